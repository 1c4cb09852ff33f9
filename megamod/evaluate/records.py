"""Judged conversations as JSONL: what tools/judge.py writes and tools/evaluate.py measures.

    {"line": 1, "severity": "unsafe", "scores": {"safe": 0.02, "controversial": 0.05, "unsafe": 0.93},
     "verdict": {"severity": "unsafe", "categories": ["Violent"], …}, "text": "Safety: Unsafe⏎…", "label": "unsafe", …}

`severity` is the most probable one; `verdict` and `text` are there where the text was decoded, `verdict` null where it did not
parse; `id`, `label`, `categories`, `language` and `kind` are the row's own.
"""

import dataclasses
import json
import os
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megamod import files
from megamod.data.jsonl import Row, json_object, lines_of, no_rows
from megamod.errors import MegamodError
from megamod.evaluate.metrics import Judged
from megamod.verdicts import SEVERITIES, Verdict


def record(row: Row, judged: Judged, line: int) -> dict[str, Any]:
    """One line of the file."""
    own = {"id": row.id, "label": row.label, "categories": list(row.categories), "language": row.language, "kind": row.kind}
    severity = max(judged.scores, key=lambda s: judged.scores[s])
    verdict = judged.verdict and {k: v for k, v in dataclasses.asdict(judged.verdict).items() if v is not None}
    decoded = {"verdict": verdict, "text": judged.text} if judged.text is not None else {}
    known = {key: value for key, value in own.items() if value not in (None, [])}
    return {"line": line, "severity": severity, "scores": dict(judged.scores), **decoded, **known}


def write(path: str | Path, rows: Sequence[Row], judged: Iterable[Judged]) -> None:
    """Write the file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        for line, (row, one) in enumerate(zip(rows, judged, strict=True), 1):
            file.write(json.dumps(record(row, one, line), ensure_ascii=False) + "\n")
    files.sync(draft)
    os.replace(draft, path)


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
    label = record.get("label")
    if label is not None and label not in SEVERITIES:
        raise MegamodError(f"{where}: label = {reprlib.repr(label)}: one of {', '.join(SEVERITIES)} was expected")
    try:
        verdict = record.get("verdict")
        said = verdict and Verdict(**{**verdict, "categories": tuple(verdict.get("categories", ()))})
        categories = tuple(record.get("categories", ()))
    except (TypeError, AttributeError) as error:
        raise MegamodError(f"{where}: verdict or categories: {error}") from None
    return Judged(scores, label, categories, record.get("language"), said, record.get("text"), record.get("kind"))
