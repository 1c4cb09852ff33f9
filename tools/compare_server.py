"""Does a server say what our model says? The next token's five largest log-probabilities, from the server and from megamod.

    python tools/compare_server.py --url http://127.0.0.1:8000 --served mod --model BASE --adapter PEFT_DIR prompts.jsonl
    torchrun --nproc-per-node 8 tools/compare_server.py --tp 8 …                  a model that needs several GPUs

The server is any that answers OpenAI's /v1/completions with log-probabilities. --served is its name for the model, or for the adapter:
`mod` of vLLM's `--lora-modules mod=PEFT_DIR`. --adapter is a PEFT directory, or the checkpoint that it was exported from; without it
the base alone is compared. A line of prompts.jsonl is a conversation, {"text": "…"} or {"messages": […]}; the model's chat template
makes tokens of it here, and these are sent (to a server that takes none: their text), so templates are not compared. A key that
the server asks for is read from OPENAI_API_KEY.

Ends with status 1 when a log-probability differs by more than --tolerance. Servers compute in bfloat16 by default, and logits of 16
to 32 then have steps of 1/8: with SmolLM2 vLLM and megamod were up to 0.3 apart, with or without an adapter, and 3e-5 in float32.
So compare in float32 (vLLM: --dtype float32), or with a larger --tolerance.
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

from megamod.command import command
from megamod.config import ChatConfig, Dtype, ModelConfig, ParallelConfig
from megamod.data import chat
from megamod.data.documents import IGNORED, Document, Integers
from megamod.data.jsonl import Row, read_rows
from megamod.data.packing import micro_batch, pack
from megamod.data.tokenizer import Tokenizer
from megamod.errors import MegamodError, nearest
from megamod.model.build import DTYPES, build
from megamod.model.lora import Adapters
from megamod.model.shape import Shape, read_shape
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
    parser.add_argument("--tolerance", type=float, default=0.05, help="of a log-probability; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="of megamod's computation; default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args(argv)
    if not args.tolerance >= 0:
        raise MegamodError(f"--tolerance {args.tolerance}: at least 0 was expected")
    shape = read_shape(args.model)
    tokenizer = chat.encoder(chat.read_settings(args.model, ChatConfig()), str(args.model)).tokenizer
    prompts = [Prompt.of(row, tokenizer) for row in read_rows(args.prompts)]
    server = Server(args.url, args.served)
    with grids.started(ParallelConfig(tp=args.tp), shape) as grid:
        answers = on_first(lambda: [server.ask(prompt) for prompt in prompts])  # before the model is loaded: it may not be there
        adapters = {"adapter": args.adapter} if args.adapter is not None else {}
        ours = next_tokens(grid, shape, args.model, adapters, [prompt.ids for prompt in prompts], args.dtype)
        is_first = grid.rank == 0
    grids.leave()
    counted = ours["adapter" if adapters else None]
    texts = Texts(tokenizer, shape.vocab)
    found = [difference(texts.ids(answer, own), own) for answer, own in zip(answers, counted, strict=True)]
    worst = max(found)
    base = max(difference(texts.ids(answer, own), own) for answer, own in zip(answers, ours[None], strict=True))
    if is_first:
        for prompt, answer, own, off in zip(prompts, answers, counted, found, strict=True):
            token, said = max(texts.ids(answer, own).items(), key=lambda item: item[1])
            both = f"{tokenizer.decode([token])!r}: {said:.4f}, here {float(own[token]):.4f}"
            print(f"{prompt.where}: {len(prompt.ids)} tokens, then {both}; largest difference {off:.1e}")
        verdict = "equal" if worst <= args.tolerance else "DIFFERENT"
        alone = f", of the base alone {base:.1e}" if adapters else ""
        summary = f"{verdict}: {len(prompts)} prompts, largest difference {worst:.1e}{alone}, tolerance {args.tolerance:g}"
        print(f"{args.url}, {args.served}: {summary}")
        if adapters and base <= args.tolerance:
            print(ALONE[verdict])
        elif verdict == "DIFFERENT" and (names := on_server(server)) and args.served not in names:
            print(f"the server does not list {args.served!r}, {nearest(args.served, names)}")
    return int(not worst <= args.tolerance)  # also where it is no number


class Prompt(NamedTuple):
    """A conversation as the model reads it, up to where its answer begins."""

    text: str
    ids: Integers  # [t]
    where: str = ""  # file:line

    @classmethod
    def of(cls, row: Row, tokenizer: Tokenizer) -> "Prompt":
        """Raises MegamodError where the chat template cannot take the row."""
        text = tokenizer.render(row.messages, prompt=True, where=row.where)
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
        plain = {"model": self.name, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
        if self._takes_ids:
            status, answer = self._post("/v1/completions", {**plain, "prompt": prompt.ids.tolist(), "return_tokens_as_token_ids": True})
            if status in (400, 422):  # not the server's words for it: everything below is OpenAI's own
                self._takes_ids = False
        if not self._takes_ids:
            status, answer = self._post("/v1/completions", {**plain, "prompt": prompt.text})
        if status != 200:
            raise MegamodError(self._refusal(status, answer))
        read = (answer.get("usage") or {}).get("prompt_tokens", len(prompt.ids))
        if read != len(prompt.ids):
            how = "" if self._takes_ids else "it takes no token ids, and its tokenizer is another or adds tokens"
            raise MegamodError(f"{self.url}: read a prompt of {len(prompt.ids)} tokens as {read}: {how or 'they were sent as ids'}")
        top = _top(answer)
        if not top:
            raise MegamodError(
                f"{self.url}: no log-probabilities in the answer (choices[0].logprobs): a server that gives the {TOP} largest was expected"
            )
        return top

    def models(self) -> list[str]:
        """The names that it serves; empty where it does not say."""
        status, answer = self._post("/v1/models", None)
        data = answer.get("data") if status == 200 else None
        return [one["id"] for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)] if isinstance(data, list) else []

    def _refusal(self, status: int, answer: Mapping[str, Any]) -> str:
        names = self.models()
        if names and self.name not in names:
            return f"{self.url}: serves no model {self.name!r}, {nearest(self.name, names)}"
        error = answer.get("error", answer)
        said = error.get("message", error) if isinstance(error, dict) else error
        return f"{self.url}/v1/completions: status {status}: {said or 'an empty answer'}"

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
def next_tokens(
    grid: Grid, shape: Shape, base: str | Path, adapters: Mapping[str, str | Path], prompts: Sequence[Integers], dtype: Dtype | None = None
) -> dict[str | None, Tensor]:
    """log p of the token after each prompt, `[P, V]`: by the name of the adapter that counts, and None, the base alone.

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
            found = collect(chunks, batches, lambda head, batch: head.logits().log_softmax(-1), grid)
        result[name] = torch.cat(found)[order]
    return result


def _asked(prompt: Integers) -> Document:
    """The prompt and one token more, which is what a head is asked about."""
    labels = np.full(len(prompt) + 1, IGNORED, np.int64)
    labels[-1] = 0
    return Document(np.append(prompt, 0), labels, np.zeros(len(labels), np.bool_))


# --- both ------------------------------------------------------------------------------------------------------------------


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
