"""Kernels on the CPU: a test file run as a program in a child process, where Triton interprets (`TRITON_INTERPRET=1`).

And what tests of kernels have in common: fences around results, errors beside the reference's own, code for a GPU that is not there.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
Results = dict[str, list[str]]  # check → what was wrong


def name_of(*parts: Any) -> str:
    """What a check is called: its case's name and what else it is given."""
    return " ".join(getattr(part, "name", str(part).removeprefix("torch.")) for part in parts)


def bench_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """kernels/bench.py as a module."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "kernels" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench", module)  # dataclasses look their module up
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    return module


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


@contextmanager
def fenced(wrong: list[str]) -> Iterator[None]:
    """Puts a fence after all memory that new_empty gives meanwhile, and NaN into it; says when a fence was written over."""
    fences: list[Tensor] = []
    plain = Tensor.new_empty

    def new_empty(x: Tensor, *size: Any, **other: Any) -> Tensor:
        if set(other) - {"dtype"}:  # it is the interpreter who asks
            return plain(x, *size, **other)
        shape: Sequence[int] = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        whole = plain(x, math.prod(shape) + 10_000, **other).fill_(77)
        if whole.is_floating_point():
            whole[: math.prod(shape)] = math.nan  # what is not written, or multiplied by zero, shows
        fences.append(whole[math.prod(shape) :])
        return whole[: math.prod(shape)].view(shape)

    with mock.patch.object(Tensor, "new_empty", new_empty):
        yield
    if not fences:
        wrong.append("no memory was asked for")
    if not all(bool((fence == 77).all()) for fence in fences):
        wrong.append("memory after a result was written over")


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with a kernel's results, given the reference's in fp64 and in the kernel's dtype.

    Their error may be twice the reference's own, and of an fp32 number 1e-6.
    """
    wrong = []
    for name, theirs in plain.items():
        ours, true = found[name], exact[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            wrong.append(f"{name} is {ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}")
            continue
        error, allowed = (float((t.double() - true).norm()) for t in (ours, theirs))
        if not error <= 2 * allowed + (1e-14 if ours.dtype is torch.float64 else 1e-6) * float(true.norm()):
            wrong.append(f"{name} is off by {error:.3g}, the reference in {ours.dtype} by {allowed:.3g}")
    return wrong


def compiled_for_hopper(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], *, fuse: bool = True, **options: int) -> Any:
    """A kernel's code for compute capability 9.0; of what a launch gives it, numbers are multiples of 16 and pointers of 16 bytes.

    fuse: whether a product and a sum may be rounded as one.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    even = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=even)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": fuse, **options})
