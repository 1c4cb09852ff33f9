"""From documents to a rank's micro-batches: one global order of rows, of which each data-parallel rank takes its part."""

import heapq
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megamod.batch import Batch
from megamod.config import RunConfig
from megamod.data.documents import IGNORED, Document, Documents
from megamod.data.packing import attention_costs, grouped, micro_batch, pack
from megamod.data.store import MANIFEST, open_documents, prepare_all
from megamod.errors import MegamodError
from megamod.model.shape import Shape


def deal(costs: npt.NDArray[np.int64], hands: int) -> list[list[int]]:
    """Deals n things to hands of n / hands each, so that the hands cost much the same; a function of its arguments alone.

    The costliest first, each to the hand that has cost least so far and is not full; of equal hands the first. Ranks wait for the
    slowest at a step's end, so the costliest hand is what counts.

    Args:
        costs: [n], n a multiple of `hands`.

    Returns:
        Indices of each hand's things, ascending; hands in the order of their first things.
    """
    size = len(costs) // hands
    dealt: list[list[int]] = [[] for _ in range(hands)]
    open_hands = [(0, hand) for hand in range(hands)]  # (cost so far, hand), a heap
    for thing in np.argsort(-costs, kind="stable").tolist():
        cost, hand = heapq.heappop(open_hands)
        dealt[hand].append(thing)
        if len(dealt[hand]) < size:
            heapq.heappush(open_hands, (cost + int(costs[thing]), hand))
    return sorted(sorted(hand) for hand in dealt)


class Loader:
    """Packs the documents once; then `step(n)` is a function of n alone, so to resume is to ask for the next step.

    Every epoch has the same rows in an order of its own, drawn from (seed, epoch). Epochs follow each other without a gap: a
    step takes the next `rows_per_step` rows of that stream, from two epochs where it crosses their border.

    Rows have the same number of tokens, but attention costs the sum of their documents' squared lengths. So a step's rows are
    dealt to micro-batches that cost much the same (a pipeline's stages wait for each other at every one), and these to the
    data-parallel ranks (which wait at the step's end). A step's micro-batches do not depend on the grid, which decides only which
    rank reads which of them.

    Args:
        documents: the same on every rank.
        row_length: tokens in a row; micro-batches have row_length · rows_per_micro_batch tokens.
        rows_per_step: rows of the global batch.
        rows_per_micro_batch: rows of a micro-batch.
        seed: of the rows' order.
        dp_rank: this data-parallel rank, of `dp_size`.
        dp_size: data-parallel ranks; each has as many micro-batches of a step.

    Attributes:
        rows: how many packed rows there are; one epoch.
        utilisation: the share of their positions that documents fill; the rest is padding.

    Raises:
        MegamodError: no documents, one longer than a row, or a step that does not divide over micro-batches and ranks.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        row_length: int,
        rows_per_step: int,
        rows_per_micro_batch: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        if not len(documents.lengths):
            raise MegamodError("data.train: no documents: at least one was expected")
        if rows_per_step % (rows_per_micro_batch * dp_size):  # every rank has as many micro-batches, all of one size
            raise MegamodError(
                f"data.rows_per_step = {rows_per_step} cannot be shared by {dp_size} data-parallel ranks in micro-batches of "
                f"{rows_per_micro_batch} rows: use a multiple of {rows_per_micro_batch * dp_size}"
            )
        self._documents = documents
        self._row_length = row_length
        self._rows_per_step = rows_per_step
        self._rows_per_micro_batch = rows_per_micro_batch
        self._seed = seed
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        groups = grouped(documents.joined)  # a pair's two halves lie in one row
        self._packed = pack(groups.sums(documents.lengths), row_length).of(groups)
        self._costs = attention_costs(self._packed, documents.lengths, row_length)  # [rows]
        self.rows = len(self._packed)
        self.utilisation = int(documents.lengths.sum()) / (self.rows * row_length)

    def step(self, number: int) -> list[Batch]:
        """This rank's micro-batches of global step `number`, which counts from 0; they, and rows in them, in the stream's order."""
        rows = self._stream(number * self._rows_per_step, self._rows_per_step)
        costs = self._costs[rows]
        groups = deal(costs, len(rows) // self._rows_per_micro_batch)
        mine = deal(np.array([costs[group].sum() for group in groups]), self._dp_size)[self._dp_rank]
        return [replace(self._micro_batch([int(rows[at]) for at in groups[j]]), seed=self._drawn(number, j)) for j in mine]

    def mismatched(self, number: int, multiple: int = 1) -> list[Batch]:
        """This rank's micro-batches of step `number`'s prompts, each with the answer of the row before it: what KTO's KL is taken from.

        An answer begins at a document's first trained token; a pair's two answers come from the pair before. Which answer follows which
        prompt does not depend on the grid. A prompt that leaves no room for the answer loses its first tokens.

        Args:
            multiple: of which the number of micro-batches must be one, for the pipeline; they are filled up with padding.

        Raises:
            MegamodError: a step of fewer than two rated documents: there is no other answer.
        """
        groups: list[list[Document]] = []  # an answer, or the two of a pair, which have one prompt
        for row in self._stream(number * self._rows_per_step, self._rows_per_step).tolist():
            for document in (document for i in self._packed[row].tolist() if (document := self._documents[i]).side):
                groups = [*groups[:-1], [*groups[-1], document]] if document.joined else [*groups, [document]]
        if len(groups) < 2:
            raise MegamodError(
                f"step {number + 1} has rated answers to {len(groups)} prompts, and KTO's KL needs other rows' answers: at least 2 were "
                f"expected: raise data.rows_per_step"
            )
        made = [
            _answered(document, next((other for other in before if other.side == document.side), before[0]), self._row_length)
            for before, group in zip([groups[-1], *groups[:-1]], groups, strict=True)
            for document in group
        ]
        packed = pack([len(document.tokens) for document in made], self._row_length).tolist()
        packed += [[]] * (-len(packed) % (self._rows_per_micro_batch * self._dp_size * multiple))
        parts = [packed[i : i + self._rows_per_micro_batch] for i in range(0, len(packed), self._rows_per_micro_batch)]
        return [micro_batch([[made[i] for i in row] for row in part], self._row_length) for part in parts[self._dp_rank :: self._dp_size]]

    def _micro_batch(self, rows: Sequence[int]) -> Batch:
        return micro_batch([[self._documents[i] for i in self._packed[row].tolist()] for row in rows], self._row_length)

    def _drawn(self, step: int, micro_batch: int) -> int:
        """A seed for a micro-batch: 63 bits of (seed, step, its number in the step)."""
        return int(np.random.SeedSequence([self._seed, step, micro_batch]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _stream(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Rows [first, first + count) of epoch 0's order, epoch 1's, … one after the other."""
        epochs = range(first // self.rows, (first + count - 1) // self.rows + 1)
        skipped = first - epochs.start * self.rows
        return np.concatenate([self._order(epoch) for epoch in epochs])[skipped : skipped + count]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        # Drawn anew for each step: milliseconds for a hundred thousand rows, and there is no state that could be wrong.
        return np.random.default_rng([self._seed, epoch]).permutation(self.rows)


def _answered(asked: Document, other: Document, capacity: int) -> Document:
    """The prompt of `asked` and the answer of `other`, as one document of at most `capacity` tokens."""
    prompt = asked.tokens[: int((asked.labels != IGNORED).argmax())]
    answer = slice(int((other.labels != IGNORED).argmax()), None)
    prompt = prompt[max(0, len(prompt) + len(other.tokens[answer]) - capacity) :]
    tokens = np.concatenate([prompt, other.tokens[answer]])
    labels = np.concatenate([np.full(len(prompt), IGNORED), other.labels[answer]])
    return Document(tokens, labels, np.zeros(len(tokens), np.bool_), other.weight, side=other.side)


def peek(cfg: RunConfig, shape: Shape, step: int) -> list[Batch]:
    """All micro-batches of a run's global step `step`, which counts from 1, as the run has them or would have them.

    Nothing is written: a store that the run has made is read, one that it has not made is made in a temporary directory.

    Args:
        shape: of the run's model.

    Raises:
        MegamodError: a step that the run does not have, or whatever is wrong with its data.
    """
    if not 1 <= step <= cfg.steps:
        raise MegamodError(f"--step {step}: a step from 1 to {cfg.steps} was expected")
    d = cfg.data
    with tempfile.TemporaryDirectory(prefix="megamod-") as folder:
        for store in Path(cfg.dir, "data").glob(f"*/{MANIFEST}"):
            Path(folder, store.parent.name).symlink_to(store.parent.resolve(), target_is_directory=True)
        stores = prepare_all(d, cfg.model.path, shape.vocab, folder, shape.score)
        documents = open_documents(d, [store.path for store in stores], shape.vocab, cfg.seed)
        loader = Loader(
            documents, row_length=d.row_length, rows_per_step=d.rows_per_step, rows_per_micro_batch=d.rows_per_micro_batch,
            seed=cfg.seed, dp_rank=0, dp_size=1,
        )  # fmt: skip
        return loader.step(step - 1)
