"""LoRA training speed of this machine's CPU: megamod beside Hugging Face's Trainer with peft, on documents as moderation has them.

    python tools/bench_train.py
    python tools/bench_train.py --shape configs/models/smollm2-135m --documents 64 --r 16 --repeats 3

All train the same: one checkpoint with random weights, one adapter to begin with, the same documents (log-normal lengths, the last 8 %
of each trained), AdamW, the same number of updates an epoch, in the same dtype on as many threads.

    megamod             megamod.train, as a config runs it: packed rows, logits where a label is
    batch 1             Trainer, a document at a time and so without padding, gradients accumulated
    batch 8 grouped     Trainer, 8 documents of similar lengths, padded, as train_sampling_strategy="group_by_length" makes batches

Few documents cannot be grouped well, and padding would count against Trainer: so the documents are batches that group_by_length made of
4,000, every so many by their lengths, and Trainer takes them as they are.

Trainer neither logs nor saves, keeps no kv cache and has its fused AdamW; megamod writes its line a step. Each measurement is a process
of its own, and they take turns. The first epoch warms up, the second is timed: each sees every document once in it, and padding counts
as no token. Before that Trainer is asked for the loss and the gradient's norm over the documents of megamod's first step: where they
differ, both do not train the same, which is an error. Prints a table and, as the last line, one JSON object.

Where other work shares the cores seconds say little. Compare CPU seconds then, "× CPU", on one thread, which waits for no other one:
--threads 1.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from megamod import losses
from megamod.batch import Batch
from megamod.command import command
from megamod.config import DataConfig, LogConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig, SyntheticData
from megamod.data.documents import IGNORED, InMemory, synthetic
from megamod.data.loader import peek
from megamod.data.packing import pack
from megamod.errors import MegamodError, expected
from megamod.losses import Loss
from megamod.model.shape import Shape, read_shape
from megamod.weights import peft
from megamod.weights.load import Random
from megamod.weights.table import hf_shapes

MODELS = Path(__file__).parents[1] / "configs" / "models"
OURS = "megamod"
THEIRS = {"batch 1": 1, "batch 8 grouped": 8}  # Trainer's settings: documents of a batch
LARGE = 4000  # documents of a set that can be grouped well, at least
EPOCHS = 2  # one to warm up, one that is timed
# How far apart, of their size, the same loss and gradient may be.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}
# A model and documents for which a test has the time.
QUICK = {"shape": MODELS / "tiny-qwen3", "documents": 32, "per_update": 8, "mean": 60.0, "longest": 256, "repeats": 1, "threads": 1}


@dataclass(frozen=True)
class Job:
    """What all train: the directory `work` has the model, the adapter and the documents."""

    work: str
    dtype: str
    updates: int  # in an epoch
    per_update: int  # documents
    row_length: int
    lr: float
    seed: int

    @property
    def model(self) -> Path:
        return Path(self.work, "model")

    @property
    def adapter(self) -> Path:
        return Path(self.work, "adapter")

    @property
    def documents(self) -> Path:
        return Path(self.work, "documents.jsonl")

    def config(self) -> RunConfig:
        """megamod's run of it; what is not named here is as it is by default."""
        return RunConfig(
            dir=str(Path(self.work, "run")),
            steps=EPOCHS * self.updates,
            model=ModelConfig(path=str(self.model), dtype=self.dtype),  # type: ignore[arg-type]
            data=DataConfig(train=str(self.documents), row_length=self.row_length, rows_per_step=1),
            optim=OptimConfig(lr=self.lr, schedule="constant", betas=(0.9, 0.999), weight_decay=0.0),
            log=LogConfig(tensorboard=False),
            lora=LoraConfig(path=str(self.adapter)),
            seed=self.seed,
        )


@dataclass(frozen=True)
class Ran:
    """What one process found."""

    seconds: float  # of the timed epoch
    cpu_seconds: float  # of all threads in it
    updates: int  # in both epochs, as all that follows
    labelled: int  # tokens that the loss was asked for
    positions: int  # tokens that the model computed, padding included
    loss: float  # the mean over updates
    first_loss: float  # of the documents of megamod's first step, before any update
    first_norm: float  # of that loss's gradient


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Path, default=MODELS / "smollm2-135m", help="a directory with config.json (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=64, help="of an epoch (default: %(default)s)")
    parser.add_argument("--per-update", type=int, default=16, help="documents of an update, a multiple of 8 (default: %(default)s)")
    parser.add_argument(
        "--mean", type=float, default=SyntheticData.mean_length, help="tokens of a document, before the cut (default: %(default)s)"
    )
    parser.add_argument("--sigma", type=float, default=SyntheticData.sigma, help="of the lengths' logarithms (default: %(default)s)")
    parser.add_argument("--labelled", type=float, default=SyntheticData.labelled, help="share of the tokens (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=2048, help="tokens at which documents are cut (default: %(default)s)")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters; alpha is twice as much (default: %(default)s)")
    parser.add_argument("--targets", default="all-linear", help="adapted linears, with commas: q_proj,v_proj (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many is told (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s, the cores")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--work", type=Path, help="a new directory that keeps model, documents and run; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few documents: whether all works, not how fast")
    parser.add_argument("--as-one", nargs=2, metavar=("NAME", "WORK"), help=argparse.SUPPRESS)
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.as_one:
        name, work = args.as_one
        job = Job(**json.loads(Path(work, "job.json").read_text(encoding="utf-8")))
        ran = ours(job) if name == OURS else theirs(job, THEIRS[name])
        Path(work, "ran.json").write_text(json.dumps(asdict(ran)), encoding="utf-8")
        return
    check(args)
    versions = installed()
    if args.work is not None:
        with expected("a new directory that can be made"):
            args.work.mkdir(parents=True)
    with nullcontext(args.work) if args.work is not None else tempfile.TemporaryDirectory(prefix="megamod-") as work:
        job, documents = prepared(args, Path(work))
        tokens = int(documents.lengths.sum())
        runs: dict[str, list[Ran]] = {name: [] for name in (OURS, *THEIRS)}
        for repeat in range(args.repeats):
            for name, found in runs.items():
                found.append(launched(name, job, args.threads))
                print(f"{repeat + 1}/{args.repeats} · {name} · {tokens / found[-1].seconds:,.0f} tokens/s", flush=True)
        record = json.loads(Path(work, "run", "run.json").read_text(encoding="utf-8"))
    refuse(runs, documents.trained, args.dtype)
    found = {name: summary(ran, tokens) for name, ran in runs.items()}
    ratios = {name: found[OURS]["tokens_per_second"] / found[name]["tokens_per_second"] for name in THEIRS}
    cpu_ratios = {name: found[OURS]["tokens_per_cpu_second"] / found[name]["tokens_per_cpu_second"] for name in THEIRS}
    console = Console(highlight=False)
    console.print(shown(found, ratios, cpu_ratios))
    console.print(
        "computed: tokens that the model went through, padding too, per token of a document · loss: the mean over both epochs",
        soft_wrap=True,
    )
    console.print(f"the first step's documents: {agreement(runs)}", soft_wrap=True)
    asked = {name: getattr(args, name) for name in vars(args) if name not in ("as_one", "work", "quick")}
    settings = {**asked, "shape": str(args.shape), "updates": job.updates, "row_length": job.row_length}
    versions |= record["versions"]
    answer = {"settings": settings, "tokens": tokens, "labelled": documents.trained, "versions": versions, "git": record["git"]}
    print(json.dumps({**answer, "found": found, "ratios": ratios, "cpu_ratios": cpu_ratios}))


def check(args: argparse.Namespace) -> None:
    """Raises MegamodError for a value that means nothing."""
    for option in ("documents", "per_update", "r", "repeats", "threads"):
        if (value := getattr(args, option)) < 1:
            raise MegamodError(f"--{option.replace('_', '-')} {value}: at least 1 was expected")
    most = max(THEIRS.values())
    if args.per_update % most or args.documents % args.per_update:
        given = f"--documents {args.documents} --per-update {args.per_update}"
        raise MegamodError(f"{given}: a multiple of {most} was expected, and documents a multiple of it")
    bounds = {"mean": (1, math.inf), "sigma": (0, math.inf), "labelled": (0, 1), "longest": (2, math.inf), "lr": (0, math.inf)}
    for option, (least, most) in {**bounds, "seed": (0, math.inf)}.items():
        if not (least <= (value := getattr(args, option)) <= most and math.isfinite(value)):
            bound = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise MegamodError(f"--{option} {value}: {bound}, finite, was expected")
    if args.work is not None and args.work.exists():
        raise MegamodError(f"--work {args.work}: exists; a new directory was expected")


def installed() -> dict[str, str]:
    """Versions of what is needed beyond megamod. Raises MegamodError for what is not there."""
    try:
        return {package: version(package) for package in ("peft", "accelerate")}
    except PackageNotFoundError as error:
        raise MegamodError(f"{error}: pip install '.[test]' has what this compares with") from None


def prepared(args: argparse.Namespace, work: Path) -> tuple[Job, InMemory]:
    """Model, adapter and documents in the directory `work`, and what to do with them."""
    shape = read_shape(args.shape)
    if shape.longest_document is not None and args.longest > shape.longest_document:
        raise MegamodError(f"--longest {args.longest}: this model attends to {shape.longest_document} tokens: use at most as many")
    documents = grouped(args, shape)
    updates = args.documents // args.per_update
    job = Job(str(work), args.dtype, updates, args.per_update, row_length(documents, updates), args.lr, args.seed)
    targets = args.targets if args.targets == "all-linear" else tuple(args.targets.split(","))
    write_adapter(job, LoraConfig(r=args.r, lora_alpha=2.0 * args.r, target_modules=targets), shape)
    with job.documents.open("w", encoding="utf-8") as file:
        for document in (documents[number] for number in range(len(documents.lengths))):
            columns = {"input_ids": document.tokens, "labels": document.labels, "verdict": document.verdict.astype(int)}
            file.write(json.dumps({name: column.tolist() for name, column in columns.items()}) + "\n")
    write_model(job, args.shape, shape)
    (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    filled = int(documents.lengths.sum()) / (updates * job.row_length)
    print(
        f"{shape.family} {shape.parameters() / 1e6:.0f}M · {args.documents} documents, {int(documents.lengths.sum()):,} tokens, "
        f"{documents.trained:,} labelled · {updates} updates an epoch · rows of {job.row_length} tokens, {filled:.1%} filled",
        flush=True,
    )
    return job, documents


def grouped(args: argparse.Namespace, shape: Shape) -> InMemory:
    """Documents in batches of similar lengths, as a large set has them: transformers sorts 50 updates' documents at a time."""
    group, size = 50 * args.per_update, max(THEIRS.values())
    count = group * -(-max(LARGE, args.documents) // group)
    large = synthetic(SyntheticData(count, args.mean, args.sigma, args.labelled), shape.vocab, args.longest, args.seed)
    order = np.argsort(-large.lengths.reshape(-1, group), axis=1, kind="stable") + np.arange(0, count, group)[:, None]
    batches = order.reshape(-1, size)
    batches = batches[np.argsort(large.lengths[batches].sum(1), kind="stable")]
    wanted = args.documents // size
    chosen = batches[(2 * np.arange(wanted) + 1) * len(batches) // (2 * wanted)]  # one of each stretch of lengths
    return InMemory([large[number] for number in chosen.ravel().tolist()])


def row_length(documents: InMemory, updates: int) -> int:
    """The shortest rows of which the documents fill as many as there are updates: a row is a step then, and no epoch ends in one.

    Raises:
        MegamodError: there is no such length.
    """
    length = int(documents.lengths.max())
    while (rows := len(pack(documents.lengths, length))) > updates:
        length += 1
    if rows < updates:
        raise MegamodError(
            f"no row length makes {updates} rows of these documents, {length} make {rows}: use another --seed, or more --per-update"
        )
    return length


def write_model(job: Job, like: Path, shape: Shape) -> None:
    """A checkpoint of random weights."""
    dtype, source = peft.DTYPES[job.dtype], Random(shape, job.seed)
    job.model.mkdir()
    config = json.loads((like / "config.json").read_text(encoding="utf-8"))
    (job.model / "config.json").write_text(json.dumps({**config, "torch_dtype": job.dtype, "quantization_config": None}), encoding="utf-8")
    tensors = {name: source.read(name, [0] * len(size), size).to(dtype) for name, size in hf_shapes(shape).items()}
    save_file(tensors, job.model / "model.safetensors", metadata={"format": "pt"})


def write_adapter(job: Job, cfg: LoraConfig, shape: Shape) -> None:
    """An adapter that does something, so that all of its gradients count when they are compared: with B = 0, A has none."""
    generator = torch.Generator().manual_seed(job.seed)
    shapes = peft.tensors(cfg, shape)
    tensors = {
        name: torch.randn(size, generator=generator) * size[1] ** -0.5 * (0.1 if ".lora_B." in name else 1.0)
        for name, size in shapes.items()
    }
    dtype = peft.DTYPES[job.dtype]
    peft.write(job.adapter, {name: tensor.to(dtype) for name, tensor in tensors.items()}, cfg, shape, base=str(job.model))


def launched(name: str, job: Job, threads: int) -> Ran:
    """One measurement in a process of its own. Raises MegamodError after saying what a process that failed has said."""
    if name == OURS:
        shutil.rmtree(Path(job.work, "run"), ignore_errors=True)  # it would be resumed
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    one = [sys.executable, __file__, "--as-one", name, job.work]
    done = subprocess.run(one, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise MegamodError(f"{name}: its process ended with status {done.returncode}: what it said stands above")
    return Ran(**json.loads(Path(job.work, "ran.json").read_text(encoding="utf-8")))


def ours(job: Job) -> Ran:
    """megamod's run, by the loop that every run has; what its loss sees is counted on the way."""
    from megamod.train import train  # not above: it takes seconds, and the other processes do without

    labelled, positions, cpu = [], [], []

    def counted(head: Any, batch: Batch) -> Loss:
        labelled.append(len(batch.labels))
        positions.append(len(batch.tokens))
        cpu.append(time.process_time())
        return losses.cross_entropy(head, batch)

    directory = train(replace(job.config(), loss=counted))
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == len(cpu) == EPOCHS * job.updates, "a step is one row"
    return Ran(
        seconds=sum(step["step_seconds"] for step in steps[job.updates :]),
        cpu_seconds=cpu[-1] - cpu[job.updates - 1],  # from loss to loss: as many forward and backward passes, all rows being as long
        updates=len(steps),
        labelled=sum(labelled),
        positions=sum(positions),
        loss=statistics.mean(step["loss"] for step in steps),
        first_loss=steps[0]["loss"],
        first_norm=steps[0]["grad_norm"],
    )


def theirs(job: Job, size: int) -> Ran:
    """Trainer's run, `size` documents in a batch."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=peft.DTYPES[job.dtype], attn_implementation="sdpa")
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base, job.adapter, is_trainable=True, autocast_adapter_dtype=False)
    labelled, positions, stamps = [], [], []

    def collated(features: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(feature["input_ids"]) for feature in features)
        batch = {
            key: torch.tensor([feature[key] + [blank] * (longest - len(feature[key])) for feature in features])
            for key, blank in (("input_ids", 0), ("labels", IGNORED))
        }
        if len(features) > 1:  # a mask that hides nothing would only cost time
            batch["attention_mask"] = torch.tensor([[1] * (n := len(f["input_ids"])) + [0] * (longest - n) for f in features])
        labelled.append(int((batch["labels"][:, 1:] != IGNORED).sum()))
        positions.append(batch["labels"].numel())
        return batch

    class Stamps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append((time.perf_counter(), time.process_time()))

    arguments = TrainingArguments(
        output_dir=str(Path(job.work, "trainer")), use_cpu=True, per_device_train_batch_size=size,
        gradient_accumulation_steps=job.per_update // size, num_train_epochs=EPOCHS, learning_rate=job.lr,
        lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.999, weight_decay=0.0, max_grad_norm=1.0, seed=job.seed,
        train_sampling_strategy="random" if size == 1 else "sequential", remove_unused_columns=False,
        logging_strategy="no", logging_nan_inf_filter=False, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    documents = [json.loads(line) for line in job.documents.read_text(encoding="utf-8").splitlines()]
    documents = [{key: document[key] for key in ("input_ids", "labels")} for document in documents]
    trainer = Trainer(model, arguments, data_collator=collated, train_dataset=documents, callbacks=[Stamps()])
    first_loss, first_norm = first_step(trainer, job)
    done = trainer.train()
    (began, cpu_began), (ended, cpu_ended) = stamps[job.updates - 1], stamps[-1]
    return Ran(ended - began, cpu_ended - cpu_began, len(stamps), sum(labelled), sum(positions), done.training_loss, first_loss, first_norm)


def first_step(trainer: Any, job: Job) -> tuple[float, float]:
    """Trainer's loss and gradient norm over the documents of megamod's first step, one by one."""
    (batch,) = peek(job.config(), read_shape(job.model), 1)
    labels = torch.full_like(batch.tokens, IGNORED)
    labels[batch.rows + 1] = batch.labels  # Hugging Face shifts them itself
    count, loss = torch.tensor(len(batch.labels)), 0.0
    trainer.model.train()
    for tokens, wanted in zip(batch.tokens.split(batch.lengths), labels.split(batch.lengths), strict=True):
        if (wanted != IGNORED).any():
            share = trainer.compute_loss(trainer.model, {"input_ids": tokens[None], "labels": wanted[None]}, num_items_in_batch=count)
            share.backward()
            loss += float(share)
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    trainer.model.zero_grad()
    return loss, norm


def refuse(runs: dict[str, list[Ran]], trained: int, dtype: str) -> None:
    """Raises MegamodError unless all have trained the same: updates, labelled tokens, the first step's loss and its gradient's norm."""
    mine = runs[OURS][0]
    for name, ran in ((name, ran) for name, found in runs.items() for ran in found):
        if (ran.updates, ran.labelled) != (mine.updates, EPOCHS * trained):
            raise MegamodError(
                f"{name}: {ran.updates} updates over {ran.labelled} labelled tokens; {mine.updates} over {EPOCHS * trained} were expected"
            )
        for what in ("first_loss", "first_norm"):
            value, right = getattr(ran, what), getattr(mine, what)
            if not math.isclose(value, right, rel_tol=TOLERANCE[dtype]):
                raise MegamodError(f"{name}: {what} is {value:.6f}, megamod's {right:.6f}: they do not train the same")


def agreement(runs: dict[str, list[Ran]]) -> str:
    """How far Trainer is from megamod in what must be the same."""
    mine, far = runs[OURS][0], []
    for what in ("first_loss", "first_norm"):
        right = getattr(mine, what)
        far.append(max(abs(getattr(ran, what) / right - 1) for found in runs.values() for ran in found))
    return f"loss {mine.first_loss:.5f}, the same within {far[0]:.0e} · gradient norm {mine.first_norm:.5f}, within {far[1]:.0e}"


def summary(runs: Sequence[Ran], tokens: int) -> dict[str, Any]:
    """The medians of a contender's runs."""
    return {
        "each": [tokens / ran.seconds for ran in runs],
        "tokens_per_second": tokens / statistics.median(ran.seconds for ran in runs),
        "tokens_per_cpu_second": tokens / statistics.median(ran.cpu_seconds for ran in runs),
        "positions_per_token": statistics.median(ran.positions for ran in runs) / (EPOCHS * tokens),
        "labelled": runs[0].labelled // EPOCHS,
        "updates": runs[0].updates // EPOCHS,
        "runs": [asdict(ran) for ran in runs],
    }


def shown(found: dict[str, dict[str, Any]], ratios: dict[str, float], cpu_ratios: dict[str, float]) -> Table:
    """A line for each contender."""
    table = Table(title="tokens of documents per second", box=SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for column in ("median", "runs", "per CPU s", "computed", "loss", "×", "× CPU"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in found.items():
        each = sorted(one["each"])
        table.add_row(
            name, f"{one['tokens_per_second']:,.0f}", f"{each[0]:,.0f}–{each[-1]:,.0f}", f"{one['tokens_per_cpu_second']:,.0f}",
            f"{one['positions_per_token']:.2f}", f"{one['runs'][0]['loss']:.2f}",
            *((f"{ratio[name]:.2f}" if name in ratio else "") for ratio in (ratios, cpu_ratios)),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
