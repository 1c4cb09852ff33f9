"""Small models that cover what decides a code path: families, biases, norms, tying, rope scaling, few kv heads, odd sizes."""

import functools
from typing import Any

import torch
from torch import Tensor

from megamod.model.shape import Shape, shape_of

BASE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 61, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    "rope_theta": 5e5,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 6.0}

# name → what differs from BASE. Together: every family, both ties, both biases, every rope, tp > kv heads.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2-tied-yarn": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": YARN},
    "qwen2-1kv": {"model_type": "qwen2", "num_key_value_heads": 1, "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "rope_theta": 1e6, "num_key_value_heads": 2},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 8, "rope_theta": 1e6, "tie_word_embeddings": True},
    "llama2": {"model_type": "llama", "rope_theta": 1e4},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "llama-bias-tied": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": True, "rope_theta": 1e4},
    "mistral": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": 64, "num_key_value_heads": 2},
    "internlm3": {"model_type": "internlm3", "rope_theta": 5e7, "num_key_value_heads": 2, "rope_scaling": DYNAMIC},
}  # fmt: skip

# Decoders of models that see images: a token has three positions. The oracle is the text part of transformers' model.
VISION: dict[str, dict[str, Any]] = {
    "qwen2-mrope": {
        "model_type": "qwen2", "hidden_size": 128,
        "rope_parameters": {"rope_type": "mrope", "rope_theta": 1e6, "mrope_section": [3, 3, 2]},
    },
    "qwen3-mrope": {
        "model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
}  # fmt: skip

# Models of experts, which are converted and not trained.
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3-moe": {
        "model_type": "qwen3_moe", "head_dim": 8, "rope_theta": 1e6, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip

# Fewer heads than context-parallel ranks, which then gather keys and values.
FEW_HEADS: dict[str, dict[str, Any]] = {
    "qwen3-2heads": {"model_type": "qwen3", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rope_theta": 1e6},
    "llama-3heads": {
        "model_type": "llama", "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8,
        "rope_parameters": LLAMA3,
    },
    "qwen2-4heads": {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6},
}  # fmt: skip

# Half as deep as the others, for tests of many grids.
SHALLOW: dict[str, dict[str, Any]] = {
    "qwen3-shallow": {"model_type": "qwen3", "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e6},
}  # fmt: skip

# Heads of scores in the vocabulary's place, as transformers writes them: a classifier of texts, of tokens, a reward model.
SCORED: dict[str, dict[str, Any]] = {
    "qwen2-classes": {
        "model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True, "architectures": ["Qwen2ForSequenceClassification"],
        "id2label": {"0": "safe", "1": "controversial", "2": "unsafe"}, "problem_type": "multi_label_classification",
    },
    "qwen3-tokens": {
        "model_type": "qwen3", "head_dim": 8, "rope_theta": 1e6, "architectures": ["Qwen3ForTokenClassification"],
        "id2label": {"0": "safe", "1": "unsafe"},
    },
    "llama-reward": {
        "model_type": "llama", "rope_theta": 1e4, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"},
    },
}  # fmt: skip

# A verdict at every token: severities, and categories beside them.
STREAMED: dict[str, dict[str, Any]] = {
    "qwen3-stream": {
        **SCORED["qwen3-tokens"], "id2label": {"0": "safe", "1": "controversial", "2": "unsafe", "3": "a", "4": "b"},
    },
}  # fmt: skip


def config(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model."""
    return {**BASE, **{**CONFIGS, **VISION, **EXPERTS, **FEW_HEADS, **SHALLOW, **SCORED, **STREAMED}[name], **changes}


@functools.cache
def shape(name: str) -> Shape:
    return shape_of(config(name))


def weights(name: str, dtype: torch.dtype = torch.float64, seed: int = 7) -> dict[str, Tensor]:
    """A Hugging Face state dict with every tensor random, norms and biases too, so that each one's place matters."""
    from megamod.weights.table import hf_shapes

    generator = torch.Generator().manual_seed(seed)
    result = {}
    for key, size in hf_shapes(shape(name)).items():
        x = torch.randn(*size, generator=generator, dtype=torch.float64) * 0.15
        result[key] = (1.0 + x if key.endswith("norm.weight") else x).to(dtype)
    return result
