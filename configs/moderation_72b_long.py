"""Long threads through Qwen2.5-72B on 128 GPUs: rows of 32,768 tokens, tp 8 · pp 4 · cp 4 with sequence parallelism.

A rank holds 8,192 tokens of a row outside attention (1,024 between the linears, by sequence parallelism), and inside it the whole row
for 2 of the 64 query heads. Of the 8 kv heads tp 8 leaves a rank one, which the 4 context-parallel ranks repeat.

    sbatch --nodes 16 launch/slurm.sbatch configs/moderation_72b_long.py model.path=/models/Qwen2.5-72B-Instruct data.train=threads.jsonl
"""

from dataclasses import replace

import moderation_72b

from megamod.config import ParallelConfig, RunConfig


def config() -> RunConfig:
    base = moderation_72b.config()
    return replace(
        base,
        dir="runs/moderation_72b_long",
        data=replace(base.data, row_length=32768, rows_per_step=32),
        parallel=ParallelConfig(tp=8, pp=4, cp=4, sp=True, layers_per_stage=(21, 21, 21, 17)),
    )
