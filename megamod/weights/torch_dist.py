"""Megatron-LM's checkpoints, `--ckpt-format torch_dist`: where boxes of tensors lie in files, and the files; no process group is needed.

    <checkpoint>/latest_checkpointed_iteration.txt    `release`, or a step
    <checkpoint>/release/                             or iter_0001000/
        .metadata          a pickle: each tensor's shape, its boxes, and the bytes of which file hold each
        __0_0.distcp       for each box what torch.save writes: a ZIP with the numbers as they are in memory, and a pickle beside them
        common.pt          what every rank has alike: `args`, the iteration
        metadata.json      which of megatron-core's formats this is

Those pickles are read by an unpickler that knows no function and makes of every class it does not refuse an empty record: what a file
says is looked at, and never called. The numbers themselves are mapped into memory, and no box is read whole.
"""

import io
import itertools
import json
import math
import mmap
import pickle
import re
import struct
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)  # fmt: skip

from megamod import foreign
from megamod.errors import MegamodError, expected
from megamod.files import sync
from megamod.weights.load import Extent, together_from
from megamod.weights.table import Box, overlap

METADATA, FORMAT, COMMON, TRACKER = ".metadata", "metadata.json", "common.pt", "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron-LM's word for weights that were no step of a run
BACKEND = "torch_dist"
VERSIONS = (1,)  # of `sharded_backend_version`
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")  # of a model whose layers differ, each under a name of its own
PICKLE_LIMIT = 1 << 20  # bytes of the pickle beside a box: it has some hundreds
DTYPES = {
    "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
}  # fmt: skip
STORAGES = {dtype: getattr(torch, name) for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """A box of a tensor, as it lies in a file."""

    file: str
    start: int  # its first byte
    box: Box


def is_torch_dist(path: str | Path) -> bool:
    """Whether `path` is such a checkpoint, or a directory that names one."""
    return any((Path(path) / name).is_file() for name in (TRACKER, METADATA))


def directory_of(path: str | Path) -> Path:
    """The directory that holds `.metadata`: `path`, or the one that its tracker names. Raises MegamodError."""
    root = Path(path)
    if (root / METADATA).is_file():
        return root
    with expected(f"a checkpoint of Megatron-LM, with {METADATA} or {TRACKER}", root / TRACKER):
        word = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    name = word if word == RELEASE else f"iter_{int(word):07d}" if word.isdecimal() and len(word) < 12 else ""
    if not (root / name / METADATA).is_file() or not name:
        legacy = " (mp_rank_… directories are the older format `torch`: convert these with Megatron-LM's tools/checkpoint)"
        raise MegamodError(f"{root / TRACKER}: {word[:40]!r}: no directory with {METADATA} is there by that name{legacy}")
    return root / name


class TorchDist:
    """The tensors of such a checkpoint by Megatron's names, readable in part: a Source.

    Layers that are stored one by one (`decoder.layers.3.…`) are shown as those are that are stored together: `decoder.layers.…`, with
    the layer for the first axis.

    Raises:
        MegamodError: damaged, of another format, with files that lie elsewhere, or with something in it that is no data.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = directory_of(path)
        _check_format(self.directory)
        self._files: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._stored: dict[str, list[Stored]] = {}
        self.others: list[str] = []  # what is no tensor
        try:
            self._open(_metadata(self.directory / METADATA))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, zipfile.BadZipFile) as error:
            what = f"{type(error).__name__}: {error}"
            raise MegamodError(f"{self.directory / METADATA}: not what Megatron-LM writes, or damaged ({what})") from None

    @property
    def directories(self) -> tuple[Path, ...]:
        return (self.directory,)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """A box of a tensor: a view of the file where one of its boxes holds all of it. It is not to be written to."""
        wanted: Box = (tuple(offset), tuple(size))
        parts = [(met, stored) for stored in self._stored[name] if (met := overlap(wanted, stored.box)) is not None]
        dtype = self._dtypes[name]
        if len(parts) == 1 and all(s == slice(0, n) for s, n in zip(parts[0][0][0], size, strict=True)):
            ((_, inside), stored) = parts[0]
            return self._view(stored, dtype)[inside]
        result = torch.empty(*size, dtype=dtype)
        for (here, inside), stored in parts:
            result[here] = self._view(stored, dtype)[inside]
        return result

    def extents(self, name: str, offset: Sequence[int], size: Sequence[int]) -> list[Extent] | None:
        """Where a box lies that is one piece of a stored one; None: it is several, or of several."""
        wanted: Box = (tuple(offset), tuple(size))
        (met, stored), *more = [(met, stored) for stored in self._stored[name] if (met := overlap(wanted, stored.box)) is not None]
        inside = tuple(part.start for part in met[1])
        first = together_from(stored.box[1], inside, size)
        if more or first is None or any(part != slice(0, n) for part, n in zip(met[0], size, strict=True)):
            return None
        itemsize = self._dtypes[name].itemsize
        return [Extent(self.directory / stored.file, stored.start + first * itemsize, math.prod(size) * itemsize)]

    def _view(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        size = stored.box[1]
        raw = self._files[stored.file][stored.start : stored.start + math.prod(size) * dtype.itemsize]
        return torch.from_numpy(raw).view(dtype).view(size)

    def _open(self, metadata: "Record") -> None:
        tensors, where = dict(metadata.state_dict_metadata), metadata.storage_data
        by_name: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        for index, info in where.items():
            by_name[index.fqn].append((index, info))
        stacks: dict[str, dict[int, str]] = defaultdict(dict)
        for name, about in tensors.items():
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is no name")
            if about.kind != "TensorStorageMetadata":
                self.others.append(name)
                continue
            self._add(name, about, by_name[name])
            if (match := LAYER.fullmatch(name)) is not None:
                stacks[f"decoder.layers.{match[2]}"][int(match[1])] = name
        for name, layers in stacks.items():
            self._stack(name, layers)

    def _add(self, name: str, about: "Record", infos: Iterable[tuple[Any, Any]]) -> None:
        """A tensor: its boxes are disjoint and the whole, and each is in a file of the directory."""
        shape = _counts(about.size)
        sizes = {_counts(chunk.offsets): _counts(chunk.sizes) for chunk in about.chunks}
        stored, dtypes = [], set()
        for index, info in infos:
            offset = _counts(index.offset)
            size = sizes.pop(offset)
            if not all(o + n <= whole for o, n, whole in zip(offset, size, shape, strict=True)):
                raise ValueError(f"{name}: a box at {offset} reaches beyond {shape}")
            start, dtype = self._data(info, size, name)
            stored.append(Stored(info.relative_path, start, (offset, size)))
            dtypes.add(dtype)
        numbers = sum(math.prod(one.box[1]) for one in stored)
        if sizes or numbers != math.prod(shape) or len(dtypes) != 1 or not _apart([one.box for one in stored]):
            raise MegamodError(f"{self.directory}: the boxes of {name} are not the whole of it, each once: a rank's file may be missing")
        self._shapes[name], self._stored[name], (self._dtypes[name],) = shape, stored, dtypes

    def _data(self, info: "Record", size: tuple[int, ...], name: str) -> tuple[int, torch.dtype]:
        """First byte and dtype of the numbers of a box, whose ZIP is where `info` says."""
        file = info.relative_path
        first, length = _counts((info.offset, info.length))
        data = self._mapped(file)
        if first + length > len(data):
            raise MegamodError(f"{self.directory / file}: shorter than {METADATA} says: copy it again")
        try:
            with zipfile.ZipFile(_Window(data[first : first + length])) as archive:
                records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
                if records["data.pkl"].file_size > PICKLE_LIMIT:
                    raise ValueError(f"a pickle of {records['data.pkl'].file_size:,} bytes")
                if "byteorder" in records and records["byteorder"].file_size < 16 and archive.read(records["byteorder"]) != b"little":
                    raise ValueError("the numbers are big-endian")
                dtype = _described(archive.read(records["data.pkl"]), size)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, zipfile.BadZipFile) as error:
            what = f"{type(error).__name__}: {error}"
            raise MegamodError(f"{self.directory / file}: {name}: not what torch.save writes of a tensor, or damaged ({what})") from None
        entry = records["data/0"]
        header = data[first + entry.header_offset : first + entry.header_offset + 30].tobytes()
        start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        numbers = math.prod(size) * dtype.itemsize
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < numbers or start + numbers > length:
            raise MegamodError(f"{self.directory / file}: {name}: not the bytes of {math.prod(size):,} numbers, or damaged")
        return first + start, dtype

    def _mapped(self, file: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a file; nothing of them is read yet."""
        if file not in self._files:
            if not file.endswith(".distcp") or not foreign.is_inside(self.directory, file):
                raise MegamodError(f"{self.directory / METADATA}: {file!r} must be a bare *.distcp name inside the directory")
            path = self.directory / file
            with expected("a file that can be read", path), path.open("rb") as opened:
                empty = path.stat().st_size == 0
                # A private mapping, which may be written to by what nobody here does: torch makes tensors of no other without a word.
                mapped = b"" if empty else mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
                self._files[file] = np.frombuffer(mapped, np.uint8)
        return self._files[file]

    def _stack(self, name: str, layers: Mapping[int, str]) -> None:
        first = layers[min(layers)]
        alike = {(self._shapes[one], self._dtypes[one]) for one in layers.values()}
        if name in self._shapes or sorted(layers) != list(range(len(layers))) or len(alike) != 1:
            raise MegamodError(f"{self.directory}: {first} and its neighbours: layers 0, 1, … of one shape were expected")
        self._shapes[name], self._dtypes[name] = (len(layers), *self._shapes[first]), self._dtypes[first]
        self._stored[name] = [
            Stored(file, start, ((layer, *offset), (1, *size)))
            for layer, one in layers.items()
            for file, start, (offset, size) in self._stored[one]
        ]
        for one in layers.values():
            del self._shapes[one], self._dtypes[one], self._stored[one]


def _check_format(directory: Path) -> None:
    file = directory / FORMAT
    if not file.exists():  # torch's own checkpoints, which megatron-core's are, have no such file
        return
    try:
        said = foreign.read_json(file)
        backend, version = said["sharded_backend"], said["sharded_backend_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MegamodError(f"{file}: not what Megatron-LM writes, or damaged ({error})") from None
    if backend != BACKEND or version not in VERSIONS:
        raise MegamodError(
            f"{file}: {backend} {version}: only {BACKEND}, version {VERSIONS[-1]}, is read; save with --ckpt-format torch_dist"
        )


def _counts(values: Any) -> tuple[int, ...]:
    counts = tuple(values)
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in counts):
        raise ValueError(f"{counts} are no counts")
    return counts


def _apart(boxes: Sequence[Box], axis: int = 0) -> bool:
    """Whether no two boxes have a number in common, as layers, experts and ranks cut a tensor: along one axis after the other."""
    if len(boxes) < 2:
        return True
    if axis == len(boxes[0][0]):
        return False  # two at the same place
    groups: dict[tuple[int, int], list[Box]] = defaultdict(list)
    for box in boxes:
        groups[box[0][axis], box[1][axis]].append(box)
    places = itertools.pairwise(sorted(groups))
    if any(offset + size > following for (offset, size), (following, _) in places):
        return False
    return all(_apart(group, axis + 1) for group in groups.values())


# --- pickles, looked at ----------------------------------------------------------------------------------------------------


class Record:
    """What stands for an instance of any class of a pickle: its attributes, and nothing that runs."""

    kind = ""

    def __init__(self, *args: Any) -> None:
        self.args = args

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __hash__(self) -> int:
        return id(self)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):  # TensorProperties' is a tuple; none of these is asked for anything
            self.state = state
        else:
            self.__dict__.update((str(key), value) for key, value in state.items() if not str(key).startswith("__"))


class _Looking(pickle.Unpickler):
    """Knows the classes that torch.distributed.checkpoint and torch.save name, as records, and refuses all others."""

    MODULES = ("torch.distributed.checkpoint.", "pathlib")  # of which every name is a record
    NAMES = ("torch.serialization._get_layout", "torch._utils._rebuild_tensor_v2")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and (name in DTYPES or isinstance(getattr(torch, name, None), torch.dtype)):
            return Record  # a class where there is a value: nothing can be done with it but to pass it on
        if f"{module}.".startswith(self.MODULES) or f"{module}.{name}" in self.NAMES:
            return type(str(name), (Record,), {"kind": str(name)})
        raise MegamodError(f"names {module}.{name}, which is no data of a checkpoint")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _LookingAtTensor(_Looking):
    """As `_Looking`; the storage's class is its dtype."""

    def find_class(self, module: str, name: str) -> Any:
        return DTYPES[name] if module == "torch" and name in DTYPES else super().find_class(module, name)


def _metadata(file: Path) -> Record:
    with expected("a file that can be read", file), file.open("rb") as opened:
        data = opened.read(foreign.LIMIT + 1)
    if len(data) > foreign.LIMIT:
        raise MegamodError(f"{file}: it has more than {foreign.LIMIT:,} bytes")
    found = _looked_at(_Looking(io.BytesIO(data)), file)
    if not isinstance(found, Record) or found.kind != "Metadata":
        raise MegamodError(f"{file}: not what Megatron-LM writes, or damaged")
    return found


def _looked_at(unpickler: pickle.Unpickler, where: str | Path) -> Any:
    try:
        return unpickler.load()
    except MegamodError as error:
        raise MegamodError(f"{where}: {error}: it is not opened") from None
    except Exception as error:  # a damaged pickle fails in any way there is
        raise MegamodError(f"{where}: not what Megatron-LM writes, or damaged ({type(error).__name__}: {error})") from None


def _described(data: bytes, size: tuple[int, ...]) -> torch.dtype:
    """The dtype of a tensor that torch.save has written, which must be whole, of `size`, and lie as its numbers do."""
    found = _looked_at(_LookingAtTensor(io.BytesIO(data)), "its pickle")
    storage, first, shape, stride, *_ = found.args
    kind, dtype, key, _, _ = storage
    strides = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    lies = all(n == 1 or have == want for n, have, want in zip(size, stride, strides, strict=True))
    if found.kind != "_rebuild_tensor_v2" or kind != "storage" or key != "0" or first != 0 or tuple(shape) != size or not lies:
        raise ValueError(f"a tensor {tuple(shape)} in its own storage, {size}, was expected")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"numbers of one of {', '.join(map(str, DTYPES.values()))} were expected")
    return dtype


class _Window(io.RawIOBase):
    """Bytes in memory as a file, without a copy of them."""

    def __init__(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = max(0, offset + (0, self._at, len(self._data))[whence])
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        end = len(self._data) if size is None or size < 0 else self._at + size
        found = self._data[self._at : end].tobytes()
        self._at += len(found)
        return found


# --- written ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A box that was written: of which tensor, and the bytes of its ZIP."""

    name: str
    shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype
    file: str
    start: int
    length: int


class _Storage:
    """What stands for a tensor's numbers in its pickle."""


@dataclass(frozen=True)
class _Saved:
    """Pickles as a contiguous tensor does."""

    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (_Storage(), 0, self.shape, strides, False, OrderedDict())


class _TensorPickler(pickle.Pickler):
    def __init__(self, file: IO[bytes], dtype: torch.dtype, count: int) -> None:
        super().__init__(file, protocol=2)
        self._id = ("storage", STORAGES[dtype], "0", "cpu", count)

    def persistent_id(self, obj: Any) -> Any:
        return self._id if isinstance(obj, _Storage) else None


def around(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after the numbers of a tensor: a ZIP in which nothing is compressed.

    Of the numbers it has no CRC, as torch has none after `torch.serialization.set_crc32_options(False)`: torch compares none.
    """
    described = io.BytesIO()
    _TensorPickler(described, dtype, math.prod(shape)).dump(_Saved(shape))
    archive, small = _Zip(), {"data.pkl": described.getvalue(), "byteorder": b"little", "version": b"3\n"}
    before = b"".join(archive.begun(f"archive/{name}", len(data), zlib.crc32(data)) + data for name, data in small.items())
    before += archive.begun("archive/data/0", math.prod(shape) * dtype.itemsize, 0)
    return before, archive.ended()


class _Zip:
    """A ZIP64 archive, written from its beginning to its end (PKWARE's APPNOTE, 4.3)."""

    LOCAL, CENTRAL, END64, LOCATOR, END = b"PK\3\4", b"PK\1\2", b"PK\6\6", b"PK\6\7", b"PK\5\6"
    NEEDS, DATE, ELSEWHERE = 45, 33, 0xFFFFFFFF  # version 4.5; 1 January 1980; a number that has its place in the ZIP64 field

    def __init__(self) -> None:
        self._central: list[bytes] = []
        self._at = 0

    def begun(self, name: str, size: int, crc: int) -> bytes:
        """What comes before the `size` bytes of a file."""
        encoded, far = name.encode(), self.ELSEWHERE
        alike = struct.pack("<HHHHHIII", self.NEEDS, 0, 0, 0, self.DATE, crc, far, far)
        own = struct.pack("<HHQQQ", 1, 24, size, size, self._at)
        attributes = struct.pack("<HHHHHII", len(encoded), len(own), 0, 0, 0, 0, far)
        self._central.append(self.CENTRAL + struct.pack("<H", self.NEEDS) + alike + attributes + encoded + own)
        field = struct.pack("<HHQQ", 1, 16, size, size)
        header = self.LOCAL + alike + struct.pack("<HH", len(encoded), len(field)) + encoded + field
        self._at += len(header) + size
        return header

    def ended(self) -> bytes:
        """What comes after the last file."""
        central, count = b"".join(self._central), len(self._central)
        end = self.END64 + struct.pack("<QHHIIQQQQ", 44, self.NEEDS, self.NEEDS, 0, 0, count, count, len(central), self._at)
        locator = self.LOCATOR + struct.pack("<IQI", 0, self._at + len(central), 1)
        return central + end + locator + self.END + struct.pack("<HHHHIIH", 0, 0, count, count, len(central), self.ELSEWHERE, 0)


def nothing() -> bytes:
    """What megatron-core writes for a layer's `_extra_state` that is None: the FP8 state that it has not."""
    written = io.BytesIO()
    torch.save([None], written)
    return written.getvalue()


def finish(directory: Path, entries: Iterable[Entry], others: Mapping[str, tuple[str, int, int]], args: Mapping[str, Any]) -> None:
    """All of a checkpoint but its `.distcp` files, synced.

    Args:
        others: name → file, first byte and length of what `nothing` says.
        args: what Megatron-LM calls its arguments: the model's.
    """
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for entry in entries:
        offset, size = map(torch.Size, entry.box)
        about = tensors.setdefault(entry.name, TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), []))
        assert isinstance(about, TensorStorageMetadata)
        about.chunks.append(ChunkStorageMetadata(offset, size))
        storage[MetadataIndex(entry.name, offset)] = _StorageInfo(entry.file, entry.start, entry.length)
    for name, (file, start, length) in others.items():
        tensors[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = _StorageInfo(file, start, length)
    (directory / METADATA).write_bytes(pickle.dumps(Metadata(tensors, storage_data=storage), protocol=2))
    torch.save({"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 0}, directory / COMMON)
    said = {"sharded_backend": BACKEND, "sharded_backend_version": VERSIONS[-1], "common_backend": "torch", "common_backend_version": 1}
    (directory / FORMAT).write_text(json.dumps(said), encoding="utf-8")
    for name in (METADATA, COMMON, FORMAT):
        sync(directory / name)
