"""Tokenised documents: from JSONL, or made up.

A line of such a file is one document, an object with these keys:

    {"input_ids": [1, 57, 9, 4], "labels": [-100, -100, 9, 4], "verdict": [0, 0, 1, 0], "weight": 1.0, "weights": [1, 1, 4, 1]}

`labels` are Hugging Face's, unshifted: a token's own id where it is trained, -100 elsewhere. Left out, every token is trained.
`data/packing.py` shifts them, once. A token counts with its document's `weight` times its own of `weights`; with 0 there it is not trained.
"""

import hashlib
import math
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
KEYS = ("input_ids", "labels", "verdict", "weight", "weights")


@dataclass(frozen=True, eq=False)  # eq=False: arrays have no single truth value, so documents compare by identity
class Document:
    """`t` tokens of one text."""

    tokens: Integers  # [t] int32 or int64
    labels: Integers  # [t] int64, unshifted: labels[i] is tokens[i] where token i is trained, else IGNORED
    verdict: Flags  # [t]: which of the trained tokens say the verdict
    weight: float = 1.0
    side: int = 0  # 1: ends in a wanted answer, -1: in an unwanted one, 0: neither
    joined: bool = False  # lies in the same row as the document before it; the worse answer of a pair follows the better one
    margin: float = 0.0  # of a pair's better answer: by how much it is better
    classes: Integers | None = None  # [t] int64, for a head of scores: the classes at each token as bits, IGNORED where none is asked
    reference: npt.NDArray[np.floating[Any]] | None = None  # [t]: the reference model's log-probability of each trained token
    teacher: npt.NDArray[np.floating[Any]] | None = None  # [t, K, 2]: a teacher's K largest log-probabilities in its place, and whose
    weights: npt.NDArray[np.float32] | None = None  # [t] above 0: what each token counts beside `weight`; None: 1. See `weighed`


class Documents(Protocol):
    """What a loader reads: documents by number. `InMemory` here, `store.Store`, `store.Mixed`."""

    lengths: npt.NDArray[np.int64]  # [n] tokens of each
    joined: Flags  # [n]: which lie in the same row as the one before them
    side: npt.NDArray[np.int8]  # [n]: as Document has it
    trained: int  # positions that a loss may ask about
    verdicts: int  # of those, the ones that say a verdict
    weighed: bool  # whether any document has `weights`

    def __getitem__(self, number: int) -> Document: ...

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that the documents hold, in their order."""
        ...


class InMemory:
    """Documents of a list."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self.lengths = np.array([len(document.tokens) for document in documents], np.int64)
        self.joined = np.array([document.joined for document in documents], np.bool_)
        self.side = np.array([document.side for document in documents], np.int8)
        self.trained = sum(asked_about(document) for document in documents)
        self.verdicts = sum(int(document.verdict.sum()) for document in documents)
        self.weighed = any(document.weights is not None for document in documents)

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
            if document.side or document.joined or document.margin:
                digest.update(struct.pack("<b?d", document.side, document.joined, document.margin))
            if document.classes is not None:
                digest.update(document.classes.astype("<i8").tobytes())
            if document.weights is not None:
                digest.update(document.weights.astype("<f4").tobytes())
        return digest.hexdigest()


def asked_about(document: Document) -> int:
    """Positions of `document` that a loss may ask about: of trained tokens all but the first, which nothing predicts."""
    own = 0 if document.classes is None else int((document.classes != IGNORED).sum())
    return own + int((document.labels[1:] != IGNORED).sum())


def weighed(document: Document, weights: npt.NDArray[np.float64], where: str) -> Document:
    """`document`, its tokens with these weights `[t]`: those of weight 0 are not trained; where all others have 1, there is no column.

    Raises:
        MegamodError: a token that would count more than a batch can say.
    """
    most = float(weights[document.labels != IGNORED].max(initial=0.0)) * document.weight
    if not most <= LARGEST_WEIGHT:
        raise MegamodError(f"{where}: a token's weights multiply to {most:g}: at most {LARGEST_WEIGHT:g} was expected")
    with np.errstate(over="ignore"):  # of tokens that are not trained
        kept = weights.astype(np.float32)
    trained = (document.labels != IGNORED) & (kept > 0)
    return replace(
        document,
        labels=np.where(trained, document.labels, IGNORED),
        verdict=document.verdict & (trained | (document.labels == IGNORED)),
        weights=np.where(trained, kept, np.float32(1)) if (kept[trained] != 1).any() else None,
    )


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
        ("data.row_length", longest, longest >= (least := 4 if cfg.pairs else 2), f"at least {least} for synthetic documents"),
        ("data.train.documents", cfg.documents, not (cfg.pairs and cfg.documents % 2), "an even number, for pairs"),
    ):
        if not fits:
            raise MegamodError(f"{key} = {value}: must be {expected}")
    rng = np.random.Generator(np.random.PCG64(seed))
    mu = math.log(cfg.mean_length) - cfg.sigma**2 / 2  # a log-normal's mean is exp(mu + sigma²/2)
    longest = longest // 2 if cfg.pairs else longest  # a pair fits into a row
    lengths = np.clip(np.rint(rng.lognormal(mu, cfg.sigma, cfg.documents)), 2, longest).astype(np.int64)
    documents: list[Document] = []
    for number, length in enumerate(lengths.tolist()):
        tokens = rng.integers(vocab, size=length, dtype=np.int32)
        trained = max(1, round(cfg.labelled * length))
        first = length - trained
        labels = np.full(length, IGNORED, dtype=np.int64)
        labels[first:] = tokens[first:]
        verdict = np.zeros(length, dtype=np.bool_)
        verdict[first : first + max(1, trained // 4)] = True
        is_worse = cfg.pairs and number % 2 == 1
        if is_worse:  # to the prompt of the better one, as far as it goes
            shared = min(first, int((documents[-1].labels == IGNORED).sum()))
            tokens[:shared] = documents[-1].tokens[:shared]
        documents.append(Document(tokens, labels, verdict, side=(-1 if is_worse else 1) if cfg.pairs else 0, joined=is_worse))
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
    made = Document(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int64), np.array(verdict, dtype=np.bool_), float(weight))
    if "weights" not in record:
        return made
    weights = _column(record, "weights", {int, float}, "numbers", where)
    for i, one in enumerate(weights):
        if not 0 <= one <= LARGEST_WEIGHT:
            raise MegamodError(f"{where}: weights[{i}] = {reprlib.repr(one)}: a finite number of at least 0 was expected")
    return weighed(made, np.array(weights, dtype=np.float64), where)


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
