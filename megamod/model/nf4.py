"""A base's linears in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), cut per rank, with adapters of every kind on them.

A rank keeps its share of each Hugging Face tensor as bitsandbytes would: codes of 4 bits, and for each block the largest number, which
is a number of the *whole* tensor's block. A cut may fall inside a block; the values stay those of a single process. Nothing else is
kept: a weight is made dense, in one buffer that all of a model's weights share, when it is multiplied with, once in a forward and once in
the backward pass (DoRA's norm asks for it once more), and what autograd remembers of it are the codes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megamod.errors import MegamodError
from megamod.model.lora import LoraLinear
from megamod.model.shape import Shape
from megamod.parallel.grid import Grid
from megamod.weights.bitsandbytes import BitsAndBytes, four_bits
from megamod.weights.load import Source
from megamod.weights.quantization import Quantization
from megamod.weights.table import Piece, pieces, table
from megamod_kernels import nf4
from megamod_kernels.lora import Compact
from megamod_kernels.nf4 import Absmax, Lines, Shard


class Buffer:
    """The memory that dense weights take their turns in: as large as the largest of them, and one for a model."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, weight: Compact) -> Tensor:
        """`[F, C]`, contiguous, uninitialised: whatever was in it before is gone."""
        numel = weight.shape.numel()
        held = self._memory
        if held.numel() < numel or held.dtype is not weight.dtype or held.device != weight.device:
            self._memory = torch.empty(numel, dtype=weight.dtype, device=weight.device)
        return self._memory[:numel].view(weight.shape)


class Segment(nn.Module):
    """This rank's share of one Hugging Face tensor: in 4 bits, or as it is where it is not to be converted.

    Args:
        piece: of the tensor, rows [row, row + F') of the fused weight.
        quantization: None: it is kept as it is, in `like`'s dtype.
        like: of the weight's dtype and device.
    """

    dense: Tensor | None
    data: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: Tensor | None

    def __init__(self, piece: Piece, quantization: Quantization | None, like: Tensor) -> None:
        super().__init__()
        self.piece, self.quantization = piece, quantization
        assert len(piece.shape) == len(piece.offset) == len(piece.size) == 2, "a linear's weight"
        self.lines = Lines.of(piece.shape, piece.offset, piece.size)
        if quantization is None:
            self.register_buffer("dense", like.new_empty(piece.size))
            return
        blocks = -(-self.lines.total // quantization.blocksize)
        of_blocks = (self.lines.count, self.lines.touched(quantization.blocksize))
        double = quantization.use_double_quant
        self.register_buffer("dense", None)
        self.register_buffer("data", like.new_empty(-(-piece.numel // 2), dtype=torch.uint8))
        self.register_buffer("absmax", like.new_empty(of_blocks, dtype=torch.uint8 if double else torch.float32))
        self.register_buffer("nested", like.new_empty(-(-blocks // nf4.NESTED), dtype=torch.float32) if double else None)
        self.register_buffer("offset", like.new_empty((), dtype=torch.float32) if double else None)

    @property
    def shard(self) -> Shard:
        """What is in 4 bits."""
        assert self.quantization is not None
        q = self.quantization
        return Shard(self.data, self.absmax, self.nested, self.offset, self.lines, q.blocksize, q.quant_type)

    def write(self, out: Tensor) -> None:
        """Its values into `out` `[F', C']`."""
        if self.dense is not None:
            out.copy_(self.dense)
        elif not out.is_meta:  # a dry run's has a shape, and no numbers
            nf4.dequantize(self.shard, out)

    @torch.no_grad()
    def keep(self, shard: Shard) -> None:
        """Take over what `shard` holds."""
        self.data.copy_(shard.data)
        self.absmax.copy_(shard.absmax)
        if self.nested is not None and self.offset is not None:
            assert shard.nested is not None
            assert shard.offset is not None
            self.nested.copy_(shard.nested)
            self.offset.copy_(shard.offset)


class Weight4bit(nn.Module, Compact):
    """This rank's rows of a fused linear, `[F, C]`.

    Args:
        pieces: the Hugging Face tensors in it, one below the other.
        quantization: which of them are in 4 bits, and how.
        size: F and C here.
        like: of the dense weight's dtype, on the device where it is to be.
        buffer: where it is made dense.
    """

    def __init__(self, pieces: Sequence[Piece], quantization: Quantization, size: tuple[int, int], like: Tensor, buffer: Buffer) -> None:
        super().__init__()
        self.shape, self.dtype, self.device = torch.Size(size), like.dtype, like.device
        self._buffer = buffer
        kinds = [quantization if quantization.converts(piece.hf.removesuffix(".weight")) else None for piece in pieces]
        self.segments = nn.ModuleList(Segment(piece, kind, like) for piece, kind in zip(pieces, kinds, strict=True))

    def dense(self) -> Tensor:
        """`[F, C]` in the model's buffer; good until another weight of the model is made dense."""
        whole = self._buffer.of(self)
        for segment in self.segments:
            assert isinstance(segment, Segment)
            segment.write(segment.piece.of(whole))
        return whole

    @property
    def nbytes(self) -> int:
        """Bytes that it takes here, without the buffer's."""
        return sum(held.nbytes for held in self.buffers())

    def values(self, piece: Piece) -> Tensor:
        """`[F', C]` of one of its tensors, in memory of its own."""
        segment = self._segment(piece)
        out = torch.empty(piece.size, dtype=self.dtype, device=self.device)
        segment.write(out)
        return out

    @torch.no_grad()
    def fill(self, piece: Piece, source: Source, grid: Grid) -> None:
        """One of its tensors from `source`; the tp ranks call it alike.

        Where a directory has it in 4 bits, its bytes are taken over. Else each rank reads its own share, and the largest numbers of the
        blocks, which may lie on several ranks, are found together.

        Raises:
            Exception: whatever the source raises, after this rank has taken its part in what the ranks do together.
        """
        segment, box = self._segment(piece), (piece.hf, piece.offset, piece.size)
        held = four_bits(source)
        if segment.dense is not None:
            segment.dense.copy_(source.read(*box))
        elif isinstance(held, BitsAndBytes):
            shard = held.shard(*box)
            assert shard is not None, "the shape's quantization is the directory's"
            segment.keep(shard)
        else:  # what is to be quantised is read as it is
            plain = held.source if held is not None else source
            segment.keep(_quantized(segment, partial(plain.read, *box), grid))

    def _segment(self, piece: Piece) -> Segment:
        return next(segment for segment in self.segments if isinstance(segment, Segment) and segment.piece == piece)


def _quantized(segment: Segment, read: Callable[[], Tensor], grid: Grid) -> Shard:
    """This rank's share in 4 bits of a tensor of which every tp rank reads its own."""
    lines, q, device = segment.lines, segment.quantization, segment.data.device
    assert q is not None
    absmax, fault = torch.zeros(-(-lines.total // q.blocksize), dtype=torch.float32, device=device), None
    try:
        x = read().to(device)
        if x.dtype not in nf4.DTYPES:
            raise MegamodError(f"{segment.piece.hf}: is in {str(x.dtype).removeprefix('torch.')}, and cannot be in 4 bits")
        if not bool(x.isfinite().all()):
            raise MegamodError(f"{segment.piece.hf}: holds NaN or an infinite number, and cannot be in 4 bits")
        absmax = nf4.block_absmax(x, lines, q.blocksize)
    except Exception as error:  # the others wait for this rank's numbers all the same
        fault = error
    if grid.tp.size > 1:
        dist.all_reduce(absmax, dist.ReduceOp.MAX, group=grid.tp.group)
    if fault is not None:
        raise fault
    absmax = nf4.whole_blocks(absmax, lines, q.blocksize)
    known = nf4.compress(absmax) if q.use_double_quant else Absmax(absmax.cpu())
    data = nf4.quantize(x, absmax, lines, q.blocksize, q.quant_type)
    return Shard(data, known.of(lines, q.blocksize), known.nested, known.offset, lines, q.blocksize, q.quant_type)


class Linear4bit(LoraLinear):
    """A column- or row-parallel linear with its weight in 4 bits, as megatron-core's layers make their linears.

    Args:
        input_size, output_size: of the whole linear.
        config, bias, skip_bias_add: from megatron-core; what else it says is of no concern to a frozen weight.
        cut, name: as in LoraLinear.
        pieces: of its weight, on this rank.
        quantization, grid, like, buffer: see Weight4bit.
    """

    def __init__(
        self, input_size: int, output_size: int, *, bias: bool, skip_bias_add: bool, cut: int, name: str, pieces: Sequence[Piece],
        quantization: Quantization, grid: Grid, like: Tensor, buffer: Buffer, **_: Any,
    ) -> None:  # fmt: skip
        tp = grid.tp.size
        size = (output_size // tp, input_size) if cut == 0 else (output_size, input_size // tp)
        weight = Weight4bit(pieces, quantization, size, like, buffer)
        own = nn.Parameter(like.new_empty(size[0]), requires_grad=False) if bias else None
        super().__init__(weight, own, skip_bias_add, cut, name, grid)


class Linears:
    """Who multiplies in each place of a model: Linear4bit where the shape says so. All its weights share one buffer."""

    def __init__(self, shape: Shape, grid: Grid, dtype: torch.dtype) -> None:
        self._quantization, self._grid, self._buffer = shape.quantization, grid, Buffer()
        self._rows = {row.ours: row for row in table(shape)}
        self._like = torch.empty(0, dtype=dtype, device=grid.device)

    def linear(self, layer: int, place: str, plain: type) -> type | ModuleSpec:
        """Who multiplies in `place` of `layer`, which counts from 0: `plain`, where nothing there is in 4 bits."""
        row, tp, q = self._rows[f"decoder.layers.{{}}.{place}.weight"], self._grid.tp, self._quantization
        own = pieces(row, tp.size, tp.rank, layer)
        if q is None or not any(q.converts(piece.hf.removesuffix(".weight")) for piece in own):
            return plain
        said = {"name": f"decoder.layers.{layer}.{place}", "cut": row.parts[0].cut, "pieces": own, "quantization": q}
        return ModuleSpec(module=Linear4bit, params={**said, "grid": self._grid, "like": self._like, "buffer": self._buffer})
