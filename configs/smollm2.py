"""Full fine-tuning of a small real model, SmolLM2-135M-Instruct (tools/real_weights.py), on two CPU ranks or one GPU.

launch/node.sh configs/smollm2.py data.train=train.jsonl steps=178
"""

from functools import partial
from pathlib import Path

from megamod import losses
from megamod.config import CheckpointConfig, DataConfig, LogConfig, ModelConfig, OptimConfig, RunConfig

MODELS = Path(__file__).parent / "models"


def config() -> RunConfig:
    return RunConfig(
        dir="runs/smollm2",
        steps=178,
        model=ModelConfig(path="models/smollm2", shape=str(MODELS / "smollm2-135m")),
        data=DataConfig(train="train.jsonl", row_length=512, rows_per_step=4, rows_per_micro_batch=2),
        loss=partial(losses.moderation, verdict_weight=4.0),
        optim=OptimConfig(lr=1e-4, warmup_steps=8, weight_decay=0.01),
        checkpoint=CheckpointConfig(every=30, export=True),
        log=LogConfig(every=2),
    )
