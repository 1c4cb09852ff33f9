"""Hardware questions, each answered once when the model is built, and said in the log: who attends, who multiplies, who does the rest."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megamod.errors import MegamodError
from megamod_kernels import rmsnorm, swiglu

# attend(q [T, H, D], k [T', K, D], v [T', K, D], documents) -> [T, H, D]: causal attention inside each document
Attend = Callable[[Tensor, Tensor, Tensor, "Documents"], Tensor]


@dataclass(frozen=True)
class Borders:
    """Where documents end."""

    lengths: tuple[int, ...]  # S, on the host
    cu_seqlens: Tensor  # [S+1] int32 on the device: 0, then where each document ends

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Borders":
        return cls(tuple(lengths), torch.tensor((0, *lengths)).cumsum(0).to(torch.int32).to(device, non_blocking=True))

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class Documents:
    """Documents of a packed row, as attention is asked about them: their queries, and the keys that end with the last query.

    Both are the same where a rank has whole documents; a document that began in another rank's stretch has keys before its queries.
    """

    queries: Borders
    keys: Borders
    first_key: int  # where in the row the first document's keys begin

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, stretch: slice | None = None) -> "Documents":
        """Of a row of documents of `lengths` tokens; with `stretch`, of the queries in that part of it."""
        if stretch is None:
            both = Borders.of(lengths, device)
            return cls(both, both, 0)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        there = (ends > stretch.start) & (starts < stretch.stop)
        until = np.minimum(ends, stretch.stop)[there]
        queries = until - np.maximum(starts[there], stretch.start)
        keys = until - starts[there]
        return cls(Borders.of(queries.tolist(), device), Borders.of(keys.tolist(), device), int(starts[there][0]))


def attend_reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Document by document, so the largest score matrix is the longest document's, never the row's."""
    outputs = []
    parts = (q.split(documents.queries.lengths), *(x.split(documents.keys.lengths) for x in (k, v)))
    for q_, k_, v_ in zip(*parts, strict=True):
        before = len(k_) - len(
            q_
        )  # keys of another rank's stretch: as many queries stand in for that stretch's, whose answers nobody reads
        whole = torch.cat((q_.new_zeros(before, *q_.shape[1:]), q_)) if before else q_
        a, b, c = (x.transpose(0, 1)[None] for x in (whole, k_, v_))  # [1, heads, t, D]
        outputs.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)[0].transpose(0, 1)[before:])
    return torch.cat(outputs)


def attention(name: str, device: torch.device, dtype: torch.dtype, deterministic: bool) -> tuple[str, Attend]:
    """The attention that `model.attention` names; `auto` takes the first that works here. Returns its name and function.

    The fused ones run on a GPU, in bfloat16; elsewhere there is the reference.

    Raises:
        MegamodError: the one asked for cannot run here, or not deterministically.
    """
    fused = device.type == "cuda" and dtype is torch.bfloat16
    if name == "reference" or (name == "auto" and not fused):
        return "reference", attend_reference
    if name == "auto":
        for first in FUSED:
            with suppress(MegamodError):
                return first, FUSED[first](device, deterministic)
    if not fused:
        here = f"{device.type} in {str(dtype).removeprefix('torch.')}"
        raise MegamodError(f"model.attention = {name!r} needs a GPU and bfloat16, this is {here}: use 'auto' or 'reference'")
    return name, FUSED[name](device, deterministic)


def _flash_attn_3(device: torch.device, deterministic: bool) -> Attend:
    """FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), a package of its own, for Hopper."""
    if deterministic:  # builds are about that take the argument and do not heed it: Dao-AILab/flash-attention issue 1766
        raise MegamodError("model.attention = 'flash_attn_3' is not deterministic: use 'auto', or deterministic=false")
    if torch.cuda.get_device_capability(device)[0] != 9:
        raise MegamodError("model.attention = 'flash_attn_3' needs a Hopper GPU: use 'auto'")
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except (ImportError, OSError) as error:
        raise MegamodError(f"model.attention = 'flash_attn_3': flash_attn_interface cannot be imported ({error}): use 'auto'") from None
    return _flash(flash_attn_varlen_func, deterministic)


def _flash_attn(device: torch.device, deterministic: bool) -> Attend:
    """FlashAttention-2 (Dao 2023, arXiv:2307.08691)."""
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError) as error:  # absent, or built for another torch
        raise MegamodError(f"model.attention = 'flash_attn': flash-attn cannot be imported ({error}): use 'auto'") from None
    return _flash(flash_attn_varlen_func, deterministic)


def _flash(flash_attn_varlen_func: Callable[..., Any], deterministic: bool) -> Attend:
    """Both packages name what they take alike; some releases of the third return the log-sum-exp too."""

    def attend(q: Tensor, k: Tensor, v: Tensor, d: Documents) -> Tensor:
        # Causal attention of these packages lets a document's last query see its last key, whatever the number of either.
        borders: dict[str, Any] = {"cu_seqlens_q": d.queries.cu_seqlens, "cu_seqlens_k": d.keys.cu_seqlens}
        longest = {"max_seqlen_q": d.queries.longest, "max_seqlen_k": d.keys.longest}
        out = flash_attn_varlen_func(q, k, v, **borders, **longest, causal=True, deterministic=deterministic)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    return attend


def _varlen_attn(device: torch.device, deterministic: bool) -> Attend:
    """torch's own. Its backward asks torch.use_deterministic_algorithms, which a deterministic run has set, and not `deterministic`."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor, d: Documents) -> Tensor:
        # A window that is open to the left and closed to the right is causal attention.
        out = varlen_attn(
            q, k, v, d.queries.cu_seqlens, d.keys.cu_seqlens, d.queries.longest, d.keys.longest,
            scale=1 / math.sqrt(q.shape[-1]), window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return attend


# In `auto`'s order; the last is part of torch.
FUSED: dict[str, Callable[[torch.device, bool], Attend]] = {
    "flash_attn_3": _flash_attn_3,
    "flash_attn": _flash_attn,
    "varlen_attn": _varlen_attn,
}


def linears(name: str, device: torch.device) -> tuple[type, type]:
    """The column- and row-parallel linear that `model.linear` names. Raises MegamodError where it cannot be had."""
    if name == "megatron":
        return ColumnParallelLinear, RowParallelLinear
    if device.type != "cuda":
        raise MegamodError("model.linear = 'transformer_engine' needs a GPU: use 'megatron'")
    try:
        import transformer_engine  # noqa: F401
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
    except (ImportError, OSError) as error:
        raise MegamodError(f"model.linear = 'transformer_engine': it cannot be imported ({error}): use 'megatron'") from None
    return TEColumnParallelLinear, TERowParallelLinear


def overlap_tp(tokens: int, hidden: int, tp: int, device: torch.device) -> None:
    """Give TransformerEngine the buffers through which its linears send `[tokens, hidden]` to `tp` ranks while they multiply.

    Never run. Its own groups are of `tp` consecutive ranks, as the grid's are.

    Raises:
        MegamodError: it cannot be had.
    """
    if device.type != "cuda":
        raise MegamodError("parallel.tp_comm_overlap needs GPUs: leave it out")
    try:
        from transformer_engine.pytorch.module.base import initialize_ub
    except (ImportError, OSError) as error:
        raise MegamodError(f"parallel.tp_comm_overlap: transformer_engine cannot be imported ({error}): leave it out") from None
    initialize_ub(shape=[tokens, hidden], tp_size=tp, bootstrap_backend="nccl")


def fusion(name: str, device: torch.device) -> str:
    """What `model.fusion` comes to here, triton or reference: who adds residuals, normalises, and multiplies gates with what they gate.

    Raises:
        MegamodError: there are no kernels for this device.
    """
    here = rmsnorm.runs(device) and swiglu.runs(device)
    if name == "triton" and not here:
        raise MegamodError(f"model.fusion = 'triton' needs a GPU and triton, this is {device.type}: use 'auto' or 'reference'")
    return ("triton" if here else "reference") if name == "auto" else name
