"""One table between Hugging Face's tensors and this rank's parameters, read in both directions.

A rank keeps fused rows contiguous, `[q | k | v]` and `[gate | up]`, so every Hugging Face tensor's share on a rank is a plain
row range of one parameter, and a box of the tensor. Loading copies box → rows, exporting rows → box; the optimizer's state,
the gradient norm and the checkpoint walk the same pieces. A new family's tensors are new rows of `table`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from megamod.model.shape import Shape
from megamod.parallel.grid import Grid

if TYPE_CHECKING:
    from megamod.model.shards import Buffer
    from megamod.weights.load import Source

ADAPTERS = "adapters."  # in the name of a parameter: it belongs to an adapter, not to the base
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size along each axis, in Hugging Face's coordinates


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor inside one of our parameters."""

    hf: str  # its name; `{}` is the layer's number
    shape: tuple[int, ...]  # whole, as in the checkpoint
    cut: int | None  # the axis that tensor parallelism divides; None: each rank holds the whole
    unit: int = 1  # rows that must stay together: a head
    padded: bool = False  # the vocabulary: cut into equal shares, the last ones run past the end


@dataclass(frozen=True)
class Row:
    """One of our parameters: the parts stacked along axis 0 in this order."""

    ours: str  # its name; `{}` is the layer's number
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Piece:
    """This rank's share of one Hugging Face tensor: `param[rows]` on our side, `tensor[box]` on theirs.

    `owned` marks, among the ranks that hold copies (norms on every TP rank, replicated kv heads, the last stage's tied
    embedding), the one that counts: it writes the piece on export and adds it to the gradient norm.
    """

    hf: str
    shape: tuple[int, ...]  # the whole tensor's
    offset: tuple[int, ...]
    size: tuple[int, ...]
    row: int  # first row in our parameter
    owned: bool

    @property
    def numel(self) -> int:
        count = 1
        for n in self.size:
            count *= n
        return count

    def of(self, param: Tensor) -> Tensor:
        """The view of `param`'s rows that holds this piece, in the box's shape."""
        return param[self.row : self.row + self.size[0]]


def table(shape: Shape) -> list[Row]:
    """Every parameter of the model, each tensor of Hugging Face exactly once (the vocabulary head's is absent when tied)."""
    C, D, F, V = shape.hidden, shape.head_dim, shape.ffn, shape.vocab
    q, kv = shape.heads * D, shape.kv_heads * D
    layer = "model.layers.{}."
    attention, mlp = layer + "self_attn.", layer + "mlp."

    def qkv(leaf: str, *rest: int) -> tuple[Part, ...]:
        return tuple(Part(f"{attention}{n}_proj.{leaf}", (rows, *rest), 0, D) for n, rows in (("q", q), ("k", kv), ("v", kv)))

    def feed_forward(ours: str, hf: str, F: int) -> list[Row]:
        gate_up = tuple(Part(f"{hf}{n}_proj.weight", (F, C), 0) for n in ("gate", "up"))
        return [Row(f"{ours}linear_fc1.weight", gate_up), Row(f"{ours}linear_fc2.weight", (Part(f"{hf}down_proj.weight", (C, F), 1),))]

    rows = [
        Row("embedding.word_embeddings.weight", (Part("model.embed_tokens.weight", (V, C), 0, padded=True),)),
        Row("decoder.layers.{}.input_layernorm.weight", (Part(layer + "input_layernorm.weight", (C,), None),)),
        Row("decoder.layers.{}.self_attention.linear_qkv.weight", qkv("weight", C)),
        Row("decoder.layers.{}.self_attention.linear_proj.weight", (Part(attention + "o_proj.weight", (C, q), 1, D),)),
        Row("decoder.layers.{}.pre_mlp_layernorm.weight", (Part(layer + "post_attention_layernorm.weight", (C,), None),)),
        Row("decoder.final_layernorm.weight", (Part("model.norm.weight", (C,), None),)),
    ]
    ours = "decoder.layers.{}.mlp."
    if (experts := shape.experts) is None:
        rows.extend(feed_forward(ours, mlp, F))
    else:
        rows.append(Row(f"{ours}router.weight", (Part(mlp + "gate.weight", (experts.count, C), None),)))
        for i in range(experts.count):
            rows.extend(feed_forward(f"{ours}experts.local_experts.{i}.", f"{mlp}experts.{i}.", experts.ffn))
    if shape.qkv_bias:
        rows.append(Row("decoder.layers.{}.self_attention.linear_qkv.bias", qkv("bias")))
    if shape.o_bias:
        rows.append(Row("decoder.layers.{}.self_attention.linear_proj.bias", (Part(attention + "o_proj.bias", (C,), None),)))
    if shape.qk_norm:
        for n in ("q", "k"):
            part = Part(f"{attention}{n}_norm.weight", (D,), None)
            rows.append(Row(f"decoder.layers.{{}}.self_attention.{n}_layernorm.weight", (part,)))
    if (score := shape.score) is not None:
        L = shape.outputs
        rows.append(Row("output_layer.weight", (Part("score.weight", (L, C), None),)))
        if score.every_token:
            rows.append(Row("output_layer.bias", (Part("score.bias", (L,), None),)))
    elif not shape.tied:
        rows.append(Row("output_layer.weight", (Part("lm_head.weight", (V, C), 0, padded=True),)))
    return rows


def hf_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in a Hugging Face checkpoint of `shape`."""
    parts = [part for row in table(shape) for part in row.parts]
    layers = range(shape.layers)
    return {part.hf.format(i): part.shape for part in parts for i in (layers if "{}" in part.hf else [0])}


def padded_vocab(vocab: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of `tp`."""
    return -(-vocab // tp) * tp


def share(part: Part, tp: int, rank: int) -> tuple[int, int, int, bool]:
    """First index, length here, length with padding, and ownership of TP rank `rank`'s share along `part.cut`.

    When TP has more ranks than the part has units (kv heads), consecutive ranks hold the same unit and the first owns it.
    """
    assert part.cut is not None
    total = part.shape[part.cut]
    if part.padded:
        rows = padded_vocab(total, tp) // tp
        start = min(rank * rows, total)
        return start, min(rows, total - start), rows, True
    units = total // part.unit
    if units % tp == 0:
        rows = total // tp
        return rank * rows, rows, rows, True
    assert tp % units == 0, "the grid was checked against the model: parallel.grid.check"
    copies = tp // units
    return rank // copies * part.unit, part.unit, part.unit, rank % copies == 0


def pieces(row: Row, tp: int, rank: int, layer: int) -> list[Piece]:
    """The pieces of `row`'s parameter on TP rank `rank`, in the order of the parameter's rows."""
    result, first = [], 0
    for part in row.parts:
        offset, size, height, owned = [0] * len(part.shape), list(part.shape), part.shape[0], rank == 0
        if part.cut is not None:
            offset[part.cut], size[part.cut], length, owned = share(part, tp, rank)
            height = length if part.cut == 0 else height
        if size[0]:
            result.append(Piece(part.hf.format(layer), part.shape, tuple(offset), tuple(size), first, owned))
        first += height
    return result


@dataclass(frozen=True)
class Placed:
    """A parameter of this rank and the pieces it holds."""

    name: str  # as the module calls it, with the layer's global number
    param: nn.Parameter
    pieces: tuple[Piece, ...]
    rate: float = 1.0  # its learning rate ÷ the run's

    @property
    def dtype(self) -> torch.dtype:
        return self.param.dtype

    def values(self, piece: Piece) -> Tensor:
        """What it holds of a piece, in the box's shape."""
        return piece.of(self.param.detach())

    def fill(self, piece: Piece, source: "Source", grid: Grid) -> None:
        """Read a piece from `source`."""
        piece.of(self.param.detach()).copy_(source.read(piece.hf, piece.offset, piece.size))


@runtime_checkable
class InPieces(Protocol):
    """A frozen weight that is no parameter: model.nf4's, in 4 bits, and model.shards', of which ranks keep slices.

    Attributes:
        buffers_shared: the memory, shared with others, in which it is made dense.
    """

    shape: torch.Size
    dtype: torch.dtype
    buffers_shared: "Sequence[Buffer]"

    @property
    def nbytes(self) -> int: ...

    def values(self, piece: Piece) -> Tensor: ...

    def fill(self, piece: Piece, source: "Source", grid: Grid) -> None: ...


@dataclass(frozen=True)
class Frozen:
    """A frozen weight of this rank that is no parameter, and the pieces it holds."""

    name: str
    weight: InPieces
    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> torch.dtype:
        """In which it is multiplied."""
        return self.weight.dtype

    def values(self, piece: Piece) -> Tensor:
        """What it holds of a piece, in the box's shape; all ranks that share the weight call it."""
        return self.weight.values(piece)

    def fill(self, piece: Piece, source: "Source", grid: Grid) -> None:
        """Read a piece from `source`; the tp ranks call it alike."""
        self.weight.fill(piece, source, grid)


Held = Placed | Frozen


def placed(chunks: Sequence[nn.Module], shape: Shape, tp: int, rank: int) -> list[Placed]:
    """Every parameter of this rank's model chunks (bare GPTModels, or wrapped in DistributedDataParallel) with its pieces.

    The parameters of adapters are not among them: model.lora places these.

    Raises:
        AssertionError: a parameter that the table lacks; the model and the table are then out of step.
    """
    where = _Places(shape, tp, rank)
    return [
        Placed(full, param, held)
        for model in map(_bare, chunks)
        for name, param in model.named_parameters()
        if ADAPTERS not in name
        for full, held in [where.of(name, model)]
    ]


def frozen(chunks: Sequence[nn.Module], shape: Shape, tp: int, rank: int) -> list[Frozen]:
    """Every weight of this rank's model chunks that is no parameter, with its pieces. Arguments and errors as in `placed`."""
    where = _Places(shape, tp, rank)
    return [
        Frozen(full, weight, held)
        for model in map(_bare, chunks)
        for name, weight in model.named_modules()
        if isinstance(weight, InPieces)
        for full, held in [where.of(name, model)]
    ]


def _bare(chunk: Any) -> Any:
    return getattr(chunk, "module", chunk)


class _Places:
    """Where the weights of a rank's chunks lie."""

    def __init__(self, shape: Shape, tp: int, rank: int) -> None:
        self._rows, self._tied, self._tp, self._rank = {row.ours: row for row in table(shape)}, shape.tied, tp, rank

    def of(self, name: str, model: Any) -> tuple[str, tuple[Piece, ...]]:
        """What `name` is called in the whole model, and its pieces."""
        prefix, _, rest = name.partition("decoder.layers.")
        layer, generic, full = 0, name, name
        if rest and not prefix:
            local, _, leaf = rest.partition(".")
            layer = model.decoder.layers[int(local)].layer_number - 1
            generic, full = f"decoder.layers.{{}}.{leaf}", f"decoder.layers.{layer}.{leaf}"
        if generic == "output_layer.weight" and self._tied:  # the last stage's copy of the embedding
            row = replace(self._rows["embedding.word_embeddings.weight"], ours=generic)
            return full, tuple(replace(piece, owned=False) for piece in pieces(row, self._tp, self._rank, 0))
        assert generic in self._rows, f"{generic} is missing from weights.table"
        return full, tuple(pieces(self._rows[generic], self._tp, self._rank, layer))


def boxes(piece: Piece, start: int, stop: int) -> Iterator[tuple[int, int, Box]]:
    """Cut the flat range [start, stop) of a piece into boxes of the Hugging Face tensor.

    A data-parallel rank's share of a parameter is a flat range that may begin and end inside a row, so it is at most three
    boxes: the end of a row, whole rows, the beginning of a row. Yields flat start, flat stop and the box.
    """
    if len(piece.size) == 1:
        yield start, stop, ((piece.offset[0] + start,), (stop - start,))
        return
    _, width = piece.size
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width:  # part of one row
            end = min(stop, (row + 1) * width)
            box = ((piece.offset[0] + row, piece.offset[1] + column), (1, end - start))
        else:  # as many whole rows as there are
            end = start + (stop - start) // width * width
            box = ((piece.offset[0] + row, piece.offset[1]), ((end - start) // width, width))
        yield start, end, box
        start = end


def overlap(a: Box, b: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where boxes `a` and `b` meet, as slices within each; None when they do not."""
    inside_a, inside_b = [], []
    for offset_a, size_a, offset_b, size_b in zip(*a, *b, strict=True):
        low, high = max(offset_a, offset_b), min(offset_a + size_a, offset_b + size_b)
        if low >= high:
            return None
        inside_a.append(slice(low - offset_a, high - offset_a))
        inside_b.append(slice(low - offset_b, high - offset_b))
    return tuple(inside_a), tuple(inside_b)


def zero_padding(item: Placed) -> None:
    """Set the rows of a parameter that no piece covers (the padded vocabulary) to zero."""
    end = max((piece.row + piece.size[0] for piece in item.pieces), default=0)
    with torch.no_grad():
        item.param[end:].zero_()
