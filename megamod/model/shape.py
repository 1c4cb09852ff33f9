"""What a decoder is, as data: families, a model's `Shape`, and Hugging Face's config.json in both of its spellings.

A family is a row of FAMILIES. A new model of the Llama kind (RMSNorm, SwiGLU, RoPE, grouped queries) is one more row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from megamod import foreign
from megamod.errors import MegamodError, listed, nearest
from megamod.weights import checksums
from megamod.weights.quantization import Quantization

Json = Mapping[str, Any]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
MOST_LABELS = 63  # a position's classes are the bits of one int64
LARGEST = 1 << 31  # of any count that a config.json may say
MOST_LAYERS = 4096
MOST_EXPERTS = 4096


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
    # Models that see images: how many of the D/2 frequencies read a token's place in time, in height and in width.
    mrope_section: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False  # time, height, width in turn, not in stretches


@dataclass(frozen=True)
class Score:
    """A head of scores in the vocabulary's place: a reward model, or a classifier of whole texts or of each token."""

    labels: tuple[str, ...]  # one score each, in the order of the weight's rows; ("reward",) for a reward model
    problem: Problem  # transformers' `problem_type`: softmax over the labels, a sigmoid each, or the scores as they are
    # False: transformers' ForSequenceClassification, read at a text's last token; True: ForTokenClassification, whose head has a bias.
    every_token: bool = False

    def fault(self) -> str | None:
        """What is wrong with it, as the end of a line; None: nothing."""
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if not self.labels:
            return "no labels: at least one was expected"
        if len(self.labels) > MOST_LABELS:
            return f"{len(self.labels)} labels: at most {MOST_LABELS} were expected"
        if "" in self.labels or twice:
            return f"the label {(twice or [''])[0]!r}: names, each once, were expected"
        if self.problem not in get_args(Problem):
            return f"problem = {self.problem!r}, {nearest(str(self.problem), get_args(Problem))}"
        if self.problem == "single_label_classification" and len(self.labels) == 1:  # transformers refuses to load such a one, too
            return "single_label_classification of one label: use two, or 'regression' for a single score"
        return None

    def __str__(self) -> str:
        """`a head of 2 scores, safe and unsafe`"""
        count, each = len(self.labels), " for every token" if self.every_token else ""
        names = " and ".join(part for part in (", ".join(self.labels[:-1]), self.labels[-1]) if part) if count <= 8 else listed(self.labels)
        return f"a head of {count} {'score' if count == 1 else 'scores'}{each}, {names}"


def score_from_json(value: Any, where: str) -> Score | None:
    """The Score of which `config.as_json` made `value`, an object or its text; None for null. Raises MegamodError."""
    try:
        found = foreign.parse_json(value) if isinstance(value, str) else value
        if found is None:
            return None
        score = Score(tuple(map(str, found["labels"])), found["problem"], found["every_token"] is True)
    except (ValueError, KeyError, TypeError) as error:
        raise MegamodError(f"{where}: {value!r} is no head of scores ({error})") from None
    if (fault := score.fault()) is not None:
        raise MegamodError(f"{where}: {fault}")
    return score


def unnamed(count: int) -> tuple[str, ...]:
    """What transformers calls so many labels that nobody has named."""
    return tuple(f"LABEL_{i}" for i in range(count))


@dataclass(frozen=True)
class Experts:
    """Several MLPs in the place of each layer's one, of which a router takes a few for each token."""

    count: int
    per_token: int
    ffn: int  # of one of them


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
    score: Score | None = None  # in the vocabulary's place; None: the head is the vocabulary
    quantization: Quantization | None = None  # of the layers' linears, frozen; None: every weight is in the model's dtype
    experts: Experts | None = None  # in every layer; such a model is converted, and not trained

    def scored(self, score: Score | None) -> "Shape":
        """This decoder with `score` for its head, which then shares nothing with the embedding; None: as it is.

        A checkpoint's own head of scores may be given names where it has none; another order of its names would be another meaning.

        Raises:
            MegamodError: a head that cannot be, or another one than the checkpoint's own.
        """
        if score is None:
            return self
        if (fault := score.fault()) is not None:
            raise MegamodError(f"model.score: {fault}")
        own = self.score or score
        if own.every_token != score.every_token or own.labels not in (score.labels, unnamed(len(score.labels))):
            raise MegamodError(
                f"model.score is {score}, and the checkpoint has {own}: leave model.score out, or begin from a model with a vocabulary"
            )
        return replace(self, score=score, tied=False)

    def quantized(self, quantization: Quantization | None) -> "Shape":
        """This decoder with its linears in 4 bits; None: as it is.

        Raises:
            MegamodError: a quantization that cannot be, or another one than the checkpoint's own.
        """
        if quantization is None:
            return self
        if (fault := quantization.fault()) is not None:
            raise MegamodError(f"model.quantization: {fault}")
        own = self.quantization
        if own is not None and quantization == replace(own, modules_to_not_convert=()):  # which linears the checkpoint itself says
            return self
        if own not in (None, quantization):
            skipped = f", without {listed(own.modules_to_not_convert, 3)}" if own.modules_to_not_convert else ""
            raise MegamodError(f"model.quantization is {quantization}, and the checkpoint is in {own}{skipped}: leave it out")
        return replace(self, quantization=quantization)

    @property
    def outputs(self) -> int:
        """Rows of the head: V, or the number of scores."""
        return self.vocab if self.score is None else len(self.score.labels)

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
        mlp = 3 * self.hidden * self.ffn if (e := self.experts) is None else e.count * (3 * self.hidden * e.ffn + self.hidden)
        layer = attention + biases + mlp + 2 * self.hidden
        head = 0 if self.tied else self.outputs * self.hidden
        bias = self.outputs if self.score is not None and self.score.every_token else 0
        return self.layers * layer + self.hidden + self.vocab * self.hidden + head + bias

    def flops(self, lengths: Iterable[int], labelled: int) -> float:
        """Floating-point operations of one forward pass over documents of `lengths` tokens, `labelled` positions of which
        reach the head. Matrix products only; attention counts the causal half. A training step is three times that.
        """
        tokens = squares = 0
        for n in lengths:
            tokens, squares = tokens + n, squares + n * n
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        per_token = self.hidden * (q + 2 * kv) + q * self.hidden + 3 * self.hidden * self.ffn
        return 2.0 * self.layers * (per_token * tokens + q * squares) + 2.0 * self.hidden * self.outputs * labelled


@dataclass(frozen=True)
class Family:
    """How a `model_type` of Hugging Face maps to a Shape: each entry is a constant or the config key that decides."""

    architecture: str  # the class an export names, so that transformers, vLLM and SGLang load it
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    qk_norm: bool = False
    head_dim: int | None = None  # where config.json does not say; None: hidden_size / num_attention_heads
    window: str | None = None  # the key whose truth turns `sliding_window` on; "" when the key itself does
    experts: bool = False  # whether every layer has experts

    def architecture_of(self, score: Score | None) -> str:
        """transformers' class of a model of this family with that head."""
        return self.architecture if score is None else self.architecture.removesuffix("ForCausalLM") + ENDINGS[score.every_token]


# How transformers' classes with a head of scores end: by whether every token is scored.
ENDINGS = {False: "ForSequenceClassification", True: "ForTokenClassification"}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias"),  # Llama 1-3, Yi, SmolLM2
    "mistral": Family("MistralForCausalLM", window=""),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window="use_sliding_window"),  # Qwen2, Qwen2.5
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        head_dim=128,
        window="use_sliding_window",
    ),  # Qwen3, Qwen3Guard-Gen
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        head_dim=128,
        window="use_sliding_window",
        experts=True,
    ),
    "internlm3": Family("InternLM3ForCausalLM", qkv_bias="qkv_bias", o_bias="bias"),
}

# Keys that would change the computation in a way no family here has: a config that sets one is refused.
ONLY = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "logit_scale": None,
    "final_logit_softcapping": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
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
        MegamodError: missing, not JSON, not as its checksum says, or a config that names code to run (`auto_map`).
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if file.name == "config.json":
        checksums.verify(file.parent, wanted=lambda name: name == file.name)
    try:
        config = foreign.read_json(file)
    except OSError as error:
        raise MegamodError(f"{file}: cannot be read ({error.strerror}); a Hugging Face directory holds config.json") from None
    except ValueError as error:
        raise MegamodError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise MegamodError(f"{file}: a JSON object was expected, not {type(config).__name__}")
    if "auto_map" in config:
        raise MegamodError(f"{file}: names code to run (`auto_map`); megamod runs none from a checkpoint: remove that key")
    return config


def read_shape(path: str | Path, *, experts: bool = False) -> Shape:
    """The Shape of a Hugging Face directory or config.json. Raises MegamodError for what megamod cannot compute exactly.

    Args:
        experts: whether the caller can do with a model of experts, which is not computed here: it converts.
    """
    try:
        shape = shape_of(read_config(path))
    except ConfigJsonError as error:
        raise MegamodError(f"{path}: config.json: {error}") from None
    if shape.experts is not None and not experts:
        raise MegamodError(f"{path}: config.json: a model of {shape.experts.count} experts: it can be converted, and not be trained")
    return shape


class ConfigJsonError(MegamodError):
    """A config.json that no family here can compute."""


def shape_of(config: Json) -> Shape:
    """The Shape that Hugging Face's `config` describes, from either spelling (`rope_theta` or `rope_parameters`)."""
    kind = str(config.get("model_type", ""))
    if kind not in FAMILIES:
        raise ConfigJsonError(f"model_type {kind!r} is not supported, {nearest(kind, FAMILIES)}")
    family = FAMILIES[kind]
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise ConfigJsonError(f"{key} = {config[key]!r} is not supported: only {value!r}")
    in_four_bits(config)  # what it refuses is refused now

    def flag(rule: bool | str) -> bool:
        return _get(config, rule, bool, False) if isinstance(rule, str) else rule

    heads: int = _get(config, "num_attention_heads", int)
    hidden: int = _get(config, "hidden_size", int)
    kv_heads: int = _get(config, "num_key_value_heads", int, heads)
    head_dim: int = _get(config, "head_dim", int, family.head_dim or hidden // heads)
    if heads % kv_heads:
        raise ConfigJsonError(f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}")
    if head_dim % 2:
        raise ConfigJsonError(f"head_dim = {head_dim}: an even number was expected, for RoPE")
    windowed = family.window is not None and (family.window == "" or flag(family.window))
    decoder = Shape(
        family=kind,
        layers=_get(config, "num_hidden_layers", int),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=_get(config, "intermediate_size", int),
        vocab=_get(config, "vocab_size", int),
        rope=_rope_of(config, head_dim),
        norm_eps=_get(config, "rms_norm_eps", float, 1e-6),
        max_position=_get(config, "max_position_embeddings", int),
        qkv_bias=flag(family.qkv_bias),
        o_bias=flag(family.o_bias),
        qk_norm=family.qk_norm,
        tied=flag("tie_word_embeddings"),
        sliding_window=_get(config, "sliding_window", int, None) if windowed else None,
        experts=_experts_of(config) if family.experts else None,
    )
    if decoder.layers > MOST_LAYERS:
        raise ConfigJsonError(f"num_hidden_layers = {decoder.layers}: at most {MOST_LAYERS} were expected")
    return decoder.scored(_score_of(config))


def _experts_of(config: Json) -> Experts:
    number = "num_experts" if "num_experts" in config else "num_local_experts"  # as transformers 5 writes it
    count, each, ffn = (_get(config, key, int) for key in (number, "num_experts_per_tok", "moe_intermediate_size"))
    if not each <= count <= MOST_EXPERTS:
        raise ConfigJsonError(
            f"{number} = {count}, num_experts_per_tok = {each}: at most {MOST_EXPERTS}, and no more a token, were expected"
        )
    return Experts(count, each, ffn)


def in_four_bits(config: Json) -> bool:
    """Whether the weights beside `config` are in 4 bits, as bitsandbytes stores them; `weights.bitsandbytes` reads these.

    Raises:
        ConfigJsonError: they are quantised in another way.
    """
    said = config.get("quantization_config")
    if said is None:
        return False
    if not isinstance(said, Mapping):
        raise ConfigJsonError(f"quantization_config: an object was expected, not {said!r}")
    loads = {bits: said.get(f"load_in_{bits}bit") is True for bits in (4, 8)}
    method = said.get("quant_method", "bitsandbytes" if any(loads.values()) else None)  # the first versions did not say
    if method != "bitsandbytes":
        raise ConfigJsonError(f"quantization_config: quant_method = {method!r} is not supported: only 'bitsandbytes', in 4 bits")
    if loads != {4: True, 8: False}:
        raise ConfigJsonError("quantization_config: only 4 bits are supported: load_in_4bit = true and load_in_8bit = false were expected")
    if (storage := said.get("bnb_4bit_quant_storage", "uint8")) != "uint8":
        raise ConfigJsonError(f"quantization_config: bnb_4bit_quant_storage = {storage!r} is not supported: only 'uint8'")
    return True


def _score_of(config: Json) -> Score | None:
    """The head of scores that `config` describes as transformers reads it; None: none."""
    architecture = str(config.get("architectures")).strip("[]'")  # a list of one name; null in some old exports
    every_token = next((every for every, ending in ENDINGS.items() if architecture.endswith(ending)), None)
    if every_token is None:
        return None
    names = config.get("id2label")
    if names is None:  # transformers leaves out what it takes for granted
        names = dict(enumerate(unnamed(_get(config, "num_labels", int, 2))))
    if not isinstance(names, Mapping) or {str(key) for key in names} != {str(i) for i in range(len(names))}:
        raise ConfigJsonError(f"id2label = {names!r}: an object with a name for each of 0, 1, … was expected")
    labels = {int(key): str(name) for key, name in names.items()}
    if every_token and not _get(config, "token_classification_bias", bool, True):
        raise ConfigJsonError("token_classification_bias = false is not supported: only true")
    problem: Any = config.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
    score = Score(tuple(labels[i] for i in range(len(labels))), problem, every_token)
    if (fault := score.fault()) is not None:
        raise ConfigJsonError(f"id2label, problem_type: {fault}")
    return score


_NEEDED: Any = object()


def _get(config: Json, key: str, kind: type, default: Any = _NEEDED) -> Any:
    """`config[key]` of the given kind, numbers positive; absent or null: `default`. Raises ConfigJsonError."""
    value = config.get(key)
    if value is None:
        if default is _NEEDED:
            raise ConfigJsonError(f"{key} is missing")
        return default
    number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    fits = {bool: isinstance(value, bool), int: number and isinstance(value, int), float: number}[kind]
    if not fits:
        what = {bool: "true or false", int: "a positive integer", float: "a positive number"}[kind]
        raise ConfigJsonError(f"{key} = {value!r}: {what} was expected")
    if kind is int and value > LARGEST:
        raise ConfigJsonError(f"{key} = {value}: at most {LARGEST} was expected")
    return value


def _rope_entries(config: Json) -> tuple[str, float, dict[str, Any]]:
    """Kind, theta and the kind's own keys, from either spelling.

    transformers 5 writes `rope_parameters`; 4 wrote `rope_theta` beside `rope_scaling`, whose `type` became `rope_type`. Where
    both are there, as in what megamod exports, `rope_parameters` is the whole.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ConfigJsonError(f"rope_parameters = {given!r}: an object was expected")
    entries = {key: value for key, value in given.items() if value is not None}
    kind = str(entries.pop("rope_type", None) or entries.get("type") or "default")
    entries.pop("type", None)
    kind = "default" if kind == "mrope" else kind  # Qwen2-VL's word for the default with mrope_section
    theta = _get(entries, "rope_theta", float, _get(config, "rope_theta", float, 10000.0))
    entries.pop("rope_theta", None)
    return kind, float(theta), entries


def _rope_of(config: Json, head_dim: int) -> Rope:
    kind, theta, entries = _rope_entries(config)
    section, interleaved = entries.pop("mrope_section", None), _get(entries, "mrope_interleaved", bool, False)
    given = entries.pop("mrope_interleaved", None) is not None
    if section is None and (given or _says_mrope(config)):
        raise ConfigJsonError("rope_parameters: mrope without mrope_section: which frequencies read height and width is not said")
    if section is not None:
        numbers = isinstance(section, list | tuple) and len(section) == 3 and all(type(n) is int and n > 0 for n in section)
        if not numbers or sum(section) != head_dim // 2:
            raise ConfigJsonError(
                f"mrope_section = {section!r}: three positive integers that sum to head_dim / 2 = {head_dim // 2} were expected"
            )
        section = tuple(section)
    if entries.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigJsonError("rope_parameters: partial_rotary_factor other than 1 is not supported")
    if kind not in _ROPE_KEYS:
        raise ConfigJsonError(f"rope_type {kind!r} is not supported, {nearest(kind, _ROPE_KEYS)}")
    unknown = set(entries) - _ROPE_KEYS[kind]
    if unknown:
        raise ConfigJsonError(f"rope_parameters: {min(unknown)!r} means nothing for rope_type {kind!r}")
    if kind in ("llama3", "yarn"):
        entries.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if kind != "default" and "factor" not in entries:
        raise ConfigJsonError(f"rope_parameters: rope_type {kind!r} needs `factor`")
    kinds = {"original_max_position_embeddings": int, "truncate": bool}
    values = {key: _get(entries, key, kinds.get(key, float)) for key in entries}
    values["original_max_position"] = values.pop("original_max_position_embeddings", None)
    return Rope(theta=theta, kind=kind, mrope_section=section, mrope_interleaved=interleaved, **values)


def _says_mrope(config: Json) -> bool:
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return "mrope" in (given.get("rope_type"), given.get("type"))


def both_spellings(config: Json, dtype: str) -> dict[str, Any]:
    """`config` with what transformers 4 and 5 (and clients that read either) call the same thing: RoPE and the dtype.

    Top-level `rope_theta` and `rope_scaling` beside `rope_parameters`; `torch_dtype` beside `dtype`.
    """
    family = FAMILIES[config["model_type"]]
    kind, theta, entries = _rope_entries(config)
    old = "mrope" if kind == "default" and entries else kind  # transformers 4's word; nothing else goes with the default
    scaling = {"rope_type": kind, "type": old, **entries} if kind != "default" or entries else None
    return {
        **config,
        "architectures": [family.architecture_of(_score_of(config))],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": kind, "rope_theta": theta, **entries},
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def with_score(config: Json, score: Score, pad: int | None) -> dict[str, Any]:
    """`config` of a model with `score` for its head, in transformers' words.

    Args:
        pad: the token that fills up a batch, which ForSequenceClassification passes over in looking for a text's last token. None:
            there is none that no text may end with; transformers then refuses batches of several texts instead of reading the
            wrong token.
    """
    return {
        **config,
        "architectures": [FAMILIES[config["model_type"]].architecture_of(score)],
        "id2label": {str(i): label for i, label in enumerate(score.labels)},
        "label2id": {label: i for i, label in enumerate(score.labels)},
        "num_labels": len(score.labels),
        "problem_type": score.problem,
        "tie_word_embeddings": False,
        "pad_token_id": pad,
    }
