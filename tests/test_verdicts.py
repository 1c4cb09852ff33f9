"""Verdict formats: what is said is what is read, texts as they were published, and nothing else passes for a verdict."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from complaints import complaint
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megamod.errors import MegamodError
from megamod.verdicts import FORMATS, SEVERITIES, Format, Line, Severity, Verdict, format_from_json, format_of

THOROUGH = settings(max_examples=150, deadline=None)

# One of a user's own: the reason first, a score for the severity, names by semicolons, another word before each value.
OWN_LINES = (
    Line("reason", "Because: "),
    Line("refusal", "Refused? ", {"yes": "ja", "no": "nein"}),
    Line("severity", "Score (1-3): ", {"safe": "1", "controversial": "2", "unsafe": "3"}),
    Line("categories", "Policies: ", separator="; "),
)
OWN = Format(prompt=OWN_LINES, response=OWN_LINES)
EVERY = {**FORMATS, "own": OWN}
BOTH = pytest.mark.parametrize("response", [False, True], ids=["prompt", "response"])
EACH = pytest.mark.parametrize("name", EVERY)

letters = st.text(st.sampled_from("aZé色情暴力 &/()-.'\"\\*+?$^:|[]{}0🙂\u3000\u00a0\t"), min_size=1, max_size=12)
names = letters.map(str.strip).filter(lambda name: name not in ("", "None"))
reasons = st.text(st.sampled_from("ab 中\n\r\t:\u2028.,"), max_size=20) | st.sampled_from(
    ["Safety: Safe", "Reason: x\nReason: y", "two\nlines", "x\nRefusal: Yes", "x\nCategories: None"]
)
trimmed = reasons.map(str.strip).filter(bool)


@st.composite
def verdicts(draw: st.DrawFn, form: Format, response: bool) -> Verdict:
    """What the format can say, no more: parts that no line tells are left empty."""
    said: dict[str, Any] = {}
    for line in form.lines(response):
        keys = [*line.words, *(["none"] if line.optional else [])]
        if line.part in ("reason", "categories"):
            said[line.part] = draw(st.none() | trimmed if line.part == "reason" else st.lists(names, max_size=4).map(tuple))
        else:
            key = draw(st.sampled_from(keys))
            said[line.part] = {"none": None, "yes": True, "no": False}.get(key, key)
    for line in form.lines(response):
        if line.only_unsafe and said["severity"] != "unsafe":
            said[line.part] = () if line.part == "categories" else None
    return Verdict(**said)


# ---- rendered and read back


@EACH
@BOTH
def test_what_is_said_is_read(name: str, response: bool) -> None:
    form = EVERY[name]

    @THOROUGH
    @given(verdicts(form, response), st.sampled_from(["", " ", "\n", "\r\n  "]))
    def check(verdict: Verdict, around: str) -> None:
        text, spans = form.render(verdict, response)
        assert text == text.strip()
        assert form.parse(around + text + around, response) == verdict
        assert [text[start:stop] for start, stop in spans] == values_of(form, verdict, response)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans)), "in order, none within another"

    check()


def values_of(form: Format, verdict: Verdict, response: bool) -> list[str]:
    """The definition: every value but the reason's, one after the other."""
    found = []
    for line in form.lines(response):
        if line.part == "reason" or (line.only_unsafe and verdict.severity != "unsafe"):
            continue
        if line.part == "categories":
            value = line.separator.join(verdict.categories) or line.words.get("none")
        else:
            given = getattr(verdict, line.part)
            value = line.words.get("none" if given is None else {True: "yes", False: "no"}.get(given, given))
        found += [value] if value is not None else []
    return found


PUBLISHED: list[tuple[str, bool, Verdict, str]] = [
    ("qwen3guard", False, Verdict("unsafe", ("Violent",)), "Safety: Unsafe\nCategories: Violent"),
    ("qwen3guard", False, Verdict("safe"), "Safety: Safe\nCategories: None"),
    ("qwen3guard", True, Verdict("safe", refusal=True), "Safety: Safe\nCategories: None\nRefusal: Yes"),
    (
        "qwen3guard", True, Verdict("controversial", ("Suicide & Self-Harm", "PII"), refusal=False),
        "Safety: Controversial\nCategories: Suicide & Self-Harm, PII\nRefusal: No",
    ),
    ("llama_guard", False, Verdict("safe"), "safe"),
    ("llama_guard", True, Verdict("unsafe", ("S1", "S10")), "unsafe\nS1,S10"),
    ("shieldgemma", False, Verdict("unsafe"), "Yes"),
    ("shieldgemma", True, Verdict("safe"), "No"),
    ("wildguard", False, Verdict("unsafe"), "Harmful request: yes\nResponse refusal: N/A\nHarmful response: N/A"),
    (
        "wildguard", True, Verdict("safe", refusal=True, request="unsafe"),
        "Harmful request: yes\nResponse refusal: yes\nHarmful response: no",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "response", "verdict", "text"), PUBLISHED)
def test_texts_are_the_published_ones(name: str, response: bool, verdict: Verdict, text: str) -> None:
    assert FORMATS[name].render(verdict, response).text == text
    assert FORMATS[name].parse(text, response) == verdict


@pytest.mark.parametrize(("name", "response", "verdict", "text"), PUBLISHED)
def test_a_reason_comes_after_the_published_lines(name: str, response: bool, verdict: Verdict, text: str) -> None:
    said = FORMATS[name].render(dataclasses.replace(verdict, reason=" because,\n\nof this \n"), response)
    assert said.text == f"{text}\nReason: because,\n\nof this"
    assert said.spans == FORMATS[name].render(verdict, response).spans, "a reason is no part of the verdict's values"
    read = FORMATS[name].parse(said.text, response)
    assert read is not None and read.reason == "because,\n\nof this"


def test_a_reason_of_white_space_is_none() -> None:
    for reason in ("", " ", "\n\t "):
        assert FORMATS["qwen3guard"].render(Verdict("safe", reason=reason)).text == "Safety: Safe\nCategories: None"


def test_a_verdict_without_its_optional_lines() -> None:
    guard, llama = FORMATS["qwen3guard"], FORMATS["llama_guard"]
    assert guard.parse("Safety: Safe\nCategories: None", response=True) == Verdict("safe")
    assert llama.parse("unsafe") == Verdict("unsafe")
    assert llama.parse("unsafe\nReason: x") == Verdict("unsafe", reason="x"), "the reason is not taken for categories"
    assert llama.parse("unsafe\nReason: x, y\nS1") == Verdict("unsafe", reason="x, y\nS1")
    assert OWN.parse("Score (1-3): 2") == Verdict("controversial")
    assert OWN.parse("Because: a\nb\nScore (1-3): 3\nPolicies: x;y ; z") == Verdict("unsafe", ("x", "y", "z"), reason="a\nb")


# ---- what a format cannot say

CANNOT: dict[str, tuple[str, bool, Verdict, str]] = {
    "comma": ("qwen3guard", False, Verdict("unsafe", ("A", "Guns, knives")), "category 'Guns, knives': a name without ',', 'None', line b"),
    "line break": ("qwen3guard", False, Verdict("unsafe", ("A\nRefusal: No",)), r"category 'A\nRefusal: No': a name without"),
    "blank": ("llama_guard", False, Verdict("unsafe", ("S1", " ")), "category ' ': a name without ',', line breaks and outer white"),
    "empty": ("llama_guard", False, Verdict("unsafe", ("",)), "category '': a name without"),
    "outer space": ("qwen3guard", True, Verdict("unsafe", ("PII ",)), "category 'PII ': a name without"),
    "the word for none": ("qwen3guard", False, Verdict("unsafe", ("PII", "None")), "category 'None': a name without ',', 'None'"),
    "a line in a name": ("llama_guard", False, Verdict("unsafe", ("Reason: x",)), r"'unsafe\nReason: x': a verdict that would be read"),
    "no third label": ("llama_guard", False, Verdict("controversial"), "no word for severity 'controversial' in this"),
    "nor here": ("wildguard", True, Verdict("safe", request="controversial", refusal=False), "no word for request 'controversial'"),
    "refusal of a prompt": ("wildguard", False, Verdict("safe", refusal=True), "no word for refusal 'yes' in this verdict format"),
    "a line of one's own": ("own", False, Verdict("safe", reason="a\nRefused? ja"), "would be read as another one"),
}  # fmt: skip


@pytest.mark.parametrize("what", CANNOT)
def test_what_a_format_cannot_say_is_one_line(what: str) -> None:
    name, response, verdict, said = CANNOT[what]
    assert said in complaint(lambda: EVERY[name].render(verdict, response))


@EACH
@BOTH
def test_a_verdict_is_said_as_it_is_or_refused(name: str, response: bool) -> None:
    """Whatever a row holds: never a text that reads as another verdict."""
    form = EVERY[name]
    parts = {line.part for line in form.lines(response)}
    odd = letters | st.sampled_from(["None", "a,b", "a;b", "", "Reason: x", "Because: x", "x\ny", "Refusal: Yes", "Score (1-3): 1"])
    optional = st.none() | st.booleans()
    anything = st.builds(
        Verdict, st.sampled_from(SEVERITIES), st.lists(odd, max_size=3).map(tuple), optional, st.none() | st.sampled_from(SEVERITIES),
        st.none() | reasons | odd.map(lambda text: f"x\n{text}\ny"),
    )  # fmt: skip

    @THOROUGH
    @given(anything)
    def check(verdict: Verdict) -> None:
        try:
            text = form.render(verdict, response).text
        except MegamodError:
            return
        untold = {part: getattr(Verdict("safe"), part) for part in ("categories", "refusal", "request", "reason") if part not in parts}
        if any(line.only_unsafe for line in form.lines(response)) and verdict.severity != "unsafe":
            untold["categories"] = ()  # such a line is not there
        expected = dataclasses.replace(verdict, reason=(verdict.reason or "").strip() or None)
        assert form.parse(text, response) == dataclasses.replace(expected, **untold)

    check()


# ---- what is no verdict

NONE: list[tuple[str, bool, str]] = [
    ("qwen3guard", False, ""),
    ("qwen3guard", False, "Safety: Unsafe"),
    ("qwen3guard", False, "Safety: unsafe\nCategories: Violent"),
    ("qwen3guard", False, "Safety: Unsafe.\nCategories: Violent"),
    ("qwen3guard", False, "Safety:Unsafe\nCategories: Violent"),
    ("qwen3guard", False, "Safety: Safe Safe\nCategories: None"),
    ("qwen3guard", False, "The verdict:\nSafety: Safe\nCategories: None"),
    ("qwen3guard", False, "Safety: Safe\nCategories: None\nand more"),
    ("qwen3guard", False, "Safety: Safe\nCategories: None\nRefusal: No"),  # of a prompt
    ("qwen3guard", False, "Categories: None\nSafety: Safe"),
    ("qwen3guard", False, "Safety: Safe\nCategories: \nReason: x"),
    ("qwen3guard", True, "Safety: Safe\nCategories: None\nRefusal: Maybe"),
    ("qwen3guard", False, "Safety: Safe\n\nCategories: None"),
    ("qwen3guard", False, "Safety: Safe\nCategories: None\nReason:"),
    ("llama_guard", False, "unsafe S1"),
    ("llama_guard", False, "Unsafe\nS1"),
    ("llama_guard", False, "safe\nS1"),  # contradicts itself
    ("llama_guard", False, "unsafe\nS1\nS2"),
    ("shieldgemma", False, "Yes, it does"),
    ("shieldgemma", False, "yes"),
    ("wildguard", False, "Harmful request: yes"),
    ("wildguard", True, "Harmful request: N/A\nResponse refusal: no\nHarmful response: N/A"),
    ("wildguard", False, "Harmful request: yes\nResponse refusal: no\nHarmful response: N/A"),
]


@pytest.mark.parametrize(("name", "response", "text"), NONE)
def test_what_is_not_in_the_format_is_no_verdict(name: str, response: bool, text: str) -> None:
    assert FORMATS[name].parse(text, response) is None


def fixpoint(form: Format, text: str, response: bool) -> None:
    """A text is no verdict, or one that the format says and reads again."""
    read = form.parse(text, response)
    if read is not None:
        again = form.parse(form.render(read, response).text, response)
        assert again == dataclasses.replace(read, reason=read.reason and read.reason.strip())


@EACH
@BOTH
def test_any_text_is_a_verdict_that_can_be_said_or_none(name: str, response: bool) -> None:
    form = EVERY[name]

    @THOROUGH
    @given(st.data())
    def check(data: st.DataObject) -> None:
        fixpoint(form, data.draw(st.text(max_size=30)), response)
        text = form.render(data.draw(verdicts(form, response)), response).text
        start, stop = sorted((data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))))
        put = data.draw(st.sampled_from(["", " ", "\n", ",", "Reason: ", "None", "\x1c", text]))
        fixpoint(form, text[:start] + put + text[stop:], response)
        fixpoint(form, "\n".join(data.draw(st.permutations(text.split("\n")))), response)

    check()


# ---- scoring


@EACH
@BOTH
def test_candidates_are_how_verdicts_begin(name: str, response: bool) -> None:
    if name == "own":
        assert "its severity has no score" in complaint(lambda: OWN.candidates(response))
        return
    form = FORMATS[name]
    candidates = form.candidates(response)
    assert {severity for severity, _ in candidates} == set(form.severities)
    texts = [text for _, text in candidates]
    assert len(set(texts)) == len(texts)

    @THOROUGH
    @given(verdicts(form, response))
    def check(verdict: Verdict) -> None:
        text = form.render(verdict, response).text
        begins = [severity for severity, start in candidates if text == start or text.startswith(start + "\n")]
        assert begins == [verdict.severity], "one candidate, of the verdict's own severity"

    check()


def test_candidates_by_hand() -> None:
    assert FORMATS["qwen3guard"].candidates(True) == [
        ("safe", "Safety: Safe"), ("controversial", "Safety: Controversial"), ("unsafe", "Safety: Unsafe"),
    ]  # fmt: skip
    assert FORMATS["shieldgemma"].candidates() == [("safe", "No"), ("unsafe", "Yes")]
    wild = FORMATS["wildguard"].candidates(True)
    assert len(wild) == 3 * 3 * 2
    assert ("unsafe", "Harmful request: no\nResponse refusal: N/A\nHarmful response: yes") in wild


def test_candidates_leave_out_what_verdicts_may_leave_out() -> None:
    lines = (Line("refusal", "R: ", {"yes": "y", "no": "n"}), Line("severity", "S: ", {"safe": "0", "unsafe": "1"}))
    texts = [text for _, text in Format(lines, lines).candidates()]
    assert sorted(texts) == ["R: n\nS: 0", "R: n\nS: 1", "R: y\nS: 0", "R: y\nS: 1", "S: 0", "S: 1"]


def test_severities_are_those_that_have_a_word() -> None:
    assert FORMATS["qwen3guard"].severities == ("safe", "controversial", "unsafe")
    for name in ("llama_guard", "shieldgemma", "wildguard"):
        assert FORMATS[name].severities == ("safe", "unsafe")


# ---- formats as data


@EACH
def test_a_format_survives_json(name: str) -> None:
    form = EVERY[name]
    assert format_from_json(json.loads(json.dumps(dataclasses.asdict(form)))) == form


def test_formats_by_name() -> None:
    assert all(format_of(name) is form for name, form in FORMATS.items())
    assert format_of(OWN) is OWN
    assert complaint(lambda: format_of("llama-guard")) == "verdict format 'llama-guard': did you mean 'llama_guard'?"


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (Line("categories"),),
        (Line("severity"),),
        (Line("severity", words={"safe": "a", "harmful": "b"}),),
        (Line("severity", words={"safe": "a"}), Line("severity", words={"unsafe": "b"})),
        (Line("severity", words={"safe": "a"}), Line("score", words={"none": "1"})),  # type: ignore[arg-type]
    ],
)
def test_a_format_that_is_none(lines: tuple[Line, ...]) -> None:
    good = FORMATS["qwen3guard"].prompt
    calls: list[Callable[[], Any]] = [lambda: Format(lines, good), lambda: Format(good, lines)]
    for call in calls:
        assert "a verdict format with lines for" in complaint(call)


@given(st.sampled_from(SEVERITIES), st.sampled_from([" ", "|", " / ", "、"]))
def test_names_may_stand_apart_by_anything(severity: Severity, separator: str) -> None:
    line = Line("categories", "C: ", separator=separator)
    form = Format(*[(Line("severity", "", {s: s for s in SEVERITIES}), line)] * 2)
    assume(severity != "safe")
    verdict = Verdict(severity, ("a", "b-c", "色情"))
    assert form.parse(form.render(verdict).text) == verdict
