"""The head against all logits at once, in one process and cut over tensor-parallel ranks; the losses as a notebook calls them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import distributed
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamod import losses
from megamod.batch import UNITS, Batch
from megamod.config import ParallelConfig
from megamod.data.documents import Document
from megamod.data.packing import micro_batch
from megamod.errors import MegamodError
from megamod.model import head as head_module
from megamod.model.head import Head
from megamod.parallel.grid import Grid, started
from megamod.weights.table import padded_vocab

TERMS = ("logprob", "logsumexp", "entropy")


class Plain:
    """The head as a textbook has it: all logits, log_softmax."""

    def __init__(self, hidden: Tensor, weight: Tensor, vocab: int, rows: Tensor) -> None:
        self.z = hidden.reshape(-1, hidden.shape[-1])[rows] @ weight[:vocab].t()  # [N, V]
        self.log_p = F.log_softmax(self.z, -1)

    def statistics(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        entropy = -(self.log_p.exp() * self.log_p).sum(-1)
        return self.log_p.gather(-1, ids[:, None])[:, 0], self.z.logsumexp(-1), entropy

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        values, ids = self.log_p.topk(min(k, self.log_p.shape[-1]), dim=-1)
        return values, ids

    def logits(self) -> Tensor:
        return self.z


def random(*size: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def objective(head: Any, ids: Tensor) -> Tensor:
    """Every number that the head gives with a gradient, each position and column with a factor of its own."""
    terms = [(x * random(len(x), seed=10 + i)).sum() for i, x in enumerate(head.statistics(ids))]
    logits = head.logits()
    return sum(terms, (logits * random(*logits.shape, seed=20)).sum())


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected element where that is above 1."""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    return float(torch.nan_to_num(error, nan=float("inf")))


def of_rows(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> list[int]:
    """Let the head take as many float64 logits at a time as so many rows have. Returns a list that it fills with the chunks' numbers."""
    made: list[int] = []
    chunks = head_module._chunks

    def counted(n: int, rows: int) -> list[slice]:
        made.append(len(chunks(n, rows)))
        return chunks(n, rows)

    monkeypatch.setattr(head_module, "CHUNK_BYTES", rows * columns * 8 + 3)
    monkeypatch.setattr(head_module, "_chunks", counted)
    return made


# ---- one process


@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 100])
@pytest.mark.parametrize("labelled", [0, 1, 11])
def test_whole_is_the_plain_form(monkeypatch: pytest.MonkeyPatch, chunk: int, labelled: int) -> None:
    vocab = 23
    made = of_rows(monkeypatch, chunk, vocab)
    results = []
    ids = torch.randint(0, vocab, (labelled,), generator=torch.Generator().manual_seed(3))
    if labelled > 1:
        ids[0], ids[-1] = 0, vocab - 1
    for plain in (False, True):
        hidden, weight = random(labelled, 7, seed=1).requires_grad_(), random(vocab, 7, seed=2).requires_grad_()
        head: Any = Plain(hidden, weight, vocab, torch.arange(labelled)) if plain else Head.whole(hidden, weight)
        objective(head, ids).backward()
        results.append([*head.statistics(ids), head.logits(), *head.topk(4), hidden.grad, weight.grad])
        if not plain:
            alone = [head.logprobs(ids), head.logsumexp(), head.entropy()]
            assert all(torch.equal(a, b) for a, b in zip(alone, head.statistics(ids), strict=True))
    width = max(1, (chunk * vocab * 8 + 3) // (8 * max(1, labelled)))  # statistics go by columns, topk by rows
    assert set(made) == {-(-vocab // width), -(-labelled // chunk)}
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert gap(found, expected) < 1e-12
    if not labelled:
        assert not results[0][-1].any(), "no labelled row, and a gradient"


@pytest.mark.parametrize("asked", [terms for n in (1, 2, 3) for terms in itertools.combinations(TERMS, n)])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("alone", [False, True], ids=["statistics", "alone"])
def test_gradients_of_some_terms(monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], trained: tuple[bool, bool], alone: bool) -> None:
    """What is not asked is not computed: each selection of terms and inputs has a way of its own through the backward."""
    vocab, rows, ids = 11, torch.tensor([1, 2, 5, 6]), torch.tensor([0, 10, 3, 3])
    monkeypatch.setattr(head_module, "CPU_COLUMNS", 4)
    gradients = []
    for make in (Head, Plain):
        inputs = [random(8, 5, seed=1), random(vocab + 3, 5, seed=2)]
        for x, wanted in zip(inputs, trained, strict=True):
            x.requires_grad_(wanted)
        head: Any = make(*inputs, vocab, rows)
        values = dict(zip(TERMS, head.statistics(ids), strict=True))
        if alone and make is Head:
            values = {"logprob": head.logprobs(ids), "logsumexp": head.logsumexp(), "entropy": head.entropy()}
        sum((values[term] * random(4, seed=10 + TERMS.index(term))).sum() for term in asked).backward()
        gradients.append([x.grad for x in inputs])
    for found, expected, wanted in zip(*gradients, trained, strict=True):
        assert (found is not None) == wanted
        assert not wanted or gap(found, expected) < 1e-12


def test_without_a_gradient_the_numbers_are_the_same() -> None:
    hidden, weight, ids = random(5, 4, seed=1).requires_grad_(), random(9, 4, seed=2).requires_grad_(), torch.tensor([0, 8, 3, 3, 1])
    expected = Head.whole(hidden, weight).statistics(ids)
    with torch.no_grad():
        head = Head.whole(hidden, weight)
        found = [*head.statistics(ids), head.logprobs(ids)]
    assert all(torch.equal(a, b) for a, b in zip(found, [*expected, expected.logprob], strict=True))
    assert not any(x.requires_grad for x in found)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight = random(5, 4, seed=1).requires_grad_(), random(9, 4, seed=2).requires_grad_()
    (grad,) = torch.autograd.grad(Head.whole(hidden, weight).logsumexp().square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


class Largest(TorchDispatchMode):
    """`with Largest() as largest:` keeps the number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("bound", ["CHUNK_BYTES", "CPU_COLUMNS"])
def test_logits_of_all_columns_never_exist(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    n, c, vocab, width = 50, 3, 1000, 100
    monkeypatch.setattr(head_module, bound, n * width * 8 if bound == "CHUNK_BYTES" else width)
    hidden, weight = random(n, c, seed=1).requires_grad_(), random(vocab, c, seed=2).requires_grad_()
    ids = torch.arange(n)
    with Largest() as largest:
        head = Head.whole(hidden, weight)
        (sum(x.sum() for x in head.statistics(ids)) + head.logprobs(ids).sum()).backward()
    assert largest.elements == n * width
    with Largest() as largest:
        head.logits()
    assert largest.elements == n * vocab


class Products(TorchDispatchMode):
    """`with Products() as products:` counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).startswith(("aten.mm.", "aten.addmm"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_kept_logits_save_products_and_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, trained: tuple[bool, bool], entropy: bool, dtype: torch.dtype
) -> None:
    n, c, vocab, width = 7, 5, 26, 8
    blocks = -(-vocab // width)
    monkeypatch.setattr(head_module, "CPU_COLUMNS", width)
    ids = torch.arange(n)
    results = []
    for held in (0, 1, 3, blocks):
        bound = (min(held * width, vocab) * n + n) * dtype.itemsize  # and a column, which is no block
        monkeypatch.setattr(head_module, "KEPT_BYTES", bound)
        inputs = [random(n, c, seed=1).to(dtype), random(vocab, c, seed=2).to(dtype)]
        for x, wanted in zip(inputs, trained, strict=True):
            x.requires_grad_(wanted)
        with Products() as products:
            head = Head.whole(*inputs)
            value = head.entropy() if entropy else head.logprobs(ids)
            kept = value.grad_fn.kept  # type: ignore[union-attr]
            assert len(kept) == held
            assert sum(z.nbytes for z in kept.values()) <= bound
            learnt = [x for x in inputs if x.requires_grad]
            first = torch.autograd.grad(value.sum(), learnt, retain_graph=True)
            assert not kept, "nothing is held once it was used"
        assert products.count == blocks * (2 + sum(trained)) - held
        again = torch.autograd.grad(value.sum(), learnt)
        results.append([value, *first])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))


def test_without_a_gradient_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    apply = head_module._Vocabulary.apply
    monkeypatch.setattr(head_module._Vocabulary, "apply", lambda *args: asked.append(args[-1]) or apply(*args))
    head = Head.whole(random(5, 4, seed=1).requires_grad_(), random(9, 4, seed=2).requires_grad_())
    with torch.no_grad():
        head.logprobs(torch.arange(5))
    head.logprobs(torch.arange(5))
    assert asked == [0, head_module.KEPT_BYTES]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_any_padding_any_chunk(data: st.DataObject) -> None:
    tokens, vocab, padding, chunk = (data.draw(st.integers(low, 6)) for low in (1, 1, 0, 1))
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, tokens - 1)))), dtype=torch.long)
    ids = torch.tensor([data.draw(st.integers(0, vocab - 1)) for _ in rows], dtype=torch.long)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "CHUNK_BYTES", chunk * vocab * 8)
        patch.setattr(head_module, "KEPT_BYTES", data.draw(st.integers(0, 6 * 6 * 8)))
        for make in (Head, Plain):
            hidden, weight = random(tokens, 1, 3, seed=1).requires_grad_(), random(vocab + padding, 3, seed=2).requires_grad_()
            head = make(hidden, weight, vocab, rows)
            objective(head, ids).backward()
            results.append([*head.statistics(ids), head.logits(), *head.topk(3), hidden.grad, weight.grad])
    assert all(gap(found, expected) < 1e-12 for found, expected in zip(*results, strict=True))


def test_gradients_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    of_rows(monkeypatch, 2, 9)
    ids = torch.tensor([0, 8, 4, 4, 1])

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, 9, torch.tensor([0, 2, 3, 4, 6]))
        return (*head.statistics(ids), head.logits())

    assert torch.autograd.gradcheck(outputs, (random(7, 4, seed=1).requires_grad_(), random(12, 4, seed=2).requires_grad_()))


def test_padding_does_not_count() -> None:
    vocab, rows = 9, torch.tensor([1, 2, 5])
    ids = torch.tensor([0, 8, 3])
    results = []
    for junk in (0.0, 1e3):
        weight = torch.cat([random(vocab, 4, seed=2), torch.full((7, 4), junk, dtype=torch.float64)]).requires_grad_()
        hidden = random(6, 4, seed=1).requires_grad_()
        head = Head(hidden, weight, vocab, rows)
        assert head.logits().shape == (3, vocab)
        objective(head, ids).backward()
        results.append([*head.statistics(ids), head.logits(), *head.topk(vocab), hidden.grad, weight.grad])
        assert weight.grad is not None
        assert not weight.grad[vocab:].any()
        assert weight.grad[:vocab].any()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_one_of_two_inputs_is_trained() -> None:
    """LoRA trains no head, and a frozen body has no gradient."""
    hidden, weight, ids = random(5, 4, seed=1), random(9, 4, seed=2), torch.tensor([0, 8, 3, 3, 1])
    both = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    objective(Head.whole(*both), ids).backward()
    for trained in (0, 1):
        one = [hidden.clone(), weight.clone()]
        one[trained].requires_grad_()
        objective(Head.whole(*one), ids).backward()
        assert torch.equal(one[trained].grad, both[trained].grad)  # type: ignore[arg-type]
        assert one[1 - trained].grad is None


@pytest.mark.parametrize("first", ["topk", "no_grad"])
def test_what_is_asked_without_a_gradient_takes_none_from_later(first: str) -> None:
    hidden, weight = random(5, 4, seed=1).requires_grad_(), random(9, 4, seed=2).requires_grad_()
    head = Head.whole(hidden, weight)
    if first == "topk":
        values, _ = head.topk(2)
        assert not values.requires_grad
    else:
        with torch.no_grad():
            head.entropy()
    head.logprobs(torch.tensor([0, 8, 3, 3, 1])).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().min() > 0


def test_bfloat16_gives_fp32_close_to_the_truth() -> None:
    vocab, labelled = 300, 40
    hidden, weight = (random(n, 64, seed=n, scale=s).bfloat16().requires_grad_() for n, s in ((labelled, 1.0), (vocab, 0.3)))
    ids = torch.randint(0, vocab, (labelled,), generator=torch.Generator().manual_seed(3))
    truth_hidden, truth_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    head, truth = Head.whole(hidden, weight), Plain(truth_hidden, truth_weight, vocab, torch.arange(labelled))
    numbers, true_numbers = ((*x.statistics(ids), x.logits(), x.topk(5)[0]) for x in (head, truth))
    for found, expected in zip(numbers, true_numbers, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 0.05  # logits of about 10 were rounded to bf16's 8 bits
    sum(x.sum() for x in head.statistics(ids)).backward()
    sum(x.sum() for x in truth.statistics(ids)).backward()
    for found, expected in ((hidden.grad, truth_hidden.grad), (weight.grad, truth_weight.grad)):
        assert found.dtype == torch.bfloat16
        assert float((found.double() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4], [-1e4, 1e4, 1.0]], dtype=dtype)  # logits, with weight I
    hidden, weight = z.clone().requires_grad_(), torch.eye(3, dtype=dtype).requires_grad_()
    head, ids = Head.whole(hidden, weight), torch.tensor([1, 0, 0, 1])
    logprob, logsumexp, entropy = head.statistics(ids)
    (logprob.sum() + logsumexp.sum() + entropy.sum()).backward()
    log_p = F.log_softmax(z.double(), -1)
    slack = 1e-2  # what fp32 has left at 1e4
    assert (logprob - log_p.gather(-1, ids[:, None])[:, 0]).abs().max() < slack
    assert (logsumexp - z.double().logsumexp(-1)).abs().max() < slack
    assert (entropy - torch.special.entr(log_p.exp()).sum(-1)).abs().max() < slack
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert head.topk(3)[0].isfinite().all()


# ---- tensor-parallel ranks

SHAPE = "qwen2"  # 8 heads: it can be cut in 2, 4 and 8
TOKENS = 24
# (tp, sp, vocab): 9 over 8 ranks are padded to 16, and the last three have none that is real; 61 is padded by all; 64 by none.
CUTS = [(tp, sp, vocab) for tp in (2, 4, 8) for sp in (False, True) for vocab in (9, 61, 64)]
LABELLED = {"none": [], "one": [13], "many": [*range(0, TOKENS, 2), 1, 23]}  # also rows of one rank only, and out of order


def cut(grid: Grid, vocab: int, sp: bool, rows: Sequence[int]) -> dict[str, float]:
    """On this rank: how far the head's numbers and gradients are from the whole form's."""
    tp, rank = grid.tp.size, grid.tp.rank
    at = torch.tensor(rows, dtype=torch.long)
    shard = padded_vocab(vocab, tp) // tp
    borders = [i for s in range(0, vocab, shard) for i in (s - 1, s) if 0 <= i < vocab] + [vocab - 1]
    ids = torch.tensor([borders[i % len(borders)] for i in range(len(rows))], dtype=torch.long)
    all_hidden, all_weight = random(TOKENS, 1, 6, seed=1), torch.zeros(shard * tp, 6, dtype=torch.float64)
    all_weight[:vocab] = random(vocab, 6, seed=2)
    mine = slice(rank * TOKENS // tp, (rank + 1) * TOKENS // tp) if sp else slice(None)
    rows_of_weight = slice(rank * shard, (rank + 1) * shard)

    whole_hidden, whole_weight = all_hidden.clone().requires_grad_(), all_weight.clone().requires_grad_()
    plain = Plain(whole_hidden, whole_weight, vocab, at)
    objective(plain, ids).backward()
    assert whole_hidden.grad is not None
    assert whole_weight.grad is not None

    all_weight[vocab:] = 1e3  # what padding holds must not matter
    hidden, weight = all_hidden[mine].clone().requires_grad_(), all_weight[rows_of_weight].clone().requires_grad_()
    head = Head(hidden, weight, vocab, at, grid.tp.group, sp)
    first = head.topk(5)  # asked first: it must not take the gradient away
    objective(head, ids).backward()
    assert hidden.grad is not None
    assert weight.grad is not None

    result = {name: gap(x, y) for name, x, y in zip(TERMS, head.statistics(ids), plain.statistics(ids), strict=True)}
    result["logits"] = gap(head.logits(), plain.z)
    for k, found in ((5, first), (1, head.topk(1)), (vocab, head.topk(vocab)), (vocab + 3, head.topk(vocab + 3))):
        for what, x, y in zip(("values", "ids"), found, plain.topk(k), strict=True):
            result[f"top {k} {what}"] = gap(x, y)
    result["hidden gradient"] = gap(hidden.grad, whole_hidden.grad[mine])
    result["weight gradient"] = gap(weight.grad, whole_weight.grad[rows_of_weight])
    result["padding gradient"] = float(weight.grad[max(0, vocab - rank * shard) :].abs().sum())
    return result


def cuts() -> dict[tuple[int, bool, int, str], dict[str, float]]:
    results = {}
    for size in sorted({tp for tp, _, _ in CUTS}):
        with started(ParallelConfig(tp=size), tiny.shape(SHAPE)) as grid:
            for (tp, sp, vocab), (labelled, rows) in itertools.product(CUTS, LABELLED.items()):
                if tp == size:
                    results[tp, sp, vocab, labelled] = cut(grid, vocab, sp, rows)
    return results


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[tuple[int, bool, int, str], dict[str, float]]]:
    return distributed.run(8, cuts)


@pytest.mark.parametrize("labelled", LABELLED)
@pytest.mark.parametrize(("tp", "sp", "vocab"), CUTS)
def test_cut_is_the_whole_on_every_rank(on_ranks: list[Any], tp: int, sp: bool, vocab: int, labelled: str) -> None:
    for rank, results in enumerate(on_ranks):
        wrong = {what: error for what, error in results[tp, sp, vocab, labelled].items() if not error < 1e-12}
        assert not wrong, f"rank {rank}"
        assert results[tp, sp, vocab, labelled]["padding gradient"] == 0.0


# ---- the losses, as a notebook calls them

VOCAB = 19


def document(length: int, trained: Sequence[int], verdict: Sequence[int], weight: float, seed: int) -> Document:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, length)
    is_trained, is_verdict = np.zeros(length, np.bool_), np.zeros(length, np.bool_)
    is_trained[list(trained)], is_verdict[list(verdict)] = True, True
    return Document(tokens, np.where(is_trained, tokens, -100), is_verdict, weight)


DOCUMENTS = [
    [document(6, [3, 4, 5], [4], 1.0, seed=1), document(5, [0, 1, 4], [0, 4], 0.25, seed=2)],  # a first token is never predicted
    [document(4, [], [], 3.0, seed=3), document(7, [1, 2, 3, 4, 5, 6], [6], 3.5, seed=4)],
]
CAPACITY = 12  # both rows end with padding


def notebook() -> tuple[Head, Batch, Tensor, Tensor]:
    batch = micro_batch(DOCUMENTS, CAPACITY)
    hidden, weight = random(2 * CAPACITY, 5, seed=1).requires_grad_(), random(VOCAB, 5, seed=2).requires_grad_()
    return Head.whole(hidden[batch.rows], weight), batch, hidden, weight


def by_hand(hidden: Tensor, weight: Tensor, verdict_weight: float) -> tuple[Tensor, dict[str, float]]:
    """Document by document, token by token. Returns the loss and what the metrics should be."""
    total, weights, nlls = torch.zeros((), dtype=torch.float64), 0.0, {False: [], True: []}
    for row, documents in enumerate(DOCUMENTS):
        at = row * CAPACITY
        for doc in documents:
            for i in range(1, len(doc.tokens)):
                if doc.labels[i] != -100:
                    nll = F.cross_entropy(hidden[at + i - 1] @ weight.t(), torch.tensor(int(doc.tokens[i])))
                    total = total + doc.weight * (verdict_weight if doc.verdict[i] else 1.0) * nll
                    weights += doc.weight
                    nlls[bool(doc.verdict[i])].append(float(nll.detach()))
            at += len(doc.tokens)
    both = nlls[False] + nlls[True]
    return total / weights, {"nll": sum(both) / len(both), "nll/verdict": sum(nlls[True]) / len(nlls[True])}


LOSSES: Mapping[str, tuple[losses.LossFunction, float]] = {
    "cross_entropy": (losses.cross_entropy, 1.0),
    "moderation": (losses.moderation, 4.0),
    "moderation of 6": (partial(losses.moderation, verdict_weight=6.0), 6.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_in_a_notebook_is_the_one_by_hand(name: str) -> None:
    loss, verdict_weight = LOSSES[name]
    head, batch, hidden, weight = notebook()
    value, metrics = loss(head, batch)
    value.backward()
    hand_hidden, hand_weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    expected, means = by_hand(hand_hidden, hand_weight, verdict_weight)
    expected.backward()
    value, expected = value.detach(), expected.detach()
    assert abs(float(value) - float(expected)) < 1e-12
    assert gap(hidden.grad, hand_hidden.grad) < 1e-12  # type: ignore[arg-type]
    assert gap(weight.grad, hand_weight.grad) < 1e-12  # type: ignore[arg-type]
    for metric, mean in metrics.items():
        assert abs(float(mean.sum / mean.count) - means[metric]) < 1e-12
        assert not mean.sum.requires_grad
    assert list(metrics) == (["nll"] if name == "cross_entropy" else ["nll", "nll/verdict"])
    # A part of a step: the totals are the step's, and the parts add up.
    parts = [micro_batch([row], CAPACITY) for row in DOCUMENTS]
    counts = [part.counts() for part in parts]
    totals = {unit: float(counts[0][unit] + counts[1][unit]) for unit in counts[0]}
    values = []
    for i, part in enumerate(parts):
        rows_hidden = hidden.detach()[i * CAPACITY : (i + 1) * CAPACITY][part.rows]
        values.append(float(loss(Head.whole(rows_hidden, weight.detach()), replace(part, totals=totals)).value))
    assert abs(sum(values) - float(expected)) < 1e-12


def test_units_and_sums_over_documents() -> None:
    _, batch, _, _ = notebook()
    # Positions that predict: 3 and 2 of the first row (tokens 1 and 4 of its second document), 6 of the last document.
    assert len(batch.labels) == 11
    assert batch.sequences == 6  # four documents, two paddings
    counts = {unit: float(count) for unit, count in batch.counts().items()}
    assert counts == {
        "tokens": 11.0, "weights": 3 * 1.0 + 2 * 0.25 + 6 * 3.5, "samples": 1.0 + 0.25 + 3.5, "pairs": 0.0, "rated": 0.0, "chosen": 0.0,
    }  # fmt: skip
    x = random(11, seed=5)
    sums = batch.per_sequence(x)
    nothing = x[:0].sum()
    expected = torch.stack([x[:3].sum(), x[3:5].sum(), nothing, nothing, x[5:].sum(), nothing])
    assert gap(sums, expected) < 1e-15
    of_documents = sums * torch.tensor([1.0, 0.25, 1.0, 3.0, 3.5, 1.0], dtype=torch.float64)  # each counts with its weight
    for unit, y, summed in (("tokens", x, x), ("weights", x, x), ("samples", sums, of_documents)):
        assert abs(float(batch.mean(y, over=unit)) - float(summed.sum()) / counts[unit]) < 1e-15
        assert abs(float(replace(batch, totals={unit: 7.0}).mean(y, over=unit)) - float(summed.sum()) / 7) < 1e-15
    mean = batch.mean_of(x)
    assert float(mean.count) == 11.0
    assert abs(float(mean.sum) - float(x.sum())) < 1e-15


@pytest.mark.parametrize(("unit", "hint"), [("token", "did you mean 'tokens'"), ("quarks", "choose from: chosen, pairs, rated, sam")])
def test_an_unknown_unit_names_the_choices(unit: Any, hint: str) -> None:
    _, batch, _, _ = notebook()
    with pytest.raises(MegamodError, match=hint) as error:
        batch.mean(torch.ones(11), over=unit)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_without_a_labelled_token_is_refused(name: str) -> None:
    """A micro-batch may have none, and then contributes nothing; a whole step without would be a step for nothing."""
    batch = micro_batch([[document(5, [], [], 1.0, seed=1), document(3, [0], [0], 2.0, seed=2)]], 9)
    assert len(batch.labels) == 0
    hidden, weight = random(9, 5, seed=1).requires_grad_(), random(VOCAB, 5, seed=2).requires_grad_()
    head = Head.whole(hidden[batch.rows], weight)
    assert (
        complaint(lambda: LOSSES[name][0](head, batch))
        == "a mean over 'weights', and the step has no labelled tokens with a weight: more rows in a step may have some"
    )
    of_a_step = replace(batch, totals=dict.fromkeys(UNITS, 3.0))
    value, metrics = LOSSES[name][0](head, of_a_step)
    value.backward()
    assert float(value.detach()) == 0.0
    for grad in (hidden.grad, weight.grad):
        assert grad is not None
        assert torch.equal(grad, torch.zeros_like(grad))
    assert all(float(mean.count) == float(mean.sum) == 0.0 for mean in metrics.values())
    assert float(of_a_step.mean(of_a_step.per_sequence(torch.zeros(0)), over="samples")) == 0.0
