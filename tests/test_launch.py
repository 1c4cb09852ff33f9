"""The launchers: what they hand on, who gets the signals, when a job comes back in the queue, which nodes it takes."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def stub(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A Slurm that runs what it is given here, from a daemon that knows no trap of the job, and a torchrun that says what it got."""
    stub(tmp_path, "srun", SRUN.format(log=tmp_path / "srun.log"))
    stub(tmp_path, "scontrol", f'[ "$1" = show ] && seq -f node%g ${{NODES:-20000}} || echo "$@" >> {tmp_path}/scontrol.log')
    stub(tmp_path, "torchrun", f'printf "%s\\n" "$@" > {tmp_path}/torchrun.log; kill -USR1 $$; eval "$RUN"')
    stub(tmp_path, "nvidia-smi", NVIDIA_SMI)
    stub(tmp_path, "journalctl", 'echo "${KERNEL:-}"')
    return tmp_path


# Of the options it keeps a record; nodes 1 and 2 say how they are.
SRUN = """
[ -z "${{SRUN_FAILS:-}}" ] || exit 1
echo "$@" >> {log}
while [ "$1" != bash ]; do shift; done
case "$*" in
*health.sh*) status=0; for n in node1 node2; do SLURMD_NODENAME=$n "$@" || status=1; done; exit "$status" ;;
esac
SLURMD_NODENAME=node1 exec env --default-signal "$@"
"""
# Eight GPUs that are fit; what differs on a node is in the variable of its name: a GPU's line, a number that it has not, a remapped row.
NVIDIA_SMI = """
name=${SLURMD_NODENAME:-node1}; own=${!name:-}
case "$*:$own" in *:fails) echo "Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error"; exit 15 ;; esac
for i in 0 1 2 3 4 5 6 7; do
    case "$*" in
    *query-remapped-rows*) [ "$own" = "row $i" ] && echo "0000:$i, 1, 0" || echo "0000:$i, 0, 0" ;;
    *) case "$own" in "$i, "*) echo "$own" ;; "lost $i") ;; *) echo "$i, 3, 0" ;; esac ;;
    esac
done
"""


def sbatch(cluster: Path, run: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/slurm.sbatch in a job; its torchrun does `run`."""
    job = {"SLURM_SUBMIT_DIR": str(cluster / "root"), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    if not (cluster / "root").exists():
        (cluster / "root").mkdir()
        (cluster / "root" / "launch").symlink_to(ROOT / "launch")
    job |= {"MIN_DISK_GIB": "0", "MIN_MEMORY": "0", "SYS": str(cluster)}  # this machine's are not what is tested
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
    assert given[: given.index("--nnodes")] == ["--log-dir", "runs/logs/7/node1", "--tee", "3"]


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


def started_on(cluster: Path) -> list[str]:
    """The options with which the run itself was started."""
    return next(line for line in (cluster / "srun.log").read_text().splitlines() if "torchrun" in line).split()[:6]


def test_nodes_that_are_not_fit_are_left_out(cluster: Path) -> None:
    done = sbatch(cluster, "true", "configs/x.py", SPARES="1", SLURM_NNODES="3", node1="lost 3")
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["megamod: node1 is not fit: 7 of 8 GPUs"]
    assert started_on(cluster) == ["--nodes", "2", "--ntasks", "2", "--nodelist", "node2,node3"]
    given = (cluster / "torchrun.log").read_text().splitlines()
    assert [given[given.index(option) + 1] for option in ("--nnodes", "--rdzv-endpoint")] == ["2", "node2:29500"]


def test_spares_that_are_not_needed_rest(cluster: Path) -> None:
    assert sbatch(cluster, "true", "configs/x.py", SPARES="1", SLURM_NNODES="3").returncode == 0
    assert started_on(cluster)[-1] == "node1,node2"


def test_without_spares_the_job_ends_and_says_whom_to_exclude(cluster: Path) -> None:
    done = sbatch(cluster, "true", "configs/x.py", NODES="2", node2="5, 79000, 4")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "megamod: node2 is not fit: GPU 5: 79000 MiB are in use before the run",
        "megamod: node2 is not fit: GPU 5: 4 uncorrected ECC errors since its driver was loaded",
        "megamod: error: 1 of 2 nodes are fit, and 2 are needed: sbatch --exclude=node2 …, or with spares",
    ]
    assert not (cluster / "torchrun.log").exists()
    assert sbatch(cluster, "true", "configs/x.py", NODES="2", node2="lost 1", HEALTH="0").returncode == 0


def test_a_slurm_that_cannot_ask_is_an_error(cluster: Path) -> None:
    done = sbatch(cluster, "true", "configs/x.py", SRUN_FAILS="1")
    assert (done.returncode, done.stderr) == (
        1,
        "megamod: error: srun could not ask the nodes how they are; HEALTH=0 goes on without\n",
    )


def adapter(sys: Path, name: str, *states: str) -> None:
    """An InfiniBand adapter with these ports."""
    for number, state in enumerate(states, 1):
        port = sys / "class" / "infiniband" / name / "ports" / str(number)
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")


def health(cluster: Path, **environment: str) -> tuple[int, list[str]]:
    """The exit status of launch/health.sh on node1, and its lines."""
    own = {"SLURMD_NODENAME": "node1", "GPUS": "8", "SYS": str(cluster / "sys"), "CUDA_VISIBLE_DEVICES": "", "MIN_DISK_GIB": "0"}
    (cluster / "meminfo").write_text("MemTotal:  2000 kB\nMemFree:  10 kB\nMemAvailable:  1500 kB\n")
    own["PROC"] = str(cluster)
    env = {**os.environ, **own, "PATH": f"{cluster}:{os.environ['PATH']}", **environment}
    command = ["bash", str(ROOT / "launch" / "health.sh"), str(cluster / "not" / "yet")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("environment", "wrong"),
    [
        ({"node1": "fails"}, "nvidia-smi: Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error"),
        ({"node1": "lost 0"}, "7 of 8 GPUs"),
        ({"GPUS": "9"}, "8 of 9 GPUs"),
        ({"node1": "2, 5000, [N/A]"}, "GPU 2: 5000 MiB are in use before the run"),
        ({"node1": "2, 10, 1"}, "GPU 2: 1 uncorrected ECC errors since its driver was loaded"),
        ({"node1": "row 6"}, "GPU 0000:6: a row of its memory waits to be remapped: it needs a reset"),
        (
            {"KERNEL": "NVRM: Xid (PCI:0000:3b:00): 79, pid=7, GPU has fallen off the bus."},
            "the kernel's log has Xid (PCI:0000:3b:00): 79",
        ),
        ({"MIN_MEMORY": "80"}, "75 % of its memory are available, 80 were expected"),
        ({"NOW": "1000000"}, "its clock is off by "),
        ({"MIN_DISK_GIB": "9999999"}, "GiB are free, 9999999 were expected"),
        ({"NCCL_IB_HCA": "mlx5_1,mlx5_2:1"}, "mlx5_2: none of its ports is active: 1: DOWN; NCCL_IB_HCA says which are meant"),
        ({"NCCL_IB_HCA": "^=mlx5_1"}, "mlx5_2: none of its ports is active"),
    ],
)
def test_what_is_wrong_with_a_node(cluster: Path, environment: dict[str, str], wrong: str) -> None:
    adapter(cluster / "sys", "mlx5_1", "4: ACTIVE", "1: DOWN")
    adapter(cluster / "sys", "mlx5_2", "1: DOWN")
    status, lines = health(cluster, **{"NCCL_IB_HCA": "=mlx5_1", **environment})
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith("node1: ")
    assert wrong in lines[0]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"node1": "2, 5000, 0", "MAX_GPU_MIB": "6000"},
        {"KERNEL": "NVRM: Xid (PCI:0000:3b:00): 13, pid=7, Graphics Exception"},  # a kernel of somebody's that was wrong
        {"NCCL_IB_HCA": "^mlx5_2"},
        {"node1": "fails", "GPUS": "0"},
    ],
    ids=str,
)
def test_what_is_not_wrong_with_a_node(cluster: Path, environment: dict[str, str]) -> None:
    adapter(cluster / "sys", "mlx5_1", "4: ACTIVE")
    adapter(cluster / "sys", "mlx5_2", "1: DOWN")
    now = str(int(time.time()))
    assert health(cluster, **{"NCCL_IB_HCA": "mlx5_1", "NOW": now, **environment}) == (0, [])


def test_a_node_of_ones_own_is_looked_at(cluster: Path) -> None:
    env = {
        **os.environ,
        "PATH": f"{cluster}:{os.environ['PATH']}",
        "NPROC": "8",
        "MIN_DISK_GIB": "0",
        "MIN_MEMORY": "0",
        "RUN": "true",
        "SYS": str(cluster),
    }
    env |= {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURMD_NODENAME": "node1"}
    command = ["bash", str(ROOT / "launch" / "node.sh"), "configs/x.py"]
    done = subprocess.run(command, env={**env, "node1": "lost 3"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "megamod: error: node1: 7 of 8 GPUs; HEALTH=0 goes on all the same\n")


def family(process: int) -> list[int]:
    """A process, its children and theirs: whom Slurm signals in a job's step, whatever sessions they are in."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(one for child in children for one in family(int(child)))]


def test_a_signal_to_everyone_reaches_the_ranks_and_spares_the_launcher(tmp_path: Path) -> None:
    """As Slurm's --signal: bash, torchrun and the rank all get it, and the run ends saved, exit status 0; what the rank said is kept."""
    small = ["data.row_length=64", "data.rows_per_step=1", "data.train.documents=8", "log.tensorboard=false", "log.every=1", "steps=400"]
    command = ["bash", str(ROOT / "launch" / "node.sh"), str(ROOT / "configs" / "tiny.py"), f"dir={tmp_path / 'run'}", *small]
    run = subprocess.Popen(
        command,
        env={**os.environ, "NPROC": "1", "LOGS": str(tmp_path / "logs")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout is not None
    said = []
    for line in run.stdout:
        said.append(line)
        if line.startswith("[0] step 2/"):
            for process in family(run.pid):
                os.kill(process, signal.SIGUSR1)
    assert run.wait() == 0, "".join(said)
    assert any(line.startswith("[0] stopped after step ") and "SIGUSR1" in line for line in said), "".join(said[-5:])
    (log,) = (tmp_path / "logs").glob("*/attempt_0/0/stdout.log")
    assert "stopped after step" in log.read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
