"""A base's linears in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), cut per rank, with adapters of every kind on them.

A rank keeps its share of each Hugging Face tensor as bitsandbytes would: codes of 4 bits, and for each block the largest number, which
is a number of the *whole* tensor's block. A cut may fall inside a block; the values stay those of a single process. Nothing else is
kept: a weight is made dense, in one buffer that all of a model's weights share, when it is multiplied with, once in a forward and once in
the backward pass (DoRA's norm asks for it once more), and what autograd remembers of it are the codes. All bytes of a fused weight lie
one after the other, so that ranks may keep slices of them (model.shards), and one gather brings them together.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megamod.errors import MegamodError
from megamod.model.lora import LoraLinear
from megamod.model.shape import Shape
from megamod.model.shards import Buffer, Gathering, ShardedWeight, Slices, size_of
from megamod.parallel.grid import Grid
from megamod.weights.bitsandbytes import BitsAndBytes, four_bits
from megamod.weights.load import Source
from megamod.weights.quantization import Quantization
from megamod.weights.table import Piece, pieces, table
from megamod_kernels import nf4
from megamod_kernels.lora import Compact
from megamod_kernels.nf4 import Absmax, Lines, Shard


class Field(NamedTuple):
    """Where one of a segment's tensors lies among the bytes of a weight."""

    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.first + math.prod(self.shape) * self.dtype.itemsize

    def of(self, stored: Tensor) -> Tensor:
        """The view of a weight's bytes."""
        return stored[self.first : self.end].view(self.dtype).view(self.shape)


class Segment:
    """This rank's share of one Hugging Face tensor: in 4 bits, or as it is where it is not to be converted.

    Args:
        piece: of the tensor, rows [row, row + F') of the fused weight.
        quantization: None: it is kept as it is.
        dtype: of the weight.
        first: where among the weight's bytes its own begin.

    Attributes:
        fields: data, absmax, nested and offset, as in Shard; or the one tensor that is not converted.
        end: where its bytes end.
    """

    def __init__(self, piece: Piece, quantization: Quantization | None, dtype: torch.dtype, first: int) -> None:
        self.piece, self.quantization = piece, quantization
        assert len(piece.shape) == len(piece.offset) == len(piece.size) == 2, "a linear's weight"
        self.lines = Lines.of(piece.shape, piece.offset, piece.size)
        kinds: list[tuple[tuple[int, ...], torch.dtype]] = [(piece.size, dtype)]
        if quantization is not None:
            blocks = -(-self.lines.total // quantization.blocksize)
            of_blocks = (self.lines.count, self.lines.touched(quantization.blocksize))
            kinds = [((-(-piece.numel // 2),), torch.uint8), (of_blocks, torch.float32)]
            if quantization.use_double_quant:
                kinds = [kinds[0], (of_blocks, torch.uint8), ((-(-blocks // nf4.NESTED),), torch.float32), ((), torch.float32)]
        self.fields: list[Field] = []
        for shape, kind in kinds:
            self.fields.append(Field(first, shape, kind))
            first = aligned(self.fields[-1].end)
        self.end = first

    def shard(self, stored: Tensor) -> Shard:
        """What is in 4 bits, of a weight's bytes."""
        assert self.quantization is not None
        q, (data, absmax, *rest) = self.quantization, (field.of(stored) for field in self.fields)
        nested, offset = rest or (None, None)
        return Shard(data, absmax, nested, offset, self.lines, q.blocksize, q.quant_type)

    def write(self, stored: Tensor, out: Tensor) -> None:
        """Its values into `out` `[F', C']`."""
        if self.quantization is None:
            out.copy_(self.fields[0].of(stored))
        elif not out.is_meta:  # a dry run's has a shape, and no numbers
            nf4.dequantize(self.shard(stored), out)


class Weight4bit(nn.Module, Compact):
    """This rank's rows of a fused linear, `[F, C]`.

    Args:
        pieces: the Hugging Face tensors in it, one below the other.
        quantization: which of them are in 4 bits, and how.
        like: of the dense weight's dtype, on the device where it is to be.
        buffer: where it is made dense.
        gathering: with whom its bytes are shared; None: they are all here.
    """

    def __init__(
        self, pieces: Sequence[Piece], quantization: Quantization, like: Tensor, buffer: Buffer, gathering: Gathering | None = None
    ) -> None:
        super().__init__()
        self.shape, self.dtype, self.device = size_of(pieces), like.dtype, like.device
        self._buffer = buffer
        buffer.announce(self.shape.numel() * self.dtype.itemsize)
        self.segments: list[Segment] = []
        for piece in pieces:
            kind = quantization if quantization.converts(piece.hf.removesuffix(".weight")) else None
            self.segments.append(Segment(piece, kind, like.dtype, self.segments[-1].end if self.segments else 0))
        self.slices = Slices(self.segments[-1].end, like.to(torch.uint8), gathering)
        self.buffers_shared = (buffer, *(gathering.buffers if gathering is not None else ()))

    def dense(self) -> Tensor:
        """`[F, C]` in the model's buffer; good until another weight of the model is made dense."""
        stored, whole = self.slices.whole(), self._buffer.of(self.shape, self.dtype, self.device)
        for segment in self.segments:
            segment.write(stored, segment.piece.of(whole))
        return whole

    @property
    def nbytes(self) -> int:
        """Bytes that it takes here, without the buffers'."""
        return self.slices.own.nbytes

    def values(self, piece: Piece) -> Tensor:
        """`[F', C]` of one of its tensors, in memory of its own; all ranks that share it call this."""
        out = torch.empty(piece.size, dtype=self.dtype, device=self.device)
        self._segment(piece).write(self.slices.whole(), out)
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
        if segment.quantization is None:
            self._keep(segment, source.read(*box))
        elif isinstance(held, BitsAndBytes):
            shard = held.shard(*box)
            assert shard is not None, "the shape's quantization is the directory's"
            self._keep(segment, shard.data, shard.absmax, shard.nested, shard.offset)
        else:  # what is to be quantised is read as it is
            plain = held.source if held is not None else source
            shard = _quantized(segment, partial(plain.read, *box), grid)
            self._keep(segment, shard.data, shard.absmax, shard.nested, shard.offset)

    def _keep(self, segment: Segment, *tensors: Tensor | None) -> None:
        """Take over a segment's tensors."""
        for field, tensor in zip(segment.fields, (x for x in tensors if x is not None), strict=True):
            assert tensor.numel() == math.prod(field.shape)
            self.slices.keep(field.first, tensor.to(field.dtype).contiguous().view(-1).view(torch.uint8))

    def _segment(self, piece: Piece) -> Segment:
        return next(segment for segment in self.segments if segment.piece == piece)


def aligned(count: int) -> int:
    """Bytes up to a multiple of 16: the kernels read so many at once."""
    return -(-count // 16) * 16


def _quantized(segment: Segment, read: Callable[[], Tensor], grid: Grid) -> Shard:
    """This rank's share in 4 bits of a tensor of which every tp rank reads its own."""
    lines, q, device = segment.lines, segment.quantization, grid.device
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


class FrozenLinear(LoraLinear):
    """A column- or row-parallel linear whose weight is no parameter, as megatron-core's layers make their linears.

    Args:
        input_size, output_size: of the whole linear.
        config, bias, skip_bias_add: from megatron-core; what else it says is of no concern to a frozen weight.
        cut, name: as in LoraLinear.
        weight: makes it.
        like: of its dtype, on the device where it is to be.
    """

    def __init__(
        self, input_size: int, output_size: int, *, bias: bool, skip_bias_add: bool, cut: int, name: str,
        weight: Callable[[], Compact], grid: Grid, like: Tensor, **_: Any,
    ) -> None:  # fmt: skip
        tp, made = grid.tp.size, weight()
        assert made.shape == ((output_size // tp, input_size) if cut == 0 else (output_size, input_size // tp))
        own = nn.Parameter(like.new_empty(made.shape[0]), requires_grad=False) if bias else None
        super().__init__(made, own, skip_bias_add, cut, name, grid)


class Linears:
    """Who multiplies in each place of a model: FrozenLinear where a base is in 4 bits or kept in slices. All its weights share buffers."""

    def __init__(self, shape: Shape, grid: Grid, dtype: torch.dtype) -> None:
        self._quantization, self._grid, self._buffer = shape.quantization, grid, Buffer()
        self._gathering = Gathering(grid.base_shards) if grid.base_shards is not None else None
        self._rows = {row.ours: row for row in table(shape)}
        self._like = torch.empty(0, dtype=dtype, device=grid.device)

    def linear(self, layer: int, place: str, plain: type) -> type | ModuleSpec:
        """Who multiplies in `place` of `layer`, which counts from 0: `plain`, where nothing there is in 4 bits or shared."""
        row, tp, q = self._rows[f"decoder.layers.{{}}.{place}.weight"], self._grid.tp, self._quantization
        own = pieces(row, tp.size, tp.rank, layer)
        weight: Callable[[], Compact]
        if q is not None and any(q.converts(piece.hf.removesuffix(".weight")) for piece in own):
            weight = partial(Weight4bit, own, q, self._like, self._buffer, self._gathering)
        elif self._gathering is not None:
            weight = partial(ShardedWeight, own, self._like, self._gathering)
        else:
            return plain
        said = {"name": f"decoder.layers.{layer}.{place}", "cut": row.parts[0].cut, "weight": weight}
        return ModuleSpec(module=FrozenLinear, params={**said, "grid": self._grid, "like": self._like})
