"""LoRA on Qwen2.5-72B as a moderation model on one node of 8 GPUs of 80 GB: tp 8 with sequence parallelism.

launch/node.sh configs/moderation_72b_lora.py model.path=/models/Qwen2.5-72B-Instruct data.train=train.jsonl

On several nodes (sbatch --nodes 2 launch/slurm.sbatch …) dp is their number. Or each GPU takes rows of its own and keeps an eighth of the
frozen base: parallel.tp=1 parallel.sp=false parallel.shard_base=true.
"""

from dataclasses import replace
from pathlib import Path

import moderation_7b_lora

from megamod.config import ParallelConfig, RunConfig

MODELS = Path(__file__).parent / "models"


def config() -> RunConfig:
    base = moderation_7b_lora.config()
    return replace(
        base,
        dir="runs/moderation_72b_lora",
        model=replace(base.model, path="/models/Qwen2.5-72B-Instruct", shape=str(MODELS / "qwen2.5-72b")),
        parallel=ParallelConfig(tp=8, sp=True),
        optim=replace(base.optim, lr=5e-5, min_lr=5e-6),
    )
