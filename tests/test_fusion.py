"""model.fusion: a model through Triton's kernels equals transformers and peft; what cannot be is refused.

The kernels are interpreted in a child process, as test_kernel_packing.py says; this file run as a program is that child. That torch's
operations in their place are exact on every grid is test_parity's, what they keep is test_plan's.
"""

import json
from unittest import mock

import lora_parity
import oracle
import parity
import pytest
import tiny
import torch
from interpreted import Results, run_interpreted
from lora_parity import LoraCase
from parity import Case

from megamod.config import LoraConfig, ModelConfig
from megamod.config import ParallelConfig as P
from megamod.errors import MegamodError
from megamod.model import backends
from megamod.model.build import build
from megamod.parallel.grid import started
from megamod_kernels import rmsnorm, swiglu

CPU = torch.device("cpu")
LORA = LoraConfig(r=4, lora_alpha=8.0)
# Norms of heads; everything, or the MLP alone, once more; frozen weights, which get no gradient.
CHECKS = {
    "qwen3": Case("qwen3", P()),
    "qwen2 full": Case("qwen2", P(), "full"),
    "qwen2 mlp": Case("qwen2", P(), "selective", ("mlp", "core_attn")),
    "qwen2 lora": LoraCase(LORA, Case("qwen2", P())),
}


def faults(case: Case | LoraCase) -> list[str]:
    """Loss and every gradient in float64, and whether it was kernels that made them."""
    model = case.model if isinstance(case, Case) else case.case.model
    rows = parity.made_rows(model)
    if isinstance(case, Case):
        value, gradients = oracle.run(oracle.model(model), rows, parity.everything)
    else:
        value, gradients = lora_parity.expected(LORA, model, rows)
    norms = mock.patch.object(rmsnorm, "_forward", wraps=rmsnorm._forward)
    products = mock.patch.object(swiglu, "_launch", wraps=swiglu._launch)
    with started(P(), tiny.shape(model)) as grid, norms as normed, products as launched:
        run = parity.prepare(case, grid) if isinstance(case, Case) else lora_parity.prepare(case, grid)[0]
        run.step()
        off = {
            "the loss": abs(float(run.metrics["loss"]) / float(value) - 1),
            "a gradient": parity.worst(run, gradients, parity.gradient),
        }
        passes = (2 + (run.case.recompute != "none")) * len(run.case.batches(grid))
    wrong = [f"{name} is off by {error:.3g}" for name, error in off.items() if not error <= 1e-11]
    if not all(call.args[-1] for call in normed.call_args_list) or launched.call_count != passes * tiny.shape(model).layers:
        wrong.append(f"{launched.call_count} launches for SwiGLU, norms by kernels: {[call.args[-1] for call in normed.call_args_list]}")
    return wrong


@pytest.fixture(scope="module")
def interpreted() -> Results:
    """What the child found, by check."""
    return run_interpreted(__file__, list(CHECKS))


@pytest.mark.parametrize("name", CHECKS)
def test_through_the_kernels_it_is_exact(interpreted: Results, name: str) -> None:
    assert interpreted[name] == []


def test_what_is_asked_for_is_what_runs_or_is_refused() -> None:
    assert backends.fusion("auto", CPU) == backends.fusion("reference", CPU) == "reference"
    assert backends.fusion("reference", torch.device("cuda")) == "reference"
    with pytest.raises(MegamodError, match=r"model\.fusion = 'triton' needs a GPU and triton, this is cpu: use 'auto' or 'ref"):
        backends.fusion("triton", CPU)
    with started(P(), tiny.shape("qwen3")) as grid:
        with pytest.raises(MegamodError, match="this is cpu"):
            build(ModelConfig("", dtype="float32", fusion="triton"), tiny.shape("qwen3"), grid)
        _, chosen = build(ModelConfig("", dtype="float32"), tiny.shape("qwen3"), grid)
    assert chosen == {"attention": "reference", "linear": "megatron", "fusion": "reference"}


@pytest.mark.skipif(rmsnorm.triton is None, reason="no triton")
def test_a_gpu_has_the_kernels() -> None:
    assert backends.fusion("auto", torch.device("cuda")) == backends.fusion("triton", torch.device("cuda")) == "triton"


if __name__ == "__main__":
    assert backends.fusion("auto", CPU) == "triton", "TRITON_INTERPRET is not set"
    print(json.dumps({name: faults(case) for name, case in CHECKS.items()}))
