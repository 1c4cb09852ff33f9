"""Validation during training: judge labelled rows every so often, remember which step was best, and say when to stop."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megamod import files
from megamod.config import EvalConfig
from megamod.data.chat import Encoder
from megamod.data.jsonl import Row, json_object, lines_of, read_rows
from megamod.errors import MegamodError, nearest
from megamod.evaluate import report
from megamod.evaluate.judge import check, judge
from megamod.evaluate.metrics import HEADLINE, measure
from megamod.model.build import Decoder
from megamod.parallel.collectives import together
from megamod.parallel.grid import Grid

HISTORY = "validations.jsonl"  # in the run's directory: a line for each
LOGGED = ("macro_f1", "accuracy", "strict.f1", "strict.auroc", "strict.fpr", "strict.fnr")
SMALLER_IS_BETTER = ("fpr", "fnr", "ece")


class Record(NamedTuple):
    """A line of the history."""

    step: int
    rows: str  # a digest of what was judged, and how
    metrics: dict[str, float | None]  # of HEADLINE
    ends: bool  # whether it was the run's last step


class Validation:
    """The rows, and what they have said of the run so far. What it decides depends on the history alone, which a file keeps.

    Args:
        rows: with labels; see `labelled_rows`.
        directory: the run's.
        done: steps that the run goes on from; what was said of later ones is forgotten.
        steps: of the whole run: the last is validated whatever `cfg.every` says.
        saved: whether there is a checkpoint after a step: without one, none is kept for being the best.

    Raises:
        MegamodError: a row that the template cannot take, or that does not fit; so that no step is made in vain.
    """

    def __init__(
        self, cfg: EvalConfig, rows: Sequence[Row], encoder: Encoder, directory: Path, done: int, steps: int, saved: Callable[[int], bool]
    ) -> None:
        self._cfg, self._encoder, self._directory, self._steps = cfg, encoder, directory, steps
        self._rows = [encoder.gold(row) for row in rows]
        check(encoder, cfg.scoring, cfg.decode)
        for i, row in enumerate(rows):
            encoder.prompts(row, cfg.max_new_tokens if i < cfg.decode else 0)
        # What was said of other rows, or scored otherwise, is another number.
        about = [cfg.limit, cfg.scoring, *[[row.label, *row.messages] for row in self._rows]]
        self._digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self._history = [r for r in _read(directory / HISTORY) if r.step <= done and r.rows == self._digest]
        self._lost = {r.step for r in self._history if cfg.keep_best and not saved(r.step)}

    def is_due(self, step: int) -> bool:
        """Whether step `step`, which counts from 1, is followed by a validation."""
        return step == self._steps or (self._cfg.every is not None and step % self._cfg.every == 0)

    def run(self, step: int, chunks: Sequence[Decoder], grid: Grid) -> dict[str, float | None]:
        """Judge the rows; every rank calls it, and has the numbers for the log. Rank 0 writes `<run>/eval/step-…` and the history."""
        cfg = self._cfg
        judged = judge(
            chunks, grid, self._rows, self._encoder, scoring=cfg.scoring, decode=cfg.decode, max_new_tokens=cfg.max_new_tokens,
            progress=False,
        )  # fmt: skip
        metrics = measure(judged, intervals=0)
        numbers = {name: _number(metrics, name) for name in HEADLINE}
        self._history.append(Record(step, self._digest, numbers, ends=step == self._steps))

        def write() -> None:
            report.write(metrics, judged, self._directory / "eval" / f"step-{step:08d}", title=f"{self._directory.name}, step {step}")
            files.replace_text(self._directory / HISTORY, "".join(json.dumps(r._asdict()) + "\n" for r in self._history))

        together(write, acts=grid.rank == 0)
        return {name: numbers[name] for name in dict.fromkeys((cfg.metric, *LOGGED))}

    @property
    def best(self) -> int | None:
        """The step with the best value, the earlier of equal ones; None before the first that has a value."""
        sign = -1 if self._cfg.metric.split(".")[-1] in SMALLER_IS_BETTER else 1
        values = [(r.step, r.metrics[self._cfg.metric]) for r in self._history if r.step not in self._lost]
        known = [(sign * value, -step) for step, value in values if value is not None]
        return -max(known)[1] if known else None

    @property
    def kept(self) -> int | None:
        """The step that is kept for being the best; None: none is."""
        return self.best if self._cfg.keep_best else None

    @property
    def beaten(self) -> list[int]:
        """Validated steps that are not kept for being the best, or no longer; a run's last step is kept for that."""
        return [r.step for r in self._history if r.step != self.kept and not r.ends]

    @property
    def stops(self) -> str | None:
        """Why the run should stop: the last `patience` validations were none better than one before them. None: it should not."""
        later = [r.step for r in self._history if self.best is not None and r.step > self.best]
        if self._cfg.patience is None or len(later) < self._cfg.patience:
            return None
        return f"{len(later)} validations without a better {self._cfg.metric} than after step {self.best}"


def _number(metrics: Any, name: str) -> float | None:
    """The number at a path such as `strict.auroc`."""
    for key in name.split("."):
        metrics = metrics[key]
    return None if metrics is None else float(metrics)


def labelled_rows(cfg: EvalConfig, seed: int) -> list[Row]:
    """The rows that `cfg` names, in the file's order. Raises MegamodError for a row without a label, or an unknown metric."""
    if cfg.metric not in HEADLINE:
        raise MegamodError(f"eval.metric = {cfg.metric!r}: {nearest(cfg.metric, HEADLINE)}")
    rows = list(read_rows(cfg.data, labelled=True))
    if cfg.limit is not None and cfg.limit < len(rows):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[: cfg.limit])
        rows = [rows[i] for i in chosen]
    return rows


def _read(file: Path) -> list[Record]:
    """The history's lines. Raises MegamodError for a damaged one."""
    if not file.exists():
        return []
    found = []
    kinds = {"step": int, "rows": str, "metrics": dict, "ends": bool}
    for where, line in lines_of(file):
        record = json_object(line, where)
        if record.keys() != kinds.keys() or not all(isinstance(record[key], kind) for key, kind in kinds.items()):
            raise MegamodError(f"{where}: no line of a run's validations: remove the file")
        if not {*HEADLINE} <= record["metrics"].keys():
            raise MegamodError(f"{where}: numbers are missing: remove the file")
        found.append(Record(**record))
    return found
