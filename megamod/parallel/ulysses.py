"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv:2309.14509): sequence ↔ heads. And beyond the heads, keys and values gathered.

A context-parallel rank holds a stretch of the packed row. Before attention each rank gives away its stretch of most heads and
receives the whole row of its own; after it, back. Every rank then sees whole documents in order, so attention, RoPE and
document borders need no special case, however the documents lie over the ranks.

Where cp exceeds what the heads allow, cp = u × r: u neighbours share the heads as above and see the stretch that is theirs
together; the r ranks that hold the same heads of other stretches gather their keys and values (as Llama 3 was trained,
arXiv:2407.21783 §3.3.2), which grouped queries make small. A query then has all keys before it.

Sent by a rank in one layer's forward pass, and as much again in its backward pass, with t = T/cp tokens, H/tp query heads,
K' kv heads (a rank's K/tp, or 1, repeated until u divides them: their least common multiple) and e bytes a number:

    (u - 1)/u · t · D · e · (2·H/tp + 2·K')            q and the output, k and v, to the other u - 1
    (r - 1) · t · D · e · 2·K'                         keys and values of u·t tokens and K'/u heads, to the other r - 1

Recomputed attention (`model.recompute`) exchanges a second time in the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SEQUENCE, HEADS = 0, 1  # the axes of [T, H, D]


def _in_flight(op: Callable[..., Any], outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """`op` for each pair of tensors: all are on their way before any is awaited."""
    works = [op(y, x, group=group, async_op=True) for y, x in zip(outputs, inputs, strict=True)]
    for work in works:
        work.wait()


class _AllToAll(torch.autograd.Function):
    """Send rank r its slice of each tensor along `cut`, join what arrives along `join`.

    With the axes swapped it is its inverse and its own gradient: a number moves, and nothing is computed.
    """

    @staticmethod
    def forward(ctx: Any, cut: int, join: int, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.args = cut, join, group
        # Ranks first, [cp, t, H/cp, D]: cut along the sequence, or joined along it, that is a view, so each way copies once.
        leaving = [x.unflatten(cut, (group.size(), -1)).movedim(cut, 0).contiguous() for x in tensors]
        arriving = [torch.empty_like(x) for x in leaving]
        _in_flight(dist.all_to_all_single, arriving, leaving, group)
        return tuple(y.movedim(0, join).flatten(join, join + 1) for y in arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cut, join, group = ctx.args
        return None, None, None, *_AllToAll.apply(join, cut, group, *grads)


def seq_to_heads(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each `[T/cp, H, D]` of this rank's stretch → `[T, H/cp, D]` of this rank's heads; H may differ between the tensors."""
    return tensors if group.size() == 1 else _AllToAll.apply(HEADS, SEQUENCE, group, *tensors)


def heads_to_seq(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each `[T, H/cp, D]` of this rank's heads → `[T/cp, H, D]` of this rank's stretch."""
    return tensors if group.size() == 1 else _AllToAll.apply(SEQUENCE, HEADS, group, *tensors)


class _Gather(torch.autograd.Function):
    """Each rank's stretch of each tensor, joined along the sequence; the gradient of a stretch is the sum of what all ranks have of it."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        sent = [x.contiguous() for x in tensors]
        wholes = tuple(x.new_empty(group.size() * len(x), *x.shape[1:]) for x in sent)
        _in_flight(dist.all_gather_into_tensor, wholes, sent, group)
        return wholes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sent = [grad.contiguous() for grad in grads]
        parts = tuple(grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:]) for grad in sent)
        _in_flight(dist.reduce_scatter_tensor, parts, sent, ctx.group)
        return None, *parts


def gather_seq(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each `[T/r, K, D]` of this rank's stretch → `[T, K, D]`, the row of `group`'s r ranks, which hold the same heads."""
    gathered: tuple[Tensor, ...] = _Gather.apply(group, *tensors)
    return gathered
