"""Whether a run of yours comes back: it is run twice, once undisturbed, once killed and started again, and what both leave is compared.

    python tools/prove_resume.py configs/tiny.py
    python tools/prove_resume.py configs/x.py model.path=/models/x parallel.tp=2 --nproc 4 --steps 40 --kills 3

Both runs are torchrun's, on this machine, as launch/node.sh starts them; SIGKILL ends all ranks at once. Compared are the last checkpoints,
every element of masters, moments and whatever else they hold, by its bits, and the numbers of every step in metrics.jsonl. Nothing is
exported. Says what is equal and what differs first, and as the last line one JSON object; exit status 1 if anything differs.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch

from megamod import config
from megamod.command import command
from megamod.config import RunConfig
from megamod.errors import MegamodError, expected, listed
from megamod.lives import POLL, Job, Launched, checkpoints_differ, metrics_differ, newest, steps_logged, tail

ENVIRONMENT = Path(__file__).parents[1] / "launch" / "env.sh"
STEPS = 20  # at most, unless asked for


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="owner.key=value")
    parser.add_argument("--nproc", type=int, help="ranks; default: tp × pp × cp")
    parser.add_argument("--steps", type=int, help=f"of both runs; default: the config's, at most {STEPS}")
    parser.add_argument("--kills", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills; default: %(default)s")
    parser.add_argument("--work", type=Path, help="a new directory that keeps both runs; default: a temporary one")
    args = parser.parse_intermixed_args(argv)
    for option, least in (("nproc", 1), ("steps", 2), ("kills", 1)):
        if (value := getattr(args, option)) is not None and value < least:
            raise MegamodError(f"--{option} {value}: at least {least} was expected")
    cfg = config.load(args.config, args.overrides)
    p, steps = cfg.parallel, args.steps or min(cfg.steps, STEPS)
    every = cfg.checkpoint.every if (cfg.checkpoint.every or steps) < steps else max(1, steps // (args.kills + 2))
    if every != cfg.checkpoint.every:
        print(f"checkpoint.every = {every} here, for there to be something to resume from", flush=True)
    if args.work is not None:
        with expected("a new directory that can be made"):
            args.work.mkdir(parents=True)
    with nullcontext(str(args.work)) if args.work is not None else tempfile.TemporaryDirectory(prefix="megamod-") as work:
        job = Job(args.config, tuple(args.overrides), args.nproc or p.tp * p.pp * p.cp).but(
            f"steps={steps}", f"checkpoint.every={every}", "checkpoint.resume=auto", "checkpoint.export=false", "log.every=1"
        )
        runs = Path(work, "undisturbed"), Path(work, "killed")
        lived(job.but(f"dir={runs[0]}"), runs[0], steps, [], 0.0)
        rng = random.Random(args.seed)
        moments = sorted(rng.sample(range(1, steps), min(args.kills, steps - 1)))
        fell = lived(job.but(f"dir={runs[1]}"), runs[1], steps, [(step, rng.random()) for step in moments], step_seconds(runs[0]))
        return compared(cfg, runs, {"steps": steps, "ranks": job.ranks, "checkpoint.every": every, "killed after steps": fell})


def lived(job: Job, run: Path, steps: int, kills: Sequence[tuple[int, float]], second: float) -> list[int]:
    """Run `job` to its end, killed after these steps and so much of the time of a step, `second`.

    Returns:
        The last step that was logged at each kill.

    Raises:
        MegamodError: a life ends by itself with another exit status than 0.
    """
    said, began, fell = run.with_name(f"{run.name}.txt"), time.perf_counter(), list[int]()
    told = 0.0
    for after, part in [*kills, (steps + 1, 0.0)]:
        life = Launched(job, said, ENVIRONMENT)
        while not life.ended() and (done := steps_logged(run)) < after:
            if (now := time.perf_counter()) - told > 5:
                told, left = now, timedelta(seconds=round((now - began) / max(1, done) * (steps - done)))
                print(f"{run.name} · step {done}/{steps}" + (f" · ETA {left}" if done else " · starting"), flush=True)
            time.sleep(10 * POLL)
        time.sleep(part * second)
        if life.ended():
            if any(life.statuses()):
                shutil.copy(said, kept := Path(tempfile.gettempdir(), f"megamod-{run.name}.txt"))
                raise MegamodError(f"the run ended with exit status {life.statuses()[0]}: {kept} has all that it said: {tail(said)}")
            break
        life.kill()
        fell.append(steps_logged(run))
        print(f"{run.name} · killed after step {fell[-1]}/{steps}", flush=True)
    print(f"{run.name} · ended after {timedelta(seconds=round(time.perf_counter() - began))}", flush=True)
    return fell


def step_seconds(run: Path) -> float:
    """Of a step of the run, the median."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return statistics.median(line["step_seconds"] for line in lines if "step_seconds" in line)


def compared(cfg: RunConfig, runs: tuple[Path, Path], about: dict[str, object]) -> int:
    """Say what is equal and what is not. Returns the exit status."""
    one, other = (newest(run) for run in runs)
    if one is None or other is None:
        raise MegamodError(f"{runs[0] if one is None else runs[1]}: the run has left no checkpoint")
    metrics, tensors = list(metrics_differ(*runs)), list(checkpoints_differ(one, other))
    held = len(json.loads((one / "manifest.json").read_text(encoding="utf-8"))["tensors"])
    print()
    if metrics:
        print(f"the steps' numbers differ, {len(metrics)} of them; the first: {metrics[0]}")
    else:
        print(f"equal: the numbers of all {about['steps']} steps in metrics.jsonl, but for the speed")
    if tensors:
        print(f"the last checkpoints differ in {len(tensors)} things: {listed(tensors, 3)}")
    else:
        print(f"equal: {one.name}, masters and moments of {held} tensors, to the bit")
    if (metrics or tensors) and not cfg.deterministic and torch.cuda.is_available():
        print("on a GPU two runs are the same only with deterministic=true, and this config has it not")
    print(json.dumps({"equal": not (metrics or tensors), **about, "metrics": metrics[:3], "tensors": tensors[:3]}))
    return 1 if metrics or tensors else 0


if __name__ == "__main__":
    sys.exit(main())
