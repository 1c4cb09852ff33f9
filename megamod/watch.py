"""What watches over a run: who asks it to end early, a step that does not end, ranks that are slow, losses out of line."""

import faulthandler
import math
import signal
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megamod.errors import listed
from megamod.parallel.collectives import gathered
from megamod.parallel.grid import Grid

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of a preemption; Slurm's warning, `sbatch --signal`


class Stop:
    """`with Stop(...) as stop:` — inside, signals that would end the process only ask the run to end after the step at hand.

    Args:
        at: seconds since the epoch when the time is up; None: never.
    """

    def __init__(self, at: float | None, grid: Grid) -> None:
        self._at, self._grid = at, grid
        self._received = 0
        self._before: dict[int, Any] = {}

    def asked(self) -> str | None:
        """Why the run should end now; None: it should not. Every rank calls it, and has the same answer: one all-reduce."""
        is_late = self._at is not None and time.time() >= self._at
        found = torch.tensor([self._received, int(is_late)], device=self._grid.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        received, late = found.tolist()
        if received:
            return signal.Signals(received).name
        return "its time is up (checkpoint.stop_at)" if late else None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python handles no signals
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: it was not Python that set it


class Watchdog:
    """`with Watchdog(...) as watchdog:` — when no `beat` comes for so long, every rank writes the stacks of its threads to a file.

    The run is not ended: a collective that takes too long does that (`parallel.timeout_minutes`).

    Args:
        directory: made when it is needed; `step-<step>-rank-<rank>.txt` are put there.
        seconds: what a step may take.
        say: called with a line about it, once a hang.
    """

    def __init__(self, directory: Path, rank: int, seconds: float, say: Callable[[str], None]) -> None:
        self._directory, self._rank, self._seconds, self._say = directory, rank, seconds, say
        self._changed = threading.Condition()
        self._step: int | None = 0  # None: it has ended
        self._due = 0.0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """Step `step` begins."""
        with self._changed:
            self._step, self._due = step, time.monotonic() + self._seconds
            self._changed.notify()

    def rest(self) -> None:
        """What comes now, until the next step begins, may take as long as it likes."""
        with self._changed:
            self._due = float("inf")

    def _watch(self) -> None:
        with self._changed:
            while self._step is not None:
                left = self._due - time.monotonic()
                if left > 0:
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                else:
                    self._write(self._step)
                    self._due = float("inf")

    def _write(self, step: int) -> None:
        file = self._directory / f"step-{step:08d}-rank-{self._rank:05d}.txt"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank} on {socket.gethostname()}\n")
                stream.flush()
                faulthandler.dump_traceback(stream)
        except OSError as error:
            self._say(f"step {step} has taken {self._seconds / 60:g} minutes, and {file} cannot be written ({error.strerror})")
        else:
            self._say(f"step {step} has taken {self._seconds / 60:g} minutes: what every rank is doing is in {self._directory}")

    def __enter__(self) -> "Watchdog":
        self.beat(0)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._step = None
            self._changed.notify()
        self._thread.join()


class Stragglers:
    """Times this rank's forward passes, and finds ranks that take longer for them than others with the same layers do.

    Tensor- and context-parallel peers wait for each other in a forward pass, so a slow rank is found with its peers.

    Args:
        chunks: the rank's model chunks; a hook of each is used.
    """

    SLOW = 1.5  # times the median of the ranks of the same pipeline stage

    def __init__(self, chunks: Sequence[nn.Module], grid: Grid) -> None:
        self._grid = grid
        self._passes: list[tuple[Any, Any]] = []
        self._begun: Any = None
        self._hooks = [chunk.register_forward_pre_hook(self._begin) for chunk in chunks]
        self._hooks += [chunk.register_forward_hook(self._end) for chunk in chunks]

    def found(self) -> str | None:
        """A line about ranks that were slow since it was last asked; None: there are none. Every rank calls it."""
        if self._grid.device.type == "cuda":
            torch.cuda.synchronize()
            seconds = sum(begun.elapsed_time(ended) for begun, ended in self._passes) / 1000
        else:
            seconds = sum(ended - begun for begun, ended in self._passes)
        self._passes = []
        told = gathered((self._grid.pp.rank, seconds, socket.gethostname()))
        slow = []
        for rank, (stage, mine, host) in enumerate(told):
            usual = statistics.median_low(theirs for other, theirs, _ in told if other == stage)
            if mine > self.SLOW * usual > 0:
                slow.append(f"rank {rank} on {host} ({mine / usual:.1f}×)")
        return f"slow in forward passes, against ranks with the same layers: {listed(slow)}" if slow else None

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _now(self) -> Any:
        if self._grid.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, *_: Any) -> None:
        self._begun = self._now()

    def _end(self, *_: Any) -> None:
        self._passes.append((self._begun, self._now()))


class Spikes:
    """Says which losses are far above those before them: over their median by eight deviations (the median one, as of a normal)."""

    FAR, LEAST, WINDOW = 8 * 1.4826, 16, 64
    NEGLIGIBLE = 1e-3  # a smaller deviation counts as this one: losses may be the same over and over, such as a hinge's 0

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW)

    def found(self, step: int, loss: float) -> str | None:
        """A line about the loss of step `step`, if it is one."""
        before = list(self._recent)
        if math.isfinite(loss):
            self._recent.append(loss)
        if len(before) < self.LEAST:
            return None
        middle = statistics.median(before)
        bound = middle + self.FAR * max(self.NEGLIGIBLE, statistics.median(abs(x - middle) for x in before))
        return f"loss spike: step {step} has {loss:.4f}, the last {len(before)} had {middle:.4f} in the middle" if loss > bound else None
