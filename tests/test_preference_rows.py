"""Pairs and rated answers: every spelling becomes the same row; a bad one is a line that says where and what was expected."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st

from megamod.data.jsonl import Answer, Json, Message, Row, json_object, read_rows, row_of
from megamod.errors import MegamodError
from megamod.verdicts import Verdict

QUICK = settings(max_examples=100, deadline=None)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def human(value: str) -> dict[str, str]:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict[str, str]:
    return {"from": "gpt", "value": value}


# ---- spellings

PROMPT = [user("a"), said("b"), user("c")]
SYSTEM = {"role": "system", "content": "s"}


def pairs(first: str, answer: str, query: str, good: str, bad: str) -> dict[str, Json]:
    """Spelling → a row whose prompt is user, assistant, user and whose answers are `good` and `bad`."""
    prompt = [user(first), said(answer), user(query)]
    spoken = [human(first), gpt(answer), human(query)]
    whole, other = [*prompt, said(good)], [*prompt, said(bad)]
    history = [[first, answer]]
    return {
        "TRL": {"prompt": prompt, "chosen": [said(good)], "rejected": [said(bad)]},
        "TRL, text": {"prompt": prompt, "chosen": good, "rejected": bad},
        "TRL, text and messages": {"prompt": prompt, "chosen": good, "rejected": [said(bad)]},
        "TRL, completion": {"prompt": prompt, "completion": good, "rejected": bad},
        "TRL, implicit": {"chosen": whole, "rejected": other},
        "TRL, implicit, in parts": {
            "chosen": [*prompt, {"role": "assistant", "content": [{"type": "text", "text": good}]}],
            "rejected": other,
        },
        "ShareGPT, implicit": {"chosen": [*spoken, gpt(good)], "rejected": [*spoken, gpt(bad)]},
        "UltraFeedback": {"prompt": query, "prompt_id": "x", "messages": whole, "chosen": whole, "rejected": other},
        "prompt and whole conversations": {"prompt": prompt, "chosen": whole, "rejected": other},
        "ms-swift": {"messages": whole, "rejected_response": bad},
        "ms-swift, messages": {"messages": whole, "rejected_messages": other},
        "ms-swift, query": {"query": query, "response": good, "history": history, "rejected_response": bad},
        "LLaMA-Factory, Alpaca": {"instruction": query, "input": "", "history": history, "chosen": good, "rejected": bad},
        "LLaMA-Factory, ShareGPT": {"conversations": spoken, "chosen": gpt(good), "rejected": gpt(bad)},
        "LLaMA-Factory, OpenAI": {"messages": prompt, "chosen": said(good), "rejected": said(bad)},
        "Alpaca's output": {"instruction": query, "output": good, "history": history, "rejected": bad},
    }


def ratings(first: str, answer: str, query: str, rated: str, wanted: bool) -> dict[str, Json]:
    """Spelling → a row whose prompt is user, assistant, user and whose rated answer is `rated`."""
    prompt = [user(first), said(answer), user(query)]
    spoken = [human(first), gpt(answer), human(query)]
    history = [[first, answer]]
    return {
        "TRL": {"prompt": prompt, "completion": [said(rated)], "label": wanted},
        "TRL, text": {"prompt": prompt, "completion": rated, "label": wanted},
        "ms-swift": {"messages": [*prompt, said(rated)], "label": wanted},
        "ms-swift, query": {"query": query, "response": rated, "history": history, "label": wanted},
        "LLaMA-Factory, OpenAI": {"messages": [*prompt, said(rated)], "kto_tag": wanted},
        "LLaMA-Factory, ShareGPT": {"conversations": [*spoken, gpt(rated)], "kto_tag": wanted},
        "LLaMA-Factory, Alpaca": {"instruction": query, "output": rated, "history": history, "kto_tag": wanted},
        "our own": {"messages": [*prompt, said(rated)], "desirable": wanted},
    }


PAIRS = pairs("a", "b", "c", "good", "bad")
RATINGS = {wanted: ratings("a", "b", "c", "d", wanted) for wanted in (True, False)}


@pytest.mark.parametrize("spelling", PAIRS)
def test_every_spelling_of_a_pair_is_the_same_row(spelling: str) -> None:
    row = row_of(PAIRS[spelling])
    assert row == Row(tuple(PROMPT), chosen="good", rejected="bad", where="row")
    assert row.is_preference and not row.is_rated and not row.is_response and row.verdict is None
    assert set(row.unread) <= {"prompt", "prompt_id"}


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("spelling", RATINGS[True])
def test_every_spelling_of_a_rated_answer_is_the_same_row(spelling: str, wanted: bool) -> None:
    row = row_of(RATINGS[wanted][spelling])
    assert row == Row(tuple(PROMPT), chosen="d", desirable=wanted, where="row")
    assert row.is_rated and not row.is_preference and not row.is_response and row.verdict is None and not row.unread


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "x", "chosen": "good", "rejected": "bad"},
        {"text": "x", "chosen": "good", "rejected": "bad"},
        {"query": "x", "chosen": "good", "rejected": "bad"},
        {"instruction": "x", "chosen": "good", "rejected": "bad"},
        {"instruction": "", "input": "x", "output": None, "chosen": "good", "rejected": "bad"},
        {"chosen": [user("x"), said("good")], "rejected": [user("x"), said("bad")]},
        {"chosen": [user("x"), said("good")], "rejected": "bad"},
    ],
)
def test_a_prompt_of_one_message(record: Json) -> None:
    assert row_of(record) == Row((user("x"),), chosen="good", rejected="bad", where="row")


def test_a_system_prompt_comes_first() -> None:
    wanted = Row((SYSTEM, user("x")), chosen="good", rejected="bad", where="row")
    for record in (
        {"prompt": "x", "system": "s"},
        {"prompt": [SYSTEM, user("x")]},
        {"instruction": "x", "system": "s"},
        {"conversations": [human("x")], "system": "s"},
    ):
        assert row_of({**record, "chosen": "good", "rejected": "bad"}) == wanted
    assert row_of({"chosen": [SYSTEM, user("x"), said("good")], "rejected": [SYSTEM, user("x"), said("bad")]}) == wanted


@pytest.mark.parametrize("record", [{"prompt": "x", "completion": "y"}, {"prompt": [user("x")], "completion": [said("y")]}])
def test_a_prompt_and_its_completion_alone_are_a_conversation(record: Json) -> None:
    assert row_of(record) == Row((user("x"), said("y")), where="row")


def test_prompts_that_stand_beside_a_conversation_are_left_alone() -> None:
    row = row_of({"messages": [user("x"), said("y")], "prompt": "x", "completion": "y"})
    assert row.messages == (user("x"), said("y")) and row.unread == ("completion", "prompt")


@QUICK
@given(st.tuples(*[st.text(max_size=6).map(lambda text: text + "x")] * 5), st.booleans(), st.booleans())
def test_the_spellings_agree(texts: tuple[str, str, str, str, str], wanted: bool, ascii_only: bool) -> None:
    first, answer, query, good, bad = texts
    prompt = (user(first), said(answer), user(query))

    def read(record: Json) -> Row:
        return row_of(json_object(json.dumps(record, ensure_ascii=ascii_only).encode(), "row"), "row")

    for record in ratings(first, answer, query, good, wanted).values():
        assert read(record) == Row(prompt, chosen=good, desirable=wanted, where="row")
    for record in pairs(first, answer, query, good, bad).values():
        if good.strip() == bad.strip():
            assert complaint(lambda record=record: read(record)).endswith("are the same: two different answers were expected")  # type: ignore[misc]
        else:
            assert read(record) == Row(prompt, chosen=good, rejected=bad, where="row")


# ---- verdicts

UNSAFE: dict[str, Any] = {"label": "Unsafe", "categories": ["Violent"], "reason": "r", "refusal": False, "request": "safe"}
GOOD, BAD_ONE = Verdict("unsafe", ("Violent",), False, "safe", "r"), Verdict("safe")
KNOWN: dict[str, Any] = {"label": "unsafe", "categories": ("Violent",), "reason": "r", "refusal": False, "request": "safe"}
JUDGED: dict[str, tuple[Json, tuple[Message, ...]]] = {
    "a prompt": ({"text": "x"}, (user("x"),)),
    "a response": ({"messages": [user("x"), said("y")]}, (user("x"), said("y"))),
    "ShareGPT": ({"conversations": [human("x"), gpt("y")]}, (user("x"), said("y"))),
    "Alpaca": ({"instruction": "x", "output": "y"}, (user("x"), said("y"))),
    "ms-swift": ({"query": "x", "response": "y"}, (user("x"), said("y"))),
    "TRL": ({"prompt": "x", "completion": "y"}, (user("x"), said("y"))),
}


@pytest.mark.parametrize("name", JUDGED)
def test_a_pair_of_verdicts(name: str) -> None:
    """The better one is the row's own; `messages` is all of the conversation, also where it ends with the response that is judged."""
    record, messages = JUDGED[name]
    wanted = Row(messages, chosen=GOOD, rejected=BAD_ONE, where="row", **KNOWN)
    assert row_of({**record, "chosen": UNSAFE, "rejected": {"label": "safe"}}) == wanted
    assert row_of({**record, **UNSAFE, "rejected": {"label": "safe", "categories": None}}) == wanted
    assert wanted.verdict == wanted.chosen
    assert wanted.is_response == (len(messages) == 2)


@pytest.mark.parametrize("name", JUDGED)
def test_a_rated_verdict(name: str) -> None:
    """A desirable one is the row's label too; of an undesirable one a model should say something else, so there is none."""
    record, messages = JUDGED[name]
    for key in ("desirable", "kto_tag"):
        right, wrong = (row_of({**record, **UNSAFE, key: wanted, "kind": "k"}) for wanted in (True, False))
        assert right == Row(messages, chosen=GOOD, desirable=True, kind="k", where="row", **KNOWN)
        assert wrong == Row(messages, chosen=GOOD, desirable=False, kind="k", where="row")
        assert right.verdict == GOOD and wrong.verdict is None


def test_verdicts_may_differ_in_anything() -> None:
    for rejected in ({**UNSAFE, "reason": None}, {**UNSAFE, "refusal": True}, {**UNSAFE, "categories": []}):
        assert row_of({"text": "x", **UNSAFE, "rejected": rejected}).is_preference


# ---- what stands beside

BESIDE = {"language": "zh", "kind": "k", "weight": 2, "id": 7}


def test_what_is_known_of_a_pair() -> None:
    row = row_of({"prompt": "x", "chosen": "y", "rejected": "z", "margin": 2, **BESIDE})
    assert (row.language, row.kind, row.weight, row.id, row.margin) == ("zh", "k", 2.0, "7", 2.0)
    assert type(row.margin) is float
    rated = row_of({"prompt": "x", "completion": "y", "label": False, **BESIDE})
    assert (rated.language, rated.kind, rated.weight, rated.id, rated.margin) == ("zh", "k", 2.0, "7", None)
    for margin in (0, -1.5, 1e-3):
        assert row_of({"prompt": "x", "chosen": "y", "rejected": "z", "margin": margin}).margin == margin


def test_null_is_as_good_as_nothing() -> None:
    nothing = dict.fromkeys(
        ("chosen", "rejected", "rejected_response", "rejected_messages", "margin", "desirable", "kto_tag", "label", "completion")
    )
    assert row_of({**nothing, "text": "x"}) == row_of({"text": "x"})
    assert row_of({**nothing, "prompt": "x", "completion": "y"}) == row_of({"prompt": "x", "completion": "y"})
    assert row_of({**nothing, **PAIRS["TRL"]}) == row_of(PAIRS["TRL"])
    assert row_of({**nothing, **RATINGS[True]["TRL"]}) == row_of(RATINGS[True]["TRL"])


def test_keys_that_nothing_reads_are_told() -> None:
    ids = {"prompt_id": 1, "chosen_id": 2, "rejected_id": 3, "score_chosen": 4.0, "source": "web"}
    row = row_of({"prompt": "x", "chosen": "y", "rejected": "z", **ids})
    assert row.unread == tuple(sorted(ids))


def test_rows_that_must_have_a_label(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def read(record: Json) -> list[Row]:
        path.write_text(json.dumps(record) + "\n")
        return list(read_rows(path, labelled=True))

    assert [row.label for row in read({"text": "x", **UNSAFE, "rejected": {"label": "safe"}})] == ["unsafe"]
    assert [row.label for row in read({"text": "x", **UNSAFE, "desirable": True})] == ["unsafe"]
    for record in (PAIRS["TRL"], RATINGS[True]["TRL"], {"text": "x", **UNSAFE, "desirable": False}):
        text = complaint(lambda record=record: read(record))  # type: ignore[misc]
        assert text == f"{path}:1: no label: safe, controversial or unsafe was expected"


# ---- what is refused

LABEL = "safe, controversial or unsafe was expected"
SAME = "are the same: two different answers were expected"
BEFORE = "conversations that differ before their last turn cannot be compared"
BETTER = "the better answer is chosen, or the row's own verdict, not both"
UNRATED = f"{LABEL} as label, or a conversation that ends with an assistant's answer"
TWO: dict[str, Any] = {"chosen": "y", "rejected": "z"}
PAIR: dict[str, Any] = {"prompt": "x", **TWO}

# a bad row → what its error says after `file:line: `
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "prompt alone": ({"prompt": "x"}, "prompt alone: completion, or chosen and rejected, were expected beside it; a text to be judged "),
    "prompt and a severity": ({"prompt": "x", "label": "safe"}, "prompt alone: completion, or chosen and rejected, were expected"),
    "prompt and a rating": ({"prompt": [user("x"), said("y")], "label": True}, "prompt alone: completion, or chosen and rejected, were "),
    "prompt number": ({**PAIR, "prompt": 5}, "prompt = 5: a list of turns was expected"),
    "prompt empty": ({**PAIR, "prompt": []}, "prompt = []: a list of turns was expected"),
    "prompt's role": ({**PAIR, "prompt": [{"role": "usr", "content": "x"}]}, "prompt[0]: role = 'usr': did you mean 'user'?"),
    "prompt's speaker": ({**PAIR, "prompt": [{"from": "bot", "value": "x"}]}, "prompt[0]: from = 'bot': one of human, "),
    "only a system prompt": ({**PAIR, "prompt": [SYSTEM]}, "prompt holds no message besides a system prompt and an answer"),
    "no prompt": ({"chosen": [said("y")], "rejected": [said("z")]}, "chosen holds no message besides a system prompt and an answer"),
    "only an answer": ({"messages": [said("y")], "label": True}, "messages holds no message besides a system prompt and an answer"),
    "transcripts": (
        {"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: x\n\nAssistant: z"},
        r"chosen = '\n\nHuman: x\n\nAssistant: y': a whole conversation was expected, or its input beside it, such as prompt",
    ),
    "no conversation": ({"rejected": "z"}, "none of 'messages', 'conversations', "),
    "null alone": ({"chosen": None}, "chosen = None: a whole conversation was expected, or its input beside it, such as prompt"),
    "chosen alone": ({"prompt": "x", "chosen": "y"}, "chosen without rejected: the worse answer was expected beside it"),
    "chosen, whole, alone": ({"chosen": [user("x"), said("y")]}, "chosen without rejected: the worse answer was expected beside it"),
    "chosen and a rating": ({"prompt": "x", "chosen": "y", "desirable": True}, "chosen without rejected: the worse answer was expected"),
    "rejected alone": (
        {"prompt": "x", "rejected": "z"},
        "rejected without chosen: the better answer was expected as chosen, as an assistant's turn that ends the conversation, or, of "
        "verdicts, as label",
    ),
    "rejected_response alone": ({"messages": [user("x")], "rejected_response": "z"}, "rejected_response without chosen: the better answer"),
    "rejected verdict alone": ({"text": "x", "rejected": {"label": "safe"}}, "rejected without chosen: the better answer was expected"),
    "two worse ones": ({**PAIR, "rejected_response": "z"}, "both 'rejected' and 'rejected_response': one of them is the worse answer"),
    "two better ones": (
        {"messages": [user("x"), said("y")], **TWO},
        "both 'chosen' and an assistant's turn at the end of 'messages': one of them is the better answer",
    ),
    "chosen and completion": ({**PAIR, "completion": "y"}, "both 'chosen' and an assistant's turn at the end of 'prompt': one of them"),
    "the same": ({**PAIR, "rejected": "y"}, f"chosen and rejected {SAME}"),
    "the same but for white space": ({**PAIR, "rejected": " y\n"}, f"chosen and rejected {SAME}"),
    "the same, ms-swift": ({"messages": [user("x"), said("y")], "rejected_response": "y"}, f"chosen and rejected_response {SAME}"),
    "the same conversations": ({"chosen": [user("x"), said("y")], "rejected": [user("x"), said("y")]}, f"chosen and rejected {SAME}"),
    "the same verdicts": ({"text": "x", **UNSAFE, "rejected": UNSAFE}, f"chosen and rejected {SAME}"),
    "another prompt": (
        {"chosen": [user("x"), said("y")], "rejected": [user("w"), said("z")]},
        f"chosen and rejected differ from message 0 on (the first is 0): {BEFORE}",
    ),
    "another earlier turn": (
        {"messages": [*PROMPT, said("y")], "rejected_messages": [user("a"), said("B"), user("c"), said("y")]},
        f"chosen and rejected_messages differ from message 1 on (the first is 0): {BEFORE}",
    ),
    "a longer one": ({"chosen": [user("a"), said("y")], "rejected": [*PROMPT, said("z")]}, "chosen and rejected differ from message 1 on"),
    "a shorter one": ({"chosen": [*PROMPT, said("z")], "rejected": [user("a"), said("y")]}, "chosen and rejected differ from message 1 on"),
    "not of this prompt": (
        {"prompt": "w", "chosen": [user("x"), said("y")], "rejected": [user("x"), said("z")]},
        "chosen holds 2 messages, which do not begin with those of 'prompt': an assistant's message alone, or the whole conversation, was",
    ),
    "rejected is not of this prompt": ({**PAIR, "rejected": [user("w"), said("z")]}, "chosen and rejected differ from message 0 on"),
    "ends with a user's": (
        {"chosen": [user("x"), user("y")], "rejected": [user("x"), said("z")]},
        "chosen ends with a message whose role is 'user': an assistant's was expected",
    ),
    "rejected is a user's": ({**PAIR, "rejected": user("z")}, "rejected ends with a message whose role is 'user': an assistant's was "),
    "rejected is a human's": ({"conversations": [human("x")], "chosen": gpt("y"), "rejected": human("z")}, "rejected ends with a message "),
    "chosen empty": ({**PAIR, "chosen": ""}, "chosen is empty: a text was expected"),
    "rejected blank": ({**PAIR, "rejected": " \n"}, "rejected is empty: a text was expected"),
    "rejected_response empty": ({"messages": [user("x"), said("y")], "rejected_response": ""}, "rejected_response is empty: a text was "),
    "chosen number": ({**PAIR, "chosen": 5}, "chosen = 5: text, messages or a verdict was expected"),
    "chosen true": ({**PAIR, "chosen": True}, "chosen = True: text, messages or a verdict was expected"),
    "rejected list": ({**PAIR, "rejected": []}, "rejected = []: text, messages or a verdict was expected"),
    "rejected texts": ({**PAIR, "rejected": ["z"]}, "rejected[0] = 'z': an object with 'role' and 'content' was expected"),
    "chosen without content": ({**PAIR, "chosen": {"role": "assistant"}}, "chosen = {'role': 'assistant'}: an object with 'role' and 'con"),
    "chosen's content": ({**PAIR, "chosen": [{"role": "assistant", "content": None}]}, "chosen[0]: None: text was expected"),
    "text and a verdict": ({**PAIR, "rejected": UNSAFE}, "the better answer is text and rejected is a verdict: two of one kind were "),
    "a verdict and text": ({"text": "x", **UNSAFE, "rejected": "z"}, "the better answer is a verdict and rejected is text: two of one"),
    "a label beside texts": ({**PAIR, "label": "unsafe"}, f"both 'chosen' and 'label': {BETTER}"),
    "two verdicts": (
        {"text": "x", "label": "unsafe", "chosen": UNSAFE, "rejected": {"label": "safe"}},
        f"both 'chosen' and 'label': {BETTER}",
    ),
    "a part of another": (
        {"text": "x", "reason": "r", "chosen": UNSAFE, "rejected": {"label": "safe"}},
        f"both 'chosen' and 'reason': {BETTER}",
    ),
    "verdict's key": (
        {"text": "x", **UNSAFE, "rejected": {"label": "safe", "catagories": []}},
        "rejected: no key 'catagories' in a verdict, did you mean 'categories'?",
    ),
    "verdict without label": (
        {"text": "x", **UNSAFE, "rejected": {"categories": []}},
        f"rejected = {{'categories': []}}: label = {LABEL} in a verdict",
    ),
    "verdict empty": ({"text": "x", **UNSAFE, "rejected": {}}, f"rejected = {{}}: label = {LABEL} in a verdict"),
    "verdict's label": ({"text": "x", **UNSAFE, "rejected": {"label": "bad"}}, f"rejected: label = 'bad': {LABEL}"),
    "verdict's label true": ({"text": "x", **UNSAFE, "rejected": {"label": True}}, f"rejected: label = True: {LABEL}"),
    "verdict's refusal": ({"text": "x", **UNSAFE, "rejected": {"label": "safe", "refusal": "no"}}, "rejected: refusal = 'no': true or "),
    "margin NaN": ({**PAIR, "margin": math.nan}, "margin = nan: a finite number was expected"),
    "margin infinite": ({**PAIR, "margin": -math.inf}, "margin = -inf: a finite number was expected"),
    "margin long": ({**PAIR, "margin": 10**400}, "margin = 1000"),
    "margin text": ({**PAIR, "margin": "1"}, "margin = '1': a finite number was expected"),
    "margin true": ({**PAIR, "margin": True}, "margin = True: a finite number was expected"),
    "margin of a rated one": ({"prompt": "x", "completion": "y", "label": True, "margin": 1}, "margin without rejected: it says by how "),
    "margin of a row": ({"text": "x", "label": "safe", "margin": 1}, "margin without rejected: it says by how much one of two answers is"),
    "a rated pair": (
        {**PAIR, "desirable": True},
        "both 'rejected' and 'desirable': a pair of answers, or one answer and whether it is wanted, was expected",
    ),
    "a pair, true": ({**PAIR, "label": True}, "both 'rejected' and 'label': a pair of answers, or one answer and whether it is wanted"),
    "a pair, kto_tag": ({"messages": [user("x"), said("y")], "rejected_response": "z", "kto_tag": False}, "both 'rejected_response' and "),
    "kto_tag and label": (
        {"messages": [user("x"), said("y")], "kto_tag": True, "label": True},
        "both 'kto_tag' and 'label': one of them says whether the answer is wanted",
    ),
    "desirable and kto_tag": ({"text": "x", **UNSAFE, "kto_tag": True, "desirable": True}, "both 'desirable' and 'kto_tag': one of them"),
    "desirable text": ({"text": "x", **UNSAFE, "desirable": "yes"}, "desirable = 'yes': true or false was expected"),
    "kto_tag number": ({"messages": [user("x"), said("y")], "kto_tag": 1}, "kto_tag = 1: true or false was expected"),
    "label number": ({"prompt": "x", "completion": "y", "label": 1}, f"label = 1: {LABEL}"),
    "no answer, label": ({"messages": [user("x")], "label": False}, f"label = False: {UNRATED}"),
    "no answer, kto_tag": ({"text": "x", "kto_tag": True}, f"kto_tag = True: {UNRATED}"),
    "no answer, desirable": ({"text": "x", "desirable": True}, f"desirable = True: {UNRATED}"),
    "completion empty": ({"prompt": "x", "completion": "", "label": True}, "the answer is empty: a text was expected"),
    "completion blank": ({"prompt": "x", "completion": [said(" ")], "label": True}, "the answer is empty: a text was expected"),
    "answer empty": ({"messages": [user("x"), said("")], "kto_tag": True}, "the answer is empty: a text was expected"),
    "completion number": ({"prompt": "x", "completion": 5, "label": True}, "completion = 5: text, messages or a verdict was expected"),
    "completion's role": ({"prompt": "x", "completion": [user("y")], "label": True}, "completion ends with a message whose role is 'user'"),
    "completion of two": (
        {"prompt": "x", "completion": [user("x"), said("y")], "label": True},
        "completion = [{'content': 'x', 'role': 'user'}, {'content': 'y', 'role': 'assistant'}]: text, or one message, an assistant's, was",
    ),
    "completion a verdict": ({"prompt": "x", "completion": UNSAFE, "label": True}, "completion = {'categories': ['Violent'], 'label': "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_says_what_is_wrong_and_where(tmp_path: Path, name: str) -> None:
    record, expected = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n\n" + json.dumps(record) + "\n")
    text = complaint(lambda: list(read_rows(path)))
    assert text.startswith(f"{path}:3: {expected}")
    assert len(text) < len(f"{path}:3: ") + 230


NEAR = [
    ("choosen", "chosen"), ("reject", "rejected"), ("rejected_respons", "rejected_response"), ("reject_messages", "rejected_messages"),
    ("margins", "margin"), ("desireable", "desirable"), ("kto_tags", "kto_tag"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "meant"), NEAR)
def test_a_key_that_looks_like_one_of_ours_is_refused(key: str, meant: str) -> None:
    assert complaint(lambda: row_of({"text": "x", key: "y"}, "a.jsonl:3")) == f"a.jsonl:3: unknown key {key!r}, did you mean {meant!r}?"


def test_misspelt_keys_of_a_prompt() -> None:
    assert complaint(lambda: row_of({"prompt": "x", "completions": "y"})) == "row: unknown key 'completions', did you mean 'completion'?"
    assert complaint(lambda: row_of({"promt": "x", **TWO})).endswith(", such as prompt; did you mean 'prompt' by 'promt'?")
    assert complaint(lambda: row_of({"promt": "x", "completion": "y"})).endswith("; did you mean 'prompt' by 'promt'?")


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(["role", "content", "from", "value", "label", "categories"])
    return st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4)


messages = st.lists(st.builds(user, st.just("x")) | st.builds(said, st.sampled_from(["y", "z", ""])), max_size=3)
verdicts = st.fixed_dictionaries({"label": st.sampled_from(["safe", "unsafe"])})
leaves = st.none() | st.booleans() | st.floats() | st.sampled_from(["x", "y", "safe", ""]) | messages | verdicts
KEYS = [
    "messages", "conversations", "text", "prompt", "completion", "chosen", "rejected", "rejected_response", "rejected_messages", "margin",
    "desirable", "kto_tag", "label", "categories", "system",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), st.recursive(leaves, objects, max_leaves=4), min_size=1, max_size=5))
def test_anything_is_a_row_or_one_line(record: dict[str, Any]) -> None:
    try:
        row = row_of(json_object(json.dumps(record).encode(), "a:1"), "a:1")
    except MegamodError as error:
        text = str(error)
    else:
        text = "a:1: a row"
        check(row)
    assert text.startswith("a:1: ")


def check(row: Row) -> None:
    """What Row promises of its answers."""
    answers: list[Answer] = [answer for answer in (row.chosen, row.rejected) if answer is not None]
    assert len(answers) == (2 if row.is_preference else 1 if row.is_rated else 0)
    assert not (row.is_preference and row.is_rated)
    assert len({type(answer) for answer in answers}) <= 1
    assert row.margin is None or row.is_preference
    assert any(message["role"] != "system" for message in row.messages)
    if answers and isinstance(row.chosen, Verdict):
        assert row.verdict == (None if row.desirable is False else row.chosen)
    elif answers:
        assert row.verdict is None and all(isinstance(answer, str) and answer.strip() for answer in answers)
