"""What must not change a step: micro-batches, packing, padding, data parallelism, the neighbours in a row. And the optimizer's step."""

import math
import re
from dataclasses import replace

import distributed
import oracle
import parity
import pytest
import rows
import tiny
import torch
from parity import Case, prepare, running, worst
from torch import Tensor

from megamod import losses, optim
from megamod.batch import Batch
from megamod.config import OptimConfig
from megamod.config import ParallelConfig as P
from megamod.data.documents import Document
from megamod.data.packing import micro_batch
from megamod.errors import MegamodError
from megamod.losses import Loss
from megamod.model.head import Head
from megamod.optim import learning_rate
from megamod.parallel.grid import started
from megamod.step import eval_step, train_step
from megamod.weights.table import hf_shapes

TOLERANCE = 1e-11
MODEL = "qwen3-tied"


def documents(seed: int = 11) -> list[Document]:
    """24 documents, of 2 to 30 tokens, the last third of each trained; half of them with weights of their tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in torch.randint(2, 31, (24,), generator=generator).tolist():
        tokens = torch.randint(1, 61, (n,), generator=generator)
        labels = torch.where(torch.arange(n) >= n - max(1, n // 3), tokens, -100)
        weight = 0.5 + float(torch.rand((), generator=generator))
        own = (torch.randint(1, 9, (n,), generator=generator) / 4).numpy() if len(made) % 2 else None
        made.append(Document(tokens.numpy(), labels.numpy(), (torch.arange(n) == n - 1).numpy(), weight, weights=own))
    return made


def layouts() -> dict[str, list[Batch]]:
    """The same documents as 8 or 24 micro-batches' worth of rows: packed, one a row, in other orders, with more filler."""
    docs = documents()
    packed: list[list[Document]] = [[] for _ in range(8)]
    for i, doc in enumerate(docs):
        packed[i % 8].append(doc)
    reverse = [list(reversed(row)) for row in reversed(packed)]
    return {
        "packed": [micro_batch([row], 96) for row in packed],
        "packed in another order": [micro_batch([row], 96) for row in reverse],
        "more filler": [micro_batch([row], 128) for row in packed],
        "two rows a micro-batch": [micro_batch(packed[i : i + 2], 96) for i in range(0, 8, 2)],
        "not packed": [micro_batch([[doc]], 32) for doc in docs],
        "not packed, three rows a micro-batch": [micro_batch([[d] for d in docs[i : i + 3]], 32) for i in range(0, 24, 3)],
    }


def gradients_of(grid: P, names: list[str]) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """Loss and gradients by each layout on `grid`, whole on every rank: for grids without tp and pp."""
    results = {}
    with started(grid, tiny.shape(MODEL)) as started_grid:
        for name in names:
            batches = layouts()[name][started_grid.dp.rank :: started_grid.dp.size]
            run = prepare(Case(MODEL, grid), started_grid)
            metrics = train_step(run.optimizer.chunks, batches, parity.everything, started_grid)
            results[name] = (
                float(metrics["loss"]) if metrics else math.nan,
                {f"{s.piece.hf} {s.start} {s.piece.offset}": s.grad.clone() for s in run.optimizer.segments},
            )
    return results


def differences(grid: P, names: list[str]) -> list[tuple[str, float, float]]:
    """On a rank: each layout's loss and gradients against the first one's."""
    results = gradients_of(grid, names)
    loss, base = results[names[0]]
    return [
        (
            name,
            abs(results[name][0] - loss) / abs(loss) if not math.isnan(loss) else 0.0,
            max(float((results[name][1][k] - g).abs().max() / g.abs().max().clamp(min=1e-12)) for k, g in base.items()),
        )
        for name in names[1:]
    ]


@pytest.mark.parametrize("grid", [P(tp=2, pp=4), P(pp=4), P(tp=4, sp=True), P(cp=2, pp=2, tp=2, sp=True)], ids=str)
def test_layout_changes_nothing(grid: P) -> None:
    """Micro-batch size, packing against not packing, order and filler leave loss and gradients as they are."""
    dp = distributed.WORLD // (grid.tp * grid.pp * grid.cp)
    names = [name for name, batches in layouts().items() if len(batches) % dp == 0]
    for answer in distributed.run(distributed.WORLD, differences, grid, names):
        for name, loss, gradient in answer:
            assert loss <= TOLERANCE, (name, loss)
            assert gradient <= TOLERANCE, (name, gradient)


def whole_gradients(case: Case, layout: str) -> tuple[float | None, dict[str, Tensor]]:
    """This rank's owned segments, to be put together by name and place."""
    with running(case) as run:
        batches = layouts()[layout][run.grid.dp.rank :: run.grid.dp.size]
        metrics = train_step(run.optimizer.chunks, batches, parity.everything, run.grid)
        owned = {f"{s.piece.hf}|{s.piece.offset}|{s.start}": s.grad.clone().numpy() for s in run.optimizer.segments if s.piece.owned}
        return (float(metrics["loss"]) if metrics else None), owned  # type: ignore[return-value]


def test_data_parallelism_changes_nothing() -> None:
    """dp 1, 2, 4 and 8: the same loss and the same gradient norm."""
    values = []
    for grid in (P(tp=8), P(tp=4), P(tp=2), P()):
        answers = distributed.run(distributed.WORLD, whole_gradients, Case(MODEL, grid), "packed")
        loss = next(value for value, _ in answers if value is not None)
        values.append((loss, math.sqrt(sum(float((g**2).sum()) for _, owned in answers for g in owned.values()))))
    for loss, norm in values[1:]:
        assert loss == pytest.approx(values[0][0], rel=TOLERANCE)
        assert norm == pytest.approx(values[0][1], rel=TOLERANCE)


def test_layouts_equal_the_oracle() -> None:
    """The layouts hold what the documents say: one of them against transformers, with labels shifted by hand."""
    hf = oracle.model(MODEL)
    docs = documents()
    nll, weight = torch.zeros((), dtype=torch.float64), 0.0
    for doc in docs:
        tokens, labels = torch.as_tensor(doc.tokens), torch.as_tensor(doc.labels)
        logits = hf(tokens[None]).logits[0]
        at = (labels[1:] != -100).nonzero()[:, 0]
        logp = logits[:-1][at].log_softmax(-1).gather(-1, labels[1:][at][:, None])[:, 0]
        own = torch.ones(len(at)) if doc.weights is None else torch.as_tensor(doc.weights)[1:][at]
        nll = nll - doc.weight * (own * logp.detach()).sum()
        weight += doc.weight * float(own.sum())
    value, _ = oracle.run(hf, layouts()["packed"], losses.cross_entropy)
    assert float(value) == pytest.approx(float(nll) / weight, rel=1e-7)  # weights are fp32 columns


def isolation(grid: P) -> list[tuple[float, float]]:
    """Change each document's tokens in turn; how much do the hidden states of the others and of itself change?"""
    with started(grid, tiny.shape(MODEL)) as started_grid:
        run = prepare(Case(MODEL, grid), started_grid)
        batch = rows.rows(61)[0]

        def logprobs(batch: Batch) -> Tensor:
            seen: list[Tensor] = []

            def look(head: Head, b: Batch) -> Loss:
                x = torch.zeros(len(batch.tokens), dtype=torch.float64)
                width = len(b.tokens)
                x[b.rows + started_grid.cp.rank * width] = head.logprobs(b.labels)
                torch.distributed.all_reduce(x, group=started_grid.cp.group)
                seen.append(x)
                return losses.cross_entropy(head, b)

            eval_step(run.optimizer.chunks, [batch], look, started_grid)
            return seen[0]

        every = torch.arange(len(batch.tokens))
        sequence = torch.cat([torch.full((n,), i) for i, n in enumerate(batch.lengths)])
        ones = torch.ones(len(every))
        batch = replace(batch, rows=every, labels=batch.tokens, verdict=ones > 0, weight=ones, sequence=sequence)
        base, result = logprobs(batch), []
        for number in range(batch.sequences):
            mine = sequence == number
            changed = logprobs(replace(batch, tokens=torch.where(mine, (batch.tokens + 7) % 61, batch.tokens)))
            difference = (changed - base).abs()
            result.append((float(difference[~mine].max()), float(difference[mine].max())))
        return result


@pytest.mark.parametrize("grid", [P(), P(cp=2), P(cp=4), P(tp=2, sp=True, cp=2), P(cp=8)], ids=str)
def test_documents_are_isolated(grid: P) -> None:
    """Changing the tokens of one document changes nothing in the others of its row, to the last bit."""
    for answer in distributed.run(distributed.WORLD, isolation, grid):
        for others, itself in answer:
            assert others == 0.0
            assert itself > 1e-3


def test_eval_equals_train() -> None:
    answers = distributed.run(distributed.WORLD, eval_and_train, Case("qwen3", P(tp=2, pp=2, vpp=2, sp=True)))
    assert any(answers)
    for answer in answers:
        if answer:
            assert answer[0] == answer[1]


def eval_and_train(case: Case) -> tuple[float, float] | None:
    with running(case) as run:
        batches = case.batches(run.grid)
        trained = train_step(run.optimizer.chunks, batches, parity.everything, run.grid)
        evaluated = eval_step(run.optimizer.chunks, batches, parity.everything, run.grid)
        return (float(trained["loss"]), float(evaluated["loss"])) if trained else None


# ---- the optimizer

OPTIM = OptimConfig(lr=1e-2, schedule="cosine", min_lr=1e-3, warmup_steps=3, weight_decay=0.1, clip_grad=0.5, no_decay=("embed_tokens",))
STEPS = 10


def ten_steps(cases: list[Case], expected_file: str) -> list[tuple[float, float, float]]:
    """On a rank, for each case: worst error of the gradient norms, of the first clipped gradient, of the weights after ten steps."""
    expected = torch.load(expected_file, weights_only=True)
    results = []
    for case in cases:
        with running(case, OPTIM) as run:
            want = expected[case.model]
            norm_error = clipped_error = 0.0
            for step in range(STEPS):
                run.step(losses.cross_entropy)
                update = run.optimizer.step(learning_rate(OPTIM, step, STEPS))
                norm_error = max(norm_error, abs(update.grad_norm - want["norms"][step]) / want["norms"][step])
                if step == 0:  # clipped in place
                    clipped_error = worst(run, want["clipped"], lambda s: s.grad)
            results.append((norm_error, clipped_error, worst(run, want["weights"], lambda s: s.weight)))
    return results


def oracle_steps(name: str) -> dict[str, object]:
    """torch's AdamW and clip_grad_norm_ on transformers' model."""
    hf = oracle.model(name)
    matrices = [p for n, p in hf.named_parameters() if p.dim() > 1 and "embed_tokens" not in n]
    rest = [p for n, p in hf.named_parameters() if not (p.dim() > 1 and "embed_tokens" not in n)]
    groups = [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, foreach=False)
    norms, clipped = [], {}
    for step in range(STEPS):
        oracle.run(hf, rows.rows(tiny.shape(name).vocab), losses.cross_entropy)
        assert OPTIM.clip_grad is not None
        norms.append(float(torch.nn.utils.clip_grad_norm_(hf.parameters(), OPTIM.clip_grad)))
        if step == 0:
            clipped = {n: p.grad.clone() for n, p in hf.named_parameters() if p.grad is not None}
        for group in adam.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        adam.step()
    assert norms[0] > OPTIM.clip_grad, "the clip must act for the test to test it"
    return {"norms": norms, "clipped": clipped, "weights": {n: p.detach() for n, p in hf.named_parameters()}}


def test_ten_adamw_steps(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Gradient norm, clipped gradient and ten AdamW updates equal torch's, where weights are copied in every way there is."""
    cases = [
        Case("qwen2", P()), Case("qwen3-tied", P(pp=4)), Case("qwen3-tied", P(tp=2, pp=2, vpp=2, sp=True)), Case("qwen2-1kv", P(tp=4)),
        Case("qwen3", P(tp=8, sp=True)), Case("llama-bias-tied", P(tp=4, pp=2)), Case("llama-bias-tied", P(tp=2, cp=2, sp=True)),
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("steps") / "expected.pt"
    torch.save({name: oracle_steps(name) for name in sorted({case.model for case in cases})}, path)
    answers = distributed.run(distributed.WORLD, ten_steps, cases, str(path))
    for number, case in enumerate(cases):
        errors = [max(answer[number][i] for answer in answers) for i in range(3)]
        assert max(errors) <= TOLERANCE, (case, errors)


def skipping(value: float) -> tuple[bool, bool, bool, int]:
    with running(Case("qwen2", P(tp=2, pp=2))) as run:
        before = [s.weight.clone() for s in run.optimizer.segments]
        run.step()
        if run.grid.rank == 5 and run.optimizer.segments:
            run.optimizer.segments[0].grad[0] = value
        update = run.optimizer.step(1e-2)
        same = all(torch.equal(a, s.weight) for a, s in zip(before, run.optimizer.segments, strict=True))
        run.step()
        after = run.optimizer.step(1e-2)
        return update.skipped, same, after.skipped, run.optimizer.steps


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    """One such element on one rank: every rank skips the step, and the next step is an ordinary one."""
    assert distributed.run(distributed.WORLD, skipping, value) == [(True, True, False, 1)] * distributed.WORLD


def bf16_masters() -> tuple[float, bool]:
    """Updates too small for bf16 add up in the masters, and weights are the masters' rounding."""
    with running(Case("qwen2", P(tp=2), dtype="bfloat16"), OptimConfig(weight_decay=0.0, clip_grad=None)) as run:
        start = [s.master.detach().clone() for s in run.optimizer.segments]
        for _ in range(4):
            run.step()
            run.optimizer.step(1e-5)
        moved = [float((s.master - a).abs().mean()) for s, a in zip(run.optimizer.segments, start, strict=True)]
        return min(moved), all(torch.equal(s.weight, s.master.to(torch.bfloat16)) for s in run.optimizer.segments)


def test_bf16_weights_have_fp32_masters() -> None:
    for moved, rounded in distributed.run(distributed.WORLD, bf16_masters):
        assert 1e-6 < moved < 1e-4  # four AdamW steps of at most 1e-5 each
        assert rounded


@pytest.mark.parametrize(
    ("cfg", "at"),
    [
        (OptimConfig(lr=1.0, schedule="constant"), {0: 1.0, 99: 1.0}),
        (OptimConfig(lr=1.0, schedule="constant", warmup_steps=10), {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0}),
        (OptimConfig(lr=1.0, schedule="linear"), {0: 1.0, 50: 0.5, 100: 0.0}),
        (OptimConfig(lr=1.0, schedule="linear", min_lr=0.2, warmup_steps=20), {20: 1.0, 60: 0.6, 100: 0.2}),
        (OptimConfig(lr=1.0, schedule="cosine"), {0: 1.0, 50: 0.5, 100: 0.0}),
        (OptimConfig(lr=1.0, schedule="cosine", min_lr=0.5), {0: 1.0, 50: 0.75, 100: 0.5}),
        (OptimConfig(lr=1.0, schedule="wsd", decay_steps=20), {0: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        (OptimConfig(lr=1.0, schedule="wsd", decay_steps=20, min_lr=0.5, warmup_steps=2), {0: 0.5, 2: 1.0, 90: 0.75}),
    ],
)
def test_learning_rate(cfg: OptimConfig, at: dict[int, float]) -> None:
    for step, lr in at.items():
        assert learning_rate(cfg, step, 100) == pytest.approx(lr)


@pytest.mark.parametrize(("pattern", "words"), [("nrom", "'nrom' matches no tensor"), ("norm(", "is no regular expression")])
def test_unknown_no_decay_pattern(pattern: str, words: str) -> None:
    with pytest.raises(MegamodError, match=re.escape(words)):
        optim.check(OptimConfig(no_decay=("embed", pattern)), list(hf_shapes(tiny.shape("qwen2"))), torch.device("cpu"), 1)


def deterministic() -> list[Tensor]:
    with running(Case("qwen3", P(tp=2, pp=2, sp=True), dtype="bfloat16")) as run:
        for _ in range(3):
            run.step()
            run.optimizer.step(1e-3)
        return [s.master.detach().clone() for s in run.optimizer.segments]


def twice() -> bool:
    """Two runs end with the same bits."""
    torch.use_deterministic_algorithms(True)
    try:
        return all(torch.equal(a, b) for a, b in zip(deterministic(), deterministic(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_runs_are_equal_to_the_last_bit() -> None:
    assert all(distributed.run(distributed.WORLD, twice))
