"""The tool that kills, starves and damages runs, in its short form: that runs come back from all of it, and that it would see if not."""

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamod import checkpoint, lives
from megamod.damage import WAYS, flip
from megamod.errors import MegamodError
from megamod.lives import Nursery, checkpoints_differ, metrics_differ
from tools import torture
from tools.torture import Call, Patients, Place, Report

SHARD = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    work = tmp_path_factory.mktemp("torture")
    torture.write_model(work)
    with Nursery(work) as nursery:
        yield Place(work, nursery, random.Random(1))


def holds(report: Report) -> None:
    assert report.faults == []
    assert report.claims
    assert all(report.claims.values()), report


# --- runs that are killed, starved and damaged -----------------------------------------------------------------------------


def test_kills(place: Place) -> None:
    report = torture.kills(place, 4, 2, 2)
    holds(report)
    assert sum(report.facts["phases"].values()) == report.facts["kills"] == 4
    assert report.facts["in a save"] >= 2


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_kill_before_a_system_call_of_a_save(place: Place) -> None:
    try:
        report = torture.syscalls(place, 5, 1, 1)
    except MegamodError as error:
        if "strace cannot attach" in str(error):
            pytest.skip(str(error))  # a container may forbid it
        raise
    holds(report)
    assert {"write", "fsync", "rename"} <= set(report.facts["kinds"])
    assert report.facts["calls"] > 15


def test_flipped_bits(place: Place) -> None:
    report = torture.flips(place, 18)
    holds(report)
    assert all(sum(found.values()) == 6 for found in report.facts["outcomes"].values())
    assert report.facts["verification"]["seconds per GB"] > 0


def test_other_damage(place: Place) -> None:
    """Each way once."""
    report = torture.corruptions(place, len(WAYS), 1)
    holds(report)
    assert all(sum(found.values()) == 1 for found in report.facts["outcomes"].values())


def test_disks(place: Place) -> None:
    report = torture.disk(place)
    holds(report)
    assert all(outcome in ("went on", "stopped with one line") for outcome in report.facts["outcomes"].values())


# --- the tool would see it -------------------------------------------------------------------------------------------------


def test_damage_that_nothing_notices_is_seen(place: Place) -> None:
    """A run that ends with one bit that is another than the reference's counts as silently damaged."""
    patients = Patients.of(place, "sabotage", 1)
    patients.fresh()
    assert patients.resumed() == (torture.UNHARMED, "")
    last = lives.newest(patients.reference)
    assert last is not None
    flip(last / SHARD, 8 * (last / SHARD).stat().st_size - 1)
    patients.fresh()
    outcome, text = patients.resumed()
    assert outcome == torture.SILENT
    assert "1 of" in text


def test_a_run_that_begins_again_is_seen(place: Place) -> None:
    patients = Patients.of(place, "again", 1)
    shutil.rmtree(patients.fresh())
    assert patients.resumed() == (torture.LOST, "")


def written(root: Path) -> Path:
    return checkpoint.write(root, 3, {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.zeros(2)})


def edit(path: Path, key: str, change: Any) -> None:
    tensors = load_file(path / SHARD)
    tensors[key] = change(tensors[key])
    save_file(tensors, path / SHARD)


def set_element(tensor: torch.Tensor, at: int, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


def edit_manifest(path: Path, change: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_equal_checkpoints_do_not_differ(tmp_path: Path) -> None:
    assert list(checkpoints_differ(written(tmp_path / "1"), written(tmp_path / "2"))) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda path: edit(path, "a.weight|master|0,0", lambda x: set_element(x, 6, 7.0)),
            "a.weight master: 1 of 12 elements, the first at [1, 2]: 6.0 and 7.0",
        ),
        (
            lambda path: edit(path, "b|exp_avg|0", lambda x: set_element(x, 1, -0.0)),  # equal as a number, and other bits
            "b exp_avg: 1 of 2 elements, the first at [1]: 0.0 and -0.0",
        ),
        (lambda path: edit(path, "b|exp_avg_sq|0", lambda x: x.double()), "b exp_avg_sq: torch.float32 [2] and torch.float64 [2]"),
        (lambda path: edit_manifest(path, lambda m: m.update(step=4)), "step: 3 and 4"),
        (lambda path: edit_manifest(path, lambda m: m.update(updates=4)), "updates: 0 and 4"),
        (
            lambda path: edit_manifest(path, lambda m: m["tensors"]["b"]["pieces"].append(m["tensors"]["b"]["pieces"][0])),
            "b master: whole and damaged (2 elements are not there once)",
        ),
        (lambda path: edit_manifest(path, lambda m: m["tensors"]["b"]["pieces"].pop()), "b exp_avg_sq: whole and absent"),
    ],
)
def test_what_differs_between_checkpoints_is_said(tmp_path: Path, change: Any, line: str) -> None:
    one, other = written(tmp_path / "1"), written(tmp_path / "2")
    change(other)
    assert list(checkpoints_differ(one, other)) == [line]


def test_what_differs_between_logged_numbers_is_said(tmp_path: Path) -> None:
    for name, third in (("1", 0.1), ("2", 0.1 + 2**-56)):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "loss": 0.5 if step < 3 else third, "step_seconds": third} for step in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    assert list(metrics_differ(tmp_path / "1", tmp_path / "2")) == [f"step 3: loss 0.1 and {0.1 + 2**-56!r}"]
    assert list(metrics_differ(tmp_path / "1", tmp_path / "1")) == []
    assert lives.steps_logged(tmp_path / "1") == 3


# --- how a kill is aimed and judged ----------------------------------------------------------------------------------------

OLD = {
    "latest": "step-00000002\n",
    "step-00000002/manifest.json": "{}",
    ".step-00000004.tmp/rank-00000.safetensors": "left by another life",
}
TWO = {"latest": "step-00000004\nstep-00000002\n", "step-00000004/manifest.json": "{}"}


@pytest.mark.parametrize(
    ("made", "gone", "expected"),
    [
        ({}, (), torture.BEFORE),
        ({"../metrics.jsonl": '{"step": 2}\n'}, (), torture.BEFORE),
        ({"../metrics.jsonl": '{"step": 3}\n'}, (), torture.BETWEEN),
        ({".step-00000006.tmp/": ""}, (), torture.MADE),
        ({".step-00000006.tmp/rank-00001.safetensors": "x"}, (), torture.SHARDS),
        ({".step-00000004.tmp/rank-00000.safetensors": "written anew"}, (), torture.SHARDS),
        ({".step-00000004.tmp/manifest.json": "{}"}, (), torture.WHOLE),
        ({"step-00000004/manifest.json": "{}"}, (".step-00000004.tmp",), torture.RENAMED),
        ({"step-00000004/manifest.json": "{}", ".latest.tmp": ""}, (), torture.TRACKER),
        (TWO | {"../metrics.jsonl": '{"step": 4}\n'}, (), torture.BETWEEN),
        ({"latest": "step-00000004\n", "step-00000004/manifest.json": "{}"}, (), torture.REMOVAL),
        (TWO | {".step-00000002.gone.tmp/manifest.json": "{}"}, ("step-00000002",), torture.REMOVAL),
    ],
)
def test_the_phase_of_a_kill(tmp_path: Path, made: dict[str, str], gone: Sequence[str], expected: str) -> None:
    def make(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / "checkpoints" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir()
            else:
                path.write_text(text)

    make(OLD)
    before, known = torture.seen(tmp_path), torture.listed_in(tmp_path)
    for name in gone:
        shutil.rmtree(tmp_path / "checkpoints" / name)
    make(made)
    assert torture.phase(tmp_path, before, known) == expected


def test_how_a_system_call_is_named() -> None:
    """By its number in its thread, where that is the first to get there; else on its path; and some cannot be named."""
    trace = """\
7 write(1</run/said.txt>, ""..., 10) = 10
9 openat(AT_FDCWD</home>, "/run/c/.tmpAbC", O_RDWR|O_CREAT|O_EXCL|O_CLOEXEC, 0600) = 5</run/c/.tmpAbC>
9 write(5</run/c/.tmpAbC>, ""..., 8192 <unfinished ...>
9 <... write resumed>) = 8192
9 write(5</run/c/.tmpAbC>, ""..., 8192) = 8192
9 openat(AT_FDCWD</home>, "/run/c", O_RDONLY|O_CLOEXEC) = 6</run/c>
9 fsync(6</run/c>) = 0
7 write(1</run/said.txt>, ""..., 10) = 10
7 write(1</run/said.txt>, ""..., 10) = 10
9 write(7</run/c/manifest.json>, ""..., 10) = 10
9 renameat(AT_FDCWD</home>, "/run/c/.tmpAbC", AT_FDCWD</home>, "/run/c/shard") = 0
7 write(3</run/latest>, ""..., 10) = 10
9 +++ exited with 0 +++
"""
    assert torture.calls_of(trace, 1, "/run/c") == [
        Call(1, "openat", 1, "/run/c/.tmpAbC"), "rank 1, write of .tmpAbC", Call(1, "write", 2, "/run/c/.tmpAbC"),
        Call(1, "fsync", 1, "/run/c"), Call(1, "write", 1, "/run/c/manifest.json", "/run/c/manifest.json"),
        Call(1, "renameat", 1, "/run/c/.tmpAbC"),
    ]  # fmt: skip


def test_without_strace_it_says_so(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torture.shutil, "which", lambda name: None)
    assert torture.syscalls(place, 5, 1, 1).facts == {"skipped": "strace is not installed"}
    assert capsys.readouterr().out == "syscalls · skipped: strace is not installed\n"


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["kill"], "'kill' is no part of this: choose from kills, syscalls,"),
        (["kills", "flips", "--count", "3"], "--count is read by corruptions, flips, kills, restarts, syscalls, one at a time"),
        (["kills", "--count", "0"], "--count 0: at least 1 was expected"),
        (["disk", "--tp", "2"], "--tp is read by corruptions, kills, syscalls"),
    ],
)
def test_the_command_line(capsys: pytest.CaptureFixture[str], arguments: list[str], wrong: str) -> None:
    assert torture.main(arguments) == 1
    error = capsys.readouterr().err
    assert wrong in error
    assert error.count("\n") == 1


def test_a_fork_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    with Nursery(tmp_path) as nursery:
        nursery._process.kill()
        with pytest.raises(MegamodError, match=r"has died: .*nursery.txt has what it said"):
            nursery.ask({"poll": []})
