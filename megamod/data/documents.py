"""Tokenised documents: from JSONL, or made up.

A line of such a file is one document, an object with these keys:

    {"input_ids": [1, 57, 9, 4], "labels": [-100, -100, 9, 4], "verdict": [0, 0, 1, 0], "weight": 1.0}

`labels` are Hugging Face's, unshifted: a token's own id where it is trained, -100 elsewhere. Left out, every token is trained.
`data/packing.py` shifts them, once.
"""

import hashlib
import math
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megamod.config import SyntheticData
from megamod.data.jsonl import LARGEST_WEIGHT, Json
from megamod.errors import MegamodError, nearest

Integers = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]

IGNORED = -100  # the label of a token that is not trained
MOST_IDS = 2**31  # a document keeps them in int32
KEYS = ("input_ids", "labels", "verdict", "weight")


@dataclass(frozen=True, eq=False)  # eq=False: arrays have no single truth value, so documents compare by identity
class Document:
    """`t` tokens of one text."""

    tokens: Integers  # [t] int32 or int64
    labels: Integers  # [t] int64, unshifted: labels[i] is tokens[i] where token i is trained, else IGNORED
    verdict: Flags  # [t]: which of the trained tokens say the verdict
    weight: float = 1.0


class Documents(Protocol):
    """What a loader reads: documents by number. `InMemory` here, `store.Store`, `store.Mixed`."""

    lengths: npt.NDArray[np.int64]  # [n] tokens of each
    trained: int  # tokens that a loss may ask for
    verdicts: int  # of those, the ones that say a verdict

    def __getitem__(self, number: int) -> Document: ...

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of tokens, labels, verdicts and weights, in their order."""
        ...


class InMemory:
    """Documents of a list."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self.lengths = np.array([len(document.tokens) for document in documents], np.int64)
        self.trained = sum(int((document.labels[1:] != IGNORED).sum()) for document in documents)
        self.verdicts = sum(int(document.verdict.sum()) for document in documents)

    def __getitem__(self, number: int) -> Document:
        return self._documents[number]

    def fingerprint(self) -> str:
        """Of the documents; integers of any width alike."""
        digest = hashlib.sha256()
        for document in self._documents:
            # The length first: without it, two documents could pass for one.
            digest.update(struct.pack("<qd", len(document.tokens), document.weight))
            digest.update(document.tokens.astype("<i8").tobytes())
            digest.update(document.labels.astype("<i8").tobytes())
            digest.update(document.verdict.astype(np.bool_).tobytes())
        return digest.hexdigest()


def synthetic(cfg: SyntheticData, vocab: int, longest: int, seed: int) -> InMemory:
    """Random documents, the same for the same arguments.

    Args:
        cfg: how many, how long and how much of each is trained. `mean_length` is the arithmetic mean before lengths are cut
            off at `longest`.
        vocab: token ids are uniform in [0, vocab).
        longest: the greatest length; the smallest is 2, so that each document has a token to predict.
        seed: of the random-number generator.

    Raises:
        MegamodError: a value of `cfg` that means nothing, or rows too short for a document of 2.
    """
    for key, value, fits, expected in (
        ("data.train.documents", cfg.documents, cfg.documents >= 1, "at least 1"),
        ("data.train.mean_length", cfg.mean_length, cfg.mean_length >= 1, "at least 1"),
        ("data.train.sigma", cfg.sigma, 0 <= cfg.sigma < math.inf, "a finite number of at least 0"),
        ("data.train.labelled", cfg.labelled, 0 <= cfg.labelled <= 1, "a share from 0 to 1"),
        ("data.row_length", longest, longest >= 2, "at least 2 for synthetic documents"),
    ):
        if not fits:
            raise MegamodError(f"{key} = {value}: must be {expected}")
    rng = np.random.Generator(np.random.PCG64(seed))
    mu = math.log(cfg.mean_length) - cfg.sigma**2 / 2  # a log-normal's mean is exp(mu + sigma²/2)
    lengths = np.clip(np.rint(rng.lognormal(mu, cfg.sigma, cfg.documents)), 2, longest).astype(np.int64)
    documents = []
    for length in lengths.tolist():
        tokens = rng.integers(vocab, size=length, dtype=np.int32)
        trained = max(1, round(cfg.labelled * length))
        first = length - trained
        labels = np.full(length, IGNORED, dtype=np.int64)
        labels[first:] = tokens[first:]
        verdict = np.zeros(length, dtype=np.bool_)
        verdict[first : first + max(1, trained // 4)] = True
        documents.append(Document(tokens, labels, verdict))
    return InMemory(documents)


def document_of(record: Json, where: str, vocab: int | None = None) -> Document:
    """The document that a line of tokenised JSONL holds.

    Args:
        vocab: the model's vocabulary, below which ids must be; None: any.

    Raises:
        MegamodError: a fault in it; one line that begins with `where`.
    """
    for key in record:
        if key not in KEYS:
            raise MegamodError(f"{where}: unknown key {key!r}, {nearest(key, KEYS)}")
    ids = _column(record, "input_ids", {int}, "integers", where)
    if not ids:
        raise MegamodError(f"{where}: input_ids is empty: a document has at least one token")
    bound = MOST_IDS if vocab is None else vocab
    if min(ids) < 0 or max(ids) >= bound:
        i = next(i for i, token in enumerate(ids) if not 0 <= token < bound)
        raise MegamodError(f"{where}: input_ids[{i}] = {ids[i]} is outside the vocabulary: ids from 0 to {bound - 1} were expected")

    labels = _column(record, "labels", {int}, "integers", where) if "labels" in record else ids
    for i, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (token, IGNORED):
            raise MegamodError(
                f"{where}: labels[{i}] = {label}, but input_ids[{i}] = {token}: a label is its own token's id, or {IGNORED} where "
                f"the token is not trained (megamod shifts labels itself)"
            )

    verdict = _column(record, "verdict", {int, bool}, "0 and 1, or booleans,", where) if "verdict" in record else [False] * len(ids)
    for i, flag in enumerate(verdict):
        if flag not in (0, 1):
            raise MegamodError(f"{where}: verdict[{i}] = {flag}: 0, 1, false or true was expected")

    weight = record.get("weight", 1.0)
    # The comparison is false for NaN, and takes integers too large for a float.
    if type(weight) not in (int, float) or not 0 <= weight <= LARGEST_WEIGHT:
        raise MegamodError(f"{where}: weight = {reprlib.repr(weight)}: a finite number of at least 0 was expected")
    return Document(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int64), np.array(verdict, dtype=np.bool_), float(weight))


def _column(record: Json, key: str, kinds: set[type], what: str, where: str) -> list[Any]:
    """The list at `key`: one entry of a type in `kinds` for each token. `type()`, not `isinstance`: True is no integer here."""
    value = record[key]
    if not isinstance(value, list):
        raise MegamodError(f"{where}: {key} = {reprlib.repr(value)}: a list of {what} was expected")
    if not kinds >= set(map(type, value)):
        i = next(i for i, item in enumerate(value) if type(item) not in kinds)
        raise MegamodError(f"{where}: {key}[{i}] = {reprlib.repr(value[i])}: a list of {what} was expected")
    tokens = len(record["input_ids"])  # a list: it is the first column to be read
    if len(value) != tokens:
        raise MegamodError(f"{where}: {key} has {len(value)} entries, but input_ids has {tokens}: one for each token was expected")
    return value
