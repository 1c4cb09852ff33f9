"""The log of a run: its lines, metrics.jsonl, TensorBoard; and the counts that MFU is made of."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamod import log as log_module
from megamod.config import LogConfig
from megamod.log import Log
from megamod.model.shape import Shape
from megamod.weights.table import hf_shapes

CPU = torch.device("cpu")


class Clock:
    """Stands for `time` in the log: it stays where it is put."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(log_module, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def start(directory: Path, steps: int = 10, first: int = 0, world: int = 1, *, active: bool = True, **cfg: Any) -> Log:
    return Log(LogConfig(**{"tensorboard": False, **cfg}), directory, steps, first, world, CPU, active=active)


def refuse(token: str) -> float:
    raise AssertionError(f"{token} is not JSON")


def records(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, by a reader that takes no NaN and no Infinity."""
    return [json.loads(line, parse_constant=refuse) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


# ---- lines and records


def test_a_step_is_a_line_and_a_record(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    log = start(tmp_path / "new" / "run", world=8, peak_tflops=200.0)
    clock.now += 4.0
    log.step(1, {"loss": torch.tensor(2.5, dtype=torch.float64), "lr": 1e-3, "grad_norm": 0.125}, tokens=6000, flops=8 * 4.0 * 50e12)
    clock.now += 2.0
    log.step(2, {"loss": 1.0, "nll/verdict": 0.5, "skipped": 1.0}, tokens=6000, flops=8 * 2.0 * 20e12)
    log.close()
    lines = [re.sub(r" · \d+\.\d GiB", " · _ GiB", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        # 50 of 200 TFLOP/s on each of 8 ranks; 9 steps of 4 s to go
        "step 1/10 · loss 2.5000 · lr 1.00e-03 · grad norm 0.125 · 1,500 tok/s · 4.00 s · MFU 25.0% · _ GiB · ETA 0:00:36",
        # 8 steps of 3 s on average to go
        "step 2/10 · loss 1.0000 · nll/verdict 0.5000 · skipped 1 · 3,000 tok/s · 2.00 s · MFU 10.0% · _ GiB · ETA 0:00:24",
    ]
    first, second = records(tmp_path / "new" / "run")
    assert first == {
        "step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.125, "tokens_per_second": 1500.0, "step_seconds": 4.0,
        "mfu": pytest.approx(0.25), "memory_gib": first["memory_gib"],
    }  # fmt: skip
    assert 0.05 < first["memory_gib"] < 50, "the process's peak"
    assert second == {
        "step": 2, "loss": 1.0, "nll/verdict": 0.5, "skipped": 1.0, "tokens_per_second": 3000.0, "step_seconds": 2.0,
        "mfu": pytest.approx(0.10), "memory_gib": second["memory_gib"],
    }  # fmt: skip


def test_a_validation_is_a_line_and_a_record_and_no_step_s_time(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    log = start(tmp_path, tensorboard=True)
    clock.now += 1.0
    log.step(1, {"loss": 2.5}, tokens=100, flops=1.0)
    clock.now += 60.0
    log.validation(1, {"macro_f1": 0.75, "strict.auroc": None}, seconds=60.0)
    clock.now += 2.0
    log.step(2, {"loss": 2.0}, tokens=100, flops=1.0)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "validation after step 1 · macro_f1 0.7500 · 60.0 s"
    assert " 50 tok/s · 2.00 s" in lines[2]
    _, validation, second = records(tmp_path)
    assert validation == {"step": 1, "eval/macro_f1": 0.75}
    assert second["step_seconds"] == 2.0
    assert scalars(tmp_path)["eval/macro_f1"] == {1: 0.75}


def test_a_step_between_lines_is_timed_without_the_validation_after_it(tmp_path: Path, clock: Clock) -> None:
    log = start(tmp_path, every=2)
    for number in (1, 2):
        clock.now += 1.0
        log.step(number, {"loss": 2.5}, tokens=100, flops=1.0)
        clock.now += 60.0
        log.validation(number, {}, seconds=60.0)
    log.close()
    (step,) = [record for record in records(tmp_path) if "loss" in record]
    assert (step["step_seconds"], step["tokens_per_second"]) == (1.0, 100.0)


def test_the_last_step_of_a_run_that_ends_early_is_told(tmp_path: Path, clock: Clock) -> None:
    log = start(tmp_path, every=4)
    for number in range(1, 7):
        clock.now += 1.0
        log.step(number, {"loss": float(number)}, tokens=100, flops=1.0)
    log.close()
    assert [record["step"] for record in records(tmp_path)] == [4, 6]


def test_records_are_there_at_once(tmp_path: Path, clock: Clock) -> None:
    """A run that is killed leaves its numbers."""
    log = start(tmp_path)
    clock.now += 1.0
    log.step(1, {"loss": 2.5}, tokens=1, flops=1.0)
    assert [record["loss"] for record in records(tmp_path)] == [2.5]
    log.close()


def test_every_so_many_steps_and_the_last(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    log = start(tmp_path, steps=10, every=4, peak_tflops=1.0)
    for number in range(1, 11):
        clock.now += number  # a step takes as many seconds
        log.step(number, {"loss": float(number)}, tokens=100 * number, flops=0.5e12 * number)
    log.close()
    assert [line.split(" · ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 4/10", "step 8/10", "step 10/10"]
    found = records(tmp_path)
    assert [record["step"] for record in found] == [4, 8, 10]
    assert [record["loss"] for record in found] == [4.0, 8.0, 10.0]
    # Over all steps since the last line, not over the last step.
    assert [record["step_seconds"] for record in found] == [10 / 4, 26 / 4, 19 / 2]
    assert [record["tokens_per_second"] for record in found] == [100.0] * 3
    assert [record["mfu"] for record in found] == pytest.approx([0.5] * 3)


def test_the_eta_counts_from_the_step_of_the_resume(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    log = start(tmp_path, steps=7204, first=2)
    clock.now += 2.0
    log.step(4, {"loss": 1.0}, tokens=1, flops=1.0)  # 1 s a step, 7200 to go
    log.close()
    assert capsys.readouterr().out.rstrip().endswith(" · ETA 2:00:00")


def test_no_peak_no_mfu(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    log = start(tmp_path)
    clock.now += 1.0
    log.step(1, {"loss": 1.0}, tokens=1, flops=1e12)
    log.close()
    assert "mfu" not in records(tmp_path)[0]
    assert "MFU" not in capsys.readouterr().out


def test_what_is_no_number_is_still_json(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    log = start(tmp_path)
    for number, (loss, norm) in enumerate(((math.nan, math.inf), (-math.inf, math.nan), (1.0, 2.0)), 1):
        clock.now += 1.0
        log.step(number, {"loss": torch.tensor(loss), "grad_norm": norm, "nll/verdict": math.nan, "nll": math.inf}, tokens=1, flops=1.0)
    log.close()
    found = records(tmp_path)
    # A mean over nothing is left out. A loss never is: JSON has no NaN, so it is null.
    assert [record["loss"] for record in found] == [None, None, 1.0]
    assert [record["grad_norm"] for record in found] == [None, None, 2.0]
    assert [record["nll"] for record in found] == [None] * 3
    assert all("nll/verdict" not in record for record in found)
    first, second, _ = capsys.readouterr().out.splitlines()
    assert "loss nan · grad norm inf" in first
    assert "loss -inf · grad norm nan" in second
    assert "nll/verdict" not in first


def test_a_rank_that_does_not_report_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = start(tmp_path / "run", active=False, tensorboard=True)
    log.say("hello")
    log.step(1, {}, tokens=1, flops=1.0)
    log.close()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_say_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = start(tmp_path)
    log.say("qwen3 0.6B · tp 2")
    log.close()
    assert capsys.readouterr().out == "qwen3 0.6B · tp 2\n"


# ---- TensorBoard, and a run in two parts


def test_tensorboard_has_the_same_numbers(tmp_path: Path, clock: Clock) -> None:
    log = start(tmp_path, tensorboard=True, peak_tflops=1.0)
    for number in (1, 2, 3):
        clock.now += 1.0
        log.step(number, {"loss": 1.0 / number, "nll/verdict": math.nan if number == 2 else 0.5}, tokens=3, flops=1e11)
    log.close()
    found: dict[str, dict[int, float]] = {}
    for record in records(tmp_path):
        step = record.pop("step")
        for name, value in record.items():
            found.setdefault(name, {})[step] = pytest.approx(value, rel=1e-6)
    assert set(found) >= {"loss", "nll/verdict", "tokens_per_second", "mfu"}
    assert scalars(tmp_path) == found


def test_without_tensorboard_there_is_no_directory(tmp_path: Path) -> None:
    start(tmp_path).close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_goes_on_in_the_same_files(tmp_path: Path, clock: Clock) -> None:
    """Steps 1 to 3, a checkpoint after 2; the second part makes step 3 again."""
    for first, numbers, loss in ((0, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        log = start(tmp_path, first=first, tensorboard=True)
        for number in numbers:
            clock.now += 1.0
            log.step(number, {"loss": loss}, tokens=1, flops=1.0)
        log.close()
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)], "each once"
    assert scalars(tmp_path)["loss"] == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0}, "in TensorBoard too"


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    log = start(tmp_path, first=1)
    clock.now += 1.0
    log.step(2, {"loss": 2.0}, tokens=1, flops=1.0)
    log.close()
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(1, 1.0), (2, 2.0)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_that_lost_their_middle_stop_no_resume(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "lo\0\0\xff 1.0}\n{"step": 3, "lo{"step": 3}\n{}\n7\n')
    start(tmp_path, first=5).close()
    assert [record["step"] for record in records(tmp_path)] == [1]


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    log = start(tmp_path)
    log._metrics.close()
    log._metrics = (tmp_path / "full").open("a")
    for number in (1, 2):
        clock.now += 1.0
        log.step(number, {"loss": 1.0}, tokens=1, flops=1.0)
    log.close()
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if not line.startswith("step ")] == [
        "metrics.jsonl and TensorBoard: No space left on device: what could not be written is only printed"
    ]


# ---- what MFU is made of


def by_matmul(shape: Shape, lengths: list[int], labelled: int) -> float:
    """Every matrix product of a forward pass, m·n·k each, written down one by one."""
    total = 0.0

    def product(m: int, k: int, n: int, part: float = 1.0) -> None:
        nonlocal total
        total += part * 2 * m * k * n

    for name, size in hf_shapes(shape).items():
        if len(size) == 2 and name not in ("model.embed_tokens.weight", "lm_head.weight"):
            product(sum(lengths), size[1], size[0])
    for _layer in range(shape.layers):
        for length in lengths:
            for _head in range(shape.heads):
                product(length, shape.head_dim, length, part=0.5)  # q kᵀ, the causal half
                product(length, length, shape.head_dim, part=0.5)  # p v
    product(labelled, shape.hidden, shape.vocab)
    return total


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_flops_and_parameters_are_those_of_the_tensors(name: str) -> None:
    shape = tiny.shape(name)
    assert shape.parameters() == sum(math.prod(size) for size in hf_shapes(shape).values())
    for lengths, labelled in (([32], 0), ([7, 13, 12], 5), ([1, 1, 30], 32), ([], 0)):
        assert shape.flops(lengths, labelled) == by_matmul(shape, lengths, labelled)
    assert shape.flops([32], 0) > shape.flops([16, 16], 0), "shorter documents attend to less"
