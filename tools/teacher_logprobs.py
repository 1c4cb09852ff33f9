"""Store a teacher's most probable tokens beside the data, so that a model learns from it without having it in memory.

    torchrun --nproc-per-node 8 tools/teacher_logprobs.py configs/<run>.py --teacher /models/Qwen2.5-72B-Instruct parallel.tp=8 \
        reference.kind=stored reference.path=stores/teacher reference.top_k=50
    torchrun --nproc-per-node 8 -m megamod.train          configs/<run>.py reference.kind=stored reference.path=stores/teacher

The run's loss must be one that learns from a teacher, such as losses.distillation. The teacher may be of any shape with the run's
vocabulary; the data is cut as the run's tokenizer, template and row length do it. At each position that a loss may ask about,
reference.top_k tokens with their log-probabilities are kept, 8 bytes for each. A killed attempt goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from megamod import config
from megamod.command import command
from megamod.config import RunConfig
from megamod.errors import MegamodError
from megamod.losses import needs_of
from megamod.parallel import grid as grids
from megamod.train import model_shape
from tools.reference_logprobs import compute


def taught_by(cfg: RunConfig, teacher: str) -> RunConfig:
    """The run with the teacher in the model's place, and the model's data. Raises MegamodError."""
    if "teacher" not in needs_of(cfg.loss):
        raise MegamodError(f"loss {config.loss_name(cfg.loss)} learns from no teacher: losses.distillation does")
    chat = replace(cfg.data.chat, tokenizer=cfg.data.chat.tokenizer or cfg.model.path)
    model = replace(cfg.model, path=teacher, shape=None, init="load", quantization=None)
    other = replace(cfg, model=model, lora=None, data=replace(cfg.data, chat=chat))
    own, theirs = model_shape(cfg).vocab, model_shape(other).vocab
    if own != theirs:
        raise MegamodError(f"--teacher {teacher}: a vocabulary of {theirs:,}, and the model's is {own:,}: the same was expected")
    return other


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a Python file with config() -> RunConfig")
    parser.add_argument("overrides", nargs="*", metavar="owner.key=value")
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="a Hugging Face directory")
    args = parser.parse_intermixed_args(argv)
    compute(taught_by(config.load(args.config, args.overrides), args.teacher))
    grids.leave()


if __name__ == "__main__":
    sys.exit(main())
