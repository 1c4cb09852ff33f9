"""Memory and time of one training step over a long packed row, shared by more and more context-parallel ranks.

    python tools/bench_context.py --tokens 32768 --cp 1,2,4

The row holds documents of uneven lengths, up to a quarter of it. Each measurement is a torchrun of its own: gloo on the CPU, where
private memory (RssAnon) is sampled; NCCL where there are GPUs, whose allocator knows its peak. Prints a table and, as the last line, one
JSON object. Ranks of one machine share its cores, so on a CPU only memory is to be compared, and time is said for completeness.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megamod import losses
from megamod.command import command
from megamod.config import ModelConfig, ParallelConfig
from megamod.data.documents import IGNORED, Document
from megamod.data.packing import micro_batch
from megamod.errors import MegamodError
from megamod.memory import Peak
from megamod.model.build import build, data_parallel
from megamod.model.shape import Shape, read_shape, shape_of
from megamod.parallel import grid as grids
from megamod.step import train_step
from megamod.weights.load import Random, load

SMALL = {
    "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4096, "max_position_embeddings": 1 << 20,
}  # fmt: skip
# glibc gives freed memory back at once, so that what is seen is what is held, and not what was.
PROMPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Measured:
    """One rank's step."""

    cp: int
    rank: int
    before: float  # MiB: the process with its model, before the step
    peak: float  # MiB
    seconds: float

    @property
    def step(self) -> float:
        """MiB that the step itself needed at its worst."""
        return self.peak - self.before


def documents(tokens: int, vocab: int, seed: int = 1) -> list[Document]:
    """Uneven documents that fill a row of `tokens`, the longest a quarter of it; the last twentieth of each is trained."""
    rng = np.random.default_rng(seed)
    made, left = [], tokens
    while left:
        length = left if left < 8 else int(min(left, max(8, rng.lognormal(np.log(tokens / 32), 1.0)), tokens // 4))
        ids = rng.integers(0, vocab, length)
        labels = np.full(length, IGNORED, dtype=np.int64)
        labels[-max(1, length // 20) :] = ids[-max(1, length // 20) :]
        made.append(Document(ids, labels, labels != IGNORED))
        left -= length
    return made


def measure(shape: Shape, tokens: int, recompute: str) -> list[Measured]:
    """One step on the ranks that torchrun launched; the second, after one that warms up. What every rank found, on all of them."""
    world = int(os.environ["WORLD_SIZE"])
    grid = grids.start(ParallelConfig(cp=world), shape)
    dtype = "bfloat16" if grid.device.type == "cuda" else "float32"
    cfg = ModelConfig(path="", dtype=dtype, recompute=recompute)  # type: ignore[arg-type]
    chunks, _ = build(cfg, shape, grid)
    load(chunks, shape, grid, Random(shape, 1), where="random weights")
    wrapped = data_parallel(chunks, grid)
    batch = micro_batch([documents(tokens, shape.vocab)], tokens)
    short = micro_batch([documents(64 * world, shape.vocab)], 64 * world)
    train_step(wrapped, [short], losses.cross_entropy, grid)
    with Peak(grid.device) as peak:
        before, began = peak.value, time.perf_counter()
        train_step(wrapped, [batch], losses.cross_entropy, grid)
    mine = Measured(world, grid.rank, before, peak.value, time.perf_counter() - began)
    found: list[Measured] = [mine] * world
    dist.all_gather_object(found, mine)
    grids.leave()
    return found


def launched(cp: int, args: argparse.Namespace) -> list[Measured]:
    """`measure` in a torchrun of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cp), __file__, "--as-rank"]
    command += ["--tokens", str(args.tokens), "--recompute", args.recompute] + (["--shape", args.shape] if args.shape else [])
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={"OMP_NUM_THREADS": "1", **os.environ, **PROMPT})
    if done.returncode:
        raise MegamodError(f"cp {cp}: a rank ended with status {done.returncode}: what it said stands above")
    return [Measured(**one) for one in json.loads(done.stdout.splitlines()[-1])]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="of the row (default: %(default)s)")
    parser.add_argument("--cp", default="1,2,4", help="context-parallel ranks to compare (default: %(default)s)")
    parser.add_argument("--shape", help="a directory with config.json; default: 2 layers of 256, 8 heads, 2 kv heads")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = read_shape(args.shape) if args.shape else shape_of(SMALL)
    if shape.longest_document is not None and args.tokens > 4 * shape.longest_document:  # the longest document is a quarter of the row
        raise MegamodError(f"--tokens {args.tokens}: this model attends to {shape.longest_document} tokens: use at most four times that")
    if args.as_rank:
        found = measure(shape, args.tokens, args.recompute)
        if os.environ["RANK"] == "0":
            print(json.dumps([asdict(one) for one in found]))
        return
    sizes = [int(n) if n.isdecimal() else 0 for n in args.cp.split(",")]
    if min(sizes) < 1 or args.tokens < 64 or any(args.tokens % n for n in sizes):
        raise MegamodError(f"--cp {args.cp} --tokens {args.tokens}: numbers of ranks that divide the tokens, at least 64, were expected")
    found = [one for cp in sizes for one in launched(cp, args)]
    base = max(one.step for one in found if one.cp == sizes[0])
    table = Table(title=f"{args.tokens:,} tokens, {shape.layers} layers of {shape.hidden}, recompute {args.recompute}")
    for name in ("cp", "tokens a rank", "process and model, MiB", "peak, MiB", "the step, MiB", f"of cp {sizes[0]}", "seconds"):
        table.add_column(name, justify="right")
    for cp in sizes:
        ranks = [one for one in found if one.cp == cp]
        before, peak, step = (max(getattr(one, name) for one in ranks) for name in ("before", "peak", "step"))
        seconds = max(one.seconds for one in ranks)
        sums = (f"{before:,.0f}", f"{peak:,.0f}", f"{step:,.0f}", f"{step / base:.2f}", f"{seconds:.1f}")
        table.add_row(str(cp), f"{args.tokens // cp:,}", *sums)
    Console().print(table)
    print(json.dumps({"tokens": args.tokens, "recompute": args.recompute, "ranks": [{**asdict(one), "step": one.step} for one in found]}))


if __name__ == "__main__":
    sys.exit(main())
