"""What validations decide: which step is best, what is kept of it, when to stop; and that it all follows from the history."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st

from megamod.config import EvalConfig
from megamod.data.jsonl import Row, row_of
from megamod.evaluate.metrics import HEADLINE
from megamod.evaluate.validation import HISTORY, Record, Validation, labelled_rows

ROWS = [row_of({"text": "x", "label": "safe"}, "e.jsonl:1"), row_of({"text": "y", "label": "unsafe"}, "e.jsonl:2")]
ENCODER: Any = SimpleNamespace(gold=lambda row: row, prompts=lambda row, room: None, score=None)


def validation(
    folder: Path, done: int = 0, steps: int = 99, saved: Callable[[int], bool] = lambda step: True, rows: list[Row] = ROWS, **options: Any
) -> Validation:
    return Validation(EvalConfig("e.jsonl", **options), rows, ENCODER, folder, done, steps, saved)


def said(made: Validation, *values: tuple[int, float | None], metric: str = "macro_f1") -> Validation:
    """As `run` notes what a validation said of `metric`; of the others nothing."""
    for step, value in values:
        made._history.append(Record(step, made._digest, {name: value if name == metric else None for name in HEADLINE}, step == 99))
    return made


def keep(made: Validation, folder: Path) -> None:
    """As `run` writes it."""
    (folder / HISTORY).write_text("".join(json.dumps(record._asdict()) + "\n" for record in made._history))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | st.sampled_from([0.1, 0.2, 0.3]), max_size=8), st.integers(1, 3), st.sampled_from(["macro_f1", "strict.fpr"]))
def test_the_best_step_and_patience_by_their_definitions(
    tmp_path_factory: pytest.TempPathFactory, values: list[float | None], patience: int, metric: str
) -> None:
    made = said(validation(tmp_path_factory.mktemp("run"), every=1, patience=patience, metric=metric), *enumerate(values, 1), metric=metric)
    known = [x for x in values if x is not None]
    if not known:
        assert made.best is made.stops is None
        return
    top = min(known) if metric == "strict.fpr" else max(known)
    assert made.best == values.index(top) + 1
    assert made.kept == made.best
    assert made.beaten == [step for step in range(1, len(values) + 1) if step != made.best]
    assert (made.stops is not None) == (len(values) - made.best >= patience)


def test_a_run_goes_on_with_what_was_said_before_its_checkpoint(tmp_path: Path) -> None:
    keep(said(validation(tmp_path), (2, 0.5), (4, 0.7), (6, 0.9)), tmp_path)
    assert validation(tmp_path, done=4).best == 4, "what was said of step 6 is forgotten, as the step is"
    assert validation(tmp_path, done=6).best == 6


def test_a_step_without_a_checkpoint_is_never_the_best_to_be_kept(tmp_path: Path) -> None:
    keep(said(validation(tmp_path), (2, 0.9), (4, 0.7)), tmp_path)
    assert validation(tmp_path, done=4, saved=lambda step: step == 4).kept == 4
    assert validation(tmp_path, done=4, saved=lambda step: False).kept is None
    free = validation(tmp_path, done=4, saved=lambda step: False, keep_best=False)
    assert (free.best, free.kept) == (2, None)


def test_another_metric_reads_its_own_numbers_and_other_rows_none(tmp_path: Path) -> None:
    first = validation(tmp_path)
    for step, f1, auroc in ((1, 0.9, 0.1), (2, 0.8, 0.7)):
        first._history.append(Record(step, first._digest, {**dict.fromkeys(HEADLINE), "macro_f1": f1, "strict.auroc": auroc}, False))
    keep(first, tmp_path)
    assert validation(tmp_path, done=2).best == 1
    assert validation(tmp_path, done=2, metric="strict.auroc").best == 2
    assert validation(tmp_path, done=2, rows=ROWS[:1]).best is None
    assert validation(tmp_path, done=2, scoring="first_token").best is None


def test_the_last_step_of_a_run_is_not_forgotten_for_being_beaten(tmp_path: Path) -> None:
    made = said(validation(tmp_path), (2, 0.5), (99, 0.4))
    assert (made.best, made.beaten) == (2, [])
    assert said(validation(tmp_path), (2, 0.5), (3, 0.4)).beaten == [3]


def test_when_one_is_due(tmp_path: Path) -> None:
    assert [step for step in range(1, 10) if validation(tmp_path, steps=9, every=4).is_due(step)] == [4, 8, 9]
    assert [step for step in range(1, 10) if validation(tmp_path, steps=9).is_due(step)] == [9]


@pytest.mark.parametrize("line", ["{", "[]", '{"step": "x", "rows": "r", "metrics": {}}', '{"step": 1, "rows": "r", "metrics": {}}'])
def test_a_damaged_history_is_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / HISTORY).write_text(line + "\n")
    assert complaint(lambda: validation(tmp_path, done=3)).startswith(f"{tmp_path / HISTORY}:1: ")


def test_rows_to_validate_on(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"t{i}", "label": "safe"}) + "\n" for i in range(9)))
    rows = labelled_rows(EvalConfig(str(file), limit=4), seed=3)
    assert len(rows) == 4
    assert [row.where for row in rows] == sorted(row.where for row in rows), "in the file's order"
    assert rows == labelled_rows(EvalConfig(str(file), limit=4), seed=3) != labelled_rows(EvalConfig(str(file), limit=4), seed=4)
    assert (
        complaint(lambda: labelled_rows(EvalConfig(str(file), metric="macrof1"), 1)) == "eval.metric = 'macrof1': did you mean 'macro_f1'?"
    )
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    assert complaint(lambda: labelled_rows(EvalConfig(str(file)), 1)).startswith(f"{file}:1: no label")
