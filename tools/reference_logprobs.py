"""Store a reference model's log-probabilities beside the data, so that a preference run has no reference model in memory.

    torchrun --nproc-per-node 8 tools/reference_logprobs.py configs/<run>.py reference.kind=stored reference.path=stores/reference
    torchrun --nproc-per-node 8 -m megamod.train            configs/<run>.py reference.kind=stored reference.path=stores/reference

The model is the one that the run begins with: `model.path`, with the adapter at `lora.path` if there is one. What is stored belongs to that
model, and to the data as the run's tokenizer, template and row length cut it; a run with others refuses it. A killed attempt goes on
where it was.
"""

import argparse
import shutil
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megamod import config
from megamod.command import command
from megamod.config import RunConfig
from megamod.data import stored
from megamod.data.store import open_documents, prepare_all
from megamod.errors import MegamodError
from megamod.losses import needs_of
from megamod.model.build import build
from megamod.model.lora import Plan
from megamod.parallel import grid as grids
from megamod.parallel.collectives import on_first, together
from megamod.reference import ask_all, model_at_start
from megamod.train import model_shape, weights_of
from megamod.weights import fingerprint
from megamod.weights.load import load


def compute(cfg: RunConfig) -> Path:
    """Ask the model that `cfg` begins with about every document of its data, what its loss needs. Every rank calls it.

    Returns:
        `reference.path`.
    """
    if cfg.reference.kind != "stored" or cfg.reference.path is None:
        raise MegamodError("reference.kind=stored and reference.path, where to write, were expected")
    out, directory, shape = Path(cfg.reference.path), Path(cfg.dir), model_shape(cfg)
    top_k = cfg.reference.top_k if "teacher" in needs_of(cfg.loss) else None
    if top_k is not None and top_k > shape.vocab:
        raise MegamodError(f"reference.top_k = {top_k}: at most the vocabulary's {shape.vocab:,} was expected")
    grid = grids.start(cfg.parallel, shape, cfg.seed)
    grids.check_rows(cfg, shape, grid.world)
    if out.exists():
        raise MegamodError(f"{out}: exists: remove it, or name another reference.path")
    plan = together(lambda: Plan.of(cfg.lora, shape) if cfg.lora is not None else None)
    stores = on_first(lambda: prepare_all(cfg.data, cfg.model.path, shape.vocab, directory / "data", shape.score))
    documents = together(lambda: open_documents(cfg.data, [store.path for store in stores], shape.vocab, cfg.seed))
    assert documents is not None
    chunks, _ = build(cfg.model, shape, grid, deterministic=cfg.deterministic)
    source = weights_of(cfg, shape)
    base = together(lambda: load(chunks, shape, grid, source, where=cfg.model.path))
    assert base is not None
    known = fingerprint.of_model(base, grid)
    adapters = None
    if plan is not None:
        together(partial(plan.check_base, known))
        adapters = plan.attach(chunks, shape, grid, source, cfg.seed, directory / plan.begun(known, shape))
    model = model_at_start(known, plan, adapters, grid)
    for chunk in chunks:
        chunk.to(grid.device).requires_grad_(False)
    key = zlib.crc32(f"{documents.fingerprint()} {model} {cfg.data.row_length} {cfg.model.dtype} {grid} {top_k or ''}".encode())
    parts = out.with_name(f".{out.name}.{key:08x}.parts")
    together(lambda: parts.mkdir(parents=True, exist_ok=True), acts=grid.rank == 0)
    values = ask_all(chunks, documents, cfg, grid, parts)

    def finish() -> None:
        assert values is not None
        stored.write(out, values, documents.fingerprint(), model, top_k)
        shutil.rmtree(parts, ignore_errors=True)
        print(f"{out}: {len(values):,} documents, {sum(map(len, values)):,} log-probabilities of the model {model}")

    together(finish, acts=grid.rank == 0)
    return out


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a Python file with config() -> RunConfig")
    parser.add_argument("overrides", nargs="*", metavar="owner.key=value")
    args = parser.parse_args(argv)
    compute(config.load(args.config, args.overrides))
    grids.leave()


if __name__ == "__main__":
    sys.exit(main())
