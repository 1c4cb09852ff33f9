"""Conversion beside `cp` and beside the usual way, which collects the model and calls torch.save: times, private memory, the same bytes.

    python tools/bench_convert.py
    python tools/bench_convert.py --gigabytes 4 --rounds 5 --work /scratch/bench

A model of made-up bf16 weights, and one of half the size whose peak of private memory (RssAnon) must be the same. Each way is a process
of its own, by turns, on files that were just read into the page cache; its time begins when Python has imported what it needs, and ends
when the bytes are on disk (`cp` is also timed without that). Then both directions give the same bytes as they were, and a conversion
that is killed at random moments ends with the same bytes. Prints a table and, as the last line, one JSON object; exit status 1 if a
claim about bytes or memory fails.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from megamod.command import command
from megamod.errors import MegamodError
from megamod.model.shape import shape_of
from megamod.weights import mcore
from megamod.weights.table import hf_shapes

TOOLS = Path(__file__).parent
COLLECT = """
import sys, torch
from safetensors import safe_open
from pathlib import Path
out = open(sys.argv[2] + ".part", "wb")
tensors = {}
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(file, framework="pt") as opened:
        tensors |= {name: opened.get_tensor(name).clone() for name in opened.keys()}
torch.save(tensors, out)
out.flush()
__import__("os").fsync(out.fileno())
__import__("os").rename(out.name, sys.argv[2])
"""
ALLOWED = 64 << 20  # bytes of private memory beside twice the largest fused tensor


class Took(NamedTuple):
    """A process that has ended."""

    seconds: float
    private: int  # bytes of private memory at their most, less what it had once it had imported what it needs


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.4, help="of the larger model; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3, help="of a conversion in each direction")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a new directory on the disk to measure; default: a temporary one")
    args = parser.parse_args(argv)
    if args.work is not None and args.work.exists():
        raise MegamodError(f"{args.work}: exists; a new directory was expected")
    with tempfile.TemporaryDirectory(dir=args.work and args.work.parent) as temporary:
        work = Path(temporary)
        report = measure(work, args.gigabytes, args.rounds, args.jobs)
        report |= killed(work, args.kills, args.jobs, random.Random(args.seed))
    print(json.dumps(report))
    return 0 if report["same bytes"] and report["same bytes after kills"] and report["memory holds"] else 1


def measure(work: Path, gigabytes: float, rounds: int, jobs: int) -> dict[str, object]:
    """Every way, by turns; on the smaller model once, for its memory."""
    big, small = (make(work / name, size) for name, size in (("big", gigabytes), ("small", gigabytes / 2)))
    ways = ways_of(work, big, jobs)
    times: dict[str, list[Took]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, way in ways.items():
            shown(f"round {turn + 1} of {rounds}: {name}")
            times[name].append(way())
    again = {name: way() for name, way in ways_of(work, small, jobs, "small").items() if "→" in name}
    seconds = {name: statistics.median(took.seconds for took in turns) for name, turns in times.items()}
    private = {name: max(took.private for took in turns) for name, turns in times.items()}
    shape = shape_of(json.loads((big / "config.json").read_text(encoding="utf-8")))
    fused = 2 * mcore.largest(shape)
    total = sum(file.stat().st_size for file in big.glob("*.safetensors"))
    table = Table(title=f"{total / 1e9:.2f} GB, largest fused tensor {fused / 1e6:.0f} MB, medians of {rounds}, {jobs} jobs")
    for column in ("way", "s", "GB/s", "× cp", "× cp, synced", "× collect", "private, MB", "of half the model, MB"):
        table.add_column(column, justify="right")
    for name, one in seconds.items():
        ratios = (seconds[other] / one for other in ("cp", "cp, synced", "collect, torch.save"))
        memory = f"{again[name].private / 1e6:.0f}" if name in again else ""
        table.add_row(
            name, f"{one:.2f}", f"{total / one / 1e9:.2f}", *(f"{ratio:.2f}" for ratio in ratios), f"{private[name] / 1e6:.0f}", memory
        )
    Console(width=140).print(table)
    held = all(private[name] <= 2 * fused + ALLOWED and private[name] - took.private < ALLOWED // 4 for name, took in again.items())
    return {
        "gigabytes": total / 1e9, "jobs": jobs, "seconds": seconds, "private": private, "fused": fused,
        "half": {name: took.private for name, took in again.items()}, "memory holds": held, "same bytes": same(big, work / "hf"),
    }  # fmt: skip


def ways_of(work: Path, model: Path, jobs: int, name: str = "") -> dict[str, Callable[[], Took]]:
    """What is compared, by name. The third direction is the second's inverse, and reads what that has written."""
    copy, pt, middle, back, bare, bare_back = (work / f"{kind}{name}" for kind in ("copy", "pt", "mcore", "hf", "bare", "bare-hf"))
    copied = 'cp -r "$0" "$1" && sync "$1"/*'
    python = [sys.executable, "-c", COLLECT]
    ways: dict[str, tuple[Path, Path, Sequence[str]]] = {
        "cp": (model, copy, ["cp", "-r", str(model), str(copy)]),
        "cp, synced": (model, copy, ["sh", "-c", copied, str(model), str(copy)]),
        "collect, torch.save": (model, pt, [*python, str(model), str(pt)]),
        "cp, synced, sha256sum": (model, copy, ["sh", "-c", f'{copied}; cd "$1" && sha256sum * > SHA256SUMS', str(model), str(copy)]),
        "HF → Megatron": (model, middle, tool("hf_to_mcore", model, middle, jobs)),
        "Megatron → HF": (middle, back, tool("mcore_to_hf", middle, back, jobs)),
        "HF → Megatron, no sums": (model, bare, [*tool("hf_to_mcore", model, bare, jobs), "--no-sums"]),
        "Megatron → HF, no sums": (bare, bare_back, [*tool("mcore_to_hf", bare, bare_back, jobs), "--no-sums"]),
    }
    return {way: partial(run, words, source, out, keep=out in (middle, back, bare)) for way, (source, out, words) in ways.items()}


def tool(name: str, source: Path, out: Path, jobs: int) -> list[str]:
    """The command, as a user gives it."""
    return [sys.executable, str(TOOLS / f"{name}.py"), str(source), str(out), "--jobs", str(jobs), "--shard-bytes", "3e8"]


def run(words: Sequence[str], source: Path, out: Path, keep: bool) -> Took:
    """A process, from where it begins to write until what it writes has its name.

    Args:
        source: what it reads, which is in the page cache then.
        keep: whether `out`, which is removed before it, stays: what is not needed would take the source's place there.
    """
    remove(out)
    os.sync()
    for file in sorted(source.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass
    begun, most, first, ended = time.perf_counter(), 0, None, None
    drafts = (out.with_name(f".{out.name}.tmp"), out.with_name(f"{out.name}.part"))
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            now = anonymous(process.pid)
            most = max(most, now)
            if first is None and any(path.exists() for path in drafts):  # what it imports is there: its work begins
                begun, first = time.perf_counter(), now
            elif first is not None and ended is None and out.exists():  # and ends: the interpreter is still to end
                ended = time.perf_counter()
            time.sleep(0.002)
        took = (ended or time.perf_counter()) - begun
        said = process.stderr.read() if process.stderr is not None else ""
    if process.returncode:
        raise MegamodError(f"{' '.join(words[:3])}: ended with {process.returncode}: {said.strip()[-300:]}")
    if not keep:
        remove(out)
    return Took(took, most - (first or 0))


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def anonymous(pid: int) -> int:
    """Bytes of a process's private memory now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def killed(work: Path, kills: int, jobs: int, draw: random.Random) -> dict[str, object]:
    """Both directions, each killed at random moments and started again, end with the bytes of what was left alone."""
    counts = {}
    alike = True
    for name, source, whole in (("hf_to_mcore", work / "big", work / "mcore"), ("mcore_to_hf", work / "mcore", work / "hf")):
        out = work / "again"
        shutil.rmtree(out, ignore_errors=True)
        done = 0
        for _ in range(kills):
            shown(f"killed: {name}, {done} so far")
            with subprocess.Popen(tool(name, source, out, jobs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                while process.poll() is None and not any(out.parent.glob(f".{out.name}.tmp")):
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 2))
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    done += 1
            if out.exists():
                break
        if not out.exists():
            subprocess.run(tool(name, source, out, jobs), check=True, stdout=subprocess.DEVNULL)
        counts[name], alike = done, alike and same(whole, out)
    return {"kills": counts, "same bytes after kills": alike}


def same(a: Path, b: Path) -> bool:
    """Whether two directories hold the same weights: tensors, or whole files where both are of one kind of layout."""
    if any(b.rglob("*.distcp")):
        names = sorted(file.relative_to(a) for file in a.rglob("*") if file.is_file())
        return names == sorted(file.relative_to(b) for file in b.rglob("*") if file.is_file()) and all(
            subprocess.run(["cmp", "-s", str(a / name), str(b / name)], check=False).returncode == 0 for name in names
        )
    from megamod.weights.load import Safetensors

    one, other = Safetensors(a), Safetensors(b)
    return one.shapes() == other.shapes() and all(
        torch.equal(*(source.read(name, (0,) * len(size), size).view(torch.int16) for source in (one, other)))
        for name, size in one.shapes().items()
    )


def make(directory: Path, gigabytes: float) -> Path:
    """A Qwen2-like model of about that size in bf16, in files of about a gigabyte."""
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632,
        "num_attention_heads": 16, "num_key_value_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "bfloat16",
    }  # fmt: skip
    one = shape_of(config).parameters()
    layer = shape_of({**config, "num_hidden_layers": 2}).parameters() - one
    config["num_hidden_layers"] = max(1, round((gigabytes * 1e9 / 2 - (one - layer)) / layer))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(1)
    shapes, where, shard, number = hf_shapes(shape_of(config)), dict[str, str](), dict[str, torch.Tensor](), 0
    for i, (name, size) in enumerate(shapes.items(), 1):
        shard[name] = torch.empty(size, dtype=torch.bfloat16).normal_(generator=generator)
        if i == len(shapes) or sum(tensor.nbytes for tensor in shard.values()) > 1e9:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, directory / file)
            where |= dict.fromkeys(shard, file)
            shard = {}
            shown(f"making {directory.name}: {i} of {len(shapes)} tensors")
    index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes.values()))}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def shown(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
