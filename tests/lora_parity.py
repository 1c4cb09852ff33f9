"""LoRA's oracle, peft on transformers' model in one process, and what a pool rank does to be compared with it."""

import ctypes
import gc
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import parity
import preferences
import tiny
import torch
import torch.distributed as dist
from parity import Case, Run
from torch import Tensor, nn

from megamod import checkpoint, losses
from megamod.batch import Batch
from megamod.config import LoraConfig, ModelConfig, OptimConfig, ParallelConfig, as_json
from megamod.config import load as load_config
from megamod.losses import LossFunction
from megamod.memory import Peak
from megamod.model.build import build, data_parallel
from megamod.model.lora import Adapters, Plan
from megamod.model.shape import read_shape
from megamod.optim import Optimizer
from megamod.parallel.grid import Grid, started
from megamod.reference import Reference
from megamod.step import eval_step, train_step
from megamod.train import train
from megamod.weights import fingerprint, peft
from megamod.weights.load import Tensors, load, weights_at
from megamod.weights.quantization import Quantization
from megamod.weights.table import frozen, placed
from megamod_kernels.lora import Dropout, dropout_keep

Weights = dict[str, Tensor]
TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


def weights(cfg: LoraConfig, model: str, seed: int = 5) -> Weights:
    """Every tensor of the adapter, random, in PEFT's names: B too, so that the place of each matters."""
    generator = torch.Generator().manual_seed(seed)
    base = tiny.weights(model)
    result = {}
    for name, size in peft.tensors(cfg, tiny.shape(model)).items():
        x = torch.randn(*size, generator=generator, dtype=torch.float64) * 0.15
        if "magnitude" in name:
            x += base[name.removeprefix(peft.PREFIX).replace(".lora_magnitude_vector", ".weight")].norm(dim=1)
        elif ".lora_" not in name:
            x += base[name.removeprefix(peft.PREFIX)]
        result[name] = x
    return result


def initial(cfg: LoraConfig, model: str) -> Weights:
    """PiSSA's A₀ and B₀: for the equation any will do."""
    return weights(replace(cfg, use_dora=False, modules_to_save=()), model, seed=11) if cfg.init_lora_weights == "pissa" else {}


def base_of(model: str, quantization: Quantization | None) -> Weights:
    """The base's weights: in double; of one that is to be in 4 bits, which are made of at most fp32, in bfloat16."""
    return tiny.weights(model, torch.float64 if quantization is None else torch.bfloat16)


def in_4_bits(hf: nn.Module, quantization: Quantization) -> nn.Module:
    """`hf` with what bitsandbytes keeps of its linears, made dense again by bitsandbytes, in double.

    Its own Linear4bit computes in fp32 at most. A weight is given to it flat: on a CPU it cuts the blocks of a matrix whose rows are no
    multiple of them otherwise when it reads than when it writes.
    """
    import bitsandbytes.functional as bnb

    for name, module in hf.named_modules():
        for param in module.parameters(recurse=False):
            param.data = param.data.bfloat16()
        if isinstance(module, nn.Linear) and name != "lm_head" and quantization.converts(name):
            q, shape = quantization, module.weight.shape
            flat = module.weight.data.flatten()
            codes, state = bnb.quantize_4bit(
                flat, blocksize=q.blocksize, quant_type=q.quant_type, compress_statistics=q.use_double_quant
            )  # fmt: skip
            state.dtype = torch.float32  # and not rounded to bfloat16
            module.weight.data = bnb.dequantize_4bit(codes, state).view(shape)
    return hf.double()


def oracle_of(
    cfg: LoraConfig, model: str, own: Mapping[str, Tensor], first: Mapping[str, Tensor], quantization: Quantization | None = None
) -> nn.Module:
    """peft's model with the adapter's weights; with PiSSA its base is W - s·B₀A₀."""
    from peft import LoraConfig as Peft
    from peft import get_peft_model

    hf = oracle.model(model) if quantization is None else in_4_bits(oracle.model(model), quantization)
    for slot in peft.slots(cfg, tiny.shape(model)).values():
        if first:
            hf.get_submodule(slot.module).weight.data -= slot.scale * first[slot.b] @ first[slot.a]
    said = Peft(
        r=cfg.r, lora_alpha=cfg.lora_alpha, rank_pattern=dict(cfg.rank_pattern), alpha_pattern=dict(cfg.alpha_pattern),  # type: ignore[arg-type]
        target_modules=cfg.target_modules if isinstance(cfg.target_modules, str) else list(cfg.target_modules),
        exclude_modules=cfg.exclude_modules if isinstance(cfg.exclude_modules, str | None) else list(cfg.exclude_modules),
        layers_to_transform=list(cfg.layers_to_transform) if cfg.layers_to_transform else None,
        modules_to_save=list(cfg.modules_to_save) or None, use_rslora=cfg.use_rslora, use_dora=cfg.use_dora, bias="none",
        ensure_weight_tying=bool(cfg.modules_to_save) and tiny.shape(model).tied, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(hf, said, autocast_adapter_dtype=False).double()  # type: ignore[arg-type]
    names = trained(adapted)
    assert names.keys() == own.keys()
    for name, param in names.items():
        param.data.copy_(own[name])
    return adapted


def trained(adapted: nn.Module) -> dict[str, nn.Parameter]:
    """Its trained parameters, as a PEFT directory names them."""
    return {
        name.replace(".modules_to_save.default", "").replace(".default", "").removesuffix(".weight")
        + ("" if "magnitude" in name else ".weight"): param
        for name, param in adapted.named_parameters()
        if param.requires_grad
    }


class Plain(nn.Module):
    """What oracle.run asks of a model, of peft's."""

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.model = adapted.base_model.model.model
        head = adapted.base_model.model.lm_head
        self.lm_head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head


class Mask(nn.Module):
    """In the place of peft's dropout: the mask that megamod draws for a module, a micro-batch and its tokens."""

    def __init__(self, p: float, fused: str) -> None:
        super().__init__()
        self.p, self.key = p, zlib.crc32(fused.encode())
        self.seed = self.first = 0

    def forward(self, x: Tensor) -> Tensor:  # [1, t, C]
        seed = (self.seed + self.key * 0x9E3779B97F4A7C15) % 2**64
        drawn = Dropout(self.p, seed, token=self.first)
        return x * dropout_keep(drawn, x.shape[1], x.shape[2], x.device) * drawn.scale


FUSED = {
    "q_proj": "self_attention.linear_qkv", "k_proj": "self_attention.linear_qkv", "v_proj": "self_attention.linear_qkv",
    "o_proj": "self_attention.linear_proj", "gate_proj": "mlp.linear_fc1", "up_proj": "mlp.linear_fc1", "down_proj": "mlp.linear_fc2",
}  # fmt: skip


def masks(adapted: nn.Module, p: float) -> list[Mask]:
    """Put a Mask in every adapted linear."""
    found = []
    for name, module in list(adapted.named_modules()):
        if hasattr(module, "lora_dropout"):
            _, _, rest = name.partition("model.layers.")
            layer, _, leaf = rest.partition(".")
            mask = Mask(p, f"decoder.layers.{layer}.{FUSED[leaf.rpartition('.')[2]]}")
            module.lora_dropout["default"] = mask
            found.append(mask)
    return found


def expected(
    cfg: LoraConfig, model: str, batches: list[Batch], loss: LossFunction = parity.everything, quantization: Quantization | None = None
) -> tuple[Tensor, Weights]:
    """The oracle's loss and gradients, by PEFT's names."""
    adapted = oracle_of(cfg, model, weights(cfg, model), initial(cfg, model), quantization)
    drawn = masks(adapted, cfg.lora_dropout) if cfg.lora_dropout else []

    def before(batch: Batch, token: int) -> None:
        for mask in drawn:
            mask.seed, mask.first = batch.seed, token

    value, _ = oracle.run(Plain(adapted), batches, loss, before)
    return value, {name: param.grad for name, param in trained(adapted).items() if param.grad is not None}


def steps(
    cfg: LoraConfig, model: str, optim: OptimConfig, count: int, quantization: Quantization | None = None
) -> tuple[list[float], Weights]:
    """Norms before clipping, and the weights after `count` steps of torch's AdamW, or of peft's LoRA+."""
    from peft.optimizers import create_loraplus_optimizer

    adapted = oracle_of(cfg, model, weights(cfg, model), initial(cfg, model), quantization)
    params = trained(adapted)
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if cfg.loraplus_lr_ratio is not None:
        ratio = cfg.loraplus_lr_ratio
        adam = create_loraplus_optimizer(
            adapted, torch.optim.AdamW, loraplus_lr_ratio=ratio, loraplus_weight_decay=optim.weight_decay, **settings
        )
    else:
        matrices, vectors = [p for p in params.values() if p.dim() > 1], [p for p in params.values() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        adam = torch.optim.AdamW(groups, **settings)
    norms = []
    for _ in range(count):
        oracle.run(Plain(adapted), parity.made_rows(model), parity.everything)
        assert optim.clip_grad is not None
        norms.append(float(nn.utils.clip_grad_norm_(params.values(), optim.clip_grad)))
        adam.step()
        adam.zero_grad()
    return norms, {name: param.data for name, param in params.items()}


@dataclass(frozen=True)
class LoraCase:
    """An adapter on a model on a grid."""

    lora: LoraConfig
    case: Case
    quantization: Quantization | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Of what is expected: the same on every grid."""
        return self.case.model, repr(self.lora), str(self.quantization)


class SeededRun(Run):
    """Micro-batches of one row, each with its number as its seed, whatever the grid."""

    def step(self, loss: Any = parity.everything) -> None:
        dp = self.grid.dp
        mine = [replace(row, seed=seed_of(i)) for i, row in enumerate(parity.made_rows(self.case.model))][dp.rank :: dp.size]
        self.metrics = train_step(self.optimizer.chunks, mine, loss, self.grid)


def seed_of(number: int) -> int:
    return 2**62 // (number + 1)


def prepare(
    one: LoraCase, grid: Grid, optim: OptimConfig | None = None, configs: Mapping[str, LoraConfig] | None = None
) -> tuple[Run, Adapters]:
    """The case's adapter is trained; `configs` may have frozen ones beside it, each with weights of its own."""
    case, shape = one.case, tiny.shape(one.case.model).quantized(one.quantization)
    cfg = ModelConfig(path="", dtype=case.dtype, recompute=case.recompute, recompute_modules=case.recompute_modules)  # type: ignore[arg-type]
    chunks, _ = build(cfg, shape, grid)
    load(chunks, shape, grid, Tensors(base_of(case.model, one.quantization)))
    adapters = Adapters(chunks, shape, grid, configs or {"default": one.lora}, "default")
    for number, (name, own) in enumerate(adapters.configs.items()):
        adapters.fill(name, Tensors(weights(own, case.model, 5 + number)), Tensors(initial(own, case.model)))
    wrapped = data_parallel(chunks, grid, overlap=case.overlap)
    kind = SeededRun if one.lora.lora_dropout else Run
    return kind(grid, case, Optimizer(optim or OptimConfig(), wrapped, adapters.items, grid)), adapters


def optimize(cases: list[LoraCase], optim: OptimConfig, expected_file: str) -> list[tuple[float, float]]:
    """For each case on this rank: the worst error of a norm, and of a weight after as many steps."""
    known = torch.load(expected_file, weights_only=True)
    results = []
    for one in cases:
        norms, after = known[one.key]
        with started(one.case.parallel, tiny.shape(one.case.model)) as grid:
            run, _ = prepare(one, grid, optim)
            off = 0.0
            for norm in norms:
                run.step()
                found = abs(run.optimizer.step(optim.lr).grad_norm - norm) / norm
                off = max(off, found if found == found else float("inf"))
            results.append((off, parity.worst(run, after, lambda segment: segment.master.detach())))
            del run
        gc.collect()
    return results


def choose(one: LoraCase, other: LoraConfig) -> dict[str, list[float]]:
    """The losses of passes with the trained adapter, another one and none, before and after a step; and of a model without any."""
    shape = tiny.shape(one.case.model)
    with started(one.case.parallel, shape) as grid:
        run, adapters = prepare(one, grid, configs={"default": one.lora, "other": other})
        found: dict[str, list[float]] = {}
        for _ in range(2):
            for name in ("default", "other", None):
                with adapters.using(name):
                    found.setdefault(str(name), []).append(evaluated(run))
            run.step()
            run.optimizer.step(1e-2)
        return found | {"bare": [evaluated(parity.prepare(one.case, grid))]}


def preferring(one: LoraCase, expected_file: str) -> tuple[float, float]:
    """A step of DPO whose reference is the base: the error of the loss on this rank, and the worst of a gradient."""
    value, gradients = torch.load(expected_file, weights_only=True)
    with started(one.case.parallel, tiny.shape(one.case.model)) as grid:
        run, adapters = prepare(one, grid)
        loss, case = preferences.LOSSES["dpo"], one.case
        cfg = preferences.config(loss, lora=one.lora)
        shape = tiny.shape(case.model).quantized(one.quantization)
        reference = Reference(cfg, shape, grid, run.optimizer.chunks, adapters.items, adapters, Tensors({}))
        loader = preferences.loader(case.model, grid.dp.rank, grid.dp.size, case.count(grid))
        batches = reference.complete(loader.step(0), partial(loader.mismatched, 0, grid.pp.size))
        metrics = train_step(run.optimizer.chunks, batches, loss, grid)
        off = abs(float(metrics["loss"]) - float(value)) / abs(float(value)) if metrics else 0.0
        return off, parity.worst(run, gradients, parity.gradient)


def beside_transformers(path: str, adapter: str, q: Quantization, batch: Batch, expected_file: str) -> tuple[float, float]:
    """A step on two tp ranks in fp32 on the base at `path`: the error of the loss on this rank, and the worst of a gradient."""
    value, gradients = torch.load(expected_file, weights_only=True)
    shape = read_shape(path).quantized(q)
    with started(ParallelConfig(tp=2, sp=True), shape) as grid:
        chunks, _ = build(ModelConfig(path=path, dtype="float32", recompute="full"), shape, grid)
        base = weights_at(path, shape, 0)
        load(chunks, shape, grid, base)
        plan = Plan.of(LoraConfig(path=adapter), shape)
        adapters = plan.attach(chunks, shape, grid, base, 0, Path("unused"))
        wrapped = data_parallel(chunks, grid)
        run = Run(grid, Case("", ParallelConfig()), Optimizer(OptimConfig(), wrapped, adapters.items, grid))
        metrics = train_step(wrapped, [batch], losses.cross_entropy, grid)
        return abs(float(metrics["loss"]) - value) / value, parity.worst(run, gradients, parity.gradient)


def evaluated(run: Run) -> float:
    """The loss, on every rank."""
    metrics = eval_step(run.optimizer.chunks, run.case.batches(run.grid), parity.everything, run.grid)
    loss = torch.tensor([float(metrics["loss"]) if metrics else float("-inf")], dtype=torch.float64)
    dist.all_reduce(loss, dist.ReduceOp.MAX)
    return float(loss)


def fingerprints(parallel: ParallelConfig, model: str, dtype: str) -> list[str]:
    """Of a base: as loaded, after two steps of an adapter on it, and after the smallest change of one element on one rank."""
    shape = tiny.shape(model)
    one = LoraCase(LoraConfig(r=3), Case(model, parallel, dtype=dtype))
    with started(parallel, shape) as grid:
        run, _ = prepare(one, grid)
        items = placed(run.optimizer.chunks, shape, grid.tp.size, grid.tp.rank)
        found = [fingerprint.of_model(items, grid, None)]
        for _ in range(2):
            run.step()
            run.optimizer.step(1e-2)
        found.append(fingerprint.of_model(items, grid, None))
        with torch.no_grad():
            for item in items:
                if item.name == "decoder.layers.2.mlp.linear_fc2.weight" and grid.tp.rank == grid.tp.size - 1:
                    last = item.param.view(-1)[-1:]
                    last.copy_(torch.nextafter(last, torch.full_like(last, torch.inf)))
        return [*found, fingerprint.of_model(items, grid, None)]


def fingerprints_in_4_bits(parallel: ParallelConfig, model: str, q: Quantization) -> tuple[str, str]:
    """Of a base in 4 bits: as loaded, and after two steps of an adapter on it."""
    shape = tiny.shape(model).quantized(q)
    with started(parallel, shape) as grid:
        run, _ = prepare(LoraCase(LoraConfig(r=3), Case(model, parallel), q), grid)
        own = (run.optimizer.chunks, shape, grid.tp.size, grid.tp.rank)
        items = [*placed(*own), *frozen(*own)]
        before = fingerprint.of_model(items, grid)
        for _ in range(2):
            run.step()
            run.optimizer.step(1e-2)
        return before, fingerprint.of_model(items, grid)


def cycles(one: LoraCase, count: int, directory: str) -> tuple[bool, bool, Mapping[str, tuple[int, ...]]]:
    """Save and export `count` times while the adapter moves: whether the base is what it was to the bit, whether each export is
    another one, and what the last checkpoint holds."""
    shape, root = tiny.shape(one.case.model), Path(directory)
    with started(one.case.parallel, shape) as grid:
        run, _ = prepare(one, grid)
        base = placed(run.optimizer.chunks, shape, grid.tp.size, grid.tp.rank)
        before = [item.param.detach().clone() for item in base]
        about = {"lora": as_json(one.lora), "model.path": "base", "dtype": one.case.dtype, "base": fingerprint.of_model(base, grid)}
        run.step()
        grads = [segment.grad.clone() for segment in run.optimizer.segments]
        exported = set()
        for number in range(1, count + 1):
            for segment, grad in zip(run.optimizer.segments, grads, strict=True):
                segment.grad.copy_(grad)
            run.optimizer.step(1e-3)
            saved = checkpoint.save(root / "checkpoints", number, run.optimizer, grid, about)
            if grid.rank == 0:
                out = peft.export(saved, root / "peft" / str(number), shape)
                exported.add((out / "adapter_model.safetensors").read_bytes())
                if number > 1:
                    checkpoint.remove(root / "checkpoints" / f"step-{number - 1:08d}")
            dist.barrier()
        same = all(torch.equal(item.param, old) for item, old in zip(base, before, strict=True))
        return same, grid.rank != 0 or len(exported) == count, checkpoint.Masters(saved).shapes()


def compare(cases: list[LoraCase], expected_file: str) -> list[tuple[float, float, int]]:
    """For each case on this rank, all of one grid and as many kv heads: error of the loss, worst of a gradient, elements owned."""
    known = torch.load(expected_file, weights_only=True)
    results = []
    with started(cases[0].case.parallel, tiny.shape(cases[0].case.model)) as grid:
        for one in cases:
            run, _ = prepare(one, grid)
            run.step()
            value, gradients = known[one.key]
            off = abs(float(run.metrics["loss"]) - float(value)) / abs(float(value)) if run.metrics else 0.0
            results.append((off, parity.worst(run, gradients, parity.gradient), parity.owned(run)))
    return results


def trained_by_runs(runs: list[tuple[str, list[str]]]) -> list[tuple[dict[int, float], str]]:
    """Runs of configs/tiny.py one after the other, each with its directory and overrides: the loss of every step, and the export."""
    found = []
    for directory, overrides in runs:
        cfg = load_config(TINY, [f"dir={directory}", *overrides])
        train(cfg)
        lines = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
        found.append(({line["step"]: line["loss"] for line in lines}, str(max((Path(directory) / "peft").iterdir()))))
        gc.collect()
    return found


def memory_of_loading(path: str, tp: int) -> tuple[float, float]:
    """MiB of this rank's private memory before its model is made, and at most until it is loaded, in bfloat16 on a base in NF4."""
    shape = read_shape(path).quantized(Quantization())
    with started(ParallelConfig(tp=tp), shape) as grid:
        source = weights_at(path, shape, 0)
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what earlier tests have freed would be taken again, and not be seen
        with Peak(grid.device) as peak:
            chunks, _ = build(ModelConfig(path=path, dtype="bfloat16"), shape, grid)
            load(chunks, shape, grid, source)
        return peak.before, peak.value
