"""Who asks a run to end, a step that hangs, ranks that are slow, losses out of line."""

import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamod.config import ParallelConfig
from megamod.parallel.grid import Grid, started
from megamod.watch import Spikes, Stop, Stragglers, Watchdog


def on_grid(parallel: ParallelConfig, fn: Any) -> Any:
    """`fn` of a grid of the ranks, as a task of distributed.run."""
    with started(parallel, tiny.shape("qwen2")) as grid:
        return fn(grid)


# ---- asked to end


def asked(grid: Grid) -> list[str | None]:
    """What every rank hears: of nothing, of a signal to one rank, of two, of time that is up on one rank."""
    answers = []
    with Stop(None, grid) as stop:
        answers.append(stop.asked())
        if grid.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        answers.append(stop.asked())
        os.kill(os.getpid(), signal.SIGTERM)
        answers.append(stop.asked())
    with Stop(0 if grid.rank == 1 else time.time() + 1000, grid) as stop:
        answers.append(stop.asked())
    return answers


def test_all_ranks_hear_the_same() -> None:
    first, second = distributed.run(2, on_grid, ParallelConfig(), asked)
    assert first == second == [None, "SIGUSR1", "SIGTERM", "its time is up (checkpoint.stop_at)"]


def in_a_thread(grid: Grid) -> str | None:
    """Where Python allows no handlers, as in a notebook's worker."""
    heard = []

    def act() -> None:
        with Stop(None, grid) as stop:
            heard.append(stop.asked())

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    return heard[0]


def test_a_thread_has_no_signals_and_no_fault() -> None:
    assert distributed.run(1, on_grid, ParallelConfig(), in_a_thread) == [None]


# ---- hangs


def test_a_hang_leaves_every_threads_stack(tmp_path: Path) -> None:
    said: list[str] = []
    heard = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        heard.set()

    def stuck_in_a_collective() -> None:
        heard.wait(60)

    worker = threading.Thread(target=stuck_in_a_collective)
    worker.start()
    with Watchdog(tmp_path / "stacks", 3, 0.2, say) as watchdog:
        watchdog.beat(7)
        worker.join()
        heard.clear()
        watchdog.beat(8)  # and again, in a later step
        assert heard.wait(60)
    (file, other) = sorted((tmp_path / "stacks").iterdir())
    assert (file.name, other.name) == ("step-00000007-rank-00003.txt", "step-00000008-rank-00003.txt")
    text = file.read_text()
    assert re.search(r"rank 3 on \S+\n", text)
    assert "in stuck_in_a_collective" in text
    assert "test_a_hang_leaves_every_threads_stack" in text
    assert said[0] == f"step 7 has taken 0.00333333 minutes: what every rank is doing is in {tmp_path / 'stacks'}"


def test_no_hang_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with Watchdog(tmp_path / "stacks", 0, 1e-9, said.append) as watchdog:
        watchdog.rest()  # an evaluation may take as long as it likes
    with Watchdog(tmp_path / "stacks", 0, 1000, said.append) as watchdog:
        watchdog.beat(1)
    assert [line for line in said if not line.startswith("step 0 ")] == []
    assert not any(file.name.startswith("step-00000001") for file in tmp_path.glob("stacks/*"))


def test_a_hang_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    heard = threading.Event()
    said: list[str] = []
    with Watchdog(tmp_path / "file", 0, 1e-3, lambda line: (said.append(line), heard.set())[0]) as watchdog:
        watchdog.beat(1)
        assert heard.wait(60)
    assert "cannot be written (" in said[-1]


# ---- stragglers


class Slow(torch.nn.Module):
    """A chunk whose time is told, not taken."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: int) -> int:
        self.clock[0] += self.seconds
        return x


def found(grid: Grid, seconds: list[float]) -> tuple[str | None, str | None, int]:
    """Ranks whose passes take so many seconds each; asked after ten passes, and again after none."""
    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megamod.watch.time.perf_counter", lambda: clock[0])
        chunk = Slow(clock, seconds[grid.rank])
        stragglers = Stragglers([chunk], grid)
        for i in range(10):
            chunk(i)
        first, second = stragglers.found(), stragglers.found()
        stragglers.close()
        chunk(0)
    return first, second, len(stragglers._passes)


@pytest.mark.parametrize(
    ("parallel", "seconds", "slow"),
    [
        (ParallelConfig(), [1.0, 1.1, 1.6, 0.9], "rank 2 on"),
        (ParallelConfig(), [1.0, 1.1, 1.4, 0.9], None),
        (ParallelConfig(pp=2), [1.0, 1.0, 3.0, 3.0], None),  # the second stage has more to do, and both its ranks take so long
        (ParallelConfig(pp=2), [1.0, 1.0, 3.0, 9.0], "rank 3 on"),
    ],
)
def test_slow_ranks_are_told_from_stages_that_have_more_to_do(parallel: ParallelConfig, seconds: list[float], slow: str | None) -> None:
    lines = distributed.run(4, on_grid, parallel, partial(found, seconds=seconds))
    for first, second, after in lines:
        assert (slow is None and first is None) or (slow is not None and first is not None and slow in first and first.count("rank") == 2)
        assert second is None
        assert after == 0, "its hooks are gone"


# ---- spikes


@given(st.lists(st.floats(1.0, 1.2), min_size=Spikes.LEAST, max_size=60), st.floats(5, 50))
def test_a_spike_is_found(losses: list[float], spike: float) -> None:
    spikes = Spikes()
    for step, loss in enumerate(losses[: Spikes.LEAST], 1):
        assert spikes.found(step, loss) is None, "too few to tell"
    for step, loss in enumerate(losses[Spikes.LEAST :], 1):
        spikes.found(step, loss)
    line = spikes.found(99, spike)
    assert line is not None
    assert f"loss spike: step 99 has {spike:.4f}" in line


def test_what_is_no_spike() -> None:
    spikes = Spikes()
    falling = [8 * 0.98**n + 0.05 * (-1) ** n for n in range(200)]
    assert [step for step, loss in enumerate(falling) if spikes.found(step, loss)] == []
    assert spikes.found(200, float("nan")) is None, "that is another fault, and no measure for later ones"
    assert spikes.found(201, falling[-1]) is None


def test_what_is_as_good_as_nothing_is_no_spike() -> None:
    spikes = Spikes()
    assert [n for n in range(40) if spikes.found(n, 0.0 if n % 3 else 1e-6)] == []
    assert spikes.found(40, 1.0) is not None
