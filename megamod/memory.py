"""How much memory a piece of work needs at its worst."""

import threading
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

STATUS = Path("/proc/self/status")
EVERY = 0.005  # seconds between two looks at it


class Peak:
    """`with Peak(device) as peak:` — the largest private memory of this process, in MiB: RssAnon, or what the GPU's allocator held.

    Attributes:
        before: as it was.
        value: at its worst.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before, self.value = device, 0.0, 0.0
        self._done = threading.Event()

    def now(self) -> float:
        """As it is."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated() / 2**20
        if not STATUS.exists():  # no Linux: nobody tells private memory from shared
            return 0.0
        status = STATUS.read_text(encoding="ascii")
        return int(status.partition("RssAnon:")[2].split()[0]) / 1024

    def _watch(self) -> None:
        while not self._done.wait(EVERY):
            self.value = max(self.value, self.now())

    def __enter__(self) -> "Peak":
        self.before = self.value = self.now()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self.device.type != "cuda":  # a GPU's allocator remembers
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type != "cuda":
            self._done.set()
            self._watcher.join()
        else:
            torch.cuda.synchronize()
            self.value = torch.cuda.max_memory_allocated() / 2**20


class Saved:
    """`with Saved(model.parameters()) as saved:` — how many bytes the passes inside keep for their backward.

    Each storage counts once, whole, however many tensors lie in it, and those in `without` not at all. What an autograd function keeps
    in other ways than save_for_backward is not seen.

    Attributes:
        bytes: so far.
    """

    def __init__(self, without: Iterable[Tensor]) -> None:
        self._seen = {x.untyped_storage()._cdata for x in without}
        self._alive: list[torch.UntypedStorage] = []  # so that no address is given away a second time
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self.bytes = 0

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)
            self.bytes += storage.nbytes()
        return x

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()
        self._alive.clear()
