"""A pre-norm decoder layer: megatron-core's, put together so that what only moves memory is done in few passes over it."""

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megamod.model.attention import PackedRow
from megamod_kernels.swiglu import swiglu


class DecoderLayer(TransformerLayer):
    """x + attention(norm(x)), and of this sum x + mlp(norm(x)).

    megatron-core makes the parts and decides what is recomputed. Its own forward pass adds and normalises one after the other, and so
    does autograd what comes back from a norm and past it; here each norm does both.
    """

    def forward(self, hidden_states: Tensor, *, packed_seq_params: PackedRow, **_: Any) -> tuple[Tensor, None]:
        """`[T', 1, C]` → `[T', 1, C]`, and no context, which only cross-attention has."""
        normed, x = self.input_layernorm.add(hidden_states, None)
        attended, bias = self.self_attention(normed, packed_seq_params=packed_seq_params)
        normed, x = self.pre_mlp_layernorm.add(attended if bias is None else attended + bias, x)
        made, _bias = tensor_parallel.checkpoint(self.mlp, False, normed) if self.recompute_mlp else self.mlp(normed)
        return x + made, None


class SwiGLU(nn.Module):
    """What megatron-core's MLP builds in its activation_func slot; its own way keeps 4F numbers a token where this keeps 2F."""

    def __init__(self, config: Any, kernel: bool) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, gate_up: Tensor) -> Tensor:
        """`[T', 1, 2F/tp]`, this rank's `[gate | up]` → `[T', 1, F/tp]`."""
        return swiglu(gate_up, kernel=self.kernel)
