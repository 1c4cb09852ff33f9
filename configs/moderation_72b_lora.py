"""LoRA on Qwen2.5-72B as a moderation model on 16 GPUs of 80 GB: tp 8 inside each node, dp 2, with sequence parallelism.

sbatch --nodes 2 launch/slurm.sbatch configs/moderation_72b_lora.py model.path=/models/Qwen2.5-72B-Instruct data.train=train.jsonl
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
