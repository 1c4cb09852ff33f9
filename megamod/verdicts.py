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
from typing import Any, Literal, NamedTuple, cast

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
            return verdict.reason or None
        if self.part == "categories":
            for category in verdict.categories:
                if not category.strip() or self.separator.strip() in category or "\n" in category or category in self.words.values():
                    raise MegamodError(f"category {category!r}: one without {self.separator.strip()!r} and line breaks was expected")
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
            value = r"[\s\S]*\S"
        elif self.part == "categories":
            value = r"(?!Reason: )[^\n]*\S"  # where the line may be missing, the next is not taken for it
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
            names = [] if value in (None, self.words.get("none")) else [name.strip() for name in str(value).split(self.separator.strip())]
            return tuple(name for name in names if name)
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
        for line in self.lines(response):
            value = line.value(verdict)
            if value is None:
                continue
            text += ("\n" if text else "") + line.before
            if line.part != "reason":
                spans.append((len(text), len(text) + len(value)))
            text += value
        return Rendered(text, tuple(spans))

    def parse(self, text: str, response: bool = False) -> Verdict | None:
        """The verdict that `text` says, surrounding white space aside; None where it is not in the format."""
        lines = self.lines(response)
        pattern = ""
        for line in lines:
            one = ("\n" if pattern else "") + line.pattern
            pattern += f"(?:{one})?" if line.optional else one
        match = re.fullmatch(pattern, text.strip())
        if match is None:
            return None
        return Verdict(**{line.part: line.read(value) for line, value in zip(lines, match.groups(), strict=True)})

    def candidates(self, response: bool = False) -> list[tuple[Severity, str]]:
        """Every text from a verdict's start to the end of its severity's word, with that severity.

        One a severity where it is said first; where other lines come before it, one for each of their values, whose
        probabilities add up.
        """
        before: list[Line] = []
        for line in self.lines(response):
            before.append(line)
            if line.part == "severity":
                break
        words = [[line.before + word for key, word in line.words.items() if line.part != "severity" or key != "none"] for line in before]
        *_, severity = before
        named = {severity.before + word: key for key, word in severity.words.items()}
        return [(cast(Severity, named[values[-1]]), "\n".join(values)) for values in itertools.product(*words)]


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
    """The Format that `dataclasses.asdict` wrote as JSON."""
    return Format(**{kind: tuple(Line(**line) for line in lines) for kind, lines in data.items()})
