"""Documents into rows, rows into a batch. Labels are shifted here, once."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, TypedDict, overload

import numpy as np
import numpy.typing as npt
import torch

from megamod.batch import Batch
from megamod.data.documents import IGNORED, Document, Integers
from megamod.errors import MegamodError

Indices = npt.NDArray[np.int64]

# Rows that look alike, by their numbers: first, first + step, …, `count` of them, each with `held` documents. The first is the next
# to be filled. Tuples, since packing is little else than making and unmaking them.
_Run = tuple[int, int, int, int]  # (first, step, count, held)
_Placement = tuple[int, int, int, int, int]  # a run before documents came, and how many came to each of its rows


@dataclass(frozen=True, eq=False)  # eq=False: arrays have no single truth value
class Rows(Sequence[Indices]):
    """Which documents each row holds: `rows[r]` is an array of their indices, a view; a slice is `Rows` of its own."""

    order: Indices  # [N]: documents, row after row
    starts: Indices  # [R + 1]: row r is order[starts[r] : starts[r + 1]]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Indices: ...

    @overload
    def __getitem__(self, index: slice) -> "Rows": ...

    def __getitem__(self, index: int | slice) -> "Indices | Rows":
        which = range(len(self))[index]
        if isinstance(which, int):
            return self.order[self.starts[which] : self.starts[which + 1]]
        return self.take(np.arange(which.start, which.stop, which.step))

    def __iter__(self) -> Iterator[Indices]:
        return (self.order[start:stop] for start, stop in pairwise(self.starts.tolist()))

    def take(self, which: Indices) -> "Rows":
        """The rows of these numbers, in this order."""
        begin, sizes = self.starts[which], np.diff(self.starts)[which]  # [R'] each
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        return Rows(self.order[np.repeat(begin - starts[:-1], sizes) + np.arange(starts[-1])], starts)

    def of(self, groups: "Rows") -> "Rows":
        """The rows of what is in groups, where these are rows of groups: `groups[g]` in place of g."""
        taken = groups.take(self.order)
        return Rows(taken.order, taken.starts[self.starts])

    def tolist(self) -> list[list[int]]:
        """As lists of integers."""
        order = self.order.tolist()
        return [order[start:stop] for start, stop in pairwise(self.starts.tolist())]

    def sums(self, values: Indices) -> Indices:
        """[R] Each row's sum of its documents' `values` [N]. Every row of `pack` holds a document, which this relies on."""
        return np.add.reduceat(values[self.order], self.starts[:-1]) if len(self) else np.zeros(0, np.int64)


def grouped(joined: npt.NDArray[np.bool_]) -> Rows:
    """Documents in groups that stay together: a document that is `joined` [N] belongs to the one before it."""
    return Rows(np.arange(len(joined)), np.append(np.flatnonzero(~joined), len(joined)))


def pack(lengths: Sequence[int] | Integers, capacity: int) -> Rows:
    """Best fit decreasing: the longest document first, each into the fullest row that still holds it, else into a new row.

    Of documents of one length the first comes first; of rows with the same room the one that came to it last is taken. So the
    result depends on the arguments alone.

    Rows with the same room differ in nothing that the rule asks about, so as many documents of one length as such rows take are
    placed at once. What Python counts are therefore runs of equal rows: their number follows from how many different lengths
    there are, some thousands, whether the documents are a thousand or a million. numpy then says which document lies where.

    Args:
        lengths: [N] tokens of each document; an array spares a copy.
        capacity: tokens that a row holds.

    Returns:
        Document indices of each row, rows in the order in which they were opened, documents in that in which they were placed.

    Raises:
        MegamodError: a document that no row holds, or one without tokens.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    _check(tokens, capacity, first=0)
    if not len(tokens):
        return Rows(np.zeros(0, np.int64), np.zeros(1, np.int64))
    histogram = np.bincount(tokens)  # no longer than a row, which will lie in memory too
    different = np.flatnonzero(histogram)[::-1]  # [D] lengths, falling
    placements, filled = _place(different.tolist(), histogram[different].tolist(), capacity)
    first, step, count, held, copies = np.array(placements, np.int64).T  # [P]
    lowest, rows, holds = np.array([(min(f, f + s * (n - 1)), n, h) for f, s, n, h in filled], np.int64).T
    by_number = np.argsort(lowest)
    starts = np.concatenate([[0], np.cumsum(np.repeat(holds[by_number], rows[by_number]))])  # [R + 1]

    # A visit is one row of a placement: `each` documents, taken from the longest first, into the places of row `row` that follow the
    # `held` ones it has.
    visits = np.cumsum(count)
    row = np.repeat(first - step * (visits - count), count)  # [U] for U visits
    row += np.repeat(step, count) * np.arange(len(row))
    each = np.repeat(copies, count)  # [U]
    shift = starts[row]  # [U]: from a document's turn to its place
    shift += np.repeat(held, count)
    shift -= np.cumsum(each) - each
    place = np.repeat(shift, each)  # [N]
    place += np.arange(len(place))
    order = np.empty_like(place)
    order[place] = _longest_first(tokens)
    return Rows(order, starts)


def _check(lengths: Indices, capacity: int, first: int) -> None:
    """Raises MegamodError for the first of the documents `first`, `first` + 1, … that has no tokens, or too many for a row."""
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        at = int(((lengths < 1) | (lengths > capacity)).argmax())
        index, length = first + at, int(lengths[at])
        if length < 1:
            raise MegamodError(f"document {index} has {length} tokens: at least 1 was expected")
        raise MegamodError(f"document {index} has {length} tokens, but a row holds {capacity}: raise data.row_length to {length}")


def _longest_first(lengths: Indices) -> Indices:
    """[N] indices, a stable order. By digits of 16 bits, which numpy sorts by radix: several times as fast as wider integers."""
    keys = lengths.max() - lengths
    order: Indices = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(16, int(keys.max()).bit_length(), 16):
        order = order[np.argsort((keys >> shift & 0xFFFF).astype(np.uint16)[order], kind="stable")]
    return order


def _place(lengths: Sequence[int], counts: Sequence[int], capacity: int) -> tuple[list[_Placement], list[_Run]]:
    """Best fit decreasing of a histogram.

    Args:
        lengths: [D] the different lengths, falling.
        counts: [D] documents of each.

    Returns:
        The placements in the order in which documents are taken, and the runs of all rows as they are at the end.
    """
    runs: dict[int, list[_Run]] = {}  # room → the rows that have it left, a stack of runs; full rows are in none
    rooms: list[int] = []  # the keys of `runs`, ascending
    placements: list[_Placement] = []
    full: list[_Run] = []
    opened = 0
    for length, count in zip(lengths, counts, strict=True):
        at = emptied = bisect_left(rooms, length)
        moved: list[tuple[int, _Run]] = []
        while count:
            if emptied < len(rooms):
                room = rooms[emptied]
                copies = room // length  # a row that takes one is the fullest that holds the next: it is filled up first
                stack = runs[room]
            else:
                room = capacity
                copies = room // length
                new = -(-count // copies)
                stack = [(opened, 1, new, 0)]
                opened += new
            while count and stack:
                first, step, rows, held = stack.pop()
                whole = min(rows, count // copies)
                if whole:
                    placements.append((first, step, whole, held, copies))
                    # The row that was filled last is the next to be filled: the run turns round.
                    moved.append((room - copies * length, (first + step * (whole - 1), -step, whole, held + copies)))
                    count -= whole * copies
                if whole < rows:  # the last documents of this length, fewer than fill a row up
                    if count:
                        placements.append((first + step * whole, step, 1, held, count))
                        moved.append((room - count * length, (first + step * whole, step, 1, held + count)))
                        whole += 1
                        count = 0
                    if whole < rows:
                        stack.append((first + step * whole, step, rows - whole, held))
            if not stack and room < capacity:
                del runs[room]
                emptied += 1
        del rooms[at:emptied]
        for room, run in moved:
            if not room:
                full.append(run)
            elif room in runs:
                runs[room].append(run)
            else:
                runs[room] = [run]
                insort(rooms, room)
    return placements, [*full, *(run for stack in runs.values() for run in stack)]


def attention_costs(rows: Rows, lengths: Integers, capacity: int) -> Indices:
    """[R] Σ length² over each row's documents: what attention costs. What is left of a row is a document, as in `micro_batch`."""
    tokens = np.asarray(lengths, dtype=np.int64)
    return rows.sums(tokens**2) + (capacity - rows.sums(tokens)) ** 2


class PackState(TypedDict):
    """Where a `StreamPacker` stands, as JSON."""

    read: int  # documents read from the stream
    due: int  # rows still to come of the buffer that was packed last
    held: list[tuple[int, int]]  # (index in the stream, tokens) of each document that was read and is in no row yet, ascending


class StreamPacker(Iterator[Indices]):
    """Rows of a stream that cannot be read whole: at most `look_ahead` documents are read and not yet in a row.

    A buffer is filled and packed by `pack`. Rows without room leave, the fullest half of all at least; the documents of the others
    stay, and wait for short ones that fill them up. After the stream's end all rows leave, in the order of `pack`: a stream of
    fewer than `look_ahead` documents has the rows of `pack`, one for one.

    Between any two rows `state` is all there is to know: `StreamPacker(rest, capacity, look_ahead, state)`, where `rest` is the
    stream from document `state["read"]` on, goes on with the row that would have been next. That the buffer's packing need not
    be kept is a property of best fit decreasing: without some of its rows, their documents gone, the others are the same.

    Args:
        lengths: tokens of each document, read as far as needed.
        capacity: tokens that a row holds.
        look_ahead: documents held, at most.
        state: of a packer with the same `capacity` and `look_ahead`, also after a detour through JSON; None: from the start.

    Yields:
        Indices of each row's documents, in the stream. Every document once.

    Raises:
        MegamodError: `look_ahead` below 1, a state that no such packer was in; on the way, what `pack` refuses.
    """

    def __init__(self, lengths: Iterable[int], capacity: int, look_ahead: int, state: PackState | None = None) -> None:
        if look_ahead < 1:
            raise MegamodError(f"look_ahead = {look_ahead}: at least 1 document was expected")
        self._stream = iter(lengths)
        self._capacity = capacity
        self._look_ahead = look_ahead
        state = state or PackState(read=0, due=0, held=[])
        self._read = state["read"]
        held = np.array(state["held"], dtype=np.int64).reshape(-1, 2)
        self._held, self._lengths = held[:, 0], held[:, 1]  # [n] documents of the buffer, ascending in the stream
        self._gone = np.zeros(len(held), np.bool_)  # [n]: left in a row
        self._leaving: Iterator[Indices] = iter(())  # rows of the buffer that have not left yet …
        self._due = 0  # … and how many these are
        self._ended = False
        if (
            len(held) > look_ahead
            or (np.diff(self._held, prepend=-1, append=self._read) < 1).any()
            or ((self._lengths < 1) | (self._lengths > capacity)).any()
            or not 0 <= state["due"] <= len(held)
        ):
            raise MegamodError(
                f"a state with {self._read} documents read, {len(held)} of them held, and {state['due']} rows due is none of a packer "
                f"with capacity = {capacity}, look_ahead = {look_ahead}"
            )
        if state["due"]:
            self._pack(state["due"])

    @property
    def state(self) -> PackState:
        """As of the last row that was yielded."""
        stay = ~self._gone
        held = list(zip(self._held[stay].tolist(), self._lengths[stay].tolist(), strict=True))
        return PackState(read=self._read, due=0 if self._ended else self._due, held=held)

    def __next__(self) -> Indices:
        if not self._due:
            self._fill()
            if not len(self._held):
                raise StopIteration
            self._pack()
        row = next(self._leaving)
        self._due -= 1
        self._gone[row] = True
        return self._held[row]

    def _fill(self) -> None:
        """Forgets what has left, and reads as much."""
        stay = ~self._gone
        held, lengths = self._held[stay], self._lengths[stay]
        new = np.fromiter(islice(self._stream, self._look_ahead - len(held)), np.int64)
        _check(new, self._capacity, first=self._read)
        self._held = np.concatenate([held, np.arange(self._read, self._read + len(new))])
        self._lengths = np.concatenate([lengths, new])
        self._gone = np.zeros(len(self._held), np.bool_)
        self._read += len(new)
        self._ended = len(self._held) < self._look_ahead

    def _pack(self, due: int | None = None) -> None:
        """Packs the buffer and says which rows leave: the `due` fullest, all of them after the end; None: as many as the rule says."""
        rows = pack(self._lengths, self._capacity)
        if not self._ended:
            room = self._capacity - rows.sums(self._lengths)
            due = due or max(int((room == 0).sum()), (len(rows) + 1) // 2)
            rows = rows.take(np.argsort(room, kind="stable")[:due])
        self._leaving, self._due = iter(rows), len(rows)


def micro_batch(rows: Sequence[Sequence[Document]], capacity: int, pad_id: int = 0) -> Batch:
    """One or more rows of documents as one packed batch on the CPU, each row filled up to `capacity` tokens.

    What is left of a row is one document of `pad_id` without labels, with its own entry in `lengths`. A position is labelled
    when the next token of the same document is trained: a document's first token is never predicted, and its last position
    predicts nothing, whatever follows in the row. Where a document has classes, they are asked of their own position. A position has
    its document's weight, times that of the token it predicts.

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
    target, verdict = (_shifted(documents, ends, name) for name in ("labels", "verdict"))  # [T] each
    for document, end in zip(documents, ends.tolist(), strict=True):
        if document.classes is not None:
            own = slice(end - len(document.tokens), end)
            target[own] = np.where(document.classes != IGNORED, document.classes, target[own])
    labelled = np.flatnonzero(target != IGNORED)  # [N]
    weight = np.array([document.weight for document in documents], dtype=np.float32)  # [S]
    of_tokens = _beside(documents, labelled, "weights", absent=1.0)
    each = torch.from_numpy(weight[sequence[labelled]])  # [N]
    side = np.array([document.side for document in documents])  # [S]
    joined = np.array([document.joined for document in documents])  # [S]
    better = np.flatnonzero((side[:-1] == 1) & (side[1:] == -1) & joined[1:])  # [P]: the worse one follows
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.arange(len(tokens)) - (ends - lengths)[sequence]),
        lengths=tuple(lengths.tolist()),
        rows=torch.from_numpy(labelled),
        labels=torch.from_numpy(target[labelled].astype(np.int64)),
        verdict=torch.from_numpy(verdict[labelled].astype(np.bool_)),
        weight=each if of_tokens is None else each * of_tokens,
        sequence=torch.from_numpy(sequence[labelled]),
        document_weight=torch.from_numpy(weight),
        side=torch.from_numpy(side),
        pairs=torch.from_numpy(np.stack([better, better + 1])),
        margin=torch.tensor([documents[i].margin for i in better], dtype=torch.float64),
        stored=_beside(documents, labelled, "reference"),
        taught=_beside(documents, labelled, "teacher"),
    )


def _shifted(documents: Sequence[Document], ends: Indices, name: str) -> npt.NDArray[Any]:
    """[T] what column `name` has at the token that follows each position, but for a document's last one: nothing follows it."""
    column = np.concatenate([getattr(document, name) for document in documents])
    shifted = np.roll(column, -1)
    shifted[ends - 1] = IGNORED if name == "labels" else 0
    return shifted


def _beside(documents: Sequence[Document], labelled: Indices, name: str, absent: float = 0.0) -> torch.Tensor | None:
    """[N, …] column `name` at the labelled positions, `absent` where a document has none; None: no document has it."""
    one = next((found for document in documents if (found := getattr(document, name)) is not None), None)
    if one is None:
        return None
    columns = [getattr(d, name) for d in documents]
    nothing = (np.full((len(d.tokens), *one.shape[1:]), absent, np.float32) for d in documents)
    whole = np.concatenate([filled if column is None else column for column, filled in zip(columns, nothing, strict=True)])
    return torch.from_numpy(np.roll(whole, -1, axis=0)[labelled])  # a document's last position is not labelled


def _padding(length: int, pad_id: int) -> Document:
    return Document(np.full(length, pad_id, dtype=np.int64), np.full(length, IGNORED, dtype=np.int64), np.zeros(length, dtype=np.bool_))
