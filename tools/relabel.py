"""Find the rows on which a strict and a lenient model disagree, and call them controversial (Qwen3Guard, arXiv:2510.14276).

    python tools/relabel.py split rows.jsonl runs/relabel --ratio 3
    launch/node.sh configs/<run>.py dir=runs/relabel/a-strict data.train=runs/relabel/a-strict.jsonl   # and a-lenient, b-strict, b-lenient
    python tools/judge.py --model <a-strict's export> runs/relabel/b.jsonl runs/relabel/b-strict.verdicts.jsonl   # b's models judge a
    python tools/relabel.py join runs/relabel relabelled.jsonl

split cuts the rows into two halves, a and b, each label alike. Of each half it writes what a strict model is trained on, with rows that are
not safe weighed --ratio times, and a lenient one, with safe rows weighed so. Each half is judged by the two models of the other. join
calls unsafe what both find not safe, safe what both find safe, and controversial what they disagree on; rows stay as they are otherwise, in
the order of the halves. Rows with `votes`, of annotators by severity, say how well that agrees with them.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamod.command import command
from megamod.data.jsonl import json_object, lines_of, row_of
from megamod.errors import MegamodError, expected
from megamod.evaluate import records
from megamod.files import replace_text
from megamod.verdicts import SEVERITIES, Severity

HALVES = ("a", "b")
STANCES = ("strict", "lenient")
Record = dict[str, Any]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    first = tasks.add_parser("split", help="write the halves, and what each model is trained on")
    first.add_argument("rows", type=Path, help="JSONL of conversations with labels")
    first.add_argument("folder", type=Path)
    first.add_argument("--ratio", type=float, default=3.0, help="how often the stressed label counts (default: %(default)s)")
    first.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    second = tasks.add_parser("join", help="label each half by the verdicts of the other's models")
    second.add_argument("folder", type=Path)
    second.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    if args.task == "split":
        if not args.ratio > 1:
            raise MegamodError(f"--ratio {args.ratio}: above 1 was expected: at 1 no model is stricter than the other")
        split(args.rows, args.folder, args.ratio, args.seed)
    else:
        join(args.folder, args.out)


def split(rows: Path, folder: Path, ratio: float, seed: int) -> None:
    """Write a.jsonl, a-strict.jsonl, a-lenient.jsonl and the same of b. Raises MegamodError."""
    found = _labelled(rows)
    rng, half = np.random.default_rng(seed), np.zeros(len(found), np.int64)
    for label in SEVERITIES:
        own = rng.permutation([i for i, record in enumerate(found) if record["label"] == label]).astype(np.int64)
        half[own[len(own) // 2 :]] = 1
    for number, name in enumerate(HALVES):
        mine = [found[i] for i in np.flatnonzero(half == number)]
        if len({record["label"] == "safe" for record in mine}) < 2:
            raise MegamodError(f"{rows}: too few rows: half {name} would not have both safe rows and others")
        _write(folder / f"{name}.jsonl", mine)
        for stance in STANCES:
            stressed = [(record["label"] == "safe") is (stance == "lenient") for record in mine]
            weights = [record.get("weight", 1.0) * (ratio if more else 1.0) for record, more in zip(mine, stressed, strict=True)]
            _write(folder / f"{name}-{stance}.jsonl", [{**record, "weight": w} for record, w in zip(mine, weights, strict=True)])
        print(f"{folder / name}.jsonl, and {', '.join(STANCES)}: {len(mine):,} rows")


def join(folder: Path, out: Path) -> None:
    """Write the rows of both halves with their new labels, and say what became of which. Raises MegamodError."""
    made, counts, votes = [], Counter[tuple[str, str]](), []
    for name in HALVES:
        file = folder / f"{name}.jsonl"
        mine, verdicts = _labelled(file), [folder / f"{name}-{stance}.verdicts.jsonl" for stance in STANCES]
        judged = [records.read(path) for path in verdicts]
        for path, found in zip(verdicts, judged, strict=True):
            if len(found) != len(mine):
                raise MegamodError(f"{path}: {len(found)} verdicts, and {file} has {len(mine)} rows: those of the same file were expected")
        for record, *two in zip(mine, *judged, strict=True):
            label = agreed(*(one.severity for one in two))
            counts[record["label"], label] += 1
            made.append({**record, "label": label})
            if "votes" in record:
                votes.append((label, _share(record, file)))
    _write(out, made)
    new = Counter(record["label"] for record in made)
    print(f"{out}: {len(made):,} rows · " + " · ".join(f"{label} {new[label]:,}" for label in SEVERITIES))
    for before in SEVERITIES:
        if own := [f"{label} {n:,}" for label in SEVERITIES if (n := counts[before, label])]:
            print(f"  that were {before}: {', '.join(own)}")
    for label in SEVERITIES:
        shares = np.array([share for found, share in votes if found == label])
        if len(shares):
            divided = float(((shares > 0) & (shares < 1)).mean())
            print(f"  votes on {label}: {shares.mean():.3f} not safe, divided on {divided:.3f} of {len(shares):,} rows")


def agreed(strict: Severity, lenient: Severity) -> Severity:
    """What two verdicts are together."""
    found = {strict != "safe", lenient != "safe"}
    return "controversial" if len(found) == 2 else "unsafe" if True in found else "safe"


def _labelled(path: Path) -> list[Record]:
    found = []
    for where, line in lines_of(path):
        record = json_object(line, where)
        if row_of(record, where).label is None:
            raise MegamodError(f"{where}: no label: {', '.join(SEVERITIES)} was expected")
        found.append(record)
    return found


def _share(record: Record, file: Path) -> float:
    """The share of the annotators who do not find it safe."""
    votes = record["votes"]
    counts = list(votes.values()) if isinstance(votes, dict) and votes.keys() <= {*SEVERITIES} else []
    if not any(type(n) is int and n > 0 for n in counts) or not all(type(n) is int and n >= 0 for n in counts):
        raise MegamodError(f"{file}: votes = {votes!r}: how many voted for each severity was expected")
    return 1 - float(votes.get("safe", 0)) / sum(counts)


def _write(path: Path, found: Sequence[Record]) -> None:
    with expected("a file that can be written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found))


if __name__ == "__main__":
    sys.exit(main())
