"""The plain single process that everything is compared with: transformers, document by document, in float64.

transformers computes RMSNorm and RoPE in fp32; here both keep the dtype of their input, with transformers' own frequencies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamod.batch import UNITS, Batch
from megamod.losses import LossFunction


def model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """transformers' model of tiny config `name` with `tiny.weights`."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = tiny.config(name)
    if config["model_type"] == "internlm3":  # the Llama class computes it: no class of its own in transformers
        config = {**config, "model_type": "llama"}
    kind = config.pop("model_type")
    if name in tiny.VISION:
        text = {"qwen2": "qwen2_5_vl_text", "qwen3": "qwen3_vl_text"}[kind]
        decoder = AutoModel.from_config(AutoConfig.for_model(text, **config), attn_implementation="sdpa")
        hf = nn.ModuleDict({"model": decoder, "lm_head": nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)}).to(dtype)
        hf.load_state_dict(tiny.weights(name, dtype))
        return in_double(hf) if dtype is torch.float64 else hf
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), attn_implementation="sdpa").to(dtype)
    state = tiny.weights(name, dtype)
    result = hf.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    hf.tie_weights()
    return in_double(hf) if dtype is torch.float64 else hf


def in_double(hf: nn.Module) -> nn.Module:
    """A float64 model of transformers' that keeps double in RMSNorm and RoPE, too."""
    for module in hf.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = _rms_norm.__get__(module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = _rotary.__get__(module)
    return hf


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


def _rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
    if hasattr(self, "mrope_section"):  # [3, 1, T, D/2]
        cos, sin = (self.recomposition_frequencies(y) for y in (angles.cos(), angles.sin()))
        return cos * self.attention_scaling, sin * self.attention_scaling
    both = torch.cat((angles, angles), -1)
    return both.cos() * self.attention_scaling, both.sin() * self.attention_scaling


@dataclass(frozen=True)
class Document:
    tokens: list[int]
    labels: list[int]  # unshifted: labels[i] is tokens[i] where it is trained, else -100
    verdict: list[bool]
    weight: float = 1.0


def run(
    hf: nn.Module, batches: Sequence[Batch], loss: LossFunction, before: Callable[[Batch, int], None] = lambda batch, token: None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective over all `batches` and its gradient by Hugging Face's names: each document through the model alone.

    `before` is told of each document: its batch, and where in the batch it begins.
    """
    hf.zero_grad()
    totals = {unit: float(sum(batch.counts()[unit] for batch in batches)) for unit in UNITS}
    value = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        head = _PlainHead(hidden(hf, batch, before), hf.get_submodule("lm_head").weight)  # type: ignore[arg-type]
        value = value + loss(head, replace(batch, totals=totals)).value  # type: ignore[arg-type]
    value.backward()
    return value.detach(), {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}


def hidden(hf: nn.Module, batch: Batch, before: Callable[[Batch, int], None] = lambda batch, token: None) -> Tensor:
    """`[N, C]`: the hidden states of the labelled positions."""
    decoder, first, pieces = hf.get_submodule("model"), 0, []
    for tokens, positions in zip(batch.tokens.split(batch.lengths), batch.positions.split(batch.lengths, -1), strict=True):
        before(batch, first)
        pieces.append(decoder(tokens[None], position_ids=positions[..., None, :], use_cache=False).last_hidden_state[0])
        first += len(tokens)
    return torch.cat(pieces)[batch.rows]


class _PlainHead:
    """The head in textbook form: all logits at once."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self._log_p = F.log_softmax(hidden @ weight.t(), -1)
        self._z = hidden @ weight.t()

    def logprobs(self, ids: Tensor) -> Tensor:
        return self._log_p.gather(-1, ids[:, None])[:, 0]

    def entropy(self) -> Tensor:
        return -(self._log_p.exp() * self._log_p).sum(-1)

    def logsumexp(self) -> Tensor:
        return self._z.logsumexp(-1)


LossMaker = Callable[[], LossFunction]
