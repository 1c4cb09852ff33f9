"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv:2309.14509): sequence ↔ heads.

A context-parallel rank holds a stretch of the packed row. Before attention each rank gives away its stretch of most heads and
receives the whole row of its own; after it, back. Every rank then sees whole documents in order, so attention, RoPE and
document borders need no special case.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """Send rank r its slice along axis `cut`, join what arrives along axis `join`. With the axes swapped it is its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.args = cut, join, group
        send = torch.stack(x.chunk(group.size(), cut))
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=group)
        return torch.cat(receive.unbind(), join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cut, join, group = ctx.args
        return _AllToAll.apply(grad, join, cut, group), None, None, None


def seq_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[T/cp, H, D]` of this rank's stretch → `[T, H/cp, D]` of this rank's heads."""
    return x if group.size() == 1 else _AllToAll.apply(x, 1, 0, group)


def heads_to_seq(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[T, H/cp, D]` of this rank's heads → `[T/cp, H, D]` of this rank's stretch."""
    return x if group.size() == 1 else _AllToAll.apply(x, 0, 1, group)
