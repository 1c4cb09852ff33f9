"""Bases in 4 bits against transformers and bitsandbytes themselves: directories both ways, any rectangle, merging, and what is refused."""

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import distributed
import pytest
import tiny
import torch
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_peft import made
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from megamod import checkpoint
from megamod.config import LoraConfig, ParallelConfig, as_json
from megamod.data.bilingual import generate
from megamod.model.shape import Score, read_shape, shape_of
from megamod.moderator import Moderator
from megamod.weights import bitsandbytes as bnb
from megamod.weights import export as export_module
from megamod.weights import peft
from megamod.weights.bitsandbytes import BitsAndBytes, FourBits, Quantizing, four_bits, quantization_at
from megamod.weights.fingerprint import of_source
from megamod.weights.load import INDEX, SINGLE, Random, Safetensors, Scored, Source, Tensors, check_keys, weights_at
from megamod.weights.merge import merge
from megamod.weights.quantization import Quantization, quantization_from_json
from megamod.weights.table import hf_shapes
from megamod_kernels.nf4 import Shard, dequantize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")

# Sizes that nothing divides: down_proj's 77 · 371 numbers fill no last byte, no last block of 64, and no second block of 256 blocks.
ODD = {
    "model_type": "qwen3", "hidden_size": 77, "intermediate_size": 371, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 14, "vocab_size": 61, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
    "rope_theta": 1e6, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
CONFIGS = {"odd": ODD, **{name: {**tiny.config(name), "dtype": "bfloat16"} for name in ("qwen2", "llama-bias-tied")}}
CASES: dict[str, tuple[str, Quantization]] = {
    "nf4": ("odd", Quantization()),
    "fp4": ("odd", Quantization("fp4")),
    "single": ("odd", Quantization(use_double_quant=False)),
    "kept": ("qwen2", Quantization(modules_to_not_convert=("q_proj", "model.layers.1", "2.mlp.down_proj"))),
    "tied": ("llama-bias-tied", Quantization("fp4", False)),
}
DOWN = "model.layers.1.mlp.down_proj.weight"  # [77, 371]


def plain(directory: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Model `name` of CONFIGS, not quantised; a block of zeros is in it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[name]))
    source = Random(shape_of(CONFIGS[name]), seed=3, std=0.3)
    tensors = {key: source.read(key, [0] * len(size), size).to(dtype) for key, size in source.shapes().items()}
    tensors["model.layers.0.self_attn.v_proj.weight"].view(-1)[64:200] = 0
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    return directory


def theirs(directory: Path, base: Path, q: Quantization, head: bool = False) -> Path:
    """What transformers and bitsandbytes make of `base`; with `head`, of its head too."""
    skip = [*q.modules_to_not_convert, *([] if head else ["lm_head"])] if q.modules_to_not_convert else None
    said = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=q.quant_type, bnb_4bit_use_double_quant=q.use_double_quant,
        bnb_4bit_compute_dtype="bfloat16", llm_int8_skip_modules=skip,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of bitsandbytes' mean depends on them
    try:
        AutoModelForCausalLM.from_pretrained(base, quantization_config=said, dtype="auto").save_pretrained(directory)
    finally:
        torch.set_num_threads(threads)
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case `<model>`, the plain directory, and `<case>`, the one of transformers."""
    root = tmp_path_factory.mktemp("bitsandbytes")
    for case, (name, quantization) in CASES.items():
        theirs(root / case, root / name if (root / name).exists() else plain(root / name, name), quantization)
    return root


def oracle(directory: Path) -> dict[str, Tensor]:
    """Each weight as bitsandbytes dequantises it, in fp32; others as they are stored.

    As one row: with AVX-512 its CPU kernel takes wrong absmax values where the width is a multiple of 16, and not of the block size.
    """
    tensors = load_file(directory / SINGLE)
    result = {}
    for name in [name for name in tensors if name.endswith((".weight", ".bias"))]:
        side = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        result[name] = tensors[name]
        if side:
            state = bitsandbytes.functional.QuantState.from_dict(side, torch.device("cpu"))
            shape, state.dtype, state.shape = state.shape, torch.float32, torch.Size([1, state.shape.numel()])
            result[name] = bitsandbytes.functional.dequantize_4bit(tensors[name], state).view(shape)
    return result


def whole(source: Source) -> dict[str, Tensor]:
    return {name: source.read(name, [0] * len(size), size) for name, size in source.shapes().items()}


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names, dtypes, shapes and bits that are not the same."""
    keys = [f"{key} is in one only" for key in sorted(found.keys() ^ expected.keys())]
    both = sorted(found.keys() & expected.keys())
    return keys + [k for k in both if found[k].dtype != expected[k].dtype or not torch.equal(found[k], expected[k])]


# --- reading ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_reading_what_transformers_wrote(root: Path, case: str) -> None:
    name, asked = CASES[case]
    shape, source = read_shape(root / case), weights_at(root / case, read_shape(root / case), 0)
    assert shape == shape_of(CONFIGS[name])
    assert isinstance(source, BitsAndBytes)
    check_keys(source, shape, case)
    assert differences(whole(source), oracle(root / case)) == []
    assert {source.dtype(name) for name in source.shapes()} == {torch.bfloat16}

    linears = {name.removesuffix(".weight") for name, size in source.shapes().items() if bnb.is_linear(name, size)}
    assert {m for m in linears if source.quantization.converts(m)} == {m for m in linears if asked.converts(m)}
    assert replace(source.quantization, modules_to_not_convert=()) == replace(asked, modules_to_not_convert=())
    assert quantization_at(root / case) == source.quantization
    for module in linears:
        size = source.shapes()[f"{module}.weight"]
        assert (source.shard(f"{module}.weight", (0, 0), size) is not None) == asked.converts(module)
    assert source.shard("lm_head.weight" if not shape.tied else "model.embed_tokens.weight", (0, 0), (2, 2)) is None
    assert quantization_at(root / name) is None


@pytest.mark.parametrize("case", CASES)
def test_quantised_when_read(root: Path, case: str) -> None:
    name, asked = CASES[case]
    made, there = Quantizing(Safetensors(root / name), asked), BitsAndBytes(root / case)
    assert made.shapes() == there.shapes() == hf_shapes(read_shape(root / name))
    assert differences(whole(made), whole(there)) == []
    assert {name: made.dtype(name) for name in made.shapes()} == {name: there.dtype(name) for name in there.shapes()}
    assert of_source(made, read_shape(root / name)) == of_source(there, read_shape(root / case))
    assert of_source(made, read_shape(root / name)) != of_source(Safetensors(root / name), read_shape(root / name))
    for key, size in made.shapes().items():
        if bnb.is_linear(key, size):
            assert same(made.shard(key, (0, 0), size), there.shard(key, (0, 0), size)), key


def same(a: Shard | None, b: Shard | None) -> bool:
    """Every byte of two shards."""
    if a is None or b is None:
        return a is b
    pairs = ((a.data, b.data), (a.absmax, b.absmax), (a.nested, b.nested), (a.offset, b.offset))
    equal = all((x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)
    return equal and (a.lines, a.blocksize, a.quant_type) == (b.lines, b.blocksize, b.quant_type)


@st.composite
def boxes(draw: st.DrawFn, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    row, column = draw(st.integers(0, rows - 1)), draw(st.sampled_from([0, *range(columns)]))
    height = draw(st.integers(1, rows - row))
    width = draw(st.sampled_from([columns - column, *range(1, columns - column + 1)]))
    return (row, column), (height, width)


@settings(max_examples=40, deadline=None)
@given(box=boxes(77, 371), case=st.sampled_from(["nf4", "fp4", "single"]), at_a_time=st.sampled_from([2, 700, 1000, bnb.AT_A_TIME]))
def test_any_rectangle(root: Path, box: tuple[tuple[int, int], tuple[int, int]], case: str, at_a_time: int) -> None:
    (row, column), (height, width) = box
    there = BitsAndBytes(root / case)
    expected = there.read(DOWN, (0, 0), (77, 371))[row : row + height, column : column + width]
    with mock.patch.object(bnb, "AT_A_TIME", at_a_time):
        sources: list[FourBits] = [there, Quantizing(Safetensors(root / "odd"), CASES[case][1])]
        for source in sources:
            assert torch.equal(source.read(DOWN, *box), expected)
            shard = source.shard(DOWN, *box)
            assert shard is not None
            assert len(shard.data) == -(-height * width // 2)
            assert torch.equal(dequantize(shard, torch.empty(height, width)), expected)
            assert same(shard, sources[0].shard(DOWN, *box))


def test_only_what_is_needed_is_read(root: Path) -> None:
    """A row cut reads its bytes and no more, a column cut a few rows at a time."""
    source = BitsAndBytes(root / "nf4")
    source.stored(DOWN)
    read: list[int] = []
    original = Safetensors.read

    def spied(self: Safetensors, name: str, offset: Any, size: Any) -> Tensor:
        read.append(size[0])
        return original(self, name, offset, size)

    with mock.patch.object(Safetensors, "read", spied), mock.patch.object(bnb, "AT_A_TIME", 2 * 371):
        source.shard(DOWN, (10, 0), (6, 371))
        assert read == [3 * 371]
        read.clear()
        source.shard(DOWN, (0, 100), (77, 3))
        assert len(read) == 39
        assert max(read) <= 371


def test_beneath_a_new_head_of_scores(root: Path) -> None:
    shape = read_shape(root / "nf4").scored(Score(("safe", "unsafe"), "single_label_classification"))
    source = weights_at(root / "nf4", shape, 1)
    assert isinstance(source, Scored)
    check_keys(source, shape, "scored")
    beneath = four_bits(source)
    assert isinstance(beneath, BitsAndBytes)
    assert four_bits(beneath) is beneath
    assert four_bits(weights_at(root / "odd", read_shape(root / "odd"), 0)) is None
    assert (source.dtype("score.weight"), source.dtype(DOWN)) == (torch.float32, torch.bfloat16)


def test_what_cannot_be_quantised() -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.randn(6, 64), "lm_head.weight": torch.randn(4, 6)}
    assert complaint(lambda: Quantizing(Tensors(tensors), Quantization(blocksize=48))) == (
        "quantization.blocksize = 48: one of 32, 64, 128, 256, 512, 1024, 2048, 4096 was expected"
    )
    text = complaint(lambda: Quantizing(Tensors(tensors), Quantization(modules_to_not_convert=("up_prj",))))
    assert text == "modules_to_not_convert: 'up_prj' names no linear of this model, did you mean 'up_proj'?"
    text = complaint(lambda: Quantizing(Tensors(tensors), Quantization(modules_to_not_convert=("up_proj",))))
    assert text == "modules_to_not_convert: no linear is left to quantise"
    Quantizing(Tensors(tensors), Quantization(modules_to_not_convert=("lm_head",)))  # a word of transformers' that changes nothing
    for bad in (math.nan, -math.inf):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = bad
        source = Quantizing(Tensors(tensors), Quantization())
        text = complaint(lambda: source.read("model.layers.0.mlp.up_proj.weight", (0, 0), (1, 1)))  # noqa: B023
        assert text == "model.layers.0.mlp.up_proj.weight: holds NaN or an infinite number, and cannot be in 4 bits"


# --- damage ----------------------------------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Tensor]], object]
STATE = f"{DOWN}.quant_state.bitsandbytes__nf4"


def stating(**changes: Any) -> Edit:
    """Entries of one matrix's JSON; None: taken out."""

    def edit(tensors: dict[str, Tensor]) -> None:
        said = {**json.loads(bytes(tensors[STATE].tolist())), **changes}
        text = json.dumps({key: value for key, value in said.items() if value is not None})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return edit


def with_(key: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.update({f"{DOWN}.{key}".removesuffix("."): change(tensors[f"{DOWN}.{key}".removesuffix(".")])})


def put(place: int, value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_fill(0, torch.tensor([place]), value)


DAMAGE: dict[str, tuple[Edit, str]] = {
    "no absmax": (lambda t: t.pop(f"{DOWN}.absmax"), f"{DOWN}.absmax: missing, and its matrix is in 4 bits"),
    "short absmax": (with_("absmax", lambda t: t[:-1]), f"{DOWN}.absmax: is [446] uint8: [447] uint8 was expected"),
    "absmax in fp32": (with_("absmax", Tensor.float), f"{DOWN}.absmax: is [447] float32: [447] uint8 was expected"),
    "no nested absmax": (lambda t: t.pop(f"{DOWN}.nested_absmax"), f"{DOWN}.nested_absmax: missing, and its matrix is in 4 bits"),
    "long nested absmax": (
        with_("nested_absmax", lambda t: t.repeat(2)), f"{DOWN}.nested_absmax: is [4] float32: [2] float32 was expected",
    ),
    "short data": (with_("", lambda t: t[1:].contiguous()), f"{DOWN}: is [14283, 1] uint8: [14284, 1] uint8 was expected"),
    "flat data": (with_("", Tensor.flatten), f"{DOWN}: is [14284] uint8: [14284, 1] uint8 was expected"),
    "data in fp32": (with_("", Tensor.float), f"{DOWN}: is [14284, 1] float32: [14284, 1] uint8 was expected"),
    "no state": (lambda t: t.pop(STATE), f"{DOWN}.quant_state.bitsandbytes__…: none there: one was expected"),
    "two states": (
        lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE].clone()}),
        f"{DOWN}.quant_state.bitsandbytes__…: 2 there: one was expected",
    ),
    "no side tensor": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith(f"{DOWN}.")],
        f"{DOWN}.quant_state.bitsandbytes__…: missing, and the tensor is in uint8",
    ),
    "no JSON": (lambda t: t.update({STATE: t[STATE][:-1].clone()}), f"{STATE}: not JSON (Expecting ',' delimiter"),
    "a list": (lambda t: t.update({STATE: torch.tensor([91, 93], dtype=torch.uint8)}), f"{STATE}: a JSON object was expected, not list"),
    "block size": (stating(blocksize=48), f"{STATE}: blocksize = 48: one of 32, 64, 128, 256, 512, 1024, 2048, 4096 was expected"),
    "another block size": (stating(blocksize=128), f"{DOWN}.absmax: is [447] uint8: [224] uint8 was expected"),
    "type": (stating(quant_type="fp4"), f"{STATE}: quant_type = 'fp4': one of nf4 was expected"),
    "unknown type": (
        lambda t: t.update({f"{DOWN}.quant_state.bitsandbytes__int4": t.pop(STATE)}),
        f"{DOWN}.quant_state.bitsandbytes__int4: bitsandbytes' types are nf4 and fp4",
    ),
    "dtype": (stating(dtype="int8"), f"{STATE}: dtype = 'int8': one of bfloat16, float16, float32 was expected"),
    "shape": (stating(shape=[371, 77]), f"{STATE}: shape = [371, 77]: config.json needs [77, 371]"),
    "no shape": (stating(shape=None), f"{STATE}: shape = None: two positive integers were expected"),
    "offset": (stating(nested_offset=math.nan), f"{STATE}: nested_offset = nan: a finite number was expected"),
    "nested block size": (stating(nested_blocksize=128), f"{STATE}: nested_blocksize = 128: one of 256 was expected"),
    "no offset": (stating(nested_offset=None), f"{DOWN}.absmax: is [447] uint8: [447] float32 was expected"),
    "codes": (
        with_("quant_map", lambda t: t * 1.001), f"{DOWN}.quant_map: other numbers than the 16 that bitsandbytes has for nf4",
    ),
    "dynamic numbers": (
        with_("nested_quant_map", lambda t: t.flip(0)),
        f"{DOWN}.nested_quant_map: other numbers than the 256 that bitsandbytes has for nf4",
    ),
}  # fmt: skip


def damaged(root: Path, edit: Edit, out: Path, case: str = "nf4") -> Path:
    """The directory of `case` with its tensors edited."""
    tensors = load_file(root / case / SINGLE)
    edit(tensors)
    out.mkdir()
    (out / "config.json").write_text((root / case / "config.json").read_text())
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / SINGLE, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_line(root: Path, tmp_path: Path, kind: str) -> None:
    edit, line = DAMAGE[kind]
    out = damaged(root, edit, tmp_path / "damaged")
    assert complaint(lambda: BitsAndBytes(out)).startswith(f"{out}: {line}")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_damaged_numbers_are_found_when_they_are_read(root: Path, tmp_path: Path, bad: float) -> None:
    for case, key in (("nf4", "nested_absmax"), ("single", "absmax")):
        source = BitsAndBytes(damaged(root, with_(key, put(1, bad)), tmp_path / case, case))
        text = complaint(lambda: source.shard(DOWN, (0, 0), (1, 1)))  # noqa: B023
        assert text == f"{tmp_path / case}: {DOWN}.{key}: holds NaN, an infinite or a negative number: damaged; copy the file again"


def test_matrices_quantised_differently(root: Path, tmp_path: Path) -> None:
    other = load_file(theirs(tmp_path / "fp4-single", root / "odd", Quantization("fp4", False)) / SINGLE)

    def mixed(tensors: dict[str, Tensor], of: Mapping[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(DOWN)]:
            del tensors[key]
        tensors.update({key: tensor for key, tensor in of.items() if key.startswith(DOWN)})

    for i, (of, line) in enumerate(
        (
            (other, "quant_type = fp4, and model.layers.0.mlp.down_proj.weight has nf4"),
            (load_file(root / "single" / SINGLE), "double quantisation = False, and model.layers.0.mlp.down_proj.weight has True"),
        )
    ):
        out = damaged(root, lambda t: mixed(t, of), tmp_path / str(i))  # noqa: B023
        assert complaint(lambda: BitsAndBytes(out)) == f"{out}: {DOWN}: {line}: one for all matrices was expected"  # noqa: B023


EIGHT = "only 4 bits are supported: load_in_4bit = true and load_in_8bit = false were expected"
QUANTISED: dict[str | None, tuple[Any, str]] = {
    **{
        method: ({"quant_method": method}, f"quant_method = {method!r} is not supported: only 'bitsandbytes', in 4 bits")
        for method in ("gptq", "awq", "compressed-tensors", "fp8", None)
    },
    "text": ("nf4", "an object was expected, not 'nf4'"),
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, EIGHT),
    "8 bits, as first versions say it": ({"load_in_8bit": True, "load_in_4bit": False}, EIGHT),
    "no bits": ({"quant_method": "bitsandbytes"}, EIGHT),
    "storage": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        "bnb_4bit_quant_storage = 'bfloat16' is not supported: only 'uint8'",
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_other_quantisations_are_refused(tmp_path: Path, kind: str | None) -> None:
    said, line = QUANTISED[kind]
    whole_line = f"{tmp_path}: config.json: quantization_config: {line}"
    (tmp_path / "config.json").write_text(json.dumps({**ODD, "quantization_config": said}))
    assert complaint(lambda: read_shape(tmp_path)) == whole_line
    assert complaint(lambda: quantization_at(tmp_path)) == whole_line
    assert complaint(lambda: weights_at(tmp_path, shape_of(ODD), 0)) == whole_line


def test_a_config_json_that_says_something_else(root: Path, tmp_path: Path) -> None:
    out = damaged(root, lambda t: None, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    for entry, value, line in (
        ("bnb_4bit_quant_type", "fp4", "bnb_4bit_quant_type = 'fp4', and the tensors have 'nf4'"),
        ("bnb_4bit_use_double_quant", False, "bnb_4bit_use_double_quant = False, and the tensors have True"),
    ):
        said = {**config, "quantization_config": {**config["quantization_config"], entry: value}}
        (out / "config.json").write_text(json.dumps(said))
        assert complaint(lambda: BitsAndBytes(out)) == f"{out}: config.json: {line}"
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))  # as first versions say it
    assert quantization_at(out) == Quantization()
    save_file(load_file(root / "odd" / SINGLE), out / SINGLE)
    assert complaint(lambda: BitsAndBytes(out)).startswith(
        f"{out}: config.json says bitsandbytes, and no tensor has the quant_state of 4 bits"
    )


# --- writing ---------------------------------------------------------------------------------------------------------------


def module(name: str) -> Any:
    """A tool."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", Path(__file__).parents[1] / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every file, without megamod."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(directory: Path) -> Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    # In training, since bitsandbytes' own kernel for inference on a CPU takes no odd sizes. Nothing is dropped out.
    result: Tensor = model.train()(torch.arange(20)[None] * 7 % 61).logits
    return result


@pytest.mark.parametrize("case", CASES)
def test_written_as_transformers_writes_it(root: Path, tmp_path: Path, case: str) -> None:
    name, asked = CASES[case]
    bnb.quantize(root / name, tmp_path / "ours", asked, shard_bytes=8_000)
    assert differences(read(tmp_path / "ours"), read(root / case)) == []
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "ours" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read(root / case).values())
    ours, their = (json.loads((d / "config.json").read_text())["quantization_config"] for d in (tmp_path / "ours", root / case))
    assert ours.pop("llm_int8_skip_modules")[0] == "lm_head"
    del their["llm_int8_skip_modules"]
    assert {**ours, "_load_in_4bit": True, "_load_in_8bit": False} == their
    assert torch.equal(logits(tmp_path / "ours"), logits(root / case))
    assert quantization_at(tmp_path / "ours") == quantization_at(root / case)


@pytest.mark.parametrize("blocksize", [32, 256, 4096])
def test_other_block_sizes(root: Path, tmp_path: Path, blocksize: int) -> None:
    """Which transformers cannot ask for, and reads."""
    q = Quantization(blocksize=blocksize)
    bnb.quantize(root / "odd", tmp_path / "ours", q, shard_bytes=10**9)
    (file,) = (tmp_path / "ours").glob("*.safetensors")
    file.rename(tmp_path / "ours" / SINGLE)
    (tmp_path / "ours" / INDEX).unlink()
    assert quantization_at(tmp_path / "ours") == q
    expected = oracle(tmp_path / "ours")
    assert differences(whole(BitsAndBytes(tmp_path / "ours")), expected) == []
    w = load_file(root / "odd" / SINGLE)[DOWN].clone()
    data, state = bitsandbytes.functional.quantize_4bit(w, blocksize=blocksize, compress_statistics=True, quant_type="nf4")
    theirs = {DOWN: data, **{f"{DOWN}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}}
    ours = {key: tensor for key, tensor in load_file(tmp_path / "ours" / SINGLE).items() if key.startswith(DOWN)}
    assert differences(ours, theirs) == []
    logits(tmp_path / "ours")


def test_a_head_of_scores_stays(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = {**tiny.config("qwen2-classes"), "dtype": "float16"}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    save_file(tiny.weights("qwen2-classes", torch.float16), tmp_path / "base" / SINGLE, metadata={"format": "pt"})
    bnb.quantize(tmp_path / "base", tmp_path / "ours", Quantization())
    said = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert (said["llm_int8_skip_modules"], said["bnb_4bit_compute_dtype"]) == (["score"], "float16")
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert torch.equal(model.score.weight, tiny.weights("qwen2-classes", torch.float16)["score.weight"])
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_the_tool(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, out = module("quantize").main, tmp_path / "out"
    words = ["--quant-type", "fp4", "--no-double-quant", "--blocksize", "128", "--keep", "q_proj,model.layers.1"]
    assert main([str(root / "qwen2"), str(out), *words]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: fp4, blocks of 128 · ")
    source = BitsAndBytes(out)
    assert str(source.quantization) == "fp4, blocks of 128"
    assert {name for name in source.quantization.modules_to_not_convert if "layers.1." not in name} == {
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 2, 3)
    }
    plain(tmp_path / "double", "qwen2", torch.float64)
    before = sorted(tmp_path.rglob("*"))
    for model, target, line in (
        (out, tmp_path / "new", f"{out}: is in 4 bits already: plain weights were expected"),
        (root / "qwen2", out, f"{out}: exists and is not an empty directory; export to a new one, or remove it"),
        (
            tmp_path / "double",
            tmp_path / "new",
            f"{tmp_path / 'double'}: model.layers.0.self_attn.q_proj.weight is in float64: bitsandbytes",
        ),
    ):
        assert main([str(model), str(target)]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"megamod: error: {line}")
    assert main([str(root / "qwen2"), str(tmp_path / "new"), "--keep", "q_prj"]) == 1
    assert "modules_to_not_convert: 'q_prj' names no linear of this model, did you mean 'q_proj'?" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_half_written(root: Path, tmp_path: Path) -> None:
    """A disk that fills up in the second file; NaN in the last tensor."""
    files = []

    def full(tensors: Any, file: Path, **kwargs: Any) -> None:
        files.append(file)
        if len(files) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, file, **kwargs)

    with mock.patch.object(export_module, "save_file", full):
        text = complaint(lambda: bnb.quantize(root / "odd", tmp_path / "out", Quantization(), shard_bytes=30_000))
    assert text == f"{tmp_path / 'out'}: cannot be written ([Errno 28] No space left on device)"
    tensors = load_file(root / "odd" / SINGLE)
    tensors[DOWN][76, 370] = math.nan
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(json.dumps(ODD))
    save_file(tensors, tmp_path / "bad" / SINGLE)
    text = complaint(lambda: bnb.quantize(tmp_path / "bad", tmp_path / "out", Quantization()))
    assert text == f"{DOWN}: holds NaN or an infinite number, and cannot be in 4 bits"
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


# --- adapters --------------------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=3, lora_alpha=7.0, target_modules=("q_proj", "down_proj"))


def adapter_of(directory: Path, base: Path, q: Quantization | None, mark: str | None, cfg: LoraConfig = LORA) -> Path:
    """A PEFT directory as if it was trained beside `base`."""
    return peft.write(
        directory, made(cfg, read_shape(base), torch.float32), cfg, read_shape(base), base=str(base), fingerprint=mark, quantization=q
    )


@pytest.mark.parametrize("case", CASES)
def test_merged_is_the_4_bits_and_the_adapter_rounded_once(root: Path, tmp_path: Path, case: str) -> None:
    """From bitsandbytes' directory, from ours, and from the plain one with what the adapter says."""
    name, q = CASES[case]
    shape = read_shape(root / name)
    mark = of_source(BitsAndBytes(root / case), shape)
    adapter = adapter_of(tmp_path / "adapter", root / name, q, mark)
    tensors = load_file(adapter / peft.TENSORS)
    expected = oracle(root / case)
    for module, slot in peft.slots(LORA, shape).items():
        w = expected[f"{module}.weight"].float()
        expected[f"{module}.weight"] = torch.addmm(w, tensors[slot.b], tensors[slot.a], alpha=slot.scale)
    expected = {key: tensor.bfloat16() for key, tensor in expected.items()}

    bnb.quantize(root / name, tmp_path / "ours", q)
    for i, base in enumerate((root / case, tmp_path / "ours", root / name)):
        out = merge(base, adapter, tmp_path / f"merged{i}")
        assert differences(read(out), expected) == []
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert isinstance(weights_at(out, shape, 0), Safetensors)
    logits(out)
    nameless = adapter_of(tmp_path / "nameless", root / name, None, None)  # as PEFT writes it
    assert differences(read(merge(root / name, nameless, tmp_path / "asked", quantization=q)), expected) == []
    other = Quantization("fp4" if q.quant_type == "nf4" else "nf4")
    text = complaint(lambda: merge(root / name, adapter, tmp_path / "never", quantization=other))
    assert text == f"{adapter}: an adapter of a base in {q}, and {other} was asked for"


def test_an_adapter_of_another_base(root: Path, tmp_path: Path) -> None:
    q = Quantization()
    shape = read_shape(root / "odd")
    mark, plainly = of_source(BitsAndBytes(root / "nf4"), shape), of_source(Safetensors(root / "odd"), shape)
    adapter = adapter_of(tmp_path / "adapter", root / "odd", q, mark)
    text = complaint(lambda: merge(root / "fp4", adapter, tmp_path / "out"))
    assert text == f"{adapter}: an adapter of a base in {q}, and this base is in fp4, double quantisation, blocks of 64"
    bnb.quantize(root / "odd", tmp_path / "kept", Quantization(modules_to_not_convert=("v_proj",)))
    text = complaint(lambda: merge(tmp_path / "kept", adapter, tmp_path / "out"))
    both = "model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj"
    assert text == f"{adapter}: an adapter of a base in {q}, and this base is in {q}: {both} in one only"

    wrong = adapter_of(tmp_path / "wrong", root / "odd", q, "0" * 16)
    text = complaint(lambda: merge(root / "odd", wrong, tmp_path / "out"))
    assert text == f"{wrong}: an adapter of another base: its weights, in {q}, had the fingerprint {'0' * 16}, these have {mark}"
    unaware = adapter_of(tmp_path / "unaware", root / "odd", None, plainly)
    text = complaint(lambda: merge(root / "nf4", unaware, tmp_path / "out"))
    assert text == f"{unaware}: an adapter of another base: its weights had the fingerprint {plainly}, these have {mark}"
    assert not (tmp_path / "out").exists()


def test_in_and_out_through_the_tool(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT's own adapter on bitsandbytes' base → a checkpoint → PEFT: what the base was quantised to goes along."""
    import peft as hf_peft

    model = AutoModelForCausalLM.from_pretrained(root / "kept", dtype="auto")
    theirs = hf_peft.get_peft_model(model, hf_peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    main, base = module("adapter").main, str(root / "kept")
    assert main(["import", str(tmp_path / "theirs"), "--base", base, str(tmp_path / "ours")]) == 0
    about = checkpoint.read_about(tmp_path / "ours" / "step-00000000")[1]
    source = BitsAndBytes(root / "kept")
    assert about["quantization"] == as_json(source.quantization)
    assert about["base"] == of_source(source, read_shape(root / "kept"))
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    opened = peft.opened(tmp_path / "again", read_shape(root / "kept"))
    assert (opened.quantization, opened.base) == (source.quantization, about["base"])
    assert main(["import", str(tmp_path / "again"), "--base", str(root / "qwen2"), str(tmp_path / "once more")]) == 0
    again = checkpoint.read_about(tmp_path / "once more" / "step-00000000")[1]
    assert (again["quantization"], again["base"]) == (about["quantization"], about["base"])

    merged = []
    for i, words in enumerate(([str(tmp_path / "ours")], [str(tmp_path / "again"), "--base", str(root / "qwen2")])):
        assert main(["merge", words[0], str(tmp_path / f"merged{i}"), *words[1:]]) == 0
        merged.append(read(tmp_path / f"merged{i}"))
    assert differences(*merged) == []
    assert main(["merge", str(tmp_path / "ours"), str(tmp_path / "never"), "--base", str(root / "tied")]) == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("{", "'{' is no quantisation (Expecting property name"),
        ('{"quant_type": "nf4"}', " is no quantisation ('use_double_quant')"),
        (as_json(Quantization(blocksize=48)), "blocksize = 48: one of 32, 64"),
        ({**as_json(Quantization()), "use_double_quant": 1}, " is no quantisation (a list of names, and true or false, were expected)"),
        ({**as_json(Quantization()), "quant_type": []}, " is no quantisation (unhashable type"),
        (3, "3 is no quantisation ("),
    ],
)
def test_what_an_adapter_may_say(said: Any, line: str) -> None:
    assert line in complaint(lambda: quantization_from_json(said, "here"))
    assert complaint(lambda: quantization_from_json(said, "here")).startswith("here: ")


def test_what_an_adapter_says_comes_back() -> None:
    q = Quantization("fp4", False, 128, ("q_proj",))
    for said in (as_json(q), json.dumps(as_json(q))):
        assert quantization_from_json(said, "here") == q
    assert quantization_from_json(None, "here") is None
    assert quantization_from_json("null", "here") is None


def test_a_head_in_4_bits_is_read(root: Path, tmp_path: Path) -> None:
    """As those that leave llm_int8_skip_modules to themselves write it."""
    theirs(tmp_path / "all", root / "odd", Quantization(modules_to_not_convert=("k_proj",)), head=True)
    source = BitsAndBytes(tmp_path / "all")
    check_keys(source, read_shape(tmp_path / "all"), "all")
    assert source.shard("lm_head.weight", (0, 0), (61, 77)) is not None
    assert differences(whole(source), oracle(tmp_path / "all")) == []
    assert source.quantization.modules_to_not_convert == tuple(f"model.layers.{i}.self_attn.k_proj" for i in (0, 1))


def judged(folder: Path) -> list[dict[str, float]]:
    """By the 4 bits and an adapter, by the plain base that the adapter says was quantised, and by the merged model."""
    found = []
    for base, adapters in (("four", {"a": folder / "adapter"}), ("plain", {"a": folder / "adapter"}), ("merged", None)):
        with Moderator(folder / base, ParallelConfig(tp=2), adapters=adapters, dtype="float32", row_length=256) as moderator:
            (one,) = moderator.judge(["I will hurt you."])
            found.append(dict(one.scores))
    return found


def test_a_moderator_reads_them(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in generate(20, 1, seed=3)[0]))
    module("make_checkpoint").make(tmp_path / "plain", tmp_path / "rows.jsonl", vocab=400, layers=2, hidden=32, heads=4, seed=1)
    q, shape = Quantization("fp4"), read_shape(tmp_path / "plain")
    bnb.quantize(tmp_path / "plain", tmp_path / "four", q)
    adapter = adapter_of(tmp_path / "adapter", tmp_path / "plain", q, of_source(BitsAndBytes(tmp_path / "four"), shape))
    merge(tmp_path / "four", adapter, tmp_path / "merged")
    four, plainly, merged = distributed.run(2, judged, tmp_path)[0]
    assert four == plainly
    assert merged == pytest.approx(four, rel=1e-4)
