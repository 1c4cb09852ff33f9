"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv:2309.14509): sequence ↔ heads.

A context-parallel rank holds a stretch of the packed row. Before attention each rank gives away its stretch of most heads and
receives the whole row of its own; after it, back. Every rank then sees whole documents in order, so attention, RoPE and
document borders need no special case, however the documents lie over the ranks.

Sent by a rank in one layer's forward pass, and as much again in its backward pass, with t = T/cp tokens, H/tp query heads,
K' kv heads (K/tp, or 1, repeated up to cp where there are fewer) and e bytes a number:

    (cp - 1)/cp · t · D · e · (2·H/tp + 2·K')          q and the output, k and v

Recomputed attention (`model.recompute`) exchanges a second time in the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SEQUENCE, HEADS = 0, 1  # the axes of [T, H, D]


class _AllToAll(torch.autograd.Function):
    """Send rank r its slice of each tensor along `cut`, join what arrives along `join`: all are on their way before any is awaited.

    With the axes swapped it is its inverse and its own gradient: a number moves, and nothing is computed.
    """

    @staticmethod
    def forward(ctx: Any, cut: int, join: int, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.args = cut, join, group
        return _exchange(tensors, cut, join, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cut, join, group = ctx.args
        return None, None, None, *_AllToAll.apply(join, cut, group, *grads)


def _exchange(tensors: Sequence[Tensor], cut: int, join: int, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    arriving, works = [], []
    for x in tensors:
        # Ranks first, [cp, t, H/cp, D]: cut along the sequence, or joined along it, that is a view, so each way copies once.
        send = x.unflatten(cut, (group.size(), -1)).movedim(cut, 0).contiguous()
        receive = torch.empty_like(send)
        works.append((dist.all_to_all_single(receive, send, group=group, async_op=True), send))  # `send` lives until it has left
        arriving.append(receive)
    for work, _ in works:
        work.wait()
    return tuple(receive.movedim(0, join).flatten(join, join + 1) for receive in arriving)


def seq_to_heads(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each `[T/cp, H, D]` of this rank's stretch → `[T, H/cp, D]` of this rank's heads; H may differ between the tensors."""
    return tensors if group.size() == 1 else _AllToAll.apply(HEADS, SEQUENCE, group, *tensors)


def heads_to_seq(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each `[T, H/cp, D]` of this rank's heads → `[T/cp, H, D]` of this rank's stretch."""
    return tensors if group.size() == 1 else _AllToAll.apply(SEQUENCE, HEADS, group, *tensors)
