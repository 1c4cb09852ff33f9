"""A run is a value: frozen dataclasses, one per owner of values, made by a Python file's `config()`.

    cfg = load("configs/tiny.py", ["optim.lr=3e-6", "parallel.tp=4"])

An unknown key is an error that names the nearest one; so is an option that the rest of the configuration leaves unused.
"""

import ast
import dataclasses
import functools
import inspect
import json
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from megamod import losses
from megamod.data.jsonl import LARGEST_WEIGHT
from megamod.errors import MegamodError, nearest
from megamod.model.shape import Score
from megamod.verdicts import Format, format_of
from megamod.weights.quantization import Quantization

Recompute = Literal["none", "selective", "full"]
Attention = Literal["auto", "flash_attn_3", "flash_attn", "varlen_attn", "reference"]
Linear = Literal["megatron", "transformer_engine"]
Fusion = Literal["auto", "triton", "reference"]
Dtype = Literal["bfloat16", "float32", "float64"]
InitLora = Literal["default", "gaussian", "pissa"]
ReferenceKind = Literal["start", "base", "adapter", "model", "stored", "uniform"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]
Scoring = Literal["whole", "first_token"]  # of label strings: all their tokens, or those that tell them apart
T = TypeVar("T")


@dataclass(frozen=True)
class ParallelConfig:
    """The grid. Data parallelism takes the ranks that tp × pp × cp leave."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # model chunks per pipeline rank: the interleaved schedule
    cp: int = 1  # context parallelism: Ulysses, sequence ↔ heads
    sp: bool = False  # Megatron's sequence parallelism: activations outside attention and MLP split over tp
    # TransformerEngine's linears send to tp ranks while they multiply (`model.linear`, sp). Never run: it wants GPUs joined by NVLink.
    tp_comm_overlap: bool = False
    # ZeRO-3 for what is frozen: each rank of dp × cp keeps a slice of the base's linears beneath adapters, gathered when it is used.
    shard_base: bool = False
    layers_per_stage: tuple[int, ...] | None = None  # an uneven split: pp × vpp numbers in pipeline order; None: even
    timeout_minutes: int = 30  # a collective that takes longer ends the run


@dataclass(frozen=True)
class ModelConfig:
    """Which model, in which precision, and who computes its parts."""

    path: str  # a Hugging Face directory: config.json and *.safetensors
    shape: str | None = None  # a config.json to use where `path` is not there yet (planning, dry runs); None: path's own
    init: Literal["load", "random"] = "load"  # random: N(0, 0.02), the same on every grid
    dtype: Dtype = "bfloat16"
    recompute: Recompute = "none"
    recompute_modules: tuple[str, ...] | None = None  # selective: core_attn, mlp or both; None: core_attn
    attention: Attention = "auto"
    linear: Linear = "megatron"
    fusion: Fusion = "auto"  # RMSNorm with the residual's addition, SwiGLU: Triton's kernels, or torch's operations, which keep as little
    score: Score | None = None  # a head of scores in the vocabulary's place; None: what path's own config.json says
    quantization: Quantization | None = None  # QLoRA: the frozen base in 4 bits; None: as path has it


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside a frozen base, in PEFT's words (huggingface.co/docs/peft, LoraConfig).

    A linear W `[F, C]` computes x Wᵀ + s·(dropout(x) Aᵀ) Bᵀ with A `[R, C]` and B `[F, R]` (LoRA, Hu et al. 2021, arXiv:2106.09685);
    s = lora_alpha / r, or lora_alpha / √r with `use_rslora` (Kalajdzievski 2023, arXiv:2312.03732).
    """

    r: int = 8
    lora_alpha: float = 8.0
    # Names' ends, such as ("q_proj", "v_proj"); a regular expression of whole names; or all-linear: every one but the head.
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None  # the same, of what is not to be adapted
    layers_to_transform: tuple[int, ...] | None = None  # from 0; None: all
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # the end of a name, or a regular expression of it → its own r
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # the same → its own lora_alpha
    modules_to_save: tuple[str, ...] = ()  # embed_tokens, lm_head: trained whole, in the adapter's own copy; a head of scores always is
    lora_dropout: float = 0.0  # of what A reads; W always reads all, with DoRA too (where PEFT's W reads what dropout leaves)
    use_rslora: bool = False
    use_dora: bool = False  # directions by LoRA, a magnitude of its own for each output (Liu et al. 2024, arXiv:2402.09353)
    init_lora_weights: InitLora = "default"  # default: A uniform, B 0; gaussian: A normal; pissa: W's r largest singular directions
    loraplus_lr_ratio: float | None = None  # B's learning rate ÷ A's (LoRA+, Hayou et al. 2024, arXiv:2402.12354); None: 1
    path: str | None = None  # an adapter to go on from, a PEFT directory or a checkpoint: it says all of the above but dropout and LoRA+
    name: str = "default"


@dataclass(frozen=True)
class ReferenceConfig:
    """The model that a preference loss compares with, whose log-probabilities are `batch.reference`; or a teacher, `batch.teacher`.

    start     the model as the run begins: with a new adapter the base beneath it, with `lora.path` that adapter, frozen beside the
              trained one, and without adapters a second copy of the weights
    base      the base without any adapter, also where the run goes on from one
    adapter   another adapter on the same base, at `path`: a PEFT directory or a checkpoint
    model     other weights of the same shape, at `path`: a Hugging Face directory; a teacher may have another shape
    stored    what tools/reference_logprobs.py or teacher_logprobs.py wrote to `path`: no reference model is in memory
    uniform   every answer alike, log-probability 0: reference-free

    With `sync_every` the reference follows the trained model (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656): every so many steps
    θ_ref ← α·θ + (1 - α)·θ_ref.
    """

    kind: ReferenceKind = "start"
    path: str | None = None
    top_k: int = 50  # of a teacher: how many of its most probable tokens at each position
    sync_every: int | None = None  # steps; None: it stays as it is
    sync_alpha: float = 1.0  # α; with adapters only 1, since a mixture of two adapters is no adapter of their rank


@dataclass(frozen=True)
class SyntheticData:
    """Random documents for benchmarks and rehearsals: log-normal lengths, the last `labelled` share of each one trained."""

    documents: int = 512
    mean_length: int = 200
    sigma: float = 0.8
    labelled: float = 0.08
    pairs: bool = False  # every two documents are a better and a worse answer to one prompt, as preference losses take them


@dataclass(frozen=True)
class Source:
    """One of several files that are mixed."""

    path: str
    weight: float = 1.0  # how often each of its documents is seen in an epoch; of a fraction, a part of them drawn once


@dataclass(frozen=True)
class ChatConfig:
    """How conversations become tokens."""

    format: str | Format = "qwen3guard"  # of verdicts: a name in verdicts.FORMATS, or one of your own
    reasons: bool = True  # whether the rows' reasons are part of the verdict
    controversial: Literal["keep", "safe", "unsafe"] = "keep"  # what a controversial row is trained as
    turns: Literal["each", "last"] = "each"  # of rows without label: which of the assistant's turns with a weight above 0 are trained
    # A regular expression (Python's `re`) → how much the tokens count that overlap what it matches in what the assistant says, without
    # what its template puts before and behind it; 0: not trained. The weights of several that match a token are multiplied.
    weights: Mapping[str, float] | None = None
    too_long: Literal["skip", "cut", "error"] = "skip"  # a document longer than a row; cut: the end of its longest message
    tokenizer: str | None = None  # a Hugging Face directory; None: model.path
    template: str | None = None  # a Jinja file; None: the tokenizer's own chat template
    template_arguments: Mapping[str, Any] = field(default_factory=dict)  # what the template asks for, such as enable_thinking


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into rows and batches."""

    # JSONL of conversations (data/jsonl.py) or of tokenised documents (data/documents.py), a store that tools/prepare_data.py
    # made of either, several of these, or made-up documents.
    train: str | tuple[Source, ...] | SyntheticData
    chat: ChatConfig = field(default_factory=ChatConfig)
    row_length: int = 4096  # tokens in a packed row
    rows_per_step: int = 8  # rows in a global batch
    rows_per_micro_batch: int = 1


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training: labelled conversations are judged, and the best step is kept."""

    data: str  # JSONL of conversations with labels
    every: int | None = None  # steps between validations; None: only after the last step
    limit: int | None = None  # rows, drawn once from the seed; None: all
    scoring: Scoring = "whole"
    decode: int = 0  # of how many rows the verdict is decoded too, for categories and the parse rate
    max_new_tokens: int = 128
    metric: str = "macro_f1"  # what decides which step is best: a name of metrics.HEADLINE, such as strict.auroc
    keep_best: bool = True  # export the step with the best metric, not the last one
    patience: int | None = None  # stop after so many validations without a better one; None: never


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) with the learning rate of `optim.learning_rate`."""

    lr: float = 1e-5
    schedule: Schedule = "cosine"
    min_lr: float | None = None  # where linear, cosine and wsd end; None: 0
    warmup_steps: int = 0
    decay_steps: int | None = None  # wsd: length of the final descent
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ()  # regular expressions of Hugging Face names, beside vectors, which never decay
    clip_grad: float | None = 1.0  # the global norm that gradients are scaled down to; None: never
    max_skips: int = 3  # steps in a row whose loss or gradients are not finite, which change nothing; then the run ends
    overlap_grad_reduce: bool = False  # reduce gradients in buckets while the backward pass goes on
    offload: bool = False  # masters and moments in host memory, where a processor updates them; OMP_NUM_THREADS says by how many threads


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run leaves behind to go on from, and to use."""

    every: int | None = None  # steps between saves; None: only at the end
    keep_last: int | None = None  # how many of the newest stay, beside the best; None: all, but those that were the best
    keep_every: int | None = None  # steps whose multiples stay, too
    asynchronous: bool = True  # written while the run goes on, from a copy in host memory; False: the run waits
    resume: str = "auto"  # auto: from the newest whole checkpoint in the run's directory; no: begin again; or the path of one
    stop_at: int | None = None  # seconds since the epoch: end after the step at hand then, as after SIGTERM or SIGUSR1, saved
    requeue_file: str | None = None  # made when the run has ended before its last step so, for a launcher that starts it again
    export: bool = False  # write a Hugging Face directory at the end: <run>/hf/step-<steps>


@dataclass(frozen=True)
class LogConfig:
    """What a person reads while the run goes on."""

    every: int = 1  # steps between lines
    tensorboard: bool = True
    peak_tflops: float | None = None  # the GPU's dense peak in `model.dtype`, for MFU; None: known GPUs only
    stacks_after_minutes: float = 10.0  # a step that takes longer leaves what every rank is doing in <run>/stacks
    stragglers_every: int = 100  # steps between looks for ranks that are slow


@dataclass(frozen=True)
class RunConfig:
    """A whole run: all that decides its numbers."""

    dir: str  # everything the run writes
    steps: int
    model: ModelConfig
    data: DataConfig
    loss: losses.LossFunction = losses.cross_entropy
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig | None = None
    lora: LoraConfig | None = None  # None: every weight is trained
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)  # read only where the loss needs one
    seed: int = 1
    deterministic: bool = False  # bitwise the same from run to run on the same grid


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Run `config()` of the Python file at `path` and apply `owner.key=value` overrides, checked against the fields' types.

    Raises:
        MegamodError: no such file, no `config`, an unknown key (the nearest is offered), a value of the wrong type, or an
            option that nothing would read.
    """
    if not Path(path).is_file():
        raise MegamodError(f"{path}: no such config file")
    made = _run_file(Path(path)).get("config")
    if not callable(made):
        raise MegamodError(f"{path}: defines no function config() -> RunConfig")
    cfg = _guarded(path, made)
    if not isinstance(cfg, RunConfig):
        raise MegamodError(f"{path}: config() returned {type(cfg).__name__}, not RunConfig")
    cfg = override(cfg, overrides)
    check(cfg)
    return cfg


def override(node: T, items: Sequence[str]) -> T:
    """`node`, a dataclass, with `owner.key=value` items applied. Raises MegamodError for an unknown key or a wrong type."""
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise MegamodError(f"override {item!r}: write it as owner.key=value, such as optim.lr=3e-6")
        node = _replace(node, key.split("."), text, key)
    return node


def _run_file(path: Path) -> dict[str, Any]:
    """Run a config file as a script in its own folder is run: it may import its neighbours, to derive a run from another's."""
    folder = path.resolve().parent
    neighbours = {file.stem for file in folder.glob("*.py")} & sys.modules.keys()  # of these names, someone else's modules
    others, before = {name: sys.modules.pop(name) for name in neighbours}, set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        # The name is the one under which `save` writes functions of the file.
        return _guarded(path, lambda: runpy.run_path(str(path), run_name=str(path)))
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:  # a neighbour is read again next time, and its name is free for another folder's
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == folder:
                del sys.modules[name]
        sys.modules.update(others)


def _guarded(path: str | Path, act: Callable[[], T]) -> T:
    """Run a piece of the user's config file; what goes wrong in it is one line, with the file's line and the nearest name."""
    try:
        return act()
    except MegamodError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        hint = _keyword_hint(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
        if isinstance(error, AttributeError) and error.name is not None:
            hint = f"{hint}, {nearest(error.name, [n for n in dir(error.obj) if not n.startswith('_')])}"
        raise MegamodError(f"{where}: {hint}") from None


def check(cfg: RunConfig) -> None:
    """Refuse what no part of the run would read, and values that mean nothing. Raises MegamodError."""
    _check_types(cfg, "")
    _check_loss(cfg.loss)
    p, o, m = cfg.parallel, cfg.optim, cfg.model
    unused = [
        (o.min_lr is not None and o.schedule == "constant", "optim.min_lr", "optim.schedule is 'constant'"),
        (o.decay_steps is not None and o.schedule != "wsd", "optim.decay_steps", f"optim.schedule is {o.schedule!r}, not 'wsd'"),
        (
            m.recompute_modules is not None and m.recompute != "selective",
            "model.recompute_modules",
            f"model.recompute is {m.recompute!r}, not 'selective'",
        ),
        (p.sp and p.tp == 1, "parallel.sp", "parallel.tp is 1"),
        (p.vpp > 1 and p.pp == 1, "parallel.vpp", "parallel.pp is 1"),
        (
            p.tp_comm_overlap and m.linear != "transformer_engine",
            "parallel.tp_comm_overlap",
            f"model.linear is {m.linear!r}, not 'transformer_engine'",
        ),
        (p.tp_comm_overlap and not p.sp, "parallel.tp_comm_overlap", "parallel.sp is False"),
        (p.shard_base and cfg.lora is None, "parallel.shard_base", "lora is None, and no weight is frozen: set lora.r"),
        (p.layers_per_stage is not None and p.pp == 1, "parallel.layers_per_stage", "parallel.pp is 1"),
        (
            cfg.checkpoint.keep_every is not None and cfg.checkpoint.keep_last is None,
            "checkpoint.keep_every",
            "checkpoint.keep_last is None, and all of them stay",
        ),
        (bool(o.no_decay) and o.weight_decay == 0, "optim.no_decay", "optim.weight_decay is 0"),
        (
            cfg.data.chat != ChatConfig() and isinstance(cfg.data.train, SyntheticData) and cfg.eval is None,
            "data.chat",
            "data.train is made up, and there is no eval",
        ),
        (bool(cfg.data.chat.weights) and isinstance(cfg.data.train, SyntheticData), "data.chat.weights", "data.train is made up"),
    ]  # fmt: skip
    unused += _unused_reference(cfg)
    lora = cfg.lora
    if m.quantization is not None and (fault := m.quantization.fault()):
        raise MegamodError(f"model.quantization: {fault}")
    if m.quantization is not None and lora is None:
        raise MegamodError("model.quantization: weights in 4 bits are frozen, and nothing would be trained: set lora.r")
    if lora is not None and m.linear != "megatron":
        raise MegamodError(f"model.linear = {m.linear!r}: an adapted linear is multiplied with its adapter: use 'megatron'")
    if p.tp_comm_overlap and cfg.eval is not None and cfg.data.rows_per_micro_batch > 1:
        raise MegamodError(
            "parallel.tp_comm_overlap: its buffers are for micro-batches of one size, and validation's have one row: set "
            "data.rows_per_micro_batch=1"
        )
    if (e := cfg.eval) is not None:
        unused += [
            (e.patience is not None and e.every is None, "eval.patience", "eval.every is None"),
            (e.max_new_tokens != EvalConfig.max_new_tokens and not e.decode, "eval.max_new_tokens", "eval.decode is 0"),
        ]
        if e.decode and e.max_new_tokens >= cfg.data.row_length:
            raise MegamodError(f"eval.max_new_tokens = {e.max_new_tokens}: must be below data.row_length = {cfg.data.row_length}")
    for is_unused, key, why in unused:
        if is_unused:
            raise MegamodError(f"{key} would not be read: {why}")
    if o.schedule == "wsd" and o.decay_steps is None:
        raise MegamodError("optim.schedule 'wsd' needs optim.decay_steps")
    if o.warmup_steps + (o.decay_steps or 0) > cfg.steps:
        parts = f"optim.warmup_steps = {o.warmup_steps}" + (f" and optim.decay_steps = {o.decay_steps}" if o.decay_steps else "")
        raise MegamodError(f"{parts} do not fit into steps = {cfg.steps}")
    if o.min_lr is not None and o.min_lr > o.lr:
        raise MegamodError(f"optim.min_lr = {o.min_lr} is above optim.lr = {o.lr}")
    if m.recompute_modules == ():
        raise MegamodError("model.recompute_modules is empty: name some, or set model.recompute to 'none'")
    if m.score is not None and (fault := m.score.fault()):
        raise MegamodError(f"model.score: {fault}")
    for module in m.recompute_modules or ():
        if module not in (choices := ("core_attn", "mlp")):
            raise MegamodError(f"model.recompute_modules: {module!r}, {nearest(module, choices)}")
    least: list[tuple[str, float | None, float]] = [
        ("steps", cfg.steps, 1), ("seed", cfg.seed, 0), ("log.every", cfg.log.every, 1), ("checkpoint.every", cfg.checkpoint.every, 1),
        *((f"checkpoint.{n}", getattr(cfg.checkpoint, n), 1) for n in ("keep_last", "keep_every")), ("optim.max_skips", o.max_skips, 1),
        ("log.stragglers_every", cfg.log.stragglers_every, 1),
        ("data.row_length", cfg.data.row_length, 1), ("data.rows_per_step", cfg.data.rows_per_step, 1),
        ("data.rows_per_micro_batch", cfg.data.rows_per_micro_batch, 1), ("optim.lr", o.lr, 0), ("optim.warmup_steps", o.warmup_steps, 0),
        ("optim.weight_decay", o.weight_decay, 0), ("optim.min_lr", o.min_lr, 0), ("optim.decay_steps", o.decay_steps, 1),
        ("reference.sync_every", cfg.reference.sync_every, 1), ("optim.eps", o.eps, 0), ("parallel.timeout_minutes", p.timeout_minutes, 1),
        *((f"parallel.{n}", getattr(p, n), 1) for n in ("tp", "pp", "vpp", "cp")),
    ]  # fmt: skip
    if e is not None:
        least += [(f"eval.{n}", getattr(e, n), 1) for n in ("every", "limit", "patience", "max_new_tokens")] + [
            ("eval.decode", e.decode, 0)
        ]
    if lora is not None:
        least += [("lora.r", lora.r, 1), *((f"lora.rank_pattern: {name!r}", r, 1) for name, r in lora.rank_pattern.items())]
    for key, value, bound in least:
        if value is not None and not value >= bound:
            raise MegamodError(f"{key} = {value}: must be at least {bound}")
    above: list[tuple[str, float | None]] = [
        ("optim.clip_grad", o.clip_grad),
        ("log.peak_tflops", cfg.log.peak_tflops),
        ("log.stacks_after_minutes", cfg.log.stacks_after_minutes),
    ]
    if lora is not None:
        above += [("lora.lora_alpha", lora.lora_alpha), ("lora.loraplus_lr_ratio", lora.loraplus_lr_ratio)]
        above += [(f"lora.alpha_pattern: {name!r}", alpha) for name, alpha in lora.alpha_pattern.items()]
        if not 0 <= lora.lora_dropout < 1:
            raise MegamodError(f"lora.lora_dropout = {lora.lora_dropout}: at least 0 and below 1 was expected")
    for key, value in above:
        if value is not None and value <= 0:
            raise MegamodError(f"{key} = {value}: must be above 0")
    if not all(0 <= beta < 1 for beta in o.betas):
        raise MegamodError(f"optim.betas = {o.betas}: each must be at least 0 and below 1")
    format_of(cfg.data.chat.format)
    check_weights(cfg.data.chat)
    if isinstance(cfg.data.train, tuple):
        if not cfg.data.train:
            raise MegamodError("data.train is empty: at least one Source was expected")
        for i, source in enumerate(cfg.data.train):
            if not source.weight > 0:
                raise MegamodError(f"data.train[{i}].weight = {source.weight}: must be above 0")
    for pattern in o.no_decay:
        try:
            re.compile(pattern)
        except re.error as error:
            raise MegamodError(f"optim.no_decay: {pattern!r} is no regular expression: {error}") from None


def _unused_reference(cfg: RunConfig) -> list[tuple[bool, str, str]]:
    """What of `cfg.reference` nothing would read: whether, the key, why. Raises MegamodError for what does not go together."""
    r, needs, name = cfg.reference, losses.needs_of(cfg.loss), loss_name(cfg.loss)
    follows = r.sync_every is not None
    if r.kind in ("base", "adapter") and cfg.lora is None:
        raise MegamodError(f"reference.kind = {r.kind!r} is of a run with adapters, and lora is None: use 'start' or 'model'")
    if (has := r.kind in ("adapter", "model", "stored")) and r.path is None:
        raise MegamodError(f"reference.kind = {r.kind!r} needs reference.path")
    if follows and r.kind not in ("start", "model"):
        raise MegamodError(f"reference.sync_every: a reference of kind {r.kind!r} has no weights that could follow: use 'start'")
    if follows and cfg.lora is not None and (r.kind == "model" or r.sync_alpha != 1.0):
        raise MegamodError("reference.sync_every with lora: a mixture of two models is no adapter: use kind 'start' and sync_alpha = 1")
    if not 0 < r.sync_alpha <= 1:
        raise MegamodError(f"reference.sync_alpha = {r.sync_alpha}: above 0 and at most 1 was expected")
    if "kl" in needs and r.kind == "stored":
        raise MegamodError(f"reference.kind = 'stored': {name} asks the reference about answers to other rows' prompts too: use 'start'")
    if follows and r.kind == "model" and "reference" not in needs:
        raise MegamodError(
            "reference.sync_every: a teacher at reference.path does not follow the model: use kind 'start' for one that does"
        )
    if "teacher" in needs and r.kind == "uniform":
        raise MegamodError(f"reference.kind = 'uniform': {name} learns from a teacher: use 'model' or 'stored'")
    if {"teacher", "reference"} <= needs and r.kind == "stored":
        raise MegamodError(f"reference.kind = 'stored': {name} needs a teacher and a reference, and one of them is stored: use 'model'")
    if r.top_k < 1:
        raise MegamodError(f"reference.top_k = {r.top_k}: at least 1 was expected")
    return [
        (r != ReferenceConfig() and not needs & {"reference", "teacher"}, "reference", f"the loss {name} needs none"),
        (r.top_k != ReferenceConfig.top_k and "teacher" not in needs, "reference.top_k", f"the loss {name} needs no teacher"),
        (r.path is not None and not has, "reference.path", f"reference.kind is {r.kind!r}"),
        (r.sync_alpha != 1.0 and not follows, "reference.sync_alpha", "reference.sync_every is None"),
    ]


def check_weights(chat: ChatConfig) -> None:
    """Refuse `weights` that are no regular expressions, and those below 0. Raises MegamodError."""
    for pattern, weight in (chat.weights or {}).items():
        key = f"data.chat.weights: {pattern!r}"
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise MegamodError(f"{key}: no regular expression: {error}") from None
        if not (_fits(weight, float) and 0 <= weight <= LARGEST_WEIGHT):
            raise MegamodError(f"{key} = {weight!r}: a finite number of at least 0 was expected")


def loss_name(function: Callable[..., Any]) -> str:
    """What a loss is called, whatever `functools.partial` binds."""
    return _name(losses.unbound(function)[0])


def _check_loss(function: Callable[..., Any]) -> None:
    """A loss is called with a head and a batch; the keywords that `partial` binds must be its own, of the types it declares."""
    inner, bound = losses.unbound(function)
    try:
        own = inspect.signature(inner)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in own.parameters.values())
        for name in bound:
            if name not in own.parameters and not takes_any:
                raise MegamodError(f"loss: {_name(inner)} takes no keyword {name!r}, {nearest(name, _keywords(inner))}")
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError) as error:
        raise MegamodError(f"loss: {_name(inner)} cannot be called with a head and a batch: {error}") from None
    for part in losses.parts_of(function):
        _check_loss(part)
    hints = _annotations(function)
    for name, value in bound.items():
        if name in hints and not _fits(value, hints[name]):
            raise MegamodError(f"loss.{name} = {value!r}: {_expected(hints[name])} was expected")


def save(cfg: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as JSON, beside the run's results. Functions are written by name and arguments."""
    Path(path).write_text(json.dumps(as_json(cfg), indent=1) + "\n", encoding="utf-8")


def as_json(value: Any) -> Any:
    """`value` in JSON's types: dataclasses as objects, callables as `module:name` with their bound arguments."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, functools.partial):
        arguments = {"arguments": as_json(value.args)} if value.args else {}
        return {"call": as_json(value.func), **arguments, **{k: as_json(v) for k, v in value.keywords.items()}}
    if callable(value):
        return f"{value.__module__}:{_name(value)}"
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float | None) else repr(value)


def _name(function: Callable[..., Any]) -> str:
    """A function's name; for an object that can be called, its class's."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _keyword_hint(error: TypeError) -> str:
    """`RunConfig.__init__() got an unexpected keyword argument 'lrr'` with the nearest field added."""
    text = str(error)
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)  # newer Pythons add a hint of their own
    cls = globals().get(match[1]) if match else None
    if match and cls is not None and dataclasses.is_dataclass(cls):
        return f"{match[1]} has no field {match[2]!r}, {nearest(match[2], [f.name for f in dataclasses.fields(cls)])}"
    return text


def _replace(node: Any, path: list[str], text: str, key: str) -> Any:
    head, *rest = path
    if isinstance(node, functools.partial) or (callable(node) and not dataclasses.is_dataclass(node)):
        if not rest:
            return _rebind(node, head, text, key)
        part = losses.unbound(node)[1].get(head)  # a loss within a loss: loss.loss.beta
        if not callable(part):
            raise MegamodError(f"override {key}={text}: {rest[0]!r} is below a plain value")
        return functools.partial(node, **{head: _replace(part, rest, text, key)})
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise MegamodError(f"override {key}={text}: {head!r} is below a plain value")
    names = [f.name for f in dataclasses.fields(node)]
    if head not in names:
        raise MegamodError(f"override {key}={text}: {type(node).__name__} has no field {head!r}, {nearest(head, names)}")
    hint = typing.get_type_hints(type(node))[head]
    if rest and getattr(node, head) is None:
        return dataclasses.replace(node, **{head: _made(hint, rest, text, key)})
    value = _replace(getattr(node, head), rest, text, key) if rest else _parse(text, hint, key)
    return dataclasses.replace(node, **{head: value})


def _made(hint: Any, path: list[str], text: str, key: str) -> Any:
    """What is None so far, begun by its one field without a default, if it has one: `eval.data=held_out.jsonl`, `lora.r=16`."""
    for cls in filter(dataclasses.is_dataclass, typing.get_args(hint)):
        needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        if not needed:
            return _replace(typing.cast(Any, cls)(), path, text, key)
        if path == needed:
            return typing.cast(Any, cls)(**{path[0]: _parse(text, typing.get_type_hints(cls)[path[0]], key)})
        if len(needed) == 1:
            raise MegamodError(f"override {key}={text}: {key.rpartition('.')[0]} is None: give {key.rpartition('.')[0]}.{needed[0]} first")
    raise MegamodError(f"override {key}={text}: {path[0]!r} is below a plain value")


def _rebind(function: Callable[..., Any], name: str, text: str, key: str) -> Callable[..., Any]:
    """`loss.verdict_weight=6`: bind a keyword of the configured function."""
    keywords = _keywords(function)
    if name not in keywords:
        raise MegamodError(f"override {key}={text}: the function takes no keyword {name!r}, {nearest(name, keywords)}")
    hints = _annotations(function)
    return functools.partial(function, **{name: _parse(text, hints[name], key) if name in hints else _literal(text)})


def _keywords(function: Callable[..., Any]) -> list[str]:
    """What can be bound by name: keyword-only arguments, and others that have a default."""
    arguments = inspect.signature(function).parameters.values()
    return [p.name for p in arguments if p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty)]


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """The types that a function's arguments declare; none where they cannot be known here."""
    function, _ = losses.unbound(function)
    try:
        return typing.get_type_hints(function if inspect.isroutine(function) else type(function).__call__)
    except (NameError, TypeError, AttributeError):
        return {}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _parse(text: str, hint: Any, key: str) -> Any:
    value = text if _fits(text, hint) and not _fits(_literal(text), hint) else _literal(text)
    value = _coerce(value, hint)
    if not _fits(value, hint):
        raise MegamodError(f"override {key}={text}: {_expected(hint)} was expected")
    return value


def _coerce(value: Any, hint: Any) -> Any:
    """Ints serve where floats are asked for, lists where tuples are."""
    if isinstance(value, list):
        value = tuple(value)
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if isinstance(value, int) and int not in options and float in options and _fits(value, float):
        return float(value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in args)
    if origin is tuple:
        inner = args[0] if args[-1] is Ellipsis else None
        if not isinstance(value, tuple) or (inner is None and len(value) != len(args)):
            return False
        return all(_fits(v, inner or args[i]) for i, v in enumerate(value))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if hint is float:  # the comparison is false for NaN, and takes integers too large for a float
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if getattr(hint, "_is_protocol", False):  # the loss: any function
        return callable(value)
    kind = origin or hint
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(map(_expected, typing.get_args(hint)))
    if typing.get_origin(hint) is not None:
        return str(hint)
    return {float: "finite float", types.NoneType: "None"}.get(hint, str(getattr(hint, "__name__", hint)))


def _check_types(node: Any, prefix: str) -> None:
    hints = typing.get_type_hints(type(node))
    for f in dataclasses.fields(node):
        value, key = getattr(node, f.name), f"{prefix}{f.name}"
        if not _fits(value, hints[f.name]):
            raise MegamodError(f"{key} = {value!r}: {_expected(hints[f.name])} was expected")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            _check_types(value, f"{key}.")
