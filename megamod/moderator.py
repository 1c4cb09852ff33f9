"""A model that judges, from a notebook or a tool: a Hugging Face directory or a run's checkpoint, on this process's grid.

with Moderator("runs/quickstart/hf/step-00000360") as moderator:
    for judged in moderator.judge(["I will find out where you live."], decode=None):
        print(judged.scores, judged.verdict)
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megamod import checkpoint
from megamod.config import ChatConfig, Dtype, ModelConfig, ParallelConfig, Scoring
from megamod.data import chat
from megamod.data.jsonl import Row, row_of
from megamod.errors import MegamodError
from megamod.evaluate.judge import judge
from megamod.evaluate.metrics import Judged
from megamod.model.build import build
from megamod.model.lora import Adapters
from megamod.model.shape import read_shape, score_from_json
from megamod.parallel import grid as grids
from megamod.parallel.collectives import together
from megamod.verdicts import Format
from megamod.weights import fingerprint, peft
from megamod.weights.bitsandbytes import four_bits, quantised
from megamod.weights.load import Source, load, weights_at

Conversation = str | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Row  # a user's message, `messages`, a JSONL row, a Row


class Moderator:
    """Loads the model once; `judge` then takes any number of conversations.

    Alone it joins a world of one; under torchrun every rank makes one and calls it alike. One grid at a time: close it, or use
    `with`, before the next one or a training run.

    Args:
        path: a Hugging Face directory, or a checkpoint of a run: `<run>/checkpoints/step-…`; with the base beneath it, if it is one
            of an adapter.
        adapters: further adapters on the same base, name → PEFT directory or checkpoint; `using` chooses among them.
        parallel: the grid.
        dtype: None: bfloat16 on a GPU, float32 elsewhere.
        format: the verdict format; None: what the first adapter's or the model's directory says (`moderation.json`, the checkpoint's
            run), else qwen3guard.
        row_length: tokens of a packed row; a longer conversation is read in windows.

    Raises:
        MegamodError: no model there, one that the grid does not fit, or a tokenizer that cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        parallel: ParallelConfig | None = None,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        dtype: Dtype | None = None,
        format: str | Format | None = None,
        row_length: int = 4096,
    ) -> None:
        origin, masters, settings, own = _open(Path(path))
        paths = {**(adapters or {}), **own}  # a given one comes first, and so counts
        if len(paths) < len(adapters or {}) + len(own):
            raise MegamodError(f"adapters: {next(iter(own))!r} is the name of the checkpoint's own adapter: use another")
        if adapters:
            settings = _settings(Path(next(iter(adapters.values()))), settings)
        if format is not None:
            settings = replace(settings, format=format)
        shape = read_shape(origin)
        if masters is not None:
            shape = shape.scored(score_from_json(masters.about.get("shape", {}).get("score"), f"{path}: shape.score"))
        elif paths:
            shape = peft.shape_with(next(iter(paths.values())), shape)
        source: Source = masters or weights_at(origin, shape, 0)  # where a head of scores would be drawn, an adapter brings its own
        opened = {name: peft.opened(where, shape) for name, where in paths.items()}
        for name, one in opened.items():
            source = quantised(source, one.quantization, name)
        if (in_4_bits := four_bits(source)) is not None:
            shape = shape.quantized(in_4_bits.quantization)
        if row_length < 1:
            raise MegamodError(f"row_length = {row_length}: must be at least 1")
        # Beyond its window, or the length that its RoPE was trained for, the model would be another one.
        row_length = min(row_length, shape.longest_document or row_length)
        self._grid = grids.start(parallel or ParallelConfig(), shape, seed=1)
        try:
            chosen: Dtype = dtype or ("bfloat16" if self._grid.device.type == "cuda" else "float32")
            self._chunks, _ = build(ModelConfig(path=str(origin), dtype=chosen), shape, self._grid)
            items = together(lambda: load(self._chunks, shape, self._grid, source, where=str(path)))
            assert items is not None
            if any(one.base is not None for one in opened.values()):
                base = fingerprint.of_model(items, self._grid)
                for name, one in opened.items():
                    peft.check_fingerprint(one, base, name)
            self._adapters = Adapters(self._chunks, shape, self._grid, {name: one.config for name, one in opened.items()})
            for name, one in opened.items():
                together(partial(self._adapters.fill, name, one))
            for chunk in self._chunks:
                chunk.to(self._grid.device).requires_grad_(False)
            encoder = together(lambda: chat.encoder(settings, str(origin), row_length, shape.score))
        except MegamodError:
            self.close()
            raise
        assert encoder is not None
        self._encoder = encoder

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what all know."""
        return self._grid.rank == 0

    def judge(
        self,
        conversations: Sequence[Conversation],
        *,
        scoring: Scoring = "whole",
        decode: int | None = 0,
        max_new_tokens: int = 128,
    ) -> list[Judged]:
        """Judge each of them: `scores` always, `text` and `verdict` for the first `decode` of them (None: for all).

        See `megamod.evaluate.judge.judge`. Every rank has the result.
        """
        if isinstance(conversations, str):
            raise MegamodError("judge takes a list of conversations: judge([text])")
        rows = [_row(conversation, i) for i, conversation in enumerate(conversations)]
        with torch.no_grad():
            return judge(self._chunks, self._grid, rows, self._encoder, scoring=scoring, decode=decode, max_new_tokens=max_new_tokens)

    def using(self, adapter: str | None) -> AbstractContextManager[None]:
        """`with moderator.using(None):` — inside, that adapter counts, or with None the base alone. Outside it is the first there is.

        Raises:
            MegamodError: there is no such adapter.
        """
        return self._adapters.using(adapter)

    def close(self) -> None:
        """Give up the grid; the process stays joined, and may start another."""
        grids.stop()

    def __enter__(self) -> "Moderator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path) -> tuple[Path, checkpoint.Masters | None, ChatConfig, dict[str, str | Path]]:
    """Where tokenizer and config.json are, a full run's weights, how conversations became tokens, and the path's own adapter."""
    if (path / "config.json").is_file():
        return path, None, chat.read_settings(path, ChatConfig()), {}
    if (path / "manifest.json").is_file():
        masters = checkpoint.Masters(path)
        origin, settings = Path(str(masters.about.get("model.path"))), chat.of_run(masters.about, path)
        if not origin.is_dir():
            raise MegamodError(f"{path}: its run began from {origin}, which is not here: judge where the run was started, or its export")
        return (origin, None, settings, {"default": path}) if masters.about.get("lora") else (origin, masters, settings, {})
    raise MegamodError(f"{path}: neither a Hugging Face directory (config.json) nor a run's checkpoint (<run>/checkpoints/step-…)")


def _settings(adapter: Path, default: ChatConfig) -> ChatConfig:
    """How an adapter's run made tokens of conversations, where that is known."""
    at = peft.checkpoint_at(adapter)
    if at is None:
        return chat.read_settings(adapter, default)
    about = checkpoint.Masters(at).about
    return chat.of_run(about, at) if "data.chat" in about else default


def _row(conversation: Conversation, number: int) -> Row:
    if isinstance(conversation, Row):
        return conversation
    if isinstance(conversation, str):
        conversation = {"text": conversation}
    return row_of(conversation if isinstance(conversation, Mapping) else {"messages": list(conversation)}, f"conversation {number}")
