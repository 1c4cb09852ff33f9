"""What a person reads while the run goes on, and what stays: one line a step, metrics.jsonl, TensorBoard, run.json."""

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from megamod import files
from megamod.config import LogConfig, RunConfig, as_json
from megamod.watch import Spikes

# Dense bf16 TFLOP/s of NVIDIA's data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "B200": 2250.0, "L40S": 362.0}
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in ru_maxrss's unit
PACKAGES = ("torch", "megatron-core", "transformers", "triton", "flash-attn", "transformer-engine")


class Log:
    """The log of the one rank that knows the loss; on the others (`active` False) every call does nothing.

    Args:
        directory: the run's.
        steps: of the whole run, for the ETA.
        first: the step to begin at.
        world: number of ranks, over which FLOP/s are shared.
    """

    def __init__(self, cfg: LogConfig, directory: Path, steps: int, first: int, world: int, device: torch.device, *, active: bool) -> None:
        self.cfg, self.steps, self.active, self.device, self.world = cfg, steps, active, device, world
        self.peak = cfg.peak_tflops or _known_peak(device)
        self._began, self._first, self._last = time.perf_counter(), first, time.perf_counter()
        self._tokens, self._flops, self._since = 0, 0.0, 0
        self._spikes, self._lost = Spikes(), False
        self._pending: tuple[int, Mapping[str, float | torch.Tensor]] | None = None
        if active:
            directory.mkdir(parents=True, exist_ok=True)
            _forget_after(directory / "metrics.jsonl", first)
            self._metrics = (directory / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first + 1) if cfg.tensorboard else None

    def say(self, text: str) -> None:
        """A line about the run."""
        if self.active:
            print(text, flush=True)

    def step(self, number: int, values: Mapping[str, float | torch.Tensor], *, tokens: int, flops: float) -> None:
        """After step `number` (from 1): `values` by name, `tokens` and training `flops` of the whole step over all ranks."""
        if not self.active:
            return
        self._tokens, self._flops, self._since = self._tokens + tokens, self._flops + flops, self._since + 1
        self._pending = (number, values)
        if number % self.cfg.every == 0 or number == self.steps:
            self._report()

    def _report(self) -> None:
        """The line and the record of the step at hand."""
        assert self._pending is not None
        (number, values), self._pending = self._pending, None
        numbers = {name: float(value) for name, value in values.items()}
        # A mean over nothing, such as verdict tokens in a step without one, is not a number to report; a loss always is.
        record = {name: x for name, x in numbers.items() if name in ("loss", "grad_norm") or not math.isnan(x)}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        record |= {"tokens_per_second": self._tokens / seconds, "step_seconds": seconds / self._since}
        if self.peak is not None:
            record["mfu"] = self._flops / seconds / self.world / (self.peak * 1e12)
        if self.device.type == "cuda":
            record["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            record["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 2**30
        self._tokens, self._flops, self._since = 0, 0.0, 0
        eta = (now - self._began) / max(1, number - self._first) * (self.steps - number)
        print(f"step {number}/{self.steps} · {_line(record)} · ETA {timedelta(seconds=round(eta))}", flush=True)
        self._keep(number, record)
        if spike := self._spikes.found(number, numbers["loss"]):
            self.say(spike)

    def validation(self, number: int, values: Mapping[str, float | None], seconds: float) -> None:
        """After a validation that follows step `number` and took `seconds`, which count as no step's: what it found, by name."""
        if not self.active:
            return
        known = {f"eval/{name}": value for name, value in values.items() if value is not None}
        self._last += seconds
        found = " · ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in known.items())
        print(f"validation after step {number} · {found} · {seconds:.1f} s", flush=True)
        self._keep(number, known)

    def _keep(self, number: int, record: Mapping[str, float]) -> None:
        # JSON has no NaN and no infinity: such a number is null there; the printed line and TensorBoard say which it is.
        finite = {name: x if math.isfinite(x) else None for name, x in record.items()}
        try:
            self._metrics.write(json.dumps({"step": number, **finite}, allow_nan=False) + "\n")
            self._metrics.flush()
            if self._board is not None:
                for name, value in record.items():
                    self._board.add_scalar(name, value, number)
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """A run does not die of its log."""
        if not self._lost:
            self.say(f"metrics.jsonl and TensorBoard: {error.strerror}: what could not be written is only printed")
        self._lost = True

    def close(self) -> None:
        if self.active:
            if self._pending is not None:  # the run has ended early
                self._report()
            try:
                self._metrics.close()
                if self._board is not None:
                    self._board.close()
            except OSError as error:  # what was not written before is tried again
                self._lose(error)


def record_run(cfg: RunConfig, directory: Path, about: Mapping[str, Any]) -> None:
    """Write run.json: the resolved configuration, versions, git commit, command line, and `about`."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_record(directory, {"config": as_json(cfg), "versions": _versions(), "git": _git_commit(), "command": sys.argv, **about})


def add_to_record(directory: Path, about: Mapping[str, Any]) -> None:
    """Add `about` to run.json: what is known only at the end."""
    _write_record(directory, {**json.loads((directory / "run.json").read_text(encoding="utf-8")), **about})


def _write_record(directory: Path, record: Mapping[str, Any]) -> None:
    files.replace_text(directory / "run.json", json.dumps(record, indent=1, default=str) + "\n")


def _line(record: Mapping[str, float]) -> str:
    forms = {
        "lr": "lr {:.2e}", "grad_norm": "grad norm {:.3f}", "tokens_per_second": "{:,.0f} tok/s", "mfu": "MFU {:.1%}",
        "memory_gib": "{:.1f} GiB", "skipped": "skipped {:.0f}", "step_seconds": "{:.2f} s",
    }  # fmt: skip
    return " · ".join(forms.get(name, name + " {:.4f}").format(value) for name, value in record.items())


def _forget_after(file: Path, step: int) -> None:
    """Drop the lines of steps that are about to be run again, by a run that goes on from a checkpoint before them."""
    if not file.exists():
        return

    def stays(line: str) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):  # cut short, when the machine died or the disk was full
            return False

    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    files.replace_text(file, "".join(line + "\n" for line in lines if stays(line)))


def _known_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() + (" with uncommitted changes" if dirty else "")
