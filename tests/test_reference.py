"""The reference model of preference losses: which one it is, stored or following, resumed on another grid, and what is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import preferences
import pytest
import torch
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st

from megamod import config, losses
from megamod.batch import Batch
from megamod.config import ReferenceConfig, SyntheticData
from megamod.data import stored
from megamod.data.documents import IGNORED, Document, InMemory, synthetic
from megamod.data.loader import Loader
from megamod.data.packing import grouped, micro_batch, pack
from megamod.losses import Loss
from megamod.model.head import Head
from megamod.parallel.grid import started

CONFIGS = Path(__file__).parents[1] / "configs"
DPO = str(CONFIGS / "tiny_dpo.py")
LORA = ["lora.r=3", "optim.lr=1e-2"]


def trained(runs: preferences.Runs) -> list[dict[int, dict[str, float]]]:
    found: list[dict[int, dict[str, float]]] = distributed.run(2, preferences.trained_by_runs, runs)[0]
    return found


def of(run: dict[int, dict[str, float]], name: str) -> dict[int, float]:
    return {step: line[name] for step, line in run.items()}


# --- which model it is --------------------------------------------------------------------------------------------------------


def test_after_sft_with_an_adapter_the_reference_is_that_adapter(tmp_path: Path) -> None:
    """Not the base, which adapters-off would be: so the run begins with no margin at all, log 2, and a margin against the base."""
    sft = [*LORA, f"dir={tmp_path}/sft", "steps=3", "checkpoint.export=false"]
    again = [f"lora.path={tmp_path}/sft/checkpoints", "steps=2", "checkpoint.export=false", "optim.lr=1e-2"]
    runs: preferences.Runs = [
        (str(CONFIGS / "tiny.py"), sft),
        (DPO, [*again, f"dir={tmp_path}/dpo"]),
        (DPO, [*again, f"dir={tmp_path}/base", "reference.kind=base"]),
        (DPO, [*again, f"dir={tmp_path}/named", "reference.kind=adapter", f"reference.path={tmp_path}/sft/checkpoints"]),
        (DPO, [*again, f"dir={tmp_path}/dpo", "steps=3"]),  # goes on, and so with the same reference
        (DPO, [*again, f"dir={tmp_path}/whole", "steps=3", "parallel.tp=2"]),
    ]
    _, dpo, base, named, resumed, whole = trained(runs)
    assert dpo[1]["loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert dpo[1]["rewards/margins"] == dpo[1]["log_ratio"] == 0.0
    assert abs(base[1]["log_ratio"]) > 1e-3 and abs(base[1]["loss"] - math.log(2)) > 1e-4
    assert of(named, "loss") == of(dpo, "loss")
    assert of(resumed, "loss") == pytest.approx(of(whole, "loss"), rel=1e-9)
    assert dpo[2]["loss"] != math.log(2)
    about = json.loads(Path(tmp_path, "dpo", "run.json").read_text())["identity"]["reference"]
    assert about.startswith("start ")


def test_a_new_adapter_is_compared_with_the_base(tmp_path: Path) -> None:
    runs = [
        (DPO, [*LORA, f"dir={tmp_path}/{kind}", "steps=2", f"reference.kind={kind}", "checkpoint.export=false"])
        for kind in ("start", "base")
    ]
    start, base = trained(runs)
    assert of(start, "loss") == of(base, "loss")
    assert start[1]["rewards/margins"] == 0.0 != start[2]["rewards/margins"]


@pytest.mark.parametrize("kind", [["reference.sync_alpha=0.5"], LORA], ids=["weights", "adapter"])
def test_a_reference_that_follows_is_resumed_on_another_grid(kind: list[str], tmp_path: Path) -> None:
    """TR-DPO: after every second step the reference moves; stopped after the third on tp 2, resumed on pp 2."""
    follows = [*kind, "reference.sync_every=2", "checkpoint.export=false"]
    runs: preferences.Runs = [
        (DPO, [*follows, f"dir={tmp_path}/whole", "steps=6"]),
        (DPO, [*follows, f"dir={tmp_path}/cut", "steps=3", "parallel.tp=2"]),
        (DPO, [*follows, f"dir={tmp_path}/cut", "steps=6", "parallel.pp=2"]),
        (DPO, [o for o in follows if "sync" not in o] + [f"dir={tmp_path}/still", "steps=6"]),
    ]
    whole, first, both, still = trained(runs)
    assert of(first, "loss") == pytest.approx({step: whole[step]["loss"] for step in (1, 2, 3)}, rel=1e-9)
    assert of(both, "loss") == pytest.approx(of(whole, "loss"), rel=1e-9)
    assert [whole[step]["loss"] for step in (1, 2)] == [still[step]["loss"] for step in (1, 2)]
    assert whole[3]["loss"] != pytest.approx(still[3]["loss"], rel=1e-4)
    if kind == LORA:  # moved onto it whole, the third step begins with no margin
        assert whole[3]["loss"] == pytest.approx(math.log(2), rel=1e-12)


def test_another_reference_is_refused_on_resume(tmp_path: Path) -> None:
    run = [f"dir={tmp_path}/run", "checkpoint.export=false"]
    trained([(DPO, [*run, "steps=1"])])
    with pytest.raises(
        distributed.RankError, match=r"its loss was compared with the reference 'start [0-9a-f]{16}', this run has 'uniform'"
    ):
        trained([(DPO, [*run, "steps=2", "reference.kind=uniform"])])
    with pytest.raises(distributed.RankError, match=r"this run has 'start [0-9a-f]{16}, synchronised with 0.5'"):
        trained([(DPO, [*run, "steps=2", "reference.sync_every=1", "reference.sync_alpha=0.5"])])
    other = f"reference.path={CONFIGS}/models/qwen2.5-7b"
    with pytest.raises(distributed.RankError, match=r"config\.json describes another model than the one that is trained"):
        trained([(DPO, [f"dir={tmp_path}/other", "steps=1", "reference.kind=model", other])])


def test_uniform_is_reference_free(tmp_path: Path) -> None:
    (run,) = trained([(DPO, [f"dir={tmp_path}/run", "steps=1", "reference.kind=uniform", "checkpoint.export=false"])])
    assert run[1]["rewards/chosen"] == pytest.approx(0.5 * run[1]["logps/chosen"], rel=1e-12)


# --- stored -------------------------------------------------------------------------------------------------------------------


def test_stored_log_probabilities_are_those_of_the_start(tmp_path: Path) -> None:
    """Computed on another grid than the run's, kept in fp32; with an adapter to go on from, they are the adapter's."""
    same = ["checkpoint.export=false", "steps=2"]
    kept = ["reference.kind=stored", f"reference.path={tmp_path}/kept"]
    lora = ["reference.kind=stored", f"reference.path={tmp_path}/lora", f"lora.path={tmp_path}/sft/checkpoints"]
    runs: preferences.Runs = [
        (DPO, [*same, f"dir={tmp_path}/start"]),
        (DPO, ["store", *preferences.EXACT, *kept, f"dir={tmp_path}/made", "parallel.tp=2"]),
        (DPO, [*same, *kept, f"dir={tmp_path}/stored", "parallel.pp=2"]),
        (str(CONFIGS / "tiny.py"), [*LORA, f"dir={tmp_path}/sft", "steps=2", "checkpoint.export=false"]),
        (DPO, ["store", *preferences.EXACT, *lora, f"dir={tmp_path}/made"]),
        (DPO, [*same, *lora, f"dir={tmp_path}/dpo"]),
    ]
    start, _, kept_, _, _, dpo = trained(runs)
    assert of(kept_, "loss") == pytest.approx(of(start, "loss"), rel=1e-5)
    assert of(kept_, "grad_norm") == pytest.approx(of(start, "grad_norm"), rel=1e-5)
    assert dpo[1]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert not list(tmp_path.glob(".*")), "nothing half-made is left"
    for number, (other, wrong) in enumerate(
        (
            (["seed=2"], "log-probabilities of other documents"),
            (["lora.r=3"], None),
            ([f"lora.path={tmp_path}/sft/checkpoints"], "this run begins with"),
        )
    ):
        runs = [(DPO, [*same, *kept, *other, f"dir={tmp_path}/again{number}"])]
        if wrong is None:
            trained(runs)  # a new adapter begins as the base
        else:
            with pytest.raises(distributed.RankError, match=wrong):
                trained(runs)


def test_asking_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """Parts that are there are not asked for again, and the result is the same."""
    answers = distributed.run(2, ask_twice, str(tmp_path))
    first, second, waves = answers[0]
    assert len(first) == 256 and first == second
    assert waves == [1, 0], "a second attempt asks for the part that was lost alone"


def ask_twice(folder: str) -> Any:
    """On a pool's rank: everything; and everything again, with one part of two lost."""
    from megamod import reference
    from megamod.config import load
    from megamod.model.build import build
    from megamod.train import model_shape, weights_of
    from megamod.weights.load import load as fill

    cfg = load(DPO, ["model.dtype=float64", "parallel.tp=2"])
    shape = model_shape(cfg)
    documents = synthetic(cfg.data.train, shape.vocab, cfg.data.row_length, 1)  # type: ignore[arg-type]
    calls: list[int] = []
    original = reference.collect_rows

    def counted(chunks: Any, rows: Any, *rest: Any) -> Any:
        calls.append(len(rows))
        return original(chunks, rows, *rest)

    with started(cfg.parallel, shape) as grid:
        chunks, _ = build(cfg.model, shape, grid)
        fill(chunks, shape, grid, weights_of(cfg, shape))
        reference.collect_rows = counted
        try:
            found, waves = [], []
            for lost in (None, "000001.npz"):
                if lost is not None and grid.rank == 0:
                    Path(folder, lost).unlink()
                torch.distributed.barrier()
                calls.clear()
                values = reference.ask_all(chunks, documents, cfg, grid, Path(folder), wave=20)
                found.append([v.tolist() for v in values] if values is not None else None)
                waves.append(len(calls))
        finally:
            reference.collect_rows = original
        return *found, [waves[0] - waves[1], waves[1] - 1]


def document(prompt: int, answer: int, side: int = 0, joined: bool = False) -> Document:
    tokens = np.arange(1, prompt + answer + 1, dtype=np.int32)
    labels = np.where(np.arange(prompt + answer) >= prompt, tokens.astype(np.int64), IGNORED)
    return Document(tokens, labels, np.zeros(len(tokens), np.bool_), side=side, joined=joined)


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (lambda root: (root / stored.MANIFEST).unlink(), "what tools/reference_logprobs.py writes was expected"),
        (lambda root: (root / stored.LOGPROBS).write_bytes(b"\0" * 12), "damaged (it fails its checksum)"),
        (lambda root: (root / stored.OFFSETS).unlink(), "what tools/reference_logprobs.py writes was expected"),
        (lambda root: (root / stored.MANIFEST).write_text("{}"), "damaged ('format')"),
        (lambda root: (root / stored.MANIFEST).write_text('{"format": 9}'), "format 9, this megamod reads 1"),
    ],
)
def test_what_is_damaged_is_refused(spoil: Callable[[Path], Any], wrong: str, tmp_path: Path) -> None:
    documents = InMemory([document(2, 3), document(0, 2)])
    root = stored.write(tmp_path / "kept", [np.ones(3, np.float32), np.ones(1, np.float32)], documents.fingerprint(), "m")
    compared = stored.Compared(documents, root)
    assert compared[0].reference.tolist() == [0, 0, 1, 1, 1]  # type: ignore[union-attr]
    assert compared[1].reference.tolist() == [0, 1], "nothing predicts a first token"  # type: ignore[union-attr]
    assert "begins with other" in complaint(lambda: compared.check("other"))
    spoil(root)
    assert wrong in complaint(lambda: stored.Compared(documents, root))


# --- the batch ----------------------------------------------------------------------------------------------------------------

PAIRS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(PAIRS, st.integers(0, 3), st.randoms())
def test_both_halves_lie_in_one_row(pairs: list[tuple[int, int, int]], alone: int, random: Any) -> None:
    """Whatever the lengths and their order: every pair whole in a row, the better half first, every document once."""
    made = [[document(p, a, 1), document(p, b, -1, joined=True)] for p, a, b in pairs] + [[document(3, 2)] for _ in range(alone)]
    random.shuffle(made)
    documents = InMemory([one for group in made for one in group])
    groups = grouped(documents.joined)
    packed = pack(groups.sums(documents.lengths), 30).of(groups)
    assert sorted(i for row in packed.tolist() for i in row) == list(range(len(documents.lengths)))
    batches = [micro_batch([[documents[i] for i in row]], 30) for row in packed.tolist()]
    assert sum(batch.pairs.shape[1] for batch in batches) == len(pairs)
    for batch in batches:
        better, worse = batch.pairs
        assert (batch.side[better] == 1).all() and (batch.side[worse] == -1).all() and torch.equal(worse, better + 1)
        assert batch.counts()["pairs"] == batch.pairs.shape[1] and batch.counts()["rated"] == 2 * batch.pairs.shape[1]


def test_mismatched_answers_do_not_depend_on_the_grid() -> None:
    """Each prompt with the answer before it in the step; over the ranks each once; a prompt too long loses its first tokens."""
    documents = InMemory([document(n % 7 + 1, (5 * n) % 11 + 1, 1 if n % 3 else -1) for n in range(40)])

    def found(dp_size: int, rows: int, multiple: int) -> list[list[int]]:
        batches = []
        for rank in range(dp_size):
            loader = Loader(documents, row_length=20, rows_per_step=8, rows_per_micro_batch=rows, seed=3, dp_rank=rank, dp_size=dp_size)
            own = loader.mismatched(1, multiple)
            assert len(own) % multiple == 0
            batches += own
        texts = [
            tokens.tolist() for batch in batches for tokens, side in zip(batch.tokens.split(batch.lengths), batch.side, strict=True) if side
        ]
        return sorted(texts)

    expected = found(1, 1, 1)
    assert found(2, 2, 1) == found(4, 1, 2) == expected
    loader = Loader(documents, row_length=20, rows_per_step=8, rows_per_micro_batch=1, seed=3, dp_rank=0, dp_size=1)
    step = [one for row in loader._stream(8, 8) for i in loader._packed[int(row)].tolist() if (one := documents[i]).side]
    answers = [[t for t, label in zip(d.tokens.tolist(), d.labels.tolist(), strict=True) if label != IGNORED] for d in step]
    prompts = [[t for t, label in zip(d.tokens.tolist(), d.labels.tolist(), strict=True) if label == IGNORED] for d in step]
    assert expected == sorted((prompt + answer)[-20:] for prompt, answer in zip(prompts, answers[-1:] + answers[:-1], strict=True))


def test_the_answers_of_a_pair_are_not_each_other_s() -> None:
    """They have one prompt: its own better answer after it would be no other row's."""
    pairs = [(n, [document(n + 1, n + 2, 1), document(n + 1, 2 * n + 3, -1, joined=True)]) for n in range(6)]
    documents = InMemory([one for _, pair in pairs for one in pair])
    loader = Loader(documents, row_length=40, rows_per_step=3, rows_per_micro_batch=1, seed=3, dp_rank=0, dp_size=1)
    own = {tuple(one.tokens.tolist()) for _, pair in pairs for one in pair}
    texts = [
        tuple(tokens.tolist())
        for batch in loader.mismatched(0)
        for tokens, side in zip(batch.tokens.split(batch.lengths), batch.side.tolist(), strict=True)
        if side
    ]
    assert texts and not {*texts} & own


def test_one_answer_cannot_be_mismatched() -> None:
    loader = Loader(InMemory([document(3, 4, 1)]), row_length=8, rows_per_step=1, rows_per_micro_batch=1, seed=1, dp_rank=0, dp_size=1)
    assert "step 1 has rated answers to 1 prompts" in complaint(lambda: loader.mismatched(0))


def test_made_up_pairs_share_their_prompts() -> None:
    made = synthetic(SyntheticData(documents=40, mean_length=20, labelled=0.3, pairs=True), 50, 64, seed=2)
    for number in range(0, 40, 2):
        better, worse = made[number], made[number + 1]
        assert (better.side, worse.side, better.joined, worse.joined) == (1, -1, False, True)
        shared = min(int((d.labels == IGNORED).sum()) for d in (better, worse))
        assert (better.tokens[:shared] == worse.tokens[:shared]).all() and len(better.tokens) + len(worse.tokens) <= 64
    said = complaint(lambda: synthetic(SyntheticData(documents=3, pairs=True), 50, 64, seed=2))
    assert said == "data.train.documents = 3: must be an even number, for pairs"


@given(st.integers(0, 9))
def test_padding_is_no_sample(room: int) -> None:
    """A function of [S] that is not 0 at 0 changes nothing where a document has no label, or is what is left of a row."""
    items = [replace(document(2, 3), weight=0.5), replace(document(1, 4), weight=2.0), replace(document(3, 0), weight=9.0)]
    batch = micro_batch([items], 13 + room)
    x = batch.per_sequence(torch.ones(7, dtype=torch.float64)).cos()
    expected = (0.5 * math.cos(3) + 2.0 * math.cos(4)) / 2.5
    assert float(batch.mean(x, over="samples")) == pytest.approx(expected, rel=1e-12)
    assert batch.labelled.tolist()[:3] == [True, True, False]


def test_small_steps_of_a_mixture_are_kept_in_bfloat16() -> None:
    """θ_ref ← α·θ + (1 - α)·θ_ref with α = .05, fifty times: what follows is kept in fp32, and rounded for the model."""
    assert distributed.run(2, followed)[0] < 0.02


def followed() -> float:
    """On a pool's rank: how far, relatively, the reference is from where the recursion ends."""
    from megamod.model.build import build
    from megamod.reference import Reference
    from megamod.train import model_shape
    from megamod.weights.load import Random, load

    cfg = config.load(DPO, ["model.dtype=bfloat16", "reference.sync_every=1", "reference.sync_alpha=0.05"])
    shape = model_shape(cfg)
    with started(cfg.parallel, shape) as grid:
        chunks, _ = build(cfg.model, shape, grid)
        items = load(chunks, shape, grid, Random(shape, 1))
        reference = Reference(cfg, shape, grid, chunks, items, None, Random(shape, 2))
        begun = [item.param.detach().double() for item in reference._followers]
        for step in range(1, 51):
            reference.follow(step)
        off, far = 0.0, 0.0
        for item, first, theirs in zip(reference._followers, begun, items, strict=True):
            expected = theirs.param.double() + 0.95**50 * (first - theirs.param.double())
            off, far = off + float((item.param.double() - expected).norm()), far + float((first - expected).norm())
        return off / far


# --- what a config may say ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        (["reference.kind=base"], "reference.kind = 'base' is of a run with adapters, and lora is None"),
        (["reference.kind=adapter", "reference.path=x"], "reference.kind = 'adapter' is of a run with adapters"),
        (["reference.kind=model"], "reference.kind = 'model' needs reference.path"),
        (["reference.path=x"], "reference.path would not be read: reference.kind is 'start'"),
        (["reference.sync_alpha=0.5"], "reference.sync_alpha would not be read: reference.sync_every is None"),
        (["reference.sync_every=0"], "reference.sync_every = 0: must be at least 1"),
        (["reference.sync_every=2", "reference.sync_alpha=1.5"], "reference.sync_alpha = 1.5: above 0 and at most 1"),
        (["reference.sync_every=2", "reference.kind=uniform"], "has no weights that could follow"),
        (["reference.sync_every=2", "reference.sync_alpha=0.5", "lora.r=4"], "a mixture of two models is no adapter"),
        (["reference.kind=strat"], "override reference.kind=strat: one of 'start', 'base', 'adapter', 'model', 'stored', 'uniform'"),
    ],
)
def test_what_a_config_refuses(overrides: list[str], wrong: str) -> None:
    assert wrong in complaint(lambda: config.load(DPO, overrides))


def test_a_loss_without_a_reference_refuses_one() -> None:
    said = complaint(lambda: config.load(CONFIGS / "tiny.py", ["reference.kind=uniform"]))
    assert said == "reference would not be read: the loss moderation needs none"


def test_kto_asks_for_more_than_is_stored() -> None:
    cfg = replace(config.load(DPO), loss=partial(losses.kto, beta=0.2), reference=ReferenceConfig("stored", "kept"))
    assert "kto asks the reference about answers to other rows' prompts too" in complaint(lambda: config.check(cfg))


def unmarked(head: Head, batch: Batch) -> Loss:
    return Loss(batch.mean(batch.reference, over="tokens"), {})


def test_a_loss_that_is_not_marked_is_told_so() -> None:
    batch = micro_batch([[document(2, 3)]], 8)
    head: Any = None
    assert '@losses.needs("reference")' in complaint(lambda: unmarked(head, batch))
    assert '@losses.needs("reference", "kl")' in complaint(lambda: batch.kl)  # type: ignore[arg-type, return-value]
    assert losses.needs_of(partial(partial(losses.kto, beta=1.0), beta=2.0)) == {"rated", "reference", "kl"}
    assert losses.needs_of(unmarked) == frozenset()
