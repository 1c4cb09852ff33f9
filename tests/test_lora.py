"""LoRA under Megatron against peft in one process, in float64 to 1e-11: loss, every gradient, the norm, ten steps of AdamW.

`FULL=1 python -m pytest tests/test_lora.py` checks every adapter on every model with every recompute mode on every grid; without it
adapters, models and modes take turns, each grid with half of the adapters.
"""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import distributed
import lora_parity as lora
import parity
import pytest
import tiny
import torch
from lora_parity import LoraCase
from parity import Case
from safetensors.torch import load_file

from megamod.config import LoraConfig, OptimConfig
from megamod.config import ParallelConfig as P
from megamod.errors import MegamodError
from megamod.model.build import DTYPES
from megamod.model.lora import Plan
from megamod.weights import fingerprint, peft
from megamod.weights.load import Tensors

TOLERANCE = 1e-11
GRIDS = [
    P(), P(tp=2), P(tp=2, sp=True), P(tp=4), P(tp=4, sp=True), P(pp=2), P(tp=2, pp=2), P(tp=2, pp=2, sp=True), P(tp=4, pp=2, sp=True),
    P(cp=2), P(pp=2, cp=2), P(tp=2, cp=2), P(tp=2, cp=2, sp=True), P(tp=2, pp=2, cp=2, sp=True), P(pp=2, vpp=2),
    P(tp=2, pp=2, vpp=2, sp=True), P(tp=4, cp=2), P(tp=4, cp=2, sp=True), P(tp=8, sp=True), P(pp=4),
    P(tp=2, cp=2, sp=True, shard_base=True), P(pp=2, vpp=2, shard_base=True),
]  # fmt: skip
RECOMPUTE = [("none", None), ("full", None), ("selective", ("core_attn", "mlp"))]
ADAPTERS = {
    "all": LoraConfig(r=3, lora_alpha=7),
    "dropout": LoraConfig(r=10, lora_alpha=16, lora_dropout=0.3),
    "dora": LoraConfig(r=10, lora_alpha=16, use_dora=True, use_rslora=True),
    "pissa": LoraConfig(r=3, init_lora_weights="pissa", target_modules=("q_proj", "v_proj", "up_proj", "down_proj")),
    "pissa-dora": LoraConfig(r=4, init_lora_weights="pissa", use_dora=True, target_modules=("k_proj", "o_proj", "gate_proj")),
    "patterns": LoraConfig(
        r=4, target_modules=r".*\.(1|2|3)\.(self_attn\.[qv]_proj|mlp\.\w+_proj)", rank_pattern={"q_proj": 10, "layers.2.mlp.up_proj": 3},
        alpha_pattern={"v_proj": 2.5},
    ),
    "top": LoraConfig(r=2, layers_to_transform=(3,), target_modules=("v_proj", "o_proj")),  # a first stage without any
    # Stages that hold unlike adapters beside what they share.
    "embedding": LoraConfig(r=3, modules_to_save=("embed_tokens",), layers_to_transform=(3,), target_modules=("q_proj", "down_proj")),
}  # fmt: skip
HEAD = LoraConfig(r=3, modules_to_save=("embed_tokens", "lm_head"), target_modules=("k_proj",))  # where they are not tied
MODELS = ("qwen2-1kv", "qwen3", "llama-bias-tied")
FULL = bool(os.environ.get("FULL"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """peft's loss and gradients of every adapter on every model, in a file that the ranks read."""
    results = {}
    for model in MODELS:
        for cfg in [*ADAPTERS.values(), *([] if tiny.shape(model).tied else [HEAD])]:
            rows = parity.made_rows(model)
            if cfg.lora_dropout:
                rows = [replace(row, seed=lora.seed_of(i)) for i, row in enumerate(rows)]
            results[LoraCase(cfg, Case(model, P())).key] = lora.expected(cfg, model, rows)
    path = tmp_path_factory.mktemp("peft") / "expected.pt"
    torch.save(results, path)
    return str(path)


def check(cases: list[LoraCase], expected: str) -> None:
    answers = distributed.run(distributed.WORLD, lora.compare, cases, expected)
    faults = []
    for number, one in enumerate(cases):
        losses, gradients, owned = zip(*(answer[number] for answer in answers), strict=True)
        if not max(*losses, *gradients) <= TOLERANCE:
            faults.append(f"{one}: loss off by {max(losses):.1e}, a gradient by {max(gradients):.1e}")
        count = sum(math.prod(size) for size in peft.tensors(one.lora, tiny.shape(one.case.model)).values())
        if sum(owned) != count:
            faults.append(f"{one}: {sum(owned)} weights are owned of {count}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "number",
    range(len(GRIDS)),
    ids=lambda n: f"{GRIDS[n].tp}-{GRIDS[n].pp}-{GRIDS[n].vpp}-{GRIDS[n].cp}-{GRIDS[n].sp}" + "-sliced" * GRIDS[n].shard_base,
)
def test_grid(number: int, expected: str) -> None:
    """tp, pp, vpp, cp, sp: loss and every gradient of A, B, magnitudes and whole copies."""
    grid = GRIDS[number]
    for turn, model in enumerate(MODELS):
        adapters = [*ADAPTERS.values(), *([] if tiny.shape(model).tied else [HEAD])]
        cases = [
            LoraCase(cfg, Case(model, grid, recompute, modules))
            for i, cfg in enumerate(adapters)
            for j, (recompute, modules) in enumerate(RECOMPUTE)
            if FULL or ((number + i) % 2 == 0 and (number // 2 + i) % 3 == turn and (number // 3 + i) % 3 == j)
        ]
        if cases:
            check(cases, expected)


OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.5)
STEPPED = {
    "plus": (LoraConfig(r=3, lora_alpha=6, loraplus_lr_ratio=16.0), P(tp=2, pp=2, sp=True)),
    "dora": (ADAPTERS["dora"], P(tp=4, cp=2)),
    "pissa": (LoraConfig(r=10, lora_alpha=10, init_lora_weights="pissa"), P(tp=4, pp=2, sp=True)),
}


@pytest.mark.parametrize("name", STEPPED)
def test_ten_steps(name: str, tmp_path: Path) -> None:
    """The norm at each of ten steps, and the weights after them: AdamW with clipping, also LoRA+ against peft's own optimizer."""
    (cfg, grid), model = STEPPED[name], "qwen2-1kv"
    torch.save({LoraCase(cfg, Case(model, P())).key: lora.steps(cfg, model, OPTIM, 10)}, tmp_path / "steps.pt")
    grids = [P(tp=2, cp=2, sp=True), grid]
    cases = [LoraCase(cfg, Case(model, grid, "full")) for grid in grids]
    answers = distributed.run(distributed.WORLD, lora.optimize, cases, OPTIM, str(tmp_path / "steps.pt"))
    for number, grid in enumerate(grids):
        norms, after = zip(*(answer[number] for answer in answers), strict=True)
        assert max(norms) <= TOLERANCE, grid
        assert max(after) <= TOLERANCE, grid


def test_one_of_several_adapters_counts() -> None:
    """Trained, frozen or none: a pass has the numbers of the one that counts, and training moves the trained one alone."""
    model = "qwen3"
    cfg, other = LoraConfig(r=3), LoraConfig(r=4, use_dora=True, target_modules=("v_proj", "gate_proj"), modules_to_save=("lm_head",))
    answers = distributed.run(distributed.WORLD, lora.choose, LoraCase(cfg, Case(model, P(tp=2, pp=2, cp=2, sp=True))), other)
    for found in answers:
        assert found["None"] == [found["bare"][0]] * 2
        assert found["other"][0] == found["other"][1] != found["None"][0]
        assert found["default"][1] < found["default"][0] != found["None"][0]
    rows = parity.made_rows(model)
    assert answers[0]["default"][0] == pytest.approx(float(lora.expected(cfg, model, rows)[0]), rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_fingerprint(dtype: str) -> None:
    """The same on every grid and from the files; training leaves it, the last bit of one element does not."""
    model = "llama-bias-tied"
    known = fingerprint.of_source(Tensors(tiny.weights(model)), tiny.shape(model), DTYPES[dtype])
    for grid in (P(), P(tp=4, pp=2)):
        for before, after, changed in distributed.run(distributed.WORLD, lora.fingerprints, grid, model, dtype):
            assert before == after == known
            assert changed != known


def test_saving_and_exporting_leave_the_base_as_it_is(tmp_path: Path) -> None:
    """To the last bit after 200 saves and exports; a checkpoint holds the adapter and its optimizer, not the base."""
    one = LoraCase(LoraConfig(r=3), Case("qwen3", P(tp=2), dtype="bfloat16"))
    answers = distributed.run(2, lora.cycles, one, 200, str(tmp_path))
    for same, moved, stored in answers:
        assert same
        assert moved
        assert stored == peft.tensors(one.lora, tiny.shape("qwen3"))


def test_a_run_goes_on_from_another_grid_and_another_run_from_its_export(tmp_path: Path) -> None:
    """PiSSA, DoRA and dropout: stopped after two steps on tp 2 and resumed on pp 2, the numbers are those of a run that was not."""
    same = ["steps=4", "model.dtype=float64", "optim.schedule=constant", "log.every=1", "log.tensorboard=false", "data.rows_per_step=4"]
    kind = ["lora.r=3", "lora.init_lora_weights=pissa", "lora.use_dora=true", "lora.lora_dropout=0.2"]
    whole, stopped, next_, moved = (str(tmp_path / name) for name in ("whole", "stopped", "next", "moved"))
    runs = [
        (whole, [*same, *kind, "parallel.tp=2"]),
        (stopped, [*same, *kind, "parallel.tp=2", "steps=2"]),
        (stopped, [*same, *kind, "parallel.pp=2"]),
        (moved, [*same, *kind, "parallel.tp=2", f"checkpoint.resume={stopped}/checkpoints/step-00000002"]),
        (next_, [*same, f"lora.path={whole}/checkpoints", "lora.lora_dropout=0", "steps=1"]),
        (next_, [*same, "lora.path=is/not/read/again", "steps=2"]),
        (stopped, [*same, *kind, "lora.r=5", "steps=1", "checkpoint.resume=no", "checkpoint.export=false"]),  # with a beginning of its own
    ]
    found = distributed.run(2, lora.trained_by_runs, runs)[0]
    (losses, export), (first, _), (second, resumed), (third, elsewhere), (after, _), (again, _), (other, _) = found
    assert first == {step: losses[step] for step in (1, 2)}
    assert second == pytest.approx(losses, rel=1e-9)
    assert third == {step: losses[step] for step in (3, 4)}
    (beginning,) = Path(moved).glob(f"{peft.INITIAL}-*")
    theirs = Path(stopped, beginning.name)
    assert {f.name: f.read_bytes() for f in beginning.iterdir()} == {f.name: f.read_bytes() for f in theirs.iterdir()}
    assert after[1] < losses[1]
    assert again[1] == after[1]
    assert other[1] == pytest.approx(losses[1], rel=1e-9)  # PiSSA begins as the base, whatever the rank
    # Their tensors' bits, not the files': safetensors writes the entries of a header's metadata in no order.
    one, other_grid, same_grid = (load_file(Path(path) / "adapter_model.safetensors") for path in (export, resumed, elsewhere))
    assert one.keys() == same_grid.keys()
    assert all(torch.equal(one[name].view(torch.uint8), same_grid[name].view(torch.uint8)) for name in one)
    assert one.keys() == other_grid.keys()
    assert all(torch.allclose(one[name], other_grid[name], rtol=1e-7, atol=1e-9) for name in one)
    record = json.loads(Path(whole, "run.json").read_text())
    assert record["base"]["before"] == record["base"]["after"] != record["identity"]["base"]
    assert set(record["adapters"].values()) == {"addmm"}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"target_modules": ("q_prj",)}, "lora.target_modules: 'q_prj' names no linear of this model, did you mean 'q_proj'?"),
        ({"target_modules": ".*zz"}, "lora.target_modules: the regular expression '.*zz' matches no linear"),
        ({"rank_pattern": {"layers.9.q_proj": 4}}, "lora.rank_pattern: 'layers.9.q_proj' matches no adapted module"),
        ({"layers_to_transform": (4,)}, "lora.layers_to_transform: 4: the model has layers 0 to 3"),
        ({"init_lora_weights": "pissa", "r": 33}, "lora.r = 33: model.layers.0.self_attn.q_proj is (64, 32): PiSSA can take at most 32"),
        ({"path": "nowhere"}, "nowhere"),
    ],
)
def test_what_a_plan_refuses(changes: dict[str, Any], wrong: str) -> None:
    with pytest.raises(MegamodError, match=re.escape(wrong)):
        Plan.of(LoraConfig(**changes), tiny.shape("qwen3"))
