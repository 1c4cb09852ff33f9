"""A base of which each rank of dp × cp keeps a slice: the same numbers as with the whole, in less memory."""

import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import distributed
import lora_parity as lora
import parity
import pytest
import tiny
import torch
from lora_parity import LoraCase
from parity import Case, Run
from safetensors.torch import load_file
from torch import Tensor

from megamod import config, losses
from megamod.batch import Batch
from megamod.config import LoraConfig
from megamod.config import ParallelConfig as P
from megamod.errors import MegamodError
from megamod.model.head import Head
from megamod.model.shards import Gathering, Slices
from megamod.parallel.grid import Grid, check, started
from megamod.weights import fingerprint
from megamod.weights.load import Source, Tensors, load
from megamod.weights.quantization import Quantization
from megamod.weights.table import Frozen, frozen, placed

CONFIGS = Path(__file__).parents[1] / "configs"
WORLD = 4
GRIDS = {
    "dp 4": P(),
    "tp 2 dp 2 sp": P(tp=2, sp=True),
    "cp 2 dp 2": P(cp=2),
    "tp 2 cp 2 sp": P(tp=2, cp=2, sp=True),
    "pp 2 dp 2": P(pp=2),
    "pp 2 vpp 2 cp 2": P(pp=2, vpp=2, cp=2),
}
ADAPTERS = {
    "lora": (LoraConfig(r=3, lora_alpha=7), None),
    "some": (LoraConfig(r=4, target_modules=("q_proj", "down_proj"), layers_to_transform=(0, 3)), None),  # linears without adapters
    "dora": (LoraConfig(r=10, lora_alpha=16, use_dora=True, lora_dropout=0.3), None),
    "qlora": (LoraConfig(r=3, lora_alpha=7), Quantization()),
    "qlora, some plain": (LoraConfig(r=4, use_dora=True), Quantization("fp4", False, 32, ("k_proj", "down_proj", "layers.1.self_attn"))),
}
RECOMPUTE = [("none", None), ("full", None), ("selective", ("core_attn", "mlp"))]


class Found(NamedTuple):
    """What a rank says of a base that is whole, or in slices."""

    losses: list[float]
    trained: list[Tensor]
    fingerprint: str
    kept: int  # bytes of the base's linears
    whole: int  # what they would have


def compact_of(run: Run, one: LoraCase) -> list[Frozen]:
    shape = tiny.shape(one.case.model).quantized(one.quantization)
    return frozen(run.optimizer.chunks, shape, run.grid.tp.size, run.grid.tp.rank)


def trained(one: LoraCase, grid: Grid) -> Found:
    """After two steps."""
    run, _ = lora.prepare(one, grid)
    values = []
    for _ in range(2):
        run.step()
        run.optimizer.step(1e-2)
        values.append(float(run.metrics.get("loss", 0.0)))
    shape = tiny.shape(one.case.model).quantized(one.quantization)
    items = compact_of(run, one)
    base = [*placed(run.optimizer.chunks, shape, grid.tp.size, grid.tp.rank), *items]
    whole = sum(item.weight.slices.numel * item.weight.slices.own.itemsize for item in items)  # type: ignore[attr-defined]
    masters = [segment.master.detach().clone() for segment in run.optimizer.segments]
    return Found(values, masters, fingerprint.of_model(base, grid), sum(item.weight.nbytes for item in items), whole)


def both(cases: list[LoraCase]) -> list[tuple[float, bool, float, float]]:
    """How far slices change losses and weights; whether not the base; of their bytes the share that this rank keeps, and of the ranks."""
    found = []
    with started(cases[0].case.parallel, tiny.shape(cases[0].case.model)) as grid:
        for one in cases:
            whole, sliced = (trained(one, replace(grid, base_shards=shards)) for shards in (None, grid.dp_cp))
            off = max(abs(a - b) for a, b in zip(whole.losses, sliced.losses, strict=True))
            off = max(off, *(float((a - b).abs().max()) for a, b in zip(whole.trained, sliced.trained, strict=True)), 0.0)
            found.append((off, whole.fingerprint == sliced.fingerprint, sliced.kept / sliced.whole, 1 / grid.dp_cp.size))
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_slices_change_no_number(grid: str) -> None:
    """Losses, weights after two steps and the base's fingerprint: to the bit, and to rounding where torch's own product, whose backward
    is summed in another order, is what a linear without adapters has. Models, adapters and ways to recompute take turns."""
    number = list(GRIDS).index(grid)
    model = "qwen2-1kv" if number % 2 else "qwen3"
    adapters = list(ADAPTERS)[number % 2 :: 2]
    ways = RECOMPUTE[number // 2 :] + RECOMPUTE[: number // 2]
    cases = [
        LoraCase(ADAPTERS[name][0], Case(model, GRIDS[grid], *way), ADAPTERS[name][1]) for name, way in zip(adapters, ways, strict=False)
    ]
    for answer in distributed.run(WORLD, both, cases):
        for name, (off, same, kept, share) in zip(adapters, answer, strict=True):
            assert off <= (1e-13 if name == "some" else 0.0), name
            assert same
            assert kept == pytest.approx(share, rel=0.02)


def gathered(one: LoraCase) -> tuple[int, int, int]:
    """Between a forward and its backward pass: tensors that autograd keeps in the memory that is gathered into, or with what was there;
    the bytes of this memory, and of the largest weight."""
    with started(one.case.parallel, tiny.shape(one.case.model)) as whole:
        grid = replace(whole, base_shards=whole.dp_cp)
        run, _ = lora.prepare(one, grid)
        weights = [item.weight for item in compact_of(run, one)]
        known = [weight.dense().clone() for weight in weights]  # type: ignore[attr-defined]
        buffers = {buffer for weight in weights for buffer in weight.buffers_shared}
        memory = {buffer._memory.untyped_storage().data_ptr() for buffer in buffers}
        kept: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x)
            return x

        def asked(head: Head, batch: Batch) -> losses.Loss:
            return parity.everything(head, batch)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run.step(asked)
        assert kept
        inside = [x for x in kept if x.untyped_storage().data_ptr() in memory]
        copies = [x for x in kept if any(x.shape == w.shape and torch.equal(x, w) for w in known)]
        return len(inside) + len(copies), sum(buffer.nbytes for buffer in buffers), max(w.nbytes for w in known)


@pytest.mark.parametrize(("recompute", "modules"), RECOMPUTE)
@pytest.mark.parametrize("adapter", ["lora", "dora", "some"])
def test_nothing_keeps_a_gathered_weight(adapter: str, recompute: str, modules: tuple[str, ...] | None) -> None:
    one = LoraCase(ADAPTERS[adapter][0], Case("qwen3", P(tp=2, sp=True), recompute, modules))
    for count, buffers, largest in distributed.run(WORLD, gathered, one):
        assert count == 0
        assert buffers == 2 * largest


class Counting:
    """How many numbers are read of what is not the embedding, the head or a vector."""

    def __init__(self, source: Source) -> None:
        self.source, self.read_numbers = source, 0
        self.shapes, self.dtype = source.shapes, source.dtype

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        values = self.source.read(name, offset, size)
        self.read_numbers += values.numel() if "_proj.weight" in name else 0
        return values


def read_by_ranks(model: str, parallel: P) -> tuple[int, int]:
    """Numbers of the layers' linears that this rank reads to load its slices, and that there are."""
    shape = tiny.shape(model)
    with started(parallel, shape) as grid:
        source = Counting(Tensors(tiny.weights(model)))
        chunks, _ = lora.build(config.ModelConfig(path="", dtype="float64"), shape, grid)
        items = load(chunks, shape, grid, source)
        assert {type(item) for item in items if "linear" in item.name and item.name.endswith("weight")} == {Frozen}
        return source.read_numbers, sum(x.numel() for name, x in tiny.weights(model).items() if "_proj.weight" in name)


@pytest.mark.parametrize("parallel", [P(shard_base=True), P(tp=2, cp=2, shard_base=True)], ids=["dp", "tp-cp-dp"])
def test_a_rank_reads_its_slices_alone(parallel: P) -> None:
    """Together the ranks read each number once."""
    answers = distributed.run(WORLD, read_by_ranks, "qwen3", parallel)
    assert sum(read for read, _ in answers) == answers[0][1]
    assert max(read for read, _ in answers) <= answers[0][1] / WORLD * 1.05


def in_any_order(orders: list[list[int]]) -> bool:
    """Whether what is asked for comes, whatever was expected; after a change too."""
    with started(P(), tiny.shape("qwen3")) as grid:
        gathering = Gathering(grid.dp_cp)
        several = [Slices(n, torch.empty(0, dtype=torch.float64), gathering) for n in (7, 64, 100, 1)]
        truth = [torch.arange(s.numel, dtype=torch.float64) + 1000 * i for i, s in enumerate(several)]
        for slices, values in zip(several, truth, strict=True):
            slices.keep(0, values)
        same = True
        for order in orders:
            same = same and all(torch.equal(several[i].whole(), truth[i]) for i in chain(order, order, order))
            truth[order[0]] = truth[order[0]] + 0.5
            several[order[0]].keep(0, truth[order[0]])
            same = same and torch.equal(several[order[0]].whole(), truth[order[0]])
        return same


def test_what_is_asked_for_comes() -> None:
    orders = [[0, 1, 2, 3, 3, 2, 1, 0], [2, 0, 2, 1], [3, 3, 1], [1, 2, 3, 0, 1, 0], [0]]
    assert all(distributed.run(WORLD, in_any_order, orders))


SAME = ["steps=4", "model.dtype=float64", "optim.schedule=constant", "log.every=1", "log.tensorboard=false", "data.rows_per_step=4"]


@pytest.mark.parametrize("kind", [["lora.r=3", "lora.init_lora_weights=pissa"], ["lora.r=3", "model.quantization.quant_type=nf4"]], ids=str)
def test_a_run_of_slices_goes_on_with_the_whole(kind: list[str], tmp_path: Path) -> None:
    """Losses, checkpoints, exports and records know nothing of slices; they are in no run's identity."""
    whole, sliced = str(tmp_path / "whole"), str(tmp_path / "sliced")
    runs = [
        (whole, [*SAME, *kind]),
        (sliced, [*SAME, *kind, "parallel.shard_base=true", "steps=2"]),
        (sliced, [*SAME, *kind, "steps=3"]),
        (sliced, [*SAME, *kind, "parallel.shard_base=true"]),
    ]
    (expected, export), (first, _), (second, _), (third, other) = distributed.run(2, lora.trained_by_runs, runs)[0]
    assert first == {step: expected[step] for step in (1, 2)}
    assert second | third == expected
    ours, theirs = (load_file(Path(path) / "adapter_model.safetensors") for path in (export, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    records = [json.loads(Path(run, "run.json").read_text()) for run in (whole, sliced)]
    assert records[0]["base"] == records[1]["base"]
    assert "base in 2 slices" in records[1]["grid"]
    assert "slices" not in records[0]["grid"]


def test_what_cannot_be_sliced_is_refused() -> None:
    shape = tiny.shape("qwen3")
    with pytest.raises(MegamodError, match=re.escape("parallel.shard_base would not be read: lora is None, and no weight is frozen: set")):
        config.load(CONFIGS / "tiny.py", ["parallel.shard_base=true"])
    for grid, hint in ((P(shard_base=True), "launch 2 ranks"), (P(tp=2, shard_base=True), "launch 4 ranks or use a smaller tp or pp")):
        with pytest.raises(MegamodError, match=f"parallel.shard_base: dp × cp is 1, and nobody shares a rank's part of the base: {hint}$"):
            check(grid, shape, grid.tp)
    assert check(P(cp=2, shard_base=True), shape, 2) == (shape.layers,)
