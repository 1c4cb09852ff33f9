"""A micro-batch: packed tokens, and all that a loss may ask of them.

The model reads the row (`tokens`, `positions`, `lengths`); a loss reads the labelled columns (`labels`, `verdict`, `weight`,
`sequence`), `[N]` each, where N counts the labelled positions of this rank. Labels are shifted already: `labels[i]` is what
the model should say after the token at `rows[i]`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megamod.errors import MegamodError, nearest
from megamod.parallel.collectives import all_sum

Unit = Literal["tokens", "weights", "samples"]
UNITS: tuple[Unit, ...] = ("tokens", "weights", "samples")


@dataclass(frozen=True)
class Mean:
    """A metric on its way to a mean: sums and counts are added over micro-batches and ranks, and divided once, at the end."""

    sum: Tensor
    count: Tensor


@dataclass(frozen=True)
class Batch:
    """`T` tokens of `S` documents back to back; `N` of the positions are labelled.

    Built on the host with `cp_rank` 0 of 1; `slice` gives a context-parallel rank its stretch of the row, `to` moves it.
    """

    tokens: Tensor  # [T] of the row, [T/cp] after `slice`
    positions: Tensor  # [T] int64: 0, 1, … from the start of each document; [3, T] with mRoPE. The whole row's, also after `slice`
    lengths: tuple[int, ...]  # S document lengths, which sum to T
    rows: Tensor  # [N] int64: where the labelled positions are in `tokens`
    labels: Tensor  # [N] int64: the token to be predicted there
    verdict: Tensor  # [N] bool: whether that token belongs to the verdict
    weight: Tensor  # [N] float: the weight of that token
    sequence: Tensor  # [N] int64: which document it belongs to
    totals: Mapping[Unit, Tensor] = field(default_factory=dict)  # unit → its count in the whole step; none: this batch is the step
    cp: dist.ProcessGroup | None = None  # the ranks that share the row
    seed: int = 0  # of what is drawn at random for this micro-batch: the same on every grid

    @property
    def sequences(self) -> int:
        """S."""
        return len(self.lengths)

    def counts(self) -> dict[Unit, Tensor]:
        """How much of each unit this micro-batch holds; summed over the step and the data-parallel ranks they are `totals`.

        Read on the whole row, before `slice`.
        """
        return {
            "tokens": torch.tensor(float(len(self.labels)), dtype=torch.float64),
            "weights": self.weight.double().sum(),
            "samples": torch.tensor(float(len(self.sequence.unique())), dtype=torch.float64),
        }

    def slice(self, rank: int, size: int, group: dist.ProcessGroup | None) -> "Batch":
        """The stretch of context-parallel rank `rank` of `size`: its tokens and the labels that lie on them."""
        if size == 1:
            return self
        width = len(self.tokens) // size
        assert width * size == len(self.tokens), "the rows were checked against the grid: parallel.grid.check_rows"
        first = rank * width
        mine = (self.rows >= first) & (self.rows < first + width)
        columns = {name: getattr(self, name)[mine] for name in ("labels", "verdict", "weight", "sequence")}
        return replace(self, tokens=self.tokens[first : first + width], rows=self.rows[mine] - first, cp=group, **columns)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        tensors = ("tokens", "positions", "rows", "labels", "verdict", "weight", "sequence")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in tensors}
        return replace(self, **moved)

    def mean(self, x: Tensor, over: Unit) -> Tensor:
        """This micro-batch's share of a mean over the whole step: `x.sum()` ÷ the global count of `over`.

        The count is known from the data before the forward pass, so means of different units can be added, and micro-batch
        size, packing, padding, data and context parallelism cannot change a loss.

        Args:
            x: `[N]` for tokens and weights (for weights, `batch.weight` times something); `[S]` for samples, as
                `per_sequence` gives it. Samples without a label must contribute 0.
            over: tokens — labelled positions; weights — the sum of their weights; samples — documents with a label.
        """
        if over not in UNITS:
            raise MegamodError(f"batch.mean(over={over!r}): {nearest(over, UNITS)}")
        assert self.totals or self.cp is None, "the step's counts are taken from whole rows: step.with_totals"
        total = (self.totals or self.counts())[over].to(x.dtype)
        share = x.sum() / torch.where(total > 0, total, 1.0)  # a step without any: 0, and zero gradients
        # Context-parallel ranks hold the same `[S]`, and the objective is the sum over them.
        return share / self.cp.size() if over == "samples" and self.cp is not None else share

    def per_sequence(self, x: Tensor) -> Tensor:
        """`[N]` → `[S]`: the sum of `x` over each document's labelled positions, wherever in the row's ranks they lie."""
        return all_sum(x.new_zeros(self.sequences).index_add(0, self.sequence, x), self.cp)

    def mean_of(self, x: Tensor, where: Tensor | None = None) -> Mean:
        """A metric: the mean of `x` over the whole step, or over the elements that the mask `where` keeps."""
        kept = torch.ones_like(x, dtype=torch.bool) if where is None else where
        return Mean(torch.where(kept, x.detach(), 0).sum(), kept.sum())
