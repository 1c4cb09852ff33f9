"""A checkpoint of Megatron-LM (torch_dist), or of a run of ours, → a Hugging Face directory for transformers, vLLM and SGLang.

    python tools/mcore_to_hf.py CHECKPOINT OUT
    python tools/mcore_to_hf.py CHECKPOINT OUT --model MODEL --dtype bfloat16 --jobs 16 --verify

CHECKPOINT is what Megatron-LM's --save names, one of its iter_… directories, or <run>/checkpoints/step-…. MODEL is the Hugging Face
directory that it was made from, whose config.json, tokenizer and licence are copied: where CHECKPOINT brings or names it, it need not be
said. What a checkpoint has beside the weights is left out, and counted. OUT is new; after a kill the same command goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megamod.command import command
from megamod.errors import listed
from megamod.weights import peft
from megamod.weights.convert import add_options, compare, mcore_to_hf


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of Megatron-LM, or of a run of all weights")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument(
        "--model", type=Path, help="the Hugging Face directory it was made from; default: what the checkpoint brings or names"
    )
    add_options(parser)
    args = parser.parse_args(argv)
    dtype = peft.DTYPES[args.dtype] if args.dtype else None
    options = {"model": args.model, "shard_bytes": args.shard_bytes, "jobs": args.jobs, "sums": args.sums}
    out, left_out = mcore_to_hf(args.checkpoint, args.out, dtype, **options)
    if left_out:
        print(f"left out, no weights: {len(left_out)}: {listed(left_out, 3)}")
    print(f"Hugging Face directory: {out}")
    if args.verify:
        print(f"verified: {compare(args.checkpoint, args.out, args.model):,} bytes, every number")


if __name__ == "__main__":
    sys.exit(main())
