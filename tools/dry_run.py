"""Rehearse ranks of a configuration on meta tensors, without a GPU: what would fail when the job starts fails here.

python tools/dry_run.py configs/moderation_72b.py --world 128 --ranks 3,64,127
"""

import argparse
import sys

from megamod import config
from megamod.command import command
from megamod.dry_run import dry_run
from megamod.errors import MegamodError
from megamod.train import model_shape


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="owner.key=value")
    parser.add_argument("--world", type=int, required=True, help="number of GPUs")
    parser.add_argument("--ranks", default="0", help="comma-separated, or 'all'")
    args = parser.parse_intermixed_args()
    cfg = config.load(args.config, args.overrides)
    shape = model_shape(cfg)
    if args.world < 1 or not (args.ranks == "all" or all(r.isdecimal() for r in args.ranks.split(","))):
        raise MegamodError(f"--world {args.world} --ranks {args.ranks}: a number of GPUs, and ranks such as 0,3 or 'all', were expected")
    ranks = range(args.world) if args.ranks == "all" else [int(r) for r in args.ranks.split(",")]
    names = "  ".join(f"{name:>9}" for name in ("weights", "gradients", "optimizer", "host"))
    print(f"rank  place                            layers          parameters  {names}  micro-batches  seconds")
    for rank in ranks:
        r = dry_run(cfg, shape, args.world, rank)
        sizes = "  ".join(f"{n / 2**30:>8.2f}G" for n in (r.weight_bytes, r.gradient_bytes, r.optimizer_bytes, r.host_bytes))
        layers = "+".join(map(str, r.layers))
        print(f"{r.rank:>4}  {r.place:<31}  {layers:<11}  {r.parameters:>13,}  {sizes}  {r.micro_batches:>13}  {r.seconds:>7.1f}")


if __name__ == "__main__":
    sys.exit(main())
