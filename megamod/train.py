"""The training loop: set-up, loop, tear-down. Read this first.

torchrun --nproc-per-node 2 -m megamod.train configs/tiny.py parallel.tp=2
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from megamod import checkpoint, config, optim
from megamod.config import RunConfig
from megamod.data.loader import Loader, load_documents
from megamod.errors import MegamodError
from megamod.log import Log, record_run
from megamod.model.build import build, data_parallel
from megamod.model.shape import Shape, read_shape
from megamod.optim import Optimizer, learning_rate
from megamod.parallel import grid as grids
from megamod.parallel.collectives import together
from megamod.step import train_step
from megamod.weights.export import check as check_export
from megamod.weights.export import export
from megamod.weights.load import Random, Safetensors, Source, load


def train(cfg: RunConfig) -> Path:
    """Run `cfg` from its start, or from its newest checkpoint. Every rank calls it. Returns the run's directory.

    Raises:
        MegamodError: whatever the user can mend, before the first step where that is possible.
    """
    shape = model_shape(cfg)
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True)
    grid = grids.start(cfg.parallel, shape, cfg.seed)
    grids.check_rows(cfg, shape, grid.world)
    optim.check(cfg.optim, shape)
    directory = Path(cfg.dir)
    checkpoints, hf = directory / "checkpoints", directory / "hf" / f"step-{cfg.steps:08d}"

    d = cfg.data
    documents = load_documents(d, shape.vocab, cfg.seed)
    loader = Loader(
        documents, row_length=d.row_length, rows_per_step=d.rows_per_step, rows_per_micro_batch=d.rows_per_micro_batch,
        seed=cfg.seed, dp_rank=grid.dp.rank, dp_size=grid.dp.size,
    )  # fmt: skip
    # What must be the same for a resumed run to go on with the same model, and to see the rows that the first would have seen.
    identity = {
        "shape": config.as_json(shape), "model.path": cfg.model.path, "data": loader.fingerprint(), "data.row_length": d.row_length,
        "data.rows_per_step": d.rows_per_step, "seed": cfg.seed,
    }  # fmt: skip
    newest = checkpoint.latest(checkpoints) if cfg.checkpoint.resume == "auto" else None
    done = _steps_done(newest, identity, cfg.steps)

    chunks, backends = build(cfg.model, shape, grid, deterministic=cfg.deterministic)
    if cfg.checkpoint.export and done < cfg.steps:
        check_export(shape, cfg.model.path, hf)
    together(lambda: directory.mkdir(parents=True, exist_ok=True), acts=grid.rank == 0)
    together(lambda: _see(directory))
    items = together(lambda: load(chunks, shape, grid, weights_of(cfg, shape), where=cfg.model.path))
    assert items is not None
    wrapped = data_parallel(chunks, grid, overlap=cfg.optim.overlap_grad_reduce)
    optimizer = Optimizer(cfg.optim, wrapped, items, grid)
    if newest is not None:
        checkpoint.resume(newest, optimizer)

    log = Log(cfg.log, directory, cfg.steps, done, grid.world, grid.device, active=grid.reports)
    if grid.rank == 0:
        record_run(cfg, directory, {"grid": str(grid), "backends": backends, "parameters": shape.parameters(), "identity": identity})
    chosen = " · ".join(f"{question} {answer}" for question, answer in backends.items())
    log.say(f"{shape.family} {shape.parameters() / 1e9:.3f}B · {grid} · {grid.device.type} · {chosen}")
    log.say(f"{loader.rows} rows of {d.row_length} tokens, {loader.utilisation:.1%} filled")
    if not any(document.verdict.any() for document in documents):
        log.say("no document marks verdict tokens: a loss that weighs them has none to weigh")
    if newest is not None:
        log.say(f"resumed after step {done} from {newest}")

    for step in range(done, cfg.steps):
        batches = loader.step(step)
        metrics = train_step(wrapped, batches, cfg.loss, grid)
        lr = learning_rate(cfg.optim, step, cfg.steps)
        update = optimizer.step(lr)
        flops = 3 * grid.dp.size * sum(shape.flops(b.lengths, len(b.labels)) for b in batches)
        values = {**metrics, "lr": lr, "grad_norm": update.grad_norm, **({"skipped": 1.0} if update.skipped else {})}
        log.step(step + 1, values, tokens=d.rows_per_step * d.row_length, flops=flops)
        if (cfg.checkpoint.every and (step + 1) % cfg.checkpoint.every == 0) or step + 1 == cfg.steps:
            path = checkpoint.save(checkpoints, step + 1, optimizer, grid, identity)
            log.say(f"saved {path}")

    if cfg.checkpoint.export and done < cfg.steps:  # else the run had ended before, and was only asked again
        log.say(f"exported {export(chunks, shape, grid, hf, source=cfg.model.path)}")
    log.close()
    return directory


def _see(directory: Path) -> None:
    if not directory.is_dir():
        raise MegamodError(f"dir = {directory}: rank 0 made it and other nodes do not see it: use storage that all nodes share")


def _steps_done(newest: Path | None, identity: dict[str, Any], steps: int) -> int:
    """The step to go on from. Raises MegamodError for a checkpoint of another run, or from beyond this one's end."""
    if newest is None:
        return 0
    done, saved = checkpoint.read_about(newest)
    for key, value in identity.items():
        if saved.get(key) != value:
            raise MegamodError(f"{newest}: saved with another {key}; use another dir, or checkpoint.resume=no to begin again here")
    if done > steps:
        raise MegamodError(f"{newest}: saved after step {done}, and steps = {steps}: use more steps, or another dir")
    return done


def model_shape(cfg: RunConfig) -> Shape:
    """The model's shape: `model.shape` if given, which must then agree with the checkpoint's own config.json if that is there."""
    if cfg.model.shape is None:
        return read_shape(cfg.model.path)
    shape = read_shape(cfg.model.shape)
    if (Path(cfg.model.path) / "config.json").exists() and read_shape(cfg.model.path) != shape:
        raise MegamodError(f"model.shape = {cfg.model.shape} describes another model than {cfg.model.path}/config.json: remove model.shape")
    return shape


def weights_of(cfg: RunConfig, shape: Shape) -> Source:
    """Where the run's first weights come from."""
    return Random(shape, cfg.seed) if cfg.model.init == "random" else Safetensors(cfg.model.path)


class _Parser(argparse.ArgumentParser):
    """Its errors, too, are said once over all ranks."""

    def error(self, message: str) -> NoReturn:
        raise MegamodError(f"{message}; usage: {self.prog} configs/<run>.py [owner.key=value ...]")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, or 1 after one line that says what is wrong, said once over all ranks."""
    parser = _Parser(prog="python -m megamod.train", description="Train; launch with torchrun on every rank.")
    parser.add_argument("config", help="a Python file with config() -> RunConfig")
    parser.add_argument("overrides", nargs="*", metavar="owner.key=value", help="such as optim.lr=3e-6")
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise MegamodError(f"argument {unknown[0]!r}: write overrides as owner.key=value, such as optim.lr=3e-6, without dashes")
        train(config.load(args.config, args.overrides))
    except MegamodError as error:
        grids.say_once(f"megamod: error: {error}")
        return 1
    grids.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
