"""Micro-batches in a file: every field of a Batch comes back bit for bit, and no damage goes unseen."""

import json
import random
import stat
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from complaints import complaint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megamod.batch import Batch
from megamod.data import saved_batch
from megamod.data.documents import IGNORED, Document
from megamod.data.packing import micro_batch
from megamod.data.saved_batch import ABOUT, load, save


def document(length: int, side: int = 0, joined: bool = False) -> Document:
    tokens = np.arange(1, length + 1)
    labels = np.where(tokens > length // 2, tokens, IGNORED)
    return Document(tokens, labels, tokens > length - 2, 0.5 + length, side=side, joined=joined)


def completed() -> list[Batch]:
    """A pair and an answer with what a reference adds; padding alone; three positions a token."""
    first = micro_batch([[document(7, 1), document(5, -1, True), document(6, 1)]], 20)
    n, draw = len(first.labels), torch.Generator().manual_seed(1)
    first = replace(
        first,
        stored=torch.randn(n, generator=draw),
        divergence=torch.tensor(0.25),
        totals={"tokens": 9.0, "pairs": 0.1},
        seed=(1 << 63) - 1,
    )
    first = replace(first, taught=torch.randn(n, 3, 2, generator=draw), share=torch.rand(n, generator=draw), numbered=torch.arange(n))
    second = micro_batch([[]], 20)
    third = micro_batch([[document(9)]], 20)
    third = replace(third, positions=third.positions.expand(3, -1), weight=third.weight.double() * float("nan"), of_row=third.labelled)
    return [first, second, third]


def told(batch: Batch) -> list[Any]:
    """All of its fields, a tensor as its dtype, shape and bytes: so that NaN is NaN."""
    values = [getattr(batch, f.name) for f in fields(batch)]
    return [(v.dtype, v.shape, v.contiguous().numpy().tobytes()) if isinstance(v, torch.Tensor) else v for v in values]


def test_every_field_comes_back(tmp_path: Path) -> None:
    made = completed()
    assert made[0].pairs.tolist() == [[0], [1]]
    assert {f.name for f in fields(Batch) if all(getattr(batch, f.name) is None for batch in made)} == {"cp", "answers"}
    file = save(tmp_path / "a step", made)
    assert [told(batch) for batch in load(file)] == [told(batch) for batch in made]
    save(file, made[1:])  # in the place of the first
    assert [told(batch) for batch in load(file)] == [told(batch) for batch in made[1:]]
    assert [path.name for path in tmp_path.iterdir()] == ["a step"]
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(tmp_path.stat().st_mode) & 0o666


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path / "a step", completed()[:1])
    before = file.read_bytes()

    def full(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_batch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(file, completed())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {file: before}


def test_no_flipped_bit_is_silent(tmp_path: Path) -> None:
    file, draw = save(tmp_path / "a step", completed()), random.Random(1)
    before, silent = file.read_bytes(), []
    header = 8 + int.from_bytes(before[:8], "little")
    for at in (draw.randrange(8 * (header if i % 2 else len(before))) for i in range(400)):
        after = bytearray(before)
        after[at // 8] ^= 1 << at % 8
        file.write_bytes(after)
        try:
            found = [told(batch) for batch in load(file)]
        except saved_batch.MegamodError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 (either is right)
        else:
            silent += [at] if found != [told(batch) for batch in completed()] else []
    assert silent == []


def edited(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """What a maker of such files could write: its checksum is right."""

    def edit(file: Path) -> None:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()[ABOUT])
        del about["crc32"]
        change(about, tensors)
        about["crc32"] = saved_batch._crc(about, tensors)
        save_file(tensors, file, metadata={ABOUT: json.dumps(about)})

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-3]),
        lambda file: save_file({"0.tokens": torch.zeros(3)}, file),
        lambda file: save_file({}, file, metadata={ABOUT: "[" * 100_000}),
        lambda file: save_file({}, file, metadata={ABOUT: "[]"}),
        edited(lambda about, tensors: about.update(format=2)),
        edited(lambda about, tensors: about.update(batches=7)),
        edited(lambda about, tensors: about["batches"].append({})),
        edited(lambda about, tensors: about["batches"][0].update(lengths=[19])),
        edited(lambda about, tensors: about["batches"][0].update(lengths=["a"])),
        edited(lambda about, tensors: about["batches"][0].update(totals=3)),
        edited(lambda about, tensors: tensors.pop("0.labels") is None),
        edited(lambda about, tensors: tensors.update({"0.labels": tensors["0.labels"][1:]})),
        edited(lambda about, tensors: tensors.update({"0.rows": tensors["0.rows"] + 20})),
        edited(lambda about, tensors: tensors.update({"0.sequence": tensors["0.sequence"] + 9})),
        edited(lambda about, tensors: tensors.update({"0.tokens": torch.tensor(3)})),
    ],
)
def test_what_is_no_such_file(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    file = save(tmp_path / "a step", completed()[:1])
    damage(file)
    assert complaint(lambda: load(file)).startswith(f"{file}: ")
