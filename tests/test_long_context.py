"""The tools of long rows: whether documents are isolated, and what context parallelism does to memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from complaints import complaint
from torch import Tensor

from megamod import config
from megamod.model import backends
from tools import bench_context, check_packing

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, *command], env={**environment, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip


def test_documents_are_isolated_on_two_ranks(tmp_path: Path) -> None:
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = launch(*ranks, str(ROOT / "tools" / "check_packing.py"), TINY, "parallel.cp=2", f"dir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(rows) >= 2
    for number, (document, tokens, ranks_of_it, elsewhere, itself, alone) in enumerate(rows, 1):
        assert int(document) == number
        assert int(tokens) > 0
        assert ranks_of_it in ("0", "1", "0–1")
        assert elsewhere == "0"
        assert float(itself) > 1e-3
        assert float(alone) < 1e-5
    assert done.stdout.splitlines()[-1] == f"{len(rows)} documents changed, each alone: all others kept every bit"
    assert not list(tmp_path.iterdir())


def test_a_base_in_4_bits_with_biases_is_shown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("qwen2", max_position_embeddings=512)))
    in_4_bits = ["lora.r=3", "model.quantization.quant_type=nf4"]
    cfg = config.load(TINY, [f"dir={tmp_path}", f"model.path={tmp_path}", "data.rows_per_step=4", *in_4_bits])
    found, _ = check_packing.findings(cfg, 1, 2)
    check_packing.refuse(found)
    assert len(found) == 2


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With an attention that knows no borders every document but the first sees what was changed before it."""

    def leaky(q: Tensor, k: Tensor, v: Tensor, documents: backends.Documents) -> Tensor:
        return honest(q, k, v, backends.Documents.of([sum(documents.queries.lengths)], q.device))

    honest = backends.attend_reference
    monkeypatch.setattr(backends, "attend_reference", leaky)
    cfg = config.load(TINY, [f"dir={tmp_path}", "data.rows_per_step=4"])
    found, _ = check_packing.findings(cfg, 1, 2)
    assert found[0].others > 0
    assert found[0].itself > 0
    assert complaint(lambda: check_packing.refuse(found)).endswith("documents are not isolated, the first is document 1")


def test_a_change_without_effect_is_no_proof() -> None:
    found = [check_packing.Finding(1, 5, "0", 0, 0.3, 0.0), check_packing.Finding(2, 5, "0", 0, 0.0, 0.0)]
    assert "1 of 2 documents are not isolated, the first is document 2" in complaint(lambda: check_packing.refuse(found))


def test_memory_falls_with_the_ranks() -> None:
    done = launch(str(ROOT / "tools" / "bench_context.py"), "--tokens", "8192", "--cp", "1,4")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    step = {cp: max(one["step"] for one in answer["ranks"] if one["cp"] == cp) for cp in (1, 4)}
    assert [(one["cp"], one["rank"]) for one in answer["ranks"]] == [(1, 0), *((4, rank) for rank in range(4))]
    assert step[4] < step[1] / 2  # a quarter of the activations, and what does not shrink


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("--cp", "3", "--tokens", "4096"), "numbers of ranks that divide the tokens, at least 64, were expected"),
        (("--cp", "two",), "numbers of ranks that divide the tokens"),
    ],
)  # fmt: skip
def test_a_bench_that_cannot_be(
    arguments: tuple[str, ...], wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_context.py", *arguments])
    monkeypatch.delenv("RANK", raising=False)
    assert bench_context.main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megamod: error: ")
    assert wrong in err


def test_documents_fill_the_row() -> None:
    for tokens in (64, 1000, 32768):
        made = bench_context.documents(tokens, 4096)
        assert sum(len(document.tokens) for document in made) == tokens
        assert max(len(document.tokens) for document in made) <= max(8, tokens // 4)
