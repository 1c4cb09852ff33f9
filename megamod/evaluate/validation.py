"""Validation during training: judge labelled rows every so often, remember which step was best, and say when to stop."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamod import files
from megamod.config import EvalConfig
from megamod.data.chat import Encoder
from megamod.data.jsonl import Row, read_rows
from megamod.errors import MegamodError, nearest
from megamod.evaluate import report
from megamod.evaluate.judge import judge
from megamod.evaluate.metrics import HEADLINE, measure
from megamod.model.build import Decoder
from megamod.parallel.collectives import together
from megamod.parallel.grid import Grid

HISTORY = "validations.jsonl"  # in the run's directory: a line for each
LOGGED = ("macro_f1", "accuracy", "strict.f1", "strict.auroc", "strict.fpr", "strict.fnr")
SMALLER_IS_BETTER = ("fpr", "fnr", "ece")


class Validation:
    """The rows, and what they have said of the run so far. What it decides depends on the history alone, which a file keeps.

    Args:
        rows: with labels; see `labelled_rows`.
        directory: the run's.
        done: steps that the run goes on from; what was said of later ones is forgotten.
        steps: of the whole run: the last is validated whatever `cfg.every` says.
    """

    def __init__(self, cfg: EvalConfig, rows: Sequence[Row], encoder: Encoder, directory: Path, done: int, steps: int) -> None:
        self._cfg, self._rows, self._encoder, self._directory, self._steps = cfg, rows, encoder, directory, steps
        self._history = [(step, value) for step, value in _read(directory / HISTORY) if step <= done]

    def is_due(self, step: int) -> bool:
        """Whether step `step`, which counts from 1, is followed by a validation."""
        return step == self._steps or (self._cfg.every is not None and step % self._cfg.every == 0)

    def run(self, step: int, chunks: Sequence[Decoder], grid: Grid, row_length: int) -> dict[str, float | None]:
        """Judge the rows; every rank calls it, and has the numbers for the log. Rank 0 writes `<run>/eval/step-…` and the history."""
        cfg = self._cfg
        judged = judge(
            chunks, grid, self._rows, self._encoder, row_length=row_length, scoring=cfg.scoring, decode=cfg.decode,
            max_new_tokens=cfg.max_new_tokens, progress=False,
        )  # fmt: skip
        metrics = measure(judged, intervals=0)
        self._history.append((step, _number(metrics, cfg.metric)))

        def write() -> None:
            report.write(metrics, judged, self._directory / "eval" / f"step-{step:08d}", title=f"{self._directory.name}, step {step}")
            lines = (json.dumps({"step": s, cfg.metric: v}) + "\n" for s, v in self._history)
            files.replace_text(self._directory / HISTORY, "".join(lines))

        together(write, acts=grid.rank == 0)
        return {name: _number(metrics, name) for name in dict.fromkeys((cfg.metric, *LOGGED))}

    @property
    def best(self) -> int | None:
        """The step with the best value, the earlier of equal ones; None before the first that has a value."""
        return self._best_of(self._history)

    @property
    def beaten(self) -> int | None:
        """The step that was best before `best` was."""
        return self._best_of([(step, value) for step, value in self._history if self.best is not None and step < self.best])

    def keeps(self, step: int | None) -> bool:
        """Whether step `step` is the best so far, and the best is to be kept."""
        return self._cfg.keep_best and step is not None and step == self.best

    @property
    def has_converged(self) -> bool:
        """Whether the last `patience` validations were none better than one before them."""
        later = [step for step, _ in self._history if self.best is not None and step > self.best]
        return self._cfg.patience is not None and len(later) >= self._cfg.patience

    def _best_of(self, history: Sequence[tuple[int, float | None]]) -> int | None:
        sign = -1 if self._cfg.metric.split(".")[-1] in SMALLER_IS_BETTER else 1
        known = [(sign * value, -step) for step, value in history if value is not None]
        return -max(known)[1] if known else None


def _number(metrics: Any, name: str) -> float | None:
    """The number at a path such as `strict.auroc`."""
    for key in name.split("."):
        metrics = metrics[key]
    return None if metrics is None else float(metrics)


def labelled_rows(cfg: EvalConfig, seed: int) -> list[Row]:
    """The rows that `cfg` names, in the file's order. Raises MegamodError for a row without a label, or an unknown metric."""
    if cfg.metric not in HEADLINE:
        raise MegamodError(f"eval.metric = {cfg.metric!r}: {nearest(cfg.metric, HEADLINE)}")
    rows = list(read_rows(cfg.data))
    for row in rows:
        if row.label is None:
            raise MegamodError(f"{row.where}: no label: rows to validate on need one")
    if cfg.limit is not None and cfg.limit < len(rows):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[: cfg.limit])
        rows = [rows[i] for i in chosen]
    return rows


def _read(file: Path) -> list[tuple[int, float | None]]:
    if not file.exists():
        return []
    try:
        lines = [list(json.loads(line).values()) for line in file.read_text(encoding="utf-8").splitlines()]
        return [(step, value) for step, value in lines]
    except (OSError, ValueError, AttributeError) as error:
        raise MegamodError(f"{file}: damaged ({error}): remove it") from None
