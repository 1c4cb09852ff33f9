"""AdamW over a sharded set of parameters: fp32 masters, the true global gradient norm, learning-rate schedules.

Gradients arrive in megatron-core's flat buckets, summed, each data-parallel (× context-parallel) rank holding the final values
of its share only (ZeRO stage 1; Rajbhandari et al. 2020). A share is described as `Segment`s: a flat range of one piece of one
Hugging Face tensor. Whatever is asked of the optimizer — which weights decay, what counts towards the norm, where a moment
goes in a checkpoint — is asked of the segment's piece, on every grid alike.

With `optim.offload` masters and moments are in host memory (ZeRO-Offload, Ren et al. 2021, arXiv:2101.06840): gradients are clipped
where they are and copied down, torch's AdamW updates masters on the processor, and the rounded weights are copied up.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megamod.config import OptimConfig
from megamod.errors import MegamodError
from megamod.parallel.grid import Grid
from megamod.weights.table import Piece, Placed

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Segment:
    """This rank's share of a piece: elements [start, stop) of the piece, flattened. All tensors are 1-D of that length."""

    piece: Piece
    start: int
    stop: int
    weight: Tensor  # a view of the parameter, in its dtype
    grad: Tensor  # a view of the gradient buffer, in at least fp32
    master: nn.Parameter  # at least fp32: the weight itself, or its fp32 copy, in host memory when it is offloaded
    rate: float = 1.0  # its learning rate ÷ the run's


class Update(NamedTuple):
    """What one optimizer step did."""

    grad_norm: float  # before clipping, of the whole model
    skipped: bool  # a gradient was NaN or infinite: nothing was changed


def segments(chunks: Sequence[DistributedDataParallel], items: Sequence[Placed], grid: Grid, *, offload: bool = False) -> list[Segment]:
    """This rank's share of all trained parameters, in the order of its buffers.

    Args:
        chunks: as `model.build.data_parallel` wraps them.
        items: where the parameters' pieces lie, as `weights.load.load` returns.
        offload: every master is a copy, in host memory.
    """
    placed = {item.param: item for item in items}
    result = []
    for chunk in chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                length = bucket.grad_data.numel() // grid.dp_cp.size
                low = bucket.offset + grid.dp_cp.rank * length
                for param in bucket.params_list:
                    origin = buffer.param_index_map[param][0]
                    width = param[0].numel()  # of a row
                    for piece in placed[param].pieces:
                        first = origin + piece.row * width
                        start, stop = max(first, low), min(first + piece.numel, low + length)
                        if start < stop:
                            weight, grad = buffer.param_data[start:stop], buffer.grad_data[start:stop]
                            work = torch.promote_types(weight.dtype, torch.float32)
                            own = _on_host(weight.detach(), work) if offload else weight.detach().to(work)
                            result.append(Segment(piece, start - first, stop - first, weight, grad, nn.Parameter(own), placed[param].rate))
    return result


def _on_host(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `x` in host memory, from which a GPU can read by itself; a dry run's stays without memory."""
    device = "meta" if x.is_meta else "cpu"
    return torch.empty(x.shape, dtype=dtype, device=device, pin_memory=x.is_cuda).copy_(x)


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over `segments`. The configuration was checked with `check`."""

    def __init__(self, cfg: OptimConfig, chunks: Sequence[DistributedDataParallel], items: Sequence[Placed], grid: Grid) -> None:
        self.cfg, self.chunks, self.grid = cfg, chunks, grid
        self.segments = segments(chunks, items, grid, offload=cfg.offload)
        alike: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
        for segment in self.segments:
            alike[self._decays(segment.piece), segment.rate].append(segment.master)
            segment.master.grad = _on_host(segment.grad, segment.grad.dtype) if cfg.offload else segment.grad
        groups: list[dict[str, Any]] = [
            {"params": params, "weight_decay": cfg.weight_decay if decays else 0.0, "rate": rate}
            for (decays, rate), params in alike.items()
        ]
        fused = grid.device.type == "cuda" or cfg.offload  # on a processor 9 times as fast
        # A rank may hold no share at all of a small model; torch's optimizers refuse an empty list, an empty tensor they take.
        groups = groups or [{"params": [nn.Parameter(torch.empty(0, device=grid.device))], "rate": 1.0}]
        self.adam = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused)
        for segment in self.segments:
            step = torch.zeros((), dtype=torch.float32, device=segment.master.device if fused else "cpu")
            zeros = {kind: torch.zeros_like(segment.master.detach()) for kind in KINDS[1:]}
            self.adam.state[segment.master] = {"step": step, **zeros}
        self.steps = 0  # updates made

    def _decays(self, piece: Piece) -> bool:
        """Matrices decay; norms and biases, which are vectors, never do, nor does what `no_decay` names."""
        return len(piece.shape) > 1 and not any(re.search(pattern, piece.hf) for pattern in self.cfg.no_decay)

    def tensor(self, segment: Segment, kind: str) -> Tensor:
        """A segment's master, exp_avg or exp_avg_sq, 1-D."""
        return segment.master.detach() if kind == "master" else self.adam.state[segment.master][kind]

    @torch.no_grad()
    def step(self, lr: float) -> Update:
        """Clip by the global norm, update masters and weights, and give every data-parallel rank the new weights.

        Every element of the model counts once in the norm, however many ranks hold a copy. A step with a gradient that is not
        finite changes nothing.
        """
        norm = self.grad_norm()
        value = float(norm)
        if not math.isfinite(value):
            return Update(value, skipped=True)
        if self.cfg.clip_grad is not None and self.segments:
            scale = (self.cfg.clip_grad / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([s.grad for s in self.segments], scale)
        for group in self.adam.param_groups:
            group["lr"] = lr * group["rate"]
        if self.cfg.offload:
            self._bring_gradients()
        if self.segments:
            self.adam.step()
        self.steps += 1
        self.publish()
        return Update(value, skipped=False)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of the whole model's gradient, a float64 scalar, the same on all ranks: one all-reduce over the world."""
        owned = [s.grad for s in self.segments if s.piece.owned]
        norms = torch._foreach_norm(owned) if owned else []
        squares = torch.stack([n.double() for n in norms]).square().sum() if norms else torch.zeros((), dtype=torch.float64)
        squares = squares.to(self.grid.device)
        dist.all_reduce(squares)
        return squares.sqrt()

    def _bring_gradients(self) -> None:
        """To the masters in host memory. Afterwards what was copied up before has arrived, and masters may be written to."""
        for segment in self.segments:
            assert segment.master.grad is not None
            segment.master.grad.copy_(segment.grad, non_blocking=True)
        if self.grid.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the weights and gather every rank's share. Also after a checkpoint is read."""
        copied = [s for s in self.segments if self.cfg.offload or s.master.dtype is not s.weight.dtype]
        if copied:
            torch._foreach_copy_([s.weight for s in copied], [s.master.detach() for s in copied], non_blocking=self.cfg.offload)
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)

    def restore(self, steps: int) -> None:
        """Continue as after `steps` updates, once the tensors are filled: Adam's bias correction depends on their number."""
        self.steps = steps
        for state in self.adam.state.values():
            state["step"].fill_(steps)
        self.publish()


def check(cfg: OptimConfig, names: Sequence[str], device: torch.device, ranks: int) -> None:
    """Refuse what cannot act in a run that trains tensors of these `names` on `device`, its gradients shared by `ranks` of dp × cp.

    Raises:
        MegamodError: one line.
    """
    if cfg.offload and device.type == "cpu":
        raise MegamodError("optim.offload: masters and moments go from a GPU to host memory, and here they are there already: leave it out")
    if cfg.overlap_grad_reduce and ranks == 1:
        raise MegamodError("optim.overlap_grad_reduce: dp × cp is 1, and there is nobody to reduce gradients with: leave it out")
    for pattern in cfg.no_decay:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise MegamodError(f"optim.no_decay: {pattern!r} is no regular expression ({error})") from None
        if not found:
            raise MegamodError(f"optim.no_decay: {pattern!r} matches no tensor that is trained; names look like {names[-1]}")


def learning_rate(cfg: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of update `step` (from 0) of `steps`.

    All schedules rise linearly over `warmup_steps`. Then: constant; linear or cosine (Loshchilov & Hutter 2017) to `min_lr`
    over the rest; wsd (Hu et al. 2024, MiniCPM) constant, then linear to `min_lr` over the last `decay_steps`.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    floor = cfg.min_lr or 0.0
    if cfg.schedule == "constant":
        return cfg.lr
    if cfg.schedule == "wsd":
        assert cfg.decay_steps is not None
        start = steps - cfg.decay_steps
        part = max(0.0, (step - start) / max(1, cfg.decay_steps))
        return cfg.lr + (floor - cfg.lr) * part
    part = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    if cfg.schedule == "linear":
        return cfg.lr + (floor - cfg.lr) * part
    return floor + (cfg.lr - floor) * 0.5 * (1 + math.cos(math.pi * part))
