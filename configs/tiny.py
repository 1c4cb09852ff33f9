"""A run of half a minute on a laptop: a 1M-parameter Qwen3 from random weights on made-up documents.

torchrun --nproc-per-node 2 -m megamod.train configs/tiny.py parallel.tp=2
"""

from functools import partial
from pathlib import Path

from megamod import losses
from megamod.config import CheckpointConfig, DataConfig, LogConfig, ModelConfig, OptimConfig, RunConfig, SyntheticData

MODELS = Path(__file__).parent / "models"


def config() -> RunConfig:
    return RunConfig(
        dir="runs/tiny",
        steps=20,
        model=ModelConfig(path=str(MODELS / "tiny-qwen3"), init="random", dtype="float32"),
        data=DataConfig(train=SyntheticData(documents=256, mean_length=60, labelled=0.2), row_length=512, rows_per_step=8),
        loss=partial(losses.moderation, verdict_weight=4.0),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        checkpoint=CheckpointConfig(export=True),
        log=LogConfig(every=5),
    )
