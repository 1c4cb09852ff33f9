"""Judge the conversations of a JSONL file: a verdict a line, with scores.

python tools/judge.py --model runs/quickstart/hf/step-00000400 held_out.jsonl verdicts.jsonl
torchrun --nproc-per-node 8 tools/judge.py --model /models/my-72b --tp 8 queue.jsonl verdicts.jsonl

--model is a Hugging Face directory or a run's checkpoint (<run>/checkpoints/step-…); an adapter's checkpoint brings its base. Rows
need no label; where they have one, tools/evaluate.py measures the verdicts. Without --decode only scores are computed, in one
forward pass a label that begins with tokens of its own.
"""

import argparse
import sys
from pathlib import Path

from megamod.command import command
from megamod.config import ParallelConfig
from megamod.data.jsonl import read_rows
from megamod.errors import MegamodError
from megamod.evaluate import records
from megamod.model.build import DTYPES
from megamod.moderator import Moderator
from megamod.parallel import grid as grids
from megamod.parallel.collectives import together
from megamod.verdicts import FORMATS


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="on the model: a PEFT directory, or a checkpoint of a LoRA run")
    parser.add_argument("--decode", default="0", help="of how many rows the verdict's text is decoded too: a number, or all")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--scoring", choices=["whole", "first_token"], default="whole")
    parser.add_argument("--format", choices=FORMATS, help="of verdicts; default: what the model's directory says, else qwen3guard")
    parser.add_argument("--row-length", type=int, default=4096, help="tokens of a packed row; longer conversations are read in windows")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    args = parser.parse_args()
    if args.decode != "all" and not args.decode.isdecimal():
        raise MegamodError(f"--decode {args.decode}: a number of rows, or all, was expected")
    if args.max_new_tokens != parser.get_default("max_new_tokens") and args.decode == "0":
        raise MegamodError(f"--max-new-tokens {args.max_new_tokens} would not be read: --decode is 0")
    if args.out.exists():
        raise MegamodError(f"{args.out}: exists; a new file was expected")
    records.check(args.out)
    rows = list(read_rows(args.rows))
    parallel = ParallelConfig(tp=args.tp, pp=args.pp, cp=args.cp)
    adapters = {"adapter": args.adapter} if args.adapter is not None else None
    moderator = Moderator(args.model, parallel, adapters=adapters, dtype=args.dtype, format=args.format, row_length=args.row_length)
    decode = None if args.decode == "all" else int(args.decode)
    judged = moderator.judge(rows, scoring=args.scoring, decode=decode, max_new_tokens=args.max_new_tokens)
    together(lambda: records.write(args.out, rows, judged), acts=moderator.is_first)
    if moderator.is_first:
        flagged = sum(one.severity != "safe" for one in judged)
        print(f"{args.out}: {len(rows):,} verdicts, {flagged:,} not safe")
        windows, special = (sum(any(what in note for note in one.notes) for one in judged) for what in ("windows", "special"))
        if windows:
            print(f"{windows:,} conversations are longer than a row and were read in windows: --row-length")
        if special:
            print(f"{special:,} hold the text of special tokens, with which a text can end its own turn: see `notes`")
    grids.leave()


if __name__ == "__main__":
    sys.exit(main())
