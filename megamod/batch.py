"""A micro-batch: packed tokens, and all that a loss may ask of them.

The model reads the row (`tokens`, `positions`, `lengths`); a loss reads the labelled columns (`labels`, `verdict`, `weight`,
`sequence`, `reference`), `[N]` each, where N counts the labelled positions of this rank. Labels are shifted already: `labels[i]`
is what the model should say after the token at `rows[i]`; with a head of scores it is the set of classes there, as bits.

What is known of whole documents (`side`, `document_weight`) is `[S]`, and of pairs (`pairs`, `margin`) `[P]`, on every rank alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megamod.errors import MegamodError, nearest
from megamod.parallel.collectives import all_sum

Unit = Literal["tokens", "weights", "samples", "pairs", "rated", "chosen"]
UNITS: tuple[Unit, ...] = ("tokens", "weights", "samples", "pairs", "rated", "chosen")
PER_RANK = ("tokens", "weights", "chosen")  # of the labels that lie on this rank; the others are of whole documents
MEANING: Mapping[Unit, str] = {
    "tokens": "labelled tokens",
    "weights": "labelled tokens with a weight",
    "samples": "documents with a label",
    "pairs": "pairs of a better and a worse answer (`chosen` and `rejected`)",
    "rated": "answers that are said to be wanted or unwanted",
    "chosen": "labelled tokens of wanted answers with a weight",
}


@dataclass(frozen=True)
class Mean:
    """A metric on its way to a mean: sums and counts are added over micro-batches and ranks, and divided once, at the end."""

    sum: Tensor
    count: Tensor


class Answers(NamedTuple):
    """All documents of a step, wherever they lie, as the model saw them before the training pass: Z of them, and Q pairs. No gradient."""

    logps: Tensor  # [Z] log π of each document's labels
    reference: Tensor  # [Z] log π_ref
    side: Tensor  # [Z] as in Batch
    weight: Tensor  # [Z] as `document_weight`
    pairs: Tensor  # [2, Q] as in Batch
    mine: slice  # which of the pairs are the micro-batch's

    def of_pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[Z]` → `[Q]` and `[Q]`, as of a Batch."""
        return x[self.pairs[0]], x[self.pairs[1]]

    def to(self, device: torch.device) -> "Answers":
        """The same with its tensors on `device`."""
        logps, reference, side, weight, pairs = (x.to(device) for x in self[:5])
        return Answers(logps, reference, side, weight, pairs, self.mine)

    @staticmethod
    def joined(parts: Sequence["Answers"]) -> list["Answers"]:
        """Those of all of a step's micro-batches, for each of these."""
        documents, pairs = [0], [0]
        for part in parts:
            documents.append(documents[-1] + len(part.side))
            pairs.append(pairs[-1] + part.pairs.shape[1])
        logps, reference, side, weight = (torch.cat(column) for column in list(zip(*parts, strict=True))[:4])
        of_step = torch.cat([part.pairs + first for part, first in zip(parts, documents, strict=False)], 1)
        return [Answers(logps, reference, side, weight, of_step, slice(*pairs[i : i + 2])) for i in range(len(parts))]


@dataclass(frozen=True)
class Batch:
    """`T` tokens of `S` documents back to back, P pairs among them; `N` of the positions are labelled.

    Built on the host with `cp_rank` 0 of 1; `slice` gives a context-parallel rank its stretch of the row, `to` moves it.
    """

    tokens: Tensor  # [T] of the row, [T/cp] after `slice`
    positions: Tensor  # [T] int64: 0, 1, … from the start of each document; [3, T] with mRoPE. The whole row's, also after `slice`
    lengths: tuple[int, ...]  # S document lengths, which sum to T
    rows: Tensor  # [N] int64: where the labelled positions are in `tokens`
    labels: Tensor  # [N] int64: the token to be predicted there; with a head of scores, the classes that hold there, as bits
    verdict: Tensor  # [N] bool: whether that token belongs to the verdict
    weight: Tensor  # [N] float: the weight of that token: its document's, times its own where the data gives it one
    sequence: Tensor  # [N] int64: which document it belongs to
    document_weight: Tensor = None  # type: ignore[assignment]  # [S] float; left out: 1
    side: Tensor = None  # type: ignore[assignment]  # [S] int64: 1 a wanted answer, -1 an unwanted one, 0 neither; left out: 0
    pairs: Tensor = None  # type: ignore[assignment]  # [2, P] int64: the better and the worse document of each pair; left out: none
    margin: Tensor = None  # type: ignore[assignment]  # [P] float: by how much the better one is better; left out: 0
    stored: Tensor | None = None  # [N] float: the reference model's log-probabilities of `labels`; None: read `reference`
    taught: Tensor | None = None  # [N, K, 2] float: a teacher's K largest log-probabilities and their tokens' ids; None: read `teacher`
    divergence: Tensor | None = None  # scalar: KTO's KL over the whole step; None: read `kl`
    answers: Answers | None = None  # of the whole step; None: read `step`
    share: Tensor | None = None  # [N] float: how much of a position `per_sequence` counts; None: all
    totals: Mapping[Unit, float] = field(default_factory=dict)  # unit → its count in the whole step; none: this batch is the step
    cp: dist.ProcessGroup | None = None  # the ranks that share the row
    of_row: Tensor | None = None  # [S] bool: `labelled` of the whole row, after `slice`
    numbered: Tensor | None = None  # [N] int64: `ordinal` as the whole row has it, after `slice`
    seed: int = 0  # of what is drawn at random for this micro-batch: the same on every grid

    def __post_init__(self) -> None:
        left_out = {
            "document_weight": lambda: torch.ones(self.sequences, dtype=self.weight.dtype, device=self.weight.device),
            "side": lambda: torch.zeros(self.sequences, dtype=torch.long, device=self.rows.device),
            "pairs": lambda: torch.zeros(2, 0, dtype=torch.long, device=self.rows.device),
            "margin": lambda: self.weight.new_zeros(self.pairs.shape[1]),
        }
        for name, make in left_out.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, make())

    @property
    def sequences(self) -> int:
        """S."""
        return len(self.lengths)

    @property
    def labelled(self) -> Tensor:
        """`[S]` bool: which documents have a label, wherever in the row's ranks it lies."""
        if self.of_row is not None:
            return self.of_row
        return torch.zeros(self.sequences, dtype=torch.bool, device=self.sequence.device).index_fill(0, self.sequence, True)

    @property
    def ordinal(self) -> Tensor:
        """`[N]` int64: the number, from 0, of each labelled position among its document's, wherever in the row's ranks these lie."""
        if self.numbered is not None:
            return self.numbered
        return torch.arange(len(self.sequence), device=self.sequence.device) - torch.searchsorted(self.sequence, self.sequence)

    @property
    def reference(self) -> Tensor:
        """`[N]` log-probabilities of `labels` under the reference model. Raises MegamodError where the loss is not marked as needing it."""
        if self.stored is None:
            raise MegamodError('the loss reads batch.reference: mark it with @losses.needs("reference")')
        return self.stored

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        """`[N, K]` and `[N, K]`: the tokens that a teacher finds most probable, and its log-probabilities. Raises as `reference` does."""
        if self.taught is None:
            raise MegamodError('the loss reads batch.teacher: mark it with @losses.needs("teacher")')
        return self.taught[..., 1].long(), self.taught[..., 0]

    @property
    def kl(self) -> Tensor:
        """KTO's estimate of KL(model ‖ reference) over the whole step, a scalar ≥ 0 without a gradient. Raises as `reference` does."""
        if self.divergence is None:
            raise MegamodError('the loss reads batch.kl: mark it with @losses.needs("reference", "kl")')
        return self.divergence

    @property
    def step(self) -> Answers:
        """All of the step's answers, of which a loss takes what it shall know of the whole step. Raises as `reference` does."""
        if self.answers is None:
            raise MegamodError('the loss reads batch.step: mark it with @losses.needs("reference", "step")')
        return self.answers

    @property
    def sizes(self) -> Tensor:
        """`[S]` how many labelled positions each document has, wherever in the row's ranks they lie."""
        return replace(self, share=None).per_sequence(torch.ones_like(self.sequence))

    def alone(self, logprob: Tensor) -> Answers:
        """What `step` is where this micro-batch is the whole step. `logprob`: `[N]` log π of the labels before the training pass."""
        logps, reference = (self.per_sequence(x.detach()) for x in (logprob, self.reference))
        return Answers(logps, reference, self.side, self.document_weight, self.pairs, slice(0, self.pairs.shape[1]))

    def counts(self) -> dict[Unit, Tensor]:
        """How much of each unit this micro-batch holds; summed over the step and the data-parallel ranks they are `totals`.

        Read on the whole row, before `slice`. Documents and pairs count with the weight that the data gives them.
        """
        weight = self.document_weight.double()
        return {
            "tokens": torch.tensor(float(len(self.labels)), dtype=torch.float64),
            "weights": self.weight.double().sum(),
            "samples": weight[self.labelled].sum(),
            "pairs": weight[self.pairs[0]].sum(),
            "rated": weight[self.side != 0].sum(),
            "chosen": self.weight[self.side[self.sequence] == 1].double().sum(),
        }

    def slice(self, rank: int, size: int, group: dist.ProcessGroup | None) -> "Batch":
        """The stretch of context-parallel rank `rank` of `size`: its tokens and the labels that lie on them."""
        if size == 1:
            return self
        width = len(self.tokens) // size
        assert width * size == len(self.tokens), "the rows were checked against the grid: parallel.grid.check_rows"
        first = rank * width
        mine = (self.rows >= first) & (self.rows < first + width)
        labelled = ("labels", "verdict", "weight", "sequence", "stored", "taught", "share")
        columns: dict[str, Any] = {name: value[mine] for name, value in self._tensors() if name in labelled}
        return replace(
            self,
            tokens=self.tokens[first : first + width],
            rows=self.rows[mine] - first,
            cp=group,
            of_row=self.labelled,
            numbered=self.ordinal[mine],
            **columns,
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in self._tensors()}
        return replace(self, **moved, answers=None if self.answers is None else self.answers.to(device))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(f.name, value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)]

    def mean(self, x: Tensor, over: Unit) -> Tensor:
        """This micro-batch's share of a mean over the whole step: `x.sum()` ÷ the global count of `over`.

        The count is known from the data before the forward pass, so means of different units can be added, and micro-batch
        size, packing, padding, data and context parallelism cannot change a loss.

        Args:
            x: `[N]` for tokens, for weights and chosen (`batch.weight` times something; for chosen 0 where the document is not
                wanted); `[S]` for samples and rated, as `per_sequence` gives it; `[P]` for pairs, as `of_pairs` gives it.
            over: tokens — labelled positions; weights — the sum of their weights; chosen — that of wanted answers' positions;
                samples — documents with a label; rated — those that are wanted or unwanted; pairs. Of documents and pairs each
                counts with its weight; those that are not counted do not contribute.

        Raises:
            MegamodError: no such unit, or the whole step has none of it.
        """
        if over not in UNITS:
            raise MegamodError(f"batch.mean(over={over!r}): {nearest(over, UNITS)}")
        assert self.totals or self.cp is None, "the step's counts are taken from whole rows: step.with_totals"
        total = float((self.totals or self.counts())[over])
        if not total > 0:
            raise MegamodError(f"a mean over {over!r}, and the step has no {MEANING[over]}: more rows in a step may have some")
        if over in PER_RANK:
            return x.sum() / total
        # Context-parallel ranks hold the same documents, and the objective is the sum over them.
        return (x * self._shares(over).to(x.dtype)).sum() / (total * (self.cp.size() if self.cp is not None else 1))

    def _shares(self, over: Unit) -> Tensor:
        """The weight with which each document `[S]`, or pair `[P]`, counts."""
        if over == "pairs":
            return self.document_weight[self.pairs[0]]
        return torch.where(self.side != 0 if over == "rated" else self.labelled, self.document_weight, 0.0)

    def per_sequence(self, x: Tensor) -> Tensor:
        """`[N]` → `[S]`: the sum of `x` over each document's labelled positions, wherever in the row's ranks they lie."""
        x = x if self.share is None else x * self.share.to(x.dtype)
        return all_sum(x.new_zeros(self.sequences).index_add(0, self.sequence, x), self.cp)

    def of_pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[S]` → `[P]` and `[P]`: `x` of each pair's better and of its worse document."""
        return x[self.pairs[0]], x[self.pairs[1]]

    def classes(self, number: int) -> Tensor:
        """`[N, number]` 0 or 1, int64: which of a head's `number` classes hold at each labelled position."""
        return self.labels[:, None] >> torch.arange(number, device=self.labels.device) & 1

    def mean_of(self, x: Tensor, where: Tensor | None = None) -> Mean:
        """A metric: the mean of `x` over the whole step, or over the elements that the mask `where` keeps, such as `labelled` of `[S]`."""
        kept = torch.ones_like(x, dtype=torch.bool) if where is None else where
        return Mean(torch.where(kept, x.detach(), 0).sum(), kept.sum())
