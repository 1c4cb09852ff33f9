"""Judging: severities scored by the probability of their label strings, verdicts decoded greedily, on the training grid.

Both are questions to the head about known tokens, so both are packed rows through the forward-only schedule (`step.collect`),
and whatever grid can train can judge: there is no second model, and no cache of keys and values.

- **Score.** Each label's string is fed after the prompt, its tokens' log-probabilities are summed, and the sums are normalised
  over the labels: p(strict) = 1 - p(safe), p(loose) = p(unsafe). Strings that begin alike share what they have in common: after
  `Safety:`, Qwen3's three labels need one document, since two are a single token.
- **Classify.** A head of scores is asked once a text, at its last token, or at every token (`_severities`).
- **Decode.** Greedy, by verification (Stern et al. 2018, arXiv:1811.03115): a whole verdict is guessed from those seen before,
  one pass tells which token the model would have said at each place of it, and the guess is kept up to the first that differs.
  The result is exactly greedy decoding; a verdict that was guessed right takes one pass, and a token that was not one more.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from megamod.batch import Batch
from megamod.config import Scoring
from megamod.data.chat import Candidate, Encoder, Prompts
from megamod.data.jsonl import Row
from megamod.data.packing import pack
from megamod.errors import MegamodError, nearest
from megamod.evaluate.metrics import Judged
from megamod.model.build import Decoder
from megamod.model.head import Head
from megamod.model.shape import Score
from megamod.parallel.grid import Grid
from megamod.step import collect_rows
from megamod.verdicts import SEVERITIES, Severity, Verdict

WAVE = 16  # packed rows of each data-parallel rank and stage between two movements of the progress bar
Ids = tuple[int, ...]


class Query(NamedTuple):
    """Tokens, and what is asked after some of them: after tokens[at[i]], about ids[i]."""

    tokens: npt.NDArray[np.int32]  # [t]
    at: npt.NDArray[np.int64]  # [n], ascending
    ids: npt.NDArray[np.int64]  # [n]; 0 where nothing is asked about an id


Answer = npt.NDArray[np.float64]  # [n], or [n, L]: to each question of a Query; float64 holds token ids too
Question = Callable[[Head, Batch], Tensor]  # gives [N], or [N, L]


def judge(
    chunks: Sequence[Decoder],
    grid: Grid,
    rows: Sequence[Row],
    encoder: Encoder,
    *,
    scoring: Scoring = "whole",
    decode: int | None = 0,
    max_new_tokens: int = 128,
    progress: bool = True,
) -> list[Judged]:
    """Judge conversations; every rank calls it with the same arguments and has the same result, one entry a row, in their order.

    A conversation longer than a packed row is read in windows; the one that is least safe gives the verdict.

    Args:
        chunks: this rank's, bare.
        rows: what is known of them beside the conversation (label, categories) is handed through, and does not decide anything.
        encoder: of the model's template and verdict format, its limit the tokens of a packed row.
        scoring: whole — all tokens of the label strings; first_token — up to the first that tells them apart, which is cheaper
            and refused where labels begin alike.
        decode: of how many rows the verdict's text is decoded too; None: of all.
        max_new_tokens: of a decoded verdict.

    Raises:
        MegamodError: a row that the template cannot take, or that does not fit; labels that `first_token` cannot tell apart; an
            argument that means nothing.
    """
    if scoring not in (choices := get_args(Scoring)):
        raise MegamodError(f"scoring = {scoring!r}: {nearest(str(scoring), choices)}")
    if (decode is not None and decode < 0) or max_new_tokens < 1:
        raise MegamodError(f"decode = {decode}, max_new_tokens = {max_new_tokens}: at least 0 and 1 were expected")
    check(encoder, scoring, decode)
    asker = _Asker(chunks, grid, encoder, progress and grid.rank == 0)
    if encoder.score is not None:
        return _classified(asker, rows)
    contexts = _Contexts(encoder, scoring)
    decoded = len(rows) if decode is None else min(decode, len(rows))
    plans = [contexts.plan(row) for row in rows]
    prompts = [
        asker.encoder.prompts(row, max(plan.longest, max_new_tokens if i < decoded else 0))
        for i, (row, plan) in enumerate(zip(rows, plans, strict=True))
    ]
    scores, windows = _score(asker, prompts, plans)
    chosen = [max(s, key=lambda severity: s[severity]) for s in scores[:decoded]]
    texts = _decode(asker, windows[:decoded], rows[:decoded], chosen, contexts, max_new_tokens)
    found = []
    for i, row in enumerate(rows):
        text = texts[i] if i < decoded else None
        verdict = None if text is None else encoder.format.parse(text, row.is_response)
        found.append(Judged(scores[i], row.label, row.categories, row.language, verdict, text, row.kind, prompts[i].notes))
    return found


def check(encoder: Encoder, scoring: Scoring, decode: int | None) -> None:
    """Refuse what a model with a head of scores cannot be asked. Raises MegamodError."""
    if encoder.score is None:
        return
    severities_of(encoder.score)
    if decode != 0 or scoring != "whole":
        raise MegamodError(f"decode = {decode}, scoring = {scoring!r}: the model has {encoder.score}, which say no text")


# --- scoring -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a set of label strings is scored: which of their beginnings are fed, and what is asked after each token.

    An edge is a token after a beginning; a string's log-probability is the sum over its edges.
    """

    edges: tuple[tuple[Ids, int], ...]
    paths: tuple[tuple[Ids, tuple[int, ...]], ...]  # a beginning that is fed whole, and the edges asked along it
    strings: tuple[tuple[Severity, tuple[int, ...]], ...]  # a severity, and the edges of a string that says it

    @classmethod
    def of(cls, candidates: Sequence[Candidate], scoring: Scoring) -> "Plan":
        """Raises MegamodError where `first_token` cannot tell two severities apart."""
        if scoring == "first_token":
            candidates = _first_tokens(candidates)
        edges: dict[tuple[Ids, int], int] = {}
        strings = []
        for severity, ids in candidates:
            own = tuple(edges.setdefault((ids[:j], ids[j]), len(edges)) for j in range(len(ids)))
            strings.append((severity, own))
        fed = {ids[:-1] for _, ids in candidates}
        longest = sorted((path for path in fed if not any(_begins(other, path) for other in fed)), key=lambda path: (-len(path), path))
        paths, asked = [], set[int]()
        for path in longest:
            mine = sorted(
                (len(start), number) for (start, _), number in edges.items() if number not in asked and path[: len(start)] == start
            )
            asked.update(number for _, number in mine)
            paths.append((path, tuple(number for _, number in mine)))
        return cls(tuple(edges), tuple(paths), tuple(strings))

    @property
    def longest(self) -> int:
        """Tokens that the longest path adds to a prompt."""
        return max(len(path) for path, _ in self.paths)

    def queries(self, prompt: npt.NDArray[np.int32]) -> list[Query]:
        """One for each path."""
        return [
            Query(
                np.concatenate([prompt, np.array(path, np.int32)]),
                np.array([len(prompt) - 1 + len(self.edges[number][0]) for number in asked], np.int64),
                np.array([self.edges[number][1] for number in asked], np.int64),
            )
            for path, asked in self.paths
        ]

    def scores(self, answers: Sequence[Answer]) -> dict[Severity, float]:
        """The severities' probabilities, from the answers to `queries`."""
        logprob: dict[int, float] = {}
        for (_, asked), answer in zip(self.paths, answers, strict=True):
            logprob.update(zip(asked, answer.tolist(), strict=True))
        sums: dict[Severity, list[float]] = defaultdict(list)
        for severity, own in self.strings:
            sums[severity].append(sum(logprob[number] for number in own))
        totals = {severity: float(np.logaddexp.reduce(sums[severity])) for severity in SEVERITIES if severity in sums}
        whole = float(np.logaddexp.reduce(list(totals.values())))
        return {severity: math.exp(total - whole) for severity, total in totals.items()}


def _begins(longer: Ids, shorter: Ids) -> bool:
    return len(longer) > len(shorter) and longer[: len(shorter)] == shorter


def _first_tokens(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates up to the first token in which they differ."""
    alike = 0
    while all(len(ids) > alike for _, ids in candidates) and len({ids[alike] for _, ids in candidates}) == 1:
        alike += 1
    cut = {Candidate(severity, ids[: alike + 1]) for severity, ids in candidates}
    by_ids: dict[Ids, Severity] = {}
    for severity, ids in sorted(cut):
        other = by_ids.setdefault(ids, severity)
        if other != severity or len(ids) <= alike:
            raise MegamodError(f"scoring 'first_token': {severity!r} and {other!r} begin with the same token here: use scoring 'whole'")
    return sorted(cut)


class _Contexts:
    """Plans by what stands between prompt and verdict: the tokens of label strings are the same after every prompt."""

    def __init__(self, encoder: Encoder, scoring: Scoring) -> None:
        self._encoder, self._scoring = encoder, scoring
        self._plans: dict[tuple[bool, str], Plan] = {}

    def plan(self, row: Row) -> Plan:
        key = (row.is_response, self._encoder.lead(row))
        if key not in self._plans:
            self._plans[key] = Plan.of(self._encoder.candidates(row), self._scoring)
        return self._plans[key]


def _score(
    asker: "_Asker", prompts: Sequence[Prompts], plans: Sequence[Plan]
) -> tuple[list[dict[Severity, float]], list[npt.NDArray[np.int32]]]:
    """Each row's scores, and the window that they come from: the least safe."""
    queries = [[plan.queries(window) for window in own.windows] for own, plan in zip(prompts, plans, strict=True)]
    answers = iter(asker.ask([query for row in queries for window in row for query in window], _logprobs, "scoring"))
    scores, windows = [], []
    for own, plan, row in zip(prompts, plans, queries, strict=True):
        found = [plan.scores([next(answers) for _ in window]) for window in row]
        worst = min(range(len(found)), key=lambda i: found[i].get("safe", 0.0))
        scores.append(found[worst])
        windows.append(own.windows[worst])
    return scores, windows


# --- a head of scores ----------------------------------------------------------------------------------------------------------


def _classified(asker: "_Asker", rows: Sequence[Row]) -> list[Judged]:
    """Verdicts of a classifier. Raises MegamodError where its scores are of no severities."""
    score = asker.encoder.score
    assert score is not None
    severities = severities_of(score)
    prompts = [asker.encoder.prompts(row) for row in rows]
    queries = [Query(window, at, np.zeros(len(at), np.int64)) for own in prompts for window, at in zip(own.windows, own.asked, strict=True)]
    answers = iter(asker.ask(queries, _scores, "scoring"))
    found = []
    for row, own in zip(rows, prompts, strict=True):
        windows = [_severities(score, severities, next(answers)) for _ in own.windows]
        chances, categories = min(windows, key=lambda window: window[0]["safe"])  # the least safe
        severity = max(chances, key=lambda one: chances[one])
        # A verdict says categories; of a head without them, none is not the same as no category.
        verdict = Verdict(severity, () if severity == "safe" else categories) if {*score.labels} - {*SEVERITIES} else None
        found.append(Judged(chances, row.label, row.categories, row.language, verdict, None, row.kind, own.notes))
    return found


def severities_of(score: Score) -> list[Severity]:
    """The severities that a head of scores tells apart. Raises MegamodError for one that cannot judge."""
    found = [severity for severity in SEVERITIES if severity in score.labels]
    is_each = score.problem == "multi_label_classification" and not score.every_token  # a probability of its own for every label
    if score.problem == "regression" or not ({*score.labels} - {"safe"} if is_each else {"safe"} < {*found}):
        raise MegamodError(f"the model has {score}: scores of safe and of another severity, or of categories, were expected to judge with")
    return found


def _severities(score: Score, severities: Sequence[Severity], z: Answer) -> tuple[dict[Severity, float], tuple[str, ...]]:
    """The severities' probabilities, and the categories, from scores `[n, L]` of one token, or of every token of a text.

    Of one class the probabilities are the softmax over severities; of any number of classes a text is as unsafe as its likeliest class.
    Of every token, two in a row must say that the text is not safe before it is (as Qwen3Guard-Stream flags, arXiv:2510.14276): the
    pair counts whose safer token is the least safe, and of that pair the safer token. A single token speaks for itself.
    """
    others = [i for i, label in enumerate(score.labels) if label not in SEVERITIES]
    if score.problem == "multi_label_classification" and not score.every_token:
        likely = 1 / (1 + np.exp(-z[0]))  # [L]
        held = [i for i, label in enumerate(score.labels) if label != "safe"]
        worst = float(likely[held].max())
        return {"safe": 1 - worst, "unsafe": worst}, tuple(score.labels[i] for i in others if likely[i] > 0.5)
    own = z[:, [score.labels.index(severity) for severity in severities]]
    chances = np.exp(own - np.logaddexp.reduce(own, axis=1, keepdims=True))  # [n, severities]
    safe = chances[:, severities.index("safe")]
    pair = int(np.maximum(safe[:-1], safe[1:]).argmin()) if len(safe) > 1 else 0
    at = pair if len(safe) == 1 or safe[pair] >= safe[pair + 1] else pair + 1
    categories = (score.labels[max(others, key=lambda i: z[at, i])],) if others else ()
    return dict(zip(severities, chances[at].tolist(), strict=True)), categories


# --- decoding ----------------------------------------------------------------------------------------------------------------


class Drafts:
    """Guesses of how a text goes on, from those seen before: a trie with counts. They decide how fast, never what is decoded."""

    def __init__(self) -> None:
        self._root: dict[int, _Node] = {}

    def add(self, ids: Ids) -> None:
        """One more text."""
        children = self._root
        for token in ids:
            node = children.setdefault(token, _Node())
            node.count += 1
            children = node.children

    def after(self, begun: Ids) -> Ids:
        """The most usual continuation of `begun`; empty where it was never seen."""
        children = self._root
        for token in begun:
            if token not in children:
                return ()
            children = children[token].children
        guess: list[int] = []
        while children:
            guess.append(min(children, key=lambda token: (-children[token].count, token)))
            children = children[guess[-1]].children
        return tuple(guess)


class _Node:
    def __init__(self) -> None:
        self.count = 0
        self.children: dict[int, _Node] = {}


def _decode(
    asker: "_Asker",
    prompts: Sequence[npt.NDArray[np.int32]],
    rows: Sequence[Row],
    chosen: Sequence[Severity],
    contexts: _Contexts,
    limit: int,
) -> list[str]:
    """The greedy continuation of each prompt, without the end token and what the template puts before a verdict."""
    encoder = asker.encoder
    end = encoder.tokenizer.end
    drafts = Drafts()
    for row in rows:
        if row.verdict is not None:  # labels, where there are any, in their frequency; the scored severity else
            with suppress(MegamodError):  # one that the format has no word for is no help, and no fault
                drafts.add(tuple(encoder.answer(row).tolist()))
    opening: dict[int, Ids] = {}
    for i, (row, severity) in enumerate(zip(rows, chosen, strict=True)):
        plan = contexts.plan(row)
        opening[i] = next((*plan.edges[own[-1]][0], plan.edges[own[-1]][1]) for s, own in plan.strings if s == severity)
    said: list[Ids] = [() for _ in rows]
    open_ = set(range(len(rows)))
    while open_:
        order = sorted(open_)
        guesses, queries = [], []
        for i in order:
            begun = said[i]
            guess = drafts.after(begun) if begun else (*opening[i], *drafts.after(opening[i]))
            guess = guess[: limit - len(begun) - 1]
            guesses.append(guess)
            tokens = np.concatenate([prompts[i], np.array((*begun, *guess), np.int32)])
            at = np.arange(len(prompts[i]) + len(begun) - 1, len(tokens))
            queries.append(Query(tokens, at, np.zeros(len(at), np.int64)))
        for i, guess, answer in zip(order, guesses, asker.ask(queries, _greedy, "decoding"), strict=True):
            says = [int(x) for x in answer]
            right = next((j for j, token in enumerate(guess) if token != says[j]), len(guess))
            said[i] = (*said[i], *says[: right + 1])
            if end in said[i]:
                said[i] = said[i][: said[i].index(end) + 1]
            if end in said[i] or len(said[i]) >= limit:
                open_.remove(i)
                drafts.add(said[i])
    texts = []
    for row, ids in zip(rows, said, strict=True):
        text = encoder.tokenizer.decode([token for token in ids if token != end])
        texts.append(text.removeprefix(encoder.lead(row)).strip())
    return texts


# --- asking ------------------------------------------------------------------------------------------------------------------


class _Asker:
    """Queries in packed rows through the grid's forward-only schedule."""

    def __init__(self, chunks: Sequence[Decoder], grid: Grid, encoder: Encoder, progress: bool) -> None:
        self._chunks, self._grid, self._progress = chunks, grid, progress
        self._unit = grid.cp.size * grid.tp.size  # what rows are shared by, under sp
        assert encoder.limit is not None
        self._row_length = encoder.limit // self._unit * self._unit
        if not self._row_length:
            raise MegamodError(f"rows of {encoder.limit} tokens cannot be shared by cp {grid.cp.size} × tp {grid.tp.size}: use longer ones")
        self.encoder = replace(encoder, limit=self._row_length)

    def ask(self, queries: Sequence[Query], question: Question, what: str) -> list[Answer]:
        """The answers, in the queries' order, the same on every rank. `what` names it for the progress bar."""
        grid = self._grid
        if not queries:
            return []
        lengths = [len(query.tokens) for query in queries]
        row_length = self._fitted(lengths)
        packed = pack(lengths, row_length)
        each = grid.dp.size * grid.pp.size
        found: dict[int, Answer] = {}
        with tqdm(total=len(queries), desc=what, unit=" texts", delay=3, mininterval=1, disable=not self._progress) as bar:
            for first in range(0, len(packed), WAVE * each):
                rows = packed[first : first + WAVE * each].tolist()
                answers = collect_rows(self._chunks, rows, lambda row: self._batch([queries[i] for i in row], row_length), question, grid)
                for row, answer in zip(rows, answers, strict=True):
                    borders = np.cumsum([len(queries[i].at) for i in row])[:-1]
                    found.update(zip(row, np.split(answer, borders), strict=False))
                bar.update(sum(map(len, rows)))
        return [found[i] for i in range(len(queries))]

    def _fitted(self, lengths: Sequence[int]) -> int:
        """Rows no longer than a few texts need."""
        rows = self._grid.dp.size * self._grid.pp.size
        needed = max(max(lengths), math.ceil(sum(lengths) / rows))
        return min(self._row_length, math.ceil(needed / self._unit) * self._unit)

    def _batch(self, queries: Sequence[Query], capacity: int) -> Batch:
        """One packed row; what is left of it is a document that nothing is asked about."""
        tokens = [query.tokens for query in queries]
        rest = capacity - sum(map(len, tokens))
        lengths = [len(t) for t in tokens] + ([rest] if rest else [])
        starts = np.cumsum([0, *lengths])[:-1]
        at = np.concatenate([start + query.at for start, query in zip(starts, queries, strict=False)] or [np.zeros(0, np.int64)])
        ids = np.concatenate([query.ids for query in queries] or [np.zeros(0, np.int64)])
        return Batch(
            tokens=torch.from_numpy(np.concatenate([*tokens, np.zeros(rest, np.int64)]).astype(np.int64)),
            positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
            lengths=tuple(lengths),
            rows=torch.from_numpy(at.astype(np.int64)),
            labels=torch.from_numpy(ids.astype(np.int64)),
            verdict=torch.zeros(len(at), dtype=torch.bool),
            weight=torch.ones(len(at)),
            sequence=torch.from_numpy(np.repeat(np.arange(len(queries)), [len(query.at) for query in queries]).astype(np.int64)),
        )


def _logprobs(head: Head, batch: Batch) -> Tensor:
    return head.logprobs(batch.labels).double()


def _scores(head: Head, batch: Batch) -> Tensor:
    return head.scores().double()


def _greedy(head: Head, batch: Batch) -> Tensor:
    return head.greedy().double()
