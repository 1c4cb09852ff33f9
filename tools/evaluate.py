"""Measure verdicts that tools/judge.py wrote: a table, metrics.json and one page of plots.

python tools/evaluate.py verdicts.jsonl OUT_DIR
python tools/evaluate.py verdicts.jsonl OUT_DIR --train train.jsonl --test held_out.jsonl

With --train and --test (the rows that were judged) a linear model, TF-IDF and logistic regression, is fitted and measured beside.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megamod.command import command
from megamod.data.jsonl import Row, read_rows
from megamod.errors import MegamodError
from megamod.evaluate import records, report
from megamod.evaluate.linear import linear_baseline
from megamod.evaluate.metrics import Judged, headline, measure
from megamod.verdicts import SEVERITIES

LINEAR = "TF-IDF + logistic regression"


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verdicts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, help="JSONL that the linear model learns from")
    parser.add_argument("--test", type=Path, help="JSONL of the conversations that were judged")
    parser.add_argument("--name", default="model", help="of the model, in table and plots")
    args = parser.parse_args()
    if (args.train is None) != (args.test is None):
        raise MegamodError("--train and --test: both were expected, or neither")
    judged = records.read(args.verdicts)
    sides = [(args.name, measure(judged))]
    baseline = None
    if args.train is not None:
        linear = judged_linearly(list(read_rows(args.train, labelled=True)), list(read_rows(args.test, labelled=True)), judged)
        baseline = (LINEAR, measure(linear), linear)
        sides.append(baseline[:2])
    metrics, page = report.write(sides[0][1], judged, args.out, title=args.name, baseline=baseline)
    table = Table(*["", *(name for name, _ in sides)], title=f"{args.verdicts}, [95 % intervals]")
    columns = [dict(headline(metrics)) for _, metrics in sides]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "–") for column in columns))
    Console().print(table)
    print(f"{metrics}\n{page}")


def judged_linearly(train: list[Row], test: list[Row], judged: list[Judged]) -> list[Judged]:
    """The rows that were judged, with the linear model's scores over the same severities. Raises MegamodError."""
    if len(test) != len(judged) or any(row.label != one.label for row, one in zip(test, judged, strict=True)):
        raise MegamodError(f"{len(judged)} verdicts are not of the {len(test)} rows of --test: other labels")
    scores = linear_baseline(
        [text(row) for row in train], [row.label for row in train], None, [text(row) for row in test], None
    )  # fmt: skip
    kept = [severity in judged[0].scores for severity in SEVERITIES]
    found = []
    for row, s in zip(test, scores, strict=True):
        probabilities = {severity: float(p) for severity, p, keep in zip(SEVERITIES, s, kept, strict=True) if keep}
        whole = sum(probabilities.values())
        normalised = {severity: p / whole for severity, p in probabilities.items()}
        found.append(Judged(normalised, row.label, row.categories, row.language, kind=row.kind))
    return found


def text(row: Row) -> str:
    """What the linear model reads: all that was said, without system prompts."""
    return "\n".join(message["content"] for message in row.messages if message["role"] != "system")


if __name__ == "__main__":
    sys.exit(main())
