"""SwiGLU (Shazeer 2020, arXiv:2002.05202): the product of a gate and what it lets through.

Each token has 2F numbers, the gate g and then up u, as one projection `[gate | up]` made them; with σ(g) = 1 / (1 + e^-g):

    y[t, f]  = g · σ(g) · u                            g = x[t, f], u = x[t, F + f], f < F

    dg[t, f] = dy · u · σ(g) · (1 + g · (1 - σ(g)))
    du[t, f] = dy · g · σ(g)

Shapes: T tokens, F ffn; F is any number. Computed in fp32, of fp64 numbers in fp64, and rounded once.

Kept for the backward: x alone, 2F numbers a token; σ(g) is made again. Both directions only move memory: forward 2F numbers are read and F
written; backward 3F are read and 2F written.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform that torch runs on; the references do without
    triton = None

BLOCK = 2048  # numbers of y that a program makes: with 4 warps 16 a thread, two 16-byte loads of bf16 from each half


# ---- reference: the only definition of correct


def swiglu_ref(gate_up: Tensor) -> Tensor:
    """y `[..., F]` of `[..., 2F]`."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _grad_ref(gate_up: Tensor, dy: Tensor) -> Tensor:
    """What autograd makes of swiglu_ref: the same operations, and the same bits."""
    gate, up = gate_up.chunk(2, -1)
    dx = torch.empty_like(gate_up)
    d_gate, d_up = dx.chunk(2, -1)
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
    torch.mul(dy, F.silu(gate), out=d_up)
    return dx


# ---- kernels

if triton is not None:

    @triton.jit
    def _halves(x, width, blocks, WORK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """A program's gate, σ(gate) and up; where in y they belong, where in x, and which of them exist. `blocks` share a token."""
        token = (tl.program_id(0) // blocks).to(tl.int64)  # 64 bits: T·F may exceed 2^31
        column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        here = token * 2 * width + column
        g = tl.load(x + here, mask=inside, other=0.0).to(WORK)
        u = tl.load(x + here + width, mask=inside, other=0.0).to(WORK)
        return g, 1 / (1 + tl.exp(-g)), u, token * width + column, here, inside

    @triton.jit
    def _forward_kernel(x, y, width, blocks, WORK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """A program: BLOCK numbers of one token's y."""
        g, sigma, u, at, _, inside = _halves(x, width, blocks, WORK, BLOCK)
        tl.store(y + at, (g * sigma * u).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(x, dy, dx, width, blocks, WORK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """A program: BLOCK numbers of dg and as many of du of one token."""
        g, sigma, u, at, here, inside = _halves(x, width, blocks, WORK, BLOCK)
        d = tl.load(dy + at, mask=inside, other=0.0).to(WORK)
        tl.store(dx + here, (d * u * sigma * (1 + g * (1 - sigma))).to(dx.dtype.element_ty), mask=inside)
        tl.store(dx + here + width, (d * g * sigma).to(dx.dtype.element_ty), mask=inside)

    # Under TRITON_INTERPRET=1, read when the kernels are decorated, they run on CPU tensors too.
    INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


def runs(device: torch.device) -> bool:
    """Whether there is a kernel for tensors on `device`."""
    return triton is not None and (device.type == "cuda" or INTERPRETED)


def _launch(kernel: Any, x: Tensor, *tensors: Tensor) -> None:
    """On all of x's tokens; x and the others lie close."""
    width = x.shape[-1] // 2
    if not x.numel():
        return
    block = min(BLOCK, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    work = tl.float64 if x.dtype is torch.float64 else tl.float32
    with torch.cuda.device_of(x):
        kernel[(x.numel() // (2 * width) * blocks,)](x, *tensors, width, blocks, WORK=work, BLOCK=block, num_warps=4)


# ---- autograd


class _SwiGLU(torch.autograd.Function):
    """Keeps its input and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kernel: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kernel = kernel
        if not kernel:
            return swiglu_ref(gate_up)
        y = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
        _launch(_forward_kernel, gate_up.contiguous(), y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        if not ctx.kernel:
            return _grad_ref(gate_up, dy), None
        dx = gate_up.new_empty(gate_up.shape)
        _launch(_backward_kernel, gate_up.contiguous(), dy.contiguous(), dx)
        return dx, None


# ---- public function


def swiglu(gate_up: Tensor, *, kernel: bool = True) -> Tensor:
    """silu(gate) · up.

    Args:
        gate_up: `[..., 2F]`, a token's gate and then its up.
        kernel: False: torch's operations, also where there is a kernel; they keep as little.

    Returns:
        `[..., F]`, contiguous. It can be differentiated once.

    Raises:
        ValueError: a last axis that cannot be halved, or numbers that are not floating point.
    """
    if not gate_up.dim() or gate_up.shape[-1] % 2 or not gate_up.is_floating_point():
        raise ValueError(f"gate_up {gate_up.dtype} {list(gate_up.shape)}: floating-point [..., 2F] was expected")
    y: Tensor = _SwiGLU.apply(gate_up, kernel and runs(gate_up.device))
    return y
