"""Packed rows for the parity tests: eight rows of 32 tokens, uneven documents, labels on some of the positions."""

from collections.abc import Sequence

import torch

from megamod.batch import Batch

LENGTHS = ((7, 13, 12), (32,), (1, 2, 29), (16, 16), (5, 27), (8, 8, 8, 8), (31, 1), (10, 10, 12))
ROW = 32


def rows(vocab: int, lengths: Sequence[Sequence[int]] = LENGTHS, seed: int = 3, labelled: float = 0.4, mrope: bool = False) -> list[Batch]:
    """One Batch a row. The last document of row 1 … has no label at all, as filler has none.

    With `mrope` a token has three positions, any three, as in a document with an image.
    """
    generator = torch.Generator().manual_seed(seed)
    result = []
    for number, row in enumerate(lengths):
        total = sum(row)
        tokens = torch.randint(0, vocab, (total,), generator=generator)
        positions = torch.cat([torch.arange(n) for n in row])
        sequence = torch.cat([torch.full((n,), i) for i, n in enumerate(row)])
        keep = torch.rand(total, generator=generator) < labelled
        if number % 3 == 2:
            keep &= sequence < len(row) - 1
        at = keep.nonzero()[:, 0]
        labels = torch.randint(0, vocab, (len(at),), generator=generator)
        verdict = torch.rand(len(at), generator=generator) < 0.3
        weight = torch.rand(len(row), generator=generator, dtype=torch.float64)[sequence[at]] + 0.5
        if mrope:
            positions = torch.stack((positions, *torch.randint(0, 40, (2, total), generator=generator)))
        result.append(Batch(tokens, positions, tuple(row), at, labels, verdict, weight, sequence[at]))
    return result


def join(parts: Sequence[Batch]) -> Batch:
    """Rows laid end to end: a micro-batch of several rows."""
    tokens = [len(p.tokens) for p in parts]
    documents = [len(p.lengths) for p in parts]
    return Batch(
        tokens=torch.cat([p.tokens for p in parts]),
        positions=torch.cat([p.positions for p in parts], -1),
        lengths=tuple(n for p in parts for n in p.lengths),
        rows=torch.cat([p.rows + sum(tokens[:i]) for i, p in enumerate(parts)]),
        labels=torch.cat([p.labels for p in parts]),
        verdict=torch.cat([p.verdict for p in parts]),
        weight=torch.cat([p.weight for p in parts]),
        sequence=torch.cat([p.sequence + sum(documents[:i]) for i, p in enumerate(parts)]),
    )


def shared(batches: Sequence[Batch], dp_rank: int, dp_size: int, micro_batches: int) -> list[Batch]:
    """Data-parallel rank `dp_rank`'s share of the rows, as `micro_batches` micro-batches."""
    each = len(batches) // (dp_size * micro_batches)
    groups = [join(batches[i : i + each]) for i in range(0, len(batches), each)]
    return groups[dp_rank::dp_size]
