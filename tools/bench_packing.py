"""Time the packers on made-up lengths, and say how full their rows are and how even the data-parallel ranks' shares.

python tools/bench_packing.py --documents 1000000 --capacity 4096 8192 32768

Lengths are log-normal, as a chat set's are, cut off at the capacity. megamod's `pack` and TRL's best fit decreasing (where trl can be
imported) take turns on the same lengths in one process; TRL's seconds are without those in which pyarrow moves tokens, which are
`moving_seconds` in the JSON. Shares are a step's rows dealt to data-parallel ranks: the costliest rank's Σ length² over the mean,
averaged over steps. The last line is one JSON object.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megamod.command import command
from megamod.data.loader import deal
from megamod.data.packing import StreamPacker, attention_costs, pack
from megamod.errors import MegamodError

Lengths = npt.NDArray[np.int64]
Packer = Callable[[Lengths, int], tuple[int, float, float]]  # lengths, capacity → rows; seconds and CPU seconds that do not count
MOST_STEPS = 200  # that shares are averaged over


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--capacity", type=int, nargs="+", default=[4096], help="tokens of a row; several give several tables' rows")
    parser.add_argument("--mean", type=float, default=600.0, help="tokens of a document, before the cut (default: %(default)s)")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lengths' logarithms (default: %(default)s)")
    parser.add_argument("--look-ahead", type=int, default=10_000, help="documents that the stream's packer holds (default: %(default)s)")
    parser.add_argument("--dp", type=int, nargs="+", default=[4, 8, 16], help="data-parallel ranks (default: 4 8 16)")
    parser.add_argument("--rows-per-step", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--rows-per-micro-batch", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="the best of so many is told (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    check(args)
    theirs, why_not = trl_packer()
    results = [measured(args, capacity, theirs) for capacity in args.capacity]
    console = Console(highlight=False)
    console.print(packers(results))
    console.print(shares(results))
    if why_not:
        console.print(why_not, soft_wrap=True)
    asked = {name: getattr(args, name) for name in ("documents", "mean", "sigma", "seed", "repeats")}
    print(json.dumps({**asked, "trl": why_not or "measured", "results": results}))


def check(args: argparse.Namespace) -> None:
    """Raises MegamodError for a value that means nothing."""
    for option in ("documents", "capacity", "look_ahead", "dp", "rows_per_step", "rows_per_micro_batch", "repeats"):
        value = getattr(args, option)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise MegamodError(f"--{option.replace('_', '-')} {value}: at least 1 was expected")
    if not (1 <= args.mean < math.inf and 0 <= args.sigma < math.inf and args.seed >= 0):
        raise MegamodError(f"--mean {args.mean} --sigma {args.sigma} --seed {args.seed}: at least 1, 0 and 0, finite, were expected")
    for dp in args.dp:
        if args.rows_per_step % (dp * args.rows_per_micro_batch):
            raise MegamodError(
                f"--rows-per-step {args.rows_per_step}: a multiple of {dp * args.rows_per_micro_batch} was expected, for {dp} ranks"
            )


class Clock:
    """Stands before a module: keeps the time that its functions take."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.seconds = self.cpu_seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)

        def timed(*args: Any, **options: Any) -> Any:
            begin, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - begin
                self.cpu_seconds += time.process_time() - cpu

        return timed


def trl_packer() -> tuple[Packer | None, str]:
    """TRL's packer; or None, and why. What pyarrow does for it is moving tokens, which `pack` does not do: that is told apart."""
    try:
        import pyarrow as pa
        import trl
        from trl import data_utils
        from trl.data_utils import _pack_bfd, pc
    except ImportError as error:
        return None, f"without TRL's packer: {error}"

    def packer(lengths: Lengths, capacity: int) -> tuple[int, float, float]:
        borders = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
        documents = pa.LargeListArray.from_arrays(borders, pa.nulls(int(lengths.sum())))  # tokens that take no memory
        table = pa.Table.from_arrays([documents], names=["input_ids"])
        with patch.object(data_utils, "pc", Clock(pc)) as moving:
            rows = _pack_bfd(table, capacity).num_rows
        return rows, moving.seconds, moving.cpu_seconds

    packer.__name__ = f"TRL {trl.__version__}"
    return packer, ""


def measured(args: argparse.Namespace, capacity: int, theirs: Packer | None) -> dict[str, Any]:
    """Every packer on the same lengths, and the shares of the rows that `pack` makes."""
    rng = np.random.default_rng(args.seed)
    mu = math.log(args.mean) - args.sigma**2 / 2  # a log-normal's mean is exp(mu + sigma²/2)
    lengths = np.clip(np.rint(rng.lognormal(mu, args.sigma, args.documents)), 1, capacity).astype(np.int64)
    costs = attention_costs(pack(lengths, capacity), lengths, capacity)
    if len(costs) < args.rows_per_step:
        raise MegamodError(f"{len(costs)} rows of {capacity} tokens are no step of {args.rows_per_step}: use more --documents")
    listed = lengths.tolist()  # a stream gives integers
    contestants: dict[str, Callable[[], tuple[int, float, float]]] = {
        "pack": lambda: (len(pack(lengths, capacity)), 0.0, 0.0),
        f"stream {args.look_ahead:,}": lambda: (sum(1 for _ in StreamPacker(listed, capacity, args.look_ahead)), 0.0, 0.0),
    }
    if theirs:
        contestants[theirs.__name__] = lambda: theirs(lengths, capacity)

    found: dict[str, dict[str, Any]] = {
        name: {"seconds": math.inf, "cpu_seconds": math.inf, "moving_seconds": math.inf} for name in contestants
    }
    for _ in range(args.repeats):
        for name, contestant in contestants.items():
            begin, cpu = time.perf_counter(), time.process_time()
            rows, moving, moving_cpu = contestant()
            seconds, cpu = time.perf_counter() - begin - moving, time.process_time() - cpu - moving_cpu
            best = found[name]
            for key, value in (("seconds", seconds), ("cpu_seconds", cpu), ("moving_seconds", moving)):
                best[key] = min(best[key], value)
            best["rows"], best["utilisation"] = rows, int(lengths.sum()) / (rows * capacity)
    for best in found.values():
        best["ratio"] = best["seconds"] / found["pack"]["seconds"]
        best["cpu_ratio"] = best["cpu_seconds"] / found["pack"]["cpu_seconds"]
    return {"capacity": capacity, "packers": found, "shares": [dealt(args, costs, dp) for dp in args.dp]}


def dealt(args: argparse.Namespace, costs: Lengths, dp: int) -> dict[str, Any]:
    """The costliest rank over the mean: in turns, by `deal`, and what no deal can be below, since a row is read by one rank."""
    steps = min(MOST_STEPS, len(costs) // args.rows_per_step)
    stream = np.random.default_rng([args.seed, 0]).permutation(len(costs))
    turns, evened, least = [], [], []
    for rows in stream[: steps * args.rows_per_step].reshape(steps, -1):
        step = costs[rows]
        mean = step.sum() / dp
        turns.append(step.reshape(-1, dp, args.rows_per_micro_batch).sum((0, 2)).max() / mean)
        batches = np.array([step[group].sum() for group in deal(step, len(step) // args.rows_per_micro_batch)])
        evened.append(max(batches[hand].sum() for hand in deal(batches, dp)) / mean)
        least.append(max(1.0, step.max() / mean))
    means = {"in_turns": float(np.mean(turns)), "dealt": float(np.mean(evened)), "least": float(np.mean(least))}
    return {"dp": dp, "rows_per_step": args.rows_per_step, "rows_per_micro_batch": args.rows_per_micro_batch, "steps": steps, **means}


def packers(results: Sequence[dict[str, Any]]) -> Table:
    """A line for each packer and capacity."""
    table = Table("capacity", "packer", title="packing", box=SIMPLE)
    for column in ("rows", "full", "s", "CPU s", "×", "× CPU"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        for name, one in result["packers"].items():
            table.add_row(
                f"{result['capacity']:,}", name, f"{one['rows']:,}", f"{one['utilisation']:.6f}",
                f"{one['seconds']:.3f}", f"{one['cpu_seconds']:.3f}", f"{one['ratio']:.1f}", f"{one['cpu_ratio']:.1f}",
            )  # fmt: skip
        table.add_section()
    return table


def shares(results: Sequence[dict[str, Any]]) -> Table:
    """A line for each number of ranks and capacity."""
    table = Table("capacity", title="costliest rank's Σ length² over the mean", box=SIMPLE)
    for column in ("dp", "rows/step", "rows/batch", "steps", "in turns", "dealt", "at least"):
        table.add_column(column, justify="right")
    for result in results:
        for one in result["shares"]:
            table.add_row(
                f"{result['capacity']:,}", *(str(one[name]) for name in ("dp", "rows_per_step", "rows_per_micro_batch", "steps")),
                *(f"{one[name]:.3f}" for name in ("in_turns", "dealt", "least")),
            )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
