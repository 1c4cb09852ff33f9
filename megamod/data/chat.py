"""Conversations into documents: rendered by the chat template, trained on what follows its generation prompt.

A row with a label is input, whole; the verdict is the target. In a row without, each assistant turn is a document of its own:
templates change earlier turns when a later one comes (Qwen3's drops their thinking), so what a turn was generated from is
rendered for that turn.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megamod.config import ChatConfig
from megamod.data.documents import IGNORED, Document
from megamod.data.jsonl import Message, Row
from megamod.data.tokenizer import Tokenizer
from megamod.errors import MegamodError
from megamod.verdicts import Format, Severity, Verdict, format_from_json, format_of

CUTS = 8  # attempts to shorten a message to the right number of tokens


class Rendered(NamedTuple):
    """A conversation up to the generation prompt, and what should follow."""

    prompt: str
    target: str
    start: int  # where in `target` the assistant's own words begin: templates may put something before them


class Prompts(NamedTuple):
    """A conversation to be judged."""

    windows: list[npt.NDArray[np.int32]]  # [t] each
    notes: tuple[str, ...]  # what whoever reads the verdict should know


class Candidate(NamedTuple):
    """A text that gives a verdict's severity, as tokens after a prompt."""

    severity: Severity
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Encoder:
    """How rows become tokens: the tokenizer with its template, the verdict format, and what to do with long rows.

    Args:
        limit: the tokens that a document may have; None: any number.
    """

    tokenizer: Tokenizer
    cfg: ChatConfig
    limit: int | None = None

    @property
    def format(self) -> Format:
        """The verdict format."""
        return format_of(self.cfg.format)

    def identity(self) -> dict[str, Any]:
        """What decides a row's tokens, as JSON: two encoders of the same identity make the same documents."""
        options = {key: value for key, value in dataclasses.asdict(self.cfg).items() if key not in ("tokenizer", "template", "format")}
        return {
            **options,
            "tokenizer": self.tokenizer.fingerprint(),
            "format": dataclasses.asdict(self.format),
            "limit": self.limit,
        }

    def documents(self, row: Row, counts: Counter[str]) -> list[Document]:
        """The row's documents. `counts` is told what became of it: `rows`, `documents`, `skipped`, `cut` and `special`.

        Raises:
            MegamodError: what the template or the verdict format cannot take, or a row that is too long, where
                `data.chat.too_long` is "error"; one line that begins with `file:line:`.
        """
        counts["rows"] += 1
        if self.holds_special(row):
            counts["special"] += 1
        found = []
        for messages, verdict in self._tasks(row):
            document = self._document(row, messages, verdict)
            if self.limit is not None and len(document.tokens) > self.limit:
                shorter = self._too_long(row, messages, verdict, len(document.tokens))
                counts["skipped" if shorter is None else "cut"] += 1
                if shorter is None:
                    continue
                document = shorter
            found.append(document)
        counts["documents"] += len(found)
        return found

    def prompts(self, row: Row, room: int = 0) -> Prompts:
        """A row to be judged, up to where the verdict begins; several times where it is too long.

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
        return Prompts(prompts, (*notes, *["holds special tokens"] * self.holds_special(row)))

    def holds_special(self, row: Row) -> bool:
        """Whether a message holds the text of a special token, which is read as the token."""
        return any(token in message["content"] for message in row.messages for token in self.tokenizer.special)

    def _windows(self, messages: Sequence[Message], where: str, room: int) -> list[npt.NDArray[np.int32]] | None:
        """The conversation's tokens, or those of its windows; None: no window fits."""

        def encoded(conversation: Sequence[Message]) -> npt.NDArray[np.int32]:
            return self.tokenizer.encode(self.tokenizer.render(conversation, prompt=True, where=where)).ids

        whole = encoded(messages)
        if self.limit is None or len(whole) + room <= self.limit:
            return [whole]
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
            found = [encoded([*messages[:at], {**messages[at], "content": piece}, *messages[at + 1 :]]) for piece in pieces]
            over = max(map(len, found)) + room - self.limit
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
        document = self._document(row, row.messages, self._said(verdict, row))
        ids = document.tokens[document.labels != IGNORED]
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

    def _tasks(self, row: Row) -> list[tuple[Sequence[Message], Verdict | str]]:
        """What there is to learn from a row: a conversation, and the verdict or the turn that follows."""
        if row.verdict is not None:
            return [(row.messages, self._said(row.verdict, row))]
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant" and i > 0]
        if not turns:
            raise MegamodError(f"{row.where}: neither a label nor an assistant's turn after another: nothing in this row could be trained")
        return [(row.messages[:i], row.messages[i]["content"]) for i in (turns if self.cfg.turns == "each" else turns[-1:])]

    def _said(self, verdict: Verdict, row: Row) -> Verdict:
        severity, request = verdict.severity, verdict.request
        if self.cfg.controversial != "keep":
            severity = self.cfg.controversial if severity == "controversial" else severity
            request = self.cfg.controversial if request == "controversial" else request
        categories = () if severity == "safe" else verdict.categories
        if severity not in self.format.severities:
            raise MegamodError(
                f"{row.where}: label {severity!r}: the verdict format has no word for it; set data.chat.controversial to 'unsafe' or 'safe'"
            )
        reason = verdict.reason if self.cfg.reasons else None
        return replace(verdict, severity=severity, request=request, categories=categories, reason=reason)

    def _document(self, row: Row, messages: Sequence[Message], answer: Verdict | str) -> Document:
        """Prompt and target as one document: the target's tokens are trained, the values of a verdict are marked."""
        spans: tuple[tuple[int, int], ...] = ()
        if isinstance(answer, Verdict):
            try:
                text, spans = self.format.render(answer, messages[-1]["role"] == "assistant")
            except MegamodError as error:
                raise MegamodError(f"{row.where}: {error}") from None
        else:
            text = answer
        rendered = self._rendered(messages, text, row.where, is_verdict=isinstance(answer, Verdict))
        first = len(rendered.prompt)
        prompt = self.tokenizer.encode(rendered.prompt).ids
        tokens, offsets = self.tokenizer.encode(rendered.prompt + rendered.target)
        self._check_border(prompt, tokens, row.where)
        labels = np.full(len(tokens), IGNORED, np.int64)
        labels[len(prompt) :] = tokens[len(prompt) :]
        verdict = np.zeros(len(tokens), np.bool_)
        for start, stop in spans:
            start, stop = (first + rendered.start + x for x in (start, stop))
            verdict |= (offsets[:, 0] < stop) & (offsets[:, 1] > start) & (labels != IGNORED)
        return Document(tokens, labels, verdict, row.weight)

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

    def _too_long(self, row: Row, messages: Sequence[Message], answer: Verdict | str, tokens: int) -> Document | None:
        """A document with the longest message cut from its end, or None to skip it. Raises MegamodError."""
        assert self.limit is not None
        if self.cfg.too_long == "error":
            raise MegamodError(
                f"{row.where}: {tokens} tokens, but a row holds {self.limit}: raise data.row_length, or see data.chat.too_long"
            )
        if self.cfg.too_long == "skip":
            return None
        for _ in range(CUTS):
            shorter = self._shortened(messages, tokens - self.limit)
            if shorter is None:
                return None
            document = self._document(row, shorter, answer)
            messages, tokens = shorter, len(document.tokens)
            if tokens <= self.limit:
                return document
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


def _longest(messages: Sequence[Message]) -> int:
    return max(range(len(messages)), key=lambda i: len(messages[i]["content"]))


def _end(offsets: npt.NDArray[np.int64], tokens: int) -> int:
    """Where the first `tokens` tokens end in their text. Tokens of less than a character share its place: it goes with the next."""
    last = int(offsets[min(tokens, len(offsets)) - 1, 1])
    return last if tokens >= len(offsets) else min(last, int(offsets[tokens, 0]))


def encoder(cfg: ChatConfig, model: str, limit: int | None = None) -> Encoder:
    """The Encoder of `cfg`, for the checkpoint at `model`. Raises MegamodError."""
    template = None if cfg.template is None else _read_template(cfg.template)
    arguments: Mapping[str, Any] = cfg.template_arguments
    return Encoder(Tokenizer(cfg.tokenizer or model, template, arguments), cfg, limit)


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
        about = json.loads(file.read_text(encoding="utf-8"))
        arguments = about["template_arguments"]
        if not isinstance(arguments, dict):
            raise TypeError("template_arguments is no object")
        return replace(default, format=format_from_json(about["format"]), template_arguments=arguments)
    except FileNotFoundError:
        return default
    except (MegamodError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MegamodError(f"{file}: damaged ({error}): remove it, and name the format yourself") from None
