"""A model from one format into another, file by file: Hugging Face's directories, Megatron-LM's torch_dist, a run's checkpoint.

What is written is a list of files, each of them tensors, each of these boxes of a source's tensors one after the other. What lies in one
piece in a source's file, in the same dtype, the kernel copies from file to file; the rest is read and converted BLOCK bytes at a time.
Whatever the model's size, memory holds a few blocks. Several files are in work at a time: one is read while another is written and a
third waits for the disk. A file gets its name when it is whole and synced, and the directory its own when all are; after a kill the same
command goes on.
"""

import argparse
import errno
import hashlib
import io
import json
import math
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from megamod import checkpoint, foreign
from megamod.errors import MegamodError
from megamod.files import finish, locked, replace_text, sync
from megamod.model.shape import Shape, read_config, read_shape, score_from_json
from megamod.weights import checksums, mcore, peft, torch_dist
from megamod.weights.bitsandbytes import says_four_bits
from megamod.weights.export import begin, dealt, in_order, refuse_taken, write_index
from megamod.weights.load import DTYPES, EMBEDDING, HEAD, Extent, InFiles, Safetensors, Source, check_keys, check_tied, directories, verify
from megamod.weights.table import hf_shapes
from megamod.weights.torch_dist import Entry, TorchDist

BLOCK = 1 << 22  # bytes that are read and converted at a time
EXTENT = 1 << 25  # bytes that the kernel is asked to copy at a time
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # safetensors' of dtypes
STATE = ".converting"  # in a directory that is not whole: what is to be made, and of each file that is there what it holds
COMPANIONS = "hf"  # in a checkpoint of Megatron-LM: config.json, tokenizer and so on


class Box(NamedTuple):
    """Part of a source's tensor."""

    name: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """A tensor to write: boxes of the source's, one after the other in the order of its numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


NBYTES = attrgetter("nbytes")
Record = dict[str, Any]  # JSON: what is known of a file that was written


def hf_to_mcore(
    model: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int = 4_000_000_000,
    jobs: int = 4,
    sums: bool = True,
) -> Path:
    """Write the Hugging Face directory `model` as a checkpoint that Megatron-LM loads on any grid, and what else is in it to `out`/hf.

    Args:
        out: new, empty, or what the same call left when it was killed.
        dtype: of the written tensors; None: each as it is, bit for bit (of q, k and v in several dtypes, the one that holds them all).
        shard_bytes: a file holds at most so much, or a single larger tensor.
        jobs: files that are written at a time.
        sums: whether checksums of what is read are compared, and those of what is written kept: most of what a conversion computes.

    Raises:
        MegamodError: tensors that do not match config.json, a model that Megatron-LM has no place for, a target that holds something,
            or a write that fails.
    """
    model, out = Path(model), Path(out)
    shape, source = _hugging_face(model, sums)
    slabs = mcore.slabs(shape)
    made = [
        Made(
            slab.names[0],
            slab.box[1],
            dtype or reduce(torch.promote_types, {source.dtype(run.hf) for run in slab.runs}),
            tuple(_rows(run, source.shapes()[run.hf]) for run in slab.runs),
        )
        for slab in slabs
    ]
    shards = dealt(made, NBYTES, shard_bytes)
    files = {f"__{i}_0.distcp": shard for i, shard in enumerate(shards)}
    plan = _plan(model, source, {"to": "mcore", "dtype": str(dtype), "shard_bytes": shard_bytes, "sums": sums})
    with _resumable(out, plan) as draft:
        release = draft / torch_dist.RELEASE
        release.mkdir(exist_ok=True)
        states = list(mcore.extra_states(shape))
        write = {file: partial(_write_distcp, states=states if file == "__0_0.distcp" else ()) for file in files}
        written = _write_all(source, files, release, write, jobs, sums, "to Megatron")
        torch_dist.finish(release, *_entries(files, written, slabs), mcore.arguments(shape))
        shutil.rmtree(draft / COMPANIONS, ignore_errors=True)
        (draft / COMPANIONS).mkdir()
        begin(draft / COMPANIONS, model, model, dtype or source.dtype(EMBEDDING), {})
        replace_text(draft / torch_dist.TRACKER, torch_dist.RELEASE)
        if sums:
            checksums.seal(release, {file: record["sha256"] for file, record in written.items()})
        sync(release)
    return out


def mcore_to_hf(
    path: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    model: str | Path | None = None,
    shard_bytes: int = 4_000_000_000,
    jobs: int = 4,
    sums: bool = True,
) -> tuple[Path, list[str]]:
    """Write a checkpoint of Megatron-LM, or of a run of all weights, as a Hugging Face directory that stands alone.

    Args:
        path: a torch_dist directory, or <run>/checkpoints/step-….
        out, shard_bytes, jobs, sums: as in `hf_to_mcore`.
        dtype: of the written tensors; None: as they are, and of a run's fp32 masters as `model` has them.
        model: the Hugging Face directory whose config.json, tokenizer and licence are copied; None: what `path` brings or names.

    Returns:
        `out`, and the names of what else the checkpoint holds, which is of no use here: optimizer states and the like.

    Raises:
        MegamodError: as in `hf_to_mcore`; or a checkpoint that is damaged.
    """
    path, out = Path(path), Path(out)
    origin, shape, source, left_out = _checkpoint(path, model, sums)
    dtype = dtype or (_dtype_of(origin) if isinstance(source, checkpoint.Masters) else None)
    made = [Made(name, size, dtype or source.dtype(name), (_whole(name, size),)) for name, size in _in_order(hf_shapes(shape))]
    shards = [sorted(shard, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name)) for shard in dealt(made, NBYTES, shard_bytes)]
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
    plan = _plan(path, source, {"to": "hf", "dtype": str(dtype), "shard_bytes": shard_bytes, "sums": sums, "model": str(origin.resolve())})
    with _resumable(out, plan) as draft:
        written = _write_all(source, files, draft, dict.fromkeys(files, _write_safetensors), jobs, sums, "to Hugging Face")
        begin(draft, origin, origin, dtype or made[0].dtype, {}, shape.score)
        write_index(draft, {tensor.name: file for file, tensors in files.items() for tensor in tensors}, sum(t.nbytes for t in made))
        if sums:
            checksums.seal(draft, {file: record["sha256"] for file, record in written.items()})
    return out, left_out


def compare(path: str | Path, out: str | Path, model: str | Path | None = None) -> int:
    """Read both sides of a conversion again, and compare every number: of `path`, in the dtype of `out`. Returns how many bytes.

    Raises:
        MegamodError: a tensor that differs.
    """
    path, out = Path(path), Path(out)
    if torch_dist.is_torch_dist(out):
        shape, before = _hugging_face(path, sums=False)
        after: Source = mcore.AsHuggingFace(TorchDist(out), shape, str(out))
    else:
        _, shape, before, _ = _checkpoint(path, model, sums=False)
        after = Safetensors(out)
        check_keys(after, shape, str(out))
    sizes = _in_order(hf_shapes(shape))
    total = sum(math.prod(size) * after.dtype(name).itemsize for name, size in sizes)
    with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, delay=3, mininterval=3) as progress:
        for name, size in sizes:
            dtype = after.dtype(name)
            for box in _cut(_whole(name, size), dtype.itemsize):
                if not _same_bits(before.read(*box).to(dtype), after.read(*box)):
                    raise MegamodError(f"{out}: {name} is not what {path} has")
                progress.update(math.prod(box.size) * dtype.itemsize)
    return total


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the two tools have alike: --dtype, --shard-bytes, --jobs, --no-sums, --verify."""

    def count(text: str) -> int:
        number = int(float(text))
        if number < 1:
            raise argparse.ArgumentTypeError(f"{text}: at least 1 was expected")
        return number

    parser.add_argument("--dtype", choices=peft.DTYPES, help="of the written tensors; default: as they are")
    parser.add_argument("--shard-bytes", type=count, default=4_000_000_000, help="of a file at most, such as 1e9; default: %(default)s")
    parser.add_argument("--jobs", type=count, default=min(4, os.cpu_count() or 1), help="files written at a time; default: %(default)s")
    none = f"no {checksums.SUMS}, of what is read or written: little is computed then"
    parser.add_argument("--no-sums", dest="sums", action="store_false", help=none)
    parser.add_argument("--verify", action="store_true", help="read both again, and compare every number")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))  # torch.equal on numbers: a NaN is not one


def _hugging_face(model: Path, sums: bool) -> tuple[Shape, Source]:
    shape = read_shape(model, experts=True)
    if says_four_bits(model):
        raise MegamodError(f"{model}: in 4 bits, which Megatron-LM does not read: convert the model that it was made of")
    source = Safetensors(model)
    check_keys(source, shape, str(model))
    if sums:
        verify(source)
    if shape.tied and HEAD in source.shapes():
        for box in _cut(_whole(EMBEDDING, source.shapes()[EMBEDDING]), source.dtype(EMBEDDING).itemsize):
            check_tied(source, box.offset, box.size, str(model))
    return shape, source


def _checkpoint(path: Path, model: str | Path | None, sums: bool) -> tuple[Path, Shape, Source, list[str]]:
    """Where config.json and tokenizer come from, the shape, the weights by Hugging Face's names, and what else is there."""
    if (path / checkpoint.MANIFEST).is_file():
        masters = checkpoint.Masters(path)
        if masters.about.get("lora"):
            raise MegamodError(f"{path}: an adapter's checkpoint: `tools/adapter.py export` or `merge` makes a directory of it")
        origin = Path(model or str(masters.about.get("model.path")))
        shape = read_shape(_there(origin, path)).scored(
            score_from_json(masters.about.get("shape", {}).get("score"), f"{path}: shape.score")
        )
        check_keys(masters, shape, str(path))
        return origin, shape, masters, []
    if not torch_dist.is_torch_dist(path):
        what = f"neither a checkpoint of Megatron-LM ({torch_dist.METADATA}, or {torch_dist.TRACKER}) nor of a run ({checkpoint.MANIFEST})"
        raise MegamodError(f"{path}: {what}")
    found = TorchDist(path)
    if sums:
        verify(found)
    own = next((at / COMPANIONS for at in (path, found.directory.parent) if (at / COMPANIONS).is_dir()), None)
    if model is None and own is None:
        raise MegamodError(f"{path}: of which model is it? Say with --model where its config.json and tokenizer are")
    origin = Path(model or own or "")
    shape = read_shape(_there(origin, path), experts=True)
    weights = mcore.AsHuggingFace(found, shape, str(path))
    return origin, shape, weights, weights.left_out


def _there(origin: Path, path: Path) -> Path:
    if not origin.is_dir():
        raise MegamodError(f"{path}: its model, {origin}, is not here: say with --model where config.json and tokenizer are")
    return origin


def _dtype_of(model: Path) -> torch.dtype:
    """Of the weights that config.json describes. Raises MegamodError where it does not say."""
    config = read_config(model)
    said = str(config.get("dtype") or config.get("torch_dtype"))
    dtype = getattr(torch, said, None)
    if not isinstance(dtype, torch.dtype):
        raise MegamodError(f"{model}: config.json says no dtype: say which with --dtype")
    return dtype


def _rows(run: mcore.Run, size: tuple[int, ...]) -> Box:
    return Box(run.hf, (run.first, *(0 for _ in size[1:])), (run.rows, *size[1:]))


def _whole(name: str, size: tuple[int, ...]) -> Box:
    return Box(name, (0,) * len(size), size)


def _in_order(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return sorted(shapes.items(), key=lambda item: in_order(item[0]))


# --- a directory that comes into being, and goes on doing so after a kill -----------------------------------------------------


def _plan(path: Path, source: Source, options: Mapping[str, Any]) -> str:
    """What is to be made of what, as JSON: a directory that was begun for the same is gone on with."""
    root = next(iter(directories(source)), path)
    stats = {file.name: file.stat() for file in sorted(root.iterdir()) if file.is_file()}
    sizes = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return json.dumps({"version": 1, "of": str(path.resolve()), "files": sizes, **options}, indent=1)


@contextmanager
def _resumable(out: Path, plan: str) -> Iterator[Path]:
    """A neighbour of `out` to fill, which is given its name at the end. After a fault it stays, and is handed out again for the same plan.

    Raises:
        MegamodError: a target that holds something, another process that fills it, or a write that fails.
    """
    refuse_taken(out)
    final = out.resolve()
    draft = final.with_name(f".{final.name}.tmp")
    with locked(final.with_name(f".{final.name}.lock")):
        try:
            state = draft / STATE
            if not (state / "plan.json").is_file() or (state / "plan.json").read_text(encoding="utf-8") != plan:
                shutil.rmtree(draft, ignore_errors=True)
                state.mkdir(parents=True)
                replace_text(state / "plan.json", plan)
            yield draft
            shutil.rmtree(state)
            sync(draft)
            if final.exists():
                final.rmdir()
            draft.rename(final)
            sync(final.parent)
        except (OSError, SafetensorError) as error:
            raise MegamodError(f"{out}: cannot be written ({error}); what is written stays in {draft}: the same command goes on") from None


def _write_all(
    source: Source, files: Mapping[str, Sequence[Made]], directory: Path, write: Mapping[str, "Write"], jobs: int, sums: bool, doing: str
) -> dict[str, Record]:
    """Write the files that are not there yet, `jobs` at a time. Returns what is known of each."""
    state = next(at / STATE for at in (directory, directory.parent) if (at / STATE).is_dir())
    done = {file: record for file in files if (record := _recorded(state / f"{file}.json", directory / file)) is not None}
    size = {file: sum(tensor.nbytes for tensor in tensors) for file, tensors in files.items()}
    stop, copying = threading.Event(), threading.Semaphore(jobs)  # of the files that are whole, as many more wait for the disk meanwhile
    with tqdm(total=sum(size.values()), desc=doing, unit="B", unit_scale=True, delay=3, mininterval=3) as progress:
        progress.update(sum(size[file] for file in done))
        numbers = _Numbers(source, stop, progress.update)

        def one(file: str) -> Record:
            tensors = files[file]
            draft = directory / f".{file}.tmp"
            with copying, draft.open("wb", buffering=0) as opened:
                sink = Sink(opened, hashlib.sha256() if sums else None)
                record = {**write[file](sink, tensors, numbers), "sha256": sink.digest(), "bytes": sink.tell()}
            finish(draft)
            draft.rename(directory / file)
            sync(directory)
            replace_text(state / f"{file}.json", json.dumps(record))
            return record

        with ThreadPoolExecutor(2 * jobs) as pool:
            futures = {file: pool.submit(one, file) for file in files if file not in done}
            try:
                wait(futures.values(), return_when=FIRST_EXCEPTION)
            finally:
                if not all(future.done() and future.exception() is None for future in futures.values()):
                    stop.set()
                    pool.shutdown(cancel_futures=True)
            faults = [fault for future in futures.values() if not future.cancelled() and (fault := future.exception()) is not None]
            for fault in sorted(faults, key=lambda fault: isinstance(fault, _Stopped)):  # those that others' faults stopped come last
                raise fault
            return done | {file: future.result() for file, future in futures.items()}


def _recorded(record: Path, file: Path) -> Record | None:
    """What is known of a file that was written before; None: it is to be written."""
    try:
        known = foreign.read_json(record)
        return known if file.stat().st_size == known["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Stopped(Exception):
    """Another file has failed."""


class Sink:
    """A file that is written from its beginning to its end, and `hash` of it."""

    def __init__(self, file: io.FileIO, hash: "hashlib._Hash | None" = None) -> None:
        self._file, self._hash, self._at = file, hash, 0

    def tell(self) -> int:
        return self._at

    def digest(self) -> str | None:
        return self._hash.hexdigest() if self._hash is not None else None

    def write(self, data: bytes | memoryview) -> None:
        self._see(data)
        self._put(data)

    def copy(self, file: Path, data: memoryview, start: int) -> None:
        """Bytes of `file`, from `start` on, which are mapped as `data`."""
        self._see(data)
        with file.open("rb", buffering=0) as opened:
            done = 0
            while done < len(data):
                try:
                    count = os.copy_file_range(opened.fileno(), self._file.fileno(), len(data) - done, start + done)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                        raise
                    count = 0
                if count == 0:  # the kernel does not do it between these two
                    self._put(data[done:])
                    return
                done, self._at = done + count, self._at + count

    def _see(self, data: bytes | memoryview) -> None:
        if self._hash is not None:
            self._hash.update(data)

    def _put(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        self._at += len(left)
        while left:
            left = left[self._file.write(left) :]


class _Numbers:
    """Writes tensors' numbers, of which it knows where they lie. `told` hears how many bytes, each time."""

    def __init__(self, source: Source, stop: threading.Event, told: Callable[[int], Any]) -> None:
        self._source, self._stop, self._told = source, stop, told
        self._mapped: dict[Path, memoryview] = {}

    def __call__(self, sink: Sink, tensor: Made) -> None:
        for box in tensor.boxes:
            extents = self._extents(box, tensor.dtype)
            if extents is None:
                for part in _cut(box, tensor.dtype.itemsize):
                    numbers = self._source.read(*part).to(tensor.dtype).contiguous()
                    sink.write(memoryview(numbers.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
                    self._done(numbers.nbytes)
                continue
            for file, first, length in extents:
                for start in range(first, first + length, EXTENT):
                    data = self._of(file)[start : min(start + EXTENT, first + length)]
                    sink.copy(file, data, start)
                    self._done(len(data))

    def _extents(self, box: Box, dtype: torch.dtype) -> list[Extent] | None:
        """Where the bytes of a box lie that need no conversion."""
        source = self._source
        return source.extents(*box) if isinstance(source, InFiles) and source.dtype(box.name) == dtype else None

    def _done(self, count: int) -> None:
        self._told(count)
        if self._stop.is_set():
            raise _Stopped

    def _of(self, file: Path) -> memoryview:
        if file not in self._mapped:
            with file.open("rb") as opened:
                self._mapped[file] = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        return self._mapped[file]


def _cut(box: Box, itemsize: int) -> Iterator[Box]:
    """A box in boxes of BLOCK bytes at most, in the order of its numbers."""
    count = math.prod(box.size)
    if count * itemsize <= BLOCK:
        if count:
            yield box
        return
    axis = next(i for i, n in enumerate(box.size) if n > 1)
    step = max(1, BLOCK // (count // box.size[axis] * itemsize))
    for first in range(0, box.size[axis], step):
        offset, size = list(box.offset), list(box.size)
        offset[axis], size[axis] = box.offset[axis] + first, min(step, box.size[axis] - first)
        yield from _cut(Box(box.name, tuple(offset), tuple(size)), itemsize)


Numbers = Callable[[Sink, Made], None]
Write = Callable[[Sink, Sequence[Made], Numbers], Record]  # a whole file


# --- the two kinds of files -----------------------------------------------------------------------------------------------------


def _write_safetensors(sink: Sink, tensors: Sequence[Made], numbers: Numbers) -> Record:
    """As safetensors.torch.save_file does, which sorts them first (huggingface.co/docs/safetensors, "Format")."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (at, at + tensor.nbytes)}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        numbers(sink, tensor)
    return {}


def _write_distcp(sink: Sink, tensors: Sequence[Made], numbers: Numbers, states: Sequence[str]) -> Record:
    """Boxes as torch.save writes them, one after the other, and where each lies; and layers' empty states."""

    def place(write: Callable[[], None]) -> tuple[int, int]:
        first = sink.tell()
        write()
        return first, sink.tell() - first

    boxes = [place(partial(_write_box, sink, tensor, numbers)) for tensor in tensors]
    return {"boxes": boxes, "states": {state: place(partial(sink.write, torch_dist.nothing())) for state in states}}


def _write_box(sink: Sink, tensor: Made, numbers: Numbers) -> None:
    before, after = torch_dist.around(tensor.shape, tensor.dtype)
    sink.write(before)
    numbers(sink, tensor)
    sink.write(after)


def _entries(
    files: Mapping[str, Sequence[Made]], written: Mapping[str, Record], slabs: Sequence[mcore.Slab]
) -> tuple[list[Entry], dict[str, tuple[str, int, int]]]:
    """What `torch_dist.finish` is told: where each slab lies, under each of its names, and each empty state."""
    where = [
        (file, tensor.dtype, *place)
        for file, tensors in files.items()
        for tensor, place in zip(tensors, written[file]["boxes"], strict=True)
    ]
    entries = [
        Entry(name, slab.shape, slab.box, dtype, file, start, length)
        for slab, (file, dtype, start, length) in zip(slabs, where, strict=True)
        for name in slab.names
    ]
    states = {state: (file, *place) for file, record in written.items() for state, place in record["states"].items()}
    return entries, states
