"""LoRA for launch/gpu_check.sh: Qwen2.5-7B's shape from random weights, every linear adapted, with dropout, on one GPU of 80 GB.

NPROC=1 launch/node.sh configs/gpu_check_lora.py
"""

from dataclasses import replace
from pathlib import Path

import gpu_check

from megamod.config import LoraConfig, OptimConfig, RunConfig

MODELS = Path(__file__).parent / "models"


def config() -> RunConfig:
    base = gpu_check.config()
    return replace(
        base,
        dir="runs/gpu_check_lora",
        model=replace(base.model, path=str(MODELS / "qwen2.5-7b")),
        lora=LoraConfig(r=64, lora_alpha=64, lora_dropout=0.05),
        optim=OptimConfig(lr=1e-4),
    )
