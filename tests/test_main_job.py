"""The main job as a user runs it: rows in, a run with validation on two ranks, an export, verdicts, numbers and plots."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import torch
from complaints import complaint
from transformers import AutoModelForCausalLM, AutoTokenizer
from written import write

from megamod import checkpoint
from megamod.config import ChatConfig
from megamod.data import chat
from megamod.data.bilingual import generate
from megamod.data.jsonl import read_rows
from megamod.evaluate import records
from megamod.model.shape import read_shape
from megamod.moderator import Moderator
from megamod.weights.load import Safetensors

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "quickstart.py")


def python(*arguments: str | Path, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """A tool, or a module, in a process of its own; with `ranks`, under torchrun."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "HF_HUB_OFFLINE": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return subprocess.run(
        [sys.executable, *launch, *map(str, arguments)], env={**inherited, **ours}, capture_output=True, text=True, timeout=600
    )


def tool(name: str, *arguments: str | Path, ranks: int = 0) -> str:
    """Standard output of a tool that must succeed."""
    done = python(ROOT / "tools" / f"{name}.py", *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(name: str, *arguments: str | Path) -> str:
    """What a tool that must fail says, in one line."""
    done = python(ROOT / "tools" / f"{name}.py", *arguments)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "warn" not in line.lower()]
    assert line.startswith("megamod: error: ")
    return line.removeprefix("megamod: error: ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a checkpoint to begin with."""
    folder = tmp_path_factory.mktemp("job")
    train, held_out = generate(80, 24, seed=3)
    write(folder / "train.jsonl", train)
    write(folder / "held_out.jsonl", held_out)
    said = tool(
        "make_checkpoint",
        folder / "base",
        "--data",
        folder / "train.jsonl",
        "--vocab",
        "400",
        "--layers",
        "2",
        "--hidden",
        "32",
        "--heads",
        "4",
    )
    assert "2 layers of 32, 400 tokens" in said
    return folder


def train(folder: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    arguments = [
        f"dir={folder / name}", f"model.path={folder / 'base'}", f"data.train={folder / 'train.jsonl'}",
        f"eval.data={folder / 'held_out.jsonl'}", "optim.warmup_steps=0", "optim.schedule=constant", "log.every=1", *overrides,
    ]  # fmt: skip
    done = python("-m", "megamod.train", CONFIG, *arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Four steps in one go, validated after the second and the fourth."""
    train(folder, "run", "steps=4", "eval.every=2", "eval.limit=16", "eval.decode=2", "eval.max_new_tokens=12", "parallel.tp=2")
    return folder / "run"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_run_leaves_all_that_tells_of_it(folder: Path, run: Path) -> None:
    metrics = lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 2, 3, 4, 4]
    validations = [line for line in metrics if "eval/macro_f1" in line]
    assert [v["step"] for v in validations] == [2, 4]
    assert [line["metrics"]["macro_f1"] for line in lines(run / "validations.jsonl")] == [v["eval/macro_f1"] for v in validations]
    assert {"loss", "nll/verdict", "lr", "grad_norm", "tokens_per_second", "memory_gib"} <= metrics[0].keys()
    for step in (2, 4):
        about = json.loads((run / "eval" / f"step-{step:08d}" / "metrics.json").read_text())
        assert about["rows"] == 16
        assert about["decoded"]["rows"] == 2
        assert (run / "eval" / f"step-{step:08d}" / "report.png").stat().st_size > 10_000
    about = json.loads((run / "run.json").read_text())
    (store,) = (run / "data").iterdir()
    assert about["identity"]["data"] == json.loads((store / "store.json").read_text())["fingerprint"]
    assert about["config"]["eval"]["every"] == 2


def test_a_run_is_plotted(run: Path, tmp_path: Path) -> None:
    assert tool("plot_run", run, tmp_path / "new" / "curves.png") == f"{tmp_path / 'new' / 'curves.png'}\n"
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "metrics.jsonl: No such file" in refusal("plot_run", tmp_path, tmp_path / "none.png")


def best(run: Path) -> int:
    values = [(line["metrics"]["macro_f1"], -line["step"]) for line in lines(run / "validations.jsonl")]
    return -max(values)[1]


def test_the_best_step_is_exported_and_kept(run: Path) -> None:
    (exported,) = (run / "hf").iterdir()
    assert exported.name == f"step-{best(run):08d}"
    kept = {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()}
    assert kept == {f"step-{best(run):08d}", "step-00000004"}
    masters = checkpoint.Masters(checkpoint.at(run / "checkpoints", best(run)))
    shards = Safetensors(exported)
    assert masters.shapes() == shards.shapes()
    for name, size in shards.shapes().items():
        zero = [0] * len(size)
        assert torch.equal(masters.read(name, zero, size), shards.read(name, zero, size).double()), name


def test_the_export_stands_alone(run: Path) -> None:
    (exported,) = (run / "hf").iterdir()
    model, loading = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3
    assert chat.read_settings(exported, ChatConfig(format="wildguard")).format == ChatConfig().format or (exported / chat.SETTINGS).exists()


def judged_in_a_pool(folder: Path) -> list[list[dict[str, float]]]:
    """From the export and from the checkpoint it was made of, on the pool's eight ranks."""
    run = folder / "run"
    (exported,) = (run / "hf").iterdir()
    found = []
    for path in (exported, checkpoint.at(run / "checkpoints", int(exported.name[5:]))):
        with Moderator(path, dtype="float64", row_length=256) as moderator:
            found.append([dict(one.scores) for one in moderator.judge(["I will hurt you.", "你好"])])
    return found


def test_a_checkpoint_judges_as_its_export_does(folder: Path, run: Path) -> None:
    answers = distributed.run(8, judged_in_a_pool, folder)
    export, masters = answers[0]
    assert export == masters
    assert all(answer == answers[0] for answer in answers)


def test_judge_and_evaluate(folder: Path, run: Path) -> None:
    (exported,) = (run / "hf").iterdir()
    verdicts = folder / "verdicts.jsonl"
    arguments = ("--model", exported, folder / "held_out.jsonl", verdicts, "--decode", "2", "--max-new-tokens", "8", "--row-length", "512")
    assert "24 verdicts" in tool("judge", *arguments, ranks=2)
    written = lines(verdicts)
    rows = list(read_rows(folder / "held_out.jsonl"))
    assert [line["line"] for line in written] == list(range(1, 25))
    assert [line["label"] for line in written] == [row.label for row in rows]
    assert ["text" in line for line in written] == [True] * 2 + [False] * 22
    assert all(abs(sum(line["scores"].values()) - 1) < 1e-6 for line in written)
    assert [dict(one.scores) for one in records.read(verdicts)] == [line["scores"] for line in written]
    said = tool("evaluate", verdicts, folder / "report", "--train", folder / "train.jsonl", "--test", folder / "held_out.jsonl")
    assert "macro-F1" in said and "TF-IDF" in said and "parse rate" in said
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert metrics["rows"] == metrics["baseline"]["metrics"]["rows"] == 24
    assert set(metrics["kinds"]) == {row.kind for row in rows}
    assert "exists; a new file was expected" in refusal("judge", *arguments)


def test_a_run_that_is_resumed_sees_the_same_rows_and_ends_alike(folder: Path, run: Path) -> None:
    """Two steps and then two more, on another grid, end where four in a row end."""
    train(folder, "parts", "steps=2", "eval.every=2", "eval.limit=16", "checkpoint.export=false")
    done = train(folder, "parts", "steps=4", "eval.every=2", "eval.limit=16")
    assert "resumed after step 2" in done.stdout
    whole = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    parts = [line for line in lines(folder / "parts" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    for key in ("loss", "nll", "nll/verdict", "grad_norm"):
        assert np.allclose([line[key] for line in whole], [line[key] for line in parts], rtol=2e-4), key
    assert [line["step"] for line in lines(folder / "parts" / "validations.jsonl")] == [2, 4]
    again = train(folder, "parts", "steps=4", "eval.every=2", "eval.limit=16")  # it has ended: nothing is done again
    assert "step 4/4" not in again.stdout and "exported before: " in again.stdout


def test_patience_ends_a_run_early(folder: Path) -> None:
    """With a learning rate of zero no validation is better than the first."""
    done = train(folder, "patient", "steps=9", "eval.every=1", "eval.limit=6", "eval.patience=2", "optim.lr=0", "checkpoint.every=2")
    steps = [line["step"] for line in lines(folder / "patient" / "validations.jsonl")]
    assert steps == [1, 2, 3]
    assert [path.name for path in (folder / "patient" / "hf").iterdir()] == ["step-00000001"]
    assert "the best step is 1" in done.stdout
    assert "stopped after step 3: 2 validations without a better macro_f1 than after step 1" in done.stdout
    kept = {path.name for path in (folder / "patient" / "checkpoints").iterdir() if path.is_dir()}
    assert kept == {"step-00000001", "step-00000002", "step-00000003"}
    again = train(folder, "patient", "steps=9", "eval.every=1", "eval.limit=6", "eval.patience=2", "optim.lr=0", "checkpoint.every=2")
    assert "step 4/9" not in again.stdout


NOTEBOOK = """
import sys
from pathlib import Path
from megamod import config, train
from megamod.errors import MegamodError
from megamod.moderator import Moderator

folder, *overrides = sys.argv[1:]
for data in ("absent.jsonl", "held_out.jsonl"):
    try:
        directory = train.train(config.load(CONFIG, [*overrides, f"eval.data={folder}/{data}"]))
    except MegamodError as error:
        print("refused:", error)
exported = next((directory / "hf").iterdir())
for length in (0, 256):
    try:
        with Moderator(exported, row_length=length) as moderator:
            long, short = moderator.judge(["a fine day. " * 200, {"text": "hello", "label": "safe"}])
            print(long.notes, short.label)
            moderator.judge("hello")
    except MegamodError as error:
        print("refused:", error)
"""


def test_a_notebook_goes_on_after_a_refusal(folder: Path) -> None:
    overrides = [
        f"dir={folder / 'notebook'}", f"model.path={folder / 'base'}", f"data.train={folder / 'train.jsonl'}", "steps=1", "eval.limit=4",
        "optim.warmup_steps=0",
    ]  # fmt: skip
    done = python("-c", NOTEBOOK.replace("CONFIG", repr(CONFIG)), str(folder), *overrides)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(("refused", "("))]
    assert said[0].startswith(f"refused: {folder}/absent.jsonl: No such file")
    assert said[1] == "refused: row_length = 0: must be at least 1"
    assert said[2].startswith("('read in ") and said[2].endswith(" windows',) safe")
    assert said[3] == "refused: judge takes a list of conversations: judge([text])"


def test_any_number_of_ranks_may_ask_whether_a_file_can_be_written(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(lambda _: records.check(tmp_path / "new" / "verdicts.jsonl"), range(400)))
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    assert complaint(lambda: records.check(tmp_path / "file" / "verdicts.jsonl")).startswith(f"{tmp_path / 'file' / 'verdicts.jsonl'}: ")


def test_split_data(tmp_path: Path) -> None:
    """Each label is split alike; what is said twice counts once, and what is labelled both ways not at all."""
    rows = [{"text": f"t{i}", "label": "safe" if i % 4 else "unsafe"} for i in range(40)]
    turns = [{"role": "user", "content": "t1\nt2"}, {"role": "assistant", "content": "t3"}]
    more = [{"text": " T3 ", "label": "safe"}, {"text": "T5", "label": "unsafe"}, {"messages": turns, "label": "safe"}]
    source = write(tmp_path / "rows.jsonl", [*rows, *more])
    said = tool("split_data", source, tmp_path / "out", "--held-out", "0.2", "--validation", "0.1")
    assert "dropped 1 that repeat" in said and "dropped 1 conversations that come with different labels" in said
    parts = {name: lines(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "validation", "held_out")}
    labels = {name: [sum(row["label"] == label for row in part) for label in ("safe", "unsafe")] for name, part in parts.items()}
    assert labels == {"train": [21, 7], "validation": [3, 1], "held_out": [6, 2]}
    texts = [json.dumps(row, sort_keys=True) for part in parts.values() for row in part]
    assert len(set(texts)) == len(texts) == 40
    unlabelled = write(tmp_path / "none.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    assert refusal("split_data", unlabelled, tmp_path / "other").startswith(f"{unlabelled}:1: no label")
    assert not (tmp_path / "other").exists()


def test_make_checkpoint_refuses_what_it_cannot_make(folder: Path, tmp_path: Path) -> None:
    data = folder / "train.jsonl"
    assert "--vocab 100: at least 300" in refusal("make_checkpoint", tmp_path / "a", "--data", data, "--vocab", "100")
    assert "exists; a new directory" in refusal("make_checkpoint", folder / "base", "--data", data)
    assert "absent.jsonl: No such file" in refusal("make_checkpoint", tmp_path / "a", "--data", tmp_path / "absent.jsonl")
    assert list(tmp_path.iterdir()) == []
    assert read_shape(folder / "base").layers == 2
