"""Make pairs of verdicts out of labelled rows: the right one is preferred to the one that a model is most likely to get wrong.

    python tools/make_preferences.py train.jsonl pairs.jsonl --verdicts verdicts.jsonl --below 0.9
    launch/node.sh configs/smollm2_dpo.py data.train=pairs.jsonl

--verdicts are the model's own of the same rows, in the same order (tools/judge.py); the rejected verdict is then the wrong severity that it
finds most probable, with the categories that it gave where it was decoded so. Without, it is drawn from the seed. Reasons and what else a
verdict says are the right one's. --below keeps the rows
whose right severity the model gives less than that probability: where it is sure and right there is little to learn.
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
from megamod.data.jsonl import Row, json_object, lines_of, row_of
from megamod.errors import MegamodError, expected
from megamod.evaluate import records
from megamod.evaluate.metrics import Judged
from megamod.files import replace_text
from megamod.verdicts import FORMATS, Severity, format_of


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSONL of conversations with labels")
    parser.add_argument("out", type=Path)
    parser.add_argument("--verdicts", type=Path, help="of a model, of the same rows")
    parser.add_argument("--below", type=float, help="probability of the right severity, with --verdicts (default: all rows)")
    parser.add_argument("--format", choices=FORMATS, default="qwen3guard", help="whose severities there are (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args()
    if args.below is not None and args.verdicts is None:
        raise MegamodError("--below would not be read: there are no --verdicts")
    if args.below is not None and not 0 < args.below <= 1:
        raise MegamodError(f"--below {args.below}: above 0 and at most 1 was expected")
    lines = list(lines_of(args.rows))
    judged = records.read(args.verdicts) if args.verdicts is not None else [None] * len(lines)
    if len(judged) != len(lines):
        raise MegamodError(f"{args.verdicts}: {len(judged)} verdicts of {len(lines)} rows: those of the same file were expected")
    rng = np.random.default_rng(args.seed)
    severities = format_of(args.format).severities
    made, counts = [], Counter[str]()
    categories = sorted({name for where, line in lines for name in row_of(json_object(line, where), where).categories})
    for (where, line), one in zip(lines, judged, strict=True):
        record = json_object(line, where)
        row = row_of(record, where)
        label = row.label
        if label is None or "rejected" in record:
            raise MegamodError(f"{where}: {'no label' if label is None else 'rejected'}: a labelled row that is no pair was expected")
        if label not in severities:
            raise MegamodError(f"{where}: label {label!r}: the format {args.format} has no word for it")
        if one is not None and one.label not in (None, label):
            raise MegamodError(f"{args.verdicts}: the verdict on {where} says that its label is {one.label}, not {label}")
        if one is not None and args.below is not None and one.scores.get(label, 0.0) >= args.below:
            counts["sure"] += 1
            continue
        rejected = _rejected(row, one, [s for s in severities if s != label], categories, rng)
        counts[f"{label} over {rejected['label']}"] += 1
        made.append(json.dumps({**record, "rejected": rejected}, ensure_ascii=False) + "\n")
    if not made:
        raise MegamodError(f"{args.rows}: the model is sure and right of all rows: no pairs: a higher --below was expected")
    with expected("a file that can be written", args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(args.out, "".join(made))
    kinds = " · ".join(f"{n:,} {kind}" for kind, n in sorted(counts.items()) if kind != "sure")
    print(f"{args.out}: {len(made):,} pairs · {kinds}" + (f" · {counts['sure']:,} rows left out" if counts["sure"] else ""))


def _rejected(
    row: Row, judged: Judged | None, others: Sequence[Severity], categories: Sequence[str], rng: np.random.Generator
) -> dict[str, Any]:
    """A wrong verdict, as a row says it; what is not wrong is the right one's, so that nothing else tells the two apart."""
    wrong = others[int(rng.integers(len(others)))]
    if judged is not None:
        wrong = max(others, key=lambda severity: judged.scores.get(severity, 0.0))
    named: Sequence[str] = ()
    if wrong != "safe":
        said = judged.verdict if judged is not None else None
        named = said.categories if said is not None and said.severity == wrong else row.categories
        named = named or ([str(rng.choice(categories))] if categories else ())
    same = {"reason": row.reason, "refusal": row.refusal, "request": row.request}
    return {"label": wrong, "categories": list(named), **{key: value for key, value in same.items() if value is not None}}


if __name__ == "__main__":
    sys.exit(main())
