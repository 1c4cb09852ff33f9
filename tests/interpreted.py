"""Kernels on the CPU: a test file run as a program in a child process, where Triton interprets (`TRITON_INTERPRET=1`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Results = dict[str, list[str]]  # check → what was wrong


def run_interpreted(file: str, names: list[str]) -> Results:
    """What the child that runs `file` found, by the checks' names: its last line, one JSON object."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}, after: {done.stderr}"
    found: Results = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == names
    return found
