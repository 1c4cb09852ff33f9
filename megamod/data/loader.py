"""From documents to a rank's micro-batches: one global order of rows, of which each data-parallel rank takes its part."""

import numpy as np
import numpy.typing as npt

from megamod.batch import Batch
from megamod.data.documents import Documents
from megamod.data.packing import micro_batch, pack
from megamod.errors import MegamodError


class Loader:
    """Packs the documents once; then `step(n)` is a function of n alone, so to resume is to ask for the next step.

    Every epoch has the same rows in an order of its own, drawn from (seed, epoch). Epochs follow each other without a gap: a
    step takes the next `rows_per_step` rows of that stream, from two epochs where it crosses their border. The grid decides
    only which rank reads which of a step's micro-batches.

    Args:
        documents: the same on every rank.
        row_length: tokens in a row; micro-batches have row_length · rows_per_micro_batch tokens.
        rows_per_step: rows of the global batch.
        rows_per_micro_batch: rows of a micro-batch.
        seed: of the rows' order.
        dp_rank: this data-parallel rank, of `dp_size`.
        dp_size: data-parallel ranks; micro-batch j of a step goes to rank j % dp_size.

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
        lengths = documents.lengths.tolist()
        self._packed = pack(lengths, row_length)
        self.rows = len(self._packed)
        self.utilisation = sum(lengths) / (self.rows * row_length)

    def step(self, number: int) -> list[Batch]:
        """This rank's micro-batches of global step `number`, which counts from 0."""
        rows = self._stream(number * self._rows_per_step, self._rows_per_step)
        size, stride = self._rows_per_micro_batch, self._rows_per_micro_batch * self._dp_size
        groups = [rows[first : first + size] for first in range(self._dp_rank * size, len(rows), stride)]
        return [micro_batch([[self._documents[i] for i in self._packed[row]] for row in group], self._row_length) for group in groups]

    def _stream(self, first: int, count: int) -> list[int]:
        """Rows [first, first + count) of epoch 0's order, epoch 1's, … one after the other."""
        epochs = range(first // self.rows, (first + count - 1) // self.rows + 1)
        skipped = first - epochs.start * self.rows
        order: list[int] = np.concatenate([self._order(epoch) for epoch in epochs])[skipped : skipped + count].tolist()
        return order

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        # Drawn anew for each step: milliseconds for a hundred thousand rows, and there is no state that could be wrong.
        return np.random.default_rng([self._seed, epoch]).permutation(self.rows)
