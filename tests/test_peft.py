"""Adapters against peft itself: which modules, which tensors, which numbers; directories both ways, merging, and what is refused."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import distributed
import oracle
import peft as hf_peft
import pytest
import tiny
import torch
from complaints import complaint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parity import Case, running
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megamod import checkpoint
from megamod.config import LoraConfig, ParallelConfig, as_json
from megamod.errors import MegamodError
from megamod.model.shape import Shape, shape_of
from megamod.weights import checksums, peft
from megamod.weights import export as export_module
from megamod.weights.fingerprint import of_source
from megamod.weights.load import Safetensors, Tensors, check_keys
from megamod.weights.merge import merge

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft.*", "ignore::RuntimeWarning:peft.*", "ignore::FutureWarning:transformers.*"
)
TOKENS = torch.arange(20)[None] * 7 % 61
ODD = LoraConfig(target_modules=r"model\.layers\.(0\.self_attn\.(q|o)|2\.mlp\.down|3\.self_attn\.v)_proj", r=3, lora_alpha=5.0)

# name → the tiny model and the adapter: together every field that PEFT has for what megamod computes.
ADAPTERS: dict[str, tuple[str, LoraConfig]] = {
    "lora": ("qwen2", LoraConfig(r=3, lora_alpha=7.0)),
    "bias": ("llama-bias-tied", LoraConfig(r=4, lora_alpha=16.0, target_modules=("q_proj", "o_proj"))),
    "rslora": ("qwen3", LoraConfig(r=10, lora_alpha=3.5, target_modules=("v_proj", "down_proj"), use_rslora=True)),
    "dora": ("qwen3", LoraConfig(r=10, target_modules=("q_proj", "o_proj", "up_proj", "down_proj"), use_dora=True)),
    "dora-rslora": ("mistral", LoraConfig(r=3, target_modules=("k_proj", "gate_proj"), use_dora=True, use_rslora=True)),
    "patterns": (
        "llama3",
        LoraConfig(
            target_modules=("q_proj", "v_proj", "up_proj"),
            rank_pattern={"layers.1.self_attn.q_proj": 3, r"layers\.[23]\..*v_proj": 10},
            alpha_pattern={"up_proj": 2.5, "layers.1.self_attn.q_proj": 4},
        ),
    ),
    "layers": ("qwen2", LoraConfig(r=3, target_modules=("q_proj", "gate_proj"), layers_to_transform=(1, 3))),
    "excluded": ("qwen2", LoraConfig(r=3, exclude_modules=r".*layers\.[02]\..*|.*mlp.*")),
    "odd": ("qwen3", ODD),
    "odd-dora": ("qwen2", replace(ODD, use_dora=True, rank_pattern={"down_proj": 7})),
    "saved": ("qwen2", LoraConfig(r=3, target_modules=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))),
    "saved-head": ("qwen3", LoraConfig(r=3, target_modules=("q_proj",), modules_to_save=("lm_head",))),
    "saved-tied": ("qwen3-tied", LoraConfig(r=3, target_modules=("q_proj",), modules_to_save=("embed_tokens",))),
}


def base_directory(directory: Path, name: str, dtype: torch.dtype = torch.float64) -> Path:
    """Tiny model `name` with `tiny.weights`, in two shards."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(tiny.config(name)))
    (directory / "tokenizer.json").write_text("{}")
    tensors = tiny.weights(name, dtype)
    where = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for file in set(where.values()):
        save_file({key: t for key, t in tensors.items() if where[key] == file}, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def made(cfg: LoraConfig, shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 3) -> dict[str, Tensor]:
    """An adapter as if it was trained: no tensor is 0, magnitudes are positive."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, size in peft.tensors(cfg, shape).items():
        x = torch.randn(*size, generator=generator, dtype=torch.float64)
        result[name] = (0.5 + x.abs() if "magnitude" in name else 0.3 * x).to(dtype)
    return result


def by_hand(name: str, cfg: LoraConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The adapted model's weights, by the definitions, in float64."""
    state = {key: value.double() for key, value in tiny.weights(name, dtype).items()}
    for key in list(state):
        prefix = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in tensors:
            a, b = (tensors[f"{prefix}.lora_{x}.weight"].double() for x in "AB")
            alpha = own(cfg.alpha_pattern, key, cfg.lora_alpha)
            r = own(cfg.rank_pattern, key, cfg.r)
            assert r == len(a)
            state[key] = state[key] + alpha / (math.sqrt(r) if cfg.use_rslora else r) * (b @ a)
            if cfg.use_dora:
                m = tensors[f"{prefix}.lora_magnitude_vector"].double()
                state[key] = m[:, None] * state[key] / state[key].square().sum(1, keepdim=True).sqrt()
        elif f"{prefix}.weight" in tensors:
            state[key] = tensors[f"{prefix}.weight"].double()
    return state


def own(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    return next((v for p, v in patterns.items() if re.search(rf"(^|\.){p}$", key.removesuffix(".weight"))), default)


@torch.no_grad()
def logits(name: str, state: Mapping[str, Tensor]) -> Tensor:
    with mock.patch.object(tiny, "weights", return_value=state):
        return oracle.model(name)(TOKENS).logits


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names, dtypes, shapes and bits that are not the same."""
    keys = [f"{key} is in one only" for key in sorted(found.keys() ^ expected.keys())]
    both = sorted(found.keys() & expected.keys())
    return keys + [k for k in both if found[k].dtype != expected[k].dtype or not torch.equal(found[k], expected[k])]


# --- which modules ---------------------------------------------------------------------------------------------------------

TWELVE = {**tiny.config("qwen2"), "num_hidden_layers": 12}  # layers 1 and 11 are told apart
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = (
    *LINEARS,
    "self_attn.k_proj",
    "layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "proj",
)
REGEXES = (
    r".*\.(q|v)_proj", r".*_proj", r"model\.layers\.1\..*_proj", r"model.layers.1.*k_proj", r".*\.1?[0-3]\.mlp\.(up|down)_proj",
    r".*attn.(o_proj)", r"q_proj", r".*(lm_head|q_proj)", r".*[02468]\.self_attn\.[qk]_proj",
)  # fmt: skip
PATTERNS = ("q_proj", "_proj", r"layers\.[01]\..*v_proj", r".*down_proj", r"^model\.layers\.1\.mlp\.up_proj", "layers.1.self_attn.q_proj")


def lists(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True).map(tuple)


CONFIGS = st.builds(
    LoraConfig,
    r=st.sampled_from((3, 10)),
    target_modules=st.one_of(lists(LINEARS), lists((*NAMES, "lm_head")), st.sampled_from(REGEXES), st.just("all-linear")),
    exclude_modules=st.one_of(st.none(), lists((*NAMES, "lm_head", "embed_tokens")), st.sampled_from(REGEXES)),
    layers_to_transform=st.one_of(st.none(), st.sets(st.integers(0, 11), min_size=1).map(tuple)),
    rank_pattern=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 9), max_size=2),
    alpha_pattern=st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from((1.0, 2.5)), max_size=2),
    modules_to_save=st.sampled_from(((), ("lm_head",), ("lm_head", "model.embed_tokens"))),
    use_rslora=st.booleans(),
)


def twelve() -> nn.Module:
    config = dict(TWELVE)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


MODEL = twelve()


def peft_adapts(words: Mapping[str, Any]) -> dict[str, tuple[int, float]] | None:
    """Module → r and scale, of what peft makes of a LoraConfig's words; None: it refuses them."""
    model = deepcopy(MODEL)
    try:
        config = hf_peft.LoraConfig(**words)
        hf_peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    except ValueError:
        return None
    found = {name: m for name, m in model.named_modules() if isinstance(m, hf_peft.tuners.lora.LoraLayer)}
    return {name: (m.r["default"], m.scaling["default"]) for name, m in found.items()}


def peft_words(cfg: LoraConfig) -> dict[str, Any]:
    words = {key: value for key, value in as_json(cfg).items() if key in peft.SHARED}
    return words | {"modules_to_save": words["modules_to_save"] or None}


@settings(deadline=None, max_examples=30)
@given(CONFIGS)
@example(LoraConfig(target_modules=("q_proj", "model.layers.1.self_attn.q_proj"), layers_to_transform=(0,)))  # a whole name stays
@example(LoraConfig(target_modules=("q_proj", "lm_head"), modules_to_save=("lm_head",)))
@example(LoraConfig(target_modules=r".*(lm_head|q_proj)", exclude_modules=("lm_head",)))
@example(LoraConfig(rank_pattern={r"layers\.[01]\..*v_proj": 3, "v_proj": 5}, alpha_pattern={"_proj": 2.0}))  # `_proj` is no end
def test_the_modules_that_peft_adapts(cfg: LoraConfig) -> None:
    shape = shape_of(TWELVE)
    direct = peft_adapts(peft_words(cfg))
    try:
        ours = {module: (slot.r, slot.scale) for module, slot in peft.slots(cfg, shape).items()}
    except MegamodError as error:
        # peft refuses it too, or adapts the head, or passes over a name without effect.
        text = str(error)
        silent = ("names no linear", "matches no linear", "matches no adapted module", "would not be read")
        heads = direct is not None and not direct.keys().isdisjoint({"lm_head", "model.embed_tokens"})
        assert not direct or heads or any(words in text for words in silent), (text, direct)
        return
    if cfg.target_modules != "all-linear" or cfg.layers_to_transform is None:  # peft does not take both
        assert direct == ours or direct is None
    assert list(ours) == [module for module in peft._linears(shape) if module in ours]  # the model's order
    written = peft.config_json(cfg, shape, "base")
    assert peft_adapts(json.loads(json.dumps(written))) == ours
    assert peft._config_of(written, "") == replace(
        peft._config_of(written, ""), r=cfg.r, lora_alpha=cfg.lora_alpha, rank_pattern=cfg.rank_pattern, use_rslora=cfg.use_rslora
    )


def test_whole_names_match_no_other_layer() -> None:
    shape = shape_of(TWELVE)
    cfg = LoraConfig(target_modules=r"model\.layers\.(1\.self_attn\.q|2\.mlp\.up)_proj")
    written = peft.config_json(cfg, shape, "base")
    assert written["target_modules"] == ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"]
    assert set(peft_adapts(written) or ()) == set(written["target_modules"])


@pytest.mark.parametrize(
    ("cfg", "targets", "layers"),
    [
        (LoraConfig(), sorted(LINEARS), None),
        (LoraConfig(target_modules=("v_proj", "q_proj")), ["q_proj", "v_proj"], None),
        (LoraConfig(target_modules=r".*\.(3|11)\..*[qv]_proj"), ["q_proj", "v_proj"], [3, 11]),
        (LoraConfig(exclude_modules=("mlp.up_proj", "o_proj", "lm_head")), sorted({*LINEARS} - {"up_proj", "o_proj"}), None),
    ],
)
def test_names_are_short_where_they_can_be(cfg: LoraConfig, targets: list[str], layers: list[int] | None) -> None:
    written = peft.config_json(cfg, shape_of(TWELVE), "base")
    assert (written["target_modules"], written["layers_to_transform"]) == (targets, layers)


# --- ours → peft -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ADAPTERS)
def test_peft_computes_what_was_exported(tmp_path: Path, case: str) -> None:
    name, cfg = ADAPTERS[case]
    tensors = made(cfg, tiny.shape(name))
    peft.write(tmp_path / "out", tensors, cfg, tiny.shape(name), base="models/base", fingerprint="0123", texts={"run.json": "{}\n"})
    wrapped = hf_peft.PeftModel.from_pretrained(oracle.model(name), str(tmp_path / "out"))
    assert not hf_peft.set_peft_model_state_dict(wrapped, load_file(tmp_path / "out" / peft.TENSORS)).unexpected_keys
    with torch.no_grad():
        theirs = wrapped(TOKENS).logits
    assert (theirs - logits(name, by_hand(name, cfg, tensors))).abs().max() < 1e-11
    assert (theirs - logits(name, tiny.weights(name))).abs().max() > 1e-3

    stored = load_file(tmp_path / "out" / peft.TENSORS)
    if case == "saved-tied":  # peft stores the copy under both names
        assert torch.equal(stored.pop("base_model.model.lm_head.weight"), tensors["base_model.model.model.embed_tokens.weight"])
    assert differences(stored, tensors) == []
    found = peft.Peft(tmp_path / "out")
    assert (found.base, found.factor_dtype) == ("0123", torch.float64)
    peft.check(found, found.config, tiny.shape(name), "here")
    assert peft.base_of(tmp_path / "out") == "models/base"
    assert {f.name for f in tmp_path.rglob("*")} == {"out", peft.CONFIG, peft.TENSORS, "run.json", checksums.SUMS}
    numbers = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert type(numbers["lora_alpha"]) is (int if cfg.lora_alpha.is_integer() else float)


def test_files_are_readable_by_the_umask(tmp_path: Path) -> None:
    name, cfg = ADAPTERS["lora"]
    peft.write(tmp_path / "deep" / "out", made(cfg, tiny.shape(name)), cfg, tiny.shape(name), base="b")
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "deep" / "out").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_a_view_is_written_whole(tmp_path: Path) -> None:
    """Transposed and shared tensors: safetensors takes neither as they are."""
    cfg, shape = LoraConfig(r=32, target_modules=("q_proj",)), tiny.shape("qwen2")
    square = torch.randn(32, 32)
    tensors = {name: square.t() for name in peft.tensors(cfg, shape)}
    peft.write(tmp_path / "out", tensors, cfg, shape, base="b")
    assert differences(load_file(tmp_path / "out" / peft.TENSORS), tensors) == []


# --- peft → ours → peft ----------------------------------------------------------------------------------------------------

SAVED_BY_PEFT: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "lora": ("qwen2", torch.float32, {"target_modules": ["q_proj", "down_proj"], "r": 3}),
    "all-linear": ("qwen3", torch.bfloat16, {"target_modules": "all-linear", "r": 10, "lora_alpha": 5, "use_rslora": True}),
    "dora": ("llama3", torch.float16, {"target_modules": ["v_proj", "gate_proj"], "use_dora": True}),
    "double": ("qwen2", torch.float64, {"target_modules": ["v_proj"], "layers_to_transform": 2, "layers_pattern": "layers"}),
    "regex": ("qwen3", torch.float32, {"target_modules": r".*\.(1\.mlp\.up|3\.self_attn\.q)_proj", "init_lora_weights": "gaussian"}),
    "own": ("qwen2", torch.bfloat16, {"target_modules": ["k_proj", "o_proj"], "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"k.*": 2}}),
    "excluded": ("qwen2", torch.float32, {"target_modules": "all-linear", "exclude_modules": ["up_proj", "visual"], "lora_dropout": 0.1}),
    "superfluous": ("qwen2", torch.float32, {"target_modules": ["q_proj", "query_key_value"], "init_lora_weights": "orthogonal", "r": 4}),
    "saved": ("qwen2", torch.bfloat16, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied": ("qwen3-tied", torch.float32, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}  # fmt: skip


def saved_by_peft(directory: Path, name: str, dtype: torch.dtype, words: Mapping[str, Any], *, autocast: bool = False) -> Path:
    model = hf_peft.get_peft_model(
        oracle.model(name, dtype), hf_peft.LoraConfig(task_type="CAUSAL_LM", **words), autocast_adapter_dtype=autocast
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                p.copy_(torch.rand(p.shape) if "magnitude" in key else torch.randn(p.shape))
    model.save_pretrained(str(directory))
    return directory


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", SAVED_BY_PEFT)
def test_import_and_export_give_the_same_bytes(tmp_path: Path, case: str, autocast: bool) -> None:
    name, dtype, words = SAVED_BY_PEFT[case]
    base = base_directory(tmp_path / "base", name, dtype)
    theirs = saved_by_peft(tmp_path / "theirs", name, dtype, words, autocast=autocast)
    path = peft.adopt(theirs, base, tmp_path / "ours")
    assert (path, checkpoint.latest(tmp_path / "ours")) == (tmp_path / "ours" / "step-00000000", path)
    peft.export(path, tmp_path / "again", tiny.shape(name))
    expected = load_file(theirs / peft.TENSORS)
    assert differences(load_file(tmp_path / "again" / peft.TENSORS), expected) == []
    held = {t.dtype for t in expected.values()}
    if case == "saved" and autocast:  # what peft does by itself: A and B in fp32, copies as the base is
        assert held == {torch.bfloat16, torch.float32}

    about = checkpoint.read_about(path)[1]
    assert about["model.path"] == str(base)
    assert about["base"] == of_source(Safetensors(base), tiny.shape(name))
    assert peft.Peft(tmp_path / "again").base == about["base"]
    first = hf_peft.PeftModel.from_pretrained(oracle.model(name, dtype), str(theirs))
    second = hf_peft.PeftModel.from_pretrained(oracle.model(name, dtype), str(tmp_path / "again"))
    assert torch.equal(first(TOKENS).logits, second(TOKENS).logits)


def test_names_of_other_makers(tmp_path: Path) -> None:
    """Without the prefix, with the adapter's name inside, DoRA's magnitude with `.weight`."""
    name, cfg = "qwen2", LoraConfig(r=3, target_modules=("q_proj",), use_dora=True, modules_to_save=("lm_head",))
    tensors = made(cfg, tiny.shape(name))
    peft.write(tmp_path / "usual", tensors, cfg, tiny.shape(name), base="b")

    def renamed(key: str) -> str:
        key = key.removeprefix(peft.PREFIX) if ".1." in key else key
        key = key.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.weight", "lora_B.my_name.weight")
        key = key.replace("magnitude_vector", "magnitude_vector.default.weight" if ".2." in key else "magnitude_vector.weight")
        return key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")

    stored = {renamed(key): value for key, value in tensors.items()}
    assert not stored.keys() & tensors.keys()
    save_file(stored, tmp_path / "usual" / peft.TENSORS)
    found = peft.opened(tmp_path / "usual", tiny.shape(name))
    assert differences(peft.whole(found), tensors) == []
    part = found.read("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight", (3, 1), (5, 2))
    assert torch.equal(part, tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3:8, 1:3])

    save_file(stored | {key.replace("my_name.", ""): value.clone() for key, value in stored.items()}, tmp_path / "usual" / peft.TENSORS)
    assert "are one tensor, which is expected once" in complaint(lambda: peft.Peft(tmp_path / "usual"))


def test_the_config_of_a_run_comes_back_from_json() -> None:
    for _, cfg in ADAPTERS.values():
        cfg = replace(cfg, init_lora_weights="pissa", loraplus_lr_ratio=16.0, path="a/b", name="n")
        assert peft.lora_from_json(json.loads(json.dumps(as_json(cfg))), "here") == cfg


# --- checkpoints -----------------------------------------------------------------------------------------------------------


def a_run(run: Path, cfg: LoraConfig, name: str, base: Path, tensors: Mapping[str, Tensor], dtype: str = "float64") -> Path:
    about = {"lora": as_json(cfg), "model.path": str(base), "dtype": dtype, "base": None}
    return checkpoint.write(run / "checkpoints", 3, tensors, about)


def initial(run: Path, cfg: LoraConfig, shape: Shape) -> dict[str, Tensor]:
    """What PiSSA began with, in its place."""
    (run / peft.INITIAL).mkdir(parents=True)
    tensors = {key: value for key, value in made(cfg, shape, seed=9).items() if ".lora_A" in key or ".lora_B" in key}
    save_file(tensors, run / peft.INITIAL / "model.safetensors")
    return tensors


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "dora-rslora", "patterns", "odd-dora", "saved-tied"])
def test_pissa_becomes_a_plain_adapter(tmp_path: Path, case: str) -> None:
    name, cfg = ADAPTERS[case][0], replace(ADAPTERS[case][1], init_lora_weights="pissa")
    shape = tiny.shape(name)
    base = base_directory(tmp_path / "base", name)
    tensors, began = made(cfg, shape), initial(tmp_path / "run", cfg, shape)
    path = a_run(tmp_path / "run", cfg, name, base, tensors)
    peft.export(path, tmp_path / "out", shape)

    # W − s·B₀A₀ is the base that PiSSA has in mind, and the adapter is beside it.
    without = replace(cfg, use_dora=False, modules_to_save=())
    moved = by_hand(name, without, {k: -v if ".lora_B" in k else v for k, v in began.items()})
    with mock.patch.object(tiny, "weights", return_value=moved):
        expected = by_hand(name, cfg, tensors)
    model = hf_peft.PeftModel.from_pretrained(oracle.model(name), str(tmp_path / "out"))
    assert (model(TOKENS).logits - logits(name, expected)).abs().max() < 1e-11
    assert model.peft_config["default"].r == 2 * cfg.r
    assert json.loads((tmp_path / "out" / peft.CONFIG).read_text())["init_lora_weights"] is True

    merge(base, path, tmp_path / "merged")
    merged = peft.whole(Safetensors(tmp_path / "merged"))
    assert max(float((merged[key] - expected[key]).abs().max()) for key in expected) < 1e-12
    half = peft.opened(path, shape).read(next(iter(tensors)), (0, 0), (2 * cfg.r, 5))
    assert torch.equal(half, peft.whole(peft.opened(path, shape))[next(iter(tensors))][: 2 * cfg.r, :5])


def test_pissa_without_its_beginning(tmp_path: Path) -> None:
    name, cfg = "qwen2", LoraConfig(r=3, init_lora_weights="pissa")
    path = a_run(tmp_path / "run", cfg, name, tmp_path, made(cfg, tiny.shape(name)))
    assert "pissa_init: holds neither" in complaint(lambda: peft.Checkpoint(path))
    began = initial(tmp_path / "run", cfg, tiny.shape(name))
    began.pop(min(began))
    save_file(began, tmp_path / "run" / peft.INITIAL / "model.safetensors")
    said = complaint(lambda: peft.export(path, tmp_path / "out", tiny.shape(name)))
    assert "is not there as the run began with it" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_masters_are_rounded_once(tmp_path: Path, dtype: str) -> None:
    name, cfg = ADAPTERS["dora"]
    tensors = made(cfg, tiny.shape(name), torch.float32)
    path = a_run(tmp_path / "run", cfg, name, tmp_path / "base", tensors, dtype)
    peft.export(tmp_path / "run" / "checkpoints", tmp_path / "out", tiny.shape(name))  # the newest
    expected = {key: value.to(getattr(torch, dtype)) for key, value in tensors.items()}
    assert differences(load_file(tmp_path / "out" / peft.TENSORS), expected) == []
    assert peft.Checkpoint(path).base is None
    with safe_open(tmp_path / "out" / peft.TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def resumed(path: Path) -> list[str]:
    """What is wrong with the masters and moments that a run finds in a checkpoint that was written without one."""
    with running(Case("qwen3", ParallelConfig(), micro_batches=1)) as run:
        expected = {key: value + 1 for key, value in tiny.weights("qwen3").items()}
        for segment in run.optimizer.segments:
            run.optimizer.tensor(segment, "exp_avg").fill_(math.nan)
        step, about = checkpoint.resume(path, run.optimizer)
        assert (step, about, run.optimizer.steps) == (5, {"a": 1}, 0)
        wrong = []
        for s in run.optimizer.segments:
            box = tuple(slice(o, o + n) for o, n in zip(s.piece.offset, s.piece.size, strict=True))
            if not torch.equal(run.optimizer.tensor(s, "master"), expected[s.piece.hf][box].flatten()[s.start : s.stop]):
                wrong.append(s.piece.hf)
            if run.optimizer.tensor(s, "exp_avg").any() or run.optimizer.tensor(s, "exp_avg_sq").any():
                wrong.append(f"{s.piece.hf} moments")
        return wrong


def test_a_checkpoint_without_a_run_is_resumed_by_one(tmp_path: Path) -> None:
    tensors = {key: value + 1 for key, value in tiny.weights("qwen3").items()}
    path = checkpoint.write(tmp_path, 5, tensors, {"a": 1})
    assert checkpoint.latest(tmp_path) == path == tmp_path / "step-00000005"
    assert distributed.run(1, resumed, path) == [[]]
    again = checkpoint.write(tmp_path, 5, tensors, {"a": 2})  # what `latest` names stays until the new one is whole
    assert (again.name, checkpoint.latest(tmp_path)) == ("step-00000005-2", again)
    assert path.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_written_masters_are_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"x": torch.randn(3, 5).to(dtype), "y": torch.randn(4).to(dtype), "z": torch.randn(5, 3).to(dtype).t()}
    masters = checkpoint.Masters(checkpoint.write(tmp_path, 0, tensors))
    assert differences(peft.whole(masters), {key: value.double() for key, value in tensors.items()}) == []
    stored = load_file(tmp_path / "step-00000000" / "rank-00000.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float64 if dtype is torch.float64 else torch.float32}


def test_a_checkpoint_that_cannot_be_written_leaves_the_last(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, {"x": torch.ones(2)})
    before = sorted(tmp_path.rglob("*"))
    with mock.patch.object(checkpoint, "save_file", full):
        assert "No space left" in complaint(lambda: checkpoint.write(tmp_path, 2, {"x": torch.ones(2)}))
    assert sorted(tmp_path.rglob("*")) == before


def full(_: Any, file: Path, **__: Any) -> None:
    file.write_bytes(b"half")
    raise OSError(28, "No space left on device")


# --- merging ---------------------------------------------------------------------------------------------------------------


def digest(directory: Path) -> dict[str, tuple[str, int]]:
    return {f.name: (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in directory.iterdir()}


@pytest.mark.parametrize("case", ADAPTERS)
def test_merging_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    name, cfg = ADAPTERS[case]
    shape = tiny.shape(name)
    base = base_directory(tmp_path / "base", name)
    before = digest(base)
    peft.write(tmp_path / "adapter", made(cfg, shape), cfg, shape, base=str(base))
    merge(base, tmp_path / "adapter", tmp_path / "out", shard_bytes=40_000)
    assert digest(base) == before
    assert not list(tmp_path.glob(".*"))

    found = Safetensors(tmp_path / "out")
    check_keys(found, shape, "out")
    ours = peft.whole(found)
    theirs = hf_peft.PeftModel.from_pretrained(oracle.model(name), str(tmp_path / "adapter")).merge_and_unload().state_dict()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-11
    touched = {slot.module + ".weight" for slot in peft.slots(cfg, shape).values()} | set(peft.saved(cfg, shape).values())
    for key, value in tiny.weights(name).items():
        assert torch.equal(ours[key], value) is (key not in touched), key

    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 8 for t in ours.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float64" and config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert (tmp_path / "out" / "tokenizer.json").exists()
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "patterns", "saved-tied"])
@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", None), ("float32", "bfloat16"), ("float16", None), ("float32", None)])
def test_merged_weights_are_rounded_once(tmp_path: Path, case: str, stored: str, asked: str | None) -> None:
    name, cfg = ADAPTERS[case]
    dtype, result = getattr(torch, stored), getattr(torch, asked or stored)
    base = base_directory(tmp_path / "base", name, dtype)
    tensors = made(cfg, tiny.shape(name), torch.float32)
    peft.write(tmp_path / "adapter", tensors, cfg, tiny.shape(name), base=str(base))
    merge(base, tmp_path / "adapter", tmp_path / "out", dtype=getattr(torch, asked) if asked else None)
    ours, exact = peft.whole(Safetensors(tmp_path / "out")), by_hand(name, cfg, tensors, dtype)
    for key, value in exact.items():
        assert ours[key].dtype is result
        half_step = torch.finfo(result).eps / 2 * 2.0 ** (torch.frexp(value)[1] - 1)
        assert ((ours[key].double() - value).abs() <= half_step + 1e-5).all(), key  # and what fp32 sums lose


def test_an_adapter_says_which_base_it_is_of(tmp_path: Path) -> None:
    name, cfg = ADAPTERS["lora"]
    shape = tiny.shape(name)
    base = base_directory(tmp_path / "base", name)
    mark = of_source(Safetensors(base), shape, torch.bfloat16)
    peft.write(tmp_path / "adapter", made(cfg, shape, torch.bfloat16), cfg, shape, base="b", fingerprint=mark)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    other = base_directory(tmp_path / "other", name)
    file = next(other.glob("model-00001*"))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file)
    for act in (
        lambda: merge(other, tmp_path / "adapter", tmp_path / "never"),
        lambda: peft.adopt(tmp_path / "adapter", other, tmp_path / "never"),
    ):
        assert f"adapter: an adapter of another base: its weights had the fingerprint {mark}" in complaint(act)
    assert not (tmp_path / "never").exists()


def test_a_fault_while_merging_leaves_nothing(tmp_path: Path) -> None:
    name, cfg = ADAPTERS["lora"]
    base = base_directory(tmp_path / "base", name)
    peft.write(tmp_path / "adapter", made(cfg, tiny.shape(name)), cfg, tiny.shape(name), base="b")
    before = sorted(tmp_path.rglob("*"))
    written = []

    def later(tensors: Any, file: Path, **kwargs: Any) -> None:
        written.append(file)
        (full if len(written) == 3 else save_file)(tensors, file, **kwargs)

    with mock.patch.object(export_module, "save_file", later):
        assert "No space left" in complaint(lambda: merge(base, tmp_path / "adapter", tmp_path / "out", shard_bytes=10_000))
    assert len(written) == 3
    assert sorted(tmp_path.rglob("*")) == before
    for taken in (tmp_path / "adapter", base):
        assert "exists and is not an empty directory" in complaint(lambda t=taken: merge(base, tmp_path / "adapter", t))
        assert "exists and is not an empty directory" in complaint(lambda t=taken: peft.adopt(tmp_path / "adapter", base, t))
    with mock.patch.object(peft, "save_file", full):
        tensors = made(cfg, tiny.shape(name))
        assert "No space left" in complaint(lambda: peft.write(tmp_path / "out", tensors, cfg, tiny.shape(name), base="b"))
    with mock.patch.object(checkpoint, "save_file", full):
        assert "No space left" in complaint(lambda: peft.adopt(tmp_path / "adapter", base, tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"target_modules": ("q_prj",)}, "lora.target_modules: 'q_prj' names no linear of this model, did you mean 'q_proj'?"),
        (
            {"target_modules": r".*query"},
            "lora.target_modules: the regular expression '.*query' matches no linear; whole names look like model.layers.0.self_attn",
        ),
        ({"target_modules": "(q_proj"}, "lora.target_modules: '(q_proj' is no regular expression (missing ), untermin"),
        ({"target_modules": ("q_proj", "lm_head")}, "lora.target_modules: 'lm_head' takes no adapter here: name it in lora."),
        ({"exclude_modules": ("up_prj",)}, "lora.exclude_modules: 'up_prj' names no linear of this model, did you mean 'up_proj'?"),
        ({"exclude_modules": r".*"}, "lora: no module is left to adapt: see target_modules, exclude_modules and layers_to_transform"),
        ({"rank_pattern": {r"layers\.9\..*": 4}}, r"lora.rank_pattern: 'layers\\.9\\..*' matches no adapted module, choose from: "),
        ({"alpha_pattern": {"o_pro": 4}}, "lora.alpha_pattern: 'o_pro' matches no adapted module, did you mean 'o_proj'?"),
        ({"rank_pattern": {"(": 4}}, "lora.rank_pattern: '(' is no regular expression"),
        ({"layers_to_transform": (4,)}, "lora.layers_to_transform: 4: the model has layers 0 to 3"),
        ({"target_modules": ".*q_proj", "layers_to_transform": (1,)}, "lora.layers_to_transform would not be read: "),
        ({"modules_to_save": ("embed_token",)}, "lora.modules_to_save: 'embed_token', did you mean 'embed_tokens'?"),
        ({"modules_to_save": ("visual.embed_tokens",)}, "lora.modules_to_save: 'visual.embed_tokens', "),
    ],
)  # fmt: skip
def test_a_mistake_in_the_configuration_is_one_line(changes: dict[str, Any], line: str) -> None:
    assert complaint(lambda: peft.tensors(replace(LoraConfig(), **changes), tiny.shape("qwen2"))).startswith(line)


def test_a_tied_model_has_one_copy() -> None:
    cfg = LoraConfig(modules_to_save=("lm_head",))
    assert "name embed_tokens alone" in complaint(lambda: peft.tensors(cfg, tiny.shape("qwen3-tied")))


def changed(key: str, value: Any) -> Callable[[dict[str, Any]], str]:
    def act(config: dict[str, Any]) -> str:
        return json.dumps({**config, key: value})

    return act


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda _: "{", "not JSON ("),
        (lambda _: "[]", "a JSON object was expected, not list"),
        (changed("peft_type", "IA3"), "peft_type = 'IA3': megamod reads 'LORA' alone"),
        (changed("bias", "lora_only"), "bias = 'lora_only': megamod computes \"none\" alone"),
        (changed("lora_bias", True), "lora_bias = True: megamod computes false alone"),
        (changed("fan_in_fan_out", True), "fan_in_fan_out = True"),
        (changed("use_qalora", True), "use_qalora = True"),
        (changed("alora_invocation_tokens", [1]), "alora_invocation_tokens = [1]: megamod computes null alone"),
        (changed("trainable_token_indices", [1]), "trainable_token_indices = [1]"),
        (changed("target_parameters", ["w"]), "target_parameters = ['w']"),
        (changed("layer_replication", [[0, 2]]), "layer_replication = [[0, 2]]"),
        (changed("arrow_config", {"top_k": 3}), "arrow_config = "),
        (changed("kasa_config", {"beta": 3}), "kasa_config = "),
        (changed("use_bdlora", {"a": 1}), "use_bdlora = "),
        (changed("sparkle", 3), "sparkle = 3: not known here; remove it if the adapter computes the same without"),
        (changed("init_lora_weights", "pissa_niter_4"), "init_lora_weights = 'pissa_niter_4': the adapter belongs to a base that PEFT has"),
        (changed("init_lora_weights", "olora"), "init_lora_weights = 'olora'"),
        (changed("init_lora_weights", "corda"), "init_lora_weights = 'corda'"),
        (changed("init_lora_weights", "loftq"), "init_lora_weights = 'loftq'"),
        (changed("target_modules", None), "target_modules is missing"),
        (changed("target_modules", 3), "target_modules = 3: a string or a list of strings was expected"),
        (changed("r", 0), "r = 0: a positive integer was expected"),
        (changed("r", 2.5), "r = 2.5"),
        (changed("lora_alpha", math.nan), "lora_alpha = nan: a finite number was expected"),
        (changed("lora_alpha", 10**400), "lora_alpha = 1000"),
        (changed("lora_dropout", 1.5), "lora_dropout = 1.5: a number from 0 to below 1 was expected"),
        (changed("rank_pattern", {"q_proj": 0}), "rank_pattern = {'q_proj': 0}: an object of positive integers was expected"),
        (changed("layers_to_transform", [-1]), "layers_to_transform = [-1]"),
        (changed("use_dora", 1), "use_dora = 1: true or false was expected"),
        (lambda c: json.dumps({**c, "layers_to_transform": 1, "layers_pattern": 3}), "layers_pattern = 3: 'layers' was expected"),
        (changed("layers_to_transform", True), "layers_to_transform = True: a list of layers, from 0 was expected"),
        (lambda c: json.dumps({**c, "layers_to_transform": 1, "layers_pattern": ["h"]}), "layers_pattern = ['h']: 'layers' was expected"),
    ],
)
def test_what_peft_may_say_and_megamod_not_compute(tmp_path: Path, act: Callable[[dict[str, Any]], str], line: str) -> None:
    config = peft.config_json(LoraConfig(), tiny.shape("qwen2"), "base")
    (tmp_path / peft.CONFIG).write_text(act(config))
    assert complaint(lambda: peft.read_config(tmp_path)).startswith(f"{tmp_path / peft.CONFIG}: {line}")


def test_peft_s_own_defaults_are_ours(tmp_path: Path) -> None:
    hf_peft.LoraConfig(target_modules="ALL-LINEAR").save_pretrained(str(tmp_path))
    assert peft.read_config(tmp_path) == LoraConfig()
    (tmp_path / peft.CONFIG).write_text(
        json.dumps({**dict.fromkeys(peft.SHARED), "peft_type": "LORA", "target_modules": ["q_proj"], "new": None})
    )
    assert peft.read_config(tmp_path) == LoraConfig(target_modules=("q_proj",))
    known = {*peft.SHARED, *peft.ONLY, *peft.SILENT, "init_lora_weights", "layers_pattern"}
    assert hf_peft.LoraConfig().to_dict().keys() <= known  # a new release's keys are looked at


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    name, cfg = ADAPTERS["lora"]
    return peft.write(tmp_path / "adapter", made(cfg, tiny.shape(name)), cfg, tiny.shape(name), base="b")


def test_an_adapter_for_another_base(adapter: Path) -> None:
    other = replace(tiny.shape("qwen2"), ffn=64, layers=5)
    said = complaint(lambda: peft.opened(adapter, other))
    assert said.startswith(f"{adapter}: an adapter for another base, or not whole: ")
    first = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight is (3, 48), this base needs (3, 64)"
    assert f"12 mis-shaped: {first}, " in said
    assert "14 missing: base_model.model.model.layers.4." in said
    assert "unexpected" not in said
    smaller = complaint(lambda: peft.opened(adapter, replace(tiny.shape("qwen2"), layers=3)))
    assert "14 unexpected" in smaller


def test_a_rank_pattern_for_a_missing_layer(tmp_path: Path) -> None:
    cfg, shape = LoraConfig(rank_pattern={"layers.3.mlp.up_proj": 2}), tiny.shape("qwen2")
    peft.write(tmp_path / "a", made(cfg, shape), cfg, shape, base="b")
    said = complaint(lambda: peft.opened(tmp_path / "a", replace(shape, layers=3)))
    assert said.startswith(f"{tmp_path / 'a'}: an adapter for another base, or not whole: 14 unexpected: ")
    said = complaint(lambda: peft.slots(cfg, replace(shape, layers=3)))
    assert said.startswith("lora.rank_pattern: 'layers.3.mlp.up_proj' matches no adapted module")


def edit(adapter: Path, act: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(adapter / peft.TENSORS)
    act(tensors)
    save_file(tensors, adapter / peft.TENSORS)
    return adapter


def test_tensors_that_do_not_fit(adapter: Path) -> None:
    shape = tiny.shape("qwen2")
    edit(adapter, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(61, 32)}))
    said = complaint(lambda: peft.opened(adapter, shape))
    assert "1 unexpected: base_model.model.lm_head.weight; a whole embedding or head is read where modules_to_save names it" in said
    edit(adapter, lambda t: t.pop("base_model.model.lm_head.weight"))
    edit(adapter, lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"))
    assert "1 missing: base_model.model.model.layers.0.mlp.up_proj.lora_B.weight" in complaint(lambda: peft.opened(adapter, shape))
    edit(adapter, lambda t: t.update({"a.lora_B.weight": torch.zeros(3, dtype=torch.int32)}))
    assert "a.lora_B.weight is of I32: one of BF16, F16, F32, F64 was expected" in complaint(lambda: peft.Peft(adapter))
    cfg = LoraConfig(r=3)
    few = made(cfg, shape)
    few.pop(min(few))
    assert "1 missing" in complaint(lambda: peft.write(adapter.with_name("never"), few, cfg, shape, base="b"))
    assert not adapter.with_name("never").exists()


def test_files_that_are_not_opened(adapter: Path, tmp_path: Path) -> None:
    shape = tiny.shape("qwen2")
    (adapter / peft.TENSORS).rename(tmp_path / "elsewhere")
    assert f"{adapter}: holds no adapter_model.safetensors" in complaint(lambda: peft.opened(adapter, shape))
    (adapter / "adapter_model.bin").touch()
    assert "adapter_model.bin: a pickle may hold code and is not opened" in complaint(lambda: peft.opened(adapter, shape))
    (adapter / peft.TENSORS).symlink_to(tmp_path / "elsewhere")
    assert "a link that leaves the directory is not followed" in complaint(lambda: peft.opened(adapter, shape))
    (adapter / peft.TENSORS).unlink()
    (adapter / peft.TENSORS).write_bytes((tmp_path / "elsewhere").read_bytes()[:-7])
    assert "not a whole safetensors file" in complaint(lambda: peft.opened(adapter, shape))
    assert "adapter_config.json: cannot be read (No such file" in complaint(lambda: peft.opened(tmp_path / "absent", shape))
    assert "adapter_config.json: cannot be read (Not a directory" in complaint(lambda: peft.opened(tmp_path / "elsewhere", shape))


def test_a_tied_head_that_stays_behind(tmp_path: Path) -> None:
    """Without ensure_weight_tying, PEFT's head is the base's embedding: another model than any that megamod has."""
    words = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    theirs = saved_by_peft(tmp_path / "theirs", "qwen3-tied", torch.float32, words)
    assert "without ensure_weight_tying its head is the base's embedding" in complaint(
        lambda: peft.opened(theirs, tiny.shape("qwen3-tied"))
    )
    tied = saved_by_peft(tmp_path / "tied", "qwen3-tied", torch.float32, {**words, "ensure_weight_tying": True})
    edit(tied, lambda t: t["base_model.model.lm_head.weight"].view(-1)[3].add_(1))
    assert "and they differ" in complaint(lambda: peft.opened(tied, tiny.shape("qwen3-tied")))


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({}, "a checkpoint of whole weights, which holds no adapter"),
        ({"lora": []}, "a checkpoint of whole weights, which holds no adapter"),
        ({"lora": 3, "dtype": "float32"}, "lora: a JSON object was expected, not int"),
        ({"lora": {"rr": 3}, "dtype": "float32"}, "lora: unknown key 'rr', did you mean 'r'?"),
        ({"lora": {"r": "3"}, "dtype": "float32"}, "lora: r = '3': a positive integer was expected"),
        ({"lora": {"r": None}, "dtype": "float32"}, "lora: r = None: a positive integer was expected"),
        ({"lora": {"init_lora_weights": "eva"}, "dtype": "float32"}, "init_lora_weights = 'eva': one of default, gaussian, pissa"),
        ({"lora": {"r": 3}, "dtype": "int8"}, "dtype = 'int8': one of bfloat16, float16, float32, float64 was expected"),
    ],
)
def test_checkpoints_that_hold_no_adapter(tmp_path: Path, about: dict[str, Any], line: str) -> None:
    path = checkpoint.write(tmp_path, 0, {"x": torch.zeros(1)}, about)
    assert line in complaint(lambda: peft.Checkpoint(path))


def test_an_in_memory_adapter_is_checked_too() -> None:
    cfg, shape = LoraConfig(r=3), tiny.shape("qwen2")
    tensors = made(cfg, shape)
    peft.check(Tensors(tensors), cfg, shape, "here")
    wrong = {**tensors, min(tensors): tensors[min(tensors)].t().contiguous()}
    assert complaint(lambda: peft.check(Tensors(wrong), cfg, shape, "here")).startswith(
        "here: an adapter for another base, or not whole: 1 mis"
    )
