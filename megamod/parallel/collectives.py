"""Sums over ranks that know how to be differentiated.

Two rules, and the wrong one gives an exact loss with wrong gradients:

- Tensor-parallel ranks are replicas of one computation: what they sum is summed once, its gradient is the same on each.
  megatron-core's mappings (`copy_to_…`, `reduce_from_tensor_model_parallel_region`) follow this rule.
- Data- and context-parallel ranks each return a *share* of the objective, which is the sum over them: a collective between
  them is differentiated truthfully, so the backward of a sum is a sum. `all_sum` follows this rule.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from megamod.errors import MegamodError

T = TypeVar("T")


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        y = x.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def all_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of `x` over the ranks of `group` that share an objective (dp, cp). `group` None: a single process."""
    return x if group is None or group.size() == 1 else _AllSum.apply(x, group)


def sum_row_gradients(param: nn.Parameter, first: int, group: dist.ProcessGroup) -> None:
    """From now on the gradient of `param`'s rows from `first` on is summed over `group`, whose ranks hold copies of them.

    For kv heads that several tensor-parallel ranks hold: each copy serves other query heads, so each gets a part of the
    gradient. Done before the gradient is accumulated, so whatever reads it later (data-parallel reduction, the norm, the
    optimizer) sees the same on every copy.
    """

    def add_up(grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad[first:], group=group)
        return grad

    param.register_hook(add_up)


def sum_later(param: nn.Parameter, group: dist.ProcessGroup) -> None:
    """Mark `param`: each rank of `group` will have a part of its gradient, which `sum_marked` adds up once a step."""
    if group.size() > 1:
        param.summed_over = group  # type: ignore[attr-defined]


def sum_marked(params: Iterable[nn.Parameter]) -> None:
    """Add up the final gradients (`main_grad`) of the parameters that `sum_later` marked; one all-reduce for each group."""
    parts: dict[dist.ProcessGroup, list[Tensor]] = defaultdict(list)
    for param in params:
        if param.requires_grad and hasattr(param, "summed_over"):
            parts[param.summed_over].append(param.main_grad)  # type: ignore[attr-defined]
    for group, grads in parts.items():
        whole = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(whole, group=group)
        for grad, total in zip(grads, whole.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))


def together(step: Callable[[], T], *, acts: bool = True, group: dist.ProcessGroup | None = None) -> T | None:
    """Take `step` on the ranks of `group` (None: the world) that act in it; if it fails on one, raise its fault on all: none waits.

    Raises:
        MegamodError: the fault of the first rank that has one: its own, or what an operating-system error means.
    """
    result, fault = None, None
    try:
        if acts:
            result = step()
    except MegamodError as error:
        fault = str(error)
    except (OSError, SafetensorError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        text = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        fault = f"{where}rank {dist.get_rank()}: {text}"
    first = next((f for f in gathered(fault, group) if f is not None), None)
    if first is not None:
        raise MegamodError(first)
    return result


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's `value`, which must pickle, in the order of `group`'s ranks; None: of the world's."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_first(step: Callable[[], T]) -> T:
    """Take `step` on rank 0 of the world and hand its result, which must pickle, to all. Raises its fault on all."""
    result = [together(step, acts=dist.get_rank() == 0)]
    dist.broadcast_object_list(result, src=0)
    return cast(T, result[0])
