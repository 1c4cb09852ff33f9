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


@dataclass(frozen=True)
class LoraCase:
    """x `[T, C]`, a frozen weight `[F, C]`, and adapters of (first feature, features, rank, scale)."""

    label: str
    tokens: int
    channels: int
    features: int
    parts: tuple[tuple[int, int, int, float], ...]
    bench: bool = False

    @property
    def name(self) -> str:
        ranks = "+".join(str(rank) for _, _, rank, _ in self.parts)
        return f"{self.label} T{self.tokens} C{self.channels} F{self.features} R{ranks}"

    @property
    def stacked(self) -> bool:
        """Whether each output feature has one part, in their order, as where they are linears of their own."""
        ends = [0, *(row + features for row, features, _, _ in self.parts)]
        return ends[-1] == self.features and ends[:-1] == [row for row, _, _, _ in self.parts]

    @property
    def frozen(self) -> int:
        """Multiplications and additions of x Wᵀ, and as many again of dy W."""
        return 2 * self.tokens * self.channels * self.features

    @property
    def adapters(self) -> int:
        """Those of down and up; their gradients take twice as many."""
        return 2 * self.tokens * sum(rank * (self.channels + features) for _, features, rank, _ in self.parts)


@dataclass(frozen=True)
class Nf4Case:
    """The rectangle of `size` at `offset` of a matrix of `shape`."""

    label: str
    shape: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]
    blocksize: int = 64
    double: bool = True
    bench: bool = False

    @property
    def name(self) -> str:
        return f"{self.label} {self.size[0]}x{self.size[1]} of {self.shape[0]}x{self.shape[1]} B{self.blocksize}{' double' * self.double}"

    @property
    def numbers(self) -> int:
        return self.size[0] * self.size[1]


@dataclass(frozen=True)
class RmsnormCase:
    """x `[T, C]`, or with heads `[T, H, C]`, of a fused `[T, H + 2, C]`."""

    tokens: int
    channels: int
    heads: int = 0
    bench: bool = False

    @property
    def name(self) -> str:
        return f"T{self.tokens} {f'H{self.heads} ' if self.heads else ''}C{self.channels}"

    @property
    def numbers(self) -> int:
        return self.tokens * max(1, self.heads) * self.channels


@dataclass(frozen=True)
class SwigluCase:
    """gate_up `[T, 2F]`."""

    tokens: int
    ffn: int
    bench: bool = False

    @property
    def name(self) -> str:
        return f"T{self.tokens} F{self.ffn}"

    @property
    def numbers(self) -> int:
        """In y."""
        return self.tokens * self.ffn


def _nf4_72b(tp: int) -> list[Nf4Case]:
    """The last rank's part of the three largest kinds of weights: cut by rows, by columns, and by columns inside blocks."""
    rows, columns, inside = (29568 // tp, 8192), (8192, 8192 // tp), (8192, 29568 // tp)
    return [
        Nf4Case(f"gate_proj tp{tp}", (29568, 8192), (29568 - rows[0], 0), rows, bench=True),
        Nf4Case(f"o_proj tp{tp}", (8192, 8192), (0, 8192 - columns[1]), columns, bench=True),
        Nf4Case(f"down_proj tp{tp}", (8192, 29568), (0, 29568 - inside[1]), inside, bench=True),
    ]


def _stacked(rows: tuple[int, ...], rank: int, scale: float) -> tuple[tuple[int, int, int, float], ...]:
    return tuple((end - n, n, rank, scale) for n, end in zip(rows, accumulate(rows), strict=True))


def _lora_72b(tp: int) -> list[LoraCase]:
    """One layer's four linears: their inputs' channels where they are split by rows, else their features, divided by tp."""
    q, kv, ffn, hidden = 8192 // tp, 1024 // tp, 29568 // tp, 8192
    linears = ("qkv", hidden, (q, kv, kv)), ("proj", q, (hidden,)), ("fc1", hidden, (ffn, ffn)), ("fc2", ffn, (hidden,))
    return [LoraCase(f"{name} tp{tp}", 8192, channels, sum(rows), _stacked(rows, 64, 2.0), bench=True) for name, channels, rows in linears]


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
LORA = [
    *(case for tp in (1, 2, 4, 8) for case in _lora_72b(tp)),
    LoraCase("one", 33, 40, 72, ((0, 72, 16, 2.0),)),
    LoraCase("odd rank", 17, 24, 40, ((0, 40, 3, 0.3),)),
    LoraCase("high rank", 20, 48, 56, ((0, 56, 64, 1.0),)),
    LoraCase("qkv", 33, 40, 88, _stacked((64, 16, 8), 10, 2.0)),
    LoraCase("overlap", 18, 32, 72, ((25, 20, 10, -1.0), (0, 30, 3, 2.0), (5, 10, 2, 0.3))),  # nor in the order of their rows
    LoraCase("same rows", 9, 16, 40, ((0, 40, 8, 1.5), (0, 40, 8, -1.5))),
    LoraCase("gaps", 1, 16, 104, ((8, 8, 4, 1.0), (90, 5, 4, 1.0))),  # columns without a part, and whole tiles
    LoraCase("none", 0, 16, 24, ((0, 24, 4, 2.0),)),
    LoraCase("odd sizes", 17, 37, 41, ((3, 30, 5, 2.0),)),  # no rows of 16 bytes
]
NF4 = [
    *(case for tp in (1, 2, 4, 8) for case in _nf4_72b(tp)),
    Nf4Case("whole", (6, 128), (0, 0), (6, 128)),
    Nf4Case("rows", (9, 96), (3, 0), (4, 96), 32, double=False),
    Nf4Case("columns", (5, 256), (0, 64), (5, 128)),
    Nf4Case("inside blocks", (5, 320), (0, 96), (5, 160), 128),  # pieces of 16 bytes
    Nf4Case("inside blocks, uneven", (5, 320), (0, 48), (5, 77)),
    Nf4Case("other phases", (7, 75), (1, 4), (6, 50), 32),
    Nf4Case("odd", (3, 37), (0, 0), (3, 37), double=False),  # the last block is not full, the last byte has one number
    Nf4Case("a last block", (40, 120), (0, 0), (40, 120), 4096),
    Nf4Case("many blocks", (300, 64), (100, 0), (200, 64), 32),  # of several nested ones
    Nf4Case("none", (4, 64), (2, 0), (0, 64)),
]
# Sequence parallelism leaves a rank 1/tp of the tokens, tensor parallelism 1/tp of the heads and of ffn.
RMSNORM = [
    *(RmsnormCase(8192 // tp, 8192, bench=True) for tp in (1, 2, 4, 8)),
    *(RmsnormCase(8192, 128, 64 // tp, bench=True) for tp in (1, 8)),  # q's heads, in the families that normalise them
    RmsnormCase(1, 1),
    RmsnormCase(17, 40),
    RmsnormCase(700, 64),  # rows enough for a program to have several tiles
    RmsnormCase(33, 128, 3),
    RmsnormCase(5, 37, 2),  # no rows of 16 bytes
    RmsnormCase(9, 4100),  # a row is more than a tile
    RmsnormCase(0, 16),
]
SWIGLU = [
    *(SwigluCase(8192, 29568 // tp, bench=True) for tp in (1, 2, 4, 8)),
    SwigluCase(1, 1),
    SwigluCase(17, 48),
    SwigluCase(5, 231),  # 29568 / 128: odd, up begins nowhere even
    SwigluCase(3, 4100),  # a token is more than a program, and the last one is not full
    SwigluCase(0, 16),
]
