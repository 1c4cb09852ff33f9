"""tools/compare_hf.py: equal models are equal in each layer, and where one differs its layer is found."""

import json
import subprocess
import sys
from pathlib import Path

import distributed
import tiny
import torch
from complaints import complaint
from safetensors.torch import save_file
from torch import Tensor

from tools import compare_hf, make_checkpoint

ROOT = Path(__file__).parents[1]


def differences(path: Path, dtype: str, changed: str | None) -> tuple[dict[str, tuple[float, float]], float, float]:
    """With transformers' model changed in one weight after it was loaded."""
    whole = compare_hf._theirs

    def theirs(directory: str, kind: torch.dtype) -> torch.nn.Module:
        model: torch.nn.Module = whole(directory, kind)
        if changed is not None:
            weight: Tensor = model.get_parameter(changed)
            weight.data[0] += 0.1
        return model

    compare_hf._theirs = theirs  # in this process of the pool
    try:
        return compare_hf.differences(str(path), dtype)
    finally:
        compare_hf._theirs = whole


def test_the_first_layer_that_differs_is_seen(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("qwen3")), encoding="utf-8")
    save_file(tiny.weights("qwen3", torch.float32), tmp_path / "model.safetensors")
    ((layers, worst, mean),) = distributed.run(1, differences, tmp_path, "float32", None)
    assert list(layers) == ["embedding", "layer 0", "layer 1", "layer 2", "layer 3"]
    assert all(relative < 1e-5 for _, relative in layers.values())
    assert mean <= worst < 1e-4
    ((layers, worst, _),) = distributed.run(1, differences, tmp_path, "float32", "model.layers.2.mlp.up_proj.weight")
    apart = [name for name, (_, relative) in layers.items() if relative > 1e-5]
    assert apart == ["layer 2", "layer 3"]
    assert worst > 1e-4


def test_the_command_compares_texts(tmp_path: Path) -> None:
    make_checkpoint.make(tmp_path / "m", _rows(tmp_path / "rows.jsonl"), vocab=300, layers=2, hidden=32, heads=4, seed=1)
    words = [sys.executable, str(ROOT / "tools" / "compare_hf.py"), str(tmp_path / "m")]
    ran = subprocess.run([*words, "--text", "How do I pick a lock?", "Hello"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "layer 1" in ran.stdout
    assert "float32: equal" in ran.stdout
    assert "at least two were expected" in complaint(lambda: compare_hf._documents(str(tmp_path / "m"), [""]))


def _rows(path: Path) -> Path:
    rows = [{"text": f"How do I pick lock {i}? Hello.", "label": "safe"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
