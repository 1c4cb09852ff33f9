"""Compare a Hugging Face directory in megamod and in transformers: log-probabilities of the same random documents.

    python tools/compare_hf.py runs/tiny/hf/step-00000020 --dtype float32

Documents are packed into one row for megamod and run one by one in transformers. Ends with status 1 when they differ by more
than --tolerance.
"""

import argparse
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megamod.command import command
from megamod.config import ModelConfig, ParallelConfig, SyntheticData
from megamod.data.documents import synthetic
from megamod.data.packing import micro_batch
from megamod.errors import MegamodError
from megamod.model.build import DTYPES, build
from megamod.model.shape import read_shape
from megamod.parallel import grid as grids
from megamod.weights.load import load, weights_at

TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 0.1}  # transformers computes norms and RoPE in fp32, also in float64


@command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tolerance", type=float, help="default: 1e-5 in float64, 1e-4 in float32, 0.1 in bfloat16")
    args = parser.parse_args()
    worst, mean = difference(args.directory, args.dtype)
    tolerance = args.tolerance or TOLERANCE[args.dtype]
    verdict = "equal" if worst <= tolerance else "DIFFERENT"
    print(f"{args.directory}: log-probabilities in megamod and transformers, {args.dtype}: {verdict}")
    print(f"largest difference {worst:.1e}, mean {mean:.1e}, tolerance {tolerance:.0e}")
    return int(worst > tolerance)


@torch.no_grad()
def difference(directory: str, dtype: str) -> tuple[float, float]:
    """Largest and mean absolute difference of log p over all next tokens of a few documents."""
    shape = read_shape(directory)
    grid = grids.start(ParallelConfig(), shape)
    chunks, _ = build(ModelConfig(path=directory, dtype=dtype), shape, grid)  # type: ignore[arg-type]
    load(chunks, shape, grid, weights_at(directory, shape, 0), where=directory)
    chunk = chunks[0].eval()
    documents = synthetic(SyntheticData(documents=4, mean_length=24, labelled=1.0), shape.vocab, 48, seed=1)
    batch = micro_batch([documents], sum(len(d.tokens) for d in documents)).to(grid.device)
    ours = chunk.head(chunk(batch), batch).logprobs(batch.labels).cpu()
    theirs_model = _theirs(directory, DTYPES[dtype]).to(grid.device)
    rows = [theirs_model(document[None]).logits[0] for document in batch.tokens.split(batch.lengths)]
    log_p = torch.cat(rows)[batch.rows].to(ours.dtype).log_softmax(-1)
    theirs = log_p.gather(-1, batch.labels[:, None])[:, 0].cpu()
    grids.leave()
    return float((ours - theirs).abs().max()), float((ours - theirs).abs().mean())


def _theirs(directory: str, dtype: torch.dtype) -> Any:
    """transformers' model, all of it in `dtype`; of one in 4 bits transformers keeps the rest in the dtype of config.json."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            if dtype is torch.float64 or module.in_features % module.weight.quant_state.blocksize:
                raise MegamodError(f"{directory}: bitsandbytes computes in float32 at most, and with rows of whole blocks on a CPU")
            module.compute_dtype = module.weight.quant_state.dtype = dtype
    for param in model.parameters():
        param.data = param.data.to(dtype) if param.is_floating_point() else param.data
    return model.train()  # to evaluate, bitsandbytes has another kernel on a CPU, in bfloat16 only; nothing here drops out


if __name__ == "__main__":
    sys.exit(main())
