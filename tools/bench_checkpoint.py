"""What saving takes from training, and what checking a checkpoint costs: blocking against asynchronous, in one process, side by side.

    python tools/bench_checkpoint.py --shape configs/models/smollm2-135m --layers 8

A model of random weights trains for `--steps` steps: without saves, with one blocking save in the middle, and with one asynchronous
save, three times by turns; the state is on disk in the end of each. A save's price is what the run took longer than the one without,
whose steps are the same; the stop is what `Saver.save` itself took. Then the last checkpoint is verified and loaded. Prints a table
and, as the last line, one JSON object.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megamod import checkpoint, losses
from megamod.command import command
from megamod.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig, SyntheticData
from megamod.data.documents import synthetic
from megamod.data.packing import micro_batch
from megamod.model.build import build, data_parallel
from megamod.model.shape import read_shape
from megamod.optim import Optimizer
from megamod.parallel import grid as grids
from megamod.saver import Saver
from megamod.step import train_step
from megamod.weights.load import Random, load
from megamod.weights.table import Placed


@dataclass(frozen=True)
class Turn:
    """One run of some steps."""

    seconds: float  # until its state is on disk
    stop: float  # of them in `Saver.save`
    slowest: float  # step


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="a directory with config.json")
    parser.add_argument("--layers", type=int, help="so many of them; default: all")
    parser.add_argument("--tokens", type=int, default=256, help="of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--dir", help="where to write; default: a temporary directory")
    args = parser.parse_args()
    shape = read_shape(args.shape)
    shape = replace(shape, layers=args.layers or shape.layers)
    grid = grids.start(ParallelConfig(), shape)
    chunks, _ = build(ModelConfig(path="", dtype="float32"), shape, grid)
    items = [item for item in load(chunks, shape, grid, Random(shape, 1), where="random weights") if isinstance(item, Placed)]
    wrapped = data_parallel(chunks, grid)
    optimizer = Optimizer(OptimConfig(), wrapped, items, grid)
    made = synthetic(SyntheticData(documents=4, mean_length=args.tokens // 8), shape.vocab, args.tokens // 2, 1)
    batch = micro_batch([list(made)], args.tokens)
    group = grids.background(30)
    folder = Path(args.dir or tempfile.mkdtemp(prefix="megamod-"))

    def step() -> float:
        began = time.perf_counter()
        train_step(wrapped, [batch], losses.cross_entropy, grid)
        optimizer.step(1e-5)
        return time.perf_counter() - began

    def turn(saver: Saver | None) -> Turn:
        began, stop, slowest = time.perf_counter(), 0.0, 0.0
        for number in range(1, args.steps + 1):
            slowest = max(slowest, step())
            if number == args.steps // 2 and saver is not None:
                asked = time.perf_counter()
                saver.save(number, optimizer, {})
                stop = time.perf_counter() - asked
        if saver is not None:
            saver.finish()
        return Turn(time.perf_counter() - began, stop, slowest)

    step()
    ways = {
        "no save": None,
        "blocking": Saver(folder / "blocking", CheckpointConfig(asynchronous=False), grid, group, None, lambda line: None),
        "asynchronous": Saver(folder / "asynchronous", CheckpointConfig(), grid, group, None, lambda line: None),
    }
    for saver in ways.values():
        turn(saver)  # host memory for the copies is taken at the first save, and kept
    found: dict[str, list[Turn]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, saver in ways.items():
            found[name].append(turn(saver))

    def middle(name: str, of: str) -> float:
        return statistics.median(getattr(one, of) for one in found[name])

    path = checkpoint.latest(folder / "asynchronous")
    assert path is not None
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e9
    began = time.perf_counter()
    checkpoint.verify(path, grid)
    verified = time.perf_counter() - began
    began = time.perf_counter()
    checkpoint.resume(path, optimizer)
    resumed = time.perf_counter() - began
    table = Table(title=f"a checkpoint of {size:.2f} GB, {args.steps} steps, medians of {args.repeats}")
    for column in ("way", "run, s", "the save's price, s", "the stop, s", "slowest step, s"):
        table.add_column(column, justify="right")
    prices = {name: middle(name, "seconds") - middle("no save", "seconds") for name in ways}
    for name in ways:
        numbers = (middle(name, "seconds"), prices[name], middle(name, "stop"), middle(name, "slowest"))
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    Console().print(table)
    print(f"verified in {verified:.2f} s, {size / verified:.2f} GB/s; loaded, which checks again, in {resumed:.2f} s")
    result = {name: {"seconds": middle(name, "seconds"), "price": prices[name], "stop": middle(name, "stop")} for name in ways}
    print(json.dumps({"gigabytes": size, **result, "verify_seconds": verified, "resume_seconds": resumed}))
    if args.dir is None:
        shutil.rmtree(folder)
    grids.leave()


if __name__ == "__main__":
    sys.exit(main())
