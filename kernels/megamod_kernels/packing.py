"""What packed rows ask of memory: rotary embedding of q and k at once, and the way between packed and padded.

RoPE (Su et al. 2021, RoFormer, arXiv:2104.09864), its pairs as Hugging Face has them, i and i + D/2. With θ the angle of token t's
position in pair i, for every head h of q and of k alike:

    out[t, h, i]       = x[t, h, i] · cos θ - x[t, h, i + D/2] · sin θ
    out[t, h, i + D/2] = x[t, h, i + D/2] · cos θ + x[t, h, i] · sin θ          i < D/2

It is a rotation, so its transpose, the backward, is its inverse: the same with -sin. Padding and its way back, with u the `[S+1]`
document borders (cu_seqlens): 0, then where each document ends:

    padded[s, l] = x[u[s] + l]   where u[s] + l < u[s+1], else the filler      s < S, l < L
    x[u[s] + l]  = padded[s, l]  where l < L and u[s] + l < u[s+1]; a row of x that no [s, l] names is 0

Each is the other's transpose (with a filler of 0), so each is the other's backward.

Shapes: T packed tokens, S sequences, L rows of the longest one, H query heads, K kv heads, D head dim, C numbers a token.

All three only move memory: each number is read once and written once. Nothing here asks the GPU for a number, so nothing waits for it.
"""

import math
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on; the references do without
    triton = None

ROPE_TILE = 1024  # pairs that a program holds: with 4 warps 8 a thread, one 16-byte load of bf16 from each half
ROPE_HEADS = 8  # heads that share a program's cos and sin; more would leave a GPU idle where tp has left few heads a rank
PAD_TILE = 2048  # numbers that a program copies: 16 a thread


# ---- references: the only definition of correct


def rope_ref(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q `[T, H, D]` and k `[T, K, D]`, turned by their tokens' angles; cos and sin `[T, D/2]`. In cos' dtype; new tensors."""
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, D/2]
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def pad_ref(x: Tensor, cu_seqlens: Tensor, longest: int, value: float = 0.0) -> Tensor:
    """Packed x `[T, ...]` → `[S, L, ...]`, L = `longest`, with `value` after each document's end."""
    sequences = len(cu_seqlens) - 1
    out = x.new_full((sequences * longest + 1, *x.shape[1:]), value)  # the last row takes tokens without a place
    out[_places(cu_seqlens, len(x), longest)] = x
    return out[:-1].view(sequences, longest, *x.shape[1:])  # [S, L, ...]


def unpad_ref(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Padded `[S, L, ...]` → `[T, ...]`, T = `total`; 0 for tokens without a place."""
    rows = padded.flatten(0, 1)  # [S·L, ...]
    rows = torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))
    return rows[_places(cu_seqlens, total, padded.shape[1])]  # [T, ...]


def _places(cu_seqlens: Tensor, total: int, longest: int) -> Tensor:
    """`[T]`: each token's row in `[S·L]`; S·L where it has none, being after the last border or beyond `longest`."""
    sequences = len(cu_seqlens) - 1
    token = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1  # the last border at or before it: empty documents are passed over
    position = token - cu_seqlens[sequence]
    placed = (sequence < sequences) & (position < longest)
    return torch.where(placed, sequence * longest + position, sequences * longest)


# ---- kernels

if triton is not None:

    @triton.jit
    def _rope_heads(x, x_token, x_head, out, out_token, out_head, first, last, token, pair, inside, cos, sin, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
        """Heads first … last - 1 of one tensor, for a program's tokens."""
        for head in range(first, last):
            here = x + token * x_token + head * x_head + pair  # [BLOCK_T, BLOCK_P]
            there = out + token * out_token + head * out_head + pair
            a = tl.load(here, mask=inside, other=0.0).to(cos.dtype)
            b = tl.load(here + HALF, mask=inside, other=0.0).to(cos.dtype)
            # A thread has read both of a pair before it writes either, and no other thread touches the pair: `out` may be `x`.
            tl.store(there, (a * cos - b * sin).to(out.dtype.element_ty), mask=inside)
            tl.store(there + HALF, (b * cos + a * sin).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _rope_kernel(  # type: ignore[no-untyped-def]
        q, k, q_out, k_out, cos_table, sin_table,
        T, H, K, group,
        q_token, q_head, k_token, k_head, q_out_token, q_out_head, k_out_token, k_out_head,
        INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    ):  # fmt: skip
        """A program: BLOCK_T tokens and `group` of the H + K heads. It loads cos and sin once for all of them."""
        token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # 64 bits: T·H·D may exceed 2^31
        pair = tl.arange(0, BLOCK_P)[None, :]
        inside = (token < T) & (pair < HALF)
        at = token * HALF + pair
        cos = tl.load(cos_table + at, mask=inside, other=0.0)  # [BLOCK_T, BLOCK_P]
        sin = tl.load(sin_table + at, mask=inside, other=0.0)
        if INVERSE:
            sin = -sin
        first = tl.program_id(1).to(tl.int64) * group
        last = tl.minimum(first + group, H + K)
        # Heads 0 … H-1 are q's, H … H+K-1 are k's; a group may hold some of both.
        _rope_heads(
            q, q_token, q_head, q_out, q_out_token, q_out_head,
            tl.minimum(first, H), tl.minimum(last, H), token, pair, inside, cos, sin, HALF,
        )  # fmt: skip
        _rope_heads(
            k, k_token, k_head, k_out, k_out_token, k_out_head,
            tl.maximum(first, H) - H, tl.maximum(last, H) - H, token, pair, inside, cos, sin, HALF,
        )  # fmt: skip

    @triton.jit
    def _pad_kernel(  # type: ignore[no-untyped-def]
        x, out, borders, T, L, C, x_token, blocks,
        VALUE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """A program: BLOCK_R rows of one padded sequence, BLOCK_C columns. `blocks` programs share a sequence."""
        sequence = (tl.program_id(0) // blocks).to(tl.int64)
        row = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        token = tl.load(borders + sequence).to(tl.int64) + row
        there = (row < L) & (column < C)
        inside = there & (token < tl.load(borders + sequence + 1)) & (token < T)
        values = tl.load(x + token * x_token + column, mask=inside, other=0)  # [BLOCK_R, BLOCK_C]
        values = tl.where(inside, values, tl.full((BLOCK_R, BLOCK_C), VALUE, x.dtype.element_ty))
        tl.store(out + (sequence * L + row) * C + column, values, mask=there)

    @triton.jit
    def _unpad_kernel(  # type: ignore[no-untyped-def]
        padded, out, borders, T, S, L, C, p_sequence, p_row, steps,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """A program: BLOCK_R packed tokens, whatever their documents, BLOCK_C columns."""
        token = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        # The token's document by bisection: low becomes the last of the S + 1 borders that is at or before it.
        low = tl.zeros((BLOCK_R,), tl.int32)
        high = low + S
        for _ in range(steps):
            middle = (low + high + 1) // 2
            before = tl.load(borders + middle) <= token
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        position = token - tl.load(borders + low)
        placed = (token < T) & (low < S) & (position < L)
        start = low.to(tl.int64) * p_sequence + position.to(tl.int64) * p_row
        values = tl.load(padded + start[:, None] + column, mask=placed[:, None] & (column < C), other=0)  # [BLOCK_R, BLOCK_C]
        there = (token < T)[:, None] & (column < C)
        tl.store(out + token.to(tl.int64)[:, None] * C + column, values, mask=there)

    # Under TRITON_INTERPRET=1, read when the kernels are decorated, they run on CPU tensors too.
    INTERPRETED = not isinstance(_rope_kernel, triton.JITFunction)


def fused(x: Tensor) -> bool:
    """Whether a kernel, and not the reference, takes `x`."""
    return triton is not None and (x.is_cuda or INTERPRETED)


def _rope(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Turn q and k into q_out and k_out, which may be q and k; their last axis is contiguous. One launch."""
    tokens, heads, dim = q.shape
    kv_heads, half = k.shape[1], dim // 2
    if not fused(q):
        turned = rope_ref(q, k, cos, -sin if inverse else sin)
        for out, new in zip((q_out, k_out), turned, strict=True):
            out.data.copy_(new)  # as the kernel writes: unseen by autograd, whom _Rope tells
        return
    if not (q.numel() or k.numel()):
        return
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    block_p = triton.next_power_of_2(half)
    block_t = max(1, ROPE_TILE // block_p)
    groups = triton.cdiv(heads + kv_heads, ROPE_HEADS)
    with torch.cuda.device_of(q):
        _rope_kernel[(triton.cdiv(tokens, block_t), groups)](
            q, k, q_out, k_out, cos.contiguous(), sin.contiguous(),
            tokens, heads, kv_heads, triton.cdiv(heads + kv_heads, groups),  # groups of equal size, up to one head
            *q.stride()[:2], *k.stride()[:2], *q_out.stride()[:2], *k_out.stride()[:2],
            INVERSE=inverse, HALF=half, BLOCK_T=block_t, BLOCK_P=block_p, num_warps=4,
            enable_fp_fusion=False,  # two roundings, as torch has them, not one: the same bits
        )  # fmt: skip


def _padded(x: Tensor, cu_seqlens: Tensor, longest: int, value: float) -> Tensor:
    """`[T, ...]` → `[S, L, ...]`, by the kernel where there is one."""
    if not fused(x):
        return pad_ref(x, cu_seqlens, longest, value)
    sequences, total = len(cu_seqlens) - 1, len(x)
    out = x.new_empty(sequences, longest, *x.shape[1:])
    if not out.numel():
        return out
    width = math.prod(x.shape[1:])
    rows = _rows_of(x.reshape(total, width))  # a view of a fused tensor stays one
    block_c = min(PAD_TILE, triton.next_power_of_2(width))
    block_r = min(PAD_TILE // block_c, triton.next_power_of_2(longest))
    blocks = triton.cdiv(longest, block_r)
    with torch.cuda.device_of(x):
        _pad_kernel[(sequences * blocks, triton.cdiv(width, block_c))](
            rows, out, cu_seqlens.contiguous(), total, longest, width, rows.stride(0), blocks,
            VALUE=value if x.is_floating_point() else int(value),  # triton makes no integer constant of 0.0
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return out


def _unpadded(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """`[S, L, ...]` → `[T, ...]`, by the kernel where there is one."""
    if not fused(padded):
        return unpad_ref(padded, cu_seqlens, total)
    sequences, longest = padded.shape[:2]
    out = padded.new_empty(total, *padded.shape[2:])
    if not out.numel():
        return out
    width = math.prod(padded.shape[2:])
    rows = _rows_of(padded.reshape(sequences, longest, width))
    block_c = min(PAD_TILE, triton.next_power_of_2(width))
    block_r = min(PAD_TILE // block_c, triton.next_power_of_2(total))
    with torch.cuda.device_of(padded):
        _unpad_kernel[(triton.cdiv(total, block_r), triton.cdiv(width, block_c))](
            rows, out, cu_seqlens.contiguous(), total, sequences, longest, width, *rows.stride()[:2], sequences.bit_length(),
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return out


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- autograd


class _Rope(torch.autograd.Function):
    """Turns, and in the backward turns back: nothing is saved but cos and sin, which all layers share."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, inplace: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        q_out, k_out = (q, k) if inplace else (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        _rope(q, k, q_out, k_out, cos, sin, inverse)
        if inplace:
            ctx.mark_dirty(*(x for x in (q, k) if not x._is_view()))
        # Of views torch lets a Function mark one as dirty, not two, and none that a split made; it would also copy the whole fused
        # tensor's gradient. Unmarked, each is returned as an alias with a history of its own. Its version is not raised either:
        # torch would then refuse the split's third part, v, whose numbers are untouched.
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # Into new memory: autograd may have given the same gradient to another node as well (an addition's two inputs), or one
        # number as all of it (a sum's). The kernel moves no more bytes for it.
        return *_Rope.apply(dq, dk, cos, sin, not ctx.inverse, False), None, None, None, None


class _Pad(torch.autograd.Function):
    """Its backward is _Unpad: gradients of the filler's places go nowhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor, longest: int, value: float) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.total = len(x)
        return _padded(x, cu_seqlens, longest, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return _Unpad.apply(grad, cu_seqlens, ctx.total), None, None, None


class _Unpad(torch.autograd.Function):
    """Its backward is _Pad with a filler of 0: what was not read has no gradient."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.longest = padded.shape[1]
        return _unpadded(padded, cu_seqlens, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return _Pad.apply(grad, cu_seqlens, ctx.longest, 0.0), None, None


# ---- public functions


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = True) -> tuple[Tensor, Tensor]:
    """Turn q and k by their tokens' angles, in their own memory: they are given over, and only what is returned may be used after.

    q and k may be views of one fused `[T, H + 2K, D]`; nothing is copied. Tensors with memory of their own are changed as by any
    in-place operation of torch, which finds who had saved their old numbers. Of views it cannot know: nothing before this may have
    saved them for its own backward. Activation checkpointing does save its inputs: inside a checkpointed function use
    `inplace=False`. Forgotten, megatron-core's (and torch's reentrant one) recomputes from leaves and meets the RuntimeError below;
    torch's other kind turns twice, and nothing tells.

    Args:
        q: `[T, H, D]`, D even.
        k: `[T, K, D]`, in memory of its own: not a view of q.
        cos, sin: `[T, D/2]` of each token's position, fp32 or fp64: the dtype of the computation. They get no gradient.
        inplace: False leaves q and k as they are and returns new tensors.

    Returns:
        q and k, turned, in their dtypes. Gradients are new tensors, never written over one that autograd gave.

    Raises:
        ValueError: shapes or dtypes that do not fit; in place, a last axis that is not contiguous, or an expanded tensor.
        RuntimeError: in place, a leaf that requires a gradient, or a view of one, as from torch's own operations; nothing is written.
    """
    _check_rope(q, k, cos, sin)
    if inplace:
        for name, x in (("q", q), ("k", k)):
            _check_writable(name, x)
    out_q, out_k = _Rope.apply(q, k, cos, sin, False, inplace)
    return out_q, out_k


def pad(x: Tensor, cu_seqlens: Tensor, longest: int, value: float = 0.0) -> Tensor:
    """Packed documents as rows of one length.

    Args:
        x: `[T, ...]`, any dtype.
        cu_seqlens: `[S+1]` int32 on x's device: 0, then where each document ends. Documents may be empty.
        longest: L, at least the longest document's length; what a document has beyond it is left out. On the host: nobody waits.
        value: the filler after each document's end.

    Returns:
        `[S, L, ...]`, contiguous. Its gradient is `unpad`'s result.

    Raises:
        ValueError: borders of another dtype, shape or device, or a negative length.
    """
    _check_borders(x, cu_seqlens, longest)
    out: Tensor = _Pad.apply(x, cu_seqlens, longest, value)
    return out


def unpad(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """The way back: `unpad(pad(x, u, L), u, len(x))` is x.

    Args:
        padded: `[S, L, ...]`, any dtype.
        cu_seqlens: `[S+1]` int32 on its device.
        total: T, which the borders' last says too, but on the GPU.

    Returns:
        `[T, ...]`, contiguous; 0 where a token has no place in `padded`. Its gradient is `pad`'s result with 0 as filler.

    Raises:
        ValueError: as `pad`, or another number of sequences.
    """
    _check_borders(padded, cu_seqlens, total)
    if padded.dim() < 2 or len(padded) != len(cu_seqlens) - 1:
        raise ValueError(f"padded {list(padded.shape)} and {len(cu_seqlens)} borders: [S, L, ...] and S + 1 borders were expected")
    out: Tensor = _Unpad.apply(padded, cu_seqlens, total)
    return out


def _check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or len(q) != len(k) or q.shape[2] != k.shape[2] or q.shape[2] % 2:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)}: [T, H, D] and [T, K, D] with an even D were expected")
    if list(cos.shape) != [len(q), q.shape[2] // 2] or cos.shape != sin.shape:
        raise ValueError(f"cos {list(cos.shape)}, sin {list(sin.shape)}: [T, D/2] = {[len(q), q.shape[2] // 2]} were expected")
    if cos.dtype not in (torch.float32, torch.float64) or sin.dtype != cos.dtype:
        raise ValueError(f"cos {cos.dtype}, sin {sin.dtype}: both float32 or both float64 were expected")
    if not (q.device == k.device == cos.device == sin.device):
        raise ValueError(f"q on {q.device}, k on {k.device}, cos on {cos.device}, sin on {sin.device}: one device was expected")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin get no gradient here: detach them, or use rope_ref")


def _check_writable(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 or any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{name} with strides {x.stride()}: in place its heads must be contiguous and share no memory; use inplace=False")
    # Before anything is written: torch itself looks only after a Function has run, and not at all at a view that is returned unmarked.
    root = x if x._base is None else x._base
    if torch.is_grad_enabled() and root.is_leaf and root.requires_grad:
        raise RuntimeError(f"{name} is or views a leaf Variable that requires grad, used in an in-place operation: use inplace=False")


def _check_borders(x: Tensor, cu_seqlens: Tensor, length: int) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.device != x.device:
        found = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens {found}: int32 [S+1] on {x.device} was expected")
    if length < 0 or not x.dim():
        raise ValueError(f"x {list(x.shape)} and a length of {length}: [T, ...] and a length of 0 or more were expected")
