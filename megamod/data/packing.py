"""Documents into rows, rows into a batch. Labels are shifted here, once."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch

from megamod.batch import Batch
from megamod.data.documents import IGNORED, Document
from megamod.errors import MegamodError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing: the longest document first, each into the fullest row that still holds it, else into a new row.

    Of documents of one length the first comes first; of rows with the same room the one that came to it last is taken. So the
    result depends on the arguments alone. O(n log n) besides moving at most `capacity` small integers a document.

    Args:
        lengths: tokens of each document.
        capacity: tokens that a row holds.

    Returns:
        Document indices of each row, rows in the order in which they were opened.

    Raises:
        MegamodError: a document that no row holds, or one without tokens.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room → the rows that have it left, a stack; full rows are in none
    rooms: list[int] = []  # the keys of `with_room`, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise MegamodError(f"document {index} has {length} tokens, but a row holds {capacity}: raise data.row_length to {length}")
        if length < 1:
            raise MegamodError(f"document {index} has {length} tokens: at least 1 was expected")
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(index)
        room -= length
        if room:
            if room not in with_room:
                insort(rooms, room)
            with_room.setdefault(room, []).append(row)
    return rows


def micro_batch(rows: Sequence[Sequence[Document]], capacity: int, pad_id: int = 0) -> Batch:
    """One or more rows of documents as one packed batch on the CPU, each row filled up to `capacity` tokens.

    What is left of a row is one document of `pad_id` without labels, with its own entry in `lengths`. A position is labelled
    when the next token of the same document is trained: a document's first token is never predicted, and its last position
    predicts nothing, whatever follows in the row.

    Returns:
        A batch of T = len(rows) · capacity tokens; `weight` is float32, ids are int64.

    Raises:
        MegamodError: a row of more than `capacity` tokens.
    """
    documents: list[Document] = []
    for number, row in enumerate(rows):
        rest = capacity - sum(len(document.tokens) for document in row)
        if rest < 0:
            raise MegamodError(f"row {number} has {capacity - rest} tokens, but holds {capacity}: rows are made by packing.pack")
        documents.extend(row)
        if rest:
            documents.append(_padding(rest, pad_id))

    lengths = np.array([len(document.tokens) for document in documents])  # [S]
    ends = np.cumsum(lengths)  # [S]
    sequence = np.repeat(np.arange(len(lengths)), lengths)  # [T]
    tokens = np.concatenate([document.tokens for document in documents]).astype(np.int64)  # [T]
    verdict = np.concatenate([document.verdict for document in documents])  # [T]
    labels = np.concatenate([document.labels for document in documents]).astype(np.int64)  # [T]
    target = np.roll(labels, -1)  # [T]: what follows each position …
    target[ends - 1] = IGNORED  # … but not the next document's first token
    labelled = np.flatnonzero(target != IGNORED)  # [N]
    weight = np.array([document.weight for document in documents], dtype=np.float32)  # [S]
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.arange(len(tokens)) - (ends - lengths)[sequence]),
        lengths=tuple(lengths.tolist()),
        rows=torch.from_numpy(labelled),
        labels=torch.from_numpy(target[labelled]),
        verdict=torch.from_numpy(verdict[labelled + 1]),
        weight=torch.from_numpy(weight[sequence[labelled]]),
        sequence=torch.from_numpy(sequence[labelled]),
    )


def _padding(length: int, pad_id: int) -> Document:
    return Document(np.full(length, pad_id, dtype=np.int64), np.full(length, IGNORED, dtype=np.int64), np.zeros(length, dtype=np.bool_))
