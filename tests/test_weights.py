"""Hugging Face → ranks → Hugging Face: the table's properties, the round trip on real grids, who can read it, bad input."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import distributed
import numpy as np
import oracle
import pytest
import tiny
import torch
from complaints import complaint
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamod.config import ModelConfig, ParallelConfig
from megamod.errors import MegamodError
from megamod.model.build import DTYPES, build, data_parallel
from megamod.model.rope import inverse_frequencies
from megamod.model.shape import FAMILIES, Rope, Shape, both_spellings, read_shape, shape_of
from megamod.parallel.grid import started
from megamod.weights import export as export_module
from megamod.weights.checksums import SUMS
from megamod.weights.export import export
from megamod.weights.load import INDEX, SINGLE, Safetensors, check_keys, load
from megamod.weights.table import boxes, hf_shapes, overlap, padded_vocab, pieces, share, table

# --- directories -----------------------------------------------------------------------------------------------------------


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], files: int = 1) -> Path:
    """A Hugging Face directory: one file, or an index and so many shards."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(dict(tensors), directory / SINGLE, metadata={"format": "pt"})
        return directory
    where = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: t for name, t in tensors.items() if where[name] == file}, directory / file, metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every shard, without megamod."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What is not the same to the last bit."""
    keys = [f"{key} is in one only" for key in sorted(found.keys() ^ expected.keys())]
    both = found.keys() & expected.keys()
    return keys + [key for key in sorted(both) if found[key].dtype != expected[key].dtype or not torch.equal(found[key], expected[key])]


# --- the round trip, on every grid -----------------------------------------------------------------------------------------

GRIDS: list[dict[str, Any]] = [{"tp": tp, "pp": pp} for tp in (1, 2, 4) for pp in (1, 2)]
# qwen2-1kv at tp 2 and 4, qwen3 at tp 4: more ranks than kv heads. The vocabulary of 61 is padded by tp 2 and 4.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{name}-{dtype}-tp{grid['tp']}-pp{grid['pp']}": (name, dtype, grid)
    for grid in GRIDS
    for name, dtype in (("qwen2-1kv", "bfloat16"), ("qwen3", "float32"), ("llama-bias-tied", "bfloat16" if grid["tp"] == 2 else "float32"))
}
CASES |= {
    "uneven": ("qwen3-tied", "bfloat16", {"tp": 2, "pp": 2, "layers_per_stage": (3, 1)}),
    "vpp": ("qwen2-tied-yarn", "float32", {"tp": 2, "pp": 2, "vpp": 2}),
    "vpp-uneven": ("llama3", "float32", {"tp": 1, "pp": 2, "vpp": 2, "layers_per_stage": (1, 2, 1, 0)}),
    "cp": ("mistral", "float32", {"tp": 2, "pp": 2, "cp": 2}),
    "tp8": ("qwen2", "float32", {"tp": 8}),
    "internlm3": ("internlm3", "bfloat16", {"tp": 4, "pp": 2}),
}


def round_trips(root: Path, cases: Mapping[str, tuple[str, str, dict[str, Any]]]) -> list[str]:
    """On every rank: export each case to root/<case>. Returns parameters with an element that loading left as it was."""
    unset = []
    for case, (name, dtype, parallel) in cases.items():
        shape = tiny.shape(name)
        source = root / f"{name}-{dtype}"
        with started(ParallelConfig(**parallel), shape) as grid:
            chunks: Any = build(ModelConfig(path="", dtype=dtype), shape, grid)[0]  # type: ignore[arg-type]
            for chunk in chunks:
                for param in chunk.parameters():
                    param.data.fill_(math.nan)
            for item in load(chunks, shape, grid, Safetensors(source)):
                if item.param.isnan().any():
                    unset.append(f"{case}: {item.name} on rank {grid.rank}")
            if case == "uneven":  # as in training
                chunks = data_parallel(chunks, grid)
            export(chunks, shape, grid, root / case, source=source)
    return unset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a source directory for each model and dtype, and the export of every case."""
    root = tmp_path_factory.mktemp("round_trips")
    for files, (name, dtype) in enumerate(sorted({(name, dtype) for name, dtype, _ in CASES.values()})):
        write(root / f"{name}-{dtype}", tiny.config(name), tiny.weights(name, DTYPES[dtype]), files=1 + files % 3)
    unset = distributed.run(8, round_trips, root, CASES)
    assert unset == [[]] * 8
    return root


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_exact(root: Path, case: str) -> None:
    name, dtype, _ = CASES[case]
    assert differences(read(root / case), tiny.weights(name, DTYPES[dtype])) == []
    config = json.loads((root / case / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == tiny.shape(name).rope.theta
    assert config["architectures"] == [FAMILIES[config["model_type"]].architecture]
    assert read_shape(root / case) == tiny.shape(name)
    check_keys(Safetensors(root / case), tiny.shape(name), case)


@pytest.mark.parametrize("case", ["qwen3-float32-tp4-pp2", "llama-bias-tied-float32-tp4-pp1", "vpp", "vpp-uneven", "cp", "tp8"])
def test_transformers_reads_the_export(root: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    name = CASES[case][0]
    model, info = AutoModelForCausalLM.from_pretrained(root / case, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    tokens = torch.arange(24)[None] * 7 % 61
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, oracle.model(name, torch.float32)(tokens).logits, rtol=0, atol=1e-6)


# --- files -----------------------------------------------------------------------------------------------------------------

SHARD = 12_000  # bytes: several shards for each writer


def export_files(source: Path, target: Path, dtype: torch.dtype | None, shard_bytes: int, parallel: dict[str, Any]) -> None:
    shape = read_shape(source)
    before = os.umask(0o027)
    try:
        with started(ParallelConfig(**parallel), shape) as grid:
            chunks, _ = build(ModelConfig(path="", dtype="float32"), shape, grid)
            load(chunks, shape, grid, Safetensors(source))
            export(chunks, shape, grid, target, source=source, dtype=dtype, shard_bytes=shard_bytes)
    finally:
        os.umask(before)


def test_shards_index_companions_and_permissions(tmp_path: Path) -> None:
    tensors = tiny.weights("qwen3", torch.float32)
    source = write(tmp_path / "source", tiny.config("qwen3", eos_token_id=2), tensors)
    companions = {"tokenizer.json", "merges.txt", "chat_template.jinja", "generation_config.json", "LICENSE.txt"}
    for name in companions | {"modeling_evil.py", "optimizer.pt", ".secret"}:
        (source / name).write_text(f"{name} π")
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)  # an empty directory may be there
    left = target.with_name(".target.tmp")  # and what an export that was killed left behind
    left.mkdir()
    (left / "rubbish").touch()
    distributed.run(8, export_files, source, target, torch.bfloat16, SHARD, {"tp": 2, "pp": 2})

    assert not left.exists()
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 6
    assert [s.name for s in shards] == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert {f.name for f in target.iterdir()} == companions | {"config.json", INDEX, SUMS} | {s.name for s in shards}
    assert all((target / name).read_text() == f"{name} π" for name in companions)
    assert {f.stat().st_mode & 0o777 for f in target.iterdir()} == {0o640}

    index = json.loads((target / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors.values())
    held = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == held
    assert differences(read(target), {name: t.bfloat16() for name, t in tensors.items()}) == []
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = [math.prod(file.get_slice(k).get_shape()) * 2 for k in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= SHARD or len(sizes) == 1

    config = json.loads((target / "config.json").read_text())
    assert config["eos_token_id"] == 2
    assert config["dtype"] == "bfloat16"
    ours = Safetensors(target)
    assert ours.shapes() == hf_shapes(tiny.shape("qwen3"))
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(ours.read(name, (3, 5), (7, 11)), tensors[name].bfloat16()[3:10, 5:16])


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tiny.config("llama2"), tiny.weights("llama2", torch.float32))
    distributed.run(8, export_files, source, tmp_path / "target", None, 10**9, {"tp": 4})
    assert [f.name for f in (tmp_path / "target").glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]


def refusals(root: Path) -> list[tuple[str, str | None]]:
    """On every rank: what each export says that must fail."""
    shape = tiny.shape("qwen2")
    result: list[tuple[str, str | None]] = []
    with started(ParallelConfig(tp=2, pp=2), shape) as grid:
        chunks, _ = build(ModelConfig(path="", dtype="float32"), shape, grid)
        load(chunks, shape, grid, Safetensors(root / "source"))

        def attempt(case: str, target: str = "target", source: str = "source", save: Callable[..., None] = save_file) -> None:
            with mock.patch.object(export_module, "save_file", save):
                try:
                    export(chunks, shape, grid, root / target, source=root / source, shard_bytes=10_000)
                    result.append((case, None))
                except MegamodError as error:
                    result.append((case, str(error)))

        written = []

        def full(tensors: Any, file: Path, **kwargs: Any) -> None:
            written.append(file)
            if grid.rank == 5 and len(written) == 2:
                raise OSError(28, "No space left on device")
            save_file(tensors, file, **kwargs)

        attempt("taken", target="taken")
        attempt("a file", target="file")
        attempt("under a file", target="file/target")
        attempt("another model", source="other")
        attempt("no source", source="nowhere")
        attempt("link", target="never", source="linked")
        attempt("disk full on one rank", target="never", save=full)
        attempt("and then it works")
    return result


def test_export_refuses_on_every_rank_alike(tmp_path: Path) -> None:
    config, tensors = tiny.config("qwen2"), tiny.weights("qwen2", torch.float32)
    write(tmp_path / "source", config, tensors)
    write(tmp_path / "linked", config, tensors)
    write(tmp_path / "other", {**config, "num_hidden_layers": 5, "rope_theta": 5.0}, tensors)
    (tmp_path / "secret").write_text("key")
    (tmp_path / "linked" / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "keep").write_text("me")
    (tmp_path / "file").touch()
    before = {f.name for f in tmp_path.iterdir()}
    answers = distributed.run(8, refusals, tmp_path)
    assert all(answer == answers[0] for answer in answers)
    said = dict(answers[0])
    assert all(text is None or "\n" not in text for text in said.values())
    assert said.pop("and then it works") is None
    assert {case: text is not None for case, text in said.items()} == dict.fromkeys(said, True)
    for case, words in {
        "taken": "taken: exists and is not an empty directory; export to a new one, or remove it",
        "a file": "file: exists and is not an empty directory",
        "under a file": "file: rank 0: File exists",
        "another model": "other: config.json describes another model than the one to export: its layers, rope differ",
        "no source": "nowhere: cannot be read",
        "link": "LICENSE: a link that leaves the directory is not followed",
        "disk full on one rank": "rank 5: No space left on device",
    }.items():
        assert words in str(said[case]), case
    assert (tmp_path / "taken" / "keep").read_text() == "me"
    assert {f.name for f in tmp_path.iterdir()} == before | {"target"}  # no drafts are left
    assert differences(read(tmp_path / "target"), tensors) == []


# --- an independent client generates ---------------------------------------------------------------------------------------

PROMPT = "w1 w2 w3 w4"
MISTRALRS = """
import json, sys
from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which
answers = []
for path in sys.argv[2:]:
    runner = Runner(which=Which.Plain(model_id=path, dtype=ModelDType.F32), token_source="none")
    messages = [{"role": "user", "content": sys.argv[1]}]
    request = ChatCompletionRequest(model="default", messages=messages, max_tokens=8, temperature=0.0, top_k=1)
    answers.append(runner.send_chat_completion_request(request).choices[0].message.content)
print("ANSWERS", json.dumps(answers))
"""


def write_tokenizer(directory: Path, vocab: int) -> None:
    """Words `w0`, `w1`, … and a chat template. mistral.rs asks for a ByteLevel decoder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>"]
    words = special + [f"w{i}" for i in range(vocab - len(special))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fast.save_pretrained(directory)


def test_mistralrs_answers_from_the_export(tmp_path: Path) -> None:
    pytest.importorskip("mistralrs")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 95}
    rope = {"rope_type": "default", "rope_theta": 1e4}  # transformers 5 alone: mistral.rs needs the export's other spelling
    targets, expected = [], []
    qwen3 = {"head_dim": 32, "tie_word_embeddings": True, "max_window_layers": 2, "use_sliding_window": False, "attention_bias": False}
    for family, extra in (("qwen3", qwen3), ("llama", {"head_dim": 16})):
        config: dict[str, Any] = {**tiny.BASE, **sizes, **extra, "model_type": family, "rope_parameters": rope, "eos_token_id": 2}
        generator = torch.Generator().manual_seed(3)
        state = {
            name: torch.randn(size, generator=generator) * (0.3 if len(size) > 1 else 0.1) + (len(size) == 1)
            for name, size in hf_shapes(shape_of(config)).items()
        }
        source, target = write(tmp_path / family, config, state), tmp_path / f"{family}-export"
        write_tokenizer(source, sizes["vocab_size"])
        distributed.run(8, export_files, source, target, None, 10**5, {"tp": 2, "pp": 2})
        tokenizer = AutoTokenizer.from_pretrained(target)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = AutoModelForCausalLM.from_pretrained(target).generate(**prompt, max_new_tokens=8, do_sample=False)[0]
        targets.append(str(target))
        expected.append(tokenizer.decode(answer[prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    assert all(len(set(text.split("w"))) > 3 for text in expected), expected  # an answer that says something
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MISTRALRS, PROMPT, *targets], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.split("ANSWERS ")[1]) == expected


# --- the table -------------------------------------------------------------------------------------------------------------


@st.composite
def shapes_and_tp(draw: st.DrawFn) -> tuple[Shape, int]:
    """A shape and a tensor-parallel size that can cut it, as parallel.grid.check rules."""
    kv_heads, group = draw(st.sampled_from([1, 2, 3, 4, 6, 8])), draw(st.integers(1, 4))
    tp = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    assume(kv_heads % tp == 0 or tp % kv_heads == 0)
    assume(kv_heads * group % tp == 0)
    shape = Shape(
        family="llama", layers=draw(st.integers(1, 3)), hidden=draw(st.integers(1, 7)), heads=kv_heads * group, kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 2, 4])), ffn=tp * draw(st.integers(1, 4)), vocab=draw(st.integers(1, 70)), rope=Rope(1e4),
        norm_eps=1e-6, max_position=8, qkv_bias=draw(st.booleans()), o_bias=draw(st.booleans()), qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
    )  # fmt: skip
    return shape, tp


@settings(max_examples=60, deadline=None)
@given(shapes_and_tp())
def test_owned_pieces_tile_every_tensor_once(drawn: tuple[Shape, int]) -> None:
    shape, tp = drawn
    count = {name: np.zeros(size, int) for name, size in hf_shapes(shape).items()}
    for row in table(shape):
        for layer in range(shape.layers if "{}" in row.ours else 1):
            for rank in range(tp):
                for piece in pieces(row, tp, rank, layer):
                    assert piece.shape == count[piece.hf].shape
                    if piece.owned:
                        count[piece.hf][tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.size, strict=True))] += 1
    assert all((c == 1).all() for c in count.values()), {name: c for name, c in count.items() if (c != 1).any()}


@settings(max_examples=60, deadline=None)
@given(shapes_and_tp())
def test_pieces_fill_the_parameter_and_ranks_hold_the_heads_they_use(drawn: tuple[Shape, int]) -> None:
    shape, tp = drawn
    D = shape.head_dim
    for row in table(shape):
        for rank in range(tp):
            end = 0
            for piece in pieces(row, tp, rank, 0):
                assert piece.row == end
                end += piece.size[0]
            if row.parts[0].padded:
                height = padded_vocab(shape.vocab, tp) // tp
                assert share(row.parts[0], tp, rank)[2] == height
                assert end == max(0, min(height, shape.vocab - rank * height))
            if row.ours.endswith("linear_qkv.weight"):
                q, k, v = pieces(row, tp, rank, 0)
                assert [p.hf.split(".")[-2] for p in (q, k, v)] == ["q_proj", "k_proj", "v_proj"]
                assert q.size[0] == shape.heads // tp * D
                assert k.size[0] == v.size[0] == max(1, shape.kv_heads // tp) * D
                used = {(q.offset[0] + i) // D // (shape.heads // shape.kv_heads) for i in range(q.size[0])}
                assert used == {(k.offset[0] + i) // D for i in range(k.size[0])} == {(v.offset[0] + i) // D for i in range(v.size[0])}


def test_hf_shapes_counts_what_shape_counts() -> None:
    for name in tiny.CONFIGS:
        assert sum(math.prod(size) for size in hf_shapes(tiny.shape(name)).values()) == tiny.shape(name).parameters()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_boxes_tile_any_flat_range_in_order(data: st.DataObject) -> None:
    size = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=2)))
    offset = tuple(data.draw(st.integers(0, 4)) for _ in size)
    whole = tuple(o + n + 2 for o, n in zip(offset, size, strict=True))
    start = data.draw(st.integers(0, math.prod(size) - 1))
    stop = data.draw(st.integers(start + 1, math.prod(size)))
    piece = replace(pieces(table(tiny.shape("qwen2"))[0], 1, 0, 0)[0], shape=whole, offset=offset, size=size)
    tensor = np.arange(math.prod(whole)).reshape(whole)

    def cut(box: Any) -> np.ndarray:
        return tensor[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].ravel()

    found = list(boxes(piece, start, stop))
    assert len(found) <= 3
    assert [a for a, _, _ in found] + [stop] == [start] + [b for _, b, _ in found]
    assert all(cut(box).size == b - a > 0 for a, b, box in found)
    assert (np.concatenate([cut(box) for _, _, box in found]) == cut((offset, size))[start:stop]).all()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_overlap_agrees_with_masks(data: st.DataObject) -> None:
    dimensions = data.draw(st.integers(1, 3))

    def box() -> tuple[tuple[int, ...], tuple[int, ...]]:
        offset = tuple(data.draw(st.integers(0, 5)) for _ in range(dimensions))
        return offset, tuple(data.draw(st.integers(1, 4)) for _ in range(dimensions))

    def slices(box: Any) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(*box, strict=True))

    a, b = box(), box()
    where = np.arange(9**dimensions).reshape((9,) * dimensions)
    inside_both = np.zeros(where.shape, int)
    inside_both[slices(a)] += 1
    inside_both[slices(b)] += 1
    common = overlap(a, b)
    assert (common is None) == (not (inside_both == 2).any())
    if common is not None:
        assert (where[slices(a)][common[0]] == where[slices(b)][common[1]]).all()
        assert where[slices(a)][common[0]].ravel().tolist() == where[inside_both == 2].tolist()


# --- bad input -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good checkpoint in two shards, for a test to spoil."""
    return write(tmp_path / "hf", tiny.config("qwen3"), tiny.weights("qwen3", torch.float32), files=2)


def edit_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING = "model.embed_tokens.weight"  # in FIRST


def test_keys_that_do_not_match_are_all_listed(tmp_path: Path) -> None:
    tensors = tiny.weights("qwen3", torch.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old exports carry it: let pass
    write(tmp_path / "good", tiny.config("qwen3"), tensors)
    check_keys(Safetensors(tmp_path / "good"), tiny.shape("qwen3"), "good")
    del tensors["model.layers.1.self_attn.q_norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.4.mlp.up_proj.weight"] = torch.zeros(48, 32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.norm.weight"] = torch.zeros(31)
    tensors[EMBEDDING] = torch.zeros(64, 32)
    write(tmp_path / "bad", tiny.config("qwen3"), tensors)
    text = complaint(lambda: check_keys(Safetensors(tmp_path / "bad"), tiny.shape("qwen3"), "bad"))
    assert text == (
        "bad: the tensors do not match config.json: 2 missing: lm_head.weight, model.layers.1.self_attn.q_norm.weight; "
        "2 unexpected: model.layers.0.self_attn.q_proj.bias, model.layers.4.mlp.up_proj.weight; "
        "2 mis-shaped: model.embed_tokens.weight is (64, 32), not (61, 32), model.norm.weight is (31,), not (32,)"
    )


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "model.bin", "..", "", "a\0.safetensors", "\ud800.safetensors", 7],
)
def test_a_shard_has_a_bare_safetensors_name(sharded: Path, name: str) -> None:
    save_file({EMBEDDING: torch.zeros(61, 32)}, sharded.parent / "x.safetensors")
    edit_index(sharded, lambda where: where.update({EMBEDDING: name}))
    text = complaint(lambda: Safetensors(sharded))
    assert text == f"{sharded / INDEX}: {name!r} must be a bare *.safetensors name inside the directory"


def test_a_link_that_leaves_the_directory_is_not_followed(sharded: Path) -> None:
    (sharded / SECOND).rename(sharded.parent / "x.safetensors")
    (sharded / SECOND).symlink_to("../x.safetensors")
    assert "must be a bare *.safetensors name inside the directory" in complaint(lambda: Safetensors(sharded))
    (sharded / SECOND).unlink()
    (sharded.parent / "x.safetensors").rename(sharded / "y.safetensors")
    (sharded / SECOND).symlink_to("y.safetensors")  # inside: allowed
    Safetensors(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    assert complaint(lambda: Safetensors(sharded)) == f"{sharded / SECOND}: missing, and the index names it"


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_shard(sharded: Path, left: int) -> None:
    content = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(content[:left])
    text = complaint(lambda: Safetensors(sharded))
    assert text.startswith(f"{sharded / SECOND}: not a whole safetensors file (")
    assert text.endswith("copy it again")


def test_a_key_in_another_shard_than_the_index_says(sharded: Path) -> None:
    edit_index(sharded, lambda where: where.update({EMBEDDING: SECOND}))
    assert complaint(lambda: Safetensors(sharded)) == f"{sharded / INDEX}: {EMBEDDING} is said to be in {SECOND}, and {FIRST} holds it"


def test_a_key_in_no_shard_or_in_two(sharded: Path) -> None:
    edit_index(sharded, lambda where: where.update({"made.up": SECOND}))
    assert complaint(lambda: Safetensors(sharded)) == f"{sharded / INDEX}: made.up is not in {SECOND}, where it is said to be"
    edit_index(sharded, lambda where: where.pop("made.up"))
    save_file({**load_file(sharded / SECOND), EMBEDDING: torch.zeros(61, 32)}, sharded / SECOND)
    assert complaint(lambda: Safetensors(sharded)) == f"{sharded / INDEX}: {EMBEDDING} is said to be in {FIRST}, and {SECOND} holds it"


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": ["b"]}}', b"\xff\xfe"]
)
def test_an_index_that_is_none(sharded: Path, content: str | bytes) -> None:
    (sharded / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert complaint(lambda: Safetensors(sharded)).startswith(f"{sharded / INDEX}: a JSON object with `weight_map` was expected (")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert complaint(lambda: Safetensors(tmp_path)) == f"{tmp_path}: holds neither {INDEX} nor {SINGLE}"
    assert complaint(lambda: read_shape(tmp_path)).startswith(f"{tmp_path / 'config.json'}: cannot be read (No such file or directory)")


def load_tied(source: Path) -> str | None:
    shape = read_shape(source)
    with started(ParallelConfig(tp=4, pp=2), shape) as grid:
        chunks, _ = build(ModelConfig(path="", dtype="float32"), shape, grid)
        try:
            load(chunks, shape, grid, Safetensors(source), str(source))
        except MegamodError as error:
            return str(error)
    return None


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    name = "qwen3-tied"
    tensors = tiny.weights(name, torch.float32)
    equal = write(tmp_path / "equal", tiny.config(name), {**tensors, "lm_head.weight": tensors[EMBEDDING].clone()})
    assert distributed.run(8, load_tied, equal) == [None] * 8
    head = tensors[EMBEDDING].clone()
    head[60, 31] += 1  # a rank reads its rows only: TP rank 3 of both stages finds it
    differs = write(tmp_path / "differs", tiny.config(name), {**tensors, "lm_head.weight": head})
    text = f"{differs}: config.json ties the embeddings, but lm_head.weight differs from them"
    assert distributed.run(8, load_tied, differs) == [None, None, None, text] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "names code to run (`auto_map`); megamod runs none"),
        ({"model_type": "qwen4"}, "model_type 'qwen4' is not supported, did you mean 'qwen3'?"),
        ({"model_type": "bert"}, "model_type 'bert' is not supported, choose from: internlm3, llama, mistral, qwen2, qwen3"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "yrn", "factor": 2.0}}, "rope_type 'yrn' is not supported, did you mean 'yarn'?"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs `factor`"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "'beta_fast' means nothing for rope_type 'linear'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor other than 1 is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported: only False"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: quant_method = 'gptq' is not supported: only"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported: only 'silu'"),
        ({"vocab_size": "61"}, "vocab_size = '61': a positive integer was expected"),
        ({"vocab_size": True}, "vocab_size = True: a positive integer was expected"),
        ({"num_key_value_heads": "4"}, "num_key_value_heads = '4': a positive integer was expected"),
        ({"num_key_value_heads": -2}, "num_key_value_heads = -2: a positive integer was expected"),
        ({"head_dim": 7}, "head_dim = 7: an even number was expected"),
        ({"rms_norm_eps": "a"}, "rms_norm_eps = 'a': a positive number was expected"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': true or false was expected"),
        ({"rope_theta": "x"}, "rope_theta = 'x': a positive number was expected"),
        ({"rope_scaling": [1]}, "rope_parameters = [1]: an object was expected"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor = '2': a positive number was expected"),
        ({"model_type": ["qwen2"]}, "is not supported"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 8 is no multiple of num_key_value_heads = 3"),
    ],
)
def test_a_config_that_megamod_cannot_compute(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**tiny.config("llama2"), **change}))
    text = complaint(lambda: read_shape(tmp_path))
    assert words in text
    assert str(tmp_path) in text


@pytest.mark.parametrize("content", ["{", "[]", b"\xff"])
def test_a_config_that_is_none(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(tmp_path / "config.json") in complaint(lambda: read_shape(tmp_path))


# --- config.json's spellings, and RoPE -------------------------------------------------------------------------------------


def spelled(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tiny config as transformers 4 wrote it and as transformers 5 does."""
    config = tiny.config(name)
    rope = {**(config.pop("rope_scaling", None) or {}), **(config.pop("rope_parameters", None) or {})}
    theta = config.pop("rope_theta", None) or rope.pop("rope_theta")
    rope.pop("rope_theta", None)
    kind = rope.pop("rope_type", "default")
    four = {**config, "rope_theta": theta, "rope_scaling": {"type": kind, **rope} if kind != "default" else None}
    return four, {**config, "rope_parameters": {"rope_type": kind, "rope_theta": theta, **rope}}


def hf_config(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    kind = "llama" if config["model_type"] == "internlm3" else config["model_type"]  # transformers has no internlm3
    return AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_both_spellings_are_one_shape(name: str) -> None:
    four, five = spelled(name)
    expected = tiny.shape(name)
    both = both_spellings(tiny.config(name), "bfloat16")
    assert four != five
    assert shape_of(four) == shape_of(five) == shape_of(both) == shape_of(both_spellings(four, "float32")) == expected
    assert shape_of(both_spellings(both, "float32")) == expected
    for other in ({"rope_parameters", "dtype"}, {"rope_theta", "rope_scaling", "torch_dtype"}):  # each spelling says it all alone
        assert shape_of({k: v for k, v in both.items() if k not in other}) == expected
    if expected.family != "internlm3":  # what save_pretrained would write
        assert shape_of(hf_config(four).to_diff_dict()) == expected


@pytest.mark.parametrize("name", [name for name in tiny.CONFIGS if name != "internlm3"])
def test_transformers_reads_both_spellings(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig

    four, five = spelled(name)
    for i, config in enumerate((four, five, tiny.config(name))):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text(json.dumps(both_spellings(config, "bfloat16")))
        found = AutoConfig.from_pretrained(tmp_path / str(i))
        rope = {k: v for k, v in found.rope_parameters.items() if k != "type"}
        assert rope == five["rope_parameters"]
        assert found.dtype == torch.bfloat16
        assert found.tie_word_embeddings == tiny.shape(name).tied


LLAMA_31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PRETRAINED = {"original_max_position_embeddings": 4096}
ROPES: dict[str, dict[str, Any]] = {name: tiny.config(name) for name in tiny.CONFIGS} | {
    name: {**tiny.config("qwen3"), "max_position_embeddings": 131072, "head_dim": 128, "rope_parameters": {"rope_type": kind, **rope}}
    for name, kind, rope in (
        ("llama-3.1", "llama3", {**LLAMA_31, "rope_theta": 5e5}),
        ("qwen2.5-yarn", "yarn", {"factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}),
        ("mscale", "yarn", {**PRETRAINED, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 24, "beta_slow": 2}),
        ("attention-factor", "yarn", {**PRETRAINED, "factor": 8.0, "attention_factor": 1.3, "truncate": False, "rope_theta": 1.5e5}),
        ("linear", "linear", {"factor": 3.0, "rope_theta": 1e4}),
        ("default", "default", {"rope_theta": 1e7}),
    )
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape, config = shape_of(ROPES[name]), hf_config(ROPES[name])
    reference = ROPE_INIT_FUNCTIONS.get(shape.rope.kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, expected_factor = reference(config)
    found, factor = inverse_frequencies(shape.rope, shape.head_dim)
    assert torch.equal(found, expected), asdict(shape.rope)
    assert factor == expected_factor
