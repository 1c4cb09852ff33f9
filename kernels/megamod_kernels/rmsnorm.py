"""RMSNorm, and the addition of the residual before it (Zhang & Sennrich 2019, arXiv:1910.07467).

For each row t of C numbers, with ε and a weight w of C:

    s[t]    = x[t] + residual[t]                  rounded to x's dtype; without a residual it is x
    r[t]    = 1 / √(mean over c of s[t, c]² + ε)
    y[t, c] = w[c] · s[t, c] · r[t]

A pre-norm layer needs both y and s, the next residual. With ŝ = s·r, their gradients dy and ds come back as one:

    u       = w · dy
    dx      = ds + r · (u - ŝ · mean over c of u·ŝ)      dresidual is the same
    dw[c]   = Σ over t of dy[t, c] · ŝ[t, c]

Shapes: T rows, here all but the last axis, C numbers a row. Statistics are fp32, of fp64 numbers fp64; y and dx are rounded once.

Kept for the backward: s, and r, one number a row. Both directions only move memory: forward x and the residual are read, s and y written;
backward s, dy and ds are read, dx is written. Each of a fixed number of programs sums dw over its own rows, and the sums are added up
after: no `[T, C]` of fp32 anywhere, no atomics, and on one GPU always the same order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on; the references do without
    triton = None

TILE = 4096  # numbers that a program holds at least: one row, or several short ones
MOST_ROWS = 64
PER_WARP = 512  # numbers that a warp has: 16 a thread
MAX_CHANNELS = 65536  # of a row, which one program holds whole
WARPS = 16  # that a multiprocessor's registers let work on the backward at once, each thread with its part of w and of dw
PIPELINE = 200 * 1024  # bytes of shared memory for rows that are on their way while others are worked on; Hopper has 227 KiB
INTERPRETED_PROGRAMS = 3  # where there is no GPU to ask


# ---- references: the only definition of correct


def rmsnorm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y of x `[..., C]` and weight `[C]`, in at least fp32, rounded once."""
    h = x.to(_work(x))
    return (h * _rstd(h, eps) * weight.to(h.dtype)).to(x.dtype)


def rmsnorm_residual_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and s of x and residual `[..., C]`, weight `[C]`."""
    s = x + residual
    return rmsnorm_ref(s, weight, eps), s


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rstd(h: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)  # [..., 1]


# ---- kernels

if triton is not None:

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        x, residual, weight, s, y, rstd, T, C, inner, x_outer, x_inner,
        EPS: tl.constexpr, ADDS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """A program: BLOCK_T rows, whole. Row t of x is at (t // inner)·x_outer + (t % inner)·x_inner; the others lie close."""
        row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # 64 bits: T·C may exceed 2^31
        column = tl.arange(0, BLOCK_C)[None, :]
        inside = (row < T) & (column < C)
        at = row * C + column  # [BLOCK_T, BLOCK_C]
        work = rstd.dtype.element_ty
        h = tl.load(x + row // inner * x_outer + row % inner * x_inner + column, mask=inside, other=0.0)
        w = tl.load(weight + column, mask=column < C, other=0.0).to(work)
        if ADDS:
            added = h.to(work) + tl.load(residual + at, mask=inside, other=0.0).to(work)
            h = added.to(s.dtype.element_ty)  # the norm is that of the sum as it is kept
            tl.store(s + at, h, mask=inside)
        h = h.to(work)
        r = tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / C + EPS)  # [BLOCK_T, 1]
        tl.store(rstd + row, r, mask=row < T)
        tl.store(y + at, (h * r * w).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(  # type: ignore[no-untyped-def]
        s, weight, rstd, dy, ds, dx, sums, T, C, inner, s_outer, s_inner, tiles, programs,
        ADDS: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """A program: every `programs`-th tile of BLOCK_T rows from its own number on; row p of `sums` is its part of dw."""
        first = tl.program_id(0)
        column = tl.arange(0, BLOCK_C)[None, :]
        work = rstd.dtype.element_ty
        w = tl.load(weight + column, mask=column < C, other=0.0).to(work)
        dw = tl.zeros((BLOCK_T, BLOCK_C), work)
        for tile in tl.range(first, tiles, programs, num_stages=STAGES):
            row = tile * BLOCK_T + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
            inside = (row < T) & (column < C)
            at = row * C + column
            h = tl.load(s + row // inner * s_outer + row % inner * s_inner + column, mask=inside, other=0.0).to(work)
            g = tl.load(dy + at, mask=inside, other=0.0).to(work)
            r = tl.load(rstd + row, mask=row < T, other=0.0)
            h = h * r
            if WEIGHT:
                dw += g * h
            g = g * w
            g = r * (g - h * (tl.sum(g * h, 1, keep_dims=True) / C))
            if ADDS:
                g += tl.load(ds + at, mask=inside, other=0.0).to(work)
            tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)
        if WEIGHT:
            tl.store(sums + first.to(tl.int64) * C + column, tl.sum(dw, 0, keep_dims=True), mask=column < C)

    # Under TRITON_INTERPRET=1, read when the kernels are decorated, they run on CPU tensors too.
    INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


def runs(device: torch.device) -> bool:
    """Whether there is a kernel for tensors on `device`."""
    return triton is not None and (device.type == "cuda" or INTERPRETED)


def _tile(channels: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps."""
    block_c = triton.next_power_of_2(channels)
    block_t = min(MOST_ROWS, max(1, TILE // block_c))
    return {"BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": min(WARPS, max(4, block_t * block_c // PER_WARP))}


def _stages(shape: dict[str, int], itemsize: int) -> int:
    """How many tiles of s, dy and ds a program of the backward has at once: one that it works on, and up to two that are on their way."""
    return 1 + min(2, PIPELINE // (3 * shape["BLOCK_T"] * shape["BLOCK_C"] * itemsize))


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x, or a copy; how many rows lie at one stride, that of these groups, and that inside one. A fused tensor's heads stay a view."""
    if x.dim() == 3 and x.stride(-1) == 1:
        return x, x.shape[1], x.stride(0), x.stride(1)
    return x.contiguous(), 1, x.shape[-1], 0


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, kernel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, s and r `[..., 1]`."""
    if not kernel:
        s = x if residual is None else x + residual
        h = s.to(_work(x))
        r = _rstd(h, eps)
        return (h * r * weight.to(h.dtype)).to(x.dtype), s, r
    channels = x.shape[-1]
    # Of x's shape, not views of rows: what a recomputed function is given must be no view.
    y, r = x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=_work(x))
    s = x if residual is None else x.new_empty(x.shape)
    if not x.numel():
        return y, s, r
    rows, inner, outer_stride, inner_stride = _rows(x)
    shape, total = _tile(channels), x.numel() // channels
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(total, shape["BLOCK_T"]),)](
            rows, rows if residual is None else residual.contiguous(), weight.contiguous(), s, y, r,
            total, channels, inner, outer_stride, inner_stride, EPS=eps, ADDS=residual is not None, **shape,
        )  # fmt: skip
    return y, s, r


def _backward(
    s: Tensor, r: Tensor, weight: Tensor, dy: Tensor, ds: Tensor | None, need_w: bool, kernel: bool
) -> tuple[Tensor, Tensor | None]:
    """dx and, if needed, dw."""
    channels = s.shape[-1]
    if not kernel:
        hat, g = s.to(r.dtype) * r, dy.to(r.dtype)
        dw = (g * hat).reshape(-1, channels).sum(0).to(weight.dtype) if need_w else None
        g = g * weight.to(r.dtype)
        dx = r * (g - hat * (g * hat).mean(-1, keepdim=True))
        return (dx if ds is None else dx + ds.to(r.dtype)).to(s.dtype), dw
    dx = s.new_empty(s.shape)
    if not s.numel():
        return dx, torch.zeros_like(weight) if need_w else None
    rows, inner, outer_stride, inner_stride = _rows(s)
    shape, total = _tile(channels), s.numel() // channels
    tiles = triton.cdiv(total, shape["BLOCK_T"])
    processors = torch.cuda.get_device_properties(s.device).multi_processor_count if s.is_cuda else INTERPRETED_PROGRAMS
    programs = min(tiles, processors * (WARPS // shape["num_warps"]))
    sums = s.new_empty((programs if need_w else 0, channels), dtype=r.dtype)
    dy = dy.contiguous()
    with torch.cuda.device_of(s):
        _backward_kernel[(programs,)](
            rows, weight.contiguous(), r, dy, dy if ds is None else ds.contiguous(), dx, sums,
            total, channels, inner, outer_stride, inner_stride, tiles, programs,
            ADDS=ds is not None, WEIGHT=need_w, STAGES=_stages(shape, s.element_size()), **shape,
        )  # fmt: skip
    return dx, sums.sum(0).to(weight.dtype) if need_w else None


# ---- autograd


class _RMSNorm(torch.autograd.Function):
    """y and s. Without a residual s is x itself, handed on so that what comes back by both ways is added where it is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, kernel: bool) -> tuple[Tensor, Tensor]:
        y, s, r = _forward(x, residual, weight, eps, kernel)
        ctx.save_for_backward(s, r, weight)
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        s, r, weight = ctx.saved_tensors
        dx, dw = ds, None
        if dy is not None:
            dx, dw = _backward(s, r, weight, dy, ds, ctx.needs_input_grad[2], ctx.kernel)
        return dx, dx if ctx.needs_input_grad[1] else None, dw, None, None


# ---- public functions


def rmsnorm(x: Tensor, weight: Tensor, eps: float, *, kernel: bool = True) -> Tensor:
    """y alone.

    Args:
        x: `[..., C]`; heads `[T, H, C]` may be a view of a fused tensor, and are not copied.
        weight: `[C]`, in any dtype; its gradient has it too.
        eps: ε.
        kernel: False: torch's operations, also where there is a kernel; they keep as little.

    Returns:
        y, `[..., C]`, in x's dtype. It can be differentiated once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    y, _ = _normed(x, None, weight, eps, kernel)
    return y


def rmsnorm_residual(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, kernel: bool = True) -> tuple[Tensor, Tensor]:
    """y and s, the sum that y is the norm of: one reading and writing of each, and one of the gradients that come back by both.

    Args:
        x: `[..., C]`.
        residual: `[..., C]`, or None: nothing is added, and s is x. Whoever uses this s and not x saves autograd an addition.
        weight, eps, kernel: as rmsnorm's.

    Returns:
        y and s, both `[..., C]` and in x's dtype. They can be differentiated once.

    Raises:
        ValueError: as rmsnorm, or a residual unlike x.
    """
    return _normed(x, residual, weight, eps, kernel)


def _normed(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, kernel: bool) -> tuple[Tensor, Tensor]:
    if not x.dim() or list(weight.shape) != [x.shape[-1]] or not 0 < x.shape[-1] <= MAX_CHANNELS:
        raise ValueError(f"x {list(x.shape)}, weight {list(weight.shape)}: [..., C] and [C] with C up to {MAX_CHANNELS} were expected")
    if not x.is_floating_point() or weight.device != x.device:
        raise ValueError(f"x {x.dtype} on {x.device}, weight on {weight.device}: floating point on one device was expected")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        found = f"residual {residual.dtype} {list(residual.shape)} on {residual.device}"
        raise ValueError(f"{found}: x's {x.dtype} {list(x.shape)} on {x.device} was expected")
    y, s = _RMSNorm.apply(x, residual, weight, eps, kernel and runs(x.device))
    return y, s
