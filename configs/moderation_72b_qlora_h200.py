"""QLoRA on Qwen2.5-72B as a moderation model on one H200 of 141 GB, rows of 8,192 tokens.

NPROC=1 launch/node.sh configs/moderation_72b_qlora_h200.py model.path=/models/Qwen2.5-72B-Instruct data.train=train.jsonl
"""

from dataclasses import replace

import moderation_72b_qlora

from megamod.config import RunConfig


def config() -> RunConfig:
    base = moderation_72b_qlora.config()
    return replace(base, dir="runs/moderation_72b_qlora_h200", data=replace(base.data, row_length=8192))
