"""The table between Hugging Face's tensors and Megatron-LM's, as its checkpoints name and lay them; from `table`'s rows, both directions.

Megatron stacks the layers (and experts) of a kind along a first axis, and has the rows of q, k and v in turns, a group of query heads
and their key and value head at a time. So each of its tensors is runs of rows of Hugging Face's, and the other way about.
"""

import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megamod.errors import MegamodError
from megamod.model.shape import Shape
from megamod.weights.load import Extent, refuse_keys
from megamod.weights.table import Box, Part, Row, hf_shapes, table
from megamod.weights.torch_dist import TorchDist

# Beside a layer's parameters in the same checkpoint: what a run has, and an export has no use for.
OF_A_RUN = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler", "args", "iteration", "num_floating_point")
EXTRA = "_extra_state"
EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")
# A norm and the linear after it are one module in Transformer Engine, whose names megatron-core uses on other backends, too; except
# before experts, where Transformer Engine has the norm by itself.
NORMS = {"input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight",)}
NORM_AFTER = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
# Modules that keep an FP8 state, in Transformer Engine or in megatron-core's own layers: of a layer, of an expert, of the rest.
STATES = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention", "input_layernorm", "pre_mlp_layernorm",
    "self_attention.q_layernorm", "self_attention.k_layernorm",
)  # fmt: skip
MLP_STATES = ("linear_fc1", "linear_fc2")
FINAL_STATES = ("decoder.final_layernorm._extra_state", "output_layer._extra_state")


class Run(NamedTuple):
    """Rows of one of Hugging Face's tensors that lie together in one of Megatron's."""

    hf: str
    first: int
    rows: int


@dataclass(frozen=True)
class Slab:
    """One layer's part of one of Megatron's tensors, whole in all other axes; one expert's of that."""

    names: tuple[str, ...]  # what it is called: several where Megatron's backends differ
    shape: tuple[int, ...]  # the tensor's
    at: tuple[int, ...]  # layer, and expert: the place in the axes that come first
    runs: tuple[Run, ...]  # what its rows are, from the top

    @property
    def box(self) -> Box:
        inner = self.shape[len(self.at) :]
        return (*self.at, *(0 for _ in inner)), (*(1 for _ in self.at), *inner)


def slabs(shape: Shape) -> list[Slab]:
    """Of all of Megatron's tensors, layer by layer; each row of Hugging Face's is in one of them.

    Raises:
        MegamodError: a head of scores, or a bias of o_proj alone, which Megatron-LM has not.
    """
    if shape.score is not None:
        raise MegamodError(f"Megatron-LM has no place for {shape.score}: only models with a vocabulary are converted")
    if shape.o_bias:
        raise MegamodError("Megatron-LM has no place for a bias of o_proj without one of the MLP: such a model is not converted")
    rows = table(shape)
    layered, single = [row for row in rows if "{}" in row.ours], [row for row in rows if "{}" not in row.ours]
    result = [_slab(row, shape, None) for row in single if row.ours.startswith("embedding")]
    result += [_slab(row, shape, layer) for layer in range(shape.layers) for row in layered]
    return result + [_slab(row, shape, None) for row in single if not row.ours.startswith("embedding")]


def _slab(row: Row, shape: Shape, layer: int | None) -> Slab:
    name = row.ours.replace("layers.{}.", "layers.")
    at, before = ((), ()) if layer is None else ((layer,), (shape.layers,))
    if (match := EXPERT.search(name)) is not None and shape.experts is not None:
        name = name.replace(match[0], "mlp.experts.experts.")
        at, before = (*at, int(match[1])), (*before, shape.experts.count)
    inner = (sum(part.shape[0] for part in row.parts), *row.parts[0].shape[1:])
    parts = tuple(_named(part, layer) for part in row.parts)
    return Slab(_names(name, shape), (*before, *inner), at, _runs(name, parts, shape))


def _named(part: Part, layer: int | None) -> tuple[str, int]:
    return part.hf.format(layer), part.shape[0]


def _names(name: str, shape: Shape) -> tuple[str, ...]:
    prefix, _, leaf = name.partition("decoder.layers.")
    if leaf == "pre_mlp_layernorm.weight":
        leaves: Sequence[str] = NORM_AFTER if shape.experts is not None else NORM_AFTER[:1]
    else:
        leaves = NORMS.get(leaf, (leaf,))
    return tuple(f"decoder.layers.{one}" if leaf else prefix for one in leaves)


def _runs(name: str, parts: Sequence[tuple[str, int]], shape: Shape) -> tuple[Run, ...]:
    groups = shape.kv_heads if "linear_qkv." in name and len(parts) > 1 else 1
    return tuple(Run(hf, group * rows // groups, rows // groups) for group in range(groups) for hf, rows in parts)


def extra_states(shape: Shape) -> Iterator[str]:
    """The keys of the FP8 states that Megatron-LM asks a checkpoint for, whichever backend its layers are of."""
    E = shape.experts.count if shape.experts is not None else None
    for layer in range(shape.layers):
        for module in (*STATES, *(f"mlp.{one}" for one in MLP_STATES)):
            yield f"decoder.layers.{module}.{EXTRA}/shard_{layer}_{shape.layers}"
        for expert in range(E or 0):
            for module in MLP_STATES:
                yield f"decoder.layers.mlp.experts.experts.{module}.{EXTRA}/shard_{layer}.{expert}_{shape.layers}.{E}"
    yield from (f"{name}/shard_0_1" for name in FINAL_STATES)


class AsHuggingFace:
    """A checkpoint of Megatron-LM as a Source by Hugging Face's names.

    Args:
        where: what to call it in errors.

    Raises:
        MegamodError: every tensor of either side once, in its shape, or a line that lists what is not so. A vocabulary may be padded.
    """

    def __init__(self, source: TorchDist, shape: Shape, where: str) -> None:
        self._source, self._shapes = source, hf_shapes(shape)
        self._found: dict[str, list[tuple[int, int, str, Slab, int]]] = defaultdict(list)  # first row, rows, name, slab, its row
        shapes, used = source.shapes(), set[str]()
        missing, wrong = dict[str, None](), dict[str, None]()  # in their order, once
        for slab in slabs(shape):
            name = next((name for name in slab.names if name in shapes), None)
            if name is None:
                missing[slab.names[0]] = None
                continue
            if not _fits(shapes[name], slab, shape):
                wrong[f"{name} is {shapes[name]}, not {slab.shape}"] = None
            used.update(slab.names)  # where Megatron's backends differ, ours have both names for the same bytes
            row = 0
            for run in slab.runs:
                self._found[run.hf].append((run.first, run.rows, name, slab, row))
                row += run.rows
        others = {name for name in (*shapes, *source.others) if name not in used and f".{EXTRA}" not in name}
        self.left_out = sorted(name for name in others if name.startswith(OF_A_RUN))
        refuse_keys(list(missing), sorted(others - set(self.left_out)), list(wrong), where)
        for runs in self._found.values():
            runs.sort(key=lambda run: run[0])

    @property
    def directories(self) -> tuple[Path, ...]:
        return self._source.directories

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._found[name][0][2])

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """A box of a tensor; a view where it lies in one piece. It is not to be written to."""
        parts = [self._source.read(*box).reshape(-1, *size[1:]) for box in self._boxes(name, offset, size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def extents(self, name: str, offset: Sequence[int], size: Sequence[int]) -> list[Extent] | None:
        found = [self._source.extents(*box) for box in self._boxes(name, offset, size)]
        return None if None in found else [extent for extents in found for extent in extents or ()]

    def _boxes(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """A box in boxes of Megatron's tensors, in the order of its rows."""
        runs, first, last = self._found[name], offset[0], offset[0] + size[0]
        for start, rows, theirs, slab, row in runs[max(0, bisect_right(runs, first, key=lambda run: run[0]) - 1) :]:
            low, high = max(start, first), min(start + rows, last)
            if start >= last:
                return
            if low < high:
                yield theirs, (*slab.at, row + low - start, *offset[1:]), (*(1 for _ in slab.at), high - low, *size[1:])


def _fits(found: tuple[int, ...], slab: Slab, shape: Shape) -> bool:
    padded = slab.names[0] in ("embedding.word_embeddings.weight", "output_layer.weight")
    if padded and len(found) == 2:
        return found[0] >= shape.vocab and found[1] == shape.hidden
    return found == slab.shape


def arguments(shape: Shape) -> dict[str, object]:
    """What Megatron-LM's `--use-checkpoint-args` reads of a model."""
    experts = {} if (e := shape.experts) is None else {
        "num_experts": e.count, "moe_router_topk": e.per_token, "moe_ffn_hidden_size": e.ffn, "moe_router_load_balancing_type": "aux_loss",
    }  # fmt: skip
    return {
        "num_layers": shape.layers, "hidden_size": shape.hidden, "ffn_hidden_size": shape.ffn, "num_attention_heads": shape.heads,
        "group_query_attention": shape.kv_heads != shape.heads, "num_query_groups": shape.kv_heads, "kv_channels": shape.head_dim,
        "max_position_embeddings": shape.max_position, "seq_length": shape.max_position, "position_embedding_type": "rope",
        "rotary_base": int(shape.rope.theta), "rotary_percent": 1.0, "use_rope_scaling": shape.rope.kind == "llama3",
        "rope_scaling_factor": shape.rope.factor, "normalization": "RMSNorm", "norm_epsilon": shape.norm_eps,
        "swiglu": True, "add_bias_linear": False, "add_qkv_bias": shape.qkv_bias, "qk_layernorm": shape.qk_norm,
        "untie_embeddings_and_output_weights": not shape.tied, "padded_vocab_size": shape.vocab, "vocab_size": shape.vocab,
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, **experts,
    }  # fmt: skip


def largest(shape: Shape) -> int:
    """Numbers in the largest of Megatron's fused tensors."""
    return max(math.prod(slab.box[1]) for slab in slabs(shape))
