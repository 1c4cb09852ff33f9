"""Two hardware questions, each answered once when the model is built, and said in the log: who attends, who multiplies."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megamod.errors import MegamodError

# attend(q [T, H, D], k [T, K, D], v [T, K, D], documents) -> [T, H, D]: causal attention inside each document
Attend = Callable[[Tensor, Tensor, Tensor, "Documents"], Tensor]


@dataclass(frozen=True)
class Documents:
    """Document borders of a packed row."""

    lengths: tuple[int, ...]  # on the host
    cu_seqlens: Tensor  # [S+1] int32 on the device: 0, then where each document ends

    @property
    def longest(self) -> int:
        return max(self.lengths)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Document by document, so the largest score matrix is the longest document's, never the row's."""
    outputs = []
    for q_, k_, v_ in zip(*(x.split(documents.lengths) for x in (q, k, v)), strict=True):
        a, b, c = (x.transpose(0, 1)[None] for x in (q_, k_, v_))  # [1, heads, t, D]
        outputs.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


def attention(name: str, device: torch.device, deterministic: bool) -> tuple[str, Attend]:
    """The attention that `model.attention` names; `auto` takes the first that works here. Returns its name and function.

    Raises:
        MegamodError: the one asked for cannot run here.
    """
    on_gpu = device.type == "cuda"
    if name == "auto":
        name = ("flash_attn" if _installed("flash_attn") else "varlen_attn") if on_gpu else "reference"
    if name == "reference":
        return name, attend_reference
    if not on_gpu:
        raise MegamodError(f"model.attention = {name!r} needs a GPU: use 'auto' or 'reference'")
    if name == "flash_attn":
        if not _installed("flash_attn"):
            raise MegamodError("model.attention = 'flash_attn': the package flash-attn is not installed: use 'auto'")
        from flash_attn import flash_attn_varlen_func

        def flash(q: Tensor, k: Tensor, v: Tensor, d: Documents) -> Tensor:
            borders: dict[str, Any] = {"cu_seqlens_q": d.cu_seqlens, "cu_seqlens_k": d.cu_seqlens}
            longest = {"max_seqlen_q": d.longest, "max_seqlen_k": d.longest}
            return flash_attn_varlen_func(q, k, v, **borders, **longest, causal=True, deterministic=deterministic)

        return name, flash
    # Its backward follows torch.use_deterministic_algorithms, which a deterministic run sets.
    from torch.nn.attention.varlen import varlen_attn

    def varlen(q: Tensor, k: Tensor, v: Tensor, d: Documents) -> Tensor:
        # A window that is open to the left and closed to the right is causal attention.
        out = varlen_attn(
            q, k, v, d.cu_seqlens, d.cu_seqlens, d.longest, d.longest,
            scale=1 / math.sqrt(q.shape[-1]), window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return name, varlen


def linears(name: str) -> tuple[type, type]:
    """The column- and row-parallel linear that `model.linear` names. Raises MegamodError where it cannot be had."""
    if name == "megatron":
        return ColumnParallelLinear, RowParallelLinear
    if not _installed("transformer_engine"):
        raise MegamodError("model.linear = 'transformer_engine': the package transformer-engine is not installed: use 'megatron'")
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
