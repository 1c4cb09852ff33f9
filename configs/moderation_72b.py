"""Full fine-tuning of Qwen2.5-72B as a moderation model on 64 GPUs of 80 GB: tp 8 · pp 4 · cp 2 with sequence parallelism.

Tensor parallelism stays inside a node; the last stage has fewer layers, since it also holds the vocabulary's head. On 16 nodes dp is 2.

    sbatch --nodes 8 launch/slurm.sbatch configs/moderation_72b.py model.path=/models/Qwen2.5-72B-Instruct data.train=train.jsonl
"""

from dataclasses import replace
from pathlib import Path

import moderation_7b

from megamod.config import ModelConfig, ParallelConfig, RunConfig

MODELS = Path(__file__).parent / "models"


def config() -> RunConfig:
    base = moderation_7b.config()
    return replace(
        base,
        dir="runs/moderation_72b",
        model=ModelConfig(path="/models/Qwen2.5-72B-Instruct", shape=str(MODELS / "qwen2.5-72b"), recompute="full"),
        data=replace(base.data, row_length=16384, rows_per_step=64),
        parallel=ParallelConfig(tp=8, pp=4, cp=2, sp=True, layers_per_stage=(21, 21, 21, 17)),
        optim=replace(base.optim, lr=5e-6, min_lr=5e-7),
    )
