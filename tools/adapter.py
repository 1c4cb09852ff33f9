"""LoRA adapters in and out: PEFT directories, checkpoints that training goes on from, and models with an adapter merged in.

    python tools/adapter.py import PEFT_DIR --base MODEL OUT    a checkpoint of it: lora.path=OUT, or what the others take
    python tools/adapter.py export CHECKPOINT OUT               a PEFT directory of a run's checkpoint
    python tools/adapter.py merge ADAPTER OUT --base MODEL      a Hugging Face directory that needs no adapter

ADAPTER is a PEFT directory, or a checkpoint, which knows its base. MODEL may be in bitsandbytes' 4 bits, or plain where an adapter
says what it was quantised to in training; what is merged is plain. OUT is new; after a fault it is not there.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megamod import checkpoint
from megamod.command import command
from megamod.data import chat
from megamod.errors import MegamodError
from megamod.model.shape import Shape, read_shape
from megamod.weights import peft
from megamod.weights.merge import merge


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source, what in (
        ("import", "PEFT_DIR", "a PEFT directory → a checkpoint"),
        ("export", "CHECKPOINT", "a checkpoint → a PEFT directory"),
        ("merge", "ADAPTER", "base and adapter → a Hugging Face directory"),
    ):
        sub = commands.add_parser(name, help=what)
        sub.add_argument("adapter", type=Path, metavar=source)
        sub.add_argument("out", type=Path, metavar="OUT", help="a new directory")
        base = "the base, a Hugging Face directory" + ("" if name == "import" else "; default: what the adapter says")
        sub.add_argument("--base", type=Path, metavar="MODEL", required=name == "import", help=base)
        if name == "merge":
            sub.add_argument("--dtype", choices=peft.DTYPES, help="of the merged weights; default: the base's own")
    args = parser.parse_args(argv)
    base = args.base or Path(peft.base_of(args.adapter))
    if args.base is None and not base.is_dir():
        raise MegamodError(f"{args.adapter}: its base, {base}, is not here: say where it is with --base")
    shape = peft.shape_with(args.adapter, read_shape(base))
    print(f"{args.adapter}: {described(peft.opened(args.adapter, shape), shape)}")
    if args.command == "import":
        print(f"checkpoint: {peft.adopt(args.adapter, base, args.out)}")
    elif args.command == "export":
        texts = texts_of(args.adapter)
        print(f"PEFT directory: {peft.export(args.adapter, args.out, shape, base=str(base), texts=texts)}")
    else:
        dtype = peft.DTYPES[args.dtype] if args.dtype else None
        print(f"merged: {merge(base, args.adapter, args.out, dtype, texts=texts_of(args.adapter))}")


def texts_of(path: Path) -> dict[str, str]:
    """What goes with the adapter at `path`: how its run read conversations, by file name; nothing where that is not known."""
    at = peft.checkpoint_at(path)
    if at is not None:
        about = checkpoint.Masters(at).about
        return chat.companions(chat.of_run(about, at)) if "data.chat" in about else {}
    return {name: (path / name).read_text(encoding="utf-8") for name in chat.COMPANIONS if (path / name).is_file()}


def described(adapter: peft.Adapter, shape: Shape) -> str:
    """What an adapter is, in a line."""
    cfg, slots = adapter.config, peft.slots(adapter.config, shape).values()
    kind = ("rsLoRA" if cfg.use_rslora else "LoRA") + (" with DoRA's magnitudes" if cfg.use_dora else "")
    ranks = ", ".join(f"{r}" for r in sorted({slot.r for slot in slots}))
    scales = ", ".join(f"{scale:g}" for scale in sorted({slot.scale for slot in slots}))
    leaves = ", ".join(sorted({slot.module.rpartition(".")[2] for slot in slots}))
    copies = "".join(f" · {origin} whole" for origin in peft.saved(cfg, shape).values())
    numbers = sum(math.prod(size) for size in adapter.shapes().values())
    dtype = peft.dtype_name(adapter.factor_dtype)
    base = f" · on a base in {adapter.quantization}" if adapter.quantization is not None else ""
    return f"{kind} · rank {ranks} · scale {scales} · {len(slots)} linears: {leaves}{copies} · {numbers:,} parameters, {dtype}{base}"


if __name__ == "__main__":
    sys.exit(main())
