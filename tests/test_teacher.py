"""Teachers: one of another shape in memory, on another grid than the one whose most probable tokens are stored; what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import numpy as np
import preferences
import pytest
import torch
from complaints import complaint
from safetensors.torch import save_file

from megamod import config, losses, reference
from megamod import train as train_module
from megamod.config import RunConfig, SyntheticData
from megamod.data import stored
from megamod.data.documents import synthetic
from megamod.data.packing import micro_batch
from megamod.model.shape import shape_of
from megamod.parallel import grid as grids
from megamod.train import model_shape, train
from megamod.weights.table import hf_shapes
from tools.reference_logprobs import compute
from tools.teacher_logprobs import taught_by

CONFIGS = Path(__file__).parents[1] / "configs"
LOSS = """from dataclasses import replace
from megamod import losses
from megamod.config import load
def config():
    return replace(load("{}/tiny.py"), loss=losses.{})
"""
FIXED = [*preferences.FIXED, "steps=2", "checkpoint.export=false", "reference.top_k=5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a teacher of half as many layers as the model and of other widths, and the run's config."""
    root = tmp_path_factory.mktemp("teacher")
    about = json.loads((CONFIGS / "models" / "tiny-qwen3" / "config.json").read_text())
    about |= {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80}
    made = root / "teacher"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(about))
    generator = torch.Generator().manual_seed(3)
    save_file(
        {name: 0.3 * torch.randn(*size, generator=generator) for name, size in sorted(hf_shapes(shape_of(about)).items())},
        made / "model.safetensors",
    )
    (root / "run.py").write_text(LOSS.format(CONFIGS, "distillation"))
    (root / "plain.py").write_text(LOSS.format(CONFIGS, "cross_entropy"))
    (root / "dpo.py").write_text(LOSS.format(CONFIGS, "dpo"))
    return root


def read(folder: Path, *overrides: str, name: str = "run") -> RunConfig:
    return config.load(str(folder / f"{name}.py"), [*FIXED, *overrides] if name == "run" else list(overrides))


def ran(folder: Path) -> list[list[dict[str, Any]]]:
    """What two runs say of their steps: with the teacher in memory, and with what it stored on another grid."""
    teacher = str(folder / "teacher")
    at = f"reference.path={folder}/stored"
    compute(taught_by(read(folder, "reference.kind=stored", at, "parallel.pp=2", f"dir={folder}/asks"), teacher))
    grids.stop()
    runs = [
        ("live", ["reference.kind=model", f"reference.path={teacher}", "parallel.tp=2"]),
        ("kept", ["reference.kind=stored", at, "parallel.cp=2"]),
    ]
    return [
        [json.loads(line) for line in (train(read(folder, *more, f"dir={folder}/{name}")) / "metrics.jsonl").read_text().splitlines()]
        for name, more in runs
    ]


def test_live_and_stored_are_one_teacher(folder: Path) -> None:
    live, kept = distributed.run(2, ran, folder)[0]
    assert len(live) == len(kept) == 2
    for one, other in zip(live, kept, strict=True):
        for key in ("loss", "nll", "divergence"):  # stored in float32
            assert other[key] == pytest.approx(one[key], rel=1e-6), key
        assert one["divergence"] > 1e-3  # of models that have nothing in common, far above what is stored in float32
    assert live[0]["divergence"] != live[1]["divergence"]
    about = json.loads((folder / "stored" / "reference.json").read_text())
    assert about["top_k"] == 5


def test_what_is_stored_comes_back_at_its_own_tokens(folder: Path, tmp_path: Path) -> None:
    """Token by token, over two documents in one row."""
    documents = synthetic(SyntheticData(documents=2, mean_length=9, labelled=0.5), 40, 20, seed=1)
    rng = np.random.default_rng(2)
    counts = [len(stored.asked(documents[n])) for n in range(2)]
    values = [rng.random((count, 3, 2), np.float32) for count in counts]
    root = stored.write(tmp_path / "kept", values, documents.fingerprint(), "m", top_k=3)
    found = stored.Compared(documents, root)
    batch = micro_batch([[found[0], found[1]]], 64)
    assert batch.taught is not None and batch.stored is None
    np.testing.assert_array_equal(batch.taught.numpy(), np.concatenate(values))
    cfg = read(folder, "reference.kind=stored", f"reference.path={root}", "reference.top_k=3")
    assert train_module._stored(cfg, documents) is not None
    more = replace(cfg, reference=replace(cfg.reference, top_k=4))
    expected = "a teacher's 3 most probable tokens, and loss distillation needs a teacher with reference.top_k = 4"
    assert expected in complaint(lambda: train_module._stored(more, documents))
    expected = "a teacher's 3 most probable tokens, and loss dpo needs a reference"
    assert expected in complaint(lambda: train_module._stored(replace(cfg, loss=losses.dpo), documents))
    ids, logprobs = batch.slice(1, 2, None).teacher
    assert ids.shape == logprobs.shape == (len(batch.slice(1, 2, None).labels), 3)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    assert "loss cross_entropy learns from no teacher" in complaint(lambda: taught_by(read(folder, name="plain"), "x"))
    assert "uniform" in complaint(lambda: read(folder, "reference.kind=uniform"))
    follows = ["reference.kind=model", "reference.path=x", "reference.sync_every=2"]
    assert "a teacher at reference.path does not follow the model" in complaint(lambda: read(folder, *follows))
    assert "reference.top_k = 0: at least 1" in complaint(lambda: read(folder, "reference.top_k=0"))
    assert "the loss dpo needs no teacher" in complaint(lambda: read(folder, "reference.top_k=9", "data.train.pairs=true", name="dpo"))
    about = json.loads((folder / "teacher" / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(about | {"vocab_size": 77}))
    assert "a vocabulary of 77, and the model's is 512" in complaint(lambda: taught_by(read(folder), str(tmp_path)))
    cfg = read(folder, "reference.kind=model", f"reference.path={tmp_path}", "parallel.cp=4")

    def live() -> None:
        reference._teacher_on(cfg, str(tmp_path), model_shape(cfg), SimpleNamespace(world=4))  # type: ignore[arg-type]

    assert "a vocabulary of 77, and the model's is 512" in complaint(live)
    file.write_text(json.dumps(about | {"num_key_value_heads": 2, "num_attention_heads": 2}))
    assert "its heads and the model's would be shared by other ranks on tp 1 and cp 4" in complaint(live)


def test_the_data_stay_the_run_s(folder: Path) -> None:
    cfg = read(folder)
    asked = taught_by(cfg, str(folder / "teacher"))
    assert (asked.data.chat.tokenizer, asked.model.path) == (cfg.model.path, str(folder / "teacher"))
    assert replace(asked.data, chat=cfg.data.chat) == cfg.data
