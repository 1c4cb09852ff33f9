"""Time what it costs to verify a directory of weights, beside reading it and beside the CRC-32 of a checkpoint's pieces.

python tools/bench_checksums.py --gigabytes 2 --files 8

Files of random bytes are written to --dir, sealed, and read again and again, so from the system's cache where they fit: a disk's or a
network's own time comes on top, but what was just verified is then in the cache for the load. Of --repeats the best is told. With
many ranks each verifies its share. The last line is one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from megamod.command import command
from megamod.errors import MegamodError, expected
from megamod.weights import checksums

BLOCK = 1 << 20


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="together (default: %(default)s)")
    parser.add_argument("--files", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--dir", type=Path, help="where they are written and removed (default: the system's temporary folder)")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(argv)
    for name in ("gigabytes", "files", "repeats"):
        if not getattr(args, name) > 0:
            raise MegamodError(f"--{name} {getattr(args, name)}: a positive number was expected")
    with expected("a folder with room for the files"), tempfile.TemporaryDirectory(dir=args.dir) as folder:
        root, blocks = Path(folder), max(1, round(args.gigabytes * 1e9 / args.files / BLOCK))
        for number in tqdm(range(args.files), desc="writing", unit="file", delay=3):
            with (root / f"model-{number:05d}.safetensors").open("wb") as file:
                for _ in range(blocks):
                    file.write(os.urandom(BLOCK))
        checksums.seal(root)
        size = args.files * blocks * BLOCK / 1e9
        done = {name: best(work, root, args.repeats, size) for name, work in WORK.items()}
    table = Table("", title=f"{size:.2f} GB in {args.files} files", box=SIMPLE)
    for column in ("s/GB", "CPU s/GB"):
        table.add_column(column, justify="right")
    for name, (seconds, cpu) in done.items():
        table.add_row(name, f"{seconds:.2f}", f"{cpu:.2f}")
    Console(highlight=False).print(table)
    results = {name: {"seconds_per_gb": seconds, "cpu_seconds_per_gb": cpu} for name, (seconds, cpu) in done.items()}
    print(json.dumps({"gigabytes": size, "files": args.files, "cores": os.cpu_count(), "results": results}))


def best(work: Callable[[Path], None], root: Path, repeats: int, gigabytes: float) -> tuple[float, float]:
    """Seconds and CPU seconds a gigabyte, each the least of so many."""
    found = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work(root)
        found.append(((time.perf_counter() - wall) / gigabytes, (time.process_time() - cpu) / gigabytes))
    return min(wall for wall, _ in found), min(cpu for _, cpu in found)


def each(root: Path, update: Callable[[memoryview], object]) -> None:
    """Hand every block of every file to `update`, one after the other."""
    block = memoryview(bytearray(BLOCK))
    for path in sorted(root.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(block):
                update(block[:count])


WORK: dict[str, Callable[[Path], None]] = {
    "read": lambda root: each(root, len),
    "read, CRC-32": lambda root: each(root, zlib.crc32),
    f"verify, {checksums.THREADS} threads": checksums.verify,
}


if __name__ == "__main__":
    sys.exit(main())
