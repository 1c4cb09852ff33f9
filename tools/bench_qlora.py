"""Speed and memory of QLoRA training steps, on weights that are made up where they are to be: no checkpoint is needed.

    python tools/bench_qlora.py --shape configs/models/qwen2.5-72b --tokens 8192               # on one GPU
    torchrun --nproc-per-node 8 tools/bench_qlora.py --tp 8 --tokens 32768
    python tools/bench_qlora.py --shape configs/models/tiny-qwen3 --tokens 256                 # a rehearsal on the CPU

Every linear of the layers is in NF4 with double quantisation and has an adapter; activations are recomputed; the last 8 % of each
document are trained, documents are log-normal. The first step warms up, the others are timed. Prints a table and, as the last line, one
JSON object. On one H200 the goal for the 72B shape at 8,192 tokens is 1,000 tokens/s within 75 GB.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from megamod import losses
from megamod.command import command
from megamod.config import LoraConfig, ModelConfig, OptimConfig, ParallelConfig, SyntheticData
from megamod.data.documents import synthetic
from megamod.data.loader import Loader
from megamod.memory import Peak
from megamod.model.build import build, data_parallel
from megamod.model.lora import Adapters, Fresh
from megamod.model.nf4 import Weight4bit
from megamod.model.shape import read_shape
from megamod.optim import Optimizer
from megamod.parallel import grid as grids
from megamod.step import train_step
from megamod.weights.quantization import Quantization


@torch.no_grad()
def make_up(chunks: Sequence[nn.Module]) -> None:
    """Numbers of the size that trained weights have, drawn on the device."""
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if name.endswith("norm.weight"):
                param.fill_(1.0)
            elif param.dim() == 1:
                param.zero_()
            else:
                param.normal_(0, 0.02)
        for weight in chunk.modules():
            for segment in weight.segments if isinstance(weight, Weight4bit) else ():
                made = segment.shard(weight.slices.own)
                made.data.random_(0, 256)
                made.absmax.random_(0, 256)
                assert made.nested is not None
                assert made.offset is not None
                made.nested.fill_(0.01)
                made.offset.fill_(0.05)  # blocks' largest numbers lie within .04 and .06


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="configs/models/qwen2.5-72b", help="a directory with config.json (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="only so many; default: all of the shape's")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step's one row on each data-parallel rank (default: %(default)s)")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="that are timed (default: %(default)s)")
    args = parser.parse_args()
    shape = read_shape(args.shape).quantized(Quantization())
    shape = replace(shape, layers=args.layers or shape.layers)
    grid = grids.start(ParallelConfig(tp=args.tp, sp=args.tp > 1), shape)
    is_gpu = grid.device.type == "cuda"
    cfg = ModelConfig(path="", dtype="bfloat16" if is_gpu else "float32", recompute="full")
    torch.manual_seed(1)
    began = time.perf_counter()
    with Peak(grid.device) as peak:
        chunks, _ = build(cfg, shape, grid)
        make_up(chunks)
        for chunk in chunks:
            chunk.to(grid.device)
        lora = LoraConfig(r=args.r, lora_alpha=args.r)
        adapters = Adapters(chunks, shape, grid, {"default": lora}, "default")
        adapters.fill("default", Fresh(lora, shape, 1))
        wrapped = data_parallel(chunks, grid)
        optimizer = Optimizer(OptimConfig(lr=1e-4), wrapped, adapters.items, grid)
        made = time.perf_counter() - began
        rows = (args.steps + 1) * grid.dp.size
        documents = synthetic(SyntheticData(rows * args.tokens // 100, 300, 0.8, 0.08), shape.vocab, args.tokens, 1)
        loader = Loader(
            documents, row_length=args.tokens, rows_per_step=grid.dp.size, rows_per_micro_batch=1, seed=1, dp_rank=grid.dp.rank,
            dp_size=grid.dp.size,
        )  # fmt: skip
        seconds = []
        for step in range(args.steps + 1):
            batches = loader.step(step)
            if is_gpu:
                torch.cuda.synchronize()
            dist.barrier()
            start = time.perf_counter()
            train_step(wrapped, batches, losses.cross_entropy, grid)
            optimizer.step(1e-4)
            if is_gpu:
                torch.cuda.synchronize()
            dist.barrier()
            seconds.append(time.perf_counter() - start)
    timed = float(np.median(seconds[1:]))
    low_rank = sum(item.param.numel() for item in adapters.items)
    flops = 3 * shape.flops(batches[0].lengths, len(batches[0].labels)) + 6 * low_rank * args.tokens  # the forward twice: recomputed
    found = {
        "shape": args.shape, "layers": shape.layers, "parameters": shape.parameters(), "tokens": args.tokens, "tp": args.tp,
        "world": grid.world, "dtype": cfg.dtype, "r": args.r, "made_seconds": made, "step_seconds": timed,
        "tokens_per_second": args.tokens * grid.dp.size / timed, "peak_mib": peak.value,
        "tflops_per_rank": flops * grid.dp.size / timed / grid.world / 1e12,
        "device": torch.cuda.get_device_name(grid.device) if is_gpu else "cpu", "torch": torch.__version__,
    }  # fmt: skip
    if grid.rank == 0:
        table = Table("model", "tokens/s", "step, s", "TFLOP/s a rank", "peak memory, MiB")
        numbers = (f"{found['tokens_per_second']:,.0f}", f"{timed:.2f}", f"{found['tflops_per_rank']:.2f}", f"{peak.value:,.0f}")
        table.add_row(f"{shape.family} {shape.parameters() / 1e9:.2f}B · {shape.layers} layers", *numbers)
        Console(width=int(os.environ.get("COLUMNS", 120))).print(table)
        print(json.dumps(found))
    grids.leave()


if __name__ == "__main__":
    sys.exit(main())
