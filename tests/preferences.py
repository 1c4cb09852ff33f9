"""Preference losses for the parity tests: pairs of very different lengths, unlike sides, a reference of other weights, and their oracle."""

import gc
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import oracle
import tiny
import torch
from torch import Tensor, nn

from megamod import losses
from megamod.batch import Batch
from megamod.config import DataConfig, ModelConfig, ReferenceConfig, RunConfig
from megamod.config import load as load_config
from megamod.data.documents import IGNORED, Document, InMemory
from megamod.data.loader import Loader
from megamod.losses import LossFunction
from megamod.parallel import grid as grids
from megamod.train import train
from megamod.weights.load import Tensors
from tools.reference_logprobs import compute

ROW = 32
EXACT = ["model.dtype=float64", "data.row_length=128", "data.train.documents=64"]
FIXED = [*EXACT, "optim.schedule=constant", "log.every=1", "log.tensorboard=false", "data.rows_per_step=4"]
LOSSES: dict[str, LossFunction] = {
    "dpo": partial(losses.dpo, beta=0.3, label_smoothing=0.1, sft_weight=0.5),
    "ipo": partial(losses.ipo, beta=0.4),
    "kto": partial(losses.kto, beta=0.3, desirable_weight=1.3, undesirable_weight=0.7),
}
# Tokens of the prompt, of the better and of the worse answer: a pair fills a row, or shares it.
PAIRS = ((2, 3, 25), (5, 11, 11), (8, 1, 15), (3, 20, 1), (1, 1, 1), (10, 6, 6), (4, 2, 9), (1, 28, 2), (6, 10, 10), (2, 2, 2), (3, 4, 5))
ALONE = ((4, 9, True), (1, 2, True), (12, 3, False), (2, 11, True))  # rated answers that are no pair's


def documents(vocab: int) -> list[Document]:
    """Pairs, and rated answers without one, each with a weight."""
    rng = np.random.default_rng(5)
    made = []
    for prompt, *answers in PAIRS:
        begun, weight = rng.integers(vocab, size=prompt), rng.uniform(0.5, 1.5)
        made += [
            replace(_document(begun, rng.integers(vocab, size=n), weight), side=side, joined=side < 0)
            for n, side in zip(answers, (1, -1), strict=True)
        ]
    for prompt, answer, wanted in ALONE:
        one = _document(rng.integers(vocab, size=prompt), rng.integers(vocab, size=answer), rng.uniform(0.5, 1.5))
        made.append(replace(one, side=1 if wanted else -1))
    return made


def _document(prompt: np.ndarray[Any, Any], answer: np.ndarray[Any, Any], weight: float) -> Document:
    tokens = np.concatenate([prompt, answer]).astype(np.int32)
    labels = np.concatenate([np.full(len(prompt), IGNORED), answer])
    return Document(tokens, labels, np.zeros(len(tokens), np.bool_), weight)


def loader(model: str, dp_rank: int = 0, dp_size: int = 1, micro_batches: int = 8) -> Loader:
    """Steps of eight rows, as `micro_batches` micro-batches a rank."""
    made = InMemory(documents(tiny.shape(model).vocab))
    rows = 8 // (dp_size * micro_batches)
    return Loader(made, row_length=ROW, rows_per_step=8, rows_per_micro_batch=rows, seed=1, dp_rank=dp_rank, dp_size=dp_size)


def other_weights(model: str) -> dict[str, Tensor]:
    """The reference's: not the policy's, as they would be after some steps."""
    generator = torch.Generator().manual_seed(23)
    return {name: x + 0.02 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in tiny.weights(model).items()}


def config(loss: LossFunction, reference: ReferenceConfig | None = None, **more: Any) -> RunConfig:
    """What `Reference` reads of a run."""
    model = ModelConfig(path="", dtype="float64")
    return RunConfig("", 1, model, DataConfig(train=""), loss=loss, reference=reference or ReferenceConfig(), **more)


def source(model: str) -> Tensors:
    return Tensors(other_weights(model))


def models(model: str) -> tuple[nn.Module, nn.Module]:
    """transformers', with the policy's weights and with the reference's."""
    policy, reference = oracle.model(model), oracle.model(model)
    missing = reference.load_state_dict(other_weights(model), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    return policy, reference


def oracle_of(model: str, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective of loss `name` over step 0 and its gradients, from two models of transformers', document by document."""
    policy, reference = models(model)
    made = loader(model)
    return oracle.run(policy, completed(policy, reference, made.step(0), made.mismatched(0)), LOSSES[name])


def completed(policy: nn.Module, reference: nn.Module, batches: Sequence[Batch], mismatched: Sequence[Batch]) -> list[Batch]:
    """The batches with the reference's log-probabilities and KTO's KL."""
    differences = torch.cat([b.per_sequence(logprobs(policy, b) - logprobs(reference, b))[b.side != 0] for b in mismatched])
    kl = differences.mean().clamp(min=0)
    return [replace(batch, stored=logprobs(reference, batch), divergence=kl) for batch in batches]


@torch.no_grad()
def logprobs(hf: nn.Module, batch: Batch) -> Tensor:
    """`[N]` of the labels."""
    hidden = oracle.hidden(hf, batch)
    return torch.log_softmax(hidden @ hf.get_submodule("lm_head").weight.t(), -1).gather(-1, batch.labels[:, None])[:, 0]  # type: ignore[union-attr, operator]


Runs = list[tuple[str, list[str]]]  # a config file and its overrides each


def trained_by_runs(runs: Runs) -> list[dict[int, dict[str, float]]]:
    """Runs one after the other on this rank's world: of each, what metrics.jsonl says of every step. `store` in front of the overrides
    has tools/reference_logprobs.py run instead."""
    found: list[dict[int, dict[str, float]]] = []
    for path, overrides in runs:
        if overrides[0] == "store":
            compute(load_config(path, overrides[1:]))
            grids.stop()
            found.append({})
            continue
        directory = train(load_config(path, [*FIXED, *overrides]))
        lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        found.append({line["step"]: line for line in lines})
        gc.collect()
    return found
