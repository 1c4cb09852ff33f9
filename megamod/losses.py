"""The losses. Researchers edit this file, or write such a function in their own config.

A loss is a function of a head and a batch. `head` is all that knows how the vocabulary is sharded: `head.logprobs(ids)` are
log-probabilities at the labelled positions. `batch` knows the labels and the global counts. The objective is the sum of what
all micro-batches, data- and context-parallel ranks return, so divide with `batch.mean`, whose denominator is global.

    def my_loss(head: Head, batch: Batch, *, threat: float = 3.0) -> Loss:
        nll = -head.logprobs(batch.labels)
        return Loss(batch.mean(nll * torch.where(batch.verdict, threat, 1.0), over="tokens"), {"nll": batch.mean_of(nll)})

A config chooses one by naming it: `loss=partial(losses.moderation, verdict_weight=6.0)`.

What a loss compares with is in the batch too, if it says that it needs it: `batch.reference`, the reference model's
log-probabilities of the same tokens, and `batch.kl`. Where they come from is the config's `reference`, no loss's business.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megamod.batch import Batch, Mean
from megamod.errors import MegamodError
from megamod.model.head import Head
from megamod.verdicts import SEVERITIES

Need = Literal["pairs", "rated", "scores", "reference", "kl"]
Function = TypeVar("Function", bound=Callable[..., Any])


class Loss(NamedTuple):
    """What a loss returns for one micro-batch."""

    value: Tensor  # this rank's share of the objective, a scalar
    metrics: dict[str, Mean]  # reported as sum ÷ count over the whole step; the same names in every micro-batch


class LossFunction(Protocol):
    """Any function of a head and a batch; further parameters are bound by `functools.partial` in the config."""

    def __call__(self, head: Head, batch: Batch) -> Loss: ...


def needs(*what: Need) -> Callable[[Function], Function]:
    """Marks what a loss needs beside labels.

    Of the data: "pairs" of a better and a worse answer, or "rated" answers, wanted and unwanted; other losses refuse unwanted answers.
    Of the model: "scores", a head of them. Of a pass before the training pass: "reference", which it reads as `batch.reference`, and
    "kl", as `batch.kl`.

    @needs("pairs", "reference")
    def my_dpo(head: Head, batch: Batch) -> Loss: ...
    """

    def mark(function: Function) -> Function:
        function.needs = frozenset((*what, *["reference"] * ("kl" in what)))  # type: ignore[attr-defined]
        return function

    return mark


def needs_of(loss: Callable[..., Any]) -> frozenset[Need]:
    """What `loss` was marked with; nothing where it was not."""
    return getattr(unbound(loss)[0], "needs", frozenset())


def unbound(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What `functools.partial`s are partials of, and the keywords that they bind."""
    bound: dict[str, Any] = {}
    while isinstance(function, partial):
        bound = {**function.keywords, **bound}
        function = function.func
    return function, bound


# --- supervised ----------------------------------------------------------------------------------------------------------------


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
    weight = _either(batch.verdict, verdict_weight, 1.0, nll) * batch.weight
    value = batch.mean(weight * nll, over="weights")
    return Loss(value, {"nll": batch.mean_of(nll), "nll/verdict": batch.mean_of(nll, where=batch.verdict)})


# --- preferences: pairs of a better and a worse answer -------------------------------------------------------------------------


@needs("pairs", "reference")
def dpo(head: Head, batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 0.0) -> Loss:
    """Direct preference optimisation: mean over pairs of -log σ(β·Δ) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    Δ is log π/π_ref of the better answer less that of the worse. With label smoothing ε: -(1 - ε) log σ(β·Δ) - ε log σ(-β·Δ) (cDPO,
    Mitchell 2023).

    Args:
        beta: β, how strongly the model is held to the reference.
        label_smoothing: ε, the share of pairs that are thought to be labelled the wrong way round.
        sft_weight: of a further term, the mean over the better answers' tokens of -log π (RPO, Pang et al. 2024, arXiv:2404.19733).
    """
    logprob = head.logprobs(batch.labels)  # [N]
    better, worse = batch.of_pairs(beta * batch.per_sequence(logprob - batch.reference))  # [P] each
    each = -(1 - label_smoothing) * F.logsigmoid(better - worse) - label_smoothing * F.logsigmoid(worse - better)
    value = batch.mean(each, over="pairs") + _sft(batch, logprob, sft_weight)
    return Loss(value, preference_metrics(batch, logprob, beta))


@needs("pairs", "reference")
def ipo(head: Head, batch: Batch, *, beta: float = 0.1, sft_weight: float = 0.0) -> Loss:
    """Identity preference optimisation: mean over pairs of (Δ̄ - 1/2β)² (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    Δ̄ is DPO's Δ with means over an answer's tokens in place of sums, as its authors use it.

    Args:
        beta: the paper's τ.
        sft_weight: as in `dpo`.
    """
    logprob = head.logprobs(batch.labels)  # [N]
    tokens = batch.per_sequence(torch.ones_like(logprob)).clamp(min=1)  # [S]
    better, worse = batch.of_pairs(batch.per_sequence(logprob - batch.reference) / tokens)  # [P] each
    value = batch.mean((better - worse - 1 / (2 * beta)).square(), over="pairs") + _sft(batch, logprob, sft_weight)
    return Loss(value, preference_metrics(batch, logprob, beta))


def _sft(batch: Batch, logprob: Tensor, weight: float) -> Tensor | float:
    """The mean of -log π over the better answers' tokens, with its weight."""
    if not weight:
        return 0.0
    return weight * batch.mean(torch.where(batch.side[batch.sequence] > 0, -logprob * batch.weight, 0.0), over="chosen")


def preference_metrics(batch: Batch, logprob: Tensor, beta: float) -> dict[str, Mean]:
    """What is watched while preferences are learnt: rewards β·log π/π_ref, as TRL names them, and what they are made of.

    Args:
        logprob: `[N]` log π of the labels.
    """
    logps, reference = (batch.per_sequence(x.detach()) for x in (logprob, batch.reference))  # [S]
    rewards = beta * (logps - reference)
    better, worse = batch.of_pairs(rewards)  # [P]
    chosen, rejected = batch.of_pairs(logps)
    return {
        "rewards/chosen": batch.mean_of(better),
        "rewards/rejected": batch.mean_of(worse),
        "rewards/margins": batch.mean_of(better - worse),
        "rewards/accuracies": batch.mean_of((better > worse).to(better.dtype)),
        "logps/chosen": batch.mean_of(chosen),
        "logps/rejected": batch.mean_of(rejected),
        "log_ratio": batch.mean_of(logprob - batch.reference),  # a token's, over both answers
    }


@needs("rated", "reference", "kl")
def kto(head: Head, batch: Batch, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Loss:
    """Kahneman-Tversky optimisation, from answers that are wanted or not, without pairs (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).

    Mean over answers of w·(1 - σ(β·s·(log π/π_ref - KL))), s = 1 for a wanted answer and -1 for an unwanted one. KL is estimated
    before the pass over the whole step, from each row's prompt with the answer of the row before it, and has no gradient.

    Args:
        beta: β, how strongly the model is held to the reference.
        desirable_weight: w of wanted answers; with `undesirable_weight` it should balance the two: n_D·w_D / n_U·w_U from 1 to 4/3.
        undesirable_weight: w of unwanted ones.
    """
    logprob = head.logprobs(batch.labels)  # [N]
    ratio = batch.per_sequence(logprob - batch.reference)  # [S] log π/π_ref
    weight = _either(batch.side > 0, desirable_weight, undesirable_weight, ratio)
    value = batch.mean(weight * torch.sigmoid(-beta * (batch.side * (ratio - batch.kl))), over="rated")
    logps, rewards = batch.per_sequence(logprob.detach()), beta * ratio
    wanted, unwanted = batch.side > 0, batch.side < 0
    return Loss(
        value,
        {
            "rewards/chosen": batch.mean_of(rewards, where=wanted),
            "rewards/rejected": batch.mean_of(rewards, where=unwanted),
            "logps/chosen": batch.mean_of(logps, where=wanted),
            "logps/rejected": batch.mean_of(logps, where=unwanted),
            "kl": batch.mean_of(batch.kl[None]),
        },
    )


# --- scores: reward models and classifiers, whose head has scores in the vocabulary's place (model.score) ----------------------


@needs("pairs", "scores")
def reward(head: Head, batch: Batch, *, centering: float = 0.0) -> Loss:
    """A reward model from pairs (Bradley & Terry 1952): mean of -log σ(r⁺ - r⁻ - m), m the row's margin (Llama 2, arXiv:2307.09288, eq. 2).

    Args:
        centering: of a further term, the mean of (r⁺ + r⁻)², which keeps rewards around 0 (Eisenstein et al. 2023, arXiv:2312.09244).
    """
    better, worse = batch.of_pairs(batch.per_sequence(head.scores()[:, 0]))  # [P]
    value = batch.mean(-F.logsigmoid(better - worse - batch.margin.to(better.dtype)), over="pairs")
    if centering:
        value = value + centering * batch.mean((better + worse).square(), over="pairs")
    return Loss(
        value,
        {
            "rewards/chosen": batch.mean_of(better),
            "rewards/rejected": batch.mean_of(worse),
            "rewards/margins": batch.mean_of(better - worse),
            "rewards/accuracies": batch.mean_of((better > worse).to(better.dtype)),
        },
    )


@needs("scores")
def classification(head: Head, batch: Batch, *, class_weights: tuple[float, ...] | None = None, gamma: float = 0.0) -> Loss:
    """One class of several: mean of w_c·(1 - p_c)^γ·(-log p_c), p = softmax of the scores; each document with its weight.

    With class weights the mean is Σ w·x / n, not / Σ w: a step's classes do not change what its rows count.

    Args:
        class_weights: w_c, in the order of `model.score.labels`; None: 1.
        gamma: γ of the focal loss (Lin et al. 2017, arXiv:1708.02002); 0: cross-entropy.
    """
    logp = F.log_softmax(head.scores(), -1)  # [N, L]
    truth = batch.classes(logp.shape[1])
    nll = -(logp * truth).sum(-1)  # [N]
    each = _focus(-nll, gamma) * nll
    if class_weights is not None:
        each = each * (truth.to(each.dtype) @ _per_class(class_weights, logp))
    right = (logp.argmax(-1) == truth.argmax(-1)).to(nll.dtype)
    return Loss(batch.mean(batch.weight * each, over="weights"), {"nll": batch.mean_of(nll), "accuracy": batch.mean_of(right)})


@needs("scores")
def multilabel(
    head: Head,
    batch: Batch,
    *,
    pos_weight: tuple[float, ...] | None = None,
    gamma_positive: float = 0.0,
    gamma_negative: float = 0.0,
    clip: float = 0.0,
) -> Loss:
    """Any number of classes: the mean over documents and classes of binary cross-entropy, p = σ(score).

    -y·w_c·(1 - p)^γ⁺·log p - (1 - y)·p_m^γ⁻·log(1 - p_m), p_m = max(p - m, 0): with γ⁺ = γ⁻ the focal loss (arXiv:1708.02002), with
    γ⁻ > γ⁺ and m > 0 the asymmetric loss (Ridnik et al. 2021, arXiv:2009.14119, eq. 6 and 7). For heads of whole texts: of every token
    a head is judged by as `streaming` trains it.

    Args:
        pos_weight: w_c of the classes that hold, in the order of `model.score.labels`; None: 1.
        gamma_positive: γ⁺, of the classes that hold.
        gamma_negative: γ⁻, of those that do not.
        clip: m, by which the probability of a class that does not hold is lowered: easy negatives then count nothing.
    """
    z = head.scores()  # [N, L]
    y = batch.classes(z.shape[1]).to(z.dtype)
    positive, negative = F.logsigmoid(z), F.logsigmoid(-z)  # log p, log(1 - p)
    if clip:
        negative = torch.log1p(-(torch.sigmoid(z) - clip).clamp(min=0))
    weight = 1.0 if pos_weight is None else _per_class(pos_weight, z)
    holds, does_not = _focus(positive, gamma_positive) * positive, _focus(negative, gamma_negative) * negative
    each = -(y * weight * holds + (1 - y) * does_not).mean(-1)  # [N]
    nll, right = -(y * positive + (1 - y) * F.logsigmoid(-z)).mean(-1), ((z > 0) == (y > 0)).to(z.dtype).mean(-1)
    return Loss(batch.mean(batch.weight * each, over="weights"), {"nll": batch.mean_of(nll), "accuracy": batch.mean_of(right)})


@needs("scores")
def streaming(head: Head, batch: Batch, *, category_weight: float = 1.0) -> Loss:
    """A verdict at every token, as Qwen3Guard-Stream learns it (arXiv:2510.14276): severity everywhere, category where it is not safe.

    Mean over tokens of -log p(severity) + λ·(-log p(category)), each a softmax over its own scores: those of `model.score.labels` that are
    severities, and the others. Of several categories each has an equal part.

    Args:
        category_weight: λ.
    """
    labels, z = head.labels(), head.scores()  # [N, L]
    severities, categories = ([i for i, label in enumerate(labels) if (label in SEVERITIES) is wanted] for wanted in (True, False))
    if "safe" not in labels or len(severities) < 2:
        raise MegamodError(f"streaming: {', '.join(labels)} are no labels of severities: safe, and another of {', '.join(SEVERITIES)}")
    y = batch.classes(len(labels))
    severity, category = F.log_softmax(z[:, severities], -1), F.log_softmax(z[:, categories], -1)
    nll = -(severity * y[:, severities]).sum(-1)  # [N]
    right = (severity.argmax(-1) == y[:, severities].argmax(-1)).to(z.dtype)
    kinds = y[:, categories]
    about = kinds / kinds.sum(-1, keepdim=True).clamp(min=1) * (1 - y[:, [labels.index("safe")]])
    each = nll - category_weight * (category * about).sum(-1)
    return Loss(batch.mean(batch.weight * each, over="weights"), {"nll": batch.mean_of(nll), "accuracy": batch.mean_of(right)})


def _either(mask: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """`yes` where the mask holds, else `no`, in the dtype of `like`: torch.where of two floats would round them to fp32."""
    return torch.full_like(like, no).masked_fill(mask, yes)  # on the device, where a new tensor would be copied to it


def _focus(logp: Tensor, gamma: float) -> Tensor | float:
    """(1 - p)^γ. Where p is 1 it has no gradient: for γ < 1 that of x^γ at 0 is infinite."""
    return (-torch.expm1(logp)).clamp(min=torch.finfo(logp.dtype).tiny).pow(gamma) if gamma else 1.0


def _per_class(numbers: tuple[float, ...], scores: Tensor) -> Tensor:
    """`[L]` one number for each class. Raises MegamodError where there are more or fewer than scores."""
    if len(numbers) != scores.shape[-1]:
        raise MegamodError(
            f"loss: {len(numbers)} class weights for {scores.shape[-1]} scores: one for each of model.score.labels was expected"
        )
    return torch.tensor(numbers, dtype=scores.dtype, device=scores.device)
