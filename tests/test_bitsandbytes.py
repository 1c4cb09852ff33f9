"""Bases in 4 bits against transformers and bitsandbytes themselves: directories both ways, any rectangle, merging, and what is refused."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import tiny
import torch
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from megamod.model.shape import read_shape, shape_of
from megamod.weights import bitsandbytes as bnb
from megamod.weights.bitsandbytes import BitsAndBytes, FourBits, Quantizing, four_bits, quantization_at
from megamod.weights.fingerprint import of_source
from megamod.weights.load import SINGLE, Random, Safetensors, Scored, Source, Tensors, check_keys, weights_at
from megamod.weights.quantization import Quantization
from megamod.weights.table import hf_shapes
from megamod_kernels.nf4 import Shard, dequantize

pytestmark = pytest.mark.filterwarnings("ignore:.*has been saved.*", "ignore::UserWarning:bitsandbytes.*")

# Odd numbers of rows and columns, of blocks and of absmax values: 77 · 130 numbers are no multiple of 64, 37 · 77 are odd.
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


def theirs(directory: Path, base: Path, q: Quantization) -> Path:
    """What transformers and bitsandbytes make of `base`."""
    skip = ["lm_head", *q.modules_to_not_convert] if q.modules_to_not_convert else None
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

    As one row: with AVX-512 its CPU kernel takes wrong absmax values for matrices of even width that begin a row inside a block.
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
    from megamod.model.shape import Score

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


QUANTISED: dict[str, tuple[Any, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quant_method = 'gptq' is not supported: only 'bitsandbytes' in 4 bits, or plain"),
    "awq": ({"quant_method": "awq"}, "quant_method = 'awq' is not supported: only"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "quant_method = 'compressed-tensors' is not supported: only"),
    "fp8": ({"quant_method": "fp8"}, "quant_method = 'fp8' is not supported: only"),
    "none": ({"bits": 4}, "quant_method = None is not supported: only"),
    "text": ("nf4", "quantization_config = 'nf4': an object was expected"),
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits is not supported: only 4 bits ("),
    "8 bits, as first versions say it": ({"load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes in 8 bits is not supported: only"),
    "storage": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        "bnb_4bit_quant_storage = 'bfloat16' is not supported: only 'uint8'",
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_other_quantisations_are_refused(tmp_path: Path, kind: str) -> None:
    said, line = QUANTISED[kind]
    (tmp_path / "config.json").write_text(json.dumps({**ODD, "quantization_config": said}))
    assert complaint(lambda: read_shape(tmp_path)).startswith(f"{tmp_path}: config.json: {line}")
    assert complaint(lambda: quantization_at(tmp_path)).startswith(f"{tmp_path}: config.json: {line}")
    assert complaint(lambda: weights_at(tmp_path, shape_of(ODD), 0)).startswith(f"{tmp_path}: config.json: {line}")


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
