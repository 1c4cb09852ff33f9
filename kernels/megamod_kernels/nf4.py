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

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

QuantType = Literal["nf4", "fp4"]
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # absmax values that share one of their own
PLACES = 1 << 16  # to which bitsandbytes rounds a number before it looks up the nearest dynamic one
SMALLEST = 1e-38  # a block of zeros is divided by it

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
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Absmax:
    """The statistics of a whole tensor's blocks."""

    values: Tensor  # [⌈N/B⌉] fp32; uint8 codes where nested
    nested: Tensor | None = None  # [⌈N/B/256⌉] fp32
    offset: Tensor | None = None  # scalar fp32

    def of(self, lines: Lines, blocksize: int) -> Tensor:
        """`[lines, M]`: those of a shard, as it keeps them; zeros past the end of a line and of the tensor."""
        block = lines.blocks(blocksize)[:, None] + torch.arange(lines.touched(blocksize))
        inside = block < len(self.values)
        return torch.where(inside, self.values[block.clamp(max=len(self.values) - 1)], 0).to(self.values.dtype)


# ---- references: the only definition of correct


@cache
def dynamic_map() -> Tensor:
    """`[256]` fp32, sorted: dynamic 8-bit numbers (Dettmers et al. 2022, arXiv:2110.02861, 1.3): a sign, an exponent of ten, the rest a
    fraction: 2^i of them at exponent i - 6, in the middles of equal parts of [0.1, 1]; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        middles = (ends[:-1] + ends[1:]) / 2 * 10 ** (i - 6)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


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
    limits, order = (t.to(x.device) for t in bounds(quant_type))
    block = lines.places(x.device).flatten() // blocksize
    flat = x.flatten().float()
    least = absmax.clamp(min=SMALLEST)
    scaled = flat * (1.0 / least)[block]
    if lines.total % blocksize:
        scaled = torch.where(block == lines.total // blocksize, flat / least[-1], scaled)
    scaled = torch.nn.functional.pad(scaled.clamp(-1, 1), (0, len(scaled) % 2))  # bitsandbytes fills up the last byte with a zero's code
    codes = order[torch.bucketize(scaled, limits)].to(torch.uint8)
    return codes[::2] << 4 | codes[1::2]


def whole_blocks(absmax: Tensor, lines: Lines, blocksize: int) -> Tensor:
    """The tensor's absmax as bitsandbytes keeps it, of the maximum over all shards: of a last block that is not full at least SMALLEST."""
    if lines.total % blocksize:
        absmax[-1:].clamp_(min=SMALLEST)
    return absmax


@cache
def _nearest_dynamic() -> Tensor:
    """`[65536]` uint8: the dynamic code that is nearest to each of as many even places in [-1, 1]."""
    code = dynamic_map()
    places = -1 + 2 * torch.arange(PLACES, dtype=torch.float32) / (PLACES - 1)
    return torch.bucketize(places, (code[1:] + code[:-1]) * 0.5).to(torch.uint8)


def compress(absmax: Tensor) -> Absmax:
    """Absmax `[⌈N/B⌉]` fp32 of a whole tensor in 8 bits. On the CPU, in one thread, where the mean's sum has always the same order."""
    values = absmax.cpu()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        offset = values.mean()
    finally:
        torch.set_num_threads(threads)
    centred = torch.nn.functional.pad(values - offset, (0, -len(values) % NESTED)).view(-1, NESTED)
    nested = centred.abs().amax(1)
    normed = (centred * (1.0 / nested)[:, None]).clamp(-1, 1)
    place = ((normed + 1) * 0.5 * (PLACES - 1) + 0.5).nan_to_num(0).long()  # of a nested block of zeros: code 0
    return Absmax(_nearest_dynamic()[place].flatten()[: len(values)], nested, offset)


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


# ---- public functions


def block_absmax(x: Tensor, lines: Lines, blocksize: int) -> Tensor:
    """block_absmax_ref."""
    return block_absmax_ref(x, lines, blocksize)


def quantize(x: Tensor, absmax: Tensor, lines: Lines, blocksize: int, quant_type: QuantType) -> Tensor:
    """quantize_ref."""
    return quantize_ref(x, absmax, lines, blocksize, quant_type)


def dequantize(shard: Shard, out: Tensor) -> Tensor:
    """dequantize_ref."""
    return dequantize_ref(shard, out)
