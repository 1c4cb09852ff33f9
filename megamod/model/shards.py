"""Frozen weights of which each data-parallel rank keeps a slice, and which are gathered when they are multiplied with.

What ZeRO's third stage (Rajbhandari et al. 2020, arXiv:1910.02054) and FSDP (Zhao et al. 2023, arXiv:2304.11277) do with parameters, for a
base beneath adapters: nothing of it is trained, so nothing is ever reduced or written back. All ranks of dp × cp hold the same share of
the base by tp and pp, and each keeps 1 / (dp × cp) of the bytes of every linear's weight, in 4 bits or not. Norms, biases, the
embedding and the head stay whole.

A weight is gathered in the forward pass, in recomputation and in the backward pass, each time into the same memory: autograd keeps the
slice. While one is multiplied with, the next is on its way. Which that will be is what came last time after the same two; the ranks
take the same steps in the same order, so they expect the same.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamod.parallel.grid import Axis, Grid
from megamod.weights.load import Source
from megamod.weights.table import Piece, boxes
from megamod_kernels.lora import Compact


class Buffer:
    """Memory in which tensors take their turns: as large as the largest that is announced, and made when the first one comes.

    Attributes:
        nbytes: of the largest.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._memory = torch.empty(0, dtype=torch.uint8)

    def announce(self, nbytes: int) -> None:
        """Something so large will take its turn."""
        self.nbytes = max(self.nbytes, nbytes)

    def of(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Of `shape`, contiguous, uninitialised: whatever was in it before is gone."""
        if len(self._memory) < self.nbytes or self._memory.device != device:
            self._memory = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        return self._memory[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(*shape)


class Slices(nn.Module):
    """A flat frozen tensor `[n]`: this rank's slice of it, or all of it where nobody shares it.

    Args:
        numel: n.
        like: of its dtype and device.
        gathering: with whom it is shared.

    Attributes:
        own: `[⌈n / ranks⌉]`; the last ranks' run past the end.
        start, stop: which elements these are.
    """

    own: Tensor

    def __init__(self, numel: int, like: Tensor, gathering: "Gathering | None") -> None:
        super().__init__()
        self.numel, self._gathering = numel, gathering
        ranks, rank = (gathering.axis.size, gathering.axis.rank) if gathering is not None else (1, 0)
        each = -(-numel // ranks)
        self.start, self.stop = (min(n * each, numel) for n in (rank, rank + 1))
        self.register_buffer("own", like.new_empty(each))
        if gathering is not None:
            gathering.announce(ranks * self.own.nbytes)

    def whole(self) -> Tensor:
        """`[n]`; where it is shared every rank that does so calls it, and it is good until the next one is gathered."""
        return self.own if self._gathering is None else self._gathering.whole(self)[: self.numel]

    @torch.no_grad()
    def keep(self, first: int, values: Tensor) -> None:
        """Take over what is this rank's of `values`, elements from `first` on."""
        low, high = max(first, self.start), min(first + len(values), self.stop)
        if low < high:
            self.own[low - self.start : high - self.start].copy_(values[low - first : high - first])
        if self._gathering is not None:
            self._gathering.forget(self)


class Gathering:
    """Gathers a model's Slices over `axis`, in memory that they share: one that is used, one that is on its way.

    Attributes:
        buffers: this memory.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis, self.buffers = axis, (Buffer(), Buffer())
        self._turn = 0  # of the buffers, the one that is used
        self._here: Slices | None = None  # what is in it
        self._before: Slices | None = None  # what was there before that
        self._coming: tuple[Slices, dist.Work] | None = None  # to the other one
        self._after: dict[tuple[Slices | None, Slices | None], Slices] = {}  # what came after these two

    def announce(self, nbytes: int) -> None:
        """Something so large will be gathered."""
        for buffer in self.buffers:
            buffer.announce(nbytes)

    def forget(self, slices: Slices) -> None:
        """It is not any more what was gathered."""
        if self._here is slices:
            self._here = None
        if self._coming is not None and self._coming[0] is slices:
            self._arrived()

    def whole(self, slices: Slices) -> Tensor:
        """All ranks' slices, one after the other: those of one that is here still, or was expected, are not gathered again."""
        if self._here is not slices:
            if self._coming is None or self._coming[0] is not slices:
                self._send(slices)
            self._arrived()
            self._turn = 1 - self._turn
            self._after[self._before, self._here] = slices
            self._before, self._here = self._here, slices
            following = self._after.get((self._before, slices))
            if following is not None and following is not slices:
                self._send(following)
        return self._memory(slices, self._turn)

    def _send(self, slices: Slices) -> None:
        """Begin to gather it into the memory that is not used."""
        self._arrived()  # another one was expected, wrongly
        memory = self._memory(slices, 1 - self._turn)
        work = dist.all_gather_into_tensor(memory, slices.own, group=self.axis.group, async_op=True)
        assert work is not None
        self._coming = slices, work

    def _arrived(self) -> None:
        if self._coming is not None:
            self._coming[1].wait()
            self._coming = None

    def _memory(self, slices: Slices, turn: int) -> Tensor:
        return self.buffers[turn].of((self.axis.size * len(slices.own),), slices.own.dtype, slices.own.device)


class ShardedWeight(nn.Module, Compact):
    """A linear's weight `[F, C]` of which this rank keeps a slice.

    Args:
        pieces: the Hugging Face tensors in it, one below the other.
        like: of its dtype, on the device where it is to be.
        gathering: with whom it is shared.
    """

    def __init__(self, pieces: Sequence[Piece], like: Tensor, gathering: Gathering) -> None:
        super().__init__()
        self.shape, self.dtype, self.device = size_of(pieces), like.dtype, like.device
        self.slices, self.buffers_shared = Slices(self.shape.numel(), like, gathering), gathering.buffers

    def dense(self) -> Tensor:
        """`[F, C]`; good until the next one is gathered."""
        return self.slices.whole().view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the slice."""
        return self.slices.own.nbytes

    def values(self, piece: Piece) -> Tensor:
        """`[F', C]` of one of its tensors, in memory of its own; all ranks that share it call this."""
        return piece.of(self.dense()).clone()

    def fill(self, piece: Piece, source: Source, grid: Grid) -> None:
        """Of one of its tensors read what is in this rank's slice."""
        first = piece.row * self.shape[1]
        low, high = (min(max(n - first, 0), piece.numel) for n in (self.slices.start, self.slices.stop))
        read = [source.read(piece.hf, *box).flatten() for _, _, box in boxes(piece, low, high)]
        self.slices.keep(first + low, torch.cat(read) if read else self.slices.own[:0])  # also of nothing: all forget what they had


def size_of(pieces: Sequence[Piece]) -> torch.Size:
    """F and C of a linear's weight in which `pieces` are one below the other."""
    return torch.Size((sum(piece.size[0] for piece in pieces), pieces[0].size[1]))
