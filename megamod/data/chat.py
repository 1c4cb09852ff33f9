"""Conversations into documents: rendered by the chat template, trained on what follows its generation prompt.

A row with a label is input, whole; the verdict is the target. In a row without, each assistant turn is a document of its own:
templates change earlier turns when a later one comes (Qwen3's drops their thinking), so what a turn was generated from is
rendered for that turn. A preference is two documents that stay together, the better answer and the worse.

For a head of scores nothing is generated: the conversation is rendered whole, without a generation prompt, and its classes are
asked at its last token, as transformers' ForSequenceClassification reads them, or at every token of the last message.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megamod import foreign
from megamod.config import ChatConfig, check_weights
from megamod.data.documents import IGNORED, Document, weighed
from megamod.data.jsonl import Message, Row
from megamod.data.tokenizer import Tokenizer
from megamod.errors import MegamodError, listed
from megamod.model.shape import Score
from megamod.verdicts import Format, Severity, Verdict, format_from_json, format_of

CUTS = 8  # attempts to shorten a message to the right number of tokens
MARK = "\ue000"  # put behind a message to see where it ends in what the template makes of it: a character for private use


class Rendered(NamedTuple):
    """A conversation up to the generation prompt, and what should follow."""

    prompt: str
    target: str
    start: int  # where in `target` the assistant's own words begin: templates may put something before them


class Task(NamedTuple):
    """What there is to learn from a conversation: what may follow it, each a document, all in one packed row."""

    messages: Sequence[Message]
    answers: tuple[tuple[Verdict | str | None, int], ...]  # and its side, as in Document; None: nothing follows, it is scored
    weight: float = 1.0  # that the row gives the message


class Encoded(NamedTuple):
    """A prompt and what follows it, in `t` tokens."""

    prompt: int  # tokens
    tokens: npt.NDArray[np.int32]  # [t]
    offsets: npt.NDArray[np.int64]  # [t, 2] the characters of each
    said: str  # what the assistant says, without what the template puts before and behind it, such as the end token
    start: int  # the character with which that begins
    verdict: list[tuple[int, int]]  # the characters of a verdict's values


class Prompts(NamedTuple):
    """A conversation to be judged."""

    windows: list[npt.NDArray[np.int32]]  # [t] each
    notes: tuple[str, ...]  # what whoever reads the verdict should know
    asked: list[npt.NDArray[np.int64]]  # for a head of scores: after which tokens of each window it is asked; else none


class Candidate(NamedTuple):
    """A text that gives a verdict's severity, as tokens after a prompt."""

    severity: Severity
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Encoder:
    """How rows become tokens: the tokenizer with its template, the verdict format, and what to do with long rows.

    Args:
        limit: the tokens that a row holds, and so a document, or a pair of them, may have; None: any number.
        score: the model's head of scores, if that is what is trained.
    """

    tokenizer: Tokenizer
    cfg: ChatConfig
    limit: int | None = None
    score: Score | None = None

    @property
    def format(self) -> Format:
        """The verdict format."""
        return format_of(self.cfg.format)

    def identity(self) -> dict[str, Any]:
        """What decides a row's tokens, as JSON: two encoders of the same identity make the same documents."""
        options = {key: value for key, value in dataclasses.asdict(self.cfg).items() if key not in ("tokenizer", "template", "format")}
        if not options["weights"]:  # a store of before there were any is what it would be now
            del options["weights"]
        return {
            **options,
            "tokenizer": self.tokenizer.fingerprint(),
            "format": dataclasses.asdict(self.format),
            "limit": self.limit,
            **({} if self.score is None else {"score": dataclasses.asdict(self.score)}),
        }

    def documents(self, row: Row, counts: Counter[str]) -> list[Document]:
        """The row's documents. `counts` is told what became of it: `rows`, `documents`, `skipped`, `cut`, `special` and, of each of
        `data.chat.weights`, how many tokens it weighs (`matches_of`).

        Raises:
            MegamodError: what the template or the verdict format cannot take, or a row that is too long, where
                `data.chat.too_long` is "error"; one line that begins with `file:line:`.
        """
        counts["rows"] += 1
        if self.holds_special(row):
            counts["special"] += 1
        found = []
        for task in self._tasks(row):
            matches: Counter[str] = Counter()
            documents = self._documents(row, task, matches)
            if self._excess(documents) > 0:
                shorter = self._too_long(row, task, documents, matches)
                counts["skipped" if shorter is None else "cut"] += 1
                if shorter is None:
                    continue
                documents = shorter
            found += documents
            counts.update(matches)
        counts["documents"] += len(found)
        return found

    def prompts(self, row: Row, room: int = 0) -> Prompts:
        """A row to be judged, up to where the verdict begins, or whole for a head of scores; several times where it is too long.

        The longest message is then read through windows that overlap by half, so that nothing in it goes unread; where even that
        leaves no room, the earliest turns are left out.

        Args:
            room: tokens to leave below the limit.

        Raises:
            MegamodError: the template cannot take the row, or nothing fits.
        """
        messages, left_out = list(row.messages), 0
        while True:
            prompts = self._windows(messages, row.where, room)
            if prompts is not None:
                break
            earliest = next((i for i, message in enumerate(messages[:-1]) if message["role"] != "system"), None)
            if earliest is None:
                raise MegamodError(f"{row.where}: the conversation does not fit into {self.limit} tokens with {room} for the verdict")
            del messages[earliest]
            left_out += 1
        notes = [f"read in {len(prompts)} windows"] * (len(prompts) > 1) + [f"{left_out} earliest turns left out"] * (left_out > 0)
        found = [prompt for _, prompt in prompts]
        asked = [] if self.score is None else [self._asked(conversation, row.where)[1] for conversation, _ in prompts]
        return Prompts(found, (*notes, *["holds special tokens"] * self.holds_special(row)), asked)

    def holds_special(self, row: Row) -> bool:
        """Whether a message, or an answer, holds the text of a special token, which is read as the token."""
        answers = [answer for answer in (row.chosen, row.rejected) if isinstance(answer, str)]
        texts = [*(message["content"] for message in row.messages), *answers]
        return any(token in text for text in texts for token in self.tokenizer.special)

    def _windows(self, messages: Sequence[Message], where: str, room: int) -> list[tuple[Sequence[Message], npt.NDArray[np.int32]]] | None:
        """The conversation and its tokens, or those of its windows; None: no window fits."""

        def encoded(conversation: Sequence[Message]) -> npt.NDArray[np.int32]:
            return self.tokenizer.encode(self.tokenizer.render(conversation, prompt=self.score is None, where=where)).ids

        whole = encoded(messages)
        if self.limit is None or len(whole) + room <= self.limit:
            return [(messages, whole)]
        at = _longest(messages)
        text = messages[at]["content"]
        offsets = self.tokenizer.encode(text).offsets
        width = len(offsets) + self.limit - room - len(whole)
        for _ in range(CUTS):
            if width < 1:
                return None
            stride = (width + 1) // 2
            starts = range(0, max(1, len(offsets) - width + stride), stride)
            pieces = [text[int(offsets[s, 0]) : _end(offsets, s + width)] for s in starts]
            parts = [[*messages[:at], {**messages[at], "content": piece}, *messages[at + 1 :]] for piece in pieces]
            found: list[tuple[Sequence[Message], npt.NDArray[np.int32]]] = [(part, encoded(part)) for part in parts]
            over = max(len(ids) for _, ids in found) + room - self.limit
            if over <= 0:
                return found
            width -= over
        return None

    def candidates(self, row: Row) -> tuple[Candidate, ...]:
        """Every way to say each severity after the row's prompt, as the template would have it, in tokens.

        Raises:
            MegamodError: the prompt's tokens change with what follows.
        """
        found = []
        for severity, text in self.format.candidates(row.is_response):
            rendered = self._rendered(row.messages, text, row.where)
            whole = rendered.prompt + rendered.target[: rendered.start] + text
            prompt, ids = (self.tokenizer.encode(x).ids for x in (rendered.prompt, whole))
            self._check_border(prompt, ids, row.where)
            found.append(Candidate(severity, tuple(ids[len(prompt) :].tolist())))
        return tuple(found)

    def answer(self, row: Row) -> npt.NDArray[np.int32]:
        """`[t]`: the tokens that should follow the row's prompt, up to the end token."""
        verdict = row.verdict
        assert verdict is not None
        prompt, tokens, *_ = self._encoded(row, row.messages, self._said(verdict, row))
        ids = tokens[prompt:]
        ends = np.flatnonzero(ids == self.tokenizer.end)
        return ids[: ends[0] + 1] if len(ends) else ids

    def gold(self, row: Row) -> Row:
        """The row with its label as `data.chat.controversial` has it trained."""
        severity = self.cfg.controversial
        return row if row.label != "controversial" or severity == "keep" else replace(row, label=severity)

    def lead(self, row: Row) -> str:
        """What the template puts between the generation prompt and the assistant's own words, such as an empty thought."""
        _, text = self.format.candidates(row.is_response)[0]
        rendered = self._rendered(row.messages, text, row.where)
        return rendered.target[: rendered.start]

    def _tasks(self, row: Row) -> list[Task]:
        """What there is to learn from a row."""
        if row.chosen is not None:
            answers = [(row.chosen, -1 if row.desirable is False else 1), *([(row.rejected, -1)] if row.rejected is not None else [])]
            return [Task(row.messages, tuple((self._said(a, row) if isinstance(a, Verdict) else a, side) for a, side in answers))]
        if self.score is not None:
            return [Task(row.messages, ((None, 0),))]
        if row.verdict is not None:
            return [Task(row.messages, ((self._said(row.verdict, row), 0),))]
        turns = [i for i in row.turns if row.weight_of(i) > 0]
        if not turns:
            what = "each of the assistant's turns has weight 0" if row.turns else "neither a label nor an assistant's turn after another"
            raise MegamodError(f"{row.where}: {what}: nothing in this row could be trained")
        if self.cfg.turns == "last":
            unread = [i for i in turns[:-1] if row.weight_of(i) != 1]
            if unread:
                raise MegamodError(
                    f"{row.where}: message {unread[0]} (the first is 0) has weight {row.weight_of(unread[0]):g}, and data.chat.turns = "
                    f"'last' trains only the last turn: use 'each'"
                )
            turns = turns[-1:]
        return [Task(row.messages[:i], ((row.messages[i]["content"], 0),), row.weight_of(i)) for i in turns]

    def _said(self, verdict: Verdict, row: Row) -> Verdict:
        """The verdict as it is trained. Raises MegamodError for a severity that the format has no word for."""
        verdict = self._mapped(verdict)
        if verdict.severity not in self.format.severities:
            raise MegamodError(
                f"{row.where}: label {verdict.severity!r}: the verdict format has no word for it; set data.chat.controversial to "
                f"'unsafe' or 'safe'"
            )
        return verdict if self.cfg.reasons else replace(verdict, reason=None)

    def _mapped(self, verdict: Verdict) -> Verdict:
        """The verdict with `data.chat.controversial` applied."""
        severity, request = verdict.severity, verdict.request
        if self.cfg.controversial != "keep":
            severity = self.cfg.controversial if severity == "controversial" else severity
            request = self.cfg.controversial if request == "controversial" else request
        return replace(verdict, severity=severity, request=request, categories=() if severity == "safe" else verdict.categories)

    def _documents(self, row: Row, task: Task, matches: Counter[str]) -> list[Document]:
        """The task's documents, those after the first joined to it. `matches` is told anew what `data.chat.weights` match in them."""
        matches.clear()
        row = replace(row, weight=row.weight * task.weight)  # an assistant's turn is a document of its own
        made = [
            replace(
                self._document(row, task.messages, answer, matches) if self.score is None else self._scored(row, task.messages, answer),
                side=side,
                joined=number > 0,
                margin=row.margin or 0.0,
            )
            for number, (answer, side) in enumerate(task.answers)
        ]
        if len(made) == 2 and np.array_equal(made[0].tokens, made[1].tokens):
            raise MegamodError(f"{row.where}: chosen and rejected are the same tokens, and teach nothing: two answers were expected")
        return made

    def _excess(self, documents: Sequence[Document]) -> int:
        """Tokens of the documents beyond what a row holds."""
        return 0 if self.limit is None else sum(len(document.tokens) for document in documents) - self.limit

    def _document(self, row: Row, messages: Sequence[Message], answer: Verdict | str | None, matches: Counter[str]) -> Document:
        """Prompt and target as one document: the target's tokens are trained, the values of a verdict are marked."""
        assert answer is not None, "without a head of scores something follows"
        first, tokens, offsets, said, own, spans = self._encoded(row, messages, answer)
        labels = np.full(len(tokens), IGNORED, np.int64)
        labels[first:] = tokens[first:]
        document = Document(tokens, labels, _overlapping(offsets, spans) & (labels != IGNORED), row.weight)
        if not self.cfg.weights:
            return document
        weights = np.ones(len(tokens))
        for pattern, weight in self.cfg.weights.items():
            found = [(own + match.start(), own + match.end()) for match in re.finditer(pattern, said)]
            matched = _overlapping(offsets, found) & (labels != IGNORED)
            matches[matches_of(pattern)] += int(matched.sum())
            weights[matched] *= weight
        return weighed(document, weights, row.where)

    def _encoded(self, row: Row, messages: Sequence[Message], answer: Verdict | str) -> Encoded:
        text, spans = self._text(row, messages, answer)
        rendered = self._rendered(messages, text, row.where, is_verdict=isinstance(answer, Verdict))
        first = len(rendered.prompt)
        prompt = self.tokenizer.encode(rendered.prompt).ids
        tokens, offsets = self.tokenizer.encode(rendered.prompt + rendered.target)
        self._check_border(prompt, tokens, row.where)
        own = first + rendered.start
        end = rendered.target.rfind(self.tokenizer.end_text)
        said = rendered.target[rendered.start : end if end >= rendered.start else None].rstrip()
        return Encoded(len(prompt), tokens, offsets, said, own, [(own + start, own + stop) for start, stop in spans])

    def _scored(self, row: Row, messages: Sequence[Message], answer: Verdict | str | None) -> Document:
        """The conversation, and an answer if there is one, with its classes where they are asked."""
        assert self.score is not None
        if answer is not None:
            messages = [*messages, {"role": "assistant", "content": self._text(row, messages, answer)[0]}]
        tokens, at = self._asked(messages, row.where)
        classes = np.full(len(tokens), IGNORED, np.int64)
        classes[at] = self._classes(row)
        return Document(tokens, np.full(len(tokens), IGNORED, np.int64), np.zeros(len(tokens), np.bool_), row.weight, classes=classes)

    def _asked(self, messages: Sequence[Message], where: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """The conversation's tokens, and after which of them a head of scores is asked: the last, or those of the last message.

        Of a message without a visible character it is the last, too.
        """
        assert self.score is not None
        text = self.tokenizer.render(messages, prompt=False, where=where)
        tokens, offsets = self.tokenizer.encode(text)
        content = messages[-1]["content"].strip()
        if not self.score.every_token or not content:
            return tokens, np.array([len(tokens) - 1])
        marked = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"].rstrip() + MARK}]
        end = self.tokenizer.render(marked, prompt=False, where=where).rfind(MARK)
        start = end - len(content)
        if start < 0 or text[start:end] != content:
            raise MegamodError(f"{where}: the chat template does not say the last message as it is: its tokens cannot be found")
        return tokens, np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))

    def _classes(self, row: Row) -> int:
        """The classes that hold for a row, as bits. Raises MegamodError where the row does not say which."""
        score = self.score
        assert score is not None
        wants_pairs = score.problem == "regression"
        if not (row.is_preference if wants_pairs else row.chosen is None):
            what = "chosen and rejected were" if wants_pairs else "a label alone was"
            raise MegamodError(f"{row.where}: {what} expected, for a head of scores of problem {score.problem!r}")
        if wants_pairs:
            return 0
        if row.verdict is None:
            raise MegamodError(f"{row.where}: no label, and the model's head has a score for each of {', '.join(score.labels)}")
        said = self._mapped(row.verdict)
        names = (said.severity, *said.categories)
        is_single = score.problem == "single_label_classification"
        held = [i for i, label in enumerate(score.labels) if label in names]
        grades = {"controversial", "unsafe"} & {*score.labels}  # without them the categories say that a text is not safe
        needed = names if said.severity != "safe" and (grades or not said.categories) else said.categories
        unknown = [name for name in needed if name not in score.labels]
        if (is_single and len(held) != 1) or (not is_single and unknown):
            raise MegamodError(
                f"{row.where}: {listed(unknown or names)}: {'one' if is_single else 'each'} must be one of model.score.labels = "
                f"{', '.join(score.labels)}"
            )
        return sum(1 << i for i in held)

    def _text(self, row: Row, messages: Sequence[Message], answer: Verdict | str) -> tuple[str, tuple[tuple[int, int], ...]]:
        """What the assistant says, and where in it the values of a verdict are. Raises MegamodError."""
        if not isinstance(answer, Verdict):
            return answer, ()
        try:
            return self.format.render(answer, messages[-1]["role"] == "assistant")
        except MegamodError as error:
            raise MegamodError(f"{row.where}: {error}") from None

    def _rendered(self, messages: Sequence[Message], text: str, where: str, *, is_verdict: bool = True) -> Rendered:
        prompt = self.tokenizer.render(messages, prompt=True, where=where)
        whole = self.tokenizer.render([*messages, {"role": "assistant", "content": text}], prompt=False, where=where)
        if whole.startswith(prompt) and (start := whole.find(text.strip(), len(prompt))) >= 0:
            return Rendered(prompt, whole[len(prompt) :], start - len(prompt))
        if whole.startswith(prompt) and len(whole) > len(prompt) and not is_verdict:
            return Rendered(prompt, whole[len(prompt) :], 0)  # a turn that the template writes in its own way, such as its thinking
        if is_verdict:  # a guard's own template, which renders every turn as what is to be judged
            return Rendered(prompt, text + self.tokenizer.end_text, 0)
        raise MegamodError(
            f"{where}: the chat template does not put an assistant's turn after its generation prompt: nothing can be trained"
        )

    def _check_border(self, prompt: npt.NDArray[np.int32], ids: npt.NDArray[np.int32], where: str) -> None:
        if not np.array_equal(ids[: len(prompt)], prompt):
            raise MegamodError(
                f"{where}: the chat template's generation prompt ends inside a token, so a model would not see in use what it saw in "
                f"training: end it with a special token or a line break"
            )

    def _too_long(self, row: Row, task: Task, documents: Sequence[Document], matches: Counter[str]) -> list[Document] | None:
        """Documents with the conversation's longest message cut from its end, or None to skip them. Raises MegamodError."""
        assert self.limit is not None
        tokens = self._excess(documents) + self.limit
        if self.cfg.too_long == "error":
            what = "" if len(documents) == 1 else f" in {len(documents)} answers with their prompts"
            raise MegamodError(
                f"{row.where}: {tokens} tokens{what}, but a row holds {self.limit}: raise data.row_length, or see data.chat.too_long"
            )
        if self.cfg.too_long == "skip":
            return None
        for _ in range(CUTS):
            shorter = self._shortened(task.messages, math.ceil(self._excess(documents) / len(documents)))
            if shorter is None:
                return None
            task = task._replace(messages=shorter)
            documents = self._documents(row, task, matches)
            if self._excess(documents) <= 0:
                return list(documents)
        return None

    def _shortened(self, messages: Sequence[Message], excess: int) -> list[Message] | None:
        """`messages` without the last `excess` tokens of the longest one; None: it has no more than that."""
        at = _longest(messages)
        text = messages[at]["content"]
        offsets = self.tokenizer.encode(text).offsets
        kept = len(offsets) - excess
        end = _end(offsets, kept) if kept > 0 else 0
        if end == 0:
            return None
        return [*messages[:at], {**messages[at], "content": text[:end]}, *messages[at + 1 :]]


def matches_of(pattern: str) -> str:
    """Where `counts` of `Encoder.documents` has how many tokens one of `data.chat.weights` weighs."""
    return f"weights: {pattern}"


def _overlapping(offsets: npt.NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """`[t]`: which tokens have a character in one of the spans, also where they begin before it, or end after it."""
    end = int(offsets.max(initial=0))
    edges = np.zeros(end + 1, np.int64)
    for start, stop in spans:
        edges[min(start, end)] += 1
        edges[min(stop, end)] -= 1
    before = np.concatenate([[0], np.cumsum(np.cumsum(edges) > 0)])  # of the characters before each, how many are in a span
    inside: npt.NDArray[np.bool_] = before[offsets[:, 1]] > before[offsets[:, 0]]
    return inside


def _longest(messages: Sequence[Message]) -> int:
    return max(range(len(messages)), key=lambda i: len(messages[i]["content"]))


def _end(offsets: npt.NDArray[np.int64], tokens: int) -> int:
    """Where the first `tokens` tokens end in their text. Tokens of less than a character share its place: it goes with the next."""
    last = int(offsets[min(tokens, len(offsets)) - 1, 1])
    return last if tokens >= len(offsets) else min(last, int(offsets[tokens, 0]))


def encoder(cfg: ChatConfig, model: str, limit: int | None = None, score: Score | None = None) -> Encoder:
    """The Encoder of `cfg`, for the checkpoint at `model`, with a head of scores or without. Raises MegamodError."""
    check_weights(cfg)
    if cfg.weights and score is not None:
        raise MegamodError(f"data.chat.weights weigh tokens, and with {score} none is trained: leave them out")
    template = None if cfg.template is None else _read_template(cfg.template)
    arguments: Mapping[str, Any] = cfg.template_arguments
    return Encoder(Tokenizer(cfg.tokenizer or model, template, arguments), cfg, limit, score)


# What a Hugging Face directory says beside its tokenizer, so that whoever judges with it asks as it was trained.
SETTINGS = "moderation.json"
COMPANIONS = (SETTINGS, "chat_template.jinja")  # what `companions` may give


def companions(cfg: ChatConfig) -> dict[str, str]:
    """Small files, by name, that go with an exported model: SETTINGS, and the chat template where it is not the tokenizer's own."""
    about = {"format": dataclasses.asdict(format_of(cfg.format)), "template_arguments": dict(cfg.template_arguments)}
    own = {"chat_template.jinja": _read_template(cfg.template)} if cfg.template is not None else {}
    return {SETTINGS: json.dumps(about, indent=1, ensure_ascii=False) + "\n", **own}


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MegamodError(f"data.chat.template = {path}: cannot be read ({error})") from None


def of_run(about: Mapping[str, Any], where: str | Path) -> ChatConfig:
    """`data.chat` of a run, as its checkpoint at `where` tells it. Raises MegamodError for one that does not."""
    try:
        saved = dict(about["data.chat"])
        format = saved["format"]
        return ChatConfig(**{**saved, "format": format if isinstance(format, str) else format_from_json(format)})
    except (MegamodError, KeyError, TypeError) as error:
        raise MegamodError(f"{where}: a checkpoint that does not say how its run read conversations ({error})") from None


def read_settings(model: str | Path, default: ChatConfig) -> ChatConfig:
    """`default` with what SETTINGS of the directory at `model` says, if it is there. Raises MegamodError for a damaged one."""
    file = Path(model) / SETTINGS
    try:
        about = foreign.read_json(file)
        arguments = about["template_arguments"]
        if not isinstance(arguments, dict):
            raise TypeError("template_arguments is no object")
        return replace(default, format=format_from_json(about["format"]), template_arguments=arguments)
    except FileNotFoundError:
        return default
    except (MegamodError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MegamodError(f"{file}: damaged ({error}): remove it, and name the format yourself") from None
