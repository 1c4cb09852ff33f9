"""The launchers: what they hand on, who gets the signals, when a job comes back in the queue."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def stub(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A Slurm that runs what it is given here, from a daemon that knows no trap of the job, and a torchrun that says what it got."""
    stub(tmp_path, "srun", 'exec env --default-signal "$@"')
    stub(tmp_path, "scontrol", f'[ "$1" = show ] && seq -f node%g 20000 || echo "$@" >> {tmp_path}/scontrol.log')
    stub(tmp_path, "torchrun", f'printf "%s\\n" "$@" > {tmp_path}/torchrun.log; kill -USR1 $$; eval "$RUN"')
    return tmp_path


def sbatch(cluster: Path, run: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/slurm.sbatch in a job; its torchrun does `run`."""
    job = {"SLURM_SUBMIT_DIR": str(cluster / "root"), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    if not (cluster / "root").exists():
        (cluster / "root").mkdir()
        (cluster / "root" / "launch").symlink_to(ROOT / "launch")
    env = {**os.environ, **job, "PATH": f"{cluster}:{os.environ['PATH']}", "RUN": run, **environment}
    return subprocess.run(["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments], env=env, capture_output=True, text=True, check=False)


MAKES_THE_FILE = 'for a in "$@"; do case $a in checkpoint.requeue_file=*) touch "${a#*=}" ;; esac; done'


def test_a_run_that_ended_early_comes_back(cluster: Path) -> None:
    done = sbatch(cluster, MAKES_THE_FILE, "configs/x.py", "optim.lr=3e-6")
    assert done.returncode == 0, done.stderr
    assert (cluster / "scontrol.log").read_text() == "requeue 7\n"
    assert not list((cluster / "root").glob(".again*")), "it asks once"
    given = (cluster / "torchrun.log").read_text().splitlines()
    assert given[given.index("megamod.train") + 1 :] == [
        "configs/x.py",
        "optim.lr=3e-6",
        f"checkpoint.requeue_file={cluster}/root/.again-7",
    ]
    assert given[given.index("--rdzv-endpoint") + 1] == "node1:29500"
    assert given[given.index("--max-restarts") + 1] == "3"


def test_the_run_is_told_when_its_job_ends(cluster: Path) -> None:
    sbatch(cluster, "true", "configs/x.py", SLURM_JOB_END_TIME="2000000600")
    assert "checkpoint.stop_at=2000000000" in (cluster / "torchrun.log").read_text().splitlines()


def test_a_run_that_is_done_does_not(cluster: Path) -> None:
    assert sbatch(cluster, "true", "configs/x.py").returncode == 0
    assert not (cluster / "scontrol.log").exists()


def test_a_run_that_failed_does_not(cluster: Path) -> None:
    (cluster / "root").mkdir()
    (cluster / "root" / "launch").symlink_to(ROOT / "launch")
    (cluster / "root" / ".again-7").touch()  # left by an earlier life
    assert sbatch(cluster, "exit 3", "configs/x.py").returncode == 3
    assert not (cluster / "scontrol.log").exists()


def family(process: int) -> list[int]:
    """A process, its children and theirs: whom Slurm signals in a job's step, whatever sessions they are in."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(one for child in children for one in family(int(child)))]


def test_a_signal_to_everyone_reaches_the_ranks_and_spares_the_launcher(tmp_path: Path) -> None:
    """As Slurm's --signal: bash, torchrun and the rank all get it, and the run ends saved, exit status 0."""
    small = ["data.row_length=64", "data.rows_per_step=1", "data.train.documents=8", "log.tensorboard=false", "log.every=1", "steps=400"]
    command = ["bash", str(ROOT / "launch" / "node.sh"), str(ROOT / "configs" / "tiny.py"), f"dir={tmp_path / 'run'}", *small]
    run = subprocess.Popen(command, env={**os.environ, "NPROC": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout is not None
    said = []
    for line in run.stdout:
        said.append(line)
        if line.startswith("step 2/"):
            for process in family(run.pid):
                os.kill(process, signal.SIGUSR1)
    assert run.wait() == 0, "".join(said)
    assert any(line.startswith("stopped after step ") and "SIGUSR1" in line for line in said), "".join(said[-5:])
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
