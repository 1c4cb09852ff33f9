"""configs/tiny.py with DPO, on made-up pairs: a rehearsal of preference losses, their references and their checkpoints.

torchrun --nproc-per-node 2 -m megamod.train configs/tiny_dpo.py parallel.tp=2
"""

from dataclasses import replace
from functools import partial

import tiny

from megamod import losses
from megamod.config import RunConfig, SyntheticData


def config() -> RunConfig:
    base = tiny.config()
    pairs = SyntheticData(documents=256, mean_length=60, labelled=0.2, pairs=True)
    return replace(base, dir="runs/tiny_dpo", loss=partial(losses.dpo, beta=0.5), data=replace(base.data, train=pairs))
