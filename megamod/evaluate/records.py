"""Judged conversations as JSONL: what tools/judge.py writes and tools/evaluate.py measures.

    {"line": 1, "severity": "unsafe", "scores": {"safe": 0.02, "controversial": 0.05, "unsafe": 0.93},
     "verdict": {"severity": "unsafe", "categories": ["Violent"], …}, "text": "Safety: Unsafe⏎…", "label": "unsafe", …}

`severity` is the most probable one; `verdict` and `text` are there where the text was decoded, `verdict` null where it did not
parse; a classifier with categories says a `verdict` without text; `notes` say what to know of it (read in windows, holds special
tokens); `id`, `label`, `categories`, `language` and `kind` are the row's own.
"""

import dataclasses
import json
import reprlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megamod import files
from megamod.data.jsonl import Row, json_object, lines_of, names_of, no_rows, severity_of, typed
from megamod.errors import MegamodError, expected
from megamod.evaluate.metrics import Judged
from megamod.verdicts import SEVERITIES, Verdict


def record(row: Row, judged: Judged) -> dict[str, Any]:
    """One line of the file."""
    own = {"id": row.id, "label": row.label, "categories": list(row.categories), "language": row.language, "kind": row.kind}
    verdict = judged.verdict and {k: v for k, v in dataclasses.asdict(judged.verdict).items() if v is not None}
    decoded: dict[str, Any] = {"text": judged.text} if judged.text is not None else {}
    if verdict is not None or judged.text is not None:
        decoded = {"verdict": verdict, **decoded}
    known = {key: value for key, value in own.items() if value not in (None, [])}
    notes = {"notes": list(judged.notes)} if judged.notes else {}
    return {"line": row.line, "severity": judged.severity, "scores": dict(judged.scores), **decoded, **notes, **known}


def check(path: str | Path) -> None:
    """Refuse, before the work, a file that could not be written after it. Raises MegamodError."""
    path = Path(path)
    with expected("a file that can be written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # without a name: every rank may ask at once
            pass


def write(path: str | Path, rows: Sequence[Row], judged: Iterable[Judged]) -> None:
    """Write the file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as draft, draft.open("w", encoding="utf-8") as file:
        for row, one in zip(rows, judged, strict=True):
            file.write(json.dumps(record(row, one), ensure_ascii=False) + "\n")


def read(path: str | Path) -> list[Judged]:
    """The file's lines. Raises MegamodError with `file:line:` for what is not one of them."""
    found = [_judged(json_object(line, where), where) for where, line in lines_of(path)]
    if not found:
        raise no_rows(path)
    return found


def _judged(record: dict[str, Any], where: str) -> Judged:
    scores = record.get("scores")
    if not isinstance(scores, dict) or not scores or not all(s in SEVERITIES and isinstance(p, int | float) for s, p in scores.items()):
        raise MegamodError(f"{where}: scores = {reprlib.repr(scores)}: probabilities by severity were expected")
    text = typed(record, "text", str, where)
    said = typed(record, "verdict", dict, where)
    verdict = None
    if said is not None:
        severity = severity_of(said, "severity", where)
        if severity is None:
            raise MegamodError(f"{where}: verdict = {reprlib.repr(said)}: no severity")
        verdict = Verdict(
            severity,
            names_of(said, "categories", where),
            typed(said, "refusal", bool, where),
            severity_of(said, "request", where),
            typed(said, "reason", str, where),
        )
    label, categories = severity_of(record, "label", where), names_of(record, "categories", where)
    language, kind = typed(record, "language", str, where), typed(record, "kind", str, where)
    return Judged(scores, label, categories, language, verdict, text, kind, names_of(record, "notes", where))
