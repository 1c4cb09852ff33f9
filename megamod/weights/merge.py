"""Base and adapter → a Hugging Face directory of its own, tensor by tensor; the base is read, and never written.

    W' = W + s·BA                              LoRA
    W' = m ⊙ (W + s·BA) / ‖W + s·BA‖           DoRA: m and the norms `[F]`, over W's inputs

computed in fp32 at least and rounded once. What the adapter does not change is copied bit for bit.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from megamod.files import finish
from megamod.model.shape import Shape, read_shape
from megamod.weights import peft
from megamod.weights.export import begin, drafting, refuse_taken, write_index
from megamod.weights.load import Source, check_keys, weights_at
from megamod.weights.table import hf_shapes

Files = Mapping[str, list[str]]  # file → the tensors in it


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = 4_000_000_000,
) -> Path:
    """Write the model that `base` and `adapter` are together to `out`. Memory holds one file's tensors, and one in fp32.

    Args:
        base: a Hugging Face directory; its config.json, tokenizer and licence are copied.
        adapter: a PEFT directory or a run's checkpoint.
        out: new, or empty.
        dtype: of the written tensors; None: the base's own.
        texts: further small files, by name; they replace the base's of that name.
        shard_bytes: a file holds at most so much, or a single larger tensor.

    Raises:
        MegamodError: an adapter of another base, a target that holds something, or a write that fails; `out` is not there then.
    """
    refuse_taken(Path(out))
    shape = peft.shape_with(adapter, read_shape(base))
    weights = weights_at(base, shape, 0)
    check_keys(weights, shape, str(base))
    found = peft.opened(adapter, shape)
    peft.check_base(found, weights, shape, str(adapter))
    merged = Merged(weights, found, shape, dtype)
    sizes = {name: math.prod(size) * merged.dtype(name).itemsize for name, size in merged.shapes().items()}
    files = _files(sizes, shard_bytes)
    progress = tqdm(total=sum(sizes.values()), desc="merging", unit="B", unit_scale=True, delay=3, mininterval=3)
    with progress, drafting(Path(out)) as draft:
        begin(draft, Path(base), Path(base), merged.dtype("model.embed_tokens.weight"), texts or {}, shape.score)
        for file, names in files.items():
            tensors = {}
            for name in names:
                tensors[name] = merged.read(name)
                progress.update(sizes[name])
            save_file(tensors, draft / file, metadata={"format": "pt"})
            finish(draft / file)
        write_index(draft, {name: file for file, names in files.items() for name in names}, sum(sizes.values()))
    return Path(out)


class Merged:
    """The tensors of base and adapter together, by Hugging Face's names, each made when it is read."""

    def __init__(self, base: Source, adapter: peft.Adapter, shape: Shape, dtype: torch.dtype | None = None) -> None:
        self._base, self._adapter, self._dtype = base, adapter, dtype
        self._shapes = hf_shapes(shape)
        self._slots = {f"{module}.weight": slot for module, slot in peft.slots(adapter.config, shape).items()}
        self._copies = {origin: name for name, origin in peft.saved(adapter.config, shape).items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the tensors, by name."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is written: the base's, unless another was asked for."""
        one = [1] * len(self._shapes[name])
        return self._dtype or self._base.read(name, [0] * len(one), one).dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        dtype = self.dtype(name)
        if name in self._copies:
            return _whole(self._adapter, self._copies[name]).to(dtype)
        weight = _whole(self._base, name)
        return (self._adapted(weight, self._slots[name]) if name in self._slots else weight).to(dtype)

    def _adapted(self, weight: Tensor, slot: peft.Slot) -> Tensor:
        """W' `[F, C]` of the module docstring, in fp32, or fp64 where W is."""
        a, b = _whole(self._adapter, slot.a), _whole(self._adapter, slot.b)  # [R, C], [F, R]
        work = torch.promote_types(weight.dtype, torch.float32)
        sum_ = torch.addmm(weight.to(work), b.to(work), a.to(work), alpha=slot.scale)  # [F, C]
        if not self._adapter.config.use_dora:
            return sum_
        magnitude = _whole(self._adapter, slot.magnitude).to(work)  # [F]
        return sum_.mul_((magnitude / torch.linalg.vector_norm(sum_, dim=1))[:, None])


def _whole(source: Source, name: str) -> Tensor:
    size = source.shapes()[name]
    return source.read(name, [0] * len(size), size)


def _files(sizes: Mapping[str, int], shard_bytes: int) -> Files:
    """Tensors dealt to files in their order, layer by layer."""
    shards = list(_shards(sizes, shard_bytes))
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    room = shard_bytes
    for name in sorted(sizes, key=_place):
        if shard and sizes[name] > room:
            yield shard
            shard, room = [], shard_bytes
        shard.append(name)
        room -= sizes[name]
    yield shard


def _place(name: str) -> tuple[int, int]:
    """Where a tensor comes: the embedding, the layers in their order, the rest."""
    parts = name.split(".")
    return (1, int(parts[2])) if parts[1] == "layers" else (0 if "embed" in name else 2, 0)
