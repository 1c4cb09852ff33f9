"""A Hugging Face directory → a checkpoint that Megatron-LM loads on any grid (`--ckpt-format torch_dist`).

    python tools/hf_to_mcore.py MODEL OUT
    python tools/hf_to_mcore.py MODEL OUT --dtype bfloat16 --jobs 16 --verify

On a machine without a GPU or inside a job; memory holds a few megabytes whatever the model's size. OUT is new; after a kill the same
command goes on where it was. config.json, tokenizer and chat template go to OUT/hf, so that tools/mcore_to_hf.py needs nothing else.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megamod.command import command
from megamod.weights import peft
from megamod.weights.convert import add_options, compare, hf_to_mcore


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory that is not quantised")
    parser.add_argument("out", type=Path, help="a new directory")
    add_options(parser)
    args = parser.parse_args(argv)
    dtype = peft.DTYPES[args.dtype] if args.dtype else None
    out = hf_to_mcore(args.model, args.out, dtype, shard_bytes=args.shard_bytes, jobs=args.jobs, sums=args.sums)
    print(f"checkpoint of Megatron-LM: {out}")
    if args.verify:
        print(f"verified: {compare(args.model, args.out):,} bytes, every number")


if __name__ == "__main__":
    sys.exit(main())
