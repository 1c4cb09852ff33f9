"""Weights in 4 bits, byte for byte as bitsandbytes makes them and bit for bit as it reads them; any shard's numbers are the whole's.

The kernels are interpreted in a child process, as test_kernel_packing.py says; this file run as a program is that child.
"""

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import Results, bench_module, compiled_for_hopper, fenced, name_of, run_interpreted
from torch import Tensor

from megamod_kernels import nf4, nf4_cpu
from megamod_kernels.cases import NF4, Nf4Case
from megamod_kernels.nf4 import Absmax, Lines, QuantType, Shard, block_absmax, compress, dequantize, quantize, whole_blocks

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TYPES: tuple[QuantType, ...] = ("nf4", "fp4")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """All is small here; what threads do has a test of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bnb() -> Iterator[ModuleType]:
    """bitsandbytes.functional, which neither warns nor compiles."""
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    import bitsandbytes.functional

    with torch.compiler.set_stance("force_eager"):
        yield bitsandbytes.functional


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(shape: tuple[int, ...]) -> Lines:
    return Lines.of((1, torch.Size(shape).numel()), (0, 0), (1, torch.Size(shape).numel()))


def statistics(x: Tensor, blocksize: int, nested: bool) -> tuple[Tensor, Absmax]:
    """A whole tensor's absmax, as found and as kept."""
    lines = whole(x.shape)
    absmax = whole_blocks(block_absmax(x, lines, blocksize), lines, blocksize)
    return absmax, compress(absmax) if nested else Absmax(absmax)


def shard(x: Tensor, absmax: Tensor, kept: Absmax, lines: Lines, blocksize: int, quant_type: QuantType) -> Shard:
    data = quantize(x, absmax, lines, blocksize, quant_type)
    return Shard(data, kept.of(lines, blocksize), kept.nested, kept.offset, lines, blocksize, quant_type)


def part(x: Tensor, offset: tuple[int, int], size: tuple[int, int]) -> Tensor:
    return x[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but that all NaN are the same."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


# ---- against bitsandbytes


def test_tables_are_those_of_bitsandbytes(bnb: ModuleType) -> None:
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())
    for quant_type in TYPES:
        assert torch.equal(torch.tensor(nf4.CODES[quant_type]), bnb.get_4bit_type(quant_type, device="cpu"))


def compare(bnb: ModuleType, x: Tensor, blocksize: int, quant_type: QuantType, nested: bool) -> None:
    codes, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    absmax, kept = statistics(x, blocksize, nested)
    made = shard(x, absmax, kept, whole(x.shape), blocksize, quant_type)
    assert torch.equal(made.data, codes.flatten())
    assert torch.equal(kept.values, state.absmax)
    if nested:
        assert kept.nested is not None and kept.offset is not None
        assert torch.equal(kept.nested, state.state2.absmax)
        assert torch.equal(kept.offset, state.offset)
    if x.shape[1] % blocksize:  # with AVX-512 bitsandbytes takes a wrong absmax where lines begin inside blocks
        state.shape = torch.Size((x.numel(),))
    assert torch.equal(dequantize(made, torch.empty_like(x)), bnb.dequantize_4bit(codes, state).view(x.shape))


@pytest.mark.parametrize("blocksize", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", TYPES)
def test_codes_and_numbers_are_those_of_bitsandbytes(bnb: ModuleType, quant_type: QuantType, blocksize: int) -> None:
    """Whole and cut last blocks, an odd number of numbers, rows of zeros; all dtypes, absmax in 32 and in 8 bits."""
    for shape, dtype, nested in itertools.product([(96, 256), (37, 102), (5, 3), (700, 256)], DTYPES, (False, True)):
        x = random(*shape, dtype=dtype)
        x[:2] = 0
        if not (quant_type == "fp4" and shape == (700, 256)):
            compare(bnb, x, blocksize, quant_type, nested)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_places_near_midpoints(bnb: ModuleType, quant_type: QuantType, dtype: torch.dtype) -> None:
    """Numbers on both sides of every midpoint, with many absmax, where a table of 65,536 places cannot tell."""
    limits, _ = nf4.bounds(quant_type)
    near = limits[:, None] + torch.tensor([-3e-5, -6e-8, -3e-8, 0, 3e-8, 6e-8, 3e-5])
    most = torch.logspace(-8, 4, 301)[:, None]
    blocks = torch.cat((most, near.flatten() * most, torch.zeros(len(most), 128 - 1 - near.numel())), 1)
    compare(bnb, blocks.to(dtype), 128, quant_type, nested=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_small_large_or_none(bnb: ModuleType, dtype: torch.dtype) -> None:
    """Blocks at both ends of the range, with infinities and NaN."""
    x = random(64, 64, dtype=torch.float64)
    x = (x * torch.logspace(-46, 39, 64, dtype=torch.float64)[:, None]).to(dtype)
    for value in (0.0, torch.inf, -torch.inf, torch.nan):
        x = torch.cat((x, torch.full((3, 64), 1.0, dtype=dtype)))
        x[-2, 5] = value
    for quant_type, rows in itertools.product(TYPES, (len(x), 1)):
        codes, state = bnb.quantize_4bit(x[-rows:], blocksize=64, quant_type=quant_type)
        absmax, kept = statistics(x[-rows:], 64, nested=False)
        made = shard(x[-rows:], absmax, kept, whole((rows, 64)), 64, quant_type)
        assert same(absmax, state.absmax)
        assert torch.equal(made.data, codes.flatten())
        state.dtype = torch.float32
        assert same(dequantize(made, torch.empty(rows, 64)), bnb.dequantize_4bit(codes, state))


# ---- kernels against references: run in the child, and on a GPU


def faults(case: Nf4Case, dtype: torch.dtype, quant_type: QuantType, device: torch.device = CPU) -> list[str]:
    """All three, bit for bit."""
    wrong: list[str] = []
    lines, blocksize = Lines.of(case.shape, case.offset, case.size), case.blocksize
    x = random(*case.shape, dtype=dtype)
    x[0] = 0
    if dtype != torch.bfloat16 or device != CPU:  # of these triton's interpreter makes other numbers
        x[-1] *= torch.tensor(1e-39).to(dtype)  # a block's absmax may be nothing, or next to it
        x[1, -3:] = torch.tensor([torch.nan, torch.inf, 1])
    x = x.to(device)
    mine = part(x, case.offset, case.size)
    absmax = nf4.block_absmax_ref(x, whole(case.shape), blocksize)
    kept = compress(absmax.nan_to_num(1, 1)) if case.double else Absmax(absmax.cpu())
    data = nf4.quantize_ref(mine, absmax, lines, blocksize, quant_type)
    good = Shard(data, kept.of(lines, blocksize), kept.nested, kept.offset, lines, blocksize, quant_type).to(device)
    if not same(block_absmax(mine, lines, blocksize), nf4.block_absmax_ref(mine, lines, blocksize)):
        wrong.append("block_absmax")
    with fenced(wrong):
        found = {
            name: quantize(numbers, absmax, lines, blocksize, quant_type) for name, numbers in (("view", mine), ("copy", mine.clone()))
        }
        read = {out: dequantize(good, x.new_empty(*case.size, dtype=out)) for out in (*DTYPES, torch.float64)}
    wrong += [f"{name}: {int((codes != data).sum())} of {len(data)} bytes" for name, codes in found.items() if not torch.equal(codes, data)]
    for out, values in read.items():
        exact = nf4.dequantize_ref(good, torch.empty(case.size, device=device))
        if out == torch.bfloat16 and device == CPU:  # triton's interpreter cuts fp32's last 16 bits off where a GPU, and torch, round
            exact = (exact.view(torch.int32) & -65536).view(torch.float32)
        if not same(values, exact.to(out)):
            wrong.append(f"{out}: {int((values != exact.to(out)).sum())} of {values.numel()} numbers")
    return wrong


SMALL = [case for case in NF4 if not case.bench]
CHECKS = [(case, DTYPES[i % 3], TYPES[i // 2 % 2]) for i, case in enumerate(SMALL)]
CHECKS += [
    (SMALL[2], dtype, quant_type) for dtype, quant_type in itertools.product(DTYPES, TYPES) if (SMALL[2], dtype, quant_type) not in CHECKS
]


@pytest.fixture(scope="module")
def interpreted() -> Results:
    """What the child found, by check."""
    return run_interpreted(__file__, [name_of(*args) for args in CHECKS])


@pytest.mark.parametrize("args", CHECKS, ids=lambda args: name_of(*args))
def test_interpreted_kernel_equals_its_reference(interpreted: Results, args: tuple[Nf4Case, torch.dtype, QuantType]) -> None:
    assert interpreted[name_of(*args)] == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    "args", [*itertools.product(SMALL, DTYPES, TYPES), (NF4[11], torch.bfloat16, "nf4")], ids=lambda args: name_of(*args)
)
def test_compiled_kernel_equals_its_reference(args: tuple[Nf4Case, torch.dtype, QuantType]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    assert nf4.fused(torch.empty(0, device=device)), "triton cannot be imported"
    assert faults(*args, device=device) == []


compiled = partial(compiled_for_hopper, fuse=False, num_warps=4)
POINTERS = {"data": "*u8", "nested": "*fp32", "dynamic": "*fp32", "offset": "*fp32", "code": "*fp32", "limits": "*fp32", "order": "*i32"}
ONES = dict.fromkeys(("n", "width", "start", "stride", "M", "row", "tiles", "whole"), 1)  # triton compiles ones in
needs_compiler = pytest.mark.skipif(nf4.triton is None or nf4.INTERPRETED, reason="nothing to compile with")


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "unit", "double", "ones"),
    [("bf16", 16, True, False), ("fp16", 16, False, False), ("fp32", 16, True, False), ("bf16", 1, True, False), ("fp32", 1, False, True)],
)
def test_kernels_compile_for_a_gpu(
    unit: int, double: bool, ones: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 16 bytes where they can, without a fused multiply-add, dividing as IEEE 754 has it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled now, not once
    sizes = {"SIZE": 2 if unit == 16 else 64, "UNIT": unit, "UNITS": 128 if unit == 16 else 1024}
    types = {**POINTERS, "absmax": "*u8" if double else "*fp32", "out": f"*{dtype}"}
    none = {} if double else {"nested": None, "offset": None}
    counts = ONES if ones else {}
    read = compiled(nf4._dequantize_kernel, types, {**sizes, "DOUBLE": double, **none, **counts}).asm["ptx"]
    types = {**POINTERS, "x": f"*{dtype}", "absmax": "*fp32", "out": "*u8"}
    made = compiled(nf4._quantize_kernel, types, {**sizes, "PARTIAL": unit == 1, **counts}).asm["ptx"]
    most = compiled(nf4._absmax_kernel, {"x": f"*{dtype}", "found": "*i32"}, {"SIZE": 64, "BLOCKS": 64, **counts}).asm["ptx"]
    if ones:
        return
    if unit == 16:
        assert "ld.global.v4.b32" in read and "st.global.v4.b32" in read
        assert "ld.global.v4.b32" in made
    assert "ld.global.v4.b32" in most
    assert "fma.rn.f32" not in read and "fma.rn.f32" not in made
    assert "div.rn.f32" in made or "rcp.rn.f32" in made


# ---- shards

SIZES = st.sampled_from(nf4.BLOCK_SIZES[:4])
SEEDS = st.integers(0, 2**31)


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """A matrix's shape, an offset and a size; widths by turns odd, and of whole blocks."""
    unit = draw(st.sampled_from([1, 2, 32, 64]))
    rows, columns = draw(st.integers(1, 9)), unit * draw(st.integers(1, 400 // unit))
    row, column = draw(st.integers(0, rows)), unit * draw(st.integers(0, columns // unit))
    return (rows, columns), (row, column), (draw(st.integers(0, rows - row)), unit * draw(st.integers(0, (columns - column) // unit)))


@settings(deadline=None, max_examples=150)
@given(rectangles(), SIZES, st.sampled_from(DTYPES), st.sampled_from(TYPES), st.booleans(), SEEDS, st.sampled_from([32, 256, 1 << 18]))
def test_a_shard_has_the_numbers_of_the_whole(
    rectangle: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    blocksize: int, dtype: torch.dtype, quant_type: QuantType, nested: bool, seed: int, piece: int,
) -> None:  # fmt: skip
    """Any rectangle of any matrix, whatever pieces it is worked on in; and the references agree."""
    shape, offset, size = rectangle
    x = random(*shape, dtype=dtype, seed=seed)
    absmax, kept = statistics(x, blocksize, nested)
    all_of_it = shard(x, absmax, kept, whole(shape), blocksize, quant_type)
    lines, mine = Lines.of(shape, offset, size), part(x, offset, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "PIECE", max(piece, blocksize))
        some = shard(mine, absmax, kept, lines, blocksize, quant_type)
        assert torch.equal(block_absmax(mine, lines, blocksize), nf4.block_absmax_ref(mine, lines, blocksize))
        for out in (dtype, torch.float64):
            expected = part(nf4.dequantize_ref(all_of_it, torch.empty(shape, dtype=out)), offset, size)
            assert torch.equal(dequantize(some, torch.empty(size, dtype=out)), expected)
            assert torch.equal(nf4.dequantize_ref(some, torch.empty(size, dtype=out)), expected)
    assert torch.equal(some.data, nf4.quantize_ref(mine, absmax, lines, blocksize, quant_type))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 300), st.data(), SIZES, SEEDS)
def test_the_maxima_of_all_shards_are_the_tensors(rows: int, columns: int, data: st.DataObject, blocksize: int, seed: int) -> None:
    x = random(rows, columns, seed=seed)
    downs, acrosses = ([0, *sorted(data.draw(st.sets(st.integers(0, n)))), n] for n in (rows, columns))
    found = torch.zeros(-(-x.numel() // blocksize))
    for (top, bottom), (left, right) in itertools.product(itertools.pairwise(downs), itertools.pairwise(acrosses)):
        offset, size = (top, left), (bottom - top, right - left)
        found = found.maximum(block_absmax(part(x, offset, size), Lines.of((rows, columns), offset, size), blocksize))
    assert torch.equal(found, torch.nn.functional.pad(x.flatten().abs(), (0, -x.numel() % blocksize)).view(-1, blocksize).amax(1))


@pytest.mark.parametrize("tp", [4, 8])
def test_down_proj_of_72b_is_cut_inside_blocks(bnb: ModuleType, tp: int) -> None:
    """[8192, 29568] by columns: 3,696 numbers of a rank's line are 57 blocks of 64 and three quarters of one."""
    shape, width = (8192, 29568), 29568 // tp
    assert width % 64 == {4: 32, 8: 48}[tp]
    rows = 40
    x = random(rows, shape[1], dtype=torch.bfloat16)
    codes, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    expected = bnb.dequantize_4bit(codes, state)
    found = torch.zeros(x.numel() // 64)
    cuts = [((0, rank * width), (rows, width)) for rank in range(tp)]
    for offset, size in cuts:
        found = found.maximum(block_absmax(part(x, offset, size), Lines.of((rows, shape[1]), offset, size), 64))
    kept = compress(found)
    assert torch.equal(kept.values, state.absmax)
    for offset, size in cuts:
        lines = Lines.of((rows, shape[1]), offset, size)
        some = shard(part(x, offset, size), found, kept, lines, 64, "nf4")
        assert torch.equal(dequantize(some, torch.empty(size, dtype=torch.bfloat16)), part(expected, offset, size))
    for rank in range(tp):  # all lines, by their arithmetic alone
        lines = Lines.of(shape, (0, rank * width), (8192, width))
        assert (lines.count, lines.width, lines.stride, lines.total) == (8192, width, 29568, 8192 * 29568)
        first, last = lines.blocks(64), (lines.start + torch.arange(8192) * 29568 + width - 1) // 64
        assert int((last - first).max()) + 1 == lines.touched(64) == -(-(rank * width % 64 + width) // 64)


# ---- the path of the CPU


@pytest.mark.parametrize("odd", [False, True])
def test_threads_do_not_change_the_result(odd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "PIECE", 4096)
    x = random(64, 1000 + odd, dtype=torch.bfloat16)
    lines, results = Lines.of((64, 1024 + odd), (0, 24), (64, 1000)), []
    mine = x[:, :1000]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        absmax = block_absmax(mine, lines, 64).clamp(min=1e-3)
        kept = compress(absmax)
        made = shard(mine, absmax, kept, lines, 64, "nf4")
        results.append((absmax, *vars(kept).values(), made.data, dequantize(made, torch.empty_like(mine))))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits(dtype: torch.dtype, quant_type: QuantType) -> None:
    """Zeros, subnormal numbers, infinities and NaN among them, once by themselves and once beside much larger ones."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    for beside in (x, x.flip(0), x[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(1))]):
        mixed = torch.stack((x, beside), 1)
        lines = whole(mixed.shape)
        absmax = block_absmax(mixed, lines, 32)
        torch.testing.assert_close(absmax, nf4.block_absmax_ref(mixed, lines, 32), rtol=0, atol=0, equal_nan=True)
        codes = quantize(mixed, absmax, lines, 32, quant_type)
        assert torch.equal(codes, nf4.quantize_ref(mixed, absmax, lines, 32, quant_type))
        made = Shard(codes, Absmax(absmax).of(lines, 32), None, None, lines, 32, quant_type)
        for out in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            found, expected = (read(made, torch.empty(lines.numel, dtype=out)) for read in (dequantize, nf4.dequantize_ref))
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_loops_are_compiled_where_no_cache_can_be_written() -> None:
    names: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x\n", names)  # of no file: Numba has no place for its cache, and says so by a RuntimeError
    assert nf4_cpu.compiled(names["twice"])(21) == 42


def test_lines_that_lie_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "PIECE", 32)
    lines = Lines(5, 100, 3, 20, 300)
    x = random(500)
    absmax = block_absmax(x, lines, 32)
    assert torch.equal(absmax, nf4.block_absmax_ref(x, lines, 32))
    assert torch.equal(quantize(x, absmax, lines, 32, "nf4"), nf4.quantize_ref(x, absmax, lines, 32, "nf4"))


def test_callers_modes_do_not_matter() -> None:
    """Leaves that ask for gradients, inference mode, memory that is not contiguous, another default dtype."""
    x = random(128, 64).requires_grad_()
    absmax, kept = statistics(x, 64, nested=True)
    made = shard(x, absmax, kept, whole(x.shape), 64, "nf4")
    assert torch.equal(shard(x.mT.contiguous().mT, absmax, kept, whole(x.shape), 64, "nf4").data, made.data)
    with torch.inference_mode():
        again = shard(x.clone(), absmax, kept, whole(x.shape), 64, "nf4")
        found = dequantize(again, torch.empty(x.shape))
    assert torch.equal(made.data, again.data)
    torch.set_default_dtype(torch.float64)
    try:
        for table in (nf4.dynamic_map, nf4._nearest_dynamic, nf4.bounds):
            table.cache_clear()
        absmax, kept = statistics(x, 64, nested=True)
        again = shard(x, absmax, kept, whole(x.shape), 64, "nf4")
        assert again.nested is not None and made.nested is not None
        assert torch.equal(made.data, again.data) and torch.equal(made.absmax, again.absmax) and torch.equal(made.nested, again.nested)
        assert torch.equal(found, dequantize(again, torch.empty(x.shape, dtype=torch.float32)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, dequantize(made, torch.empty(x.shape)))


def test_what_does_not_fit_is_refused() -> None:
    x, lines = random(4, 64), Lines.of((4, 64), (0, 0), (4, 64))
    absmax, kept = statistics(x, 64, nested=True)
    good = shard(x, absmax, kept, lines, 64, "nf4")
    out = torch.empty(4, 64)
    for blocksize in (0, 16, 48, 8192):
        with pytest.raises(ValueError, match=f"blocks of {blocksize}: one of 32, 64"):
            block_absmax(x, lines, blocksize)
    with pytest.raises(ValueError, match="quant_type 'int4'"):
        quantize(x, absmax, lines, 64, "int4")  # type: ignore[arg-type]
    for wrong in (x[1:], x.double(), x.int()):
        with pytest.raises(ValueError, match="256 numbers in bfloat16, float16 or float32 were expected"):
            block_absmax(wrong, lines, 64)
        with pytest.raises(ValueError, match="256 numbers"):
            quantize(wrong, absmax, lines, 64, "nf4")
    for wrong in (absmax[1:], absmax.double(), absmax[None]):
        with pytest.raises(ValueError, match=r"float32 \[4\] on cpu was expected"):
            quantize(x, wrong, lines, 64, "nf4")
    with pytest.raises(ValueError, match="not all in the tensor"):
        block_absmax(x, replace(lines, start=1), 64)
    for change in ({"data": good.data[1:]}, {"data": good.data.int()}, {"absmax": absmax}, {"absmax": kept.of(lines, 64).float()}):
        with pytest.raises(ValueError, match="was expected"):
            dequantize(replace(good, **change), out)  # type: ignore[arg-type]
    for wrong in (out[1:], out.int(), torch.empty(64, 4).mT):
        with pytest.raises(ValueError, match="256 numbers, contiguous, floating, on cpu were expected"):
            dequantize(good, wrong)


# ---- the benchmark


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench.py as a module, with small cases for its clock too."""
    module = bench_module(monkeypatch)
    monkeypatch.setattr(
        module.cases, "NF4", [*SMALL, *(replace(SMALL[2], label=name, bench=True) for name in ("o_proj tp1", "down_proj tp8"))]
    )
    return module


@pytest.mark.parametrize("wrong", [False, True])
def test_bench_times_the_path_of_the_cpu(
    bench: Any, bnb: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: bool
) -> None:
    if wrong:
        monkeypatch.setattr(bench.nf4, "quantize", lambda *args: nf4.quantize_ref(*args) ^ 1)
    assert bench.main(["nf4", "--device", "cpu"]) == wrong
    *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert [case["name"].split()[:3] for case in report["cases"]] == [
        [what, *name.split()] for name in ("o_proj tp1", "down_proj tp8") for what in ("quantize", "dequantize")
    ]
    assert all(case["threads"] == 1 and set(case["ms"]) == {"here", "bitsandbytes"} for case in report["cases"])
    assert all(case["agrees"] != wrong for case in report["cases"])
    assert (len([line for line in lines if line.endswith(": WRONG")]) > 0) == wrong


def test_bench_s_table_and_report(bench: Any, bnb: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the clock, which needs a GPU: ours takes 1 ms, bitsandbytes 2."""

    def turns(candidates: Any, _: Tensor) -> list[float]:
        for candidate in candidates:
            candidate()
        return [1.0, 2.0][: len(candidates)]

    monkeypatch.setattr(bench, "turns", turns)
    monkeypatch.setattr(bench, "COPY_BYTES", 4000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    report = bench.on_gpu("nf4", CPU)
    assert all(case["agrees"] and case["ms"] == {"kernel": 1.0, "bitsandbytes": 2.0} for case in report["cases"])
    assert report["cases"][1]["bytes"] == 5 * 128 * 2 + 5 * 64 + 5 * 2  # numbers, codes, absmax in 8 bits
    heading = capsys.readouterr().out.splitlines()[1]
    assert heading.split() == ["kernel", "bitsandbytes", "GB/s", "%", "of", "copy", "×", "bitsandbytes", "TFLOP/s"]


if __name__ == "__main__":
    print(json.dumps({name_of(*args): faults(*args) for args in CHECKS}))
