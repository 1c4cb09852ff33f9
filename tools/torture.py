"""Small runs that are killed, starved of disk and damaged, over and over: each must come back, and end with the bits of an undisturbed run.

    python tools/torture.py                            # all of it
    python tools/torture.py kills --count 470
    python tools/torture.py flips corruptions --seed 2

    kills        SIGKILL at random moments, at least 3 of 10 inside a save, of all ranks or of one and then its peers
    syscalls     one kill before each system call of a save that writes, renames, syncs, makes or removes (needs strace)
    flips        one bit of a checkpoint's files is another; and what verification costs
    corruptions  files cut, exchanged, missing, replaced; entries of manifests and the tracker changed
    disk         a file system that is full, a limit on a file's size, a directory that is read-only
    restarts     torchrun --max-restarts, and one rank killed

Every life is a run as a user launches it, `megamod.train` with a config and overrides, and is judged by what it leaves and says. Prints its
progress, a report, and as the last line one JSON object; exit status 1 if a claim fails. On the CPU.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megamod import checkpoint
from megamod.command import command
from megamod.damage import WAYS, flip, header
from megamod.errors import MegamodError, expected, listed
from megamod.lives import (
    POLL,
    Forked,
    Job,
    Launched,
    Nursery,
    checkpoints_differ,
    end,
    metrics_differ,
    newest,
    steps_logged,
    tail,
    wait,
)

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "launch" / "env.sh"
PATIENCE = 180.0  # seconds without an end, after which a life hangs; a few are usual
GRACE = 10.0  # seconds for the peers of a rank that was killed; then they are killed, as torchrun's agent does
SHAPE = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "rope_theta": 1e4,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
KEEP = ("checkpoint.keep_last=2",)
# Counts of what is asked for; syscalls: None is each.
COUNTS: dict[str, int | None] = {"kills": 100, "syscalls": None, "flips": 1000, "corruptions": 500, "restarts": 20}


@dataclass
class Report:
    """What a part found: what it claims, each true or not, and what it counted and measured."""

    claims: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # a line for each thing that was not as claimed


@dataclass(frozen=True)
class Place:
    """Where the runs live, and from what they are forked."""

    work: Path
    nursery: Nursery
    rng: random.Random

    def job(self, name: str, steps: int, *overrides: str, tp: int = 1, pp: int = 1, every: int = 2) -> Job:
        """A small run in a directory `name`, saved every `every` steps; how many steps it has changes none of its numbers."""
        return Job(
            str(ROOT / "configs" / "tiny.py"),
            (
                f"model.path={self.work / 'model'}", "data.train.documents=64", "data.train.mean_length=12", "data.row_length=32",
                "data.rows_per_step=4", "optim.schedule=constant", "log.every=1", "log.tensorboard=false", "checkpoint.export=false",
                f"checkpoint.every={every}", f"steps={steps}", f"parallel.tp={tp}", f"parallel.pp={pp}",
                f"dir={self.work / name}", *overrides,
            ),
            tp * pp,
        )  # fmt: skip

    def said(self, job: Job) -> Path:
        """The file of what the run's life says."""
        return self.work / f"{job.directory.name}.txt"

    def run(self, job: Job, **how: Any) -> "Ended":
        """One life of `job`, to its end."""
        said = self.said(job)
        said.unlink(missing_ok=True)
        life = self.nursery.start(job, said, **how)
        by_itself = end(life, PATIENCE)
        return Ended(life.statuses() if by_itself else None, said.read_text(encoding="utf-8", errors="replace"))

    def undisturbed(self, job: Job) -> Path:
        """The run's directory after its whole life. Raises MegamodError where even that fails."""
        shutil.rmtree(job.directory, ignore_errors=True)
        ended = self.run(job)
        if not ended.well:
            raise MegamodError(f"an undisturbed run has failed, {ended.statuses}: {tail(self.said(job))}")
        return job.directory


@dataclass(frozen=True)
class Ended:
    """How a life ended: each rank's exit status, None for one that hung; and what was said."""

    statuses: list[int | None] | None
    said: str

    @property
    def well(self) -> bool:
        return self.statuses is not None and not any(self.statuses)

    @property
    def refused(self) -> bool:
        """One line that says what is wrong, and exit status 1."""
        lines = [line for line in self.said.splitlines() if line.startswith("megamod: error: ")]
        return self.statuses is not None and set(self.statuses) == {1} and len(lines) == 1 and "Traceback" not in self.said

    @property
    def how(self) -> str:
        if self.statuses is None:
            return "it hung"
        if "Traceback" in self.said:
            return "a traceback"
        return f"exit status {listed(sorted({str(status) for status in self.statuses}))}"


def write_model(work: Path) -> None:
    """What all runs are of: a config.json; the weights are random."""
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")


class Progress:
    """A line about what is done, every few seconds, and after the last."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self._began, self._said = what, total, time.perf_counter(), 0.0

    def __call__(self, done: int, text: str = "") -> None:
        now = time.perf_counter()
        if now - self._said > 5 or done == self.total:
            self._said = now
            left = timedelta(seconds=round((now - self._began) / max(1, done) * (self.total - done)))
            print(f"{self.what} {done}/{self.total}{f' · {text}' if text else ''} · ETA {left}", flush=True)


def same_end(run: Path, reference: Path) -> list[str]:
    """What differs between the last checkpoints of two runs, and between the numbers they logged; a few lines."""
    a, b = newest(run), newest(reference)
    if a is None or b is None:
        return [f"{run.name}: no checkpoint"]
    found = [*checkpoints_differ(a, b), *metrics_differ(run, reference)]
    return [f"{run.name}: {line}" for line in found[:3]]


# ---- kills


BEFORE, BETWEEN = "before the first step", "between saves"
MADE, SHARDS, WHOLE, RENAMED, TRACKER, REMOVAL = IN_SAVE = (
    "draft made, no shard yet", "shards being written", "manifest written, not renamed", "renamed, tracker not moved",
    "tracker being written", "old ones being removed",
)  # fmt: skip
DRAFT = re.compile(r"\.step-\d+\.tmp")
REMOVED = re.compile(r"\.step-.*\.gone\.tmp")
Seen = dict[str, tuple[int, int]]  # files and directories below one: when each was changed, and its size


def seen(directory: Path) -> Seen:
    found: Seen = {}
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # a run is at work
            found[str(path.relative_to(directory))] = path.stat().st_mtime_ns, path.stat().st_size
    return found


def listed_in(run: Path) -> list[str]:
    """What the tracker names."""
    file = run / "checkpoints" / "latest"
    return file.read_text(encoding="utf-8").split() if file.exists() else []


def phase(run: Path, before: Seen, known: Sequence[str]) -> str:
    """In what a life was killed, judged by what it left. `before`, `known`: the run's files and its tracker as the life began."""
    after, tracked = seen(run), listed_in(run)
    fresh = {tuple(Path(name).parts[1:]) for name, what in after.items() if name.startswith("checkpoints/") and before.get(name) != what}
    drafts = [parts for parts in fresh if DRAFT.fullmatch(parts[0])]
    if drafts:
        files = {parts[-1] for parts in drafts if len(parts) > 1}
        return WHOLE if "manifest.json" in files else SHARDS if files else MADE
    if (".latest.tmp",) in fresh:
        return TRACKER
    if any(REMOVED.fullmatch(parts[0]) for parts in fresh):
        return REMOVAL
    whole = {parts[0] for parts in fresh if parts[-1] == "manifest.json"}
    if any(name not in tracked for name in whole):
        return RENAMED
    if any(name not in tracked and f"checkpoints/{name}" in after for name in known):
        return REMOVAL
    resumed = int(known[0].split("-")[1]) if known and known[0].startswith("step-") else 0
    return BETWEEN if before.get("metrics.jsonl") != after.get("metrics.jsonl") and steps_logged(run) > resumed else BEFORE


class Saves:
    """The saves of a run from now on, seen from outside."""

    def __init__(self, run: Path) -> None:
        self._directory = run / "checkpoints"
        self._old = self._drafts()

    def _drafts(self) -> dict[str, int]:
        found = {}
        with suppress(FileNotFoundError):  # the run's first save makes the directory, and a save renames its draft
            for entry in os.scandir(self._directory):
                if DRAFT.fullmatch(entry.name):
                    found[entry.name] = entry.stat().st_mtime_ns
        return found

    def draft(self) -> str | None:
        """One that was not there before."""
        return next((name for name, changed in self._drafts().items() if self._old.get(name) != changed), None)

    def await_draft(self, number: int, life: Forked) -> None:
        """Wait until the draft of save `number`, from 1, has appeared, or `life` has ended."""
        met: set[str | None] = {None}
        while len(met) <= number and not life.ended():
            met.add(self.draft())
            time.sleep(POLL / 4)


def watched(place: Place, job: Job) -> tuple[Path, float, float]:
    """An undisturbed run: its directory, the seconds to its first save, and those of a save, the median."""
    run = job.directory
    shutil.rmtree(run, ignore_errors=True)
    said = place.said(job)
    saves, firsts, lengths = Saves(run), list[float](), list[float]()
    life = place.nursery.start(job, said)
    began = time.perf_counter()
    while not life.ended():
        if (draft := saves.draft()) is not None:
            start, name = time.perf_counter(), draft[1 : -len(".tmp")]
            firsts.append(start - began)
            while name not in listed_in(run) and not life.ended():
                time.sleep(POLL)
            lengths.append(time.perf_counter() - start)
        time.sleep(POLL)
    if any(life.statuses()) or not lengths:
        raise MegamodError(f"an undisturbed run has failed, {life.statuses()}: {tail(said)}")
    return run, firsts[0], statistics.median(lengths)


def kills(place: Place, count: int, tp: int, pp: int) -> Report:
    """Run after run is killed until `count` kills were made; each must end as one that was not."""
    report, rng, say = Report(), place.rng, Progress("kills", count)
    steps = max(20, 2 * count)  # most kills are in a single run
    name = f"kills-{tp}x{pp}"
    reference, first, length = watched(place, place.job(f"{name}-reference", steps, *KEEP, tp=tp, pp=pp))
    print(f"kills · an undisturbed run: {steps} steps, {first:.2f} s to its first save, a save in {1000 * length:.0f} ms", flush=True)
    job = place.job(name, steps, *KEEP, tp=tp, pp=pp)
    run, said = job.directory, place.said(job)
    phases, whose, lives, runs, hung, done = Counter[str](), Counter[str](), 0, 0, 0, 0

    def finish(life: Forked) -> None:
        """The run's last life, and what the run has left."""
        nonlocal runs
        if not end(life, PATIENCE + steps) or any(life.statuses()):
            report.faults.append(f"kill {done}: the last life ended with {life.statuses()}: {tail(said)}")
        report.faults.extend(same_end(run, reference))
        runs += 1
        shutil.rmtree(run, ignore_errors=True)

    shutil.rmtree(run, ignore_errors=True)
    while done < count and len(report.faults) < 5:
        before, known, saves = seen(run), listed_in(run), Saves(run)
        said.unlink(missing_ok=True)
        life = place.nursery.start(job, said)
        lives += 1
        inside = sum(phases[kind] for kind in IN_SAVE)
        if inside < 0.45 * (done + 1):
            saves.await_draft(rng.choice((1, 1, 2)), life)  # a life that gets to its second save moves the run on
            time.sleep(rng.uniform(0, 1.2 * length))
        else:
            wait(life, rng.uniform(0, first + 2 * length))
        if life.ended():
            finish(life)
            continue
        rank = rng.randrange(job.ranks) if job.ranks > 1 and rng.random() < 0.25 else None
        life.kill(*([] if rank is None else [rank]))
        whose["one rank" if rank is not None else "all ranks"] += 1
        hung += not end(life, GRACE)
        phases[phase(run, before, known)] += 1
        done += 1
        say(done, f"{sum(phases[kind] for kind in IN_SAVE)} in a save · at step {steps_logged(run)} of {steps}")
    finish(place.nursery.start(job, said))
    inside = sum(phases[kind] for kind in IN_SAVE)
    report.facts = {
        "kills": done, "in a save": inside, "lives": lives + 1, "runs": runs, "steps of a run": steps, "tp": tp, "pp": pp,
        "of": dict(whose), "peers that waited and were killed": hung, "save ms": round(1000 * length),
        "phases": {kind: phases[kind] for kind in (BEFORE, BETWEEN, *IN_SAVE)},
    }  # fmt: skip
    report.claims = {
        f"{count} kills, and every run ends with the bits of an undisturbed one": done == count and not report.faults,
        "3 of 10 kills were inside a save": inside >= 0.3 * count,
    }
    return report


# ---- system calls


ACTS = (
    "write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range", "ftruncate", "fallocate", "rename", "renameat",
    "renameat2", "fsync", "fdatasync", "sync_file_range", "syncfs", "mkdir", "mkdirat", "openat", "open", "creat", "link", "linkat",
    "symlink", "symlinkat", "unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One system call of a save, and how strace is told which it is: the how-manieth of its name, among all or those on a path."""

    rank: int
    name: str
    number: int
    path: str  # that it is about
    only: str | None = None  # the path; None: among all

    def options(self) -> list[str]:
        """Of strace: SIGKILL as the call is entered."""
        place = [] if self.only is None else ["-P", self.only]
        return [*place, "-e", f"trace={self.name}", "-e", f"inject={self.name}:signal=SIGKILL:when={self.number}"]

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.name} of {Path(self.path).name}"


@contextmanager
def strace(pid: int, out: Path, options: Sequence[str]) -> Iterator[None]:
    """strace on a process and its threads, from now on; its lines go to `out`. Raises MegamodError where it cannot."""
    line = ["strace", "-f", "-y", "-s", "0", "-o", str(out), *options, "-p", str(pid)]
    tracer = subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    try:
        if "attached" not in (said := tracer.stderr.readline()):
            raise MegamodError(f"strace cannot attach to a process here: {said.strip()}")
        yield
    finally:
        tracer.terminate()  # it lets the process go; where that has ended it has, too
        tracer.communicate()


def await_stop(life: Forked, rank: int) -> bool:
    """Wait until the rank is stopped by a signal, or the life has ended. Returns whether it is stopped."""
    while not life.ended():
        if Path(f"/proc/{life.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(POLL)
    return False


def stopped_before_saving(place: Place, job: Job, said: Path, out: Path) -> Forked:
    """A life whose rank 0 was stopped as it began its first save; the others wait for it. Raises MegamodError where it never saves."""
    life = place.nursery.start(job, said, stopped=True)
    for rank in range(job.ranks):
        await_stop(life, rank)
    out.unlink(missing_ok=True)
    first = ["-P", str(job.directory / "checkpoints"), "-e", "trace=mkdir", "-e", "inject=mkdir:signal=SIGSTOP:when=1"]
    with strace(life.pids[0], out, first):
        for pid in life.pids:
            os.kill(pid, signal.SIGCONT)
        while not life.ended() and "stopped by SIGSTOP" not in out.read_text(errors="replace").partition("mkdir(")[2]:
            time.sleep(POLL)
    if not await_stop(life, 0):
        raise MegamodError(f"a run has ended without a save, {life.statuses()}: {tail(said)}")
    return life


def calls_of(trace: str, rank: int, directory: str) -> list[Call | str]:
    """What a rank did to the directory from there on: each call before which strace can put a kill; a line for one that it cannot name.

    strace counts by thread, and the first thread that comes to the number is killed in: so a call is told by its number among all of its
    name where no other thread has made as many before, and among those on its path where that name was made up for the one save.
    """
    found: list[Call | str] = []
    counts, most = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()  # by thread; of the thread that has made the most
    for line in trace.splitlines():
        match = re.match(r"(\d+)\s+(\w+)\(", line)
        if match is None:
            continue
        thread, name = match.groups()
        paths = [a or b for a, b in re.findall(r'<(/[^>]*)>|"(/[^"]*)"', line)]
        first = {}
        for key in ((name,), *((name, path) for path in set(paths))):
            counts[(thread, *key)] += 1
            first[key] = counts[(thread, *key)] > most[key]
            most[key] = max(most[key], counts[(thread, *key)])
        inside = [path for path in paths if path == directory or path.startswith(f"{directory}/")]
        if not inside or (name.startswith("open") and "O_CREAT" not in line):
            continue
        steady = [path for path in inside if first[name, path] and not Path(path).name.startswith(".tmp")]
        if first[name,]:
            found.append(Call(rank, name, counts[thread, name], inside[0]))
        elif steady:
            found.append(Call(rank, name, counts[thread, name, steady[0]], inside[0], steady[0]))
        else:
            found.append(f"rank {rank}, {name} of {Path(inside[0]).name}")
    return found


def syscalls(place: Place, count: int | None, tp: int, pp: int) -> Report:
    """A run with two checkpoints makes its third and removes its first: killed before each call of that, it goes on to the same end."""
    report = Report()
    if shutil.which("strace") is None:
        print("syscalls · skipped: strace is not installed", flush=True)
        return Report(facts={"skipped": "strace is not installed"})
    name = f"syscalls-{tp}x{pp}"
    start = place.undisturbed(place.job(f"{name}-start", 4, *KEEP, tp=tp, pp=pp))
    reference = place.undisturbed(place.job(f"{name}-reference", 6, *KEEP, tp=tp, pp=pp))
    job = place.job(name, 6, *KEEP, tp=tp, pp=pp)
    run, said, out = job.directory, place.said(job), place.work / "strace.txt"

    def traced(rank: int, options: Sequence[str]) -> tuple[bool, list[int | None]]:
        """Whether the life ended by itself, and how its ranks did."""
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(start, run)
        said.unlink(missing_ok=True)
        life = stopped_before_saving(place, job, said, out)
        with strace(life.pids[rank], out, options):
            os.kill(life.pids[0], signal.SIGCONT)
            by_itself = end(life, GRACE)
        return by_itself, life.statuses()

    found: list[Call | str] = []
    for rank in range(job.ranks):
        _, statuses = traced(rank, ["-e", f"trace={','.join(ACTS)}"])
        if any(statuses):
            raise MegamodError(f"a run under strace has failed, {statuses}: {tail(said)}")
        found += calls_of(out.read_text(encoding="utf-8", errors="replace"), rank, str(run / "checkpoints"))
    calls, unnamed = [call for call in found if isinstance(call, Call)], [call for call in found if isinstance(call, str)]
    kinds = Counter(call.name for call in calls)
    chosen = calls if count is None or count >= len(calls) else [calls[i * len(calls) // count] for i in range(count)]
    print(f"syscalls · a save, with the removal of an old one, makes {len(found)}: {dict(kinds)}", flush=True)
    say, missed, waited = Progress("syscalls", len(chosen)), list[str](), 0
    for done, call in enumerate(chosen, 1):
        by_itself, statuses = traced(call.rank, call.options())
        waited += not by_itself
        if statuses[call.rank] != -signal.SIGKILL:
            missed.append(f"{call}: ended with {statuses}")
        ended = place.run(job)
        if not ended.well:
            report.faults.append(f"{call}: the resumed run: {ended.how}: {tail(said)}")
        else:
            report.faults.extend(f"{call}: {line}" for line in same_end(run, reference))
        say(done, str(call))
    report.facts = {
        "calls": len(found), "kinds": dict(kinds), "killed before": len(chosen) - len(missed), "missed": missed, "not named": unnamed,
        "peers that waited and were killed": waited, "tp": tp, "pp": pp,
    }  # fmt: skip
    report.claims = {
        f"killed before {len(chosen)} of a save's {len(found)} system calls, a run ends with the bits of an undisturbed one": (
            not report.faults
        ),
        "each kill came where it was meant to": not missed and not unnamed,
    }
    return report


# ---- damage


NEWEST, PREVIOUS = "step-00000004", "step-00000002"
SILENT, HUNG, CRASHED, LOST = BAD = ("silent", "hung", "a traceback", "began again from nothing")
REFUSED, FELL_BACK, UNHARMED = "refused with one line", "fell back", "resumed as if nothing were"


@dataclass(frozen=True)
class Patients:
    """Runs that are damaged after step 4, with checkpoints of steps 2 and 4, and go on to step 5."""

    place: Place
    start: Path
    reference: Path
    job: Job

    @staticmethod
    def of(place: Place, name: str, tp: int) -> "Patients":
        start = place.undisturbed(place.job(f"{name}-start", 4, tp=tp))
        reference = place.undisturbed(place.job(f"{name}-reference", 5, tp=tp))
        return Patients(place, start, reference, place.job(name, 5, tp=tp))

    def fresh(self) -> Path:
        """The run's `checkpoints`, as they were."""
        run = self.job.directory
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.start, run)
        return run / "checkpoints"

    def resumed(self) -> tuple[str, str]:
        """How the damaged run ends, and a line about it."""
        ended = self.place.run(self.job)
        if ended.statuses is None:
            return HUNG, "it hung"
        if ended.refused:
            return REFUSED, next(line for line in ended.said.splitlines() if line.startswith("megamod: error: "))
        if not ended.well:
            return CRASHED, f"{ended.how}: {' / '.join(ended.said.splitlines()[-2:])}"
        if wrong := same_end(self.job.directory, self.reference):
            return SILENT, wrong[0]
        found = re.search(r"resumed after step (\d+)", ended.said)
        if found is None:
            return LOST, ""
        return (UNHARMED, "") if found[1] == "4" else (FELL_BACK, "")


def flips(place: Place, count: int) -> Report:
    """Single bits of the newest checkpoint: a third each in its manifest, in its shard's header and in its data."""
    report, say = Report(), Progress("flips", count)
    patients = Patients.of(place, "flips", 1)
    outcomes: dict[str, Counter[str]] = {part: Counter() for part in ("manifest", "header", "data")}
    for done in range(1, count + 1):
        newest_one = patients.fresh() / NEWEST
        part = list(outcomes)[done % 3]
        file = newest_one / "manifest.json" if part == "manifest" else place.rng.choice(sorted(newest_one.glob("*.safetensors")))
        low, high = {"manifest": (0, file.stat().st_size), "header": (0, header(file)), "data": (header(file), file.stat().st_size)}[part]
        bit = place.rng.randrange(8 * low, 8 * high)
        flip(file, bit)
        outcome, text = patients.resumed()
        outcomes[part][outcome] += 1
        if outcome in BAD:
            report.faults.append(f"{file.name}, bit {bit}: {outcome}: {text}")
        say(done, f"{len(report.faults)} not noticed")
    total = sum(outcomes.values(), Counter())
    report.facts = {"outcomes": {part: dict(found) for part, found in outcomes.items()}, "verification": verification(place.work)}
    report.claims = {
        f"0 of {count} flipped bits loaded silently": total[SILENT] == 0,
        "none hangs, ends in a traceback or begins again from nothing": not any(total[kind] for kind in BAD[1:]),
    }
    return report


def verification(work: Path, tensors: int = 16, numbers: int = 2**20, repeats: int = 3) -> dict[str, float]:
    """What the checksums cost when a checkpoint is read: seconds per GB, and as a share of reading it; the files are in memory then."""
    path = checkpoint.write(work / "verification", 1, {f"t{i}": torch.randn(numbers) for i in range(tensors)})
    files = sorted(path.glob("*.safetensors"))

    def verified() -> None:
        source = checkpoint.Masters(path)
        for name, shape in source.shapes().items():
            source.read(name, (0,) * len(shape), shape)

    def bare() -> None:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    if "|master|" in key:
                        torch.empty(numbers, dtype=torch.float64).copy_(opened.get_tensor(key))

    def seconds(act: Callable[[], None]) -> float:
        began = time.perf_counter()
        act()
        return time.perf_counter() - began

    bare()
    with_sums, without = (min(seconds(act) for _ in range(repeats)) for act in (verified, bare))
    shutil.rmtree(path.parent)
    cost, size = with_sums - without, 4 * numbers * tensors / 1e9
    return {"seconds per GB": round(cost / size, 3), "share of the load": round(cost / with_sums, 3)}


def corruptions(place: Place, count: int, tp: int) -> Report:
    """Every kind of damage in turn, to runs of `tp` ranks."""
    report, say = Report(), Progress("corruptions", count)
    patients = Patients.of(place, "corruptions", tp)
    outcomes: dict[str, Counter[str]] = {damage.__name__: Counter() for damage in WAYS}
    for done in range(1, count + 1):
        damage = WAYS[done % len(WAYS)]
        root = patients.fresh()
        what = damage(place.rng, root / NEWEST, root / PREVIOUS)
        outcome, text = patients.resumed()
        outcomes[damage.__name__][outcome] += 1
        if outcome in BAD:
            report.faults.append(f"{what}: {outcome}: {text}")
        say(done, f"{len(report.faults)} not as promised")
    total = sum(outcomes.values(), Counter())
    report.facts = {"outcomes": {kind: dict(found) for kind, found in outcomes.items()}, "total": dict(total), "tp": tp}
    report.claims = {
        f"{count} corruptions: each a one-line error, or the right bits from this checkpoint or the one before": not report.faults,
    }
    return report


# ---- disks


def digest(directory: Path) -> dict[str, int]:
    return {str(file.relative_to(directory)): zlib.crc32(file.read_bytes()) for file in sorted(directory.rglob("*")) if file.is_file()}


def call(*line: str) -> None:
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise MegamodError(f"{' '.join(line)}: {done.stderr.strip()}")


@contextmanager
def mounted(at: Path) -> Iterator[Path]:
    """A file system of 24 MB in memory."""
    at.mkdir()
    call("mount", "-t", "tmpfs", "-o", "size=24m", "none", str(at))
    try:
        yield at
    finally:
        call("umount", "--lazy", str(at))


def disk(place: Place) -> Report:
    """A run with a good checkpoint of step 4 meets a disk on which the next saves fail; with room again it goes on to the same end."""
    report, steps = Report(), 20
    reference = place.undisturbed(place.job("disk-reference", steps, *KEEP))
    size = sum(file.stat().st_size for file in (newest(reference) or reference).iterdir())
    outcomes: dict[str, str] = {}

    def tried(
        name: str, job: Job, fail: Callable[[], None], mend: Callable[[], None], *, after: int = 0, mends: bool = False, **how: Any
    ) -> None:
        """Fail once step `after` is logged; mend when the run has ended or, with `mends`, when it has said what is wrong."""
        run, said = job.directory, place.said(job)
        place.undisturbed(job.but("steps=4"))
        good = newest(run)
        assert good is not None
        before = digest(good)
        said.write_text("", encoding="utf-8")
        if not after:
            fail()
        life = place.nursery.start(job, said, **how)
        while after and steps_logged(run) < after and not life.ended():
            time.sleep(POLL)
        if after:
            fail()
        while mends and "No space left" not in said.read_text(encoding="utf-8") and not life.ended():
            time.sleep(POLL)
        if mends:
            mend()
        by_itself = end(life, PATIENCE)
        ended = Ended(life.statuses() if by_itself else None, said.read_text(encoding="utf-8", errors="replace"))
        wrong = []
        if good.name in listed_in(run) and digest(good) != before:
            wrong.append("the last good checkpoint is not as it was")
        if not ended.well and not ended.refused:
            wrong.append(f"it ended with {ended.how}: {tail(said)}")
        if ended.well and not mends and not after:
            wrong.append("it ended well, and its last save cannot have been")
        outcomes[name] = "went on" if ended.well else "stopped with one line" if ended.refused else ended.how
        if not mends:
            mend()
        if not ended.well:
            again = place.run(job)
            wrong += [] if again.well else [f"with room again: {again.how}: {tail(said)}"]
        wrong = wrong or same_end(run, reference)
        report.faults.extend(f"{name}: {line}" for line in wrong)
        print(f"disk · {name}: {outcomes[name]}{', and then the same bits' if not wrong else ''}", flush=True)

    job = place.job("disk-limit", steps, *KEEP)
    tried("files may not be longer than half a shard", job, lambda: None, lambda: None, limit=size // 2)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        print("disk · skipped, for root only: a full file system, a read-only one", flush=True)
        report.facts["skipped"] = "not root: no file system was mounted"
    else:
        with mounted(place.work / "small") as small:
            filler = small / "filler"

            def leave(room: int) -> None:
                free = os.statvfs(small)
                with filler.open("wb") as opened, suppress(OSError):
                    opened.write(bytes(max(0, free.f_bavail * free.f_frsize - room)))
                    opened.flush()

            def full(name: str, room: int, **how: Any) -> None:
                run = place.job(f"small/{name.replace(' ', '-')}", steps, *KEEP)
                tried(name, run, lambda: leave(room), filler.unlink, **how)
                shutil.rmtree(run.directory)

            full("a disk with room for half a checkpoint", size // 2)
            full("a disk that has room again while the run goes on", size // 2, mends=True)
            full("a disk that fills while the run goes on", 0, after=6)
            full("a disk without a free byte", 0)
            run = place.job("small/read-only", steps, *KEEP)
            mount = ("mount", "-o")
            tried("a read-only disk", run, lambda: call(*mount, "remount,ro", str(small)), lambda: call(*mount, "remount,rw", str(small)))
    report.facts |= {"outcomes": outcomes, "checkpoint bytes": size}
    report.claims = {
        "where a save fails a run goes on or stops with one line, its last good checkpoint stays, with room it ends with the same bits": (
            not report.faults
        )
    }
    return report


# ---- restarts


def restarts(place: Place, count: int) -> Report:
    """torchrun starts the ranks again after one was killed."""
    report, say, steps = Report(), Progress("restarts", count), 8
    said = place.work / "restarts.txt"

    def launched(job: Job, kill_after: int | None) -> str | None:
        """What is wrong with how it ended. `kill_after`: the step after which one rank is killed; 0: as they start."""
        shutil.rmtree(job.directory, ignore_errors=True)
        said.unlink(missing_ok=True)
        life = Launched(job, said, ENVIRONMENT, ("--max-restarts", "3"))
        if kill_after is not None:
            while not life.ended() and (steps_logged(job.directory) < kill_after or len(life.pids) < job.ranks):
                time.sleep(10 * POLL)
            time.sleep(place.rng.uniform(0, 0.2))
            with suppress(ProcessLookupError, IndexError):
                os.kill(place.rng.choice(life.pids), signal.SIGKILL)
        if not end(life, PATIENCE):
            return f"it hung: {tail(said)}"
        return f"exit status {life.statuses()[0]}: {tail(said)}" if any(life.statuses()) else None

    reference, job = place.job("restarts-reference", steps, tp=2), place.job("restarts", steps, tp=2)
    if wrong := launched(reference, None):
        raise MegamodError(f"an undisturbed run has failed: {wrong}")
    for done in range(1, count + 1):
        after = place.rng.randrange(steps)
        wrong = launched(job, after)
        report.faults.extend([f"killed after step {after}: {wrong}"] if wrong else same_end(job.directory, reference.directory))
        say(done, f"{done - len(report.faults)} ended as they should")
    report.facts = {"restarts": count}
    report.claims = {f"{count} of {count} runs whose rank was killed end with the bits of an undisturbed one": not report.faults}
    return report


# ---- the command


PARTS = ("kills", "syscalls", "flips", "corruptions", "disk", "restarts")


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument(
        "--count", type=int, help=f"of a single part; default: {', '.join(f'{n} {part}' for part, n in COUNTS.items() if n)}"
    )
    parser.add_argument("--tp", type=int, help="kills, syscalls, corruptions: tensor-parallel ranks; default: 2")
    parser.add_argument("--pp", type=int, help="kills, syscalls: pipeline stages, 1 or 2; default: 2 and 1")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn; default: %(default)s")
    parser.add_argument("--work", type=Path, help="a new directory that keeps the runs; default: a temporary one")
    args = parser.parse_args(argv)
    check(args)
    parts = args.parts or PARTS
    reports: dict[str, Report] = {}
    if args.work is not None:
        with expected("a new directory that can be made"):
            args.work.mkdir(parents=True)
    with nullcontext(str(args.work)) if args.work is not None else tempfile.TemporaryDirectory(prefix="megamod-") as made:
        work = Path(made).resolve()
        write_model(work)
        with Nursery(work) as nursery:
            for part in parts:
                began = time.perf_counter()
                place = Place(work, nursery, random.Random(f"{args.seed} {part}"))
                count, tp, pp = args.count or COUNTS.get(part), args.tp or 2, args.pp
                if part == "kills":
                    report = kills(place, count or 0, tp, pp or 2)
                elif part == "syscalls":
                    report = syscalls(place, count, tp, pp or 1)
                elif part == "flips":
                    report = flips(place, count or 0)
                elif part == "corruptions":
                    report = corruptions(place, count or 0, tp)
                elif part == "disk":
                    report = disk(place)
                else:
                    report = restarts(place, count or 0)
                report.facts["seconds"] = round(time.perf_counter() - began, 1)
                reports[part] = report
    for part, report in reports.items():
        print(f"\n{part}")
        for fault in report.faults[:20]:
            print(f"  not as it should be: {fault}")
        for name, value in report.facts.items():
            print(f"  {name}: {value}")
        for claim, holds in report.claims.items():
            print(f"  {'holds ' if holds else 'FAILS '} {claim}")
    holds = all(all(report.claims.values()) for report in reports.values())
    print(json.dumps({"holds": holds, "seed": args.seed, **{part: asdict(report) for part, report in reports.items()}}))
    return 0 if holds else 1


def check(args: argparse.Namespace) -> None:
    """Raises MegamodError for what no part would read."""
    if wrong := [part for part in args.parts if part not in PARTS]:
        raise MegamodError(f"{wrong[0]!r} is no part of this: choose from {', '.join(PARTS)}")
    readers = {"count": set(COUNTS), "tp": {"kills", "syscalls", "corruptions"}, "pp": {"kills", "syscalls"}}
    for option, parts in readers.items():
        value = getattr(args, option)
        if value is None:
            continue
        if value < 1:
            raise MegamodError(f"--{option} {value}: at least 1 was expected")
        if not set(args.parts or PARTS) <= parts or (option == "count" and len(args.parts) != 1):
            raise MegamodError(
                f"--{option} is read by {', '.join(sorted(parts))}{', one at a time' if option == 'count' else ''}: name that part"
            )


if __name__ == "__main__":
    sys.exit(main())
