"""Weights in 4 bits, NF4 and FP4, exactly as bitsandbytes 0.50.2 makes and reads them (Dettmers et al. 2023, arXiv:2305.14314).

A tensor's numbers, in their flat order, are cut into blocks of B. With a_b = max |w_i| over block b and the 16 numbers `code`:

    q_i = argmin_c |w_i · (1 / a_b) - code_c|        4 bits; w_i / a_b in a last block that is not full
    ŵ_i = code[q_i] · a_b                            in fp32, rounded once to the output's dtype

With double quantisation (the paper's section 3) the a_b are 8 bits each: m their mean, in blocks of 256 of them,

    c_b = argmin_c |⟨(a_b - m) / A_⌊b/256⌋⟩ - dynamic_c|,    â_b = dynamic[c_b] · A_⌊b/256⌋ + m        A = max |a_b - m|

where ⟨⟩ rounds to one of 65,536 even places in [-1, 1], as bitsandbytes does on a CPU.

A shard is a rectangle of a matrix: some lines of its flat numbers (`Lines`). Its numbers stay in the blocks of the whole tensor, wherever
a cut falls, so that ŵ is the same whoever holds it. Two codes share a byte, the first in its high half, in the shard's own order.

Shapes: N numbers in the tensor, n = lines × width in a shard, B numbers a block, M blocks that a line of the shard can touch.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on; the references do without
    triton = None

T = TypeVar("T")
QuantType = Literal["nf4", "fp4"]
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # absmax values that share one of their own
PLACES = 1 << 16  # to which bitsandbytes rounds a number before it looks up the nearest dynamic one
SMALLEST = 1e-38  # a block of zeros is divided by it
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that can be quantised
PIECE = 1 << 19  # numbers that a thread takes at a time: even, and of absmax values whole groups of NESTED

# fmt: off
CODES: dict[QuantType, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}
# fmt: on


@dataclass(frozen=True)
class Lines:
    """Which numbers of a flat tensor a shard holds: line k has `width` of them, from start + k · stride.

    A rectangle as wide as its matrix is one line.
    """

    count: int
    width: int
    start: int
    stride: int
    total: int  # N, of the whole tensor

    @classmethod
    def of(cls, shape: tuple[int, int], offset: tuple[int, int], size: tuple[int, int]) -> "Lines":
        """The rectangle of `size` at `offset` of a matrix of `shape`."""
        (rows, columns), (row, column), (height, width) = shape, offset, size
        if width == columns:
            return cls(1, height * columns, row * columns, 0, rows * columns)
        return cls(height, width, row * columns + column, columns, rows * columns)

    @property
    def numel(self) -> int:
        return self.count * self.width

    def places(self, device: torch.device | None = None) -> Tensor:
        """`[lines, width]` int64: where in the flat tensor each number lies."""
        first = self.start + torch.arange(self.count, device=device)[:, None] * self.stride
        return first + torch.arange(self.width, device=device)

    def blocks(self, size: int) -> Tensor:
        """`[lines]` int64, on the CPU: the block of `size` in which each line begins."""
        return (self.start + torch.arange(self.count) * self.stride) // size

    def touched(self, size: int) -> int:
        """M: the most blocks of `size` that a line can touch; its phase may be any that the stride leads to."""
        phases = {self.start % size} if self.stride % size == 0 else None
        worst = max(phases) if phases is not None else size - 1
        return -(-(worst + self.width) // size) if self.width else 0


@dataclass(frozen=True)
class Shard:
    """A shard's numbers in 4 bits."""

    data: Tensor  # [⌈n/2⌉] uint8
    absmax: Tensor  # [lines, M] of the blocks that each line touches, from the one in which it begins: fp32, or uint8 where nested
    nested: Tensor | None  # [⌈blocks of the whole tensor / 256⌉] fp32: A
    offset: Tensor | None  # scalar fp32: m
    lines: Lines
    blocksize: int
    quant_type: QuantType

    def to(self, device: torch.device) -> "Shard":
        nested, offset = (None if x is None else x.to(device) for x in (self.nested, self.offset))
        return replace(self, data=self.data.to(device), absmax=self.absmax.to(device), nested=nested, offset=offset)


@dataclass(frozen=True)
class Absmax:
    """The statistics of a whole tensor's blocks."""

    values: Tensor  # [⌈N/B⌉] fp32; uint8 codes where nested
    nested: Tensor | None = None  # [⌈N/B/256⌉] fp32
    offset: Tensor | None = None  # scalar fp32

    def of(self, lines: Lines, blocksize: int) -> Tensor:
        """`[lines, M]`: those of a shard, as it keeps them; zeros past the end of a line and of the tensor."""
        device, touched = self.values.device, lines.touched(blocksize)
        block = lines.blocks(blocksize).to(device, torch.int32)[:, None] + torch.arange(touched, dtype=torch.int32, device=device)
        return torch.nn.functional.pad(self.values, (0, touched)).index_select(0, block.flatten()).view(block.shape)


# ---- references: the only definition of correct


@cache
def dynamic_map() -> Tensor:
    """`[256]` fp32, sorted: dynamic 8-bit numbers (Dettmers et al. 2022, arXiv:2110.02861, 1.3): a sign, an exponent of ten, the rest a
    fraction: 2^i of them at exponent i - 6, in the middles of equal parts of [0.1, 1]; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (ends[:-1] + ends[1:]) / 2 * 10 ** (i - 6)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def bounds(quant_type: QuantType) -> tuple[Tensor, Tensor]:
    """`[15]` fp32 midpoints between the codes in their order, and `[16]` which code each place in that order is."""
    code = torch.tensor(CODES[quant_type], dtype=torch.float32)
    order = torch.argsort(code)
    return (code[order[:-1]] + code[order[1:]]) / 2, order


def block_absmax_ref(x: Tensor, lines: Lines, blocksize: int) -> Tensor:
    """`[⌈N/B⌉]` fp32: of each block of the whole tensor the largest |number| that this shard has of it; 0 where it has none.

    The maximum over all shards is the tensor's.
    """
    block = lines.places(x.device).flatten() // blocksize
    found = torch.zeros(-(-lines.total // blocksize), dtype=torch.float32, device=x.device)
    return found.scatter_reduce_(0, block, x.flatten().float().abs(), "amax")


def quantize_ref(x: Tensor, absmax: Tensor, lines: Lines, blocksize: int, quant_type: QuantType) -> Tensor:
    """`[⌈n/2⌉]` uint8: the codes of a shard's numbers x, given the tensor's absmax `[⌈N/B⌉]`."""
    block = lines.places(x.device).flatten() // blocksize
    flat = x.flatten().float()
    least = absmax.clamp(min=SMALLEST)
    scaled = flat * (1.0 / least)[block]
    if lines.total % blocksize:
        scaled = torch.where(block == lines.total // blocksize, flat / least[-1], scaled)
    return _packed(scaled, quant_type)


def _packed(scaled: Tensor, quant_type: QuantType) -> Tensor:
    """`[⌈n/2⌉]` uint8: the codes that are nearest to x / a, of NaN the last; two a byte, the last byte filled up with a zero's."""
    limits, order = (t.to(scaled.device) for t in bounds(quant_type))
    scaled = torch.nn.functional.pad(scaled.clamp(-1, 1), (0, len(scaled) % 2))
    codes = order[torch.bucketize(scaled, limits)].to(torch.uint8)
    return codes[::2] << 4 | codes[1::2]


@cache
def _nearest_dynamic() -> Tensor:
    """`[65536]` uint8: the dynamic code that is nearest to each of as many even places in [-1, 1]."""
    code = dynamic_map()
    places = -1 + 2 * torch.arange(PLACES, dtype=torch.float32) / (PLACES - 1)
    return torch.bucketize(places, (code[1:] + code[:-1]) * 0.5).to(torch.uint8)


def absmax_ref(shard: Shard) -> Tensor:
    """`[lines, M]` fp32: the shard's â."""
    if shard.nested is None or shard.offset is None:
        return shard.absmax
    first = shard.lines.blocks(shard.blocksize).to(shard.absmax.device)
    block = first[:, None] + torch.arange(shard.absmax.shape[1], device=first.device)
    inside = (block // NESTED).clamp(max=len(shard.nested) - 1)
    return dynamic_map().to(first.device)[shard.absmax.long()] * shard.nested[inside] + shard.offset


def dequantize_ref(shard: Shard, out: Tensor) -> Tensor:
    """ŵ `[lines, width]` into `out`, of as many numbers, contiguous; each is rounded once from fp32."""
    lines = shard.lines
    code = torch.tensor(CODES[shard.quant_type], dtype=torch.float32, device=out.device)
    halves = torch.stack((shard.data >> 4, shard.data & 15), 1).flatten()[: lines.numel].view(lines.count, lines.width)
    first = lines.blocks(shard.blocksize).to(out.device)[:, None]
    block = lines.places(out.device) // shard.blocksize - first
    values = code[halves.long()] * absmax_ref(shard).gather(1, block)
    return out.copy_(values.view(out.shape))


# ---- kernels

if triton is not None:

    @triton.jit
    def _block_of(number, width, start, stride, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        """Of a number of the shard, in its flat order: its line and column, its block, and the block in which the line begins."""
        line = number // width
        column = number - line * width
        begin = start + line * stride
        return line, column, (begin + column) // SIZE, begin // SIZE

    @triton.jit
    def _scale(number, inside, absmax, nested, dynamic, offset, width, start, stride, M, SIZE: tl.constexpr, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
        """â of the blocks that numbers are in."""
        line, _, block, first = _block_of(number, width, start, stride, SIZE)
        a = tl.load(absmax + line.to(tl.int64) * M + (block - first), mask=inside, other=0)
        if DOUBLE:
            a = tl.load(dynamic + a.to(tl.int32)) * tl.load(nested + block // 256, mask=inside, other=0.0) + offset
        return a

    @triton.jit
    def _dequantize_kernel(  # type: ignore[no-untyped-def]
        data, absmax, nested, dynamic, offset, code, out, n, width, start, stride, M,
        SIZE: tl.constexpr, DOUBLE: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
    ):  # fmt: skip
        """A program: UNITS times UNIT bytes of codes. n, width, start, stride and SIZE count units where one has 16 bytes, else numbers.

        A unit of 16 bytes, a thread's load, lies in one block of one line.
        """
        unit = tl.program_id(0).to(tl.int32 if UNIT == 16 else tl.int64) * UNITS + tl.arange(0, UNITS)  # 2^31 units are enough, bytes not
        m = tl.load(offset) if DOUBLE else 0.0
        if UNIT == 16:
            inside = unit < n
            a = _scale(unit, inside, absmax, nested, dynamic, m, width, start, stride, M, SIZE, DOUBLE)[:, None]
            b, there = a, inside[:, None]
        else:
            number = 2 * unit
            a = _scale(number, number < n, absmax, nested, dynamic, m, width, start, stride, M, SIZE, DOUBLE)[:, None]
            b = _scale(number + 1, number + 1 < n, absmax, nested, dynamic, m, width, start, stride, M, SIZE, DOUBLE)[:, None]
            there = (number < n)[:, None]
        at = unit.to(tl.int64)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]  # [UNITS, UNIT]
        byte = tl.load(data + at, mask=there, other=0).to(tl.int32)
        # 16 numbers are half a line of the L1 cache, and no two of a warp's loads wait for each other there.
        values = tl.interleave(tl.load(code + (byte >> 4)) * a, tl.load(code + (byte & 15)) * b)  # [UNITS, 2 UNIT]
        place = unit.to(tl.int64)[:, None] * (2 * UNIT) + tl.arange(0, 2 * UNIT)[None, :]
        inside = there if UNIT == 16 else place < n
        tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _code_of(x, a, divided, limits, order, PARTIAL: tl.constexpr):  # type: ignore[no-untyped-def]
        """The code of numbers x in blocks with absmax a; NaN is not below any limit."""
        a = tl.maximum(a, 1e-38, propagate_nan=tl.PropagateNan.ALL)
        scaled = x * tl.div_rn(tl.full(a.shape, 1.0, tl.float32), a)
        if PARTIAL:
            scaled = tl.where(divided, tl.div_rn(x, a), scaled)
        code = tl.full(scaled.shape, 0, tl.int32) + tl.load(order)
        for i in tl.static_range(15):
            code = tl.where(scaled <= tl.load(limits + i), code, tl.load(order + i + 1))
        return code

    @triton.jit
    def _quantize_kernel(  # type: ignore[no-untyped-def]
        x, absmax, limits, order, out, n, width, start, stride, row, whole,
        SIZE: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, PARTIAL: tl.constexpr,
    ):  # fmt: skip
        """A program: UNITS times UNIT bytes of codes; counts as in _dequantize_kernel. x has its lines `row` numbers apart.

        Where PARTIAL, the block that comes after `whole` ones is not full, and its numbers are divided.
        """
        unit = tl.program_id(0).to(tl.int32 if UNIT == 16 else tl.int64) * UNITS + tl.arange(0, UNITS)  # 2^31 units are enough, bytes not
        if UNIT == 16:
            inside = unit < n
            line, column, block, _ = _block_of(unit, width, start, stride, SIZE)
            a = tl.load(absmax + block, mask=inside, other=1.0)[:, None]
            here = line.to(tl.int64)[:, None] * row + column.to(tl.int64)[:, None] * 32 + tl.arange(0, 32)[None, :]
            values = tl.load(x + here, mask=inside[:, None], other=0.0).to(tl.float32)  # [UNITS, 32]
            code = _code_of(values, a, (block == whole)[:, None], limits, order, PARTIAL)
        else:
            number = (2 * unit)[:, None] + tl.arange(0, 2)[None, :]  # [UNITS, 2]
            inside = number < n
            line, column, block, _ = _block_of(number, width, start, stride, SIZE)
            a = tl.load(absmax + block, mask=inside, other=1.0)
            values = tl.load(x + line * row + column, mask=inside, other=0.0).to(tl.float32)
            code = _code_of(values, a, block == whole, limits, order, PARTIAL)
            inside = 2 * unit < n
        high, low = tl.split(code.reshape(UNITS, UNIT, 2))
        at = unit.to(tl.int64)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
        tl.store(out + at, (high << 4 | low).to(tl.uint8), mask=inside[:, None])

    @triton.jit
    def _absmax_kernel(  # type: ignore[no-untyped-def]
        x, found, width, start, stride, row, tiles,
        SIZE: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """A program: BLOCKS blocks of one line, of those that it touches. Numbers without their sign have the order of their bits."""
        line = (tl.program_id(0) // tiles).to(tl.int64)
        begin = start + line * stride
        block = begin // SIZE + (tl.program_id(0) % tiles) * BLOCKS + tl.arange(0, BLOCKS)
        column = (block * SIZE - begin)[:, None] + tl.arange(0, SIZE)[None, :]  # [BLOCKS, SIZE]
        inside = (column >= 0) & (column < width)
        bits = tl.load(x + line * row + column, mask=inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.atomic_max(found + block, tl.max(bits, 1), mask=block * SIZE < begin + width, sem="relaxed")  # the next line may have some of it

    # Under TRITON_INTERPRET=1, read when the kernels are decorated, they run on CPU tensors too.
    INTERPRETED = not isinstance(_absmax_kernel, triton.JITFunction)


def fused(x: Tensor) -> bool:
    """Whether a kernel takes x, and not the CPU's path."""
    return triton is not None and (x.is_cuda or INTERPRETED)


@cache
def _tables(quant_type: QuantType, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp32 codes, midpoints, int32 codes in the order of their numbers, dynamic_map."""
    limits, order = bounds(quant_type)
    return (
        torch.tensor(CODES[quant_type], dtype=torch.float32, device=device),
        limits.to(device),
        order.int().to(device),
        dynamic_map().to(device),
    )


def _units(lines: Lines, *aligned: Tensor) -> tuple[int, int, int, int, int, int]:
    """How a kernel counts: bytes in a unit, the numbers that count as one, and in these n, width, start and stride."""
    counts = lines.numel, lines.width, lines.start, 0 if lines.count == 1 else lines.stride
    if all(count % 32 == 0 for count in counts) and all(t.data_ptr() % 16 == 0 for t in aligned):
        n, width, start, stride = (count // 32 for count in counts)
        return 16, 32, n, width, start, stride
    return 1, 1, *counts


def _grid(unit: int, n: int) -> tuple[tuple[int], int]:
    """Programs, and units that each has: 16 bytes for each of 128 threads, or eight bytes."""
    units = 8 if INTERPRETED else 128 if unit == 16 else 1024
    return (triton.cdiv(n if unit == 16 else triton.cdiv(n, 2), units),), units


def _fused_dequantize(shard: Shard, out: Tensor) -> Tensor:
    unit, numbers, n, width, start, stride = _units(shard.lines, shard.data, out)
    code, _, _, dynamic = _tables(shard.quant_type, out.device)
    grid, units = _grid(unit, n)
    absmax = shard.absmax.contiguous()
    with torch.cuda.device_of(out):
        _dequantize_kernel[grid](
            shard.data, absmax, shard.nested, dynamic, shard.offset, code, out.detach(), n, width, start, stride, absmax.shape[1],
            SIZE=shard.blocksize // numbers, DOUBLE=shard.nested is not None, UNIT=unit, UNITS=units, num_warps=4,
            enable_fp_fusion=False,  # product and sum are rounded each, as the reference rounds them
        )  # fmt: skip
    return out


def _fused_quantize(x: Tensor, absmax: Tensor, lines: Lines, blocksize: int, quant_type: QuantType) -> Tensor:
    rows = _rows(x, lines)
    row = rows.stride(0)
    unit, numbers, n, width, start, stride = _units(lines, rows)
    if row * x.itemsize % 16:
        unit, numbers, n, width, start, stride = 1, 1, lines.numel, lines.width, lines.start, lines.stride
    _, limits, order, _ = _tables(quant_type, x.device)
    grid, units = _grid(unit, n)
    out = x.new_empty(-(-lines.numel // 2), dtype=torch.uint8)
    with torch.cuda.device_of(x):
        _quantize_kernel[grid](
            rows, absmax, limits, order, out, n, width, start, stride, row, lines.total // blocksize,
            SIZE=blocksize // numbers, UNIT=unit, UNITS=units, PARTIAL=lines.total % blocksize != 0, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _fused_block_absmax(x: Tensor, lines: Lines, blocksize: int) -> Tensor:
    rows = _rows(x, lines)
    found = torch.zeros(-(-lines.total // blocksize), dtype=torch.int32, device=x.device)
    blocks = max(1, 4096 // blocksize)
    tiles = triton.cdiv(lines.touched(blocksize), blocks)
    with torch.cuda.device_of(x):
        _absmax_kernel[(lines.count * tiles,)](
            rows, found, lines.width, lines.start, lines.stride, rows.stride(0), tiles, SIZE=blocksize, BLOCKS=blocks, num_warps=4
        )
    return found.view(torch.float32)


def _rows(x: Tensor, lines: Lines) -> Tensor:
    """`[lines, width]`, a line's numbers side by side."""
    rows = x.detach().reshape(lines.count, lines.width)
    return rows if rows.stride(1) == 1 or lines.width == 1 else rows.contiguous()


# ---- on the CPU: the references' results by compiled loops, each piece by whichever thread is free


def _pieces(count: int) -> list[tuple[int, int]]:
    return [(first, min(first + PIECE, count)) for first in range(0, count, PIECE)]


def _share_out(pieces: Sequence[tuple[int, int]], work: Callable[[int, int], T]) -> list[T]:
    """What work makes of each piece, by as many threads as torch has; its own would wait for each other longer than they work."""
    with _one_thread() as threads:
        if min(threads, len(pieces)) <= 1:
            return [work(*piece) for piece in pieces]
        with ThreadPoolExecutor(min(threads, len(pieces))) as pool:
            return list(pool.map(lambda piece: work(*piece), pieces))


@contextmanager
def _one_thread() -> Iterator[int]:
    """For torch's operations of this thread, and of those that it starts meanwhile; how many there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _loops() -> ModuleType:
    """Imported where they run: the first import of Numba takes half a second, and a GPU needs none."""
    from megamod_kernels import nf4_cpu

    return nf4_cpu


def _bits(x: Tensor, lines: Lines) -> tuple[np.ndarray, int, int]:
    """A shard's numbers as bits in a row, which dtype's they are, and how far apart lines begin."""
    rows, loops = _rows(x, lines), _loops()
    pitch = rows.stride(0) if lines.count > 1 else 0
    flat = rows.as_strided(((lines.count - 1) * pitch + lines.width,), (1,))
    kind = {torch.bfloat16: loops.BFLOAT16, torch.float16: loops.FLOAT16, torch.float32: loops.FLOAT32}[x.dtype]
    return flat.view(torch.uint32 if x.itemsize == 4 else torch.uint16).numpy(), kind, pitch


def _block_absmax(x: Tensor, lines: Lines, blocksize: int) -> Tensor:
    bits, kind, pitch = _bits(x, lines)
    found, loop = np.zeros(-(-lines.total // blocksize), np.uint32), _loops().block_absmax

    def work(first: int, last: int) -> np.ndarray:
        edges = np.zeros(2, np.uint32)
        loop(bits, kind, pitch, lines.width, lines.start, lines.stride, blocksize, first, last, found, edges)
        return edges

    # Lines that lie over each other have more than the edges of their pieces in common.
    pieces = _pieces(lines.numel) if lines.count == 1 or lines.width <= lines.stride else [(0, lines.numel)]
    for piece, edges in zip(pieces, _share_out(pieces, work), strict=True):
        for number, most in zip((piece[0], piece[1] - 1), edges, strict=True):
            line, column = divmod(number, lines.width)
            block = (lines.start + line * lines.stride + column) // blocksize
            found[block] = max(found[block], most)
    return torch.from_numpy(found.view(np.float32))


def _quantize(x: Tensor, absmax: Tensor, lines: Lines, blocksize: int, quant_type: QuantType) -> Tensor:
    bits, kind, pitch = _bits(x, lines)
    out, loop = np.empty(-(-lines.numel // 2), np.uint8), _loops().quantize
    cut = (pitch, lines.width, lines.start, lines.stride, lines.total, blocksize)
    most = absmax.detach().numpy()

    def work(first: int, last: int) -> None:
        loop(bits, kind, *cut, most, quant_type == "fp4", first, last, out)

    _share_out(_pieces(lines.numel), work)
    return torch.from_numpy(out)


def _dequantize(shard: Shard, out: Tensor) -> Tensor:
    lines, flat, loop = shard.lines, out.detach().view(-1), _loops().dequantize
    nested, offset = np.empty(0, np.float32), np.float32(0)
    if shard.nested is not None and shard.offset is not None:
        nested, offset = shard.nested.numpy(), np.float32(shard.offset.item())
    data, absmax, fp4 = shard.data.numpy(), shard.absmax.numpy(), shard.quant_type == "fp4"
    cut = (lines.width, lines.start, lines.stride, shard.blocksize)
    nothing = np.empty(0, np.float32), np.empty(0, np.uint16)

    def work(first: int, last: int) -> None:
        part = flat[first:last]
        if out.dtype == torch.bfloat16:
            loop(data, fp4, absmax, nested, offset, *cut, first, last, nothing[0], part.view(torch.uint16).numpy())
            return
        numbers = part if out.dtype == torch.float32 else part.float()
        loop(data, fp4, absmax, nested, offset, *cut, first, last, numbers.numpy(), nothing[1])
        part.copy_(numbers)

    _share_out(_pieces(lines.numel), work)
    return out


# ---- public functions


def block_absmax(x: Tensor, lines: Lines, blocksize: int) -> Tensor:
    """`[⌈N/B⌉]` fp32: of each block of the whole tensor the largest |number| that this shard has of it; 0 where it has none.

    The maximum over all shards is the tensor's.

    Args:
        x: the shard's numbers, in bf16, fp16 or fp32, of any shape.

    Raises:
        ValueError: as quantize and dequantize too, a block size, shape, dtype or device that does not fit.
    """
    _check(lines, blocksize)
    _check_numbers(x, lines)
    if not x.numel():
        return torch.zeros(-(-lines.total // blocksize), dtype=torch.float32, device=x.device)
    if fused(x):
        return _fused_block_absmax(x, lines, blocksize)
    return _block_absmax(x, lines, blocksize)


def whole_blocks(absmax: Tensor, lines: Lines, blocksize: int) -> Tensor:
    """The tensor's absmax as bitsandbytes keeps it, of the maximum over all shards: of a last block that is not full at least SMALLEST."""
    if lines.total % blocksize:
        absmax[-1:].clamp_(min=SMALLEST)
    return absmax


def compress(absmax: Tensor) -> Absmax:
    """Absmax `[⌈N/B⌉]` fp32 of a whole tensor in 8 bits, made on the CPU.

    There a single thread's sum is the same each time, and bitsandbytes' with one thread.
    """
    values = absmax.cpu()
    with _one_thread():
        offset = values.mean()
    codes, nested = np.empty(len(values), np.uint8), np.empty(-(-len(values) // NESTED), np.float32)
    numbers, middle, loop = values.numpy(), np.float32(offset.item()), _loops().compress
    _share_out(_pieces(len(values)), lambda first, last: loop(numbers, middle, first, last, codes, nested))
    return Absmax(torch.from_numpy(codes), torch.from_numpy(nested), offset)


def quantize(x: Tensor, absmax: Tensor, lines: Lines, blocksize: int, quant_type: QuantType) -> Tensor:
    """`[⌈n/2⌉]` uint8: the codes of a shard's numbers.

    Args:
        x: the shard's numbers, in bf16, fp16 or fp32, of any shape.
        absmax: `[⌈N/B⌉]` fp32, the whole tensor's: of block_absmax the maximum over all shards. No number may be larger than its block's.
    """
    _check(lines, blocksize, quant_type)
    _check_numbers(x, lines)
    blocks = -(-lines.total // blocksize)
    if absmax.dtype != torch.float32 or list(absmax.shape) != [blocks] or absmax.device != x.device:
        raise ValueError(f"absmax {_said(absmax)}: float32 [{blocks}] on {x.device} was expected")
    if not x.numel():
        return torch.empty(0, dtype=torch.uint8, device=x.device)
    if fused(x):
        return _fused_quantize(x, absmax.contiguous(), lines, blocksize, quant_type)
    return _quantize(x, absmax.contiguous(), lines, blocksize, quant_type)


def dequantize(shard: Shard, out: Tensor) -> Tensor:
    """ŵ into `out`, which is returned: contiguous, of as many numbers, on the shard's device, of any floating dtype.

    Each number is rounded once, from fp32.
    """
    lines, data = shard.lines, shard.data
    _check(lines, shard.blocksize, shard.quant_type)
    if data.dtype != torch.uint8 or list(data.shape) != [-(-lines.numel // 2)] or not data.is_contiguous():
        raise ValueError(f"data {_said(data)}: uint8 [{-(-lines.numel // 2)}], contiguous, was expected")
    double = shard.nested is not None and shard.offset is not None
    if shard.absmax.dtype != (torch.uint8 if double else torch.float32) or shard.absmax.dim() != 2 or len(shard.absmax) != lines.count:
        raise ValueError(f"absmax {_said(shard.absmax)}: [{lines.count}, M] of {'uint8' if double else 'float32'} was expected")
    if out.numel() != lines.numel or not out.is_contiguous() or not out.is_floating_point() or out.device != data.device:
        raise ValueError(f"out {_said(out)}: {lines.numel} numbers, contiguous, floating, on {data.device} were expected")
    if not out.numel():
        return out
    if fused(out):
        return _fused_dequantize(shard, out)
    return _dequantize(shard, out)


def _said(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}".removeprefix("torch.")


def _check(lines: Lines, blocksize: int, quant_type: str = "nf4") -> None:
    if blocksize not in BLOCK_SIZES:
        raise ValueError(f"blocks of {blocksize}: one of {', '.join(map(str, BLOCK_SIZES))} was expected")
    if quant_type not in CODES:
        raise ValueError(f"quant_type {quant_type!r}: nf4 or fp4 was expected")
    last = lines.start + max(0, lines.count - 1) * lines.stride + lines.width
    if min(lines.count, lines.width, lines.start, lines.stride) < 0 or (lines.numel and last > lines.total):
        raise ValueError(f"{lines} are not all in the tensor")


def _check_numbers(x: Tensor, lines: Lines) -> None:
    if x.dtype not in DTYPES or x.numel() != lines.numel:
        raise ValueError(f"x {_said(x)}: {lines.numel} numbers in bfloat16, float16 or float32 were expected")
