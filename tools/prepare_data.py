"""Tokenise a JSONL file into a token store, once, with several processes: for data too large to be encoded when a run starts.

python tools/prepare_data.py --model /models/Qwen2.5-72B-Instruct train.jsonl stores/train --row-length 8192 --processes 16

A run then names the store: data.train=stores/train. Killed, it goes on where it was. Options of data.chat follow as
key=value: format=llama_guard too_long=cut.
"""

import argparse
import sys
from pathlib import Path

from megamod import config
from megamod.command import command
from megamod.config import ChatConfig
from megamod.data.store import prepare
from megamod.errors import MegamodError
from megamod.model.shape import read_shape


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("store", type=Path, help="a new directory")
    parser.add_argument("options", nargs="*", metavar="key=value", help="of data.chat")
    parser.add_argument("--model", type=Path, required=True, help="the Hugging Face directory with the tokenizer")
    parser.add_argument("--row-length", type=int, help="the tokens that a document may have; default: any number")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_intermixed_args()
    if args.processes < 1 or (args.row_length is not None and args.row_length < 1):
        raise MegamodError(f"--processes {args.processes} --row-length {args.row_length}: must be at least 1")
    chat: ChatConfig = config.override(ChatConfig(), args.options)
    vocab = read_shape(args.model).vocab if (args.model / "config.json").exists() else None
    made = prepare(
        args.rows, args.store.parent, chat, str(args.model), limit=args.row_length, vocab=vocab, processes=args.processes,
        name=args.store.name,
    )  # fmt: skip
    print(made)


if __name__ == "__main__":
    sys.exit(main())
