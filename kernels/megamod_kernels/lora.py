"""A frozen linear and the adapters on it, at once: LoRA (Hu et al. 2021, arXiv:2106.09685), also over fused projections.

With ⊙ the element-wise product, keep the dropout's `[T, C]` mask of zeros and ones, and columns(i) = row_i … row_i + F_i - 1:

    x̃ = keep ⊙ x / (1 - p)                       or x, without dropout
    S_i = x̃ A_iᵀ                                  lora_down: [T, R], the parts side by side
    y = x Wᵀ + bias;  y[:, columns(i)] += s_i S_i B_iᵀ                  lora_up

    dS_i = s_i dy[:, columns(i)] B_i        dB_i = s_i dy[:, columns(i)]ᵀ S_i
    dA_i = dS_iᵀ x̃                          dx = dy W + keep ⊙ (Σ_i dS_i A_i) / (1 - p)

Down and up are two functions too, because under sequence parallelism only S, R numbers a token, is gathered between them. W and bias
are frozen: they get no gradient, so the backward of y = x Wᵀ needs no x. What is kept is x for dA, S for dB, and the weights: a W in
4 bits as it is, made dense once in the forward and once in the backward.

Shapes: T tokens, C input features, F output features of the linear, F_i of a part, R_i its rank, R = Σ R_i.

The mask is a pure function of (seed, token, channel), numbered over all ranks and all of the features, so that no split of either
changes it; it is computed where it is needed and never stored. Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) is
asked for (token, channel // 8, 0, 0) with the seed's low and high 32 bits as its key. Its four words are eight numbers of 16 bits, of
each word the low half first; number channel % 8 decides: x is kept where it is at least round(65536 p). p below is that number /
65536, so that x̃'s expectation is x. One x has one mask: all parts of a fused projection see the same x̃.

On a GPU y and dx are each one product with two sums (after LoRAFusion, Zhu et al. 2025, arXiv:2510.00206): the kernel begins with the
R-wide product, masks it if it must, and goes on with the C- or F-wide one in the same registers. y and dx are written once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # not on every platform that torch runs on; the addmm path does without
    triton = None

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox4x32's
WEYL = (0x9E3779B9, 0xBB67AE85)  # what each round adds to the key
ROUNDS = 10
WORD = 0xFFFFFFFF
CPU_COUNTERS = 1 << 15  # Philox counters that a core makes at a time: their int64 tensors stay in its cache
GPU_COUNTERS = 1 << 24


class Compact:
    """A frozen weight that is kept otherwise than it is multiplied, in fewer bits or in slices, and made dense each time that it is.

    Attributes:
        shape, dtype, device: of the dense weight.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def dense(self) -> Tensor:
        """`[F, C]`, contiguous; good until the next compact weight is made dense, which may take the same memory."""
        raise NotImplementedError


Weight = Tensor | Compact  # frozen, [F, C]


class Part(NamedTuple):
    """What an adapter adds to a stretch of a frozen linear's output."""

    a: Tensor  # [R_i, C]
    b: Tensor  # [F_i, R_i]
    row: int  # first of the F output features that it adds to
    scale: float


@dataclass(frozen=True)
class Dropout:
    """Which numbers of x the adapters do not see; the frozen linear sees all of them."""

    p: float
    seed: int  # 64 bits
    token: int = 0  # the global number of x's first row
    channel: int = 0  # the global number of x's first column

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 65536:
            raise ValueError(f"dropout with p = {self.p}: 0 or more and less than 1 - 2^-17 was expected")
        if not (0 <= self.seed < 1 << 64 and 0 <= self.token < 1 << 31 and 0 <= self.channel < 1 << 31):
            raise ValueError(f"dropout's seed {self.seed}, token {self.token}, channel {self.channel}: 64, 31 and 31 bits were expected")

    @property
    def threshold(self) -> int:
        """Of the 65536 numbers those below it drop."""
        return round(self.p * 65536)

    @property
    def scale(self) -> float:
        """1 / (1 - p), with the p that 16 bits can express."""
        return 65536 / (65536 - self.threshold)

    @property
    def key(self) -> tuple[int, int]:
        return self.seed & WORD, self.seed >> 32


# ---- references: the only definition of correct


def philox_ref(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words for each counter; words are int64 of 0 … 2^32 - 1, of shapes that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # Products wrap at 2^64, as int64 as well: their bits are right, and >> brings in copies of the sign for the mask to remove.
        # c1 and c3, the low words, may keep bits above the 32nd till the next mask.
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((right >> 32) ^ c1 ^ k0).bitwise_and_(WORD), right
        c2, c3 = ((left >> 32) ^ c3 ^ k1).bitwise_and_(WORD), left
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def dropout_keep(dropout: Dropout, tokens: int, channels: int, device: torch.device) -> Tensor:
    """The mask, `[T, C]` bool: which numbers of x the adapters see."""
    keep = torch.empty(tokens, channels, dtype=torch.bool, device=device)
    first = dropout.channel // 8
    group = torch.arange(first, (dropout.channel + channels + 7) // 8, device=device)  # [G]
    skipped = dropout.channel - 8 * first
    zero = group.new_zeros(1, 1)
    counters = CPU_COUNTERS * torch.get_num_threads() if device.type == "cpu" else GPU_COUNTERS
    step = max(1, counters // max(1, len(group)))
    for start in range(0, tokens, step):
        token = torch.arange(start, min(start + step, tokens), device=device) + dropout.token
        words = philox_ref((token[:, None], group[None], zero, zero), dropout.key)  # each [T', G]
        numbers = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        some = torch.stack([number >= dropout.threshold for number in numbers], -1)  # [T', G, 8]
        keep[start : start + len(token)] = some.flatten(1)[:, skipped : skipped + channels]
    return keep


def lora_down_ref(x: Tensor, parts: Sequence[Part], dropout: Dropout | None = None) -> Tensor:
    """x `[T, C]` → S `[T, R]`."""
    if dropout is not None:
        keep = dropout_keep(dropout, x.shape[:-1].numel(), x.shape[-1], x.device).view(x.shape)
        x = torch.where(keep, x, 0) * dropout.scale
    return torch.cat([x @ part.a.T for part in parts], -1)


def lora_up_ref(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, parts: Sequence[Part]) -> Tensor:
    """x `[T, C]` and S `[T, R]` → y `[T, F]`."""
    y = F.linear(x, weight, bias)
    for s, part in zip(down.split([len(part.a) for part in parts], -1), parts, strict=True):
        after = len(weight) - part.row - len(part.b)
        y = y + F.pad(s @ part.b.T * part.scale, (part.row, after))
    return y


def lora_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], dropout: Dropout | None = None) -> Tensor:
    """x `[T, C]` → y `[T, F]`."""
    return lora_up_ref(x, weight, bias, lora_down_ref(x, parts, dropout), parts)


# ---- kernels

if triton is not None:

    @triton.jit
    def _keep(token, group, key_low, key_high, threshold, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
        """The mask of `token` and the next ones, and of the 8 channels of `group` and the next ones: [TOKENS, CHANNELS]."""
        tokens = (token + tl.arange(0, TOKENS))[:, None]
        groups = (group + tl.arange(0, CHANNELS // 8))[None, :]
        tokens, groups = tl.broadcast(tokens.to(tl.uint32, bitcast=True), groups.to(tl.uint32, bitcast=True))  # [TOKENS, CHANNELS/8]
        zeros = tl.zeros_like(groups)
        low, high = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
        w0, w1, w2, w3 = tl.philox_impl(tokens, groups, zeros, zeros, low, high)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [TOKENS, CHANNELS/2]: w0, w1, w2, w3
        return tl.interleave((words & 0xFFFF) >= threshold.to(tl.uint32), (words >> 16) >= threshold.to(tl.uint32))

    def _shape_tiles(args: dict[str, Any]) -> None:
        """A descriptor's tile is part of it: each candidate of the autotuner sets its own."""
        m, n, k, r = (args[f"BLOCK_{letter}"] for letter in "MNKR")
        args["x"].block_shape, args["s"].block_shape, args["out"].block_shape = [m, k], [m, r], [m, n]
        args["w"].block_shape, args["b"].block_shape = ([n, k], [n, r]) if args["FORWARD"] else ([k, n], [r, n])

    def _tile(m: int, n: int, k: int, warps: int, stages: int, group: int = 8) -> Any:
        sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group}
        return triton.Config(sizes, num_warps=warps, num_stages=stages, pre_hook=_shape_tiles)

    # Of the first three one fills a processor with its accumulator and stages; of the others two fit, to hide each other's loads and
    # stores. All take 64 of the inner dimension at a time: which one was the fastest is not meant to show in a sum's order.
    TILES = [_tile(128, 256, 64, 8, stages) for stages in (3, 4)] + [_tile(256, 128, 64, 8, 3)]
    TILES += [_tile(128, 128, 64, warps, 3) for warps in (4, 8)]
    if triton.knobs.runtime.interpret:
        TILES = [_tile(16, 32, 16, 4, 1, group=2)]  # nothing to tune, and small shapes have several tiles, and groups of them

    @triton.autotune(TILES, key=["N", "K", "FORWARD", "MASKED", "BIASED"])
    @triton.jit(do_not_specialize=["token", "group", "key_low", "key_high", "threshold", "scale"])
    def _product_kernel(  # type: ignore[no-untyped-def]
        x, w, s, b, bias, out, table, M, N, K, R,
        token, group, key_low, key_high, threshold, scale,
        FORWARD: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, SPANS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    ):  # fmt: skip
        """out [M, N] = keep ⊙ (s b) scale + x w + bias: a program makes [BLOCK_M, BLOCK_N] of it, in fp32.

        x [M, K], s [M, R]; FORWARD w [N, K] and b [N, R], else w [K, N] and b [R, N]. `table` says for stretches of the N columns which
        of the R are theirs; b has zeros where a stretch does not fill a program's columns. Descriptors read zeros outside their tensors.
        """
        # Programs of GROUP_M rows of tiles come together: what they read of x and w is still in the cache.
        columns = tl.cdiv(N, BLOCK_N)
        first = tl.program_id(0) // (GROUP_M * columns) * GROUP_M
        rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
        here = tl.program_id(0) % (GROUP_M * columns)
        m = (first + here % rows) * BLOCK_M
        n = here // rows * BLOCK_N

        low = R
        high = 0
        for i in tl.static_range(SPANS):
            if (tl.load(table + 4 * i) < n + BLOCK_N) & (tl.load(table + 4 * i + 1) > n):
                low = tl.minimum(low, tl.load(table + 4 * i + 2))
                high = tl.maximum(high, tl.load(table + 4 * i + 3))
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in range(low, high, BLOCK_R):
            right = b.load([n, r]).T if FORWARD else b.load([r, n])
            total = tl.dot(s.load([m, r]), right, total)
        if MASKED:  # now, while the other sum is not in it: one set of registers for both
            keep = _keep(token + m, group + n // 8, key_low, key_high, threshold, BLOCK_M, BLOCK_N)
            total = tl.where(keep, total * scale, 0.0)
        for k in range(0, K, BLOCK_K):
            right = w.load([n, k]).T if FORWARD else w.load([k, n])
            total = tl.dot(x.load([m, k]), right, total)
        if BIASED:
            column = n + tl.arange(0, BLOCK_N)
            total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        out.store([m, n], total.to(out.dtype))

    @triton.jit(do_not_specialize=["token", "group", "key_low", "key_high", "threshold", "scale"])
    def _down_kernel(  # type: ignore[no-untyped-def]
        x, a, out, T, C, R, share,
        token, group, key_low, key_high, threshold, scale,
        BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """S = x̃ Aᵀ: a program makes [BLOCK_T, BLOCK_R] of its sum over `share` channels; out [shares, T, R] in fp32."""
        t, r = tl.program_id(0) * BLOCK_T, tl.program_id(2) * BLOCK_R
        first = tl.program_id(1) * share
        total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for c in range(first, tl.minimum(first + share, C), BLOCK_C):
            keep = _keep(token + t, group + c // 8, key_low, key_high, threshold, BLOCK_T, BLOCK_C)
            total = tl.dot(tl.where(keep, x.load([t, c]), 0.0), a.load([r, c]).T, total)
        row = t + tl.arange(0, BLOCK_T)[:, None]
        column = r + tl.arange(0, BLOCK_R)[None, :]
        there = out + tl.program_id(1).to(tl.int64) * T * R + row * R + column
        tl.store(there, total * scale, mask=(row < T) & (column < R))

    @triton.jit(do_not_specialize=["token", "group", "key_low", "key_high", "threshold", "scale"])
    def _d_a_kernel(  # type: ignore[no-untyped-def]
        ds, x, out, T, C, R, share,
        token, group, key_low, key_high, threshold, scale,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        """dA = dSᵀ x̃: a program makes [BLOCK_R, BLOCK_C] of its sum over `share` tokens; out [shares, R, C] in fp32."""
        c, r = tl.program_id(0) * BLOCK_C, tl.program_id(2) * BLOCK_R
        first = tl.program_id(1) * share
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for t in range(first, tl.minimum(first + share, T), BLOCK_T):
            keep = _keep(token + t, group + c // 8, key_low, key_high, threshold, BLOCK_T, BLOCK_C)
            total = tl.dot(ds.load([t, r]).T, tl.where(keep, x.load([t, c]), 0.0), total)
        row = r + tl.arange(0, BLOCK_R)[:, None]
        column = c + tl.arange(0, BLOCK_C)[None, :]
        there = out + (tl.program_id(1).to(tl.int64) * R + row) * C + column
        tl.store(there, total * scale, mask=(row < R) & (column < C))

    # Under TRITON_INTERPRET=1, read when the kernels are decorated, they run on CPU tensors too.
    INTERPRETED = not isinstance(_down_kernel, triton.JITFunction)


def path(weight: Weight) -> str:
    """Who multiplies by a frozen `weight` `[F, C]`, for a run's log: "triton", the fused kernels, or "addmm", torch's products.

    The kernels read pieces of 16 bytes: F and C must be multiples of 8, and the weight contiguous.
    """
    if isinstance(weight, Compact):
        fits = _runs(weight.device, weight.dtype) and weight.shape.numel() > 0 and weight.shape[1] % 8 == 0
    else:
        fits = _fits(weight, weight)
    return "triton" if fits and weight.shape[0] % 8 == 0 else "addmm"


def _runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for this device and dtype."""
    if triton is None:
        return False
    if INTERPRETED:  # bf16 is two bytes to triton's interpreter, and a product of theirs no number
        return dtype in (torch.float32, torch.float16)
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)


def _fits(x: Tensor, *others: Tensor, dropout: Dropout | None = None) -> bool:
    """Whether the kernels can read x, others and the mask; others as they are, x may be copied."""
    return (
        _runs(x.device, x.dtype)
        and all(t.numel() > 0 and t.shape[-1] % 8 == 0 for t in (x, *others))
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in others)
        and (dropout is None or dropout.channel % 8 == 0)
    )


def _described(x: Tensor, rows: int = 16, columns: int = 16) -> Any:
    """A descriptor that reads and writes tiles of x. The autotuner sets the tile where it chooses it."""
    return TensorDescriptor.from_tensor(x, [rows, columns])


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _even(x: Tensor, rows: bool = False) -> Tensor:
    """x with zeros up to a multiple of 16 columns, or rows: the hardware sums 16 ranks at a time."""
    more = -x.shape[0 if rows else 1] % 16
    return _contiguous(F.pad(x, (0, 0, 0, more) if rows else (0, more)) if more else x)


def _mask_numbers(dropout: Dropout | None) -> tuple[int, int, int, int, int, float]:
    """token, group, key_low, key_high, threshold, scale, as the kernels take them: words with a sign, so that all have one type."""
    if dropout is None:
        return 0, 0, 0, 0, 0, 1.0
    low, high = (word - (word >> 31 << 32) for word in dropout.key)
    return dropout.token, dropout.channel // 8, low, high, dropout.threshold, dropout.scale


@lru_cache(maxsize=1024)
def _table(stretches: tuple[tuple[int, int, int, int], ...], device: torch.device) -> Tensor:
    return torch.tensor(stretches, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _share(total: int, block: int, tiles: int, device: torch.device) -> int:
    """How much of a sum a program takes, in whole blocks, so that there are about four programs a processor."""
    shares = triton.cdiv(4 * _processors(device), tiles)
    return int(triton.cdiv(triton.cdiv(total, block), shares) * block)


def _product(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, stretches: tuple[tuple[int, int, int, int], ...],
    dropout: Dropout | None, inner: int, forward: bool,
) -> Tensor:  # fmt: skip
    """keep ⊙ (s b) / (1 - p) + x w + bias: `[T, F]`, w and b as they are, if forward, else `[T, C]`, w and b transposed.

    `inner` is the x w's inner dimension; with 0 there is no such product, and x and w only have to be there.
    """
    rows, rank = s.shape
    columns = len(b) if forward else b.shape[1]
    out = s.new_empty(rows, columns)
    table = _table(tuple((n, end, low // 16 * 16, high) for n, end, low, high in stretches), s.device)
    with torch.cuda.device_of(s):
        _product_kernel[lambda sizes: (triton.cdiv(rows, sizes["BLOCK_M"]) * triton.cdiv(columns, sizes["BLOCK_N"]),)](
            *map(_described, (x, w, s, b)), bias, _described(out), table, rows, columns, inner, rank, *_mask_numbers(dropout),
            FORWARD=forward, MASKED=dropout is not None, BIASED=bias is not None, SPANS=len(table),
            BLOCK_R=16 if INTERPRETED else min(64, triton.next_power_of_2(rank)), enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _masked_down(x: Tensor, a: Tensor, dropout: Dropout) -> Tensor:
    """_down, with the mask made while x is read, once."""
    (tokens, channels), rank = x.shape, len(a)
    block_t, block_c, block_r = (16, 16, 16) if INTERPRETED else (64, 64, min(256, max(16, triton.next_power_of_2(rank))))
    tiles = triton.cdiv(tokens, block_t), triton.cdiv(rank, block_r)
    share = _share(channels, block_c, tiles[0] * tiles[1], x.device)
    sums = x.new_empty(triton.cdiv(channels, share), tokens, rank, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _down_kernel[(tiles[0], len(sums), tiles[1])](
            _described(_contiguous(x), block_t, block_c), _described(_contiguous(a), block_r, block_c), sums,
            tokens, channels, rank, share, *_mask_numbers(dropout),
            BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8 if block_r > 128 else 4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return sums.sum(0).to(x.dtype)


def _masked_d_a(ds: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    """_d_a, with the mask made while x is read, once."""
    (tokens, channels), rank = x.shape, ds.shape[1]
    # Below 64 a Hopper's tensor cores would have no whole tile; above 128 the registers end, and x is read again.
    block_t, block_c, block_r = (16, 16, 16) if INTERPRETED else (64, 128, min(128, max(64, triton.next_power_of_2(rank))))
    tiles = triton.cdiv(channels, block_c), triton.cdiv(rank, block_r)
    share = _share(tokens, block_t, tiles[0] * tiles[1], x.device)
    sums = x.new_empty(triton.cdiv(tokens, share), rank, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _d_a_kernel[(tiles[0], len(sums), tiles[1])](
            _described(_even(ds), block_t, block_r), _described(_contiguous(x), block_t, block_c), sums,
            tokens, channels, rank, share, *_mask_numbers(dropout),
            BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_T=block_t, num_warps=4 if block_r == 64 else 8, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return sums.sum(0).to(x.dtype)


# ---- products: by the kernels where they can, else by torch


def dense(weight: Weight) -> Tensor:
    """`[F, C]`; of a compact weight good until the next one is made dense."""
    return weight.dense() if isinstance(weight, Compact) else weight


class _Span(NamedTuple):
    """Where a part lies: its columns of S and of y, and its scale."""

    s: slice
    y: slice
    scale: float


def _spans(parts: Sequence[Part]) -> tuple[_Span, ...]:
    spans, start = [], 0
    for part in parts:
        features, rank = part.b.shape
        spans.append(_Span(slice(start, start + rank), slice(part.row, part.row + features), part.scale))
        start += rank
    return tuple(spans)


def _stacked(a: Sequence[Tensor]) -> Tensor:
    """A `[R, C]` of all parts: one product reads x once for all of them."""
    return a[0] if len(a) == 1 else torch.cat(tuple(a))


def _mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b, rounded once."""
    return a.new_empty(len(a), b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


def _mask(dropout: Dropout, tokens: int, channels: int, device: torch.device) -> Tensor:
    """The mask as bytes, by which torch multiplies three times as fast as by bools."""
    return dropout_keep(dropout, tokens, channels, device).view(torch.uint8)


def _down(x: Tensor, a: Tensor, dropout: Dropout | None) -> Tensor:
    """S `[T, R]` = x̃ Aᵀ."""
    if dropout is None:
        return x @ a.T
    if _fits(x, dropout=dropout):
        return _masked_down(x, a, dropout)
    return _mm(x * _mask(dropout, len(x), x.shape[1], x.device), a.T, dropout.scale)


def _up(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Sequence[Tensor], spans: Sequence[_Span]) -> Tensor:
    """y `[T, F]` = x Wᵀ + bias, and s_i S_i B_iᵀ added to each part's columns."""
    if _fits(x, weight) and len(weight) % 8 == 0:
        s = _even(s)
        dense = s.new_zeros(len(weight), s.shape[1])  # [F, R]: the parts' B's, scaled, where they belong
        for b_i, span in zip(b, spans, strict=True):
            torch.mul(b_i, span.scale, out=dense[span.y, span.s])
        stretches = tuple((span.y.start, span.y.stop, span.s.start, span.s.stop) for span in spans)
        return _product(_contiguous(x), weight, s, dense, bias, stretches, None, x.shape[1], forward=True)
    y = F.linear(x, weight, bias)
    for b_i, span in zip(b, spans, strict=True):
        y[:, span.y].addmm_(s[:, span.s], b_i.T, alpha=span.scale)
    return y


def _d_down(dy: Tensor, b: Sequence[Tensor], spans: Sequence[_Span]) -> Tensor:
    """dS `[T, R]`, of each part s_i dy_i B_i. It reads dy once where no parts overlap."""
    ds = dy.new_empty(len(dy), sum(b_i.shape[1] for b_i in b))
    for b_i, span in zip(b, spans, strict=True):
        ds[:, span.s].addmm_(dy[:, span.y], b_i, beta=0, alpha=span.scale)
    return ds


def _d_b(dy: Tensor, s: Tensor, span: _Span) -> Tensor:
    """dB_i `[F_i, R_i]` = s_i dy_iᵀ S_i."""
    dy, s = dy[:, span.y], s[:, span.s]
    return _mm(dy.T, s, span.scale)


def _d_a(ds: Tensor, x: Tensor, dropout: Dropout | None, mask: Callable[[], Tensor]) -> Tensor:
    """dA `[R, C]` = dSᵀ x̃."""
    if dropout is None:
        return ds.T @ x
    if _fits(x, dropout=dropout):
        return _masked_d_a(ds, x, dropout)
    return _mm(ds.T, x * mask(), dropout.scale)


def _d_x(dy: Tensor | None, weight: Tensor | None, ds: Tensor, a: Tensor, dropout: Dropout | None, mask: Callable[[], Tensor]) -> Tensor:
    """dx `[T, C]` = dy W + keep ⊙ (dS A) / (1 - p); without dy W for lora_down."""
    if dy is None or weight is None:
        if dropout is None:
            return ds @ a
        if len(ds) and _fits(a, dropout=dropout):
            ds, a = _even(ds), _even(a, rows=True)
            return _product(ds, a, ds, a, None, ((0, a.shape[1], 0, len(a)),), dropout, 0, forward=False)
        return _mm(ds, a, dropout.scale).mul_(mask())
    if _fits(dy, weight, dropout=dropout):
        ds, a = _even(ds), _even(a, rows=True)
        return _product(_contiguous(dy), weight, ds, a, None, ((0, a.shape[1], 0, len(a)),), dropout, dy.shape[1], forward=False)
    dx = dy @ weight
    if dropout is None:
        return dx.addmm_(ds, a)
    return dx.add_((ds @ a).mul_(mask()), alpha=dropout.scale)


# ---- autograd


def _tensor(weight: Weight) -> Tensor | None:
    """What autograd saves of a weight, and checks that nobody has written to."""
    return None if isinstance(weight, Compact) else weight


def _compact(weight: Weight) -> Compact | None:
    return weight if isinstance(weight, Compact) else None


class _Linear(torch.autograd.Function):
    """lora_linear: keeps x, W, S and the adapters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, dropout: Dropout | None, spans: tuple[_Span, ...], *ab: Tensor
    ) -> Tensor:
        a, b = ab[: len(spans)], ab[len(spans) :]
        s = _down(x, _stacked(a), dropout)
        need_a, need_b = ctx.needs_input_grad[5 : 5 + len(a)], ctx.needs_input_grad[5 + len(a) :]
        ctx.save_for_backward(x if any(need_a) else None, _tensor(weight), s if any(need_b) else None, *ab)
        ctx.compact, ctx.dropout, ctx.spans = _compact(weight), dropout, spans
        return _up(x, dense(weight), bias, s, b, spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, plain, s, *ab = ctx.saved_tensors
        n = len(ctx.spans)
        need_x, need_a, need_b = ctx.needs_input_grad[0], ctx.needs_input_grad[5 : 5 + n], ctx.needs_input_grad[5 + n :]
        db = _grads_of_b(dy, s, ctx.spans, need_b)
        if not (need_x or any(need_a)):
            return (*(None for _ in range(5 + n)), *db)
        ds, weight = _d_down(dy, ab[n:], ctx.spans), dense(ctx.compact if plain is None else plain) if need_x else None
        dx, *da = _grads_of_down(x, dy, weight, ds, ab[:n], ctx.dropout, ctx.spans, need_x, need_a)
        return dx, None, None, None, None, *da, *db


class _Down(torch.autograd.Function):
    """lora_down: keeps x and the A's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout | None, spans: tuple[_Span, ...], *a: Tensor) -> Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *a)
        ctx.dropout, ctx.spans = dropout, spans
        return _down(x, _stacked(a), dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
        x, *a = ctx.saved_tensors
        need_x, _, _, *need_a = ctx.needs_input_grad
        dx, *da = _grads_of_down(x, None, None, ds, a, ctx.dropout, ctx.spans, need_x, need_a)
        return dx, None, None, *da


class _Up(torch.autograd.Function):
    """lora_up: keeps W, S and the B's; not x, whose gradient a frozen W alone gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, s: Tensor, spans: tuple[_Span, ...], *b: Tensor) -> Tensor:
        ctx.save_for_backward(_tensor(weight), s if any(ctx.needs_input_grad[5:]) else None, *b)
        ctx.compact, ctx.spans = _compact(weight), spans
        return _up(x, dense(weight), bias, s, b, spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plain, s, *b = ctx.saved_tensors
        need_x, _, _, need_s, _, *need_b = ctx.needs_input_grad
        dx = dy @ dense(ctx.compact if plain is None else plain) if need_x else None
        ds = _d_down(dy, b, ctx.spans) if need_s else None
        return dx, None, None, ds, None, *_grads_of_b(dy, s, ctx.spans, need_b)


class _Frozen(torch.autograd.Function):
    """x Wᵀ + bias, of a compact W: keeps it as it is, where torch would keep what is made of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Compact, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dense(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy @ ctx.weight.dense() if ctx.needs_input_grad[0] else None, None, None


def _frozen(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The linear without adapters."""
    if not isinstance(weight, Compact):
        return F.linear(x, weight, bias)
    y: Tensor = _Frozen.apply(x, weight, bias)
    return y


def _grads_of_b(dy: Tensor, s: Tensor | None, spans: Sequence[_Span], need: Sequence[bool]) -> list[Tensor | None]:
    """Of each part dB_i, or None where it is frozen; S is there if one is not."""
    return [_d_b(dy, s, span) if needed and s is not None else None for span, needed in zip(spans, need, strict=True)]


def _grads_of_down(
    x: Tensor | None, dy: Tensor | None, weight: Tensor | None, ds: Tensor, a: Sequence[Tensor],
    dropout: Dropout | None, spans: Sequence[_Span], need_x: bool, need_a: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """dx, if needed, and of each part dA_i, or None where it is frozen; x is there if one is not."""
    stacked = _stacked(a)

    @cache
    def mask() -> Tensor:  # both gradients may ask for it
        assert dropout is not None
        return _mask(dropout, len(ds), stacked.shape[1], ds.device)

    dx = _d_x(dy, weight, ds, stacked, dropout, mask) if need_x else None
    wanted = [span.s for span, needed in zip(spans, need_a, strict=True) if needed]
    if x is None or not wanted:
        return [dx, *(None for _ in need_a)]
    columns = ds if len(wanted) == len(spans) else torch.cat([ds[:, some] for some in wanted], 1)
    da = iter(_d_a(columns, x, dropout, mask).split([some.stop - some.start for some in wanted]))
    return [dx, *(next(da) if needed else None for needed in need_a)]


# ---- public functions


def lora_linear(x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[Part], dropout: Dropout | None = None) -> Tensor:
    """A frozen linear with its adapters: `lora_up(x, weight, bias, lora_down(x, parts, dropout), parts)`, in one.

    Args:
        x: `[..., C]`; its leading axes are tokens.
        weight: `[F, C]`, frozen; or compact, and then made dense where it is multiplied with, forward and backward.
        bias: `[F]`, frozen, or None.
        parts: what is added, and where. Parts may overlap, and columns may be without any. All in x's dtype. Gradients go to x and
            to the a's and b's that ask for one.
        dropout: None is the same as p = 0: evaluation.

    Returns:
        y, `[..., F]`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a weight or bias that asks for a gradient.
    """
    _check(x, parts, weight.shape[0])
    _check_frozen(x, weight, bias)
    if not parts:
        return _frozen(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])  # [T, C]
    ab = (*(part.a for part in parts), *(part.b for part in parts))
    y: Tensor = _Linear.apply(rows, weight, bias, _real(dropout), _spans(parts), *ab)
    return y.view(*x.shape[:-1], weight.shape[0])


def lora_down(x: Tensor, parts: Sequence[Part], dropout: Dropout | None = None) -> Tensor:
    """S, `[..., R]`, R = Σ R_i, its columns in the order of parts; arguments and errors as lora_linear's."""
    _check(x, parts)
    if not parts:
        return x.new_empty(*x.shape[:-1], 0)
    rows = x.reshape(-1, x.shape[-1])  # [T, C]
    s: Tensor = _Down.apply(rows, _real(dropout), _spans(parts), *(part.a for part in parts))
    return s.view(*x.shape[:-1], s.shape[-1])


def lora_up(x: Tensor, weight: Weight, bias: Tensor | None, down: Tensor, parts: Sequence[Part]) -> Tensor:
    """y, `[..., F]`, of x `[..., C]` and lora_down's S `[..., R]`, of the same tokens; arguments and errors as lora_linear's."""
    _check(x, parts, weight.shape[0])
    _check_frozen(x, weight, bias)
    if list(down.shape) != [*x.shape[:-1], sum(len(part.a) for part in parts)] or down.dtype != x.dtype:
        raise ValueError(f"down {down.dtype} {list(down.shape)} does not fit x {x.dtype} {list(x.shape)} and parts of {_ranks(parts)}")
    if not parts:
        return _frozen(x, weight, bias)
    rows, s = x.reshape(-1, x.shape[-1]), down.reshape(-1, down.shape[-1])  # [T, C], [T, R]
    y: Tensor = _Up.apply(rows, weight, bias, s, _spans(parts), *(part.b for part in parts))
    return y.view(*x.shape[:-1], weight.shape[0])


def _real(dropout: Dropout | None) -> Dropout | None:
    return dropout if dropout is not None and dropout.threshold else None


def _ranks(parts: Sequence[Part]) -> str:
    return "ranks " + ", ".join(str(len(part.a)) for part in parts)


def _check(x: Tensor, parts: Sequence[Part], features: int | None = None) -> None:
    if x.dim() < 2:
        raise ValueError(f"x {list(x.shape)}: [T, C] was expected")
    for i, (a, b, row, _) in enumerate(parts):
        if a.dim() != 2 or b.dim() != 2 or not len(a) == b.shape[1] > 0 or a.shape[1] != x.shape[-1]:
            raise ValueError(f"part {i} with a {list(a.shape)}, b {list(b.shape)} on x {list(x.shape)}: [R, C], [F', R] were expected")
        if row < 0 or (features is not None and row + len(b) > features):
            raise ValueError(f"part {i} adds to features {row} … {row + len(b) - 1}, which are not all there")
        for name, t in (("a", a), ("b", b)):
            if t.dtype != x.dtype or t.device != x.device:
                raise ValueError(f"part {i} with {name} {t.dtype} on {t.device}: x's {x.dtype} on {x.device} was expected")


def _check_frozen(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[-1] or (bias is not None and list(bias.shape) != [weight.shape[0]]):
        found = f"weight {list(weight.shape)}, bias {None if bias is None else list(bias.shape)}"
        raise ValueError(f"{found} on x {list(x.shape)}: [F, C] and [F] were expected")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if isinstance(t, Tensor) and t.requires_grad:
            raise ValueError(f"{name} asks for a gradient: it is frozen here and gets none")
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f"{name} {t.dtype} on {t.device}: x's {x.dtype} on {x.device} was expected")
