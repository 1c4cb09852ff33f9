"""SwiGLU: torch's path and the kernels against the reference and its gradient by autograd; the benchmark of it and of the norm.

The kernels are interpreted in a child process, as test_kernel_packing.py says; this file run as a program is that child. triton's
interpreter cuts fp32 to bf16 where a GPU rounds, so they run in fp16 there; on a GPU in both.
"""

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import Results, bench_module, compiled_for_hopper, errors, fenced, name_of, run_interpreted
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megamod_kernels import swiglu as module
from megamod_kernels.cases import SWIGLU, SwigluCase
from megamod_kernels.swiglu import swiglu, swiglu_ref

CPU = torch.device("cpu")


def random(*size: int, seed: int, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def results(op: Callable[[Tensor], Tensor], gate_up: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = gate_up.detach().clone().requires_grad_()
    y = op(leaf)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, leaf, dy)[0]}


# ---- kernels against the reference: run in the child, and on a GPU


def faults(case: SwigluCase, dtype: torch.dtype, device: torch.device = CPU) -> list[str]:
    """Also of gates so large that a sigmoid is 0 or 1."""
    gate_up = random(case.tokens, 2 * case.ffn, seed=1, dtype=dtype, device=device)
    gate_up[:, ::7] *= 60
    dy = random(case.tokens, case.ffn, seed=2, dtype=dtype, device=device)
    wrong: list[str] = []
    with fenced(wrong):
        found = results(swiglu, gate_up, dy)
    exact, plain = results(swiglu_ref, gate_up.double(), dy.double()), results(swiglu_ref, gate_up, dy)
    return wrong + errors(found, exact, plain)


SMALL = [case for case in SWIGLU if not case.bench]
CHECKS = [*itertools.product(SMALL, [torch.float32, torch.float16]), *itertools.product(SMALL[1:3], [torch.float64])]


@pytest.fixture(scope="module")
def interpreted() -> Results:
    """What the child found, by check."""
    return run_interpreted(__file__, [name_of(*args) for args in CHECKS])


@pytest.mark.parametrize("args", CHECKS, ids=lambda args: name_of(*args))
def test_interpreted_kernel_equals_its_reference(interpreted: Results, args: Sequence[Any]) -> None:
    assert interpreted[name_of(*args)] == []


@pytest.mark.gpu
@pytest.mark.parametrize("args", [*CHECKS, *itertools.product([*SMALL, SWIGLU[3]], [torch.bfloat16])], ids=lambda args: name_of(*args))
def test_compiled_kernel_equals_its_reference(args: Sequence[Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert module.runs(torch.device("cuda")), "triton cannot be imported"
    assert faults(*args, device=torch.device("cuda", 0)) == []


@pytest.mark.skipif(module.triton is None or module.INTERPRETED, reason="nothing to compile with")
@pytest.mark.parametrize(("dtype", "ones"), [("bf16", {}), ("fp32", {}), ("fp64", {"width": 1, "blocks": 1})])
def test_kernels_compile_for_a_gpu(dtype: str, ones: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of 16 bytes, where F is a multiple of 16."""
    import triton.language as tl

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled now, not once
    constants = {"WORK": tl.float64 if dtype == "fp64" else tl.float32, "BLOCK": module.BLOCK, **ones}
    types = dict.fromkeys(("x", "y", "dy", "dx"), f"*{dtype}")
    for kernel in (module._forward_kernel, module._backward_kernel):
        ptx = compiled_for_hopper(kernel, types, constants, num_warps=4).asm["ptx"]
        if not ones:
            assert "ld.global.v4.b32" in ptx.replace(".L1::evict_first", "") and "st.global.v4.b32" in ptx


# ---- torch's path, which a CPU takes


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 70), st.booleans())
def test_it_is_the_reference_bit_for_bit(tokens: int, width: int, kernel: bool) -> None:
    """Also its gradient, which recomputes what autograd would have kept."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        gate_up, dy = random(tokens, 2 * width, seed=width, dtype=dtype), random(tokens, width, seed=3, dtype=dtype)
        found, expected = results(lambda x: swiglu(x, kernel=kernel), gate_up, dy), results(swiglu_ref, gate_up, dy)
        assert all(torch.equal(found[name], expected[name]) for name in ("y", "dx"))


def test_swiglu_by_hand() -> None:
    """σ(log 3) = 3/4."""
    log_3 = math.log(3)
    found = swiglu(torch.tensor([[0.0, log_3, 5.0, -2.0]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([[0.0, -1.5 * log_3]], dtype=torch.float64), rtol=1e-14, atol=0)


def test_gradients() -> None:
    assert torch.autograd.gradcheck(swiglu, random(3, 2, 10, seed=1).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_input_alone_is_kept(dtype: torch.dtype) -> None:
    gate_up = random(7, 1, 22, seed=1, dtype=dtype).requires_grad_() * 1
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = swiglu(gate_up)
    assert [t.data_ptr() for t in kept] == [gate_up.data_ptr()]
    assert y.shape == (7, 1, 11) and y.is_contiguous() and y._base is None


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(()), torch.zeros(2, 4, dtype=torch.int32)], ids=str)
def test_errors_are_one_line(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"floating-point \[\.\.\., 2F\] was expected") as caught:
        swiglu(wrong)
    assert "\n" not in str(caught.value)


# ---- the benchmark


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    return bench_module(monkeypatch)


@pytest.mark.parametrize("kernel", ["rmsnorm", "swiglu"])
@pytest.mark.parametrize("wrong", [False, True])
def test_bench_rehearses_each_way(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kernel: str, wrong: bool
) -> None:
    if wrong:
        monkeypatch.setattr(bench.swiglu, "swiglu", lambda x: swiglu_ref(x) * 1.1)
        monkeypatch.setattr(bench.rmsnorm, "rmsnorm", lambda x, weight, eps: bench.rmsnorm.rmsnorm_ref(x, weight, eps) * 1.1)
    assert bench.main([kernel, "--device", "cpu"]) == wrong
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [case["name"] for case in report["cases"]]
    assert names[1::2] == [f"{name} backward" for name in names[::2]]
    assert len(names) == (2 * 4 if kernel == "swiglu" else 2 * (6 + 4))
    assert {case["agrees"] for case in report["cases"] if not case["name"].startswith("with")} == {not wrong}


def test_bench_beside_liger(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the clock and Liger's own kernels, which need a GPU: each candidate is called, and bytes are those that must be moved."""

    def turns(candidates: Any, _: Tensor) -> list[float]:
        for candidate in candidates:
            candidate()
        return [1.0, 2.0, 3.0, 4.0][: len(candidates)]

    of = {
        "rms_norm LigerRMSNormFunction": lambda x, w, eps, *_: bench.rmsnorm.rmsnorm_ref(x, w, eps),
        "fused_add_rms_norm LigerFusedAddRMSNormFunction": bench.rmsnorm.rmsnorm_residual_ref,
        "swiglu LigerFusedGateUpSiLUMulFunction": swiglu_ref,
    }
    for name, op in of.items():
        file, function = name.split()
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{file}", SimpleNamespace(**{function: SimpleNamespace(apply=op)}))  # type: ignore[arg-type]
    monkeypatch.setattr(bench, "liger_ops", lambda _, find=bench.liger_ops: find(torch.device("cuda")))
    monkeypatch.setattr(bench, "turns", turns)
    monkeypatch.setattr(bench, "COPY_BYTES", 4000)
    monkeypatch.setattr(torch, "compile", lambda op, **_: op)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(bench.cases, "RMSNORM", [replace(case, bench=True) for case in bench.cases.RMSNORM[7:10:2]])
    monkeypatch.setattr(bench.cases, "SWIGLU", [SwigluCase(17, 48, bench=True)])
    sizes = {}
    for kernel in ("rmsnorm", "swiglu"):
        for case in bench.on_gpu(kernel, CPU)["cases"]:
            assert case["agrees"] and case["ms"] == {"kernel": 1.0, "liger": 2.0, "reference": 3.0, "compiled": 4.0}
            sizes[case["name"]] = case["bytes"]
    norm, q, activation = 2 * 17 * 40, 2 * 33 * 3 * 128, 2 * 17 * 48
    assert sizes == {
        "rmsnorm T17 C40": 2 * norm, "rmsnorm T17 C40 backward": 3 * norm,
        "with residual T17 C40": 4 * norm, "with residual T17 C40 backward": 4 * norm,
        "rmsnorm T33 H3 C128": 2 * q, "rmsnorm T33 H3 C128 backward": 3 * q,
        "swiglu T17 F48": 3 * activation, "swiglu T17 F48 backward": 5 * activation,
    }  # fmt: skip
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["kernel", "liger", "reference", "compiled"]


if __name__ == "__main__":
    assert module.runs(CPU), "TRITON_INTERPRET is not set"
    print(json.dumps({name_of(*args): faults(*args) for args in CHECKS}))
