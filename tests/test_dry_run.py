"""Every configuration's grid, rehearsed rank by rank on meta tensors: what a rank holds is what the table of weights says."""

import json
import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest

from megamod.config import RunConfig, load
from megamod.model.build import DTYPES
from megamod.model.shape import Shape
from megamod.parallel.grid import check, check_rows
from megamod.train import model_shape
from megamod.weights.peft import slots
from megamod.weights.table import Piece, Row, hf_shapes, pieces, share, table

ROOT = Path(__file__).parents[1]
TOOL = str(ROOT / "tools" / "dry_run.py")
MADE_ON_THE_WAY = {"quickstart", "classifier"}  # their checkpoint's shape depends on its data
CONFIGS = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - MADE_ON_THE_WAY)


class Rehearsal(NamedTuple):
    world: int
    ranks: tuple[int, ...]  # the first, the last and some between
    overrides: tuple[str, ...] = ()


REHEARSALS = {
    # A tied embedding on two stages, few kv heads on many ranks, uneven stages, weights that do not decay.
    "tiny": Rehearsal(
        32, (0, 9, 31), ("parallel.tp=8", "parallel.pp=2", "parallel.layers_per_stage=3,1", "optim.no_decay=('embed_tokens',)")
    ),
    "moderation_7b": Rehearsal(8, (0, 5, 7)),
    "moderation_72b": Rehearsal(64, (3, 31, 63)),
    "moderation_72b_long": Rehearsal(128, (0, 77, 127)),
    "moderation_7b_lora": Rehearsal(8, (7,)),
    "moderation_72b_lora": Rehearsal(8, (5,)),
    "moderation_7b_qlora": Rehearsal(1, (0,)),
    "moderation_72b_qlora": Rehearsal(8, (7,), ("parallel.tp=8", "parallel.sp=true")),
    "moderation_72b_qlora_h200": Rehearsal(1, (0,)),
    "gpu_check": Rehearsal(1, (0,)),
    "gpu_check_lora": Rehearsal(1, (0,)),
    "smollm2": Rehearsal(2, (0, 1)),
    "smollm2_dpo": Rehearsal(2, (1,)),
    "tiny_dpo": Rehearsal(4, (3,), ("parallel.tp=2", "parallel.pp=2", "lora.r=4")),
    "moderation_72b_dpo": Rehearsal(8, (7,)),
    "cost_sensitive": Rehearsal(8, (5,)),
}


class Line(NamedTuple):
    """What the tool prints of a rank."""

    rank: int
    place: dict[str, int]
    layers: str
    parameters: int
    gibibytes: tuple[float, ...]  # of weights, gradients, optimizer; and in the host's memory
    micro_batches: int


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)


def rehearse(name: str) -> list[Line]:
    world, ranks, overrides = REHEARSALS[name]
    done = python(TOOL, str(ROOT / "configs" / f"{name}.py"), *overrides, "--world", str(world), "--ranks", ",".join(map(str, ranks)))
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows = done.stdout.splitlines()
    names = ("rank", "place", "layers", "parameters", "weights", "gradients", "optimizer", "host", "micro-batches", "seconds")
    assert tuple(header.split()) == names
    lines = []
    for row in rows:
        rank, *words = row.replace("·", "").split()
        place, (layers, parameters, *sizes, count, _seconds) = words[:8], words[8:]
        coordinates = dict(zip(place[::2], map(int, place[1::2]), strict=True))
        lines.append(
            Line(int(rank), coordinates, layers, int(parameters.replace(",", "")), tuple(float(s[:-1]) for s in sizes), int(count))
        )
    return lines


@cache
def config_of(name: str) -> tuple[RunConfig, Shape, tuple[int, ...]]:
    cfg = load(ROOT / "configs" / f"{name}.py", REHEARSALS[name].overrides)
    shape = model_shape(cfg)
    return cfg, shape, check(cfg.parallel, shape, REHEARSALS[name].world)


def rows_of(name: str, pp: int) -> list[tuple[Row, int]]:
    """The table's rows that pipeline rank `pp` holds, each with its layer's number."""
    cfg, shape, split = config_of(name)
    stages = [number for number in range(len(split)) if number % cfg.parallel.pp == pp]
    layers = [i for number in stages for i in range(sum(split[:number]), sum(split[: number + 1]))]
    first, last = 0 in stages, len(split) - 1 in stages
    held = []
    for row in table(shape):
        if "{}" in row.ours:
            held += [(row, i) for i in layers]
        elif row.ours.startswith("embedding."):
            held += [(row, 0)] * (first or (shape.tied and last))  # tied: the last stage has a copy, which counts as the head
        else:
            held += [(row, 0)] * last
    return held


def held(row: Row, tp: int, rank: int) -> int:
    """Elements of a parameter on a tensor-parallel rank, with copies and padding."""
    sizes = []
    for part in row.parts:
        size = list(part.shape)
        if part.cut is not None:
            size[part.cut] = share(part, tp, rank)[2]
        sizes.append(prod(size))
    return sum(sizes)


def adapter(name: str, pp: int) -> int:
    """Weights of the run's adapter on a rank, A whole where a linear is cut by rows and B where it is cut by columns."""
    cfg, shape, _ = config_of(name)
    if cfg.lora is None:
        return 0
    total, wanted = 0, slots(cfg.lora, shape)
    for row, layer in rows_of(name, pp):
        for part in row.parts:
            slot = wanted.get(part.hf.format(layer).removesuffix(".weight"))
            if slot is not None and part.cut is not None:
                size = list(part.shape)
                size[part.cut] = share(part, cfg.parallel.tp, 0)[2]
                total += slot.r * sum(size)
    if shape.score is not None and any(row.ours == "output_layer.weight" for row, _ in rows_of(name, pp)):
        total += shape.outputs * shape.hidden  # trained whole, in a copy
    return total


def saved_by_4_bits(rows: list[tuple[Row, int]], tp: int, rank: int, weight: int) -> float:
    """Bytes that NF4 with double quantisation takes less than weights of `weight` bytes, but for the buffer of the largest linear."""
    linears = [held(row, tp, rank) for row, _ in rows if row.ours.endswith("weight") and "linear" in row.ours]
    return sum(linears) * (weight - (4 + 8 / 64 + 32 / 64 / 256) / 8) - max(linears) * weight


def test_a_reference_of_its_own_counts() -> None:
    """Without adapters a preference loss has a second model in memory; made-up pairs stand for the data."""
    large = [str(ROOT / "configs" / "tiny_dpo.py"), f"model.path={ROOT / 'configs' / 'models' / 'qwen2.5-7b'}"]
    rows = [python(TOOL, *large, *more, "--world", "1", "--ranks", "0") for more in ((), ("reference.kind=uniform",))]
    assert [(done.returncode, done.stderr) for done in rows] == [(0, "")] * 2
    both, alone = (float(done.stdout.splitlines()[1].split()[-6][:-1]) for done in rows)
    assert both == pytest.approx(2 * alone, rel=0.02)


def test_beyond_the_heads() -> None:
    """cp 16 where tp 8 leaves a rank 8 heads: the groups that gather keys and values are rehearsed too."""
    config = str(ROOT / "configs" / "moderation_72b_long.py")
    done = python(TOOL, config, "parallel.cp=16", "--world", "512", "--ranks", "300")
    assert (done.returncode, done.stderr) == (0, "")
    assert "pp 2 · dp 0 · cp 5 · tp 4" in done.stdout


def test_every_config_has_a_rehearsal() -> None:
    assert sorted(REHEARSALS) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run(name: str) -> None:
    cfg, shape, split = config_of(name)
    p, (world, ranks, _) = cfg.parallel, REHEARSALS[name]
    dp = world // (p.tp * p.pp * p.cp)
    lines = rehearse(name)
    assert [line.rank for line in lines] == list(ranks)
    for line in lines:
        pp, rest = divmod(line.rank, dp * p.cp * p.tp)
        assert line.place == {"pp": pp, "dp": rest // (p.cp * p.tp), "cp": rest // p.tp % p.cp, "tp": rest % p.tp}
        assert line.layers == "+".join(str(split[chunk * p.pp + pp]) for chunk in range(p.vpp))
        base, low = sum(held(row, p.tp, line.place["tp"]) for row, _ in rows_of(name, pp)), adapter(name, pp)
        assert line.parameters == base + low
        trained = low or base
        # Gradients in fp32 at least; masters where weights are rounded, and two moments, of this rank's share of dp × cp. Buckets
        # are padded, so a little more.
        weight, full = DTYPES[cfg.model.dtype].itemsize, max(4, DTYPES[cfg.model.dtype].itemsize)
        optimizer = (2 * full + full * (weight < full)) / (dp * p.cp)
        expected = [count * each / 2**30 for count, each in ((base + low, weight), (trained, full), (trained, optimizer), (0, 0))]
        if shape.quantization is not None:
            expected[0] -= saved_by_4_bits(rows_of(name, pp), p.tp, line.place["tp"], weight) / 2**30
        assert line.gibibytes == pytest.approx(expected, rel=0.01, abs=0.006)
        assert line.micro_batches == check_rows(cfg, shape, world)


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_hold_the_model_once(name: str) -> None:
    """Over tp × pp, what ranks own is the model. `test_dry_run` ties what is counted here to what ranks really build."""
    cfg, shape, _ = config_of(name)
    p = cfg.parallel
    owned = 0
    for pp in range(p.pp):
        copy = shape.tied and pp == p.pp - 1 > 0  # of the embedding, on the last stage
        rows = [(row, i) for row, i in rows_of(name, pp) if not (copy and row.ours.startswith("embedding."))]
        owned += sum(piece.numel for rank in range(p.tp) for row, i in rows for piece in pieces(row, p.tp, rank, i) if piece.owned)
    assert owned == shape.parameters()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_rank_loads_its_parameters_whole_and_exports_every_tensor_once(name: str) -> None:
    """Each tp × pp rank's pieces fill its parameters but for the vocabulary's padding; those that ranks own tile Hugging Face's tensors."""
    cfg, shape, _ = config_of(name)
    p = cfg.parallel
    written: dict[str, list[Piece]] = {}
    for pp in range(p.pp):
        copy = shape.tied and pp == p.pp - 1 > 0  # of the embedding, on the last stage
        for row, layer in rows_of(name, pp):
            for rank in range(p.tp):
                here, first = pieces(row, p.tp, rank, layer), 0
                for piece in here:
                    assert piece.row == first, (row.ours, layer, rank)
                    first += piece.size[0]
                padding = held(row, p.tp, rank) - sum(piece.numel for piece in here)
                assert padding == 0 or (row.parts[0].padded and 0 < padding < held(row, p.tp, rank)), (row.ours, layer, rank)
                if not (copy and row.ours.startswith("embedding.")):
                    for piece in here:
                        written.setdefault(piece.hf, []).extend([piece] * piece.owned)
    assert {hf: several[0].shape for hf, several in written.items()} == hf_shapes(shape)
    for several in written.values():
        several.sort(key=lambda piece: piece.offset)
        assert sum(piece.numel for piece in several) == prod(several[0].shape)
        assert all(one.offset != other.offset for one, other in pairwise(several))  # shares of one axis alone, none of them twice
        cut = [axis for axis in range(len(several[0].shape)) if len({piece.offset[axis] for piece in several}) > 1]
        assert len(cut) <= 1
        for one, other in pairwise(several):
            assert one.offset[cut[0]] + one.size[cut[0]] == other.offset[cut[0]]


SEVERAL = """
import json, runpy, sys
tool, *_ = sys.argv[1:]
for arguments in json.loads(sys.argv[2]):
    sys.argv = [tool, *arguments]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as end:
        print(f"exit {end.code}", file=sys.stderr, flush=True)
"""

IMPOSSIBLE = [
    ("moderation_72b", ("parallel.tp=12",), (96, "0"), "parallel.tp = 12 cannot cut 64 heads, 8 kv heads and ffn 29568: use 8 or 16"),
    ("moderation_72b", (), (96, "0"), "tp 8 × pp 4 × cp 2 = 64 does not divide 96 ranks: launch 64 or 128"),
    ("tiny", ("data.rows_per_step=7",), (4, "0,1"), "data.rows_per_step = 7 cannot be shared by dp 4 × 1 rows a micro-batch: use 4 or 8"),
    ("tiny", (), (4, "4"), "there is no rank 4 in a world of 4: ranks go from 0 to 3"),
    ("tiny", ("parallel.tpp=2",), (4, "0"), "override parallel.tpp=2: ParallelConfig has no field 'tpp', did you mean 'tp'?"),
    (
        "tiny",
        ("optim.no_decay=('embedd',)",),
        (4, "1"),
        "optim.no_decay: 'embedd' matches no tensor that is trained; names look like model.layers.3.self_attn.k_norm.weight",
    ),
    (
        "tiny",
        ("model.attention=flash_attn",),
        (4, "0"),
        "model.attention = 'flash_attn' needs a GPU and bfloat16, this is meta in float32: use 'auto' or 'reference'",
    ),
    ("tiny", ("model.fusion=triton",), (4, "0"), "model.fusion = 'triton' needs a GPU and triton, this is meta: use 'auto' or 'reference'"),
]


def test_what_cannot_be_is_one_line_and_status_1() -> None:
    calls = [
        [str(ROOT / "configs" / f"{name}.py"), *overrides, "--world", str(world), "--ranks", ranks]
        for name, overrides, (world, ranks), _ in IMPOSSIBLE
    ]
    done = python("-c", SEVERAL, TOOL, json.dumps(calls))
    assert done.stderr.splitlines() == [line for *_, wrong in IMPOSSIBLE for line in (f"megamod: error: {wrong}", "exit 1")]
