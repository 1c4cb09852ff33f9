"""tools/adapter.py as a user runs it: in, out and merged; what it prints; one line for what goes wrong, and nothing left behind."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_peft import base_directory, differences, digest, full, made

from megamod import checkpoint
from megamod.config import LoraConfig, as_json
from megamod.weights import export as export_module
from megamod.weights import peft
from megamod.weights.fingerprint import of_source
from megamod.weights.load import Safetensors

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "adapter.py"
NAME = "qwen2"
CFG = LoraConfig(r=3, lora_alpha=6.0, target_modules=("q_proj", "down_proj"), rank_pattern={"down_proj": 10}, modules_to_save=("lm_head",))


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adapter_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAIN = tool().main


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_directory(tmp_path / "base", NAME, torch.bfloat16)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    tensors = made(CFG, tiny.shape(NAME), torch.bfloat16)
    return peft.write(tmp_path / "adapter", tensors, CFG, tiny.shape(NAME), base=str(base))


def test_as_a_command(tmp_path: Path, base: Path, adapter: Path) -> None:
    command = [sys.executable, str(TOOL), "import", "adapter", "--base", "base", "ours"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers = sum(t.numel() for t in load_file(adapter / peft.TENSORS).values())
    assert done.stdout.splitlines() == [
        "adapter: LoRA · rank 3, 10 · scale 0.6, 2 · 8 linears: down_proj, q_proj · lm_head.weight whole · "
        f"{numbers:,} parameters, bfloat16",
        "checkpoint: ours/step-00000000",
    ]
    about = checkpoint.read_about(tmp_path / "ours" / "step-00000000")[1]
    mark = of_source(Safetensors(base), tiny.shape(NAME), torch.bfloat16)
    assert about == {"lora": as_json(peft.read_config(adapter)), "model.path": "base", "dtype": "bfloat16", "dtypes": {}, "base": mark}

    command = [*command[:2], "merge", "absent", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    line = "absent/adapter_config.json: cannot be read (No such file or directory); a PEFT directory holds adapter_config.json"
    assert done.stderr.splitlines()[-1] == f"megamod: error: {line}"
    assert "Traceback" not in done.stderr


def test_there_and_back_and_merged(tmp_path: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(base), digest(adapter)
    ours, again = str(tmp_path / "ours"), str(tmp_path / "again")
    assert MAIN(["import", str(adapter), "--base", str(base), ours]) == 0
    assert MAIN(["export", ours, again]) == 0  # the newest checkpoint there, and its own base
    expected = load_file(adapter / peft.TENSORS)
    assert differences(load_file(tmp_path / "again" / peft.TENSORS), expected) == []
    assert json.loads((tmp_path / "again" / peft.CONFIG).read_text()) == json.loads((adapter / peft.CONFIG).read_text())

    # Merged alike from the directory, the checkpoint, and the directory that says its base.
    merged = []
    for i, (source, *more) in enumerate(([str(adapter), "--base", str(base)], [ours], [f"{ours}/step-00000000"], [again])):
        assert MAIN(["merge", source, str(tmp_path / f"merged{i}"), *more]) == 0
        merged.append(peft.whole(Safetensors(tmp_path / f"merged{i}")))
    assert [differences(one, merged[0]) for one in merged] == [[]] * 4
    assert MAIN(["merge", again, str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    wide = peft.whole(Safetensors(tmp_path / "wide"))
    assert differences({name: t.bfloat16() for name, t in wide.items()}, merged[0]) == []
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert (digest(base), digest(adapter)) == before
    assert f"merged: {tmp_path / 'wide'}" in capsys.readouterr().out


def test_an_imported_adapter_is_imported_with_its_fingerprint(tmp_path: Path, base: Path, adapter: Path) -> None:
    assert MAIN(["import", str(adapter), "--base", str(base), str(tmp_path / "ours")]) == 0
    assert MAIN(["export", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    with mock.patch.object(peft, "of_source", side_effect=["not this one"]):  # computed once, to compare
        assert MAIN(["import", str(tmp_path / "again"), "--base", str(base), str(tmp_path / "never")]) == 1
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["import", "adapter", "--base", "absent", "out"], "absent: cannot be read (No such file or directory); a Hugging Face directory"),
        (["import", "base", "--base", "base", "out"], "base/adapter_config.json: cannot be read (No such file or directory)"),
        (["import", "adapter", "--base", "other", "out"], "adapter: an adapter for another base, or not whole: 13 mis-shaped: "),
        (["import", "adapter", "--base", "base", "base"], "base: exists and is not an empty directory"),
        (["export", "adapter", "out"], "adapter/manifest.json: cannot be read (No such file or directory)"),
        (["export", "full", "out", "--base", "base"], "full/step-00000001: a checkpoint of whole weights, which holds no adapter"),
        (["merge", "nameless", "out"], "nameless: does not say which base it belongs to: name it with --base"),
        (["merge", "adapter", "adapter"], "adapter: exists and is not an empty directory"),
    ],
)
def test_one_line_and_nothing_left(
    tmp_path: Path, base: Path, adapter: Path, arguments: list[str], line: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base_directory(tmp_path / "other", "llama-3heads", torch.bfloat16)
    checkpoint.write(tmp_path / "full", 1, {"x": torch.zeros(1)})
    peft.write(tmp_path / "nameless", made(CFG, tiny.shape(NAME)), CFG, tiny.shape(NAME), base="")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert MAIN(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"megamod: error: {line}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (checkpoint, ["import", "adapter", "--base", "base", "out"]),
        (peft, ["export", "ours", "out"]),
        (export_module, ["merge", "adapter", "out"]),
    ],
    ids=["import", "export", "merge"],
)
def test_a_full_disk(
    tmp_path: Path, adapter: Path, module: ModuleType, arguments: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert MAIN(["import", "adapter", "--base", "base", "ours"]) == 0
    before = sorted(tmp_path.rglob("*"))
    with mock.patch.object(module, "save_file", full):
        assert MAIN(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
    assert MAIN(arguments) == 0  # and then it works
