"""The versions that megamod fits. It reads megatron-core's buffers and schedules, so another release is refused, not tried."""

from importlib.metadata import version

from megamod.errors import MegamodError

MEGATRON_CORE = "0.16.1"
TORCH = ((2, 11), (2, 14))  # from, and below


def check() -> None:
    """Raises MegamodError for a torch or megatron-core that megamod was not tested with."""
    found = version("megatron-core")
    if found != MEGATRON_CORE:
        raise MegamodError(f"megatron-core {found} is installed, megamod fits {MEGATRON_CORE}: pip install megatron-core=={MEGATRON_CORE}")
    found = version("torch")
    low, high = (".".join(map(str, bound)) for bound in TORCH)
    if not TORCH[0] <= tuple(int(n) for n in found.split(".")[:2]) < TORCH[1]:
        raise MegamodError(f"torch {found} is installed, megamod fits {low} up to below {high}")
