"""What a decoder is, as data: families, a model's `Shape`, and Hugging Face's config.json in both of its spellings.

A family is a row of FAMILIES. A new model of the Llama kind (RMSNorm, SwiGLU, RoPE, grouped queries) is one more row.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamod.errors import MegamodError, nearest

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, in the words of Hugging Face's `rope_parameters`."""

    theta: float
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn
    factor: float = 1.0
    original_max_position: int | None = None  # llama3, yarn: the context length of pretraining
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True)
class Shape:
    """Everything that the model's code asks of a checkpoint. Letters as in README: C hidden, H heads, K kv heads, D, F, V."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rope: Rope
    norm_eps: float
    max_position: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    sliding_window: int | None = None

    @property
    def longest_document(self) -> int | None:
        """Tokens of a document beyond which attention would differ from the original's; None: no bound.

        Below a sliding window's length the window has no effect, and below `max_position` dynamic RoPE is plain RoPE, so
        documents up to there are exact.
        """
        bounds = [self.sliding_window, self.max_position if self.rope.kind == "dynamic" else None]
        return min((b for b in bounds if b is not None), default=None)

    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (q + 2 * kv) + q * self.hidden
        biases = (q + 2 * kv) * self.qkv_bias + self.hidden * self.o_bias + 2 * self.head_dim * self.qk_norm
        layer = attention + biases + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def flops(self, lengths: Iterable[int], labelled: int) -> float:
        """Floating-point operations of one forward pass over documents of `lengths` tokens, `labelled` positions of which
        reach the vocabulary. Matrix products only; attention counts the causal half. A training step is three times that.
        """
        tokens = squares = 0
        for n in lengths:
            tokens, squares = tokens + n, squares + n * n
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        per_token = self.hidden * (q + 2 * kv) + q * self.hidden + 3 * self.hidden * self.ffn
        return 2.0 * self.layers * (per_token * tokens + q * squares) + 2.0 * self.hidden * self.vocab * labelled


@dataclass(frozen=True)
class Family:
    """How a `model_type` of Hugging Face maps to a Shape: each entry is a constant or the config key that decides."""

    architecture: str  # the class an export names, so that transformers, vLLM and SGLang load it
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    qk_norm: bool = False
    window: str | None = None  # the key whose truth turns `sliding_window` on; "" when the key itself does


FAMILIES = {
    "llama": Family("LlamaForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias"),  # Llama 1-3, Yi, SmolLM2
    "mistral": Family("MistralForCausalLM", window=""),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window="use_sliding_window"),  # Qwen2, Qwen2.5
    "qwen3": Family(
        "Qwen3ForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, window="use_sliding_window"
    ),  # Qwen3, Qwen3Guard-Gen
    "internlm3": Family("InternLM3ForCausalLM", qkv_bias="qkv_bias", o_bias="bias"),
}

# Keys that would change the computation in a way no family here has: a config that sets one is refused.
ONLY = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "quantization_config": None,
    "logit_scale": None,
    "final_logit_softcapping": None,
}

_ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip


def read_config(path: str | Path) -> dict[str, Any]:
    """The JSON object at `path`: a config.json, or a directory that holds one.

    Raises:
        MegamodError: missing, not JSON, or a config that names code to run (`auto_map`).
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MegamodError(f"{file}: cannot be read ({error.strerror}); a Hugging Face directory holds config.json") from None
    except ValueError as error:
        raise MegamodError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise MegamodError(f"{file}: a JSON object was expected, not {type(config).__name__}")
    if "auto_map" in config:
        raise MegamodError(f"{file}: names code to run (`auto_map`); megamod runs none from a checkpoint: remove that key")
    return config


def read_shape(path: str | Path) -> Shape:
    """The Shape of a Hugging Face directory or config.json. Raises MegamodError for what megamod cannot compute exactly."""
    try:
        return shape_of(read_config(path))
    except ConfigJsonError as error:
        raise MegamodError(f"{path}: config.json: {error}") from None


class ConfigJsonError(MegamodError):
    """A config.json that no family here can compute."""


def shape_of(config: Json) -> Shape:
    """The Shape that Hugging Face's `config` describes, from either spelling (`rope_theta` or `rope_parameters`)."""
    kind = config.get("model_type", "")
    if kind not in FAMILIES:
        raise ConfigJsonError(f"model_type {kind!r} is not supported, {nearest(str(kind), FAMILIES)}")
    family = FAMILIES[kind]
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise ConfigJsonError(f"{key} = {config[key]!r} is not supported: only {value!r}")

    def need(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or value < 1:
            raise ConfigJsonError(f"{key} = {value!r}: a positive integer was expected")
        return value

    def flag(rule: bool | str) -> bool:
        return bool(config.get(rule, False)) if isinstance(rule, str) else rule

    heads = need("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    windowed = family.window is not None and (family.window == "" or flag(family.window))
    shape = Shape(
        family=kind,
        layers=need("num_hidden_layers"),
        hidden=need("hidden_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.get("head_dim") or need("hidden_size") // heads,
        ffn=need("intermediate_size"),
        vocab=need("vocab_size"),
        rope=_rope_of(config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        max_position=config.get("max_position_embeddings", 2048),
        qkv_bias=flag(family.qkv_bias),
        o_bias=flag(family.o_bias),
        qk_norm=family.qk_norm,
        tied=bool(config.get("tie_word_embeddings", False)),
        sliding_window=config.get("sliding_window") if windowed else None,
    )
    if heads % kv_heads:
        raise ConfigJsonError(f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}")
    return shape


def _rope_of(config: Json) -> Rope:
    """transformers 5 writes `rope_parameters`; 4 wrote `rope_theta` beside `rope_scaling`, whose `type` became `rope_type`."""
    given: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigJsonError("rope_parameters: partial_rotary_factor other than 1 is not supported")
    if kind not in _ROPE_KEYS:
        raise ConfigJsonError(f"rope_type {kind!r} is not supported, {nearest(str(kind), _ROPE_KEYS)}")
    unknown = set(given) - _ROPE_KEYS[kind]
    if unknown:
        raise ConfigJsonError(f"rope_parameters: {sorted(unknown)[0]!r} means nothing for rope_type {kind!r}")
    if kind != "default" and not given.get("factor"):
        raise ConfigJsonError(f"rope_parameters: rope_type {kind!r} needs `factor`")
    if kind in ("llama3", "yarn"):
        given.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    given["original_max_position"] = given.pop("original_max_position_embeddings", None)
    return Rope(theta=float(theta), kind=kind, **{k: v for k, v in given.items() if v is not None})


def both_spellings(config: Json, dtype: str) -> dict[str, Any]:
    """`config` with what transformers 4 and 5 (and clients that read either) call the same thing: RoPE and the dtype.

    Top-level `rope_theta` and `rope_scaling` beside `rope_parameters`; `torch_dtype` beside `dtype`.
    """
    rope = _rope_of(config)
    extra = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    for key in ("type", "rope_type", "rope_theta"):
        extra.pop(key, None)
    scaling = {"rope_type": rope.kind, "type": rope.kind, **extra} if rope.kind != "default" else None
    return {
        **config,
        "architectures": [FAMILIES[config["model_type"]].architecture],
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": rope.kind, "rope_theta": rope.theta, **extra},
        "dtype": dtype,
        "torch_dtype": dtype,
    }
