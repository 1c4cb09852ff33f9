"""The main job on a laptop, from nothing: a Qwen3 of a few million weights learns to moderate; launch/quickstart.sh makes its data.

launch/node.sh configs/quickstart.py steps=100
"""

from functools import partial

import torch

from megamod import losses
from megamod.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, ModelConfig, OptimConfig, RunConfig

RUN = "runs/quickstart"


def config() -> RunConfig:
    return RunConfig(
        dir=RUN,
        steps=360,
        model=ModelConfig(path=f"{RUN}/base", dtype="bfloat16" if torch.cuda.is_available() else "float32"),
        data=DataConfig(train=f"{RUN}/data/train.jsonl", row_length=512, rows_per_step=8, rows_per_micro_batch=2),
        loss=partial(losses.moderation, verdict_weight=4.0),
        optim=OptimConfig(lr=2e-3, warmup_steps=20, weight_decay=0.05),
        checkpoint=CheckpointConfig(export=True),
        log=LogConfig(every=20),
        eval=EvalConfig(f"{RUN}/data/validation.jsonl", every=120),
    )
