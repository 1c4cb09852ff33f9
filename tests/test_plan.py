"""A plan against what is: the dry run's meta tensors to the byte, what ranks save for the backward pass, and the search's own words."""

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import distributed
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from megamod import config, losses, plan
from megamod.config import LoraConfig, ReferenceConfig, RunConfig
from megamod.dry_run import DryRun, dry_run
from megamod.model.shape import Shape, read_shape, shape_of
from megamod.parallel.grid import started
from megamod.plan import HARDWARE, Documents, Model, Parameter
from megamod.train import model_shape
from megamod.weights.quantization import Quantization

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 1000, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "hidden_act": "silu",
    "rope_theta": 1e6,
}  # fmt: skip
H100, DOCUMENTS = HARDWARE["H100"], Documents()


def module(name: str) -> Any:
    """A tool."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", CONFIGS.parent / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def loaded(name: str, *overrides: str) -> tuple[RunConfig, Shape]:
    cfg = config.load(CONFIGS / f"{name}.py", overrides)
    return cfg, model_shape(cfg)


# --- what a rank holds -----------------------------------------------------------------------------------------------------


class Rehearsal(NamedTuple):
    world: int
    ranks: tuple[int, ...]
    overrides: tuple[str, ...] = ()


REHEARSALS = [
    # A tied embedding on two stages, kv heads on several ranks, uneven stages; then chunks, buckets, and another dtype.
    ("tiny", Rehearsal(32, (0, 9, 31), ("parallel.tp=8", "parallel.pp=2", "parallel.layers_per_stage=3,1"))),
    ("tiny", Rehearsal(8, (0, 5), ("parallel.pp=2", "parallel.vpp=2", "parallel.cp=2", "optim.overlap_grad_reduce=true"))),
    ("tiny", Rehearsal(3, (2,), ("model.dtype=bfloat16", "data.rows_per_step=6"))),
    ("tiny", Rehearsal(2, (1,), ("parallel.pp=2", "optim.offload=true"))),
    ("tiny", Rehearsal(2, (1,), ("lora.r=4", "lora.modules_to_save=('embed_tokens',)", "lora.use_dora=true", "parallel.pp=2"))),
    ("tiny_dpo", Rehearsal(4, (3,), ("parallel.tp=2", "parallel.pp=2", "lora.r=4"))),
    ("tiny", Rehearsal(12, (2, 11), ("lora.r=4", "parallel.tp=2", "parallel.pp=2", "parallel.shard_base=true", "data.rows_per_step=12"))),
    ("moderation_72b_lora", Rehearsal(16, (15,), ("parallel.shard_base=true",))),
    ("smollm2_dpo", Rehearsal(2, (1,))),  # a second model is the reference
    ("moderation_7b", Rehearsal(8, (3,), ("optim.overlap_grad_reduce=true",))),  # in many buckets
    ("moderation_72b", Rehearsal(128, (127,))),
]


@pytest.fixture(scope="module")
def rehearsed() -> Iterator[Callable[[RunConfig, Shape, int, int], DryRun]]:
    """`dry_run` in a process that no other test has joined to a world."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        yield lambda *arguments: process.submit(dry_run, *arguments).result()


@pytest.mark.parametrize(("name", "rehearsal"), REHEARSALS, ids=lambda x: x if isinstance(x, str) else f"{x.world} {' '.join(x.overrides)}")
def test_what_a_rank_holds_is_what_the_dry_run_finds(
    rehearsed: Callable[[RunConfig, Shape, int, int], DryRun], name: str, rehearsal: Rehearsal
) -> None:
    cfg, shape = loaded(name, *rehearsal.overrides)
    p, world = cfg.parallel, rehearsal.world
    model, stage = Model.of(cfg, shape), world // p.pp
    for rank in rehearsal.ranks:
        found = rehearsed(cfg, shape, world, rank)
        h = plan.held(cfg, model, world, tp=rank % p.tp, pp=rank // stage, dp_cp=rank % stage // p.tp)
        expected = (found.layers, found.parameters, found.weight_bytes, found.gradient_bytes, found.optimizer_bytes, found.host_bytes)
        optimizer = h.master_bytes + h.moment_bytes
        assert (h.layers, h.parameters, h.weight_bytes, h.gradient_bytes, optimizer, h.host_bytes) == expected
        assert (h.host_bytes > 0) == cfg.optim.offload


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
@pytest.mark.parametrize("q", [Quantization(), Quantization("fp4", False, 128, ("k_proj", "o_proj"))], ids=str)
def test_a_base_in_4_bits(rehearsed: Callable[[RunConfig, Shape, int, int], DryRun], q: Quantization, sliced: bool) -> None:
    cfg, shape = loaded("tiny", "parallel.tp=4", "lora.r=4", f"parallel.shard_base={str(sliced).lower()}", "data.rows_per_step=12")
    shape = shape.quantized(q)
    found, h = rehearsed(cfg, shape, 12, 3), plan.held(cfg, Model.of(cfg, shape), 12, tp=3)
    assert (h.parameters, h.weight_bytes, h.gradient_bytes) == (found.parameters, found.weight_bytes, found.gradient_bytes)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 700), st.booleans()), min_size=1, max_size=12),
    ranks=st.integers(1, 6),
    bucket=st.none() | st.integers(1, 1000),
)
@settings(max_examples=60, deadline=None)
def test_every_element_is_one_ranks(sizes: list[tuple[int, bool]], ranks: int, bucket: int | None) -> None:
    parameters = [Parameter(n, True, ((0, n),), alone) for n, alone in sizes]
    shares = [plan._buffer(parameters, ranks, rank, bucket) for rank in range(ranks)]
    assert sum(owned for _, owned in shares) == sum(n for n, _ in sizes)
    (length,) = {length for length, _ in shares}
    assert length % ranks == 0 and length >= sum(n for n, _ in sizes)


# --- what is saved for the backward pass -----------------------------------------------------------------------------------

RECOMPUTE = {
    "none": (),
    "core": ("model.recompute=selective",),
    "mlp": ("model.recompute=selective", "model.recompute_modules=('mlp',)"),
    "both": ("model.recompute=selective", "model.recompute_modules=('core_attn','mlp')"),
    "full": ("model.recompute=full",),
}
GRIDS = {
    "1": (),
    "tp 2": ("parallel.tp=2",),
    "tp 4 sp": ("parallel.tp=4", "parallel.sp=true"),
    "cp 2": ("parallel.cp=2",),
    "tp 2 cp 2 sp": ("parallel.tp=2", "parallel.cp=2", "parallel.sp=true"),
}
ADAPTERS = {
    "lora": LoraConfig(r=8),
    "lora q_proj": LoraConfig(r=4, target_modules=("q_proj", "down_proj"), layers_to_transform=(1,)),
    "dora": LoraConfig(r=4, use_dora=True),
}
SHAPES = {"tiny qwen2": tiny.shape("qwen2"), "tiny qwen3": tiny.shape("qwen3"), "small": shape_of(SMALL)}
Case = tuple[str, str, str, str | None]  # shape, grid, recompute, adapter
CASES: list[Case] = [
    *((shape, grid, recompute, None) for shape in ("tiny qwen3", "small") for grid in GRIDS for recompute in RECOMPUTE),
    *((shape, grid, recompute, "lora") for shape in ("tiny qwen2", "small") for grid in GRIDS for recompute in ("none", "core", "full")),
    *(("small", grid, "none", adapter) for grid in ("1", "tp 4 sp") for adapter in ADAPTERS),
]


def config_of(case: Case) -> tuple[RunConfig, Shape]:
    shape, grid, recompute, adapter = case
    length = 512 if shape == "small" else 64
    words = [*GRIDS[grid], *RECOMPUTE[recompute], f"data.row_length={length}", "data.rows_per_step=4"]
    cfg = config.load(CONFIGS / "tiny.py", words)
    return replace(cfg, lora=None if adapter is None else ADAPTERS[adapter]), SHAPES[shape]


def saved_here(cases: Sequence[Case]) -> list[int]:
    """What this rank saves, case by case; the cases of one model on one grid come together."""
    tool, found = module("plan"), []
    for _, alike in groupby(cases, key=lambda case: case[:2]):
        several = [config_of(case) for case in alike]
        with started(several[0][0].parallel, several[0][1]) as grid:
            found += [tool.saved_by_ranks(cfg, shape, grid)[0] for cfg, shape in several]
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_activations_are_those_that_ranks_save(grid: str) -> None:
    """Within 3 % on every rank, in every way to recompute: real tensors on a CPU, through autograd's hooks."""
    cases = sorted((case for case in CASES if case[1] == grid), key=lambda case: case[0])
    cfg = config_of(cases[0])[0]
    off = {}
    for rank, measured in enumerate(distributed.run(cfg.parallel.tp * cfg.parallel.cp, saved_here, cases)):
        for case, found in zip(cases, measured, strict=True):
            cfg, shape = config_of(case)
            predicted = plan.saved(cfg, Model.of(cfg, shape), range(shape.layers), first=True, last=True, fused=False)
            off[(rank, *case)] = predicted / found - 1
    assert {case: error for case, error in off.items() if abs(error) > 0.03} == {}


def test_what_fused_kernels_leave_out() -> None:
    """On a GPU the attention's output is kept once: of a layer, by hand (Korthikanti et al. 2022), and SwiGLU's input alone."""
    cfg, _ = loaded("moderation_7b", "model.recompute=none", "data.row_length=4096", "parallel.tp=1", "parallel.sp=false")
    shape = read_shape(CONFIGS / "models" / "qwen2.5-7b")
    t, c, q, kv, f = 4096, 3584, 3584, 512, 18944
    two = plan.saved(cfg, Model(shape, None), range(2), first=False, last=False)
    one = plan.saved(cfg, Model(shape, None), range(1), first=False, last=False)
    assert two - one == 2 * t * (4 * c + q + 2 * kv + q + 3 * f) + 4 * t * (28 + 2)


# --- plans -----------------------------------------------------------------------------------------------------------------


def test_72b_on_tp_8_and_pp_4() -> None:
    cfg, shape = loaded("moderation_72b", "parallel.cp=1")
    found = plan.plan(cfg, Model.of(cfg, shape), 32, H100, DOCUMENTS)
    assert (
        sum(plan.held(cfg, Model.of(cfg, shape), 32, pp=pp, tp=tp).parameters for pp in range(4) for tp in range(8)) >= shape.parameters()
    )
    # 72.7e9 weights on 8 × 4 ranks, in bf16; gradients in fp32; one data-parallel rank has all of masters and moments.
    numbers = found.held.parameters
    assert numbers == pytest.approx(shape.parameters() / 32, rel=0.15)
    assert (found.held.weight_bytes, found.held.moment_bytes) == (2 * numbers, 8 * numbers)
    assert found.held.gradient_bytes == pytest.approx(4 * numbers, rel=1e-4)
    assert found.bytes <= H100.usable  # 18 bytes a weight: 32 GPUs of 80 GB do, 16 do not
    halved = replace(cfg, parallel=replace(cfg.parallel, pp=2, layers_per_stage=None))
    assert plan.plan(halved, Model.of(halved, shape), 16, H100, DOCUMENTS).bytes > H100.usable


def test_operations_are_six_a_weight_and_token() -> None:
    cfg, shape = loaded("moderation_72b", "model.recompute=none")
    w = plan.work(cfg, shape, document=1, labelled=1)
    per_token = plan.train_flops(cfg, Model(shape, None), w) / cfg.data.row_length
    assert per_token == pytest.approx(6 * (shape.parameters() - shape.vocab * shape.hidden), rel=2e-3)
    again = replace(cfg, model=replace(cfg.model, recompute="full"))
    more = plan.train_flops(again, Model(shape, None), w) / plan.train_flops(cfg, Model(shape, None), w)
    assert more == pytest.approx(4 / 3, rel=0.02)


def test_what_a_loss_asks_before_the_training_pass_takes_time() -> None:
    cfg, shape = loaded("moderation_72b_dpo", "model.recompute=full")
    alone = replace(cfg, reference=ReferenceConfig("uniform"))
    w = plan.work(cfg, shape, DOCUMENTS.length, DOCUMENTS.labelled)
    model, world = Model.of(cfg, shape), cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp
    compared, without = (plan.plan(one, model, world, H100, DOCUMENTS) for one in (cfg, alone))
    forward = (w.linears + w.attention + w.head) / (cfg.data.row_length * cfg.data.rows_per_micro_batch)
    assert compared.flops_per_token - without.flops_per_token == pytest.approx(forward)
    assert compared.seconds > without.seconds
    assert [plan.asked(replace(cfg, loss=loss)) for loss in (losses.cpo, losses.kto, losses.bco)] == [0, 3, 2]


def test_operations_are_the_logs() -> None:
    """A plan's forward pass is what the log counts for MFU."""
    cfg, shape = loaded("tiny")
    w = plan.work(cfg, shape, document=64, labelled=0.25)
    assert w.linears + w.attention + w.head == pytest.approx(shape.flops([64] * 8, 128))
    assert 0 < w.mlp < w.linears


def test_bytes_over_links_by_hand() -> None:
    cfg, shape = loaded("moderation_72b")  # tp 8, pp 4, cp 2, sp, full recomputation: 16,384 tokens, 64 rows a step on 128 GPUs
    found = plan.plan(cfg, Model.of(cfg, shape), 128, H100, DOCUMENTS)
    t, c, layers, micro = 8192, 8192, 21, 32
    assert found.links.tp == 7 / 8 * micro * 2 * t * c * (layers * (3 * 4 + 2) + 4)
    assert found.links.pp == micro * 2 * (2 * t // 8 * c)
    # 8 query heads and one kv head a rank, of which each of 2 ranks has a copy; twice forward, once backward.
    assert found.links.cp == layers * micro * 3 * (1 / 2 * t * 128 * 2 * (2 * 8 + 2 * 2))
    assert found.links.dp == 3 / 4 * (found.held.gradient_bytes + 2 * found.held.trained)


def test_the_longest_row_is_the_longest() -> None:
    cfg, shape = loaded("moderation_72b_lora")
    model = Model.of(cfg, shape)
    longest = plan.longest_row(cfg, model, 16, H100, DOCUMENTS)
    assert longest is not None

    def needs(length: int) -> int:
        return plan.plan(replace(cfg, data=replace(cfg.data, row_length=length)), model, 16, H100, DOCUMENTS).bytes

    assert needs(longest) <= H100.usable < needs(longest + 64)
    assert plan.longest_row(cfg, model, 16, replace(H100, memory=1e9), DOCUMENTS) is None


def test_more_in_flight_at_the_pipelines_begin() -> None:
    cfg, _ = loaded("moderation_72b")
    assert [plan.in_flight(cfg, rank, 32) for rank in range(4)] == [4, 3, 2, 1]
    assert plan.in_flight(cfg, 0, 2) == 2
    chunked = replace(cfg, parallel=replace(cfg.parallel, vpp=2))
    assert [plan.in_flight(chunked, rank, 32) for rank in range(4)] == [11, 9, 7, 5]


@pytest.fixture(scope="module")
def searched() -> tuple[RunConfig, Model, list[plan.Planned], list[plan.Lost]]:
    cfg, shape = loaded("moderation_72b_lora")
    model = Model.of(cfg, shape)
    return cfg, model, *plan.fit(cfg, model, 8, H100, DOCUMENTS)


def test_fit_finds_what_fits_and_says_why_the_rest_lost(searched: tuple[RunConfig, Model, list[plan.Planned], list[plan.Lost]]) -> None:
    cfg, model, found, lost = searched
    assert found
    assert all(one.bytes <= H100.usable for one in found)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    best = found[0].cfg
    kinds = {(one.kind.tp, one.kind.pp) for one in lost} | {(best.parallel.tp, best.parallel.pp)}
    assert kinds == {(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8) if tp * pp <= 8}
    assert len(lost) == len(kinds) - 1
    reasons = {str(one.kind): one.reason for one in lost}
    assert reasons["tp 1 · pp 8"].endswith("recompute full")
    # Its overrides make the same plan.
    again = config.override(cfg, plan.changes(cfg, best))
    assert plan.plan(again, model, 8, H100, DOCUMENTS).seconds == found[0].seconds


@pytest.mark.parametrize(
    ("name", "world", "grid", "expected"),
    [
        ("moderation_72b_lora", 8, {"tp": 8, "sp": True}, (False, False)),
        ("moderation_72b_lora", 8, {}, (True, False)),
        ("moderation_72b", 32, {"pp": 8, "vpp": 2, "cp": 4}, (False, True)),
        ("moderation_72b", 32, {"pp": 2, "cp": 4}, (False, True)),  # the least that it can be, and too much
    ],
)
def test_what_does_not_fit_is_sliced_or_offloaded(name: str, world: int, grid: dict[str, Any], expected: tuple[bool, bool]) -> None:
    cfg, shape = loaded(name)
    cfg = replace(cfg, parallel=config.ParallelConfig(**grid))
    model = Model.of(cfg, shape)
    found = plan._relieved(cfg, model, world, H100, DOCUMENTS)
    assert (found.cfg.parallel.shard_base, found.cfg.optim.offload) == expected
    bare = plan.plan(cfg, model, world, H100, DOCUMENTS)
    if any(expected):
        assert bare.bytes > H100.usable and bare.bytes > found.bytes
        assert bare.seconds < found.seconds
        assert ("base in slices" in plan.said(found.cfg), "offload" in plan.said(found.cfg)) == expected
    assert (found.bytes <= H100.usable) == (grid.get("pp") != 2)


def test_what_does_not_fit_gets_the_nearest_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    main, path = module("plan").main, str(CONFIGS / "moderation_72b_lora.py")
    assert main([path, "--world", "8", "parallel.tp=1", "parallel.sp=false"]) == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("megamod: error")]
    assert "do not fit into 73.6 GiB of a H100: the nearest that does: " in line
    overrides = line.rpartition(": ")[2].split()
    assert main([path, "--world", "8", "parallel.tp=1", "parallel.sp=false", *overrides]) == 0
    assert main([str(CONFIGS / "moderation_72b.py"), "--world", "8"]) == 1
    assert "tp 8 × pp 4 × cp 2 = 64 does not divide 8 ranks: launch 64" in capsys.readouterr().err


def test_the_tool(capsys: pytest.CaptureFixture[str]) -> None:
    main = module("plan").main
    assert main([str(CONFIGS / "moderation_72b.py"), "--world", "128"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines()[1:] if line.strip()]
    assert all("predicted" in row or "never measured" in row for row in rows)
    for name in ("weights", "gradients", "masters and moments", "activations", "the head", "longest row", "sent to its tp", "tokens/s"):
        assert any(name in row for row in rows)
    assert main([str(CONFIGS / "moderation_72b_lora.py"), "--fit", "8xH200"]) == 0
    assert "the first one: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--gpu", "H10"), "GPU 'H10', did you mean 'H100'?"),
        (("--fit", "H100"), "--fit H100: a number of GPUs and their name, such as 8xH100, were expected"),
        (("--fit", "8xH100", "--world", "8"), "--fit --world: --fit says how many GPUs"),
        (("--efficiency", "2"), "--efficiency 2.0: at most 1 was expected"),
        (("--memory", "-1"), "--memory: a positive number was expected"),
        (("--labelled", "0"), "a share of at most 1"),
        (("--fit", "8xH100", "--measure"), "--measure --fit: one of the two was expected"),
        (("--measure", "parallel.pp=2"), "--measure: parallel.pp = 2: 1 was expected"),
    ],
)
def test_what_the_tool_refuses(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str) -> None:
    assert module("plan").main([str(CONFIGS / "tiny.py"), *words]) == 1
    assert line in capsys.readouterr().err
