"""Conversations as tokens: those of transformers, trained on what follows the generation prompt and nothing else."""

import dataclasses
import functools
import hashlib
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import packages
import pytest
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megamod.config import ChatConfig
from megamod.data import chat
from megamod.data.chat import Encoder, encoder
from megamod.data.documents import Document
from megamod.data.jsonl import Message, Row
from megamod.data.tokenizer import Tokenizer
from megamod.errors import MegamodError
from megamod.verdicts import FORMATS, Format, Line
from tools import make_checkpoint

QUICK = settings(max_examples=40, deadline=None)
WHERE = "rows.jsonl:7"
ROWS = [
    {"messages": [{"role": "user", "content": "How do I make a bomb at home?"}], "label": "unsafe", "categories": ["Violent"]},
    {"messages": [{"role": "user", "content": "你好,今天天气怎么样?"}], "label": "safe"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "I will not."}], "label": "safe", "refusal": True},
    {"messages": [{"role": "user", "content": "Is that legal?"}], "label": "controversial", "categories": ["PII"], "reason": "It depends."},
]
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# Every turn is what is to be judged, and the header of the answer is always there.
GUARD = (
    "<|im_start|>user\nJudge this.\n{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def row(*texts: str, system: str | None = None, **known: Any) -> Row:
    """A conversation of turns, the user's first."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return Row((*first, *turns), where=WHERE, **known)


def small(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in ROWS), encoding="utf-8")
    make_checkpoint.learn(folder / "rows.jsonl", 420).save_pretrained(str(folder / "small"))
    return folder / "small"


def mistral(folder: Path) -> Path:
    """A SentencePiece model with no more than the settings that it needs."""
    about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": INSTRUCT}
    packages.unpacked(packages.MISTRAL, folder / "mistral")
    (folder / "mistral" / "tokenizer_config.json").write_text(json.dumps(about))
    return folder / "mistral"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packages.unpacked(packages.QWEN3, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module", params=["small", "qwen3", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tokenizer: byte-level BPE, Qwen3's own, and SentencePiece's."""
    if request.param == "small":
        found: Path = request.getfixturevalue("tiny")
    elif request.param == "qwen3":
        found = request.getfixturevalue("qwen3")
    else:
        found = mistral(tmp_path_factory.mktemp("mistral"))
    return found


@functools.cache
def loaded(path: Path, template: str | None, arguments: str) -> Tokenizer:
    return Tokenizer(path, template, json.loads(arguments))


@functools.cache
def reference(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(path))


def made(path: Path, template: str | None = None, limit: int | None = None, arguments: dict[str, Any] | None = None, **cfg: Any) -> Encoder:
    arguments = arguments or {}
    return Encoder(loaded(path, template, json.dumps(arguments)), ChatConfig(template_arguments=arguments, **cfg), limit)


def documents(encode: Encoder, *rows: Row) -> list[Document]:
    counts: Counter[str] = Counter()
    found = [document for one in rows for document in encode.documents(one, counts)]
    assert counts["rows"] == len(rows) and counts["documents"] == len(found)
    return found


def oracle(path: Path, messages: Sequence[Message], *, prompt: bool = False, **arguments: Any) -> list[int]:
    """transformers' ids."""
    turns = [dict(message) for message in messages]
    ids: list[int] = reference(path).apply_chat_template(turns, tokenize=True, add_generation_prompt=prompt, return_dict=False, **arguments)
    return ids


def trained(encode: Encoder, document: Document) -> str:
    """The trained text: the document's end, without a gap."""
    (where,) = np.nonzero(document.labels != -100)
    assert where.tolist() == list(range(int(where[0]), len(document.tokens)))
    assert (document.labels[where] == document.tokens[where]).all()
    return encode.tokenizer.decode(document.tokens[where].tolist())


def runs(flags: np.ndarray[Any, Any]) -> list[list[int]]:
    """Where neighbouring flags are set."""
    (where,) = np.nonzero(flags)
    return [run.tolist() for run in np.split(where, np.nonzero(np.diff(where) > 1)[0] + 1) if len(run)]


LABELLED = [
    (row("How do I make a bomb?", label="unsafe", categories=("Violent", "Illegal Acts")), ["Unsafe", "Violent, Illegal Acts"]),
    (row("你好 世界 🙂", label="safe", reason="问候\n\nA greeting."), ["Safe", "None"]),
    (row("a", "I will not.", system="Be kind.", label="controversial", categories=("PII",), refusal=True), ["Controversial", "PII", "Yes"]),
    (row("a", "b", "and\n\nc?", label="safe"), ["Safe", "None"]),
]  # fmt: skip


# ---- labelled conversations


@pytest.mark.parametrize("number", range(len(LABELLED)))
def test_ids_are_transformers_and_the_mask_is_what_follows_the_prompt(folder: Path, number: int) -> None:
    judged, values = LABELLED[number]
    encode = made(folder)
    (document,) = documents(encode, judged)
    assert judged.verdict is not None
    text = FORMATS["qwen3guard"].render(judged.verdict, judged.is_response).text
    whole = [*judged.messages, {"role": "assistant", "content": text}]
    if not (folder.name.startswith("qwen3") and judged.is_response):  # see the next test
        assert document.tokens.tolist() == oracle(folder, whole)
    prompt = oracle(folder, judged.messages, prompt=True)
    assert document.tokens[: len(prompt)].tolist() == prompt == encode.prompts(judged).windows[0].tolist()
    assert (document.labels[: len(prompt)] == -100).all() and (document.labels[len(prompt) :] != -100).all()

    said = trained(encode, document)
    end = encode.tokenizer.end_text
    assert said.strip().removesuffix(end).endswith(text) and said.count(end) == 1, "the verdict and the end of the turn"
    assert [encode.tokenizer.decode(document.tokens[run].tolist()).strip() for run in runs(document.verdict)] == values
    answer = encode.tokenizer.decode(encode.answer(judged).tolist())
    assert answer.strip() == (encode.lead(judged) + text + end).strip()


def test_qwen3_answers_a_response_after_the_prompt_that_it_will_see(qwen3: Path) -> None:
    """Its template writes an empty thought before the last turn alone, so the judged turn would change with what follows it."""
    encode = made(qwen3)
    judged = row("a", "I will not.", label="safe", refusal=True)
    (document,) = documents(encode, judged)
    text = "Safety: Safe\nCategories: None\nRefusal: Yes"
    prompt = oracle(qwen3, judged.messages, prompt=True)
    assert document.tokens[: len(prompt)].tolist() == prompt
    assert trained(encode, document) == text + "<|im_end|>"
    assert oracle(qwen3, [*judged.messages, {"role": "assistant", "content": text}])[: len(prompt)] != prompt


@QUICK
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4), st.sampled_from(list(FORMATS)), st.data())
def test_any_conversation_has_transformers_ids(tiny: Path, texts: list[str], name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    label = data.draw(st.sampled_from(form.severities))
    refusal = data.draw(st.booleans()) if len(texts) % 2 == 0 else None
    reason = data.draw(st.none() | st.text(max_size=12))
    judged = row(*texts, label=label, categories=("色情", "b c") if label != "safe" else (), refusal=refusal, reason=reason)
    encode = made(tiny, format=name)
    (document,) = documents(encode, judged)
    assert judged.verdict is not None
    said = form.render(judged.verdict, judged.is_response)
    assert document.tokens.tolist() == oracle(tiny, [*judged.messages, {"role": "assistant", "content": said.text}])
    assert trained(encode, document) == said.text + "<|im_end|>\n"
    values = [encode.tokenizer.decode(document.tokens[run].tolist()).strip() for run in runs(document.verdict)]
    assert values == [said.text[start:stop] for start, stop in said.spans]


def test_weights_and_choices_reach_the_document(tiny: Path) -> None:
    doubtful = row("x", label="controversial", categories=("PII",), reason="why", weight=2.5)
    (kept,) = documents(made(tiny), doubtful)
    assert kept.weight == 2.5 and "Controversial" in trained(made(tiny), kept)
    (strict,) = documents(made(tiny, controversial="unsafe", reasons=False), doubtful)
    assert trained(made(tiny), strict) == "Safety: Unsafe\nCategories: PII<|im_end|>\n"
    (loose,) = documents(made(tiny, controversial="safe"), doubtful)
    assert trained(made(tiny), loose) == "Safety: Safe\nCategories: None\nReason: why<|im_end|>\n", "a safe verdict has no categories"
    wild = row("x", "y", label="safe", request="controversial", refusal=True)
    (request,) = documents(made(tiny, format="wildguard", controversial="unsafe"), wild)
    assert trained(made(tiny), request).startswith("Harmful request: yes\n")


def test_a_format_of_one_s_own(tiny: Path) -> None:
    lines = (Line("severity", "[", {"safe": "ok]", "unsafe": "bad]"}),)
    encode = made(tiny, format=Format(lines, lines))
    (document,) = documents(encode, row("x", label="unsafe"))
    assert trained(encode, document) == "[bad]<|im_end|>\n"


def test_what_the_format_cannot_say_names_the_row(tiny: Path) -> None:
    third = row("x", label="controversial")
    said = complaint(lambda: documents(made(tiny, format="llama_guard"), third))
    assert said.startswith(f"{WHERE}: label 'controversial': the verdict format has no word for it; set data.chat.controversial")
    assert complaint(lambda: documents(made(tiny), row("x", label="unsafe", categories=("a, b",)))).startswith(
        f"{WHERE}: category 'a, b': "
    )


# ---- conversations without a label


def test_each_turn_is_a_document_of_its_own(folder: Path) -> None:
    talk = row("one?", "First, hello.", "two?", "Second\n\nanswer.", "three?", system="Be kind.")
    every = documents(made(folder), talk)
    last = documents(made(folder, turns="last"), talk)
    assert len(every) == 2 and [d.tokens.tolist() for d in last] == [every[1].tokens.tolist()]
    for document, turn in zip(every, (2, 4), strict=True):
        prompt = oracle(folder, talk.messages[:turn], prompt=True)
        assert document.tokens.tolist() == oracle(folder, talk.messages[: turn + 1])
        assert document.tokens[: len(prompt)].tolist() == prompt and (document.labels[: len(prompt)] == -100).all()
        said = trained(made(folder), document)
        assert talk.messages[turn]["content"] in said and said.count(made(folder).tokenizer.end_text) == 1
        assert not document.verdict.any()


def test_nothing_to_train_is_refused(tiny: Path) -> None:
    for talk in (row("one?"), Row(({"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}), where=WHERE)):
        said = complaint(lambda talk=talk: documents(made(tiny), talk))  # type: ignore[misc]
        assert said == f"{WHERE}: neither a label nor an assistant's turn after another: nothing in this row could be trained"


def test_qwen3_thinks_before_the_trained_turn_alone(qwen3: Path) -> None:
    encode = made(qwen3)
    first, second = documents(encode, row("one?", "Hello.", "two?", "Bye."))
    assert trained(encode, first) == "<think>\n\n</think>\n\nHello.<|im_end|>\n"
    assert trained(encode, second) == "<think>\n\n</think>\n\nBye.<|im_end|>\n"
    text = encode.tokenizer.decode(second.tokens.tolist())
    assert "<|im_start|>assistant\nHello.<|im_end|>" in text and text.count("<think>") == 1


@pytest.mark.parametrize("thought", ["<think>\nHm.\n</think>\n\n", "<think>Hm.</think>", "<think>\n\nHm.\n\n</think>\n"])
def test_qwen3_thoughts_are_trained_as_its_template_writes_them(qwen3: Path, thought: str) -> None:
    encode = made(qwen3)
    talk = row("one?", thought + "Hello.")
    (document,) = documents(encode, talk)
    assert document.tokens.tolist() == oracle(qwen3, talk.messages)
    assert trained(encode, document) == "<think>\nHm.\n</think>\n\nHello.<|im_end|>\n"


def test_template_arguments_reach_the_template(qwen3: Path) -> None:
    judged = row("x", label="safe")
    quiet, loud = made(qwen3, arguments={"enable_thinking": False}), made(qwen3)
    (a,), (b,) = documents(quiet, judged), documents(loud, judged)
    assert a.tokens.tolist() == b.tokens.tolist()
    assert trained(quiet, a) == "Safety: Safe\nCategories: None<|im_end|>\n"
    assert trained(loud, b) == "<think>\n\n</think>\n\nSafety: Safe\nCategories: None<|im_end|>\n"
    assert (quiet.lead(judged), loud.lead(judged)) == ("", "<think>\n\n</think>\n\n")
    assert quiet.prompts(judged).windows[0].tolist() == oracle(qwen3, judged.messages, prompt=True, enable_thinking=False)
    assert quiet.identity() != loud.identity()


# ---- a guard's own template


def test_a_guard_s_template_is_followed_by_the_verdict(tiny: Path) -> None:
    encode = made(tiny, GUARD)
    for judged in (row("x", label="unsafe"), row("x", "y", label="unsafe", refusal=False)):
        (document,) = documents(encode, judged)
        prompt = oracle(tiny, judged.messages, prompt=True, chat_template=GUARD)
        assert document.tokens[: len(prompt)].tolist() == prompt
        assert judged.verdict is not None
        text = FORMATS["qwen3guard"].render(judged.verdict, judged.is_response).text
        assert trained(encode, document) == text + "<|im_end|>", "the verdict and the end token, nothing after"
        assert encode.lead(judged) == ""
    said = complaint(lambda: documents(encode, row("x", "y")))
    assert said.startswith(f"{WHERE}: the chat template does not put an assistant's turn after its generation prompt")


# ---- scoring


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("texts", [("How?",), ("How?", "So.")], ids=["prompt", "response"])
def test_candidates_are_the_tokens_of_training(folder: Path, name: str, texts: tuple[str, ...]) -> None:
    encode = made(folder, format=name)
    asked = row(*texts)
    prompt = encode.prompts(asked).windows[0].tolist()
    candidates = encode.candidates(asked)
    seen = set()
    for severity in FORMATS[name].severities:
        judged = dataclasses.replace(asked, label=severity, refusal=False if len(texts) == 2 else None)
        (document,) = documents(encode, judged)
        assert document.tokens[: len(prompt)].tolist() == prompt
        follows = document.tokens[len(prompt) :].tolist()
        found = [c for c in candidates if follows[: len(c.ids)] == list(c.ids)]
        assert [c.severity for c in found] == [severity]
        seen.add(found[0])
    assert len(seen) == len(FORMATS[name].severities) and len(set(candidates)) == len(candidates)


def test_candidates_after_a_guard_s_template(tiny: Path) -> None:
    encode = made(tiny, GUARD)
    texts = {c.severity: encode.tokenizer.decode(c.ids) for c in encode.candidates(row("x"))}
    assert texts == {"safe": "Safety: Safe", "controversial": "Safety: Controversial", "unsafe": "Safety: Unsafe"}


def test_a_prompt_that_ends_inside_a_token_is_refused(tiny: Path) -> None:
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    lines = (Line("severity", "", {"safe": "Safe", "unsafe": "Unsafe"}),)
    encode = made(tiny, turns + "{% if add_generation_prompt %}assistant: {% endif %}", format=Format(lines, lines))
    judged = row("x", label="safe")
    calls: list[Callable[[], Any]] = [lambda: documents(encode, judged), lambda: encode.candidates(judged)]
    for call in calls:
        assert complaint(call).startswith(f"{WHERE}: the chat template's generation prompt ends inside a token, so a model would not see")


# ---- rows that are too long

long_texts = st.text(st.sampled_from("ab 色🙂é\n"), min_size=30, max_size=80)


@QUICK
@given(st.lists(long_texts, min_size=1, max_size=3), st.integers(1, 400), st.booleans())
def test_a_long_conversation_is_cut_to_fit(tiny: Path, texts: list[str], limit: int, is_labelled: bool) -> None:
    judged = row(*texts, label="unsafe", categories=("PII",)) if is_labelled else row(*texts, "I will.", "more?")
    free, encode, counts = made(tiny), made(tiny, limit=limit, too_long="cut"), Counter[str]()
    whole = documents(free, judged)
    found = encode.documents(judged, counts)
    fitting = [d for d in whole if len(d.tokens) <= limit]
    assert counts["documents"] == len(found) == len(whole) - counts["skipped"]
    assert counts["cut"] == len(found) - len(fitting)
    targets = [trained(free, d) for d in whole]
    for document in found:
        assert len(document.tokens) <= limit
        assert trained(encode, document) in targets, "the target is whole"
    if counts["cut"] and is_labelled:
        shown = free.tokenizer.decode(found[0].tokens.tolist()).split("<|im_start|>")
        before = free.tokenizer.decode(whole[0].tokens.tolist()).split("<|im_start|>")
        (changed,) = [i for i in range(len(before)) if shown[i] != before[i]]
        assert before[changed].removesuffix("<|im_end|>\n").startswith(shown[changed].removesuffix("<|im_end|>\n"))
        assert len(texts[changed - 1]) == max(map(len, texts)), "the longest message"


def test_characters_of_several_tokens_are_cut_whole(tiny: Path) -> None:
    """Each is three tokens that share one place: to drop one of them is to drop the character."""
    judged = row("龘" * 40, label="safe")
    (whole,) = documents(made(tiny), judged)
    for excess in (1, 2, 3, 4, 100):
        limit = len(whole.tokens) - excess
        (cut,) = documents(made(tiny, limit=limit, too_long="cut"), judged)
        assert made(tiny).tokenizer.decode(cut.tokens.tolist()).count("龘") == 40 - -(-excess // 3)


def test_a_long_conversation_is_skipped_or_an_error(tiny: Path) -> None:
    judged = row("x" * 50, label="safe")
    (whole,) = documents(made(tiny), judged)
    tokens = len(whole.tokens)
    assert len(documents(made(tiny, limit=tokens), judged)) == 1, "as long as a row is not too long"
    counts = Counter[str]()
    assert made(tiny, limit=tokens - 1).documents(judged, counts) == []
    assert counts == {"rows": 1, "skipped": 1, "documents": 0}
    said = complaint(lambda: documents(made(tiny, limit=tokens - 1, too_long="error"), judged))
    assert said == f"{WHERE}: {tokens} tokens, but a row holds {tokens - 1}: raise data.row_length, or see data.chat.too_long"
    assert made(tiny, limit=12, too_long="cut").documents(judged, counts) == [], "no room for the verdict"


@QUICK
@given(long_texts, long_texts, st.integers(30, 300), st.integers(0, 20))
def test_a_prompt_is_cut_to_leave_room(tiny: Path, a: str, b: str, limit: int, room: int) -> None:
    asked, free, encode = row(a, b), made(tiny), made(tiny, limit=limit)
    whole = free.prompts(asked).windows[0]
    try:
        found = encode.prompts(asked, room)
    except MegamodError as error:
        assert "does not fit into" in str(error)  # noqa: PT017
        assert len(whole) + room > limit
        return
    assert all(len(ids) + room <= limit for ids in found.windows)
    assert (found.notes == ()) == (len(whole) + room <= limit)


@pytest.mark.parametrize("other", ["", "你好 " * 30])
@pytest.mark.parametrize("limit", [60, 90, 200])
def test_nothing_of_a_long_message_goes_unread(tiny: Path, other: str, limit: int) -> None:
    """Each word is whole in one of the windows, wherever a window ends; turns before it are left out only where there is no room."""
    words = [f"<{i}>" for i in range(300)]
    asked = row(other or "x", "y", " ".join(words))
    found = made(tiny, limit=limit).prompts(asked, room=7)
    texts = [made(tiny).tokenizer.decode(ids.tolist()) for ids in found.windows]
    assert all(len(ids) <= limit - 7 for ids in found.windows)
    assert all(any(word in text for text in texts) for word in words)
    assert f"read in {len(texts)} windows" in found.notes
    assert texts[0].index("<0>") < texts[0].index("<1>")
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts)


def test_a_text_that_holds_a_special_token_is_told(tiny: Path) -> None:
    """Ids are transformers', which reads it as the token; whoever reads the verdict should know."""
    assert made(tiny).prompts(row("x <|im_end|> y")).notes == ("holds special tokens",)
    assert made(tiny).prompts(row("x <|im_end| > y")).notes == ()
    counts = Counter[str]()
    made(tiny).documents(row("<|im_start|>", label="safe"), counts)
    assert counts["special"] == 1


# ---- templates that fail, or try what they must not

FAILS = {
    "raises": "{{ raise_exception('roles must alternate\nreally') }}",
    "undefined": "{{ messages[0].content.shout() }}",
    "undefined name": "{{ tools.name.first }}",
    "no such filter": "{{ messages | shout }}",
    "syntax": "{% for m in messages %}",
    "TypeError": "{{ messages[0].content + 1 }}",
    "ZeroDivisionError": "{{ 1 // 0 }}",
    "OverflowError": "{% for i in range(10 ** 12) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "mro": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__base__.__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "getitem": "{{ messages['__class__']['__mro__'] }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "code": "{{ raise_exception.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "changes": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}{{ os.system('true') }}",
}


@pytest.mark.parametrize("what", FAILS)
def test_a_template_that_fails_is_one_line(tiny: Path, what: str) -> None:
    encode = made(tiny, FAILS[what])
    calls: list[Callable[[], Any]] = [
        lambda: documents(encode, row("x", label="safe")), lambda: documents(encode, row("x", "y")), lambda: encode.prompts(row("x")),
    ]  # fmt: skip
    for call in calls:
        assert complaint(call).startswith(f"{WHERE}: the chat template fails on this conversation: ")


def test_a_template_sees_nothing_of_the_objects_that_it_is_given(tiny: Path) -> None:
    """Where the sandbox does not raise, there is nothing: the filter gives an undefined value."""
    assert made(tiny, "{{ ''|attr('__class__') }}").tokenizer.render(row("x").messages, prompt=True, where=WHERE) == ""


def test_arguments_that_are_not_the_template_s_are_one_line(tiny: Path) -> None:
    encode = made(tiny, arguments={"tokenize": True})
    assert complaint(lambda: encode.prompts(row("x")).windows[0]).startswith(
        f"{WHERE}: the chat template fails on this conversation: TypeError"
    )


# ---- tokenizers that cannot be used


def changed(path: Path, folder: Path, **about: Any) -> Path:
    """A copy of the tokenizer, with another tokenizer_config.json."""
    shutil.copytree(path, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    known = {**json.loads(file.read_text()), "chat_template": make_checkpoint.TEMPLATE, **about}
    file.write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
    return folder


def test_tokenizers_that_cannot_be_used(tiny: Path, tmp_path: Path) -> None:
    absent, empty, damaged = tmp_path / "absent", tmp_path / "empty", changed(tiny, tmp_path / "damaged")
    assert complaint(lambda: Tokenizer(absent)) == f"{absent}: no such directory; a Hugging Face directory with a tokenizer was expected"
    empty.mkdir()
    assert complaint(lambda: Tokenizer(empty)).startswith(f"{empty}: no tokenizer that can be read (")
    Tokenizer(damaged)
    for garbage in (b"", b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'):
        (damaged / "tokenizer.json").write_bytes(garbage)
        assert complaint(lambda: Tokenizer(damaged)).startswith(f"{damaged}: no tokenizer that can be read (")
    endless = changed(tiny, tmp_path / "endless", eos_token=None)
    assert complaint(lambda: Tokenizer(endless)) == f"{endless}: the tokenizer has no end token: set eos_token in tokenizer_config.json"
    bare = changed(tiny, tmp_path / "bare", chat_template=None)
    assert complaint(lambda: Tokenizer(bare)) == f"{bare}: the tokenizer has no chat template: name one with data.chat.template"
    assert Tokenizer(bare, "{{ messages }}").template == "{{ messages }}"


def test_a_template_of_one_s_own(tiny: Path, tmp_path: Path) -> None:
    cfg = ChatConfig(template=str(tmp_path / "own.jinja"))
    said = complaint(lambda: encoder(cfg, str(tiny)))
    assert said.startswith(f"data.chat.template = {tmp_path}/own.jinja: cannot be read (")
    (tmp_path / "own.jinja").write_text(GUARD)
    assert encoder(cfg, str(tiny)).prompts(row("x")).windows[0].tolist() == made(tiny, GUARD).prompts(row("x")).windows[0].tolist()
    elsewhere = ChatConfig(tokenizer=str(tiny))
    assert encoder(elsewhere, "no model here").prompts(row("x")).windows[0].tolist() == made(tiny).prompts(row("x")).windows[0].tolist()


# ---- identity


def test_what_decides_the_tokens_decides_the_identity(tiny: Path, tmp_path: Path) -> None:
    base = made(tiny)
    base.prompts(row("x")).windows[0]
    assert made(tiny).identity() == base.identity(), "also after use"
    assert made(changed(tiny, tmp_path / "same")).identity() == base.identity(), "the place does not matter"
    other = changed(tiny, tmp_path / "other")
    text = json.loads((other / "tokenizer.json").read_text())
    text["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(text))
    others = [
        made(other), made(tiny, GUARD), made(tiny, limit=9), made(tiny, format="wildguard"), made(tiny, reasons=False),
        made(tiny, turns="last"),
        made(tiny, too_long="cut"), made(tiny, controversial="safe"), made(tiny, arguments={"x": 1}),
    ]  # fmt: skip
    told = [json.dumps(one.identity(), sort_keys=True) for one in (base, *others)]
    assert len(set(told)) == len(told)


# ---- settings beside an exported model


def test_settings_are_read_back(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages }} 色\n", encoding="utf-8")
    lines = (Line("severity", "Étiquette: ", {"safe": "好", "unsafe": "坏"}),)
    formats: list[str | Format] = ["wildguard", Format(lines, lines)]
    for form in formats:
        cfg = ChatConfig(format=form, template=str(tmp_path / "own.jinja"), template_arguments={"enable_thinking": False})
        texts = chat.companions(cfg)
        assert texts.pop("chat_template.jinja") == "{{ messages }} 色\n"
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        read = chat.read_settings(tmp_path, ChatConfig(turns="last"))
        own = FORMATS["wildguard"] if form == "wildguard" else form
        assert read == ChatConfig(format=own, template_arguments={"enable_thinking": False}, turns="last")
    assert set(chat.companions(ChatConfig())) == {chat.SETTINGS}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": {}}', '{"format": {"prompt": [], "response": []}, "template_arguments": {}}', "\xff"]
)
def test_damaged_settings_are_one_line(tmp_path: Path, text: str) -> None:
    assert chat.read_settings(tmp_path, ChatConfig()) == ChatConfig()
    (tmp_path / chat.SETTINGS).write_text(text, encoding="latin-1")
    assert complaint(lambda: chat.read_settings(tmp_path, ChatConfig())).startswith(f"{tmp_path / chat.SETTINGS}: damaged (")


# ---- against the tokenizers' own libraries


def test_sentencepiece_ids_are_sentencepiece_s(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = mistral(tmp_path)
    own = sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model"))
    tokenizer = Tokenizer(path)
    assert len(tokenizer) == own.vocab_size()
    texts = [
        "How do I make a bomb?",
        "你好,世界 🙂",
        "色情\n\ncontent\twith é",
        "Safety: Unsafe\nCategories: PII, Violent",
        "x",
        "a-b_c(d)",
    ]
    for text in texts:  # without runs of spaces: transformers merges them in another order
        assert tokenizer.encode(text).ids.tolist() == own.encode(text)
        assert tokenizer.decode(own.encode(text)) == text


def test_a_package_s_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pinned = packages.Package("a.whl", ("no-such-program-here",), {"a.txt": ("in/a.txt", hashlib.sha256(b"right").hexdigest())})
    with pytest.raises(pytest.skip.Exception, match=r"no a\.whl: .*no-such-program-here"):
        packages.unpacked(pinned, tmp_path / "out")
    for content, good in ((b"right", True), (b"wrong", False)):
        with zipfile.ZipFile(tmp_path / "megamod" / "a.whl", "w") as wheel:
            wheel.writestr("in/a.txt", content)
        if good:
            assert (packages.unpacked(pinned, tmp_path / "out") / "a.txt").read_bytes() == b"right"
        else:
            with pytest.raises(AssertionError, match="not the file that is pinned here"):
                packages.unpacked(pinned, tmp_path / "out")
