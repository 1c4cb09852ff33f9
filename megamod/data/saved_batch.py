"""A step's micro-batches in a file, to be looked at later: what a run keeps of a step that went wrong.

One safetensors file: a tensor `<number>.<field>` for each field of each Batch that is one, and in the header's metadata, as JSON, the
others, with a CRC-32 of it all. `tools/show_batch.py --saved` shows it.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megamod import files
from megamod.batch import Batch
from megamod.errors import MegamodError
from megamod.foreign import parse_json

FORMAT = 1
ABOUT = "megamod.batches"  # in the metadata
TENSORS = tuple(f.name for f in fields(Batch) if "Tensor" in str(f.type))
OTHERS = ("lengths", "totals", "seed")  # not `answers`, which are the step's, nor `cp`, a group of processes, which whole rows have none of
PER_LABEL = ("rows", "labels", "verdict", "weight", "sequence", "stored", "share", "numbered")  # [N]


def save(path: str | Path, batches: Sequence[Batch]) -> Path:
    """Write whole micro-batches, as the loader gives them and a reference completes them, at once. Returns the path.

    Raises:
        OSError, SafetensorError: a write that fails; what was there before is there still.
    """
    assert all(batch.cp is None for batch in batches), "before `Batch.slice`: every rank of cp has the whole row"
    held = [{name: value for name in TENSORS if (value := getattr(batch, name)) is not None} for batch in batches]
    tensors = {f"{i}.{name}": value.detach().cpu().contiguous().clone() for i, one in enumerate(held) for name, value in one.items()}
    about = {"format": FORMAT, "batches": [{name: getattr(batch, name) for name in OTHERS} for batch in batches]}
    about["crc32"] = _crc(about, tensors)
    target = Path(path)
    with files.replacing(target) as draft:
        save_file(tensors, draft, metadata={"format": "pt", ABOUT: json.dumps(about)})
        files.finish(draft)
    return target


def load(path: str | Path) -> list[Batch]:
    """The micro-batches that `save` wrote, bit for bit, on the CPU.

    Raises:
        MegamodError: no such file, another kind of file, or one that is damaged.
    """
    if not Path(path).is_file():
        raise MegamodError(f"{path}: no such file: what a run saves of a step was expected")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = parse_json((file.metadata() or {})[ABOUT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a method of safe_open, no mapping)
        if about["format"] != FORMAT:
            raise MegamodError(f"{path}: format {about['format']}, this megamod reads {FORMAT}")
        if about.pop("crc32") != _crc(about, tensors):
            raise ValueError("it fails its checksum")
        return [_batch(number, one, tensors) for number, one in enumerate(about["batches"])]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MegamodError(f"{path}: no whole file of micro-batches ({error}): what a run saves of a step was expected") from None


def _batch(number: int, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Batch:
    held: dict[str, Any] = {name: tensors[key] for name in TENSORS if (key := f"{number}.{name}") in tensors}
    batch = Batch(**held, lengths=tuple(about["lengths"]), totals=dict(about["totals"]), seed=int(about["seed"]))
    count, length = len(batch.rows), len(batch.tokens)
    if sum(batch.lengths) != length or batch.positions.shape[-1] != length:
        raise ValueError(f"{number}: lengths and positions of {length} tokens were expected")
    if wrong := [name for name in PER_LABEL if name in held and held[name].shape != (count,)]:
        raise ValueError(f"{number}.{wrong[0]}: one for each of {count} labels was expected")
    if bool(((batch.rows < 0) | (batch.rows >= length) | (batch.sequence < 0) | (batch.sequence >= batch.sequences)).any()):
        raise ValueError(f"{number}: labels outside of the row")
    return batch


def _crc(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    found = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), found) if tensor.numel() else found  # type: ignore[arg-type]
    return found
