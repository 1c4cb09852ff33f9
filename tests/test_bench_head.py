"""The tool that times the head beside naive cross-entropy and Apple's: that it runs, and that all compute the same. Not how fast."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import bench_head
from tools.bench_head import CCE, NAIVE, OURS

TINY = ("--tokens", "64", "--labelled", "0.25", "--hidden", "16", "--vocab", "3000", "--repeats", "2", "--threads", "1")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A package of Apple's name, which here and in processes is found before the real one; that one compiles for long."""
    (folder / "cut_cross_entropy.py").write_text(f"def linear_cross_entropy(e, c, targets, ignore_index, impl):\n    {body}\n")
    (folder / "cut_cross_entropy-1.0.dist-info").mkdir()
    (folder / "cut_cross_entropy-1.0.dist-info" / "METADATA").write_text("Name: cut-cross-entropy\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    monkeypatch.delitem(sys.modules, "cut_cross_entropy", raising=False)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, Any]]:
    """What the tool says before its last line, and that."""
    assert not bench_head.main((*TINY, *arguments))
    out, err = capsys.readouterr()
    assert err == ""
    table, _, last = out.strip().rpartition("\n")
    return table, json.loads(last)


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.02)])
def test_all_compute_the_same(
    dtype: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, monkeypatch, "import torch; return torch.nn.functional.cross_entropy((e @ c.t()).to(c.dtype), targets)")
    monkeypatch.setattr(bench_head, "launched", lambda name, settings: 1.0)  # one dtype's processes, below, are enough
    table, found = answer(capsys, "--dtype", dtype)
    assert set(found) == {"settings", "labelled", "versions", "cce", "found", "ratios", "cpu_ratios"}
    assert found["settings"]["dtype"] == dtype
    assert (found["labelled"], found["cce"], found["versions"]["cut-cross-entropy"]) == (16, "measured", "1.0")
    assert list(found["found"]) == [NAIVE, CCE, OURS]
    assert set(found["ratios"]) == set(found["cpu_ratios"]) == {NAIVE, CCE}
    for name, one in found["found"].items():
        assert name in table
        assert set(one) == {"seconds", "cpu_seconds", "each", "peak_mib", "error"}
        assert len(one["each"]) == 2
        assert 0 < one["seconds"] == min(one["each"])
        assert set(one["error"]) == {"loss", "hidden", "weight"}
        assert all(error <= most for error in one["error"].values()), name
    assert not any(found["found"][NAIVE]["error"].values())


def test_without_theirs_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    table, found = answer(capsys, "--vocab", "100000")
    assert list(found["found"]) == [NAIVE, OURS]
    assert found["cce"].startswith("without Apple's cut-cross-entropy: ")
    assert found["cce"] in table
    assert "cut-cross-entropy" not in found["versions"]
    if sys.platform == "linux":
        peaks = {name: one["peak_mib"] for name, one in found["found"].items()}
        weight = 100000 * 16 * 4 / 2**20
        logits = 64 * 100000 * 4 / 2**20
        assert weight <= peaks[OURS] < weight + logits / 2  # its gradient, and no logits of all columns
        assert peaks[NAIVE] > weight + logits


def test_theirs_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(tmp_path, monkeypatch, "raise RuntimeError('no compiler\\nwas found')")
    monkeypatch.setattr(bench_head, "launched", lambda name, settings: None)
    table, found = answer(capsys)
    assert list(found["found"]) == [NAIVE, OURS]
    assert found["cce"] == "without Apple's cut-cross-entropy: RuntimeError: no compiler"
    assert "?" in table


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("--labelled", "0"), "--labelled 0.0: above 0 and at most 1 was expected"),
        (("--labelled", "nan"), "--labelled nan: above 0 and at most 1 was expected"),
        (("--repeats", "0"), "--repeats 0: at least 1 was expected"),
    ],
)
def test_a_bench_that_cannot_be(arguments: tuple[str, ...], wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_head.main((*TINY, *arguments)) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"megamod: error: {wrong}\n")
