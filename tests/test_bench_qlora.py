"""tools/bench_qlora.py rehearsed on a CPU, alone and on two ranks: that its numbers are of the steps that it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = str(ROOT / "tools" / "bench_qlora.py")


@pytest.mark.parametrize("tp", [1, 2])
def test_a_rehearsal(tp: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if tp > 1 else []
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, TOOL, "--shape", str(ROOT / "configs" / "models" / "tiny-qwen3"), "--layers", "2"]
    command += ["--tokens", "128", "--steps", "1", "--tp", str(tp)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["tp"], found["world"], found["layers"], found["dtype"], found["device"]) == (tp, tp, 2, "float32", "cpu")
    assert found["tokens_per_second"] == pytest.approx(128 / found["step_seconds"])
    assert found["peak_mib"] > 0


def test_one_line_for_what_goes_wrong() -> None:
    done = subprocess.run([sys.executable, TOOL, "--shape", "nowhere"], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("megamod: error: nowhere: cannot be read")
    assert len(done.stderr.splitlines()) == 1
