"""Split labelled rows of your own into train.jsonl and held_out.jsonl, which share no conversation.

python tools/split_data.py rows.jsonl OUT_DIR --held-out 0.15 --seed 1

Rows stay as they are. A conversation that comes again (white space and case aside) is dropped: beside itself in training it would
count twice, and in the held-out part it would be a question with a known answer.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from megamod.data.jsonl import json_object, lines_of, no_rows, row_of
from megamod.errors import MegamodError
from megamod.files import replace_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--held-out", type=float, default=0.15, help="share of the rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args()
    try:
        if not 0 < args.held_out < 1:
            raise MegamodError(f"--held-out {args.held_out}: a share between 0 and 1 was expected")
        lines, repeated = unique_lines(args.rows)
        held_out = round(args.held_out * len(lines))
        if not 0 < held_out < len(lines):
            raise MegamodError(f"{args.rows}: {len(lines)} different conversations cannot be split with --held-out {args.held_out}")
        order = np.random.default_rng(args.seed).permutation(len(lines))
        args.out.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", order[held_out:]), ("held_out", order[:held_out])):
            file = args.out / f"{name}.jsonl"
            replace_text(file, "".join(lines[i] + "\n" for i in part))
            print(f"{file}: {len(part):,} rows")
        if repeated:
            print(f"dropped {repeated:,} that repeat an earlier conversation")
    except MegamodError as error:
        print(f"megamod: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"megamod: error: {error.filename}: {error.strerror}: a directory that can be written was expected", file=sys.stderr)
        return 1
    return 0


def unique_lines(path: Path) -> tuple[list[str], int]:
    """The file's lines, the first of each conversation, and how many were dropped. Raises MegamodError for a row without label."""
    lines: dict[str, str] = {}
    count = 0
    for where, line in lines_of(path):
        row = row_of(json_object(line, where), where)
        if row.label is None:
            raise MegamodError(f"{where}: no label: safe, controversial or unsafe was expected")
        text = " ".join("\n".join(message["content"] for message in row.messages).casefold().split())
        lines.setdefault(text, line.decode("utf-8").strip())
        count += 1
    if not lines:
        raise no_rows(path)
    return list(lines.values()), count - len(lines)


if __name__ == "__main__":
    sys.exit(main())
