"""QLoRA under Megatron against transformers, peft and bitsandbytes in one process, in float64 to 1e-11.

What is in 4 bits is made and read by bitsandbytes. Blocks of 32 to 1,024 numbers on weights of 32 × 32 to 48 × 32: every cut of tensor
parallelism falls inside blocks, and blocks go over rows.
"""

import os
from dataclasses import replace

import distributed
import lora_parity as lora
import parity
import pytest
import torch
from lora_parity import LoraCase
from parity import Case

from megamod.config import LoraConfig
from megamod.config import ParallelConfig as P
from megamod.weights.quantization import Quantization

TOLERANCE = 1e-11
GRIDS = [
    P(), P(tp=2), P(tp=2, sp=True), P(tp=4), P(pp=2), P(tp=2, pp=2, sp=True), P(tp=4, pp=2, sp=True), P(cp=2), P(tp=2, cp=2, sp=True),
    P(tp=2, pp=2, cp=2, sp=True), P(pp=2, vpp=2), P(tp=2, pp=2, vpp=2, sp=True), P(tp=8, sp=True), P(pp=4),
]  # fmt: skip
RECOMPUTE = [("none", None), ("full", None), ("selective", ("core_attn", "mlp"))]
ADAPTERS = {
    "all": LoraConfig(r=3, lora_alpha=7),
    "dropout": LoraConfig(r=10, lora_alpha=16, lora_dropout=0.3),
    "dora": LoraConfig(r=10, lora_alpha=16, use_dora=True, use_rslora=True),
    "some": LoraConfig(r=4, target_modules=("q_proj", "v_proj", "down_proj"), layers_to_transform=(0, 3)),  # linears without adapters
}
QUANTIZATIONS = [
    Quantization(),
    Quantization("fp4", use_double_quant=False, blocksize=32),
    Quantization("nf4", blocksize=1024),
    Quantization(blocksize=128, modules_to_not_convert=("k_proj", "model.layers.1", "down_proj")),  # beside others in a fused weight
]
MODELS = ("qwen2-1kv", "qwen3", "llama-bias-tied")
FULL = bool(os.environ.get("FULL"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    results = {}
    for model in MODELS:
        for cfg in ADAPTERS.values():
            for q in QUANTIZATIONS:
                rows = parity.made_rows(model)
                if cfg.lora_dropout:
                    rows = [replace(row, seed=lora.seed_of(i)) for i, row in enumerate(rows)]
                results[LoraCase(cfg, Case(model, P()), q).key] = lora.expected(cfg, model, rows, quantization=q)
    path = tmp_path_factory.mktemp("bitsandbytes") / "expected.pt"
    torch.save(results, path)
    return str(path)


@pytest.mark.parametrize(
    "number", range(len(GRIDS)), ids=lambda n: f"{GRIDS[n].tp}-{GRIDS[n].pp}-{GRIDS[n].vpp}-{GRIDS[n].cp}-{GRIDS[n].sp}"
)
def test_grid(number: int, expected: str) -> None:
    """tp, pp, vpp, cp, sp: loss and every gradient."""
    faults = []
    for turn, model in enumerate(MODELS):
        cases = [
            LoraCase(cfg, Case(model, GRIDS[number], recompute, modules), q)
            for i, cfg in enumerate(ADAPTERS.values())
            for k, q in enumerate(QUANTIZATIONS)
            for j, (recompute, modules) in enumerate(RECOMPUTE)
            if FULL or ((number + i + k) % 4 == 0 and (number + i) % 3 == turn and (number // 3 + i) % 3 == j)
        ]
        if not cases:
            continue
        answers = distributed.run(distributed.WORLD, lora.compare, cases, expected)
        for at, one in enumerate(cases):
            losses, gradients, _ = zip(*(answer[at] for answer in answers), strict=True)
            if not max(*losses, *gradients) <= TOLERANCE:
                faults.append(f"{one}: loss off by {max(losses):.1e}, a gradient by {max(gradients):.1e}")
    assert not faults, "\n".join(faults)
