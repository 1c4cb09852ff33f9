"""LoRA on Qwen2.5-7B as a moderation model, one node of 8 GPUs: dp 8, the whole frozen base on each.

launch/node.sh configs/moderation_7b_lora.py model.path=/models/Qwen2.5-7B-Instruct data.train=train.jsonl
"""

from dataclasses import replace

import moderation_7b

from megamod.config import LoraConfig, ParallelConfig, RunConfig


def config() -> RunConfig:
    base = moderation_7b.config()
    return replace(
        base,
        dir="runs/moderation_7b_lora",
        model=replace(base.model, recompute="full"),
        parallel=ParallelConfig(),
        lora=LoraConfig(r=64, lora_alpha=64, use_rslora=True, lora_dropout=0.05),
        optim=replace(base.optim, lr=1e-4, min_lr=1e-5, weight_decay=0.0),
    )
