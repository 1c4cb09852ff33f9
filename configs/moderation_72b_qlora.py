"""QLoRA on Qwen2.5-72B as a moderation model on one node of 8 GPUs of 80 GB: dp 8, the whole base in 4 bits on each.

launch/node.sh configs/moderation_72b_qlora.py model.path=/models/Qwen2.5-72B-Instruct data.train=train.jsonl

With parallel.shard_base=true a GPU keeps an eighth of the base, and gathers the rest as it goes. With parallel.tp=8 parallel.sp=true it
holds an eighth, and activations of an eighth of a row, for longer rows.
"""

from dataclasses import replace
from pathlib import Path

import moderation_7b_qlora

from megamod.config import RunConfig

MODELS = Path(__file__).parent / "models"


def config() -> RunConfig:
    base = moderation_7b_qlora.config()
    assert base.lora is not None
    return replace(
        base,
        dir="runs/moderation_72b_qlora",
        model=replace(base.model, path="/models/Qwen2.5-72B-Instruct", shape=str(MODELS / "qwen2.5-72b")),
        lora=replace(base.lora, r=32, lora_alpha=32),
        optim=replace(base.optim, lr=5e-5, min_lr=5e-6),
    )
