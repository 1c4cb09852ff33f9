"""The losses. Researchers edit this file, or write such a function in their own config.

A loss is a function of a head and a batch. `head` is all that knows how the vocabulary is sharded: `head.logprobs(ids)` are
log-probabilities at the labelled positions. `batch` knows the labels and the global counts. The objective is the sum of what
all micro-batches, data- and context-parallel ranks return, so divide with `batch.mean`, whose denominator is global.

    def my_loss(head: Head, batch: Batch, *, threat: float = 3.0) -> Loss:
        nll = -head.logprobs(batch.labels)
        return Loss(batch.mean(nll * torch.where(batch.verdict, threat, 1.0), over="tokens"), {"nll": batch.mean_of(nll)})

A config chooses one by naming it: `loss=partial(losses.moderation, verdict_weight=6.0)`.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megamod.batch import Batch, Mean
from megamod.model.head import Head


class Loss(NamedTuple):
    """What a loss returns for one micro-batch."""

    value: Tensor  # this rank's share of the objective, a scalar
    metrics: dict[str, Mean]  # reported as sum ÷ count over the whole step; the same names in every micro-batch


class LossFunction(Protocol):
    """Any function of a head and a batch; further parameters are bound by `functools.partial` in the config."""

    def __call__(self, head: Head, batch: Batch) -> Loss: ...


def cross_entropy(head: Head, batch: Batch) -> Loss:
    """Mean over labelled tokens of -log p(y_t), each with the weight that the data gives its document (1 where it gives none)."""
    nll = -head.logprobs(batch.labels)  # [N]
    return Loss(batch.mean(batch.weight * nll, over="weights"), {"nll": batch.mean_of(nll)})


def moderation(head: Head, batch: Batch, *, verdict_weight: float = 4.0) -> Loss:
    """Cross-entropy with the verdict's tokens weighted: mean over labelled tokens of w_t · -log p(y_t).

    Documents count with the weight that the data gives them, as in `cross_entropy`.

    Args:
        verdict_weight: w_t of the tokens that say the verdict; the reason's tokens have 1.
    """
    nll = -head.logprobs(batch.labels)  # [N]
    weight = torch.where(batch.verdict, verdict_weight, 1.0) * batch.weight
    value = batch.mean(weight * nll, over="weights")
    return Loss(value, {"nll": batch.mean_of(nll), "nll/verdict": batch.mean_of(nll, where=batch.verdict)})
