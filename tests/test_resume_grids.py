"""A run that comes back on another grid twelve times, with all weights trained and with an adapter: its next ten losses are those of the
run that stayed where it was, in float64 to 1e-11.
"""

import gc
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import distributed
import lora_parity as lora
import parity
import pytest
import rows
import tiny
import torch
import torch.distributed as dist
from lora_parity import LoraCase
from parity import Case, Run
from test_checkpoint import forget

from megamod import checkpoint, losses
from megamod.config import LoraConfig, OptimConfig
from megamod.config import ParallelConfig as P
from megamod.parallel.grid import Grid, started
from megamod.step import train_step

TOLERANCE = 1e-11
COMPARED = 10  # losses after a resume
OPTIM = OptimConfig(weight_decay=0.1, clip_grad=1.0)
LR = 1e-2
MODEL = "qwen3-shallow"  # two kv heads, fewer than some grids' tp
LORA = LoraConfig(r=3, lora_alpha=6, modules_to_save=("embed_tokens",))
# Of eight ranks, each grid followed by one that differs from it in most of tp, pp, vpp, cp, dp and sp.
GRIDS = (
    P(), P(pp=2), P(tp=4, cp=2, sp=True), P(pp=4, layers_per_stage=(1, 0, 0, 1)), P(tp=2, cp=2),
    P(pp=2, vpp=2, layers_per_stage=(1, 0, 1, 0)), P(tp=2, sp=True), P(cp=4),
    P(tp=2, pp=2, vpp=2, sp=True, layers_per_stage=(0, 1, 0, 1)), P(tp=8, sp=True), P(pp=2, cp=2), P(cp=8), P(tp=2, pp=2, cp=2, sp=True),
)  # fmt: skip
Links = dict[str, list[tuple[list[float], list[float]]]]  # of a kind of run: for each link, the run that stayed, and the one that moved


def named(grid: P) -> str:
    dp = distributed.WORLD // (grid.tp * grid.pp * grid.cp)
    return f"tp{grid.tp}-pp{grid.pp}{f'-vpp{grid.vpp}' if grid.vpp > 1 else ''}-cp{grid.cp}-dp{dp}{'-sp' if grid.sp else ''}"


def full(grid: Grid, parallel: P) -> Run:
    """A run that trains every weight."""
    return parity.prepare(Case(MODEL, parallel), grid, OPTIM)


def adapter(grid: Grid, parallel: P) -> Run:
    """A run that trains an adapter and a copy of the embedding."""
    return lora.prepare(LoraCase(LORA, Case(MODEL, parallel)), grid, OPTIM)[0]


KINDS: dict[str, Callable[[Grid, P], Run]] = {"full": full, "lora": adapter}


def step(run: Run) -> float:
    """The loss of the next step, on rows of its own; the same number on every rank."""
    grid, made = run.grid, rows.rows(tiny.shape(MODEL).vocab, seed=run.optimizer.steps)
    batches = rows.shared(made, grid.dp.rank, grid.dp.size, run.case.count(grid))
    metrics = train_step(run.optimizer.chunks, batches, losses.cross_entropy, grid)
    run.optimizer.step(LR)
    loss = torch.tensor([float(metrics["loss"]) if metrics else float("-inf")], dtype=torch.float64)
    dist.all_reduce(loss, dist.ReduceOp.MAX)
    return float(loss)


def continued(run: Run, directory: Path, *, resumed: bool) -> list[float]:
    """The losses of a run's next steps; it is saved after the first."""
    if resumed:
        forget(run)
        newest = checkpoint.latest(directory)
        assert newest is not None
        checkpoint.resume(newest, run.optimizer)
    first = step(run)
    checkpoint.save(directory, run.optimizer.steps, run.optimizer, run.grid)
    return [first, *(step(run) for _ in range(COMPARED))]


def chains(root: Path) -> Links:
    gc.freeze()  # what was imported need not be looked at after each grid
    found: Links = defaultdict(list)
    stayed: dict[str, list[float]] = {}
    for number, parallel in enumerate(GRIDS):
        with started(parallel, tiny.shape(MODEL)) as grid:
            for kind, start in KINDS.items():
                values = continued(start(grid, parallel), root / kind, resumed=number > 0)
                if number:
                    found[kind].append((stayed[kind], values[:COMPARED]))
                stayed[kind] = values[1:]
        gc.collect()  # the grid's groups: see distributed._serve
    return dict(found)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Links:
    answers: list[Links] = distributed.run(distributed.WORLD, chains, tmp_path_factory.mktemp("chains"))
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


@pytest.mark.parametrize("link", [pytest.param(i, id=f"{named(GRIDS[i])} to {named(GRIDS[i + 1])}") for i in range(len(GRIDS) - 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_losses_are_those_of_the_run_that_stayed(found: Links, kind: str, link: int) -> None:
    stayed, moved = found[kind][link]
    assert len(stayed) == len(moved) == COMPARED
    assert len(set(stayed)) == COMPARED, "the losses do not move: they would prove nothing"
    assert max(abs(loss - expected) / abs(expected) for loss, expected in zip(moved, stayed, strict=True)) <= TOLERANCE
