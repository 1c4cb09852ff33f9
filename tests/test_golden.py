"""Loss curves as fixtures: small runs give the losses and gradient norms of tests/golden, bit for bit on the machine that made them.

    python tests/test_golden.py --write      makes them anew: after a change that is meant to change them
    python tests/test_golden.py --compare    how far this machine's are from them; with --threads N, with ATEN_CPU_CAPABILITY=default

Numbers are kept as `float.hex` writes them. On another machine (processor, instruction set, version of torch or megatron-core, threads)
sums are taken in another order, and they must be near: TOLERANCE, ten times and more of what was measured (LOG.md).
"""

import argparse
import gc
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from written import write

from megamod import config, files, losses
from megamod.config import CheckpointConfig, LogConfig, LoraConfig, OptimConfig, ParallelConfig, Quantization, RunConfig
from megamod.model.shape import Score
from megamod.train import train
from tools import make_checkpoint

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
WORLD, STEPS = 4, 8
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # relative, of a loss and of a gradient norm

Curve = list[tuple[float, float]]  # loss and gradient norm of each step


# --- the runs --------------------------------------------------------------------------------------------------------------


def run(name: str, folder: Path) -> RunConfig:
    """One of RUNS: configs/tiny.py or configs/tiny_dpo.py made smaller, with what the name says."""
    base = config.load(ROOT / "configs" / ("tiny_dpo.py" if name == "dpo" else "tiny.py"))
    data = replace(base.data, row_length=128, rows_per_step=8)
    cfg = replace(
        base, dir=str(folder / name), steps=STEPS, data=data, optim=OptimConfig(lr=1e-3, warmup_steps=2), checkpoint=CheckpointConfig(),
        log=LogConfig(every=1, tensorboard=False), deterministic=True,
    )  # fmt: skip
    return replace(cfg, **RUNS[name](cfg))


def _of_model(cfg: RunConfig, **changes: Any) -> dict[str, Any]:
    return {"model": replace(cfg.model, **changes)}


SCORE = Score(("safe", "controversial", "unsafe"), "single_label_classification")
LORA = LoraConfig(r=4, lora_alpha=8.0, lora_dropout=0.1)
RUNS: Mapping[str, Any] = {
    "sft": lambda cfg: {},
    "sft-tp2-pp2": lambda cfg: {"parallel": ParallelConfig(tp=2, pp=2, sp=True)},
    "sft-bf16-tp2": lambda cfg: {"parallel": ParallelConfig(tp=2), **_of_model(cfg, dtype="bfloat16")},
    "lora-tp2": lambda cfg: {"parallel": ParallelConfig(tp=2), "lora": LORA},
    "qlora-pp2": lambda cfg: {"parallel": ParallelConfig(pp=2), "lora": LORA, **_of_model(cfg, quantization=Quantization())},
    "dpo": lambda cfg: {"parallel": ParallelConfig(cp=2)},
    "classifier": lambda cfg: {
        "loss": losses.classification,
        "data": replace(cfg.data, train=str(Path(cfg.dir).parent / "rows.jsonl")),
        **_of_model(cfg, score=SCORE, path=str(Path(cfg.dir).parent / "base")),
    },
}


def trained(names: Sequence[str], folder: Path, threads: int) -> dict[str, Curve]:
    """On a pool's rank: the runs, one after the other."""
    before, found = torch.get_num_threads(), {}
    torch.set_num_threads(threads)
    for name in names:
        lines = map(json.loads, (train(run(name, folder)) / "metrics.jsonl").read_text().splitlines())
        found[name] = [(line["loss"], line["grad_norm"]) for line in lines]
        gc.collect()
    torch.set_num_threads(before)
    return found


def curves(names: Sequence[str], threads: int = 1) -> dict[str, Curve]:
    """Every run, beside the data and the tokenizer of the one that reads texts."""
    with tempfile.TemporaryDirectory() as folder:
        rows = write(Path(folder) / "rows.jsonl", [{"text": f"{n % 3} " * (3 + n % 7), "label": SCORE.labels[n % 3]} for n in range(60)])
        make_checkpoint.make(Path(folder) / "base", rows, vocab=300, layers=2, hidden=64, heads=4, seed=1)
        return distributed.run(WORLD, trained, names, Path(folder), threads)[-1]


# --- what made them --------------------------------------------------------------------------------------------------------


def machine(threads: int = 1) -> dict[str, Any]:
    """All that is known to decide the order in which a sum is taken."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except OSError:
        about = {}
    words = [about.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping", "model name")]
    return {
        "processor": " ".join(word for word in words if word) or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
        "threads": threads,
    }


@dataclass(frozen=True)
class Golden:
    """A curve and the machine that made it."""

    machine: Mapping[str, Any]
    curve: Curve

    @classmethod
    def read(cls, name: str) -> "Golden":
        found = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
        return cls(found["machine"], [(float.fromhex(loss), float.fromhex(norm)) for loss, norm in found["loss, gradient norm"]])

    def write(self, name: str) -> None:
        lines = ",\n".join(f'  ["{loss.hex()}", "{norm.hex()}"]' for loss, norm in self.curve)
        text = f'{{\n "machine": {json.dumps(self.machine)},\n "loss, gradient norm": [\n{lines}\n ]\n}}\n'
        files.replace_text(GOLDEN / f"{name}.json", text)


def distance(a: Curve, b: Curve) -> float:
    """The largest relative difference of a loss or gradient norm of the same step; infinite for NaN or another number of steps."""
    if len(a) != len(b):
        return float("inf")
    pairs = [(x, y) for step, other in zip(a, b, strict=True) for x, y in zip(step, other, strict=True)]
    return max(abs(x - y) / abs(y) if x == x else float("inf") for x, y in pairs)


def fault(name: str, golden: Golden, found: Curve, here: Mapping[str, Any]) -> str | None:
    """What is wrong with a curve that was found here; None: nothing."""
    far, right = distance(found, golden.curve), TOLERANCE["bfloat16" if "bf16" in name else "float32"]
    if found == golden.curve or (here != golden.machine and far <= right):
        return None
    step = next((i for i, (x, y) in enumerate(zip(found, golden.curve, strict=False), 1) if x != y), len(golden.curve))
    asked = "the same bits" if here == golden.machine else f"at most {right:g} on another machine than {dict(golden.machine)}"
    return f"{name}: another curve from step {step} on, {far:.1e} away at most: {asked} were expected; where it is meant, --write"


# --- tests -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> dict[str, Curve]:
    return curves(list(RUNS))


@pytest.mark.parametrize("name", RUNS)
def test_curves_are_as_they_were(found: dict[str, Curve], name: str) -> None:
    assert fault(name, Golden.read(name), found[name], machine()) is None


def test_there_is_a_curve_for_each_run() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(RUNS)
    for name in RUNS:
        curve = Golden.read(name).curve
        assert len(curve) == STEPS
        assert len({loss for loss, _ in curve}) == STEPS


def test_what_counts_as_another_curve() -> None:
    here, there = machine(), machine(threads=2)
    golden = Golden(here, [(0.5, 2.0), (0.25, 1.0)])
    near = [(0.5, 2.0), (0.25 + 2**-54, 1.0)]
    assert [fault("sft", golden, near, who) is None for who in (here, there)] == [False, True]
    assert fault("sft", golden, [(0.5, 2.0), (0.25, 1.0)], here) is None
    for far in ([(0.5, 2.0)], [(0.5, 2.0), (0.26, 1.0)], [(0.5, 2.0), (0.25, 1.1)], [(0.5, float("nan")), (0.25, 1.0)]):
        text = fault("sft", golden, far, there)
        assert text is not None and text.startswith("sft: another curve from step ")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.write == args.compare:
        parser.error("one of --write and --compare was expected")
    found, here = curves(list(RUNS), args.threads), machine(args.threads)
    print(" · ".join(f"{key} {value}" for key, value in here.items()))
    for name, curve in found.items():
        if args.write:
            Golden(here, curve).write(name)
        golden = Golden.read(name).curve
        first, far = distance(curve[:1], golden[:1]), distance(curve, golden)
        print(f"{name:<14} loss {curve[0][0]:.4f} → {curve[-1][0]:.4f} · step 1 {first:.1e} away · at most {far:.1e}")


if __name__ == "__main__":
    main()
