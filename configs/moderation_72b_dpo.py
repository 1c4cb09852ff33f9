"""DPO on Qwen2.5-72B after configs/moderation_72b_lora.py, on the same 8 GPUs: the adapter of that run is trained on.

launch/node.sh configs/moderation_72b_dpo.py model.path=/models/Qwen2.5-72B-Instruct data.train=pairs.jsonl \
    lora.path=runs/moderation_72b_lora/peft/step-00001000

The reference is that adapter as it is at first, frozen beside the one that is trained: 72B weights are in memory once. Without lora.path
the adapter is new, and the reference is the base.
"""

from dataclasses import replace
from functools import partial

import moderation_72b_lora

from megamod import losses
from megamod.config import RunConfig


def config() -> RunConfig:
    base = moderation_72b_lora.config()
    assert base.lora is not None
    return replace(
        base,
        dir="runs/moderation_72b_dpo",
        steps=300,
        loss=partial(losses.dpo, beta=0.1, sft_weight=0.1),
        lora=replace(base.lora, lora_dropout=0.0),
        optim=replace(base.optim, lr=1e-5, min_lr=1e-6, warmup_steps=20),
    )
