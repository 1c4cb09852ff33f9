"""What may become of checkpoints on a disk: each way is done to a run's newest, or to what lies beside it, and says what it has done.

All that is random is drawn from the generator that is given. Also what a well-meaning hand may do: take files from another
checkpoint, edit a manifest and sign it again.
"""

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[random.Random, Path, Path], str]  # of the newest checkpoint and the one before


def flip(file: Path, bit: int) -> None:
    """Bit `bit` of a file is the other one."""
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def header(file: Path) -> int:
    """Bytes of a safetensors file before its data."""
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def _shard_of(rng: random.Random, directory: Path) -> Path:
    return rng.choice(sorted(directory.glob("*.safetensors")))


def _any_of(rng: random.Random, directory: Path) -> Path:
    return rng.choice(sorted(directory.iterdir()))


def truncate(rng: random.Random, newest: Path, previous: Path) -> str:
    """A file of the newest is cut."""
    file = _any_of(rng, newest)
    size = rng.choice((0, 1, 7, file.stat().st_size - 1, rng.randrange(file.stat().st_size)))
    os.truncate(file, size)
    return f"{file.name} cut to {size} bytes"


def extend(rng: random.Random, newest: Path, previous: Path) -> str:
    """A file of the newest is longer."""
    file = _any_of(rng, newest)
    with file.open("ab") as opened:
        opened.write(rng.randbytes(length := rng.choice((1, 8, 4096))))
    return f"{file.name} longer by {length} bytes"


def overwrite(rng: random.Random, newest: Path, previous: Path) -> str:
    """A stretch of a file is zeros, or random."""
    file = _any_of(rng, newest)
    length = min(file.stat().st_size, rng.choice((8, 512, 4096)))
    at = rng.randrange(file.stat().st_size - length + 1)
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(bytes(length) if rng.random() < 0.5 else rng.randbytes(length))
    return f"{file.name}: {length} other bytes at {at}"


def drop_file(rng: random.Random, newest: Path, previous: Path) -> str:
    """A file is not there."""
    file = _any_of(rng, newest)
    file.unlink()
    return f"{file.name} is gone"


def _exchange(one: Path, other: Path) -> str:
    away = one.with_name("away")
    one.rename(away)
    other.rename(one)
    away.rename(other)
    return f"{one.parent.name}/{one.name} and {other.parent.name}/{other.name} exchanged"


def swap_files(rng: random.Random, newest: Path, previous: Path) -> str:
    """Two files of the newest have each other's names."""
    one, other = rng.sample(sorted(newest.iterdir()), 2)
    return _exchange(one, other)


def swap_between(rng: random.Random, newest: Path, previous: Path) -> str:
    """A file of the newest and that of the previous are exchanged."""
    file = _any_of(rng, newest)
    return _exchange(file, previous / file.name)


def swap_checkpoints(rng: random.Random, newest: Path, previous: Path) -> str:
    """Both have each other's names."""
    return _exchange(newest, previous)


def copy_between(rng: random.Random, newest: Path, previous: Path) -> str:
    """A file of the newest is the previous one's."""
    file = _any_of(rng, newest)
    shutil.copy(previous / file.name, file)
    return f"{file.name} is that of {previous.name}"


def swap_pieces(rng: random.Random, newest: Path, previous: Path) -> str:
    """Two pieces in a shard have each other's bytes."""
    file = _shard_of(rng, newest)
    x = load_file(file)
    one, other = rng.choice([(a, b) for a in x for b in x if a < b and len(x[a]) == len(x[b]) and not torch.equal(x[a], x[b])])
    save_file({**x, one: x[other].clone(), other: x[one].clone()}, file)
    return f"{file.name}: the bytes of {one} and {other} exchanged"


def drop_piece(rng: random.Random, newest: Path, previous: Path) -> str:
    """A shard lacks a piece."""
    file = _shard_of(rng, newest)
    tensors = load_file(file)
    del tensors[gone := rng.choice(sorted(tensors))]
    save_file(tensors, file)
    return f"{file.name} without {gone}"


def other_dtype(rng: random.Random, newest: Path, previous: Path) -> str:
    """A piece's bytes are said to be of another type."""
    file = _shard_of(rng, newest)
    tensors = load_file(file)
    key = rng.choice(sorted(tensors))
    save_file({**tensors, key: tensors[key].view(torch.int32)}, file)
    return f"{file.name}: {key} as int32"


def edit_manifest(rng: random.Random, newest: Path, previous: Path) -> str:
    """A character of the manifest changed, added or taken away, its checksum not."""
    file = newest / "manifest.json"
    text = file.read_text(encoding="utf-8")
    at = rng.randrange(len(text) - 2)
    other = rng.choice([c for c in '0123456789abc"{}[],:' if c != text[at]])
    how = rng.choice(("changed", "added", "gone"))
    before, after = text[:at], text[at if how == "added" else at + 1 :]
    changed = before + after if how == "gone" else before + other + after
    file.write_text(changed, encoding="utf-8")
    return f"manifest.json: character {at} {how}"


def replace_manifest(rng: random.Random, newest: Path, previous: Path) -> str:
    """The manifest is another text."""
    texts = (
        "", "{", "[]", "null", "{}", "NaN", '{"format": 1}', '{"format": 1, "crc32": 0, "tensors": 7}', '"\\ud800"', "[" * 100_000,
        "\0" * 4096,
    )  # fmt: skip
    text = rng.choice(texts)
    (newest / "manifest.json").write_text(text, encoding="utf-8")
    return f"manifest.json is {text[:20]!r}"


def _sign(manifest: dict[str, Any], file: Path) -> None:
    manifest.pop("crc32", None)
    file.write_text(json.dumps({**manifest, "crc32": zlib.crc32(json.dumps(manifest).encode())}) + "\n", encoding="utf-8")


def edit_signed(rng: random.Random, newest: Path, previous: Path) -> str:
    """An entry of the manifest is another, and its checksum is right."""
    file = newest / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    name = rng.choice(sorted(manifest["tensors"]))
    tensor = manifest["tensors"][name]
    entry = rng.choice(tensor["pieces"])

    axes = len(tensor["shape"])
    edits: dict[str, Callable[[], Any]] = {
        "a piece less": lambda: tensor["pieces"].remove(entry), "a piece twice": lambda: tensor["pieces"].append(entry),
        "pieces that are text": lambda: tensor.update(pieces="none"), "no tensor": lambda: manifest["tensors"].pop(name),
        "tensors that are a list": lambda: manifest.update(tensors=[]), "another shape": lambda: tensor["shape"].append(2),
        "another size": lambda: entry.update(size=[1] * axes), "another offset": lambda: entry.update(offset=[3] * axes),
        "a negative offset": lambda: entry.update(offset=[-1] * axes), "no offset": lambda: entry.pop("offset"),
        "another checksum": lambda: entry.update(crc32=entry["crc32"] ^ 1), "no checksum": lambda: entry.pop("crc32"),
        "another key": lambda: entry.update(key=entry["key"] + "x"), "a key that is no text": lambda: entry.update(key=[1]),
        "a file outside": lambda: entry.update(file=f"../{previous.name}/{entry['file']}"),
        "an absolute file": lambda: entry.update(file="/etc/passwd"), "a file that is a number": lambda: entry.update(file=7),
        "another format": lambda: manifest.update(format=2), "a step that is text": lambda: manifest.update(step="4"),
        "no step": lambda: manifest.pop("step"), "no updates": lambda: manifest.pop("updates"), "no about": lambda: manifest.pop("about"),
    }  # fmt: skip
    what = rng.choice(sorted(edits))
    edits[what]()
    _sign(manifest, file)
    return f"manifest.json, signed again: {name}: {what}"


def edit_tracker(rng: random.Random, newest: Path, previous: Path) -> str:
    """The tracker is another text."""
    texts = (
        b"", b"\n", b"\xff\xfe\0", b"step-00000009\n", b"../elsewhere\n", b"/etc\n", b".\n", newest.name[:-1].encode(), b"\0" * 512,
        b"." * 100_000, f"{newest.name}/manifest.json\n".encode(), f"{previous.name}\n{newest.name}\n".encode(),
        f"{newest.name}\n{newest.name}\n".encode(),
    )  # fmt: skip
    (newest.parent / "latest").write_bytes(text := rng.choice(texts))
    return f"the tracker says {text[:40]!r}"


def lose_tracker(rng: random.Random, newest: Path, previous: Path) -> str:
    """The tracker is not there, or is no file."""
    file = newest.parent / "latest"
    file.unlink()
    how = rng.choice(("gone", "a directory", "a link to itself", "a link to nothing"))
    if how == "a directory":
        file.mkdir()
    elif how != "gone":
        file.symlink_to("latest" if how == "a link to itself" else "nowhere")
    return f"the tracker is {how}"


def other_kind(rng: random.Random, newest: Path, previous: Path) -> str:
    """A directory where a file was, a file where a directory was, links."""
    file = rng.choice((newest, *sorted(newest.iterdir())))
    outside = newest.parents[1] / f"outside-{file.name}"
    is_directory = file.is_dir()
    file.rename(outside)
    choices = ("a file",) if is_directory else ("a directory", "a link outside")
    how = rng.choice((*choices, "a link to itself", "a link to nothing"))
    if how == "a directory":
        file.mkdir()
    elif how == "a file":
        file.write_bytes(b"")
    else:
        file.symlink_to({"a link to itself": file.name, "a link to nothing": "nowhere", "a link outside": str(outside)}[how])
    return f"{file.name} is {how}"


def drop_checkpoints(rng: random.Random, newest: Path, previous: Path) -> str:
    """The newest is not there, or neither is."""
    gone = rng.choice(((newest,), (newest, previous)))
    for path in gone:
        shutil.rmtree(path)
    return f"{' and '.join(path.name for path in gone)} gone"


def damage_both(rng: random.Random, newest: Path, previous: Path) -> str:
    """No checkpoint is whole."""
    for path in (newest, previous):
        file = _shard_of(rng, path)
        flip(file, rng.randrange(8 * file.stat().st_size))
    return "a bit flipped in each checkpoint"


def rubbish(rng: random.Random, newest: Path, previous: Path) -> str:
    """What a run may meet where it is about to write."""
    following = f"step-{int(newest.name[5:]) + 1:08d}"
    name = rng.choice((f".{following}.tmp", ".latest.tmp", following))
    how = rng.choice(("a file", "a directory", "a full directory", "a link to nothing"))
    path = newest.parent / name
    if how == "a file":
        path.write_bytes(rng.randbytes(100))
    elif how == "a link to nothing":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
        if how == "a full directory":
            (path / "rank-00000.safetensors").write_bytes(rng.randbytes(100))
    return f"{name} is there, {how}"


WAYS: tuple[Damage, ...] = (
    truncate, extend, overwrite, drop_file, swap_files, swap_between, swap_checkpoints, copy_between, swap_pieces, drop_piece, other_dtype,
    edit_manifest, replace_manifest, edit_signed, edit_tracker, lose_tracker, other_kind, drop_checkpoints, damage_both, rubbish,
)  # fmt: skip
