"""Runs on a base in 4 bits as a user starts them: from plain weights and from bitsandbytes' own, resumed on another grid, exported,
merged, refused; and the memory that loading takes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import distributed
import lora_parity as lora
import pytest
import torch
from safetensors.torch import load_file, save_file

from megamod import config
from megamod.errors import MegamodError
from megamod.model.shape import Shape, read_shape, shape_of
from megamod.train import model_shape
from megamod.weights import bitsandbytes, checksums, merge
from megamod.weights.load import SINGLE, Random
from megamod.weights.quantization import Quantization
from megamod.weights.table import hf_shapes

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "models" / "tiny-qwen3"
SAME = ["steps=4", "model.dtype=float64", "optim.schedule=constant", "log.every=1", "log.tensorboard=false", "data.rows_per_step=4"]
IN_4_BITS = ["lora.r=3", "model.quantization.quant_type=nf4", "model.init=load"]


def directory(path: Path, about: dict[str, object], std: float = 0.05) -> Path:
    """A Hugging Face directory of random weights in bfloat16."""
    drawn = Random(shape_of(about), 3, std)
    path.mkdir()
    save_file({name: drawn.read(name, [0] * len(size), size).bfloat16() for name, size in drawn.shapes().items()}, path / SINGLE)
    (path / "config.json").write_text(json.dumps({**about, "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tmp_path_factory.mktemp("qlora") / "base", json.loads((TINY / "config.json").read_text()))


def test_runs(base: Path, tmp_path: Path) -> None:
    """The same losses from plain weights and from bitsandbytes' own, on tp 2 and gone on with on pp 2; what is exported, merged."""
    stored = bitsandbytes.quantize(base, tmp_path / "stored", Quantization())
    whole, stopped, other = (str(tmp_path / name) for name in ("whole", "stopped", "other"))
    plain = [*SAME, *IN_4_BITS, f"model.path={base}"]
    own = [*SAME, "lora.r=3", "model.init=load", f"model.path={stored}"]
    runs = [
        (whole, [*plain, "parallel.tp=2"]),
        (stopped, [*plain, "parallel.tp=2", "steps=2"]),
        (stopped, [*plain, "parallel.pp=2"]),
        (other, [*own, "parallel.tp=2", "parallel.sp=true"]),
        (str(tmp_path / "next"), [*plain, f"lora.path={whole}/checkpoints", "steps=1"]),
    ]
    runs[-1][1].remove("lora.r=3")
    (losses, export), (first, _), (second, _), (again, _), (after, _) = distributed.run(2, lora.trained_by_runs, runs)[0]
    assert first == {step: losses[step] for step in (1, 2)}
    assert second == pytest.approx(losses, rel=1e-9)
    assert again == pytest.approx(losses, rel=1e-9)
    assert after[1] < losses[1]
    record = json.loads(Path(whole, "run.json").read_text())
    assert record["base"]["before"] == record["base"]["after"]
    assert record["identity"]["quantization"] == {
        "quant_type": "nf4", "use_double_quant": True, "blocksize": 64, "modules_to_not_convert": [],
    }  # fmt: skip
    # One base in two forms gives one merged model; it is the sum that was trained, in the base's dtype.
    merged = [merge.merge(origin, export, tmp_path / f"merged-{origin.name}") for origin in (base, stored)]
    ours, theirs = ({name: x for file in sorted(path.glob("*.safetensors")) for name, x in load_file(file).items()} for path in merged)
    assert ours.keys() == theirs.keys() == hf_shapes(read_shape(base)).keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all("quantization_config" not in json.loads((path / "config.json").read_text()) for path in merged)
    assert {x.dtype for x in ours.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        (
            ["model.quantization.quant_type=nf4"],
            "model.quantization: weights in 4 bits are frozen, and nothing would be trained: set lora.r",
        ),
        (["lora.r=3", "model.quantization.quant_type=nf5"], "model.quantization.quant_type=nf5: one of 'nf4', 'fp4' was expected"),
        (["lora.r=3", "model.quantization.blocksize=48"], "model.quantization: blocksize = 48: one of 32, 64, 128"),
        (["lora.r=3", "model.quantization.bloksize=64"], "has no field 'bloksize', did you mean 'blocksize'?"),
    ],
)
def test_what_a_config_refuses(overrides: list[str], wrong: str) -> None:
    with pytest.raises(MegamodError, match=re.escape(wrong)):
        config.load(ROOT / "configs" / "tiny.py", overrides)


def test_a_base_that_is_stored_in_4_bits_is_frozen_and_keeps_its_kind(base: Path, tmp_path: Path) -> None:
    stored = bitsandbytes.quantize(base, tmp_path / "stored", Quantization(blocksize=128))
    given = [f"model.path={stored}", "model.init=load"]
    with pytest.raises(MegamodError, match=r"is in 4 bits, which are frozen, and nothing would be trained: set lora.r"):
        model_shape(config.load(ROOT / "configs" / "tiny.py", given))
    with pytest.raises(MegamodError, match=r"model.quantization is fp4, double quantisation, blocks of 64, and the checkpoint is in nf4"):
        model_shape(config.load(ROOT / "configs" / "tiny.py", [*given, "lora.r=3", "model.quantization.quant_type=fp4"]))
    assert model_shape(config.load(ROOT / "configs" / "tiny.py", [*given, "lora.r=3"])).quantization == Quantization(blocksize=128)


def test_an_adapter_of_the_plain_base_is_refused_on_it_in_4_bits(base: Path, tmp_path: Path) -> None:
    """And said once, with status 1, where two ranks meet it."""
    plain, next_ = str(tmp_path / "plain"), str(tmp_path / "next")
    done = launched(*SAME, "lora.r=3", "model.init=load", f"model.path={base}", f"dir={plain}", "steps=1")
    assert done.returncode == 0, done.stderr
    done = launched(*SAME, *IN_4_BITS[1:], f"model.path={base}", f"lora.path={plain}/checkpoints", f"dir={next_}", "parallel.tp=2")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("megamod: error:")]
    assert len(lines) == 1
    assert "an adapter of another base" in lines[0]


def test_a_rank_that_cannot_read_ends_all_of_them(base: Path, tmp_path: Path) -> None:
    """Where ranks find the blocks' largest numbers together, none waits for one that has met a fault."""
    weights = load_file(base / SINGLE)
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = float("nan")  # the second rank's alone
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(weights, broken / SINGLE)
    (broken / "config.json").write_bytes((base / "config.json").read_bytes())
    done = launched(*SAME, *IN_4_BITS, f"model.path={broken}", f"dir={tmp_path / 'run'}", "parallel.tp=2")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("megamod: error:")]
    assert len(lines) == 1
    assert "model.layers.1.mlp.up_proj.weight: holds NaN or an infinite number, and cannot be in 4 bits" in lines[0]


def test_a_rank_with_a_fault_of_its_own_goes_on_as_the_others_do(base: Path, tmp_path: Path) -> None:
    """From bitsandbytes' own weights ranks find nothing together, and the one with the fault may not wait for that."""
    stored = bitsandbytes.quantize(base, tmp_path / "stored", Quantization())
    about = json.loads((stored / "config.json").read_text())
    file, index = next(stored.glob("*.safetensors")), stored / "model.safetensors.index.json"
    weights, where = load_file(file), json.loads(index.read_text())
    head = weights["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1  # the second rank's row alone
    save_file({**weights, "lm_head.weight": head}, file, metadata={"format": "pt"})
    where["weight_map"]["lm_head.weight"] = file.name
    index.write_text(json.dumps(where))
    (stored / "config.json").write_text(json.dumps({**about, "tie_word_embeddings": True}))
    (stored / checksums.SUMS).unlink()
    done = launched(*SAME, "lora.r=3", "model.init=load", f"model.path={stored}", f"dir={tmp_path / 'run'}", "parallel.tp=2")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("megamod: error:")]
    assert len(lines) == 1
    assert "config.json ties the embeddings, but lm_head.weight differs from them" in lines[0]


def launched(*overrides: str) -> subprocess.CompletedProcess[str]:
    """configs/tiny.py on two ranks."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megamod.train"]
    return subprocess.run(
        [*command, str(ROOT / "configs" / "tiny.py"), *overrides], env=environment, capture_output=True, text=True, timeout=240
    )


LAYER = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 1e6,
}  # fmt: skip


def bound(shape: Shape, tp: int) -> float:
    """MiB: a rank's share in 4 bits, of the embeddings in bfloat16, and 1.2 times one layer in bfloat16."""
    embeddings = 2 * shape.vocab * shape.hidden
    layers = shape.parameters() - embeddings
    in_4_bits = layers * (4 + 8 / 64 + 32 / 64 / 256) / 8
    return (in_4_bits / tp + 2 * embeddings / tp + 1.2 * 2 * layers / shape.layers) / 2**20


@pytest.mark.parametrize("tp", [1, 2])
def test_memory_of_loading(tp: int, tmp_path: Path) -> None:
    """No rank ever has more than its share in 4 bits, its embeddings and about a layer: less than half of its weights in bfloat16."""
    base = directory(tmp_path / "base", LAYER)
    shape = read_shape(base)
    assert bound(shape, tp) < 0.62 * 2 * shape.parameters() / 2**20
    for before, peak in distributed.run(2, lora.memory_of_loading, str(base), tp):
        assert peak - before <= bound(shape, tp)
