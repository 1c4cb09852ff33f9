"""When a checkpoint is on disk, which ones stay, and how training goes on meanwhile.

A save stops the run for a copy of the state to host memory. A thread of every rank then writes its share and agrees with the other
ranks' over a process group of its own; the tracker moves when all bytes are on disk, and only then a save is said to be done.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamod import checkpoint
from megamod.checkpoint import Begun
from megamod.config import CheckpointConfig
from megamod.errors import MegamodError
from megamod.optim import Optimizer
from megamod.parallel.collectives import together
from megamod.parallel.grid import Grid
from megamod.weights.table import Placed


class Saver:
    """A run's checkpoints. Every rank makes one, with the same arguments, and calls it alike; `with Saver(...)` waits for the last save.

    Args:
        directory: the run's `checkpoints`.
        group: gloo, over all ranks, used by nothing else: what the saves' threads agree over.
        begun: the checkpoint that the run goes on from; None: it begins.
        say: called on every rank, from the save's thread, with a line about it.

    Attributes:
        step: the last step that was saved, or begun to be saved.
    """

    def __init__(
        self,
        directory: Path,
        cfg: CheckpointConfig,
        grid: Grid,
        group: dist.ProcessGroup,
        begun: Begun | None,
        say: Callable[[str], None],
    ) -> None:
        self._directory, self._cfg, self._grid, self._group, self._say = directory, cfg, grid, group, say
        together(lambda: checkpoint.begin(directory, begun.path if begun is not None else None), acts=grid.rank == 0)
        self.step = begun.step if begun is not None else 0
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self._best: int | None = None  # the last best step that could be saved

    def save(
        self,
        step: int,
        optimizer: Optimizer,
        about: Mapping[str, Any],
        reference: Sequence[Placed] = (),
        best: int | None = None,
        beaten: Collection[int] = (),
    ) -> None:
        """Begin to save the state after `step` steps; the save before it has ended then. That one fails is said, and the run goes on.

        But not after a fault that is not a MegamodError: ranks that no longer agree would save nothing, and say nothing of it.

        Args:
            about: JSON that `checkpoint.resume` hands back.
            reference: as in `checkpoint.snapshot`.
            best: a step whose checkpoint stays for being the best.
            beaten: steps whose checkpoints do not any more.
        """
        self._wait()
        if self._fault is not None and not isinstance(self._fault, MegamodError):
            raise self._fault
        self.step, self._fault = step, None
        taken = checkpoint.snapshot(step, optimizer, self._grid.rank, reference, self._copy if self._cfg.asynchronous else None)
        if self._grid.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._thread = threading.Thread(target=self._store, args=(taken, dict(about), best, beaten), name=f"save {step}", daemon=True)
        self._thread.start()
        if not self._cfg.asynchronous:
            self._wait()

    def finish(self) -> None:
        """Wait until the last save has ended.

        Raises:
            MegamodError: on every rank alike: it failed.
        """
        self._wait()
        if self._fault is not None:
            raise self._fault

    def _wait(self) -> None:
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self._thread = None
            if self._cfg.asynchronous and (waited := time.perf_counter() - began) > 1:
                self._say(f"waited {waited:.1f} s for step {self.step}'s checkpoint to be written")

    def _store(self, taken: checkpoint.Snapshot, about: Mapping[str, Any], best: int | None, beaten: Collection[int]) -> None:
        """What the thread does."""
        began = time.perf_counter()
        try:
            path = checkpoint.store(self._directory, taken, about, self._group, partial(self._staying, best=best, beaten=beaten))
        except MegamodError as error:
            self._fault = MegamodError(f"step {taken.step} was not saved: {error}")
            self._say(str(self._fault))
        except BaseException as error:  # another rank is gone, or a fault of ours: raised where the run asks
            self._fault = error
        else:
            self._say(f"saved {path} in {time.perf_counter() - began:.1f} s")

    def _staying(self, names: list[str], best: int | None, beaten: Collection[int]) -> list[str]:
        """`staying`; while the best step is one that could not be saved, with the best before it."""
        if best in [checkpoint.step_of(name) for name in names]:
            self._best = best
        return staying(names, self._cfg, self._best, beaten)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """In memory that is kept from one save to the next, page-locked beside a GPU: new pages cost more than the copy."""
        if name not in self._copies:
            self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._copies[name].copy_(tensor, non_blocking=True)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Another fault is this rank's alone. Its threads may be waiting for a rank that is gone, and the others for this one: it goes.
        # A single process waits for nobody, and must not leave a thread that writes: in a notebook the next run begins beside it.
        if kind is None or issubclass(kind, MegamodError) or self._grid.world == 1:
            self._wait()


def staying(names: Sequence[str], cfg: CheckpointConfig, best: int | None, beaten: Collection[int] = ()) -> list[str]:
    """Which of a run's checkpoints stay when the first of them has just been saved.

    It does, and so does the best. With `keep_last` so do the newest of that number and multiples of `keep_every`; without it all others,
    except those that no schedule asked for and that were kept for being the best.

    Args:
        names: the newest first.
        beaten: steps that are not the best any more.
    """

    def stays(place: int, step: int) -> bool:
        if cfg.keep_last is None:
            asked = step not in beaten or (cfg.every is not None and step % cfg.every == 0)
        else:
            asked = place < cfg.keep_last or (cfg.keep_every is not None and step % cfg.keep_every == 0)
        return asked or place == 0 or step == best

    return [name for place, name in enumerate(names) if stays(place, checkpoint.step_of(name))]
