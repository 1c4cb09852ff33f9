"""Time the kernels beside what else does their work, in one run on one GPU, or on a CPU what has a path for it.

python kernels/bench.py packing                 beside the plain torch references and torch.compile's of these
python kernels/bench.py lora                    beside peft's operations, and beside the frozen linear without adapters
python kernels/bench.py nf4                     beside bitsandbytes, if it is installed, and the references
python kernels/bench.py rmsnorm                 beside Liger's, if it is installed, the references and torch.compile's; so is swiglu
python kernels/bench.py swiglu                  each way by itself: what a name calls backward is the backward alone
python kernels/bench.py nf4 --device cpu        the CPU's own path beside bitsandbytes', with one thread and with all of torch's
python kernels/bench.py lora --device cpu       a rehearsal of this program: tiny shapes, the references only, no kernel

It prints a table, and as the last line one JSON object. Before a case is timed its results are compared with the reference's. The
candidates then take turns, so that clocks and heat are the same for all; between two runs the GPU's cache is overwritten. Times are
medians of CUDA events. `% of copy` is against what a large `copy_` reached in the same run, as fast as memory moves; bytes are those
that must be read and written, whoever moves more.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

sys.path.insert(0, str(Path(__file__).parent))  # also where PYTHONSAFEPATH keeps a script's folder off the path

from megamod_kernels import cases, lora, nf4, packing, rmsnorm, swiglu
from megamod_kernels.cases import Nf4Case
from megamod_kernels.lora import Dropout, Part
from megamod_kernels.nf4 import Absmax, Lines, Shard

WARM_UP, ROUNDS = 10, 50
CPU_ROUNDS = 5
COPY_BYTES = 1 << 30
CACHE_BYTES = 256 << 20  # more than any GPU's L2
WIDTH = 64  # of a case's name in the table
TOLERANCE = 2**-6  # of the largest number: two roundings of bf16 apart


Op = Callable[..., Any]  # a public function of megamod_kernels, its reference, or that one compiled


@dataclass(frozen=True)
class Task:
    """One line of the table: what is done with an operation, and the two that do it."""

    name: str
    moved: int  # bytes that must be read and written
    run: Callable[[Op], Tensor | Sequence[Tensor]]
    kernel: Op
    reference: Op  # it leaves its inputs as they are, and runs first
    others: Mapping[str, Op] | None = None  # the two that are timed beside the kernel, if not the reference and that one compiled
    operations: int = 0  # multiplications and additions
    exact: bool = False  # bit for bit
    numbers: int = 0  # that it makes of others, for those a second


def packing_tasks(device: torch.device, dtype: torch.dtype, bench: bool) -> Iterator[Task]:
    for rope in (case for case in cases.ROPE if case.bench == bench and case.tokens):
        q, k = (torch.randn(rope.tokens, n, rope.dim, device=device).to(dtype) for n in (rope.heads, rope.kv_heads))
        angles = torch.rand(rope.tokens, rope.dim // 2, device=device) * 6.3
        inputs = q, k, angles.cos(), angles.sin()
        moved = 2 * rope.numbers * dtype.itemsize + 2 * 4 * angles.numel()
        # In place, again and again: a rotation keeps lengths, so the numbers stay what they are like.
        yield Task(f"rope {rope.name}", moved, forward(*inputs), packing.rope, packing.rope_ref)
        # Leaves are given here, which cannot be turned in place.
        kernel = partial(packing.rope, inplace=False)
        yield Task(f"rope and backward {rope.name}", 2 * moved, forward_and_backward(*inputs), kernel, packing.rope_ref)
    for pad in (case for case in cases.PAD if case.bench == bench and case.tokens):
        x = torch.randn(pad.tokens, *pad.width, device=device).to(dtype)
        borders = torch.tensor(pad.borders, dtype=torch.int32, device=device)
        padded = packing.pad_ref(x, borders, pad.longest)
        read, written = (t.numel() * t.element_size() for t in (x, padded))
        yield Task(f"pad {pad.name}", read + written, forward(x, borders, pad.longest), packing.pad, packing.pad_ref)
        yield Task(f"unpad {pad.name}", 2 * read, forward(padded, borders, pad.tokens), packing.unpad, packing.unpad_ref)


def forward(*args: Any) -> Callable[[Op], Tensor | Sequence[Tensor]]:
    return lambda op: op(*args)


def forward_and_backward(*args: Tensor) -> Callable[[Op], Sequence[Tensor]]:
    """For an operation with two results, of the shapes of its first two arguments."""
    leaves, rest = [x.clone().requires_grad_() for x in args[:2]], args[2:]
    grads = [torch.randn_like(x) for x in leaves]

    def run(op: Op) -> Sequence[Tensor]:
        out = op(*leaves, *rest)
        return *(x.detach() for x in out), *torch.autograd.grad(out, leaves, grads)

    return run


def lora_tasks(device: torch.device, dtype: torch.dtype, bench: bool) -> Iterator[Task]:
    for case in (case for case in cases.LORA if case.bench == bench and case.stacked and case.tokens):

        def random(*size: int, scale: float) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype) * scale

        x = random(case.tokens, case.channels, scale=1)
        weight = random(case.features, case.channels, scale=case.channels**-0.5)
        bias = random(case.features, scale=1) if case.label.startswith("qkv") else None
        parts = [
            Part(random(rank, case.channels, scale=case.channels**-0.5), random(features, rank, scale=rank**-0.5), row, scale)
            for row, features, rank, scale in case.parts
        ]
        for leaf in leaves_of(x, parts):
            leaf.requires_grad_()
        dy = random(case.tokens, case.features, scale=1)
        numbers = case.channels * (case.tokens + case.features) + case.tokens * case.features  # x, W, y; or dx, W, dy; x again for dA
        for p in (0.0, 0.05):
            run = partial(adapted, x, weight, bias, parts, Dropout(p, seed=1) if p else None)
            name = f"{case.name} dropout {p}" if p else case.name
            ops = lora.lora_linear, lora.lora_linear_ref, {"peft": as_peft, "frozen": frozen}
            yield Task(name, numbers * dtype.itemsize, partial(run, None), *ops, operations=case.frozen + case.adapters)
            moved, operations = (2 * numbers + x.numel()) * dtype.itemsize, 2 * case.frozen + 3 * case.adapters
            yield Task(f"{name} and backward", moved, partial(run, dy), *ops, operations=operations)


def leaves_of(x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    return [x, *(t for part in parts for t in (part.a, part.b))]


def adapted(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], dropout: Dropout | None, dy: Tensor | None, op: Op
) -> Sequence[Tensor]:
    """y of a linear with adapters, in one tensor or several side by side; and with dy its gradients."""
    y = op(x, weight, bias, parts, dropout)
    ys = [y] if isinstance(y, Tensor) else y
    if dy is None:
        return [y.detach() for y in ys]
    grads = torch.autograd.grad(ys, leaves_of(x, parts), dy.split([y.shape[1] for y in ys], 1), allow_unused=True)
    return [*(y.detach() for y in ys), *(g for g in grads if g is not None)]


def as_peft(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], dropout: Dropout | None) -> list[Tensor]:
    """peft's operations; with it a model's q, k and v, its gate and up, are linears of their own. The mask is torch's."""
    ys = []
    for a, b, row, scale in parts:
        rows = slice(row, row + len(b))
        result = F.linear(x, weight[rows], None if bias is None else bias[rows])
        dropped = x if dropout is None else F.dropout(x, dropout.p)
        ys.append(result + F.linear(F.linear(dropped, a), b) * scale)
    return ys


def frozen(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], dropout: Dropout | None) -> Tensor:
    return F.linear(x, weight, bias)


def nf4_tasks(device: torch.device, dtype: torch.dtype, bench: bool) -> Iterator[Task]:
    """A CPU has two of the cases: a whole matrix, and a shard that is cut inside blocks. There the 8-bit absmax is timed too.

    For bitsandbytes a shard is a matrix by itself.
    """
    bnb = bitsandbytes()
    for case in (case for case in cases.NF4 if case.bench == bench and case.numbers):
        if bench and device.type == "cpu" and case.label not in ("o_proj tp1", "down_proj tp8"):
            continue
        lines = Lines.of(case.shape, case.offset, case.size)
        x = (torch.randn(case.size, device=device) * 0.02).to(dtype)
        double = case.double and device.type == "cpu"
        absmax, kept = statistics_of(x, lines, case, case.double, nf4.block_absmax)
        shard = Shard(
            nf4.quantize(x, absmax, lines, case.blocksize, "nf4"),
            kept.of(lines, case.blocksize),
            kept.nested,
            kept.offset,
            lines,
            case.blocksize,
            "nf4",
        ).to(device)
        del absmax, kept
        out = torch.empty_like(x)
        reference = partial(in_4_bits, nf4.block_absmax_ref, nf4.quantize_ref)
        quantized: dict[str, Op] = {"reference": reference}
        read: dict[str, Op] = {"reference": read_by_reference}
        if bnb is not None:
            codes, state = bnb.quantize_4bit(x, blocksize=case.blocksize, quant_type="nf4", compress_statistics=case.double)
            quantized = {"bitsandbytes": partial(as_bitsandbytes, bnb)}
            read = {"bitsandbytes": partial(read_by_bitsandbytes, bnb, codes, state)}
        held = sum(t.nbytes for t in (shard.data, shard.absmax))
        kernel = partial(in_4_bits, nf4.block_absmax, nf4.quantize)
        run, moved = forward(x, lines, case, double), x.nbytes + shard.data.nbytes + 4 * case.numbers // case.blocksize
        yield Task(f"quantize {case.name}", moved, run, kernel, reference, quantized, exact=True, numbers=case.numbers)
        run = forward(shard, out)
        yield Task(
            f"dequantize {case.name}", out.nbytes + held, run, nf4.dequantize, read_by_reference, read, exact=True, numbers=case.numbers
        )


def statistics_of(x: Tensor, lines: Lines, case: Nf4Case, double: bool, block_absmax: Op) -> tuple[Tensor, Absmax]:
    absmax = nf4.whole_blocks(block_absmax(x, lines, case.blocksize), lines, case.blocksize)
    return absmax, nf4.compress(absmax) if double else Absmax(absmax)


def in_4_bits(block_absmax: Op, quantize: Op, x: Tensor, lines: Lines, case: Nf4Case, double: bool) -> Sequence[Tensor]:
    """All that a shard's numbers become."""
    absmax, kept = statistics_of(x, lines, case, double, block_absmax)
    return quantize(x, absmax, lines, case.blocksize, "nf4"), kept.values


def as_bitsandbytes(bnb: Any, x: Tensor, lines: Lines, case: Nf4Case, double: bool) -> Sequence[Tensor]:
    codes, state = bnb.quantize_4bit(x, blocksize=case.blocksize, quant_type="nf4", compress_statistics=double)
    return codes, state.absmax


def read_by_reference(shard: Shard, out: Tensor) -> Tensor:
    return nf4.dequantize_ref(shard, torch.empty_like(out))


def read_by_bitsandbytes(bnb: Any, codes: Tensor, state: Any, shard: Shard, out: Tensor) -> Tensor:
    """As its layers call it: into new memory."""
    found: Tensor = bnb.dequantize_4bit(codes, state)
    return found


def bitsandbytes() -> Any:
    """Its functions, or None where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR + 1)
    try:
        import bitsandbytes.functional as found
    except ImportError:
        return None
    return found


def rmsnorm_tasks(device: torch.device, dtype: torch.dtype, bench: bool) -> Iterator[Task]:
    eps = 1e-6
    ops_of_liger = liger_ops(device)
    liger, with_residual = ops_of_liger.get("rmsnorm"), ops_of_liger.get("rmsnorm_residual")
    for case in (case for case in cases.RMSNORM if case.bench == bench and case.tokens):
        weight = torch.randn(case.channels, device=device).to(dtype)
        if case.heads:
            x, residual = torch.randn(case.tokens, case.heads + 2, case.channels, device=device).to(dtype)[:, : case.heads], None
        else:
            x, residual = torch.randn(2, case.tokens, case.channels, device=device).to(dtype)
        one = case.numbers * dtype.itemsize
        # Not into dy's memory, which is the same in every round.
        theirs = None if liger is None else lambda x, weight: liger(x, weight, eps, 0.0, "llama", False)
        ops = partial(rmsnorm.rmsnorm, eps=eps), partial(rmsnorm.rmsnorm_ref, eps=eps)
        yield from both_ways(f"rmsnorm {case.name}", (2 * one, 3 * one), (x, weight), *ops, theirs)
        if residual is not None:
            theirs = None if with_residual is None else lambda x, residual, weight: with_residual(x, residual, weight, eps)
            ops = partial(rmsnorm.rmsnorm_residual, eps=eps), partial(rmsnorm.rmsnorm_residual_ref, eps=eps)
            yield from both_ways(f"with residual {case.name}", (4 * one, 4 * one), (x, residual, weight), *ops, theirs)


def swiglu_tasks(device: torch.device, dtype: torch.dtype, bench: bool) -> Iterator[Task]:
    liger = liger_ops(device).get("swiglu")
    for case in (case for case in cases.SWIGLU if case.bench == bench and case.tokens):
        gate_up = torch.randn(case.tokens, 2 * case.ffn, device=device).to(dtype)
        one = case.numbers * dtype.itemsize
        yield from both_ways(f"swiglu {case.name}", (3 * one, 5 * one), (gate_up,), swiglu.swiglu, swiglu.swiglu_ref, liger)


def both_ways(name: str, moved: tuple[int, int], inputs: Sequence[Tensor], kernel: Op, reference: Op, liger: Op | None) -> Iterator[Task]:
    """Forward, and of a graph that is kept the backward alone; `moved` by each."""
    others: Mapping[str, Op] | None = None
    if liger is not None:
        others = {"liger": liger, "reference": reference, "compiled": torch.compile(reference, dynamic=False)}
    yield Task(name, moved[0], forward(*inputs), kernel, reference, others)
    leaves, made = [x.clone().requires_grad_() for x in inputs], dict[Op, Sequence[Tensor]]()
    grads: list[Tensor] = []

    def run(op: Op) -> Sequence[Tensor]:
        if op not in made:
            out = op(*leaves)
            made[op] = [out] if isinstance(out, Tensor) else out
            grads.extend(torch.randn_like(y) for y in made[op][len(grads) :])
        return torch.autograd.grad(made[op], leaves, grads, retain_graph=True)

    yield Task(f"{name} backward", moved[1], run, kernel, reference, others)


def liger_ops(device: torch.device) -> Mapping[str, Op]:
    """Autograd functions of Liger's by the names of ours; none where it is not installed, is another release or cannot run."""
    if device.type != "cuda":
        return {}
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
    except ImportError:
        return {}
    return {
        "rmsnorm": LigerRMSNormFunction.apply,
        "rmsnorm_residual": LigerFusedAddRMSNormFunction.apply,
        "swiglu": LigerFusedGateUpSiLUMulFunction.apply,
    }


KERNELS: dict[str, Callable[[torch.device, torch.dtype, bool], Iterator[Task]]] = {
    "packing": packing_tasks,
    "lora": lora_tasks,
    "nf4": nf4_tasks,
    "rmsnorm": rmsnorm_tasks,
    "swiglu": swiglu_tasks,
}
ON_CPU = ("nf4",)  # that have a path of their own there


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=sorted(KERNELS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("megamod: error: no GPU that torch can use; --device cpu rehearses with the references, or times nf4 there", file=sys.stderr)
        return 1
    if args.device == "cuda" and version("triton") is None:
        print("megamod: error: triton cannot be imported, so there is no kernel to time", file=sys.stderr)
        return 1
    device = torch.device(args.device)
    torch.manual_seed(1)
    measure = on_gpu if args.device == "cuda" else timed_on_cpu if args.kernel in ON_CPU else on_cpu
    report = measure(args.kernel, device)
    print(json.dumps({"kernel": args.kernel, **about(device), **report}))
    return 1 if any(not case["agrees"] for case in report["cases"]) else 0


def on_gpu(kernel: str, device: torch.device) -> dict[str, Any]:
    """Kernel, reference and compiled reference, side by side."""
    functorch_config.donated_buffer = False  # a compiled backward that is timed alone keeps what it needs again
    scratch = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    source, target = torch.empty(2, COPY_BYTES, dtype=torch.uint8, device=device)
    (copy,) = turns([partial(target.copy_, source)], scratch)
    rate = 2 * COPY_BYTES / copy / 1e6
    print(f"{torch.cuda.get_device_name(device)} · a copy moves {rate:,.0f} GB/s · bf16, medians of {ROUNDS}, milliseconds")
    rows: list[dict[str, Any]] = []
    for task in KERNELS[kernel](device, torch.bfloat16, True):
        torch.compiler.reset()  # a case's own compilation, not one made for all shapes
        others = task.others or {"reference": task.reference, "compiled": torch.compile(task.reference, dynamic=False)}
        ops = {"kernel": task.kernel, **others}
        if not rows:
            titles = "".join(f"{name:>13}" for name in ops), "".join(f"{'× ' + name:>15}" for name in others)
            print(f"{'':<{WIDTH}}{titles[0]}{'GB/s':>8}{'% of copy':>11}{titles[1]}{'TFLOP/s':>9}")
        error = apart(task.run(task.reference), task.run(task.kernel))
        torch.cuda.empty_cache()  # a reference may have taken most of the memory
        ms = dict(zip(ops, turns([partial(task.run, op) for op in ops.values()], scratch), strict=True))
        ours = ms["kernel"]
        gb_s, tflop_s = task.moved / ours / 1e6, task.operations / ours / 1e9
        row = {"name": task.name, "bytes": task.moved, "ms": ms, "gb_s": gb_s, "of_copy": gb_s / rate, "tflop_s": tflop_s}
        row |= verdict(error, task.exact)
        times = "".join(f"{t:>13.3f}" for t in ms.values())
        ratios = "".join(f"{ms[name] / ours:>15.2f}" for name in others)
        products = f"{tflop_s:>9,.0f}" if task.operations else ""  # what only moves memory has none
        wrong = "" if row["agrees"] else f"  WRONG by {error:.2g}"
        print(f"{task.name:<{WIDTH}}{times}{gb_s:>8,.0f}{gb_s / rate:>11.0%}{ratios}{products}{wrong}")
        rows.append(row)
    return {"mode": "kernel and others, side by side", "dtype": "bfloat16", "copy_gb_s": rate, "rounds": ROUNDS, "cases": rows}


def on_cpu(kernel: str, device: torch.device) -> dict[str, Any]:
    """The same tasks, tiny, with the reference alone: shows that this program works, and nothing about a kernel."""
    print("REHEARSAL on the CPU: tiny shapes, timings of the plain torch references, of no kernel")
    print(f"{'':<{WIDTH}}{'torch ms':>10}")
    rows = []
    for task in KERNELS[kernel](device, torch.float32, False):
        error = apart(task.run(task.reference), task.run(task.kernel))  # the public function, which takes no kernel here
        for other in (task.others or {}).values():
            task.run(other)  # that it can
        times = []
        for _ in range(3):
            start = time.perf_counter()
            task.run(task.reference)
            times.append((time.perf_counter() - start) * 1e3)
        ms = statistics.median(times)
        print(f"{task.name:<{WIDTH}}{ms:>10.3f}")
        rows.append({"name": task.name, "bytes": task.moved, "ms": {"reference": ms}, **verdict(error, task.exact)})
    return {"mode": "rehearsal: reference timings on the CPU, of no kernel", "dtype": "float32", "cases": rows}


def timed_on_cpu(kernel: str, device: torch.device) -> dict[str, Any]:
    """What has a path of its own on a CPU, beside others: first the small cases against the references, then the clock."""
    wrong = []
    for task in KERNELS[kernel](device, torch.bfloat16, False):
        if not verdict(apart(task.run(task.reference), task.run(task.kernel)), task.exact)["agrees"]:
            wrong.append(task.name)
    for name in wrong:
        print(f"{name}: WRONG")
    print(f"on this CPU · bf16, medians of {CPU_ROUNDS} by turns, milliseconds")
    rows: list[dict[str, Any]] = []
    most = torch.get_num_threads()
    for task in KERNELS[kernel](device, torch.bfloat16, True):
        others = task.others or {"reference": task.reference}
        ops = {"here": task.kernel, **others}
        if not rows:
            titles = "".join(f"{name:>13}" for name in ops) + "".join(f"{'× ' + name:>15}" for name in others)
            print(f"{'':<{WIDTH}}{'threads':>8}{titles}{'10⁹ numbers/s':>15}")
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            ms = dict(zip(ops, cpu_turns([partial(task.run, op) for op in ops.values()]), strict=True))
            ours, rate = ms["here"], task.numbers / ms["here"] / 1e6
            times = "".join(f"{t:>13.1f}" for t in ms.values()) + "".join(f"{ms[name] / ours:>15.2f}" for name in others)
            print(f"{task.name:<{WIDTH}}{threads:>8}{times}{rate:>15.3f}")
            row = {"name": task.name, "bytes": task.moved, "threads": threads, "ms": ms, "numbers_s": rate * 1e9}
            rows.append({**row, "times": {name: ms[name] / ours for name in others}, "agrees": not wrong})
    return {"mode": "the CPU's path and others, side by side", "dtype": "bfloat16", "rounds": CPU_ROUNDS, "wrong": wrong, "cases": rows}


def cpu_turns(candidates: Sequence[Callable[[], Any]]) -> list[float]:
    """turns, by the clock of the wall."""
    ms: list[list[float]] = [[] for _ in candidates]
    for _ in range(1 + CPU_ROUNDS):
        for candidate, times in zip(candidates, ms, strict=True):
            start = time.perf_counter()
            candidate()
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times[1:]) for times in ms]  # the first makes tables and touches memory


def turns(candidates: Sequence[Callable[[], Any]], scratch: Tensor) -> list[float]:
    """Milliseconds of each, medians over rounds in which all take their turn."""
    for candidate in candidates:
        for _ in range(WARM_UP):
            candidate()
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)] for _ in candidates]
    for i in range(ROUNDS):
        for candidate, pairs in zip(candidates, events, strict=True):
            scratch.zero_()  # nobody finds its input in the cache; it also hides the launch's own time, as a step's queue does
            pairs[i][0].record()
            candidate()
            pairs[i][1].record()
    torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) for start, end in pairs) for pairs in events]


def apart(expected: Tensor | Sequence[Tensor], found: Tensor | Sequence[Tensor]) -> float:
    """The largest difference, as a part of the largest number expected."""
    pairs = zip(*([x] if isinstance(x, Tensor) else x for x in (expected, found)), strict=True)
    return max(float((e.double() - f.double()).abs().max() / e.double().abs().max()) for e, f in pairs)


def verdict(error: float, exact: bool) -> dict[str, Any]:
    return {"error": error, "agrees": error <= (0 if exact else TOLERANCE)}


def about(device: torch.device) -> dict[str, Any]:
    """What a timing cannot be read without."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = said([*git, "rev-parse", "HEAD"])
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "commit": commit,
        "modified": bool(said([*git, "status", "--porcelain", "--", "."])) if commit else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "bitsandbytes": version("bitsandbytes"),
        "liger-kernel": version("liger-kernel"),
        "cuda": torch.version.cuda,
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def said(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: an unpacked archive
        return None


if __name__ == "__main__":
    sys.exit(main())
