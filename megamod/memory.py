"""How much memory a piece of work needs at its worst."""

import threading
from pathlib import Path

import torch

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
