"""The lives of a run: it is started, killed and started again, and what it leaves must be, to the bit, what an undisturbed run
leaves.

`Nursery` forks the ranks of a life from a process that has imported everything, so that a life costs a second and not fifteen; `Launched`
is torchrun, as a user calls it. What checkpoints hold is read here from their manifests and files alone: a judge that shares no code with
what it judges.
"""

import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import TCPStore

from megamod import config
from megamod.errors import MegamodError

POLL = 0.002  # seconds between two looks at what others do
SPEED = ("tokens_per_second", "step_seconds", "mfu", "memory_gib")  # of metrics.jsonl: the machine's, not the run's


@dataclass(frozen=True)
class Job:
    """A run as a user launches it: a config file, overrides, a number of ranks."""

    config: str
    overrides: tuple[str, ...] = ()
    ranks: int = 1

    def but(self, *overrides: str) -> "Job":
        """The same with further overrides; the later of two for the same key counts."""
        return replace(self, overrides=(*self.overrides, *overrides))

    @property
    def directory(self) -> Path:
        """The run's. Raises MegamodError for a config that is refused."""
        return Path(config.load(self.config, self.overrides).dir)


class Nursery:
    """Forks lives on the CPU from a process that has imported torch and megamod. `with Nursery(work) as nursery:`

    Args:
        work: a directory for what its process says.
    """

    def __init__(self, work: Path) -> None:
        self._said = work / "nursery.txt"
        self._is_asked = False
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megamod.lives"], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            )  # fmt: skip

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *error: object) -> None:
        """Ends with all that it has forked."""
        assert self._process.stdin is not None
        if not self._is_asked:  # it may still import, and has forked nothing
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def ask(self, question: Mapping[str, Any]) -> Any:
        """Its answer. Raises MegamodError where it has died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._is_asked, answer = True, ""
        with suppress(BrokenPipeError):
            print(json.dumps(question), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        if not answer:
            raise MegamodError(f"the process that forks the ranks has died: {self._said} has what it said")
        return json.loads(answer)

    def start(self, job: Job, said: Path, *, stopped: bool = False, limit: int | None = None) -> "Forked":
        """A life of `job`; what its ranks say is added to the file `said`.

        Args:
            stopped: each rank stops before it begins and waits for SIGCONT: a tracer has time to attach.
            limit: bytes that a file may have (RLIMIT_FSIZE).
        """
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=30))
        # The world's store is this process's, as torchrun's agent can have it: no port is guessed, and it outlives every rank.
        world = {
            "WORLD_SIZE": str(job.ranks), "LOCAL_WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        pids = []
        for rank in range(job.ranks):
            environment = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            task = {"argv": [job.config, *job.overrides], "environment": environment, "said": str(said), "stopped": stopped, "limit": limit}
            pids.append(self.ask({"fork": task}))
        return Forked(self, pids, store)


class Forked:
    """A life from a Nursery; `pids` are its ranks', in their order."""

    def __init__(self, nursery: Nursery, pids: list[int], store: TCPStore) -> None:
        self.pids = pids
        self._nursery, self._store = nursery, store
        self._statuses: dict[int, int] = {}

    def statuses(self) -> list[int | None]:
        """By rank: the exit status, minus the signal for one that was killed, None while it lives."""
        living = [pid for pid in self.pids if pid not in self._statuses]
        if living:
            self._statuses.update({int(pid): status for pid, status in self._nursery.ask({"poll": living}).items()})
        return [self._statuses.get(pid) for pid in self.pids]

    def ended(self) -> bool:
        """Whether no rank lives."""
        return None not in self.statuses()

    def kill(self, *ranks: int) -> None:
        """SIGKILL to these ranks; without any, to all."""
        for rank, pid in enumerate(self.pids):
            if pid not in self._statuses and (not ranks or rank in ranks):  # not reaped, so the number is still its own
                os.kill(pid, signal.SIGKILL)


class Launched:
    """A life of `job` under torchrun, as its user would launch it on one machine.

    Args:
        said: a file; what is said is added to it.
        environment: a shell script that is sourced first, such as launch/env.sh.
        options: further ones of torchrun.
    """

    def __init__(self, job: Job, said: Path, environment: Path, options: Sequence[str] = ()) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.ranks), *options]
        line = shlex.join([*torchrun, "-m", "megamod.train", job.config, *job.overrides])
        with said.open("a") as out:
            self._process = subprocess.Popen(
                ["bash", "-c", f"source {shlex.quote(str(environment))} && exec {line}"], stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )  # fmt: skip

    def statuses(self) -> list[int | None]:
        """torchrun's, as one; None while it lives."""
        return [self._process.poll()]

    def ended(self) -> bool:
        """Whether torchrun has ended."""
        return self._process.poll() is not None

    @property
    def pids(self) -> list[int]:
        """The ranks that live now, oldest first: torchrun's children."""
        return [pid for pid, parent in _parents().items() if parent == self._process.pid]

    def kill(self) -> None:
        """SIGKILL to torchrun and to all ranks."""
        ranks = self.pids  # they have sessions of their own, and would go on without it
        self._process.kill()
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def wait(life: Forked | Launched, seconds: float) -> bool:
    """Wait until `life` has ended, at most so long. Returns whether it has."""
    until = time.perf_counter() + seconds
    while not life.ended():
        if time.perf_counter() > until:
            return False
        time.sleep(POLL)
    return True


def end(life: Forked | Launched, seconds: float) -> bool:
    """Wait as `wait` does, then kill what still lives. Returns whether it had ended by itself."""
    by_itself = wait(life, seconds)
    if not by_itself:
        life.kill()
        wait(life, math.inf)
    return by_itself


# ---- what a run leaves


def newest(run: Path) -> Path | None:
    """The checkpoint that the tracker names first; None where there is none."""
    try:
        names = (run / "checkpoints" / "latest").read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return None
    return run / "checkpoints" / names[0] if names and names[0].startswith("step-") else None


def steps_logged(run: Path) -> int:
    """The last step in metrics.jsonl; 0 where none is."""
    return max(_metrics(run), default=0)


def checkpoints_differ(one: Path, other: Path) -> Iterator[str]:
    """What differs between two checkpoints, of whatever grids, a line for each tensor: every element of masters and moments, by bits.

    Reads one tensor of each at a time. An element that a checkpoint has not, or not once, differs too.
    """
    mine, theirs = _manifest(one), _manifest(other)
    for key in ("step", "updates"):
        if mine[key] != theirs[key]:
            yield f"{key}: {mine[key]} and {theirs[key]}"
    names = {(name, entry["kind"]) for manifest in (mine, theirs) for name, t in manifest["tensors"].items() for entry in t["pieces"]}
    for name, kind in sorted(names):
        a, b = (_whole(path, manifest, name, kind) for path, manifest in ((one, mine), (other, theirs)))
        if isinstance(a, str) or isinstance(b, str):
            if a != b or a.startswith("damaged"):  # type: ignore[union-attr]
                yield f"{name} {kind}: {a if isinstance(a, str) else 'whole'} and {b if isinstance(b, str) else 'whole'}"
        elif a.dtype is not b.dtype or a.shape != b.shape:
            yield f"{name} {kind}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        else:
            width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            wrong = (a.view(width) != b.view(width)).nonzero()  # bits: -0 is not 0, and a NaN can be the same
            if len(wrong):
                first = wrong[0].tolist()
                values = " and ".join(repr(x[tuple(first)].item()) for x in (a, b))
                yield f"{name} {kind}: {len(wrong):,} of {a.numel():,} elements, the first at {first}: {values}"


def metrics_differ(one: Path, other: Path) -> Iterator[str]:
    """What differs between two runs' metrics.jsonl, step by step, but for the speed: a line for each number."""
    mine, theirs = _metrics(one), _metrics(other)
    for step in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(step, {}), theirs.get(step, {})
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                yield f"step {step}: {name} {a.get(name)!r} and {b.get(name)!r}"


def tail(said: Path, lines: int = 5) -> str:
    """The end of what a life said, on one line."""
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    return " / ".join(text.splitlines()[-lines:])


def _metrics(run: Path) -> dict[int, dict[str, Any]]:
    """Step → its numbers; a line that is cut short is none."""
    file, found = run / "metrics.jsonl", dict[int, dict[str, Any]]()
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with suppress(ValueError):
            record = json.loads(line)
            found.setdefault(record.pop("step"), {}).update({name: x for name, x in record.items() if name not in SPEED})
    return found


def _manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def _whole(path: Path, manifest: Mapping[str, Any], name: str, kind: str) -> Tensor | str:
    """A tensor put together from its pieces; else what is wrong with it."""
    if name not in manifest["tensors"]:
        return "absent"
    shape = manifest["tensors"][name]["shape"]
    whole, times = None, torch.zeros(shape, dtype=torch.uint8)
    for entry in manifest["tensors"][name]["pieces"]:
        if entry["kind"] == kind:
            with safe_open(path / entry["file"], framework="pt") as file:
                part = file.get_tensor(entry["key"])
            whole = torch.empty(shape, dtype=part.dtype) if whole is None else whole
            box = tuple(slice(o, o + n) for o, n in zip(entry["offset"], entry["size"], strict=True))
            whole[box] = part.view(entry["size"])
            times[box] += 1
    if whole is None:
        return "absent"
    return whole if bool((times == 1).all()) else f"damaged ({int((times != 1).sum()):,} elements are not there once)"


def _parents() -> dict[int, int]:
    """Every process's parent, in the order of their numbers."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(sorted((int(pid), int(parent)) for pid, parent in (line.split() for line in lines)))


# ---- the nursery's process


def _serve() -> int:
    """Answers Nursery.ask's questions, one JSON a line, until there are no more; then ends what it has forked. Returns an exit status."""
    import megamod.train  # noqa: F401 - what every life needs

    living: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        answer: Any
        if "fork" in question:
            answer = os.fork()
            if answer == 0:
                _live(question["fork"])
            living.add(answer)
        else:
            answer = {
                pid: os.waitstatus_to_exitcode(status) for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in question["poll"]) if pid
            }
            living -= answer.keys()
        print(json.dumps(answer), flush=True)
    for pid in living:
        os.kill(pid, signal.SIGKILL)
    return 0


def _live(task: Mapping[str, Any]) -> NoReturn:
    """A rank's life, in the process that was forked for it."""
    from megamod.train import main

    said = os.open(task["said"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
        os.dup2(source, target)
    os.environ.update(task["environment"])
    if task["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["limit"], resource.RLIM_INFINITY))
    if task["stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    status = 1
    try:
        status = main(task["argv"])
    except BaseException:  # as the interpreter would say it
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)  # to take apart what was imported would take longer than the life


if __name__ == "__main__":
    sys.exit(_serve())
