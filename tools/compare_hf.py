"""Compare a Hugging Face directory in megamod and in transformers: log-probabilities of the same random documents.

    python tools/compare_hf.py runs/tiny/hf/step-00000020 --dtype float32

Documents are packed into one row for megamod and run one by one in transformers. Ends with status 1 when they differ by more
than --tolerance.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM

from megamod.command import command
from megamod.config import ModelConfig, ParallelConfig, SyntheticData
from megamod.data.documents import synthetic
from megamod.data.packing import micro_batch
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
    theirs_model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype]).to(grid.device)
    rows = [theirs_model(document[None]).logits[0] for document in batch.tokens.split(batch.lengths)]
    log_p = torch.cat(rows)[batch.rows].to(ours.dtype).log_softmax(-1)
    theirs = log_p.gather(-1, batch.labels[:, None])[:, 0].cpu()
    grids.leave()
    return float((ours - theirs).abs().max()), float((ours - theirs).abs().mean())


if __name__ == "__main__":
    sys.exit(main())
