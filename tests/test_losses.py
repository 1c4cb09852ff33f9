"""Every loss of megamod.losses against its reference number, in float64 to 1e-11: value, and every gradient, on two grids.

The number is TRL's own, from its trainers, or where TRL has no such loss the paper's formula in plain torch over transformers' model,
document by document. Both have a step in one batch and pack nothing, so what agrees with them on these grids does not depend on
packing, micro-batches, data, context, tensor or pipeline parallelism. The list of losses is read from the code: one without a
number fails. `REPORT=1 python -m pytest tests/test_losses.py` writes the worst errors to configs/losses.json.
"""

import gc
import inspect
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import distributed
import numpy as np
import parity
import preferences
import pytest
import test_trl
import tiny
import torch
import torch.nn.functional as F
from complaints import complaint
from parity import Case as ParityCase
from parity import Run
from torch import Tensor, nn
from trl_oracle import Texts, Trl, in_double, inputs_of, value_of

from megamod import losses
from megamod.batch import Batch
from megamod.config import ModelConfig, OptimConfig, ReferenceConfig, as_json
from megamod.config import ParallelConfig as P
from megamod.config import load as load_config
from megamod.data.documents import IGNORED, Document, InMemory
from megamod.data.loader import Loader
from megamod.errors import MegamodError
from megamod.losses import Loss, LossFunction, needs
from megamod.model.build import build, data_parallel
from megamod.model.head import Head
from megamod.optim import Optimizer
from megamod.parallel.grid import Grid, started
from megamod.reference import Reference
from megamod.step import train_step
from megamod.weights.load import Tensors, load
from tools.list_losses import ERRORS, PAGE, every_loss, measured, page

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*", "ignore::UserWarning:peft.*")
TOLERANCE = 1e-11
WORLD = 4
GRIDS = {"cp 2 · dp 2": P(cp=2), "tp 2 · pp 2 · sp": P(tp=2, pp=2, sp=True)}

# --- documents -------------------------------------------------------------------------------------------------------------------

CLASSES = 3  # of qwen2-classes
MODELS = {"Reward": "llama-reward", "class": "qwen2-classes", "classes": "qwen2-classes", "stream": "qwen3-stream"}
ALL = ("DPO", "KTO", "SFT", "tokens", "taught", *MODELS)
TOP_K = 7


def model_of(kind: str) -> str:
    return MODELS.get(kind, "qwen3-tied")


def documents(kind: str) -> list[Document]:
    """DPO, KTO, Reward: what TRL's trainer reads; SFT too, the same texts with nothing to compare; tokens, taught: each with a weight,
    every other with weights of its tokens, and some tokens of a verdict; class, classes: one of several, any of several, of a whole text;
    stream: at every token."""
    if kind in ("DPO", "KTO", "Reward"):
        return test_trl.documents(kind)
    rng, made = np.random.default_rng(11), []
    for number, one in enumerate(test_trl.documents("KTO")):
        document = replace(one, side=0, weight=1.0 if kind == "SFT" else 0.5 + number / 16)
        if kind in ("tokens", "taught"):
            own = rng.integers(1, 9, len(one.tokens)).astype(np.float32) / 4 if number % 2 else None
            document = replace(document, verdict=rng.random(len(one.tokens)) < 0.3, weights=own)
        elif kind != "SFT":
            asked, nothing = np.full(len(one.tokens), IGNORED), np.full(len(one.tokens), IGNORED)
            asked[-1] = 1 << number % CLASSES if kind == "class" else rng.integers(1 << CLASSES)
            if kind == "stream":  # a severity, and categories also where it is safe
                asked = 1 << rng.integers(3, size=len(asked)) | rng.integers(4, size=len(asked)) << 3
            document = replace(document, labels=nothing, classes=asked)
        made.append(document)
    return made


def loader(kind: str, dp_rank: int = 0, dp_size: int = 1) -> Loader:
    """Two micro-batches a rank, on a grid of which a rank has two rows at least."""
    rows = max(1, test_trl.ROWS // (2 * dp_size))
    made = Loader(
        InMemory(documents(kind)), row_length=test_trl.ROW, rows_per_step=test_trl.ROWS, rows_per_micro_batch=rows, seed=1,
        dp_rank=dp_rank, dp_size=dp_size,
    )  # fmt: skip
    assert made.rows == test_trl.ROWS
    return made


# --- the reference numbers -------------------------------------------------------------------------------------------------------


@dataclass
class Said:
    """What transformers' model says of one document's n labelled positions."""

    document: Document
    z: Tensor  # [n, V] logits, or [n, L] scores
    ids: Tensor  # [n] the tokens, or the classes as bits
    verdict: Tensor  # [n] bool
    compared: Tensor  # [n, V] log-probabilities of the reference, or a teacher
    own: Tensor | float = 1.0  # [n] weights

    @property
    def logp(self) -> Tensor:
        """`[n]` log π."""
        return self.z.log_softmax(-1).gather(-1, self.ids[:, None])[:, 0]

    @property
    def reference(self) -> Tensor:
        """`[n]` log π_ref."""
        return self.compared.gather(-1, self.ids[:, None])[:, 0]

    @property
    def weight(self) -> Tensor:
        """`[n]`."""
        return torch.full(self.ids.shape, self.document.weight, dtype=torch.float64) * self.own

    @property
    def ratio(self) -> Tensor:
        """log π/π_ref of the answer."""
        return (self.logp - self.reference).sum()

    @property
    def truths(self) -> Tensor:
        """`[n, L]` of bits."""
        return (self.ids[:, None] >> torch.arange(self.z.shape[1]) & 1).to(self.z.dtype)


Formula = Callable[[Sequence[Said]], Tensor]


@dataclass(frozen=True)
class Case:
    """A loss of ours and where its number is from: options of TRL's trainer, or a formula."""

    kind: str
    loss: LossFunction
    trl: dict[str, Any] | None = None
    formula: Formula | None = field(default=None)


def per_pair(each: Callable[[Said, Said], Tensor]) -> Formula:
    """The mean over pairs."""

    def value(said: Sequence[Said]) -> Tensor:
        return torch.stack([each(*pair) for pair in pairs_of(said)]).mean()

    return value


def pairs_of(said: Sequence[Said]) -> list[tuple[Said, Said]]:
    return [(one, other) for one, other in pairwise(said) if other.document.joined]


def per_token(each: Callable[[Said], Tensor]) -> Formula:
    """The mean over labelled positions, each with its weight."""

    def value(said: Sequence[Said]) -> Tensor:
        return sum((one.weight * each(one)).sum() for one in said) / sum(one.weight.sum() for one in said)  # type: ignore[return-value]

    return value


def nll_of_better(said: Sequence[Said]) -> Tensor:
    return -torch.cat([better.logp for better, _ in pairs_of(said)]).mean()


def exact(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of TRL's gives that would round to fp32."""
    with mock.patch.object(Tensor, "float", lambda self: self):
        return function(*args)


def cpo(averaged: bool, sft: float, **options: Any) -> Formula:
    """TRL's cpo_loss, and the other term."""

    def value(said: Sequence[Said]) -> Tensor:
        from trl.experimental.cpo import CPOTrainer

        settings = {"alpha": 0.0, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu"), **options}
        better, worse = (
            torch.stack([x.logp.mean() if averaged else x.logp.sum() for x in side]) for side in zip(*pairs_of(said), strict=True)
        )
        found: Tensor = exact(CPOTrainer.cpo_loss, SimpleNamespace(**settings), better, worse)[0]
        return found.mean() + sft * nll_of_better(said)

    return value


def orpo(beta: float) -> Formula:
    """TRL's odds_ratio_loss; its other term takes the prompt's tokens too, the paper's does not."""

    def value(said: Sequence[Said]) -> Tensor:
        from trl.experimental.orpo import ORPOTrainer

        better, worse = (torch.stack([x.logp.mean() for x in side]) for side in zip(*pairs_of(said), strict=True))
        settings = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
        found: Tensor = exact(ORPOTrainer.odds_ratio_loss, settings, better, worse)[0]
        return nll_of_better(said) - found.mean()

    return value


def distilled(said: Said) -> Tensor:
    """TRL's forward KL over the teacher's most probable tokens and the rest as one, in `[n]`; and half of what the labels say."""
    from trl.experimental.async_distillation import async_distillation_trainer as theirs

    values, ids = said.compared.topk(TOP_K)
    mask = torch.ones_like(ids, dtype=torch.bool)
    student, _ = theirs._add_tail_bucket(said.z.log_softmax(-1).gather(-1, ids), mask)
    teacher, support = theirs._add_tail_bucket(values, mask)
    found: Tensor = theirs._jsd_divergence(student, teacher, beta=0, support_mask=support)
    return found.sum(-1) - 0.5 * said.logp


def bco(beta: float, desirable: float, undesirable: float) -> Formula:
    def value(said: Sequence[Said]) -> Tensor:
        rewards = beta * torch.stack([one.ratio for one in said])
        shift = rewards.mean().detach()
        weights = torch.tensor([desirable if one.document.side > 0 else undesirable for one in said], dtype=torch.float64)
        wanted = torch.tensor([one.document.side > 0 for one in said])
        p = torch.where(wanted, torch.sigmoid(rewards - shift), 1 - torch.sigmoid(rewards - shift))
        return (weights * -p.log()).mean()

    return value


def alpha_divergence(alpha: float, beta: float) -> Formula:
    def each(better: Said, worse: Said) -> Tensor:
        first, second = ((one.ratio.exp() ** (alpha - 1) - 1) / (alpha - 1) for one in (better, worse))
        return -torch.sigmoid(beta * (first - second)).log()

    return per_pair(each)


def classes(each: Callable[[Tensor, Tensor], Tensor]) -> Formula:
    """Of scores `[L]` and truths `[L]`."""
    return per_token(lambda said: torch.stack([each(z, y) for z, y in zip(said.z, said.truths, strict=True)]))


def asymmetric(z: Tensor, y: Tensor) -> Tensor:
    p = z.sigmoid()
    lowered = (p - 0.05).clamp(min=0)
    return -(y * (1 - p) * p.log() + (1 - y) * lowered**4 * (1 - lowered).log()).mean()


def streamed(z: Tensor, y: Tensor) -> Tensor:
    value = F.cross_entropy(z[:3], y[:3].argmax())
    named = y[3:].nonzero()[:, 0]
    if y[0] == 0 and len(named):
        value = value + 0.4 * torch.stack([F.cross_entropy(z[3:], one) for one in named]).mean()
    return value


def balanced(z: Tensor, y: Tensor) -> Tensor:
    weights = torch.tensor([0.01 / (1 - 0.99**n) for n in COUNTS], dtype=torch.float64)
    c, p = y.argmax(), z.softmax(-1)
    return weights[c] * 3 / weights.sum() * (1 - p[c]) * -p[c].log()


def adjusted(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z + 0.7 * (torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)).log(), y.argmax())


B, E = 0.3, 0.2
COUNTS = (900.0, 90.0, 10.0)
POSITIVE = (1.0, 0.3, 2.7)
RATED = {"beta": B, "desirable_weight": 1.3, "undesirable_weight": 0.7}


def dpo_case(loss: Callable[..., Loss], name: str | None = None, **options: Any) -> Case:
    """A loss whose keywords are TRL's options."""
    trl = {"beta": B, "loss_type": [name or loss.__name__], **options}
    return Case("DPO", partial(loss, beta=B, **options), trl)


def held(loss: LossFunction, name: str, **options: Any) -> list[Case]:
    """One of the losses that may be held to the reference by another divergence than the reverse KL."""
    trl = {"beta": B, "loss_type": [name], **options}
    return [
        Case("DPO", partial(loss, divergence=ours), {**trl, "f_divergence_type": theirs})
        for ours, theirs in ((0.0, "forward_kl"), ("js", "js_divergence"))
    ]


PARTS = ((0.8, partial(losses.dpo, beta=B)), (0.2, partial(losses.bco_pair, beta=B)), (0.5, losses.sft))
LD, WPO = losses.length_desensitized, losses.wpo
CASES: dict[str, list[Case]] = {
    "cross_entropy": [
        Case("SFT", losses.cross_entropy, {}), Case("tokens", losses.cross_entropy, formula=per_token(lambda said: -said.logp)),
    ],
    "moderation": [
        Case(
            "tokens", partial(losses.moderation, verdict_weight=3.3),
            formula=lambda said: sum((x.weight * (1 + 2.3 * x.verdict.double()) * -x.logp).sum() for x in said)
            / sum(x.weight.sum() for x in said),
        ),
    ],
    # transformers' label smoother, which TRL takes, adds up in fp32.
    "label_smoothing": [
        Case(
            "tokens", partial(losses.label_smoothing, epsilon=E),
            formula=per_token(lambda said: F.cross_entropy(said.z, said.ids, reduction="none", label_smoothing=E)),
        ),
    ],
    "focal": [
        Case(
            "tokens", partial(losses.focal, gamma=gamma),
            formula=per_token(lambda said, gamma=gamma: (1 - said.logp.exp()) ** gamma * -said.logp),  # type: ignore[misc]
        ) for gamma in (0.5, 2.0)
    ],
    "z_loss": [
        Case(
            "tokens", partial(losses.z_loss, weight=0.03),
            formula=per_token(lambda said: -said.logp + 0.03 * said.z.exp().sum(-1).log() ** 2),
        ),
    ],
    "dft": [Case("SFT", losses.dft, {"loss_type": "dft"})],
    "distillation": [Case("taught", partial(losses.distillation, sft_weight=0.5), formula=per_token(distilled))],
    "dpo": [
        dpo_case(losses.dpo, "sigmoid"), *held(partial(losses.dpo, beta=B), "sigmoid"),
        Case(
            "DPO", partial(losses.dpo, beta=B, sft_weight=0.5),
            {"beta": B, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        ),
        # With a = -log σ(βΔ) and b = -log σ(-βΔ), TRL's robust loss is ((1 - ε)·a - ε·b) / (1 - 2ε): (1 - ε)·a + ε·b is a sum of both.
        Case(
            "DPO", partial(losses.dpo, beta=B, label_smoothing=E),
            {"beta": B, "loss_type": ["sigmoid", "robust"], "loss_weights": [2 * (1 - E), 2 * E - 1], "label_smoothing": E},
        ),
        Case("DPO", partial(losses.dpo, beta=B, divergence=0.4), formula=alpha_divergence(0.4, B)),
        Case("DPO", partial(losses.dpo, beta=B, divergence=1.7), formula=alpha_divergence(1.7, B)),
    ],
    "dpo_norm": [dpo_case(losses.dpo_norm, "sigmoid_norm"), *held(partial(losses.dpo_norm, beta=B), "sigmoid_norm")],
    "ipo": [
        dpo_case(losses.ipo), *held(partial(losses.ipo, beta=B), "ipo"),
        Case("DPO", partial(losses.ipo, beta=B, sft_weight=0.5), {"beta": B, "loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}),
    ],
    "hinge": [dpo_case(losses.hinge), *held(partial(losses.hinge, beta=B), "hinge")],
    "robust": [
        dpo_case(losses.robust, label_smoothing=E),
        *held(partial(losses.robust, beta=B, label_smoothing=E), "robust", label_smoothing=E),
    ],
    "exo_pair": [
        dpo_case(losses.exo_pair, label_smoothing=E),
        *held(partial(losses.exo_pair, beta=B, label_smoothing=E), "exo_pair", label_smoothing=E),
    ],
    "nca_pair": [dpo_case(losses.nca_pair)],
    "bco_pair": [dpo_case(losses.bco_pair)],
    "sppo_hard": [dpo_case(losses.sppo_hard)],
    "aot": [dpo_case(losses.aot), dpo_case(losses.aot, label_smoothing=E)],
    "aot_unpaired": [dpo_case(losses.aot_unpaired), dpo_case(losses.aot_unpaired, label_smoothing=E)],
    "apo_zero": [dpo_case(losses.apo_zero)],
    "apo_down": [dpo_case(losses.apo_down)],
    "discopop": [
        Case("DPO", partial(losses.discopop, beta=B, tau=0.2), {"beta": B, "loss_type": ["discopop"], "discopop_tau": 0.2}),
        *held(partial(losses.discopop, beta=B, tau=0.2), "discopop", discopop_tau=0.2),
    ],
    "simpo": [
        Case("DPO", partial(losses.simpo, beta=2.5, gamma=0.8), formula=cpo(True, 0.0, loss_type="simpo", beta=2.5, simpo_gamma=0.8)),
    ],
    "cpo": [
        Case("DPO", partial(losses.cpo, beta=B, sft_weight=sft), formula=cpo(False, sft, loss_type="sigmoid", beta=B)) for sft in (0.0, 0.7)
    ],
    "orpo": [Case("DPO", partial(losses.orpo, beta=B), formula=orpo(B))],
    "sft": [Case("DPO", losses.sft, {"loss_type": ["sft"]})],
    "kto": [Case("KTO", partial(losses.kto, **RATED), RATED)],
    "apo_zero_unpaired": [Case("KTO", partial(losses.apo_zero_unpaired, **RATED), {**RATED, "loss_type": "apo_zero_unpaired"})],
    "bco": [Case("KTO", partial(losses.bco, **RATED), formula=bco(*RATED.values()))],
    "weighted": [
        Case(
            "DPO", partial(losses.weighted, parts=PARTS),
            {"beta": B, "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.5]},
        ),
    ],
    "wpo": [
        Case("DPO", partial(WPO, loss=partial(loss, beta=B)), {"beta": B, "loss_type": [name], "use_weighting": True})
        for loss, name in ((losses.dpo, "sigmoid"), (losses.ipo, "ipo"), (losses.sppo_hard, "sppo_hard"))
    ],
    "length_desensitized": [
        Case("DPO", partial(LD, loss=loss, alpha=0.3), {"beta": B, "ld_alpha": 0.3, **trl})
        for loss, trl in (
            (partial(losses.dpo, beta=B), {}),
            (partial(losses.ipo, beta=B), {"loss_type": ["ipo"]}),
            (partial(losses.weighted, parts=PARTS), {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.5]}),
            (partial(WPO, loss=partial(losses.nca_pair, beta=B)), {"loss_type": ["nca_pair"], "use_weighting": True}),
        )
    ],
    "reward": [
        Case("Reward", losses.reward, {}), Case("Reward", partial(losses.reward, centering=0.3), {"center_rewards_coefficient": 0.3}),
    ],
    "classification": [
        Case("class", losses.classification, formula=classes(lambda z, y: F.cross_entropy(z, y.argmax()))),
        Case(
            "class", partial(losses.classification, class_weights=(1.0, 0.3, 2.7), gamma=2.0),
            formula=classes(lambda z, y: (1.0, 0.3, 2.7)[int(y.argmax())] * -(1 - (p := z.softmax(-1) @ y)) ** 2 * p.log()),
        ),
    ],
    "class_balanced": [Case("class", partial(losses.class_balanced, counts=COUNTS, beta=0.99, gamma=1.0), formula=classes(balanced))],
    "logit_adjusted": [Case("class", partial(losses.logit_adjusted, counts=COUNTS, tau=0.7), formula=classes(adjusted))],
    "multilabel": [
        Case(
            "classes", partial(losses.multilabel, pos_weight=POSITIVE),
            formula=classes(partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(POSITIVE, dtype=torch.float64))),
        ),
        Case("classes", partial(losses.multilabel, gamma_positive=1.0, gamma_negative=4.0, clip=0.05), formula=classes(asymmetric)),
    ],
    "streaming": [Case("stream", partial(losses.streaming, category_weight=0.4), formula=classes(streamed))],
}  # fmt: skip
NAMED = {f"{name} {number}": case for name, cases in CASES.items() for number, case in enumerate(cases)}


def models(kind: str) -> tuple[nn.Module, nn.Module | None]:
    """transformers', with the policy's weights, and with the reference's where the head is the vocabulary."""
    from test_score_head import hf_model

    return (hf_model(MODELS[kind]), None) if kind in MODELS else preferences.models(model_of(kind))


def of_trl(trl: Trl, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """TRL's value and gradients."""
    assert case.trl is not None
    if case.kind == "SFT":
        parts = [Texts(trl.tokenizer)._parts(document) for document in documents("SFT")]
        trainer = trl.trainer("SFT", [{"prompt": prompt, "completion": answer} for prompt, answer in parts], models("SFT")[0], **case.trl)
        inputs = inputs_of(trainer)
    else:
        same = test_trl.Same(case.kind, case.loss, case.trl, model=model_of(case.kind))
        trainer = test_trl.trainer_of(trl, same)
        inputs = test_trl.batch_of(trainer, same)
    torch.set_default_dtype(torch.float64)  # TRL makes a tensor of ε
    try:
        return value_of(trainer, inputs), test_trl.gradients_of(trainer)
    finally:
        torch.set_default_dtype(torch.float32)


def of_formula(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The formula's value and gradients, each document through the model alone."""
    assert case.formula is not None
    policy, reference = models(case.kind)
    policy.zero_grad()
    said = []
    for document in documents(case.kind):
        tokens, labels = torch.from_numpy(document.tokens)[None], torch.from_numpy(document.labels)
        if document.classes is not None:
            bits = torch.from_numpy(document.classes)
            z = policy(tokens).logits.flatten(0, -2)
            said.append(Said(document, z, bits[bits != IGNORED], bits[:0] > 0, torch.zeros(0, 0)))
            continue
        assert reference is not None
        at = torch.nonzero(labels[1:] != IGNORED)[:, 0]
        ids, verdict = labels[at + 1], torch.from_numpy(document.verdict)[at + 1]
        with torch.no_grad():
            compared = reference(tokens).logits[0, at].log_softmax(-1)
        own = 1.0 if document.weights is None else torch.from_numpy(document.weights)[at + 1].double()
        said.append(Said(document, policy(tokens).logits[0, at], ids, verdict, compared, own))
    value = case.formula(said)
    value.backward()
    return value.detach(), test_trl.gradients_of(SimpleNamespace(model=policy))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file with the reference numbers, which the ranks read."""
    from test_weights import write_tokenizer
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("trl")
    write_tokenizer(folder, test_trl.VOCAB)
    trl = Trl(folder, AutoTokenizer.from_pretrained(folder))
    with in_double():
        numbers = {name: of_trl(trl, case) if case.trl is not None else of_formula(case) for name, case in NAMED.items()}
    torch.save(numbers, folder / "expected.pt")
    return str(folder / "expected.pt")


# --- ours ------------------------------------------------------------------------------------------------------------------------


@needs("pairs", "reference", "step")
def of_pairs(head: Head, batch: Batch) -> Loss:
    """Needs all that a loss of pairs may need."""
    raise NotImplementedError


@needs("rated", "kl", "step")
def of_rated(head: Head, batch: Batch) -> Loss:
    """Needs all that a loss of rated answers may need."""
    raise NotImplementedError


NEEDS = {"DPO": of_pairs, "KTO": of_rated, "taught": losses.distillation}


def compare(parallel: P, file: str) -> dict[str, tuple[float, int]]:
    """What a rank finds for each case: the worst error of value and gradients, and how many elements it owns. A model is built once."""
    expected, found = torch.load(file, weights_only=True), {}
    with started(parallel, tiny.shape(model_of("DPO"))) as grid:  # as many kv heads as the others
        by_model = defaultdict(list)
        for kind in ALL:
            by_model[model_of(kind)].append(kind)
        for model, kinds in by_model.items():
            run = prepared(model, parallel, grid)
            for kind in kinds:
                batches = completed(kind, run)
                for name, case in NAMED.items():
                    if case.kind == kind:
                        metrics = train_step(run.optimizer.chunks, batches, case.loss, grid)
                        value, gradients = expected[name]
                        off = test_trl.off(float(metrics["loss"]), float(value)) if metrics else 0.0
                        assert all(math.isfinite(float(x)) for x in metrics.values()), (name, metrics)
                        found[name] = max(off, parity.worst(run, gradients, parity.gradient)), parity.owned(run)
            del run, batches
    gc.collect()
    return found


def prepared(model: str, parallel: P, grid: Grid) -> Run:
    shape = tiny.shape(model)
    chunks, _ = build(ModelConfig(path="", dtype="float64"), shape, grid)
    items = load(chunks, shape, grid, Tensors(tiny.weights(model)))
    wrapped = data_parallel(chunks, grid, overlap=False)
    return Run(grid, ParityCase(model, parallel), Optimizer(OptimConfig(), wrapped, items, grid))


def completed(kind: str, run: Run) -> list[Batch]:
    """The step's micro-batches of this rank, with all that losses of this kind may need."""
    grid, model = run.grid, model_of(kind)
    made = loader(kind, grid.dp.rank, grid.dp.size)
    if kind not in NEEDS:
        return made.step(0)
    cfg = preferences.config(NEEDS[kind], ReferenceConfig(top_k=TOP_K))
    reference = Reference(cfg, tiny.shape(model), grid, run.optimizer.chunks, (), None, Tensors(preferences.other_weights(model)))
    return reference.complete(made.step(0), partial(made.mismatched, 0, grid.pp.size))


@pytest.fixture(scope="module")
def errors(expected: str) -> dict[str, dict[str, float]]:
    """Grid → case → the worst error."""
    found = {}
    for label, parallel in GRIDS.items():
        ranks = distributed.run(WORLD, compare, parallel, expected)
        for name, case in NAMED.items():
            assert sum(rank[name][1] for rank in ranks) == tiny.shape(model_of(case.kind)).parameters()
        found[label] = {name: max(rank[name][0] for rank in ranks) for name in NAMED}
    if os.environ.get("REPORT"):
        worst = {name: max(found[grid][f"{name} {i}"] for grid in found for i in range(len(CASES[name]))) for name in every_loss()}
        ERRORS.write_text(json.dumps({name: float(f"{error:.0e}") for name, error in worst.items()}, indent=1) + "\n", encoding="utf-8")
    return found


@pytest.mark.parametrize("name", every_loss())
def test_loss(name: str, errors: dict[str, dict[str, float]]) -> None:
    """Value and every gradient are the reference's, on every grid."""
    assert CASES.get(name), f"losses.{name} has no reference number: give it one in CASES"
    faults = [f"{grid}, case {i}: off by {found[f'{name} {i}']:.1e}" for grid, found in errors.items() for i in range(len(CASES[name]))
              if not found[f"{name} {i}"] <= TOLERANCE]  # fmt: skip
    assert not faults, "\n".join(faults)


def test_each_case_is_of_the_loss_that_it_is_named_after() -> None:
    for name, cases in CASES.items():
        assert {losses.unbound(case.loss)[0] for case in cases} == {every_loss()[name]}
        assert all((case.trl is None) is not (case.formula is None) for case in cases)


def test_every_keyword_has_a_case() -> None:
    """Each keyword of each loss is given in one of its cases, and not as its default: a number that ignored it would be seen."""
    for name, cases in CASES.items():
        own = inspect.signature(every_loss()[name]).parameters
        given = {key for case in cases for key, value in losses.unbound(case.loss)[1].items() if value != own[key].default}
        assert given == {key for key in own if key not in ("head", "batch")}, name


# --- the list --------------------------------------------------------------------------------------------------------------------


def test_the_page_s_list_is_the_code_s() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, measured()) == text, "python tools/list_losses.py writes it anew"
    assert measured().keys() == every_loss().keys()
    assert all(error <= TOLERANCE for error in measured().values())


def test_a_loss_without_a_number_is_not_listed() -> None:
    with pytest.raises(MegamodError, match=r"no error of losses\.dpo: REPORT=1"):
        page(PAGE.read_text(encoding="utf-8"), {name: 0.0 for name in every_loss() if name != "dpo"})
    with pytest.raises(MegamodError, match="each once"):
        page("", measured())


# --- what must not change, whatever the data --------------------------------------------------------------------------------------


def test_needs_are_those_of_the_losses_within() -> None:
    inner = partial(losses.aot, beta=0.2)
    assert losses.needs_of(partial(losses.weighted, parts=((1.0, inner), (0.5, losses.sft)))) == {"pairs", "reference", "step"}
    assert losses.needs_of(partial(losses.wpo, loss=partial(losses.length_desensitized, loss=losses.dpo))) == {"pairs", "reference"}
    assert losses.needs_of(partial(losses.weighted, parts=((1.0, losses.cross_entropy),))) == {"weights"}
    assert losses.needs_of(partial(losses.weighted, parts=())) == frozenset()


LOSS = """from dataclasses import replace
from functools import partial
from megamod import losses
from megamod.config import load
def config():
    return replace(load("{}/tiny_dpo.py"), loss=partial(losses.wpo, loss={}))
"""


def test_a_loss_within_a_loss_is_configured_as_any(tmp_path: Path) -> None:
    path, wrong = tmp_path / "run.py", tmp_path / "wrong.py"
    path.write_text(LOSS.format(PAGE.parent, "losses.dpo"))
    cfg = load_config(path, ["loss.loss.beta=0.7"])
    assert losses.unbound(losses.unbound(cfg.loss)[1]["loss"]) == (losses.dpo, {"beta": 0.7})
    assert as_json(cfg.loss)["loss"] == {"call": "megamod.losses:dpo", "beta": 0.7}
    assert "no keyword 'betta'" in complaint(lambda: load_config(path, ["loss.loss.betta=0.7"]))
    assert "'beta' is below a plain value" in complaint(lambda: load_config(path, ["loss.los.beta=0.7"]))
    wrong.write_text(LOSS.format(PAGE.parent, "partial(losses.dpo, betta=1.0)"))
    assert "loss: dpo takes no keyword 'betta'" in complaint(lambda: load_config(wrong))


def test_what_was_not_asked_for_is_refused() -> None:
    batch = loader("DPO").step(0)[0]
    with pytest.raises(MegamodError, match=re.escape('@losses.needs("reference", "step")')):
        _ = batch.step


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (partial(losses.robust, label_smoothing=0.5), "label_smoothing = 0.5: from 0 to below 1/2 was expected"),
        (partial(losses.exo_pair, label_smoothing=0.0), "label_smoothing = 0.0: above 0 and below 1 was expected"),
        (partial(losses.class_balanced, counts=(3, 0)), "counts = (3, 0): rows of each class was expected"),
        (partial(losses.class_balanced, counts=(3, 1), beta=1.0), "beta = 1.0: from 0 to below 1 was expected"),
        (partial(losses.logit_adjusted, counts=(0, 1)), "counts = (0, 1): rows of each class was expected"),
    ],
)
def test_a_number_that_a_formula_divides_by_is_refused(loss: Callable[..., Loss], what: str) -> None:
    with pytest.raises(MegamodError, match=re.escape(f"loss: {what}")):
        loss(None, None)
