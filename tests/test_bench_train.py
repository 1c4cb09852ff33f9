"""The tool that times LoRA training beside Hugging Face's Trainer: that it runs, and that both train the same. Not how fast."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from complaints import complaint

from megamod.data.documents import Document, InMemory
from megamod.data.packing import pack
from tools import bench_train
from tools.bench_train import EPOCHS, OURS, THEIRS, Ran

ROOT = Path(__file__).parents[1]
NAMES = [OURS, *THEIRS]
RAN = Ran(seconds=2.0, cpu_seconds=4.0, updates=8, labelled=20, positions=110, loss=6.0, first_loss=6.5, first_norm=0.25)


def test_all_train_the_same() -> None:
    pytest.importorskip("peft")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_train.py"), "--quick"], env={**environment, "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split(" · ")[1] for line in lines if line.startswith("1/1 · ")] == NAMES
    answer = json.loads(lines[-1])
    assert set(answer) == {"settings", "tokens", "labelled", "versions", "git", "found", "ratios", "cpu_ratios"}
    assert {"torch", "megatron-core", "transformers", "peft", "accelerate"} <= set(answer["versions"])
    assert answer["settings"]["documents"] == 32
    assert answer["settings"]["targets"] == "all-linear"

    assert list(answer["found"]) == NAMES
    (mine,) = answer["found"][OURS]["runs"]
    for name, one in answer["found"].items():
        assert one["labelled"] == answer["labelled"] > 0
        assert one["updates"] == 4
        assert one["tokens_per_second"] > 0
        (ran,) = one["runs"]
        assert ran["first_loss"] == pytest.approx(mine["first_loss"], rel=1e-5), name
        assert ran["first_norm"] == pytest.approx(mine["first_norm"], rel=1e-4), name
        assert ran["loss"] == pytest.approx(mine["loss"], abs=0.1), name
    assert answer["found"]["batch 1"]["positions_per_token"] == 1.0
    assert 1.0 <= answer["found"][OURS]["positions_per_token"] < 1.1
    assert answer["found"]["batch 8 grouped"]["positions_per_token"] > 1.0
    assert set(answer["ratios"]) == set(answer["cpu_ratios"]) == set(THEIRS)


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (replace(RAN, first_loss=6.51), "batch 1: first_loss is 6.510000, megamod's 6.500000: they do not train the same"),
        (replace(RAN, first_norm=0.26), "batch 1: first_norm is 0.260000, megamod's 0.250000"),
        (replace(RAN, labelled=19), "batch 1: 8 updates over 19 labelled tokens; 8 over 20 were expected"),
        (replace(RAN, updates=4), "batch 1: 4 updates over 20 labelled tokens; 8 over 20 were expected"),
        (replace(RAN, first_loss=float("nan")), "batch 1: first_loss is nan"),
    ],
)
def test_others_than_ours_are_refused(other: Ran, wrong: str) -> None:
    same = {name: [RAN, replace(RAN, first_loss=6.501)] for name in NAMES}
    bench_train.refuse(same, RAN.labelled // EPOCHS, "float32")
    different = {**same, "batch 1": [RAN, other]}
    assert wrong in complaint(lambda: bench_train.refuse(different, RAN.labelled // EPOCHS, "float32"))


def test_medians() -> None:
    runs = [replace(RAN, seconds=seconds) for seconds in (9.0, 1.0, 2.0)]
    found = bench_train.summary(runs, tokens=50)
    assert (found["tokens_per_second"], found["tokens_per_cpu_second"], found["positions_per_token"]) == (25.0, 12.5, 1.1)
    assert found["each"] == [50 / 9, 50.0, 25.0]


def test_rows_are_as_many_as_updates() -> None:
    rng = np.random.default_rng(1)
    made = InMemory([document(int(length)) for length in rng.integers(5, 200, 64)])
    length = bench_train.row_length(made, 4)
    assert len(pack(made.lengths, length)) == 4
    assert len(pack(made.lengths, length - 1)) == 5
    two = InMemory([document(9), document(3)])
    assert complaint(lambda: bench_train.row_length(two, 3)).startswith("no row length makes 3 rows of these documents, 9 make 2:")


def document(length: int) -> Document:
    tokens = np.zeros(length, np.int64)
    return Document(tokens, tokens, tokens.astype(np.bool_))


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("--documents", "0"), "--documents 0: at least 1 was expected"),
        (("--per-update", "12"), "--documents 64 --per-update 12: a multiple of 8 was expected, and documents a multiple of it"),
        (("--documents", "40"), "--documents 40 --per-update 16: a multiple of 8 was expected, and documents a multiple of it"),
        (("--labelled", "2"), "--labelled 2.0: 0 to 1, finite, was expected"),
        (("--mean", "nan"), "--mean nan: at least 1, finite, was expected"),
        (("--shape", "nowhere"), "nowhere"),
        (("--quick", "--targets", "q_prj"), "'q_prj' names no linear of this model, did you mean 'q_proj'?"),
        (("--work", str(ROOT)), "exists; a new directory was expected"),
    ],
)  # fmt: skip
def test_a_bench_that_cannot_be(arguments: tuple[str, ...], wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    assert bench_train.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megamod: error: ")
    assert len(err.splitlines()) == 1
    assert wrong in err
