"""tools/relabel.py: what is written for the four models, what their verdicts make of the rows, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megamod.data.importers import read_dataset
from megamod.data.jsonl import read_rows
from megamod.evaluate import records
from megamod.evaluate.metrics import Judged
from megamod.verdicts import Severity
from tools import relabel

LABELS = ["safe", "unsafe", "safe", "unsafe", "controversial", "safe", "unsafe", "safe", "controversial", "safe"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"text": f"text {i}", "label": label, "id": i, **({"weight": 0.5} if i == 3 else {})} for i, label in enumerate(LABELS)]
    for row, safe in zip(rows, (3, 0, 2, 1, 1, 3, 0, 3, 2, 3), strict=True):
        row["votes"] = {"safe": safe, "unsafe": 3 - safe}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert relabel.main(["split", str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "--ratio", "4"]) == 0
    return tmp_path / "out"


def judge(folder: Path, half: str, stance: str, unsafe: set[int]) -> None:
    """Verdicts as a model would give them."""
    rows = list(read_rows(folder / f"{half}.jsonl"))

    def verdict(of: str | None) -> Judged:
        found: dict[Severity, float] = {"safe": 0.2, "unsafe": 0.8} if of in {str(i) for i in unsafe} else {"safe": 0.7, "unsafe": 0.3}
        return Judged(found, None)

    records.write(folder / f"{half}-{stance}.verdicts.jsonl", rows, [verdict(row.id) for row in rows])


def test_halves_and_weights(folder: Path) -> None:
    """Every row once, each label halved; the strict model's rows that are not safe count four times, the lenient one's safe ones."""
    halves = [lines(folder / f"{half}.jsonl") for half in relabel.HALVES]
    assert sorted(row["id"] for half in halves for row in half) == list(range(10))
    for half, rows in zip(relabel.HALVES, halves, strict=True):
        assert sum(row["label"] == "controversial" for row in rows) == 1
        for stance in relabel.STANCES:
            made = lines(folder / f"{half}-{stance}.jsonl")
            assert [{**row, "weight": 0} for row in made] == [{**row, "weight": 0} for row in rows]
            for row in made:
                own = 0.5 if row["id"] == 3 else 1.0
                assert row["weight"] == own * (4 if (row["label"] == "safe") is (stance == "lenient") else 1)


def test_disagreement_is_controversial(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for half in relabel.HALVES:
        judge(folder, half, "strict", {1, 3, 4, 6, 8, 2})
        judge(folder, half, "lenient", {1, 3, 6, 9})
    capsys.readouterr()
    out = tmp_path / "relabelled.jsonl"
    assert relabel.main(["join", str(folder), str(out)]) == 0
    found = {row["id"]: row for row in lines(out)}
    assert {i: row["label"] for i, row in found.items() if row["label"] != "safe"} == {
        1: "unsafe", 3: "unsafe", 6: "unsafe", 2: "controversial", 4: "controversial", 8: "controversial", 9: "controversial",
    }  # fmt: skip
    assert found[3]["weight"] == 0.5
    said = capsys.readouterr().out
    assert "10 rows · safe 3 · controversial 4 · unsafe 3" in said
    assert "that were safe: safe 3, controversial 2" in said
    assert "votes on safe: 0.000 not safe, divided on 0.000 of 3 rows" in said
    assert "votes on controversial: 0.333 not safe, divided on 0.750 of 4 rows" in said
    assert "votes on unsafe: 0.889 not safe, divided on 0.333 of 3 rows" in said


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*argv: str) -> str:
        assert relabel.main(list(argv)) == 1
        return capsys.readouterr().err

    rows, out = str(tmp_path / "rows.jsonl"), str(tmp_path / "new")
    assert "--ratio 1.0: above 1 was expected" in complaint("split", rows, out, "--ratio", "1")
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a", "label": "safe"}\n{"text": "b", "label": "unsafe"}\n')
    assert "half a would not have both safe rows and others" in complaint("split", str(few), out)
    few.write_text('{"text": "a"}\n')
    assert "few.jsonl:1: no label" in complaint("split", str(few), out)
    assert "a-strict.verdicts.jsonl" in complaint("join", str(folder), out)
    judge(folder, "a", "strict", set())
    judge(folder, "a", "lenient", set())
    first = folder / "a-strict.verdicts.jsonl"
    first.write_text(first.read_text().partition("\n")[0] + "\n")
    assert "a-strict.verdicts.jsonl: 1 verdicts, and" in complaint("join", str(folder), out)
    assert not Path(out).exists()


def test_davidson_s_votes(tmp_path: Path) -> None:
    (tmp_path / "labeled_data.csv").write_text(
        ",count,hate_speech,offensive_language,neither,class,tweet\n0,3,0,1,2,2,calm\n1,6,4,2,0,0,hate\n2,3,0,3,0,1,rude\n"
    )
    (tmp_path / "split_seed0.json").write_text('{"test_row_index_in_file_order": [2]}')
    found = read_dataset("davidson", tmp_path, split="train").rows
    assert [row["votes"] for row in found] == [
        {"unsafe": 0, "controversial": 1, "safe": 2},
        {"unsafe": 4, "controversial": 2, "safe": 0},
    ]
