"""Runs that save while they go on, that are asked to end, that cannot write, and that begin again: what each leaves, and says."""

import contextlib
import errno
import gc
import io
import itertools
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import distributed
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megamod import checkpoint, files, losses
from megamod.batch import Batch
from megamod.config import CheckpointConfig, load
from megamod.data import saved_batch
from megamod.data.loader import peek
from megamod.errors import MegamodError
from megamod.losses import Loss
from megamod.model.head import Head
from megamod.parallel import grid as grids
from megamod.saver import Saver, staying
from megamod.train import model_shape, train

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.py")
SMALL = [
    "data.row_length=128", "data.rows_per_step=2", "data.train.documents=24", "checkpoint.export=false", "log.every=1",
    "log.tensorboard=false", "steps=6", "checkpoint.every=2",
]  # fmt: skip

# ---- what a rank does

Event = Callable[[int, Loss], Loss]  # told the step, from 1, and its loss


@dataclass(frozen=True)
class Left:
    """What a run left."""

    error: str
    said: str
    listed: list[str]
    there: list[str]
    losses: dict[int, float | None]


def run(overrides: list[str], event: Event = lambda now, loss: loss) -> Left:
    """configs/tiny.py, small, on the ranks of the world; `event` is part of its loss."""
    calls = itertools.count(1)

    def loss(head: Head, batch: Batch) -> Loss:
        return event(next(calls), losses.cross_entropy(head, batch))

    cfg = replace(load(TINY, [*SMALL, *overrides]), loss=loss)
    said, error = io.StringIO(), ""
    with contextlib.redirect_stdout(said):
        try:
            train(cfg)
        except MegamodError as fault:
            error = str(fault)
    gc.collect()
    root = Path(cfg.dir, "checkpoints")
    metrics = Path(cfg.dir, "metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    dist.barrier()  # before the next one writes
    return Left(
        error, said.getvalue(), (root / "latest").read_text().split() if (root / "latest").exists() else [],
        sorted(path.name for path in root.glob("*")), {line["step"]: line["loss"] for line in lines if "loss" in line},
    )  # fmt: skip


def signalled(step: int, number: int, rank: int) -> Event:
    """Rank `rank` gets a signal in step `step`."""

    def event(now: int, loss: Loss) -> Loss:
        if now == step and dist.get_rank() == rank:
            os.kill(os.getpid(), number)
        return loss

    return event


def without_room(first: int, stop: int | None) -> Event:
    """From step `first` on, before step `stop`, no file can grow beyond some kilobytes."""

    def event(now: int, loss: Loss) -> Loss:
        if now in (first, stop):
            limit = 20_000 if now == first else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return loss

    return event


def not_a_number(*steps: int) -> Event:
    return lambda now, loss: loss._replace(value=loss.value * (float("nan") if now in steps else 1))


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {name: value}):
        yield


def scenarios(root: Path) -> dict[str, Any]:
    """All runs of this file, one after the other, in two ranks."""
    found: dict[str, Any] = {}

    def at(name: str) -> str:
        return f"dir={root / name}"

    found["whole"] = run([at("whole")])
    found["blocking"] = run([at("blocking"), "checkpoint.asynchronous=false"])
    found["kept"] = run([at("kept"), "checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3"])

    for number, rank in ((signal.SIGUSR1, 1), (signal.SIGTERM, 0)):
        name = signal.Signals(number).name
        handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
        asked = [at(name), f"checkpoint.requeue_file={root / name}.again"]
        found[name] = run(asked, signalled(3, number, rank))
        found[f"{name} again"] = (root / f"{name}.again").exists()
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == handlers, "they are put back"
        found[f"{name} on"] = run([at(name)])
    found["late"] = run([at("late"), "checkpoint.stop_at=1"])
    found["in time"] = run([at("in time"), f"checkpoint.stop_at={int(time.time()) + 10_000}"])

    waiting = ["checkpoint.asynchronous=false"]  # a file that was still being written would meet the limit, too
    try:
        found["full"] = run([at("full"), *waiting], without_room(2, 3))
        found["full to the end"] = run([at("full to the end"), *waiting], without_room(5, None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found["room again"] = run([at("full to the end")])

    found["nan once more"] = run([at("nan once more")], not_a_number(2, 3, 5))
    found["nan"] = run([at("nan")], not_a_number(2, 3, 4, 5, 6))

    found["nan, stopped"] = run([at("nan, stopped")], lambda now, loss: signalled(4, signal.SIGTERM, 0)(now, not_a_number(3, 4)(now, loss)))
    found["nan, on"] = run([at("nan, stopped")], not_a_number(1))

    # From another run's checkpoint; begun again where one was; and started again by a launcher, which means it to go on.
    found["elsewhere"] = run([at("elsewhere"), f"checkpoint.resume={root}/whole/checkpoints/step-00000002"])
    with environment("TORCHELASTIC_RESTART_COUNT", "1"):
        found["elsewhere again"] = run([at("elsewhere"), f"checkpoint.resume={root}/whole/checkpoints/step-00000002"])
    found["back"] = run([at("kept"), f"checkpoint.resume={root}/kept/checkpoints/step-00000003", "steps=6", "checkpoint.keep_last=2"])
    found["after all"] = run([at("kept"), f"checkpoint.resume={root}/kept/checkpoints/step-00000005", "checkpoint.keep_last=2"])
    found["anew"] = run([at("elsewhere"), "checkpoint.resume=no", "steps=6", "checkpoint.stop_at=1"])
    with environment("SLURM_RESTART_COUNT", "2"):
        found["anew again"] = run([at("elsewhere"), "checkpoint.resume=no"])
    with environment("TORCHELASTIC_RESTART_COUNT", "1"), environment("TORCHELASTIC_RUN_ID", "another"):
        found["died early"] = run([at("in time"), "checkpoint.resume=no", "checkpoint.stop_at=1"])
        found["died of it"] = run([at("blocking"), f"checkpoint.resume={root}/whole/checkpoints/step-00000003"])
    found["nowhere"] = run([at("nowhere"), f"checkpoint.resume={root}/whole/checkpoints/step-00000003"])
    with files.locked(root / "held") if dist.get_rank() == 0 else contextlib.nullcontext():
        dist.barrier()
        found["held"] = run([at("held")])
    found["beside"] = beside(root / "beside")
    found["broken"] = broken(root / "broken")
    found["best"] = best(root / "best")
    return found


def beside(directory: Path) -> list[bool]:
    """Whether each file was written while later steps went on: its writer waits for a step that the run makes after the save."""
    stepped, waits = {4: threading.Event(), 6: threading.Event()}, []

    def event(now: int, loss: Loss) -> Loss:
        if now in stepped:
            stepped[now].set()
        return loss

    def slow(tensors: Any, file: Path) -> None:
        step = int(file.parent.name[6:14])
        if step + 2 in stepped:  # what is saved after step 2 waits for step 4; the save after it, for this one
            waits.append(stepped[step + 2].wait(60))
        original(tensors, file)

    original = checkpoint.save_file
    with mock.patch.object(checkpoint, "save_file", slow):
        run([f"dir={directory}"], event)
    return waits


def broken(directory: Path) -> str:
    """What ends a run whose first save meets a fault that nobody expects, such as a group that has timed out."""

    def store(root: Path, taken: checkpoint.Snapshot, *others: Any) -> Path:
        if taken.step == 2:
            raise RuntimeError("a peer has gone")
        return original(root, taken, *others)

    original = checkpoint.store
    with mock.patch.object(checkpoint, "store", store):
        try:
            run([f"dir={directory}"])
        except RuntimeError as error:
            grids.stop()
            return f"{type(error).__name__}: {error}"
    return "nothing"


def best(directory: Path) -> list[list[str]]:
    """What is listed after each of four saves, of which the best may stay beside the newest: step 1, then 2, for which there is no room."""

    def write(taken: checkpoint.Snapshot, file: Path) -> list[Any]:
        if taken.step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(taken, file)

    def taken(step: int, *others: Any) -> checkpoint.Snapshot:
        return checkpoint.Snapshot(step, step, {}, [])

    original, listed = checkpoint._write_own, []
    grid: Any = SimpleNamespace(rank=dist.get_rank(), device=torch.device("cpu"))
    saver = Saver(directory, CheckpointConfig(keep_last=1, asynchronous=False), grid, grids.background(5), None, lambda line: None)
    optimizer: Any = None
    with mock.patch.object(checkpoint, "_write_own", write), mock.patch.object(checkpoint, "snapshot", taken):
        for step, of_these in ((1, 1), (2, 2), (3, 2), (4, 4)):
            saver.save(step, optimizer, {}, (), of_these)
            listed.append((directory / "latest").read_text().split())
            dist.barrier()
    return listed


def interrupted(directory: Path) -> bool:
    """Whether a save is whole when an interrupt has ended the run, of a single process, while it was written."""

    def write(taken: checkpoint.Snapshot, file: Path) -> list[Any]:
        asked.wait(60)
        return []

    def wait(saver: Saver) -> None:
        if saver._thread is not None:
            asked.set()
        original(saver)

    original, asked, optimizer = Saver._wait, threading.Event(), None
    grid: Any = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    empty = checkpoint.Snapshot(1, 1, {}, [])
    group = grids.background(5)
    with (
        mock.patch.object(checkpoint, "_write_own", write),
        mock.patch.object(checkpoint, "snapshot", return_value=empty),
        mock.patch.object(Saver, "_wait", wait),
        contextlib.suppress(KeyboardInterrupt),
        Saver(directory, CheckpointConfig(), grid, group, None, lambda line: None) as saver,
    ):
        saver.save(1, optimizer, {})  # type: ignore[arg-type]
        raise KeyboardInterrupt
    whole = checkpoint.latest(directory) is not None
    asked.set()
    return whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saver")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """Of the rank that reports: with two data-parallel ranks, the first."""
    result: dict[str, Any] = distributed.run(2, scenarios, folder)[0]
    return result


def contents(path: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name} {key}": value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints of the same grid hold the same bits."""
    one, other = contents(a), contents(b)
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def last(folder: Path, name: str, step: int = 6) -> Path:
    return folder / name / "checkpoints" / f"step-{step:08d}"


# ---- saves beside the steps


def test_what_is_written_meanwhile_is_the_state_at_the_save(folder: Path, found: dict[str, Any]) -> None:
    assert found["whole"].listed == ["step-00000006", "step-00000004", "step-00000002"] == found["blocking"].listed
    for step in (2, 4, 6):
        assert same(last(folder, "whole", step), last(folder, "blocking", step))
    assert not same(last(folder, "whole", 2), last(folder, "whole", 4)), "they would prove nothing"


def test_steps_go_on_while_a_save_is_written(found: dict[str, Any]) -> None:
    assert found["beside"] == [True, True]


def test_a_save_is_said_to_be_done_when_it_is(found: dict[str, Any]) -> None:
    assert [f"step-{n:08d} in" in found["whole"].said for n in range(1, 7)] == [False, True] * 3


def test_old_ones_go_when_a_new_one_is_whole(found: dict[str, Any]) -> None:
    kept = found["kept"]
    assert kept.listed == ["step-00000006", "step-00000005", "step-00000003"]
    assert kept.there == ["latest", *reversed(kept.listed)]


STEPS = st.lists(st.integers(1, 60), min_size=1, max_size=12, unique=True).map(lambda steps: sorted(steps, reverse=True))


NUMBER = st.none() | st.integers(1, 9)


@given(STEPS, NUMBER, NUMBER, NUMBER, st.none() | st.integers(1, 60), st.sets(st.integers(1, 60)))
def test_which_stay(
    steps: list[int], every: int | None, keep_last: int | None, keep_every: int | None, best: int | None, beaten: set[int]
) -> None:
    cfg = CheckpointConfig(every=every, keep_last=keep_last, keep_every=keep_every if keep_last is not None else None)
    stay = [checkpoint.step_of(name) for name in staying([f"step-{step:08d}" for step in steps], cfg, best, beaten)]
    assert stay == [step for step in steps if step in stay], "in their order"
    assert stay[0] == steps[0]
    assert best not in steps or best in stay
    for_good = [step for step in steps if cfg.keep_every and step % cfg.keep_every == 0]
    if keep_last is None:
        assert {step for step in steps[1:] if step not in stay} == {
            step for step in steps[1:] if step in beaten - {best} and not (every and step % every == 0)
        }
    else:
        assert set(stay) == {*steps[:keep_last], *for_good, *({best} & set(steps))}


def test_an_interrupt_in_a_notebook_leaves_no_thread_that_writes(tmp_path: Path) -> None:
    assert distributed.run(1, interrupted, tmp_path) == [True]


# ---- asked to end


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_to_any_rank_ends_the_run_saved(folder: Path, found: dict[str, Any], name: str) -> None:
    ended = found[name]
    assert f"stopped after step 3 of 6: {name}; the same command goes on from there" in ended.said
    assert ended.listed[0] == "step-00000003"
    assert list(ended.losses) == [1, 2, 3]
    assert found[f"{name} again"], "the launcher's file"
    on = found[f"{name} on"]
    assert "resumed after step 3" in on.said
    assert on.losses == found["whole"].losses
    assert same(last(folder, name), last(folder, "whole"))
    assert on.listed == [f"step-{step:08d}" for step in (6, 4, 3, 2)], "it stays"


def test_the_time_is_up(folder: Path, found: dict[str, Any]) -> None:
    assert "stopped after step 0 of 6: its time is up (checkpoint.stop_at)" in found["late"].said
    assert (found["late"].listed, found["late"].there) == ([], [])
    assert same(last(folder, "in time"), last(folder, "whole"))


# ---- no room


def test_a_save_without_room_is_said_and_the_run_goes_on(folder: Path, found: dict[str, Any]) -> None:
    full = found["full"]
    assert full.error == ""
    assert "step 2 was not saved: " in full.said
    assert "File too large" in full.said
    assert full.listed == ["step-00000006", "step-00000004"]
    assert full.there == ["latest", "step-00000004", "step-00000006"], "nothing of it is left"
    assert same(last(folder, "full"), last(folder, "whole"))


def test_a_last_save_without_room_is_an_error_and_loses_nothing(folder: Path, found: dict[str, Any]) -> None:
    full = found["full to the end"]
    assert full.error.startswith("step 6 was not saved: ")
    assert full.error.count("\n") == 0
    assert full.listed == ["step-00000004", "step-00000002"]
    assert "resumed after step 4" in found["room again"].said
    assert same(last(folder, "full to the end"), last(folder, "whole"))


def test_the_best_stays_until_a_better_one_is_saved(found: dict[str, Any]) -> None:
    one, three, four = (f"step-{step:08d}" for step in (1, 3, 4))
    assert found["best"] == [[one], [one], [three, one], [four]]


def test_a_fault_that_nobody_expects_is_not_lost(found: dict[str, Any]) -> None:
    assert found["broken"] == "RuntimeError: a peer has gone"


# ---- losses that are no numbers


def test_a_step_that_is_not_finite_is_skipped(found: dict[str, Any]) -> None:
    run = found["nan once more"]
    assert run.error == ""
    assert [step for step, loss in run.losses.items() if loss is None] == [2, 3, 5]
    assert run.said.count("skipped 1") == 3


def test_too_many_of_them_end_the_run(folder: Path, found: dict[str, Any]) -> None:
    error = found["nan"].error
    assert "step 4: its value is nan, and 3 steps in a row were skipped" in error
    assert found["nan"].listed == ["step-00000002"], "the state before them"
    assert f"its micro-batches are in {folder}/nan/skipped: see tools/show_batch.py --saved" in error
    kept = sorted((folder / "nan" / "skipped").iterdir())
    assert [file.name for file in kept] == [f"step-00000004-dp-000{rank}.safetensors" for rank in (0, 1)]
    cfg = load(TINY, [*SMALL, f"dir={folder / 'nan'}"])
    tokens = [[batch.tokens.tolist() for batch in batches] for batches in (peek(cfg, model_shape(cfg), 4), *map(saved_batch.load, kept))]
    assert sorted(tokens[0]) == sorted(tokens[1] + tokens[2])


def test_steps_in_a_row_are_counted_over_a_resume(found: dict[str, Any]) -> None:
    assert "stopped after step 4" in found["nan, stopped"].said
    assert "step 5: its value is nan, and 3 steps in a row were skipped" in found["nan, on"].error


# ---- where a run begins


def test_from_another_runs_checkpoint(folder: Path, found: dict[str, Any]) -> None:
    assert f"resumed after step 2 from {folder}/whole/checkpoints/step-00000002" in found["elsewhere"].said
    assert found["elsewhere"].listed == ["step-00000006", "step-00000004"]
    assert same(last(folder, "elsewhere"), last(folder, "whole"))
    assert f"resumed after step 6 from {folder}/elsewhere/checkpoints" in found["elsewhere again"].said, "a restart goes on"


def test_back_to_an_earlier_one(found: dict[str, Any]) -> None:
    assert "resumed after step 3" in found["back"].said
    assert found["back"].listed == ["step-00000006", "step-00000004"]
    assert "step-00000005" in found["back"].there, "what was given up is not removed"


def test_back_to_one_that_was_given_up(found: dict[str, Any]) -> None:
    assert "resumed after step 5" in found["after all"].said
    assert found["after all"].listed == ["step-00000006", "step-00000005"]


def test_to_begin_anew_forgets_what_was_there(folder: Path, found: dict[str, Any]) -> None:
    assert found["anew"].listed == ["none"]
    assert "step-00000004" in found["anew"].there
    assert "resumed" not in found["anew again"].said, "nothing of the new run was saved yet"
    assert same(last(folder, "elsewhere"), last(folder, "whole"))


def test_a_restart_does_not_go_on_with_what_another_launch_had_saved(folder: Path, found: dict[str, Any]) -> None:
    """The life before it may have died before it forgot them, or of the path that was asked for."""
    assert "resumed" not in found["died early"].said
    assert found["died early"].listed == ["none"]
    assert "with checkpoint.resume=auto goes on from there" in found["died early"].said
    assert found["died of it"].error.startswith(f"checkpoint.resume = {folder}/whole/checkpoints/step-00000003: ")


def test_from_a_checkpoint_that_is_not_there(folder: Path, found: dict[str, Any]) -> None:
    assert found["nowhere"].error.startswith(f"checkpoint.resume = {folder}/whole/checkpoints/step-00000003: ")
    assert found["nowhere"].error.endswith("cannot be read (No such file or directory)")


def test_two_runs_in_one_directory(found: dict[str, Any]) -> None:
    assert "another run is at work here (process " in found["held"].error
    assert found["held"].there == []


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    with files.locked(tmp_path / "run"), pytest.raises(MegamodError, match=f"process {os.getpid()} on "), files.locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists(), "nothing else was there"
    with files.locked(tmp_path / "run"):
        (tmp_path / "run" / "mine").write_text("")
    assert (tmp_path / "run" / "mine").exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MegamodError, match="a directory that can be written was expected"), files.locked(tmp_path / "file" / "run"):
        pass
