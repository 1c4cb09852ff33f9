"""Writing files so that a reader finds the old bytes or the new ones, whole, whatever is killed when."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until the file's bytes, or the directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to write; then it is synced and takes its place at once. After a fault it is removed."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # the usual case: it has its name, and is not there
            draft.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` at once: a temporary neighbour, synced and renamed."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def finish(file: Path) -> None:
    """Give a file that safetensors wrote the mode that the umask gives, as its directory has it, and sync it.

    safetensors leaves 0600, so that other users could not read a shared model.
    """
    file.chmod(file.parent.stat().st_mode & 0o666)
    sync(file)
