"""The reference model: whose log-probabilities a preference loss compares with, and what KTO takes its KL from.

Both are asked of whole micro-batches before the training pass, by `step.collect`: forward only, dropout off. `config.ReferenceConfig`
says which model it is; the loss reads `batch.reference` and does not know.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megamod import files, losses
from megamod.batch import Answers, Batch
from megamod.config import RunConfig
from megamod.data.documents import Documents
from megamod.data.packing import grouped, micro_batch, pack
from megamod.data.stored import Compared, Floats, asked
from megamod.errors import MegamodError
from megamod.model.build import Decoder, build
from megamod.model.head import Head
from megamod.model.lora import REFERENCE, Adapters, Plan
from megamod.model.shape import Shape, read_shape
from megamod.parallel import grid as grids
from megamod.parallel.collectives import gathered, on_first, together
from megamod.parallel.grid import Grid
from megamod.step import Chunks, collect, collect_rows
from megamod.weights import fingerprint, peft
from megamod.weights.bitsandbytes import quantised
from megamod.weights.load import Source, load, weights_at
from megamod.weights.table import Held, Placed

Place = Literal["nowhere", "copy", "beside", "beneath"]
WAVE = 16  # packed rows of each data-parallel rank and stage between two parts of what is stored


def is_asked(cfg: RunConfig) -> bool:
    """Whether the loss needs the reference, to compare with or as a teacher."""
    return bool(losses.needs_of(cfg.loss) & {"reference", "teacher"})


def place_of(cfg: RunConfig) -> Place:
    """Where the run's reference is in memory: a second model, an adapter beside the trained one, or the base beneath it."""
    r, lora = cfg.reference, cfg.lora
    if not is_asked(cfg) or r.kind in ("stored", "uniform"):
        return "nowhere"
    if r.kind == "model" or lora is None:
        return "copy"
    # The start of a new adapter is the base alone; a reference that follows it is an adapter too.
    is_adapter = r.kind == "adapter" or (r.kind == "start" and (lora.path is not None or r.sync_every is not None))
    return "beside" if is_adapter else "beneath"


def is_copy(cfg: RunConfig) -> bool:
    """Whether the reference is a second model in memory."""
    return place_of(cfg) == "copy"


def adapter_beside(cfg: RunConfig, shape: Shape, plan: Plan | None) -> peft.Adapter | Plan | None:
    """What `Plan.attach` puts beside the trained adapter: the reference, where that is an adapter of its own.

    Raises:
        MegamodError: see `peft.opened`.
    """
    if place_of(cfg) != "beside":
        return None
    assert cfg.lora is not None
    path = cfg.reference.path if cfg.reference.kind == "adapter" else cfg.lora.path
    return plan if path is None else peft.opened(path, shape)


class Reference:
    """Gives a step's micro-batches what the loss needs beside the data. Every rank makes one, and calls it alike.

    Args:
        cfg: of the run: its `reference`, and its loss, which says what it needs.
        chunks: the trained model's, bare or wrapped.
        items: where its trained parameters lie.
        adapters: of a run with adapters, among them REFERENCE where `adapter_beside` gave one.
        source: the weights that the run begins from.
        stored: the documents with what is stored of them, of a reference of kind stored.

    Attributes:
        items: the weights that follow the trained model's, to be kept in checkpoints; none where the reference stays as it is.
        identity: which model it is at first; a resumed run must have the same.
    """

    def __init__(
        self, cfg: RunConfig, shape: Shape, grid: Grid, chunks: Chunks, items: Sequence[Placed], adapters: Adapters | None, source: Source,
        stored: Compared | None = None,
    ) -> None:  # fmt: skip
        self._cfg, self._grid, self._policy, self._trained = cfg.reference, grid, chunks, items
        self._needs = losses.needs_of(cfg.loss)
        self._chunks: Chunks = chunks
        self._using: Callable[[], AbstractContextManager[None]] = nullcontext
        self.items: Sequence[Placed] = ()
        self._followers: Sequence[Placed] = ()  # what of `items` the model holds, rounded where that is needed
        own: Sequence[Held] = ()
        kind = cfg.reference.kind
        self.identity: str = kind if stored is None else f"{kind} {stored.digest}"
        place = place_of(cfg)
        if place == "copy":
            self._chunks, own = _copy(cfg, shape, grid, source)
        elif place != "nowhere":
            assert adapters is not None
            name = REFERENCE if place == "beside" else None
            self._using = partial(adapters.using, name)
            own = adapters.placed[name] if name is not None else ()
        if own:
            self.identity = f"{kind} {fingerprint.of_model(own, grid)}"
        if cfg.reference.sync_every is not None:
            self.identity += f", synchronised with {cfg.reference.sync_alpha}"
            self._followers = [item for item in own if isinstance(item, Placed)]
            self.items = [_exact(item) for item in self._followers] if cfg.reference.sync_alpha < 1 else self._followers

    def complete(self, batches: Sequence[Batch], mismatched: Callable[[], Sequence[Batch]]) -> list[Batch]:
        """The micro-batches with what the loss needs of `reference`, `teacher`, `kl` and `step`; on the last stage, which alone reads them.

        Args:
            mismatched: makes the micro-batches of prompts with other rows' answers: `Loader.mismatched`.
        """
        if "reference" in self._needs:
            batches = self._compared(batches)
        if "teacher" in self._needs and self._cfg.kind != "stored":
            with self._using():
                answers = collect(self._chunks, batches, partial(_taught, top_k=self._cfg.top_k), self._grid)
            if self._grid.is_last_stage:
                batches = [replace(batch, taught=taught) for batch, taught in zip(batches, answers, strict=True)]
        if "kl" in self._needs:
            divergence = self._kl(mismatched())
            batches = [replace(batch, divergence=divergence) for batch in batches]
        if "step" in self._needs:
            batches = self._answers(batches)
        return list(batches)

    def follow(self, step: int) -> None:
        """After step `step`, which counts from 1: move the reference towards the trained model, where it is time to."""
        if self._cfg.sync_every is None or step % self._cfg.sync_every:
            return
        with torch.no_grad():
            for mine, theirs in zip(self.items, self._trained, strict=True):
                mine.param.lerp_(theirs.param.to(mine.param.dtype), self._cfg.sync_alpha)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Give the reference model what `items` hold. Also after a checkpoint is read."""
        for mine, held in zip(self.items, self._followers, strict=True):
            held.param.copy_(mine.param)

    def _compared(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        if self._cfg.kind == "stored":
            return batches
        if self._cfg.kind == "uniform":
            return [replace(batch, stored=torch.zeros(len(batch.labels))) for batch in batches]
        with self._using():
            answers = collect(self._chunks, batches, _logprobs, self._grid)
        if not self._grid.is_last_stage:
            return batches
        return [replace(batch, stored=answer) for batch, answer in zip(batches, answers, strict=True)]

    def _kl(self, batches: Sequence[Batch]) -> Tensor | None:
        """Mean over answers of log π/π_ref, at least 0, the same on every rank of the last stage; None elsewhere."""
        own = collect(self._policy, batches, _logprobs, self._grid)
        compared = self._compared(batches)
        if not self._grid.is_last_stage:
            return None
        difference = sum((mine.double() - batch.reference.double()).sum() for mine, batch in zip(own, compared, strict=True))
        answers = sum((batch.side != 0).sum() for batch in batches)
        both = torch.tensor([float(difference), float(answers)], dtype=torch.float64, device=self._grid.device)
        dist.all_reduce(both, group=self._grid.dp.group)
        return (both[0] / both[1]).clamp(min=0).to(own[0].dtype)

    def _answers(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """What the trained model and the reference say of each document of the step, on every data-parallel rank."""
        own = collect(self._policy, batches, _logprobs, self._grid)
        if not self._grid.is_last_stage:
            return batches
        by_rank = gathered([batch.alone(logprob) for batch, logprob in zip(batches, own, strict=True)], self._grid.dp.group)
        before = sum(map(len, by_rank[: self._grid.dp.rank]))
        found = Answers.joined([part for rank in by_rank for part in rank])[before:]
        return [replace(batch, answers=answers) for batch, answers in zip(batches, found, strict=False)]


def _logprobs(head: Head, batch: Batch) -> Tensor:
    return head.logprobs(batch.labels)


def _taught(head: Head, batch: Batch, top_k: int) -> Tensor:
    """`[N, K, 2]`."""
    values, ids = head.topk(top_k)
    return torch.stack([values, ids.to(values.dtype)], -1)


def _exact(item: Placed) -> Placed:
    """A copy in at least fp32: small steps of a mixture would be lost in bfloat16's rounding."""
    param = item.param.detach()
    return replace(
        item, param=torch.nn.Parameter(param.to(torch.promote_types(param.dtype, torch.float32), copy=True), requires_grad=False)
    )


def _copy(cfg: RunConfig, shape: Shape, grid: Grid, source: Source) -> tuple[list[Decoder], list[Held]]:
    """A second model, frozen, and where its weights lie. Raises MegamodError."""
    path = cfg.reference.path if cfg.reference.kind == "model" else None
    if path is not None and "reference" not in losses.needs_of(cfg.loss):
        shape, grid = together(partial(_teacher_on, cfg, path, shape, grid)) or (shape, grid)
    chunks, _ = build(cfg.model, shape, grid, deterministic=cfg.deterministic)

    def filled() -> list[Held]:
        if path is not None and replace(read_shape(path), quantization=None) != replace(shape, quantization=None):
            raise MegamodError(f"reference.path = {path}: its config.json describes another model than the one that is trained")
        if path is None:
            return load(chunks, shape, grid, source, where=cfg.model.path)
        theirs = quantised(weights_at(path, shape, cfg.seed), shape.quantization, "reference.path")
        return load(chunks, shape, grid, theirs, where=path)

    items = together(filled)
    assert items is not None
    for chunk in chunks:
        chunk.to(grid.device).requires_grad_(False)
    return chunks, items


def _teacher_on(cfg: RunConfig, path: str, shape: Shape, grid: Grid) -> tuple[Shape, Grid]:
    """A teacher's shape, which need not be the model's, and the grid as it cuts the teacher. Raises MegamodError."""
    theirs, p = replace(read_shape(path), quantization=shape.quantization), cfg.parallel
    if theirs.vocab != shape.vocab:
        raise MegamodError(
            f"reference.path = {path}: a vocabulary of {theirs.vocab:,}, and the model's is {shape.vocab:,}: the same was expected"
        )
    split = grids.check(p if theirs.layers == shape.layers else replace(p, layers_per_stage=None), theirs, grid.world)
    if len({(max(1, p.tp // s.kv_heads), grids.ulysses_of(p, s)) for s in (theirs, shape)}) > 1:
        raise MegamodError(
            f"reference.path = {path}: its heads and the model's would be shared by other ranks on tp {p.tp} and cp {p.cp}: use a smaller "
            f"parallel.cp, or store what it says with tools/teacher_logprobs.py"
        )
    return theirs, replace(grid, layers_per_stage=split)


def model_at_start(base: str, plan: Plan | None, adapters: Adapters | None, grid: Grid) -> str:
    """Which model a run begins with: the fingerprint of its base, and of the adapter that it goes on from. Every rank calls it."""
    if plan is None or plan.source is None or adapters is None:
        return base
    return f"{base}+{fingerprint.of_model(adapters.items, grid)}"


def ask_all(chunks: Chunks, documents: Documents, cfg: RunConfig, grid: Grid, parts: Path, wave: int = WAVE) -> list[Floats] | None:
    """The log-probabilities of every document's trained tokens, of a teacher the largest, on rank 0; None elsewhere. Every rank calls it.

    What is done stays in `parts`, so a killed attempt is gone on with.

    Args:
        parts: a folder for this model and these documents alone; it must be there.
        wave: rows that each data-parallel rank and stage takes between two parts.
    """
    length, each = cfg.data.row_length, grid.dp.size * grid.pp.size
    groups = grouped(documents.joined)
    packed = pack(groups.sums(documents.lengths), length).of(groups).tolist()
    waves = [packed[first : first + wave * each] for first in range(0, len(packed), wave * each)]
    done = on_first(lambda: {i for i in range(len(waves)) if (parts / f"{i:06d}.npz").exists()})
    total = sum(map(len, packed))
    known = sum(len(row) for i in done for row in waves[i])
    teaches = "teacher" in losses.needs_of(cfg.loss)
    ask: Callable[[Head, Batch], Tensor] = partial(_taught, top_k=cfg.reference.top_k) if teaches else _logprobs
    bar = tqdm(total=total, initial=known, desc="asking the reference", unit=" texts", delay=3, mininterval=1, disable=grid.rank != 0)
    with bar:
        for i, rows in enumerate(waves):
            if i in done:
                continue
            found = collect_rows(
                chunks, rows, lambda row: micro_batch([[documents[n] for n in row]], length),
                lambda head, batch: ask(head, batch).float(), grid,
            )  # fmt: skip
            together(partial(_keep, parts / f"{i:06d}.npz", rows, found), acts=grid.rank == 0)
            bar.update(sum(map(len, rows)))
    return together(lambda: _joined(parts, len(waves), documents), acts=grid.rank == 0)


def _keep(file: Path, rows: Sequence[Sequence[int]], found: Sequence[Floats]) -> None:
    draft = file.with_suffix(".tmp")
    with draft.open("wb") as opened:
        np.savez(opened, allow_pickle=False, documents=np.array([n for row in rows for n in row], np.int64), values=np.concatenate(found))
    files.sync(draft)
    draft.replace(file)


def _joined(parts: Path, count: int, documents: Documents) -> list[Floats]:
    """Each document's values, in the documents' order."""
    values: dict[int, Floats] = {}
    for i in range(count):
        with np.load(parts / f"{i:06d}.npz", allow_pickle=False) as part:
            numbers, found = part["documents"].tolist(), part["values"]
        borders = np.cumsum([len(asked(documents[n])) for n in numbers])
        values.update(zip(numbers, np.split(found, borders[:-1]), strict=True))
    return [values[n] for n in range(len(documents.lengths))]
