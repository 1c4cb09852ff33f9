"""The shapes that tests and benchmarks share: Qwen2.5-72B's at tp 1, 2, 4 and 8, to be timed, and small odd ones, to be tested."""

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class RopeCase:
    """q `[T, H, D]` and k `[T, K, D]`."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    bench: bool = False

    @property
    def name(self) -> str:
        return f"T{self.tokens} H{self.heads} K{self.kv_heads} D{self.dim}"

    @property
    def numbers(self) -> int:
        """In q and k."""
        return self.tokens * (self.heads + self.kv_heads) * self.dim


@dataclass(frozen=True)
class PadCase:
    """Packed documents of `lengths`, `[T, *width]`."""

    lengths: tuple[int, ...]
    width: tuple[int, ...]
    bench: bool = False

    @property
    def name(self) -> str:
        return f"T{self.tokens} S{len(self.lengths)} L{self.longest} {'x'.join(map(str, self.width)) or 'flat'}"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def borders(self) -> list[int]:
        """cu_seqlens, `[S+1]`."""
        return [0, *accumulate(self.lengths)]


# 72B: 64 heads, 8 kv heads, D 128, hidden 8192.
ROPE = [
    *(RopeCase(tokens, 64 // tp, 8 // tp, 128, bench=True) for tokens in (8192, 32768) for tp in (1, 2, 4, 8)),
    RopeCase(1, 1, 1, 16),
    RopeCase(17, 3, 1, 40),
    RopeCase(17, 8, 2, 80),  # ten heads: a program's group holds the last of q and the first of k
    RopeCase(100, 3, 2, 128),
    RopeCase(100, 8, 1, 16),
    RopeCase(33, 1, 2, 96),
    RopeCase(0, 3, 1, 16),
]
DOCUMENTS = (2048, 1024, 512, 256, 256)  # 4096 tokens; 40 % of the padded rows is filled
PAD = [
    *(PadCase(DOCUMENTS * (tokens // 4096), (64 // tp, 128), bench=True) for tokens in (8192, 32768) for tp in (1, 2, 4, 8)),
    PadCase((1,), (1,)),
    PadCase((17,), (3, 40)),
    PadCase((5, 0, 11, 1), (3, 5)),  # an empty document
    PadCase((0, 0, 7, 0), ()),  # the first and the last ones empty; numbers without a trailing axis
    PadCase((37, 2, 61), (2, 128)),
    PadCase((3, 4), (2100,)),  # wider than a program
    PadCase((0,), (4,)),
]
