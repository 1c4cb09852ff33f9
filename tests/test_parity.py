"""The proof: loss and every gradient on every grid equal transformers' in one process, document by document, in float64 to 1e-11.

On each grid every model and every preference loss is run, without and with full recompute by turns; `FULL=1` runs both of each.
`REPORT=1 python -m pytest tests/test_parity.py` writes README's table of the worst errors; without it the table must be whole.
"""

import os
import re
from pathlib import Path

import distributed
import oracle
import parity
import preferences
import pytest
import rows
import tiny
import torch
from parity import EVERYTHING, Case

from megamod.config import ParallelConfig as P

TOLERANCE = 1e-11
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- parity table: written by tests/test_parity.py -->", "<!-- end of the parity table -->"

# Every tp × pp × vpp × cp × sp that fits 8 ranks, the rest of which are data-parallel; uneven splits.
GRIDS = [
    P(), P(pp=2), P(pp=4), P(pp=2, vpp=2), P(pp=2, layers_per_stage=(1, 3)),
    P(tp=2), P(tp=2, sp=True), P(tp=2, pp=2), P(tp=2, pp=2, sp=True), P(tp=2, pp=4), P(tp=2, pp=4, sp=True),
    P(tp=2, pp=2, vpp=2), P(tp=2, pp=2, vpp=2, sp=True), P(tp=2, pp=2, vpp=2, layers_per_stage=(2, 1, 0, 1)),
    P(tp=4), P(tp=4, sp=True), P(tp=4, pp=2), P(tp=4, pp=2, sp=True), P(tp=4, pp=2, vpp=2), P(tp=4, pp=2, vpp=2, sp=True),
    P(tp=8), P(tp=8, sp=True),
    P(cp=2), P(cp=2, pp=2), P(cp=2, pp=4), P(cp=2, pp=2, vpp=2), P(cp=2, pp=2, layers_per_stage=(3, 1)),
    P(cp=4), P(cp=4, pp=2), P(cp=4, pp=2, vpp=2), P(cp=8),
    P(tp=2, cp=2), P(tp=2, cp=2, sp=True), P(tp=2, pp=2, cp=2), P(tp=2, pp=2, cp=2, sp=True),
    P(tp=2, pp=2, vpp=2, cp=2), P(tp=2, pp=2, vpp=2, cp=2, sp=True),
    P(tp=2, cp=4), P(tp=2, cp=4, sp=True), P(tp=4, cp=2), P(tp=4, cp=2, sp=True),
]  # fmt: skip
RECOMPUTE = ("none", "full")
# By kv heads: models of equal kv heads share a started grid.
MODELS = sorted(tiny.CONFIGS, key=lambda name: (tiny.shape(name).kv_heads, name))
LOSSES = list(preferences.LOSSES)


def label(p: P, world: int = distributed.WORLD) -> str:
    """`tp 2 · pp 2 · vpp 2 · dp 2 · sp`"""
    sizes = {"tp": p.tp, "pp": p.pp, "vpp": p.vpp, "cp": p.cp, "dp": world // (p.tp * p.pp * p.cp)}
    text = " · ".join(f"{name} {n}" for name, n in sizes.items() if n > 1) + (" · sp" if p.sp else "")
    return text + (f" · layers {'+'.join(map(str, p.layers_per_stage))}" if p.layers_per_stage else "")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The oracle's objective and gradients of every tiny model and loss, in a file that the ranks read."""
    results = {}
    for name in MODELS:
        results[name, EVERYTHING] = oracle.run(oracle.model(name), rows.rows(tiny.shape(name).vocab), parity.everything)
        results |= {(name, loss): preferences.oracle_of(name, loss) for loss in LOSSES}
    path = tmp_path_factory.mktemp("oracle") / "expected.pt"
    torch.save(results, path)
    return str(path)


Table = dict[tuple[str, str], float]


@pytest.fixture(scope="module")
def table() -> Table:
    """(grid, model or loss) → the worst error of loss and gradients; filled by `test_grid`, read by `test_readme`."""
    return {}


def cases_on(grid: P, number: int) -> list[tuple[str, Case]]:
    """What is compared on grid `number`, each with its column of the table."""
    both = bool(os.environ.get("FULL"))

    def by_turns(turn: int) -> tuple[str, ...]:
        return RECOMPUTE if both else RECOMPUTE[turn % 2 :][:1]

    cases = [(name, Case(name, grid, recompute)) for i, name in enumerate(MODELS) for recompute in by_turns(number + i)]
    for i, loss in enumerate(LOSSES):
        model = MODELS[(number + 3 * i) % len(MODELS)]
        cases += [(loss, Case(model, grid, recompute, loss=loss)) for recompute in by_turns(number // 2 + i)]
    return sorted(cases, key=lambda case: tiny.shape(case[1].model).kv_heads)  # those share a started grid


def check(cases: list[Case], expected: str, tolerance: float = TOLERANCE) -> list[float]:
    """Run `cases`; each one's error must be within the tolerance, and the ranks must own every weight exactly once."""
    answers = distributed.run(distributed.WORLD, parity.compare, cases, expected)
    errors, faults = [], []
    for number, case in enumerate(cases):
        losses, gradients, owned = zip(*(answer[number] for answer in answers), strict=True)
        errors.append(max(*losses, *gradients))
        if not errors[-1] <= tolerance:
            faults.append(f"{case}: loss off by {max(losses):.1e}, a gradient by {max(gradients):.1e}")
        if sum(owned) != tiny.shape(case.model).parameters():
            faults.append(f"{case}: {sum(owned)} weights are owned of {tiny.shape(case.model).parameters()}")
    assert not faults, "\n".join(faults)
    return errors


@pytest.mark.parametrize("grid", GRIDS, ids=label)
def test_grid(grid: P, expected: str, table: Table) -> None:
    """Every model and preference loss on this grid; one model with selective recompute too."""
    cases = cases_on(grid, GRIDS.index(grid))
    selective = [Case(MODELS[-1], grid, "selective", ("core_attn", "mlp"))]
    errors = check([case for _, case in cases] + selective, expected)
    for (column, _), error in zip(cases, errors, strict=False):
        table[label(grid), column] = max(error, table.get((label(grid), column), 0.0))


def test_selective_recompute(expected: str) -> None:
    """Every model with selective recompute of each part, where tp, pp and sp meet."""
    grid = P(tp=2, pp=2, sp=True)
    check([Case(name, grid, "selective", (part,)) for name in MODELS for part in ("core_attn", "mlp")], expected)


def test_overlap(expected: str) -> None:
    """Gradients reduced bucket by bucket while the backward pass goes on."""
    check([Case("qwen3-tied", grid, overlap=True) for grid in (P(), P(tp=2, pp=2), P(pp=2, vpp=2))], expected)
    check([Case("qwen2-1kv", P(tp=4), overlap=True, recompute=recompute) for recompute in RECOMPUTE], expected)
    # After the reference's pass, which reduces nothing.
    check([Case("qwen3-tied", grid, overlap=True, loss="kto") for grid in (P(tp=2, pp=2), P(pp=2, vpp=2))], expected)


@pytest.mark.parametrize("model", MODELS)
def test_fp32(model: str, tmp_path: Path) -> None:
    """The same in fp32, to 1e-5: nothing is computed in less than the parameters' precision."""
    value, gradients = oracle.run(oracle.model(model, torch.float32), rows.rows(tiny.shape(model).vocab), parity.everything)
    torch.save({(model, EVERYTHING): (value, gradients)}, tmp_path / "fp32.pt")
    check([Case(model, P(tp=2, pp=2, sp=True), dtype="float32")], str(tmp_path / "fp32.pt"), tolerance=1e-5)


def render(table: Table) -> str:
    lines = ["| grid of 8 ranks | " + " | ".join(MODELS + LOSSES) + " |", "|---" * (len(MODELS + LOSSES) + 1) + "|"]
    for grid in map(label, GRIDS):
        errors = (table.get((grid, column)) for column in MODELS + LOSSES)
        lines.append(f"| {grid} | " + " | ".join("" if e is None else f"{e:.0e}" for e in errors) + " |")
    return "\n".join(lines)


def test_readme(table: Table) -> None:
    """README's table has every grid, model and loss, no empty cell, and no error above the tolerance."""
    text = README.read_text(encoding="utf-8")
    if os.environ.get("REPORT"):
        assert len(table) == len(GRIDS) * len(MODELS + LOSSES), "run the whole file to write the table"
        text = text[: text.index(BEGIN) + len(BEGIN)] + "\n" + render(table) + "\n" + text[text.index(END) :]
        README.write_text(text, encoding="utf-8")
    lines = text[text.index(BEGIN) : text.index(END)].strip().splitlines()[1:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0][1:] == MODELS + LOSSES
    assert [row[0] for row in cells[2:]] == list(map(label, GRIDS))
    assert all(float(cell) <= TOLERANCE for row in cells[2:] for cell in row[1:])
