"""A classifier of whole texts on a laptop, from nothing: a head of three scores, which transformers and vLLM load.

python tools/make_dataset.py runs/classifier/data --train 2000 --held-out 200
python tools/make_checkpoint.py runs/classifier/base --data runs/classifier/data/train.jsonl --hidden 256 --heads 4
launch/node.sh configs/classifier.py
"""

from megamod import losses
from megamod.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, ModelConfig, OptimConfig, RunConfig
from megamod.model.shape import Score

RUN = "runs/classifier"


def config() -> RunConfig:
    return RunConfig(
        dir=RUN,
        steps=60,
        model=ModelConfig(
            path=f"{RUN}/base",
            dtype="float32",
            score=Score(("safe", "controversial", "unsafe"), "single_label_classification"),
        ),
        data=DataConfig(train=f"{RUN}/data/train.jsonl", row_length=512, rows_per_step=8, rows_per_micro_batch=4),
        loss=losses.classification,
        optim=OptimConfig(lr=1e-3, warmup_steps=5, weight_decay=0.05),
        checkpoint=CheckpointConfig(export=True),
        log=LogConfig(every=10),
        eval=EvalConfig(f"{RUN}/data/held_out.jsonl", every=30, keep_best=False),
    )
