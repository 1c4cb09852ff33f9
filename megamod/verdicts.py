"""Verdicts, and the formats in which models say them: one table of lines, rendered, parsed and scored by the same code.

    FORMATS["qwen3guard"].render(Verdict("unsafe", ("Violent",)))   Safety: Unsafe⏎Categories: Violent

A format is data. One of your own is a Format in the config, `data.chat.format`, or a row of FORMATS.

Sources: Qwen3Guard (Zhao et al. 2025, arXiv:2510.14276), Llama Guard 3 (Meta 2024, model card), ShieldGemma (Zeng et al. 2024,
arXiv:2407.21772), WildGuard (Han et al. 2024, arXiv:2406.18495).
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

from megamod.errors import MegamodError, nearest

Severity = Literal["safe", "controversial", "unsafe"]
SEVERITIES: tuple[Severity, ...] = ("safe", "controversial", "unsafe")
Part = Literal["severity", "request", "categories", "refusal", "reason"]


@dataclass(frozen=True)
class Verdict:
    """What a moderation model says of a conversation: of its last message, a user's prompt or an assistant's response."""

    severity: Severity
    categories: tuple[str, ...] = ()
    refusal: bool | None = None  # of a response: whether it refuses
    request: Severity | None = None  # of a response: how severe the request was, in formats that say it
    reason: str | None = None


@dataclass(frozen=True)
class Line:
    """One line of a verdict: what stands before the value, which part of the verdict the value is, and how it is said."""

    part: Part
    before: str = ""
    words: Mapping[str, str] = field(default_factory=dict)  # severity, "yes", "no" or "none" (absent) → its word
    separator: str = ", "  # between categories
    only_unsafe: bool = False  # the line is there for unsafe verdicts alone

    def value(self, verdict: Verdict) -> str | None:
        """What the line says of `verdict`; None: the line is left out. Raises MegamodError for what it cannot say."""
        if self.only_unsafe and verdict.severity != "unsafe":
            return None
        if self.part == "reason":
            return (verdict.reason or "").strip() or None
        if self.part == "categories":
            for category in verdict.categories:
                if self.read(category) != (category,) or "\n" in category:
                    none = f", {self.words['none']!r}" if "none" in self.words else ""
                    expected = f"a name without {self.separator.strip()!r}{none}, line breaks and outer white space was expected"
                    raise MegamodError(f"category {category!r}: {expected}")
            return self.separator.join(verdict.categories) if verdict.categories else self.words.get("none")
        given = getattr(verdict, self.part)
        key = {None: "none", True: "yes", False: "no"}.get(given, given)
        if key != "none" and key not in self.words:
            raise MegamodError(f"no word for {self.part} {key!r} in this verdict format, only for {', '.join(self.words)}")
        return self.words.get(key)

    @property
    def pattern(self) -> str:
        """A regular expression of the whole line, the value in a group."""
        if self.part == "reason":
            value = r"[\s\S]*?\S"  # no more than what the lines after it leave
        elif self.part == "categories":
            value = r"[^\n]*\S"
        else:
            value = "|".join(map(re.escape, self.words.values()))
        return f"{re.escape(self.before)}({value})"

    @property
    def optional(self) -> bool:
        """Whether a verdict may come without the line."""
        return self.only_unsafe or (self.part != "severity" and "none" not in self.words)

    def read(self, value: str | None) -> Any:
        """The part of a Verdict that `value` says; None: the line was not there."""
        if self.part == "reason":
            return value
        if self.part == "categories":
            names = (name.strip() for name in (value or "").split(self.separator.strip() or None))
            return tuple(name for name in names if name and name != self.words.get("none"))
        key = next((key for key, word in self.words.items() if word == value), "none")
        return {"none": None, "yes": True, "no": False}.get(key, key)


class Rendered(NamedTuple):
    """A verdict as text."""

    text: str
    spans: tuple[tuple[int, int], ...]  # [start, end) of the characters that say it: values, but not the reason's


@dataclass(frozen=True)
class Format:
    """The lines in which a model says its verdict of a prompt, and of a response."""

    prompt: tuple[Line, ...]
    response: tuple[Line, ...]

    def __post_init__(self) -> None:
        for lines in (self.prompt, self.response):
            parts = [line.part for line in lines]
            said = [key for line in lines if line.part == "severity" for key in line.words]
            if not said or len({*parts}) < len(parts) or not {*parts} <= {*get_args(Part)} or not {*said} <= {*SEVERITIES}:
                raise MegamodError(
                    f"a verdict format with lines for {', '.join(parts)}, and words for {', '.join(said)}: one line for severity, with "
                    f"words for some of {', '.join(SEVERITIES)}, and at most one for each of {', '.join(get_args(Part))} were expected"
                )

    def lines(self, response: bool) -> tuple[Line, ...]:
        """Those for a response or a prompt."""
        return self.response if response else self.prompt

    @property
    def severities(self) -> tuple[Severity, ...]:
        """Those that the format has a word for."""
        words = next(line for line in self.prompt if line.part == "severity").words
        return tuple(severity for severity in SEVERITIES if severity in words)

    def render(self, verdict: Verdict, response: bool = False) -> Rendered:
        """`verdict` as text. Raises MegamodError for what the format has no word for."""
        text, spans = "", []
        values = [line.value(verdict) for line in self.lines(response)]
        for line, value in zip(self.lines(response), values, strict=True):
            if value is None:
                continue
            text += ("\n" if text else "") + line.before
            if line.part != "reason":
                spans.append((len(text), len(text) + len(value)))
            text += value
        if self._values(text, response) != values:
            raise MegamodError(f"{text!r}: a verdict that would be read as another one: a value looks like a line of the format")
        return Rendered(text, tuple(spans))

    def parse(self, text: str, response: bool = False) -> Verdict | None:
        """The verdict that `text` says, surrounding white space aside; None where it is not in the format."""
        values = self._values(text, response)
        if values is None:
            return None
        lines = self.lines(response)
        verdict = Verdict(**{line.part: line.read(value) for line, value in zip(lines, values, strict=True)})
        misplaced = verdict.severity != "unsafe" and any(line.only_unsafe and value for line, value in zip(lines, values, strict=True))
        return None if misplaced else verdict

    def _values(self, text: str, response: bool) -> list[str | None] | None:
        """What each line of `text` says, None for one that is left out; None for all where it is not in the format."""
        lines = self.lines(response)
        pattern, first = "", True  # first: no line has to stand before this one
        for i, line in enumerate(lines):
            later = "|".join(re.escape(after.before) for after in lines[i + 1 :] if after.before)
            one = f"(?!{later}){line.pattern}" if line.optional and later else line.pattern  # a later line is not taken for this one
            one = one if first and not line.optional else f"{one}\n" if first else f"\n{one}"
            pattern += f"(?:{one})?" if line.optional else one
            first = first and line.optional
        match = re.fullmatch(pattern, text.strip())
        return None if match is None else list(match.groups())

    def candidates(self, response: bool = False) -> list[tuple[Severity, str]]:
        """Every text from a verdict's start to the end of its severity's word, with that severity.

        One a severity where it is said first; where other lines come before it, one for each of their values, whose
        probabilities add up. Raises MegamodError where those are free text.
        """
        before: list[Line] = []
        for line in self.lines(response):
            before.append(line)
            if line.part == "severity":
                break
        *others, severity = before
        if any(line.part in ("categories", "reason") for line in others):
            raise MegamodError("a verdict format in which categories or a reason stand before the severity: its severity has no score")
        words = [[line.before + word for word in line.words.values()] + [""] * line.optional for line in before]
        named = {severity.before + word: key for key, word in severity.words.items()}
        return [(cast(Severity, named[values[-1]]), "\n".join(filter(None, values))) for values in itertools.product(*words)]


_YES_NO = {"yes": "yes", "no": "no", "none": "N/A"}
_HARM = {"safe": "no", "unsafe": "yes"}
_REASON = Line("reason", "Reason: ")  # megamod's own, after the fixed lines, so that other parsers of the format still work
_SAFETY = Line("severity", "Safety: ", {"safe": "Safe", "controversial": "Controversial", "unsafe": "Unsafe"})
_CATEGORIES = Line("categories", "Categories: ", {"none": "None"})
_LLAMA = (
    Line("severity", "", {"safe": "safe", "unsafe": "unsafe"}),
    Line("categories", separator=",", only_unsafe=True),
    _REASON,
)
_SHIELD = (Line("severity", "", {"safe": "No", "unsafe": "Yes"}), _REASON)

FORMATS = {
    "qwen3guard": Format(
        prompt=(_SAFETY, _CATEGORIES, _REASON),
        response=(_SAFETY, _CATEGORIES, Line("refusal", "Refusal: ", {"yes": "Yes", "no": "No"}), _REASON),
    ),
    "llama_guard": Format(prompt=_LLAMA, response=_LLAMA),
    "shieldgemma": Format(prompt=_SHIELD, response=_SHIELD),  # one policy a prompt, which names it
    "wildguard": Format(
        prompt=(
            Line("severity", "Harmful request: ", _HARM),
            Line("refusal", "Response refusal: ", {"none": "N/A"}),
            Line("request", "Harmful response: ", {"none": "N/A"}),  # none of a prompt alone
            _REASON,
        ),
        response=(
            Line("request", "Harmful request: ", {**_HARM, "none": "N/A"}),
            Line("refusal", "Response refusal: ", _YES_NO),
            Line("severity", "Harmful response: ", _HARM),
            _REASON,
        ),
    ),
}


def format_of(name: str | Format) -> Format:
    """The format of that name, or the one that is given. Raises MegamodError."""
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise MegamodError(f"verdict format {name!r}: {nearest(name, FORMATS)}")
    return FORMATS[name]


def format_from_json(data: Mapping[str, Sequence[Mapping[str, Any]]]) -> Format:
    """The Format that `dataclasses.asdict` wrote as JSON. Raises TypeError or MegamodError for what it did not write."""
    for line in (line for lines in data.values() for line in lines):
        texts = (line["before"], line["separator"], *line["words"], *line["words"].values())
        if not all(isinstance(text, str) for text in texts) or not isinstance(line["only_unsafe"], bool):
            raise TypeError(f"{dict(line)!r} is no line of a verdict")
    return Format(**{kind: tuple(Line(**line) for line in lines) for kind, lines in data.items()})
