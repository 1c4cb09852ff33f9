"""A plan before a run: bytes of a rank, the longest row that fits, floating-point operations, bytes over each link, tokens a second.

Functions of a configuration, a Shape and a Hardware: nothing is built, nothing is read, and a model of any size takes milliseconds. What
a rank holds (`held`) is exact: it walks weights.table, as the model does, and lays megatron-core's flat gradient buffers out. What is saved
for the backward pass (`saved`) is exact but for numbers of a few bytes a token. The rest are estimates, and say so: Status.

Sources: activations as in Korthikanti et al. 2022 (arXiv:2205.05198), with what this code keeps; the pipeline's bubble as in Narayanan et
al. 2021 (arXiv:2104.04473); rings send (n - 1)/n of a buffer to reduce-scatter or gather it.

Letters: T tokens of a micro-batch, t = T/cp those of a rank, s = t/tp under sequence parallelism, else t; C hidden, F ffn, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple, get_args

from megamod.config import LoraConfig, Recompute, RunConfig, SyntheticData
from megamod.errors import MegamodError, nearest
from megamod.losses import needs_of
from megamod.model.build import DTYPES
from megamod.model.head import CHUNK_BYTES, KEPT_BYTES
from megamod.model.lora import LINEARS
from megamod.model.nf4 import aligned
from megamod.model.shape import Shape
from megamod.parallel.grid import check, check_rows, kv_repeats, ulysses_degree
from megamod.reference import is_copy, place_of
from megamod.weights.peft import saved as copied
from megamod.weights.peft import slots
from megamod.weights.quantization import Quantization
from megamod.weights.table import Piece, Row, padded_vocab, pieces, share, table
from megamod_kernels import nf4
from megamod_kernels.nf4 import Lines

# predicted: by a formula that tests hold against measurement; measured: on these ranks; never measured: an estimate that wants a GPU
Status = Literal["predicted", "measured", "never measured"]
GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """GPUs and what joins them: data-sheet figures, and how much of them is expected."""

    name: str
    memory: float  # bytes of a GPU
    flops: float  # a second, dense, in bfloat16
    bandwidth: float  # bytes a second of its memory
    link: float  # bytes a second that a GPU sends to the others of its node
    network: float  # bytes a second that a GPU sends to other nodes
    node: int = 8  # GPUs of a node
    host: float = 10e9  # bytes a second that a rank's processor core reads and writes as it updates what is in host memory
    efficiency: float = 0.5  # of flops, over a step's matrix products and what lies between them
    reached: float = 0.7  # of bandwidth, link and network
    reserve: float = 0.08  # of the memory: CUDA's context, NCCL's buffers, what the allocator cannot use

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a plan may fill."""
        return self.memory * (1 - self.reserve)

    def rate(self, ranks: int) -> float:
        """Bytes a second that one of `ranks` neighbours sends to the next."""
        return (self.link if ranks <= self.node else self.network) * self.reached


# NVIDIA's data sheets of H100 SXM and H200 SXM: NVLink 900 GB/s both ways; a 400 Gbit/s adapter for each GPU.
HARDWARE = {
    "H100": Hardware("H100", 80 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "H200": Hardware("H200", 141e9, 989e12, 4.8e12, 450e9, 50e9),
}


def hardware_of(name: str) -> Hardware:
    """The Hardware called `name`. Raises MegamodError."""
    if name not in HARDWARE:
        raise MegamodError(f"GPU {name!r}, {nearest(name, HARDWARE)}")
    return HARDWARE[name]


# ---- what a rank holds


class Adapter:
    """What a run trains beside a frozen base; compared by identity, and one for each configuration of it.

    Attributes:
        slots: of each adapted module.
        dora: whether an output has a magnitude.
        low: how many low-rank products an adapted linear adds: with PiSSA two.
        whole: names of the base's tensors of which it has copies.
    """

    def __init__(self, cfg: LoraConfig, shape: Shape) -> None:
        self.slots, self.dora, self.whole = slots(cfg, shape), cfg.use_dora, frozenset(copied(cfg, shape).values())
        self.low = 2 if cfg.init_lora_weights == "pissa" else 1
        parts = {row.ours: row.parts for row in table(shape)}
        names = [[part.hf.removesuffix(".weight") for part in parts[f"decoder.layers.{{}}.{place}.weight"]] for place in LINEARS]

        def ranks(layer: int) -> tuple[int, ...]:
            found = ([self.slots.get(name.format(layer)) for name in of_place] for of_place in names)
            return tuple(self.low * sum(slot.r for slot in several if slot is not None) for several in found)

        self.low_rank = self.low * sum(slot.r * sum(slot.shape) for slot in self.slots.values())  # weights, over all linears
        self.ranks = [ranks(layer) for layer in range(shape.layers)]  # of each of LINEARS, all that is fused in it together


@dataclass(frozen=True)
class Model:
    """What is planned: a decoder, and what is trained beside it."""

    shape: Shape
    adapter: Adapter | None  # None: every weight is trained

    @classmethod
    def of(cls, cfg: RunConfig, shape: Shape) -> "Model":
        """Raises MegamodError: see `peft.slots`."""
        return cls(shape, None if cfg.lora is None else Adapter(cfg.lora, shape))


class Parameter(NamedTuple):
    """A parameter of a rank."""

    numel: int
    trained: bool
    spans: tuple[tuple[int, int], ...]  # of its elements, those that are in the model: all but the vocabulary's padding
    alone: bool = False  # in a bucket of its own: the embedding that two stages share


class Kept(NamedTuple):
    """A weight that is kept in 4 bits, or in slices, or both."""

    numel: int
    units: int  # of what is kept, and cut into slices
    unit: int  # bytes: 1 of codes
    in_4_bits: bool

    def bytes(self, ranks: int) -> int:
        """What each of `ranks` keeps."""
        return -(-self.units // ranks) * self.unit


class Chunk(NamedTuple):
    """What one virtual stage has."""

    layers: int
    parameters: tuple[Parameter, ...]  # in the module's order
    compact: tuple[Kept, ...]  # weights that are no parameters


@dataclass(frozen=True)
class Held:
    """What a rank holds from the first step to the last."""

    layers: tuple[int, ...]  # of each of its chunks
    parameters: int
    trained: int
    weight_bytes: int  # with a reference model's copy, and the buffers in which weights in 4 bits, or in slices, are made dense
    gradient_bytes: int
    master_bytes: int  # where they are copies
    moment_bytes: int
    gathered_bytes: int  # in each pass, from the slices of other ranks
    host_bytes: int  # masters, moments and gradients, where these are in host memory

    @property
    def bytes(self) -> int:
        """All of it, but for the host's."""
        return self.weight_bytes + self.gradient_bytes + self.master_bytes + self.moment_bytes


# In the order in which a layer's modules are made.
OF_A_LAYER = (
    "input_layernorm.weight",
    *(f"self_attention.linear_{name}" for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")),
    *(f"self_attention.{name}_layernorm.weight" for name in ("q", "k")),
    *("pre_mlp_layernorm.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
)
EMBEDDING, HEAD = "embedding.word_embeddings.weight", ("output_layer.weight", "output_layer.bias")


def held(cfg: RunConfig, model: Model, world: int, *, tp: int = 0, pp: int = 0, dp_cp: int = 0) -> Held:
    """Of the rank at these places, exactly what a dry run of it finds on meta tensors.

    Raises:
        MegamodError: the grid does not fit the model or the number of ranks.
    """
    p = cfg.parallel
    split, sharing = check(p, model.shape, world), world // (p.tp * p.pp)
    itemsize = DTYPES[cfg.model.dtype].itemsize
    ranks = sharing if p.shard_base else 1
    chunks = [_chunk(model, itemsize, p.tp, tp, split, number, p.shard_base) for number in range(pp, len(split), p.pp)]
    bucket = max(40_000_000, 1_000_000 * sharing) if cfg.optim.overlap_grad_reduce and pp == 0 else None  # megatron-core's default
    trained = buffered = owned = 0
    for number, chunk in enumerate(chunks):
        mine = [parameter for parameter in chunk.parameters if parameter.trained]
        trained += sum(parameter.numel for parameter in mine)
        length, of_rank = _buffer(mine, sharing, dp_cp, bucket if number == 0 else None)
        buffered, owned = buffered + length, owned + of_rank
    numbers = sum(parameter.numel for chunk in chunks for parameter in chunk.parameters)
    compact = [one for chunk in chunks for one in chunk.compact]
    kept = sum(one.bytes(ranks) for one in compact)
    weights = numbers * itemsize + kept
    # Where weights in 4 bits are made dense; and, of what is gathered, the one that is used and the one that is on its way.
    buffers = max((one.numel * itemsize for one in compact if one.in_4_bits), default=0)
    buffers += 2 * max((ranks * one.bytes(ranks) for one in compact), default=0) if ranks > 1 else 0
    if is_copy(cfg):
        bare = Model(model.shape, None)
        plain = [_chunk(bare, itemsize, p.tp, tp, split, number, p.shard_base) for number in range(pp, len(split), p.pp)]
        weights += sum(x.numel for c in plain for x in c.parameters) * itemsize + kept
        buffers *= 2
    work = max(4, itemsize)
    return Held(
        layers=tuple(chunk.layers for chunk in chunks),
        parameters=numbers + sum(one.numel for one in compact),
        trained=trained,
        weight_bytes=weights + buffers,
        gradient_bytes=buffered * work,
        master_bytes=owned * work if work > itemsize and not cfg.optim.offload else 0,
        moment_bytes=0 if cfg.optim.offload else 2 * owned * work,
        gathered_bytes=(ranks - 1) * kept,
        host_bytes=4 * owned * work if cfg.optim.offload else 0,
    )


@cache
def _chunk(model: Model, itemsize: int, tp: int, rank: int, split: tuple[int, ...], number: int, sliced: bool) -> Chunk:
    """Stage `number` of `split` on tensor-parallel rank `rank` of `tp`; `sliced`: ranks share its linears' weights."""
    first, last, shape, adapter = number == 0, number == len(split) - 1, model.shape, model.adapter
    rows = {row.ours: row for row in table(shape)}
    found: list[Parameter] = []
    compact: list[Kept] = []

    def plain(row: Row, layer: int, alone: bool = False) -> Parameter:
        return Parameter(_numel(row, tp, rank), adapter is None, _spans(row, pieces(row, tp, rank, layer)), alone)

    if first:
        found.append(plain(rows[EMBEDDING], 0, shape.tied and not last))
    layers = range(sum(split[:number]), sum(split[: number + 1]))
    for layer in layers:
        for place in OF_A_LAYER:
            row = rows.get(f"decoder.layers.{{}}.{place}")
            if row is None:
                continue
            here = pieces(row, tp, rank, layer)
            q = shape.quantization if place.removesuffix(".weight") in LINEARS else None
            if q is not None and any(q.converts(piece.hf.removesuffix(".weight")) for piece in here):
                compact.append(Kept(_numel(row, tp, rank), sum(_bytes_in_4_bits(q, piece, itemsize) for piece in here), 1, True))
            elif sliced and place.removesuffix(".weight") in LINEARS:
                compact.append(Kept(_numel(row, tp, rank), _numel(row, tp, rank), itemsize, False))
            else:
                found.append(plain(row, layer))
            for piece in here if place.endswith(".weight") else ():
                slot = adapter.slots.get(piece.hf.removesuffix(".weight")) if adapter is not None else None
                if adapter is not None and slot is not None:
                    sizes = [slot.r * piece.size[1], piece.size[0] * slot.r] + [piece.size[0]] * adapter.dora
                    found += [Parameter(size, True, ((0, size),)) for size in sizes]
    if last:
        found.append(plain(rows["decoder.final_layernorm.weight"], 0))
        if shape.tied and shape.score is None and not first:
            found.append(plain(rows[EMBEDDING], 0, True))
        found += [plain(rows[name], 0) for name in HEAD if name in rows]
    if adapter is not None:
        tied = shape.tied and not (first and last)
        names = [EMBEDDING] * first + [EMBEDDING] * (shape.tied and last and not first) + [n for n in HEAD if last and n in rows]
        found += [plain(rows[n], 0, tied)._replace(trained=True) for n in names if rows[n].parts[0].hf in adapter.whole]
    return Chunk(len(layers), tuple(found), tuple(compact))


def _numel(row: Row, tp: int, rank: int) -> int:
    """Elements of a parameter, padding included."""
    total = 0
    for part in row.parts:
        size = list(part.shape)
        if part.cut is not None:
            size[part.cut] = share(part, tp, rank)[2]
        total += math.prod(size)
    return total


def _spans(row: Row, here: Sequence[Piece]) -> tuple[tuple[int, int], ...]:
    spans = []
    for piece in here:
        width = math.prod(piece.size[1:])
        spans.append((piece.row * width, piece.row * width + piece.numel))
    return tuple(spans)


def _bytes_in_4_bits(q: Quantization, piece: Piece, itemsize: int) -> int:
    """Of a tensor's share as model.nf4 keeps it, each part in 16 bytes more or less; unconverted, it has `itemsize` bytes a number."""
    if not q.converts(piece.hf.removesuffix(".weight")):
        return aligned(piece.numel * itemsize)
    (rows, columns), (row, column), (height, width) = piece.shape, piece.offset, piece.size
    lines = Lines.of((rows, columns), (row, column), (height, width))
    blocks, touched = -(-lines.total // q.blocksize), lines.count * lines.touched(q.blocksize)
    statistics = [touched, 4 * -(-blocks // nf4.NESTED), 4] if q.use_double_quant else [4 * touched]
    return sum(map(aligned, (-(-piece.numel // 2), *statistics)))


def _buffer(trained: Sequence[Parameter], ranks: int, rank: int, bucket: int | None) -> tuple[int, int]:
    """A chunk's flat buffer as megatron-core lays it out: its length, and how many of its elements are a rank's to update.

    Parameters in reverse order, each at a multiple of 64; buckets end at a multiple of 128 and of the ranks that share them.
    """
    unit = math.lcm(ranks, 128)
    buckets: list[tuple[int, int]] = []
    owned, at, begin = [], 0, 0
    pending = False
    for parameter in reversed(trained):
        at = -(-at // 64) * 64
        if parameter.alone and pending:
            buckets.append((begin, at := -(-at // unit) * unit))
            begin = at
        owned += [(at + low, at + high) for low, high in parameter.spans]
        at, pending = at + parameter.numel, True
        if parameter.alone or (bucket is not None and at - begin >= bucket):
            buckets.append((begin, at := -(-at // unit) * unit))
            begin, pending = at, False
    if pending:
        buckets.append((begin, at := -(-at // unit) * unit))
    shares = [(low + rank * (high - low) // ranks, low + (rank + 1) * (high - low) // ranks) for low, high in buckets]
    mine = spot = 0
    for low, high in owned:  # both are in order, and a parameter lies in one bucket
        while buckets[spot][1] <= low:
            spot += 1
        mine += max(0, min(high, shares[spot][1]) - max(low, shares[spot][0]))
    return at, mine


# ---- what a micro-batch needs


class Tokens(NamedTuple):
    """How a micro-batch's tokens lie on a rank."""

    whole: int  # T
    rank: int  # t
    split: int  # s
    ulysses: int  # ranks that share the heads
    gather: int  # ranks that gather keys and values

    @classmethod
    def of(cls, cfg: RunConfig, shape: Shape) -> "Tokens":
        p = cfg.parallel
        whole = cfg.data.row_length * cfg.data.rows_per_micro_batch
        u = ulysses_degree(shape.heads // p.tp, max(1, shape.kv_heads // p.tp), p.cp)
        return cls(whole, whole // p.cp, whole // p.cp // (p.tp if p.sp else 1), u, p.cp // u)


def saved(cfg: RunConfig, model: Model, layers: Iterable[int], *, first: bool, last: bool, fused: bool = True) -> int:
    """Bytes that the decoder saves of one micro-batch for the backward pass of these layers.

    Args:
        layers: their numbers, from 0.
        first, last: whether the embedding comes before them, the last norm after them. What the head keeps is `head_bytes`.
        fused: attention as on a GPU. False: as the reference's, which makes an output for each document and then one of all.
    """
    shape = model.shape
    n, e = Tokens.of(cfg, shape), DTYPES[cfg.model.dtype].itemsize
    alike = Counter(None if model.adapter is None else model.adapter.ranks[layer] for layer in layers)
    total = sum(count * _layer(cfg, model, ranks, fused) for ranks, count in alike.items())
    if first and cfg.lora is None:
        total += 8 * n.rank
    if last:
        total += n.split * shape.hidden * e + _norm(cfg, n.split)
    if not _recomputes(cfg, "core_attn"):
        total += _tables(cfg, shape)
    return total


def _tables(cfg: RunConfig, shape: Shape) -> int:
    """Cosines and sines of a micro-batch, which all layers share."""
    n = Tokens.of(cfg, shape)
    return n.whole // n.gather * shape.head_dim * DTYPES[cfg.model.dtype].itemsize


def _recomputes(cfg: RunConfig, module: str) -> bool:
    m = cfg.model
    return m.recompute == "full" or (m.recompute == "selective" and module in (m.recompute_modules or ("core_attn",)))


def _norm(cfg: RunConfig, rows: int) -> int:
    """What an RMSNorm keeps beside its input: a number for each row of it."""
    return rows * max(4, DTYPES[cfg.model.dtype].itemsize)


def _layer(cfg: RunConfig, model: Model, ranks: Sequence[int] | None, fused: bool) -> int:
    """Bytes that a decoder layer with these ranks beside its linears saves of a micro-batch; None: its weights are trained."""
    shape, adapter = model.shape, model.adapter
    n, p, e = Tokens.of(cfg, shape), cfg.parallel, DTYPES[cfg.model.dtype].itemsize
    hidden = n.split * shape.hidden * e
    if cfg.model.recompute == "full":
        return hidden
    heads, kv_heads, d = shape.heads // p.tp, max(1, shape.kv_heads // p.tp), shape.head_dim
    q, kv, ffn = heads * d * n.rank * e, kv_heads * d * n.rank * e, shape.ffn // p.tp * n.rank * e
    outputs = q + 2 * kv, n.rank * shape.hidden * e, 2 * ffn, n.rank * shape.hidden * e

    def beside(r: int, output: int) -> tuple[bool, int]:
        """Whether a linear's input is kept, and what is beside it: S of R numbers a token, DoRA's output before it is scaled."""
        return r > 0, n.rank * r * e + (output if r and adapter is not None and adapter.dora else 0)

    of_linears = [(True, 0)] * len(LINEARS) if ranks is None else [beside(*pair) for pair in zip(ranks, outputs, strict=True)]
    (qkv, low_qkv), (proj, low_proj), (fc1, low_fc1), (fc2, low_fc2) = of_linears
    total = hidden + _norm(cfg, n.split) + hidden * qkv + low_qkv
    if shape.qk_norm:
        total += q + 2 * kv + _norm(cfg, n.rank * (heads + kv_heads))
    in_place = q + kv if shape.qk_norm else q + 2 * kv  # v stays where the projection wrote it
    if _recomputes(cfg, "core_attn"):
        total += in_place + q * proj
    else:
        repeats = kv_repeats(heads, kv_heads, n.ulysses) or 1
        exchanged = q + 2 * kv * repeats * n.gather
        total += (in_place if p.cp == 1 else exchanged) + n.rank * heads * max(4, e)  # and the log-sum-exp
        total += q * (1 + (proj and (n.ulysses > 1 or not fused)))
    total += low_proj + hidden + _norm(cfg, n.split)
    if _recomputes(cfg, "mlp"):
        return total + hidden
    return total + hidden * fc1 + low_fc1 + 2 * ffn + ffn * fc2 + low_fc2  # gate and up; their product, where it is kept


def head_bytes(cfg: RunConfig, shape: Shape, labelled: float) -> int:
    """The head at its worst, `labelled` of the tokens having a label: what it keeps, and a block's logits as they are used."""
    n, e = Tokens.of(cfg, shape), DTYPES[cfg.model.dtype].itemsize
    count = math.ceil(n.rank * labelled)
    columns = padded_vocab(shape.vocab, cfg.parallel.tp) // cfg.parallel.tp if shape.score is None else shape.outputs
    logits = count * columns
    weight = columns * shape.hidden * e if cfg.lora is None else 0  # its gradient, before it is added
    hidden = count * shape.hidden * (2 * e + max(4, e)) + n.rank * shape.hidden * e * (cfg.parallel.sp + 1)
    return min(KEPT_BYTES, logits * e) + 2 * min(CHUNK_BYTES, logits * max(4, e)) + hidden + weight


def working_bytes(cfg: RunConfig, model: Model) -> int:
    """Beyond what is saved, what one layer's backward pass needs at its worst: an estimate."""
    shape, ranks = model.shape, None if model.adapter is None else max(model.adapter.ranks, key=sum)
    n, p, e = Tokens.of(cfg, shape), cfg.parallel, DTYPES[cfg.model.dtype].itemsize
    again = 0
    if cfg.model.recompute != "none":
        again = _layer(_without_recompute(cfg), model, ranks, True) - _layer(cfg, model, ranks, True)
    gradients = (3 * shape.ffn // p.tp * n.rank + 3 * n.rank * shape.hidden) * e
    largest = 2 * shape.ffn // p.tp * shape.hidden * e if cfg.lora is None else 0  # a weight's gradient before it is added
    gathered = 2 * n.rank * shape.hidden * e if p.sp else 0
    exchanged = 2 * (shape.heads + 2 * shape.kv_heads) // p.tp * shape.head_dim * n.rank * e if p.cp > 1 else 0
    return again + gradients + largest + gathered + exchanged + _tables(cfg, shape)


def _without_recompute(cfg: RunConfig) -> RunConfig:
    return replace(cfg, model=replace(cfg.model, recompute="none", recompute_modules=None))


def in_flight(cfg: RunConfig, rank: int, micro_batches: int) -> int:
    """Of how many micro-batches a pipeline rank holds a chunk's activations at once (1F1B; interleaved: chunks count each)."""
    p = cfg.parallel
    if p.vpp == 1:
        return min(p.pp - rank, micro_batches)
    return min(2 * (p.pp - rank - 1) + (p.vpp - 1) * p.pp + 1, micro_batches * p.vpp)


# ---- operations, bytes over links, time


class Work(NamedTuple):
    """Floating-point operations of a micro-batch's forward pass, over all layers."""

    linears: float
    attention: float
    mlp: float  # of the linears' those of the MLPs
    head: float


def work(cfg: RunConfig, shape: Shape, document: float, labelled: float) -> Work:
    """Of one micro-batch of documents of `document` tokens each, over all ranks."""
    tokens = cfg.data.row_length * cfg.data.rows_per_micro_batch
    n = min(document, cfg.data.row_length)
    none, one = shape.flops([], 0), shape.flops([1], 0)
    per_square = (shape.flops([2], 0) - 2 * one) / 2  # a document of 2: 2 linears and 4 squares
    linears = (one - none - per_square) * tokens
    mlp = 2.0 * shape.layers * 3 * shape.hidden * shape.ffn * tokens
    return Work(linears, per_square * n * tokens, mlp, shape.flops([], 1) * labelled * tokens)


def asked(cfg: RunConfig) -> int:
    """Forward passes before the training pass: of what is in memory to compare with, and of the model for what a loss knows of a step."""
    needs = needs_of(cfg.loss)
    of_reference = len(needs & {"reference", "teacher", "kl"}) if place_of(cfg) != "nowhere" else 0
    return of_reference + len(needs & {"kl", "step"})


def train_flops(cfg: RunConfig, model: Model, w: Work) -> float:
    """Operations of a training step for a forward pass of `w`: what is recomputed is done once more; what is frozen has no gradient.

    A teacher's pass counts as one of the model's, whatever its shape.
    """
    full, adapters = model.adapter is None, 0.0
    if model.adapter is not None:
        tokens = cfg.data.row_length * cfg.data.rows_per_micro_batch
        adapters = 6.0 * tokens * model.adapter.low_rank
    total = (3 if full else 2) * (w.linears + w.head) + 3 * w.attention + adapters + asked(cfg) * (w.linears + w.attention + w.head)
    if cfg.model.recompute == "full":
        return total + w.linears + w.attention
    return total + _recomputes(cfg, "core_attn") * w.attention + _recomputes(cfg, "mlp") * w.mlp


class Links(NamedTuple):
    """Bytes that the busiest rank sends in a step."""

    tp: float
    pp: float
    cp: float
    dp: float


def links(cfg: RunConfig, shape: Shape, h: Held, sharing: int, micro_batches: int) -> Links:
    """Bytes that a rank with these weights sends in a step to the others of each group; `sharing` ranks share its gradients."""
    n, p, e = Tokens.of(cfg, shape), cfg.parallel, DTYPES[cfg.model.dtype].itemsize
    layers = sum(h.layers)
    before = asked(cfg)
    passes = 2 + (cfg.model.recompute == "full") + before
    hidden = n.rank * shape.hidden * e
    # A layer's two all-reduces a pass are, under sp, two gathers and two reduce-scatters; a trained weight's input is gathered again.
    tp = layers * hidden * (4 * passes + (2 if p.sp and cfg.lora is None else 0)) + 4 * hidden
    heads, kv_heads = shape.heads // p.tp, max(1, shape.kv_heads // p.tp)
    repeated = kv_heads * (kv_repeats(heads, kv_heads, n.ulysses) or 1)
    u, r, unit = n.ulysses, n.gather, n.rank * shape.head_dim * e
    layer = (u - 1) / u * unit * 2 * (heads + repeated) + (r - 1) * unit * 2 * repeated
    cp = layers * layer * (2 + _recomputes(cfg, "core_attn") + before)
    pp = (2 + before) * p.vpp * n.split * shape.hidden * e if p.pp > 1 else 0
    dp = (sharing - 1) / sharing * (h.gradient_bytes + h.trained * e) + h.gathered_bytes * passes * micro_batches
    return Links((p.tp - 1) / p.tp * tp * micro_batches, float(pp * micro_batches), cp * micro_batches, dp)


@dataclass(frozen=True)
class Planned:
    """A configuration on hardware. Bytes are those of the pipeline rank that needs most."""

    cfg: RunConfig
    world: int
    stage: int  # that rank's place in the pipeline
    held: Held
    activations: int  # of all micro-batches in flight
    in_flight: int
    working: int
    head: int
    flops_per_token: float  # of a training step
    links: Links
    seconds: float  # of a step
    parts: Mapping[str, float]  # of these seconds: compute, bubble, tp, pp, cp, dp, memory, host
    tokens_per_second: float
    mfu: float  # operations that the model needs, without what is computed again, of what the GPUs could do

    @property
    def bytes(self) -> int:
        """All that the rank needs at its worst."""
        return self.held.bytes + self.activations + max(self.working, self.head)


@dataclass(frozen=True)
class Documents:
    """What the rows hold, as far as it decides time and memory."""

    length: float = float(SyntheticData.mean_length)  # tokens
    labelled: float = SyntheticData.labelled  # share of them


def documents_of(cfg: RunConfig) -> Documents:
    """Of made-up data what it says, else what moderation data is like."""
    d = cfg.data.train
    return Documents(float(d.mean_length), d.labelled) if isinstance(d, SyntheticData) else Documents()


def plan(cfg: RunConfig, model: Model, world: int, hardware: Hardware, documents: Documents) -> Planned:
    """What `cfg` comes to on `world` GPUs.

    Raises:
        MegamodError: the grid does not fit the model, the batch or the number of GPUs; the nearest that does is said.
    """
    p, shape = cfg.parallel, model.shape
    split = check(p, shape, world)
    micro_batches = check_rows(cfg, shape, world)
    worst: tuple[int, int, Held, int, int, int] | None = None
    for pp in range(p.pp):
        h = held(cfg, model, world, pp=pp)
        numbers = range(pp, len(split), p.pp)
        each = [saved(cfg, model, range(sum(split[:i]), sum(split[: i + 1])), first=i == 0, last=i == len(split) - 1) for i in numbers]
        count = in_flight(cfg, pp, micro_batches)
        full, rest = divmod(count, len(each))
        kept = full * sum(each) + sum(sorted(each, reverse=True)[:rest])
        head = head_bytes(cfg, shape, documents.labelled) if len(split) - 1 in numbers else 0
        working = working_bytes(cfg, model)
        total = h.bytes + kept + max(head, working)
        if worst is None or total > worst[0]:
            worst = total, pp, h, kept, count, head
    assert worst is not None, "a pipeline has a rank"
    _, stage, h, kept, count, head = worst
    w = work(cfg, shape, documents.length, documents.labelled)
    trained = train_flops(cfg, model, w)
    tokens = cfg.data.row_length * cfg.data.rows_per_micro_batch
    # The slowest stage sets the pace; the head is the last one's.
    shares = [sum(split[i] for i in range(pp, len(split), p.pp)) / shape.layers for pp in range(p.pp)]
    top = ((3 if cfg.lora is None else 2) + asked(cfg)) * w.head
    body = trained - top
    slowest = max(body * part + (top if pp == p.pp - 1 else 0) for pp, part in enumerate(shares)) / (p.tp * p.cp)
    sent = links(cfg, shape, h, world // (p.tp * p.pp), micro_batches)
    compute = micro_batches * slowest / (hardware.flops * hardware.efficiency)
    tp, cp = sent.tp / hardware.rate(p.tp), sent.cp / hardware.rate(p.tp * p.cp)
    pp_seconds = sent.pp / (hardware.rate(world))
    dp = sent.dp / hardware.rate(world // p.pp)
    passes = 2 + (cfg.model.recompute == "full") + asked(cfg)
    dense = shape.quantization is not None  # each pass reads half a byte a weight and writes two
    in_4_bits = passes * micro_batches * 2.5 * h.parameters if dense else 0
    update = 2 * (h.master_bytes + h.moment_bytes) + h.gradient_bytes
    memory = (in_4_bits + update) / (hardware.bandwidth * hardware.reached)
    host = 2 * h.host_bytes / hardware.host  # each of the four once in or out of a core, and once more over the bus or back
    bubble = (compute + tp + cp) * (p.pp - 1) / (p.vpp * micro_batches)
    seconds = compute + bubble + tp + cp + pp_seconds + dp + memory + host
    rate = cfg.data.rows_per_step * cfg.data.row_length / seconds
    ideal = 3 if cfg.lora is None else 2
    mfu = (ideal * (w.linears + w.head) + 3 * w.attention) / tokens * rate / world / hardware.flops
    parts = {"compute": compute, "bubble": bubble, "tp": tp, "pp": pp_seconds, "cp": cp, "dp": dp, "memory": memory, "host": host}
    return Planned(cfg, world, stage, h, kept, count, working_bytes(cfg, model), head, trained / tokens, sent, seconds, parts, rate, mfu)


def longest_row(cfg: RunConfig, model: Model, world: int, hardware: Hardware, documents: Documents) -> int | None:
    """Tokens of the longest row that fits, a multiple of what shares a row; None: none does."""
    p = cfg.parallel
    unit = math.lcm(p.cp * (p.tp if p.sp else 1), 64)
    bound = model.shape.longest_document

    def fits(units: int) -> bool:
        longer = replace(cfg, data=replace(cfg.data, row_length=units * unit))
        return plan(longer, model, world, hardware, documents).bytes <= hardware.usable

    most = (bound or 2**22) // unit
    if most < 1 or not fits(1):
        return None
    low, high = 1, 1
    while high < most and fits(high):
        low, high = high, min(2 * high, most)
    if fits(high):
        return high * unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


# ---- search


SEARCHED = ("tp", "pp", "vpp", "cp", "sp", "layers_per_stage", "shard_base")  # of cfg.parallel


class Kind(NamedTuple):
    """Ways of cutting a model that are compared with each other."""

    tp: int
    pp: int

    def __str__(self) -> str:
        return f"tp {self.tp} · pp {self.pp}"


class Lost(NamedTuple):
    """Why a kind of grid is not the best."""

    kind: Kind
    reason: str


def fit(cfg: RunConfig, model: Model, world: int, hardware: Hardware, documents: Documents) -> tuple[list[Planned], list[Lost]]:
    """All grids, micro-batches and ways to recompute of this run's model, rows and losses on `world` GPUs; and of those that do not fit,
    whether they do when the base is in slices, or the optimizer's state on the host.

    Returns:
        What fits, the fastest first; and why each kind that has not the fastest lost, in one line each.
    """
    found: list[Planned] = []
    lost: list[Lost] = []
    for kind in (Kind(tp, pp) for tp in _divisors(world) for pp in _divisors(world // tp)):
        fitting: list[Planned] = []
        least: Planned | None = None
        refusal = ""
        for candidate in _of_kind(cfg, kind, world):
            try:
                one = _relieved(candidate, model, world, hardware, documents)
            except MegamodError as error:
                refusal = refusal or str(error)
                continue
            least = one if least is None or one.bytes < least.bytes else least
            if one.bytes <= hardware.usable:
                fitting.append(one)
        if fitting:
            found.append(min(fitting, key=lambda one: (one.seconds, one.bytes)))
            found += sorted(fitting, key=lambda one: (one.seconds, one.bytes))[1:4]
        elif least is not None:
            needs = f"{least.bytes / GIB:.1f} GiB of {hardware.usable / GIB:.1f}"
            lost.append(Lost(kind, f"does not fit: at least {needs} ({_largest(least)}), {said(least.cfg)}"))
        else:
            lost.append(Lost(kind, refusal))
    found.sort(key=lambda one: (one.seconds, one.bytes))
    if found:
        seen = {_kind(found[0])}
        for one in found:
            if _kind(one) not in seen:
                seen.add(_kind(one))
                slower = found[0].tokens_per_second / one.tokens_per_second
                lost.append(Lost(_kind(one), f"{slower:.2f} × slower: {_costliest(one, found[0])}, {said(one.cfg)}"))
    return found, sorted(lost)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _kind(one: Planned) -> Kind:
    return Kind(one.cfg.parallel.tp, one.cfg.parallel.pp)


def _of_kind(cfg: RunConfig, kind: Kind, world: int) -> Iterator[RunConfig]:
    for cp in _divisors(world // (kind.tp * kind.pp)):
        for vpp in (1, 2, 4) if kind.pp > 1 else (1,):
            own = cfg.parallel.layers_per_stage
            split = own if own is not None and len(own) == kind.pp * vpp else None
            p = replace(cfg.parallel, tp=kind.tp, pp=kind.pp, cp=cp, vpp=vpp, sp=kind.tp > 1, layers_per_stage=split, shard_base=False)
            o = replace(cfg.optim, offload=False)
            for rows in (1, 2, 4):
                d = replace(cfg.data, rows_per_micro_batch=rows)
                for recompute in get_args(Recompute):
                    m = replace(cfg.model, recompute=recompute, recompute_modules=None)
                    yield replace(cfg, parallel=p, data=d, model=m, optim=o)


def _relieved(cfg: RunConfig, model: Model, world: int, hardware: Hardware, documents: Documents) -> Planned:
    """The plan of `cfg`, with its base in slices, its optimizer's state on the host or both where it fits so, and not without: each costs
    time. Raises MegamodError: see `plan`."""
    p = cfg.parallel
    sliced = [False] + [True] * (cfg.lora is not None and world > p.tp * p.pp)
    found: list[Planned] = []
    for offload in (False, True):
        for shard_base in sliced:
            one = replace(cfg, parallel=replace(p, shard_base=shard_base), optim=replace(cfg.optim, offload=offload))
            found.append(plan(one, model, world, hardware, documents))
            if found[-1].bytes <= hardware.usable:
                return found[-1]
    return min(found, key=lambda one: one.bytes)


def said(cfg: RunConfig) -> str:
    """`tp 8 · pp 4 · vpp 1 · cp 2 · 1 row a micro-batch · recompute full`"""
    p, rows = cfg.parallel, cfg.data.rows_per_micro_batch
    grid = f"tp {p.tp} · pp {p.pp} · vpp {p.vpp} · cp {p.cp}" + " · base in slices" * p.shard_base
    rest = f"recompute {cfg.model.recompute}" + " · offload" * cfg.optim.offload
    return f"{grid} · {rows} {'row' if rows == 1 else 'rows'} a micro-batch · {rest}"


def _largest(one: Planned) -> str:
    h = one.held
    sizes = {
        "weights": h.weight_bytes, "gradients": h.gradient_bytes, "masters and moments": h.master_bytes + h.moment_bytes,
        "activations": one.activations, "work": max(one.working, one.head),
    }  # fmt: skip
    name = max(sizes, key=lambda key: sizes[key])
    return f"{name} {sizes[name] / GIB:.1f}"


def _costliest(one: Planned, best: Planned) -> str:
    """What costs a plan most time beyond the best one's."""
    names = {"compute": "more to compute", "bubble": "the pipeline's bubble", "memory": "memory traffic", "host": "the update on the host"}
    worse = {key: one.parts[key] - best.parts[key] for key in one.parts}
    key = max(worse, key=lambda name: worse[name])
    return f"{names.get(key, f'sending over {key}')} takes {one.parts[key] / one.seconds:.0%} of a step"


def nearest_fit(cfg: RunConfig, model: Model, world: int, hardware: Hardware, documents: Documents) -> str | None:
    """What to change in a configuration that does not fit, as overrides: the fewest changes, of these the fastest; None: nothing helps."""
    best: tuple[int, float, str] | None = None
    for kind in (Kind(tp, pp) for tp in _divisors(world) for pp in _divisors(world // tp)):
        for candidate in _of_kind(cfg, kind, world):
            words = changes(cfg, candidate)
            if best is not None and len(words) > best[0]:
                continue
            try:
                one = _relieved(candidate, model, world, hardware, documents)
            except MegamodError:
                continue
            words = changes(cfg, one.cfg)
            if one.bytes <= hardware.usable:
                best = min(best or (len(words) + 1, 0.0, ""), (len(words), one.seconds, " ".join(words)))
    return None if best is None else best[2]


def changes(cfg: RunConfig, other: RunConfig) -> list[str]:
    """The overrides that make `other` of `cfg`, as far as a plan's search goes."""
    pairs = [
        *((f"parallel.{name}", cfg.parallel, other.parallel, name) for name in SEARCHED),
        ("data.rows_per_micro_batch", cfg.data, other.data, "rows_per_micro_batch"),
        *((f"model.{name}", cfg.model, other.model, name) for name in ("recompute", "recompute_modules")),
        ("optim.offload", cfg.optim, other.optim, "offload"),
    ]
    return [f"{key}={getattr(b, name)}" for key, a, b, name in pairs if getattr(a, name) != getattr(b, name)]
