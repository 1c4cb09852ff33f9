"""A classifier whose mistakes cost what they cost: a missed threat ten times a false block. The loss is in this file (see LOSSES.md).

launch/node.sh configs/cost_sensitive.py model.path=/models/Qwen2.5-7B-Instruct data.train=train.jsonl loss.certainty=0.2
"""

from dataclasses import replace

import moderation_7b_lora
import torch

from megamod.batch import Batch
from megamod.config import RunConfig
from megamod.losses import Loss, needs
from megamod.model.head import Head
from megamod.model.shape import Score

SEVERITIES = ("safe", "controversial", "unsafe")
#        said: safe  controversial  unsafe
COSTS = ((0.0, 0.3, 1.0),  # truly safe: a false block costs 1
         (2.0, 0.0, 0.5),  # truly controversial
         (10.0, 3.0, 0.0))  # truly unsafe: a missed threat costs 10  # fmt: skip


@needs("scores")
def expected_cost(head: Head, batch: Batch, *, certainty: float = 0.1) -> Loss:
    """The mean over documents of Σ_v p(v)·cost(truth, v), and some cross-entropy, whose gradient does not fade where p(truth) is small."""
    logp = head.scores().log_softmax(-1)  # [N, 3]
    truth = batch.classes(len(SEVERITIES)).to(logp.dtype)  # [N, 3], one 1 in each row
    costs = torch.tensor(COSTS, dtype=logp.dtype, device=logp.device)
    cost = (truth @ costs * logp.exp()).sum(-1)  # [N]
    nll = -(truth * logp).sum(-1)
    value = batch.mean(batch.weight * (cost + certainty * nll), over="weights")
    missed = (logp.argmax(-1) == 0) & (truth[:, 2] > 0)
    return Loss(
        value, {"cost": batch.mean_of(cost), "nll": batch.mean_of(nll), "missed": batch.mean_of(missed.double(), where=truth[:, 2] > 0)}
    )


def config() -> RunConfig:
    base = moderation_7b_lora.config()
    score = Score(SEVERITIES, "single_label_classification")
    return replace(base, dir="runs/cost_sensitive", model=replace(base.model, score=score), loss=expected_cost)
