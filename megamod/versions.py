"""The versions that megamod fits. It reads megatron-core's buffers and schedules, so another release is refused, not tried."""

from importlib.metadata import version

from megamod.errors import MegamodError

MEGATRON_CORE = "0.16.1"
RANGES = {  # from, and below
    "torch": ((2, 11), (2, 14)),
    "transformers": ((5, 23), (5, 24)),  # tokenizers and chat templates: what a model is trained on
}


def check() -> None:
    """Raises MegamodError for a torch, megatron-core or transformers that megamod was not tested with."""
    found = version("megatron-core")
    if found != MEGATRON_CORE:
        raise MegamodError(f"megatron-core {found} is installed, megamod fits {MEGATRON_CORE}: pip install megatron-core=={MEGATRON_CORE}")
    for package, (first, end) in RANGES.items():
        found = version(package)
        low, high = (".".join(map(str, bound)) for bound in (first, end))
        if not first <= tuple(int(n) for n in found.split(".")[:2]) < end:
            raise MegamodError(f"{package} {found} is installed, megamod fits {low} up to below {high}")
