"""configs/LOSSES.md: its functions are run as they stand there, in a notebook's way and on a grid, and configs/cost_sensitive.py is."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cost_sensitive
import distributed
import oracle
import parity
import preferences
import pytest
import tiny
import torch
import torch.nn.functional as F
from parity import Case

from megamod.batch import Batch
from megamod.config import ParallelConfig as P
from megamod.config import load
from megamod.data.packing import micro_batch
from megamod.losses import Loss, needs, needs_of
from megamod.model.head import Head, ScoreHead
from megamod.parallel.grid import started
from megamod.reference import Reference
from megamod.step import train_step

CONFIGS = Path(__file__).parents[1] / "configs"
MODEL = "qwen3"


@functools.cache
def page() -> dict[str, Any]:
    """What the page defines."""
    found: dict[str, Any] = {"torch": torch, "F": F, "Loss": Loss, "needs": needs, "replace": replace}
    text = (CONFIGS / "LOSSES.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks[:2]:
        exec(block, found)
    found["notebook"] = blocks[2]
    return found


def test_the_first_is_twelve_lines() -> None:
    (first, *_) = re.findall(r"```python\n(.*?)```", (CONFIGS / "LOSSES.md").read_text(encoding="utf-8"), re.DOTALL)
    assert sum(bool(line.strip()) for line in first.splitlines()) <= 12


def test_in_a_notebook() -> None:
    """The page's own lines, with two tensors."""
    documents = preferences.documents(40)[:3]
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True) for size in ((512, 6), (40, 6)))
    room = {**page(), "documents": documents, "hidden": hidden, "weight": weight}
    exec(page()["notebook"], room)
    batch = micro_batch([documents], capacity=512)
    logp = F.log_softmax(hidden[batch.rows] @ weight.t(), -1).gather(-1, batch.labels[:, None])[:, 0]
    expected = (torch.where(batch.verdict, 3.0, 1.0) * -logp).mean()
    assert abs(float(room["value"].detach()) - float(expected.detach())) < 1e-12
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert needs_of(page()["my_dpo"]) == {"pairs", "reference"}


@pytest.mark.parametrize("name", ["threats_first", "my_dpo"])
def test_on_a_grid(name: str) -> None:
    """The same function, its loss and every gradient equal to transformers' in one process."""
    made = preferences.loader(MODEL)
    policy, reference = preferences.models(MODEL)
    batches = preferences.completed(policy, reference, made.step(0), made.mismatched(0))
    value, gradients = oracle.run(policy, batches, page()[name])
    for loss, worst in distributed.run(distributed.WORLD, step_on_a_grid, name, gradients):
        assert worst <= 1e-11
        assert loss is None or abs(loss - float(value)) <= 1e-11 * abs(float(value))


def step_on_a_grid(name: str, gradients: dict[str, torch.Tensor]) -> tuple[float | None, float]:
    """On a pool's rank: a step of the page's function, and the worst error of a gradient."""
    parallel, shape, loss = P(tp=2, pp=2, sp=True), tiny.shape(MODEL), page()[name]
    with started(parallel, shape) as grid:
        run = parity.prepare(Case(MODEL, parallel), grid)
        reference = Reference(preferences.config(loss), shape, grid, run.optimizer.chunks, (), None, preferences.source(MODEL))
        loader = preferences.loader(MODEL, grid.dp.rank, grid.dp.size, 2)
        metrics = train_step(run.optimizer.chunks, reference.complete(loader.step(0), list), loss, grid)
        return float(metrics["loss"]) if metrics else None, parity.worst(run, gradients, parity.gradient)


def test_what_mistakes_cost() -> None:
    """The expected cost by hand; a missed threat costs most, and the gradient goes against it."""
    cfg = load(CONFIGS / "cost_sensitive.py", ["loss.certainty=0.25"])
    assert cfg.model.score is not None and cfg.model.score.labels == cost_sensitive.SEVERITIES
    scores = torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    truth = torch.tensor([2, 0, 1])
    one = Batch(
        torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), (1, 1, 1), torch.arange(3), 1 << truth,
        torch.zeros(3, dtype=torch.bool), torch.tensor([1.0, 2.0, 1.0]), torch.arange(3),
    )  # fmt: skip
    identity = torch.eye(3, dtype=torch.float64).requires_grad_()
    head: Head = ScoreHead.whole(scores, identity)
    value, metrics = cfg.loss(head, one)
    p, costs = scores.softmax(-1), torch.tensor(cost_sensitive.COSTS, dtype=torch.float64)
    each = (costs[truth] * p).sum(-1) - 0.25 * p[torch.arange(3), truth].log()
    assert abs(float(value.detach()) - float((each * one.weight).sum() / 4)) < 1e-12
    assert float(metrics["missed"].sum) == float(metrics["missed"].count) == 1.0
    value.backward()
    assert identity.grad is not None and identity.grad.abs().sum() > 0
    assert costs[2, 0] == costs.max() == 10 * costs[0, 2]


def test_the_page_s_names_are_there() -> None:
    """Every `batch.x` and `head.x` of the page is one of theirs."""
    text = (CONFIGS / "LOSSES.md").read_text(encoding="utf-8")
    for owner, cls in (("batch", Batch), ("head", Head)):
        for name in set(re.findall(rf"\b{owner}\.(\w+)", text)):
            assert hasattr(cls, name) or name in Batch.__dataclass_fields__, name
