"""Rotation and padding: the references against definitions, the kernels against the references.

Here the kernels run on the CPU, interpreted by triton, in one child process: TRITON_INTERPRET is read when they are decorated, and
this process may have triton already. Run as a program this file is that child. On a GPU the same checks run compiled.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import Results, bench_module, name_of, run_interpreted
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megamod_kernels import packing
from megamod_kernels.cases import PAD, ROPE, PadCase, RopeCase

KERNELS = Path(packing.__file__).parents[1]
CPU = torch.device("cpu")
LAYOUTS = ("split", "sliced", "own", "kept", "turned")


def random(*size: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def tables(tokens: int, dim: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    angles = random(tokens, dim // 2, seed=seed, dtype=torch.float64) * 5
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


# ---- kernels against references: run in the child, and on a GPU


def faults(name: str, found: Tensor, exact: Tensor, plain: Tensor) -> Iterator[str]:
    """What is wrong with a kernel's result, given the reference's in at least fp32 and in the kernel's dtype."""
    if found.shape != plain.shape or found.dtype != plain.dtype:
        yield f"{name} is {found.dtype} {list(found.shape)}, not {plain.dtype} {list(plain.shape)}"
    elif found.dtype == torch.bfloat16 and found.device.type == "cpu":
        # triton's interpreter cuts fp32's last 16 bits off where a GPU, and torch, round.
        cut = (exact.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
        if not torch.equal(found, cut):
            yield f"{name} is not the fp32 result, cut to bf16"
    elif found.dtype in (torch.bfloat16, torch.float16):
        error, allowed = (float((x.double() - exact.double()).norm()) for x in (found, plain))
        if not error <= 2 * allowed:
            yield f"{name} is off by {error:.3g}, the reference in {found.dtype} by {allowed:.3g}"
    elif found.numel() and not float((found - exact).abs().max()) <= 1e-6:
        yield f"{name} is off by {float((found - exact).abs().max()):.3g}"


@contextmanager
def fenced(wrong: list[str]) -> Iterator[None]:
    """Puts a fence after all memory that is asked for meanwhile, and says when one was written over."""
    fences: list[Tensor] = []

    def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        whole = torch.full((size + 10_000,), 77, dtype=dtype, device=device)
        fences.append(whole[size:])
        return whole[:size].view(shape)

    plain = Tensor.new_empty

    def new_empty(x: Tensor, *shape: int, **other: Any) -> Tensor:  # with more arguments it is the interpreter who asks
        return plain(x, *shape, **other) if other else empty(shape, x.dtype, x.device)

    with mock.patch.object(torch, "empty", empty), mock.patch.object(Tensor, "new_empty", new_empty):
        yield
    if not fences:
        wrong.append("no memory was asked for")
    if not all(bool((fence == 77).all()) for fence in fences):
        wrong.append("memory after the result was written over")


def rope_faults(case: RopeCase, dtype: torch.dtype, layout: str, device: torch.device = CPU) -> list[str]:
    """Forward and backward; q, k and v are parts of one tensor, as attention has them, or (own, kept, turned) are not."""
    heads, kv_heads = case.heads, case.kv_heads
    x = random(case.tokens, heads + 2 * kv_heads, case.dim, seed=1, dtype=dtype, device=device)
    work = torch.promote_types(dtype, torch.float32)
    cos, sin = tables(case.tokens, case.dim, 2, work, device)
    grads = [random(case.tokens, n, case.dim, seed=3 + n, dtype=dtype, device=device) for n in (heads, kv_heads, kv_heads)]
    if case.tokens:
        grads[0] = grads[0][:1].expand_as(grads[0])  # the same memory for every token
        grads[1] = grads[1].mT.contiguous().mT  # D is not the last in memory
    wrong: list[str] = []

    def run(op: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, check: bool = False) -> list[Tensor]:
        leaf = x.to(dtype, copy=True).requires_grad_()
        row = torch.cat((leaf, leaf.new_full((40, *leaf.shape[1:]), 7)))  # not a leaf: it may be changed, up to the last 40 tokens
        fused = row[: case.tokens]
        if layout == "sliced":
            q, k, v = fused[:, :heads], fused[:, heads : heads + kv_heads], fused[:, heads + kv_heads :]
        else:
            q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
        if layout == "own":
            q, k = q.clone(), k.clone()
        if layout == "turned":  # D is not the last in memory: only into new memory
            q, k = (t.mT.contiguous().mT for t in (q, k))
        inplace = layout not in ("kept", "turned")
        places, before = [t.data_ptr() for t in (q, k)], [t.detach().clone() for t in (q, k, v)]
        out_q, out_k = op(q, k, cos, sin, inplace=inplace) if check else op(q, k, cos, sin)
        given = [g.to(dtype) for g in grads]
        kept = [g.clone() for g in given]
        torch.autograd.backward([out_q, out_k, v], given)
        assert leaf.grad is not None
        if check:
            if case.tokens and inplace != ([t.data_ptr() for t in (out_q, out_k)] == places):
                wrong.append(f"in place should be {inplace}")
            untouched = zip((v,), before[2:], strict=True) if inplace else zip((q, k, v), before, strict=True)
            if not all(torch.equal(now, then) for now, then in untouched) or not bool((row[case.tokens :] == 7).all()):
                wrong.append("numbers were changed that should not be")
            if not all(map(torch.equal, given, kept)):
                wrong.append("the gradient that autograd gave was written over")
            if inplace and not (torch.equal(q, out_q) and torch.equal(k, out_k)):
                wrong.append("q and k do not hold the result")
        return [out_q.detach(), out_k.detach(), leaf.grad]

    with fenced(wrong):
        found = run(packing.rope, dtype, check=True)
    exact, plain = run(packing.rope_ref, work), run(packing.rope_ref, dtype)
    for name, *three in zip(("q", "k", "gradient"), found, exact, plain, strict=True):
        wrong.extend(faults(name, *three))
    return wrong


def pad_faults(case: PadCase, dtype: torch.dtype, device: torch.device = CPU) -> list[str]:
    """Both ways and both gradients, bit for bit: numbers are moved. Also with a row too short, and tokens after the last border."""
    wrong: list[str] = []
    borders = torch.tensor(case.borders, dtype=torch.int32, device=device)
    for longest, total in {(case.longest, case.tokens), (case.longest // 2, case.tokens), (case.longest + 3, case.tokens + 5)}:
        fused = random(total, 2, *case.width, seed=1, device=device).mul(9).to(dtype)
        x = fused[:, 1]  # every second row of another tensor
        value = -2.5 if dtype.is_floating_point else -100
        plain = packing.pad_ref(x, borders, longest, value)
        y = random(*plain.shape[:1], 2, *plain.shape[1:], seed=2, device=device).mul(9).to(dtype)[:, 1]
        with fenced(wrong):
            padded, unpadded = packing.pad(x, borders, longest, value), packing.unpad(y, borders, total)
        pairs = {"padded": (padded, plain), "unpadded": (unpadded, packing.unpad_ref(y, borders, total))}
        if dtype.is_floating_point:
            for name, ours, ref, arg, last, out in (
                ("pad's gradient", packing.pad, packing.pad_ref, x, longest, y),
                ("unpad's gradient", packing.unpad, packing.unpad_ref, y, total, x),
            ):
                leaves = [arg.detach().clone().requires_grad_() for _ in range(2)]
                for op, leaf in zip((ours, ref), leaves, strict=True):
                    op(leaf, borders, last).backward(out)
                pairs[name] = (leaves[0].grad, leaves[1].grad)
        wrong += [f"{name}, L {longest}, T {total}" for name, (a, b) in pairs.items() if a.dtype != b.dtype or not torch.equal(a, b)]
    return wrong


SMALL_ROPE, SMALL_PAD = ([case for case in cases if not case.bench] for cases in (ROPE, PAD))
ROPE_CHECKS = [
    *itertools.product(SMALL_ROPE, [torch.float32], ["split"]),
    *itertools.product(SMALL_ROPE[2:3], [torch.float32], LAYOUTS[1:]),
    *itertools.product([*SMALL_ROPE[:3], SMALL_ROPE[4]], [torch.bfloat16, torch.float16], ["split"]),
    (SMALL_ROPE[2], torch.float64, "split"),
]
PAD_CHECKS = [
    *itertools.product(SMALL_PAD, [torch.float32]),
    *itertools.product(SMALL_PAD[2:4], [torch.bfloat16, torch.float64, torch.int64]),
]
CHECKS: list[tuple[Any, ...]] = [*ROPE_CHECKS, *PAD_CHECKS]


def check(*args: Any, device: torch.device = CPU) -> list[str]:
    return (rope_faults if isinstance(args[0], RopeCase) else pad_faults)(*args, device=device)


@pytest.fixture(scope="module")
def interpreted() -> Results:
    """What the child found, by check."""
    return run_interpreted(__file__, [name_of(*args) for args in CHECKS])


@pytest.mark.parametrize("args", CHECKS, ids=lambda args: name_of(*args))
def test_interpreted_kernel_equals_its_reference(interpreted: Results, args: Sequence[Any]) -> None:
    assert interpreted[name_of(*args)] == []


def test_names_of_checks_differ() -> None:
    assert len({name_of(*args) for args in CHECKS}) == len(CHECKS)
    assert {layout for *_, layout in ROPE_CHECKS} == set(LAYOUTS)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "args",
    [*CHECKS, (ROPE[0], torch.bfloat16, "split"), (ROPE[3], torch.bfloat16, "split"), (PAD[3], torch.bfloat16)],  # tp 1, tp 8
    ids=lambda args: name_of(*args),
)
def test_compiled_kernel_equals_its_reference(args: Sequence[Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert packing.fused(torch.empty(0, device="cuda")), "triton cannot be imported"
    assert check(*args, device=torch.device("cuda", 0)) == []


ONES = {"H": 1, "K": 1, "T": 1, "S": 1, "L": 1, "C": 1, "blocks": 1, "steps": 1, "group": 1, "p_row": 1}  # triton compiles ones in
POINTERS = ("q", "k", "q_out", "k_out", "x", "out", "padded")
ROPE_BLOCKS = {"INVERSE": True, "BLOCK_T": 16, "BLOCK_P": 64}
COPY_BLOCKS = {"BLOCK_R": 2, "BLOCK_C": 1024}


@pytest.mark.parametrize(
    ("kernel", "dtype", "constants"),
    [
        ("_rope_kernel", "bf16", {**ROPE_BLOCKS, "HALF": 64}),
        ("_rope_kernel", "fp64", {**ROPE_BLOCKS, "HALF": 40, **ONES}),
        ("_pad_kernel", "bf16", {**COPY_BLOCKS, "VALUE": float("-inf")}),
        ("_pad_kernel", "i64", {**COPY_BLOCKS, "VALUE": 0, **ONES}),
        ("_unpad_kernel", "bf16", COPY_BLOCKS),
        ("_unpad_kernel", "i64", {**COPY_BLOCKS, **ONES}),
    ],
)
def test_kernel_compiles_for_a_gpu(
    kernel: str, dtype: str, constants: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes what the compiler does not, a float as an integer's constant for one; the compiler needs no GPU."""
    triton = pytest.importorskip("triton")
    if packing.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled now, not once
    function = getattr(packing, kernel)
    used = {name: value for name, value in constants.items() if name in function.arg_names}
    table = "*fp64" if dtype == "fp64" else "*fp32"
    types = {**dict.fromkeys(POINTERS, f"*{dtype}"), "cos_table": table, "sin_table": table, "borders": "*i32"}
    signature = {name: "constexpr" if name in used else types.get(name, "i32") for name in function.arg_names}
    source = ASTSource(function, signature=signature, constexprs=used)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]


def test_a_stale_save_beside_a_view_is_found() -> None:
    """q a view, k with memory of its own whose old numbers its maker needs: torch must refuse, not give a wrong gradient."""
    cos, sin = tables(5, 8, 1, torch.float64)
    leaf = random(5, 3, 8, seed=1, dtype=torch.float64).requires_grad_()
    for make, harmless in ((torch.exp, False), (lambda x: 3 * x, True)):
        fused = leaf * 2
        q, k = packing.rope(fused[:, :2], make(fused[:, 2:]), cos, sin)
        total = q.square().sum() + k.square().sum()
        if not harmless:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                total.backward()
            continue
        (found,) = torch.autograd.grad(total, leaf)
        plain = leaf * 2
        q, k = packing.rope_ref(plain[:, :2], make(plain[:, 2:]), cos, sin)
        (expected,) = torch.autograd.grad(q.square().sum() + k.square().sum(), leaf)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


# ---- references against definitions

SHAPES = st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9))  # T, H, K, D/2
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**31)


@settings(deadline=None)
@given(SHAPES, SEEDS, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_rotation_is_that_of_transformers_bit_for_bit(shape: tuple[int, int, int, int], seed: int, dtype: torch.dtype) -> None:
    tokens, heads, kv_heads, half = shape
    q, k = (random(tokens, n, 2 * half, seed=seed + n, dtype=dtype) for n in (heads, kv_heads))
    cos, sin = tables(tokens, 2 * half, seed, torch.promote_types(dtype, torch.float32))
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    twice = [torch.cat((x, x), -1)[None] for x in (cos, sin)]  # [1, T, D], as transformers has them; heads come before tokens there
    rounded = apply_rotary_pos_emb(*(x.to(cos.dtype).transpose(0, 1)[None] for x in (q, k)), *twice)
    expected = [x[0].transpose(0, 1).to(dtype) for x in rounded]
    for found in (packing.rope_ref(q, k, cos, sin), packing.rope(q, k, cos, sin, inplace=False), packing.rope(q, k, cos, sin)):
        assert [x.dtype for x in found] == [dtype] * 2
        assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, (q, k), expected))  # the last was in place


@settings(deadline=None)
@given(SHAPES, SEEDS)
def test_rotation_keeps_lengths_and_can_be_undone(shape: tuple[int, int, int, int], seed: int) -> None:
    tokens, heads, kv_heads, half = shape
    q, k = (random(tokens, n, 2 * half, seed=seed + n, dtype=torch.float64) for n in (heads, kv_heads))
    cos, sin = tables(tokens, 2 * half, seed, torch.float64)
    turned = packing.rope(q, k, cos, sin, inplace=False)
    for before, after, back in zip((q, k), turned, packing.rope(*turned, cos, -sin, inplace=False), strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(back, before, rtol=1e-13, atol=1e-13)


def test_rotation_by_hand() -> None:
    """A quarter turn: (a, b) → (-b, a), pairs i and i + D/2, each token by its own angle."""
    q = torch.arange(1.0, 9.0).view(2, 1, 4)
    cos, sin = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    out, _ = packing.rope(q.clone(), q.clone(), cos, sin)
    assert out.tolist() == [[[-3.0, 2.0, 1.0, 4.0]], [[5.0, -8.0, 7.0, 6.0]]]


@settings(deadline=None)
@given(LENGTHS, st.sampled_from([(), (3,), (2, 3)]), st.integers(0, 3), SEEDS)
def test_padding_by_hand_and_back(lengths: list[int], width: tuple[int, ...], extra: int, seed: int) -> None:
    borders, longest = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), max(lengths) + extra
    x = random(sum(lengths), *width, seed=seed)
    padded = packing.pad(x, borders, longest, -7.0)
    assert padded.shape == (len(lengths), longest, *width)
    for row, document in zip(padded, x.split(lengths), strict=True):
        assert torch.equal(row[: len(document)], document)
        assert torch.equal(row[len(document) :], torch.full_like(row[len(document) :], -7.0))
    assert torch.equal(packing.unpad(padded, borders, len(x)), x)


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 7), st.integers(0, 3), SEEDS)
def test_pad_and_unpad_are_transposes_also_where_tokens_are_left_out(lengths: list[int], longest: int, after: int, seed: int) -> None:
    borders, total = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), sum(lengths) + after
    x, y = random(total, 2, seed=seed, dtype=torch.float64), random(len(lengths), longest, 2, seed=seed + 1, dtype=torch.float64)
    left, right = (packing.pad(x, borders, longest) * y).sum(), (x * packing.unpad(y, borders, total)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", [packing.rope_ref, packing.rope], ids=["reference", "autograd"])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_rope(op: Callable[..., tuple[Tensor, Tensor]], fused: bool) -> None:
    cos, sin = tables(3, 6, 1, torch.float64)
    x = random(3, 5, 6, seed=2, dtype=torch.float64).requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x * 1).split([2, 1, 2], 1)  # an input must not be changed: gradcheck asks twice
        return *op(*((q, k) if fused else (q * 1, k * 1)), cos, sin), v

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize(
    ("pad", "unpad"), [(packing.pad_ref, packing.unpad_ref), (packing.pad, packing.unpad)], ids=["reference", "autograd"]
)
@pytest.mark.parametrize(("longest", "total"), [(3, 5), (2, 7)])
def test_gradients_of_padding(pad: Callable[..., Tensor], unpad: Callable[..., Tensor], longest: int, total: int) -> None:
    borders = torch.tensor([0, 0, 2, 5], dtype=torch.int32)
    x, y = (random(*n, 2, seed=1, dtype=torch.float64).requires_grad_() for n in ((total,), (3, longest)))
    assert torch.autograd.gradcheck(lambda x: pad(x, borders, longest, 2.0), x)
    assert torch.autograd.gradcheck(lambda y: unpad(y, borders, total), y)
    assert torch.autograd.gradgradcheck(lambda x: pad(x, borders, longest, 2.0) ** 2, x)


# ---- what in place means


def parts(grad: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = random(4, 3, 6, seed=1).requires_grad_(grad)
    return x, x[:, :2], x[:, 2:], *tables(4, 6, 2)


@pytest.mark.parametrize("view", [False, True])
def test_a_leaf_is_refused_before_it_is_changed(view: bool) -> None:
    _, q, k, cos, sin = parts()
    if not view:
        q, k = q.detach().clone().requires_grad_(), k.detach().clone()
    before = q.detach().clone()
    with pytest.raises(RuntimeError, match="q is or views a leaf Variable that requires grad"):
        packing.rope(q, k, cos, sin)
    assert torch.equal(q, before)
    packing.rope(q, k, cos, sin, inplace=False)[0].sum().backward()
    with torch.no_grad():
        assert packing.rope(q, k, cos, sin)[0].data_ptr() == q.data_ptr()
    assert not torch.equal(q, before)


def test_torch_finds_who_saved_the_old_numbers() -> None:
    _, q, k, cos, sin = parts()
    q, k = q * 1, k * 1
    squares = q.square()
    out_q, out_k = packing.rope(q, k, cos, sin)
    assert out_q is q
    assert out_k is k
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])  # megatron-core's is of the first kind
def test_checkpointed_it_must_not_be_in_place(reentrant: bool) -> None:
    x, _, _, cos, sin = parts()

    def gradient(inplace: bool, recompute: bool) -> Tensor:
        q, k = (x * 1).split([2, 1], 1)

        def core(q: Tensor, k: Tensor) -> Tensor:
            out_q, out_k = packing.rope(q, k, cos, sin, inplace=inplace)
            return (out_q * out_k).square().sum()

        x.grad = None
        (checkpoint(core, q, k, use_reentrant=reentrant) if recompute else core(q, k)).backward()
        assert x.grad is not None
        return x.grad

    expected = gradient(inplace=True, recompute=False)
    assert torch.equal(gradient(inplace=False, recompute=True), expected)
    if reentrant:  # the other kind hands the changed tensors in again, and nobody can tell
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            gradient(inplace=True, recompute=True)


def test_errors_are_one_line() -> None:
    _, q, k, cos, sin = parts(grad=False)
    x, borders = torch.zeros(5, 2), torch.tensor([0, 5], dtype=torch.int32)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("even D", lambda: packing.rope(q[..., :5], k[..., :5], cos, sin)),
        (r"\[T, D/2\] = \[4, 3\]", lambda: packing.rope(q, k, cos[:2], sin)),
        ("both float32", lambda: packing.rope(q, k, cos.bfloat16(), sin.bfloat16())),
        ("no gradient", lambda: packing.rope(q, k, cos.clone().requires_grad_(), sin)),
        ("k with strides", lambda: packing.rope(q, k[:, :1].expand(4, 3, 6), cos, sin)),
        ("q with strides", lambda: packing.rope(q.mT.contiguous().mT, k, cos, sin)),
        ("int32", lambda: packing.pad(x, borders.long(), 5)),
        ("a length of -1", lambda: packing.pad(x, borders, -1)),
        ("S \\+ 1 borders", lambda: packing.unpad(x[None].expand(2, 5, 2), borders, 5)),
    ]
    for match, call in calls:
        with pytest.raises(ValueError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- the benchmark


def test_bench_rehearses_as_a_program_also_without_triton() -> None:
    program = "import runpy, sys; sys.modules['triton'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(KERNELS / "bench.py"), "packing", "--device", "cpu"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kernel"] == "packing"
    assert report["mode"].startswith("rehearsal: reference timings")
    assert {"device", "commit", "torch", "triton", "cuda", "modified"} <= set(report)
    assert len(report["cases"]) == 2 * (sum(c.tokens > 0 for c in SMALL_ROPE) + sum(c.tokens > 0 for c in SMALL_PAD))
    assert all(case["agrees"] and case["bytes"] > 0 and case["ms"]["reference"] > 0 for case in report["cases"])
    assert "REHEARSAL" in done.stdout


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    return bench_module(monkeypatch)


def test_bench_without_a_gpu_says_so_in_one_line(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["packing"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megamod: error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("wrong", [False, True])
def test_bench_s_table_and_report(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: bool) -> None:
    """All but the clock, which needs a GPU: a copy takes 1 ms, the kernel 1, the reference 2, the compiled one 3."""
    x = torch.ones(1000)
    task = bench.Task("double", 4000, lambda op: op(x), lambda x: x * (3 if wrong else 2), lambda x: x + x)
    clock: list[int] = []

    def turns(candidates: Sequence[Callable[[], Any]], _: Tensor) -> list[float]:
        clock.extend(len(candidate()) for candidate in candidates)
        return [1.0, 2.0, 3.0][: len(candidates)]

    monkeypatch.setattr(bench, "turns", turns)
    monkeypatch.setattr(bench, "KERNELS", {"packing": lambda *_: iter([task])})
    monkeypatch.setattr(bench, "COPY_BYTES", 4000)
    monkeypatch.setattr(torch, "compile", lambda op, **_: op)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    report = bench.on_gpu("packing", CPU)
    (case,) = report["cases"]
    assert clock == [4000, 1000, 1000, 1000]
    assert report["copy_gb_s"] == pytest.approx(0.008)  # read and written
    assert case["ms"] == {"kernel": 1.0, "reference": 2.0, "compiled": 3.0}
    assert (case["gb_s"], case["of_copy"], case["agrees"]) == (pytest.approx(0.004), pytest.approx(0.5), not wrong)
    *_, line = capsys.readouterr().out.splitlines()
    assert line.split()[:4] == ["double", "1.000", "2.000", "3.000"]
    assert line.split()[5:8] == ["50%", "2.00", "3.00"]
    assert ("WRONG" in line) == wrong


if __name__ == "__main__":
    assert packing.fused(torch.empty(0)), "TRITON_INTERPRET is not set"
    results: Results = {}
    for args in CHECKS:
        print(name_of(*args), file=sys.stderr, flush=True)  # the last of these is the one that a crash is to be blamed on
        results[name_of(*args)] = check(*args)
    print(json.dumps(results))
