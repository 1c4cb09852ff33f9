"""The command as a user launches it, `torchrun -m megamod.train`, on two ranks: what goes wrong is one line, said once; what goes
right leaves a run that says what it was, that others can load, and that goes on where it stopped."""

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from megamod import config, train, versions
from megamod.config import ParallelConfig
from megamod.errors import MegamodError
from megamod.model.shape import read_shape
from megamod.parallel import grid as grids

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")


def torchrun(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two ranks, in `folder`, without anything of pytest's own environment that would make a difference."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megamod.train", *arguments]
    return subprocess.run(command, cwd=folder, env={**inherited, **ours}, capture_output=True, text=True, timeout=600)


# --- what goes wrong -------------------------------------------------------------------------------------------------------

OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as launch/env.sh: rank 0 keeps the store, which dies with it


@pytest.mark.parametrize(
    ("overrides", "environment", "wrong"),
    [
        (["optim.lrr=1"], OWN_STORE, "override optim.lrr=1: OptimConfig has no field 'lrr', did you mean 'lr'?"),
        (["parallel.cp=3"], {}, "tp 1 × pp 1 × cp 3 = 3 does not divide 2 ranks: launch 3"),
        (["data.train=documents.jsonl"], OWN_STORE, "documents.jsonl:2: unknown key 'label', did you mean 'labels'?"),
        (
            ["model.path=absent", "model.init=load"], {},
            "absent: cannot be read (No such file or directory); a Hugging Face directory holds config.json",
        ),
    ],
    ids=["typo", "grid", "data", "model"],
)  # fmt: skip
def test_an_error_is_one_line_said_once(tmp_path: Path, overrides: list[str], environment: dict[str, str], wrong: str) -> None:
    (tmp_path / "documents.jsonl").write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [1, 2], "label": [1, 2]}\n')
    before = sorted(tmp_path.rglob("*"))
    done = torchrun(tmp_path, TINY, "dir=run", *overrides, **environment)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "megamod: error" in line] == [f"megamod: error: {wrong}"]
    assert f"{ROOT / 'megamod'}{os.sep}" not in done.stderr  # no frame of ours: a traceback is torchrun's summary
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_without_torchrun_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert train.main(["absent.py"]) == 1
    assert capsys.readouterr() == ("", "megamod: error: absent.py: no such config file\n")


@pytest.mark.parametrize(
    ("package", "found", "wrong"),
    [
        ("megatron-core", "0.16.0", "megatron-core 0.16.0 is installed, megamod fits 0.16.1: pip install megatron-core==0.16.1"),
        ("megatron-core", "0.17.0", "megatron-core 0.17.0 is installed"),
        ("torch", "2.10.1+cu128", "torch 2.10.1+cu128 is installed, megamod fits 2.11 up to below 2.14"),
        ("torch", "2.14.0a0+git1234", "torch 2.14.0a0+git1234 is installed, megamod fits 2.11 up to below 2.14"),
        ("torch", "2.9.0", "torch 2.9.0 is installed"),
        ("torch", "3.0.0", "torch 3.0.0 is installed"),
        ("torch", "1.13.0", "torch 1.13.0 is installed"),
        ("transformers", "5.24.0", "transformers 5.24.0 is installed, megamod fits 5.23 up to below 5.24"),
        ("transformers", "4.57.1", "transformers 4.57.1 is installed"),
    ],
)
def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch, package: str, found: str, wrong: str) -> None:
    monkeypatch.setattr(versions, "version", lambda name: found if name == package else version(name))
    with pytest.raises(MegamodError) as caught:
        grids.start(ParallelConfig(), tiny.shape("qwen2"))
    assert str(caught.value).startswith(wrong)
    assert not torch.distributed.is_initialized()  # refused before anything is joined


@pytest.mark.parametrize("found", ["2.11.0", "2.13.1+cu130", "2.12.0a0+git1234"])
def test_releases_that_fit(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    versions.check()  # what is installed here
    monkeypatch.setattr(versions, "version", lambda name: found if name == "torch" else version(name))
    versions.check()


# --- what goes right -------------------------------------------------------------------------------------------------------


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def exported(directory: Path) -> dict[str, torch.Tensor]:
    """The export's tensors, as transformers finds them: all of them, and no other."""
    model, about = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == read_shape(directory).parameters()
    tokens = torch.arange(12)[None]
    assert math.isfinite(model(tokens, labels=tokens).loss.detach())
    return {name: p.detach() for name, p in model.named_parameters()}


def test_a_run_and_its_continuation(tmp_path: Path) -> None:
    overrides = ["dir=run", "parallel.tp=2", "parallel.sp=true", "log.every=1", "data.row_length=128", "loss.verdict_weight=3"]
    run = tmp_path / "run"

    done = torchrun(tmp_path, TINY, *overrides, "steps=2", **OWN_STORE)
    assert done.returncode == 0, done.stderr
    assert "resumed" not in done.stdout
    assert "step 2/2" in done.stdout
    first = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in first] == [1, 2]
    for line in first:
        assert all(math.isfinite(line[name]) for name in ("loss", "nll", "lr", "grad_norm", "tokens_per_second"))
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert about["config"] == json.loads(json.dumps(config.as_json(config.load(TINY, [*overrides, "steps=2"]))))
    assert about["versions"].items() >= {name: version(name) for name in ("torch", "megatron-core", "transformers")}.items()
    assert about["grid"] == "tp 2 · pp 1 · cp 1 · dp 1 · sp"
    assert list((run / "tensorboard").iterdir())
    before = exported(run / "hf" / "step-00000002")

    done = torchrun(tmp_path, TINY, *overrides, "steps=4", **OWN_STORE)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 2 from run/checkpoints/step-00000002" in done.stdout
    assert "step 3/4" in done.stdout
    assert "step 2/4" not in done.stdout
    lines = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:2] == first
    assert math.isfinite(lines[-1]["loss"])
    assert (run / "checkpoints" / "latest").read_text() == "step-00000004\nstep-00000002\n"
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]["steps"] == 4
    after = exported(run / "hf" / "step-00000004")
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)
