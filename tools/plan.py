"""What a configuration needs before it runs: bytes of a rank, the longest row, operations, bytes over links, tokens a second.

    python tools/plan.py configs/moderation_72b.py --world 128
    python tools/plan.py configs/moderation_72b_lora.py --fit 8xH100
    torchrun --nproc-per-node 4 tools/plan.py configs/tiny.py parallel.tp=2 parallel.cp=2 parallel.sp=true --measure

Each figure is predicted (by a formula that the tests hold against measurement), measured (here, by --measure: these ranks build the model
and save what one micro-batch's forward pass saves; without a pipeline), or never measured (it wants GPUs that nobody had).

--fit tries grids, micro-batches and ways to recompute for the run's model, rows and loss, prints the best, and why each other kind lost.
What does not fit so is tried with the base in slices (parallel.shard_base), and with masters and moments on the host (optim.offload). A
configuration that does not fit is an error, which says the nearest that does.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist

from megamod import config, plan
from megamod.command import command
from megamod.config import RunConfig, SyntheticData
from megamod.data.documents import synthetic
from megamod.data.loader import Loader
from megamod.errors import MegamodError
from megamod.memory import Saved
from megamod.model.build import build
from megamod.model.lora import Adapters
from megamod.model.lora import Plan as AdapterPlan
from megamod.model.shape import Shape
from megamod.parallel import grid as grids
from megamod.plan import GIB, Documents, Hardware, Model, Planned, Status
from megamod.train import model_shape

BEST = 4  # plans that --fit shows


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="owner.key=value")
    parser.add_argument("--world", type=int, help="number of GPUs (default: the fewest that the grid needs)")
    parser.add_argument("--gpu", default="H100", help=f"{', '.join(plan.HARDWARE)} (default: %(default)s)")
    parser.add_argument("--fit", metavar="8xH100", help="search for the best grid on so many of these instead")
    parser.add_argument("--memory", type=float, help="GiB of a GPU, where it is not the data sheet's")
    parser.add_argument("--efficiency", type=float, help=f"of the GPU's peak (default: {Hardware.efficiency})")
    parser.add_argument("--network", type=float, help="GB/s that a GPU sends to other nodes (default: 50)")
    parser.add_argument(
        "--host", type=float, help="GB/s that a rank's processor reads and writes as it updates what is offloaded (default: 10)"
    )
    parser.add_argument("--node", type=int, help=f"GPUs of a node (default: {Hardware.node})")
    parser.add_argument("--documents", type=float, help="tokens of a document, on average (default: the made-up data's, or 200)")
    parser.add_argument("--labelled", type=float, help="share of the tokens with a label (default: the made-up data's, or 0.08)")
    parser.add_argument("--measure", action="store_true", help="on this machine's ranks, beside the predictions; under torchrun")
    args = parser.parse_intermixed_args(argv)
    cfg = config.load(args.config, args.overrides)
    shape = model_shape(cfg)
    model, documents = Model.of(cfg, shape), documents_of(args, cfg)
    if args.measure:
        if args.fit:
            raise MegamodError("--measure --fit: one of the two was expected")
        return measured(cfg, model)
    world, hardware = hardware_of(args, cfg)
    if args.fit:
        return searched(cfg, model, world, hardware, documents)
    found = plan.plan(cfg, model, world, hardware, documents)
    print(f"{world} × {hardware.name} · {plan.said(cfg)} · {cfg.data.rows_per_step} rows of {cfg.data.row_length:,} tokens a step")
    show(found, plan.longest_row(cfg, model, world, hardware, documents), hardware)
    if found.bytes <= hardware.usable:
        return 0
    near = plan.nearest_fit(cfg, model, world, hardware, documents)
    hint = f"the nearest that does: {near}" if near is not None else "no grid of so many does: take more GPUs, shorter rows, or LoRA"
    raise MegamodError(f"{found.bytes / GIB:.1f} GiB do not fit into {hardware.usable / GIB:.1f} GiB of a {hardware.name}: {hint}")


def hardware_of(args: argparse.Namespace, cfg: RunConfig) -> tuple[int, Hardware]:
    """How many GPUs, and what they are. Raises MegamodError."""
    p = cfg.parallel
    world, name = args.world or p.tp * p.pp * p.cp, args.gpu
    if args.fit is not None:
        if args.world is not None:
            raise MegamodError("--fit --world: --fit says how many GPUs")
        said = re.fullmatch(r"([1-9]\d*)x(\w+)", args.fit)
        if said is None:
            raise MegamodError(f"--fit {args.fit}: a number of GPUs and their name, such as 8xH100, were expected")
        world, name = int(said[1]), said[2]
    changed = {
        "memory": None if args.memory is None else args.memory * GIB,
        "efficiency": args.efficiency,
        "network": None if args.network is None else args.network * 1e9,
        "host": None if args.host is None else args.host * 1e9,
        "node": args.node,
    }
    for option, value in {"world": world, **changed}.items():
        if value is not None and not 0 < value < float("inf"):
            raise MegamodError(f"--{option}: a positive number was expected")
    hardware = replace(plan.hardware_of(name), **{key: value for key, value in changed.items() if value is not None})
    if hardware.efficiency > 1:
        raise MegamodError(f"--efficiency {hardware.efficiency}: at most 1 was expected")
    return world, hardware


def documents_of(args: argparse.Namespace, cfg: RunConfig) -> Documents:
    """What the rows hold. Raises MegamodError."""
    found = plan.documents_of(cfg)
    length, labelled = args.documents or found.length, found.labelled if args.labelled is None else args.labelled
    if not (1 <= length < float("inf") and 0 < labelled <= 1):
        raise MegamodError(f"--documents {length} --labelled {labelled}: at least 1 token, and a share of at most 1, were expected")
    return Documents(length, labelled)


def show(found: Planned, longest: int | None, hardware: Hardware) -> None:
    """Print every figure of a plan, and what it rests on."""

    def row(name: str, value: str, status: Status, note: str = "") -> None:
        print(f"{name:<34}{value:>18}  {status:<14}  {note}")

    def size(n: float) -> str:
        return f"{n / GIB:,.2f} GiB"

    h, s = found.held, found.links
    row("a rank's weights", size(h.weight_bytes), "predicted", f"{h.parameters:,}, of which {h.trained:,} are trained; pp {found.stage}")
    row("gradients", size(h.gradient_bytes), "predicted", "in flat buffers")
    row("masters and moments", size(h.master_bytes + h.moment_bytes), "predicted", "this rank's share of dp × cp")
    if h.host_bytes:
        row("on the host", size(h.host_bytes), "predicted", "masters, moments and gradients of this rank's share of dp × cp")
    row("activations", size(found.activations), "predicted", f"of {found.in_flight} micro-batches' chunks in flight")
    row("a layer's backward pass", size(found.working), "never measured", "beyond what is saved; counts where the head's is less")
    if found.head:
        row("the head", size(found.head), "never measured", "logits as they are used")
    row("together", size(found.bytes), "never measured", f"of {size(hardware.usable)} that a {hardware.name} has for it")
    row("longest row", "none fits" if longest is None else f"{longest:,} tokens", "never measured", "of this grid")
    row("operations a token", f"{found.flops_per_token / 1e9:,.1f} GFLOP", "predicted", "of a training step, what is recomputed too")
    reaches = {"tp": "to its tp ranks", "cp": "to its cp ranks", "pp": "to the stage before and after", "dp": "to its dp × cp ranks"}
    for name, sent in s._asdict().items():
        if sent:
            row(f"sent {reaches[name]}", f"{sent / 1e9:,.2f} GB", "never measured", f"a step; {found.parts[name]:.2f} s")
    row("a step", f"{found.seconds:,.2f} s", "never measured", spent(found))
    note = f"{found.mfu:.0%} MFU, at {hardware.efficiency:.0%} of {hardware.flops / 1e12:.0f} TFLOP/s while it computes"
    row("tokens/s", f"{found.tokens_per_second:,.0f}", "never measured", note)


def spent(found: Planned) -> str:
    """`compute 71 % · bubble 9 %`"""
    parts = {name: part / found.seconds for name, part in found.parts.items()}
    return " · ".join(f"{name} {part:.0%}" for name, part in sorted(parts.items(), key=lambda one: -one[1]) if part >= 0.005)


def searched(cfg: RunConfig, model: Model, world: int, hardware: Hardware, documents: Documents) -> int:
    """Print the best plans, and why the others lost."""
    found, lost = plan.fit(cfg, model, world, hardware, documents)
    print(f"{world} × {hardware.name} · {cfg.data.rows_per_step} rows of {cfg.data.row_length:,} tokens a step · all of it never measured")
    if found:
        print(f"{'':<88}{'GiB':>6}{'tokens/s':>11}{'MFU':>6}  a step")
    for one in found[:BEST]:
        print(f"{plan.said(one.cfg):<88}{one.bytes / GIB:>6.1f}{one.tokens_per_second:>11,.0f}{one.mfu:>6.0%}  {spent(one)}")
    if found:
        print("the first one: " + " ".join(plan.changes(cfg, found[0].cfg) or ["the configuration as it is"]))
    for lesser in lost:
        print(f"{lesser.kind}: {lesser.reason}")
    if not found:
        raise MegamodError(f"nothing fits into {world} × {hardware.name}: take more GPUs, shorter rows, recompute, or LoRA")
    return 0


def measured(cfg: RunConfig, model: Model) -> int:
    """Print what each rank holds and saves, predicted beside measured."""
    if cfg.parallel.pp > 1:
        raise MegamodError(f"--measure: parallel.pp = {cfg.parallel.pp}: 1 was expected, a stage's input comes from the one before")
    with grids.started(cfg.parallel, model.shape, cfg.seed) as grid:
        fused = grid.device.type == "cuda"
        if not fused and cfg.model.dtype == "bfloat16":
            raise MegamodError("--measure: on a CPU in bfloat16 norms keep copies in float32, as no GPU does: set model.dtype=float32")
        held = plan.held(cfg, model, grid.world, tp=grid.tp.rank)
        predicted = plan.saved(cfg, model, range(model.shape.layers), first=True, last=True, fused=fused), held.parameters
        ranks: list[tuple[int, int]] = [(0, 0)] * grid.world
        dist.all_gather_object(ranks, saved_by_ranks(cfg, model.shape, grid))
        if grid.rank == 0:
            print(f"{'rank':>4}  {'':<34}{'predicted':>16}{'measured':>16}{'off':>8}")
            for rank, both in enumerate(ranks):
                for name, expected, got in zip(("saved for the backward pass, bytes", "parameters"), predicted, both, strict=True):
                    print(f"{rank:>4}  {name:<34}{expected:>16,}{got:>16,}{expected / got - 1:>+8.1%}")
    return 0


def saved_by_ranks(cfg: RunConfig, shape: Shape, grid: grids.Grid) -> tuple[int, int]:
    """Bytes that this rank's forward pass of one micro-batch saves, the head's left out, and how many parameters it has."""
    chunks, _ = build(cfg.model, shape, grid, deterministic=cfg.deterministic)
    if cfg.lora is not None:
        Adapters(chunks, shape, grid, {"planned": AdapterPlan.of(cfg.lora, shape).config}, "planned")
    (chunk,) = (chunk.to(grid.device).train() for chunk in chunks)
    d = cfg.data
    made = SyntheticData(documents=4 * d.rows_per_micro_batch, mean_length=d.row_length // 2, sigma=0.0)
    loader = Loader(
        synthetic(made, shape.vocab, d.row_length, cfg.seed), row_length=d.row_length, rows_per_step=d.rows_per_micro_batch,
        rows_per_micro_batch=d.rows_per_micro_batch, seed=cfg.seed, dp_rank=0, dp_size=1,
    )  # fmt: skip
    batch = loader.step(0)[0].slice(grid.cp.rank, grid.cp.size, grid.cp.group).to(grid.device)
    with Saved([*chunk.parameters(), *chunk.buffers()]) as saved:
        chunk(batch)
    return saved.bytes, sum(p.numel() for p in chunk.parameters())


if __name__ == "__main__":
    sys.exit(main())
