"""Packing and dealing, each against the plainest code that says the same; the bench of both, that it runs."""

import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamod.config import SyntheticData
from megamod.data.documents import synthetic
from megamod.data.loader import deal
from megamod.data.packing import PackState, Rows, StreamPacker, _place, attention_costs, pack
from megamod.errors import MegamodError
from tools import bench_packing as tool

QUICK = settings(max_examples=60, deadline=None)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The definition: look at every row for every document. Of equal rows, the one that was touched last."""
    rows: list[list[int]] = []
    touched: list[int] = []
    for now, index in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        room = [capacity - sum(lengths[i] for i in row) for row in rows]
        fits = [r for r in range(len(rows)) if room[r] >= lengths[index]]
        if fits:
            best = min(fits, key=lambda r: (room[r], -touched[r]))
            rows[best].append(index)
            touched[best] = now
        else:
            rows.append([index])
            touched.append(now)
    return rows


@st.composite
def problems(draw: st.DrawFn, most: int = 40) -> tuple[list[int], int]:
    """Lengths, and a capacity that holds them: all kinds of lengths, or many of a few kinds, as groups of equal rows want them."""
    capacity = draw(st.integers(1, 40))
    kinds = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=4))
    length = draw(st.sampled_from([st.integers(1, capacity), st.integers(1, max(1, capacity // 4)), st.sampled_from(kinds)]))
    return draw(st.lists(length, max_size=most)), capacity


# ---- pack


@settings(max_examples=500, deadline=None)
@given(problems())
def test_pack_is_best_fit_decreasing(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    rows = pack(lengths, capacity).tolist()
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert rows == best_fit_decreasing(lengths, capacity)
    assert pack(np.array(lengths, np.int32), capacity).tolist() == rows
    # A row is only opened for a document that no earlier row holds. This bounds the rows: at most one is half empty.
    for earlier, later in itertools.combinations(rows, 2):
        assert capacity - sum(lengths[i] for i in earlier) < lengths[later[0]]
    assert sum(2 * sum(lengths[i] for i in row) <= capacity for row in rows) <= 1


@pytest.mark.parametrize(("mean", "capacity"), [(20, 512), (300, 2048), (9000, 200_000)])  # the last: more than 16 bits
def test_pack_is_best_fit_decreasing_of_a_thousand(mean: int, capacity: int) -> None:
    drawn = np.random.default_rng(mean).lognormal(math.log(mean), 1.2, 1000)
    lengths = np.clip(drawn.astype(np.int64), 1, capacity)
    assert pack(lengths, capacity).tolist() == best_fit_decreasing(lengths.tolist(), capacity)


def test_pack_leaves_no_room_when_there_are_short_documents() -> None:
    lengths = synthetic(SyntheticData(documents=10_000), 61, 4096, seed=3).lengths
    rows = pack(lengths, 4096)
    assert np.array_equal(np.sort(rows.order), np.arange(len(lengths)))
    assert rows.sums(lengths).max() <= 4096
    assert len(rows) == math.ceil(lengths.sum() / 4096)


def test_work_follows_the_lengths_and_not_the_documents() -> None:
    """A million documents, some thousands of placements."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(np.int64), 1, 4096)
    histogram = np.bincount(lengths)
    different = np.flatnonzero(histogram)[::-1]
    placements, runs = _place(different.tolist(), histogram[different].tolist(), 4096)
    assert len(placements) // 5 < 5 * len(different) and len(runs) < 3 * len(different)
    assert sum(rows * held for *_, rows, held in runs) == len(lengths)


def test_pack_by_hand() -> None:
    """The first 3 goes to the row of the second 6, which was opened last, the second 3 to the other; there it leaves room for the 1."""
    assert pack([3, 6, 3, 6, 3, 1], 10).tolist() == [[1, 2, 5], [3, 0], [4]]
    assert pack([], 10).tolist() == []
    assert pack([2] * 7, 6).tolist() == [[0, 1, 2], [3, 4, 5], [6]]


def test_pack_names_a_document_longer_than_a_row() -> None:
    with pytest.raises(MegamodError, match=r"^document 1 has 9 tokens, but a row holds 8: raise data\.row_length to 9$"):
        pack([3, 9, 8], 8)
    with pytest.raises(MegamodError, match=r"^document 1 has 0 tokens: at least 1 was expected$"):
        pack([3, 0], 8)
    with pytest.raises(MegamodError, match=r"^document 1 has -2 tokens"):
        pack([3, -2, 9], 8)


@QUICK
@given(problems(), st.data())
def test_rows_are_a_sequence(problem: tuple[list[int], int], data: st.DataObject) -> None:
    rows = pack(*problem)
    lists = rows.tolist()
    assert len(rows) == len(lists) and [row.tolist() for row in rows] == lists
    assert [row.tolist() for row in reversed(rows)] == lists[::-1]
    part = data.draw(st.slices(len(lists)))
    assert isinstance(rows[part], Rows) and rows[part].tolist() == lists[part]
    for r in range(-len(lists), len(lists)):
        assert rows[r].tolist() == lists[r]
    with pytest.raises(IndexError):
        rows[len(lists)]


@QUICK
@given(problems())
def test_attention_costs_count_what_is_left_of_a_row(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    rows = pack(lengths, capacity)
    expected = [sum(lengths[i] ** 2 for i in row) + (capacity - sum(lengths[i] for i in row)) ** 2 for row in rows.tolist()]
    assert attention_costs(rows, np.array(lengths, np.int64), capacity).tolist() == expected


# ---- deal


@QUICK
@given(size=st.integers(1, 5), hands=st.integers(1, 8), data=st.data())
def test_deal_is_greedy_and_gives_every_hand_as_many(size: int, hands: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 30), min_size=size * hands, max_size=size * hands))
    plain: list[list[int]] = [[] for _ in range(hands)]
    for thing in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        open_hands = [hand for hand in plain if len(hand) < size]
        min(open_hands, key=lambda hand: sum(costs[i] for i in hand)).append(thing)
    found = deal(np.array(costs), hands)
    assert found == sorted(map(sorted, plain))
    assert [len(hand) for hand in found] == [size] * hands


def test_deal_evens_out_what_turns_leave_uneven() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, 20_000).astype(np.int64), 1, 4096)
    costs = attention_costs(pack(lengths, 4096), lengths, 4096)
    steps = rng.permutation(costs)[: len(costs) // 64 * 64].reshape(-1, 64)
    in_turns = np.mean([step.reshape(-1, 8).sum(0).max() / step.sum() * 8 for step in steps])
    dealt = np.mean([max(step[hand].sum() for hand in deal(step, 8)) / step.sum() * 8 for step in steps])
    assert in_turns > 1.3 and dealt < 1.03


# ---- a stream


class Counted(Iterator[int]):
    """A stream that knows how far it was read."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.read = lengths, 0

    def __next__(self) -> int:
        if self.read == len(self.lengths):
            raise StopIteration
        self.read += 1
        return self.lengths[self.read - 1]


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 20))
def test_a_stream_has_every_document_once_and_is_held_in_part(problem: tuple[list[int], int], look_ahead: int) -> None:
    lengths, capacity = problem
    stream = Counted(lengths)
    packer = StreamPacker(stream, capacity, look_ahead)
    seen: list[int] = []
    for row in packer:
        assert stream.read - len(seen) <= look_ahead, "held while the row was made"
        seen += row.tolist()
        assert sum(lengths[i] for i in row) <= capacity
        assert sorted(seen + [i for i, _ in packer.state["held"]]) == list(range(stream.read))
    assert sorted(seen) == list(range(len(lengths)))
    assert packer.state == {"read": len(lengths), "due": 0, "held": []}
    assert next(packer, None) is None


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 20))
def test_a_stream_goes_on_where_it_was_killed(problem: tuple[list[int], int], look_ahead: int) -> None:
    """Killed after any row, and after every row: the state goes through JSON, the rest of the stream is read anew."""
    lengths, capacity = problem
    whole = [row.tolist() for row in StreamPacker(lengths, capacity, look_ahead)]

    def again(state: PackState) -> StreamPacker:
        state = json.loads(json.dumps(state))
        return StreamPacker(itertools.islice(lengths, state["read"], None), capacity, look_ahead, state)

    packer = StreamPacker(lengths, capacity, look_ahead)
    state = packer.state
    for number, expected in enumerate(whole):
        assert [row.tolist() for row in again(packer.state)] == whole[number:]
        assert next(packer).tolist() == expected
        from_state = again(state)
        assert next(from_state).tolist() == expected
        state = from_state.state
    assert [row.tolist() for row in again(packer.state)] == []


@QUICK
@given(problems(), st.integers(0, 3))
def test_a_stream_that_can_be_read_whole_has_the_rows_of_pack(problem: tuple[list[int], int], spare: int) -> None:
    lengths, capacity = problem
    whole = pack(lengths, capacity).tolist()
    assert [row.tolist() for row in StreamPacker(lengths, capacity, len(lengths) + 1 + spare)] == whole
    # Whether a buffer that is full to the brim is the end, only one more document could tell: fuller rows leave first.
    assert sorted(row.tolist() for row in StreamPacker(lengths, capacity, max(1, len(lengths)))) == sorted(whole)


def test_a_stream_s_rows_are_full() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 30_000).astype(np.int64), 1, 4096)
    rows = sum(1 for _ in StreamPacker(lengths.tolist(), 4096, 2000))
    assert lengths.sum() / (rows * 4096) > 0.999


def test_a_stream_s_errors() -> None:
    packer = StreamPacker([3, 4, 9, 2], 8, 2)
    with pytest.raises(MegamodError, match=r"^document 2 has 9 tokens, but a row holds 8"):
        list(packer)
    with pytest.raises(MegamodError, match=r"^look_ahead = 0: at least 1 document was expected$"):
        StreamPacker([], 8, 0)
    for state in (
        PackState(read=3, due=0, held=[(0, 1), (1, 1), (2, 1)]),
        PackState(read=3, due=0, held=[(1, 1), (0, 1)]),
        PackState(read=1, due=0, held=[(1, 1)]),
        PackState(read=3, due=3, held=[(1, 1), (2, 1)]),
        PackState(read=3, due=-1, held=[]),
        PackState(read=2, due=0, held=[(1, 9)]),
    ):
        with pytest.raises(
            MegamodError, match=r"^a state with . documents read, . of them held, and -?. rows due is none of a packer with"
        ):
            StreamPacker([], 8, 2, state)


# ---- tools/bench_packing.py


def test_the_bench(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--documents", "20000", "--capacity", "2048", "8192", "--repeats", "1", "--look-ahead", "2000")
    assert tool.main(options) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["documents"] == 20_000 and [result["capacity"] for result in told["results"]] == [2048, 8192]
    for result in told["results"]:
        for name, packer in result["packers"].items():
            assert packer["seconds"] > 0 and 0.99 < packer["utilisation"] <= 1
            assert name.startswith("stream") or packer["rows"] == result["packers"]["pack"]["rows"], "both are best fit decreasing"
        for share in result["shares"]:
            assert 1 <= share["least"] <= share["dealt"] <= share["in_turns"]
        assert len(result["packers"]) == 2 + (told["trl"] == "measured")


def test_the_bench_without_trl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    assert tool.main(["--documents", "20000", "--repeats", "1"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["trl"].startswith("without TRL's packer: ")
    assert list(told["results"][0]["packers"]) == ["pack", "stream 10,000"]


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--documents", "0"], "--documents 0: at least 1 was expected"),
        (["--capacity", "4096", "-1"], "--capacity [4096, -1]: at least 1 was expected"),
        (["--mean", "nan"], "--mean nan --sigma 1.0 --seed 1: at least 1, 0 and 0, finite, were expected"),
        (["--dp", "3"], "--rows-per-step 128: a multiple of 6 was expected, for 3 ranks"),
        (["--documents", "20"], "3 rows of 4096 tokens are no step of 128: use more --documents"),
    ],
)
def test_the_bench_says_in_one_line_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], wrong: str
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)  # it takes seconds to import
    assert tool.main(options) == 1
    assert capsys.readouterr() == ("", f"megamod: error: {wrong}\n")
