"""The training loop: set-up, loop, tear-down. Read this first.

torchrun --nproc-per-node 2 -m megamod.train configs/tiny.py parallel.tp=2
"""

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from megamod import checkpoint, config, files, optim
from megamod.batch import Batch
from megamod.checkpoint import Begun
from megamod.command import command
from megamod.config import RunConfig, loss_name
from megamod.data import chat, saved_batch
from megamod.data.documents import Documents
from megamod.data.loader import Loader
from megamod.data.store import open_documents, prepare_all
from megamod.data.stored import Compared
from megamod.errors import MegamodError, during
from megamod.evaluate.validation import Validation, labelled_rows
from megamod.log import Log, add_to_record, record_run
from megamod.losses import needs_of
from megamod.memory import Peak
from megamod.model.backends import overlap_tp
from megamod.model.build import build, data_parallel
from megamod.model.lora import Plan
from megamod.model.shape import Shape, read_shape
from megamod.optim import Optimizer, Update, learning_rate
from megamod.parallel import grid as grids
from megamod.parallel.collectives import gathered, on_first, together
from megamod.parallel.grid import Grid
from megamod.reference import Reference, adapter_beside, is_asked, model_at_start
from megamod.saver import Saver
from megamod.step import train_step
from megamod.watch import Stop, Stragglers, Watchdog
from megamod.weights import fingerprint, peft, pissa
from megamod.weights.bitsandbytes import quantised, quantization_at
from megamod.weights.export import check as check_export
from megamod.weights.export import export, refuse_taken
from megamod.weights.load import Random, Source, load, weights_at
from megamod.weights.table import Placed, hf_shapes


def train(cfg: RunConfig) -> Path:
    """Run `cfg` from its start, or from its newest checkpoint. Every rank calls it. Returns the run's directory.

    The processes stay joined afterwards: a notebook may go on with another run, or judge with this one's model.

    Raises:
        MegamodError: whatever the user can mend, before the first step where that is possible.
    """
    directory = Path(cfg.dir)
    with ExitStack() as held:
        try:
            shape = model_shape(cfg)
            if cfg.deterministic:
                torch.use_deterministic_algorithms(True)
            grid = grids.start(cfg.parallel, shape, cfg.seed)
            grids.check_rows(cfg, shape, grid.world)
            together(lambda: held.enter_context(files.locked(directory)), acts=grid.rank == 0)
            _train(cfg, shape, grid, directory)
        except MegamodError:
            grids.stop()
            raise
    grids.stop()
    return directory


def _train(cfg: RunConfig, shape: Shape, grid: Grid, directory: Path) -> None:
    checkpoints, exports = directory / "checkpoints", directory / ("hf" if cfg.lora is None else "peft")
    begun, passed = _begun(cfg, checkpoints, grid)
    plan = together(lambda: _plan(cfg, shape, begun))
    trained = list(plan.tensors(shape) if plan is not None else hf_shapes(shape))
    optim.check(cfg.optim, trained, grid.device, grid.dp_cp.size)

    d = cfg.data
    stores = on_first(lambda: prepare_all(d, cfg.model.path, shape.vocab, directory / "data", shape.score))
    together(lambda: _see(directory))
    documents = together(lambda: open_documents(d, [store.path for store in stores], shape.vocab, cfg.seed))
    assert documents is not None
    together(partial(_check_documents, cfg, shape, documents))
    stored = together(partial(_stored, cfg, documents))
    documents = stored or documents
    loader = Loader(
        documents, row_length=d.row_length, rows_per_step=d.rows_per_step, rows_per_micro_batch=d.rows_per_micro_batch,
        seed=cfg.seed, dp_rank=grid.dp.rank, dp_size=grid.dp.size,
    )  # fmt: skip
    # What must be the same for a resumed run to go on with the same model, and to see the rows that the first would have seen.
    identity = {
        "shape": config.as_json(shape), "model.path": cfg.model.path, "data": documents.fingerprint(),
        "data.chat": config.as_json(d.chat), "data.row_length": d.row_length, "data.rows_per_step": d.rows_per_step, "seed": cfg.seed,
        "lora": plan.identity if plan is not None else None,
    }  # fmt: skip
    done = first = _steps_done(begun, identity, cfg.steps)
    validation = together(lambda: _validation(cfg, shape, directory, first))
    texts = together(lambda: chat.companions(d.chat))  # as they are now: the export is of what was trained

    if cfg.checkpoint.export and first < cfg.steps:
        _check_exports(shape, cfg, exports, first)
    source = weights_of(cfg, shape)
    compared = together(lambda: adapter_beside(cfg, shape, plan))
    if cfg.parallel.tp_comm_overlap:
        overlap_tp(d.row_length * d.rows_per_micro_batch // grid.cp.size, shape.hidden, grid.tp.size, grid.device)
    with Peak(grid.device) as peak:
        chunks, backends = build(cfg.model, shape, grid, deterministic=cfg.deterministic)
        base = together(lambda: load(chunks, shape, grid, source, where=cfg.model.path))
    assert base is not None
    items: Sequence[Placed] = [item for item in base if isinstance(item, Placed)]
    adapters, about = None, dict(identity)
    known = None  # the base's fingerprint
    if plan is not None:
        before, known = fingerprint.of_model(base, grid, None), fingerprint.of_model(base, grid)
        together(partial(_check_base, begun, plan, known))
        if compared is not None and not isinstance(compared, Plan):
            together(partial(peft.check_fingerprint, compared, known, "the reference"))
        about |= {"quantization": config.as_json(shape.quantization)}
        about |= {"dtype": cfg.model.dtype, "base": known, "initial": plan.begun(known, shape)}
        initial = directory / about["initial"]
        if begun is not None:
            together(partial(pissa.bring, begun.path.resolve().parents[1] / initial.name, initial), acts=grid.rank == 0)
        adapters = plan.attach(chunks, shape, grid, source, cfg.seed, initial, compared)
        items = adapters.items
    wrapped = data_parallel(chunks, grid, overlap=cfg.optim.overlap_grad_reduce)
    optimizer = Optimizer(cfg.optim, wrapped, items, grid)
    if stored is not None and begun is None and stored.top_k is None:  # any model may be a teacher
        model = model_at_start(known or fingerprint.of_model(base, grid), plan, adapters, grid)
        together(partial(stored.check, model))
    reference = Reference(cfg, shape, grid, wrapped, items, adapters, source, stored)
    about |= {"reference": reference.identity, "launch": _launch()}
    if begun is not None:
        together(partial(_check_reference, begun, reference.identity))
        checkpoint.resume(begun.path, optimizer, reference.items)
        reference.publish()

    log = together(partial(Log, cfg.log, directory, cfg.steps, first, grid.world, grid.device, active=grid.reports))
    assert log is not None
    paths = gathered(adapters.paths if adapters is not None else {})
    facts = {"grid": str(grid), "backends": backends, "parameters": shape.parameters(), "identity": about}
    facts["adapters"] = {name: path for part in paths for name, path in part.items()}
    together(partial(record_run, cfg, directory, facts), acts=grid.rank == 0)
    chosen = " · ".join(f"{question} {answer}" for question, answer in backends.items())
    log.say(f"{shape.family} {shape.parameters() / 1e9:.3f}B · {grid} · {grid.device.type} · {chosen}")
    log.say(f"loaded: private memory from {peak.before:,.0f} to at most {peak.value:,.0f} MiB")
    if adapters is not None:
        log.say(str(adapters))
    for store in stores:
        log.say(str(store))
    if is_asked(cfg):
        log.say(f"{loss_name(cfg.loss)} compares with the reference: {reference.identity}")
    log.say(f"{loader.rows} rows of {d.row_length} tokens, {loader.utilisation:.1%} filled")
    if not documents.verdicts:
        log.say("no document marks verdict tokens: a loss that weighs them has none to weigh")
    for fault in passed:
        log.say(f"passed over: {fault}")
    if begun is not None:
        log.say(f"resumed after step {first} from {begun.path}")

    stopped = validation.stops if validation is not None else None
    interrupted = None
    best, beaten = _kept(validation)
    skips = begun.about.get("skips", 0) if begun is not None else 0  # in a row
    stragglers = Stragglers(wrapped, grid)
    watchdog = Watchdog(directory / "stacks", grid.rank, 60 * cfg.log.stacks_after_minutes, log.say)
    background = grids.background(10 * cfg.parallel.timeout_minutes)  # writing takes as long as the storage does
    with (
        Saver(checkpoints, cfg.checkpoint, grid, background, begun, log.say) as saver,
        watchdog,
        Stop(cfg.checkpoint.stop_at, grid) as stop,
    ):
        while done < cfg.steps and stopped is None and (interrupted := stop.asked()) is None:
            watchdog.beat(done + 1)
            _seed(cfg.seed, done, grid)
            batches = reference.complete(loader.step(done), partial(loader.mismatched, done, grid.pp.size))
            with during(f"loss {loss_name(cfg.loss)}, step {done + 1}"):
                metrics = train_step(wrapped, batches, cfg.loss, grid)
            lr = learning_rate(cfg.optim, done, cfg.steps)
            update = optimizer.step(lr)
            done += 1
            skips = skips + 1 if update.skipped else 0
            if skips >= cfg.optim.max_skips:
                _refuse(cfg, done, metrics, update, batches, directory, grid)
            reference.follow(done)
            flops = grid.dp.size * sum(_flops(shape, plan, batch) for batch in batches)
            values = {**metrics, "lr": lr, "grad_norm": update.grad_norm, **({"skipped": 1.0} if update.skipped else {})}
            log.step(done, values, tokens=d.rows_per_step * d.row_length, flops=flops)
            if done % cfg.log.stragglers_every == 0 and (slow := stragglers.found()):
                log.say(slow)
            watchdog.rest()
            if validation is not None and validation.is_due(done):
                began = time.perf_counter()
                found = validation.run(done, chunks, grid)
                log.validation(done, found, time.perf_counter() - began)
                stopped = validation.stops
            best, beaten = _kept(validation)
            if done == cfg.steps or stopped is not None or best == done or _is_scheduled(cfg, done):
                saver.save(done, optimizer, {**about, "skips": skips}, reference.items, best, beaten)
        if interrupted is not None and done > saver.step:
            saver.save(done, optimizer, {**about, "skips": skips}, reference.items, best, beaten)
        saver.finish()

    stragglers.close()
    if interrupted is not None:
        how = "the same command" if cfg.checkpoint.resume == "auto" else "the same command with checkpoint.resume=auto"
        log.say(f"stopped after step {done} of {cfg.steps}: {interrupted}; {how} goes on from there")
        together(partial(_ask_again, cfg.checkpoint.requeue_file), acts=grid.rank == 0)
        log.close()
        return
    if stopped is not None:
        log.say(f"stopped after step {done}: {stopped}")
    if cfg.checkpoint.export:
        target = exports / f"step-{best or done:08d}"
        if target.exists():  # the run had ended before, and was only asked again
            log.say(f"exported before: {target}")
        elif plan is not None:
            saved = together(partial(_saved, checkpoints, best or done))
            assert saved is not None
            together(lambda: peft.export(saved, target, shape, texts=texts), acts=grid.rank == 0)
            log.say(f"exported {target}")
        else:
            _restore(checkpoints, best, done, optimizer, log)
            exported = export(chunks, shape, grid, target, source=cfg.model.path, tokenizer=d.chat.tokenizer, texts=texts)
            log.say(f"exported {exported}")
    if plan is not None:
        after = fingerprint.of_model(base, grid, None)
        together(partial(add_to_record, directory, {"base": {"before": before, "after": after}}), acts=grid.rank == 0)
        assert after == before, "adapters leave the base as it is"
        log.say(f"the base is as it was: {after}")
    log.close()


def _begun(cfg: RunConfig, checkpoints: Path, grid: Grid) -> tuple[Begun | None, list[str]]:
    """The checkpoint to go on from, and what is wrong with newer ones. A launcher that starts a run again means what that launch saved."""
    asked = cfg.checkpoint.resume
    is_again = any(os.environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if asked == "auto" or is_again:
        newest, passed = checkpoint.newest(checkpoints, grid)
        begun = Begun.at(newest) if newest is not None else None
        if asked == "auto" or (begun is not None and begun.about.get("launch") == _launch()):
            return begun, passed
    if asked == "no":
        return None, []
    with during(f"checkpoint.resume = {asked}"):
        checkpoint.verify(asked, grid)
        return Begun.at(asked), []


def _launch() -> str | None:
    """What is the same each time that a launcher starts this run again; None: there is no launcher."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def _seed(seed: int, step: int, grid: Grid) -> None:
    """What a loss of the user's own draws is a function of the step too; tensor-parallel ranks, which do the same, draw the same."""
    drawn = int(np.random.SeedSequence([seed, step, grid.dp.rank, grid.cp.rank]).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)  # noqa: NPY002 — it is theirs
    torch.manual_seed(drawn)


def _ask_again(file: str | None) -> None:
    if file is not None:
        files.replace_text(Path(file), "")


def _refuse(
    cfg: RunConfig, step: int, metrics: Mapping[str, float | Tensor], update: Update, batches: Sequence[Batch], directory: Path, grid: Grid
) -> NoReturn:
    """End a run whose steps change nothing any more. Raises MegamodError, on every rank the same."""
    losses = [loss for loss in gathered(float(metrics["loss"]) if metrics else None) if loss is not None]
    what = f"its value is {losses[0]}" if not math.isfinite(losses[0]) else f"the norm of its gradients is {update.grad_norm}"
    folder = directory / "skipped"

    def keep() -> None:
        folder.mkdir(exist_ok=True)
        saved_batch.save(folder / f"step-{step:08d}-dp-{grid.dp.rank:04d}.safetensors", batches)

    together(keep, acts=grid.is_last_stage and grid.tp.rank == grid.cp.rank == 0)
    raise MegamodError(
        f"loss {loss_name(cfg.loss)}, step {step}: {what}, and {cfg.optim.max_skips} steps in a row were skipped: finite ones were "
        f"expected; its micro-batches are in {folder}: see tools/show_batch.py --saved"
    )


def _is_scheduled(cfg: RunConfig, step: int) -> bool:
    return cfg.checkpoint.every is not None and step % cfg.checkpoint.every == 0


def _validation(cfg: RunConfig, shape: Shape, directory: Path, done: int) -> Validation | None:
    if cfg.eval is None:
        return None
    encoder = chat.encoder(cfg.data.chat, cfg.model.path, cfg.data.row_length, shape.score)
    rows = labelled_rows(cfg.eval, cfg.seed)
    return Validation(
        cfg.eval, rows, encoder, directory, done, cfg.steps, lambda step: checkpoint.at(directory / "checkpoints", step) is not None
    )


def _kept(validation: Validation | None) -> tuple[int | None, list[int]]:
    """The step whose checkpoint stays for being the best, and those whose do not any more."""
    return (validation.kept, validation.beaten) if validation is not None else (None, [])


def _restore(checkpoints: Path, best: int | None, done: int, optimizer: Optimizer, log: Log) -> None:
    """The weights of the best step, where that is not the last."""
    if best is None or best == done:
        return
    saved = together(partial(_saved, checkpoints, best))
    assert saved is not None
    log.say(f"the best step is {best}")
    checkpoint.resume(saved, optimizer)


def _saved(checkpoints: Path, step: int) -> Path:
    """The checkpoint after step `step`. Raises MegamodError where the save failed."""
    found = checkpoint.at(checkpoints, step)
    if found is None:
        raise MegamodError(f"{checkpoints}: step {step} was to be exported, and could not be saved")
    return found


def _check_exports(shape: Shape, cfg: RunConfig, exports: Path, first: int) -> None:
    """Refuse, before the first step, what would stop the export after the last: whichever step is exported then."""
    in_the_way = [old for old in sorted(exports.glob("step-*")) if old.name[5:].isdecimal() and int(old.name[5:]) > first]
    for target in (*in_the_way, exports / f"step-{cfg.steps:08d}"):
        if cfg.lora is None:
            check_export(shape, cfg.model.path, target, cfg.data.chat.tokenizer)
        else:
            refuse_taken(target)


def _flops(shape: Shape, plan: Plan | None, batch: Batch) -> float:
    """Of a training step over `batch`; with adapters without the gradients of the base's weights, about a third of it."""
    whole = shape.flops(batch.lengths, len(batch.labels))
    return 3 * whole if plan is None else 2 * whole + 6 * plan.low_rank * len(batch.tokens)


def _plan(cfg: RunConfig, shape: Shape, begun: Begun | None) -> Plan | None:
    """The run's adapter, if it trains one."""
    saved = begun.about.get("lora") if begun is not None else None
    return Plan.of(cfg.lora, shape, saved) if cfg.lora is not None else None


def _check_base(begun: Begun | None, plan: Plan, base: str) -> None:
    """Refuse to go on with other weights beneath an adapter than it was trained on. Raises MegamodError."""
    plan.check_base(base)
    if begun is not None and (before := begun.about.get("base")) != base:
        raise MegamodError(f"{begun.path}: its adapter was trained on a base with the fingerprint {before}, this one has {base}")


def _check_documents(cfg: RunConfig, shape: Shape, documents: Documents) -> None:
    """Refuse what the loss cannot learn from, and answers that it would learn to give although they are unwanted. Raises MegamodError."""
    name, needs, unwanted = loss_name(cfg.loss), needs_of(cfg.loss), int((documents.side < 0).sum())
    if "scores" in needs and shape.score is None:
        raise MegamodError(f"loss {name} learns scores, and the model's head is the vocabulary: set model.score")
    if "pairs" in needs and not documents.joined.any():
        raise MegamodError(f"loss {name} learns from pairs, and data.train has none: rows with chosen and rejected were expected")
    if "rated" in needs and not documents.side.any():
        raise MegamodError(f"loss {name} learns from rated answers, and data.train has none: rows with an answer and a label true or false")
    if unwanted and not needs & {"pairs", "rated"}:
        raise MegamodError(
            f"loss {name} does not tell wanted from unwanted answers, and data.train has {unwanted:,} unwanted: use losses.dpo or "
            f'losses.kto, or mark it with @losses.needs("pairs") or "rated"'
        )
    if documents.weighed and "weights" not in needs:
        raise MegamodError(
            f"loss {name} reads no weights of tokens, and data.train has some: use losses.cross_entropy or losses.moderation, or multiply "
            f'with batch.weight and mark it with @losses.needs("weights")'
        )


def _stored(cfg: RunConfig, documents: Documents) -> Compared | None:
    """The documents with the reference's log-probabilities, where these are stored."""
    path = cfg.reference.path
    if cfg.reference.kind != "stored" or path is None:
        return None
    found, expected = Compared(documents, path), cfg.reference.top_k if "teacher" in needs_of(cfg.loss) else None
    if found.top_k != expected:
        what = "a reference's log-probabilities" if found.top_k is None else f"a teacher's {found.top_k} most probable tokens"
        asked = "a reference" if expected is None else f"a teacher with reference.top_k = {expected}"
        raise MegamodError(f"reference.path = {path}: {what}, and loss {loss_name(cfg.loss)} needs {asked}")
    return found


def _check_reference(begun: Begun, reference: str) -> None:
    """Refuse to go on with another reference model than the run began with. Raises MegamodError."""
    before = begun.about.get("reference", reference)
    if before != reference:
        raise MegamodError(f"{begun.path}: its loss was compared with the reference {before!r}, this run has {reference!r}")


def _see(directory: Path) -> None:
    if not directory.is_dir():
        raise MegamodError(f"dir = {directory}: rank 0 made it and other nodes do not see it: use storage that all nodes share")


def _steps_done(begun: Begun | None, identity: dict[str, Any], steps: int) -> int:
    """The step to go on from. Raises MegamodError for a checkpoint of another run, or from beyond this one's end."""
    if begun is None:
        return 0
    for key, value in identity.items():
        if (there := begun.about.get(key)) != value:
            if isinstance(there, dict) and isinstance(value, dict):
                differing = [name for name in {*there, *value} if there.get(name) != value.get(name)]
                if not differing:  # an option that is None is the same as one that there was not yet
                    continue
                key += "." + min(differing)
            raise MegamodError(f"{begun.path}: saved with another {key}; use another dir, or checkpoint.resume=no to begin again here")
    if begun.step > steps:
        raise MegamodError(f"{begun.path}: saved after step {begun.step}, and steps = {steps}: use more steps, or another dir")
    return begun.step


def model_shape(cfg: RunConfig) -> Shape:
    """The model's shape: `model.shape` if given, which must then agree with the checkpoint's own config.json if that is there.

    With `model.score` the vocabulary's head is replaced by a head of scores.
    """
    shape = read_shape(cfg.model.path if cfg.model.shape is None else cfg.model.shape)
    if cfg.model.shape is not None and (Path(cfg.model.path) / "config.json").exists() and read_shape(cfg.model.path) != shape:
        raise MegamodError(f"model.shape = {cfg.model.shape} describes another model than {cfg.model.path}/config.json: remove model.shape")
    shape = shape.scored(cfg.model.score).quantized(quantization_at(cfg.model.path)).quantized(cfg.model.quantization)
    if shape.quantization is not None and cfg.lora is None:
        raise MegamodError(f"model.path = {cfg.model.path} is in 4 bits, which are frozen, and nothing would be trained: set lora.r")
    return shape


def weights_of(cfg: RunConfig, shape: Shape) -> Source:
    """Where the run's first weights come from."""
    source = Random(shape, cfg.seed) if cfg.model.init == "random" else weights_at(cfg.model.path, shape, cfg.seed)
    return quantised(source, shape.quantization, "model.quantization")


class _Parser(argparse.ArgumentParser):
    """Its errors, too, are said once over all ranks."""

    def error(self, message: str) -> NoReturn:
        raise MegamodError(f"{message}; usage: {self.prog} configs/<run>.py [owner.key=value ...]")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Returns the exit status: 0, or 1 after one line that says what is wrong, said once over all ranks."""
    parser = _Parser(prog="python -m megamod.train", description="Train; launch with torchrun on every rank.")
    parser.add_argument("config", help="a Python file with config() -> RunConfig")
    parser.add_argument("overrides", nargs="*", metavar="owner.key=value", help="such as optim.lr=3e-6")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise MegamodError(f"argument {unknown[0]!r}: write overrides as owner.key=value, such as optim.lr=3e-6, without dashes")
    train(config.load(args.config, args.overrides))
    grids.leave()


if __name__ == "__main__":
    sys.exit(main())
