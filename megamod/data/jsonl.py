"""Rows as they come: JSONL of conversations, in whichever of the usual spellings.

| key | who writes it | becomes |
|---|---|---|
| `messages` | OpenAI, ms-swift | itself; content is a string, or a list of `{"type": "text", "text": …}` |
| `conversations` | ShareGPT | `from` human, gpt, system; `value` |
| `instruction`, `input`, `output`, `history` | Alpaca | user, assistant |
| `query`, `response`, `history` | ms-swift | user, assistant |
| `text` | classification sets | one user message |

`system` may stand beside all but the first. Beside the conversation a row may have `label` (safe, controversial, unsafe),
`categories`, `reason`, `refusal`, `request`, `language`, `kind` (a slice to measure by), `weight` and `id`. Other keys are left
alone and counted, unless one looks like a mistyped one of these.
"""

import difflib
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from megamod.errors import MegamodError, expected, nearest
from megamod.verdicts import SEVERITIES, Severity, Verdict

Message = Mapping[str, str]  # role and content, as chat templates take them
Json = Mapping[str, Any]

HALF = re.compile("[\ud800-\udfff]")
LARGEST_WEIGHT = 3.4028234663852886e38  # a batch keeps weights in float32
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}


@dataclass(frozen=True)
class Row:
    """A conversation, and what is known of it."""

    messages: tuple[Message, ...]
    label: Severity | None = None  # None: no verdict is trained, the assistant's turns are
    categories: tuple[str, ...] = ()
    reason: str | None = None
    refusal: bool | None = None
    request: Severity | None = None
    language: str | None = None
    kind: str | None = None
    weight: float = 1.0
    id: str | None = None
    where: str = ""  # file:line
    unread: tuple[str, ...] = field(default=(), compare=False)  # keys that are none of ours

    @property
    def line(self) -> int | None:
        """Its line in the file, from 1."""
        number = self.where.rpartition(":")[2]
        return int(number) if number.isdecimal() else None

    @property
    def is_response(self) -> bool:
        """Whether an assistant's response is judged, or a user's prompt."""
        return self.messages[-1]["role"] == "assistant"

    @property
    def verdict(self) -> Verdict | None:
        """What a model should say; None for a row without label."""
        return self.label and Verdict(self.label, self.categories, self.refusal, self.request, self.reason)


def read_rows(path: str | Path, *, labelled: bool = False) -> Iterator[Row]:
    """The rows of a JSONL file, in its order. Blank lines are skipped.

    Raises:
        MegamodError: no such file, no row in it, a fault in one, or, with `labelled`, one without a label; a line that begins with
            `file:line:`.
    """
    empty = True
    for where, line in lines_of(path):
        empty = False
        row = row_of(json_object(line, where), where)
        if labelled and row.label is None:
            raise MegamodError(f"{where}: no label: {', '.join(SEVERITIES[:-1])} or {SEVERITIES[-1]} was expected")
        yield row
    if empty:
        raise no_rows(path)


def no_rows(path: str | Path) -> MegamodError:
    """The fault of a file without a line."""
    example = '{"messages": [{"role": "user", "content": "…"}], "label": "safe"}'
    return MegamodError(f"{path}:1: no rows: at least one line such as {example} was expected")


def lines_of(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """`file:line` and the bytes of each line that is not blank; one bad character is then an error of its own line."""
    with expected("a JSONL file", path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """The object that a line holds. Raises MegamodError."""
    try:
        record = json.loads(line.decode("utf-8").rstrip())  # the break would make a fault at the line's end one of the next
    except UnicodeDecodeError as error:
        raise MegamodError(f"{where}: byte {error.start + 1} of the line is not UTF-8: save the file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise MegamodError(f"{where}: not JSON, {error.msg} at column {error.colno}: one whole object a line was expected") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise MegamodError(f"{where}: not JSON that can be read, {error}") from None
    if not isinstance(record, dict):
        raise MegamodError(f"{where}: {reprlib.repr(record)}: a JSON object was expected")
    if b"\\ud" in line.lower() and (half := HALF.search(json.dumps(record, ensure_ascii=False))):
        raise MegamodError(f"{where}: {half[0]!a}: half a character (an unpaired surrogate), which no text in UTF-8 can hold")
    return record


def row_of(record: Json, where: str = "row") -> Row:
    """A Row of one line's object. Raises MegamodError with `where` in front."""
    found = [key for key in SPELLINGS if key in record]
    if len(found) != 1:
        what = f"both {' and '.join(map(repr, found))}" if found else f"none of {', '.join(map(repr, SPELLINGS))}"
        raise MegamodError(f"{where}: {what}: one of them holds the conversation{_typo(record, SPELLINGS)}")
    read, own = SPELLINGS[found[0]]
    known = {*KEYS, *own, found[0]}
    unread = tuple(sorted(key for key in record if key not in known))
    for key in unread:
        if close := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise MegamodError(f"{where}: unknown key {key!r}, did you mean {close[0]!r}?")
    messages = tuple(read(record, where))
    if not any(message["role"] != "system" for message in messages):
        raise MegamodError(f"{where}: {found[0]} holds no message besides a system prompt")
    label = severity_of(record, "label", where)
    weight = _weight(record, where)
    return Row(
        messages,
        label,
        names_of(record, "categories", where),
        typed(record, "reason", str, where),
        typed(record, "refusal", bool, where),
        severity_of(record, "request", where),
        typed(record, "language", str, where),
        typed(record, "kind", str, where),
        weight,
        str(record["id"]) if record.get("id") is not None else None,
        where,
        unread,
    )


def _openai(record: Json, where: str) -> Iterator[Message]:
    for i, message in enumerate(_list(record, "messages", where)):
        place = f"{where}: messages[{i}]"
        role, content = _entries(message, "role", "content", place)
        if isinstance(content, list):
            content = "".join(_text_part(part, f"{place}.content[{j}]") for j, part in enumerate(content))
        yield _message(role, content, place)


def _text_part(part: Any, where: str) -> str:
    kind, text = _entries(part, "type", "text", where) if isinstance(part, dict) and part.get("type") == "text" else (None, None)
    if kind is None or not isinstance(text, str):
        raise MegamodError(f'{where} = {reprlib.repr(part)}: {{"type": "text", "text": "…"}} was expected; images are not read yet')
    return text


def _sharegpt(record: Json, where: str) -> Iterator[Message]:
    yield from _system(record, where)
    for i, turn in enumerate(_list(record, "conversations", where)):
        place = f"{where}: conversations[{i}]"
        speaker, value = _entries(turn, "from", "value", place)
        if not isinstance(speaker, str) or speaker not in SHAREGPT:
            raise MegamodError(f"{place}: from = {reprlib.repr(speaker)}: one of {', '.join(SHAREGPT)} was expected")
        yield _message(SHAREGPT[speaker], value, place)


def _alpaca(record: Json, where: str) -> Iterator[Message]:
    yield from _turns(record, where, ("instruction", "input"), "output")


def _swift(record: Json, where: str) -> Iterator[Message]:
    yield from _turns(record, where, ("query",), "response")


def _turns(record: Json, where: str, asked: tuple[str, ...], answer: str) -> Iterator[Message]:
    yield from _system(record, where)
    for i, turn in enumerate(_list(record, "history", where, default=())):
        if not isinstance(turn, list) or len(turn) != 2:
            raise MegamodError(f"{where}: history[{i}] = {reprlib.repr(turn)}: a pair of user's and assistant's text was expected")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            yield _message(role, text, f"{where}: history[{i}]")
    texts = [text for key in asked if (text := typed(record, key, str, where))]
    yield _message("user", "\n".join(texts), f"{where}: {asked[0]}")
    if record.get(answer) is not None:
        yield _message("assistant", record[answer], f"{where}: {answer}")


def _plain(record: Json, where: str) -> Iterator[Message]:
    yield from _system(record, where)
    yield _message("user", record["text"], f"{where}: text")


def _system(record: Json, where: str) -> Iterator[Message]:
    if text := typed(record, "system", str, where):
        yield _message("system", text, where)


# What holds the conversation → how it is read, and the keys that belong to it.
SPELLINGS: dict[str, tuple[Callable[[Json, str], Iterator[Message]], tuple[str, ...]]] = {
    "messages": (_openai, ()),
    "conversations": (_sharegpt, ("system",)),
    "instruction": (_alpaca, ("input", "output", "history", "system")),
    "query": (_swift, ("response", "history", "system")),
    "text": (_plain, ("system",)),
}
KEYS = ("label", "categories", "reason", "refusal", "request", "language", "kind", "weight", "id")


def _message(role: Any, content: Any, where: str) -> Message:
    if role not in ROLES:
        raise MegamodError(f"{where}: role = {reprlib.repr(role)}: {nearest(str(role), ROLES)}")
    if not isinstance(content, str):
        raise MegamodError(f"{where}: {reprlib.repr(content)}: text was expected")
    return {"role": role, "content": content}


def _entries(value: Any, first: str, second: str, where: str) -> tuple[Any, Any]:
    if not isinstance(value, dict) or first not in value or second not in value:
        raise MegamodError(f"{where} = {reprlib.repr(value)}: an object with {first!r} and {second!r} was expected")
    return value[first], value[second]


def _list(record: Json, key: str, where: str, default: Any = None) -> list[Any]:
    value = record.get(key)
    if value is None and default is not None:
        return list(default)
    if not isinstance(value, list) or (not value and default is None):
        raise MegamodError(f"{where}: {key} = {reprlib.repr(value)}: a list of turns was expected")
    return value


def typed(record: Json, key: str, kind: type, where: str) -> Any:
    """What is at `key`, of that type; None where there is nothing. Raises MegamodError."""
    value = record.get(key)
    if value is not None and not isinstance(value, kind):
        expected = {str: "text", bool: "true or false", dict: "an object"}[kind]
        raise MegamodError(f"{where}: {key} = {reprlib.repr(value)}: {expected} was expected")
    return value


def severity_of(record: Json, key: str, where: str) -> Severity | None:
    """The severity at `key`, in any case; None where there is none. Raises MegamodError."""
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in SEVERITIES:
        raise MegamodError(f"{where}: {key} = {reprlib.repr(value)}: {', '.join(SEVERITIES[:-1])} or {SEVERITIES[-1]} was expected")
    return cast(Severity, value.lower())


def names_of(record: Json, key: str, where: str) -> tuple[str, ...]:
    """The list of names at `key`; none where there is none. Raises MegamodError."""
    value = record.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise MegamodError(f"{where}: {key} = {reprlib.repr(value)}: a list of names was expected")
    return tuple(value)


def _weight(record: Json, where: str) -> float:
    value = record.get("weight", 1.0)
    # The comparison is false for NaN, and takes integers too large for a float.
    if type(value) not in (int, float) or not 0 <= value <= LARGEST_WEIGHT or not math.isfinite(value):
        raise MegamodError(f"{where}: weight = {reprlib.repr(value)}: a finite number of at least 0 was expected")
    return float(value)


def _typo(record: Json, names: Mapping[str, Any]) -> str:
    for key in record:
        if close := difflib.get_close_matches(key, names, n=1, cutoff=0.8):
            return f"; did you mean {close[0]!r} by {key!r}?"
    return ""
