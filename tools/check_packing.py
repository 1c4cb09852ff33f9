"""Does packing isolate documents? Shown on a packed row of your own run, with its model, on its grid.

    torchrun --standalone --nproc-per-node 4 tools/check_packing.py configs/<run>.py parallel.cp=4 [owner.key=value ...]

One token of each document in turn is changed, and every value that the model gives in the row is compared with what it gave before: log p
of the next token and log Σ exp z, at each position. In the other documents not one bit may differ, in the document itself something
must. Beside it: how far the document is from itself when nothing else is in the row (rounding; not judged). Ends with status 1 when a
document is not isolated. The weights are those that the run begins with; nothing is written.
"""

import argparse
import sys
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from megamod import config
from megamod.batch import Batch
from megamod.command import command
from megamod.config import RunConfig
from megamod.data.loader import peek
from megamod.errors import MegamodError
from megamod.model.build import Decoder, build
from megamod.model.head import Head
from megamod.parallel import grid as grids
from megamod.parallel.collectives import on_first, together
from megamod.parallel.grid import Grid
from megamod.step import collect
from megamod.train import model_shape, weights_of
from megamod.weights.load import load


@dataclass(frozen=True)
class Finding:
    """What one changed token did."""

    document: int
    tokens: int
    ranks: str  # context-parallel ranks that hold the document
    others: int  # values of other documents that changed
    itself: float  # largest change in the document
    alone: float  # largest difference from the document by itself


def everywhere(batch: Batch, vocab: int) -> Batch:
    """The same row with a label at each position."""
    count = len(batch.tokens)
    every, ones = torch.arange(count), torch.ones(count)
    sequence = torch.arange(batch.sequences).repeat_interleave(torch.tensor(batch.lengths))
    return replace(batch, rows=every, labels=batch.tokens.roll(-1) % vocab, verdict=ones < 0, weight=ones, sequence=sequence)


def values(head: Head, batch: Batch) -> Tensor:
    """`[N, 2]`"""
    found = head.statistics(batch.labels)
    return torch.stack((found.logprob, found.logsumexp), -1)


def findings(cfg: RunConfig, step: int, limit: int) -> tuple[list[Finding], str]:
    """Every rank calls it. Returns what was found, empty but on the rank that reports, and what the row is. Raises MegamodError."""
    shape = model_shape(cfg)
    grid = grids.start(cfg.parallel, shape, cfg.seed)
    grids.check_rows(cfg, shape, grid.world)
    batch = everywhere(on_first(lambda: peek(cfg, shape, step)[0]), shape.vocab)
    chunks, backends = build(cfg.model, shape, grid, deterministic=cfg.deterministic)
    together(lambda: load(chunks, shape, grid, weights_of(cfg, shape), where=cfg.model.path))
    for chunk in chunks:
        chunk.requires_grad_(False)  # as a linear in 4 bits must be, its bias too
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    before = answer(chunks, batch, grid)
    found = []
    for number in tqdm(range(min(limit, batch.sequences)), unit=" documents", delay=3, disable=not grid.reports):
        last, first = ends[number], ends[number] - batch.lengths[number]
        own = slice(first, last)
        tokens = batch.tokens.clone()
        tokens[first] = (tokens[first] + 1) % shape.vocab  # every position of a document attends to its first
        after = answer(chunks, replace(batch, tokens=tokens), grid)  # the questions stay
        single = answer(chunks, alone(batch, own), grid)
        if grid.reports:
            touched = before != after
            touched[own] = False
            width = len(batch.tokens) // grid.cp.size
            ranks = f"{first // width}–{(last - 1) // width}" if first // width != (last - 1) // width else f"{first // width}"
            itself = float((after - before)[own].abs().max())
            gap = float((single[: last - first] - before[own]).abs().max())
            found.append(Finding(number + 1, last - first, ranks, int(touched.sum()), itself, gap))
    about = (
        f"{cfg.data.row_length * cfg.data.rows_per_micro_batch:,} tokens, {batch.sequences} documents · {grid} · {backends['attention']}"
    )
    grids.stop()
    return found, about


def alone(batch: Batch, own: slice) -> Batch:
    """A row of the same length with one of the documents at its beginning, its questions kept, and filler after it."""
    length, rest = own.stop - own.start, len(batch.tokens) - (own.stop - own.start)
    filler = batch.tokens.new_zeros(rest)
    return replace(
        batch,
        tokens=torch.cat((batch.tokens[own], filler)),
        labels=torch.cat((batch.labels[own], filler)),
        positions=torch.cat((torch.arange(length), torch.arange(rest))),
        lengths=(length, rest) if rest else (length,),
    )


def answer(chunks: list[Decoder], batch: Batch, grid: Grid) -> Tensor:
    """`values` at each position, on the last stage. A batch goes through the schedule alone, so that all are computed alike."""
    times = grid.pp.size if grid.vpp > 1 else 1  # interleaved stages take micro-batches by the group
    found = collect(chunks, [batch] * times, values, grid)
    return found[0] if found else torch.zeros(0)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="owner.key=value")
    parser.add_argument("--step", type=int, default=1, help="of the run, from 1 (default); its first micro-batch is taken")
    parser.add_argument("--documents", type=int, default=16, help="how many are changed, at most (default: 16)")
    args = parser.parse_intermixed_args()
    if args.documents < 1:
        raise MegamodError(f"--documents {args.documents}: at least 1 was expected")
    found, about = findings(config.load(args.config, args.overrides), args.step, args.documents)
    if found:
        Console().print(table(found, about))
    together(lambda: refuse(found))  # only one rank knows, all end alike
    if found:
        print(f"{len(found)} documents changed, each alone: all others kept every bit")
    grids.leave()


def table(found: list[Finding], about: str) -> Table:
    """A line a document."""
    result = Table(title=about)
    for name in ("document", "tokens", "cp ranks", "values changed elsewhere", "largest change in itself", "against alone"):
        result.add_column(name, justify="right")
    for f in found:
        result.add_row(str(f.document), f"{f.tokens:,}", f.ranks, str(f.others), f"{f.itself:.2g}", f"{f.alone:.1e}")
    return result


def refuse(found: list[Finding]) -> None:
    """Raises MegamodError for documents that are not isolated."""
    leaks = [f.document for f in found if f.others or not f.itself]
    if leaks:
        raise MegamodError(f"{len(leaks)} of {len(found)} documents are not isolated, the first is document {leaks[0]}")


if __name__ == "__main__":
    sys.exit(main())
