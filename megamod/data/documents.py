"""Tokenised documents: read from JSONL, or made up.

A line of the file is one document, an object with these keys:

    {"input_ids": [1, 57, 9, 4], "labels": [-100, -100, 9, 4], "verdict": [0, 0, 1, 0], "weight": 1.0}

`labels` are Hugging Face's, unshifted: a token's own id where it is trained, -100 elsewhere. Left out, every token is trained.
`data/packing.py` shifts them, once.
"""

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megamod.config import SyntheticData
from megamod.errors import MegamodError, nearest

Integers = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]

IGNORED = -100  # the label of a token that is not trained
KEYS = ("input_ids", "labels", "verdict", "weight")
LARGEST_WEIGHT = float(np.finfo(np.float32).max)  # a batch keeps weights in float32


@dataclass(frozen=True, eq=False)  # eq=False: arrays have no single truth value, so documents compare by identity
class Document:
    """`t` tokens of one text."""

    tokens: Integers  # [t] int32 or int64
    labels: Integers  # [t] int64, unshifted: labels[i] is tokens[i] where token i is trained, else IGNORED
    verdict: Flags  # [t]: which of the trained tokens say the verdict
    weight: float = 1.0


def read_jsonl(path: str | Path, vocab: int) -> list[Document]:
    """The documents of a JSONL file, in its order. Blank lines are skipped.

    Args:
        path: UTF-8, one JSON object a line.
        vocab: the model's vocabulary; token ids are below it.

    Raises:
        MegamodError: no such file, or a fault in it; one line that begins with `file:line:`.
    """
    documents = []
    try:
        with open(path, "rb") as file:  # bytes: one bad character is then an error of its own line
            for number, line in enumerate(file, 1):
                if line.strip():
                    documents.append(_parse(line, vocab, f"{path}:{number}"))
    except OSError as error:
        raise MegamodError(f"{path}: {error.strerror or error}: a JSONL file of tokenised documents was expected") from None
    if not documents:
        raise MegamodError(f'{path}:1: no documents: at least one line such as {{"input_ids": [1, 2, 3]}} was expected')
    return documents


def synthetic(cfg: SyntheticData, vocab: int, longest: int, seed: int) -> list[Document]:
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
    return documents


def _parse(line: bytes, vocab: int, where: str) -> Document:
    """One line of the file. `where`: `file:line`, with which every error begins."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MegamodError(f"{where}: byte {error.start + 1} of the line is not UTF-8: save the file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise MegamodError(f"{where}: not JSON, {error.msg} at column {error.colno}: one whole object a line was expected") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise MegamodError(f"{where}: not JSON that can be read, {error}") from None
    if not isinstance(record, dict):
        raise MegamodError(f"{where}: {reprlib.repr(record)}: an object with the keys {', '.join(KEYS)} was expected")
    for key in record:
        if key not in KEYS:
            raise MegamodError(f"{where}: unknown key {key!r}, {nearest(key, KEYS)}")
    if "input_ids" not in record:
        raise MegamodError(f"{where}: no input_ids: every document needs its list of token ids")

    ids = _column(record, "input_ids", {int}, "integers", where)
    if not ids:
        raise MegamodError(f"{where}: input_ids is empty: a document has at least one token")
    if min(ids) < 0 or max(ids) >= vocab:
        i = next(i for i, token in enumerate(ids) if not 0 <= token < vocab)
        raise MegamodError(f"{where}: input_ids[{i}] = {ids[i]} is outside the vocabulary: ids from 0 to {vocab - 1} were expected")

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


def _column(record: dict[str, Any], key: str, kinds: set[type], what: str, where: str) -> list[Any]:
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
