"""The losses. Researchers edit this file, or write such a function in their own config.

A loss is a function of a head and a batch. `head` is all that knows how the vocabulary is sharded: `head.logprobs(ids)` are
log-probabilities at the labelled positions. `batch` knows the labels and the global counts. The objective is the sum of what
all micro-batches, data- and context-parallel ranks return, so divide with `batch.mean`, whose denominator is global.

    def my_loss(head: Head, batch: Batch, *, threat: float = 3.0) -> Loss:
        nll = -head.logprobs(batch.labels)
        return Loss(batch.mean(nll * torch.where(batch.verdict, threat, 1.0), over="tokens"), {"nll": batch.mean_of(nll)})

A config chooses one by naming it: `loss=partial(losses.moderation, verdict_weight=6.0)`.

What a loss compares with is in the batch too, if it says that it needs it: `batch.reference`, the reference model's
log-probabilities of the same tokens, `batch.kl`, and `batch.step`, all answers of the step. Where they come from is the config's
`reference`, no loss's business.

Each function is one published form, and its docstring begins with the formula and its source: configs/LOSSES.md lists them from here.
Of a pair, r⁺ and r⁻ are log π/π_ref of the better and of the worse answer, sums over their tokens, and Δ is r⁺ - r⁻. A few losses take
other losses: `weighted` adds them up, `wpo` and `length_desensitized` change what a pair or a token counts in any of them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megamod.batch import Batch, Mean
from megamod.errors import MegamodError
from megamod.model.head import Head
from megamod.verdicts import SEVERITIES

Need = Literal["weights", "pairs", "rated", "scores", "reference", "kl", "step", "teacher"]
Divergence = float | Literal["js"]  # what a loss is held to the reference by: see `_scores`
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
    "weights" of tokens, where the data has any: it multiplies with `batch.weight`; other losses refuse tokens that have their own.
    Of the model: "scores", a head of them. Of a pass before the training pass: "reference", which it reads as `batch.reference`,
    "kl", as `batch.kl`, "step", as `batch.step`, and "teacher", as `batch.teacher`.

    @needs("pairs", "reference")
    def my_dpo(head: Head, batch: Batch) -> Loss: ...
    """

    def mark(function: Function) -> Function:
        function.needs = frozenset((*what, *["reference"] * bool({"kl", "step"} & {*what})))  # type: ignore[attr-defined]
        return function

    return mark


def needs_of(loss: Callable[..., Any]) -> frozenset[Need]:
    """What `loss` was marked with, and the losses that are bound to it; nothing where none was."""
    return frozenset(getattr(unbound(loss)[0], "needs", ())).union(*(needs_of(part) for part in parts_of(loss)))


def parts_of(loss: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The losses that are bound to `loss`, one by one or in tuples."""

    def found(value: Any) -> Iterator[Callable[..., Any]]:
        if isinstance(value, tuple):
            for part in value:
                yield from found(part)
        elif callable(value):
            yield value

    return list(found(tuple(unbound(loss)[1].values())))


def unbound(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What `functools.partial`s are partials of, and the keywords that they bind."""
    bound: dict[str, Any] = {}
    while isinstance(function, partial):
        bound = {**function.keywords, **bound}
        function = function.func
    return function, bound


# --- supervised ----------------------------------------------------------------------------------------------------------------


@needs("weights")
def cross_entropy(head: Head, batch: Batch) -> Loss:
    """-log p(y_t): cross-entropy.

    A mean over labelled tokens, Σ w_t·-log p(y_t) ÷ Σ w_t: each has the weight that the data gives its document, times its own where
    it has one (1 where the data gives none).
    """
    nll = -head.logprobs(batch.labels)  # [N]
    return Loss(batch.mean(batch.weight * nll, over="weights"), {"nll": batch.mean_of(nll)})


@needs("weights")
def moderation(head: Head, batch: Batch, *, verdict_weight: float = 4.0) -> Loss:
    """-w_t·log p(y_t): cross-entropy with the verdict's tokens weighted.

    Documents and tokens count with the weight that the data gives them, as in `cross_entropy`.

    Args:
        verdict_weight: w_t of the tokens that say the verdict; the reason's tokens have 1.
    """
    nll = -head.logprobs(batch.labels)  # [N]
    weight = _either(batch.verdict, verdict_weight, 1.0, nll) * batch.weight
    value = batch.mean(weight * nll, over="weights")
    return Loss(value, {"nll": batch.mean_of(nll), "nll/verdict": batch.mean_of(nll, where=batch.verdict)})


@needs("weights")
def label_smoothing(head: Head, batch: Batch, *, epsilon: float = 0.1) -> Loss:
    """-(1 - ε) log p(y_t) - ε/V Σ_v log p_v: label smoothing (Szegedy et al. 2015, arXiv:1512.00567)."""
    found = head.statistics(batch.labels)
    nll, uniform = -found.logprob, found.logsumexp - head.mean_logit()  # [N]
    return Loss(batch.mean(batch.weight * ((1 - epsilon) * nll + epsilon * uniform), over="weights"), {"nll": batch.mean_of(nll)})


@needs("weights")
def focal(head: Head, batch: Batch, *, gamma: float = 2.0) -> Loss:
    """-(1 - p)^γ·log p, p = p(y_t): the focal loss of a token (Lin et al. 2017, arXiv:1708.02002, eq. 4)."""
    logp = head.logprobs(batch.labels)
    return Loss(batch.mean(batch.weight * _focus(logp, gamma) * -logp, over="weights"), {"nll": batch.mean_of(-logp)})


@needs("weights")
def z_loss(head: Head, batch: Batch, *, weight: float = 1e-4) -> Loss:
    """-log p(y_t) + λ·(log Σ_v exp z_v)²: cross-entropy that keeps logits around 0 (PaLM, Chowdhery et al. 2022, arXiv:2204.02311).

    Args:
        weight: λ.
    """
    found = head.statistics(batch.labels)
    each = -found.logprob + weight * found.logsumexp.square()
    return Loss(
        batch.mean(batch.weight * each, over="weights"),
        {"nll": batch.mean_of(-found.logprob), "logsumexp": batch.mean_of(found.logsumexp)},
    )


@needs("weights")
def dft(head: Head, batch: Batch) -> Loss:
    """-p·log p, p = p(y_t), the first without a gradient: dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629)."""
    logp = head.logprobs(batch.labels)
    return Loss(batch.mean(batch.weight * logp.detach().exp() * -logp, over="weights"), {"nll": batch.mean_of(-logp)})


@needs("weights", "teacher")
def distillation(head: Head, batch: Batch, *, sft_weight: float = 0.0) -> Loss:
    """Σ_k q_k·log(q_k/p_k), k a teacher's most probable tokens and one for all others, q the teacher:
    distillation (Hinton et al. 2015, arXiv:1503.02531).

    The teacher is the config's `reference`: another model in memory, or what tools/teacher_logprobs.py stored; `reference.top_k` is how
    many tokens it names.

    Args:
        sft_weight: of a further term, -log p(y_t).
    """
    ids, teacher = batch.teacher  # [N, K]
    found = head.logprobs(torch.cat([batch.labels[:, None], ids], 1))
    nll, q, p = -found[:, 0], _with_rest(teacher.to(found.dtype)), _with_rest(found[:, 1:])
    divergence = (q.exp() * (q - p)).sum(-1)  # [N]
    value = batch.mean(batch.weight * (divergence + sft_weight * nll), over="weights")
    return Loss(value, {"nll": batch.mean_of(nll), "divergence": batch.mean_of(divergence)})


def _with_rest(logp: Tensor) -> Tensor:
    """`[N, K]` → `[N, K + 1]`: with log(1 - Σ p), at least that of 1e-7."""
    rest = logp.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logp, (-torch.expm1(rest)).log()], -1)


# --- preferences: pairs of a better and a worse answer, and a reference ---------------------------------------------------------


@needs("pairs", "reference")
def dpo(
    head: Head,
    batch: Batch,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    divergence: Divergence = 1.0,
) -> Loss:
    """-log σ(β·Δ): direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    With label smoothing ε: -(1 - ε) log σ(β·Δ) - ε log σ(-β·Δ) (cDPO, Mitchell 2023).

    Args:
        beta: β, how strongly the model is held to the reference.
        label_smoothing: ε, the share of pairs that are thought to be labelled the wrong way round.
        sft_weight: of a further term, the mean over the better answers' tokens of -log π (RPO, Pang et al. 2024, arXiv:2404.19733).
        divergence: what the model is held to the reference by: 1.0, reverse KL; 0.0, forward KL; another α, the α-divergence, of which
            the paper and TRL count the other way, 1 - α; or "js", Jensen's and Shannon's (f-DPO, Wang et al. 2023, arXiv:2309.16240).
    """
    logprob, better, worse = _compared(head, batch, divergence)
    each = _smoothed(beta * (better - worse), label_smoothing)
    return _over_pairs(batch, logprob, beta, each, _sft(batch, logprob, sft_weight))


@needs("pairs", "reference")
def dpo_norm(head: Head, batch: Batch, *, beta: float = 2.0, divergence: Divergence = 1.0) -> Loss:
    """-log σ(β·(r⁺/|y⁺| - r⁻/|y⁻|)): DPO with means over an answer's tokens (Tülu 3, Lambert et al. 2024, arXiv:2411.15124)."""
    logprob, better, worse = _compared(head, batch, divergence)
    better_size, worse_size = batch.of_pairs(batch.sizes.clamp(min=1))
    return _over_pairs(batch, logprob, beta, -F.logsigmoid(beta * (better / better_size - worse / worse_size)))


@needs("pairs", "reference")
def ipo(head: Head, batch: Batch, *, beta: float = 0.1, sft_weight: float = 0.0, divergence: Divergence = 1.0) -> Loss:
    """(r⁺/|y⁺| - r⁻/|y⁻| - 1/2β)²: identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    Means over an answer's tokens in place of sums, as its authors use it.

    Args:
        beta: the paper's τ.
        sft_weight: as in `dpo`.
        divergence: as in `dpo`.
    """
    logprob, better, worse = _compared(head, batch, divergence)
    better_size, worse_size = batch.of_pairs(batch.sizes.clamp(min=1))
    each = (better / better_size - worse / worse_size - 1 / (2 * beta)).square()
    return _over_pairs(batch, logprob, beta, each, _sft(batch, logprob, sft_weight))


@needs("pairs", "reference")
def hinge(head: Head, batch: Batch, *, beta: float = 0.1, divergence: Divergence = 1.0) -> Loss:
    """max(0, 1 - β·Δ): SLiC's hinge on DPO's rewards (Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657)."""
    logprob, better, worse = _compared(head, batch, divergence)
    return _over_pairs(batch, logprob, beta, F.relu(1 - beta * (better - worse)))


@needs("pairs", "reference")
def robust(head: Head, batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.1, divergence: Divergence = 1.0) -> Loss:
    """(-(1 - ε) log σ(β·Δ) + ε log σ(-β·Δ)) / (1 - 2ε): robust DPO (Chowdhury et al. 2024, arXiv:2403.00409).

    Its mean over labels of which a share ε was turned round is that of DPO over the right ones.

    Args:
        label_smoothing: ε, below 1/2.

    Raises:
        MegamodError: it is not.
    """
    _expect(0 <= label_smoothing < 0.5, f"label_smoothing = {label_smoothing}: from 0 to below 1/2")
    logprob, better, worse = _compared(head, batch, divergence)
    margin = beta * (better - worse)
    each = (1 - label_smoothing) * -F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    return _over_pairs(batch, logprob, beta, each / (1 - 2 * label_smoothing))


@needs("pairs", "reference")
def exo_pair(head: Head, batch: Batch, *, beta: float = 0.1, label_smoothing: float = 1e-3, divergence: Divergence = 1.0) -> Loss:
    """KL(q ‖ (1 - ε, ε)), q = (σ(β·Δ), σ(-β·Δ)): efficient exact optimisation (Ji et al. 2024, arXiv:2402.00856, eq. 16).

    Args:
        label_smoothing: ε, above 0.

    Raises:
        MegamodError: it is not, or no share.
    """
    _expect(0 < label_smoothing < 1, f"label_smoothing = {label_smoothing}: above 0 and below 1")
    logprob, better, worse = _compared(head, batch, divergence)
    margin = beta * (better - worse)
    first, second = F.logsigmoid(margin), F.logsigmoid(-margin)
    each = first.exp() * (first - math.log1p(-label_smoothing)) + second.exp() * (second - math.log(label_smoothing))
    return _over_pairs(batch, logprob, beta, each)


@needs("pairs", "reference")
def nca_pair(head: Head, batch: Batch, *, beta: float = 0.1) -> Loss:
    """-log σ(β·r⁺) - ½ log σ(-β·r⁺) - ½ log σ(-β·r⁻): noise-contrastive alignment (Chen et al. 2024, arXiv:2402.05369)."""
    logprob, better, worse = _compared(head, batch)
    each = -F.logsigmoid(beta * better) - 0.5 * F.logsigmoid(-beta * better) - 0.5 * F.logsigmoid(-beta * worse)
    return _over_pairs(batch, logprob, beta, each)


@needs("pairs", "reference")
def bco_pair(head: Head, batch: Batch, *, beta: float = 0.1) -> Loss:
    """-log σ(β·r⁺) - log σ(-β·r⁻): binary classifier optimisation on pairs, without a shift (Jung et al. 2024, arXiv:2404.04656)."""
    logprob, better, worse = _compared(head, batch)
    return _over_pairs(batch, logprob, beta, -F.logsigmoid(beta * better) - F.logsigmoid(-beta * worse))


@needs("pairs", "reference")
def sppo_hard(head: Head, batch: Batch, *, beta: float = 0.1) -> Loss:
    """(r⁺ - 1/2β)² + (r⁻ + 1/2β)²: self-play preference optimisation (Wu et al. 2024, arXiv:2405.00675, eq. 4.7).

    The better answer is taken to win for certain.
    """
    logprob, better, worse = _compared(head, batch)
    return _over_pairs(batch, logprob, beta, (better - 0.5 / beta).square() + (worse + 0.5 / beta).square())


@needs("pairs", "reference", "step")
def aot(head: Head, batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """-log σ(β·(u₍ᵢ₎ - v₍ᵢ₎)), u = log π⁺/π⁻ and v = log π⁺_ref/π⁻_ref, each in its order:
    alignment via optimal transport (Melnyk et al. 2024, arXiv:2406.05882).

    The margins' distribution is to dominate the reference's. They are sorted over the whole step, as they are before the training pass,
    in which each pair's own u has a gradient.

    Args:
        label_smoothing: as in `dpo`.
    """
    logprob = head.logprobs(batch.labels)
    step = batch.step
    before, compared = (better - worse for better, worse in (step.of_pairs(step.logps), step.of_pairs(step.reference)))  # [Q]
    better, worse = batch.of_pairs(batch.per_sequence(logprob))
    margin = beta * (better - worse - _partners(before, compared)[step.mine])
    return _over_pairs(batch, logprob, beta, _smoothed(margin, label_smoothing))


@needs("pairs", "reference", "step")
def aot_unpaired(head: Head, batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """-log σ(β·(r⁺₍ᵢ₎ - r⁻₍ᵢ₎)), r⁺ and r⁻ each in its order: the unpaired form of `aot` (arXiv:2406.05882).

    Sorted over the whole step, as they are before the training pass. An answer has its gradient with the other side's number at its place,
    which has none: together these are the whole gradient, and the better answers' half is the whole value.

    Args:
        label_smoothing: as in `dpo`.
    """
    logprob, better, worse = _compared(head, batch)
    step = batch.step
    wanted, unwanted = step.of_pairs(step.logps - step.reference)  # [Q]
    of_better = _smoothed(beta * (better - _partners(wanted, unwanted)[step.mine]), label_smoothing)
    of_worse = _smoothed(beta * (_partners(unwanted, wanted)[step.mine] - worse), label_smoothing)
    return _over_pairs(batch, logprob, beta, of_better + of_worse - of_worse.detach())


@needs("pairs", "reference")
def apo_zero(head: Head, batch: Batch, *, beta: float = 0.1) -> Loss:
    """1 - σ(β·r⁺) + σ(β·r⁻): anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

    For better answers that are better than the model's own: it raises them, and lowers the worse ones.
    """
    logprob, better, worse = _compared(head, batch)
    return _over_pairs(batch, logprob, beta, torch.sigmoid(-beta * better) + torch.sigmoid(beta * worse))


@needs("pairs", "reference")
def apo_down(head: Head, batch: Batch, *, beta: float = 0.1) -> Loss:
    """σ(β·r⁺) + 1 - σ(β·Δ): anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8).

    For better answers that are worse than the model's own: it lowers both, the worse ones more.
    """
    logprob, better, worse = _compared(head, batch)
    return _over_pairs(batch, logprob, beta, torch.sigmoid(beta * better) + torch.sigmoid(-beta * (better - worse)))


@needs("pairs", "reference")
def discopop(head: Head, batch: Batch, *, beta: float = 0.1, tau: float = 0.05, divergence: Divergence = 1.0) -> Loss:
    """(1 - m)·(-log σ(β·Δ)) + m·exp(-β·Δ), m = σ(β·Δ/τ): what a model found by itself (Lu et al. 2024, arXiv:2406.08414, eq. 5)."""
    logprob, better, worse = _compared(head, batch, divergence)
    margin = beta * (better - worse)
    mixed = torch.sigmoid(margin / tau)
    return _over_pairs(batch, logprob, beta, -F.logsigmoid(margin) * (1 - mixed) + torch.exp(-margin) * mixed)


def _compared(head: Head, batch: Batch, divergence: Divergence = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """log π of the labels `[N]`, and of each pair's answers `[P]` r⁺ and r⁻, as `divergence` has them."""
    logprob = head.logprobs(batch.labels)
    return logprob, *batch.of_pairs(_scores(batch.per_sequence(logprob - batch.reference), divergence))


def _scores(ratio: Tensor, divergence: Divergence) -> Tensor:
    """f'(π/π_ref) of log π/π_ref, f the α-divergence's or Jensen's and Shannon's: log π/π_ref itself of the reverse KL, α = 1.

    f'(t) = (t^(α-1) - 1) / (α - 1), which of the forward KL, α = 0, is 1 - 1/t; and log(2t / (1 + t)).
    """
    if divergence == "js":
        return math.log(2) + F.logsigmoid(ratio)
    return ratio if divergence == 1 else torch.expm1((divergence - 1) * ratio) / (divergence - 1)


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - ε) log σ(m) - ε log σ(-m)."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _partners(mine: Tensor, others: Tensor) -> Tensor:
    """`[Q]`: of each of `mine` `[Q]` what has its place in the order of `others` `[Q]`."""
    return others.sort().values[mine.argsort(stable=True).argsort()]


def _sft(batch: Batch, logprob: Tensor, weight: float) -> Tensor | float:
    """The mean of -log π over the better answers' tokens, with its weight."""
    if not weight:
        return 0.0
    return weight * batch.mean(torch.where(batch.side[batch.sequence] > 0, -logprob * batch.weight, 0.0), over="chosen")


def _over_pairs(batch: Batch, logprob: Tensor, beta: float, each: Tensor, more: Tensor | float = 0.0) -> Loss:
    """The mean of `each` `[P]` over pairs, and what is watched."""
    return Loss(batch.mean(each, over="pairs") + more, preference_metrics(batch, logprob, beta))


def preference_metrics(batch: Batch, logprob: Tensor, beta: float) -> dict[str, Mean]:
    """What is watched while preferences are learnt: rewards β·log π/π_ref, as TRL names them, and what they are made of.

    Args:
        logprob: `[N]` log π of the labels.
    """
    rewards = beta * batch.per_sequence(logprob.detach() - batch.reference)  # [S]
    return {**_pair_metrics(batch, logprob, rewards), "log_ratio": batch.mean_of(logprob - batch.reference)}  # a token's, over both answers


def _pair_metrics(batch: Batch, logprob: Tensor, rewards: Tensor) -> dict[str, Mean]:
    """Of rewards `[S]`."""
    better, worse = batch.of_pairs(rewards)  # [P]
    chosen, rejected = batch.of_pairs(batch.per_sequence(logprob.detach()))
    return {
        "rewards/chosen": batch.mean_of(better),
        "rewards/rejected": batch.mean_of(worse),
        "rewards/margins": batch.mean_of(better - worse),
        "rewards/accuracies": batch.mean_of((better > worse).to(better.dtype)),
        "logps/chosen": batch.mean_of(chosen),
        "logps/rejected": batch.mean_of(rejected),
    }


# --- preferences: pairs without a reference -------------------------------------------------------------------------------------


@needs("pairs")
def simpo(head: Head, batch: Batch, *, beta: float = 2.0, gamma: float = 1.0) -> Loss:
    """-log σ(β·(log π⁺/|y⁺| - log π⁻/|y⁻|) - γ): simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, eq. 6).

    Args:
        gamma: γ, by how much the better answer's reward should be above the worse one's.
    """
    logprob = head.logprobs(batch.labels)
    rewards = beta * batch.per_sequence(logprob) / batch.sizes.clamp(min=1)  # [S]
    better, worse = batch.of_pairs(rewards)
    return Loss(batch.mean(-F.logsigmoid(better - worse - gamma), over="pairs"), _pair_metrics(batch, logprob, rewards))


@needs("pairs")
def cpo(head: Head, batch: Batch, *, beta: float = 0.1, sft_weight: float = 1.0) -> Loss:
    """-log σ(β·(log π⁺ - log π⁻)) - λ·log π⁺: contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417, eq. 3 to 5).

    Args:
        sft_weight: λ of the second term, a mean over the better answers' tokens.
    """
    logprob = head.logprobs(batch.labels)
    rewards = beta * batch.per_sequence(logprob)
    better, worse = batch.of_pairs(rewards)
    value = batch.mean(-F.logsigmoid(better - worse), over="pairs") + _sft(batch, logprob, sft_weight)
    return Loss(value, _pair_metrics(batch, logprob, rewards))


@needs("pairs")
def orpo(head: Head, batch: Batch, *, beta: float = 0.1) -> Loss:
    """-log π⁺ - β·log σ(log odds⁺/odds⁻), odds = p/(1 - p), log p = log π/|y|:
    odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7).

    Args:
        beta: the paper's λ. The first term is a mean over the better answers' tokens.
    """
    logprob = head.logprobs(batch.labels)
    logp = batch.per_sequence(logprob) / batch.sizes.clamp(min=1)  # [S]
    odds = logp - (-torch.expm1(logp)).clamp(min=torch.finfo(logp.dtype).tiny).log()
    better, worse = batch.of_pairs(odds)
    value = _sft(batch, logprob, 1.0) - beta * batch.mean(F.logsigmoid(better - worse), over="pairs")
    return Loss(value, _pair_metrics(batch, logprob, beta * logp))


@needs("pairs")
def sft(head: Head, batch: Batch) -> Loss:
    """-log π⁺, a mean over the better answers' tokens: what RPO adds to DPO (Pang et al. 2024, arXiv:2404.19733)."""
    logprob = head.logprobs(batch.labels)
    return Loss(_sft(batch, logprob, 1.0) + 0 * logprob.sum(), {"nll": batch.mean_of(-logprob, where=batch.side[batch.sequence] > 0)})


# --- preferences: answers that are wanted or not, without pairs ------------------------------------------------------------------


@needs("rated", "reference", "kl")
def kto(head: Head, batch: Batch, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Loss:
    """w·(1 - σ(β·s·(r - KL))), s = ±1 of a wanted or unwanted answer:
    Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).

    KL is estimated before the pass over the whole step, from each row's prompt with the answer of the row before it, and has no gradient.

    Args:
        beta: β, how strongly the model is held to the reference.
        desirable_weight: w of wanted answers; with `undesirable_weight` it should balance the two: n_D·w_D / n_U·w_U from 1 to 4/3.
        undesirable_weight: w of unwanted ones.
    """
    logprob, ratio, weight = _rated(head, batch, desirable_weight, undesirable_weight)
    each = weight * torch.sigmoid(-beta * (batch.side * (ratio - batch.kl)))
    return Loss(batch.mean(each, over="rated"), {**_rated_metrics(batch, logprob, beta * ratio), "kl": batch.mean_of(batch.kl[None])})


@needs("rated", "reference")
def apo_zero_unpaired(
    head: Head, batch: Batch, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Loss:
    """w·(1 - σ(β·s·r)), s = ±1 of a wanted or unwanted answer: `apo_zero` without pairs (arXiv:2408.06266, eq. 7), or `kto` without KL.

    Args:
        desirable_weight: as in `kto`, and so `undesirable_weight`.
    """
    logprob, ratio, weight = _rated(head, batch, desirable_weight, undesirable_weight)
    value = batch.mean(weight * torch.sigmoid(-beta * (batch.side * ratio)), over="rated")
    return Loss(value, _rated_metrics(batch, logprob, beta * ratio))


@needs("rated", "reference", "step")
def bco(head: Head, batch: Batch, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Loss:
    """-w·log σ(s·(β·r - δ)), s = ±1 of a wanted or unwanted answer, δ the mean of β·r:
    binary classifier optimisation (Jung et al. 2024, arXiv:2404.04656).

    δ is of the step's rated answers, each with its weight, as they are before the training pass, where the authors have a running mean.

    Args:
        desirable_weight: as in `kto`, and so `undesirable_weight`.
    """
    logprob, ratio, weight = _rated(head, batch, desirable_weight, undesirable_weight)
    step = batch.step
    share = torch.where(step.side != 0, step.weight, 0.0).to(ratio.dtype)
    shift = beta * ((step.logps - step.reference) * share).sum() / share.sum()
    value = batch.mean(-weight * F.logsigmoid(batch.side * (beta * ratio - shift)), over="rated")
    return Loss(value, {**_rated_metrics(batch, logprob, beta * ratio), "delta": batch.mean_of(shift[None])})


def _rated(head: Head, batch: Batch, desirable_weight: float, undesirable_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """log π of the labels `[N]`, r `[S]` and w `[S]`."""
    logprob = head.logprobs(batch.labels)  # [N]
    ratio = batch.per_sequence(logprob - batch.reference)  # [S] log π/π_ref
    return logprob, ratio, _either(batch.side > 0, desirable_weight, undesirable_weight, ratio)


def _rated_metrics(batch: Batch, logprob: Tensor, rewards: Tensor) -> dict[str, Mean]:
    """Of rewards `[S]`."""
    logps, wanted, unwanted = batch.per_sequence(logprob.detach()), batch.side > 0, batch.side < 0
    return {
        "rewards/chosen": batch.mean_of(rewards, where=wanted),
        "rewards/rejected": batch.mean_of(rewards, where=unwanted),
        "logps/chosen": batch.mean_of(logps, where=wanted),
        "logps/rejected": batch.mean_of(logps, where=unwanted),
    }


# --- losses of losses -----------------------------------------------------------------------------------------------------------


def weighted(head: Head, batch: Batch, *, parts: tuple[tuple[float, LossFunction], ...]) -> Loss:
    """Σ w·L: several losses, each with its weight (MPO, Wang et al. 2024, arXiv:2411.10442).

    `partial(losses.weighted, parts=((0.8, losses.dpo), (0.2, losses.bco_pair), (1.0, losses.sft)))`. Each asks the head by itself, so the
    vocabulary is multiplied for each. Of metrics of one name the first loss's is kept.
    """
    results = [loss(head, batch) for _, loss in parts]
    metrics = {name: mean for result in reversed(results) for name, mean in result.metrics.items()}
    return Loss(torch.stack([weight * result.value for (weight, _), result in zip(parts, results, strict=True)]).sum(), metrics)


@needs("pairs")
def wpo(head: Head, batch: Batch, *, loss: LossFunction) -> Loss:
    """w⁺·w⁻ times the loss of a pair, w = exp(Σ (log p(y_t) - log Σ_v p_v²) / |y|), without a gradient:
    WPO (Zhou et al. 2024, arXiv:2406.11827, eq. 2).

    Pairs that the model might have said itself count more. For any loss that is a mean over pairs: `partial(losses.wpo, loss=losses.dpo)`.
    """
    with torch.no_grad():
        likely = replace(batch, share=None).per_sequence(head.logprobs(batch.labels) - head.log_collision())  # [S]
        likely = likely / batch.sizes.clamp(min=1)
    better, worse = batch.pairs
    weight = batch.document_weight.to(likely.dtype)
    weight = weight.index_put((better,), weight[better] * (likely[better] + likely[worse]).exp())
    return loss(head, replace(batch, document_weight=weight, totals=batch.totals or {u: float(n) for u, n in batch.counts().items()}))


@needs("pairs")
def length_desensitized(head: Head, batch: Batch, *, loss: LossFunction, alpha: float = 0.5) -> Loss:
    """Any loss of pairs, where log π and log π_ref of an answer count only α beyond the length of the other one:
    LD-DPO (Liu et al. 2024, arXiv:2409.06411).

    Args:
        alpha: α; 1: as without.
    """
    better, worse = batch.pairs
    sizes = batch.sizes
    shared = sizes.index_put((batch.pairs.flatten(),), torch.minimum(sizes[better], sizes[worse]).repeat(2))  # [S]
    share = _either(batch.ordinal < shared[batch.sequence], 1.0, alpha, torch.empty_like(batch.labels, dtype=torch.float64))
    return loss(head, replace(batch, share=share))


# --- scores: reward models and classifiers, whose head has scores in the vocabulary's place (model.score) ----------------------


@needs("pairs", "scores")
def reward(head: Head, batch: Batch, *, centering: float = 0.0) -> Loss:
    """-log σ(r⁺ - r⁻ - m) of rewards r, m the row's margin:
    a reward model from pairs (Bradley & Terry 1952; Llama 2, arXiv:2307.09288, eq. 2).

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
    """-w_c·(1 - p_c)^γ·log p_c, p = softmax of the scores: one class of several, each document with its weight.

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
def class_balanced(head: Head, batch: Batch, *, counts: tuple[float, ...], beta: float = 0.999, gamma: float = 0.0) -> Loss:
    """(1 - β)/(1 - β^n_c)·(1 - p_c)^γ·(-log p_c), p = softmax of the scores: class-balanced loss (Cui et al. 2019, arXiv:1901.05555).

    The weights are scaled so that their mean over the classes is 1, as the authors do it.

    Args:
        counts: n_c, how many rows of the training data have each class, in the order of `model.score.labels`.
        beta: β: 0 weighs all alike, towards 1 by 1/n_c.
        gamma: of the focal loss.

    Raises:
        MegamodError: a class without rows, β of 1 or more, or counts of fewer or more classes than there are.
    """
    _expect(0 <= beta < 1, f"beta = {beta}: from 0 to below 1")
    _expect(all(count > 0 for count in counts), f"counts = {counts}: rows of each class")
    effective = [(1 - beta) / (1 - beta**count) for count in counts]
    weights = tuple(weight * len(counts) / sum(effective) for weight in effective)
    return classification(head, batch, class_weights=weights, gamma=gamma)


@needs("scores")
def logit_adjusted(head: Head, batch: Batch, *, counts: tuple[float, ...], tau: float = 1.0) -> Loss:
    """-log softmax(z + τ·log π)_c, π_c = n_c/Σn: the logit-adjusted loss (Menon et al. 2020, arXiv:2007.07314, eq. 10).

    Scores are judged without the adjustment: rare classes have had to do better.

    Args:
        counts: n_c, how many rows of the training data have each class, in the order of `model.score.labels`.
        tau: τ.

    Raises:
        MegamodError: a class without rows, or counts of fewer or more classes than there are.
    """
    _expect(all(count > 0 for count in counts), f"counts = {counts}: rows of each class")
    z = head.scores()  # [N, L]
    prior = _per_class(tuple(math.log(count / sum(counts)) for count in counts), z)
    truth = batch.classes(z.shape[1])
    nll, adjusted = (-(F.log_softmax(x, -1) * truth).sum(-1) for x in (z, z + tau * prior))  # [N]
    right = (z.argmax(-1) == truth.argmax(-1)).to(z.dtype)
    return Loss(batch.mean(batch.weight * adjusted, over="weights"), {"nll": batch.mean_of(nll), "accuracy": batch.mean_of(right)})


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
    """-y·w_c·(1 - p)^γ⁺·log p - (1 - y)·p_m^γ⁻·log(1 - p_m), p = σ(score), p_m = max(p - m, 0): any number of classes.

    The mean over documents and classes: with γ⁺ = γ⁻ the focal loss (arXiv:1708.02002), with
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
    """-log p(severity) - λ·log p(category), the second where it is not safe:
    a verdict at every token, as Qwen3Guard-Stream has (arXiv:2510.14276).

    A mean over tokens, each p a softmax over its own scores: those of `model.score.labels` that are
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


def _expect(holds: bool, what: str) -> None:
    """Raises MegamodError where it does not."""
    if not holds:
        raise MegamodError(f"loss: {what} was expected")


def _per_class(numbers: tuple[float, ...], scores: Tensor) -> Tensor:
    """`[L]` one number for each class. Raises MegamodError where there are more or fewer than scores."""
    if len(numbers) != scores.shape[-1]:
        raise MegamodError(
            f"loss: {len(numbers)} class weights for {scores.shape[-1]} scores: one for each of model.score.labels was expected"
        )
    return torch.tensor(numbers, dtype=scores.dtype, device=scores.device)
