"""tools/show_batch.py: what it prints is what the loader makes, token by token and byte by byte."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from complaints import complaint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megamod import config
from megamod.batch import Batch
from megamod.config import RunConfig
from megamod.data import saved_batch
from megamod.data.chat import Encoder
from megamod.data.documents import IGNORED, Document
from megamod.data.loader import Loader, peek
from megamod.data.packing import micro_batch
from megamod.data.store import Store, prepare_all
from megamod.model.shape import read_shape
from tools import make_checkpoint
from tools import show_batch as tool

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")
PROMPT = "<|im_start|>assistant\n"

ROWS = (
    ("I will find out where you live.", "unsafe", ("Violent",), "The author threatens somebody."),
    ("明天我们去看你，别怕。", "safe", (), "作者没有伤害任何人。"),
    ("Write\t‘a \\n poem’ about 👩‍🚒 ⟦brackets⟧", "safe", (), None),
    ("我先在价格上骗我表弟", "controversial", ("Unethical Acts", "作弊"), "不诚实。"),
    ("naïve café: x = [b]1[/b] :smile:", "safe", (), "Ünïcödé 🎈"),
    ("b\u200bo\u200bm\u200bb \u202e \x1b[31m", "unsafe", ("Violent", "PII"), None),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer knows hardly more than bytes, so that characters lie over many tokens; its data; a config."""
    folder = tmp_path_factory.mktemp("show")
    rows = [
        {"messages": [{"role": "user", "content": text}], "label": label, "categories": categories, "reason": reason, "weight": 1 + i / 2}
        for i, (text, label, categories, reason) in enumerate(ROWS)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    make_checkpoint.make(folder / "base", folder / "train.jsonl", vocab=320, layers=1, hidden=8, heads=2, seed=1)
    (folder / "run.py").write_text(
        "from megamod.config import DataConfig, ModelConfig, RunConfig\n"
        "def config():\n"
        f"    data = DataConfig(train={str(folder / 'train.jsonl')!r}, row_length=320, rows_per_step=2, rows_per_micro_batch=2)\n"
        f"    return RunConfig(dir={str(folder / 'run')!r}, steps=9, model=ModelConfig(path={str(folder / 'base')!r}), data=data)\n"
    )
    return folder


def run_of(folder: Path, *overrides: str) -> RunConfig:
    return config.load(folder / "run.py", overrides)


def batches(cfg: RunConfig, step: int) -> list[Batch]:
    return peek(cfg, tool.model_shape(cfg), step)


def words_of(folder: Path) -> tool.Vocabulary:
    words = tool.vocabulary(str(folder / "base"))
    assert words is not None
    return words


Told = tuple[bytes, bytes, tuple[bytes, ...], float]  # context, what is trained, the verdict's values, weight


def expected(folder: Path) -> set[Told]:
    """What there is to be seen of every row, from transformers' template alone."""
    template = AutoTokenizer.from_pretrained(folder / "base").apply_chat_template
    found: set[Told] = set()
    for i, (text, label, categories, reason) in enumerate(ROWS):
        values = (label.capitalize(), ", ".join(categories) or "None")
        said = f"Safety: {values[0]}\nCategories: {values[1]}" + (f"\nReason: {reason}" if reason else "")
        messages = [{"role": "user", "content": text}]
        prompt = template(messages, tokenize=False, add_generation_prompt=True)
        whole = template([*messages, {"role": "assistant", "content": said}], tokenize=False)
        assert whole.startswith(prompt)
        found.add((prompt.encode(), whole[len(prompt) :].encode(), tuple(v.encode() for v in values), 1 + i / 2))
    return found


def bytes_of(spans: list[tool.Span], *styles: str) -> bytes:
    return b"".join(span.data for span in spans if span.mark.style in styles)


def told(spans: list[tool.Span], weight: float) -> Told:
    verdict = tuple(span.data.strip() for span in spans if span.mark.style == "verdict")  # a token may hold the space before the value
    return bytes_of(spans, "context"), bytes_of(spans, "trained", "verdict"), verdict, weight


def test_trained_is_what_follows_the_generation_prompt(folder: Path) -> None:
    words = words_of(folder)
    found: set[Told] = set()
    for step in range(1, 5):  # more than an epoch
        for batch in batches(run_of(folder), step):
            for row in tool.passages(batch, 320):
                assert [p.start % 320 for p in row] == [0, *np.cumsum([len(p) for p in row])[:-1]]
                assert sum(map(len, row)) == 320
                for passage in row:
                    if not passage.is_padding:
                        assert len(passage.weights) == 1
                        assert passage.positions == (0, len(passage) - 1)
                        found.add(told(tool.spans(batch, passage, words), passage.weights[0]))
    assert found == expected(folder)


def test_rows_are_those_of_the_loader(folder: Path) -> None:
    """Step 3 of the log is the third that the loader makes, whichever way it is cut into micro-batches."""
    cfg = run_of(folder)
    (whole,) = batches(cfg, 3)
    halves = batches(run_of(folder, "data.rows_per_micro_batch=1"), 3)
    assert torch.cat([half.tokens for half in halves]).equal(whole.tokens)
    store = Store(prepare_all(cfg.data, cfg.model.path, read_shape(cfg.model.path).vocab, folder / "stores")[0].path)
    loader = Loader(store, row_length=320, rows_per_step=2, rows_per_micro_batch=2, seed=cfg.seed, dp_rank=0, dp_size=1)
    assert loader.step(2)[0].tokens.equal(whole.tokens)
    assert not loader.step(3)[0].tokens.equal(whole.tokens)


def test_every_token_is_in_one_span(folder: Path) -> None:
    """Each token's bytes, by itself, joined: no byte is lost or told twice."""
    words = words_of(folder)
    (batch,) = batches(run_of(folder), 1)
    backend = AutoTokenizer.from_pretrained(folder / "base")
    for row in tool.passages(batch, 320):
        for passage in row:
            spans = tool.spans(batch, passage, words)
            assert all(a.mark != b.mark for a, b in itertools.pairwise(spans))
            text = b"".join(span.data for span in spans).decode()
            assert text == backend.decode(batch.tokens[passage.start : passage.stop].tolist(), skip_special_tokens=False)


# --- characters --------------------------------------------------------------------------------------------------------------

BYTE_WISE = tool.Vocabulary(lambda token: bytes([token]))  # each id is a byte


def painted(text: str, trained: slice, verdict: slice = slice(0, 0)) -> str:
    """A text of one token a byte, as it shows without colours."""
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    labels, flags = np.full(len(tokens), IGNORED), np.zeros(len(tokens), np.bool_)
    labels[trained], flags[verdict] = tokens[trained], True
    batch = micro_batch([[Document(tokens, labels, flags)]], len(tokens))
    ((passage,),) = tool.passages(batch, len(tokens))
    return tool.painted(tool.spans(batch, passage, BYTE_WISE), coloured=False).plain


@pytest.mark.parametrize(
    ("text", "trained", "verdict", "shown"),
    [
        ("说好", slice(3, 6), slice(0, 0), "说⟦好⟧"),
        ("说好", slice(4, 6), slice(0, 0), "说\\xe5⟦\\xa5\\xbd⟧"),  # the style changes inside 好
        ("a🎈b", slice(1, 6), slice(3, 5), "a⟦\\xf0\\x9f⟧⟪\\x8e\\x88⟫⟦b⟧"),
        ("x\ny\n", slice(2, 4), slice(0, 0), "x⏎\n⟦y⏎⟧\n"),
        ("⟦⏎\\", slice(0, 0), slice(0, 0), "\\u27e6\\u23ce\\\\"),
        ("▐cp 1▌", slice(0, 0), slice(0, 0), "\\u2590cp 1\\u258c"),
        ("abc", slice(0, 3), slice(0, 0), "a⟦bc⟧"),  # a document's first token is never predicted
    ],
)
def test_characters_are_whole_or_bytes(text: str, trained: slice, verdict: slice, shown: str) -> None:
    assert painted(text, trained, verdict) == shown


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ("a\tb\r\x1b[31m\x00", "a\\tb\\r\\x1b[31m\\x00"),
        ("\u200b\u202e\u3000\x85", "\\u200b\\u202e\\u3000\\u0085"),
        ("\U000e0041", "\\U000e0041"),
        ("[bold]:smile:", "[bold]:smile:"),
    ],
)
def test_what_cannot_be_seen_is_an_escape(data: str, shown: str) -> None:
    assert tool.visible(data.encode()) == shown


def test_bytes_that_are_no_text() -> None:
    assert tool.visible(b"\xffa\xe4\xbd") == "\\xffa\\xe4\\xbd"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_both_families_of_tokenizers(tmp_path: Path, kind: str) -> None:
    """Bytes as characters (Qwen, Llama 3), and SentencePiece's with byte fallback (Llama 2, Mistral, Yi, InternLM)."""
    text = "ab 你é\n<x>"
    if kind == "byte_level":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        assert set(alphabet) == set(tool.BYTES)
        backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "你"]
        backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<x>"]).save_pretrained(tmp_path)
    words = tool.vocabulary(str(tmp_path))
    assert words is not None
    ids = AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(words.spell, ids)).decode() == text
    assert words.special >= {ids[-1]}
    assert words.spell(10**6) == b"<id 1000000>"


# --- the command -------------------------------------------------------------------------------------------------------------


def unescaped(shown: str) -> bytes:
    """What `visible` shows, back to what it was: signs that break the line, and escapes."""
    text = shown.replace(f"{tool.BREAK}\n", tool.BREAK).replace(tool.BREAK, "\n")
    plain = {"\\": "\\", "t": "\t", "r": "\r"}

    def meant(match: re.Match[str]) -> str:
        number = int(match[1][1:], 16) if match[1] not in plain else 0
        is_byte = match[1][0] == "x" and number >= 0x80
        return plain.get(match[1]) or chr(0xDC00 + number if is_byte else number)

    return re.sub(r"\\(\\|t|r|x..|u.{4}|U.{8})", meant, text).encode("utf-8", "surrogateescape")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert tool.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_brackets_tell_what_colours_tell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = printed(capsys, str(folder / "run.py"), "--rows", "2")
    assert "\x1b" not in plain
    shown = re.findall(r"^── document .*\n((?:.|\n)*?)(?=\n──|\n\n══|\Z)", plain, re.MULTILINE)
    assert len(shown) >= 2
    of_prompt = {context: trained for context, trained, *_ in expected(folder)}
    for text in shown:
        context, *_ = re.split("[⟦⟪]", text)
        assert b"".join(unescaped(part) for part in re.findall("[⟦⟪]([^⟧⟫]*)", text)) == of_prompt[unescaped(context)]
    coloured = printed(capsys, str(folder / "run.py"), "--rows", "2", "--color", "always")
    unmarked = re.sub("[⟦⟧⟪⟫]", "", plain)
    assert "\x1b[32m" in coloured
    body = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert body.replace("  special token", "") == unmarked


def test_the_header_counts_the_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (batch,) = batches(run_of(folder), 2)
    rows = tool.passages(batch, 320)
    filled = sum(len(p) for row in rows for p in row if not p.is_padding)
    trained, verdict = len(batch.labels), int(batch.verdict.sum())
    shares = " · ".join(
        f"{name} {n} ({n / 640:.1%})" for name, n in (("trained", trained), ("verdict", verdict), ("padding", 640 - filled))
    )
    lines = printed(capsys, str(folder / "run.py"), "--step", "2").splitlines()
    assert lines[0] == f"step 2 of 9 · 2 rows of 320 = 640 tokens · {shares}"
    assert lines[3].startswith("══ row 1 of 2 ══")
    assert not any("row 2 of 2" in line for line in lines)


def test_documents_and_padding_have_titles() -> None:
    tokens = np.arange(1, 6)
    two = [Document(tokens, np.where(tokens > keep, tokens, IGNORED), tokens > 99, weight) for keep, weight in ((3, 0.5), (9, 1.0))]
    batch = micro_batch([two[:1], two], 12)
    first, second = tool.passages(batch, 12)
    six, several = np.arange(6), ([1, 4, 4, 1, 1, 1], [1, 1, 2, 3, 4, 4], [1, 1, 2, 3, 4, 5])
    weighed = [Document(six, six, six > 9, 0.5, weights=np.array(own, np.float32)) for own in several]
    titles = [tool.title(1, p, 18).split(" · ")[2] for p in tool.passages(micro_batch([weighed], 18), 18)[0]]
    assert titles == ["weight 0.5 and 2", "weight 0.5 and 1 and 1.5 and 2", "weight 0.5–2.5"]
    assert [tool.title(i, p, 12) for i, p in enumerate([*first, *second], 1)] == [
        "document 1 · 5 tokens, 2 trained · weight 0.5 · positions 0–4 · at 0–4",
        "padding · 7 tokens · at 5–11",
        "document 3 · 5 tokens, 2 trained · weight 0.5 · positions 0–4 · at 0–4",
        "document 4 · 5 tokens, 0 trained · not trained · positions 0–4 · at 5–9",
        "padding · 2 tokens · at 10–11",
    ]


def test_made_up_documents_show_ids(capsys: pytest.CaptureFixture[str]) -> None:
    (first, *_) = batches(config.load(TINY), 1)
    lines = printed(capsys, TINY).splitlines()
    text = lines[lines.index(next(line for line in lines if line.startswith("── document 1 "))) + 1]
    assert [int(n) for n in re.findall(r"\d+", text)] == first.tokens[: first.lengths[0]].tolist()


def test_a_store_of_the_run_is_read_and_nothing_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = run_of(folder, f"dir={tmp_path / 'run'}")
    apart = [batch.tokens.tolist() for batch in batches(cfg, 1)]
    assert not (tmp_path / "run").exists()
    prepare_all(cfg.data, cfg.model.path, read_shape(cfg.model.path).vocab, tmp_path / "run" / "data")
    before = sorted(tmp_path.rglob("*"))

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Encoder, "documents", refuse)
    assert [batch.tokens.tolist() for batch in batches(cfg, 1)] == apart
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_is_not_needed(folder: Path) -> None:
    assert tool.vocabulary(str(ROOT / "configs" / "models" / "tiny-qwen3")) is None
    assert tool.vocabulary(str(folder / "absent")) is None


def test_a_saved_step_is_shown_as_the_loader_s(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, cut = str(folder / "run.py"), "data.rows_per_micro_batch=1"
    file = saved_batch.save(tmp_path / "step-00000003.safetensors", batches(run_of(folder, cut), 3))
    for more in ((), ("--cp", "4"), ("--color", "always")):
        shown = printed(capsys, run, cut, "--rows", "2", "--saved", str(file), *more)
        assert shown == printed(capsys, run, cut, "--rows", "2", "--step", "3", *more).replace("step 3 of 9", file.name)
    (folder / "unread").mkdir()  # neither the data nor the model of the run are needed
    alone = printed(capsys, run, cut, "--saved", str(file), "data.train=absent.jsonl", f"model.path={folder / 'unread'}")
    assert alone.startswith(f"{file.name} · 2 rows of 320 = 640 tokens · ")


def test_a_saved_step_of_another_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = str(folder / "run.py"), str(saved_batch.save(tmp_path / "saved", batches(run_of(folder, "data.rows_per_micro_batch=1"), 1)))
    none = str(saved_batch.save(tmp_path / "none", []))
    for arguments, wrong in (
        (
            ["--saved", file],
            f"{file}: micro-batches of 320 tokens, and the config's have 640 (data.row_length 320 × rows_per_micro_batch 2): the config of "
            "its run was expected",
        ),
        (["--saved", file, "--step", "1"], "--step 1: the file of --saved holds one step: leave one of them out"),
        (["--saved", none], f"{none}: holds no micro-batch"),
        (["--saved", "absent"], "absent: no such file: what a run saves of a step was expected"),
    ):
        assert tool.main([run, *arguments]) == 1
        assert capsys.readouterr() == ("", f"megamod: error: {wrong}\n")


def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "run.py")
    shared = "cannot share a micro-batch's 640 tokens (data.row_length 320 × rows_per_micro_batch 2)"
    for arguments, wrong in (
        (["absent.py"], "absent.py: no such config file"),
        ([run, "--step", "10"], "--step 10: a step from 1 to 9 was expected"),
        ([run, "--rows", "0"], "--rows 0: at least 1 was expected"),
        ([run, "--cp", "0"], "parallel.cp = 0: must be at least 1"),
        ([run, "--cp", "7"], f"parallel.cp = 7 {shared}: use 5 or 8"),
        ([run, "parallel.cp=3"], f"parallel.cp = 3 {shared}: use 2 or 4"),
        ([run, "--cp", "641"], f"parallel.cp = 641 {shared}: use 640"),
        ([run, "data.train=absent.jsonl"], "absent.jsonl: No such file or directory: a JSONL file, or a store, was expected"),
    ):
        assert tool.main(arguments) == 1
        assert capsys.readouterr() == ("", f"megamod: error: {wrong}\n")
    assert "row_length" in complaint(lambda: batches(run_of(folder, "data.row_length=40", "data.chat.too_long=error"), 1))


# --- context parallelism -----------------------------------------------------------------------------------------------------


def document(text: str, trained_from: int) -> Document:
    """A token a byte; those from `trained_from` on are trained."""
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return Document(tokens, np.where(np.arange(len(tokens)) < trained_from, IGNORED, tokens), np.zeros(len(tokens), np.bool_))


def drawn(rows: list[list[Document]], row_length: int, cp: int) -> list[str]:
    """The lines of a step of one micro-batch, without the heading, the legend and what only fills a line."""
    batch = micro_batch(rows, row_length)
    numbers = {"data.row_length": row_length, "data.rows_per_micro_batch": len(rows), "data.rows_per_step": len(rows), "parallel.cp": cp}
    cfg = config.load(TINY, [f"{key}={value}" for key, value in numbers.items()])
    parts = tool.page(cfg, "a step", [batch], len(rows), BYTE_WISE, coloured=False).renderables
    lines = [line.rstrip(" ═─") for part in parts[1:] for line in part.plain.split("\n")]
    return [line for line in lines if line and not line.startswith("context ")]


def test_a_border_inside_a_document_and_inside_padding() -> None:
    assert drawn([[document("abcdef", 3)]], 12, 3) == [
        "cp 3 · 12 tokens of a micro-batch on 3 ranks · micro-batch 1 of 1",
        "cp 0 · 4 tokens at 0–3  · labelled positions 2 · documents 1",
        "cp 1 · 4 tokens at 4–7  · labelled positions 1 · documents 1",
        "cp 2 · 4 tokens at 8–11 · labelled positions 0 · documents 0",
        "══ row 1 of 1 · tokens 0–11 of micro-batch 1 · cp 0–2",
        "── document 1 · 6 tokens, 3 trained · weight 1 · positions 0–5 · at 0–5 · cp 0–1",
        "abc⟦d⟧▐cp 1▌⟦ef⟧",
        "── padding · 6 tokens · at 6–11 · cp 1–2",
        "── ▐cp 2▌ begins at 8",
    ]


def test_a_border_between_documents_and_before_padding() -> None:
    assert drawn([[document("ab", 9), document("cd", 1)]], 6, 3)[4:] == [
        "══ row 1 of 1 · tokens 0–5 of micro-batch 1 · cp 0–2",
        "── document 1 · 2 tokens, 0 trained · not trained · positions 0–1 · at 0–1 · cp 0",
        "ab",
        "── ▐cp 1▌ begins at 2",
        "── document 2 · 2 tokens, 1 trained · weight 1 · positions 0–1 · at 2–3 · cp 1",
        "c⟦d⟧",
        "── ▐cp 2▌ begins at 4",
        "── padding · 2 tokens · at 4–5 · cp 2",
    ]


def test_a_border_between_rows() -> None:
    """With two rows a micro-batch, half of its ranks is a row each; three ranks cut both rows inside."""
    rows = [[document("abcdef", 1)], [document("ghijkl", 5)]]
    assert drawn(rows, 6, 2)[1:] == [
        "cp 0 · 6 tokens at 0–5  · labelled positions 5 · documents 1",
        "cp 1 · 6 tokens at 6–11 · labelled positions 1 · documents 1",
        "══ row 1 of 2 · tokens 0–5 of micro-batch 1 · cp 0",
        "── document 1 · 6 tokens, 5 trained · weight 1 · positions 0–5 · at 0–5 · cp 0",
        "a⟦bcdef⟧",
        "══ row 2 of 2 · tokens 6–11 of micro-batch 1 · cp 1",
        "── ▐cp 1▌ begins at 0",
        "── document 1 · 6 tokens, 1 trained · weight 1 · positions 0–5 · at 0–5 · cp 1",
        "ghijk⟦l⟧",
    ]
    thirds = drawn(rows, 6, 3)
    assert [line for line in thirds if "▐" in line] == ["a⟦bcd⟧▐cp 1▌⟦ef⟧", "gh▐cp 2▌ijk⟦l⟧"]
    assert [line[-6:] for line in thirds if "══" in line] == ["cp 0–1", "cp 1–2"]


def test_the_label_of_the_first_token_after_a_border_counts_before_it() -> None:
    lines = drawn([[document("abcd", 2)]], 4, 2)
    assert [line.split(" · ")[2] for line in lines[1:3]] == ["labelled positions 1", "labelled positions 1"]
    assert lines[-1] == "ab▐cp 1▌⟦cd⟧"


def test_a_border_inside_a_character_and_after_a_line_break() -> None:
    assert drawn([[document("好", 9), document("\n好", 0)]], 7, 7)[8:] == [
        "══ row 1 of 1 · tokens 0–6 of micro-batch 1 · cp 0–6",
        "── document 1 · 3 tokens, 0 trained · not trained · positions 0–2 · at 0–2 · cp 0–2",
        "\\xe5▐cp 1▌\\xa5▐cp 2▌\\xbd",
        "── ▐cp 3▌ begins at 3",
        "── document 2 · 4 tokens, 3 trained · weight 1 · positions 0–3 · at 3–6 · cp 3–6",
        "⏎",
        "▐cp 4▌⟦\\xe5⟧▐cp 5▌⟦\\xa5⟧▐cp 6▌⟦\\xbd⟧",
    ]


def held(shown: str, pad: bytes) -> list[dict[int, bytes]]:
    """From what is printed, the bytes of each rank of each micro-batch; `pad` is a token of padding."""
    made: list[dict[int, bytes]] = []
    rank, padding, text = 0, range(0), ""

    def add(data: bytes) -> None:
        made[-1][rank] = made[-1].get(rank, b"") + data

    def finish() -> None:
        nonlocal rank, padding, text
        words, *rest = re.split("▐cp ([0-9]+)▌", re.sub("[⟦⟧⟪⟫]", "", text))
        add(unescaped(words))
        for number, words in zip(rest[::2], rest[1::2], strict=True):
            rank = int(number)
            add(unescaped(words))
        add(pad * len(padding))
        padding, text = range(0), ""

    for line in shown[shown.index("══ row") :].splitlines():
        if line.startswith("══ row"):
            if made:
                finish()
            if " tokens 0–" in line:
                made.append({})
                rank = 0
        elif border := re.match("── ▐cp ([0-9]+)▌ begins at ([0-9]+)", line):
            inside = int(border[2]) - padding.start if padding else 0
            rest, padding = padding[inside:], padding[:inside]
            finish()
            rank, padding = int(border[1]), rest
        elif line.startswith("── "):
            finish()
            at = re.search(" at ([0-9]+)–([0-9]+) · cp ", line)
            assert at is not None
            padding = range(int(at[1]), int(at[2]) + 1) if line.startswith("── padding") else padding
        elif line:
            text += line + "\n" * line.endswith(("⏎", "⏎⟧", "⏎⟫"))
    finish()
    return made


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("cp", [2, 5, 8, 64, 320])
@pytest.mark.parametrize("color", ["never", "always"])
def test_what_is_shown_of_a_rank_is_what_it_holds(folder: Path, capsys: pytest.CaptureFixture[str], cp: int, rows: int, color: str) -> None:
    """Read back from the page, rank by rank, it is `Batch.slice`'s tokens: in colours or not, wherever the borders fall."""
    words, backend = words_of(folder), AutoTokenizer.from_pretrained(folder / "base")
    cut = f"data.rows_per_micro_batch={rows}"
    shown = printed(capsys, str(folder / "run.py"), cut, "--rows", "2", "--cp", str(cp), "--color", color)
    found = held(re.sub(r"\x1b\[[0-9;]*m", "", shown), words.spell(tool.PAD_ID))
    made = batches(run_of(folder, cut), 1)
    assert len(found) == len(made) == 2 // rows
    for ranks, batch in zip(found, made, strict=True):
        assert list(ranks) == list(range(cp))
        for rank, data in ranks.items():
            tokens = batch.slice(rank, cp, None).tokens.tolist()
            assert data == b"".join(map(words.spell, tokens))
            assert data.decode(errors="replace") == backend.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_lines_of_the_ranks_count_what_batch_slice_gives_them(folder: Path, capsys: pytest.CaptureFixture[str], rows: int) -> None:
    cut, cp = f"data.rows_per_micro_batch={rows}", 8
    lines = printed(capsys, str(folder / "run.py"), cut, "--rows", "2", "--cp", str(cp)).splitlines()
    made, width = batches(run_of(folder, cut), 1), 320 * rows // cp
    for rank, line in enumerate(lines[2 : 2 + cp]):
        start, stop = rank * width, (rank + 1) * width
        labelled = [sum(start <= at < stop for at in batch.rows.tolist()) for batch in made]
        assert labelled == [len(batch.slice(rank, cp, None).labels) for batch in made]
        documents = [
            sum(p.start < stop and start < p.stop and not p.is_padding for row in tool.passages(batch, 320) for p in row) for batch in made
        ]
        words = line.split(" · ")
        assert [re.sub(" +", " ", word).strip() for word in words[:2]] == [f"cp {rank}", f"{width} tokens at {start}–{stop - 1}"]
        assert [[int(n) for n in re.findall("[0-9]+", word)] for word in words[2:]] == [labelled, documents]


def test_borders_and_ranks_without_labels_have_colours(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(folder / "run.py"), "--rows", "2", "--cp", "20")
    plain, coloured = (printed(capsys, *arguments, "--color", color) for color in ("never", "always"))
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).replace("  special token", "") == re.sub("[⟦⟧⟪⟫]", "", plain)
    signs = re.findall("▐cp [0-9]+▌", plain)
    assert signs == [f"▐cp {rank}▌" for rank in range(1, 20)]
    assert re.findall(r"\x1b\[1;35m(?:── )?(▐cp [0-9]+▌)", coloured) == signs
    without = re.findall(r"^(cp .*labelled positions +0 .*)$", plain, re.MULTILINE)
    assert without == re.findall(r"^\x1b\[33m(cp .*)\x1b\[0m$", coloured, re.MULTILINE) != []


def test_one_rank_shows_nothing_new(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "run.py")
    alone, four = printed(capsys, run), printed(capsys, run, "--cp", "4")
    assert "cp " not in alone
    assert "▐" not in alone
    assert alone == printed(capsys, run, "--cp", "1") == printed(capsys, run, "parallel.cp=4", "--cp", "1")
    assert four == printed(capsys, run, "parallel.cp=4") != alone


def test_piped_into_head(folder: Path) -> None:
    """As a user runs it: no colours in a pipe, no noise, and no trace where the reader leaves early."""
    command = [sys.executable, str(ROOT / "tools" / "show_batch.py"), str(folder / "run.py")]
    ours = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    piped = subprocess.run(f"{shlex.join(command)} | head -1", shell=True, capture_output=True, text=True, env=ours, timeout=120)
    assert piped.stdout.startswith("step 1 of 9 · ")
    assert piped.stderr == ""
