"""A run as a value: made by a file, overridden, checked, saved; every mistake is one line that names the way out."""

import dataclasses
import functools
import json
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from complaints import complaint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamod import config, losses
from megamod.config import RunConfig, load

ROOT = Path(__file__).parents[1]
IMPORTS = """\
from dataclasses import replace
from functools import partial

from megamod import losses
from megamod.config import (
    ChatConfig, CheckpointConfig, DataConfig, EvalConfig, LogConfig, LoraConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig,
    ReferenceConfig, SyntheticData,
)
from megamod.model.shape import Score
from megamod.weights.quantization import Quantization
"""
PLAIN = 'RunConfig(dir="runs/x", steps=7, model=ModelConfig(path="/m"), data=DataConfig(train="a.jsonl"){})'
MADE_UP = 'RunConfig(dir="runs/x", steps=7, model=ModelConfig(path="/m"), data=DataConfig(train=SyntheticData()))'
# No field has its default; what one option rules out is in PLAIN.
FULL = """RunConfig(
    dir="runs/y",
    steps=9,
    model=ModelConfig(
        path="/m", shape="/s", init="random", dtype="float64", recompute="selective", recompute_modules=("mlp", "core_attn"),
        attention="reference", linear="transformer_engine", fusion="reference",
    ),
    data=DataConfig(
        train=SyntheticData(6, 50, 0.25, 0.5, True), row_length=128, rows_per_step=16, rows_per_micro_batch=2,
        chat=ChatConfig(
            format="llama_guard", reasons=False, controversial="unsafe", turns="last", too_long="cut", tokenizer="/t", template="/j",
            template_arguments={"enable_thinking": False},
        ),
    ),
    eval=EvalConfig(
        "e.jsonl", every=3, limit=20, scoring="first_token", decode=5, max_new_tokens=7, metric="accuracy", keep_best=False, patience=2,
    ),
    loss=partial(losses.moderation, verdict_weight=2.5),
    parallel=ParallelConfig(tp=2, pp=2, vpp=2, cp=2, sp=True, layers_per_stage=(1, 2, 3, 4), timeout_minutes=3),
    optim=OptimConfig(
        lr=3e-7, schedule="wsd", min_lr=1e-8, warmup_steps=2, decay_steps=4, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.2,
        no_decay=("embed", "lm_head"), clip_grad=None, max_skips=5, overlap_grad_reduce=True, offload=True,
    ),
    checkpoint=CheckpointConfig(
        every=3, keep_last=2, keep_every=6, asynchronous=False, resume="no", stop_at=2_000_000_000, requeue_file="again", export=True
    ),
    log=LogConfig(every=2, tensorboard=False, peak_tflops=100.5, stacks_after_minutes=0.5, stragglers_every=7),
    seed=5,
    deterministic=True,
)"""
# An adapter on a base in 4 bits, which FULL's linear rules out; a path would rule out most of this.
IN_4_BITS = PLAIN.replace('"/m"', '"/m", quantization=Quantization("fp4", False, 32, ("k_proj",))')
ADAPTED = IN_4_BITS.format(
    """, lora=LoraConfig(
        r=4, lora_alpha=2.5, target_modules=("q_proj", "up_proj"), exclude_modules="model.*3.*", layers_to_transform=(1, 2),
        rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 8}, modules_to_save=("lm_head",), lora_dropout=0.5, use_rslora=True,
        use_dora=True, init_lora_weights="gaussian", loraplus_lr_ratio=16.0, name="mine",
    ), parallel=ParallelConfig(shard_base=True)"""
)
# What a preference loss reads, and a head of scores, which FULL's eval rules out.
COMPARED = """RunConfig(
    dir="runs/z", steps=7, data=DataConfig(train="a.jsonl"), loss=partial(losses.dpo, beta=0.2),
    model=ModelConfig(path="/m", score=Score(("safe", "unsafe"), "multi_label_classification", every_token=True)),
    reference=ReferenceConfig("model", path="/r", sync_every=3, sync_alpha=0.5),
)"""
TAUGHT = """RunConfig(
    dir="runs/t", steps=7, model=ModelConfig(path="/m", linear="transformer_engine"),
    data=DataConfig(train="a.jsonl", chat=ChatConfig(weights={"a+": 2.0})), parallel=ParallelConfig(tp=2, sp=True, tp_comm_overlap=True),
    loss=partial(losses.distillation, sft_weight=0.5), reference=ReferenceConfig("model", path="/t", top_k=9),
)"""


def write(folder: Path, expression: str, name: str = "run.py", before: str = "") -> Path:
    """A config file whose config() returns `expression`."""
    path = folder / name
    path.write_text(f"{IMPORTS}\n{before}\n\ndef config():\n    return {expression}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain"), PLAIN.format(""))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("full"), FULL)


def value_at(cfg: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), cfg)


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Key → value of all that is no dataclass, the loss aside."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            result |= leaves(value, f"{prefix}{f.name}.")
        elif f.name != "loss":
            result[prefix + f.name] = value
    return result


# --- overrides -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=12", 12),
        ("parallel.tp=8", 8),
        ("optim.lr=3e-6", 3e-6),
        ("optim.lr=1", 1.0),
        ("optim.clip_grad=0.5", 0.5),
        ("optim.clip_grad=none", None),
        ("optim.clip_grad=None", None),
        ("checkpoint.every=none", None),
        ("checkpoint.every=4", 4),
        ("deterministic=true", True),
        ("deterministic=False", False),
        ("log.tensorboard=false", False),
        ("dir=runs/other", "runs/other"),
        ("dir='quoted name'", "quoted name"),
        ("dir=123", "123"),
        ("dir=None", "None"),
        ("dir=a=b", "a=b"),
        ("dir=", ""),
        ("dir=(unclosed", "(unclosed"),
        ("model.shape=/elsewhere", "/elsewhere"),
        ("model.shape=none", None),
        ("optim.schedule=linear", "linear"),
        ("optim.schedule='constant'", "constant"),
        ("checkpoint.resume=no", "no"),
        ("optim.betas=(0.5,0.6)", (0.5, 0.6)),
        ("optim.betas=0.5,0.6", (0.5, 0.6)),
        ("optim.betas=[0.5, 0]", (0.5, 0)),
        ("optim.no_decay=['norm','embed']", ("norm", "embed")),
        ("optim.no_decay=()", ()),
        ("data.train=b.jsonl", "b.jsonl"),
        ("data.row_length=64", 64),
    ],
)
def test_override(plain: Path, override: str, expected: Any) -> None:
    key, _, _ = override.partition("=")
    before, after = leaves(load(plain)), leaves(load(plain, [override]))
    assert after[key] == expected
    assert type(after[key]) is type(expected)
    assert {k: v for k, v in after.items() if k != key} == {k: v for k, v in before.items() if k != key}


def test_nested_and_repeated_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, MADE_UP)
    cfg = load(
        file, ["data.train.documents=9", "data.train.sigma=1", "steps=1", "steps=2", "parallel.pp=2", "parallel.layers_per_stage=3,4"]
    )
    assert cfg.data.train == config.SyntheticData(documents=9, sigma=1.0)
    assert cfg.steps == 2
    assert cfg.parallel.layers_per_stage == (3, 4)
    assert load(file, ["data.train=a.jsonl"]).data.train == "a.jsonl"


@pytest.mark.parametrize("loss", ["partial(losses.moderation, verdict_weight=4.0)", "losses.moderation"])
def test_override_of_the_loss_s_keyword(tmp_path: Path, loss: str) -> None:
    file = write(tmp_path, PLAIN.format(f", loss={loss}"))
    made = load(file, ["loss.verdict_weight=6"]).loss
    assert isinstance(made, functools.partial)
    assert made.func is losses.moderation
    assert made.keywords == {"verdict_weight": 6.0}
    assert type(made.keywords["verdict_weight"]) is float
    again = load(file, ["loss.verdict_weight=6", "loss.verdict_weight=7.5"]).loss
    assert isinstance(again, functools.partial)
    assert again.keywords == {"verdict_weight": 7.5}


def test_override_of_keywords_without_annotation_and_with_a_position(tmp_path: Path) -> None:
    before = "def mine(head, batch, scale=1.0, *, kind='a'): return scale, kind"
    loss: Any = load(write(tmp_path, PLAIN.format(", loss=mine"), before=before), ["loss.scale=3", "loss.kind=b"]).loss
    assert loss(None, None) == (3, "b")


@pytest.mark.parametrize(
    ("override", "wrong"),
    [
        ("optim.lrr=1", "override optim.lrr=1: OptimConfig has no field 'lrr', did you mean 'lr'?"),
        ("optm.lr=1", "override optm.lr=1: RunConfig has no field 'optm', did you mean 'optim'?"),
        ("parallel.qqq=1", "has no field 'qqq', choose from: cp, layers_per_stage, pp, shard_base, sp, timeout_minutes, tp, "),
        ("=1", "RunConfig has no field '', choose from: "),
        ("steps", "override 'steps': write it as owner.key=value"),
        ("--steps", "override '--steps': write it as owner.key=value"),
        ("steps.more=1", "override steps.more=1: 'more' is below a plain value"),
        ("optim.lr.x.y=1", "'x' is below a plain value"),
        ("data.train.documents=3", "'documents' is below a plain value"),
        ("model.shape.x=3", "'x' is below a plain value"),
        ("loss.verdict_weight=6", "the function takes no keyword 'verdict_weight', there are none"),
        ("loss.head=6", "the function takes no keyword 'head', there are none"),
        ("steps=1.5", "override steps=1.5: int was expected"),
        ("steps=ten", "int was expected"),
        ("steps=", "int was expected"),
        ("steps=true", "int was expected"),
        ("steps=none", "int was expected"),
        ("steps=[1", "int was expected"),
        ("steps=" + "(" * 9999, "int was expected"),
        ("steps={[]: 1}", "int was expected"),
        ("optim.lr=fast", "override optim.lr=fast: finite float was expected"),
        ("optim.lr=true", "finite float was expected"),
        ("optim.lr=nan", "finite float was expected"),
        ("optim.lr=1e999", "finite float was expected"),
        ("optim.lr=1" + "0" * 400, "finite float was expected"),
        ("optim.clip_grad=much", "finite float or None was expected"),
        ("parallel.sp=1", "override parallel.sp=1: bool was expected"),
        ("parallel.sp=yes", "bool was expected"),
        ("optim.schedule=cosin", "one of 'constant', 'linear', 'cosine', 'wsd' was expected"),
        ("optim.schedule=3", "one of 'constant'"),
        ("checkpoint.every=often", "int or None was expected"),
        ("optim.betas=0.9", "tuple[float, float] was expected"),
        ("optim.betas=(0.9,)", "tuple[float, float] was expected"),
        ("optim.betas=(0.9,'x')", "tuple[float, float] was expected"),
        ("optim.betas=(0.9,0.9,0.9)", "tuple[float, float] was expected"),
        ("optim.no_decay=norm", "tuple[str, ...] was expected"),
        ("optim.no_decay=(1,)", "tuple[str, ...] was expected"),
        ("parallel.layers_per_stage=(1,2.5)", "tuple[int, ...] or None was expected"),
        ("optim=fast", "OptimConfig was expected"),
        ("loss=moderation", "LossFunction was expected"),
        ("optim.lr=a\nb", "finite float was expected"),
    ],
)  # fmt: skip
def test_wrong_override(plain: Path, override: str, wrong: str) -> None:
    assert wrong in complaint(lambda: load(plain, [override]))


@pytest.mark.parametrize(
    ("override", "wrong"),
    [
        (
            "loss.verdict_wieght=6",
            "override loss.verdict_wieght=6: the function takes no keyword 'verdict_wieght', did you mean 'verdict_",
        ),
        ("loss.verdict_weight.x=6", "'x' is below a plain value"),
        ("loss.verdict_weight=six", "override loss.verdict_weight=six: finite float was expected"),
        ("loss.verdict_weight=nan", "finite float was expected"),
    ],
)
def test_wrong_override_of_the_loss_s_keyword(tmp_path: Path, override: str, wrong: str) -> None:
    for number, loss in enumerate(("partial(losses.moderation, verdict_weight=4.0)", "losses.moderation")):
        file = write(tmp_path, PLAIN.format(f", loss={loss}"), f"run{number}.py")
        assert wrong in complaint(lambda file=file: load(file, [override]))  # type: ignore[misc]


@pytest.mark.parametrize("expression", [PLAIN.format(""), FULL, MADE_UP, ADAPTED, COMPARED, TAUGHT])
def test_every_field_takes_its_own_value_unchanged(tmp_path: Path, expression: str) -> None:
    file = write(tmp_path, expression)
    cfg = load(file)
    keys = leaves(cfg)
    for key, value in keys.items():
        again = load(file, [f"{key}={value!r}"])
        assert dataclasses.replace(again, loss=cfg.loss) == cfg, key
        if isinstance(value, str):  # without quotes too
            assert value_at(load(file, [f"{key}={value}"]), key) == value
    assert leaves(load(file, [f"{key}={value!r}" for key, value in keys.items()])) == keys


def test_no_field_is_left_out(tmp_path: Path) -> None:
    """Between them FULL, ADAPTED, COMPARED and TAUGHT give every field of every dataclass a value that is not its default."""
    nodes = [node for expression in (FULL, ADAPTED, COMPARED, TAUGHT) for node in config_nodes(load(write(tmp_path, expression)))]
    changed = {(type(node), f.name) for node in nodes for f in dataclasses.fields(node) if getattr(node, f.name) != f.default}
    own = {c for c in vars(config).values() if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__module__ == config.__name__}
    unseen = {(owner, f.name) for owner in own - {config.Source} for f in dataclasses.fields(owner)} - changed
    assert unseen == {(config.LoraConfig, "path")}  # it would rule out most of ADAPTED, as SyntheticData does mixtures of Source


def config_nodes(node: Any) -> list[Any]:
    below = [getattr(node, f.name) for f in dataclasses.fields(node)]
    return [node, *(n for child in below if dataclasses.is_dataclass(child) for n in config_nodes(child))]


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "dir": st.text(),
    "model.shape": st.none() | st.text(),
    "steps": st.integers(1000),  # beyond the schedule's parts
    "seed": st.integers(0),
    "deterministic": st.booleans(),
    "data.train": st.text(),
    "optim.lr": st.floats(1e-7, allow_infinity=False),
    "optim.min_lr": st.none() | st.floats(0, 1e-9),
    "optim.schedule": st.sampled_from(typing.get_args(config.Schedule)[1:3]),
    "optim.betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    "optim.no_decay": st.lists(st.sampled_from(["a", "'", '"', "\\.", "a,b", "=", "é"])).map(tuple),
    "parallel.layers_per_stage": st.none() | st.lists(st.integers(), min_size=1).map(tuple),
}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FIELDS)).flatmap(lambda key: st.tuples(st.just(key), FIELDS[key])))
def test_any_value_comes_through_an_override(full: Path, drawn: tuple[str, Any]) -> None:
    key, value = drawn
    fixed = ["optim.schedule=cosine", "optim.decay_steps=none"]  # schedules other than FULL's
    cfg = load(full, [*fixed, f"{key}={value!r}"])
    assert value_at(cfg, key) == value
    before = {k: v for k, v in leaves(load(full, fixed)).items() if not f"{k}.".startswith(f"{key}.")}
    assert {k: v for k, v in leaves(cfg).items() if k != key} == before


def test_what_is_none_is_begun_by_the_field_that_it_needs(plain: Path) -> None:
    assert load(plain).eval is None
    assert load(plain, ["eval.data=e.jsonl", "eval.every=3"]).eval == config.EvalConfig("e.jsonl", every=3)
    assert complaint(lambda: load(plain, ["eval.every=3"])) == "override eval.every=3: eval is None: give eval.data first"
    text = complaint(lambda: load(plain, ["eval.data=e.jsonl", "eval.decode=4", "data.row_length=64"]))
    assert text == "eval.max_new_tokens = 128: must be below data.row_length = 64"
    assert "would not be read: eval.every is None" in complaint(lambda: load(plain, ["eval.data=e.jsonl", "eval.patience=2"]))
    assert "verdict format 'qwenguard'" in complaint(lambda: load(plain, ["data.chat.format=qwenguard"]))


# --- the file --------------------------------------------------------------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    assert complaint(lambda: load(tmp_path / "absent.py")) == f"{tmp_path / 'absent.py'}: no such config file"
    assert complaint(lambda: load(tmp_path)) == f"{tmp_path}: no such config file"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("x = 1\n", "defines no function config() -> RunConfig"),
        ("config = 3\n", "defines no function config() -> RunConfig"),
        ("def config():\n    return {'steps': 3}\n", "config() returned dict, not RunConfig"),
        ("def config():\n    pass\n", "config() returned NoneType, not RunConfig"),
        ("def config(steps):\n    pass\n", "config() missing 1 required positional argument: 'steps'"),
        ("def config(:\n", "SyntaxError: invalid syntax (run.py, line 1)"),
        ("a = '\n", "SyntaxError: unterminated string literal"),
        ("import no_such_neighbour\n", "ModuleNotFoundError: No module named 'no_such_neighbour'"),
        ("from megamod import lossses\n", "ImportError: cannot import name 'lossses' from 'megamod'"),
        (
            IMPORTS + "X = losses.moderaton\n",
            "AttributeError: module 'megamod.losses' has no attribute 'moderaton', did you mean",
        ),
        ("def config():\n    return 1 / 0\n", "run.py:2: ZeroDivisionError: division by zero"),
        (IMPORTS + "BASE = OptimConfig(lrr=1)\n", "OptimConfig has no field 'lrr', did you mean 'lr'?"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, wrong: str) -> None:
    file = tmp_path / "run.py"
    file.write_text(text)
    path_before = list(sys.path)
    text = complaint(lambda: load(file))
    assert text.startswith(f"{file}:")
    assert wrong in text
    assert sys.path == path_before


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        (", optim=OptimConfig(lrr=1)", "OptimConfig has no field 'lrr', did you mean 'lr'?"),
        (", stepps=3", "RunConfig has no field 'stepps', did you mean 'steps'?"),
        (", optim=replace(OptimConfig(), warmup=3)", "OptimConfig has no field 'warmup', did you mean 'warmup_steps'?"),
        (", parallel=ParallelConfig(tensor=3)", "ParallelConfig has no field 'tensor', choose from: cp, "),
    ],
)
def test_misspelt_field_in_the_file(tmp_path: Path, more: str, wrong: str) -> None:
    assert f": {wrong}" in complaint(lambda: load(write(tmp_path, PLAIN.format(more))))


def test_misspelt_field_where_python_adds_a_hint_of_its_own(tmp_path: Path) -> None:
    """Python 3.13 does."""
    message = "OptimConfig.__init__() got an unexpected keyword argument 'lrr'. Did you mean 'lr'?"
    file = write(tmp_path, f"wrong({message!r})", before="def wrong(text): raise TypeError(text)")
    assert complaint(lambda: load(file)).endswith(": OptimConfig has no field 'lrr', did you mean 'lr'?")


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        (", seed='3'", "seed = '3': int was expected"),
        (", seed=3.0", "seed = 3.0: int was expected"),
        (", seed=True", "seed = True: int was expected"),
        (", deterministic=1", "deterministic = 1: bool was expected"),
        (", optim=OptimConfig(lr='1e-5')", "optim.lr = '1e-5': finite float was expected"),
        (", optim=OptimConfig(lr=float('nan'))", "optim.lr = nan: finite float was expected"),
        (", optim=OptimConfig(eps=float('nan'))", "optim.eps = nan: finite float was expected"),
        (", optim=OptimConfig(clip_grad=float('inf'))", "optim.clip_grad = inf: finite float or None was expected"),
        (", optim=OptimConfig(betas=(0.9, float('nan')))", "optim.betas = (0.9, nan): tuple[float, float] was expected"),
        (", optim=OptimConfig(betas=[0.9, 0.95])", "optim.betas = [0.9, 0.95]: tuple[float, float] was expected"),
        (", optim=OptimConfig(schedule='wave')", "optim.schedule = 'wave': one of 'constant', "),
        (", optim=None", "optim = None: OptimConfig was expected"),
        (", parallel=ParallelConfig(layers_per_stage=(1, '2'))", "parallel.layers_per_stage = (1, '2'): tuple[int, ...] or None was"),
        (", loss='moderation'", "loss = 'moderation': LossFunction was expected"),
    ],
)
def test_wrong_type_in_the_file(tmp_path: Path, more: str, wrong: str) -> None:
    assert complaint(lambda: load(write(tmp_path, PLAIN.format(more)))).startswith(wrong)


def test_neighbour(tmp_path: Path) -> None:
    """A file imports another of its own folder, as the folder is now, and leaves nothing behind."""
    derived = "replace(base_run.config(), seed=base_run.config().seed + 1)"
    before = (list(sys.path), set(sys.modules))
    for name, seed in (("one", 10), ("two", 200)):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, PLAIN.format(f", seed={seed}"), "base_run.py")
        assert load(write(folder, derived, before="import base_run")).seed == seed + 1
    write(tmp_path / "two", PLAIN.format(", seed=3000"), "base_run.py")
    assert load(tmp_path / "two" / "run.py").seed == 3001
    assert (list(sys.path), set(sys.modules)) == before


def test_the_repository_s_own_configs() -> None:
    base, derived = (load(ROOT / "configs" / f"{name}.py") for name in ("moderation_7b", "moderation_72b"))
    assert derived.loss.keywords == base.loss.keywords  # type: ignore[attr-defined] # handed on
    assert (derived.optim.warmup_steps, derived.steps) == (base.optim.warmup_steps, base.steps)
    assert (derived.parallel.tp, base.parallel.tp) == (8, 4)
    for file in (ROOT / "configs").glob("*.py"):
        assert isinstance(load(file), RunConfig)


# --- the check -------------------------------------------------------------------------------------------------------------

UNUSED = [
    (["optim.schedule=constant", "optim.min_lr=1e-7"], "optim.min_lr would not be read: optim.schedule is 'constant'"),
    (["optim.decay_steps=3"], "optim.decay_steps would not be read: optim.schedule is 'cosine', not 'wsd'"),
    (["model.recompute_modules=('mlp',)"], "model.recompute_modules would not be read: model.recompute is 'none', not 'selective'"),
    (["model.recompute=full", "model.recompute_modules=('mlp',)"], "model.recompute_modules would not be read: model.recompute is 'full'"),
    (["parallel.sp=true"], "parallel.sp would not be read: parallel.tp is 1"),
    (["parallel.vpp=2"], "parallel.vpp would not be read: parallel.pp is 1"),
    (["parallel.tp_comm_overlap=true"], "parallel.tp_comm_overlap would not be read: model.linear is 'megatron', not 'transformer_engine'"),
    (
        ["parallel.tp_comm_overlap=true", "model.linear=transformer_engine", "parallel.tp=2"],
        "parallel.tp_comm_overlap would not be read: parallel.sp is False",
    ),
    (
        [
            "parallel.tp_comm_overlap=true",
            "model.linear=transformer_engine",
            "parallel.tp=2",
            "parallel.sp=true",
            "eval.data=e.jsonl",
            "data.rows_per_micro_batch=2",
        ],
        "parallel.tp_comm_overlap: its buffers are for micro-batches of one size, and validation's have one row",
    ),
    (["parallel.layers_per_stage=(4,)"], "parallel.layers_per_stage would not be read: parallel.pp is 1"),
    (["optim.weight_decay=0", "optim.no_decay=('norm',)"], "optim.no_decay would not be read: optim.weight_decay is 0"),
]


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        (["optim.warmup_steps=8", "steps=7"], "optim.warmup_steps = 8 do not fit into steps = 7"),
        (
            ["optim.schedule=wsd", "optim.warmup_steps=4", "optim.decay_steps=4", "steps=7"],
            "optim.warmup_steps = 4 and optim.decay_steps = 4 do not fit into steps = 7",
        ),
        (["optim.min_lr=1e-2", "optim.lr=1e-3"], "optim.min_lr = 0.01 is above optim.lr = 0.001"),
    ],
)
def test_a_schedule_that_means_nothing(plain: Path, overrides: list[str], wrong: str) -> None:
    assert complaint(lambda: load(plain, overrides)) == wrong


@pytest.mark.parametrize(("overrides", "wrong"), UNUSED)
def test_an_option_that_nothing_would_read(plain: Path, overrides: list[str], wrong: str) -> None:
    assert complaint(lambda: load(plain, overrides)).startswith(wrong)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.schedule=wsd", "optim.decay_steps=3", "optim.min_lr=1e-7"],
        ["model.recompute=selective", "model.recompute_modules=('mlp',)"],
        ["parallel.sp=true", "parallel.tp=2"],
        ["parallel.vpp=2", "parallel.pp=2", "parallel.layers_per_stage=(1,1,1,1)"],
        ["optim.no_decay=('norm',)"],
        ["lora.path=p", "lora.lora_dropout=0.1", "lora.loraplus_lr_ratio=16", "lora.name=mine"],
        ["lora.rank_pattern={'q_proj': 4}", "lora.alpha_pattern={'v_proj': 8}", "lora.target_modules=['q_proj', 'v_proj']"],
        ["optim.lr=0", "optim.weight_decay=0", "optim.betas=(0,0)", "seed=0", "optim.eps=0"],
    ],
)
def test_the_same_options_where_they_are_read(plain: Path, overrides: list[str]) -> None:
    load(plain, overrides)


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        *(([f"{key}={bound - 1}"], f"{key} = {bound - 1}: must be at least {bound}") for key, bound in {
            "steps": 1, "seed": 0, "log.every": 1, "checkpoint.every": 1, "data.row_length": 1, "data.rows_per_step": 1,
            "data.rows_per_micro_batch": 1, "optim.warmup_steps": 0, "parallel.timeout_minutes": 1, "parallel.tp": 1,
            "parallel.pp": 1, "parallel.vpp": 1, "parallel.cp": 1, "checkpoint.keep_last": 1, "optim.max_skips": 1,
            "log.stragglers_every": 1,
        }.items()),
        (["optim.lr=-1e-9"], "optim.lr = -1e-09: must be at least 0"),
        (["checkpoint.keep_last=1", "checkpoint.keep_every=0"], "checkpoint.keep_every = 0: must be at least 1"),
        (["log.stacks_after_minutes=0"], "log.stacks_after_minutes = 0.0: must be above 0"),
        (["lora.r=0"], "lora.r = 0: must be at least 1"),
        (["lora.rank_pattern={'q_proj': 0}"], "lora.rank_pattern: 'q_proj' = 0: must be at least 1"),
        (["lora.lora_alpha=0"], "lora.lora_alpha = 0.0: must be above 0"),
        (["lora.alpha_pattern={'q_proj': -1}"], "lora.alpha_pattern: 'q_proj' = -1: must be above 0"),
        (["lora.loraplus_lr_ratio=0"], "lora.loraplus_lr_ratio = 0.0: must be above 0"),
        (["lora.lora_dropout=1"], "lora.lora_dropout = 1.0: at least 0 and below 1 was expected"),
        (["lora.r=4", "model.linear=transformer_engine"], "model.linear = 'transformer_engine': an adapted linear is multiplied with its "
         "adapter: use 'megatron'"),
        (["optim.min_lr=-1e-9"], "optim.min_lr = -1e-09: must be at least 0"),
        (["optim.weight_decay=-0.1"], "optim.weight_decay = -0.1: must be at least 0"),
        (["optim.eps=-1e-9"], "optim.eps = -1e-09: must be at least 0"),
        (["optim.clip_grad=0"], "optim.clip_grad = 0.0: must be above 0"),
        (["optim.clip_grad=-1"], "optim.clip_grad = -1.0: must be above 0"),
        (["log.peak_tflops=0"], "log.peak_tflops = 0.0: must be above 0"),
        (["optim.betas=(0.9,1)"], "optim.betas = (0.9, 1): each must be at least 0 and below 1"),
        (["optim.betas=(-0.1,0.9)"], "optim.betas = (-0.1, 0.9): each must be at least 0 and below 1"),
        (["optim.no_decay=('(',)"], "optim.no_decay: '(' is no regular expression: "),
        (["optim.schedule=wsd"], "optim.schedule 'wsd' needs optim.decay_steps"),
        (["optim.schedule=wsd", "optim.decay_steps=0"], "optim.decay_steps = 0: must be at least 1"),
        (["model.recompute=selective", "model.recompute_modules=()"], "model.recompute_modules is empty"),
        (["model.recompute=selective", "model.recompute_modules=('mlpp',)"], "model.recompute_modules: 'mlpp', did you mean 'mlp'?"),
    ],
)  # fmt: skip
def test_values_that_mean_nothing(plain: Path, overrides: list[str], wrong: str) -> None:
    assert complaint(lambda: load(plain, overrides)).startswith(wrong)


# --- losses ----------------------------------------------------------------------------------------------------------------

OWN_LOSS = """
from megamod.losses import Loss

def gentle(head, batch, *, scale: float = 1.0):
    nll = -head.logprobs(batch.labels)
    return Loss(batch.mean(scale * nll, over="tokens"), {"nll": batch.mean_of(nll)})
"""


def test_a_loss_of_the_config_file_itself(tmp_path: Path) -> None:
    file = write(tmp_path, PLAIN.format(", loss=gentle"), "mine.py", before=OWN_LOSS)
    cfg = load(file, ["loss.scale=2"])
    logp = torch.tensor([-1.0, -2.0, -3.0])
    head: Any = SimpleNamespace(logprobs=lambda labels: logp)
    batch: Any = SimpleNamespace(labels=None, mean=lambda x, over: x.sum() / 3, mean_of=lambda x: x)
    assert cfg.loss(head, batch).value == 4.0
    assert config.as_json(load(file).loss) == f"{file}:gentle"
    assert config.as_json(cfg.loss) == {"call": f"{file}:gentle", "scale": 2.0}


@pytest.mark.parametrize(
    ("loss", "wrong"),
    [
        (
            "partial(losses.moderation, verdict_wieght=6.0)",
            "loss: moderation takes no keyword 'verdict_wieght', did you mean 'verdict_",
        ),
        ("partial(losses.cross_entropy, x=6.0)", "loss: cross_entropy takes no keyword 'x', there are none"),
        ("partial(losses.moderation, verdict_weight='6')", "loss.verdict_weight = '6': finite float was expected"),
        ("partial(losses.moderation, verdict_weight=float('nan'))", "loss.verdict_weight = nan: finite float was expected"),
        ("partial(losses.moderation, 4.0)", "loss: moderation cannot be called with a head and a batch: "),
        ("lambda head: 0", "cannot be called with a head and a batch: too many positional arguments"),
        ("lambda head, batch, more: 0", "cannot be called with a head and a batch: missing a required argument: 'more'"),
    ],
)
def test_a_loss_that_could_not_be_called(tmp_path: Path, loss: str, wrong: str) -> None:
    assert wrong in complaint(lambda: load(write(tmp_path, PLAIN.format(f", loss={loss}"))))


@pytest.mark.parametrize(
    ("loss", "saved"),
    [
        ("losses.cross_entropy", "megamod.losses:cross_entropy"),
        ("partial(losses.moderation, verdict_weight=6.0)", {"call": "megamod.losses:moderation", "verdict_weight": 6.0}),
        ("partial(partial(losses.moderation), verdict_weight=6.0)", {"call": "megamod.losses:moderation", "verdict_weight": 6.0}),
        (
            "partial(mixed, 0.5, table=(1, 2), f=print)",
            {"call": "FILE:mixed", "arguments": [0.5], "table": [1, 2], "f": "builtins:print"},
        ),
        ("Called()", "FILE:Called"),
        ("lambda head, batch, **more: 0", "FILE:config.<locals>.<lambda>"),
    ],
)
def test_how_a_loss_is_saved(tmp_path: Path, loss: str, saved: Any) -> None:
    before = "def mixed(share, head, batch, **more): ...\nclass Called:\n    def __call__(self, head, batch): ..."
    file = write(tmp_path, PLAIN.format(f", loss={loss}"), before=before)
    expected = json.loads(json.dumps(saved).replace("FILE", str(file)))
    assert config.as_json(load(file).loss) == expected


# --- saved -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", [PLAIN.format(""), FULL, ADAPTED, COMPARED])
def test_save_writes_every_value(tmp_path: Path, expression: str) -> None:
    cfg = load(write(tmp_path, expression))
    config.save(cfg, tmp_path / "run.json")
    saved = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    for owner, object_ in [(cfg, saved)] + [(getattr(cfg, f.name), saved[f.name]) for f in dataclasses.fields(cfg)]:
        if dataclasses.is_dataclass(owner):
            assert list(object_) == [f.name for f in dataclasses.fields(owner)]  # type: ignore[arg-type]
    for key, value in leaves(cfg).items():
        found = functools.reduce(dict.__getitem__, key.split("."), saved)
        assert found == (list(value) if isinstance(value, tuple) else value), key
    assert saved["loss"] == config.as_json(cfg.loss)
