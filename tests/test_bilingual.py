"""The made-up bilingual set: its splits share nothing, its words alone do not decide, and it is the same for the same seed."""

import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import get_args

import pytest
from complaints import complaint

from megamod.data.bilingual import (
    LANGUAGES,
    SHARES,
    Drawn,
    Kind,
    Row,
    draw,
    generate,
    sentences,
    shared,
    side,
    summary,
    templates,
)
from megamod.verdicts import SEVERITIES

ROOT = Path(__file__).parents[1]
CATEGORIES = {"Violent", "PII", "Non-violent Illegal Acts", "Suicide & Self-Harm", "Unethical Acts"}
HARD = ("negation", "quotation", "counter_speech", "look_alike")


@pytest.fixture(scope="module")
def splits() -> tuple[list[Drawn], list[Drawn]]:
    return draw("train", 20_000, seed=5), draw("held_out", 2_000, seed=5)


@pytest.fixture(scope="module")
def rows(splits: tuple[list[Drawn], list[Drawn]]) -> tuple[list[Row], list[Row]]:
    return [d.row for d in splits[0]], [d.row for d in splits[1]]


def contents(row: Row) -> tuple[str, ...]:
    return tuple(message["content"] for message in row["messages"])


# --- what the splits share -------------------------------------------------------------------------------------------------


def test_no_sentence_is_in_both_splits(rows: tuple[list[Row], list[Row]]) -> None:
    """By another way of cutting texts than the generator's."""
    one, other = ({s.strip().lower() for row in split for c in contents(row) for s in re.split(r"[.?!。？！]", c)} - {""} for split in rows)
    assert len(one) > 20_000
    assert len(other) > 2_000
    assert not one & other
    assert not shared(*rows)


def test_no_template_is_filled_alike_in_both_splits(splits: tuple[list[Drawn], list[Drawn]]) -> None:
    one, other = ({(d.template, d.filling) for d in split} for split in splits)
    assert not one & other
    assert len(one) == 20_000  # nor twice in one
    assert len(other) == 2_000


def test_the_bookkeeping_is_that_of_the_rows(splits: tuple[list[Drawn], list[Drawn]]) -> None:
    for split, name in zip(splits, ("train", "held_out"), strict=True):
        for drawn in split[:1000]:
            template, users = templates()[drawn.template], contents(drawn.row)[::2]
            filled = template.fill(drawn.filling)
            assert filled is not None
            assert all(turn in user for turn, user in zip(filled[0], users, strict=True))
            assert side(contents(drawn.row)) == name  # the remarks and replies too
            assert (template.language, template.kind, template.finding.label) == tuple(
                drawn.row[key] for key in ("language", "kind", "label")
            )


@pytest.mark.parametrize("end", ["", "!", "。", "…\n"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_leak_would_be_found(rows: tuple[list[Row], list[Row]], language: str, end: str) -> None:
    train, held_out = rows
    leaked = sentences(next(contents(row)[0] for row in train if row["language"] == language))[0]
    doctored = copy.deepcopy(held_out[:50])
    doctored[-1]["messages"][-1]["content"] += f" {leaked.upper()}{end}"
    assert shared(train, doctored) == {leaked}
    assert side([contents(held_out[0])[0], leaked]) is None


def test_held_out_sentences_stay_held_out_under_any_seed(rows: tuple[list[Row], list[Row]]) -> None:
    assert not shared(generate(2000, 0, seed=6)[0], rows[1])


def test_every_template_has_fillings_for_both_splits() -> None:
    for template in templates():
        filled = (template.fill(i * 7919 % template.fillings) for i in range(200))  # a large prime: every slot moves
        missing: set[str | None] = {"train", "held_out"}
        while missing:
            texts = next(filled)
            missing.discard(side(texts[0]) if texts else None)


def test_sentences_end_in_both_languages() -> None:
    assert sentences('He said "stop it".  "你好。真的吗？”Yes…') == ['he said "stop it', "你好", "真的吗", "yes"]


# --- rows ------------------------------------------------------------------------------------------------------------------


def test_rows_are_whole(rows: tuple[list[Row], list[Row]]) -> None:
    for row in rows[0] + rows[1]:
        assert list(row) == ["messages", "label", "categories", "reason", "language", "kind"]
        assert row["label"] in SEVERITIES
        assert bool(row["categories"]) == (row["label"] != "safe")
        assert set(row["categories"]) <= CATEGORIES
        assert [m["role"] for m in row["messages"]] in (["user"], ["user", "assistant", "user"])
        for text in (*contents(row), row["reason"]):
            assert text == text.strip()
            assert not set("{}|") & set(text)
            assert bool(re.search("[\u4e00-\u9fff]", text)) == (row["language"] == "zh")
            assert bool(re.search("[A-Za-z]", text)) == (row["language"] == "en")


def test_no_text_twice_in_a_split(rows: tuple[list[Row], list[Row]]) -> None:
    for split in rows:
        assert len(set(map(contents, split))) == len(split)


def test_every_kind_in_every_language_with_every_label(rows: tuple[list[Row], list[Row]]) -> None:
    wanted = {(kind, language, label) for kind in HARD for language in LANGUAGES for label in SEVERITIES}
    wanted |= {("plain", language, "safe") for language in LANGUAGES}
    wanted |= {("direct", language, label) for language in LANGUAGES for label in ("controversial", "unsafe")}
    assert {kind for kind, _, _ in wanted} == set(get_args(Kind))
    for split in rows:
        assert {(row["kind"], row["language"], row["label"]) for row in split} == wanted
        assert {category for row in split for category in row["categories"]} == CATEGORIES


def test_shares_of_labels_and_languages(rows: tuple[list[Row], list[Row]]) -> None:
    for split in rows:
        for label, share in SHARES.items():
            assert sum(row["label"] == label for row in split) / len(split) == pytest.approx(share, abs=0.04)
        assert sum(row["language"] == "en" for row in split) / len(split) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    "cue",
    ["hurt", "home address", "private photos", "forge", "out of spite", "a complete fool", "worth less", "kill", "push"]
    + ["打断", "家庭住址", "伪造", "低一等", "大笨蛋", "手机号", "打"],
)
def test_a_cue_alone_does_not_decide(rows: tuple[list[Row], list[Row]], cue: str) -> None:
    labels = Counter(row["label"] for row in rows[0] if cue in contents(row)[-1])
    assert len(labels) >= 2
    assert max(labels.values()) < 0.8 * labels.total()


def test_the_same_words_in_another_order_mean_another_thing(rows: tuple[list[Row], list[Row]]) -> None:
    meanings = defaultdict(set)
    for row in rows[0]:
        words = re.findall(r"\w+", contents(row)[-1].lower()) if row["language"] == "en" else list(contents(row)[-1])
        meanings[tuple(sorted(words))].add(row["label"])
    assert sum(len(labels) > 1 for labels in meanings.values()) >= 5


def test_the_same_seed_makes_the_same_rows_in_any_process() -> None:
    code = "import json; from megamod.data.bilingual import generate; print(json.dumps(generate(60, 20, 3)))"
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    there = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert [list(split) for split in json.loads(there)] == list(generate(60, 20, 3))
    assert generate(60, 20, 4)[0] != generate(60, 20, 3)[0]
    assert generate(10, 20, 3) == (generate(60, 20, 3)[0][:10], generate(60, 20, 3)[1])


# --- what a user reads -----------------------------------------------------------------------------------------------------


def test_more_rows_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "1000000000 rows of train: there are fewer than" in complaint(lambda: generate(10**9, 1, 1))
    assert "numbers of at least 0" in complaint(lambda: generate(1, -1, 1))
    monkeypatch.setattr("megamod.data.bilingual.FILLINGS", 3)
    assert "of held_out: there are only" in complaint(lambda: generate(0, 1000, 1))


def test_the_tool(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/make_dataset.py", *arguments]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)

    out = tmp_path / "new" / "set"
    done = run(str(out), "--train", "30", "--held-out", "12", "--seed", "9")
    assert done.returncode == 0, done.stderr
    train, held_out = generate(30, 12, 9)
    assert sorted(file.name for file in out.iterdir()) == ["held_out.jsonl", "train.jsonl"]
    assert [json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()] == train
    assert [json.loads(line) for line in (out / "held_out.jsonl").read_text(encoding="utf-8").splitlines()] == held_out
    assert re.search("[\u4e00-\u9fff]", (out / "train.jsonl").read_text(encoding="utf-8"))
    assert done.stdout.splitlines() == [f"{out}/train.jsonl: {summary(train)}", f"{out}/held_out.jsonl: {summary(held_out)}"]

    (tmp_path / "file").touch()
    for arguments in ([str(tmp_path / "file"), "--train", "3", "--held-out", "1"], [str(tmp_path), "--train", "1000000000"]):
        failed = run(*arguments)
        assert failed.returncode == 1
        assert failed.stderr.startswith("megamod: error: ")
        assert len(failed.stderr.splitlines()) == 1
