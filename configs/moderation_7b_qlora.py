"""QLoRA on Qwen2.5-7B as a moderation model on one card of 24 GB: the layers' weights in 4 bits, adapters on all of them.

NPROC=1 launch/node.sh configs/moderation_7b_qlora.py model.path=/models/Qwen2.5-7B-Instruct data.train=train.jsonl

The embedding and the head stay in bfloat16, 2 GiB of the 7.
"""

from dataclasses import replace

import moderation_7b_lora

from megamod.config import Quantization, RunConfig


def config() -> RunConfig:
    base = moderation_7b_lora.config()
    assert base.lora is not None
    return replace(
        base,
        dir="runs/moderation_7b_qlora",
        model=replace(base.model, quantization=Quantization()),
        data=replace(base.data, row_length=4096, rows_per_micro_batch=1),
        lora=replace(base.lora, r=16, lora_alpha=16),
    )
