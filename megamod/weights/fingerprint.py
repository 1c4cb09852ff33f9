"""A fingerprint of a base's weights: which bits each tensor has at which place, whatever the grid and whoever holds them.

With v the bits of element (i, j) of a tensor as an integer, it is Σ (v + 1)·u(i)·w(j) modulo 2⁶⁴ over all elements of all tensors, u
and w odd numbers that depend on the place and the tensor's name. A sum can be taken piece by piece and rank by rank; a change of
one element always changes it, since a difference times odd numbers is not 0.

Which base an adapter belongs to is told by the bits of its weights rounded to bfloat16, whatever dtype they are loaded in, and without a
head of scores, which an adapter brings along; whether a run has left its base as it was, by all of their bits.
"""

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megamod.model.shape import Shape
from megamod.parallel.grid import Grid
from megamod.weights.load import Source
from megamod.weights.table import Held, hf_shapes

SCORE = "score."  # of tensors of a head of scores
AT_A_TIME = 1 << 22  # elements; as integers of 64 bits they take eight times as many bytes
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW, _COLUMN = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9  # far from round numbers


def of_model(items: Sequence[Held], grid: Grid, dtype: torch.dtype | None = torch.bfloat16) -> str:
    """Of the weights that the ranks of `grid` hold, as `dtype` (None: as they are); every rank calls it. 16 hexadecimal digits."""
    total = torch.zeros((), dtype=torch.int64, device=grid.device)
    for number, item in enumerate(items):
        for piece in item.pieces:
            values = item.values(piece)  # all take part: a weight may be kept in slices
            mine = number % grid.dp_cp.size == grid.dp_cp.rank  # of what all have, each takes some
            if mine and piece.owned and (dtype is None or not piece.hf.startswith(SCORE)):
                total += _of(values, dtype or item.dtype, piece.hf, piece.offset)
    dist.all_reduce(total)
    return _said(total)


def of_source(source: Source, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> str:
    """Of a checkpoint's weights, read as `dtype`: what `of_model` gives after they were loaded."""
    total = torch.zeros((), dtype=torch.int64)
    for name, size in tqdm(hf_shapes(shape).items(), desc="base", unit="tensor", delay=3, mininterval=3):
        if name.startswith(SCORE):
            continue
        rows = max(1, AT_A_TIME // max(1, size[-1])) if len(size) > 1 else size[0]
        for first in range(0, size[0], rows):
            offset = (first, *(0 for _ in size[1:]))
            total += _of(source.read(name, offset, (min(rows, size[0] - first), *size[1:])), dtype, name, offset)
    return _said(total)


def _of(piece: Tensor, dtype: torch.dtype, name: str, offset: Sequence[int]) -> Tensor:
    """The part of the sum that `piece` as `dtype`, at `offset` of the tensor, contributes; a scalar, int64."""
    matrix = piece if piece.dim() == 2 else piece[None]
    row, column = offset if len(offset) == 2 else (0, offset[0])
    key = zlib.crc32(name.encode())
    ours = _weights(column, matrix.shape[1], _COLUMN, piece.device)
    total = torch.zeros((), dtype=torch.int64, device=piece.device)
    height = max(1, AT_A_TIME // max(1, matrix.shape[1]))
    for first in range(0, matrix.shape[0], height):
        bits = matrix[first : first + height].to(dtype).contiguous().view(_BITS[dtype.itemsize]).to(torch.int64)
        theirs = _weights(row + first, len(bits), _ROW + 2 * key, piece.device)
        total += ((bits + 1).mul_(ours).sum(1) * theirs).sum()
    return total


def _weights(first: int, count: int, factor: int, device: torch.device) -> Tensor:
    """An odd number for each place, mixed so that neighbours have nothing in common; int64, which wraps."""
    x = (torch.arange(first, first + count, device=device) + 1) * factor
    x = (x ^ (x >> 29)) * 0x2545F4914F6CDD1D
    return x | 1


def _said(total: Tensor) -> str:
    return f"{int(total) & (1 << 64) - 1:016x}"
