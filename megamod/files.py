"""Writing files so that a reader finds the old bytes or the new ones, whole, whatever is killed when."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megamod.errors import MegamodError, expected


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


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory`, made if it is not there, against others who would: its file `lock` says who does. Ends with the process, too.

    A directory that has nothing else in it afterwards is removed.

    Raises:
        MegamodError: another process holds it, or it cannot be written.
    """
    file = directory / "lock"
    handle = _held(file)
    try:
        with suppress(OSError):  # a disk without room for a line: the lock holds without it
            os.truncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            if os.listdir(directory) == [file.name]:
                file.unlink()
                directory.rmdir()
        os.close(handle)


def _held(file: Path) -> int:
    """A handle of `file` with its lock. Raises MegamodError, as `locked` does."""
    while True:
        with expected("a directory that can be written"):
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "it has not said who it is"
            os.close(handle)
            raise MegamodError(f"{file.parent}: another run is at work here ({holder}): use another dir, or end that one") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # storage without locks: nobody is kept out
                os.close(handle)
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(file), os.fstat(handle)):
                return handle
        os.close(handle)  # its holder has removed it meanwhile: it keeps nobody out
