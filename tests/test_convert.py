"""Conversion: megatron-core itself loads what we write, and we read what it writes; the same bits there and back, also after a fault."""

import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import distributed
import pytest
import tiny
import torch
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_security import Trap
from torch import Tensor

from megamod import checkpoint
from megamod.config import ParallelConfig
from megamod.errors import MegamodError
from megamod.model.shape import Shape, read_shape
from megamod.weights import convert, mcore, torch_dist
from megamod.weights.convert import compare, hf_to_mcore, mcore_to_hf
from megamod.weights.load import Safetensors, together_from, weights_at
from megamod.weights.table import hf_shapes, pieces, table

ROOT = Path(__file__).parents[1]
ZARR = '{"sharded_backend": "zarr", "sharded_backend_version": 1}'
NAMES = [name for name in tiny.CONFIGS if not tiny.shape(name).o_bias]


def directory(path: Path, name: str, dtype: torch.dtype = torch.bfloat16, mixed: bool = False) -> Path:
    """A Hugging Face directory. mixed: its norms in fp32."""
    tensors = tiny.weights(name, dtype)
    if mixed:
        tensors = {key: x.float() if key.endswith("norm.weight") else x for key, x in tensors.items()}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(tiny.config(name)), encoding="utf-8")
    (path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def contents(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    source = Safetensors(path)
    return {name: source.read(name, (0,) * len(size), size) for name, size in source.shapes().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and convert._same_bits(a[k], b[k]) for k in a)


def files_of(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# --- there and back -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, *tiny.EXPERTS])
def test_the_way_back_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", name, mixed=True)
    hf_to_mcore(source, tmp_path / "mcore", shard_bytes=20_000, jobs=3)
    assert len(list((tmp_path / "mcore" / "release").glob("*.distcp"))) > 2
    assert compare(source, tmp_path / "mcore") == sum(x.nbytes for x in contents(source).values())
    out, left_out = mcore_to_hf(tmp_path / "mcore", tmp_path / "back", shard_bytes=30_000, jobs=2)
    assert left_out == []
    assert same(contents(source), contents(out))
    assert compare(tmp_path / "mcore", out) > 0
    assert read_shape(out, experts=True) == read_shape(source, experts=True)
    assert {"tokenizer_config.json", "chat_template.jinja", "SHA256SUMS"} <= {file.name for file in out.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_dtype_is_changed_by_one_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", "qwen3", torch.float64)
    hf_to_mcore(source, tmp_path / "mcore", dtype)
    assert compare(source, tmp_path / "mcore") > 0
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back", torch.float64)
    assert same({k: x.to(dtype).double() for k, x in contents(source).items()}, contents(tmp_path / "back"))


def test_the_files_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    hf_to_mcore(directory(tmp_path / "hf", "qwen2", mixed=True), tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    (file,) = (tmp_path / "back").glob("*.safetensors")
    save_file(load_file(file), tmp_path / "theirs", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert file.stat().st_mode & 0o777 == (tmp_path / "back").stat().st_mode & 0o666  # as the umask has it


def test_every_box_is_a_file_of_torch_save(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", "llama3")
    release = hf_to_mcore(source, tmp_path / "mcore") / "release"
    metadata = pickle.loads((release / ".metadata").read_bytes())
    names = set()
    for index, info in metadata.storage_data.items():
        raw = (release / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        found = torch.load(io.BytesIO(raw), weights_only=True)
        assert zipfile.ZipFile(io.BytesIO(raw)).namelist()
        if index.offset is None:
            assert found == [None]
        else:
            chunk = next(chunk for chunk in metadata.state_dict_metadata[index.fqn].chunks if chunk.offsets == index.offset)
            assert found.shape == chunk.sizes
            assert found.dtype is torch.bfloat16
            names.add(index.fqn)
    assert "decoder.layers.self_attention.linear_qkv.weight" in names


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_box_in_one_piece_is_found_where_it_is(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    offset = [data.draw(st.integers(0, n - 1)) for n in shape]
    size = [data.draw(st.integers(1, n - o)) for o, n in zip(offset, shape, strict=True)]
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    box = numbers[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].flatten()
    first = together_from(shape, offset, size)
    if first is None:
        assert (box.diff() != 1).any()
    else:
        assert box.equal(torch.arange(first, first + len(box)))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 64))
@settings(deadline=None)
def test_boxes_are_cut_in_order_and_whole(size: list[int], block: int) -> None:
    numbers = torch.arange(torch.Size(size).numel()).view(size)
    with mock.patch.object(convert, "BLOCK", block):
        parts = list(convert._cut(convert.Box("x", (0,) * len(size), tuple(size)), 1))
    found = [numbers[tuple(slice(o, o + n) for o, n in zip(part.offset, part.size, strict=True))].flatten() for part in parts]
    assert torch.cat(found).equal(numbers.flatten())
    assert all(len(x) <= block for x in found)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_boxes_that_meet_are_found(data: st.DataObject) -> None:
    """Of a tensor that is cut along one axis after the other none does; with one that is moved or longer some do."""
    axes = data.draw(st.integers(1, 3))
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for _ in range(axes):
        sizes = [data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)) for _ in boxes]
        boxes = [((*o, sum(own[:i])), (*n, own[i])) for (o, n), own in zip(boxes, sizes, strict=True) for i in range(len(own))]
    boxes = data.draw(st.permutations(boxes))
    assert torch_dist._apart(boxes)
    offset, size = data.draw(st.sampled_from(boxes))
    assert not torch_dist._apart([*boxes, (offset, tuple(data.draw(st.integers(1, n)) for n in size))])


# --- megatron-core ------------------------------------------------------------------------------------------------------------


def theirs(shape: Shape, grid: Any, vocab: int) -> Any:
    """megatron-core's own model of `shape`: its layers, its attention, its RoPE."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    stages = {"pipeline_model_parallel_size": grid.pp.size, "tensor_model_parallel_size": grid.tp.size}
    experts = {} if shape.experts is None else {
        "num_moe_experts": shape.experts.count, "moe_router_topk": shape.experts.per_token, "moe_ffn_hidden_size": shape.experts.ffn,
    }  # fmt: skip
    config = TransformerConfig(
        num_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads, num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim, ffn_hidden_size=shape.ffn, normalization="RMSNorm", layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False, add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm, hidden_dropout=0.0, attention_dropout=0.0, masked_softmax_fusion=False, bias_dropout_fusion=False,
        use_cpu_initialization=True, perform_initialization=False, pipeline_dtype=torch.float32, **stages, **experts,
    )  # fmt: skip
    return GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=experts.get("num_moe_experts"), qk_layernorm=shape.qk_norm, normalization="RMSNorm"),
        vocab_size=vocab,
        max_sequence_length=shape.max_position,
        position_embedding_type="rope",
        rotary_base=int(shape.rope.theta),
        share_embeddings_and_output_weights=shape.tied,
        pre_process=grid.pp.rank == 0,
        post_process=grid.pp.rank == grid.pp.size - 1,
        parallel_output=False,
    )


@contextmanager
def model_of_theirs(name: str, parallel: ParallelConfig, vocab: int) -> Iterator[Any]:
    from megamod.parallel import grid as grids

    shape = tiny.shape(name)
    grid = grids.start(parallel, replace(shape, experts=None), seed=1)
    try:
        yield theirs(shape, grid, vocab)
    finally:
        grids.stop()


def loaded(name: str, path: Path, parallel: ParallelConfig, vocab: int) -> list[list[float]] | None:
    """The logits of megatron-core's model after its own loading of `path`; of pipelines the parameters that are as they were."""
    from megatron.core import dist_checkpointing

    with model_of_theirs(name, parallel, vocab) as model:
        for param in model.parameters():
            torch.nn.init.constant_(param, float("nan"))
        state = dist_checkpointing.load(model.sharded_state_dict(), str(path))
        model.load_state_dict({key: value for key, value in state.items() if key not in ("args", "checkpoint_version", "iteration")})
        assert state["args"].num_layers == 4
        if parallel.pp > 1 or name in tiny.EXPERTS:
            rows = {n: slice(0, 61 - p.shape[0]) for n, p in model.named_parameters() if "word_embeddings" in n}
            return [n for n, p in model.named_parameters() if p.isnan().any() and n not in rows]
        ids = torch.arange(16)[None] * 3 % 61
        mask = torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None]
        return model(ids, torch.arange(16)[None], mask)[0, :, :61].tolist()


def transformers_logits(path: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.arange(16)[None] * 3 % 61).logits[0]


@pytest.mark.parametrize("name", ["qwen2", "qwen3-tied", "llama2"])
def test_megatron_core_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", name, torch.float32)
    out = hf_to_mcore(source, tmp_path / "mcore", shard_bytes=30_000)
    # Megatron pads a vocabulary; what the checkpoint has of it goes to its place.
    for vocab, parallel in ((61, ParallelConfig()), (64, ParallelConfig(tp=2))):
        for logits in distributed.run(parallel.tp, loaded, name, out / "release", parallel, vocab):
            torch.testing.assert_close(torch.tensor(logits), transformers_logits(source), atol=2e-5, rtol=1e-5)
    assert distributed.run(4, loaded, name, out / "release", ParallelConfig(tp=2, pp=2), 64) == [[]] * 4


def test_megatron_core_loads_experts(tmp_path: Path) -> None:
    out = hf_to_mcore(directory(tmp_path / "hf", "qwen3-moe", torch.float32), tmp_path / "mcore")
    assert distributed.run(1, loaded, "qwen3-moe", out / "release", ParallelConfig(), 61) == [[]]


def saved(name: str, path: Path, parallel: ParallelConfig, vocab: int) -> list[list[float]] | None:
    """Have megatron-core draw a model and save it; its logits, where there is no pipeline."""
    from megatron.core import dist_checkpointing

    with model_of_theirs(name, parallel, vocab) as model:
        for n, param in model.named_parameters():
            seed = torch.Generator().manual_seed(len(n) * 7 + parallel.pp + (torch.distributed.get_rank() if _is_cut(n) else 0))
            with torch.no_grad():
                param.copy_(torch.randn(param.shape, generator=seed) * 0.15 + (1.0 if "norm" in n else 0.0))
        state: dict[str, Any] = model.sharded_state_dict()
        # The pool's ranks are daemons, which may not start the process that megatron-core wants beside a save.
        with mock.patch.dict(multiprocessing.current_process()._config, daemon=False):
            dist_checkpointing.save({**state, "iteration": 3, "args": {"a": 1}}, str(path))
        if parallel.pp > 1:
            return None
        ids = torch.arange(16)[None] * 3 % 61
        mask = torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None]
        return model(ids, torch.arange(16)[None], mask)[0, :, :61].tolist()


def _is_cut(name: str) -> bool:
    return any(part in name for part in ("linear", "word_embeddings", "output_layer"))


@pytest.mark.parametrize(("name", "tp", "pp", "vocab"), [("qwen2", 1, 1, 61), ("qwen3", 2, 1, 64), ("llama2", 2, 2, 64)])
def test_what_megatron_core_saves_is_read(name: str, tp: int, pp: int, vocab: int, tmp_path: Path) -> None:
    """On several ranks o_proj and down_proj lie in columns; there is no hf/ beside it, so the model is said."""
    model = directory(tmp_path / "model", name, torch.float32)
    (tmp_path / "run" / "iter_0000003").mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3\n", encoding="utf-8")
    logits = distributed.run(tp * pp, saved, name, tmp_path / "run" / "iter_0000003", ParallelConfig(tp=tp, pp=pp), vocab)
    out, _ = mcore_to_hf(tmp_path / "run", tmp_path / "hf", model=model, jobs=2)
    assert compare(tmp_path / "run", out, model) > 0
    if pp == 1:
        torch.testing.assert_close(torch.tensor(logits[0]), transformers_logits(out), atol=2e-5, rtol=1e-5)
    # And back: the same numbers in fewer boxes.
    again = hf_to_mcore(out, tmp_path / "again")
    assert mcore_to_hf(again, tmp_path / "hf2")[0].is_dir()
    assert same(contents(out), contents(tmp_path / "hf2"))


def test_experts_are_transformers_own(tmp_path: Path) -> None:
    """What transformers saves of a Qwen3-MoE goes there and back, and computes the same."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny.config("qwen3-moe")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model.save_pretrained(tmp_path / "hf")
    hf_to_mcore(tmp_path / "hf", tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert same(contents(tmp_path / "hf"), contents(tmp_path / "back"))
    assert transformers_logits(tmp_path / "back").equal(transformers_logits(tmp_path / "hf"))
    assert "experts: it can be converted, and not be trained" in complaint(lambda: read_shape(tmp_path / "hf"))


# --- a run's checkpoint ---------------------------------------------------------------------------------------------------------


def test_a_run_s_checkpoint_becomes_a_directory(tmp_path: Path) -> None:
    model = directory(tmp_path / "model", "qwen2")
    masters = tiny.weights("qwen2", torch.float32, seed=3)
    path = checkpoint.write(tmp_path / "checkpoints", 5, masters, {"model.path": str(model)})
    (model / "config.json").write_text(json.dumps({**tiny.config("qwen2"), "torch_dtype": "bfloat16"}), encoding="utf-8")
    mcore_to_hf(path, tmp_path / "hf")
    assert same({k: x.bfloat16() for k, x in masters.items()}, contents(tmp_path / "hf"))
    mcore_to_hf(path, tmp_path / "fp32", torch.float32, model=model)
    assert same(masters, contents(tmp_path / "fp32"))
    adapter = checkpoint.write(tmp_path / "adapter", 5, masters, {"model.path": str(model), "lora": {"r": 8}})
    assert "`tools/adapter.py export` or `merge`" in complaint(lambda: mcore_to_hf(adapter, tmp_path / "no"))
    shutil.rmtree(model)
    assert "say with --model" in complaint(lambda: mcore_to_hf(path, tmp_path / "no"))


# --- faults ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True])
def test_a_conversion_that_fails_anywhere_goes_on(back: bool, tmp_path: Path) -> None:
    """The disk is full after so many writes; then the same call ends with the same bytes, and does not write whole files again."""
    source = directory(tmp_path / "hf", "qwen3")
    hf_to_mcore(source, tmp_path / "mcore", shard_bytes=20_000)
    act = partial(mcore_to_hf, tmp_path / "mcore") if back else partial(hf_to_mcore, source)
    act = partial(act, shard_bytes=20_000, jobs=1)  # of which two are in work
    put, writes, left, kept, faults = convert.Sink._see, 0, 0, 0, 0

    def counted(sink: convert.Sink, data: Any) -> None:
        nonlocal writes
        writes += 1
        put(sink, data)

    def full(sink: convert.Sink, data: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        put(sink, data)

    with mock.patch.object(convert.Sink, "_see", counted):
        act(tmp_path / "whole")
    there: dict[Path, int] = {}
    while not (tmp_path / "out").exists():
        left = writes * 2 // 5
        assert faults < 9
        with mock.patch.object(convert.Sink, "_see", full):
            try:
                act(tmp_path / "out")
            except MegamodError as error:
                faults += 1
                assert "No space left on device); what is written stays in" in str(error)  # noqa: PT017
                kept += sum(file.stat().st_ino == inode for file, inode in there.items())
                state = tmp_path / ".out.tmp" / convert.STATE
                files = (tmp_path / ".out.tmp").rglob("*")
                there = {file: file.stat().st_ino for file in files if (state / f"{file.name}.json").exists()}
    assert faults > 1
    assert kept > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_no_kernel_copies_and_no_sums(tmp_path: Path) -> None:
    """Where the kernel copies nothing from file to file, or says that it copied nothing: the same bytes; without sums, too."""
    source = directory(tmp_path / "hf", "qwen2")
    hf_to_mcore(source, tmp_path / "a")
    for i, answer in enumerate((OSError(18, "Invalid cross-device link"), [0] * 1000)):
        with mock.patch.object(os, "copy_file_range", side_effect=answer):
            hf_to_mcore(source, tmp_path / f"b{i}", sums=False)
        theirs = files_of(tmp_path / "a")
        assert theirs.pop("release/SHA256SUMS")
        assert files_of(tmp_path / f"b{i}") == theirs
    (tmp_path / "a" / "release" / "SHA256SUMS").write_text("rubbish", encoding="utf-8")
    mcore_to_hf(tmp_path / "a", tmp_path / "back", sums=False)
    assert not (tmp_path / "back" / "SHA256SUMS").exists()
    assert "SHA256SUMS:1: damaged" in complaint(lambda: mcore_to_hf(tmp_path / "a", tmp_path / "no"))


def test_other_options_begin_again(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", "qwen2")
    with mock.patch.object(torch_dist, "finish", side_effect=OSError(5, "I/O error")):
        complaint(lambda: hf_to_mcore(source, tmp_path / "out", torch.float32))
    hf_to_mcore(source, tmp_path / "out")
    assert compare(source, tmp_path / "out") == sum(x.nbytes for x in contents(source).values())


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", "qwen2")
    words = [sys.executable, str(ROOT / "tools" / "hf_to_mcore.py"), str(source), str(tmp_path / "out"), "--verify", "--shard-bytes", "2e4"]
    killed = (
        "import sys, os, signal; sys.argv = sys.argv[1:]\n"
        "from megamod.weights import convert\n"
        "convert.torch_dist.finish = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    first = subprocess.run([sys.executable, "-c", killed, *words[1:]], capture_output=True, text=True, check=False)
    assert first.returncode == -signal.SIGKILL, first.stderr
    inodes = {file.name: file.stat().st_ino for file in (tmp_path / ".out.tmp" / "release").glob("*.distcp")}
    second = subprocess.run(words, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "verified:" in second.stdout
    assert inodes == {file.name: file.stat().st_ino for file in (tmp_path / "out" / "release").glob("*.distcp")}
    taken = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (taken.returncode, len(taken.stderr.splitlines())) == (1, 1)
    assert "exists and is not an empty directory" in taken.stderr


def test_verifying_finds_a_flipped_bit(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", "qwen2")
    hf_to_mcore(source, tmp_path / "mcore")
    file = tmp_path / "mcore" / "release" / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    at = torch_dist.TorchDist(tmp_path / "mcore")._stored["decoder.layers.mlp.linear_fc2.weight"][0].start
    raw[at + 5] ^= 4
    file.write_bytes(raw)
    assert "SHA-256" in complaint(lambda: mcore_to_hf(tmp_path / "mcore", tmp_path / "back"))
    assert "down_proj.weight is not what" in complaint(lambda: compare(source, tmp_path / "mcore"))


def test_what_a_checkpoint_says_is_never_called(tmp_path: Path) -> None:
    """In .metadata, and in the pickle beside a box; also through classes that are known, whose state it would be."""
    source = directory(tmp_path / "hf", "qwen2")
    whole = hf_to_mcore(source, tmp_path / "mcore") / "release"
    (whole / "SHA256SUMS").unlink()
    metadata = pickle.loads((whole / ".metadata").read_bytes())
    metadata.planner_data = Trap(tmp_path / "sprung")
    (whole / ".metadata").write_bytes(pickle.dumps(metadata))
    said = complaint(lambda: torch_dist.TorchDist(tmp_path / "mcore"))
    assert "names posix.mkdir, which is no data of a checkpoint: it is not opened" in said
    for hostile in (
        b"cbuiltins\neval\n(V1\ntR.",
        b"cos\nsystem\n(Vtrue\ntR.",
        b"ctorch\nload\n(Vx\ntR.",
        b"ctorch.distributed.checkpoint.x\ny\n.",
    ):
        (whole / ".metadata").write_bytes(hostile)
        complaint(lambda: torch_dist.TorchDist(tmp_path / "mcore"))
    assert not (tmp_path / "sprung").exists()


def test_a_hostile_box_is_never_called(tmp_path: Path) -> None:
    whole = hf_to_mcore(directory(tmp_path / "hf", "qwen2"), tmp_path / "mcore") / "release"
    (whole / "SHA256SUMS").unlink()
    file = whole / "__0_0.distcp"
    raw = file.read_bytes()
    target = b"ctorch._utils\n_rebuild_tensor_v2\n"
    hostile = b"cos\nsystem\n".ljust(len(target), b"N")  # the same length, so that the archive stays whole
    assert target in raw
    file.write_bytes(raw.replace(target, hostile, 1))
    said = complaint(lambda: torch_dist.TorchDist(tmp_path / "mcore"))
    assert "__0_0.distcp" in said


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "__0_0.distcp").unlink(), "a file that can be read was expected"),
        (lambda d: os.truncate(d / "__0_0.distcp", 9000), "shorter than .metadata says"),
        (lambda d: (d / "__0_0.distcp").write_bytes(b"\0" * (d / "__0_0.distcp").stat().st_size), "not what torch.save writes"),
        (lambda d: os.truncate(d / ".metadata", 900), ".metadata: not what Megatron-LM writes, or damaged"),
        (lambda d: (d / ".metadata").write_bytes(b""), ".metadata: not what Megatron-LM writes, or damaged"),
        (lambda d: (d / ".metadata").write_bytes(pickle.dumps([1])), ".metadata: not what Megatron-LM writes, or damaged"),
        (lambda d: (d / "metadata.json").write_text(ZARR), "zarr 1: only torch_dist"),
        (lambda d: (d.parent / "latest_checkpointed_iteration.txt").write_text("../x"), "no directory with .metadata"),
        (lambda d: edit(d, forget), "1 missing: decoder.final_layernorm.weight"),
        (lambda d: edit(d, rename), "1 unexpected: decoder.final_layernorm.bias"),
        (lambda d: edit(d, drop_box), "the boxes of output_layer.weight are not the whole of it"),
        (lambda d: edit(d, elsewhere), "must be a bare *.distcp name"),
    ],
)  # fmt: skip
def test_damage_is_one_line(damage: Any, said: str, tmp_path: Path) -> None:
    out = hf_to_mcore(directory(tmp_path / "hf", "qwen2"), tmp_path / "mcore")
    (out / "release" / "SHA256SUMS").unlink()
    damage(out / "release")
    assert said in complaint(lambda: mcore_to_hf(out, tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def edit(release: Path, change: Any) -> None:
    metadata = pickle.loads((release / ".metadata").read_bytes())
    change(metadata)
    (release / ".metadata").write_bytes(pickle.dumps(metadata))


def forget(metadata: Any) -> None:
    metadata.state_dict_metadata.pop("decoder.final_layernorm.weight")


def rename(metadata: Any) -> None:
    name, other = "decoder.final_layernorm.weight", "decoder.final_layernorm.bias"
    metadata.state_dict_metadata[other] = metadata.state_dict_metadata[name]
    for index in [index for index in metadata.storage_data if index.fqn == name]:
        metadata.storage_data[replace(index, fqn=other)] = metadata.storage_data[index]


def drop_box(metadata: Any) -> None:
    for index in [index for index in metadata.storage_data if index.fqn == "output_layer.weight"]:
        del metadata.storage_data[index]


def elsewhere(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../__0_0.distcp"


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_description_never_ends_in_a_traceback(seed: int, tmp_path: Path) -> None:
    """Random bytes of .metadata are others: it is read, or refused in one line."""
    draw = random.Random(seed)
    out = hf_to_mcore(directory(tmp_path / "hf", "qwen2"), tmp_path / "mcore") / "release"
    raw = bytearray((out / ".metadata").read_bytes())
    for _ in range(draw.choice((1, 1, 3, 30))):
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    (out / ".metadata").write_bytes(raw)
    said = ""
    try:
        mcore.AsHuggingFace(torch_dist.TorchDist(out), tiny.shape("qwen2"), "x")
    except MegamodError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1


def test_what_megatron_has_no_place_for_is_refused(tmp_path: Path) -> None:
    for name, said in (("qwen2-classes", "has no place for a head of"), ("llama-bias-tied", "no place for a bias of o_proj")):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(tiny.config(name)), encoding="utf-8")
        save_file(tiny.weights(name, torch.float32), path / "model.safetensors")
        assert said in complaint(lambda path=path: hf_to_mcore(path, tmp_path / "out"))
    assert "neither a checkpoint of Megatron-LM" in complaint(lambda: mcore_to_hf(tmp_path, tmp_path / "out"))


def test_a_tied_model_s_second_head_must_be_its_embedding(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", "qwen3-tied")
    tensors = contents(source)
    for head, fine in ((tensors["model.embed_tokens.weight"].clone(), True), (tensors["model.embed_tokens.weight"] + 1, False)):
        save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors")
        if fine:
            hf_to_mcore(source, tmp_path / "out")
        else:
            assert "ties the embeddings, but lm_head.weight differs" in complaint(lambda: hf_to_mcore(source, tmp_path / "no"))


def test_q_k_and_v_in_several_dtypes_lose_nothing(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", "qwen2", torch.float32)
    tensors = {name: x.bfloat16() if "q_proj" in name else x for name, x in contents(source).items()}
    save_file(tensors, source / "model.safetensors")
    hf_to_mcore(source, tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert same({name: x.float() for name, x in tensors.items()}, contents(tmp_path / "back"))


def test_two_at_once_are_one(tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", "qwen2")
    with convert._resumable(tmp_path / "out", "{}"):
        assert "is at work here" in complaint(lambda: hf_to_mcore(source, tmp_path / "out"))


# --- 72B ------------------------------------------------------------------------------------------------------------------------


def qwen72b(path: Path) -> Path:
    """Qwen2.5-72B's config.json and index, and sparse files of its weights' sizes: some kilobytes on disk."""
    shutil.copytree(ROOT / "configs" / "models" / "qwen2.5-72b", path)
    shapes = hf_shapes(read_shape(path))
    where, shards = {}, [[name for i, name in enumerate(shapes) if i % 37 == shard] for shard in range(37)]
    for number, names in enumerate(shards, 1):
        header, at = {}, 0
        for name in names:
            count = 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + count]}
            at += count
        text = json.dumps(header).encode()
        file = path / f"model-{number:05d}-of-00037.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(file, 8 + len(text) + at)
        where |= dict.fromkeys(names, file.name)
    index = {"metadata": {"total_size": 145412407296}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


def test_a_72b_s_directory_is_read_by_one_rank(tmp_path: Path) -> None:
    """963 keys; tp 8 × pp 4: rank (tp 3, stage 2) reads its own numbers of a layer, and nothing else of it."""
    path = qwen72b(tmp_path / "72b")
    shape = read_shape(path)
    source = weights_at(path, shape, 0)
    assert len(source.shapes()) == 963
    mark = {}
    for row in table(shape):
        if "{}" not in row.ours:
            continue
        for piece in pieces(row, 8, 3, 47):
            assert isinstance(source, Safetensors)
            file, first, _ = (source.extents(piece.hf, piece.offset, (1,) * len(piece.size)) or [])[0]
            value = 1 + len(mark)
            with file.open("r+b") as opened:  # a number where this rank's share begins
                opened.seek(first)
                opened.write(torch.tensor([float(value)], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
            mark[piece.hf] = (piece, value)
    for name, (piece, value) in mark.items():
        part = source.read(name, piece.offset, piece.size)
        assert part.flatten()[0] == value
        assert part.flatten()[1:].count_nonzero() == 0
    down = mark["model.layers.47.mlp.down_proj.weight"][0]
    assert (down.offset, down.size) == ((0, 3 * 3696), (8192, 3696))
    slabs = mcore.slabs(shape)
    assert len(slabs) == 80 * 7 + 3  # norms, qkv with its bias, proj, fc1, fc2; embedding, norm, head
    assert sum(run.rows for slab in slabs for run in slab.runs) == sum(size[0] for size in source.shapes().values())
