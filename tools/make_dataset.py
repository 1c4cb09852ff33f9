"""Make a bilingual (English, Chinese) moderation set: train.jsonl and held_out.jsonl, which share no sentence.

python tools/make_dataset.py data/bilingual --train 6000 --held-out 1000 --seed 1
"""

import argparse
import json
import sys
from pathlib import Path

from megamod.data.bilingual import generate, summary
from megamod.errors import MegamodError
from megamod.files import replace_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--train", type=int, default=6000, help="rows (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=1000, help="rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args()
    try:
        for name, rows in zip(("train", "held_out"), generate(args.train, args.held_out, args.seed), strict=True):
            file = args.out / f"{name}.jsonl"
            try:
                args.out.mkdir(parents=True, exist_ok=True)
                replace_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            except OSError as error:
                raise MegamodError(f"{file}: {error.strerror or error}: a directory that can be written was expected") from None
            print(f"{file}: {summary(rows)}")
    except MegamodError as error:
        print(f"megamod: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
