"""The CPU rehearsal seam: what lets megatron-core run on gloo, or on no hardware at all.

megatron-core asks CUDA for the current device, for random-number states and for synchronisation, and writes `device="cuda"`
in its schedules. Where there is no GPU, `install` answers those questions with another device. It is the one place in megamod
that patches; it is called by `parallel.grid.start` alone, and never on a machine whose GPU is used.

- `cpu`: the same launch that runs on 64 GPUs runs on a laptop, over gloo; every parallel mode is an ordinary unit test.
- `meta`: shapes without storage, under torch's fake process group: any rank of any grid, in seconds.
"""

import functools
from typing import Any

import torch
import torch.fx.experimental._config
from torch._C._distributed_c10d import FakeWork
from torch.overrides import TorchFunctionMode


class _OtherDevice(TorchFunctionMode):
    """Answers `device="cuda"` with the device that stands for it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = self.device
        return func(*args, **kwargs)


_mode: _OtherDevice | None = None  # what `install` put in force; patching is per process, so is this


def install(device: torch.device) -> None:
    """Let `device` (cpu or meta) stand for CUDA in this process, until it ends or another device is installed."""
    global _mode
    import megatron.core.tensor_parallel.random as rng

    if _mode is not None:
        _mode.device = device
    else:
        _mode = _OtherDevice(device)
        _mode.__enter__()
    # Schedules and layers allocate on the current device; tensors already there need no move.
    torch.cuda.current_device = lambda: device  # type: ignore[assignment, return-value]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    # megatron-core's tracker sets CUDA's generator, and not the CPU's: a generator of its own stands for it here, too.
    generator = torch.Generator()
    torch.cuda.get_rng_state = rng._get_cuda_rng_state = lambda *args, **kwargs: generator.get_state()
    torch.cuda.set_rng_state = rng._set_cuda_rng_state = lambda state, *args, **kwargs: generator.set_state(state)  # type: ignore[assignment]
    torch.cuda.manual_seed = generator.manual_seed  # type: ignore[assignment]
    if device.type == "meta":
        _register_meta_collectives()
        # `x[mask]` has a length that only the data knows: take all of it, the largest there could be.
        torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True


@functools.cache
def _register_meta_collectives() -> None:
    """torch's fake process group answers for single collectives; for coalesced ones, which DDP uses, nothing does."""
    library = torch.library.Library("c10d", "IMPL")
    for name in ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_", "allreduce_coalesced_"):
        library.impl(name, lambda *args, **kwargs: FakeWork().boxed(), "Meta")
    _register_meta_collectives.library = library  # type: ignore[attr-defined] # it unregisters when it is freed
