"""DPO after supervised training: an adapter on a model that configs/smollm2.py trained, from pairs of verdicts.

python tools/make_preferences.py rows.jsonl pairs.jsonl --verdicts verdicts.jsonl --below 0.9
launch/node.sh configs/smollm2_dpo.py model.path=runs/smollm2/hf/step-00000178 data.train=pairs.jsonl

The adapter is new, so the reference is the model beneath it: the one that was trained before.
"""

from dataclasses import replace
from functools import partial

import smollm2

from megamod import losses
from megamod.config import LoraConfig, RunConfig


def config() -> RunConfig:
    base = smollm2.config()
    return replace(
        base,
        dir="runs/smollm2_dpo",
        steps=60,
        model=replace(base.model, path="runs/smollm2/hf/step-00000178"),
        data=replace(base.data, train="pairs.jsonl"),
        loss=partial(losses.dpo, beta=0.1, sft_weight=0.1),
        lora=LoraConfig(r=16, lora_alpha=32),
        optim=replace(base.optim, lr=1e-4, warmup_steps=4, weight_decay=0.0),
    )
