"""A dry run: any rank of any grid, on meta tensors under torch's fake process group, in seconds and without a GPU.

The rank builds its model, its gradient buffers and its optimizer, and runs its part of the schedule forward and backward with
shapes alone. What would fail at the start of a job on 128 GPUs fails here.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamod import optim
from megamod.config import RunConfig, SyntheticData
from megamod.data.documents import synthetic
from megamod.data.loader import Loader
from megamod.errors import MegamodError
from megamod.losses import needs_of
from megamod.model.build import build, data_parallel
from megamod.model.lora import Adapters, Plan
from megamod.model.shape import Shape
from megamod.optim import KINDS, Optimizer
from megamod.parallel import grid as grids
from megamod.reference import is_copy
from megamod.step import train_step
from megamod.weights.table import Placed, frozen, hf_shapes, placed


@dataclass(frozen=True)
class DryRun:
    """What one rank would hold."""

    rank: int
    place: str  # its coordinates
    layers: tuple[int, ...]  # decoder layers of each of its chunks
    parameters: int
    weight_bytes: int  # with a reference model's copy
    gradient_bytes: int
    optimizer_bytes: int  # masters (where they are copies) and moments, of this rank's share
    host_bytes: int  # the same, and gradients, where these are in host memory instead
    micro_batches: int
    seconds: float


def dry_run(cfg: RunConfig, shape: Shape, world: int, rank: int) -> DryRun:
    """Rehearse rank `rank` of `world`: one step's forward and backward. The process must not have joined a world before.

    Raises:
        MegamodError: the grid does not fit the model or the batch, or a backend cannot do what is asked.
    """
    begin = time.perf_counter()
    if not 0 <= rank < world:
        raise MegamodError(f"there is no rank {rank} in a world of {world}: ranks go from 0 to {world - 1}")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        grid = grids.start(cfg.parallel, shape, cfg.seed, device=torch.device("meta"))
        count = grids.check_rows(cfg, shape, world)
        plan = Plan.of(cfg.lora, shape) if cfg.lora is not None else None
        trained = list(plan.tensors(shape) if plan is not None else hf_shapes(shape))
        optim.check(cfg.optim, trained, grid.device, grid.dp_cp.size)
        chunks, _ = build(cfg.model, shape, grid, deterministic=cfg.deterministic)
        items: Sequence[Placed] = placed(chunks, shape, grid.tp.size, grid.tp.rank)
        if plan is not None:
            items = Adapters(chunks, shape, grid, {"planned": plan.config}, "planned").items
        wrapped = data_parallel(chunks, grid, overlap=cfg.optim.overlap_grad_reduce)
        optimizer = Optimizer(cfg.optim, wrapped, items, grid)
        d = cfg.data
        rows = grid.pp.size * grid.dp.size * d.rows_per_micro_batch  # a micro-batch for each stage
        pairs = bool({"pairs", "rated"} & needs_of(cfg.loss))
        made = SyntheticData(documents=2 * rows, mean_length=d.row_length // 2, sigma=0.0, pairs=pairs)
        loader = Loader(
            synthetic(made, shape.vocab, d.row_length, cfg.seed), row_length=d.row_length, rows_per_step=rows,
            rows_per_micro_batch=d.rows_per_micro_batch, seed=cfg.seed, dp_rank=grid.dp.rank, dp_size=grid.dp.size,
        )  # fmt: skip
        compared = build(cfg.model, shape, grid, deterministic=cfg.deterministic)[0] if is_copy(cfg) else []
        needs, nothing = needs_of(cfg.loss), torch.zeros(())
        batches = loader.step(0)
        if "reference" in needs:
            batches = [replace(batch, stored=nothing.expand(len(batch.labels))) for batch in batches]
        if "teacher" in needs:
            batches = [replace(batch, taught=nothing.expand(len(batch.labels), cfg.reference.top_k, 2)) for batch in batches]
        if "kl" in needs:
            batches = [replace(batch, divergence=nothing) for batch in batches]
        if "step" in needs:
            batches = [replace(batch, answers=batch.alone(batch.reference)) for batch in batches]
        train_step(wrapped, batches, cfg.loss, grid)
        parameters, copied = ([p for chunk in part for p in chunk.parameters()] for part in (chunks, compared))
        # What is in 4 bits or in slices, and the buffers in which each of it is made dense in its turn.
        compact = [item.weight for item in frozen([*chunks, *compared], shape, grid.tp.size, grid.tp.rank)]
        dense = sum(buffer.nbytes for buffer in {buffer for weight in compact for buffer in weight.buffers_shared})
        offload = cfg.optim.offload
        copies = [s.master for s in optimizer.segments if offload or s.master.dtype is not s.weight.dtype]
        moments = [optimizer.tensor(s, kind) for s in optimizer.segments for kind in KINDS[1:]]
        state = sum(x.nbytes for x in (*copies, *moments))
        return DryRun(
            rank=rank,
            place=f"pp {grid.pp.rank} · dp {grid.dp.rank} · cp {grid.cp.rank} · tp {grid.tp.rank}",
            layers=tuple(len(chunk.decoder.layers) for chunk in chunks),
            parameters=sum(p.numel() for p in parameters) + sum(weight.shape.numel() for weight in compact),
            weight_bytes=sum(p.numel() * p.element_size() for p in (*parameters, *copied)) + sum(w.nbytes for w in compact) + dense,
            gradient_bytes=sum(b.grad_data.numel() * b.grad_data.element_size() for chunk in wrapped for b in chunk.buffers),
            optimizer_bytes=0 if offload else state,
            host_bytes=state + sum(s.grad.nbytes for s in optimizer.segments) if offload else 0,
            micro_batches=count,
            seconds=time.perf_counter() - begin,
        )
    finally:
        grids.leave()
