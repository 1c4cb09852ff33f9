"""The tool that runs a user's config twice, undisturbed and killed, and compares: it finds both equal, and what is not."""

import json
import shutil
from pathlib import Path

import pytest
from complaints import complaint

from megamod import config, lives
from megamod.damage import flip
from tools import prove_resume

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")
SMALL = ["data.train.documents=32", "data.train.mean_length=20", "data.row_length=64", "data.rows_per_step=2", "log.tensorboard=false"]
STEPS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What the tool leaves of configs/tiny.py, which it has found equal."""
    work = tmp_path_factory.mktemp("prove") / "work"
    assert prove_resume.main([TINY, *SMALL, "--steps", str(STEPS), "--kills", "1", "--work", str(work)]) == 0
    return work / "undisturbed", work / "killed"


def judged(runs: tuple[Path, Path]) -> int:
    return prove_resume.compared(config.load(TINY, SMALL), runs, {"steps": STEPS})


def test_a_killed_run_is_equal(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(runs) == 0
    out = capsys.readouterr().out
    assert f"equal: the numbers of all {STEPS} steps in metrics.jsonl, but for the speed\n" in out
    assert f"equal: step-{STEPS:08d}, masters and moments of 46 tensors, to the bit\n" in out
    assert json.loads(out.splitlines()[-1]) == {"equal": True, "steps": STEPS, "metrics": [], "tensors": []}
    lines = [json.loads(line)["step"] for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*range(1, STEPS + 1)]
    said = runs[1].with_name("killed.txt").read_text()
    assert said.count("tp 1 · pp 1") == 2, "it has lived twice"


def test_one_other_bit_is_found(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sabotaged = shutil.copytree(runs[1], tmp_path / "sabotaged")
    last = lives.newest(sabotaged)
    assert last is not None
    shard = last / "rank-00000.safetensors"
    flip(shard, 8 * shard.stat().st_size - 1)
    assert judged((runs[0], sabotaged)) == 1
    out = capsys.readouterr().out
    assert f"equal: the numbers of all {STEPS} steps" in out
    assert "the last checkpoints differ in 1 things: model." in out
    assert "1 of" in json.loads(out.splitlines()[-1])["tensors"][0]


def test_another_loss_is_found(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sabotaged = shutil.copytree(runs[1], tmp_path / "sabotaged")
    file = sabotaged / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[2]["loss"] += 1e-15 + lines[2]["loss"] * 2**-52
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert judged((runs[0], sabotaged)) == 1
    assert "the steps' numbers differ, 1 of them; the first: step 3: loss " in capsys.readouterr().out


def test_a_run_that_leaves_nothing_is_said(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert complaint(lambda: judged((runs[0], tmp_path))) == f"{tmp_path}: the run has left no checkpoint"


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ([TINY, "--kills", "0"], "--kills 0: at least 1 was expected"),
        ([TINY, "--steps", "1"], "--steps 1: at least 2 was expected"),
        ([TINY, "optim.rl=1"], "optim.rl"),
        (["no.py"], "no.py: no such config file"),
        ([TINY, "--work", "/dev/null/x"], "a new directory that can be made was expected"),
    ],
)
def test_the_command_line(capsys: pytest.CaptureFixture[str], arguments: list[str], wrong: str) -> None:
    assert prove_resume.main(arguments) == 1
    error = capsys.readouterr().err
    assert wrong in error
    assert error.count("\n") == 1
