"""What others have made is read within bounds: JSON of some size and depth, lines of some length, files that lie where they seem to."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megamod.errors import MegamodError

# Bytes of a JSON file, or of a line; the largest JSON file that is known, a vocabulary of 256,000 with its merges, has 33 MB.
LIMIT = 1 << 28


def read_json(file: Path, limit: int = LIMIT) -> Any:
    """What `file` holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8, is larger than `limit` bytes, or is nested too deeply.
    """
    with file.open("rb") as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return parse_json(data)


def parse_json(text: str | bytes) -> Any:
    """The value of `text`. Raises ValueError, also for brackets that are nested too deeply."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def lines(file: IO[bytes], where: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of `file` with their numbers, from 1. Raises MegamodError for one that is larger than LIMIT."""
    for number, line in enumerate(iter(lambda: file.readline(LIMIT + 1), b""), 1):
        if len(line) > LIMIT:
            raise MegamodError(f"{where}:{number}: a line of more than {LIMIT:,} bytes: one row a line was expected")
        yield number, line


def is_inside(directory: Path, name: str) -> bool:
    """Whether `name` is a bare name, and what it names lies in `directory` itself, wherever links lead."""
    try:
        return Path(name).name == name and os.path.dirname(os.path.realpath(directory / name)) == os.path.realpath(directory)
    except ValueError:  # characters that no file name can have
        return False
