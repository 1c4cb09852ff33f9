"""Checksums of what is exported: a file SHA256SUMS, which `sha256sum -c SHA256SUMS` reads as well.

Whoever writes a directory of weights seals it before it gets its name, and whoever reads one verifies it: a bit that storage or a
copy has lost is found, and the file that lost it. A directory without SHA256SUMS is somebody else's, and passes. These are checksums
and no signature: who can change a file can change its line.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from megamod.errors import MegamodError, expected
from megamod.files import sync
from megamod.foreign import is_inside

SUMS = "SHA256SUMS"
# Ends of the names of what decides how a model computes; a README may come later.
READ = (".safetensors", ".json", ".jinja", ".model", "merges.txt", "vocab.txt")
LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\n\r\0]+)")  # a digest, two characters of the mode, a bare name
LARGEST = 1 << 24  # bytes of a list
BLOCK = 1 << 20
THREADS = 4  # hashlib and the disk work without the interpreter's lock


def seal(directory: str | Path, known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS over every file of `directory`, synced.

    Args:
        known: digests that are there already, by name: other ranks' of what they wrote.

    Raises:
        MegamodError: a name that the list cannot hold.
        OSError: a write that fails.
    """
    root = Path(directory)
    names = sorted(file.name for file in root.iterdir() if file.is_file() and file.name != SUMS)
    for name in names:
        if LINE.fullmatch(f"{'0' * 64}  {name}") is None:
            raise MegamodError(f"{root}: {name!r} is no name that {SUMS} can hold: rename the file")
    sums = {**(known or {}), **digests(root, (name for name in names if name not in (known or {})))}
    (root / SUMS).write_bytes("".join(f"{sums[name]}  {name}\n" for name in names).encode("utf-8", "surrogateescape"))
    sync(root / SUMS)


def verify(directory: str | Path, rank: int = 0, world: int = 1, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Compare the files of `directory` with its SHA256SUMS; where there is none, do nothing.

    Args:
        rank: which of `world` shares, of much the same size in bytes, is read here. They share the storage; each reads the list.
        wanted: of the listed names, which to read.

    Raises:
        MegamodError: a file that differs, is missing or cannot be read, one of weights, configuration or tokenizer that is not
            listed, or a list that is damaged.
    """
    root = Path(directory)
    sums = read(root)
    if sums is None:
        return
    for file in sorted(root.iterdir()):
        if file.name.endswith(READ) and file.name not in sums and wanted(file.name):
            raise MegamodError(f"{file}: not listed in {SUMS}: remove it, or add the line that `sha256sum {file.name}` prints")
    sizes = {name: _size(root, name) for name in sums if wanted(name)}
    names = shares(sizes, world)[rank]
    with expected("a file that can be read"):
        for name, digest in digests(root, names, quiet=rank != 0).items():
            if digest != sums[name]:
                raise MegamodError(
                    f"{root / name}: not as it was written: its SHA-256 differs from {SUMS}; copy it again, or, if the change is meant, "
                    f"put the line that `sha256sum {name}` prints in the place of its own, or remove {SUMS}"
                )


def is_small(name: str) -> bool:
    """Whether it is anything but weights: for `verify`'s `wanted`."""
    return not name.endswith(".safetensors")


def read(directory: Path) -> dict[str, str] | None:
    """Name → digest, as SHA256SUMS has them; None: there is no such file. Raises MegamodError for one that is damaged."""
    file = directory / SUMS
    try:
        if file.stat().st_size > LARGEST:
            raise MegamodError(f"{file}: {file.stat().st_size:,} bytes: a list of files was expected")
        text = file.read_bytes().decode("utf-8", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise MegamodError(f"{file}: {error.strerror}: a file that can be read was expected") from None
    *lines, rest = text.split("\n")
    sums: dict[str, str] = {}
    for number, line in enumerate(lines if not rest else [*lines, rest], 1):
        match = LINE.fullmatch(line)
        if match is None or match[2] in (".", "..", SUMS) or match[2] in sums or number > len(lines):
            raise MegamodError(f"{file}:{number}: damaged: lines of a SHA-256, two spaces and a bare name were expected, each name once")
        sums[match[2]] = match[1]
    return sums


def digests(directory: Path, names: Iterable[str], *, quiet: bool = False) -> dict[str, str]:
    """SHA-256 in hexadecimal of files of `directory`, by name. Raises OSError."""
    wanted = sorted(names)
    total = sum((directory / name).stat().st_size for name in wanted)
    bar = tqdm(total=total, desc="checksums", unit="B", unit_scale=True, delay=3, mininterval=3, disable=quiet)
    pool, found = ThreadPoolExecutor(THREADS), dict[str, str]()
    try:
        with bar:
            for name, digest in zip(wanted, pool.map(lambda name: _digest(directory / name), wanted), strict=True):
                found[name] = digest
                bar.update((directory / name).stat().st_size)
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def shares(sizes: Mapping[str, int], world: int) -> list[list[str]]:
    """The names for each of `world` ranks: the largest first, each to the one that has fewest bytes so far."""
    result: list[list[str]] = [[] for _ in range(world)]
    total = [0] * world
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = total.index(min(total))
        result[least].append(name)
        total[least] += sizes[name]
    return result


def _size(root: Path, name: str) -> int:
    file = root / name
    if not is_inside(root, name):
        raise MegamodError(f"{file}: a link that leaves the directory is not followed; put the file itself there")
    if not file.is_file():
        raise MegamodError(f"{file}: missing, and {SUMS} lists it: copy it again, or, if it is meant to be gone, remove its line")
    return file.stat().st_size


def _digest(file: Path) -> str:
    total, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(block):
            total.update(block[:count])
    return total.hexdigest()
