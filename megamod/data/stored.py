"""A reference model's log-probabilities, stored beside the data: what tools/reference_logprobs.py writes and a run reads; and a teacher's.

    <directory>/
        reference.json  which documents they are of, by which model, and checksums
        offsets.bin     int64 [n+1]: where each document begins in logprobs.bin
        logprobs.bin    float32: of each document's trained tokens, but for a first one, which nothing predicts; of a teacher
                        [K, 2] for each: its largest log-probabilities there, and whose they are

The documents are told by their fingerprint, so by tokens and labels: another template, tokenizer or cut makes other ones.
"""

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megamod import files
from megamod.data.documents import IGNORED, Document, Documents
from megamod.errors import MegamodError

FORMAT = 1
MANIFEST, OFFSETS, LOGPROBS = "reference.json", "offsets.bin", "logprobs.bin"
Floats = npt.NDArray[np.float32]


class Compared:
    """Documents with their stored log-probabilities: Documents.

    Attributes:
        model: which one they are of: `reference.model_at_start`.
        digest: of which model that is.
        top_k: K of a teacher; None: a reference's log-probabilities.

    Raises:
        MegamodError: nothing stored there, a damaged file, or log-probabilities of other documents.
    """

    def __init__(self, documents: Documents, directory: str | Path) -> None:
        self._documents, root = documents, Path(directory)
        self.directory = root
        about = _read_manifest(root)
        if about["documents"] != documents.fingerprint():
            raise MegamodError(
                f"{root}: log-probabilities of other documents: the data, its template or the row's length has changed since: run "
                f"tools/reference_logprobs.py again"
            )
        self.model = str(about["model"])
        # Which model was asked, not its answers' last bits: computed again on another grid, they are the same reference.
        self.digest = f"{zlib.crc32(self.model.encode()):08x}"
        self._offsets = np.fromfile(root / OFFSETS, "<i8")
        self.top_k: int | None = about.get("top_k")
        values = np.memmap(root / LOGPROBS, "<f4", "r") if self._offsets[-1] else np.zeros(0, np.float32)
        self._values = values.reshape(-1, *each(self.top_k))
        self.lengths, self.joined, self.side = documents.lengths, documents.joined, documents.side
        self.trained, self.verdicts, self.weighed = documents.trained, documents.verdicts, documents.weighed

    def __getitem__(self, number: int) -> Document:
        document = self._documents[number]
        values = np.zeros((len(document.tokens), *self._values.shape[1:]), np.float32)
        values[asked(document)] = self._values[self._offsets[number] : self._offsets[number + 1]]
        return replace(document, reference=values) if self.top_k is None else replace(document, teacher=values)

    def check(self, model: str) -> None:
        """Refuse what is stored of another model than the run begins with, `reference.model_at_start`. Raises MegamodError."""
        if model != self.model:
            raise MegamodError(
                f"{self.directory}: log-probabilities of the model with the fingerprint {self.model}, and this run begins with {model}: "
                f"run tools/reference_logprobs.py with this run's config"
            )

    def fingerprint(self) -> str:
        """Of the documents, with what is stored of them."""
        return f"{self._documents.fingerprint()}:{self.digest}"


def asked(document: Document) -> npt.NDArray[np.int64]:
    """Where in a document the tokens are whose log-probabilities are stored."""
    at = np.flatnonzero(document.labels != IGNORED)
    return at[at > 0]


def each(top_k: int | None) -> tuple[int, ...]:
    """The shape of what is stored of a token."""
    return () if top_k is None else (top_k, 2)


def write(directory: str | Path, values: Sequence[Floats], documents: str, model: str, top_k: int | None = None) -> Path:
    """Store the log-probabilities of each document, in their order: all of it, or nothing.

    Args:
        documents: their fingerprint.
        model: which one was asked.
        top_k: of a teacher, as `Compared` has it.
    """
    final = Path(directory)
    draft = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    np.cumsum([0, *map(len, values)]).astype("<i8").tofile(draft / OFFSETS)
    np.concatenate([np.zeros((0, *each(top_k)), np.float32), *values]).astype("<f4").tofile(draft / LOGPROBS)
    about = {"format": FORMAT, "documents": documents, "model": model, "crc32": _crc(draft)} | ({"top_k": top_k} if top_k else {})
    (draft / MANIFEST).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for file in draft.iterdir():
        files.sync(file)
    os.rename(draft, final)
    files.sync(final.parent)
    return final


def _crc(root: Path) -> int:
    found = 0
    for name in (OFFSETS, LOGPROBS):
        with (root / name).open("rb") as file:
            while part := file.read(1 << 24):
                found = zlib.crc32(part, found)
    return found


def _read_manifest(root: Path) -> dict[str, Any]:
    file = root / MANIFEST
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version, kinds = about["format"], {"documents": str, "model": str, "crc32": int}
        if version == FORMAT and not all(isinstance(about[key], kind) for key, kind in kinds.items()):
            raise ValueError("of another kind")
        if version == FORMAT and _crc(root) != about["crc32"]:
            raise ValueError("it fails its checksum")
    except OSError as error:
        raise MegamodError(f"{error.filename}: {error.strerror}: what tools/reference_logprobs.py writes was expected") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MegamodError(f"{file}: damaged ({error}): run tools/reference_logprobs.py again") from None
    if version != FORMAT:
        raise MegamodError(f"{file}: format {version}, this megamod reads {FORMAT}: run tools/reference_logprobs.py again")
    return about
