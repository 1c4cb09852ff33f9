"""What a pool rank does in the parity tests: a tiny model on a grid, one step, every gradient against the oracle's."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import preferences
import rows
import tiny
import torch
from torch import Tensor

from megamod.batch import Batch
from megamod.config import Attention, ModelConfig, OptimConfig, ParallelConfig
from megamod.losses import Loss
from megamod.model.build import build, data_parallel
from megamod.model.head import Head
from megamod.optim import Optimizer, Segment
from megamod.parallel.grid import Grid, started
from megamod.reference import Reference
from megamod.step import train_step
from megamod.weights.load import Tensors, load
from megamod.weights.table import boxes


def everything(head: Head, batch: Batch) -> Loss:
    """A loss that asks all that a loss may ask: three units, a term that is not linear in a sequence, entropy, z-loss."""
    logp = head.logprobs(batch.labels)
    per_sequence = batch.per_sequence(logp)
    has_label = batch.per_sequence(torch.ones_like(logp)) > 0
    tokens = batch.mean(torch.where(batch.verdict, 4.0, 1.0).to(logp.dtype) * -logp, over="tokens")
    weights = batch.mean(-logp * batch.weight.to(logp.dtype), over="weights")
    samples = batch.mean(torch.nn.functional.softplus(-0.1 * per_sequence - 2) * has_label, over="samples")
    extras = batch.mean(1e-2 * head.logsumexp().square() - 0.1 * head.entropy(), over="tokens")
    return Loss(tokens + 0.5 * weights + samples + extras, {"nll": batch.mean_of(-logp)})


def made_rows(model: str) -> list[Batch]:
    """The rows of a case, for its ranks and for the oracle."""
    shape = tiny.shape(model)
    return rows.rows(shape.vocab, mrope=shape.rope.mrope_section is not None)


EVERYTHING = "everything"


@dataclass(frozen=True)
class Case:
    model: str
    parallel: ParallelConfig
    recompute: str = "none"
    recompute_modules: tuple[str, ...] | None = None
    dtype: str = "float64"
    micro_batches: int | None = None  # per rank; None: one, or what a pipeline needs to be one
    overlap: bool = False
    loss: str = EVERYTHING  # or one of preferences.LOSSES, with a reference model of other weights

    def count(self, grid: Grid) -> int:
        fewest = grid.pp.size if grid.vpp > 1 else min(grid.pp.size, 2)
        return self.micro_batches or min(fewest, len(rows.LENGTHS) // grid.dp.size)

    def batches(self, grid: Grid) -> list[Batch]:
        return rows.shared(made_rows(self.model), grid.dp.rank, grid.dp.size, self.count(grid))


@dataclass
class Run:
    grid: Grid
    case: Case
    optimizer: Optimizer
    metrics: dict[str, Any] = field(default_factory=dict)

    def step(self, loss: Any = everything) -> None:
        self.metrics = train_step(self.optimizer.chunks, self.case.batches(self.grid), loss, self.grid)


def prepare(case: Case, grid: Grid, optim: OptimConfig | None = None, attention: Attention = "auto", *, deterministic: bool = False) -> Run:
    shape = tiny.shape(case.model)
    recompute = {"recompute": case.recompute, "recompute_modules": case.recompute_modules}
    cfg = ModelConfig(path="", dtype=case.dtype, attention=attention, **recompute)  # type: ignore[arg-type]
    chunks, _ = build(cfg, shape, grid, deterministic=deterministic)
    items = load(chunks, shape, grid, Tensors(tiny.weights(case.model)))
    wrapped = data_parallel(chunks, grid, overlap=case.overlap)
    return Run(grid, case, Optimizer(optim or OptimConfig(), wrapped, items, grid))


def compared(run: Run) -> None:
    """A step of a preference loss, with the reference in a second model."""
    case, grid, shape = run.case, run.grid, tiny.shape(run.case.model)
    loss = preferences.LOSSES[case.loss]
    reference = Reference(preferences.config(loss), shape, grid, run.optimizer.chunks, (), None, preferences.source(case.model))
    loader = preferences.loader(case.model, grid.dp.rank, grid.dp.size, case.count(grid))
    batches = reference.complete(loader.step(0), partial(loader.mismatched, 0, grid.pp.size))
    run.metrics = train_step(run.optimizer.chunks, batches, loss, grid)


@contextmanager
def running(case: Case, optim: OptimConfig | None = None) -> Iterator[Run]:
    with started(case.parallel, tiny.shape(case.model)) as grid:
        yield prepare(case, grid, optim)


def worst(run: Run, expected: dict[str, Tensor], of: Any) -> float:
    """The largest error over this rank's segments, relative to the largest element of the whole tensor."""
    error = 0.0
    for segment in run.optimizer.segments:
        whole = expected[segment.piece.hf]
        mine = of(segment)
        for start, stop, (offset, size) in boxes(segment.piece, segment.start, segment.stop):
            there = whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
            here = mine[start - segment.start : stop - segment.start].view(size)
            off = float((here - there).abs().max() / whole.abs().max().clamp(min=1e-30))
            error = max(error, off if off == off else float("inf"))  # NaN is smaller than nothing
    return error


def gradient(segment: Segment) -> Tensor:
    return segment.grad


def owned(run: Run) -> int:
    """Elements that this rank owns: over the world they are the model's, each once."""
    return sum(s.stop - s.start for s in run.optimizer.segments if s.piece.owned)


def compare(cases: list[Case], expected_file: str) -> list[tuple[float, float, int]]:
    """For each case on this rank: error of the loss, worst error of a gradient, elements owned. Grids are reused in a row."""
    expected = torch.load(expected_file, weights_only=True)
    results = []
    for grid_cases in _by_grid(cases):
        results += _compare_on_a_grid(grid_cases, expected)
        gc.collect()  # the grid's groups: see distributed._serve
    return results


def _compare_on_a_grid(cases: list[Case], expected: dict[str, Any]) -> list[tuple[float, float, int]]:
    results = []
    with started(cases[0].parallel, tiny.shape(cases[0].model)) as grid:
        for case in cases:
            run = prepare(case, grid)
            if case.loss == EVERYTHING:
                run.step()
            else:
                compared(run)
            value, gradients = expected[case.model, case.loss]
            loss_error = abs(float(run.metrics["loss"]) - float(value)) / abs(float(value)) if run.metrics else 0.0
            results.append((loss_error, worst(run, gradients, gradient), owned(run)))
    return results


def _by_grid(cases: list[Case]) -> list[list[Case]]:
    """The model's kv heads decide which groups a grid has, so a started grid serves models of equal kv heads."""
    groups: list[list[Case]] = []
    key = None
    for case in cases:
        this = (replace(case.parallel, layers_per_stage=None), case.parallel.layers_per_stage, tiny.shape(case.model).kv_heads)
        if this != key:
            groups.append([])
            key = this
        groups[-1].append(case)
    return groups
