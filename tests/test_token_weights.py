"""Weights of messages and of tokens: from rows and `data.chat.weights` to `batch.weight`, and what is refused on the way."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import WHERE, documents, made, row, small

from megamod import losses
from megamod.config import ChatConfig, DataConfig, RunConfig, Source, check_weights, override
from megamod.config import load as load_config
from megamod.data.chat import encoder
from megamod.data.documents import IGNORED, Document, InMemory, document_of, weighed
from megamod.data.jsonl import LARGEST_WEIGHT, row_of
from megamod.data.packing import micro_batch
from megamod.data.store import MANIFEST, Mixed, Store, prepare, prepare_all
from megamod.model.shape import Score
from megamod.train import _check_documents
from tools.show_batch import vocabulary

QUICK = settings(max_examples=60, deadline=None)
CONFIGS = Path(__file__).parents[1] / "configs"
PATTERNS = ("色", "[ab]+", "🙂é?", "(?<=a)b", "x*", "(?s).", "龘|\n", r"\w+", r"<\|im_end\|>", "(?m)^ ?a", "never")
texts = st.text(st.sampled_from("ab 色🙂é龘\n"), min_size=1, max_size=30).filter(str.strip)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("small"))


# ---- from characters to tokens


def overlapping(model: Path, ids: Sequence[int], pattern: str) -> list[bool]:
    """Which of the tokens of an assistant's turn have a byte of what `pattern` matches in what it says."""
    words = vocabulary(str(model))
    assert words is not None
    pieces = [words.spell(token) for token in ids]
    text = b"".join(pieces).decode()
    said = text.removesuffix("<|im_end|>\n").strip()
    first = len(text[: text.index(said)].encode())
    found = [(first + len(said[: m.start()].encode()), first + len(said[: m.end()].encode())) for m in re.finditer(pattern, said)]
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    return [
        any(start < end and stop > end - len(piece) and start < stop for start, stop in found)
        for piece, end in zip(pieces, ends, strict=True)
    ]


@QUICK
@given(texts, st.lists(st.tuples(st.sampled_from(PATTERNS), st.sampled_from([0.0, 0.25, 1.0, 4.0])), unique_by=lambda x: x[0], max_size=3))
def test_a_token_counts_if_a_byte_of_it_is_matched(model: Path, text: str, weights: list[tuple[str, float]]) -> None:
    talk, counts = row("ab 色🙂é", text), Counter[str]()
    (plain,) = documents(made(model), talk)
    (found,) = made(model, weights=dict(weights)).documents(talk, counts)
    trained = plain.labels != IGNORED
    expected = np.ones(len(plain.tokens))
    for pattern, weight in weights:
        matched = overlapping(model, plain.tokens[trained].tolist(), pattern)
        expected[np.flatnonzero(trained)[matched]] *= weight
        assert counts[f"weights: {pattern}"] == sum(matched)
    assert found.tokens.tolist() == plain.tokens.tolist()
    assert found.labels.tolist() == np.where(expected > 0, plain.labels, IGNORED).tolist(), "weight 0: not trained"
    assert (np.ones(len(expected)) if found.weights is None else found.weights).tolist() == np.where(expected > 0, expected, 1.0).tolist()
    assert (found.weights is None) == bool((expected[expected > 0] == 1).all())


def test_a_verdict_s_words_are_weighed_and_its_answer_is_whole(model: Path) -> None:
    judged = row("How?", label="unsafe", categories=("PII",), weight=0.5)
    encode = made(model, weights={r"Safety: \w+": 4.0, "Categories.*": 0.0})
    (document,) = documents(encode, judged)
    assert document.weights is not None and document.weight == 0.5
    decode = encode.tokenizer.decode
    assert document.labels[-2] == encode.tokenizer.end, "what closes the turn is learnt, whatever an expression matches before it"
    assert decode(document.tokens[document.weights == 4].tolist()) == "Safety: Unsafe"
    assert decode(document.tokens[document.labels != IGNORED].tolist()) == "Safety: Unsafe\n<|im_end|>\n"
    assert decode(document.tokens[document.verdict].tolist()).strip() == "Unsafe", "what is not trained is no verdict's"
    assert encode.answer(judged).tolist() == made(model).answer(judged).tolist()
    batch = micro_batch([[document]], 128)
    assert set(batch.weight.tolist()) == {2.0, 0.5}


@QUICK
@given(st.lists(st.lists(st.sampled_from([None, 0.0, 0.5, 3.0]), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 3))
def test_a_batch_has_each_token_s_weight(all_weights: list[list[float | None]], spare: int) -> None:
    """None for a token's weight: its document may have none at all."""
    made, expected, before = [], {}, 0
    for number, weights in enumerate(all_weights):
        ids = np.arange(1, len(weights) + 1)
        document = Document(ids, ids, np.ones(len(ids), np.bool_), 1.0 + number)
        numbers = [1.0 if weight is None else weight for weight in weights]
        made.append(weighed(document, np.array(numbers), "x"))
        assert (made[-1].weights is None) == ({*numbers} <= {0.0, 1.0})
        expected |= {before + i - 1: weight * document.weight for i, weight in enumerate(numbers) if i and weight}
        before += len(ids)
    batch = micro_batch([made], before + spare)
    assert dict(zip(batch.rows.tolist(), batch.weight.tolist(), strict=True)) == expected
    assert batch.weight.dtype == torch.float32 and float(batch.counts()["weights"]) == sum(expected.values())


# ---- messages


def talk(*answers: dict[str, Any], key: str = "messages", **beside: Any) -> dict[str, Any]:
    """A row in which the user says `a` before each of these."""
    return {key: [turn for answer in answers for turn in ({"role": "user", "content": "a"}, {"role": "assistant", **answer})], **beside}


def test_a_message_s_weight_is_its_document_s(model: Path) -> None:
    weighted = talk({"content": "b", "weight": 0}, {"content": "c", "weight": 2.5}, {"content": "d"}, weight=2)
    found = documents(made(model), row_of(weighted, WHERE))
    assert [document.weight for document in found] == [5.0, 2.0]
    assert [document.weights for document in found] == [None, None], "no column: each turn is a document"
    plain = documents(made(model), row_of(talk({"content": "b"}, {"content": "c"}, {"content": "d"}), WHERE))
    assert [document.tokens.tolist() for document in found] == [document.tokens.tolist() for document in plain[1:]]
    swift = talk({"content": "b", "loss": False}, {"content": "c", "loss": 2.5}, {"content": "d", "loss": True})
    assert row_of(swift).weights == row_of(weighted).weights == (1, 0, 1, 2.5, 1, 1)
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0.5}]
    assert row_of({"system": "s", "conversations": sharegpt}).weights == (1, 1, 0.5)
    assert row_of(talk({"content": "b", "weight": 1}, {"content": "c", "loss": None})).weights == (), "1 everywhere is none"
    last = made(model, turns="last")
    (document,) = documents(last, row_of(talk({"content": "b"}, {"content": "c", "weight": 3}, {"content": "d", "weight": 0}), WHERE))
    assert document.weight == 3 and last.tokenizer.decode(document.tokens[document.labels != IGNORED].tolist()).startswith("c")


NUMBER = "a finite number of at least 0 was expected"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (talk({"content": "b", "weight": -1}), f"messages[1]: weight = -1: {NUMBER}"),
        (talk({"content": "b", "weight": float("nan")}), f"messages[1]: weight = nan: {NUMBER}"),
        (talk({"content": "b", "weight": "2"}), f"messages[1]: weight = '2': {NUMBER}"),
        (talk({"content": "b", "weight": True}), f"messages[1]: weight = True: {NUMBER}"),
        (talk({"content": "b", "loss": float("inf")}), f"messages[1]: loss = inf: {NUMBER}"),
        (talk({"content": "b", "loss": 1, "weight": 1}), "messages[1]: both 'weight' and 'loss': one of them says how much"),
        ({"messages": [{"role": "user", "content": "a", "weight": 2}]}, "message 0 (the first is 0) has weight 2: it is not trained"),
        (talk({"content": "b", "weight": 2}, label="safe"), "message 1 (the first is 0) has weight 2: it is not trained, 0 or 1"),
        (talk({"content": "b", "weight": 2}, rejected="c"), "message 1 (the first is 0) has weight 2: an answer counts as its row"),
        (talk({"content": "b", "weight": 0}, desirable=True), "message 1 (the first is 0) has weight 0: an answer counts as its row"),
        (
            talk({"content": "b"}, rejected=[{"role": "assistant", "content": "c", "weight": 2}]),
            "rejected: a message with a weight of its own, which nothing reads",
        ),
        (talk({"content": "b", "weight": 1e30}, weight=1e30), "a message's weight and the row's multiply to 1e+60: at most 3.40282e+38"),
    ],
)  # fmt: skip
def test_a_row_says_what_is_wrong_with_its_weights(record: dict[str, Any], said: str) -> None:
    assert complaint(lambda: row_of(record, WHERE)).startswith(f"{WHERE}: {said}")


def test_weights_of_messages_that_are_not_trained_may_say_so() -> None:
    for record in (talk({"content": "b", "weight": 0}, label="safe"), talk({"content": "b", "weight": 0}, {"content": "c"}, rejected="d")):
        record["messages"][0]["weight"] = 1
        assert 0 in row_of(record).weights


def test_a_row_of_which_nothing_is_trained_is_refused(model: Path) -> None:
    nothing = row_of(talk({"content": "b", "weight": 0}), WHERE)
    said = complaint(lambda: documents(made(model), nothing))
    assert said == f"{WHERE}: each of the assistant's turns has weight 0: nothing in this row could be trained"
    unread = row_of(talk({"content": "b", "weight": 0.5}, {"content": "c"}), WHERE)
    said = complaint(lambda: documents(made(model, turns="last"), unread))
    assert said.startswith(f"{WHERE}: message 1 (the first is 0) has weight 0.5, and data.chat.turns = 'last' trains only the last turn")


# ---- tokenised documents


def test_tokenised_documents_have_weights() -> None:
    found = document_of({"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "weight": 2, "weights": [9, 1, 0, 0.5]}, WHERE)
    assert found.weights is not None and found.weights.tolist() == [1, 1, 1, 0.5] and found.weights.dtype == np.float32
    assert found.labels.tolist() == [-100, 2, -100, 4] and found.weight == 2.0
    assert document_of({"input_ids": [1, 2], "weights": [1, 1]}, WHERE).weights is None
    for weights, said in (
        ([1, -1], f"weights[1] = -1: {NUMBER}"), ([float("nan"), 1], f"weights[0] = nan: {NUMBER}"), ([1], "weights has 1 entries"),
        ([True, 1], "weights[0] = True: a list of numbers"), (2.0, "weights = 2.0: a list of numbers"), ([1e39, 1], "weights[0] = 1e+39: "),
    ):  # fmt: skip
        assert complaint(lambda weights=weights: document_of({"input_ids": [1, 2], "weights": weights}, WHERE)).startswith(
            f"{WHERE}: {said}"
        )
    large = {"input_ids": [1, 2], "weights": [1e20, 1], "weight": 1e20}
    assert complaint(lambda: document_of(large, WHERE)).startswith(f"{WHERE}: a token's weights multiply to 1e+40: at most")


# ---- stores

ROWS = [talk({"content": "no 色 b"}), talk({"content": "yes"}, label="unsafe"), talk({"content": "c", "weight": 3})]


def written(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rows), encoding="utf-8")
    return path


def test_a_store_keeps_weights_and_one_without_is_what_it_was(model: Path, tmp_path: Path) -> None:
    file, chat = written(tmp_path / "rows.jsonl"), ChatConfig(weights={"色|Safety": 2.5})
    encode, counts = encoder(chat, str(model)), Counter[str]()
    expected = [document for record in ROWS for document in encode.documents(row_of(record), counts)]
    weighted = prepare(file, tmp_path, chat, str(model))
    plain = prepare(file, tmp_path, ChatConfig(), str(model))
    empty = prepare(file, tmp_path, ChatConfig(weights={}), str(model))
    assert empty == plain and weighted.path != plain.path
    assert weighted.counts["weights: 色|Safety"] == counts["weights: 色|Safety"] > 1
    assert f" · {counts['weights: 色|Safety']} tokens by weights: 色|Safety" in str(weighted)
    found, without = Store(weighted.path), Store(plain.path)
    assert found.weighed and not without.weighed and not (Path(plain.path) / "weights.bin").exists()
    assert found.fingerprint() != without.fingerprint()
    for i, document in enumerate(expected):
        own = np.ones(len(document.tokens)) if document.weights is None else document.weights
        weights = found[i].weights
        assert weights is not None and weights.tolist() == own.tolist() and found[i].weight == document.weight
        assert without[i].weights is None
    assert [document.weight for document in expected] == [1, 1, 3]
    assert Mixed([(found, 1.0), (without, 1.0)], 0).weighed and not Mixed([(without, 1.0)], 0).weighed

    manifest = Path(plain.path) / MANIFEST  # as it was before there was the column
    about = json.loads(manifest.read_text())
    del about["columns"]["weights"]
    manifest.write_text(json.dumps(about))
    (old,) = prepare_all(DataConfig(plain.path), str(model), 420, tmp_path)
    assert Store(old.path).fingerprint() == without.fingerprint() and Store(old.path)[0].weights is None
    said = complaint(lambda: prepare_all(DataConfig(plain.path, chat), str(model), 420, tmp_path))
    assert said == f"{plain.path}: prepared with another weights than data.chat and model.path ask for: prepare it again"


def test_an_expression_that_matches_nothing_anywhere_is_refused(model: Path, tmp_path: Path) -> None:
    one, other = (written(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((ROWS[:1], ROWS[1:])))
    sources, chat = (Source(str(one)), Source(str(other))), ChatConfig(weights={"色": 2.0, "Safety": 3.0})
    prepared = prepare_all(DataConfig(sources, chat), str(model), 420, tmp_path)
    assert [store.counts["weights: 色"] > 0 for store in prepared] == [True, False], "each matches in one of them"
    for pattern in ("no 色 c", "x*"):  # the user says nothing that counts, nor does an empty match
        chat = ChatConfig(weights={"Safety": 3.0, pattern: 2.0})
        said = complaint(lambda chat=chat: prepare_all(DataConfig(sources, chat), str(model), 420, tmp_path))
        assert said.startswith(f"data.chat.weights: {pattern!r} matches nothing that is trained in {tmp_path}/")


# ---- the config


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"(": 2.0}, "'(': no regular expression: missing ), unterminated subpattern at position 0"),
        ({"a": -1.0}, "'a' = -1.0: a finite number of at least 0"),
        ({"a": float("nan")}, "'a' = nan: a finite number of at least 0"),
        ({"a": 2 * LARGEST_WEIGHT}, "'a' = 6.8"),
        ({"a": "2"}, "'a' = '2': a finite number of at least 0"),
    ],
)
def test_expressions_are_checked(model: Path, weights: dict[str, Any], said: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: check_weights(ChatConfig(weights=weights)),
        lambda: encoder(ChatConfig(weights=weights), str(model)),
    ]
    for call in calls:
        assert complaint(call).startswith(f"data.chat.weights: {said}")


def test_weights_on_the_command_line_and_where_nothing_reads_them(model: Path) -> None:
    chat: ChatConfig = override(ChatConfig(), ['weights={"Safety: \\\\w+": 4, "b": 0.5}'])
    assert chat.weights == {r"Safety: \w+": 4, "b": 0.5}
    said = complaint(lambda: encoder(chat, str(model), score=Score("single_label_classification", ("safe", "unsafe"))))
    assert said.startswith("data.chat.weights weigh tokens, and with")
    assert "data.chat.weights" in complaint(lambda: load_config(CONFIGS / "tiny.py", ["data.chat.weights={'a': 2.0}", "eval.data=x.jsonl"]))


def test_a_loss_that_reads_no_weights_refuses_them() -> None:
    def mine(head: Any, batch: Any) -> Any: ...

    ids = np.array([1, 2, 3])
    plain = Document(ids, ids, np.zeros(3, np.bool_))
    some = InMemory([plain, weighed(plain, np.array([1.0, 2.0, 1.0]), "x")])
    zeros = InMemory([weighed(plain, np.array([1.0, 0.0, 1.0]), "x")])
    assert some.weighed and not zeros.weighed and len({some.fingerprint(), InMemory([plain, plain]).fingerprint()}) == 2

    def check(loss: Callable[..., Any], data: InMemory) -> None:
        _check_documents(cast(RunConfig, SimpleNamespace(loss=loss)), tiny.shape("qwen3"), data)

    assert complaint(lambda: check(mine, some)).startswith(
        "loss test_a_loss_that_reads_no_weights_refuses_them.<locals>.mine reads no weights of tokens, and data.train has some: use "
    )
    check(mine, zeros)
    for loss in (losses.cross_entropy, losses.moderation, losses.focal, losses.distillation, losses.needs("weights")(mine)):
        check(loss, some)
