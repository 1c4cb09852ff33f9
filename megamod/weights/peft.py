"""Adapters in PEFT's words: which linears they sit beside, what their tensors are called, and PEFT directories both ways.

A name of PEFT's is `base_model.model.` and the module's name in the Hugging Face model, so an adapter's tensor has a place in
checkpoints and on any grid as a base's tensor has: `weights.table`.
"""

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megamod import checkpoint, files, foreign
from megamod.config import InitLora, LoraConfig, as_json
from megamod.errors import MegamodError, listed, nearest
from megamod.model.shape import Problem, Score, Shape, read_shape, score_from_json, unnamed
from megamod.weights import checksums
from megamod.weights.bitsandbytes import four_bits, quantised
from megamod.weights.export import drafting, refuse_taken, write_json, write_texts
from megamod.weights.fingerprint import of_source
from megamod.weights.load import Safetensors, Source, Tensors, check_keys, directories, verify, weights_at
from megamod.weights.quantization import Quantization, quantization_from_json
from megamod.weights.table import hf_shapes

T = TypeVar("T")

PREFIX = "base_model.model."
EMBEDDING, HEAD, SCORE = "model.embed_tokens", "lm_head", "score"
# What PEFT adds to modules_to_save of any model with a head of scores, whatever its head is called.
OF_CLASSIFIERS = ("classifier", "score")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT = "megamod.base"  # in the metadata of the tensors' file: of the base's weights: weights.fingerprint
QUANTIZATION = "megamod.quantization"  # in the same metadata: what the base was quantised to, beside which the adapter was trained
NAMES = "megamod.score"  # in the same metadata: the head of scores, of which PEFT knows no names
INITIAL = "pissa_init"  # in a run's directory: A and B as the base's singular value decomposition gave them
TASKS = {None: "CAUSAL_LM", False: "SEQ_CLS", True: "TOKEN_CLS"}  # whether every token is scored; None: a vocabulary → task_type
KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}  # safetensors' words
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Slot:
    """One adapted linear W `[F, C]`: A is `[R, C]`, B `[F, R]`, DoRA's magnitude `[F]`."""

    module: str  # of the Hugging Face model: model.layers.0.self_attn.q_proj
    shape: tuple[int, int]  # F, C
    r: int
    scale: float  # s in W + s·BA

    @property
    def a(self) -> str:
        return f"{PREFIX}{self.module}.lora_A.weight"

    @property
    def b(self) -> str:
        return f"{PREFIX}{self.module}.lora_B.weight"

    @property
    def magnitude(self) -> str:
        return f"{PREFIX}{self.module}.lora_magnitude_vector"


def slots(cfg: LoraConfig, shape: Shape) -> dict[str, Slot]:
    """The linears that `cfg` adapts, by module name, in the model's order; PEFT's rules of matching.

    Raises:
        MegamodError: a name or pattern that matches nothing, or what cannot be adapted.
    """
    linears = _linears(shape)
    chosen = _chosen(cfg, linears, shape)
    for key, patterns in (("rank_pattern", cfg.rank_pattern), ("alpha_pattern", cfg.alpha_pattern)):
        for pattern in patterns:
            if not any(_ends(pattern, module, f"lora.{key}") for module in chosen):
                raise MegamodError(f"lora.{key}: {pattern!r} matches no adapted module, {nearest(pattern, _leaves(chosen))}")
    result = {}
    for module in chosen:
        r = _own(cfg.rank_pattern, module, cfg.r)
        alpha = _own(cfg.alpha_pattern, module, cfg.lora_alpha)
        result[module] = Slot(module, linears[module], r, alpha / (r**0.5 if cfg.use_rslora else r))
    return result


def whole_modules(shape: Shape) -> dict[str, str]:
    """What modules_to_save may name: the last part of a module's name → all of it."""
    return {name.rpartition(".")[2]: name for name in (EMBEDDING, HEAD if shape.score is None else SCORE)}


def saved(cfg: LoraConfig, shape: Shape) -> dict[str, str]:
    """Of `modules_to_save`, to which a head of scores always belongs: PEFT's name of each tensor → the base's, which it copies.

    Raises:
        MegamodError: what is no such module, or the head of a model that ties it to its embedding.
    """
    wholes = whole_modules(shape)
    modules = [SCORE] if SCORE in wholes else []
    for name in cfg.modules_to_save:
        leaf = name.rpartition(".")[2]
        if leaf not in wholes or not _is_or_ends(wholes[leaf], name):
            raise MegamodError(f"lora.modules_to_save: {name!r}, {nearest(name, wholes)}")
        if shape.tied and leaf == "lm_head":
            raise MegamodError("lora.modules_to_save: this model ties lm_head to embed_tokens: name embed_tokens alone")
        modules.append(wholes[leaf])
    return {f"{PREFIX}{origin}": origin for origin in hf_shapes(shape) if origin.rpartition(".")[0] in modules}


def tensors(cfg: LoraConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the adapter, as a PEFT directory holds them."""
    result: dict[str, tuple[int, ...]] = {}
    for slot in slots(cfg, shape).values():
        result |= {slot.a: (slot.r, slot.shape[1]), slot.b: (slot.shape[0], slot.r)}
        if cfg.use_dora:
            result[slot.magnitude] = (slot.shape[0],)
    base = hf_shapes(shape)
    return result | {name: base[origin] for name, origin in saved(cfg, shape).items()}


def _linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """Module → shape of every linear of the decoder layers."""
    found = {}
    for name, size in hf_shapes(shape).items():
        if len(size) == 2 and name.startswith("model.layers."):
            found[name.removesuffix(".weight")] = (size[0], size[1])
    return dict(sorted(found.items(), key=lambda item: _layer(item[0])))  # stable: a layer's keep their order


def _chosen(cfg: LoraConfig, linears: Mapping[str, tuple[int, int]], shape: Shape) -> list[str]:
    names = [*linears, *whole_modules(shape).values()]
    wanted = cfg.target_modules
    modules = list(linears) if wanted == "all-linear" else _matching(wanted, names, "lora.target_modules")
    out = set() if cfg.exclude_modules is None else set(_matching(cfg.exclude_modules, names, "lora.exclude_modules"))
    out |= {origin.rpartition(".")[0] for origin in saved(cfg, shape).values()}
    modules = [module for module in modules if module not in out]
    if (layers := cfg.layers_to_transform) is not None:
        if isinstance(wanted, str) and wanted != "all-linear":
            raise MegamodError(
                "lora.layers_to_transform would not be read: lora.target_modules is a regular expression: say the layers in it"
            )
        for layer in layers:
            if not 0 <= layer < shape.layers:
                raise MegamodError(f"lora.layers_to_transform: {layer}: the model has layers 0 to {shape.layers - 1}")
        exempt = () if isinstance(wanted, str) else wanted  # PEFT takes a whole name as it is
        modules = [module for module in modules if module in exempt or (module in linears and _layer(module) in layers)]
    for module in modules:
        if module not in linears:
            raise MegamodError(
                f"lora.target_modules: {module!r} takes no adapter here: name it in lora.modules_to_save, or in exclude_modules"
            )
    if not modules:
        raise MegamodError("lora: no module is left to adapt: see target_modules, exclude_modules and layers_to_transform")
    return modules


def _matching(wanted: str | Sequence[str], names: Sequence[str], key: str) -> list[str]:
    """Of `names`, those that `wanted` names: as PEFT's target_modules."""
    if isinstance(wanted, str):
        found = [name for name in names if _fullmatch(wanted, name, key)]
        if not found:
            raise MegamodError(f"{key}: the regular expression {wanted!r} matches no linear; whole names look like {names[0]}")
        return found
    for one in wanted:
        if not any(_is_or_ends(name, one) for name in names):
            linears = [name for name in names if name.startswith("model.layers.")]
            raise MegamodError(f"{key}: {one!r} names no linear of this model, {nearest(one, _leaves(linears))}")
    return [name for name in names if any(_is_or_ends(name, one) for one in wanted)]


def _is_or_ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _layer(module: str) -> int:
    return int(module.split(".")[2])


def _fullmatch(pattern: str, name: str, key: str, around: str = "{}") -> bool:
    try:
        return re.fullmatch(around.format(pattern), name) is not None
    except re.error as error:
        raise MegamodError(f"{key}: {pattern!r} is no regular expression ({error})") from None


def _ends(pattern: str, module: str, key: str) -> bool:
    """Whether `pattern` is a module's name or its end, as PEFT reads rank_pattern and alpha_pattern."""
    return _fullmatch(pattern, module, key, r"(.*\.)?({})")


def _own(patterns: Mapping[str, T], module: str, default: T) -> T:
    return next((value for pattern, value in patterns.items() if _ends(pattern, module, "lora")), default)


def _leaves(modules: Sequence[str]) -> list[str]:
    return sorted({module.rpartition(".")[2] for module in modules})


# --- adapter_config.json ---------------------------------------------------------------------------------------------------

# What else PEFT may say that changes what an adapter computes, and the only value that means what megamod computes.
ONLY: Mapping[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "bias": "none", "fan_in_fan_out": False, "kasa_config": None,
    "layer_replication": None, "lora_bias": False, "monteclora_config": None, "target_parameters": None,
    "trainable_token_indices": None, "use_bdlora": None, "use_qalora": False,
}  # fmt: skip
# What says how it was made or found, and nothing about what it computes once it is trained.
SILENT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "velora_config",
}  # fmt: skip
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that leave the base without what A and B took


Kinds = Mapping[str, tuple[Callable[[Any], bool], str]]  # key → what JSON may hold there, and in which words


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max  # false for NaN


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_wanted(value: Any) -> bool:
    return _are_names(value) or (isinstance(value, str) and value != "")


def _is_map(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


# The keys that PEFT and LoraConfig share, and all of LoraConfig's.
SHARED: Kinds = {
    "r": (_is_count, "a positive integer"),
    "lora_alpha": (_is_number, "a finite number"),
    "target_modules": (_is_wanted, "a string or a list of strings"),
    "exclude_modules": (_is_wanted, "a string or a list of strings"),
    "layers_to_transform": (lambda v: isinstance(v, list) and all(_is_count(n, 0) for n in v), "a list of layers, from 0"),
    "rank_pattern": (lambda v: _is_map(v, _is_count), "an object of positive integers"),
    "alpha_pattern": (lambda v: _is_map(v, _is_number), "an object of finite numbers"),
    "modules_to_save": (_are_names, "a list of strings"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
}
OURS: Kinds = {
    **SHARED,
    "init_lora_weights": (lambda v: v in get_args(InitLora), f"one of {', '.join(get_args(InitLora))}"),
    "loraplus_lr_ratio": (_is_number, "a finite number"),
    "path": (_is_text, "a string"),
    "name": (_is_text, "a string"),
}


def read_config(directory: str | Path) -> LoraConfig:
    """What `directory`/adapter_config.json says, in the words of LoraConfig.

    Raises:
        MegamodError: not there, no JSON, no LoRA, or something that would make the adapter compute what megamod does not.
    """
    return _config_of(_read_json(Path(directory)), str(Path(directory) / CONFIG))


def _read_json(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    checksums.verify(directory, wanted=lambda name: name == CONFIG)
    try:
        value = foreign.read_json(file)
    except OSError as error:
        raise MegamodError(f"{file}: cannot be read ({error.strerror}); a PEFT directory holds {CONFIG}") from None
    except ValueError as error:
        raise MegamodError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise MegamodError(f"{file}: a JSON object was expected, not {type(value).__name__}")
    return value


def _config_of(value: Mapping[str, Any], file: str) -> LoraConfig:
    _refuse(value, file)
    given = {key: value[key] for key in SHARED if value.get(key) not in (None, [])}
    if "target_modules" not in given:
        raise MegamodError(f"{file}: target_modules is missing: the names that PEFT saves were expected")
    wanted = given["target_modules"]
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        given["target_modules"] = "all-linear"
    if "layers_to_transform" in given:
        _check_pattern(value.get("layers_pattern"), file)
        if _is_count(given["layers_to_transform"], 0):
            given["layers_to_transform"] = [given["layers_to_transform"]]
    return _made(given, SHARED, file)


def _refuse(value: Mapping[str, Any], file: str) -> None:
    """What would make the adapter compute something else than megamod does, or might."""
    if (kind := value.get("peft_type")) != "LORA":
        raise MegamodError(f"{file}: peft_type = {kind!r}: megamod reads 'LORA' alone")
    for key, given in value.items():
        if key in ONLY and given and given != ONLY[key]:
            raise MegamodError(f"{file}: {key} = {given!r}: megamod computes {json.dumps(ONLY[key])} alone")
        if key not in {*ONLY, *SILENT, *SHARED, "init_lora_weights", "layers_pattern"} and given:
            raise MegamodError(f"{file}: {key} = {given!r}: not known here; remove it if the adapter computes the same without")
    init = str(value.get("init_lora_weights")).lower()
    if init.startswith(CHANGE_THE_BASE):
        raise MegamodError(
            f"{file}: init_lora_weights = {init!r}: the adapter belongs to a base that PEFT has changed; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )


def _check_pattern(pattern: Any, file: str) -> None:
    """Refuse a layers_pattern by which PEFT would not find the number in `model.layers.0`."""
    options = pattern if isinstance(pattern, list) else [pattern]
    if pattern and not any(_is_text(one) and _ends(one, "model.layers", f"{file}: layers_pattern") for one in options):
        raise MegamodError(f"{file}: layers_pattern = {pattern!r}: 'layers' was expected, as this model's are called")


def _made(values: Mapping[str, Any], kinds: Kinds, where: str) -> LoraConfig:
    """A LoraConfig of JSON's `values`, each of its kind."""
    for key, value in values.items():
        fits, words = kinds[key]
        if not fits(value):
            raise MegamodError(f"{where}: {key} = {value!r}: {words} was expected")
    made: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key in {"lora_alpha", "lora_dropout", "loraplus_lr_ratio"} & made.keys():
        made[key] = float(made[key])
    return LoraConfig(**made)


def lora_from_json(value: Any, where: str) -> LoraConfig:
    """The LoraConfig of which `config.as_json` made `value`; `where` begins the line of an error.

    Raises:
        MegamodError: no object, an unknown key, or a value of the wrong kind.
    """
    if not isinstance(value, dict):
        raise MegamodError(f"{where}: a JSON object was expected, not {type(value).__name__}")
    default = LoraConfig()
    for key in value:
        if key not in OURS:
            raise MegamodError(f"{where}: unknown key {key!r}, {nearest(key, OURS)}")
    # None is right where it is the default.
    given = {key: one for key, one in value.items() if one is not None or getattr(default, key) is not None}
    return _made(given, OURS, where)


def config_json(cfg: LoraConfig, shape: Shape, base: str) -> dict[str, Any]:
    """adapter_config.json for PEFT and the servers that read it. `base` is the path or name of the base model.

    Modules are named by their last part where that, with layers_to_transform, is all of them; else each by its whole name.

    Raises:
        MegamodError: see `slots`.
    """
    assert cfg.init_lora_weights != "pissa", "as a plain adapter: `plain`"
    modules = list(slots(cfg, shape))
    leaves, layers = _leaves(modules), sorted({_layer(module) for module in modules})
    are_all = set(modules) == {m for m in _linears(shape) if m.rpartition(".")[2] in leaves and _layer(m) in layers}
    copies = sorted({origin.split(".")[-2] for origin in saved(cfg, shape).values()})
    return {
        "peft_type": "LORA",
        "task_type": TASKS[shape.score.every_token if shape.score is not None else None],
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": cfg.r,
        "lora_alpha": _plainly(cfg.lora_alpha),
        "lora_dropout": cfg.lora_dropout,
        "target_modules": leaves if are_all else sorted(modules),
        "exclude_modules": None,
        "layers_to_transform": layers if are_all and len(layers) < shape.layers else None,
        "layers_pattern": None,
        "rank_pattern": dict(cfg.rank_pattern),
        "alpha_pattern": {key: _plainly(value) for key, value in cfg.alpha_pattern.items()},
        "modules_to_save": copies or None,
        "ensure_weight_tying": shape.tied and bool(copies),  # else PEFT's head would stay with the base's embedding
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": cfg.use_rslora,
        "use_dora": cfg.use_dora,
    }


def _plainly(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


# --- reading ---------------------------------------------------------------------------------------------------------------


class Adapter(Source, Protocol):
    """An adapter's tensors by the names of `tensors`, and what they are."""

    config: LoraConfig
    factor_dtype: torch.dtype  # holds every A and B exactly
    base: str | None  # the base's fingerprint; None: not known
    quantization: Quantization | None  # how the base was quantised in training; None: it was not, or that is not known
    score: Score | None  # the head of scores that it has trained; None: none


class Peft:
    """A PEFT directory as a Source, under the names that PEFT writes today; its tensors in the dtype that they are stored in.

    Raises:
        MegamodError: see `read_config`; no whole safetensors file, two names for one tensor, or tensors that are no floats.
    """

    def __init__(self, directory: str | Path) -> None:
        root = Path(directory)
        self.directories: tuple[Path, ...] = (root,)
        about = _read_json(root)
        self.config = _config_of(about, str(root / CONFIG))
        self.ties = about.get("ensure_weight_tying") is True  # a tied model's head is the copy of its embedding
        self._file, self._stored = _open(root), dict[str, str]()
        for theirs in self._file.keys():  # noqa: SIM118 (a method of safe_open, no mapping)
            if (name := _name(theirs)) in self._stored:
                raise MegamodError(f"{root / TENSORS}: {theirs} and {self._stored[name]} are one tensor, which is expected once")
            self._stored[name] = theirs
        if self.ties:
            self._drop_head(root)
        self._shapes = {name: tuple(self._file.get_slice(theirs).get_shape()) for name, theirs in self._stored.items()}
        self.factor_dtype = self._factor_dtype(root)
        metadata = self._file.metadata() or {}
        self.base: str | None = metadata.get(FINGERPRINT)
        self.quantization = quantization_from_json(metadata.get(QUANTIZATION), f"{root / TENSORS}: {QUANTIZATION}")
        self.score = self._score(about.get("task_type"), metadata.get(NAMES), root)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the tensors, by name."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is stored."""
        return KINDS[self._file.get_slice(self._stored[name]).get_dtype()]

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of `size` at `offset` of a tensor."""
        view = self._file.get_slice(self._stored[name])
        return view[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]

    def _score(self, task: Any, names: str | None, root: Path) -> Score | None:
        """What a run of ours has noted, else what can be told from the tensors."""
        weight = f"{PREFIX}{SCORE}.weight"
        if names is not None:
            return score_from_json(names, f"{root / TENSORS}: {NAMES}")
        every_token = next((every for every, called in TASKS.items() if called == task), None)
        if every_token is None or weight not in self._shapes:
            return None
        count = self._shapes[weight][0]
        problem: Problem = "regression" if count == 1 else "single_label_classification"
        return Score(unnamed(count), problem, every_token)

    def _drop_head(self, root: Path) -> None:
        """PEFT stores a tied copy under both of its names."""
        head, embedding = (f"{PREFIX}{module}.weight" for module in (HEAD, EMBEDDING))
        named = {name.rpartition(".")[2] for name in self.config.modules_to_save}
        if head not in self._stored or embedding not in self._stored or "lm_head" in named:
            return
        ours, theirs = (self._file.get_tensor(self._stored[name]) for name in (embedding, head))
        if not torch.equal(ours, theirs):
            raise MegamodError(f"{root / TENSORS}: ensure_weight_tying ties {head} to {embedding}, and they differ")
        del self._stored[head]

    def _factor_dtype(self, root: Path) -> torch.dtype:
        found: set[torch.dtype] = set()
        for theirs in self._stored.values():
            if (kind := self._file.get_slice(theirs).get_dtype()) not in KINDS:
                raise MegamodError(f"{root / TENSORS}: {theirs} is of {kind}: one of {', '.join(KINDS)} was expected")
            if ".lora_" in theirs:
                found.add(KINDS[kind])
        return functools.reduce(torch.promote_types, found) if found else torch.float32


def _open(root: Path) -> safe_open:
    file = root / TENSORS
    if not file.exists():
        pickles = sorted(root.glob("adapter_model*.bin"))
        if pickles:
            raise MegamodError(f"{pickles[0]}: a pickle may hold code and is not opened; save with PEFT's safe_serialization=True")
        raise MegamodError(f"{root}: holds no {TENSORS}")
    if not foreign.is_inside(root, TENSORS):
        raise MegamodError(f"{file}: a link that leaves the directory is not followed; put the file itself there")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise MegamodError(f"{file}: not a whole safetensors file ({error}); copy it again") from None


def _name(theirs: str) -> str:
    """Of a tensor, as PEFT saves it today: some store it without the prefix, or with the adapter's own name inside."""
    name = theirs if theirs.startswith(PREFIX) else f"{PREFIX}{theirs}"
    name = re.sub(r"\.lora_(A|B)(\.[^.]+)?\.weight$", r".lora_\1.weight", name)
    name = re.sub(r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$", ".lora_magnitude_vector", name)
    return re.sub(r"\.modules_to_save\.[^.]+\.(weight|bias)$", r".\1", name)


class Checkpoint:
    """The adapter in a run's checkpoint as a Source: masters rounded to the run's dtype, PiSSA as a plain adapter (`plain`).

    Raises:
        MegamodError: a checkpoint that is damaged, or of no adapter; PiSSA without the A and B that it began with.
    """

    def __init__(self, path: str | Path) -> None:
        manifest = Path(path) / "manifest.json"
        self._masters = checkpoint.Masters(path)
        about = self._masters.about
        if not about.get("lora"):
            raise MegamodError(f"{path}: a checkpoint of whole weights, which holds no adapter")
        cfg = lora_from_json(about["lora"], f"{manifest}: lora")
        self._trained, self.config = cfg, plain_config(cfg)
        self.factor_dtype = _dtype_named(about.get("dtype"), manifest)
        self._dtypes = {name: _dtype_named(dtype, manifest) for name, dtype in about.get("dtypes", {}).items()}
        self.base: str | None = about.get("base")
        self.quantization = quantization_from_json(about.get("quantization"), f"{manifest}: quantization")
        self.model = str(about.get("model.path") or "")  # where the base is, or was
        shape = about.get("shape")
        self.score = score_from_json(shape.get("score") if isinstance(shape, dict) else None, f"{manifest}: shape.score")
        begun = Path(path).resolve().parents[1] / str(about.get("initial", INITIAL))
        self._initial = Safetensors(begun) if cfg.init_lora_weights == "pissa" else None
        self.directories: tuple[Path, ...] = () if self._initial is None else directories(self._initial)
        sizes = {name: torch.empty(size, device="meta") for name, size in self._masters.shapes().items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in plain(cfg, sizes, sizes)[1].items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the tensors, by name."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is read."""
        return self._dtypes.get(name, self.factor_dtype)

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of `size` at `offset` of a tensor."""
        return self._whole(name)[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]

    def _whole(self, name: str) -> Tensor:
        size = self._masters.shapes()[name]
        tensor = self._masters.read(name, [0] * len(size), size).to(self.dtype(name))
        if self._initial is None or not _is_factor(name):
            return tensor
        if self._initial.shapes().get(name) != size:
            raise MegamodError(f"{self._initial.directory}: {name} is not there as the run began with it")
        return plain(self._trained, {name: tensor}, {name: self._initial.read(name, [0] * len(size), size)})[1][name]


def _dtype_named(name: Any, manifest: Path) -> torch.dtype:
    if name not in DTYPES:
        raise MegamodError(f"{manifest}: dtype = {name!r}: one of {', '.join(DTYPES)} was expected")
    return DTYPES[name]


def opened(path: str | Path, shape: Shape) -> Peft | Checkpoint:
    """The adapter at `path`, which fits a base of `shape`: a PEFT directory; a checkpoint, or a directory with the newest.

    Raises:
        MegamodError: see `Peft`, `Checkpoint` and `check`.
    """
    root = Path(path)
    at = checkpoint_at(root)
    found: Peft | Checkpoint = Peft(root) if at is None else Checkpoint(at)
    found.config = fitted(found.config, shape)
    check(found, found.config, shape, str(path))
    return found


def shape_with(path: str | Path, shape: Shape) -> Shape:
    """`shape` of a base as the adapter at `path` (see `opened`) sits on it: with the head of scores that it has trained, if any.

    Raises:
        MegamodError: see `Peft` and `Checkpoint`; or a base with another head of scores.
    """
    at = checkpoint_at(Path(path))
    found: Peft | Checkpoint = Peft(path) if at is None else Checkpoint(at)
    try:
        return shape.scored(found.score)
    except MegamodError:
        raise MegamodError(f"{path}: an adapter with {found.score}, and the base has {shape.score}") from None


def base_of(path: str | Path) -> str:
    """Where the adapter at `path` (see `opened`) found its base. Raises MegamodError where it does not say."""
    at = checkpoint_at(Path(path))
    said = _read_json(Path(path)).get("base_model_name_or_path") if at is None else Checkpoint(at).model
    if not isinstance(said, str) or not said:
        raise MegamodError(f"{path}: does not say which base it belongs to: name it with --base")
    return said


def checkpoint_at(path: Path) -> Path | None:
    """`path`, if it is a checkpoint; of a run, or its checkpoints, the newest; None where there is none."""
    if not path.is_dir():
        return None
    return path if (path / "manifest.json").is_file() else checkpoint.latest(path) or checkpoint.latest(path / "checkpoints")


def fitted(cfg: LoraConfig, shape: Shape) -> LoraConfig:
    """`cfg` without what names nothing in this model, in its lists and patterns: PEFT passes over that."""
    names = [*_linears(shape), *whole_modules(shape).values()]

    def known(wanted: Sequence[str]) -> tuple[str, ...]:
        return tuple(one for one in wanted if any(_is_or_ends(name, one) for name in names))

    targets, out = cfg.target_modules, cfg.exclude_modules
    if not isinstance(targets, str):
        targets = known(targets) or targets  # when nothing is left, `slots` says so
    if isinstance(out, str):
        out = out if any(_fullmatch(out, name, "lora.exclude_modules") for name in names) else None
    elif out is not None:
        out = known(out) or None

    def matching(patterns: Mapping[str, T], key: str) -> dict[str, T]:
        return {one: value for one, value in patterns.items() if any(_ends(one, name, f"lora.{key}") for name in _linears(shape))}

    whole = tuple(one for one in cfg.modules_to_save if one not in OF_CLASSIFIERS or one in names)
    ranks, alphas = matching(cfg.rank_pattern, "rank_pattern"), matching(cfg.alpha_pattern, "alpha_pattern")
    return replace(cfg, target_modules=targets, exclude_modules=out, modules_to_save=whole, rank_pattern=ranks, alpha_pattern=alphas)


def check(source: Source, cfg: LoraConfig, shape: Shape, where: str) -> None:
    """Every tensor of the adapter once, in the shape that this base needs, and no other.

    Raises:
        MegamodError: a line that lists what is missing, unexpected or mis-shaped; or see `slots`.
    """
    try:
        expected = tensors(cfg, shape)
    except MegamodError as error:
        raise MegamodError(f"{where}: {error}") from None
    if isinstance(source, Peft) and shape.tied and cfg.modules_to_save and not source.ties:
        raise MegamodError(
            f"{where}: without ensure_weight_tying its head is the base's embedding, not the copy in modules_to_save; "
            "here a tied model has one of them: train it with ensure_weight_tying"
        )
    found = source.shapes()
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    copies = [name for name in unexpected if name in {f"{PREFIX}{whole}.weight" for whole in whole_modules(shape).values()}]
    wrong = [f"{k} is {found[k]}, this base needs {expected[k]}" for k in sorted(expected.keys() & found.keys()) if found[k] != expected[k]]
    kinds = {"mis-shaped": wrong, "missing": missing, "unexpected": unexpected}
    faults = [f"{len(names)} {what}: {listed(names, 3)}" for what, names in kinds.items() if names]
    if copies:
        faults.append("a whole embedding or head is read where modules_to_save names it")
    if faults:
        raise MegamodError(f"{where}: an adapter for another base, or not whole: {'; '.join(faults)}")


def check_base(adapter: Adapter, base: Source, shape: Shape, where: str) -> None:
    """Refuse an adapter that was trained beside other weights than `base`'s, where it says which. Raises MegamodError."""
    if adapter.base is not None:  # or the whole base would be read for nothing
        check_fingerprint(adapter, of_source(base, shape), where)


def check_fingerprint(adapter: Adapter, base: str, where: str) -> None:
    """`check_base`, of a base whose fingerprint is known. Raises MegamodError."""
    if adapter.base not in (None, base):
        how = "" if adapter.quantization is None else f", in {adapter.quantization},"
        raise MegamodError(f"{where}: an adapter of another base: its weights{how} had the fingerprint {adapter.base}, these have {base}")


def whole(source: Source) -> dict[str, Tensor]:
    """Every tensor of `source`, in memory."""
    return {name: source.read(name, [0] * len(size), size) for name, size in source.shapes().items()}


# --- PiSSA -----------------------------------------------------------------------------------------------------------------


def plain(cfg: LoraConfig, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A PiSSA adapter, which computes W + s(BA − B₀A₀), as a plain one: A' = [A; A₀] `[2R, C]`, B' = [B, −B₀] `[F, 2R]`, the same s.

    Args:
        tensors: A and B, magnitudes and whole copies, by name.
        initial: A₀ and B₀ by the names of A and B.

    Returns:
        The configuration, see `plain_config`, and the tensors. What is plain already is returned as it is.
    """
    result = dict(tensors)
    if cfg.init_lora_weights == "pissa":
        for name, tensor in tensors.items():
            if _is_factor(name):
                axis, sign = (0, 1) if name.endswith("lora_A.weight") else (1, -1)
                result[name] = torch.cat((tensor, sign * initial[name].to(tensor.dtype)), axis)
    return plain_config(cfg), result


def plain_config(cfg: LoraConfig) -> LoraConfig:
    """Of the plain adapter that computes what a PiSSA adapter does: twice the rank, and lora_alpha so that s stays."""
    if cfg.init_lora_weights != "pissa":
        return cfg
    grow = 2**0.5 if cfg.use_rslora else 2.0
    return replace(
        cfg,
        init_lora_weights="default",
        r=2 * cfg.r,
        lora_alpha=grow * cfg.lora_alpha,
        rank_pattern={key: 2 * r for key, r in cfg.rank_pattern.items()},
        alpha_pattern={key: grow * alpha for key, alpha in cfg.alpha_pattern.items()},
    )


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


# --- writing ---------------------------------------------------------------------------------------------------------------


def write(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    cfg: LoraConfig,
    shape: Shape,
    *,
    base: str,
    fingerprint: str | None = None,
    quantization: Quantization | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write a PEFT directory, whole or not at all, with each tensor in its own dtype.

    Args:
        directory: new, or empty.
        tensors: by the names of `tensors`, in their shapes; plain, as `cfg` is.
        base: the path or name of the base model.
        fingerprint: of the base's weights.
        quantization: of the base in training; None: it had none.
        texts: further small files, by name.

    Raises:
        MegamodError: a target that holds something, tensors that are not those of `cfg`, or a write that fails.
    """
    target = Path(directory)
    check(Tensors(tensors), cfg, shape, str(directory))
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if shape.tied:  # PEFT stores a tied copy under both of its names
        stored |= {f"{PREFIX}lm_head.weight": stored[name].clone() for name in saved(cfg, shape)}
    with drafting(target) as draft:
        metadata = {"format": "pt", **({} if fingerprint is None else {FINGERPRINT: fingerprint})}
        if shape.score is not None:
            metadata[NAMES] = json.dumps(as_json(shape.score), ensure_ascii=False)
        if quantization is not None:
            metadata[QUANTIZATION] = json.dumps(as_json(quantization), ensure_ascii=False)
        save_file(stored, draft / TENSORS, metadata=metadata)
        files.finish(draft / TENSORS)
        write_json(draft / CONFIG, config_json(cfg, shape, base))
        write_texts(draft, texts or {})
        checksums.seal(draft)
    return target


def export(
    path: str | Path, directory: str | Path, shape: Shape, *, base: str | None = None, texts: Mapping[str, str] | None = None
) -> Path:
    """Write the adapter in the checkpoint at `path` as a PEFT directory. One process calls it.

    Args:
        directory: new, or empty.
        shape: of the base.
        base: the base's path or name to write; None: where the run found it.
        texts: further small files, by name.

    Raises:
        MegamodError: see `Checkpoint` and `write`.
    """
    refuse_taken(Path(directory))
    adapter = Checkpoint(checkpoint_at(Path(path)) or path)
    verify(adapter)
    return write(
        directory, whole(adapter), adapter.config, shape, base=base or adapter.model, fingerprint=adapter.base,
        quantization=adapter.quantization, texts=texts,
    )  # fmt: skip


def adopt(directory: str | Path, base: str | Path, out: str | Path) -> Path:
    """Make of a PEFT directory a checkpoint that training goes on from: `out`/step-00000000. Returns its path.

    Raises:
        MegamodError: see `Peft`, `check` and `check_base`; a target that holds something, or a write that fails.
    """
    refuse_taken(Path(out))
    shape = shape_with(directory, read_shape(base))
    adapter = opened(directory, shape)
    weights = quantised(weights_at(base, shape, seed=0), adapter.quantization, str(directory))  # its own head of scores counts, none drawn
    check_keys(weights, shape, str(base))
    verify(weights)
    verify(adapter)
    in_training = four_bits(weights)
    check_base(adapter, weights, shape, str(directory))
    masters = whole(adapter)
    about = {
        "lora": as_json(adapter.config),
        "model.path": str(base),
        "dtype": dtype_name(adapter.factor_dtype),
        "dtypes": {name: dtype_name(t.dtype) for name, t in masters.items() if t.dtype is not adapter.factor_dtype},
        "base": adapter.base or of_source(weights, shape),
        **({"quantization": as_json(in_training.quantization)} if in_training is not None else {}),
        **({"shape": as_json(shape)} if shape.score is not None else {}),
    }
    with drafting(Path(out)) as draft:
        name = checkpoint.write(draft, 0, masters, about).name
    return Path(out) / name


def dtype_name(dtype: torch.dtype) -> str:
    """As configurations spell it: bfloat16."""
    return str(dtype).removeprefix("torch.")
