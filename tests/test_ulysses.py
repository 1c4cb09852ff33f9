"""Ulysses: what moves, how much of it and when; and rows in which documents lie over the ranks in every awkward way."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import distributed
import numpy as np
import oracle
import parity
import pytest
import rows
import tiny
import torch
import torch.distributed as dist
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import EVERYTHING, Case
from torch import Tensor

from megamod import losses
from megamod.batch import Batch
from megamod.config import ParallelConfig as P
from megamod.losses import Loss
from megamod.model import rope
from megamod.model.attention import PackedAttention, PackedRow
from megamod.model.backends import FUSED, Documents, _flash, attend_reference
from megamod.model.head import Head
from megamod.model.shape import Rope, both_spellings, shape_of
from megamod.parallel.grid import kv_repeats, started
from megamod.parallel.ulysses import heads_to_seq, seq_to_heads

TOLERANCE = 1e-11
TOKENS, DIM = 6, 4  # of a rank, of a head


# --- one rank, and a group that writes down what it is asked -------------------------------------------------------------------


class Awaited(dist.Work):
    def __init__(self, log: list[Any]) -> None:
        super().__init__()
        self.log = log

    def wait(self, timeout: Any = None) -> bool:
        self.log.append("wait")
        return True


class Counting(dist.ProcessGroup):
    """A group of `size` ranks whose others send what this one sends."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)
        self.log: list[Any] = []

    def alltoall_base(self, output: Tensor, input: Tensor, output_splits: Any, input_splits: Any, options: Any) -> dist.Work:
        assert not output_splits
        assert not input_splits
        assert input.is_contiguous()
        assert output.is_contiguous()
        self.log.append(input.numel() * input.element_size())
        output.copy_(input)
        return Awaited(self.log)

    def all_gather_single(self, output: Tensor, input: Tensor, options: Any) -> dist.Work:
        self.log.append(input.numel() * input.element_size() * self.size())  # to each of the others all of it
        output.copy_(input.repeat(self.size(), 1, 1))
        return Awaited(self.log)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, options: Any) -> dist.Work:
        self.log.append(input.numel() * input.element_size())
        output.copy_(input[: len(output)])
        return Awaited(self.log)

    @property
    def sent(self) -> float:
        """Bytes that left for the other ranks."""
        return sum(n for n in self.log if n != "wait") * (self.size() - 1) / self.size()

    @property
    def order(self) -> str:
        """`iiw`: two issued, one awaited."""
        return "".join("w" if entry == "wait" else "i" for entry in self.log)


def attention(heads: int, kv_heads: int, ulysses: int, gather: int = 1) -> tuple[PackedAttention, PackedRow, Counting, Counting]:
    """One rank's attention over a row of one document, the first stretch of it; and its groups."""
    group, beyond = Counting(ulysses), Counting(gather)
    kv_gather = SimpleNamespace(group=beyond, size=gather, rank=0) if gather > 1 else None
    grid: Any = SimpleNamespace(ulysses=SimpleNamespace(group=group, size=ulysses), kv_gather=kv_gather)
    row = packed_row((TOKENS * ulysses * gather,), grid)
    return PackedAttention(heads, kv_heads, grid, attend_reference), row, group, beyond


def packed_row(lengths: Sequence[int], grid: Any) -> PackedRow:
    shape = shape_of(tiny.config("qwen2", head_dim=DIM))
    positions = torch.cat([torch.arange(n) for n in lengths])
    nothing = torch.zeros(0, dtype=torch.long)
    batch = Batch(torch.zeros_like(positions), positions, tuple(lengths), nothing, nothing, nothing > 0, nothing.float(), nothing)
    return PackedRow.of(batch, shape, torch.float32, grid)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2), (8, 1), (24, 6), (24, 12), (24, 3)])  # of a rank: H/tp and K/tp
@pytest.mark.parametrize(("ulysses", "gather"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 3), (8, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_and_order(heads: int, kv_heads: int, ulysses: int, gather: int, dtype: torch.dtype) -> None:
    """q, k and v are on their way before any is awaited, forward and backward; the bytes are those of the module's docstring."""
    module, row, group, beyond = attention(heads, kv_heads, ulysses, gather)
    q, k, v = (torch.randn(TOKENS, n, DIM, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    repeated = math.lcm(kv_heads, ulysses)  # kv heads are repeated until u divides them, and only then
    unit = TOKENS * DIM * dtype.itemsize
    exchanged = (ulysses - 1) / ulysses * unit * (2 * heads + 2 * repeated)
    gathered = (gather - 1) * unit * 2 * repeated

    out = module(q, k, v, row)
    assert out.shape == q.shape
    assert group.order == "iiiwwwiw"
    assert beyond.order == ("iiww" if gather > 1 else "")
    assert (group.sent, beyond.sent) == (exchanged, pytest.approx(gathered))

    for log in (group.log, beyond.log):
        log.clear()
    out.backward(torch.randn_like(out))
    assert group.order == "iwiiiwww"
    assert beyond.order == ("iiww" if gather > 1 else "")
    assert (group.sent, beyond.sent) == (exchanged, pytest.approx(gathered))


@given(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16]), st.sampled_from([1, 2, 3, 4, 7, 8]), st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
def test_kv_heads_are_repeated_only_where_the_ranks_cannot_share_them(kv_heads: int, each: int, cp: int) -> None:
    found = kv_repeats(kv_heads * each, kv_heads, cp)
    if kv_heads % cp == 0:
        assert found == 1
    if found is not None and found > 1:
        assert kv_heads % cp
        assert all(kv_heads * n % cp for n in range(1, found))  # no fewer would do


@pytest.mark.parametrize("returns_more", [False, True])
def test_flash_attention_is_asked_in_its_own_words(returns_more: bool) -> None:
    """The seam's wrapper of FlashAttention 2 and 3 (some releases of which return the log-sum-exp too), around a stand-in."""

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        *, causal: bool = False, deterministic: bool = False,
    ) -> Any:  # fmt: skip
        assert causal
        assert deterministic
        assert cu_seqlens_q.tolist() == [0, 2, 3]  # the end of the second document and the third
        assert cu_seqlens_k.tolist() == [0, 5, 6]
        assert (max_seqlen_q, max_seqlen_k) == (2, 5)
        out = attend_reference(q, k, v, documents)
        return (out, None) if returns_more else out

    documents = Documents.of((3, 5, 1), torch.device("cpu"), slice(6, 9))
    q, k, v = torch.randn(3, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    found = _flash(flash_attn_varlen_func, True)(q, k, v, documents)
    assert torch.equal(found, attend_reference(q, k, v, documents))


# --- many ranks ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 6))
def test_borders_of_stretches(lengths: list[int], stretches: int) -> None:
    """Each query of a row is in one stretch, and sees there the keys that it sees in the whole row."""
    lengths[-1] += -sum(lengths) % stretches
    width, at = sum(lengths) // stretches, 0
    starts = [start for n, start in zip(lengths, np.cumsum([0, *lengths]), strict=False) for _ in range(n)]  # of each token's document
    for number in range(stretches):
        found = Documents.of(lengths, torch.device("cpu"), slice(number * width, (number + 1) * width))
        key = found.first_key
        assert sum(found.queries.lengths) == width
        for queries, keys in zip(found.queries.lengths, found.keys.lengths, strict=True):
            assert 1 <= queries <= keys
            for i in range(queries):  # bottom-right causal: query i of these sees the keys up to keys - queries + i
                assert starts[at] == key
                assert key + keys - queries + i == at
                at += 1
            key += keys
    assert at == sum(lengths)


def exchange(cp: int) -> None:
    """Both ways against slicing, values and gradients, for tensors of unequal heads at once."""
    with started(P(cp=cp), tiny.shape("qwen2")) as grid:
        group, rank, t = grid.cp.group, grid.cp.rank, 3
        generator = torch.Generator().manual_seed(grid.dp.rank)
        wholes = [torch.randn(t * cp, n, 5, generator=generator, dtype=torch.float64) for n in (2 * cp, cp, 3 * cp)]
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in wholes]

        def stretch(x: Tensor) -> Tensor:
            return x.chunk(cp, 0)[rank]

        def heads(x: Tensor) -> Tensor:
            return x.chunk(cp, 1)[rank]

        for function, before, after in ((seq_to_heads, stretch, heads), (heads_to_seq, heads, stretch)):
            # Not contiguous, as the parts of a fused projection are not.
            mine = [torch.cat((before(x), before(x)), -1)[..., :5].detach().requires_grad_() for x in wholes]
            found = function(group, *mine)
            for x, whole in zip(found, wholes, strict=True):
                assert torch.equal(x, after(whole))
            torch.autograd.backward(found, [after(w) for w in weights])
            for x, w in zip(mine, weights, strict=True):
                assert torch.equal(x.grad, before(w))


@pytest.mark.parametrize("cp", [1, 2, 4, 8])
def test_exchange(cp: int) -> None:
    distributed.run(distributed.WORLD, exchange, cp)


# Rows of 32 tokens: over 4 ranks of 8 tokens, over 2 of 16, over 8 of 4.
AWKWARD: dict[str, tuple[tuple[int, ...], Sequence[int] | None]] = {
    "documents fill whole ranks": ((8, 8, 16), None),
    "one document over all ranks": ((32,), None),
    "documents of one token": ((1,) * 32, None),
    "one-token documents at the borders": ((7, 1, 1, 7, 15, 1), None),
    "a rank without a labelled token": ((20, 12), range(9)),
    "labels on one rank only": ((5, 22, 5), range(25, 30)),
    "the last rank is all tail": ((13, 7, 12), range(19)),
    "nothing but tail": ((32,), ()),
}


def awkward_rows(vocab: int) -> list[Batch]:
    """One row a case, labelled at the positions given, or at all."""
    made = []
    plain = rows.rows(vocab, [lengths for lengths, _ in AWKWARD.values()])
    for batch, (lengths, labelled) in zip(plain, AWKWARD.values(), strict=True):
        at = torch.tensor(list(range(rows.ROW) if labelled is None else labelled), dtype=torch.long)
        sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[at]
        labels = batch.tokens.roll(-1)[at]
        weight = 0.5 + torch.arange(len(at), dtype=torch.float64) / rows.ROW
        made.append(replace(batch, rows=at, labels=labels, verdict=at % 3 == 0, weight=weight, sequence=sequence))
    return made


def moderation(head: Head, batch: Batch) -> Loss:
    return losses.moderation(head, batch, verdict_weight=3.0)


LOSSES = (parity.everything, losses.cross_entropy, moderation)


def awkward(case: Case, expected_file: str) -> list[tuple[float, float]]:
    """For each loss: its error and the worst gradient's, with each of the rows a micro-batch of its own."""
    expected = torch.load(expected_file, weights_only=True)
    results = []
    with started(case.parallel, tiny.shape(case.model)) as grid:
        batches = rows.shared(awkward_rows(tiny.shape(case.model).vocab), grid.dp.rank, grid.dp.size, len(AWKWARD) // grid.dp.size)
        for number, loss in enumerate(LOSSES):
            run = parity.prepare(case, grid)
            run.metrics = parity.train_step(run.optimizer.chunks, batches, loss, grid)
            value, gradients = expected[number]
            error = abs(float(run.metrics["loss"]) - float(value)) / abs(float(value)) if run.metrics else 0.0
            results.append((error, parity.worst(run, gradients, parity.gradient)))
    return results


@pytest.fixture(scope="module")
def awkward_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    hf = oracle.model("qwen3")
    path = tmp_path_factory.mktemp("oracle") / "awkward.pt"
    torch.save([oracle.run(hf, awkward_rows(tiny.shape("qwen3").vocab), loss) for loss in LOSSES], path)
    return str(path)


@pytest.mark.parametrize(
    "grid", [P(), P(cp=2), P(cp=4), P(cp=8), P(tp=2, cp=4, sp=True), P(cp=4, pp=2, vpp=2), P(tp=2, cp=2, pp=2)], ids=str
)
def test_awkward_rows(grid: P, awkward_file: str) -> None:
    """Whatever lies where: no NaN, right counts, for every loss that there is. qwen3 here has 2 kv heads."""
    for answer in distributed.run(distributed.WORLD, awkward, Case("qwen3", grid), awkward_file):
        assert all(loss <= TOLERANCE and gradient <= TOLERANCE for loss, gradient in answer), answer


BEYOND = [P(cp=2), P(cp=4), P(cp=8), P(cp=4, pp=2, vpp=2), P(tp=2, cp=4), P(tp=2, cp=4, sp=True), P(tp=2, pp=2, cp=2)]


@pytest.fixture(scope="module")
def few_heads_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    results = {}
    for name in tiny.FEW_HEADS:
        value, gradients = oracle.run(oracle.model(name), parity.made_rows(name), parity.everything)
        results[name, EVERYTHING] = value, gradients
    path = tmp_path_factory.mktemp("oracle") / "few.pt"
    torch.save(results, path)
    return str(path)


@pytest.mark.parametrize("grid", BEYOND, ids=str)
def test_beyond_the_heads(grid: P, few_heads_file: str) -> None:
    """cp that the heads cannot be shared by: keys and values are gathered; every recompute mode, loss and every gradient."""
    recompute: list[tuple[str, Any]] = [("none", None), ("full", None), ("selective", ("core_attn",))]
    names = [name for name in tiny.FEW_HEADS if tiny.shape(name).heads % grid.tp == 0]
    cases = [Case(name, grid, mode, modules) for name in names for mode, modules in recompute]
    for answer in distributed.run(distributed.WORLD, parity.compare, cases, few_heads_file):
        assert all(loss <= TOLERANCE and gradient <= TOLERANCE for loss, gradient, _ in answer), answer


@pytest.mark.parametrize("grid", [P(), P(cp=4, pp=2), P(tp=2, cp=4, sp=True), P(tp=2, cp=2, pp=2, vpp=2)], ids=str)
def test_three_rows_of_positions(grid: P, tmp_path: Any) -> None:
    """mRoPE after the exchange: the text decoders of Qwen2.5-VL and Qwen3-VL, with any three positions a token."""
    results = {}
    for name in tiny.VISION:
        value, gradients = oracle.run(oracle.model(name), parity.made_rows(name), parity.everything)
        results[name, EVERYTHING] = value, gradients
    torch.save(results, tmp_path / "expected.pt")
    cases = [Case(name, grid, recompute) for name in tiny.VISION for recompute in ("none", "full")]
    for answer in distributed.run(distributed.WORLD, parity.compare, cases, str(tmp_path / "expected.pt")):
        assert all(loss <= TOLERANCE and gradient <= TOLERANCE for loss, gradient, _ in answer), answer


# --- mRoPE's tables ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_text_stands_at_the_same_place_in_all_three(data: st.DataObject) -> None:
    """Three equal rows of positions are one row, bit for bit, however the frequencies are shared out."""
    section = tuple(data.draw(st.lists(st.integers(1, 8), min_size=3, max_size=3)))
    fits = 3 * section[1] - 2 < sum(section) and 3 * section[2] - 1 < sum(section)  # as many turns as there are frequencies
    interleaved = data.draw(st.booleans()) and fits
    shared = Rope(theta=1e4, mrope_section=section, mrope_interleaved=interleaved)  # type: ignore[arg-type]
    positions = torch.tensor(data.draw(st.lists(st.integers(0, 4000), min_size=1, max_size=9)))
    dim = 2 * sum(section)
    one = rope.tables(Rope(theta=1e4), dim, positions, torch.float64)
    three = rope.tables(shared, dim, positions.expand(3, -1), torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    moved = positions + torch.tensor([[0], [1], [0]])
    changed = (rope.tables(shared, dim, moved, torch.float64)[1] != three[1]).any(0)
    assert int(changed.sum()) == section[1]  # what reads the height, and nothing else


@pytest.mark.parametrize("section", [[4, 2], [4, 2, 3], [4, 4, 0], "4,2,2", [4.0, 2, 2]])
def test_sections_that_are_none(section: Any) -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}
    text = complaint(lambda: shape_of(tiny.config("qwen3", head_dim=16, rope_parameters=parameters)))
    assert "three positive integers that sum to head_dim / 2 = 8 were expected" in text


@pytest.mark.parametrize("parameters", [{"type": "mrope"}, {"rope_type": "mrope"}, {"rope_type": "default", "mrope_interleaved": True}])
def test_mrope_without_sections(parameters: dict[str, Any]) -> None:
    text = complaint(lambda: shape_of(tiny.config("qwen3", head_dim=16, rope_parameters={"rope_theta": 1e4, **parameters})))
    assert "mrope without mrope_section" in text


@pytest.mark.parametrize("name", sorted(tiny.VISION))
def test_both_spellings_keep_the_sections(name: str) -> None:
    """Of an export's config.json each spelling alone says what there was."""
    config = both_spellings(tiny.config(name), "bfloat16")
    five = {key: value for key, value in config.items() if key != "rope_scaling"}
    four = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert four["rope_scaling"]["type"] == "mrope"
    assert shape_of(five).rope == shape_of(four).rope == tiny.shape(name).rope


def test_flash_attention_3_is_not_for_deterministic_runs() -> None:
    assert "not deterministic" in complaint(lambda: FUSED["flash_attn_3"](torch.device("cuda"), True))
