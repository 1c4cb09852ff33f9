"""The report: both files are there, and whatever the rows are, nothing warns and nothing is drawn as an empty box."""

import json
import struct
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from complaints import complaint
from matplotlib.font_manager import findfont

from megamod.evaluate import report
from megamod.evaluate.metrics import Judged, measure
from megamod.evaluate.report import write
from megamod.verdicts import SEVERITIES

pytestmark = pytest.mark.filterwarnings("error")

LONG = "Non-violent illegal acts, including but not limited to the hacking of whatever is connected"


def some_rows(
    n: int = 120,
    seed: int = 0,
    *,
    severities: int = 3,
    categories: tuple[str, ...] = ("Violent", "PII"),
    languages: tuple[str, ...] = ("en",),
) -> list[Judged]:
    rng = np.random.default_rng(seed)
    keys = SEVERITIES if severities == 3 else (SEVERITIES[0], SEVERITIES[2])
    gold = rng.integers(severities, size=n)
    logits = rng.normal(size=(n, severities)) + 2 * np.eye(severities)[gold]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return [
        Judged(
            dict(zip(keys, p[i].tolist(), strict=True)),
            keys[gold[i]],
            categories=(categories[i % len(categories)],) if categories and gold[i] else (),
            language=languages[i % len(languages)] if languages else None,
        )
        for i in range(n)
    ]


def page(rows: list[Judged], directory: Path, title: str = "a model", **more: Any) -> bytes:
    """The PNG's bytes, after what every report has is checked."""
    numbers = measure(rows, intervals=20)
    files = write(numbers, rows, directory, title=title, **more)
    assert files == (directory / "metrics.json", directory / "report.png")
    assert sorted(file.name for file in directory.iterdir()) == ["metrics.json", "report.png"]  # and no draft
    record = json.loads(files[0].read_text(encoding="utf-8"))
    record.pop("baseline", None)
    assert record == numbers
    picture = files[1].read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1600, 1000)
    assert 20_000 < len(picture) < 600_000
    return picture


def test_with_a_baseline(tmp_path: Path) -> None:
    rows, others = some_rows(), some_rows(seed=1)
    numbers = measure(others, intervals=0)
    picture = page(rows, tmp_path, baseline=("TF-IDF", numbers, others))
    record = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert record["baseline"] == {"name": "TF-IDF", "metrics": numbers}
    assert page(rows, tmp_path / "new" / "folder") != picture


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([Judged({"safe": 1.0, "unsafe": 0.0}, "safe")], id="one row"),
        pytest.param([Judged({"safe": 0.0, "controversial": 0.0, "unsafe": 1.0}, "unsafe", ("x",), "en")] * 9, id="one class"),
        pytest.param(some_rows(severities=2), id="two severities"),
        pytest.param(some_rows(categories=(), languages=()), id="neither categories nor languages"),
        pytest.param(some_rows(categories=tuple(f"category {i}" for i in range(30)), languages=tuple("abcdefghijklmnopqrst")), id="many"),
        pytest.param(
            some_rows(categories=(LONG, "种族歧视与地域歧视", "$x_1", "two\nlines", "_hidden", "\ud800", "", "🙂", "a\tb")), id="odd names"
        ),
    ],
)
def test_odd_rows(rows: list[Judged], tmp_path: Path) -> None:
    page(rows, tmp_path)


@pytest.mark.parametrize("name", ["", "_hidden\n线性 $a$ \\frac", LONG])
def test_odd_titles_and_baselines(name: str, tmp_path: Path) -> None:
    rows, others = some_rows(categories=("a", "b")), some_rows(30, categories=("a", "c"), languages=("zh",), severities=2)
    page(rows, tmp_path, title=name * 3, baseline=(name, measure(others, intervals=0), others))


def test_a_baseline_with_more_severities(tmp_path: Path) -> None:
    rows = some_rows(severities=2)
    others = [Judged({"safe": 0.3, "controversial": 0.4, "unsafe": 0.3}, row.label) for row in rows]
    page(rows, tmp_path, baseline=("other", measure(others, intervals=0), others))


def test_names_that_can_be_drawn() -> None:
    latin = [report.LATIN]
    assert report._shown("Suicide & Self-Harm", latin, 32) == "Suicide & Self-Harm"
    assert report._shown("a 种族", latin, 32) == "a \\u79cd\\u65cf"
    assert report._shown("two\nlines", latin, 32) == "two\\nlines"
    assert report._shown("x" * 33, latin, 32) == "x" * 31 + "…"
    assert report._shown("x" * 32, latin, 32) == "x" * 32


def test_fonts_are_there_and_latin_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report._fonts()[0] == report.LATIN
    monkeypatch.setattr(report, "FONTS", ("No Such Font", "DejaVu Serif", "DejaVu Sans Mono"))
    assert report._fonts() == [report.LATIN, "DejaVu Serif"]
    assert all("DejaVu" in findfont(name, fallback_to_default=False) for name in report._fonts())


def test_settings_of_the_user_neither_matter_nor_change(tmp_path: Path) -> None:
    """And the same input makes the same page."""
    plain = page(some_rows(), tmp_path)
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 37, "axes.grid": True}):
        assert page(some_rows(), tmp_path) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    rows = some_rows()
    (tmp_path / "file").write_text("")
    text = complaint(lambda: write(measure(rows, intervals=0), rows, tmp_path / "file", title="x"))
    assert str(tmp_path / "file") in text
