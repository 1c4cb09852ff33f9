"""What a run refuses before its first step, and what it asks of a researcher's loss."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from megamod.batch import Mean
from megamod.checkpoint import Begun
from megamod.config import DataConfig
from megamod.data.store import open_documents, prepare_all
from megamod.errors import MegamodError
from megamod.losses import Loss
from megamod.step import _checked
from megamod.train import _steps_done, main

IDENTITY = {"shape": {"layers": 4}, "model.path": "m", "data": "abc", "seed": 1}


@pytest.mark.parametrize(
    ("saved", "steps", "wrong"),
    [
        ({}, 5, None),
        ({}, 3, None),
        ({}, 2, "c: saved after step 3, and steps = 2: use more steps, or another dir"),
        *(({key: "other"}, 5, f"c: saved with another {key}; use another dir, or checkpoint.resume=no") for key in IDENTITY),
    ],
)
def test_a_run_goes_on_only_from_its_own_checkpoint(saved: dict[str, Any], steps: int, wrong: str | None) -> None:
    begun = Begun(Path("c"), 3, {**IDENTITY, **saved})
    if wrong is None:
        assert _steps_done(begun, IDENTITY, steps) == 3
    else:
        with pytest.raises(MegamodError, match=re.escape(wrong)):
            _steps_done(begun, IDENTITY, steps)


def test_a_run_without_a_checkpoint_begins_at_0() -> None:
    assert _steps_done(None, IDENTITY, 5) == 0


SCALAR = torch.zeros(())


@pytest.mark.parametrize(
    ("result", "wrong"),
    [
        (SCALAR, "the loss returned Tensor: return Loss(value, metrics)"),
        (Loss(torch.zeros(3), {}), "the loss's value is [3], a scalar was expected"),
        (Loss(0.5, {}), "the loss's value is float, a scalar was expected"),  # type: ignore[arg-type]
        (Loss(SCALAR, {"nll": 0.5}), "the loss's metric 'nll' is float: make it with batch.mean_of(x)"),  # type: ignore[dict-item]
    ],
)
def test_what_a_loss_must_return(result: Any, wrong: str) -> None:
    with pytest.raises(MegamodError, match=re.escape(wrong)):
        _checked(result)


def test_what_a_loss_may_return() -> None:
    result = Loss(SCALAR, {"nll": Mean(SCALAR, SCALAR)})
    assert _checked(result) is result


@pytest.mark.parametrize(
    "line", ['{"input_ids": [1, 2], "labels": [-100, -100]}', '{"input_ids": [1]}', '{"input_ids": [1, 2], "labels": [1, -100]}']
)
def test_data_with_nothing_to_train_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(MegamodError, match="no document has a token to train"):
        cfg, vocab = DataConfig(train=str(file)), tiny.shape("qwen2").vocab
        open_documents(cfg, [store.path for store in prepare_all(cfg, "no model", vocab, tmp_path / "stores")], vocab, 1)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["run.py", "--optim.lr=1"], "argument '--optim.lr=1': write overrides as owner.key=value, such as optim.lr=3e-6, without dashes"),
        ([], "the following arguments are required: config"),
    ],
)
def test_the_command_line(capsys: pytest.CaptureFixture[str], arguments: list[str], wrong: str) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert wrong in error
    assert error.count("\n") == 1
