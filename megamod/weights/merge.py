"""Base and adapter → a Hugging Face directory of its own, tensor by tensor; the base is read, and never written.

    W' = W + s·BA                              LoRA
    W' = m ⊙ (W + s·BA) / ‖W + s·BA‖           DoRA: m and the norms `[F]`, over W's inputs

computed in fp32 at least and rounded once. What the adapter does not change is copied bit for bit. Of a base in 4 bits W is what these
stand for, in fp32; its linears without an adapter are rounded once, too.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megamod.errors import MegamodError
from megamod.model.shape import Shape, read_shape
from megamod.weights import checksums, peft
from megamod.weights.bitsandbytes import quantised
from megamod.weights.export import begin, drafting, refuse_taken, stream
from megamod.weights.load import Source, check_keys, verify, weights_at
from megamod.weights.quantization import Quantization
from megamod.weights.table import hf_shapes


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    quantization: Quantization | None = None,
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = 4_000_000_000,
) -> Path:
    """Write the model that `base` and `adapter` are together to `out`. Memory holds one file's tensors, and one in fp32.

    Args:
        base: a Hugging Face directory, plain or of bitsandbytes; its config.json, tokenizer and licence are copied.
        adapter: a PEFT directory or a run's checkpoint.
        out: new, or empty.
        dtype: of the written tensors; None: the base's own.
        quantization: what the base was quantised to beneath the adapter; None: what the adapter says.
        texts: further small files, by name; they replace the base's of that name.
        shard_bytes: a file holds at most so much, or a single larger tensor.

    Raises:
        MegamodError: an adapter of another base, a target that holds something, or a write that fails; `out` is not there then.
    """
    refuse_taken(Path(out))
    shape = peft.shape_with(adapter, read_shape(base))
    found = peft.opened(adapter, shape)
    if quantization is not None and found.quantization not in (None, quantization):
        raise MegamodError(f"{adapter}: an adapter of a base in {found.quantization}, and {quantization} was asked for")
    weights = quantised(weights_at(base, shape, 0), quantization or found.quantization, str(adapter))
    check_keys(weights, shape, str(base))
    verify(weights)
    verify(found)
    peft.check_base(found, weights, shape, str(adapter))
    merged = Merged(weights, found, shape, dtype)
    sizes = {name: math.prod(size) * merged.dtype(name).itemsize for name, size in merged.shapes().items()}
    with drafting(Path(out)) as draft:
        begin(draft, Path(base), Path(base), merged.dtype("model.embed_tokens.weight"), texts or {}, shape.score)
        stream(draft, sizes, lambda name: {name: merged.read(name)}, shard_bytes, "merging")
        checksums.seal(draft)
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
        return self._dtype or self._base.dtype(name)

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
