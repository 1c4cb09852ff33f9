"""Switches of large runs. Masters and moments in host memory: the same steps as beside the weights (here both are the processor's memory,
and copies are copies). What of the others can be known without the GPUs that they are for: who reads them, what is refused."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import distributed
import parity
import pytest
import tiny
import torch
from parity import Case, Run

from megamod import checkpoint, optim
from megamod.config import ModelConfig, OptimConfig, ParallelConfig
from megamod.errors import MegamodError
from megamod.model.backends import overlap_tp
from megamod.model.build import transformer_config
from megamod.optim import KINDS
from megamod.parallel.grid import Grid, started

PLAIN = OptimConfig(lr=1e-2, clip_grad=0.5)
OFFLOADED = replace(PLAIN, offload=True)


def stepped(run: Run, steps: int) -> list[float]:
    """The norms of the gradients before clipping."""
    norms = []
    for _ in range(steps):
        run.step()
        norms.append(run.optimizer.step(1e-2).grad_norm)
    return norms


def apart(run: Run, other: Run) -> float:
    """The largest difference of a master, a moment or a weight."""
    pairs = [(mine, theirs) for mine, theirs in zip(run.optimizer.segments, other.optimizer.segments, strict=True)]
    found = [(mine.weight.double() - theirs.weight.double()).abs().max() for mine, theirs in pairs]
    for kind in KINDS:
        found += [(run.optimizer.tensor(a, kind) - other.optimizer.tensor(b, kind)).abs().max() for a, b in pairs]
    return float(max(found))


def is_apart(run: Run) -> bool:
    """Whether nothing of the optimizer's is in the memory of weights and gradients."""
    return all(
        segment.master.data_ptr() != segment.weight.data_ptr() and segment.master.grad.data_ptr() != segment.grad.data_ptr()  # type: ignore[union-attr]
        for segment in run.optimizer.segments
    )


def compared(case: Case) -> tuple[float, bool, list[float], list[float]]:
    with started(case.parallel, tiny.shape(case.model)) as grid:
        plain, offloaded = (parity.prepare(case, grid, cfg) for cfg in (PLAIN, OFFLOADED))
        norms, others = stepped(plain, 3), stepped(offloaded, 3)
        return apart(plain, offloaded), is_apart(offloaded), norms, others


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tp=2, sp=True)], ids=["dp", "tp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 2e-4), ("bfloat16", 1e-2)])
def test_steps_are_the_same(parallel: ParallelConfig, dtype: str, tolerance: float) -> None:
    """As near as torch's two AdamWs, one element at a time or one operation, round alike."""
    for off, is_own, norms, others in distributed.run(2, compared, Case("qwen2", parallel, dtype=dtype)):
        assert off <= tolerance
        assert is_own
        assert others == pytest.approx(norms, rel=tolerance)
        assert norms[0] > 0.5  # clipped


def skipped(case: Case) -> tuple[bool, float]:
    """Whether a step with a gradient that is no number was one, and how far it moved anything."""
    with started(case.parallel, tiny.shape(case.model)) as grid:
        run, other = (parity.prepare(case, grid, OFFLOADED) for _ in range(2))
        run.step()
        if grid.rank == 0:
            run.optimizer.segments[0].grad[0] = math.nan
        return run.optimizer.step(1e-2).skipped, apart(run, other)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    assert distributed.run(2, skipped, Case("qwen2", ParallelConfig(tp=2))) == [(True, 0.0)] * 2


def moved(case: Case, directory: str) -> list[float]:
    """A checkpoint of the one goes on as the other."""

    def continued(cfg: OptimConfig, saved: Path, grid: Grid) -> Run:
        run = parity.prepare(case, grid, cfg)
        checkpoint.resume(saved, run.optimizer)
        stepped(run, 1)
        return run

    with started(case.parallel, tiny.shape(case.model)) as grid:
        found = []
        for cfg, other in ((PLAIN, OFFLOADED), (OFFLOADED, PLAIN)):
            run = parity.prepare(case, grid, cfg)
            stepped(run, 2)
            saved = checkpoint.save(Path(directory) / str(cfg.offload), 2, run.optimizer, grid)
            stepped(run, 1)
            found.append(apart(run, continued(other, saved, grid)))
        return found


def test_a_checkpoint_goes_on_either_way(tmp_path: Path) -> None:
    for errors in distributed.run(2, moved, Case("qwen2", ParallelConfig()), str(tmp_path)):
        assert max(errors) <= 1e-13


def test_what_cannot_act_is_refused() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    with pytest.raises(MegamodError, match=re.escape("optim.offload: masters and moments go from a GPU to host memory, and here they are")):
        optim.check(OFFLOADED, ["model.norm.weight"], cpu, 2)
    with pytest.raises(MegamodError, match=r"^optim\.overlap_grad_reduce: dp × cp is 1, and there is nobody to reduce gradients with"):
        optim.check(OptimConfig(overlap_grad_reduce=True), ["model.norm.weight"], cpu, 1)
    optim.check(replace(OFFLOADED, overlap_grad_reduce=True), ["model.norm.weight"], meta, 2)


def test_tp_overlap_is_handed_to_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its buffers are for, and the one value of megatron-core's that its linears read. It has never run."""
    asked: list[dict[str, object]] = []
    base = ModuleType("transformer_engine.pytorch.module.base")
    base.initialize_ub = lambda **keywords: asked.append(keywords)  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    overlap_tp(4096, 8192, 8, torch.device("cuda"))
    assert asked == [{"shape": [4096, 8192], "tp_size": 8, "bootstrap_backend": "nccl"}]
    with pytest.raises(MegamodError, match=r"^parallel\.tp_comm_overlap needs GPUs: leave it out"):
        overlap_tp(4096, 8192, 8, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, base.__name__, None)
    with pytest.raises(MegamodError, match=r"^parallel\.tp_comm_overlap: transformer_engine cannot be imported"):
        overlap_tp(4096, 8192, 8, torch.device("cuda"))


def tp_comm_overlap() -> list[bool]:
    """As megatron-core's linears find it, without and with the switch."""
    found = []
    for switch in (False, True):
        with started(ParallelConfig(tp=2, sp=True, tp_comm_overlap=switch), tiny.shape("qwen2")) as grid:
            found.append(transformer_config(ModelConfig(path=""), tiny.shape("qwen2"), grid, False).tp_comm_overlap)
    return found


def test_tp_overlap_reaches_megatron_core() -> None:
    assert distributed.run(2, tp_comm_overlap) == [[False, True]] * 2
