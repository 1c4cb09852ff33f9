"""RMSNorm with and without the residual: torch's path and the kernels against the references and their gradients by autograd.

The kernels are interpreted in a child process, as test_kernel_packing.py says; this file run as a program is that child. triton's
interpreter cuts fp32 to bf16 where a GPU rounds, so they run in fp16 there; on a GPU in both.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import Results, compiled_for_hopper, errors, fenced, name_of, run_interpreted
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megamod_kernels import rmsnorm as norms
from megamod_kernels.cases import RMSNORM, RmsnormCase
from megamod_kernels.rmsnorm import rmsnorm, rmsnorm_ref, rmsnorm_residual, rmsnorm_residual_ref

CPU = torch.device("cpu")
EPS = 1e-6
WAYS = ("norm", "frozen", "handed on", "residual", "sum alone")


def random(*size: int, seed: int, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def inputs(case: RmsnormCase, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> list[Tensor]:
    """x, residual, weight, dy, ds. Heads are the first of a fused tensor's; x has rows near zero, where ε counts."""
    if case.heads:
        x = random(case.tokens, case.heads + 2, case.channels, seed=1, dtype=dtype, device=device)[:, : case.heads]
    else:
        x = random(case.tokens, case.channels, seed=1, dtype=dtype, device=device)
    x[::5] *= 1e-3
    others = (random(*x.shape, seed=seed, dtype=dtype, device=device) for seed in (2, 4, 5))
    residual, dy, ds = others
    residual[::5] *= 1e-3
    return [x, residual, random(case.channels, seed=3, dtype=dtype, device=device), dy, ds]


def results(one: Callable[..., Tensor], two: Callable[..., tuple[Tensor, Tensor]], way: str, given: Sequence[Tensor]) -> dict[str, Tensor]:
    """What comes of it, and the gradients; of the whole fused tensor, where x is a part of one."""
    x, residual, weight, dy, ds = given
    leaf = (x if x._base is None else x._base).detach().clone().requires_grad_()
    leaves = {"dx": leaf, "dresidual": residual.detach().clone().requires_grad_(), "dw": weight.detach().clone().requires_grad_()}
    x = leaf if x._base is None else leaf[:, : x.shape[1]]
    r, w = leaves["dresidual"], leaves["dw"]
    if way in ("norm", "frozen"):
        y = one(x, w if way == "norm" else w.detach(), EPS)
        out, grads, asked = {"y": y}, [dy], ["dx", "dw"][: 1 + (way == "norm")]
    elif way == "handed on":
        y, s = two(x, None, w, EPS)
        out, grads, asked = {"y": y, "s": s}, [dy, ds], ["dx", "dw"]
    else:
        y, s = two(x, r, w, EPS)
        out, grads, asked = {"y": y, "s": s}, [dy, ds], ["dx", "dresidual", "dw"]
        if way == "sum alone":
            out, grads, asked = {"s": s}, [ds], ["dx", "dresidual"]
    found = torch.autograd.grad(list(out.values()), [leaves[name] for name in asked], grads)
    return {name: t.detach() for name, t in out.items()} | dict(zip(asked, found, strict=True))


def passed_on_ref(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (rmsnorm_ref(x, weight, eps), x * 1) if residual is None else rmsnorm_residual_ref(x, residual, weight, eps)


# ---- kernels against references: run in the child, and on a GPU


def faults(case: RmsnormCase, dtype: torch.dtype, way: str, device: torch.device = CPU) -> list[str]:
    given = inputs(case, dtype, device)
    wrong: list[str] = []
    with fenced(wrong):
        found = results(rmsnorm, rmsnorm_residual, way, given)
    whole = [t.double() if t._base is None else t._base.double()[:, : case.heads] for t in given]
    exact, plain = (results(rmsnorm_ref, passed_on_ref, way, tensors) for tensors in (whole, given))
    return wrong + errors(found, exact, plain)


SMALL = [case for case in RMSNORM if not case.bench]
CHECKS = [
    *itertools.product(SMALL, [torch.float32], ["residual"]),
    *itertools.product(SMALL[2:4], [torch.float32], WAYS),
    *itertools.product(SMALL[1:4], [torch.float16], ["handed on", "residual"]),
    *itertools.product(SMALL[1:4], [torch.float64], ["norm", "residual"]),
]
CHECKS = list(dict.fromkeys(CHECKS))


@pytest.fixture(scope="module")
def interpreted() -> Results:
    """What the child found, by check."""
    return run_interpreted(__file__, [name_of(*args) for args in CHECKS])


@pytest.mark.parametrize("args", CHECKS, ids=lambda args: name_of(*args))
def test_interpreted_kernel_equals_its_reference(interpreted: Results, args: Sequence[Any]) -> None:
    assert interpreted[name_of(*args)] == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    "args",
    [*CHECKS, *itertools.product(SMALL, [torch.bfloat16], WAYS), *itertools.product(RMSNORM[3:5], [torch.bfloat16], ["handed on"])],
    ids=lambda args: name_of(*args),
)
def test_compiled_kernel_equals_its_reference(args: Sequence[Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert norms.runs(torch.device("cuda")), "triton cannot be imported"
    assert faults(*args, device=torch.device("cuda", 0)) == []


ONES = dict.fromkeys(("T", "C", "inner", "tiles", "programs", "x_inner", "s_inner"), 1)  # triton compiles ones in


@pytest.mark.skipif(norms.triton is None or norms.INTERPRETED, reason="nothing to compile with")
@pytest.mark.parametrize(
    ("channels", "dtype", "adds", "ones"),
    [(8192, "bf16", True, {"inner": 1}), (128, "bf16", False, {}), (3584, "fp16", True, {"inner": 1}), (1, "fp64", True, ONES)],
)
def test_kernels_compile_for_a_gpu(
    channels: int, dtype: str, adds: bool, ones: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 16 bytes; the backward fetches rows while it works on others, in the shared memory that a program can have."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled now, not once
    shape = norms._tile(channels)
    warps = shape.pop("num_warps")
    types = dict.fromkeys(("x", "residual", "weight", "s", "y", "dy", "ds", "dx"), f"*{dtype}")
    types |= dict.fromkeys(("rstd", "sums"), "*fp64" if dtype == "fp64" else "*fp32")
    forward = compiled_for_hopper(norms._forward_kernel, types, {"EPS": EPS, "ADDS": adds, **shape, **ones}, num_warps=warps)
    for weight in (True, False):
        flags = {"ADDS": adds, "WEIGHT": weight, "STAGES": norms._stages(shape, 8 if dtype == "fp64" else 2)}
        backward = compiled_for_hopper(norms._backward_kernel, types, {**flags, **shape, **ones}, num_warps=warps)
        assert backward.metadata.shared <= 227 * 1024
        if not channels % 8:
            assert "cp.async.cg.shared.global" in backward.asm["ptx"]
    if not channels % 8:
        assert ".v4.b32" in forward.asm["ptx"]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 128, 3584, 8192, 16384, norms.MAX_CHANNELS])
def test_rows_on_their_way_fit_into_shared_memory(channels: int, itemsize: int) -> None:
    if norms.triton is None:
        pytest.skip("no triton")
    shape = norms._tile(channels)
    tile = shape["BLOCK_T"] * shape["BLOCK_C"]
    assert (norms._stages(shape, itemsize) - 1) * 3 * tile * itemsize <= norms.PIPELINE
    assert shape["BLOCK_C"] >= channels and (tile >= norms.TILE or channels < 64)
    assert 4 <= shape["num_warps"] <= norms.WARPS


# ---- torch's path, which a CPU takes

SIZES = st.tuples(st.integers(0, 9), st.integers(1, 70), st.integers(0, 3))  # T, C, H


@settings(deadline=None)
@given(SIZES, st.sampled_from(WAYS), st.booleans())
def test_it_is_the_reference_in_double(size: tuple[int, int, int], way: str, kernel: bool) -> None:
    given = inputs(RmsnormCase(*size))

    def one(*args: Any) -> Tensor:
        return rmsnorm(*args, kernel=kernel)

    def two(*args: Any) -> tuple[Tensor, Tensor]:
        return rmsnorm_residual(*args, kernel=kernel)

    found, expected = results(one, two, way, given), results(rmsnorm_ref, passed_on_ref, way, given)
    for name, true in expected.items():
        torch.testing.assert_close(found[name], true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    x, _, weight, *_ = inputs(RmsnormCase(33, 96), dtype)
    expected = torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)
    assert torch.equal(rmsnorm_ref(x, weight, EPS), expected)
    assert torch.equal(rmsnorm(x, weight, EPS), expected)


def test_norm_by_hand() -> None:
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    y, s = rmsnorm_residual(x, torch.tensor([[0.0, -8.0]]), weight, 0.0)
    assert s.tolist() == [[3.0, -4.0]]
    torch.testing.assert_close(y, torch.tensor([[3.0, -8.0]]) / 12.5**0.5)


@pytest.mark.parametrize("way", WAYS[:4])
def test_gradients(way: str) -> None:
    x, residual, weight, *_ = (t.requires_grad_() for t in inputs(RmsnormCase(3, 5)))
    if way == "frozen":
        assert torch.autograd.gradcheck(lambda x: rmsnorm(x, weight.detach(), 0.1), x)
    elif way == "norm":
        assert torch.autograd.gradcheck(lambda x, w: rmsnorm(x, w, 0.1), (x, weight))
    elif way == "handed on":
        assert torch.autograd.gradcheck(lambda x, w: rmsnorm_residual(x, None, w, 0.1), (x, weight))
    else:
        assert torch.autograd.gradcheck(lambda *args: rmsnorm_residual(*args, 0.1), (x, residual, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", ["norm", "residual"])
def test_the_sum_and_one_number_a_row_are_kept(dtype: torch.dtype, way: str) -> None:
    x, residual, weight, *_ = inputs(RmsnormCase(7, 40), dtype)
    x, residual, weight = (t.requires_grad_() for t in (x, residual, weight))
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        y, s = rmsnorm_residual(x, residual, weight, EPS) if way == "residual" else (rmsnorm(x, weight, EPS), x)
    assert set(kept) >= {weight.data_ptr(), s.data_ptr()} and y.data_ptr() not in kept
    work = torch.promote_types(dtype, torch.float32)
    assert sum(kept.values()) == weight.nbytes + 7 * 40 * dtype.itemsize + 7 * work.itemsize
    y.backward(torch.ones_like(y))
    assert weight.grad is not None and weight.grad.dtype == dtype


def test_a_fused_tensors_heads_are_not_copied() -> None:
    fused = random(6, 5, 8, seed=1).requires_grad_() * 1
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        q, k, _ = fused.split([2, 2, 1], 1)
        weight = torch.ones(8, dtype=torch.float64)
        for x in (q, k):
            rmsnorm(x, weight, EPS)
    assert [t.untyped_storage().data_ptr() for t in kept].count(fused.untyped_storage().data_ptr()) == 2


def test_errors_are_one_line() -> None:
    x, weight = torch.zeros(3, 4), torch.zeros(4)
    calls: list[tuple[str, Callable[[], Any]]] = [
        (r"weight \[3\]: \[..., C\] and \[C\]", lambda: rmsnorm(x, torch.zeros(3), EPS)),
        ("with C up to 65536", lambda: rmsnorm(torch.zeros(1, 65537), torch.zeros(65537), EPS)),
        ("with C up to", lambda: rmsnorm(torch.zeros(2, 0), torch.zeros(0), EPS)),
        ("floating point", lambda: rmsnorm(x.int(), weight, EPS)),
        (r"residual torch.float64 \[3, 4\] on cpu: x's torch.float32", lambda: rmsnorm_residual(x, x.double(), weight, EPS)),
        (r"residual torch.float32 \[1, 4\]", lambda: rmsnorm_residual(x, x[:1], weight, EPS)),
    ]
    for match, call in calls:
        with pytest.raises(ValueError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)


if __name__ == "__main__":
    assert norms.runs(CPU), "TRITON_INTERPRET is not set"
    print(json.dumps({name_of(*args): faults(*args) for args in CHECKS}))
