"""Save and resume, in Hugging Face's coordinates: no grid is remembered, so any other can read it.

    <run>/checkpoints/step-00000100/
        manifest.json           step, updates, what made it, for each tensor its shape and pieces, and a CRC-32 of all that
        rank-00000.safetensors  this rank's pieces of fp32 masters and Adam's moments (and of a reference model that follows); each
                                element is in one file only
    <run>/checkpoints/latest    the name of the newest whole checkpoint; written last

A piece is a box of a Hugging Face tensor, with a CRC-32 that is checked when it is read. A checkpoint is written under a
temporary name, synced and renamed, so a reader sees a whole one or none. Nothing is pickled. The weights are the masters'
rounding, and are not stored twice.
"""

import json
import os
import shutil
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megamod import files
from megamod.errors import MegamodError, listed
from megamod.optim import KINDS, Optimizer
from megamod.parallel.collectives import gathered, together
from megamod.parallel.grid import Grid
from megamod.weights.table import Box, Placed, boxes, overlap

FORMAT = 1
REFERENCE = "reference"  # a kind of tensor beside the optimizer's KINDS
TRACKER = "latest"
FILE = "rank-{:05d}.safetensors"
Entry = tuple[str, list[int], dict[str, Any]]  # of the manifest: a tensor, its shape, and one stored piece of it


def save(
    directory: str | Path,
    step: int,
    optimizer: Optimizer,
    grid: Grid,
    about: Mapping[str, Any] | None = None,
    reference: Sequence[Placed] = (),
) -> Path:
    """Write the state after `step` steps to `<directory>/step-<step>`; every rank calls it. Returns the path.

    When that is what `latest` names (a run that began again in the same directory), `-again` is added: until the new one is
    whole, the old one stays.

    Args:
        directory: the run's checkpoints; shared by all ranks.
        about: JSON that `resume` hands back: what the caller needs to go on.
        reference: weights that follow the optimizer's, parameter by parameter: kept beside its moments, in their own dtype.
    """
    final, draft = _names(Path(directory), step)
    file = FILE.format(grid.rank)
    together(lambda: _prepare(draft), acts=grid.rank == 0)
    entries = together(lambda: _write_own(_own_pieces(optimizer, file, reference), draft / file))
    contents = _contents(step, optimizer.steps, about, gathered(entries or []))
    together(lambda: _finish(contents, draft, final), acts=grid.rank == 0)
    return final


def write(directory: str | Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> Path:
    """`save` by a single process, without a process group: of weights that were made elsewhere than in a run.

    Args:
        tensors: the masters by name, of any floating dtype; stored in at least fp32, with moments of zero after no update.

    Raises:
        MegamodError: a write that fails; nothing of it is left then.
    """
    final, draft = _names(Path(directory), step)
    file = FILE.format(0)
    try:
        _prepare(draft)
        _finish(_contents(step, 0, about, [_write_own(_new_pieces(tensors, file), draft / file)]), draft, final)
    except (OSError, SafetensorError) as error:
        raise MegamodError(f"{final}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _names(root: Path, step: int) -> tuple[Path, Path]:
    """What the checkpoint after `step` steps will be called, and its draft."""
    usual = f"step-{step:08d}"
    return root / (usual if _tracked(root) != usual else f"{usual}-again"), root / f".{usual}.tmp"


def _prepare(draft: Path) -> None:
    draft.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(draft, ignore_errors=True)  # left by a save that was cut short
    draft.mkdir()


def _write_own(pieces: tuple[dict[str, Tensor], list[Entry]], file: Path) -> list[Entry]:
    """Write a rank's pieces to `file`; their manifest entries."""
    tensors, entries = pieces
    if tensors:
        save_file(tensors, file)
        files.finish(file)
    return entries


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


def _finish(manifest: Mapping[str, Any], draft: Path, final: Path) -> None:
    """The manifest, the directory's name, and last the tracker."""
    (draft / "manifest.json").write_text(json.dumps({**manifest, "crc32": _json_crc(manifest)}) + "\n", encoding="utf-8")
    files.sync(draft / "manifest.json")
    files.sync(draft)
    shutil.rmtree(final, ignore_errors=True)  # what `latest` does not name: a save that was cut short, or a run given up
    os.rename(draft, final)
    files.sync(final.parent)
    files.replace_text(final.parent / TRACKER, final.name + "\n")


def latest(directory: str | Path) -> Path | None:
    """The newest whole checkpoint in a run's `checkpoints` directory, or None. Raises MegamodError for a tracker that lies."""
    root = Path(directory)
    name = _tracked(root)
    if name is None:
        return None
    if Path(name).name != name or not (root / name / "manifest.json").is_file():
        raise MegamodError(f"{root / TRACKER}: names {name!r}, where no checkpoint is; put the name of one of its neighbours there")
    return root / name


def at(directory: str | Path, step: int) -> Path | None:
    """The whole checkpoint after step `step`, the newer of two; None where there is none."""
    usual = f"step-{step:08d}"
    found = [Path(directory) / name / "manifest.json" for name in (usual, f"{usual}-again")]
    found = [file for file in found if file.is_file()]
    return max(found, key=lambda file: file.stat().st_mtime_ns).parent if found else None


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
    """Remove the checkpoint at `path`; without its manifest first, so that what is left of a kill is none."""
    (Path(path) / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


class _Stored:
    """A checkpoint's pieces, read box by box, each checked once."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._path, self._tensors = path, manifest["tensors"]
        self._opened: dict[str, Any] = {}
        self._last: tuple[tuple[str, str], Tensor] | None = None  # neighbours in a grid's order often need the same piece

    def fill(self, view: Tensor, name: str, kind: str, box: Box) -> None:
        """Copy the box of a tensor's master or moment into `view`, of the box's size. Raises MegamodError where it is not all there."""
        filled = 0
        for entry in self._tensors[name]["pieces"]:
            common = overlap(box, (tuple(entry["offset"]), tuple(entry["size"]))) if entry["kind"] == kind else None
            if common is None:
                continue
            address = (entry["file"], entry["key"])
            if self._last is None or self._last[0] != address:
                self._last = address, _read(self._path, entry, self._opened)
            part = self._last[1].view(entry["size"])[common[1]]
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


def _own_pieces(optimizer: Optimizer, file: str, reference: Sequence[Placed]) -> tuple[dict[str, Tensor], list[Entry]]:
    """What this rank writes: tensors by key, and their manifest entries."""
    tensors: dict[str, Tensor] = {}
    entries = []
    theirs = {piece: item.param.detach() for item in reference for piece in item.pieces}
    for segment in optimizer.segments:
        piece = segment.piece
        if not piece.owned:
            continue
        kinds = {kind: optimizer.tensor(segment, kind) for kind in KINDS}
        if piece in theirs:
            kinds[REFERENCE] = piece.of(theirs[piece]).reshape(-1)[segment.start : segment.stop]
        for start, stop, box in boxes(piece, segment.start, segment.stop):
            for kind, values in kinds.items():
                data = values[start - segment.start : stop - segment.start].to("cpu").contiguous().clone()
                entry = _entry(piece.hf, kind, data, box, file)
                tensors[entry["key"]] = data
                entries.append((piece.hf, list(piece.shape), entry))
    return tensors, entries


def _new_pieces(masters: Mapping[str, Tensor], file: str) -> tuple[dict[str, Tensor], list[Entry]]:
    """As `_own_pieces`, of whole tensors that no optimizer has changed yet."""
    tensors: dict[str, Tensor] = {}
    entries: list[Entry] = []
    for name, tensor in masters.items():
        master = tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32)).flatten()
        for kind in KINDS:
            data = master.clone() if kind == "master" else torch.zeros_like(master)
            entry = _entry(name, kind, data, ((0,) * tensor.dim(), tuple(tensor.shape)), file)
            tensors[entry["key"]] = data
            entries.append((name, list(tensor.shape), entry))
    return tensors, entries


def _entry(name: str, kind: str, data: Tensor, box: Box, file: str) -> dict[str, Any]:
    """What the manifest says of one stored piece."""
    offset, size = box
    key = f"{name}|{kind}|{','.join(map(str, offset))}"
    return {"kind": kind, "file": file, "key": key, "offset": offset, "size": size, "crc32": _crc(data)}


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
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
    except OSError as error:
        raise MegamodError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MegamodError(f"{file}: damaged ({error})") from None
    if not known:
        raise MegamodError(f"{file}: format {manifest['format']}, this megamod reads {FORMAT}")
    if manifest.pop("crc32", None) != _json_crc(manifest):
        raise MegamodError(f"{file}: damaged (it fails its checksum); resume from an earlier checkpoint")
    return manifest


def _read(path: Path, entry: Mapping[str, Any], opened: dict[str, Any]) -> Tensor:
    """A stored piece, its checksum verified."""
    name, key = entry["file"], entry["key"]
    if name not in opened and not _is_inside(path, name):
        raise MegamodError(f"{path / 'manifest.json'}: {name!r} must be a bare *.safetensors name inside the directory")
    try:
        if name not in opened:
            opened[name] = safe_open(path / name, framework="pt", device="cpu")
        data: Tensor = opened[name].get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise MegamodError(f"{path / name}: cannot be read ({error}); resume from an earlier checkpoint") from None
    if _crc(data) != entry["crc32"]:
        raise MegamodError(f"{path / name}: {key} fails its checksum; resume from an earlier checkpoint")
    return data


def _is_inside(directory: Path, name: Any) -> bool:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        return False
    try:
        return (directory / name).resolve().parent == directory.resolve()
    except ValueError:  # characters that no file name can have
        return False


def _tracked(root: Path) -> str | None:
    """What the tracker says, if there is one."""
    try:
        return (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def _json_crc(manifest: Mapping[str, Any]) -> int:
    """Over the JSON that is written for it, which is the same after it was read."""
    return zlib.crc32(json.dumps(manifest).encode())


def _crc(data: Tensor) -> int:
    return zlib.crc32(data.contiguous().view(torch.uint8).numpy()) if data.numel() else 0  # type: ignore[arg-type]
