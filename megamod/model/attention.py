"""Self-attention over packed documents: fused `[q | k | v]`, kv heads copied where tp exceeds them, RoPE after Ulysses."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megamod.batch import Batch
from megamod.model import rope
from megamod.model.backends import Attend, Documents
from megamod.model.shape import Shape
from megamod.parallel.collectives import sum_row_gradients
from megamod.parallel.grid import Grid, kv_repeats
from megamod.parallel.ulysses import gather_seq, heads_to_seq, seq_to_heads
from megamod_kernels import packing


@dataclass
class PackedRow(PackedSeqParams):
    """What megatron-core hands down to attention unread: the row's borders and rotation tables, the same for every layer."""

    documents: Documents | None = None
    cos: Tensor | None = None  # [T', D/2] of the T' tokens that this rank's queries are
    sin: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, shape: Shape, dtype: torch.dtype, grid: Grid) -> "PackedRow":
        """Of a whole row's borders and positions, for the part of it that a rank of `grid` sees in attention."""
        stretch, gather = None, grid.kv_gather
        positions = batch.positions
        if gather is not None:
            width = positions.shape[-1] // gather.size
            stretch = slice(gather.rank * width, (gather.rank + 1) * width)
            positions = positions[..., stretch]
        cos, sin = rope.tables(shape.rope, shape.head_dim, positions, dtype)
        return cls(qkv_format="thd", documents=Documents.of(batch.lengths, batch.tokens.device, stretch), cos=cos, sin=sin)


class PackedAttention(nn.Module):
    """Causal attention inside each document of a packed row, shared over the context-parallel ranks: `parallel.ulysses`."""

    def __init__(self, heads: int, kv_heads: int, grid: Grid, attend: Attend, *, recomputed: bool = False) -> None:
        super().__init__()
        self.ulysses, self.attend = grid.ulysses.group, attend
        self.kv_gather = grid.kv_gather.group if grid.kv_gather is not None else None
        # Recomputation begins again from q and k as they were. An exchange leaves them so: what it returns is new memory.
        self.rotates_in_place = grid.ulysses.size > 1 or not recomputed
        repeats = kv_repeats(heads, kv_heads, grid.ulysses.size)
        assert repeats is not None, "parallel.grid.ulysses_degree"
        self.kv_repeats = repeats

    def forward(self, q: Tensor, k: Tensor, v: Tensor, row: PackedRow) -> Tensor:
        """q `[T/cp, H/tp, D]`, k and v `[T/cp, K/tp, D]` → `[T/cp, H/tp, D]`. q and k are given over: they may be written to."""
        assert row.documents is not None
        assert row.cos is not None
        assert row.sin is not None
        if self.kv_repeats > 1:
            k, v = (x.repeat_interleave(self.kv_repeats, 1) for x in (k, v))
        q, k, v = seq_to_heads(self.ulysses, q, k, v)  # [T', H/(tp·u), D], T' = T·u/cp
        q, k = packing.rope(q, k, row.cos, row.sin, inplace=self.rotates_in_place)
        if self.kv_gather is not None:
            keys = slice(row.documents.first_key, row.documents.first_key + sum(row.documents.keys.lengths))
            k, v = (x[keys] for x in gather_seq(self.kv_gather, k, v))
        (out,) = heads_to_seq(self.ulysses, self.attend(q, k, v, row.documents))
        return out


@dataclass
class SelfAttentionSubmodules:
    """Who multiplies and who normalises inside SelfAttention."""

    linear_qkv: type | ModuleSpec
    linear_proj: type | ModuleSpec
    norm: type | ModuleSpec  # of each head's q and k, in the families that have it


class SelfAttention(MegatronModule):
    """megatron-core's SelfAttention slot with rows in Hugging Face's order: `[q | k | v]` of this rank's heads.

    RoPE turns q and k in the memory of `linear_qkv`'s output where nobody else reads it; a hook that keeps that output must copy it.
    With tp > K each rank keeps one kv head, tp / K ranks the same one, and their gradients are summed; megatron-core's own
    gathers the whole qkv instead.

    Args:
        config, layer_number: from megatron-core.
        submodules: who multiplies and who normalises.
        shape, grid, attend: from the layer's spec.
    """

    def __init__(
        self, config: Any, submodules: SelfAttentionSubmodules, layer_number: int, shape: Shape, grid: Grid, attend: Attend, **_: Any
    ) -> None:
        super().__init__(config=config)
        tp, d = grid.tp.size, shape.head_dim
        self.head_dim, self.layer_number = d, layer_number
        self.heads, self.kv_heads = shape.heads // tp, max(1, shape.kv_heads // tp)
        sizes = {"gather_output": False, "skip_bias_add": False, "is_expert": False, "tp_group": grid.tp.group}
        self.linear_qkv = build_module(
            submodules.linear_qkv, shape.hidden, tp * (self.heads + 2 * self.kv_heads) * d, config=config,
            init_method=config.init_method, bias=shape.qkv_bias, tp_comm_buffer_name="qkv", **sizes,
        )  # fmt: skip
        self.linear_proj = build_module(
            submodules.linear_proj, shape.heads * d, shape.hidden, config=config, init_method=config.output_layer_init_method,
            bias=shape.o_bias, input_is_parallel=True, skip_bias_add=True, is_expert=False, tp_comm_buffer_name="proj",
            tp_group=grid.tp.group,
        )  # fmt: skip
        self.recompute = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        self.core_attention = PackedAttention(self.heads, self.kv_heads, grid, attend, recomputed=self.recompute)
        if shape.qk_norm:
            self.q_layernorm = build_module(submodules.norm, config=config, hidden_size=d, eps=shape.norm_eps)
            self.k_layernorm = build_module(submodules.norm, config=config, hidden_size=d, eps=shape.norm_eps)
        else:
            self.q_layernorm = self.k_layernorm = nn.Identity()
        if grid.kv_copies is not None:
            for param in filter(lambda param: param.requires_grad, self.linear_qkv.parameters()):  # in 4 bits it is frozen
                sum_row_gradients(param, self.heads * d, grid.kv_copies)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: PackedRow, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`[T', 1, C]` → `[T', 1, C]` and the projection's bias, which megatron-core adds with the residual."""
        mixed, _bias = self.linear_qkv(hidden_states)  # [T/cp, 1, (H + 2K)·D/tp]
        heads = mixed.view(mixed.shape[0], -1, self.head_dim)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = self.q_layernorm(q), self.k_layernorm(k)

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.core_attention(q, k, v, packed_seq_params)

        out = tensor_parallel.checkpoint(core, False, q, k, v) if self.recompute and self.training else core(q, k, v)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))  # [T/cp, 1, H·D/tp] → [T', 1, C]


def self_attention_spec(
    column: type | ModuleSpec, row: type | ModuleSpec, norm: type | ModuleSpec, shape: Shape, grid: Grid, attend: Attend
) -> ModuleSpec:
    """What megatron-core's TransformerLayer builds in its self_attention slot."""
    return ModuleSpec(
        module=SelfAttention,
        params={"shape": shape, "grid": grid, "attend": attend},
        submodules=SelfAttentionSubmodules(column, row, norm),
    )
