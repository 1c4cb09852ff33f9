"""PiSSA's beginning (Meng, Wang & Zhang 2024, arXiv:2404.02948): the r largest singular directions of each adapted weight.

With W = U diag(σ) Vᵀ, A₀ = diag(√(σ/s)) Vᵀ and B₀ = U diag(√(σ/s)), each cut to r directions, so that s·B₀A₀ is W's best
approximation of rank r. They are computed once, by all ranks together, and kept beside the run: a resumed run, an export and a
merge take the same ones away again.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from megamod import files
from megamod.config import LoraConfig
from megamod.errors import MegamodError
from megamod.model.shape import Shape
from megamod.parallel.collectives import gathered, on_first, together
from megamod.parallel.grid import Grid
from megamod.weights import checksums
from megamod.weights.export import write_json
from megamod.weights.load import INDEX, Safetensors, Source, verify_together
from megamod.weights.peft import Slot, slots


def factors(weight: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
    """A₀ `[R, C]` and B₀ `[F, R]` of W `[F, C]`, in at least fp32."""
    left, sigma, right = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    root = (sigma[: slot.r] / slot.scale).sqrt()
    return root[:, None] * right[: slot.r], left[:, : slot.r] * root


def check(cfg: LoraConfig, shape: Shape) -> None:
    """Refuse more directions than a weight has. Raises MegamodError."""
    for slot in slots(cfg, shape).values():
        if slot.r > min(slot.shape):
            raise MegamodError(
                f"lora.r = {slot.r}: {slot.module} is {slot.shape}: PiSSA can take at most {min(slot.shape)} directions of it"
            )


def begin(directory: Path, base: Source, cfg: LoraConfig, shape: Shape, grid: Grid) -> Safetensors:
    """A₀ and B₀ of every linear that `cfg` adapts, from `directory`; made there if it does not exist. Every rank calls it.

    Raises:
        MegamodError: on every rank alike: a write that fails, or files that are not as they were written.
    """
    draft = directory.with_name(f".{directory.name}.tmp")
    if not on_first(directory.exists):
        file = f"rank-{grid.rank:05d}.safetensors"
        together(lambda: _prepare(draft), acts=grid.rank == 0)
        names: Sequence[str] = together(lambda: _write_own(draft / file, base, dealt(cfg, shape, grid), grid)) or ()
        where = {name: file for names, file in gathered((names, file)) for name in names}
        together(lambda: _finish(draft, directory, where), acts=grid.rank == 0)
    found = together(lambda: Safetensors(directory))
    assert found is not None
    verify_together(found, grid)
    return found


def bring(beginning: Path, directory: Path) -> None:
    """Let a run that goes on from another run's checkpoint have its beginning, too: made again, it might have other bits."""
    if beginning.is_dir() and not directory.exists():
        draft = directory.with_name(f".{directory.name}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(beginning, draft)
        os.rename(draft, directory)


def dealt(cfg: LoraConfig, shape: Shape, grid: Grid) -> list[Slot]:
    """This rank's share of the linears: of each size as many as the others have."""
    return sorted(slots(cfg, shape).values(), key=lambda slot: -slot.shape[0] * slot.shape[1])[grid.rank :: grid.world]


def _prepare(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)  # left by a run that was killed
    draft.mkdir(parents=True)


def _write_own(file: Path, base: Source, own: Sequence[Slot], grid: Grid) -> list[str]:
    """This rank's share; the names of its tensors."""
    tensors: dict[str, Tensor] = {}
    for slot in tqdm(own, desc="PiSSA", unit="linear", delay=3, mininterval=3, disable=grid.rank != 0):
        weight = base.read(f"{slot.module}.weight", (0, 0), slot.shape).to(grid.device)
        a, b = factors(weight, slot)
        tensors |= {slot.a: a.cpu().contiguous(), slot.b: b.cpu().contiguous()}
    if tensors:
        save_file(tensors, file, metadata={"format": "pt"})
        files.finish(file)
    return list(tensors)


def _finish(draft: Path, directory: Path, where: dict[str, str]) -> None:
    write_json(draft / INDEX, {"weight_map": dict(sorted(where.items()))})
    checksums.seal(draft)
    files.sync(draft)
    os.rename(draft, directory)
    files.sync(directory.parent)
