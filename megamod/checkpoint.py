"""Save and resume, in Hugging Face's coordinates: no grid is remembered, so any other can read it.

    <run>/checkpoints/step-00000100/
        manifest.json           step, updates, what made it, for each tensor its shape and pieces, and a CRC-32 of all that
        rank-00000.safetensors  this rank's pieces of fp32 masters and Adam's moments (and of a reference model that follows); each
                                element is in one file only
    <run>/checkpoints/latest    the names of the run's whole checkpoints, the newest first, one a line; written last

A piece is a box of a Hugging Face tensor, with a CRC-32 that is checked when it is read. A checkpoint is written under a
temporary name, synced and renamed, so a reader sees a whole one or none. Nothing is pickled. The weights are the masters'
rounding, and are not stored twice.

No state of a random generator is stored, and none of the data's order: whatever a step draws is a function of the seed and of its
number. When to save, what to keep and how not to wait for it is saver.py's.
"""

import itertools
import json
import math
import os
import re
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megamod import files, foreign
from megamod.errors import MegamodError, listed
from megamod.optim import KINDS, Optimizer
from megamod.parallel.collectives import gathered, on_first, together
from megamod.parallel.grid import Grid
from megamod.weights.table import Box, Placed, boxes, overlap

FORMAT = 2
REFERENCE = "reference"  # a kind of tensor beside the optimizer's KINDS
TRACKER = "latest"
NONE = "none"  # in the tracker of a run that begins where another was
MANIFEST = "manifest.json"
FILE = "rank-{:05d}.safetensors"
NAME = re.compile(r"step-(\d{8,})(?:-\d+)?")
Entry = tuple[str, list[int], dict[str, Any]]  # of the manifest: a tensor, its shape, and one stored piece of it
Copy = Callable[[str, Tensor], Tensor]  # of a tensor, on the CPU, under a name of its own


@dataclass(frozen=True)
class Snapshot:
    """What one rank stores of the state after a step: it writes from here, whatever becomes of the state meanwhile."""

    step: int
    updates: int
    tensors: Mapping[str, Tensor]  # by key, on the CPU
    entries: Sequence[Entry]  # without their checksums


def snapshot(step: int, optimizer: Optimizer, rank: int, reference: Sequence[Placed] = (), copy: Copy | None = None) -> Snapshot:
    """This rank's share of the state after `step` steps.

    Args:
        reference: weights that follow the optimizer's, parameter by parameter: kept beside its moments, in their own dtype.
        copy: None: what is on the CPU is not copied, and must stay as it is until it is written.
    """
    tensors, entries = _own_pieces(optimizer, FILE.format(rank), reference, copy or (lambda _, tensor: tensor.to("cpu")))
    return Snapshot(step, optimizer.steps, tensors, entries)


def save(
    directory: str | Path,
    step: int,
    optimizer: Optimizer,
    grid: Grid,
    about: Mapping[str, Any] | None = None,
    reference: Sequence[Placed] = (),
) -> Path:
    """Write the state after `step` steps to `<directory>/step-<step>`; every rank calls it. Returns the path.

    Args:
        directory: the run's checkpoints; shared by all ranks.
        about: JSON that `resume` hands back: what the caller needs to go on.
        reference: as in `snapshot`.

    Raises:
        MegamodError: on every rank alike: a write that fails; nothing of it is left then.
    """
    return store(directory, snapshot(step, optimizer, grid.rank, reference), about, None)


def store(
    directory: str | Path,
    taken: Snapshot,
    about: Mapping[str, Any] | None,
    group: dist.ProcessGroup | None,
    keep: Callable[[list[str]], list[str]] = list,
) -> Path:
    """Write what the ranks of `group` have taken; each calls it, with its own.

    Of a step that `latest` lists already (a run that began again in the same directory, or passed a damaged one over), the new
    checkpoint has another name: until it is whole, the old one stays.

    Args:
        group: over which the ranks agree; None: the world.
        keep: told the new name and those that are listed, the newest first, which of them stay; the others are removed once the new
            one is whole.

    Returns:
        The path.

    Raises:
        MegamodError: as in `save`.
    """
    root, rank = Path(directory), dist.get_rank(group)
    draft = _draft(root, taken.step)
    file = FILE.format(rank)
    try:
        together(lambda: _prepare(draft), acts=rank == 0, group=group)
        entries = together(lambda: _write_own(taken, draft / file), group=group)
        contents = _contents(taken.step, taken.updates, about, gathered(entries or [], group))
        done = together(lambda: _finish(contents, draft, _final(root, taken.step), keep), acts=rank == 0, group=group)
    except MegamodError:
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    final = gathered(done, group)[0]
    assert final is not None
    return final


def write(directory: str | Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> Path:
    """`save` by a single process, without a process group: of weights that were made elsewhere than in a run.

    Args:
        tensors: the masters by name, of any floating dtype; stored in at least fp32, with moments of zero after no update.

    Raises:
        MegamodError: a write that fails; nothing of it is left then.
    """
    root = Path(directory)
    final, draft = _final(root, step), _draft(root, step)
    file = FILE.format(0)
    try:
        _prepare(draft)
        entries = _write_own(Snapshot(step, 0, *_new_pieces(tensors, file)), draft / file)
        _finish(_contents(step, 0, about, [entries]), draft, final)
    except (OSError, SafetensorError) as error:
        raise MegamodError(f"{final}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _draft(root: Path, step: int) -> Path:
    return root / f".step-{step:08d}.tmp"


def _final(root: Path, step: int) -> Path:
    """What the checkpoint after `step` steps will be called: by a name that is not listed."""
    usual, taken = f"step-{step:08d}", _tracked(root) or []
    return root / next(name for name in itertools.chain([usual], (f"{usual}-{n}" for n in itertools.count(2))) if name not in taken)


def _prepare(draft: Path) -> None:
    draft.parent.mkdir(parents=True, exist_ok=True)
    for left in draft.parent.glob(".step-*.tmp"):  # by a save, or a removal, that was cut short
        shutil.rmtree(left, ignore_errors=True)
    draft.mkdir()


def _write_own(taken: Snapshot, file: Path) -> list[Entry]:
    """Write a rank's pieces to `file`; their manifest entries."""
    if taken.tensors:
        save_file(dict(taken.tensors), file)
        files.finish(file)
    return [(name, shape, {**entry, "crc32": _crc(taken.tensors[entry["key"]])}) for name, shape, entry in taken.entries]


def _contents(step: int, updates: int, about: Mapping[str, Any] | None, gathered: Sequence[Sequence[Entry]]) -> dict[str, Any]:
    """The manifest, before its checksum."""
    return {"format": FORMAT, "step": step, "updates": updates, "about": dict(about or {}), "tensors": _merge(gathered)}


def _merge(gathered: Sequence[Sequence[Entry]]) -> dict[str, dict[str, Any]]:
    """Tensor → its shape and all ranks' pieces."""
    tensors: dict[str, dict[str, Any]] = defaultdict(lambda: {"shape": None, "pieces": []})
    for name, shape, entry in (item for entries in gathered for item in entries):
        tensors[name]["shape"] = shape
        tensors[name]["pieces"].append(entry)
    return tensors


def _finish(manifest: Mapping[str, Any], draft: Path, final: Path, keep: Callable[[list[str]], list[str]] = list) -> Path:
    """The manifest, the directory's name, the tracker, and then away with what does not stay. Returns `final`."""
    root = final.parent
    before = [name for name in _candidates(root) if name != final.name]
    (draft / MANIFEST).write_text(json.dumps({**manifest, "crc32": _json_crc(manifest)}) + "\n", encoding="utf-8")
    files.sync(draft / MANIFEST)
    files.sync(draft)
    remove(final)  # what is not listed: a save that was cut short, or a run given up
    os.rename(draft, final)
    files.sync(root)
    names = keep([final.name, *before])
    assert names[0] == final.name, "the newest stays"
    _track(root, names)
    for name in before:
        if name not in names:
            remove(root / name)
    return final


def begin(directory: str | Path, begun: Path | None) -> None:
    """Let a run's `checkpoints` list the one at `begun` and those that it continues, or none where it is another directory's.

    So that what comes is never mistaken for a part of a run that was given up. Nothing is removed. Of one that was given up before, and
    is gone on with after all, it is not known what it continues.
    """
    root = Path(directory)
    listed_now, at = _candidates(root), begun.resolve() if begun is not None else None
    if at is None or at.parent != root.resolve() or not NAME.fullmatch(at.name):
        names = []
    else:
        names = listed_now[listed_now.index(at.name) :] if at.name in listed_now else [at.name]
    if names != listed_now:
        _track(root, names)


def _track(root: Path, names: Sequence[str]) -> None:
    files.replace_text(root / TRACKER, "".join(f"{name}\n" for name in names or [NONE]))


def latest(directory: str | Path) -> Path | None:
    """The newest checkpoint in a run's `checkpoints` directory, or None; that it is whole, its reader will see.

    Raises:
        MegamodError: the tracker names none that is there, and there is no other.
    """
    root = Path(directory)
    found = next((root / name for name in _candidates(root) if (root / name / MANIFEST).is_file()), None)
    if found is None and (root / TRACKER).exists():
        raise MegamodError(f"{root / TRACKER}: names no checkpoint that is there; put the name of one of its neighbours there")
    return found


def newest(directory: str | Path, grid: Grid) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in a run's `checkpoints` directory; every byte of it was read and checked. Every rank calls it.

    Returns:
        Its path, None where there is none yet; and what is wrong with newer ones, which were passed over.

    Raises:
        MegamodError: there are some, and none is whole.
    """
    root = Path(directory)
    passed: list[str] = []
    for name in on_first(lambda: _candidates(root)):
        try:
            verify(root / name, grid)
        except MegamodError as error:
            passed.append(str(error))
        else:
            return root / name, passed
    if passed:
        instead = "use checkpoint.resume=<path of another>, or checkpoint.resume=no to begin again"
        raise MegamodError(f"{root}: no checkpoint is whole: {listed(passed, 2)}; {instead}")
    return None, passed


def verify(path: str | Path, grid: Grid) -> None:
    """Read every byte of the checkpoint at `path` and check it; every rank calls it, and reads its share of the files.

    A rank of the grid that saved reads the file that it wrote, which is the one it will need.

    Raises:
        MegamodError: on every rank alike: damaged, or of another format.
    """

    def read() -> None:
        by_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for tensor in _manifest(Path(path))["tensors"].values():
            for entry in tensor["pieces"]:
                by_file[entry["file"]].append(entry)
        for file in sorted(by_file)[grid.rank :: grid.world]:
            opened: dict[str, Any] = {}
            for entry in by_file[file]:
                _read(Path(path), entry, opened)

    together(read)


def at(directory: str | Path, step: int) -> Path | None:
    """The checkpoint after step `step`, the newer of two; None where there is none."""
    root = Path(directory)
    return next((root / name for name in _candidates(root) if step_of(name) == step and (root / name / MANIFEST).is_file()), None)


def step_of(name: str) -> int:
    """The step that is in a checkpoint's name."""
    match = NAME.fullmatch(name)
    assert match is not None, f"{name} is no checkpoint's name"
    return int(match[1])


class Begun(NamedTuple):
    """The checkpoint that a run goes on from, its manifest read once: that of a large run is megabytes of JSON."""

    path: Path
    step: int  # that it was saved after
    about: Mapping[str, Any]

    @classmethod
    def at(cls, path: str | Path) -> "Begun":
        """Raises MegamodError for a damaged manifest."""
        return cls(Path(path), *read_about(path))


def read_about(path: str | Path) -> tuple[int, dict[str, Any]]:
    """The step that the checkpoint at `path` was saved after, and its `about`. Raises MegamodError for a damaged manifest."""
    manifest = _manifest(Path(path))
    return manifest["step"], manifest["about"]


def resume(path: str | Path, optimizer: Optimizer, reference: Sequence[Placed] = ()) -> tuple[int, dict[str, Any]]:
    """Fill the optimizer's masters and moments, the weights, and the `reference`'s, from the checkpoint at `path`, on any grid.

    Returns:
        The step it was saved after, and `about`.

    Raises:
        MegamodError: on every rank alike: a manifest or a file that is damaged, of another format, or of another model.
    """
    path = Path(path)
    manifest = _manifest(path)
    _check_model(path, manifest, optimizer)
    together(lambda: _fill(path, manifest, optimizer, reference))
    optimizer.restore(manifest["updates"])
    return manifest["step"], manifest["about"]


def remove(path: str | Path) -> None:
    """Remove the checkpoint at `path`, if there is one: at once under its name, so that a kill leaves none that is half there."""
    path = Path(path)
    if path.is_dir():
        away = path.with_name(f".{path.name}.gone.tmp")  # what a kill leaves of it the next save removes
        shutil.rmtree(away, ignore_errors=True)
        os.rename(path, away)
        shutil.rmtree(away, ignore_errors=True)


class _Stored:
    """A checkpoint's pieces, read box by box, each checked once."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._path, self._tensors = path, manifest["tensors"]
        self._opened: dict[str, Any] = {}
        self._checked = set[tuple[str, str]]()

    def fill(self, view: Tensor, name: str, kind: str, box: Box) -> None:
        """Copy the box of a tensor's master or moment into `view`, of the box's size. Raises MegamodError where it is not all there."""
        filled = 0
        for entry in self._tensors[name]["pieces"]:
            common = overlap(box, (tuple(entry["offset"]), tuple(entry["size"]))) if entry["kind"] == kind else None
            if common is None:
                continue
            address = (entry["file"], entry["key"])
            part = _read(self._path, entry, self._opened, check=address not in self._checked).view(entry["size"])[common[1]]
            self._checked.add(address)
            view[common[0]] = part.to(view.device, view.dtype)
            filled += part.numel()
        if filled != view.numel():
            raise MegamodError(f"{self._path}: {name} {kind}: {filled} of {view.numel()} elements at {box[0]} are stored")


class Masters:
    """A checkpoint's master weights as a Source of weights.load: a run's state as a model, without an export.

    Raises:
        MegamodError: damaged, or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        manifest = _manifest(Path(path))
        self.about: dict[str, Any] = manifest["about"]
        self._shapes = {name: tuple(tensor["shape"]) for name, tensor in manifest["tensors"].items()}
        self._stored = _Stored(Path(path), manifest)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the tensors, by Hugging Face name."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` gives."""
        return torch.float64

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of `size` at `offset` of a tensor, in float64, which holds masters of any run exactly."""
        result = torch.empty(*size, dtype=torch.float64)
        self._stored.fill(result, name, "master", (tuple(offset), tuple(size)))
        return result


def _fill(path: Path, manifest: Mapping[str, Any], optimizer: Optimizer, reference: Sequence[Placed]) -> None:
    """Read what this rank's segments need, and its share of the reference's weights."""
    stored = _Stored(path, manifest)
    for segment in optimizer.segments:
        for kind in KINDS:
            target = optimizer.tensor(segment, kind)
            for start, stop, box in boxes(segment.piece, segment.start, segment.stop):
                stored.fill(target[start - segment.start : stop - segment.start].view(box[1]), segment.piece.hf, kind, box)
    for item in reference:
        for piece in item.pieces:
            stored.fill(piece.of(item.param.detach()), piece.hf, REFERENCE, (piece.offset, piece.size))


def _own_pieces(optimizer: Optimizer, file: str, reference: Sequence[Placed], copy: Copy) -> tuple[dict[str, Tensor], list[Entry]]:
    """What this rank writes: tensors by key, and their manifest entries."""
    tensors: dict[str, Tensor] = {}
    entries = []
    theirs = {piece: item.param.detach() for item in reference for piece in item.pieces}
    for number, segment in enumerate(optimizer.segments):
        piece = segment.piece
        if not piece.owned:
            continue
        kinds = {kind: optimizer.tensor(segment, kind) for kind in KINDS}
        if piece in theirs:
            kinds[REFERENCE] = piece.of(theirs[piece]).reshape(-1)[segment.start : segment.stop]
        copies = {kind: copy(f"{number}|{kind}", values) for kind, values in kinds.items()}
        for start, stop, box in boxes(piece, segment.start, segment.stop):
            for kind, values in copies.items():
                entry = _entry(piece.hf, kind, box, file, values.dtype)
                tensors[entry["key"]] = values[start - segment.start : stop - segment.start]
                entries.append((piece.hf, list(piece.shape), entry))
    return tensors, entries


def _new_pieces(masters: Mapping[str, Tensor], file: str) -> tuple[dict[str, Tensor], list[Entry]]:
    """As `_own_pieces`, of whole tensors that no optimizer has changed yet."""
    tensors: dict[str, Tensor] = {}
    entries: list[Entry] = []
    for name, tensor in masters.items():
        master = tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32)).flatten()
        for kind in KINDS:
            entry = _entry(name, kind, ((0,) * tensor.dim(), tuple(tensor.shape)), file, master.dtype)
            tensors[entry["key"]] = master.clone() if kind == "master" else torch.zeros_like(master)
            entries.append((name, list(tensor.shape), entry))
    return tensors, entries


def _entry(name: str, kind: str, box: Box, file: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the manifest says of one stored piece, before its checksum."""
    offset, size = map(list, box)
    key = f"{name}|{kind}|{','.join(map(str, offset))}"
    return {"kind": kind, "file": file, "key": key, "dtype": str(dtype), "offset": offset, "size": size}


def _check_model(path: Path, manifest: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Every tensor of the checkpoint and of the model exactly once, in the same shape; the same error on every rank."""
    here = {segment.piece.hf: segment.piece.shape for segment in optimizer.segments}
    model = {name: shape for shapes in gathered(here) for name, shape in shapes.items()}
    stored = {name: tuple(tensor["shape"]) for name, tensor in manifest["tensors"].items()}
    wrong = [name for name in sorted(model.keys() | stored.keys()) if model.get(name) != stored.get(name)]
    if wrong:
        faults = (f"{name} is {stored.get(name, 'absent')}, this model's {model.get(name, 'absent')}" for name in wrong)
        raise MegamodError(f"{path}: another model's checkpoint: {listed(faults, 3)}")


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = foreign.read_json(file)
        known = manifest["format"] == FORMAT
    except OSError as error:
        raise MegamodError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MegamodError(f"{file}: damaged ({error})") from None
    if not known:
        raise MegamodError(f"{file}: format {manifest['format']}, this megamod reads {FORMAT}")
    if manifest.pop("crc32", None) != _json_crc(manifest):
        raise MegamodError(f"{file}: damaged (it fails its checksum); resume from an earlier checkpoint")
    if not _is_manifest(manifest):
        raise MegamodError(f"{file}: damaged (something is missing in it, or of another kind); resume from an earlier checkpoint")
    return manifest


def _is_manifest(value: Any) -> bool:
    """Whether it is one in all its parts: somebody may have written it, and its checksum."""

    def is_count(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and x >= 0

    def is_piece(entry: Any, axes: int) -> bool:
        return (
            isinstance(entry, dict)
            and all(isinstance(entry.get(name), str) for name in ("kind", "file", "key", "dtype"))
            and is_count(entry.get("crc32"))
            and all(isinstance(entry.get(n), list) and len(entry[n]) == axes and all(map(is_count, entry[n])) for n in ("offset", "size"))
        )

    def is_tensor(tensor: Any) -> bool:
        if not isinstance(tensor, dict) or not isinstance(shape := tensor.get("shape"), list) or not all(map(is_count, shape)):
            return False
        return isinstance(tensor.get("pieces"), list) and all(is_piece(entry, len(shape)) for entry in tensor["pieces"])

    return (
        is_count(value.get("step"))
        and is_count(value.get("updates"))
        and isinstance(value.get("about"), dict)
        and isinstance(value.get("tensors"), dict)
        and all(map(is_tensor, value["tensors"].values()))
    )


def _read(path: Path, entry: Mapping[str, Any], opened: dict[str, Any], check: bool = True) -> Tensor:
    """A stored piece, its checksum verified: a view of its file."""
    name, key = entry["file"], entry["key"]
    if name not in opened and not (name.endswith(".safetensors") and foreign.is_inside(path, name)):
        raise MegamodError(f"{path / MANIFEST}: {name!r} must be a bare *.safetensors name inside the directory")
    try:
        if name not in opened:
            opened[name] = safe_open(path / name, framework="pt", device="cpu")
        data: Tensor = opened[name].get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise MegamodError(f"{path / name}: cannot be read ({error}); resume from an earlier checkpoint") from None
    wrong = str(data.dtype) != entry["dtype"] or data.numel() != math.prod(entry["size"])
    if wrong or (check and _crc(data) != entry["crc32"]):
        raise MegamodError(f"{path / name}: {key} fails its checksum; resume from an earlier checkpoint")
    return data


def _tracked(root: Path) -> list[str] | None:
    """The names that the tracker lists, the newest first; None where it is not there or says nothing that is understood."""
    try:
        words = (root / TRACKER).read_text(encoding="utf-8", errors="replace").split()
    except (FileNotFoundError, IsADirectoryError):
        return None
    names = [name for name in dict.fromkeys(words) if NAME.fullmatch(name)]
    return names if names or words == [NONE] else None


def _candidates(root: Path) -> list[str]:
    """Checkpoints to go on from, the newest first: those that the tracker lists or, without it, those that are there."""
    tracked = _tracked(root)
    if tracked is not None:
        return tracked
    there = [path.name for path in root.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(there, key=lambda name: (step_of(name), name), reverse=True)


def _json_crc(manifest: Mapping[str, Any]) -> int:
    """Over the JSON that is written for it, which is the same after it was read."""
    return zlib.crc32(json.dumps(manifest).encode())


def _crc(data: Tensor) -> int:
    return zlib.crc32(data.contiguous().view(torch.uint8).numpy()) if data.numel() else 0  # type: ignore[arg-type]
