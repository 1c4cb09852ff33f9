"""Time and memory of the head with cross-entropy on this machine's CPU, where few positions are labelled, as in moderation.

    python tools/bench_head.py
    python tools/bench_head.py --tokens 4096 --hidden 2048 --dtype bfloat16 --repeats 3

A pass is forward and backward, with gradients of the hidden states and of the vocabulary's weight:

    naive      logits of all positions, then torch's cross_entropy, which ignores those without a label
    cce        Apple's cut-cross-entropy, in the implementation that it has for a CPU ("torch_compile"); left out where
               `pip install cut-cross-entropy` was not done, or where it finds no C++ compiler
    megamod    the head of a run, as megamod/losses.py asks it

They take turns in one process after a pass each that warms up (and compiles); the best of the repeats is told. × is how many times as
fast megamod is. Where other work shares the cores seconds say little: compare CPU seconds then, "× CPU", on one thread, which waits for
no other one: --threads 1. Peak memory is that of one more pass in a process of its own: what it held at its worst, gradients included,
beyond weight and hidden states. Errors are relative to naive: of the loss, and of the gradients as ‖x - naive‖ / ‖naive‖. Prints a
table and, as the last line, one JSON object.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megamod.command import command
from megamod.data.documents import IGNORED
from megamod.errors import MegamodError
from megamod.model.head import Head

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [T, C], weight [V, C], labels [T] → the labelled positions' mean
NAIVE, CCE, OURS = "naive", "cce", "megamod"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# glibc gives freed memory back at once, so that what is seen is what is held, and not what was.
PROMPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="positions of a row (default: %(default)s)")
    parser.add_argument("--labelled", type=float, default=0.08, help="share of them that have a label (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=896, help="size of a hidden state (default: %(default)s, Qwen2.5-0.5B's)")
    parser.add_argument("--vocab", type=int, default=152064, help="default: %(default)s, that of Qwen2.5's larger models")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="the best of so many is told (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s, the cores")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--as-one", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check(args)
    torch.set_num_threads(args.threads)
    losses: dict[str, Loss] = {NAIVE: naive, OURS: ours}
    their_loss, why_not = theirs()
    if their_loss is not None:
        losses = {NAIVE: naive, CCE: their_loss, OURS: ours}
    inputs = made(args)
    if args.as_one:
        print(json.dumps(peak_of(losses[args.as_one], *inputs)))
        return
    errors, failed = warmed_up(losses, *inputs)
    found = timed(losses, args.repeats, *inputs)
    settings = {name: getattr(args, name) for name in vars(args) if name != "as_one"}
    for name, one in found.items():
        one |= {"peak_mib": launched(name, settings), "error": errors[name]}
    others = [name for name in found if name != OURS]
    ratios, cpu_ratios = ({name: found[name][seconds] / found[OURS][seconds] for name in others} for seconds in ("seconds", "cpu_seconds"))
    labelled = int((inputs[2] != IGNORED).sum())
    console = Console(highlight=False)
    console.print(shown(found, ratios, cpu_ratios, args, labelled))
    if why_not := why_not or failed:
        console.print(why_not, soft_wrap=True)
    versions = {"torch": torch.__version__} | ({} if their_loss is None else {"cut-cross-entropy": version("cut-cross-entropy")})
    answer = {"settings": settings, "labelled": labelled, "versions": versions, "cce": why_not or "measured"}
    print(json.dumps({**answer, "found": found, "ratios": ratios, "cpu_ratios": cpu_ratios}))


def check(args: argparse.Namespace) -> None:
    """Raises MegamodError for a value that means nothing."""
    for option in ("tokens", "hidden", "vocab", "repeats", "threads"):
        if (value := getattr(args, option)) < 1:
            raise MegamodError(f"--{option} {value}: at least 1 was expected")
    if not 0 < args.labelled <= 1:
        raise MegamodError(f"--labelled {args.labelled}: above 0 and at most 1 was expected")


def made(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[T, C]` and a weight `[V, C]` that make logits of about 1, and labels `[T]`, at random positions."""
    generator = torch.Generator().manual_seed(args.seed)
    hidden = torch.randn(args.tokens, args.hidden, generator=generator)
    weight = torch.randn(args.vocab, args.hidden, generator=generator) * args.hidden**-0.5
    labels = torch.full((args.tokens,), IGNORED)
    at = torch.randperm(args.tokens, generator=generator)[: max(1, round(args.labelled * args.tokens))]
    labels[at] = torch.randint(args.vocab, at.shape, generator=generator)
    return hidden.to(DTYPES[args.dtype]).requires_grad_(), weight.to(DTYPES[args.dtype]).requires_grad_(), labels


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, ignore_index=IGNORED)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows = (labels != IGNORED).nonzero()[:, 0]
    return -Head(hidden, weight, len(weight), rows).logprobs(labels[rows]).mean()


def theirs() -> tuple[Loss | None, str]:
    """Apple's loss; or None, and why."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        return None, f"without Apple's cut-cross-entropy: {error}"

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, impl="torch_compile")

    return loss, ""


def passed(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """One pass: gradients are left in the inputs, the loss is returned."""
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, labels)
    value.backward()
    return float(value.detach())


def warmed_up(losses: dict[str, Loss], hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[dict[str, dict[str, float]], str]:
    """A pass of each, and how far each is from naive, the first. What cannot run here leaves `losses`, and the second says why."""
    errors: dict[str, dict[str, float]] = {}
    expected: list[Tensor] = []
    failed = ""
    for name, loss in list(losses.items()):
        try:
            value = passed(loss, hidden, weight, labels)
        except Exception as error:
            if name != CCE:
                raise
            del losses[name]
            failed = f"without Apple's cut-cross-entropy: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        assert hidden.grad is not None
        assert weight.grad is not None
        found = [torch.tensor(value, dtype=torch.float64), hidden.grad, weight.grad]
        expected = expected or found
        distances = (float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))
        errors[name] = dict(zip(("loss", "hidden", "weight"), distances, strict=True))
    return errors, failed


def timed(losses: dict[str, Loss], repeats: int, hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, dict[str, Any]]:
    """Seconds and CPU seconds of a pass of each, which take turns."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": math.inf, "cpu_seconds": math.inf, "each": []} for name in losses}
    for _ in range(repeats):
        for name, loss in losses.items():
            hidden.grad = weight.grad = None  # to give memory back is not part of a pass
            begin, cpu = time.perf_counter(), time.process_time()
            passed(loss, hidden, weight, labels)
            seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
            one = found[name]
            one["each"].append(seconds)
            one["seconds"], one["cpu_seconds"] = min(one["seconds"], seconds), min(one["cpu_seconds"], cpu)
    return found


def launched(name: str, settings: dict[str, Any]) -> float | None:
    """`peak_of` in a process of its own, so that what others held before is not seen."""
    options = [part for option, value in settings.items() for part in (f"--{option}", str(value))]
    done = subprocess.run(
        [sys.executable, __file__, *options, "--as-one", name], capture_output=True, text=True, env={**os.environ, **PROMPT}
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise MegamodError(f"{name}: its process ended with status {done.returncode}: what it said stands above")
    peak: float | None = json.loads(done.stdout.splitlines()[-1])
    return peak


def peak_of(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> float | None:
    """MiB that a pass holds at its worst beyond what was there before it; None where the system does not say."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    passed(loss, hidden, weight, labels)
    hidden.grad = weight.grad = None
    reset.write_text("5", encoding="ascii")  # the peak is from here on
    before = status.read_text(encoding="ascii")
    passed(loss, hidden, weight, labels)
    after = status.read_text(encoding="ascii")
    return (int(after.partition("VmHWM:")[2].split()[0]) - int(before.partition("VmRSS:")[2].split()[0])) / 1024


def shown(
    found: dict[str, dict[str, Any]], ratios: dict[str, float], cpu_ratios: dict[str, float], args: argparse.Namespace, labelled: int
) -> Table:
    """A line for each contender."""
    title = (
        f"head and loss: V {args.vocab:,}, C {args.hidden}, {labelled} of {args.tokens:,} labelled, {args.dtype}, {args.threads} threads"
    )
    table = Table(title=title, box=SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for column in ("s", "CPU s", "×", "× CPU", "peak MiB", "loss error", "dh error", "dW error"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in found.items():
        table.add_row(
            name, f"{one['seconds']:.3f}", f"{one['cpu_seconds']:.3f}",
            *((f"{ratio[name]:.2f}" if name in ratio else "") for ratio in (ratios, cpu_ratios)),
            "?" if one["peak_mib"] is None else f"{one['peak_mib']:,.0f}",
            *("" if name == NAIVE else f"{error:.0e}" for error in one["error"].values()),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
