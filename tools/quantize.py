"""A Hugging Face directory in 4 bits, NF4 or FP4, as bitsandbytes stores it: the base of a QLoRA run, and for transformers and its servers.

    python tools/quantize.py MODEL OUT
    python tools/quantize.py MODEL OUT --quant-type fp4 --no-double-quant --keep down_proj,model.layers.0

The linears of the layers are quantised; embedding, norms, biases and head stay as they are. OUT is new; after a fault it is not there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megamod.command import command
from megamod.weights.bitsandbytes import quantize
from megamod.weights.quantization import Quantization
from megamod_kernels import nf4


@command
def main(argv: Sequence[str] | None = None) -> None:
    default = Quantization()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory that is not quantised")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--quant-type", choices=nf4.CODES, default=default.quant_type, help="default: %(default)s")
    parser.add_argument("--no-double-quant", action="store_true", help="the blocks' largest numbers in fp32, not in 8 bits")
    shared = "weights that share one of these; default: %(default)s"
    parser.add_argument("--blocksize", type=int, choices=nf4.BLOCK_SIZES, default=default.blocksize, help=shared)
    parser.add_argument("--keep", metavar="NAMES", help="linears that stay as they are: names, or their beginnings or ends, and commas")
    args = parser.parse_args(argv)
    kept = tuple(name.strip() for name in args.keep.split(",")) if args.keep else ()
    quantization = Quantization(args.quant_type, not args.no_double_quant, args.blocksize, kept)
    before, after = (_bytes(directory) for directory in (args.model, quantize(args.model, args.out, quantization)))
    print(f"{args.out}: {quantization} · {before / 1e9:.3g} GB → {after / 1e9:.3g} GB")


def _bytes(directory: Path) -> int:
    """Of a directory's weights."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
