"""A labelled set's files to JSONL for training and judging: `messages`, `label`, `categories` and what else the set has.

    python tools/import_dataset.py davidson folder/of/davidson train.jsonl --split train --limit 6000 --seed 1

tools/DATASETS.md lists the sets, their files, columns and licences, and says how to add one's own.
"""

import argparse
import runpy
import sys
from collections.abc import Mapping

from megamod.command import command
from megamod.data.importers import SETS, Source, import_dataset
from megamod.errors import MegamodError


@command
def main(arguments: list[str] | None = None) -> None:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=", ".join(SETS))
    parser.add_argument("folder", help="with the set's files")
    parser.add_argument("out", help="the JSONL file to write")
    parser.add_argument("--split", help="which of the set's splits; needed where there are several")
    parser.add_argument("--limit", type=int, metavar="N", help="N rows of the split, chosen at random")
    parser.add_argument("--seed", type=int, help="of that choice (default 0)")
    parser.add_argument("--balance", type=float, default=0.0, metavar="POWER", help="weigh rare labels more: 0 not at all, 1 all alike")
    parser.add_argument("--system", metavar="TEXT", help="a system message put first in every conversation")
    parser.add_argument("--sets", metavar="FILE.py", help="a Python file with SETS of your own")
    args = parser.parse_args(arguments)
    if args.seed is not None and args.limit is None:
        raise MegamodError("--seed without --limit: nothing is chosen at random; add --limit or leave --seed out")
    sets = {**SETS, **own(args.sets)} if args.sets else SETS
    seed, options = args.seed or 0, {"split": args.split, "system": args.system, "balance": args.balance}
    found = import_dataset(args.name, args.folder, args.out, limit=args.limit, seed=seed, sets=sets, **options)
    print(f"{args.out}: {args.name}{f' {args.split}' if args.split else ''}, " + "\n  ".join(found.summary()))


def own(path: str) -> Mapping[str, Source]:
    """The SETS of a user's file."""
    try:
        sets = runpy.run_path(path).get("SETS")
    except Exception as error:  # whatever the user's file may raise
        raise MegamodError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(sets, dict) or not all(isinstance(source, Source) for source in sets.values()):
        raise MegamodError(f"{path}: no SETS: a dict of name → megamod.data.importers.Source was expected")
    return sets


if __name__ == "__main__":
    sys.exit(main())
