"""RMSNorm (Zhang & Sennrich 2019), with what megatron-core's norms lack: sequence parallelism and float64."""

from typing import Any

import torch
from torch import Tensor, nn

from megamod_kernels.rmsnorm import rmsnorm, rmsnorm_residual


class RMSNorm(nn.Module):
    """y = w · x / √(mean(x²) + ε) over the last axis, computed in at least fp32.

    Args:
        config: megatron-core's TransformerConfig, for the dtype, the device and whether activations are split over tp.
        hidden_size: length of the last axis.
        eps: ε.
        kernel: whether by megamod_kernels' kernel.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, kernel: bool) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Each tp rank then sees other tokens: finalize_model_grads sums the gradient of what is marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps, self.kernel = eps, kernel

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, self.eps, kernel=self.kernel)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum, which is the next residual; without a residual it is x, to be used in x's place."""
        return rmsnorm_residual(x, residual, self.weight, self.eps, kernel=self.kernel)
