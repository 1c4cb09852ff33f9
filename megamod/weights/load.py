"""Hugging Face → rank, by slices: each rank reads only its share of each tensor, straight into its parameters.

Strict: every key of the checkpoint and every parameter exactly once, with the shape that config.json promises.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from megamod import foreign
from megamod.errors import MegamodError, listed
from megamod.model.shape import Shape, read_shape
from megamod.parallel.collectives import together
from megamod.parallel.grid import Grid
from megamod.weights import checksums
from megamod.weights.table import Held, frozen, hf_shapes, placed, zero_padding

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old exports carry and no computation reads.
IGNORED = ("rotary_emb.inv_freq",)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8}


class Extent(NamedTuple):
    """Bytes of a file."""

    file: Path
    start: int
    length: int


class Source(Protocol):
    """Tensors by Hugging Face's names, readable in part."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor: ...


@runtime_checkable
class OfDirectories(Protocol):
    """A Source that reads whole directories, which may have checksums."""

    @property
    def directories(self) -> tuple[Path, ...]: ...


@runtime_checkable
class InFiles(Source, Protocol):
    """A Source that knows where its numbers lie."""

    def extents(self, name: str, offset: Sequence[int], size: Sequence[int]) -> list[Extent] | None:
        """A box's bytes in the order of its numbers; None: they lie scattered."""
        ...


def together_from(shape: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> int | None:
    """At which of a tensor's numbers a box begins that is one piece of them, in their order; None: it is several."""
    cut = next((axis for axis, n in enumerate(size) if n != 1), len(size))
    if any(n != whole for n, whole in zip(size[cut + 1 :], shape[cut + 1 :], strict=True)):
        return None
    at = 0
    for o, whole in zip(offset, shape, strict=True):
        at = at * whole + o
    return at


def directories(source: Source) -> tuple[Path, ...]:
    """What `source` reads; none where it is in memory, drawn, or has checksums of its own."""
    return source.directories if isinstance(source, OfDirectories) else ()


def verify(source: Source, rank: int = 0, world: int = 1) -> None:
    """Compare the files that `source` reads with their checksums, where there are some; see `checksums.verify`. Raises MegamodError."""
    for directory in directories(source):
        checksums.verify(directory, rank, world)


def verify_together(source: Source, grid: Grid) -> None:
    """`verify`, its files shared by all ranks; every rank calls it. Raises MegamodError on every rank alike."""
    if directories(source):
        together(lambda: verify(source, grid.rank, grid.world))


class Safetensors:
    """A directory of safetensors shards. Only bare file names inside the directory are opened, and nothing is executed.

    Raises:
        MegamodError: no checkpoint, a shard that is missing, truncated, outside the directory or not named `*.safetensors`,
            or an index that disagrees with the shards.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._where, names = self._index()
        self._shards = {name: self._open(name) for name in sorted(names, key=str)}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._starts: dict[str, dict[str, int]] = {}
        for name, shard in self._shards.items():
            for key in shard.keys():  # noqa: SIM118 (a method of safe_open, no mapping)
                if self._where.setdefault(key, name) != name:
                    raise MegamodError(f"{self.directory / INDEX}: {key} is said to be in {self._where[key]}, and {name} holds it")
                self._shapes[key] = tuple(shard.get_slice(key).get_shape())
        absent = sorted(set(self._where) - set(self._shapes))
        if absent:
            raise MegamodError(f"{self.directory / INDEX}: {absent[0]} is not in {self._where[absent[0]]}, where it is said to be")

    def _index(self) -> tuple[dict[str, str], set[str]]:
        file = self.directory / INDEX
        if not file.exists():
            if not (self.directory / SINGLE).exists():
                raise MegamodError(f"{self.directory}: holds neither {INDEX} nor {SINGLE}")
            return {}, {SINGLE}
        try:
            where = foreign.read_json(file)["weight_map"]
            names = set(where.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MegamodError(f"{file}: a JSON object with `weight_map` was expected ({error})") from None
        return dict(where), names

    def _open(self, name: str) -> safe_open:
        path = self.directory / str(name)
        if not isinstance(name, str) or not name.endswith(".safetensors") or not foreign.is_inside(self.directory, name):
            raise MegamodError(f"{self.directory / INDEX}: {name!r} must be a bare *.safetensors name inside the directory")
        try:
            return safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError:
            raise MegamodError(f"{path}: missing, and the index names it") from None
        except (SafetensorError, OSError) as error:
            raise MegamodError(f"{path}: not a whole safetensors file ({error}); copy it again") from None

    @property
    def directories(self) -> tuple[Path, ...]:
        return (self.directory,)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        kind = self._shards[self._where[name]].get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise MegamodError(f"{self.directory}: {name} is of {kind}: one of {', '.join(DTYPES)} was expected")
        return DTYPES[kind]

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        view = self._shards[self._where[name]].get_slice(name)
        return view[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]

    def extents(self, name: str, offset: Sequence[int], size: Sequence[int]) -> list[Extent] | None:
        first = together_from(self._shapes[name], offset, size)
        if first is None:
            return None
        itemsize = self.dtype(name).itemsize
        return [Extent(self.directory / self._where[name], self._start(name) + first * itemsize, math.prod(size) * itemsize)]

    def _start(self, name: str) -> int:
        """The first byte of a tensor in its file, which safetensors has checked."""
        file = self._where[name]
        if file not in self._starts:
            with (self.directory / file).open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = foreign.parse_json(opened.read(length))
            self._starts[file] = {key: 8 + length + about["data_offsets"][0] for key, about in header.items() if key != "__metadata__"}
        return self._starts[file][name]


class Tensors:
    """A state dict in memory as a Source: for tests and notebooks."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        return self.tensors[name][tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]


class Random:
    """Weights drawn from N(0, std²), norms 1 and biases 0; a tensor depends on its name and the seed, not on the grid."""

    def __init__(self, shape: Shape, seed: int, std: float = 0.02) -> None:
        self._shapes, self.seed, self.std = hf_shapes(shape), seed, std

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        if len(self._shapes[name]) == 1:
            return torch.ones(*size) if name.endswith("norm.weight") else torch.zeros(*size)
        result = torch.empty(*size)
        for i in range(size[0]):  # row by row, so that a rank draws its rows only
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name} {offset[0] + i}".encode()))
            row = torch.randn(self._shapes[name][1], generator=generator) * self.std
            result[i] = row[offset[1] : offset[1] + size[1]]
        return result


class Scored:
    """A model with a vocabulary as one with a head of scores: `score.weight` is drawn as in `Random`, `score.bias` is 0.

    Args:
        source: a checkpoint whose config.json says no head of scores; its `lm_head.weight`, if there is one, is not read.
        shape: with the head of scores.

    Raises:
        MegamodError: `source` has a head of another number of scores.
    """

    def __init__(self, source: Source, shape: Shape, seed: int) -> None:
        self.source, self._drawn = source, Random(shape, seed)
        own = source.shapes()
        scores = {name: size for name, size in self._drawn.shapes().items() if name.startswith("score.")}
        for name, size in scores.items():
            if own.get(name, size) != size:
                raise MegamodError(f"the checkpoint's {name} is {own[name]}, and {shape.score} needs {size}")
        self._shapes = {name: size for name, size in {**scores, **own}.items() if name != HEAD}

    @property
    def directories(self) -> tuple[Path, ...]:
        return directories(self.source)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return self._holder(name).dtype(name)

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        return self._holder(name).read(name, offset, size)

    def _holder(self, name: str) -> Source:
        return self.source if name in self.source.shapes() else self._drawn


def weights_at(path: str | Path, shape: Shape, seed: int) -> Source:
    """The checkpoint at `path` for a model of `shape`: with a new head of scores, if `shape` has one and config.json does not.

    Only names and shapes are read so far: they are compared with `shape` before anybody makes room for them.

    Raises:
        MegamodError: see `Safetensors`, `BitsAndBytes`, `Scored`, `check_keys` and `read_shape`.
    """
    from megamod.weights.bitsandbytes import BitsAndBytes, says_four_bits  # not above: it stands on this module

    source: Source = BitsAndBytes(path) if says_four_bits(path) else Safetensors(path)
    source = source if shape.score is None or read_shape(path).score is not None else Scored(source, shape, seed)
    check_keys(source, shape, str(path))
    return source


def check_keys(source: Source, shape: Shape, where: str) -> None:
    """Every tensor once, in its shape, and no other.

    Raises:
        MegamodError: a line that lists what is missing, unexpected or mis-shaped.
    """
    expected, found = hf_shapes(shape), source.shapes()
    redundant = {HEAD} if shape.tied else set()
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(k for k in found.keys() - expected.keys() - redundant if not k.endswith(IGNORED))
    wrong = [f"{k} is {found[k]}, not {expected[k]}" for k in sorted(expected.keys() & found.keys()) if found[k] != expected[k]]
    refuse_keys(missing, unexpected, wrong, where)


def refuse_keys(missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str], where: str) -> None:
    """Raises MegamodError with a line that lists them, where there are any."""
    kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": wrong}
    faults = [f"{len(names)} {what}: {listed(names)}" for what, names in kinds.items() if names]
    if faults:
        raise MegamodError(f"{where}: the tensors do not match config.json: {'; '.join(faults)}")


def load(chunks: Sequence[nn.Module], shape: Shape, grid: Grid, source: Source, where: str = "checkpoint") -> list[Held]:
    """Fill this rank's chunks from `source`, converting the dtype, tensor by tensor; every rank calls it. Returns where all pieces lie.

    Raises:
        MegamodError: see `check_keys` and `verify`; or a tied checkpoint whose lm_head.weight is not its embedding.
    """
    check_keys(source, shape, where)
    verify_together(source, grid)
    own = (chunks, shape, grid.tp.size, grid.tp.rank)
    parameters = placed(*own)
    items: list[Held] = [*parameters, *frozen(*own)]
    compare_head = shape.tied and HEAD in source.shapes()
    fault: Exception | None = None
    for parameter in parameters:
        with torch.no_grad():
            zero_padding(parameter)
    for item in tqdm(items, desc="loading", unit="parameter", delay=3, mininterval=3, disable=grid.rank != 0):
        for piece in item.pieces:
            try:
                item.fill(piece, source, grid)
                if fault is None and compare_head and piece.hf == EMBEDDING:
                    check_tied(source, piece.offset, piece.size, where)
            except Exception as error:  # this rank goes on as the others do, and meets them where they quantise together
                fault = fault or error
    if fault is not None:
        raise fault
    return items


def check_tied(source: Source, offset: Sequence[int], size: Sequence[int], where: str) -> None:
    """Raises MegamodError where a tied checkpoint has a head of its own, in a box of the embedding."""
    if not torch.equal(*(source.read(name, offset, size) for name in (EMBEDDING, HEAD))):
        raise MegamodError(f"{where}: config.json ties the embeddings, but {HEAD} differs from them")
