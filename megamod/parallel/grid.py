"""The grid: which ranks share what. `start` is the only caller of megatron-core's parallel_state.

Ranks are laid out `[pp, dp, cp, tp]`, tp fastest (megatron-core's order "tp-cp-ep-dp-pp"): the ranks that talk most are
neighbours, on the fastest links. Everything else receives the Grid and reads sizes, ranks and groups from it.
"""

import hashlib
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import distributed_c10d

from megamod import versions
from megamod.errors import MegamodError
from megamod.model.shape import Shape
from megamod.parallel import cpu

if TYPE_CHECKING:
    from megamod.config import ParallelConfig, RunConfig


@dataclass(frozen=True)
class Axis:
    """One direction of the grid: how many ranks it has, which one this is, and the group that joins them."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Grid:
    """This rank's place among all, and who shares what with it."""

    rank: int
    world: int
    tp: Axis  # tensor parallelism
    pp: Axis  # pipeline parallelism
    cp: Axis  # context parallelism: one row's tokens
    ulysses: Axis  # neighbours in cp, which share the heads: all of cp while there are heads enough
    kv_gather: Axis | None  # of cp, those that hold the same heads of other stretches, when cp exceeds what the heads allow
    dp: Axis  # data parallelism: different rows
    dp_cp: Axis  # dp × cp: the ranks over which gradients are summed and the optimizer is sharded
    base_shards: Axis | None  # of dp × cp, when each rank keeps a slice of the frozen base that all of them need; else None
    vpp: int  # model chunks per pipeline rank
    sp: bool
    tp_comm_overlap: bool  # whether linears send to tp's ranks while they multiply
    layers_per_stage: tuple[int, ...]  # decoder layers of the pp × vpp stages, in pipeline order
    device: torch.device
    groups: ProcessGroupCollection
    kv_copies: dist.ProcessGroup | None  # the TP ranks that hold the same kv head, when tp > kv heads

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1

    @property
    def reports(self) -> bool:
        """Whether this is the one rank that knows the loss and says so: on the last stage, first of tp, cp and dp."""
        return self.is_last_stage and self.tp.rank == self.dp_cp.rank == 0

    def __str__(self) -> str:
        extra = (f" · vpp {self.vpp}" if self.vpp > 1 else "") + (" · sp" if self.sp else "")
        extra += f" · base in {self.base_shards.size} slices" if self.base_shards is not None else ""
        cp = f"{self.cp.size}" + (f" (ulysses {self.ulysses.size} × {self.kv_gather.size})" if self.kv_gather is not None else "")
        return f"tp {self.tp.size} · pp {self.pp.size} · cp {cp} · dp {self.dp.size}{extra}"


def even_split(layers: int, stages: int) -> tuple[int, ...] | None:
    """`layers` over `stages` evenly; None when that is impossible."""
    return (layers // stages,) * stages if layers % stages == 0 else None


def check(cfg: "ParallelConfig", shape: Shape, world: int) -> tuple[int, ...]:
    """Refuse a grid on which the model cannot be cut, naming the nearest that can. Returns the layers of each stage.

    Raises:
        MegamodError: one line.
    """
    ranks = cfg.tp * cfg.pp * cfg.cp
    if world % ranks:
        below = world // ranks * ranks
        near = f"{below} or {below + ranks}" if below else f"{ranks}"
        raise MegamodError(f"tp {cfg.tp} × pp {cfg.pp} × cp {cfg.cp} = {ranks} does not divide {world} ranks: launch {near}")
    if cfg.shard_base and world == cfg.tp * cfg.pp:
        more = f"launch {2 * world} ranks" + (" or use a smaller tp or pp" if world > 1 else "")
        raise MegamodError(f"parallel.shard_base: dp × cp is 1, and nobody shares a rank's part of the base: {more}")

    def fits_tp(n: int) -> bool:
        kv = shape.kv_heads % n == 0 or n % shape.kv_heads == 0
        return kv and shape.heads % n == 0 and shape.ffn % n == 0

    if not fits_tp(cfg.tp):
        raise MegamodError(
            f"parallel.tp = {cfg.tp} cannot cut {shape.heads} heads, {shape.kv_heads} kv heads and ffn {shape.ffn}: "
            f"use {_around(cfg.tp, fits_tp, shape.heads)}"
        )
    stages = cfg.pp * cfg.vpp
    if cfg.layers_per_stage is None:
        split = even_split(shape.layers, stages)
        if split is None:
            near = _around(stages, lambda n: shape.layers % n == 0, shape.layers)
            raise MegamodError(
                f"{shape.layers} layers cannot be split evenly over pp {cfg.pp} × vpp {cfg.vpp} = {stages} stages: use {near} "
                f"stages, or set parallel.layers_per_stage"
            )
        return split
    split = cfg.layers_per_stage
    if len(split) != stages or sum(split) != shape.layers or min(split) < 0:
        raise MegamodError(
            f"parallel.layers_per_stage = {split}: {stages} numbers (pp {cfg.pp} × vpp {cfg.vpp}) that sum to {shape.layers} "
            f"layers were expected, not {len(split)} that sum to {sum(split)}"
        )
    return split


def kv_repeats(heads: int, kv_heads: int, cp: int) -> int | None:
    """How often a rank's kv heads are repeated so that `cp` Ulysses ranks share them evenly; None where they cannot.

    1 while cp divides the kv heads. The query heads must divide over the repeated kv heads.
    """
    if heads % cp:
        return None
    for repeats in range(1, cp + 1):
        if kv_heads * repeats % cp == 0:
            return repeats if heads % (kv_heads * repeats) == 0 else None
    return None


def ulysses_degree(heads: int, kv_heads: int, cp: int) -> int:
    """How many of `cp` ranks share the heads that tp leaves a rank: the most that divide cp and can. Any cp is possible with 1."""
    return max(n for n in range(1, cp + 1) if cp % n == 0 and kv_repeats(heads, kv_heads, n) is not None)


def ulysses_of(cfg: "ParallelConfig", shape: Shape) -> int:
    """How many of the cp ranks share the heads that tp leaves a rank."""
    return ulysses_degree(shape.heads // cfg.tp, max(1, shape.kv_heads // cfg.tp), cfg.cp)


def _around(value: int, fits: object, top: int) -> str:
    """The nearest number that fits below and above `value`: '4 or 8'."""
    assert callable(fits)
    below = next((n for n in range(min(value - 1, top), 0, -1) if fits(n)), None)
    above = next((n for n in range(value + 1, top + 1) if fits(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def check_rows(cfg: "RunConfig", shape: Shape, world: int) -> int:
    """Refuse batches that the grid cannot share, and rows that the model cannot attend to. Returns micro-batches per step."""
    p, d = cfg.parallel, cfg.data
    parts = p.cp * (p.tp if p.sp else 1)
    unit = parts // math.gcd(parts, d.rows_per_micro_batch)  # a micro-batch's tokens are shared, so one row's need not divide
    bound = shape.longest_document
    if bound is not None and d.row_length > bound:
        raise MegamodError(
            f"data.row_length = {d.row_length}: this model's attention is plain causal attention only up to {bound} tokens, "
            f"its window: use at most {bound // unit * unit or bound}"
        )
    if d.row_length % unit:
        what = f"cp {p.cp}" + (f" × tp {p.tp} (sp)" if p.sp else "")
        below = d.row_length // unit * unit
        near = " or ".join(str(n) for n in (below, below + unit) if n and (bound is None or n <= bound))
        raise MegamodError(f"data.row_length = {d.row_length} cannot be shared by {what}: use {near or 'a smaller grid'}")
    dp = world // (p.tp * p.pp * p.cp)
    group = dp * d.rows_per_micro_batch * (p.pp if p.vpp > 1 else 1)
    if d.rows_per_step % group:
        what = f"dp {dp} × {d.rows_per_micro_batch} rows a micro-batch" + (f" × pp {p.pp} (vpp)" if p.vpp > 1 else "")
        below = d.rows_per_step // group * group
        near = f"{below} or {below + group}" if below else f"{group}"
        raise MegamodError(f"data.rows_per_step = {d.rows_per_step} cannot be shared by {what}: use {near}")
    return d.rows_per_step // (dp * d.rows_per_micro_batch)


def start(cfg: "ParallelConfig", shape: Shape, seed: int = 1, device: torch.device | None = None) -> Grid:
    """Join the processes that torchrun launched (or this one alone) and lay the grid over them.

    Args:
        cfg: the sizes.
        shape: the model, which decides what can be cut and which ranks share kv heads.
        seed: of the random-number tracker.
        device: cpu and meta stand for CUDA through `parallel.cpu`; None: this process's GPU if there is one, else cpu.

    Raises:
        MegamodError: the grid does not fit the model or the number of ranks.
    """
    versions.check()
    device = device or _own_device()
    if device.type != "cuda":
        cpu.install(device)
    join(cfg.timeout_minutes, device)
    world = dist.get_world_size()
    split = check(cfg, shape, world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=cfg.tp,
        pipeline_model_parallel_size=cfg.pp,
        virtual_pipeline_model_parallel_size=cfg.vpp if cfg.vpp > 1 else None,
        context_parallel_size=cfg.cp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=cfg.timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()

    def axis(group: dist.ProcessGroup) -> Axis:
        return Axis(group.size(), group.rank(), group)

    tp, dp_cp = axis(groups.tp), axis(groups.dp_cp)
    ulysses, kv_gather = _halves_of_cp(cfg, shape, axis(groups.cp), world)
    return Grid(
        rank=dist.get_rank(),
        world=world,
        tp=tp,
        pp=axis(groups.pp),
        cp=axis(groups.cp),
        ulysses=ulysses,
        kv_gather=kv_gather,
        dp=axis(groups.dp),
        dp_cp=dp_cp,
        base_shards=dp_cp if cfg.shard_base else None,
        vpp=cfg.vpp,
        sp=cfg.sp,
        tp_comm_overlap=cfg.tp_comm_overlap,
        layers_per_stage=split,
        device=device,
        groups=groups,
        kv_copies=_kv_copies(cfg.tp, shape.kv_heads, world, cfg.timeout_minutes),
    )


def background(timeout_minutes: int) -> dist.ProcessGroup:
    """A group of all ranks for a thread beside the steps; on the CPU, whatever the device. Every rank calls it."""
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
    assert group is not None
    return group


def stop() -> None:
    """Forget the grid and free every group but the world's; the processes stay joined. For worlds that outlive a grid."""
    parallel_state.destroy_model_parallel()  # forgets its groups but frees none: each would keep its threads
    for group in [g for g in distributed_c10d._world.pg_map if g is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def leave() -> None:
    """Leave the world. Call once, at the end of the process."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def started(cfg: "ParallelConfig", shape: Shape, seed: int = 1, device: torch.device | None = None) -> Iterator[Grid]:
    """`with started(cfg, shape) as grid:` — start, and stop whatever happens."""
    grid = start(cfg, shape, seed, device)
    try:
        yield grid
    finally:
        stop()


def _kv_copies(tp: int, kv_heads: int, world: int, timeout_minutes: int) -> dist.ProcessGroup | None:
    """This rank's group of `tp / kv_heads` neighbours that hold one kv head."""
    copies = tp // kv_heads
    return _axis_of(np.arange(world).reshape(-1, copies), timeout_minutes).group if copies > 1 else None


def _halves_of_cp(cfg: "ParallelConfig", shape: Shape, cp: Axis, world: int) -> tuple[Axis, Axis | None]:
    """Neighbours that share the heads, and where these are too few, the ranks that gather keys and values."""
    degree = ulysses_of(cfg, shape)
    if degree == cfg.cp:
        return cp, None
    ranks = np.arange(world).reshape(-1, cfg.cp, cfg.tp).swapaxes(1, 2)  # [pp·dp, tp, cp]
    square = ranks.reshape(-1, cfg.cp // degree, degree)
    ulysses = _axis_of(square.reshape(-1, degree), cfg.timeout_minutes)
    return ulysses, _axis_of(square.swapaxes(1, 2).reshape(-1, cfg.cp // degree), cfg.timeout_minutes)


def _axis_of(groups: npt.NDArray[np.int64], timeout_minutes: int) -> Axis:
    """The line of `groups` `[groups, size]` that this rank is on. Every rank of the world makes every group."""
    mine = None
    for ranks in groups.tolist():
        group = dist.new_group(ranks, timeout=timedelta(minutes=timeout_minutes))
        if dist.get_rank() in ranks:
            mine = Axis(len(ranks), ranks.index(dist.get_rank()), group)
    assert mine is not None, "groups cover the world"
    return mine


def _own_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise MegamodError(f"rank {local} of this node has no GPU: {count} are visible; launch {count} ranks a node (NPROC={count})")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def join(timeout_minutes: int = 30, device: torch.device | None = None) -> None:
    """Join the processes that torchrun launched, or make a world of this one (a notebook, a tool). Once; later calls do nothing."""
    if dist.is_initialized():
        return
    device = device or _own_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:  # torchrun's environment
        dist.init_process_group(backend, timeout=timeout, device_id=device if backend == "nccl" else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def say_once(message: str) -> None:
    """Print `message` to stderr, on one of the ranks that say the same."""
    first = True
    if "RANK" in os.environ:
        try:
            join()  # an error in the configuration comes before the grid
            key = f"megamod/said/{hashlib.sha256(message.encode()).hexdigest()}"
            first = distributed_c10d._get_default_store().add(key, 1) == 1
        except (RuntimeError, dist.DistError):
            first = os.environ["RANK"] == "0"  # no store to ask any more: the rank that hosted it has spoken and left
    if first:
        print(message, file=sys.stderr, flush=True)
