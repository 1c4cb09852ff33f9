"""LoRA on a frozen linear: torch's products and the kernels against the references, the mask against Philox's published vectors.

The kernels are interpreted in a child process, as test_kernel_packing.py says; this file run as a program is that child. triton's
interpreter multiplies bf16's bits as integers, so they run in fp32 and fp16 there; on a GPU in fp16 and bf16.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import Results, bench_module, fenced, name_of, run_interpreted
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megamod_kernels import lora
from megamod_kernels.cases import LORA, LoraCase
from megamod_kernels.lora import Dropout, Part, dropout_keep, lora_down, lora_down_ref, lora_linear, lora_linear_ref, lora_up, lora_up_ref

KERNELS = Path(lora.__file__).parents[1]
CPU = torch.device("cpu")
Inputs = tuple[Tensor, Tensor, Tensor, list[Part]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """All is small here, and threads that wait for each other on a busy machine take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*size: int, seed: int, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def inputs(case: LoraCase, seed: int = 1, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Inputs:
    """x, weight, bias, parts; x and the adapters ask for gradients."""
    x = random(case.tokens, case.channels, seed=seed, dtype=dtype, device=device).requires_grad_()
    weight = random(case.features, case.channels, seed=seed + 1, dtype=dtype, device=device)
    bias = random(case.features, seed=seed + 2, dtype=dtype, device=device)
    parts = []
    for i, (row, features, rank, scale) in enumerate(case.parts):
        a = random(rank, case.channels, seed=seed + 10 + 2 * i, dtype=dtype, device=device)
        b = random(features, rank, seed=seed + 11 + 2 * i, dtype=dtype, device=device)
        parts.append(Part(a.requires_grad_(), b.requires_grad_(), row, scale))
    return x, weight, bias, parts


def leaves(x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    return [x, *(t for part in parts for t in part[:2])]


def in_dtype(args: Inputs, dtype: torch.dtype) -> Inputs:
    x, weight, bias, parts = args
    new = [t.detach().to(dtype, copy=True).requires_grad_() for t in leaves(x, parts)]
    pairs = zip(new[1::2], new[2::2], parts, strict=True)
    return new[0], weight.to(dtype), bias.to(dtype), [Part(a, b, part.row, part.scale) for a, b, part in pairs]


# ---- kernels against references: run in the child, and on a GPU


def through(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], dropout: Dropout | None) -> Tensor:
    """As sequence parallelism has it: down and up by themselves."""
    return lora_up(x, weight, bias, lora_down(x, parts, dropout), parts)


WAYS: dict[str, Callable[..., Tensor]] = {"linear": lora_linear, "down and up": through}
DROPOUTS = {
    "plain": None,
    "dropout": Dropout(0.3, 0xFEDC_BA98_7654_3210, token=5, channel=8),
    "shifted dropout": Dropout(0.3, 77, token=2**31 - 100, channel=3),
}


def lora_faults(case: LoraCase, dtype: torch.dtype, dropped: str, way: str, device: torch.device = CPU) -> list[str]:
    """y and all gradients: their error may be twice the reference's own in this dtype."""
    dropout, args = DROPOUTS[dropped], inputs(case, dtype=dtype, device=device)
    grad = random(case.tokens, case.features, seed=5, dtype=dtype, device=device)

    def run(op: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, weight, bias, parts = in_dtype(args, dtype)
        y = op(x, weight, bias, parts, dropout)
        return [y.detach(), *torch.autograd.grad(y, leaves(x, parts), grad.to(dtype))]

    wrong: list[str] = []
    with fenced(wrong), mock.patch.object(lora, "_product", wraps=lora._product) as product:
        found = run(WAYS[way], dtype)
    kernels = [call.kwargs["forward"] for call in product.call_args_list]
    fused = case.label not in ("none", "odd sizes") and lora._runs(device, dtype)
    dx_fused = dropped == "dropout" or (dropped == "plain" and way == "linear")  # by itself, down's dx has nothing to fuse but a mask
    if kernels != [True, False][: fused + (fused and dx_fused)]:
        wrong.append(f"the kernel made y and not dx in {kernels}")
    exact, plain = run(lora_linear_ref, torch.float64), run(lora_linear_ref, dtype)
    names = ["y", "dx", *(f"d{letter}_{i}" for i in range(len(case.parts)) for letter in "AB")]
    for name, ours, true, theirs in zip(names, found, exact, plain, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            wrong.append(f"{name} is {ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}")
            continue
        error, allowed = (float((t.double() - true).norm()) for t in (ours, theirs))
        if not error <= 2 * allowed + 1e-7 * float(true.norm()):
            wrong.append(f"{name} is off by {error:.3g}, the reference in {dtype} by {allowed:.3g}")
    return wrong


def mask_faults(seed: int, token: int, channel: int, device: torch.device = CPU) -> list[str]:
    """All three kernels that make masks, bit for bit, where all other numbers are ones."""
    dropout, dtype = Dropout(0.4, seed, token, channel), torch.float16
    tokens, channels = 37, 56
    keep = dropout_keep(dropout, tokens, channels, device)
    x = torch.ones(tokens, channels, dtype=dtype, device=device).requires_grad_()

    def part(rank: int, a: Tensor) -> Part:
        return Part(a.to(device, dtype).requires_grad_(), torch.ones(1, rank, dtype=dtype, device=device), 0, 1.0)

    down = lora_down(x, [part(channels, torch.eye(channels))], dropout)  # S = x̃
    one = part(1, torch.ones(1, channels))
    (dx,) = torch.autograd.grad(lora_down(x, [one], dropout), x, torch.ones(tokens, 1, dtype=dtype, device=device))
    many = part(tokens, torch.ones(tokens, channels))
    (da,) = torch.autograd.grad(lora_down(x, [many], dropout), many.a, torch.eye(tokens, dtype=dtype, device=device))  # dA = x̃
    expected = keep * torch.tensor(dropout.scale, dtype=dtype, device=device)
    return [name for name, found in (("down", down), ("dx", dx), ("dA", da)) if not torch.equal(found, expected)]


SMALL = [case for case in LORA if not case.bench]
LORA_CHECKS = [
    *itertools.product(SMALL, [torch.float32], ["plain", "dropout"], ["linear"]),
    *itertools.product(SMALL[3:5], [torch.float32], ["plain", "dropout"], ["down and up"]),
    *itertools.product(SMALL[:5], [torch.float16], ["plain"], ["linear"]),
    (SMALL[3], torch.float16, "dropout", "linear"),
    (SMALL[3], torch.float32, "shifted dropout", "linear"),
    (SMALL[3], torch.bfloat16, "dropout", "linear"),
]
MASK_CHECKS = [(0, 0, 0), (2**64 - 1, 2**31 - 50, 2**31 - 64), (0x8000_0000_7FFF_FFFF, 12345, 29568)]
CHECKS: list[tuple[Any, ...]] = [*LORA_CHECKS, *MASK_CHECKS]


def check(*args: Any, device: torch.device = CPU) -> list[str]:
    return (lora_faults if isinstance(args[0], LoraCase) else mask_faults)(*args, device=device)


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
    [
        *CHECKS,
        *itertools.product(SMALL, [torch.bfloat16], DROPOUTS, WAYS),
        *itertools.product([replace(case, tokens=1000) for case in LORA[12:16]], [torch.bfloat16], ["plain", "dropout"], WAYS),  # tp 8
    ],
    ids=lambda args: name_of(*args),
)
def test_compiled_kernel_equals_its_reference(args: Sequence[Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    assert lora._runs(device, torch.bfloat16)
    assert check(*args, device=device) == []


def descriptor(dtype: str, *tile: int) -> str:
    return f"tensordesc<{dtype}{list(tile)}>".replace(" ", "")


def compiled(kernel: Any, dtype: str, tiles: dict[str, Sequence[int]], constants: dict[str, Any], **options: int) -> Any:
    """A kernel's code for compute capability 9.0."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: descriptor(dtype, *tile) for name, tile in tiles.items()} | {"table": "*i32", "scale": "fp32", "bias": f"*{dtype}"}
    types = {"out": "*fp32"} | types
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True, **options})


FILLS = 227 * 1024  # bytes of shared memory that a program can have on Hopper
needs_compiler = pytest.mark.skipif(lora.triton is None or lora.INTERPRETED, reason="nothing to compile with")


@needs_compiler
@pytest.mark.parametrize(
    ("tile", "forward", "masked"),
    [*((tile, False, True) for tile in range(len(lora.TILES) if lora.triton is not None else 0)), (1, True, False), (2, False, False)],
)
def test_products_compile_for_a_gpu(tile: int, forward: bool, masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate of the autotuner, with the tiles that it gives the descriptors; on Hopper's tensor cores, from its copy engine."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled now, not once
    config = lora.TILES[tile]

    class Described:
        block_shape: Sequence[int] = ()

    described = {name: Described() for name in ("x", "w", "s", "b", "out")}
    constants = {"FORWARD": forward, "MASKED": masked, "BIASED": forward, "SPANS": 3 if forward else 1, "BLOCK_R": 64, **config.kwargs}
    config.pre_hook({**described, **constants})
    code = compiled(
        lora._product_kernel.fn, "fp16" if tile else "bf16", {name: d.block_shape for name, d in described.items()}, constants,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    assert "wgmma.mma_async" in code.asm["ptx"]
    assert "cp.async.bulk.tensor" in code.asm["ptx"]
    assert code.metadata.shared <= FILLS


@needs_compiler
@pytest.mark.parametrize(("rank", "dtype"), [(16, "bf16"), (64, "fp16"), (128, "bf16"), (256, "bf16")])
def test_skinny_products_compile_for_a_gpu(rank: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"BLOCK_T": 64, "BLOCK_C": 64, "BLOCK_R": rank}
    code = compiled(lora._down_kernel, dtype, {"x": (64, 64), "a": (rank, 64)}, sizes, num_warps=8 if rank > 128 else 4, num_stages=3)
    assert code.metadata.shared <= FILLS
    rank = min(128, max(64, rank))
    sizes = {"BLOCK_T": 64, "BLOCK_C": 128, "BLOCK_R": rank}
    code = compiled(lora._d_a_kernel, dtype, {"x": (64, 128), "ds": (64, rank)}, sizes, num_warps=4 if rank == 64 else 8, num_stages=3)
    assert code.metadata.shared <= FILLS


# ---- the mask


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_authors_numbers(counter: Sequence[int], key: tuple[int, int], words: str) -> None:
    """Random123's kat_vectors for philox4x32 of 10 rounds."""
    found = lora.philox_ref([torch.tensor([c]) for c in counter], key)
    assert [f"{int(word):08x}" for word in found] == words.split()
    assert [f"{word:08x}" for word in philox(counter, key)] == words.split()


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """The paper's rounds, in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (high0, low0), (high1, low1) = divmod(0xD2511F53 * c0, 2**32), divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


SEEDS = st.integers(0, 2**64 - 1)
TOKENS, CHANNELS = st.integers(0, 2**31 - 100), st.integers(0, 2**31 - 100)
PS = st.floats(0, 0.99)


@settings(deadline=None, max_examples=50)
@given(PS, SEEDS, TOKENS, CHANNELS)
def test_mask_by_hand(p: float, seed: int, token: int, channel: int) -> None:
    keep = dropout_keep(Dropout(p, seed, token, channel), 2, 11, CPU)
    for t, c in itertools.product(range(2), range(11)):
        words = philox((token + t, (channel + c) // 8, 0, 0), (seed % 2**32, seed // 2**32))
        numbers = [half for word in words for half in (word % 2**16, word // 2**16)]
        assert bool(keep[t, c]) == (numbers[(channel + c) % 8] >= round(p * 65536))


@settings(deadline=None, max_examples=50)
@given(PS, SEEDS, TOKENS, CHANNELS, st.integers(0, 19), st.integers(0, 29), st.integers(0, 20), st.integers(0, 30))
def test_mask_does_not_depend_on_the_ranks(
    p: float, seed: int, token: int, channel: int, after: int, right: int, tokens: int, channels: int
) -> None:
    whole = dropout_keep(Dropout(p, seed, token, channel), 40, 60, CPU)
    piece = dropout_keep(Dropout(p, seed, token + after, channel + right), tokens, channels, CPU)
    assert torch.equal(piece, whole[after : after + tokens, right : right + channels])


def test_mask_does_not_depend_on_how_much_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = Dropout(0.2, 3, 7, 5)
    whole = dropout_keep(dropout, 33, 20, CPU)
    for counters in (1, 8, 10):
        monkeypatch.setattr(lora, "CPU_COUNTERS", counters)
        assert torch.equal(dropout_keep(dropout, 33, 20, CPU), whole)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mask_is_random(p: float) -> None:
    """Frequencies over all, in each of the eight numbers of a counter, and of neighbours that agree: within 5 σ."""
    tokens, channels = 1024, 512
    keep = dropout_keep(Dropout(p, 2024), tokens, channels, CPU)

    def near(found: Tensor, expected: float) -> bool:
        n = found.numel()
        return abs(float(found.double().mean()) - expected) <= 5 * math.sqrt(expected * (1 - expected) / n)

    exact = 1 - round(p * 65536) / 65536
    both = exact**2 + (1 - exact) ** 2
    assert near(keep, exact)
    assert all(near(keep[:, i::8], exact) for i in range(8))
    for step in (1, 2, 8, 64):
        assert near(keep[:, step:] == keep[:, :-step], both)
        assert near(keep[step:] == keep[:-step], both)
    for other in (Dropout(p, 2025), Dropout(p, 2024 + 2**32), Dropout(p, 2024, token=tokens), Dropout(p, 2024, channel=channels)):
        assert near(dropout_keep(other, tokens, channels, CPU) == keep, both)
    assert float(keep.double().mean(0).std()) > 0.5 * math.sqrt(exact * (1 - exact) / tokens)  # columns differ, as chance has it


def test_expectation_is_exact() -> None:
    """p as 16 bits have it: the mean over all 65536 numbers of what x becomes is x."""
    for p in (0.05, 0.1, 1 / 3):
        dropout = Dropout(p, 0)
        assert dropout.scale * sum(n >= dropout.threshold for n in range(65536)) / 65536 == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("wrong", [{"p": -0.1}, {"p": 1.0}, {"seed": 1 << 64}, {"seed": -1}, {"token": -1}, {"channel": 1 << 31}])
def test_dropout_says_what_it_cannot_do(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="dropout"):
        Dropout(**{"p": 0.1, "seed": 0, **wrong})


# ---- torch's products against the references


@st.composite
def cases(draw: st.DrawFn) -> LoraCase:
    features = draw(st.integers(1, 12))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.integers(0, features - 1))
        parts.append((row, draw(st.integers(1, features - row)), draw(st.integers(1, 5)), draw(st.sampled_from([1.0, 2.0, -0.5, 0.3]))))
    return LoraCase("drawn", draw(st.integers(0, 9)), draw(st.integers(1, 20)), features, tuple(parts))


DRAWN_DROPOUTS = st.none() | st.builds(Dropout, st.floats(0, 0.9), SEEDS, st.integers(0, 1000), st.integers(0, 1000))


def close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is not None and e is not None:
            torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=80)
@given(cases(), DRAWN_DROPOUTS, st.booleans(), st.integers(0, 2**20), st.sampled_from(sorted(WAYS)))
def test_results_and_gradients_are_the_references(case: LoraCase, dropout: Dropout | None, biased: bool, frozen: int, way: str) -> None:
    """Whichever of x, the A's and the B's ask for gradients."""
    x, weight, some, parts = inputs(case)
    bias = some if biased else None
    for i, leaf in enumerate(leaves(x, parts)):
        leaf.requires_grad_(not frozen >> i & 1)
    results = []
    for op in (WAYS[way], lora_linear_ref):
        y = op(x, weight, bias, parts, dropout)
        wanted = [leaf for leaf in leaves(x, parts) if leaf.requires_grad]
        assert y.requires_grad == bool(wanted)
        grads = torch.autograd.grad(y, wanted, random(*y.shape, seed=9)) if wanted else ()
        results.append([y.detach(), *grads])
    close(*results)


@settings(deadline=None, max_examples=30)
@given(cases(), DRAWN_DROPOUTS)
def test_down_and_up_are_the_references(case: LoraCase, dropout: Dropout | None) -> None:
    x, weight, bias, parts = inputs(case)
    s = random(case.tokens, sum(rank for _, _, rank, _ in case.parts), seed=4).requires_grad_()
    down, expected = lora_down(x, parts, dropout), lora_down_ref(x, parts, dropout)
    wanted = [x, *(part.a for part in parts)]
    close([down, *torch.autograd.grad(down, wanted, s)], [expected, *torch.autograd.grad(expected, wanted, s)])
    up, expected = lora_up(x, weight, bias, s, parts), lora_up_ref(x, weight, bias, s, parts)
    wanted, grad = [x, s, *(part.b for part in parts)], random(*up.shape, seed=6)
    close([up, *torch.autograd.grad(up, wanted, grad)], [expected, *torch.autograd.grad(expected, wanted, grad)])


@pytest.mark.parametrize("dropped", DROPOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients(way: str, dropped: str) -> None:
    x, weight, bias, parts = inputs(LoraCase("", 3, 6, 8, ((0, 5, 2, 2.0), (3, 4, 1, -0.5))))

    def run(x: Tensor, *ab: Tensor) -> Tensor:
        new = [Part(a, b, part.row, part.scale) for a, b, part in zip(ab[::2], ab[1::2], parts, strict=True)]
        return WAYS[way](x, weight, bias, new, DROPOUTS[dropped])

    assert torch.autograd.gradcheck(run, leaves(x, parts))


def test_linear_by_hand() -> None:
    """Two tokens, two features; the second one's adapter adds 3 · (x · a) · 5."""
    x, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    part = Part(torch.tensor([[1.0, 1.0]]), torch.tensor([[5.0]]), 1, 3.0)
    assert lora_linear(x, weight, torch.tensor([0.5, 0.0]), [part]).tolist() == [[1.5, 47.0], [3.5, 109.0]]


@pytest.mark.parametrize("dropped", DROPOUTS)
def test_bf16_is_no_worse_than_the_reference_in_bf16(dropped: str) -> None:
    for case in SMALL:
        assert lora_faults(case, torch.bfloat16, dropped, "linear") == []


def test_a_split_by_rows_or_columns_sums_to_the_whole() -> None:
    """As tensor parallelism has it: x's channels over ranks, each with its channels' mask; tokens over ranks likewise."""
    case = LoraCase("", 12, 24, 10, ((0, 10, 3, 2.0),))
    x, weight, _, (part,) = inputs(case)
    dropout = Dropout(0.3, 99, token=100)
    whole = lora_linear(x, weight, None, [part], dropout)
    pieces = []
    for t, c in itertools.product(range(0, 12, 4), range(0, 24, 6)):
        here = replace(dropout, token=100 + t, channel=c)
        mine = part._replace(a=part.a[:, c : c + 6])
        pieces.append(lora_linear(x[t : t + 4, c : c + 6], weight[:, c : c + 6], None, [mine], here))
    found = torch.cat([sum(pieces[i : i + 4], torch.zeros(())) for i in range(0, 12, 4)])
    close([found], [whole])


def test_evaluation_needs_no_dropout() -> None:
    x, weight, bias, parts = inputs(SMALL[0])
    assert torch.equal(lora_linear(x, weight, bias, parts, Dropout(0.0, 1)), lora_linear(x, weight, bias, parts))


def test_leading_axes_are_tokens() -> None:
    x, weight, bias, parts = inputs(replace(SMALL[3], tokens=30))
    folded = x.detach().view(5, 2, 3, -1).transpose(0, 1)  # a view in another order
    flat = folded.reshape(30, -1)
    dropout = Dropout(0.3, 4, token=8)
    for op, ref in ((lora_linear, lora_linear_ref), (through, lora_linear_ref)):
        found = op(folded, weight, bias, parts, dropout)
        assert found.shape == (2, 5, 3, SMALL[3].features)
        close([found.reshape(30, -1), ref(folded, weight, bias, parts, dropout)], [ref(flat, weight, bias, parts, dropout), found])
    assert lora_down(folded, parts, dropout).shape == (2, 5, 3, 30)


def test_without_parts_it_is_the_linear() -> None:
    x, weight, bias, _ = inputs(SMALL[0])
    expected = torch.nn.functional.linear(x, weight, bias)
    assert lora_down(x, []).shape == (33, 0)
    assert torch.equal(lora_linear(x, weight, bias, []), expected)
    assert torch.equal(lora_up(x, weight, bias, lora_down(x, []), []), expected)


# ---- what is kept for the backward


def kept(run: Callable[[], Tensor]) -> list[Tensor]:
    tensors: list[Tensor] = []
    with saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        run()
    return tensors


@pytest.mark.parametrize("dropped", DROPOUTS)
def test_nothing_is_kept_but_x_the_weights_and_the_small_product(dropped: str) -> None:
    case = LoraCase("", 50, 40, 60, ((0, 40, 3, 2.0), (40, 20, 3, 2.0)))
    x, weight, bias, parts = inputs(case)
    dropout = DROPOUTS[dropped]
    adapters = {t.data_ptr() for t in leaves(x, parts)[1:]}

    def others(run: Callable[[], Tensor]) -> list[str]:
        names = {x.data_ptr(): "x", weight.data_ptr(): "weight"}
        found = {t.data_ptr(): t for t in kept(run)}
        return sorted(names.get(at, str(list(t.shape))) for at, t in found.items() if at not in adapters)

    s = lora_down(x, parts, dropout).detach().requires_grad_()
    assert others(lambda: lora_linear(x, weight, bias, parts, dropout)) == ["[50, 6]", "weight", "x"]
    assert others(lambda: lora_down(x, parts, dropout)) == ["x"]
    assert others(lambda: lora_up(x, weight, bias, s, parts)) == ["[50, 6]", "weight"]
    still = [part._replace(a=part.a.detach()) for part in parts]
    assert others(lambda: lora_linear(x, weight, bias, still, dropout)).count("x") == 0


# ---- what is refused


@pytest.mark.parametrize("op", [lora_linear, through], ids=WAYS)
def test_frozen_means_frozen(op: Callable[..., Tensor]) -> None:
    x, weight, bias, parts = inputs(SMALL[0])
    for name, args in (("weight", (weight.requires_grad_(), bias)), ("bias", (weight.detach(), bias.requires_grad_()))):
        with pytest.raises(ValueError, match=f"{name} asks for a gradient"):
            op(x, *args, parts, None)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, (part,) = inputs(SMALL[0])
    for wrong, match in (
        (part._replace(row=1), "features 1 … 72"),
        (part._replace(row=-1), "features -1"),
        (part._replace(a=part.a[:, 1:]), "part 0"),
        (part._replace(b=part.b[:, 1:]), "part 0"),
        (part._replace(a=part.a.float()), "float32"),
    ):
        with pytest.raises(ValueError, match=match):
            lora_linear(x, weight, bias, [wrong])
    with pytest.raises(ValueError, match="weight"):
        lora_linear(x, weight[:, 1:], bias, [])
    with pytest.raises(ValueError, match="bias"):
        lora_linear(x, weight, bias[1:], [part])
    with pytest.raises(ValueError, match="weight"):
        lora_linear(x, weight.float(), bias, [part])
    with pytest.raises(ValueError, match="down"):
        lora_up(x, weight, bias, random(33, 15, seed=1), [part])
    with pytest.raises(ValueError, match=r"\[T, C\]"):
        lora_down(x[0], [part])


def test_path_tells_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    if lora.triton is not None and lora.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fast = lora.triton is not None
    assert [lora._runs(cuda, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [fast, fast, False]
    assert lora.path(torch.empty(64, 64, dtype=torch.bfloat16)) == "addmm"
    monkeypatch.setattr(lora, "_runs", lambda device, dtype: True)
    weight = torch.empty(64, 64, dtype=torch.bfloat16)
    assert [lora.path(w) for w in (weight, weight[:60], weight[:, :60], weight.t()[:, 1:])] == ["triton", "addmm", "addmm", "addmm"]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not lora._runs(cuda, torch.float16)
    monkeypatch.setattr(lora, "triton", None)
    assert not lora._runs(cuda, torch.bfloat16)


# ---- the benchmark


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    return bench_module(monkeypatch)


def test_bench_rehearses(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["lora", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [case["name"] for case in report["cases"]]
    assert "qkv T33 C40 F88 R10+10+10 dropout 0.05 and backward" in names
    assert all(case["agrees"] for case in report["cases"])


def test_bench_s_table_and_report(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the clock, which needs a GPU, and on small shapes: a copy and ours take 1 ms, peft's 2, the frozen linear half of one."""
    results: list[list[Any]] = []

    def turns(candidates: Sequence[Callable[[], Any]], _: Tensor) -> list[float]:
        results.append([candidate() for candidate in candidates])
        return [1.0, 2.0, 0.5][: len(candidates)]

    monkeypatch.setattr(bench, "turns", turns)
    monkeypatch.setattr(bench, "KERNELS", {"lora": lambda device, dtype, _: bench.lora_tasks(device, dtype, False)})
    monkeypatch.setattr(bench, "COPY_BYTES", 4000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    report = bench.on_gpu("lora", CPU)
    assert {frozenset(case["ms"].items()) for case in report["cases"]} == {frozenset({("kernel", 1.0), ("peft", 2.0), ("frozen", 0.5)})}
    assert all(case["agrees"] for case in report["cases"])
    case = next(case for case in report["cases"] if case["name"] == "qkv T33 C40 F88 R10+10+10 and backward")
    products = 33 * (40 * 88 * 2 + (30 * 40 + 10 * 88) * 3)  # y, dx; S, its product with B, and the gradients of both
    assert case["tflop_s"] == pytest.approx(2 * products / 1e9)
    assert case["bytes"] == 2 * (2 * (33 * 40 + 88 * 40 + 33 * 88) + 33 * 40)
    _, heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["kernel", "peft", "frozen", "GB/s", "%", "of", "copy", "×", "peft", "×", "frozen", "TFLOP/s"]
    assert all(line[bench.WIDTH :].split()[:3] == ["1.000", "2.000", "0.500"] for line in lines)
    assert all(line.split()[-3:-1] == ["2.00", "0.50"] for line in lines)
    # peft's operations are the reference's, but for the order of sums: the results without dropout are those of ours.
    for (ours, theirs, _), case in zip(results[1:], report["cases"], strict=True):
        if "dropout" not in case["name"] and "backward" not in case["name"]:
            y = torch.cat(theirs, 1)
            assert float((y - ours[0]).abs().max()) <= bench.TOLERANCE * float(y.abs().max())


if __name__ == "__main__":
    print(json.dumps({name_of(*args): check(*args) for args in CHECKS}))
