"""Rows in every spelling become the same messages; a bad one is a line that says where and what was expected."""

import json
from pathlib import Path
from typing import Any

import pytest
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st

from megamod.data.jsonl import Message, Row, json_object, read_rows, row_of
from megamod.errors import MegamodError
from megamod.verdicts import Verdict

QUICK = settings(max_examples=100, deadline=None)
GOOD = '{"messages": [{"role": "user", "content": "hi"}]}'


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def read(path: Path, *lines: str | bytes) -> list[Row]:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return list(read_rows(path))


# ---- spellings

ONE_TURN = (message("system", "Be kind."), message("user", "你好"), message("assistant", "Hello!"))
SPELT: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": list(ONE_TURN)},
    "OpenAI, content in parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
            {"role": "user", "content": [{"type": "text", "text": "你好"}]},
            {"role": "assistant", "content": "Hello!"},
        ]
    },
    "ShareGPT": {"system": "Be kind.", "conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "Hello!"}]},
    "ShareGPT, system inside": {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "user", "value": "你好"},
            {"from": "assistant", "value": "Hello!"},
        ]
    },
    "Alpaca": {"system": "Be kind.", "instruction": "你好", "input": "", "output": "Hello!"},
    "Alpaca, null": {"system": "Be kind.", "instruction": "你好", "input": None, "output": "Hello!", "history": None},
    "ms-swift": {"system": "Be kind.", "query": "你好", "response": "Hello!", "history": []},
}  # fmt: skip
MANY_TURNS = (
    message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d"), message("user", "e\nf"),
    message("assistant", "g"),
)  # fmt: skip
SPELT_LONG: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": list(MANY_TURNS)},
    "ShareGPT": {"conversations": [{"from": "human" if i % 2 == 0 else "gpt", "value": m["content"]} for i, m in enumerate(MANY_TURNS)]},
    "Alpaca": {"instruction": "e", "input": "f", "output": "g", "history": [["a", "b"], ["c", "d"]]},
    "ms-swift": {"query": "e\nf", "response": "g", "history": [["a", "b"], ["c", "d"]]},
}


@pytest.mark.parametrize("spelling", SPELT)
def test_every_spelling_becomes_the_same_messages(spelling: str) -> None:
    assert row_of(SPELT[spelling]).messages == ONE_TURN


@pytest.mark.parametrize("spelling", SPELT_LONG)
def test_every_spelling_becomes_the_same_turns(spelling: str) -> None:
    assert row_of(SPELT_LONG[spelling]).messages == MANY_TURNS


def test_a_text_is_one_user_s_message() -> None:
    assert row_of({"text": "色情 ad"}).messages == (message("user", "色情 ad"),)
    assert row_of({"text": "x", "system": "s"}).messages == (message("system", "s"), message("user", "x"))


def test_prompts_without_an_answer() -> None:
    for record in ({"instruction": "a"}, {"query": "a", "response": None}, {"instruction": "", "input": "a"}):
        row = row_of(record)
        assert row.messages == (message("user", "a"),) and not row.is_response
    assert row_of({"query": "a", "response": ""}).is_response, "an empty answer is one"


@QUICK
@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=4), st.booleans())
def test_histories_and_conversations_are_the_same_thing(pairs: list[tuple[str, str]], ascii_only: bool) -> None:
    messages = tuple(message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True))
    *history, (query, response) = [list(pair) for pair in pairs]
    records: list[dict[str, Any]] = [
        {"messages": list(messages)},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in messages]},
        {"query": query, "response": response, "history": history},
    ]
    for record in records:
        line = json.dumps(record, ensure_ascii=ascii_only).encode()
        assert row_of(json_object(line, "x:1")).messages == messages


# ---- what stands beside the conversation


def test_what_is_known_of_a_conversation(tmp_path: Path) -> None:
    known = {
        "label": "unsafe", "categories": ["Violent", "PII"], "reason": "a\nb", "refusal": False, "request": "controversial",
        "language": "zh", "kind": "negation", "weight": 2, "id": 7,
    }  # fmt: skip
    plain, full = read(tmp_path / "rows.jsonl", '{"text": "x"}', "", " \t", json.dumps({"query": "x", "response": "y", **known}))
    assert plain == Row((message("user", "x"),), where=f"{tmp_path}/rows.jsonl:1")
    assert plain.verdict is None and plain.weight == 1.0
    assert full.verdict == Verdict("unsafe", ("Violent", "PII"), False, "controversial", "a\nb")
    assert (full.language, full.kind, full.weight, full.id) == ("zh", "negation", 2.0, "7")
    assert type(full.weight) is float and full.is_response
    assert full.where == f"{tmp_path}/rows.jsonl:4", "blank lines count"


def test_null_is_as_good_as_nothing() -> None:
    keys = ("label", "categories", "reason", "refusal", "request", "language", "kind", "id")
    assert row_of({"text": "x", **dict.fromkeys(keys)}) == row_of({"text": "x"})


def test_labels_are_read_in_any_case() -> None:
    for said in ("Unsafe", "UNSAFE", "unsafe"):
        assert row_of({"text": "x", "label": said, "request": said}).verdict == Verdict("unsafe", request="unsafe")


def test_lines_may_end_as_they_do_elsewhere_and_hold_escapes(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "rows.jsonl", b'{"text": "\\ud83d\\ude00 \\u0000"}\r')
    assert row.messages[0]["content"] == "😀 \0"


def test_keys_that_nothing_reads_are_told() -> None:
    row = row_of({"text": "x", "source": "web", "Annotator": 3, "label": "safe"})
    assert row.unread == ("Annotator", "source")
    assert row == row_of({"text": "x", "label": "safe"}), "they are no part of the row"


NEAR = [
    ("lable", "label"), ("labels", "label"), ("catagories", "categories"), ("categorys", "categories"), ("Weight", "weight"),
    ("refusals", "refusal"), ("languages", "language"), ("sytem", "system"), ("reasons", "reason"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "meant"), NEAR)
def test_a_key_that_looks_like_one_of_ours_is_refused(key: str, meant: str) -> None:
    assert complaint(lambda: row_of({"text": "x", key: "y"}, "a.jsonl:3")) == f"a.jsonl:3: unknown key {key!r}, did you mean {meant!r}?"


def test_a_key_of_another_spelling_is_not_read() -> None:
    assert row_of({"text": "x", "output": "y"}).unread == ("output",)
    assert complaint(lambda: row_of({"query": "x", "responce": "y"})) == "row: unknown key 'responce', did you mean 'response'?"


# ---- what is refused

TURN = "a list of turns was expected"
NAMES = "'messages', 'conversations', 'instruction', 'query', 'text', 'prompt', 'chosen'"
ONE_OF = "one of them holds the conversation"
WEIGHT = "a finite number of at least 0 was expected"
LABEL = "safe, controversial or unsafe was expected"
PART = '{"type": "text", "text": "…"} was expected; images are not read yet'

# a bad line → what its error says after `file:line: `
BAD: dict[str, tuple[str | bytes, str]] = {
    "broken": ('{"text": "x"', "not JSON, Expecting ',' delimiter at column 13: one whole object a line was expected"),
    "two objects": (GOOD + GOOD, "not JSON, Extra data at column 50: one whole object a line was expected"),
    "over two lines": ('{"text":', "not JSON, Expecting value at column 9: one whole object a line was expected"),
    "deep": ('{"text": ' + "[" * 200_000, "not JSON that can be read, "),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "byte 11 of the line is not UTF-8: save the file in UTF-8"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "byte 1 of the line is not UTF-8: save the file in UTF-8"),
    "half a character": (r'{"text": "a\ud83d b"}', r"'\ud83d': half a character (an unpaired surrogate), which no text in UTF-8 can hold"),
    "half, elsewhere": (r'{"text": "x", "reason": "\uDE00"}', r"'\ude00': half a character"),
    "list": ("[1, 2]", "[1, 2]: a JSON object was expected"),
    "no conversation": ('{"label": "safe"}', f"none of {NAMES}: {ONE_OF}"),
    "misspelt": ('{"message": []}', f"none of {NAMES}: {ONE_OF}; did you mean 'messages' by 'message'?"),
    "two at once": ('{"messages": [], "text": "x"}', f"both 'messages' and 'text': {ONE_OF}"),
    "messages text": ('{"messages": "hi"}', f"messages = 'hi': {TURN}"),
    "messages empty": ('{"messages": []}', f"messages = []: {TURN}"),
    "messages null": ('{"messages": null}', f"messages = None: {TURN}"),
    "messages object": ('{"messages": {"role": "user"}}', f"messages = {{'role': 'user'}}: {TURN}"),
    "message text": ('{"messages": ["hi"]}', "messages[0] = 'hi': an object with 'role' and 'content' was expected"),
    "no content": ('{"messages": [{"role": "user"}]}', "messages[0] = {'role': 'user'}: an object with 'role' and 'content' was expected"),
    "unknown role": ('{"messages": [{"role": "usr", "content": "x"}]}', "messages[0]: role = 'usr': did you mean 'user'?"),
    "role in capitals": ('{"messages": [{"role": "User", "content": "x"}]}', "messages[0]: role = 'User': did you mean 'user'?"),
    "role list": ('{"messages": [{"role": ["user"], "content": "x"}]}', "messages[0]: role = ['user']: "),
    "role null": ('{"messages": [{"role": null, "content": "x"}]}', "messages[0]: role = None: choose from: assistant, system, tool, user"),
    "content number": ('{"messages": [{"role": "user", "content": 5}]}', "messages[0]: 5: text was expected"),
    "content null": ('{"messages": [{"role": "user", "content": null}]}', "messages[0]: None: text was expected"),
    "image": (
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "image": "x.png"}]}]}',
        f"messages[0].content[1] = {{'image': 'x.png', 'type': 'image'}}: {PART}",
    ),
    "part text": ('{"messages": [{"role": "user", "content": ["x"]}]}', f"messages[0].content[0] = 'x': {PART}"),
    "part null": ('{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}', "messages[0].content[0] = "),
    "only a system prompt": ('{"messages": [{"role": "system", "content": "x"}]}', "messages holds no message besides a system prompt"),
    "unknown speaker": ('{"conversations": [{"from": "bot", "value": "x"}]}', "conversations[0]: from = 'bot': one of human, user, "),
    "speaker list": ('{"conversations": [{"from": ["gpt"], "value": "x"}]}', "conversations[0]: from = ['gpt']: one of human, user, "),
    "value null": ('{"conversations": [{"from": "gpt", "value": null}]}', "conversations[0]: None: text was expected"),
    "history triple": ('{"query": "x", "history": [["a", "b", "c"]]}', "history[0] = ['a', 'b', 'c']: a pair of user's and"),
    "history text": ('{"query": "x", "history": "a"}', f"history = 'a': {TURN}"),
    "history number": ('{"query": "x", "history": [["a", 1]]}', "history[0]: 1: text was expected"),
    "query number": ('{"query": 1}', "query = 1: text was expected"),
    "output list": ('{"instruction": "x", "output": ["y"]}', "output: ['y']: text was expected"),
    "text list": ('{"text": ["x"]}', "text: ['x']: text was expected"),
    "text null": ('{"text": null}', "text: None: text was expected"),
    "system number": ('{"text": "x", "system": 1}', "system = 1: text was expected"),
    "label NaN": ('{"text": "x", "label": NaN}', f"label = nan: {LABEL}"),
    "label unknown": ('{"text": "x", "label": "toxic"}', f"label = 'toxic': {LABEL}"),
    "label number": ('{"text": "x", "label": 1}', f"label = 1: {LABEL}"),
    "label bool": ('{"text": "x", "label": true}', f"label = True: {LABEL}"),
    "label empty": ('{"text": "x", "label": ""}', f"label = '': {LABEL}"),
    "label padded": ('{"text": "x", "label": "safe "}', f"label = 'safe ': {LABEL}"),
    "request unknown": ('{"text": "x", "request": "no"}', f"request = 'no': {LABEL}"),
    "categories text": ('{"text": "x", "categories": "PII"}', "categories = 'PII': a list of names was expected"),
    "categories number": ('{"text": "x", "categories": [1]}', "categories = [1]: a list of names was expected"),
    "reason list": ('{"text": "x", "reason": ["y"]}', "reason = ['y']: text was expected"),
    "refusal text": ('{"text": "x", "refusal": "no"}', "refusal = 'no': true or false was expected"),
    "refusal number": ('{"text": "x", "refusal": 0}', "refusal = 0: true or false was expected"),
    "language number": ('{"text": "x", "language": 1}', "language = 1: text was expected"),
    "weight NaN": ('{"text": "x", "weight": NaN}', f"weight = nan: {WEIGHT}"),
    "weight infinite": ('{"text": "x", "weight": 1e999}', f"weight = inf: {WEIGHT}"),
    "weight negative": ('{"text": "x", "weight": -1}', f"weight = -1: {WEIGHT}"),
    "weight text": ('{"text": "x", "weight": "1"}', f"weight = '1': {WEIGHT}"),
    "weight bool": ('{"text": "x", "weight": true}', f"weight = True: {WEIGHT}"),
    "weight null": ('{"text": "x", "weight": null}', f"weight = None: {WEIGHT}"),
    "weight long": ('{"text": "x", "weight": 1' + "0" * 400 + "}", "weight = 1000"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_says_what_is_wrong_and_where(tmp_path: Path, name: str) -> None:
    line, said = BAD[name]
    path = tmp_path / "rows.jsonl"
    text = complaint(lambda: read(path, GOOD, "", line, GOOD))
    assert text.startswith(f"{path}:3: {said}")
    assert len(text) < len(f"{path}:3: ") + 230


def test_rows_before_a_bad_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{GOOD}\n{{\n")
    rows = read_rows(tmp_path / "rows.jsonl")
    assert next(rows).where.endswith(":1") and next(rows).where.endswith(":2")
    assert complaint(lambda: next(rows)).startswith(f"{tmp_path}/rows.jsonl:3: not JSON")


def test_no_rows_no_file(tmp_path: Path) -> None:
    for lines in ([""], ["", " \t ", "\r"]):
        text = complaint(lambda lines=lines: read(tmp_path / "empty.jsonl", *lines))  # type: ignore[misc]
        assert text.startswith(f"{tmp_path}/empty.jsonl:1: no rows: at least one line such as {{")
    absent = tmp_path / "no.jsonl"
    assert complaint(lambda: list(read_rows(absent))) == f"{absent}: No such file or directory: a JSONL file was expected"
    assert complaint(lambda: list(read_rows(tmp_path))) == f"{tmp_path}: Is a directory: a JSONL file was expected"


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(["role", "content", "from", "value", "type", "text"])
    return st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(["user", "human", "text", "safe"])
KEYS = [
    "messages", "conversations", "instruction", "input", "output", "history", "query", "response", "text", "system", "label", "categories",
    "weight", "reason", "refusal", "request", "language", "kind", "id",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), st.recursive(leaves, objects, max_leaves=6), max_size=4))
def test_anything_is_a_row_or_one_line(record: dict[str, Any]) -> None:
    try:
        row = row_of(json_object(json.dumps(record).encode(), "a:1"), "a:1")
    except MegamodError as error:
        said = str(error)
    else:
        said = "a:1: a row"
        for found in row.messages:
            assert set(found) == {"role", "content"}
            assert all(type(value) is str for value in found.values())
    assert said.startswith("a:1: ")
