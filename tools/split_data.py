"""Split labelled rows of your own into train.jsonl, validation.jsonl and held_out.jsonl, which share no conversation.

python tools/split_data.py rows.jsonl OUT_DIR --held-out 0.15 --validation 0.05 --seed 1

Rows stay as they are; each label is split alike. A conversation that comes again (white space and case aside) is dropped: beside itself in
training it would count twice, and in the held-out part it would be a question with a known answer. Of repeats that contradict each other
all are dropped, and said.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from megamod.command import command
from megamod.data.jsonl import json_object, lines_of, no_rows, row_of
from megamod.errors import MegamodError, expected
from megamod.files import replace_text


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--held-out", type=float, default=0.15, help="share of the rows (default: %(default)s)")
    parser.add_argument("--validation", type=float, default=0.05, help="share of the rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args()
    if not (args.held_out > 0 and args.validation > 0 and args.held_out + args.validation < 1):
        raise MegamodError(f"--held-out {args.held_out} --validation {args.validation}: shares above 0, together below 1, were expected")
    by_label, repeated, contradicted = unique_lines(args.rows)
    parts: dict[str, list[str]] = {"train": [], "validation": [], "held_out": []}
    rng = np.random.default_rng(args.seed)
    for lines in by_label.values():
        order = [lines[i] for i in rng.permutation(len(lines))]
        first, second = round(args.held_out * len(lines)), round((args.held_out + args.validation) * len(lines))
        for name, part in zip(("held_out", "validation", "train"), (order[:first], order[first:second], order[second:]), strict=True):
            parts[name] += part
    for name, part in parts.items():
        if not part:
            raise MegamodError(f"{args.rows}: too few rows: none would be left for {name}")
    for name, part in parts.items():
        file = args.out / f"{name}.jsonl"
        with expected("a directory that can be written"):
            args.out.mkdir(parents=True, exist_ok=True)
            replace_text(file, "".join(line + "\n" for line in part))
        print(f"{file}: {len(part):,} rows")
    if repeated:
        print(f"dropped {repeated:,} that repeat an earlier conversation")
    if contradicted:
        print(f"dropped {contradicted:,} conversations that come with different labels")


def unique_lines(path: Path) -> tuple[dict[str, list[str]], int, int]:
    """By label, the file's lines, the first of each conversation; how many repeat one; how many conversations contradict themselves.

    Raises:
        MegamodError: a row without label, or a fault in one.
    """
    found: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    count = 0
    for where, line in lines_of(path):
        row = row_of(json_object(line, where), where)
        if row.label is None:
            raise MegamodError(f"{where}: no label: safe, controversial or unsafe was expected")
        key = tuple((message["role"], " ".join(message["content"].casefold().split())) for message in row.messages)
        found.setdefault(key, {}).setdefault(row.label, line.decode("utf-8").strip())
        count += 1
    if not found:
        raise no_rows(path)
    agreed = [lines for lines in found.values() if len(lines) == 1]
    by_label: dict[str, list[str]] = {}
    for lines in agreed:
        for label, text in lines.items():
            by_label.setdefault(label, []).append(text)
    contradicted = len(found) - len(agreed)
    return by_label, count - len(found) - contradicted, contradicted


if __name__ == "__main__":
    sys.exit(main())
