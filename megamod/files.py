"""Writing files so that a reader finds the old bytes or the new ones, whole, whatever is killed when."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until the file's bytes, or the directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` at once: a temporary neighbour, synced and renamed."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


def finish(file: Path) -> None:
    """Give a file that safetensors wrote the mode that the umask gives, as its directory has it, and sync it.

    safetensors leaves 0600, so that other users could not read a shared model.
    """
    file.chmod(file.parent.stat().st_mode & 0o666)
    sync(file)
