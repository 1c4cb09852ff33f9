"""One step: micro-batches through the pipeline, gradients finished. The one file that speaks megatron-core's schedule contract.

megatron-core's schedule (1F1B, or interleaved with virtual stages) calls `forward_step` for each micro-batch and chunk, and on
the last stage the function it returns. That function makes a Head of the hidden states and calls the loss.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megamod.batch import UNITS, Batch, Mean
from megamod.errors import MegamodError
from megamod.losses import Loss, LossFunction
from megamod.model.build import Decoder
from megamod.model.head import Head
from megamod.parallel.collectives import gathered
from megamod.parallel.grid import Grid

Metrics = dict[str, Mean]
Chunks = Sequence[DistributedDataParallel | Decoder]  # a rank's, bare or wrapped
# what a schedule takes of a micro-batch on the last stage: an objective for backward, megatron-core's count, and what to keep
Kept = TypeVar("Kept")
OnLastStage = Callable[[Tensor], tuple[Tensor, Tensor, Any]]
Ask = Callable[[Head, Batch], tuple[Tensor, Kept]]  # an objective, and what to keep


def forward_step(batches: Iterator[Batch], chunk: torch.nn.Module, *, grid: Grid, ask: Ask[Any]) -> tuple[Tensor, OnLastStage]:
    """megatron-core's forward step: the next micro-batch through one chunk, and what to do with the last one's output."""
    batch = next(batches).slice(grid.cp.rank, grid.cp.size, grid.cp.group).to(grid.device)
    return chunk(batch), partial(_on_last_stage, chunk=chunk, batch=batch, ask=ask)


def _on_last_stage(hidden: Tensor, *, chunk: torch.nn.Module, batch: Batch, ask: Ask[Any]) -> tuple[Tensor, Tensor, Any]:
    objective, kept = ask(_bare(chunk).head(hidden, batch), batch)
    no_tokens = torch.zeros((), dtype=torch.int, device=hidden.device)  # megatron-core counts none: batch.mean has
    return objective, no_tokens, kept


def _objective(head: Head, batch: Batch, *, loss: LossFunction) -> tuple[Tensor, Metrics]:
    value, metrics = _checked(loss(head, batch))
    share = Mean(value.detach(), torch.zeros_like(value))  # already divided: its count of 1 is added once, in `_totalled`
    # A constant that is not finite would go unseen by the gradients, whose norm tells every rank whether the step counts.
    return value * torch.where(value.detach().isfinite(), 1.0, torch.nan), {"loss": share, **metrics}


def _checked(result: Loss) -> Loss:
    """What a researcher's function returned, or a line that says what it should have been."""
    if not isinstance(result, Loss):
        raise MegamodError(f"the loss returned {type(result).__name__}: return Loss(value, metrics)")
    if not isinstance(result.value, Tensor) or result.value.dim():
        shape = list(result.value.shape) if isinstance(result.value, Tensor) else type(result.value).__name__
        raise MegamodError(f"the loss's value is {shape}, a scalar was expected: sum it with batch.mean(x, over=...)")
    for name, metric in result.metrics.items():
        if not isinstance(metric, Mean):
            raise MegamodError(f"the loss's metric {name!r} is {type(metric).__name__}: make it with batch.mean_of(x)")
    return result


def train_step(
    chunks: Sequence[DistributedDataParallel], batches: Sequence[Batch], loss: LossFunction, grid: Grid
) -> dict[str, float | Tensor]:
    """Forward and backward over this data-parallel rank's micro-batches. Gradients are then final, in `param.main_grad`.

    Args:
        chunks: the rank's model chunks, as `model.build.data_parallel` wraps them.
        batches: micro-batches of equal length in tokens, the same on the ranks of tp, pp and cp.
        loss: of `losses.py`, or any function of that signature.

    Returns:
        On the last stage, the metrics of the whole step: `loss` (the objective) and the loss's own; empty elsewhere.
    """
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    return _metrics(chunks, batches, loss, grid, forward_only=False)


@torch.no_grad()
def eval_step(chunks: Chunks, batches: Sequence[Batch], loss: LossFunction, grid: Grid) -> dict[str, float | Tensor]:
    """The same metrics without gradients."""
    for chunk in chunks:
        chunk.eval()
    return _metrics(chunks, batches, loss, grid, forward_only=True)


@torch.no_grad()
def collect(chunks: Chunks, batches: Sequence[Batch], ask: Callable[[Head, Batch], Tensor], grid: Grid) -> list[Tensor]:
    """Ask the head about micro-batches, forward only, dropout off: what references, batch statistics and verdicts come from.

    Args:
        chunks: the rank's model chunks, bare or wrapped.
        batches: as in `train_step`; their `rows` ascend.
        ask: gives `[N, …]`, one entry for each labelled position of the batch that it is handed.

    Returns:
        On the last stage `ask`'s answers for each micro-batch, on the CPU, in the order of the whole batch's `rows`, the same on
        every rank of tp and cp; an empty list elsewhere.
    """
    for chunk in chunks:
        chunk.eval()

    def asked(head: Head, batch: Batch) -> tuple[Tensor, Tensor]:
        return torch.zeros((), device=batch.tokens.device), ask(head, batch).cpu()

    answers: list[Tensor] = _run(chunks, batches, asked, grid, forward_only=True)
    if not grid.is_last_stage or grid.cp.size == 1:
        return answers
    shares = gathered(answers, grid.cp.group)  # a rank's positions follow those of the rank before it
    return [torch.cat(parts) for parts in zip(*shares, strict=True)]


def collect_rows(
    chunks: Chunks, rows: Sequence[Sequence[int]], made: Callable[[Sequence[int]], Batch], ask: Callable[[Head, Batch], Tensor], grid: Grid
) -> list[npt.NDArray[Any]]:
    """`collect` of packed rows that every rank knows: data-parallel ranks take them in turns, and all have all the answers.

    Args:
        rows: what each row holds, documents' numbers.
        made: a row's micro-batch; also of no documents, since stages of the interleaved schedule ask for so many micro-batches.
    """
    shares = [*rows, *[[]] * (-len(rows) % (grid.dp.size * grid.pp.size))][grid.dp.rank :: grid.dp.size]
    answers = collect(chunks, [made(row) for row in shares], ask, grid)
    speaks = grid.is_last_stage and grid.tp.rank == 0 and grid.cp.rank == 0
    told = gathered((grid.dp.rank, [answer.numpy() for answer in answers]) if speaks else None)
    by_rank = dict(one for one in told if one is not None)
    return [by_rank[n % grid.dp.size][n // grid.dp.size] for n in range(len(rows))]


def _metrics(
    chunks: Sequence[torch.nn.Module], batches: Sequence[Batch], loss: LossFunction, grid: Grid, *, forward_only: bool
) -> dict[str, float | Tensor]:
    collected = _run(chunks, with_totals(batches, grid), partial(_objective, loss=loss), grid, forward_only=forward_only)
    return _totalled(collected, grid) if grid.is_last_stage else {}


def _run(chunks: Sequence[torch.nn.Module], batches: Sequence[Batch], ask: Ask[Kept], grid: Grid, *, forward_only: bool) -> list[Kept]:
    """The micro-batches through megatron-core's schedule; on the last stage, what `ask` keeps of each."""
    schedule = get_forward_backward_func(pp_size=grid.pp.size, vp_size=grid.vpp if grid.vpp > 1 else None)
    iterators = [iter(batches) for _ in chunks]  # each chunk sees every micro-batch
    collected: list[Kept] = schedule(
        forward_step_func=partial(forward_step, grid=grid, ask=ask),
        data_iterator=iterators,
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=len(batches[0].tokens),  # the schedule itself divides by cp, and by tp under sp
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(grid.pp.group, _bare(chunks[0]).config),
        pg_collection=grid.groups,
    )
    return collected


def with_totals(batches: Sequence[Batch], grid: Grid) -> list[Batch]:
    """The micro-batches with the step's global counts, known before any forward pass: one all-reduce."""
    counts = [batch.counts() for batch in batches]
    local = torch.stack([sum((c[unit] for c in counts), torch.zeros((), dtype=torch.float64)) for unit in UNITS])
    local = local if grid.device.type == "meta" else local.to(grid.device)  # on meta tensors nothing could be read back
    dist.all_reduce(local, group=grid.dp.group)
    totals = dict(zip(UNITS, local.tolist(), strict=True))
    return [replace(batch, totals=totals) for batch in batches]


def _totalled(collected: Sequence[Metrics], grid: Grid) -> dict[str, float | Tensor]:
    """Sum ÷ count of each metric over micro-batches and ranks, as scalars on the device; one all-reduce."""
    names = list(collected[0])
    pairs = torch.stack([torch.stack([torch.stack([m[name].sum, m[name].count]).double() for m in collected]).sum(0) for name in names])
    dist.all_reduce(pairs, group=grid.dp_cp.group)
    pairs[names.index("loss"), 1] = 1.0
    return dict(zip(names, (pairs[:, 0] / pairs[:, 1]).unbind(), strict=True))


def _bare(chunk: torch.nn.Module) -> Decoder:
    model = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
    assert isinstance(model, Decoder)
    return model
