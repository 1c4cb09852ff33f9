"""Full fine-tuning of Qwen2.5-7B as a moderation model on one node of 8 GPUs: tp 4 · dp 2 with sequence parallelism.

launch/node.sh configs/moderation_7b.py model.path=/models/Qwen2.5-7B-Instruct data.train=train.jsonl
"""

from functools import partial
from pathlib import Path

from megamod import losses
from megamod.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig

MODELS = Path(__file__).parent / "models"


def config() -> RunConfig:
    return RunConfig(
        dir="runs/moderation_7b",
        steps=1000,
        model=ModelConfig(path="/models/Qwen2.5-7B-Instruct", shape=str(MODELS / "qwen2.5-7b"), recompute="selective"),
        data=DataConfig(train="train.jsonl", row_length=8192, rows_per_step=32),
        loss=partial(losses.moderation, verdict_weight=4.0),
        parallel=ParallelConfig(tp=4, sp=True),
        optim=OptimConfig(lr=1e-5, warmup_steps=50, min_lr=1e-6),
        checkpoint=CheckpointConfig(every=200, keep_last=3, export=True),
    )
