"""Make a bilingual (English, Chinese) moderation set: train.jsonl and held_out.jsonl, which share no sentence.

python tools/make_dataset.py data/bilingual --train 6000 --held-out 1000 --seed 1

With --validation N, N further rows of the training side go to validation.jsonl: what a run chooses its best step by.
"""

import argparse
import json
import sys
from pathlib import Path

from megamod.command import command
from megamod.data.bilingual import generate, summary
from megamod.errors import MegamodError, expected
from megamod.files import replace_text


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--train", type=int, default=6000, help="rows (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=0, help="rows (default: none)")
    parser.add_argument("--held-out", type=int, default=1000, help="rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args()
    if args.validation < 0:
        raise MegamodError(f"--validation {args.validation}: must be at least 0")
    rows, held_out = generate(args.train + args.validation, args.held_out, args.seed)
    parts = {"train": rows[: args.train], "validation": rows[args.train :], "held_out": held_out}
    for name, rows in parts.items():
        if name == "validation" and not args.validation:
            continue
        file = args.out / f"{name}.jsonl"
        with expected("a directory that can be written", file):
            args.out.mkdir(parents=True, exist_ok=True)
            replace_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{file}: {summary(rows)}")


if __name__ == "__main__":
    sys.exit(main())
