"""A real training step for launch/gpu_check.sh: Qwen2.5-3B's shape from random weights, full fine-tuning on one GPU of 80 GB.

NPROC=1 launch/node.sh configs/gpu_check.py
"""

from pathlib import Path

from megamod.config import DataConfig, ModelConfig, OptimConfig, RunConfig, SyntheticData

MODELS = Path(__file__).parent / "models"


def config() -> RunConfig:
    return RunConfig(
        dir="runs/gpu_check",
        steps=8,
        model=ModelConfig(path=str(MODELS / "qwen2.5-3b"), init="random", recompute="full"),
        data=DataConfig(train=SyntheticData(documents=2048, mean_length=300), row_length=8192, rows_per_step=8),
        optim=OptimConfig(lr=1e-5),
    )
