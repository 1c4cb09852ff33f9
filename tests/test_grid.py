"""Which grids a model can be cut for, what is named instead of those it cannot, and where ranks lie on the ones it can."""

import re
from dataclasses import replace
from typing import Any

import distributed
import numpy as np
import pytest
import tiny
import torch.distributed as dist
from complaints import complaint
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from megamod.config import DataConfig, ModelConfig, ParallelConfig, RunConfig
from megamod.errors import MegamodError
from megamod.model.shape import Rope, Shape
from megamod.parallel import grid as grids
from megamod.parallel.grid import check, check_rows, kv_repeats, started, ulysses_degree

BASE = tiny.shape("qwen2")  # 4 layers, 8 heads, 4 kv heads, ffn 48
QUICK = settings(max_examples=300, deadline=None)


def named(text: str) -> list[int]:
    """The alternatives that a message names: `…: use 4 or 8`, `…: launch 6`."""
    found = re.search(r": (?:use|launch|use at most) (\d+)(?: or (\d+))?( stages,.*)?$", text)
    assert found, text
    return [int(n) for n in found.groups()[:2] if n]


def run_config(parallel: ParallelConfig, **data: Any) -> RunConfig:
    return RunConfig(dir="", steps=1, model=ModelConfig(path=""), data=DataConfig(train="", **data), parallel=parallel)


# --- check -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "world", "split"),
    [
        (ParallelConfig(), 1, (4,)),
        (ParallelConfig(), 7, (4,)),
        (ParallelConfig(tp=4, pp=2), 8, (2, 2)),
        (ParallelConfig(tp=8), 8, (4,)),  # 8 ranks share 4 kv heads
        (ParallelConfig(tp=2, cp=4), 16, (4,)),  # 4 ranks share 2 kv heads
        (ParallelConfig(cp=8), 8, (4,)),
        (ParallelConfig(cp=3), 3, (4,)),  # beyond the heads
        (ParallelConfig(tp=8, cp=16), 128, (4,)),
        (ParallelConfig(pp=2, vpp=2), 2, (1, 1, 1, 1)),
        (ParallelConfig(pp=4, layers_per_stage=(2, 1, 1, 0)), 4, (2, 1, 1, 0)),
        (ParallelConfig(pp=2, vpp=2, layers_per_stage=(0, 1, 2, 1)), 4, (0, 1, 2, 1)),
    ],
)
def test_possible_grids(parallel: ParallelConfig, world: int, split: tuple[int, ...]) -> None:
    assert check(parallel, BASE, world) == split


@pytest.mark.parametrize(
    ("parallel", "world", "wrong"),
    [
        (ParallelConfig(tp=2, pp=2), 6, "tp 2 × pp 2 × cp 1 = 4 does not divide 6 ranks: launch 4 or 8"),
        (ParallelConfig(tp=4, cp=2), 2, "tp 4 × pp 1 × cp 2 = 8 does not divide 2 ranks: launch 8"),
        (ParallelConfig(tp=3), 3, "parallel.tp = 3 cannot cut 8 heads, 4 kv heads and ffn 48: use 2 or 4"),
        (ParallelConfig(tp=16), 16, "parallel.tp = 16 cannot cut 8 heads, 4 kv heads and ffn 48: use 8"),
        (ParallelConfig(tp=100), 100, "use 8"),
        (ParallelConfig(tp=3, cp=4), 12, "parallel.tp = 3 cannot cut 8 heads, 4 kv heads and ffn 48: use 2 or 4"),
        (ParallelConfig(pp=3), 3, "4 layers cannot be split evenly over pp 3 × vpp 1 = 3 stages: use 2 or 4 stages, or set parallel."),
        (ParallelConfig(pp=2, vpp=4), 2, "4 layers cannot be split evenly over pp 2 × vpp 4 = 8 stages: use 4 stages, or set parallel."),
        (
            ParallelConfig(pp=2, layers_per_stage=(1, 2)),
            2,
            "(1, 2): 2 numbers (pp 2 × vpp 1) that sum to 4 layers were expected, not 2 that sum",
        ),
        (
            ParallelConfig(pp=2, layers_per_stage=(1, 2, 1)),
            2,
            "2 numbers (pp 2 × vpp 1) that sum to 4 layers were expected, not 3 that sum to 4",
        ),
        (
            ParallelConfig(pp=2, vpp=2, layers_per_stage=(2, 2)),
            2,
            "4 numbers (pp 2 × vpp 2) that sum to 4 layers were expected, not 2 that",
        ),
        (ParallelConfig(pp=2, layers_per_stage=(5, -1)), 2, "parallel.layers_per_stage = (5, -1): 2 numbers"),
        (ParallelConfig(pp=2, layers_per_stage=()), 2, "parallel.layers_per_stage = (): 2 numbers"),
    ],
)
def test_impossible_grids(parallel: ParallelConfig, world: int, wrong: str) -> None:
    text = complaint(lambda: check(parallel, BASE, world))
    assert wrong in text
    assert text.endswith(wrong) or not re.search(r"(use|launch) [\d or]+$", wrong)  # what is named is all that is named


SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 28, 32, 40, 64)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16]))
    ffn = draw(st.sampled_from([1, 6, 30, 48, 64, 210, 18944]))
    return replace(BASE, layers=draw(st.integers(1, 12)), kv_heads=kv, heads=kv * draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8])), ffn=ffn)


def whole(parallel: ParallelConfig, shape: Shape) -> tuple[int, ...]:
    return check(parallel, shape, parallel.tp * parallel.pp * parallel.cp)


def possible(parallel: ParallelConfig, shape: Shape) -> bool:
    """The rules, by the definition: tensor-parallel ranks share query heads and kv heads evenly, so that on each rank every kv head
    serves as many query heads as on any other. Context-parallel ranks need no heads of their own."""
    tp = parallel.tp
    if shape.heads % tp or shape.ffn % tp or shape.layers % (parallel.pp * parallel.vpp):
        return False
    served = np.repeat(np.arange(shape.kv_heads), shape.heads // shape.kv_heads)  # query head → its kv head
    shares = {tuple(np.unique(mine, return_counts=True)[1].tolist()) for mine in served.reshape(tp, -1)}
    return len(shares) == 1 and len(set(shares.pop())) == 1


@QUICK
@given(shapes(), st.sampled_from(SIZES), st.integers(1, 3), st.sampled_from(SIZES))
def test_check_is_the_rule(shape: Shape, tp: int, pp: int, cp: int) -> None:
    parallel = ParallelConfig(tp=tp, pp=pp, cp=cp)
    if possible(parallel, shape):
        assert whole(parallel, shape) == (shape.layers // pp,) * pp
    else:
        complaint(lambda: whole(parallel, shape))


@QUICK
@given(shapes(), st.sampled_from(SIZES))
@example(BASE, 16)
@example(replace(BASE, heads=64, kv_heads=8, ffn=29568), 64)
def test_the_tp_that_is_named_is_possible_and_the_nearest(shape: Shape, tp: int) -> None:
    def goes(n: int) -> bool:
        return possible(ParallelConfig(tp=n), shape)

    assume(not goes(tp))
    text = complaint(lambda: whole(ParallelConfig(tp=tp), shape))
    assert text.startswith(f"parallel.tp = {tp} ")
    fits = [n for n in range(1, shape.heads + 1) if goes(n)]
    assert named(text) == [*[n for n in fits if n < tp][-1:], *[n for n in fits if n > tp][:1]]


@QUICK
@given(shapes(), st.sampled_from(SIZES))
def test_ulysses_takes_as_many_ranks_as_the_heads_allow(shape: Shape, cp: int) -> None:
    degree = ulysses_degree(shape.heads, shape.kv_heads, cp)
    assert cp % degree == 0
    assert kv_repeats(shape.heads, shape.kv_heads, degree) is not None
    assert all(kv_repeats(shape.heads, shape.kv_heads, n) is None for n in range(degree + 1, cp + 1) if cp % n == 0)


@QUICK
@given(st.integers(1, 90), st.integers(1, 16), st.integers(1, 4))
def test_the_stages_that_are_named_divide_the_layers(layers: int, pp: int, vpp: int) -> None:
    assume(layers % (pp * vpp))
    text = complaint(lambda: whole(ParallelConfig(pp=pp, vpp=vpp), replace(BASE, layers=layers)))
    fits = [n for n in range(1, layers + 1) if layers % n == 0]
    assert named(text) == [*[n for n in fits if n < pp * vpp][-1:], *[n for n in fits if n > pp * vpp][:1]]


@QUICK
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 200))
def test_the_ranks_that_are_named_are_the_nearest_multiples(tp: int, pp: int, cp: int, world: int) -> None:
    size = tp * pp * cp
    assume(world % size)
    text = complaint(lambda: check(ParallelConfig(tp=tp, pp=pp, cp=cp), BASE, world))
    assert named(text) == [n for n in (world - world % size, world - world % size + size) if n]


@QUICK
@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 24))
def test_kv_repeats(kv: int, times: int, cp: int) -> None:
    """The fewest copies with which ranks share kv heads, such that each query head meets its own kv head."""
    heads = kv * times
    fit = [r for r in range(1, cp * heads + 1) if kv * r % cp == 0 and heads % (kv * r) == 0 and heads % cp == 0]
    repeats = kv_repeats(heads, kv, cp)
    assert repeats == (fit[0] if fit else None)
    if repeats is not None:
        queries = np.arange(heads).reshape(cp, -1)
        keys = np.arange(kv).repeat(repeats).reshape(cp, -1)
        met = keys.repeat(heads // (kv * repeats), axis=1)  # grouped-query attention on each rank
        assert (met == queries // times).all()


# --- check_rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "data", "world", "count"),
    [
        (ParallelConfig(), {"row_length": 7, "rows_per_step": 6}, 1, 6),
        (ParallelConfig(), {"row_length": 7, "rows_per_step": 6}, 2, 3),
        (ParallelConfig(tp=2, cp=2), {"row_length": 6, "rows_per_step": 12, "rows_per_micro_batch": 3}, 8, 2),
        (ParallelConfig(tp=2, cp=2, sp=True), {"row_length": 2, "rows_per_step": 4, "rows_per_micro_batch": 2}, 4, 2),
        (ParallelConfig(pp=4), {"rows_per_step": 1}, 4, 1),
        (ParallelConfig(pp=2, vpp=2), {"rows_per_step": 4}, 4, 2),
    ],
)
def test_possible_rows(parallel: ParallelConfig, data: dict[str, int], world: int, count: int) -> None:
    assert check_rows(run_config(parallel, **data), BASE, world) == count


@pytest.mark.parametrize(
    ("parallel", "data", "world", "wrong"),
    [
        (ParallelConfig(cp=4), {"row_length": 6}, 4, "data.row_length = 6 cannot be shared by cp 4: use 4 or 8"),
        (ParallelConfig(cp=4), {"row_length": 3}, 4, "data.row_length = 3 cannot be shared by cp 4: use 4"),
        (
            ParallelConfig(tp=2, cp=4, sp=True),
            {"row_length": 12},
            8,
            "data.row_length = 12 cannot be shared by cp 4 × tp 2 (sp): use 8 or 16",
        ),
        (
            ParallelConfig(cp=8),
            {"row_length": 10, "rows_per_micro_batch": 2},
            8,
            "data.row_length = 10 cannot be shared by cp 8: use 8 or 12",
        ),
        (ParallelConfig(), {"rows_per_step": 3}, 2, "data.rows_per_step = 3 cannot be shared by dp 2 × 1 rows a micro-batch: use 2 or 4"),
        (ParallelConfig(tp=2), {"rows_per_step": 3, "rows_per_micro_batch": 2}, 8, "by dp 4 × 2 rows a micro-batch: use 8"),
        (ParallelConfig(pp=4, vpp=2), {"rows_per_step": 6}, 4, "dp 1 × 1 rows a micro-batch × pp 4 (vpp): use 4 or 8"),
    ],
)
def test_impossible_rows(parallel: ParallelConfig, data: dict[str, int], world: int, wrong: str) -> None:
    assert complaint(lambda: check_rows(run_config(parallel, **data), BASE, world)).endswith(wrong)


@QUICK
@given(
    st.builds(ParallelConfig, tp=st.integers(1, 6), cp=st.integers(1, 6), pp=st.integers(1, 3), vpp=st.integers(1, 2), sp=st.booleans()),
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.none() | st.integers(36, 50),
)  # fmt: skip
def test_rows_that_are_named_are_possible(p: ParallelConfig, dp: int, length: int, rows: int, micro: int, window: int | None) -> None:
    """Whoever follows the messages arrives, in two steps at most, and changes nothing that was right."""
    shape, world = replace(BASE, sliding_window=window), dp * p.tp * p.pp * p.cp

    def count(length: int, rows: int) -> int:
        return check_rows(run_config(p, row_length=length, rows_per_step=rows, rows_per_micro_batch=micro), shape, world)

    def follow(length: int, rows: int, steps: int) -> None:
        try:
            found = count(length, rows)
        except MegamodError as error:
            assert steps
            for n in named(str(error)):
                follow(n, rows, steps - 1) if "row_length" in str(error) else follow(length, n, steps - 1)
        else:
            assert found * dp * micro == rows
            assert length * micro % (p.cp * (p.tp if p.sp else 1)) == 0
            assert found % p.pp == 0 or p.vpp == 1

    follow(length, rows, 2)


def test_row_length_s_alternatives_stay_inside_the_window() -> None:
    shape = replace(BASE, sliding_window=20)
    p = ParallelConfig(cp=8)
    assert named(complaint(lambda: check_rows(run_config(p, row_length=19), shape, 8))) == [16]
    assert named(complaint(lambda: check_rows(run_config(p, row_length=21), shape, 8))) == [16]
    assert complaint(lambda: check_rows(run_config(p, row_length=3), replace(BASE, sliding_window=5), 8)).endswith("use a smaller grid")


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, None),
        ({"sliding_window": 16}, 16),
        ({"rope": Rope(1e4, "dynamic", 2.0)}, 64),  # max_position
        ({"rope": Rope(1e4, "dynamic", 2.0), "sliding_window": 16}, 16),
        ({"rope": Rope(1e4, "dynamic", 2.0), "sliding_window": 99}, 64),
        ({"rope": Rope(1e4, "linear", 2.0)}, None),
        ({"rope": Rope(1e4, "yarn", 4.0, 16)}, None),
        ({"rope": Rope(1e4, "llama3", 8.0, 16)}, None),
    ],
)
def test_longest_document(changes: dict[str, Any], longest: int | None) -> None:
    shape = replace(BASE, **changes)
    assert shape.longest_document == longest
    check_rows(run_config(ParallelConfig(), row_length=longest or 10**6), shape, 1)
    if longest is not None:
        text = complaint(lambda: check_rows(run_config(ParallelConfig(), row_length=longest + 1), shape, 1))
        assert text.startswith(f"data.row_length = {longest + 1}")
        assert named(text) == [longest]


# --- on ranks --------------------------------------------------------------------------------------------------------------

WORLD = 8
GRIDS = [
    ParallelConfig(),
    ParallelConfig(tp=2, pp=2, cp=2),
    ParallelConfig(tp=2, cp=2, sp=True),
    ParallelConfig(pp=2, vpp=2, cp=2),
    ParallelConfig(tp=4, pp=2),
    ParallelConfig(tp=8),
    ParallelConfig(pp=4, layers_per_stage=(1, 1, 2, 0)),
]
AXES = ("pp", "dp", "cp", "tp")


def ranks_of(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def places(kv_heads: int) -> list[dict[str, Any]]:
    """This rank's place on each of GRIDS, and who is in its groups there."""
    result = []
    for parallel in GRIDS:
        with started(parallel, replace(BASE, kv_heads=kv_heads)) as grid:
            assert (grid.rank, grid.world) == (dist.get_rank(), WORLD)
            axes = {name: getattr(grid, name) for name in (*AXES, "dp_cp")}
            result.append(
                {
                    **{name: (axis.size, axis.rank, ranks_of(axis.group)) for name, axis in axes.items()},
                    "kv_copies": ranks_of(grid.kv_copies),
                    "reports": grid.reports,
                    "last": grid.is_last_stage,
                    "rest": (grid.vpp, grid.sp, grid.layers_per_stage, str(grid)),
                }
            )
    return result


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_axes_are_slices_of_one_array(kv_heads: int) -> None:
    answers = distributed.run(WORLD, places, kv_heads)
    for number, p in enumerate(GRIDS):
        dp = WORLD // (p.tp * p.pp * p.cp)
        array = np.arange(WORLD).reshape(p.pp, dp, p.cp, p.tp)
        for rank in range(WORLD):
            found = answers[rank][number]
            place = dict(zip(AXES, (int(i[0]) for i in np.where(array == rank)), strict=True))
            for name in AXES:
                line = array[tuple(slice(None) if name == axis else place[axis] for axis in AXES)].tolist()
                assert found[name] == (len(line), place[name], line)
            plane = array[place["pp"], :, :, place["tp"]].reshape(-1).tolist()
            assert found["dp_cp"] == (len(plane), plane.index(rank), plane)
            # tp rank t has kv heads [t·K/tp, (t+1)·K/tp): with tp > K, part of one, the same as its neighbours'
            neighbours = array[place["pp"], place["dp"], place["cp"]].tolist()
            same = [r for t, r in enumerate(neighbours) if t * kv_heads // p.tp == place["tp"] * kv_heads // p.tp]
            assert found["kv_copies"] == (same if p.tp > kv_heads else None)
            last = place["pp"] == p.pp - 1
            assert found["last"] == last
            assert found["reports"] == (last and place["dp"] == place["cp"] == place["tp"] == 0)
            name = f"tp {p.tp} · pp {p.pp} · cp {p.cp} · dp {dp}" + " · vpp 2" * (p.vpp > 1) + " · sp" * p.sp
            assert found["rest"] == (p.vpp, p.sp, p.layers_per_stage or (4 // (p.pp * p.vpp),) * (p.pp * p.vpp), name)


def halves(parallel: ParallelConfig) -> tuple[Any, Any, str]:
    with started(parallel, replace(BASE, heads=2, kv_heads=1)) as grid:
        gather = grid.kv_gather
        assert gather is not None
        return (*((axis.size, axis.rank, ranks_of(axis.group)) for axis in (grid.ulysses, gather)), str(grid))


@pytest.mark.parametrize(
    ("parallel", "degree"), [(ParallelConfig(cp=8), 2), (ParallelConfig(tp=2, cp=4), 1), (ParallelConfig(pp=2, cp=4), 2)]
)
def test_beyond_the_heads_cp_is_a_square(parallel: ParallelConfig, degree: int) -> None:
    """Neighbours share the heads; those at the same place among their neighbours gather keys and values."""
    for rank, (ulysses, gather, name) in enumerate(distributed.run(WORLD, halves, parallel)):
        array = np.arange(WORLD).reshape(parallel.pp, -1, parallel.cp, parallel.tp)
        (pp,), (dp,), (cp,), (tp,) = np.where(array == rank)
        mine = array[pp, dp, :, tp].reshape(-1, degree)
        row, column = divmod(int(cp), degree)
        assert ulysses == (degree, column, mine[row].tolist())
        assert gather == (parallel.cp // degree, row, mine[:, column].tolist())
        assert f"cp {parallel.cp} (ulysses {degree} × {parallel.cp // degree})" in name


def refused(parallel: ParallelConfig) -> str:
    return complaint(lambda: grids.start(parallel, BASE))


def test_a_refused_grid_leaves_the_world_as_it_was() -> None:
    message = "tp 3 × pp 1 × cp 1 = 3 does not divide 8 ranks: launch 6 or 9"
    assert distributed.run(WORLD, refused, ParallelConfig(tp=3)) == [message] * WORLD
    assert distributed.run(WORLD, places, 4)[0][5]["tp"] == (8, 0, list(range(WORLD)))
