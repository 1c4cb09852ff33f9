"""Compare a Hugging Face directory in megamod and in transformers, on the same texts: layer by layer, and in log-probabilities.

    python tools/compare_hf.py runs/tiny/hf/step-00000020 --dtype float32
    python tools/compare_hf.py /models/Qwen3Guard-Gen-0.6B --text "How do I pick a lock?" "Hello"

Without --text the documents are random tokens. They are packed into one row for megamod and run one by one in transformers. Prints by how
much the output of each layer differs, and ends with status 1 when a log-probability differs by more than --tolerance.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megamod.command import command
from megamod.config import ModelConfig, ParallelConfig, SyntheticData
from megamod.data.documents import IGNORED, Document, synthetic
from megamod.data.packing import micro_batch
from megamod.data.tokenizer import Tokenizer
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
    parser.add_argument("--text", nargs="+", help="texts to compare on; default: random tokens")
    args = parser.parse_args()
    layers, worst, mean = differences(args.directory, args.dtype, args.text)
    tolerance = args.tolerance or TOLERANCE[args.dtype]
    verdict = "equal" if worst <= tolerance else "DIFFERENT"
    table = Table("after", "largest difference", "÷ largest number")
    for name, (largest, relative) in layers.items():
        table.add_row(name, f"{largest:.1e}", f"{relative:.1e}")
    Console().print(table)
    print(f"{args.directory}: log-probabilities in megamod and transformers, {args.dtype}: {verdict}")
    print(f"largest difference {worst:.1e}, mean {mean:.1e}, tolerance {tolerance:.0e}")
    return int(worst > tolerance)


@torch.no_grad()
def differences(directory: str, dtype: str, texts: Sequence[str] | None = None) -> tuple[dict[str, tuple[float, float]], float, float]:
    """How far the two models are apart on a few documents.

    Returns:
        Of the embedding and each layer the largest absolute difference of its output, and that over the largest number there; the
        largest and the mean absolute difference of log p over all next tokens.

    Raises:
        MegamodError: a directory that is none, or texts of fewer than two tokens.
    """
    shape = read_shape(directory)
    grid = grids.start(ParallelConfig(), shape)
    chunks, _ = build(ModelConfig(path=directory, dtype=dtype), shape, grid)  # type: ignore[arg-type]
    load(chunks, shape, grid, weights_at(directory, shape, 0), where=directory)
    chunk = chunks[0].eval()
    documents = (
        _documents(directory, texts) if texts else synthetic(SyntheticData(documents=4, mean_length=24, labelled=1.0), shape.vocab, 48, 1)
    )
    batch = micro_batch([documents], sum(len(d.tokens) for d in documents)).to(grid.device)
    with _outputs([chunk.embedding, *chunk.decoder.layers]) as seen:
        ours = chunk.head(chunk(batch), batch).logprobs(batch.labels).cpu()
    theirs_model = _theirs(directory, DTYPES[dtype]).to(grid.device)
    with _outputs([theirs_model.model.embed_tokens, *theirs_model.model.layers]) as meant:
        rows = [theirs_model(document[None]).logits[0] for document in batch.tokens.split(batch.lengths)]
    names = ["embedding", *(f"layer {i}" for i in range(shape.layers))]
    layers = {name: _apart(*(torch.cat(outputs) for outputs in pair)) for name, *pair in zip(names, seen, meant, strict=True)}
    log_p = torch.cat(rows)[batch.rows].to(ours.dtype).log_softmax(-1)
    theirs = log_p.gather(-1, batch.labels[:, None])[:, 0].cpu()
    grids.leave()
    return layers, float((ours - theirs).abs().max()), float((ours - theirs).abs().mean())


def _documents(directory: str, texts: Sequence[str]) -> list[Document]:
    """Every token after the first is asked for."""
    tokenizer = Tokenizer(directory)
    documents = []
    for text in texts:
        tokens = np.array(tokenizer.encode(text).ids)
        if len(tokens) < 2:
            raise MegamodError(f"--text {text!r}: {len(tokens)} tokens: at least two were expected")
        labels = np.where(np.arange(len(tokens)) > 0, tokens, IGNORED)
        documents.append(Document(tokens, labels, np.zeros(len(tokens), bool)))
    return documents


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """What each of `modules` gives inside, call by call: `[T, C]`."""
    seen: list[list[Tensor]] = [[] for _ in modules]

    def keep(number: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen[number].append(hidden.detach().reshape(-1, hidden.shape[-1]).cpu())

    hooks = [module.register_forward_hook(lambda _m, _i, output, number=i: keep(number, output)) for i, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _apart(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    largest = float((ours - theirs).abs().max())
    return largest, largest / max(float(theirs.abs().max()), 1e-30)


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
