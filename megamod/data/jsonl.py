"""Rows as they come: JSONL of conversations, in whichever of the usual spellings.

| key | who writes it | becomes |
|---|---|---|
| `messages` | OpenAI, ms-swift | itself; content is a string, or a list of `{"type": "text", "text": …}` |
| `conversations` | ShareGPT | `from` human, gpt, system; `value` |
| `instruction`, `input`, `output`, `history` | Alpaca | user, assistant |
| `query`, `response`, `history` | ms-swift | user, assistant |
| `text` | classification sets | one user message |
| `prompt`, `completion` | TRL | text is user's and assistant's; or messages |
| `chosen` | TRL | in a pair without any of the above: the whole conversation |

`system` may stand beside all but the first and the last. Beside the conversation a row may have `label` (safe, controversial, unsafe),
`categories`, `reason`, `refusal`, `request`, `language`, `kind` (a slice to measure by), `weight` and `id`. Other keys are left
alone and counted, unless one looks like a mistyped one of these.

A row's own answer is its verdict where it has a label, else the assistant's turn that ends it. A pair has a worse answer beside it, a
rating says whether it is wanted:

| key | who writes it | becomes |
|---|---|---|
| `rejected` | TRL, LLaMA-Factory | the worse answer |
| `rejected_response`, `rejected_messages` | ms-swift | the same |
| `chosen` | TRL, LLaMA-Factory | the better answer, in place of the row's own |
| `margin` | reward models | by how much it is better |
| `desirable`, `kto_tag` | LLaMA-Factory | whether the row's own answer is wanted |
| `label`, true or false | TRL, ms-swift | the same; a text is a severity |

A message of `messages`, `conversations` or `prompt` may say how much it counts when it is trained, 0: not at all:

| key | who writes it | is |
|---|---|---|
| `weight` | OpenAI | a number of at least 0 |
| `loss` | ms-swift | true or false, or such a number |

An answer is text; a message as `messages` or `conversations` have it, alone or in a list; a whole conversation, the answer last; or a
verdict: `{"label": "unsafe", "categories": ["Violent"]}`, with `reason`, `refusal` and `request` as a row has them.
"""

import difflib
import itertools
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

from megamod import foreign
from megamod.errors import MegamodError, expected, nearest
from megamod.verdicts import SEVERITIES, Severity, Verdict

Message = Mapping[str, str]  # role and content, as chat templates take them
Json = Mapping[str, Any]
Answer: TypeAlias = str | Verdict  # an assistant's text, or what a verdict format renders

HALF = re.compile("[\ud800-\udfff]")
LARGEST_WEIGHT = 3.4028234663852886e38  # a batch keeps weights, and margins, in float32
ROLES = ("system", "user", "assistant", "tool")
LABELS = f"{', '.join(SEVERITIES[:-1])} or {SEVERITIES[-1]}"
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}


@dataclass(frozen=True)
class Row:
    """A conversation, and what is known of it.

    Of a pair and of a rated answer, `messages` is the whole input, without the answers; it may end with an assistant's message, on which
    the answers are verdicts. `label`, with what belongs to it, is what a model should say, in training and in evaluation: the better of two
    verdicts, or a desirable one. Beside an undesirable verdict, and beside texts, there is none.
    """

    messages: tuple[Message, ...]
    label: Severity | None = None  # None: no verdict is trained, the assistant's turns are, or the answers below
    categories: tuple[str, ...] = ()
    reason: str | None = None
    refusal: bool | None = None
    request: Severity | None = None
    language: str | None = None
    kind: str | None = None
    weight: float = 1.0
    weights: tuple[float, ...] = ()  # of each message, where one has its own; a row with a label or with answers trains none of them
    id: str | None = None
    chosen: Answer | None = None  # of a pair: the better answer to `messages`; of a rated answer: that one
    rejected: Answer | None = None  # of a pair: the worse one, of the same type; else None
    desirable: bool | None = None  # of a rated answer: whether it is wanted; else None
    margin: float | None = None  # of a pair: by how much `chosen` is better, where that is known; finite
    where: str = ""  # file:line
    unread: tuple[str, ...] = field(default=(), compare=False)  # keys that are none of ours

    @property
    def line(self) -> int | None:
        """Its line in the file, from 1."""
        number = self.where.rpartition(":")[2]
        return int(number) if number.isdecimal() else None

    @property
    def turns(self) -> list[int]:
        """Which of the messages are the assistant's, after another: those that can be trained."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant" and i > 0]

    def weight_of(self, message: int) -> float:
        """How much message number `message` counts, beside `weight`."""
        return self.weights[message] if self.weights else 1.0

    @property
    def is_response(self) -> bool:
        """Whether an assistant's response is judged, or a user's prompt."""
        return self.messages[-1]["role"] == "assistant"

    @property
    def verdict(self) -> Verdict | None:
        """What a model should say; None for a row without label."""
        return self.label and Verdict(self.label, self.categories, self.refusal, self.request, self.reason)

    @property
    def is_preference(self) -> bool:
        """Whether it is a pair: `chosen` is better than `rejected`."""
        return self.rejected is not None

    @property
    def is_rated(self) -> bool:
        """Whether it is one answer, `chosen`, and whether that is wanted, `desirable`."""
        return self.desirable is not None


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
            raise MegamodError(f"{where}: no label: {LABELS} was expected")
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
        for number, line in foreign.lines(file, path):
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
    found = [key for key in found if key not in YIELDING] or found[:1]
    if len(found) != 1:
        what = f"both {' and '.join(map(repr, found))}" if found else f"none of {', '.join(map(repr, SPELLINGS))}"
        raise MegamodError(f"{where}: {what}: one of them holds the conversation{_typo(record, SPELLINGS)}")
    (holder,) = found
    read, own = SPELLINGS[holder]
    known = {*KEYS, *own, holder}
    unread = tuple(sorted(key for key in record if key not in known))
    near = known - (NUMBERED & record.keys())
    for key in unread:
        if close := difflib.get_close_matches(key, near, n=1, cutoff=0.8):
            raise MegamodError(f"{where}: unknown key {key!r}, did you mean {close[0]!r}?")
    ratings = ("desirable", "kto_tag", *["label"] * isinstance(record.get("label"), bool))
    rating = _one_of(record, ratings, "says whether the answer is wanted", where)
    worse = _one_of(record, WORSE, "is the worse answer", where)
    if rating and worse:
        raise MegamodError(
            f"{where}: both {worse!r} and {rating!r}: a pair of answers, or one answer and whether it is wanted, was expected"
        )
    messages = tuple(read(record, where))
    row = Row(
        messages,
        **_finding({**record, "label": None} if rating == "label" else record, where),
        language=typed(record, "language", str, where),
        kind=typed(record, "kind", str, where),
        weight=_number(record, "weight", where, least=0) if "weight" in record else 1.0,
        weights=_weights(record, holder, len(messages), where),
        id=str(record["id"]) if record.get("id") is not None else None,
        margin=_number(record, "margin", where) if record.get("margin") is not None else None,
        where=where,
        unread=unread,
    )
    if record.get("chosen") is not None:
        if not worse:
            raise MegamodError(f"{where}: chosen without rejected: the worse answer was expected beside it")
        row = _with_chosen(row, record, holder)
    if worse:
        row = _preference(row, worse, record[worse])
    elif rating:
        row = _rated(row, rating, typed(record, rating, bool, where))
    if row.margin is not None and not row.is_preference:
        raise MegamodError(f"{where}: margin without rejected: it says by how much one of two answers is better")
    _check_weights(row)
    if not any(message["role"] != "system" for message in row.messages):
        answer = " and an answer" if row.chosen is not None else ""
        raise MegamodError(f"{where}: {holder} holds no message besides a system prompt{answer}")
    return row


# --- weights of messages -----------------------------------------------------------------------------------------------------


def _weights(record: Json, holder: str, messages: int, where: str) -> tuple[float, ...]:
    """Of each of the row's messages; none where no message has its own."""
    turns = record[holder] if holder in ("messages", "conversations", "prompt") and isinstance(record[holder], list) else []
    first = int("system" in SPELLINGS[holder][1] and bool(record.get("system")))  # the system prompt that stands beside them
    found = [_weight(turn, f"{where}: {holder}[{i}]") for i, turn in enumerate(turns)]
    return (*[1.0] * first, *found, *[1.0] * (messages - first - len(found))) if any(weight != 1 for weight in found) else ()


def _weight(turn: Json, place: str) -> float:
    key = _one_of(turn, ("weight", "loss"), "says how much a message counts", place)
    if key is None or (key == "loss" and isinstance(turn[key], bool)):
        return 1.0 if key is None else float(turn[key])
    return _number(turn, key, place, least=0)


def _check_weights(row: Row) -> None:
    """Refuse weights that nothing would read, and those that are too large together. Raises MegamodError."""
    most = max(row.weights, default=1.0) * row.weight
    if most > LARGEST_WEIGHT:
        raise MegamodError(f"{row.where}: a message's weight and the row's multiply to {most:g}: at most {LARGEST_WEIGHT:g} was expected")
    trained = row.turns if row.label is None and row.chosen is None else []
    for i, weight in enumerate(row.weights):
        answers = i >= len(row.messages)  # trained whatever its weight says
        if i not in trained and weight != 1 and (weight != 0 or answers):
            what = "an answer counts as its row does, 1" if answers else "it is not trained, 0 or 1"
            raise MegamodError(f"{row.where}: message {i} (the first is 0) has weight {weight:g}: {what} was expected")


# --- pairs and rated answers: a row with an answer of its own, and what is beside it -----------------------------------------


def _own(row: Row) -> tuple[tuple[Message, ...], Answer | None]:
    """A row's input, and its own answer to it: its verdict, or the assistant's turn that ends it; None where it has neither."""
    if row.verdict is not None:
        return row.messages, row.verdict
    if row.messages and row.is_response:
        return row.messages[:-1], row.messages[-1]["content"]
    return row.messages, None


def _with_chosen(row: Row, record: Json, holder: str) -> Row:
    """`row` with `chosen` as its own answer."""
    place = f"{row.where}: chosen"
    side = _side(record["chosen"], place)
    for key in FINDING if isinstance(side, Verdict) else ("label",):
        if record.get(key) is not None:
            raise MegamodError(f"{row.where}: both 'chosen' and {key!r}: the better answer is chosen, or the row's own verdict, not both")
    if isinstance(side, Verdict):
        return replace(row, **_finding(record["chosen"], place))
    whole = _whole(row.messages, side)
    if whole[: len(row.messages)] != row.messages:
        raise MegamodError(
            f"{place} holds {len(side)} messages, which do not begin with those of {holder!r}: an assistant's message alone, or the whole "
            f"conversation, was expected"
        )
    if len(side) == 1 and row.messages and row.is_response:
        raise MegamodError(f"{row.where}: both 'chosen' and an assistant's turn at the end of {holder!r}: one of them is the better answer")
    return replace(row, messages=whole)


def _preference(row: Row, key: str, value: Any) -> Row:
    """`row` with its own answer as the better one and `value`, at `key`, as the worse one."""
    prompt, chosen = _own(row)
    side = _side(value, f"{row.where}: {key}")
    if chosen is None:
        raise MegamodError(
            f"{row.where}: {key} without chosen: the better answer was expected as chosen, as an assistant's turn that ends the "
            f"conversation, or, of verdicts, as label"
        )
    if isinstance(side, Verdict) != isinstance(chosen, Verdict):
        kinds = ("a verdict", "text") if isinstance(chosen, Verdict) else ("text", "a verdict")
        raise MegamodError(f"{row.where}: the better answer is {kinds[0]} and {key} is {kinds[1]}: two of one kind were expected")
    rejected: Answer
    if isinstance(side, Verdict):
        rejected = side
    else:
        *before, last = _whole(prompt, side)
        if tuple(before) != prompt:
            at = next(i for i, (one, other) in enumerate(itertools.zip_longest(prompt, before)) if one != other)
            raise MegamodError(
                f"{row.where}: chosen and {key} differ from message {at} on (the first is 0): conversations that differ before their last "
                f"turn cannot be compared"
            )
        rejected = last["content"]
    for name, answer in (("chosen", chosen), (key, rejected)):
        _not_empty(answer, f"{row.where}: {name}")
    if len({answer.strip() if isinstance(answer, str) else answer for answer in (chosen, rejected)}) == 1:
        raise MegamodError(f"{row.where}: chosen and {key} are the same: two different answers were expected")
    return replace(row, messages=prompt, chosen=chosen, rejected=rejected)


def _rated(row: Row, key: str, desirable: bool) -> Row:
    """`row` with its own answer as the rated one."""
    prompt, answer = _own(row)
    if answer is None:
        raise MegamodError(
            f"{row.where}: {key} = {desirable}: {LABELS} was expected as label, or a conversation that ends with an assistant's answer"
        )
    _not_empty(answer, f"{row.where}: the answer")
    wrong = isinstance(answer, Verdict) and not desirable
    return replace(row, messages=prompt, chosen=answer, desirable=desirable, **(_finding({}, row.where) if wrong else {}))


def _side(value: Any, place: str) -> Verdict | tuple[Message, ...]:
    """One answer, in any spelling: a verdict, or messages of which the last, an assistant's, is the answer."""
    if isinstance(value, str):
        return (_message("assistant", value, place),)
    if isinstance(value, dict) and not value.keys() & {"role", "content", "from", "value"}:
        for key in value:
            if key not in FINDING:
                raise MegamodError(f"{place}: no key {key!r} in a verdict, {nearest(key, FINDING)}")
        verdict = Row((), **_finding(value, place)).verdict
        if verdict is None:
            raise MegamodError(f"{place} = {reprlib.repr(value)}: label = {LABELS} was expected in a verdict")
        return verdict
    if not value or not isinstance(value, list | dict):
        raise MegamodError(f"{place} = {reprlib.repr(value)}: text, messages or a verdict was expected")
    turns = [(value, place)] if isinstance(value, dict) else list(zip(value, _places(place), strict=False))
    messages = tuple(_turn(*turn) for turn in turns)
    if any(_weight(*turn) != 1 for turn in turns):
        raise MegamodError(f"{place}: a message with a weight of its own, which nothing reads: an answer counts as its row's weight says")
    if messages[-1]["role"] != "assistant":
        raise MegamodError(f"{place} ends with a message whose role is {messages[-1]['role']!r}: an assistant's was expected")
    return messages


def _whole(prompt: tuple[Message, ...], side: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation that ends with an answer: one message answers `prompt`, more are a whole conversation."""
    return side if len(side) > 1 else (*prompt, *side)


def _not_empty(answer: Answer, place: str) -> None:
    if isinstance(answer, str) and not answer.strip():
        raise MegamodError(f"{place} is empty: a text was expected")


def _one_of(record: Json, keys: Iterable[str], what: str, where: str) -> str | None:
    """Which of `keys` the record has; None for none. Raises MegamodError for two."""
    found = [key for key in keys if record.get(key) is not None]
    if len(found) > 1:
        raise MegamodError(f"{where}: both {' and '.join(map(repr, found))}: one of them {what}")
    return found[0] if found else None


def _finding(record: Json, where: str) -> dict[str, Any]:
    """What belongs to a verdict, as Row has it."""
    return {
        "label": severity_of(record, "label", where),
        "categories": names_of(record, "categories", where),
        "reason": typed(record, "reason", str, where),
        "refusal": typed(record, "refusal", bool, where),
        "request": severity_of(record, "request", where),
    }


# --- conversations ---------------------------------------------------------------------------------------------------------


def _openai(record: Json, where: str) -> Iterator[Message]:
    yield from map(_role_turn, _list(record, "messages", where), _places(f"{where}: messages"))


def _role_turn(message: Any, place: str) -> Message:
    role, content = _entries(message, "role", "content", place)
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{place}.content[{j}]") for j, part in enumerate(content))
    return _message(role, content, place)


def _text_part(part: Any, where: str) -> str:
    kind, text = _entries(part, "type", "text", where) if isinstance(part, dict) and part.get("type") == "text" else (None, None)
    if kind is None or not isinstance(text, str):
        raise MegamodError(f'{where} = {reprlib.repr(part)}: {{"type": "text", "text": "…"}} was expected; images are not read yet')
    return text


def _sharegpt(record: Json, where: str) -> Iterator[Message]:
    yield from _system(record, where)
    yield from map(_from_turn, _list(record, "conversations", where), _places(f"{where}: conversations"))


def _from_turn(turn: Any, place: str) -> Message:
    speaker, value = _entries(turn, "from", "value", place)
    if not isinstance(speaker, str) or speaker not in SHAREGPT:
        raise MegamodError(f"{place}: from = {reprlib.repr(speaker)}: one of {', '.join(SHAREGPT)} was expected")
    return _message(SHAREGPT[speaker], value, place)


def _alpaca(record: Json, where: str) -> Iterator[Message]:
    yield from _history(record, where, ("instruction", "input"), "output")


def _swift(record: Json, where: str) -> Iterator[Message]:
    yield from _history(record, where, ("query",), "response")


def _history(record: Json, where: str, asked: tuple[str, ...], answer: str) -> Iterator[Message]:
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


def _prompt(record: Json, where: str) -> Iterator[Message]:
    if not any(record.get(key) is not None for key in ("completion", "chosen", *WORSE)):
        raise MegamodError(
            f"{where}: prompt alone: completion, or chosen and rejected, were expected beside it; a text to be judged is in 'text' or "
            f"'messages'"
        )
    yield from _system(record, where)
    value = record["prompt"]
    if isinstance(value, str):
        yield _message("user", value, f"{where}: prompt")
    else:
        yield from map(_turn, _list(record, "prompt", where), _places(f"{where}: prompt"))
    if record.get("completion") is not None:
        side = _side(record["completion"], f"{where}: completion")
        if isinstance(side, Verdict) or len(side) > 1:
            raise MegamodError(
                f"{where}: completion = {reprlib.repr(record['completion'])}: text, or one message, an assistant's, was expected"
            )
        yield from side


def _whole_pair(record: Json, where: str) -> Iterator[Message]:
    """No message: they are in the pair, which `_with_chosen` reads."""
    if not isinstance(record["chosen"], list):
        value = reprlib.repr(record["chosen"])
        typo = _typo([key for key in record if key not in KEYS], SPELLINGS)
        raise MegamodError(f"{where}: chosen = {value}: a whole conversation was expected, or its input beside it, such as prompt{typo}")
    yield from ()


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
    "prompt": (_prompt, ("completion", "system")),
    "chosen": (_whole_pair, ()),
}
YIELDING = ("prompt", "chosen")  # the first of them holds the conversation where nothing else does; sets repeat it there
WORSE = ("rejected", "rejected_response", "rejected_messages")
FINDING = ("label", "categories", "reason", "refusal", "request")  # what belongs to a verdict
KEYS = (*FINDING, "language", "kind", "weight", "id", "chosen", *WORSE, "margin", "desirable", "kto_tag")
NUMBERED = {"prompt", "chosen", "rejected"}  # prompt_id beside prompt is no misspelling of it


def _turn(value: Any, place: str) -> Message:
    """A message as `messages` or as `conversations` have it."""
    return (_from_turn if isinstance(value, dict) and "from" in value else _role_turn)(value, place)


def _places(where: str) -> Iterator[str]:
    return (f"{where}[{i}]" for i in itertools.count())


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
        raise MegamodError(f"{where}: {key} = {reprlib.repr(value)}: {LABELS} was expected")
    return cast(Severity, value.lower())


def names_of(record: Json, key: str, where: str) -> tuple[str, ...]:
    """The list of names at `key`; none where there is none. Raises MegamodError."""
    value = record.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise MegamodError(f"{where}: {key} = {reprlib.repr(value)}: a list of names was expected")
    return tuple(value)


def _number(record: Json, key: str, where: str, least: float = -LARGEST_WEIGHT) -> float:
    value = record[key]
    # The comparison is false for NaN, and takes integers too large for a float.
    if type(value) not in (int, float) or not least <= value <= LARGEST_WEIGHT or not math.isfinite(value):
        wanted = "a finite number" if least < 0 else f"a finite number of at least {least}"
        raise MegamodError(f"{where}: {key} = {reprlib.repr(value)}: {wanted} was expected")
    return float(value)


def _typo(keys: Iterable[str], names: Iterable[str]) -> str:
    for key in keys:
        if close := difflib.get_close_matches(key, names, n=1, cutoff=0.8):
            return f"; did you mean {close[0]!r} by {key!r}?"
    return ""
