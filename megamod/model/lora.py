"""LoRA beside megatron-core's linears: any of the linears in them, on any grid, the base never written.

A fused linear (q, k and v; gate and up) computes for each Hugging Face linear in it, rows [row, row + F') of its output:

    y = x Wᵀ + s·(dropout(x) Aᵀ) Bᵀ + bias                       LoRA (Hu et al. 2021, arXiv:2106.09685)
    y = m / ‖W + s·BA‖ ⊙ (x Wᵀ + s·(dropout(x) Aᵀ) Bᵀ) + bias    DoRA (Liu et al. 2024, arXiv:2402.09353, 4.3: the norm is a constant)
    y = x Wᵀ + s·(x Aᵀ) Bᵀ - s·(x A₀ᵀ) B₀ᵀ + bias                PiSSA (Meng et al. 2024, arXiv:2404.02948), W whole, not W - s·B₀A₀

How it meets tensor parallelism. Each tensor's share is cut from the base's: where W is cut by rows (q, gate, ...), B and m are, and
A is whole on every rank; where W is cut by columns (o, down), A is, and B and m are whole. No rank ever needs another one's
product: what a rank adds to its part of y is summed with that part. What is whole gets a part of its gradient on every rank,
summed once a step (`collectives.sum_later`). Under sequence parallelism A reads a rank's own tokens, and only the product, r
numbers a token, is gathered.

Dropout's masks are a function of the micro-batch, the module, the token and the channel, not of the grid. Linears that are fused
read one dropped-out x.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megamod.config import LoraConfig, as_json
from megamod.errors import MegamodError, nearest
from megamod.model.shape import Shape
from megamod.parallel.collectives import sum_later, together
from megamod.parallel.grid import Grid
from megamod.weights import peft, pissa
from megamod.weights.load import Source, verify_together
from megamod.weights.peft import Slot, saved, slots
from megamod.weights.table import Piece, Placed, Row, pieces, placed, table
from megamod_kernels.lora import Dropout, Part, Weight, dense, lora_down, lora_linear, lora_up, path

REFERENCE = "reference"  # the frozen adapter that preference losses compare with
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass
class Switch:
    """Which adapter counts now; None: the base alone. One for all modules of a rank."""

    active: str | None = None


class Low(nn.Module):
    """This rank's share of one adapter beside one Hugging Face linear: A `[R, C']`, B `[F', R]`, DoRA's magnitude `[F']`.

    Args:
        piece: of W, whose cut it shares.
        row: the first row of the fused output that it adds to.
    """

    def __init__(self, slot: Slot, cfg: LoraConfig, piece: Piece, like: Tensor, cut: int, grid: Grid) -> None:
        super().__init__()
        self.slot, self.row, self.rows = slot, piece.row, piece.size[0]
        (rows, columns), (row, column) = piece.size, piece.offset
        first_rank, r = grid.tp.rank == 0, slot.r
        # Of a factor that is whole on every tp rank the first one owns it; the other is cut, and owned, as W is.
        whole_a = Piece(slot.a, (r, slot.shape[1]), (0, column), (r, columns), 0, first_rank if cut == 0 else piece.owned)
        whole_b = Piece(slot.b, (slot.shape[0], r), (row, 0), (rows, r), 0, first_rank if cut == 1 else piece.owned)
        self.pieces = {"A": whole_a, "B": whole_b}
        if cfg.use_dora:
            self.pieces["magnitude"] = Piece(slot.magnitude, (slot.shape[0],), (row,), (rows,), 0, whole_b.owned)
        self.A, self.B = nn.Parameter(like.new_empty(r, columns)), nn.Parameter(like.new_empty(rows, r))
        self.magnitude = nn.Parameter(like.new_empty(rows)) if cfg.use_dora else None
        # PiSSA's beginning A₀, B₀, which is taken away again, since the base stays whole.
        first = (self.A, self.B) if cfg.init_lora_weights == "pissa" else ()
        for name, factor in zip(("initial_A", "initial_B"), first, strict=False):
            self.register_buffer(name, torch.empty_like(factor.data), persistent=False)
        # What is whole, or copied with its kv head, has a part of its gradient on every rank that has it.
        sharing = grid.tp.group if cut == 1 else grid.kv_copies if rows * grid.tp.size > slot.shape[0] else None
        for param, group in ((self.A, grid.tp.group if cut == 0 else None), (self.B, sharing), (self.magnitude, sharing)):
            if param is not None and group is not None:
                sum_later(param, group)

    def parts(self) -> list[Part]:
        """What the kernel adds to rows [row, row + rows) of the output."""
        found = [Part(self.A, self.B, self.row, self.slot.scale)]
        if initial := list(self.buffers()):
            found.append(Part(initial[0], initial[1], self.row, -self.slot.scale))
        return found

    @torch.no_grad()
    def norm(self, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """`[F']` ‖W + s·BA‖ of each output row over all its columns, W + s·BA never made. A constant to autograd.

        ‖w + b A‖² = ‖w‖² + 2 (w Aᵀ)·b + b (A Aᵀ) bᵀ, each a sum over columns, and so over the ranks of `group` that share them.
        """
        w = weight[self.row : self.row + self.rows]
        parts = self.parts()
        a, b = torch.cat([part.a for part in parts]), torch.cat([part.b * part.scale for part in parts], 1)
        work = torch.promote_types(w.dtype, torch.float32)
        square = torch.linalg.vector_norm(w, dim=1, dtype=work).square()
        a_, b_ = a.to(work), b.to(work)
        square += ((2 * (w @ a.t()).to(work) + b_ @ (a_ @ a_.t())) * b_).sum(1)
        if group is not None and group.size() > 1:
            dist.all_reduce(square, group=group)
        return square.sqrt()

    @torch.no_grad()
    def fill(self, source: Source, initial: Source | None) -> None:
        """A, B and, where the source has it, the magnitude; A₀ and B₀ from `initial`."""
        known = source.shapes()
        for name, piece in self.pieces.items():
            if piece.hf in known:
                self.get_parameter(name).copy_(source.read(piece.hf, piece.offset, piece.size))
        for target, piece in zip(self.buffers(), self.pieces.values(), strict=False):
            assert initial is not None, "PiSSA begins somewhere"
            target.copy_(initial.read(piece.hf, piece.offset, piece.size))

    def placed(self, prefix: str, ratio: float) -> Iterator[Placed]:
        """Where its parameters lie. With LoRA+ the outputs' side, B and the magnitude, learns at `ratio` times the rate."""
        for name, piece in self.pieces.items():
            yield Placed(f"{prefix}.{name}", self.get_parameter(name), (piece,), 1.0 if name == "A" else ratio)


class LoraLinear(nn.Module):
    """A frozen column- or row-parallel linear with adapters, in the place of megatron-core's.

    Args:
        weight, bias, skip_bias_add: megatron-core's linear's own; or a compact weight.
        cut: the axis of the weight that tp divides; 0: column-parallel, 1: row-parallel.
        name: of the module in the whole model, from which dropout's masks are drawn.
        path: who multiplies, as megamod_kernels.lora.path says.
    """

    def __init__(self, weight: Weight, bias: nn.Parameter | None, skip_bias_add: bool, cut: int, name: str, grid: Grid) -> None:
        super().__init__()
        self.weight, self.bias, self.skip_bias_add = weight, bias, skip_bias_add
        self.cut, self.grid, self.switch = cut, grid, Switch()
        self.adapters = nn.ModuleDict()  # name → the leaves that it has here → Low
        self.dropout: dict[str, float] = {}
        self.path = path(self.weight)
        self.name, self._key = name, zlib.crc32(name.encode())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[T', 1, C']` → `[T', 1, F']`, and the bias where the caller adds it."""
        lows = self.lows(self.switch.active)
        parts = [part for low in lows for part in low.parts()]
        scaled = any(low.magnitude is not None for low in lows)
        bias = None if scaled or self.skip_bias_add else self.bias
        group, sp = self.grid.tp.group, self.grid.sp
        x, dropout = x.flatten(0, -2), self._dropout(len(x))
        if self.cut == 0 and sp:
            # Each rank's rows of B give a part of the product's gradient: the backward sums and scatters.
            down = [gather_from_sequence_parallel_region(lora_down(x, parts, dropout), group=group)] if parts else []
            x = gather_from_sequence_parallel_region(x, group=group)
            y = lora_up(x, self.weight, bias, down[0], parts) if parts else lora_linear(x, self.weight, bias, [])
        else:
            x = copy_to_tensor_model_parallel_region(x, group=group) if self.cut == 0 else x
            y = lora_linear(x, self.weight, bias, parts, dropout)
        if scaled:
            y = y * self._magnitudes(lows)
            y = y if self.bias is None or self.skip_bias_add else y + self.bias
        if self.cut == 1:
            y = (
                reduce_scatter_to_sequence_parallel_region(y, group=group)
                if sp
                else reduce_from_tensor_model_parallel_region(y, group=group)
            )
        return y[:, None], self.bias if self.skip_bias_add else None

    @property
    def columns(self) -> dist.ProcessGroup | None:
        """The ranks that share a row's columns."""
        return self.grid.tp.group if self.cut == 1 else None

    def add(self, adapter: str, lows: Mapping[str, Low], dropout: float) -> None:
        """Put `adapter` beside it: for each Hugging Face linear in it that is adapted, a Low."""
        self.adapters[adapter] = nn.ModuleDict(lows)
        self.dropout[adapter] = dropout

    def lows(self, name: str | None) -> list[Low]:
        """What adapter `name` has here, in the order of the output's rows."""
        if name is None or name not in self.adapters:
            return []
        lows: Any = self.adapters[name]
        return list(lows.values())

    def _magnitudes(self, lows: Sequence[Low]) -> Tensor:
        """`[F']` DoRA's factor m / ‖W + s·BA‖ of each output row; 1 where there is no adapter."""
        factors, row, weight = [], 0, dense(self.weight)
        for low in lows:
            assert low.magnitude is not None
            norm = low.norm(weight, self.columns)
            factors += [low.magnitude.new_ones(low.row - row), (low.magnitude / norm).to(low.magnitude.dtype)]
            row = low.row + low.rows
        return torch.cat([*factors, weight.new_ones(len(weight) - row)])

    def _dropout(self, tokens: int) -> Dropout | None:
        p = self.dropout.get(self.switch.active or "", 0.0)
        if not p or not self.training:
            return None
        tp, cp = self.grid.tp, self.grid.cp
        split = self.cut == 0 and self.grid.sp
        first = (cp.rank * tp.size + tp.rank if split else cp.rank) * tokens
        # The micro-batch's seed: Decoder.forward gave it to torch's generator, whose state recomputation restores.
        seed = (torch.initial_seed() + self._key * 0x9E3779B97F4A7C15) % 2**64
        return Dropout(p, seed, token=first, channel=tp.rank * self.weight.shape[1] if self.cut == 1 else 0)


class Saved(nn.Module):
    """`modules_to_save`: an adapter's own copies of the embedding and the head, which stand in for the base's while it counts.

    A copy is called as the parameter is in whose place it stands, without the dots, which no parameter's name may have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()  # name → copy's name → copy
        self.switch = Switch()

    @staticmethod
    def called(parameter: str) -> str:
        """What the copy of `parameter` is called."""
        return parameter.replace(".", "_")

    def instead_of(self, parameter: str, weight: Tensor) -> Tensor:
        """The active adapter's copy of `parameter`, else `weight`, which is the parameter itself."""
        name = self.switch.active
        if name is None or name not in self.adapters:
            return weight
        copies: Any = self.adapters[name]
        return copies.get(self.called(parameter), weight)


class Adapters:
    """The adapters on a rank's chunks; at first the trained one counts, or else the first. `using` changes that for a pass.

    Made unfilled, after the base's weights are loaded and before `model.build.data_parallel`. The whole base is frozen.

    Attributes:
        configs: adapter → what it is.
        trained: the one whose parameters require gradients, if any.
        placed: adapter → where its parameters lie, in PEFT's coordinates.
        paths: of each of this rank's modules, who multiplies: megamod_kernels.lora.path.
    """

    def __init__(
        self, chunks: Sequence[Any], shape: Shape, grid: Grid, configs: Mapping[str, LoraConfig], trained: str | None = None
    ) -> None:
        self.configs, self.trained, self.grid = dict(configs), trained, grid
        self._switch = Switch(trained or next(iter(configs), None))
        self._linears: list[LoraLinear] = []
        self._copies: dict[str, list[tuple[Placed, nn.Parameter]]] = {name: [] for name in configs}  # and the base's own
        self.placed: dict[str, list[Placed]] = {name: [] for name in configs}
        for name in configs:
            if not re.fullmatch(r"\w[\w-]*", name) or hasattr(nn.ModuleDict, name):
                raise MegamodError(f"lora: an adapter cannot be called {name!r}: use letters, digits, _ and -")
        wanted = {name: slots(cfg, shape) for name, cfg in configs.items()}
        for chunk in chunks:
            chunk.requires_grad_(False)
            for layer in chunk.decoder.layers:
                for place, row in _linear_rows(shape):
                    self._adapt(layer, place, row, wanted)
            chunk.saved.switch = self._switch
            self._copy(chunk, shape)
        self.paths = {linear.name: linear.path for linear in self._linears}

    def __str__(self) -> str:
        said = " · ".join(f"{name}{' (trained)' if name == self.trained else ''} {_kind(cfg)}" for name, cfg in self.configs.items())
        return f"adapters {said} · " + " · ".join(f"{n} linears here by {who}" for who, n in Counter(self.paths.values()).items())

    def _adapt(self, layer: Any, place: str, row: Row, wanted: Mapping[str, Mapping[str, Slot]]) -> None:
        """Put a LoraLinear in a linear's place, if any adapter wants one of those that are fused in it."""
        number, tp = layer.layer_number - 1, self.grid.tp
        held = {piece.hf.removesuffix(".weight"): piece for piece in pieces(row, tp.size, tp.rank, number)}
        if not any(module in modules for modules in wanted.values() for module in held):
            return
        parent, leaf = layer.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
        cut = row.parts[0].cut
        assert cut is not None, "a linear is cut"
        name = f"decoder.layers.{number}.{place}"
        base = getattr(parent, leaf)
        linear = base if isinstance(base, LoraLinear) else LoraLinear(base.weight, base.bias, base.skip_bias_add, cut, name, self.grid)
        linear.switch = self._switch
        like = torch.empty(0, dtype=linear.weight.dtype, device=linear.weight.device)
        for adapter, modules in wanted.items():
            cfg = self.configs[adapter]
            lows = {
                module.rpartition(".")[2]: Low(modules[module], cfg, piece, like, cut, self.grid)
                for module, piece in held.items()
                if module in modules
            }
            if lows:
                linear.add(adapter, lows, cfg.lora_dropout)
                self._place(
                    adapter, [item for one, low in lows.items() for item in low.placed(f"{name}.{one}", cfg.loraplus_lr_ratio or 1.0)]
                )
        setattr(parent, leaf, linear)
        self._linears.append(linear)

    def _copy(self, chunk: Any, shape: Shape) -> None:
        """The copies of `modules_to_save` that this chunk needs."""
        tp = self.grid.tp
        # A rank may hold none of the vocabulary's rows, and then no piece says what the parameter is. A tied last stage's is no row.
        theirs = {"output_layer.weight": "model.embed_tokens.weight"} | {row.ours: row.parts[0].hf for row in table(shape)}
        own = placed([chunk], shape, tp.size, tp.rank)
        for adapter, cfg in self.configs.items():
            origins = {origin: name for name, origin in saved(cfg, shape).items()}
            copies = nn.ParameterDict()
            for item in own:
                origin = theirs.get(item.name)
                if origin not in origins:
                    continue
                copy = nn.Parameter(torch.empty_like(item.param))
                copies[Saved.called(item.name)] = copy
                here = tuple(replace(piece, hf=origins[origin]) for piece in item.pieces)
                self._copies[adapter].append((Placed(item.name, copy, here), item.param))
                if shape.tied and self.grid.pp.size > 1:
                    sum_later(copy, self.grid.groups.embd)
                    copy.shared_embedding = True  # type: ignore[attr-defined] # a bucket of its own, cut alike on both stages
            if copies:
                chunk.saved.adapters[adapter] = copies
                self._place(adapter, [item for item, _ in self._copies[adapter]])

    def _place(self, adapter: str, items: Sequence[Placed]) -> None:
        for item in items:
            item.param.requires_grad_(adapter == self.trained)
        self.placed[adapter] += items

    @property
    def items(self) -> list[Placed]:
        """Where the trained one's parameters lie; none where none is trained."""
        return self.placed[self.trained] if self.trained is not None else []

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside, `name` counts (None: no adapter); nothing is moved or copied, so it costs nothing.

        Raises:
            MegamodError: there is no such adapter.
        """
        if name is not None and name not in self.configs:
            raise MegamodError(f"there is no adapter {name!r}, {nearest(name, self.configs)}")
        before, self._switch.active = self._switch.active, name
        try:
            yield
        finally:
            self._switch.active = before

    @torch.no_grad()
    def fill(self, name: str, source: Source, initial: Source | None = None) -> None:
        """Adapter `name`'s weights from `source`, by PEFT's names; what it lacks begins as the base is: magnitudes and copies.

        Args:
            initial: PiSSA's A₀ and B₀.

        Raises:
            MegamodError: on every rank alike: files that are not as their checksums say.
        """
        verify_together(source, self.grid)
        known = source.shapes()
        for linear in self._linears:
            for low in linear.lows(name):
                low.fill(source, initial)
                if low.magnitude is not None and low.slot.magnitude not in known:
                    low.magnitude.copy_(low.norm(dense(linear.weight), linear.columns))
        for item, original in self._copies[name]:
            item.param.copy_(original)
            for piece in item.pieces:
                if piece.hf in known:
                    piece.of(item.param).copy_(source.read(piece.hf, piece.offset, piece.size))


class Fresh:
    """A new adapter as a Source: A drawn, B 0, so that it begins as the base. A tensor depends on its name and the seed, not the grid.

    default: A uniform within ±1/√C, which is what Kaiming's initialisation with a = √5 comes to; gaussian: normal, deviation 1/r.
    """

    def __init__(self, cfg: LoraConfig, shape: Shape, seed: int) -> None:
        self._slots = slots(cfg, shape).values()
        self._shapes = {slot.a: (slot.r, slot.shape[1]) for slot in self._slots} | {slot.b: (slot.shape[0], slot.r) for slot in self._slots}
        self._gaussian, self._seed = cfg.init_lora_weights == "gaussian", seed

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of `size` at `offset`."""
        if ".lora_B." in name:
            return torch.zeros(*size)
        r, columns = self._shapes[name]
        rows = []
        for i in range(offset[0], offset[0] + size[0]):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name} {i}".encode()))
            unit = torch.randn(columns, generator=generator) if self._gaussian else 2 * torch.rand(columns, generator=generator) - 1
            rows.append(unit[offset[1] : offset[1] + size[1]])
        return torch.stack(rows) * (1 / r if self._gaussian else columns**-0.5)


@dataclass(frozen=True)
class Plan:
    """The adapter that a run trains, opened and checked before its model is built."""

    config: LoraConfig
    source: peft.Adapter | None  # where it is already; None: it is new, or comes from the run's checkpoint
    low_rank: int  # how many weights A and B have, over all linears

    @classmethod
    def of(cls, cfg: LoraConfig, shape: Shape, saved: Mapping[str, Any] | None = None) -> "Plan":
        """The adapter that `cfg` trains: new, or gone on from `cfg.path`.

        Args:
            saved: of a run that is resumed, `identity` as its checkpoint has it; `cfg.path` is then read again for the reference only.

        Raises:
            MegamodError: see `peft.opened`, `peft.tensors` and `pissa.check`; an option that `cfg.path` contradicts.
        """
        source = None
        if cfg.name == REFERENCE:
            raise MegamodError(f"lora.name = {REFERENCE!r} is what the adapter is called that a loss compares with: use another")
        if cfg.path is not None and saved is not None:
            own = peft.lora_from_json(saved, "the checkpoint's lora")
        elif cfg.path is not None:
            source = peft.opened(cfg.path, shape)
            own = source.config
            for name in sorted({f.name for f in fields(LoraConfig)} - {"path", "name", "lora_dropout", "loraplus_lr_ratio"}):
                asked, there = getattr(cfg, name), getattr(own, name)
                if asked not in (getattr(LoraConfig(), name), there):
                    raise MegamodError(f"lora.{name} = {asked!r}, and the adapter at lora.path = {cfg.path} has {there!r}: leave it out")
        else:
            own = cfg
        config = replace(own, lora_dropout=cfg.lora_dropout, loraplus_lr_ratio=cfg.loraplus_lr_ratio, name=cfg.name, path=None)
        low_rank = sum(slot.r * sum(slot.shape) for slot in slots(config, shape).values())
        peft.saved(config, shape)  # what it refuses is refused now
        if config.init_lora_weights == "pissa":
            pissa.check(config, shape)
        return cls(config, source, low_rank)

    def tensors(self, shape: Shape) -> Mapping[str, tuple[int, ...]]:
        """Name → shape of what is trained."""
        return peft.tensors(self.config, shape)

    @property
    def identity(self) -> dict[str, Any]:
        """Of the trained adapter, what a resumed run must have alike: its shape and equation."""
        return as_json(replace(self.config, loraplus_lr_ratio=None))

    def check_base(self, base: str) -> None:
        """Refuse an adapter that was trained on other weights than those with the fingerprint `base`. Raises MegamodError."""
        if self.source is not None:
            peft.check_fingerprint(self.source, base, "lora.path")

    def begun(self, base: str, shape: Shape) -> str:
        """What the folder of PiSSA's beginning is called: on other weights, modules or ranks it is another one."""
        said = f"{base} {sorted(map(str, slots(self.config, shape).values()))}"
        return f"{peft.INITIAL}-{zlib.crc32(said.encode()):08x}"

    def attach(
        self, chunks: Sequence[Any], shape: Shape, grid: Grid, base: Source, seed: int, initial: Path,
        beside: "peft.Adapter | Plan | None" = None,
    ) -> Adapters:  # fmt: skip
        """The adapter beside the loaded model, filled. Every rank calls it.

        Args:
            base: where the model's weights came from.
            seed: of what a new adapter draws.
            initial: the folder of PiSSA's beginning, made if it is needed.
            beside: a further adapter, frozen and called REFERENCE; this plan itself: what the trained one is at first.
        """
        name = self.config.name
        configs = {name: self.config, **({REFERENCE: beside.config} if beside is not None else {})}
        adapters = Adapters(chunks, shape, grid, configs, name)
        begun = pissa.begin(initial, base, self.config, shape, grid) if self.config.init_lora_weights == "pissa" else None
        first = self.source or begun or Fresh(self.config, shape, seed)
        together(partial(adapters.fill, name, first, begun))
        if isinstance(beside, Plan):
            together(partial(adapters.fill, REFERENCE, first, begun))
        elif beside is not None:
            together(partial(adapters.fill, REFERENCE, beside))
        return adapters


def _kind(cfg: LoraConfig) -> str:
    """`DoRA, PiSSA r 16`"""
    words = [
        word for word, said in (("DoRA", cfg.use_dora), ("rsLoRA", cfg.use_rslora), ("PiSSA", cfg.init_lora_weights == "pissa")) if said
    ]
    return f"{', '.join(words) or 'LoRA'} r {cfg.r}"


def _linear_rows(shape: Shape) -> list[tuple[str, Row]]:
    """A layer's linears and their rows of the table."""
    rows = {row.ours: row for row in table(shape)}
    return [(place, rows[f"decoder.layers.{{}}.{place}.weight"]) for place in LINEARS]
