"""Does a server say what our model says? The next token's five largest log-probabilities, from the server and from megamod.

    python tools/compare_server.py --url http://127.0.0.1:8000 --served mod --model BASE --adapter PEFT_DIR prompts.jsonl
    python tools/compare_server.py --url http://127.0.0.1:8000 --served mod --model CLASSIFIER --transformers prompts.jsonl
    torchrun --nproc-per-node 8 tools/compare_server.py --tp 8 …                  a model that needs several GPUs

The server is any that answers OpenAI's /v1/completions with log-probabilities. --served is its name for the model, or for the adapter:
`mod` of vLLM's `--lora-modules mod=PEFT_DIR`. --adapter is a PEFT directory, or the checkpoint that it was exported from; without it
the base alone is compared. A line of prompts.jsonl is a conversation, {"text": "…"} or {"messages": […]}; the model's chat template
makes tokens of it here, and these are sent (to a server that takes none: their text), so templates are not compared. A key that
the server asks for is read from OPENAI_API_KEY.

A model with a head of scores for whole texts is compared by the probabilities of its labels, which vLLM's /classify gives (of a reward
model: by its score); --transformers asks its AutoModelForSequenceClassification too.

Ends with status 1 when a log-probability, or a label's probability, differs by more than --tolerance. Servers compute in bfloat16 by
default, and logits of 16 to 32 then have steps of 1/8: with SmolLM2 vLLM and megamod were up to 0.3 apart, with or without an adapter,
and 3e-5 in float32. So compare in float32 (vLLM: --dtype float32), or with a larger --tolerance.
"""

import argparse
import http.client
import json
import math
import os
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megamod.batch import Batch
from megamod.command import command
from megamod.config import ChatConfig, Dtype, ModelConfig, ParallelConfig
from megamod.data import chat
from megamod.data.documents import IGNORED, Document, Integers
from megamod.data.jsonl import Row, read_rows
from megamod.data.packing import micro_batch, pack
from megamod.data.tokenizer import Tokenizer
from megamod.errors import MegamodError, listed, nearest
from megamod.model.build import DTYPES, build
from megamod.model.head import Head, ScoreHead
from megamod.model.lora import Adapters
from megamod.model.shape import Score, Shape, read_shape
from megamod.parallel import grid as grids
from megamod.parallel.collectives import on_first, together
from megamod.parallel.grid import Grid
from megamod.step import collect
from megamod.weights import peft
from megamod.weights.load import load, weights_at

TOP = 5  # the most that OpenAI's completions give
SECONDS = 300.0  # for an answer: some servers compile at the first
ID = "token_id:"  # how vLLM spells a token when it is asked for ids

# What it means that the base alone is within the tolerance too.
ALONE = {
    "equal": "the base alone is as near: these prompts do not tell whether the server has the adapter",
    "DIFFERENT": "the server says what the base alone would: under this name it has no adapter",
}

Token = int | str  # an id, or the text that a server gives instead
Answer = Mapping[Token, float]  # the largest log-probabilities


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="JSONL of conversations")
    parser.add_argument("--url", required=True, help="of the server: http://127.0.0.1:8000")
    parser.add_argument("--served", required=True, metavar="NAME", help="the server's name for the model or the adapter")
    parser.add_argument("--model", type=Path, required=True, metavar="BASE", help="a Hugging Face directory")
    parser.add_argument("--adapter", type=Path, help="on it: a PEFT directory, or a checkpoint of a LoRA run")
    parser.add_argument("--transformers", action="store_true", help="ask transformers as well: of a classifier, in float32")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of a log-probability or a probability; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="of megamod's computation; default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args(argv)
    if not args.tolerance >= 0:
        raise MegamodError(f"--tolerance {args.tolerance}: at least 0 was expected")
    shape = read_shape(args.model)
    check(shape, args)
    tokenizer = chat.encoder(chat.read_settings(args.model, ChatConfig()), str(args.model)).tokenizer
    prompts = [Prompt.of(row, tokenizer, shape.score) for row in read_rows(args.prompts)]
    server = Server(args.url, args.served)
    with grids.started(ParallelConfig(tp=args.tp), shape) as grid:
        # Before the model is loaded: the server may not be there.
        answers: Any = on_first(lambda: [server.ask(one) if shape.score is None else server.classify(one, shape.score) for one in prompts])
        adapters = {"adapter": args.adapter} if args.adapter is not None else {}
        ours = here(grid, shape, args.model, adapters, [prompt.ids for prompt in prompts], args.dtype)
        theirs = on_first(lambda: transformers_says(args.model, shape, prompts)) if args.transformers else None
        is_first = grid.rank == 0
    grids.leave()
    if shape.score is None:
        worst, lines = spoken(server, args.tolerance, Texts(tokenizer, shape.vocab), prompts, answers, ours)
    else:
        worst, lines = classified(server, args.tolerance, shape.score, prompts, answers, ours[None], theirs)
    if is_first:
        print(*lines, sep="\n")
    return int(not worst <= args.tolerance)  # also where it is no number


def check(shape: Shape, args: argparse.Namespace) -> None:
    """Raises MegamodError for what cannot be compared."""
    if shape.score is None and args.transformers:
        raise MegamodError(f"--transformers: {args.model} is no classifier: tools/compare_hf.py compares what has a vocabulary")
    if shape.score is not None and shape.score.every_token:
        raise MegamodError(f"{args.model}: it has {shape.score}: a head for whole texts was expected")
    if shape.score is not None and args.adapter is not None:
        raise MegamodError("--adapter: servers take no adapter that brings a head of scores: merge it (tools/adapter.py merge)")


class Prompt(NamedTuple):
    """A conversation as the model reads it, up to where its answer begins; for a head of scores, all of it."""

    text: str
    ids: Integers  # [t]
    where: str = ""  # file:line

    @classmethod
    def of(cls, row: Row, tokenizer: Tokenizer, score: Score | None = None) -> "Prompt":
        """Raises MegamodError where the chat template cannot take the row."""
        text = tokenizer.render(row.messages, prompt=score is None, where=row.where)
        return cls(text, tokenizer.encode(text).ids, row.where)


# --- the server ------------------------------------------------------------------------------------------------------------


class Server:
    """An OpenAI-compatible server, asked about one of its models.

    Args:
        url: with or without the final /v1.
        name: what it calls the model.
    """

    def __init__(self, url: str, name: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise MegamodError(f"--url {url}: http://… was expected")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.name = name
        self._takes_ids = True

    def ask(self, prompt: Prompt) -> Answer:
        """What it says of the token after `prompt`.

        Raises:
            MegamodError: no server there, no such model, or no log-probabilities in the answer.
        """
        plain = {"max_tokens": 1, "temperature": 0, "logprobs": TOP}
        answer = self._of(prompt, "/v1/completions", "prompt", plain, {"return_tokens_as_token_ids": True})
        top = _top(answer)
        if not top:
            raise MegamodError(
                f"{self.url}: no log-probabilities in the answer (choices[0].logprobs): a server that gives the {TOP} largest was expected"
            )
        return top

    def classify(self, prompt: Prompt, score: Score) -> list[float]:
        """The probabilities of the labels of `score`. Raises as `ask` does."""
        answer = self._of(prompt, "/classify", "input", {"add_special_tokens": False}, {})
        try:
            found = [float(value) for value in answer["data"][0]["probs"]]
        except (IndexError, KeyError, TypeError, ValueError):
            raise MegamodError(f"{self.url}: no probabilities in the answer (data[0].probs): vLLM's /classify was expected") from None
        if len(found) != len(score.labels):
            raise MegamodError(f"{self.url}: {len(found)} probabilities in the answer, and the model has {score}: is it another model?")
        return found

    def _of(self, prompt: Prompt, path: str, key: str, options: Mapping[str, Any], of_ids: Mapping[str, Any]) -> dict[str, Any]:
        """The answer about `prompt`, sent as ids where the server takes them. Raises MegamodError."""
        plain = {"model": self.name, **options}
        if self._takes_ids:
            status, answer = self._post(path, {**plain, **of_ids, key: prompt.ids.tolist()})
            if status in (400, 422):  # not the server's words for it: text is what every server takes
                self._takes_ids = False
        if not self._takes_ids:
            status, answer = self._post(path, {**plain, key: prompt.text})
        if status != 200:
            raise MegamodError(self._refusal(path, status, answer))
        read = (answer.get("usage") or {}).get("prompt_tokens", len(prompt.ids))
        if read != len(prompt.ids):
            how = "" if self._takes_ids else "it takes no token ids, and its tokenizer is another or adds tokens"
            raise MegamodError(f"{self.url}: read a prompt of {len(prompt.ids)} tokens as {read}: {how or 'they were sent as ids'}")
        return answer

    def models(self) -> list[str]:
        """The names that it serves; empty where it does not say."""
        status, answer = self._post("/v1/models", None)
        data = answer.get("data") if status == 200 else None
        return [one["id"] for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)] if isinstance(data, list) else []

    def _refusal(self, path: str, status: int, answer: Mapping[str, Any]) -> str:
        names = self.models()
        if names and self.name not in names:
            return f"{self.url}: serves no model {self.name!r}, {nearest(self.name, names)}"
        error = answer.get("error", answer.get("detail", answer))  # OpenAI's, and FastAPI's where it has no such page
        said = error.get("message", error) if isinstance(error, dict) else error
        return f"{self.url}{path}: status {status}: {said or 'an empty answer'}"

    def _post(self, path: str, body: Mapping[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer; a GET where there is no body."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            request = urllib.request.Request(self.url + path, None if body is None else json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as response:
                    status, text = response.status, response.read()
            except urllib.error.HTTPError as error:
                status, text = error.code, error.read()
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
            raise MegamodError(f"{self.url}: no server answers there ({getattr(error, 'reason', error)}): see --url") from None
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            if status == 200:
                raise MegamodError(f"{self.url}{path}: not a JSON object: an OpenAI-compatible server was expected")
            answer = {"error": text.decode("utf-8", "replace")[:200]}
        return status, answer


def on_server(server: Server) -> list[str]:
    """Its models; empty also where it has gone away."""
    try:
        return server.models()
    except MegamodError:
        return []


def _top(answer: Mapping[str, Any]) -> Answer:
    """The log-probabilities of an answer's first token, in the spelling of completions or that of chat; empty: there are none."""
    try:
        about = answer["choices"][0]["logprobs"]
        if about.get("top_logprobs"):
            return {_token(token): float(value) for token, value in about["top_logprobs"][0].items()}
        return {_token(one["token"]): float(one["logprob"]) for one in about["content"][0]["top_logprobs"]}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return {}


def _token(token: Any) -> Token:
    if isinstance(token, str) and token.startswith(ID):
        return int(token.removeprefix(ID))
    return token if isinstance(token, int) else str(token)


# --- megamod ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def here(
    grid: Grid, shape: Shape, base: str | Path, adapters: Mapping[str, str | Path], prompts: Sequence[Integers], dtype: Dtype | None = None
) -> dict[str | None, Tensor]:
    """log p of the token after each prompt, `[P, V]`: by the name of the adapter that counts, and None, the base alone.

    Of a classifier the probabilities of its labels after each prompt, `[P, L]`.

    Raises:
        MegamodError: no model or adapter there, or a prompt that is longer than this model reads.
    """
    longest = max(map(len, prompts))
    if shape.longest_document is not None and longest > shape.longest_document:
        raise MegamodError(f"a prompt has {longest} tokens: this model reads up to {shape.longest_document}")
    chosen: Dtype = dtype or ("bfloat16" if grid.device.type == "cuda" else "float32")
    opened = together(lambda: {name: peft.opened(where, shape) for name, where in adapters.items()}) or {}
    chunks, _ = build(ModelConfig(path=str(base), dtype=chosen), shape, grid)
    together(lambda: load(chunks, shape, grid, weights_at(base, shape, 0), where=str(base)))
    beside = Adapters(chunks, shape, grid, {name: one.config for name, one in opened.items()})
    for adapter, one in opened.items():
        together(partial(beside.fill, adapter, one))
    for chunk in chunks:
        chunk.to(grid.device)
    documents = [_asked(prompt) for prompt in prompts]
    capacity = longest + 1
    rows = pack([len(document.tokens) for document in documents], capacity)
    batches = [micro_batch([[documents[i] for i in row]], capacity) for row in rows]
    order = torch.from_numpy(np.argsort(np.concatenate(list(rows))))
    result: dict[str | None, Tensor] = {}
    names: list[str | None] = [None, *opened]
    for name in names:
        with beside.using(name):
            found = collect(chunks, batches, _answered, grid)
        result[name] = torch.cat(found)[order]
    return result


def _answered(head: Head, batch: Batch) -> Tensor:
    return probabilities(head.scores(), head.score) if isinstance(head, ScoreHead) else head.logits().log_softmax(-1)


def _asked(prompt: Integers) -> Document:
    """The prompt and one token more, which is what a head is asked about."""
    labels = np.full(len(prompt) + 1, IGNORED, np.int64)
    labels[-1] = 0
    return Document(np.append(prompt, 0), labels, np.zeros(len(labels), np.bool_))


# --- classifiers -----------------------------------------------------------------------------------------------------------


def classified(
    server: Server, tolerance: float, score: Score, prompts: Sequence[Prompt], answers: Sequence[Sequence[float]], ours: Tensor,
    theirs: Tensor | None,
) -> tuple[float, list[str]]:  # fmt: skip
    """The largest difference of the server, or of transformers, from `ours` `[P, L]`; and what there is to say of it."""
    said = torch.tensor(answers, dtype=ours.dtype)
    off = apart(said, ours)
    lines = []
    for prompt, served, own, far in zip(prompts, said, ours, off.tolist(), strict=True):
        at = int(served.argmax())
        both = f"{score.labels[at]}: {served[at]:.4f}, here {own[at]:.4f}"
        lines.append(f"{prompt.where}: {len(prompt.ids)} tokens, {both}; largest difference {far:.1e}")
    worst, others = float(off.max()), ""
    if theirs is not None:
        both = float(apart(theirs, ours).max()), float(apart(theirs, said).max())
        worst, others = max(worst, *both), f", of transformers {both[0]:.1e} from here and {both[1]:.1e} from the server"
    verdict = "equal" if worst <= tolerance else "DIFFERENT"
    summary = f"{verdict}: {len(prompts)} texts, largest difference {float(off.max()):.1e}{others}, tolerance {tolerance:g}"
    lines.append(f"{server.url}, {server.name}: {summary}")
    if float(apart(ours[:1], ours).max()) <= tolerance:
        lines.append("the model says much the same of all these texts: they do not tell it from another one")
    return worst, lines


@torch.no_grad()
def transformers_says(model: Path, shape: Shape, prompts: Sequence[Prompt]) -> Tensor:
    """`[P, L]`: `probabilities` by transformers' own class, prompt by prompt, in float32. Raises MegamodError where it cannot load it."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    assert shape.score is not None
    logging.disable_progress_bar()
    found: Any
    try:
        found, about = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers raises whatever its parsers raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise MegamodError(f"{model}: transformers cannot load a classifier from it: {reason}") from None
    if about["missing_keys"]:
        raise MegamodError(f"{model}: transformers finds no {listed(sorted(map(str, about['missing_keys'])))} in it")
    logits = [found.eval()(torch.from_numpy(prompt.ids).long()[None]).logits[0] for prompt in prompts]
    return probabilities(torch.stack(logits), shape.score)


def probabilities(scores: Tensor, score: Score) -> Tensor:
    """What servers make of scores `[P, L]`: the labels' probabilities; a regression's stay as they are."""
    if score.problem == "single_label_classification":
        return scores.softmax(-1)
    return scores.sigmoid() if score.problem == "multi_label_classification" else scores


def apart(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference of each prompt, `[P]`. Infinite where one is NaN."""
    return (one - other).abs().nan_to_num(nan=math.inf).amax(-1)


# --- models that speak -----------------------------------------------------------------------------------------------------


def spoken(
    server: Server, tolerance: float, texts: "Texts", prompts: Sequence[Prompt], answers: Sequence[Answer],
    ours: Mapping[str | None, Tensor],
) -> tuple[float, list[str]]:  # fmt: skip
    """The largest difference from what counts here, the adapter or the base alone; and what there is to say of it."""
    name = next(reversed(ours))
    found, alone = (
        [difference(texts.ids(answer, own), own) for answer, own in zip(answers, of, strict=True)] for of in (ours[name], ours[None])
    )
    lines = []
    for prompt, answer, own, off in zip(prompts, answers, ours[name], found, strict=True):
        token, said = max(texts.ids(answer, own).items(), key=lambda item: item[1])
        both = f"{texts.of(token)!r}: {said:.4f}, here {float(own[token]):.4f}"
        lines.append(f"{prompt.where}: {len(prompt.ids)} tokens, then {both}; largest difference {off:.1e}")
    worst, base = max(found), max(alone)
    verdict = "equal" if worst <= tolerance else "DIFFERENT"
    beside = f", of the base alone {base:.1e}" if name is not None else ""
    summary = f"{verdict}: {len(prompts)} prompts, largest difference {worst:.1e}{beside}, tolerance {tolerance:g}"
    lines.append(f"{server.url}, {server.name}: {summary}")
    if name is not None and base <= tolerance:
        lines.append(ALONE[verdict])
    elif verdict == "DIFFERENT" and (names := on_server(server)) and server.name not in names:
        lines.append(f"the server does not list {server.name!r}, {nearest(server.name, names)}")
    return worst, lines


class Texts:
    """Which tokens a text may be, for servers that give no ids; read from the tokenizer when the first asks."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._tokenizer, self._vocab = tokenizer, vocab
        self._known: dict[str, list[int]] = {}

    def ids(self, answer: Answer, ours: Tensor) -> dict[int, float]:
        """`answer` by token ids; of several tokens with one text, the likeliest.

        Raises:
            MegamodError: a token that the model does not have.
        """
        return {self._id(token, ours): value for token, value in answer.items()}

    def of(self, token: int) -> str:
        """A token's text."""
        return self._tokenizer.decode([token])

    def _id(self, token: Token, ours: Tensor) -> int:
        candidates = self._spelled(token) if isinstance(token, str) else [token] * (0 <= token < self._vocab)
        if not candidates:
            raise MegamodError(f"the server speaks of the token {token!r}, which the model's tokenizer does not have: is it another model?")
        return max(candidates, key=lambda i: float(ours[i]))

    def _spelled(self, text: str) -> list[int]:
        if not self._known:
            found = defaultdict(list)
            for i in range(min(self._vocab, len(self._tokenizer))):
                found[self._tokenizer.decode([i])].append(i)
            self._known = dict(found)
        return self._known.get(text, [])


def difference(server: Mapping[int, float], ours: Tensor) -> float:
    """The largest by which the server's log-probabilities differ from `ours` `[V]`.

    A token that is among the largest here and not there has at most the smallest there. Infinite where one is NaN.
    """
    off = [abs(value - float(ours[token])) for token, value in server.items()]
    values, ids = ours.topk(min(len(server), len(ours)))
    smallest = min(server.values())
    off += [value - smallest for value, token in zip(values.tolist(), ids.tolist(), strict=True) if token not in server]
    return math.inf if any(map(math.isnan, off)) else max(off)  # max may pass over NaN


if __name__ == "__main__":
    sys.exit(main())
