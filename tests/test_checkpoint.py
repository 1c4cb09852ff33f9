"""Save on one grid, resume on another; saves that are interrupted; checkpoints that are damaged."""

import json
import os
import random
import shutil
import stat
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import distributed
import pytest
import tiny
import torch
import torch.distributed as dist
from parity import Case, Run, running
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamod import checkpoint, losses
from megamod.config import OptimConfig, ParallelConfig
from megamod.damage import flip
from megamod.errors import MegamodError
from megamod.model.build import DTYPES
from megamod.optim import KINDS
from megamod.weights.table import boxes, hf_shapes, placed

State = dict[tuple[str, str], Tensor]  # (Hugging Face name, kind) → the whole tensor
OPTIM = OptimConfig(weight_decay=0.1, clip_grad=1.0)
LR = 1e-2
STEPS = 3  # before the save, and after it

# ---- what a rank does


def steps(run: Run) -> list[float]:
    """The losses of the next steps, the same on every rank."""
    values = []
    for _ in range(STEPS):
        run.step(losses.cross_entropy)
        run.optimizer.step(LR)
        loss = torch.tensor([float(run.metrics["loss"]) if run.metrics else float("-inf")], dtype=torch.float64)
        dist.all_reduce(loss, dist.ReduceOp.MAX)
        values.append(float(loss))
    return values


def whole(run: Run) -> State:
    """The optimizer's state as whole tensors, put together from what every rank owns; an element that nobody owns is NaN."""
    mine = []
    for segment in run.optimizer.segments:
        if segment.piece.owned:
            for start, stop, (offset, size) in boxes(segment.piece, segment.start, segment.stop):
                for kind in KINDS:
                    part = run.optimizer.tensor(segment, kind)[start - segment.start : stop - segment.start].clone()
                    mine.append((segment.piece.hf, segment.piece.shape, kind, offset, part.view(size)))
    everyone: list[Any] = [None] * run.grid.world
    dist.all_gather_object(everyone, mine)
    state: State = {}
    for hf, shape, kind, offset, part in (entry for rank in everyone for entry in rank):
        target = state.setdefault((hf, kind), torch.full(shape, float("nan"), dtype=part.dtype))
        target[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    return state


def forget(run: Run) -> None:
    """So that nothing that a resume leaves out can be right by chance."""
    with torch.no_grad():
        for segment in run.optimizer.segments:
            segment.weight.fill_(float("nan"))
            for kind in KINDS:
                run.optimizer.tensor(segment, kind).fill_(float("nan"))


def differences(run: Run, expected: State) -> list[str]:
    """Where this rank's share of the state, or a weight, is not the expected one to the last bit."""
    wrong = []
    for segment in run.optimizer.segments:
        for kind in KINDS:
            mine = run.optimizer.tensor(segment, kind)
            for start, stop, (offset, size) in boxes(segment.piece, segment.start, segment.stop):
                there = expected[segment.piece.hf, kind][tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
                if not torch.equal(mine[start - segment.start : stop - segment.start].view(size), there):
                    wrong.append(f"{segment.piece.hf} {kind} at {offset}")
    for item in placed(run.optimizer.chunks, tiny.shape(run.case.model), run.grid.tp.size, run.grid.tp.rank):
        for piece in item.pieces:  # the whole parameter, also what other data-parallel ranks update
            there = expected[piece.hf, "master"][tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.size, strict=True))]
            if not torch.equal(piece.of(item.param), there.to(DTYPES[run.case.dtype])):
                wrong.append(f"{piece.hf}, the weight")
    return wrong


@dataclass(frozen=True)
class Chain:
    """A run that comes back on one grid after another."""

    model: str
    grids: tuple[ParallelConfig, ...]
    dtype: str = "float64"
    tolerance: float = 1e-11  # of the losses on another grid; on the same grid they are equal to the bit


@dataclass(frozen=True)
class Outcome:
    """A resume on one of the grids, and what it was to be like."""

    path: Path
    resumed: tuple[int, dict[str, Any]]
    updates: int
    went_on: list[float]  # the next losses of the run that was not stopped
    losses: list[float]
    wrong: list[str]  # on this rank, after the resume
    unowned: int  # elements of the saved state that no rank owned
    moved: bool  # whether the steps before the save changed every tensor


def links(chain: Chain, directory: Path) -> list[Outcome]:
    outcomes = []
    before = tiny.weights(chain.model)
    saved: State = {}
    went_on: list[float] = []
    for number, parallel in enumerate(chain.grids):
        micro_batches = parallel.pp if parallel.vpp > 1 else 1
        with running(Case(chain.model, parallel, dtype=chain.dtype, micro_batches=micro_batches), OPTIM) as run:
            if number:
                forget(run)
                newest = checkpoint.latest(directory)
                assert newest is not None
                resumed = checkpoint.resume(newest, run.optimizer)
                wrong, updates = differences(run, saved), run.optimizer.steps
            values = steps(run)
            if number:
                unowned = sum(int(x.isnan().sum()) for x in saved.values())
                moved = all(not torch.equal(saved[hf, "master"], x.to(saved[hf, "master"].dtype)) for hf, x in before.items())
                outcomes.append(Outcome(newest, resumed, updates, went_on, values, wrong, unowned, moved))
            if number + 1 < len(chain.grids):
                before = {hf: x for (hf, kind), x in saved.items() if kind == "master"} or before
                saved = whole(run)
                checkpoint.save(directory, run.optimizer.steps, run.optimizer, run.grid, {"data": {"seed": 5, "of": chain.model}})
                went_on = steps(run)
    return outcomes


# ---- from grid to grid

P = ParallelConfig
CHAINS: dict[str, Chain] = {
    "qwen3": Chain("qwen3", (P(tp=2, pp=2), P(tp=2, pp=2), P(tp=4))),  # tp 4 has more ranks than kv heads
    # the embedding is the head: on one stage, on two, on the first and the last of four, which has no layer
    "tied": Chain("llama-bias-tied", (P(), P(tp=2, pp=2, vpp=2), P(pp=4, layers_per_stage=(2, 1, 1, 0)))),
    # eight copies of the one kv head, with sequence parallelism; then two, and ranks that share a row
    "one kv head": Chain("qwen2-1kv", (P(tp=8, sp=True), P(tp=2, cp=2))),
    # fp32 masters of bf16 weights
    "bf16": Chain("qwen2-tied-yarn", (P(tp=2, pp=2), P(tp=2, pp=2), P(tp=4)), dtype="bfloat16", tolerance=2e-2),
}
LINKS = [pytest.param(name, i, id=f"{name}: {i} to {i + 1}") for name, chain in CHAINS.items() for i in range(len(chain.grids) - 1)]


def chains(root: Path) -> dict[str, list[Outcome]]:
    mask = os.umask(0o027)
    try:
        return {name: links(chain, root / name.replace(" ", "-") / "checkpoints") for name, chain in CHAINS.items()}
    finally:
        os.umask(mask)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Outcome]]]:
    return distributed.run(8, chains, tmp_path_factory.mktemp("chains"))


@pytest.mark.parametrize(("name", "link"), LINKS)
def test_another_grid_goes_on_where_the_first_stopped(outcomes: list[dict[str, list[Outcome]]], name: str, link: int) -> None:
    chain = CHAINS[name]
    same = chain.grids[link] == chain.grids[link + 1]
    for rank, outcome in enumerate(of_rank[name][link] for of_rank in outcomes):
        assert outcome.resumed == (STEPS * (link + 1), {"data": {"seed": 5, "of": chain.model}})
        assert outcome.updates == STEPS * (link + 1)
        assert outcome.unowned == 0
        assert outcome.moved
        assert outcome.wrong == [], f"rank {rank}"
        assert len(set(outcome.went_on)) == STEPS, "the losses do not move: they would prove nothing"
        for loss, expected in zip(outcome.losses, outcome.went_on, strict=True):
            assert abs(loss - expected) <= (0.0 if same else chain.tolerance * abs(expected))


@pytest.mark.parametrize(("name", "link"), LINKS)
def test_each_element_is_stored_once(outcomes: list[dict[str, list[Outcome]]], name: str, link: int) -> None:
    path = outcomes[0][name][link].path
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["format"], manifest["step"], manifest["updates"]) == (2, STEPS * (link + 1), STEPS * (link + 1))
    tensors = manifest["tensors"]
    assert {hf: tuple(tensor["shape"]) for hf, tensor in tensors.items()} == hf_shapes(tiny.shape(CHAINS[name].model))
    files = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    for hf, tensor in tensors.items():
        times = {kind: torch.zeros(tensor["shape"], dtype=torch.int) for kind in KINDS}
        for entry in tensor["pieces"]:
            times[entry["kind"]][tuple(slice(o, o + n) for o, n in zip(entry["offset"], entry["size"], strict=True))] += 1
            data = files[entry["file"]].pop(entry["key"])
            assert data.numel() == torch.Size(entry["size"]).numel()
            assert data.dtype == (torch.float64 if CHAINS[name].dtype == "float64" else torch.float32)
            assert entry["crc32"] == zlib.crc32(data.numpy().tobytes())
        assert all((count == 1).all() for count in times.values()), hf
    assert not any(files.values()), "data that the manifest does not name"


@pytest.mark.parametrize("name", CHAINS)
def test_the_files_are_as_the_umask_says(outcomes: list[dict[str, list[Outcome]]], name: str) -> None:
    saved = [outcome.path for outcome in outcomes[0][name]]
    directory = saved[-1].parent
    assert sorted(directory.iterdir()) == [directory / "latest", *saved], "nothing else is left"
    assert (directory / "latest").read_text().split() == [path.name for path in reversed(saved)], "the newest first"
    for path in saved:
        assert stat.S_IMODE(path.stat().st_mode) == 0o750
        for file in (*path.iterdir(), directory / "latest"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o640


# ---- one process: interrupted saves, damage

MODEL = "qwen3-tied"


class Crash(BaseException):
    """The process ends here."""


EVENTS = (  # whatever a save does to the disk
    (os, "fsync"), (os, "rename"), (os, "replace"), (os, "chmod"), (shutil, "rmtree"), (Path, "mkdir"), (Path, "write_text"),
    (checkpoint, "save_file"),
)  # fmt: skip


def save_until(event: int, save: Callable[[], Any]) -> bool:
    """Run `save`, and crash before event number `event`. Returns whether it crashed."""
    count = 0

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > event:
                raise Crash
            return original(*args, **kwargs)

        return call

    patches = [mock.patch.object(owner, name, wrapped(getattr(owner, name))) for owner, name in EVENTS]
    for patch in patches:
        patch.start()
    try:
        save()
    except Crash:
        return True
    finally:
        for patch in patches:
            patch.stop()
    return False


def alone() -> Any:
    return running(Case(MODEL, ParallelConfig(), micro_batches=1), OPTIM)


def interrupted(root: Path) -> dict[str, list[str]]:
    """Crash before each thing that a save does to the disk. Returns, by situation, what a resume finds after each crash."""
    found: dict[str, list[str]] = {}
    with alone() as run:
        steps(run)
        old = whole(run)
        checkpoint.save(root / "start", 3, run.optimizer, run.grid)
        steps(run)
        new = whole(run)
        later = checkpoint.save(root / "later", 6, run.optimizer, run.grid)

        def state(directory: Path) -> str:
            newest = checkpoint.latest(directory)
            assert newest is not None
            forget(run)
            step, _ = checkpoint.resume(newest, run.optimizer)
            names = [name for name, expected in (("old", old), ("new", new)) if not differences(run, expected)]
            return f"{''.join(names)} {step}"

        # A crash leaves its rubbish to the next try, which gets one event further.
        for situation, step in (("another step", 6), ("left from a crash", 6), ("the same step", 3)):
            directory = root / situation.replace(" ", "-")
            shutil.copytree(root / "start", directory)
            if situation == "left from a crash":  # the checkpoint is whole, the tracker was not written
                shutil.copytree(root / "start" / "step-00000003", directory / "step-00000006")
            found[situation], event, crashed = [], 0, True
            while crashed and f"new {step}" not in found[situation][-1:]:  # from there a run would go on, not save again
                checkpoint.resume(later, run.optimizer)
                crashed = save_until(event, partial(checkpoint.save, directory, step, run.optimizer, run.grid))
                found[situation].append(state(directory))
                event += 1
            found[situation].append(" ".join(sorted(file.name for file in directory.iterdir())))
    return found


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A manifest that somebody changed, and signed again."""

    def edit(path: Path) -> None:
        file = path / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest.pop("crc32", None)
        change(manifest)
        file.write_text(json.dumps({**manifest, "crc32": zlib.crc32(json.dumps(manifest).encode())}))

    return edit


FILE = "rank-00000.safetensors"
NORM = "model.norm.weight"


def flip_last(path: Path) -> None:
    flip(path / FILE, 8 * (path / FILE).stat().st_size - 1)


def truncate(path: Path) -> None:
    os.truncate(path / FILE, (path / FILE).stat().st_size - 1)


def unlink(path: Path) -> None:
    (path / FILE).unlink()


def key_away(path: Path) -> None:
    tensors = load_file(path / FILE)
    tensors.pop(next(key for key in tensors if key.startswith(NORM)))
    save_file(tensors, path / FILE)


def link_out(path: Path) -> None:
    (path / FILE).rename(path.parent / "elsewhere.safetensors")
    (path / FILE).symlink_to(path.parent / "elsewhere.safetensors")


def put(text: str, file: str = "manifest.json") -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / file).write_text(text, encoding="latin-1")

    return change


def other_dtype(path: Path) -> None:
    """The same bytes, called something else."""
    (path / FILE).write_bytes((path / FILE).read_bytes().replace(b'"F64"', b'"I64"'))


def sed(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = (path / "manifest.json").read_text()
        assert old in text
        (path / "manifest.json").write_text(text.replace(old, new))

    return change


def name_files(name: str) -> Callable[[Path], None]:
    def change(manifest: dict[str, Any]) -> None:
        for tensor in manifest["tensors"].values():
            for entry in tensor["pieces"]:
                entry["file"] = name

    return edited(change)


def no_piece(manifest: dict[str, Any]) -> None:
    manifest["tensors"][NORM]["pieces"].pop()


def no_size(manifest: dict[str, Any]) -> None:
    del manifest["tensors"][NORM]["pieces"][0]["size"]


def piece_twice(manifest: dict[str, Any]) -> None:
    """As many elements as there should be, some of them twice."""
    pieces = manifest["tensors"]["model.embed_tokens.weight"]["pieces"]
    for whole_piece in [p for p in pieces if p["kind"] == "master"]:
        assert whole_piece["offset"] == [0, 0]
        pieces.append(dict(whole_piece))


def no_tensor(manifest: dict[str, Any]) -> None:
    del manifest["tensors"][NORM]


def more_layers(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["model.layers.4.input_layernorm.weight"] = manifest["tensors"]["model.layers.3.input_layernorm.weight"]


def other_shape(manifest: dict[str, Any]) -> None:
    manifest["tensors"][NORM]["shape"] = [64]


# what is done to the checkpoint → words of the error
DAMAGE: Mapping[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a flipped bit in the data": (flip_last, (FILE, "checksum", "earlier checkpoint")),
    "a flipped bit in the header": (lambda path: flip(path / FILE, 8 * 20), (FILE, "cannot be read")),
    "another dtype in the header": (other_dtype, (FILE, "checksum", "earlier checkpoint")),
    "a truncated file": (truncate, (FILE, "cannot be read")),
    "a missing file": (unlink, (FILE, "cannot be read")),
    "a missing key": (key_away, (FILE, "cannot be read", NORM)),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), ("latest", "no checkpoint")),
    "no directory": (shutil.rmtree, ("latest", "no checkpoint")),
    "a file in its place": (lambda path: (shutil.rmtree(path), path.write_text("?")), ("latest", "no checkpoint")),  # type: ignore[dict-item]
    "a manifest that is not JSON": (put("{"), ("manifest.json", "damaged")),
    "a manifest that is not an object": (put("[1, 2]"), ("manifest.json", "damaged")),
    "a manifest without a format": (put("{}"), ("manifest.json", "damaged")),
    "a manifest that is not UTF-8": (put("\xff"), ("manifest.json", "damaged")),
    "another step than was saved": (sed('"step": 3', '"step": 4'), ("manifest.json", "damaged", "checksum")),
    "a manifest that is not signed": (sed('"crc32": ', '"crc33": '), ("manifest.json", "damaged", "checksum")),
    "a step that is text": (edited(lambda manifest: manifest.update(step="3")), ("manifest.json", "damaged", "another kind")),
    "no updates": (edited(lambda manifest: manifest.pop("updates")), ("manifest.json", "damaged", "missing")),
    "tensors that are a list": (edited(lambda manifest: manifest.update(tensors=[])), ("manifest.json", "damaged", "another kind")),
    "a piece without a size": (edited(no_size), ("manifest.json", "damaged", "missing")),
    "another format": (edited(lambda manifest: manifest.update(format=1)), ("format 1", "reads 2")),
    "a piece is missing": (edited(no_piece), (NORM, "exp_avg_sq", "0 of 32 elements")),
    "a piece is there twice": (edited(piece_twice), ("model.embed_tokens.weight", "master", "3904 of 1952 elements")),
    "a tensor is missing": (edited(no_tensor), (NORM, "another model's checkpoint")),
    "a tensor too many": (edited(more_layers), ("model.layers.4.input_layernorm.weight", "another model's checkpoint")),
    "a tensor of another shape": (edited(other_shape), (NORM, "(64,)", "(32,)", "another model's checkpoint")),
    "a file outside": (name_files("../start/step-00000003/" + FILE), ("bare", "../start")),
    "an absolute file": (name_files("/etc/passwd"), ("bare", "/etc/passwd")),
    "a file of another kind": (name_files("manifest.json"), ("bare", "'manifest.json'")),
    "a file name that no file has": (name_files("a\0.safetensors"), ("bare",)),
    "a file name that is a number": (name_files(7), ("manifest.json", "damaged", "another kind")),  # type: ignore[arg-type]
    "a link that leads outside": (link_out, ("bare", "inside the directory")),
}  # fmt: skip

# What is done to the tracker, and is no reason to lose a checkpoint that is there.
TRACKERS: Mapping[str, Callable[[Path], None]] = {
    "leads outside": put("../start/step-00000003", "../latest"),
    "is empty": put("", "../latest"),
    "has other bytes": put("\xff", "../latest"),
    "is gone": lambda path: (path.parent / "latest").unlink(),
    "has one line that is none": put("step-0000000~\nstep-00000003\n", "../latest"),
}  # fmt: skip


@dataclass
class Damages:
    """What came of them."""

    errors: dict[str, str]  # damage → what reading the newest checkpoint says
    before: dict[str, tuple[str, list[str]]]  # damage → the step that a run goes on from with its bits, and why not from the newest
    alone: dict[str, str]  # damage → what a run says that has no checkpoint before
    trackers: dict[str, str]  # what was done to the tracker → what a resume finds
    silent: list[str]  # which of so many random flips, anywhere, went unnoticed


def damaged(root: Path, flips: int) -> Damages:
    """Damage of every kind, and random flips."""
    found = Damages({}, {}, {}, {}, [])
    with alone() as run:
        steps(run)
        saved = whole(run)
        path = checkpoint.save(root / "start", 3, run.optimizer, run.grid, {"data": {"seed": 1}})

        def resume(directory: Path) -> str:
            forget(run)
            try:
                newest = checkpoint.latest(directory)
                assert newest is not None
                result = checkpoint.resume(newest, run.optimizer)
            except MegamodError as error:
                return str(error)
            return "" if result == (3, {"data": {"seed": 1}}) and not differences(run, saved) else "silent"

        def began(directory: Path) -> tuple[str, list[str]]:
            """What a run would go on from."""
            try:
                newest, passed = checkpoint.newest(directory, run.grid)
                assert newest is not None
                forget(run)
                checkpoint.resume(newest, run.optimizer)
            except MegamodError as error:
                return str(error), []
            return ("" if not differences(run, saved) else "silent ") + newest.name, passed

        checkpoint.save(root / "two", 2, run.optimizer, run.grid, {"data": {"seed": 1}})
        shutil.copytree(path, root / "two" / path.name)
        (root / "two" / "latest").write_text(f"{path.name}\nstep-00000002\n")
        for number, (name, (damage, _)) in enumerate(DAMAGE.items()):
            for kind in ("start", "two"):
                copy = root / f"damage-{kind}-{number}"
                shutil.copytree(root / kind, copy)
                damage(copy / path.name)
            found.errors[name] = resume(root / f"damage-start-{number}")
            found.alone[name] = began(root / f"damage-start-{number}")[0]
            found.before[name] = began(root / f"damage-two-{number}")
        for number, (name, damage) in enumerate(TRACKERS.items()):
            shutil.copytree(root / "start", root / f"tracker-{number}")
            damage(root / f"tracker-{number}" / path.name)
            found.trackers[name] = resume(root / f"tracker-{number}") or began(root / f"tracker-{number}")[0]

        rng = random.Random(1)
        header = 8 + int.from_bytes((path / FILE).read_bytes()[:8], "little")
        for number in range(flips):
            file = path / (FILE if number % 2 else "manifest.json")
            bit = rng.randrange(8 * (header if number % 4 == 1 else file.stat().st_size))
            flip(file, bit)
            if resume(root / "start") == "silent":
                found.silent.append(f"{file.name} bit {bit}")
            flip(file, bit)
        assert resume(root / "start") == ""
    return found


def models(root: Path) -> list[str]:
    """Resume another model's checkpoint: one that lacks a tensor, one with other shapes, one that has more."""
    errors = []
    with running(Case("qwen2", ParallelConfig(), micro_batches=1)) as run:
        path = checkpoint.save(root, 1, run.optimizer, run.grid)
    for other in ("qwen3", "qwen2-1kv", "llama2"):
        with running(Case(other, ParallelConfig(), micro_batches=1)) as run:
            try:
                checkpoint.resume(path, run.optimizer)
                errors.append("none")
            except MegamodError as error:
                errors.append(str(error))
    return errors


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return distributed.run(1, interrupted, tmp_path_factory.mktemp("interrupted"))[0]


@pytest.mark.parametrize("situation", ["another step", "left from a crash"])
def test_an_interrupted_save_leaves_the_old_checkpoint(found: dict[str, list[str]], situation: str) -> None:
    *after, files = found[situation]
    first_new = after.index("new 6")
    assert first_new > 8, "these were not all the events"
    assert after == ["old 3"] * first_new + ["new 6"]
    assert files == "latest step-00000003 step-00000006", "rubbish was left"


def test_an_interrupted_save_of_the_same_step_leaves_one_of_both(found: dict[str, list[str]]) -> None:
    *after, files = found["the same step"]
    first_new = after.index("new 3")
    assert after == ["old 3"] * first_new + ["new 3"]
    assert files == "latest step-00000003 step-00000003-2"


@pytest.fixture(scope="module")
def damages(tmp_path_factory: pytest.TempPathFactory) -> Damages:
    found: Damages = distributed.run(1, damaged, tmp_path_factory.mktemp("damaged"), 300)[0]
    return found


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_that_says_what_and_where(damages: Damages, name: str) -> None:
    error = damages.errors[name]
    assert all(word in error for word in DAMAGE[name][1]), error
    assert "\n" not in error


# What no checksum can show: a manifest that somebody signed, and files that are as it says. Another model is told apart later.
SIGNED = {"a piece is missing", "a piece is there twice", "a tensor is missing", "a tensor too many", "a tensor of another shape"}


@pytest.mark.parametrize("name", DAMAGE.keys() - SIGNED)
def test_a_run_goes_on_from_the_checkpoint_before(damages: Damages, name: str) -> None:
    went_on, passed = damages.before[name]
    assert went_on == "step-00000002"
    (why,) = passed
    assert "step-00000003" in why
    assert "no checkpoint is whole" in damages.alone[name], "it does not begin again, as if there had been none"
    assert "checkpoint.resume=no" in damages.alone[name]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_damaged_tracker_loses_nothing(damages: Damages, name: str) -> None:
    assert damages.trackers[name] == "step-00000003"


def test_no_flipped_bit_is_silent(damages: Damages) -> None:
    assert damages.silent == []


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    lacking, mis_shaped, more = distributed.run(1, models, tmp_path)[0]
    for error in (lacking, mis_shaped, more):
        assert "another model's checkpoint" in error
        assert "\n" not in error
    assert "q_norm" in lacking or "k_norm" in lacking or "bias" in lacking
    assert "k_proj" in mis_shaped or "v_proj" in mis_shaped
    assert "bias" in more


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "not there") is None
