"""tools/ask.py: an export answers through transformers alone, and its answers are read in the format that it names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from complaints import complaint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamod.config import ChatConfig
from megamod.data.chat import SETTINGS, companions
from megamod.verdicts import FORMATS, Verdict
from megamod.weights.checksums import SUMS
from tools import ask as tool
from tools import make_checkpoint

SAID = "unsafe\nViolent,PII\nReason: 威胁。"  # Llama Guard's lines
MESSAGES = ("I will find out where you live.", "明天见 [bold]x[/bold] \x1b[31m")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that has learned to say one thing, in another format than the default."""
    folder = tmp_path_factory.mktemp("ask")
    rows = [{"text": text, "label": "unsafe", "categories": ["Violent", "PII"], "reason": "威胁。"} for text in MESSAGES]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = folder / "hf"
    make_checkpoint.make(made, folder / "train.jsonl", vocab=320, layers=1, hidden=32, heads=2, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(made)
    model = AutoModelForCausalLM.from_pretrained(made)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        ask = {"role": "user", "content": MESSAGES[step % 2]}
        prompt = tokenizer.apply_chat_template([ask], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([tokenizer.apply_chat_template([ask, {"role": "assistant", "content": SAID}], return_dict=False)])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(made)
    for name, text in companions(ChatConfig(format="llama_guard")).items():
        (made / name).write_text(text, encoding="utf-8")
    (made / SUMS).unlink()  # of what it was before it learned
    return made


def copy(export: Path, to: Path) -> Path:
    return Path(shutil.copytree(export, to / "copy"))


def test_answers_are_read_in_the_model_s_own_format(export: Path) -> None:
    for answer, message in zip(tool.ask(str(export), MESSAGES), MESSAGES, strict=True):
        assert answer == tool.Answer(message, SAID, Verdict("unsafe", ("Violent", "PII"), reason="威胁。"))


def test_the_command_says_the_table_and_nothing_else(
    export: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert tool.main(["--model", str(export), *MESSAGES]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert lines == [
        [MESSAGES[0], "unsafe", "Violent, PII", "威胁。"],
        ["明天见 [bold]x[/bold] \\x1b[31m", "unsafe", "Violent, PII", "威胁。"],  # neither rich nor the terminal obeys a message
    ]


def test_no_verdict_is_shown_as_said_and_is_a_failure(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = copy(export, tmp_path)
    (directory / SETTINGS).unlink()  # so that Qwen3Guard's lines are expected
    assert tool.main(["--model", str(directory), MESSAGES[0]]) == 1
    out, err = capsys.readouterr()
    assert "no verdict" in out
    assert "Violent,PII" in out
    assert err == f"megamod: error: {directory}: no answer is a verdict in the model's format\n"


def test_one_verdict_is_enough(export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [tool.Answer("a", "what?", None), tool.Answer("b", "safe", FORMATS["llama_guard"].parse("safe"))]
    monkeypatch.setattr(tool, "ask", lambda *_: answers)
    assert tool.main(["--model", str(export), "a", "b"]) == 0
    out = capsys.readouterr().out
    assert "what?" in out
    assert "safe" in out


def test_the_answer_ends_where_it_is_told_to(export: Path) -> None:
    (answer,) = tool.ask(str(export), MESSAGES[:1], max_new_tokens=1)
    assert SAID.startswith(answer.text)
    assert len(answer.text) < len("unsafe\n")
    assert answer.verdict is None or answer.verdict == Verdict("unsafe")


def test_errors_are_one_line(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = copy(export, tmp_path)
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights, metadata={"format": "pt"})
    assert complaint(lambda: tool.ask(str(directory), MESSAGES)) == f"{directory}: missing weights: {name}"
    save_file({**tensors, name: tensors[name][:-1].clone()}, weights, metadata={"format": "pt"})
    assert complaint(lambda: tool.ask(str(directory), MESSAGES)).startswith(f"{directory}: ")
    weights.write_bytes(b"none")
    assert complaint(lambda: tool.ask(str(directory), MESSAGES)).startswith(f"{directory}: transformers cannot load a model from it: ")
    for arguments, wrong in (
        (["--model", "absent", "hi"], "absent: no such directory; a Hugging Face directory with a tokenizer was expected"),
        (["--model", "absent", "hi", "--max-new-tokens", "0"], "--max-new-tokens 0: at least 1 was expected"),
    ):
        assert tool.main(arguments) == 1
        assert capsys.readouterr() == ("", f"megamod: error: {wrong}\n")
