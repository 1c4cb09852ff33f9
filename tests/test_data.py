"""Documents, micro-batches and the loader, each against the plainest code that says the same."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamod.batch import Batch
from megamod.config import ChatConfig, DataConfig, Source, SyntheticData
from megamod.data.documents import Document, InMemory, synthetic
from megamod.data.loader import Loader, deal
from megamod.data.packing import micro_batch, pack
from megamod.data.store import Store, open_documents, prepare, prepare_all
from megamod.errors import MegamodError

VOCAB = 61
QUICK = settings(max_examples=60, deadline=None)


def document(tokens: Sequence[int], trained: Sequence[bool], verdict: Sequence[bool], weight: float = 1.0) -> Document:
    labels = [token if is_trained else -100 for token, is_trained in zip(tokens, trained, strict=True)]
    return Document(np.array(tokens, np.int32), np.array(labels, np.int64), np.array(verdict, np.bool_), weight)


@st.composite
def documents(draw: st.DrawFn, longest: int = 9) -> Document:
    length = draw(st.integers(1, longest))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length))
    return document(tokens, draw(flags), draw(flags), draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])))


def synthetic_lengths(cfg: SyntheticData, longest: int) -> list[int]:
    lengths: list[int] = synthetic(cfg, VOCAB, longest, seed=3).lengths.tolist()
    return lengths


# ---- micro_batch


def decoded(batch: Batch) -> list[tuple[list[int], dict[int, tuple[int, bool, float]]]]:
    """Each document of the batch: its tokens, and position in it → label, verdict, weight."""
    pieces = [piece.tolist() for piece in torch.split(batch.tokens, list(batch.lengths))]
    starts = [sum(batch.lengths[:s]) for s in range(batch.sequences)]
    targets: list[dict[int, tuple[int, bool, float]]] = [{} for _ in pieces]
    columns = (batch.rows, batch.labels, batch.verdict, batch.weight, batch.sequence)
    for row, label, verdict, weight, s in zip(*(column.tolist() for column in columns), strict=True):
        assert 0 <= row - starts[s] < batch.lengths[s]
        assert row - starts[s] not in targets[s]
        targets[s][row - starts[s]] = (label, verdict, weight)
    return list(zip(pieces, targets, strict=True))


def shifted(d: Document) -> tuple[list[int], dict[int, tuple[int, bool, float]]]:
    """What `decoded` should give of a document."""
    targets = {}
    for i in range(len(d.tokens) - 1):
        if d.labels[i + 1] != -100:
            targets[i] = (int(d.labels[i + 1]), bool(d.verdict[i + 1]), d.weight)
    return d.tokens.tolist(), targets


@QUICK
@given(st.lists(st.lists(documents(), max_size=4), min_size=1, max_size=3), st.integers(0, 3), st.integers(0, VOCAB - 1))
def test_micro_batch_holds_every_document_and_its_shifted_labels(rows: list[list[Document]], spare: int, pad_id: int) -> None:
    capacity = max(1, max(sum(len(d.tokens) for d in row) for row in rows) + spare)
    batch = micro_batch(rows, capacity, pad_id)

    expected = []
    for row in rows:
        expected += [shifted(d) for d in row]
        if rest := capacity - sum(len(d.tokens) for d in row):
            expected.append(([pad_id] * rest, {}))
    assert decoded(batch) == expected

    assert len(batch.tokens) == sum(batch.lengths) == capacity * len(rows)
    assert batch.positions.tolist() == [i for length in batch.lengths for i in range(length)]
    assert batch.rows.tolist() == sorted(batch.rows.tolist())
    for name in ("tokens", "positions", "rows", "labels", "sequence"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.verdict.dtype == torch.bool and batch.weight.dtype == torch.float32


def test_micro_batch_by_hand() -> None:
    """Two documents meet in the first row, whose rest is padding; the second row is full."""
    a = document([5, 6, 7], [True, False, True], [False, False, True], 2.0)
    b = document([8, 9], [True, True], [True, False])
    c = document([1, 2, 3, 4, 5, 6], [False, False, True, False, False, True], [False, False, True, False, False, False])
    batch = micro_batch([[a, b], [c]], 6)
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6]
    assert batch.lengths == (3, 2, 1, 6)
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4, 5]
    assert batch.rows.tolist() == [1, 3, 7, 10]
    assert batch.labels.tolist() == [7, 9, 3, 6]
    assert batch.verdict.tolist() == [True, False, True, False]
    assert batch.weight.tolist() == [2.0, 1.0, 1.0, 1.0]
    assert batch.sequence.tolist() == [0, 1, 3, 3]
    assert {unit: count.item() for unit, count in batch.counts().items()} == {
        "tokens": 4.0, "weights": 5.0, "samples": 2.0 + 1.0 + 1.0, "pairs": 0.0, "rated": 0.0, "chosen": 0.0,
    }  # fmt: skip


def test_micro_batch_refuses_a_row_that_is_too_full() -> None:
    full = document([1, 2, 3], [True] * 3, [False] * 3)
    with pytest.raises(MegamodError, match=r"^row 1 has 6 tokens, but holds 5"):
        micro_batch([[full], [full, full]], 5)


# ---- Loader


def numbered(count: int) -> list[Document]:
    """Documents that can be told apart by their tokens: document i is made of i + 1."""
    return [document([i + 1] * (2 + i * 7 % 5), [True] * (2 + i * 7 % 5), [False] * (2 + i * 7 % 5)) for i in range(count)]


def loader(items: Sequence[Document], *, step: int = 4, micro: int = 1, rank: int = 0, size: int = 1, seed: int = 1) -> Loader:
    documents = InMemory(items)
    return Loader(documents, row_length=8, rows_per_step=step, rows_per_micro_batch=micro, seed=seed, dp_rank=rank, dp_size=size)


def rows_of(batches: Sequence[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.tokens.view(-1, 8).tolist()]


def test_the_stream_is_one_permutation_of_the_packed_rows_an_epoch() -> None:
    items = numbered(17)
    packed = pack([len(d.tokens) for d in items], 8)
    texts = [tuple(micro_batch([[items[i] for i in row]], 8).tokens.tolist()) for row in packed]
    one = loader(items, step=4, seed=5)
    assert one.rows == len(packed) and len(packed) % 4 != 0, "the test wants steps that straddle epochs"
    assert one.utilisation == sum(len(d.tokens) for d in items) / (len(packed) * 8)

    stream = [row for number in range(one.rows) for row in rows_of(one.step(number))]  # four epochs
    epochs = [stream[first : first + one.rows] for first in range(0, len(stream), one.rows)]
    for epoch, rows in enumerate(epochs):
        assert sorted(rows) == sorted(texts), "each row once an epoch"
        assert rows == [texts[i] for i in np.random.default_rng([5, epoch]).permutation(len(texts))]
    assert len({tuple(rows) for rows in epochs}) == 4, "each epoch has an order of its own"
    assert rows_of(loader(items, step=4, seed=6).step(0)) != rows_of(one.step(0))


def told(batches: Sequence[Batch]) -> list[tuple[int, ...]]:
    return [tuple(batch.tokens.tolist()) for batch in batches]


@QUICK
@given(count=st.integers(1, 30), micro=st.integers(1, 3), factor=st.integers(1, 3), number=st.integers(0, 40), seed=st.integers(0, 9))
def test_the_grid_and_the_micro_batch_change_only_who_reads_what(count: int, micro: int, factor: int, number: int, seed: int) -> None:
    items, step = numbered(count), 4 * micro * factor
    one_by_one = loader(items, step=step, seed=seed).step(number)
    assert len(one_by_one) == step
    grouped = loader(items, step=step, micro=micro, seed=seed).step(number)
    assert sorted(rows_of(grouped)) == sorted(rows_of(one_by_one)), "the same rows, in micro-batches of even cost"
    assert all(len(batch.tokens) == micro * 8 for batch in grouped)
    for size in (2, 4):
        ranks = [loader(items, step=step, micro=micro, rank=rank, size=size, seed=seed).step(number) for rank in range(size)]
        assert [len(share) for share in ranks] == [len(grouped) // size] * size
        assert sorted(batch for share in ranks for batch in told(share)) == sorted(told(grouped)), "the same micro-batches"
        for share in ranks:
            left = iter(told(grouped))
            assert all(batch in left for batch in told(share)), "in the stream's order"


@QUICK
@given(count=st.integers(1, 30), micro=st.integers(1, 3), factor=st.integers(1, 3), number=st.integers(0, 40), size=st.sampled_from([2, 4]))
def test_shares_are_dealt_by_cost(count: int, micro: int, factor: int, number: int, size: int) -> None:
    """Rows to micro-batches, and these to ranks: by Σ length² of what the batch says its documents are, padding among them."""
    items, step = numbered(count), 4 * micro * factor
    by_row = [row[0] for row in costs_of(loader(items, step=step).step(number))]
    grouped = costs_of(loader(items, step=step, micro=micro).step(number))
    assert grouped == [[by_row[i] for i in group] for group in deal(np.array(by_row), len(grouped))]
    sums = [sum(costs) for costs in grouped]
    for rank, hand in enumerate(deal(np.array(sums), size)):
        share = costs_of(loader(items, step=step, micro=micro, rank=rank, size=size).step(number))
        assert share == [grouped[j] for j in hand]


def costs_of(batches: Sequence[Batch]) -> list[list[int]]:
    """For each batch, Σ length² of each of its rows, of 8 tokens."""
    found = []
    for batch in batches:
        costs = [0] * (len(batch.tokens) // 8)
        for start, length in zip(np.cumsum([0, *batch.lengths]).tolist(), batch.lengths, strict=False):
            costs[start // 8] += length**2
        found.append(costs)
    return found


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    items = numbered(17)
    in_sequence = loader(items, step=6, micro=2)
    for number in range(8):
        assert rows_of(in_sequence.step(number)) == rows_of(loader(items, step=6, micro=2).step(number))
    assert rows_of(in_sequence.step(0)) == rows_of(loader(items, step=6, micro=2).step(0))


def test_fingerprint_sees_every_column_and_nothing_else() -> None:
    items = [document([1, 2, 3], [True] * 3, [False] * 3), document([4, 5], [True] * 2, [False] * 2)]
    same = InMemory(items).fingerprint()
    assert len(same) == 64
    wide = [dataclasses.replace(d, tokens=d.tokens.astype(np.int64)) for d in items]
    assert InMemory(wide).fingerprint() == same
    first = items[0]
    others = [
        [dataclasses.replace(first, tokens=np.array([1, 2, 9], np.int32)), items[1]],
        [dataclasses.replace(first, labels=np.array([1, 2, -100])), items[1]],
        [dataclasses.replace(first, verdict=np.array([False, False, True])), items[1]],
        [dataclasses.replace(first, weight=2.0), items[1]],
        items[::-1],
        items[:1],
        [document([1, 2], [True] * 2, [False] * 2), document([3, 4, 5], [True] * 3, [False] * 3)],
    ]
    prints = [InMemory(other).fingerprint() for other in others]
    assert len({same, *prints}) == len(others) + 1


def test_loader_refuses_what_cannot_be_shared() -> None:
    with pytest.raises(MegamodError, match=r"^data\.rows_per_step = 6 cannot be shared by 2 .* of 2 rows: use a multiple of 4$"):
        loader(numbered(5), step=6, micro=2, size=2)
    with pytest.raises(MegamodError, match=r"no documents"):
        loader([])


# ---- tokenised JSONL, through a store


def read(path: Path) -> list[Document]:
    """What a store of the file gives back."""
    made = prepare(path, path.parent / "stores", ChatConfig(), "no model is needed", vocab=VOCAB)
    return list(Store(made.path))  # type: ignore[call-overload]


def as_line(d: Document) -> str:
    record = {"input_ids": d.tokens.tolist(), "labels": d.labels.tolist(), "verdict": d.verdict.tolist(), "weight": d.weight}
    return json.dumps(record)


def assert_same(a: Document, b: Document) -> None:
    for name in ("tokens", "labels", "verdict"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and x.tolist() == y.tolist(), name
    assert a.weight == b.weight and type(a.weight) is float


@QUICK
@given(items=st.lists(documents(), min_size=1, max_size=5), blank=st.sampled_from(["", " \t", "\r"]))
def test_tokenised_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, items: list[Document], blank: str) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "data.jsonl"
    path.write_text(f"\n{blank}\n".join(map(as_line, items)) + "\n", encoding="utf-8", newline="")
    for found, written in zip(read(path), items, strict=True):
        assert_same(found, written)


def test_tokenised_defaults(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_ids": [3, 0, 60]}\r\n{"input_ids": [1, 2], "verdict": [0, 1], "weight": 2}')
    plain, flagged = read(path)
    assert_same(plain, document([3, 0, 60], [True] * 3, [False] * 3))
    assert_same(flagged, document([1, 2], [True] * 2, [False, True], 2.0))


GOOD = '{"input_ids": [1, 2]}'

# a bad line → what its error says after `file:line: `
BAD: dict[str, tuple[str | bytes, str]] = {
    "broken": ('{"input_ids": [1, 2}', r"not JSON, Expecting ',' delimiter at column 20"),
    "two objects": (GOOD + GOOD, r"not JSON, Extra data"),
    "huge number": ('{"input_ids": [' + "1" * 5000 + "]}", r"not JSON that can be read, "),
    "deep": ("[" * 200_000, r"not JSON that can be read, "),
    "latin-1": ('{"input_ids": [1], "é": 1}'.encode("latin-1"), r"byte 21 of the line is not UTF-8"),
    "list": ("[1, 2]", r"\[1, 2\]: a JSON object was expected"),
    "null": ("null", r"None: a JSON object"),
    "misspelt": ('{"input_ids": [1], "lables": [1]}', r"unknown key 'lables', did you mean 'labels'\?"),
    "unknown": ('{"input_ids": [1], "text": "x"}', r"unknown key 'text', choose from: input_ids, labels, verdict, weight"),
    "no ids": ('{"labels": [1]}', r"no input_ids"),
    "empty ids": ('{"input_ids": []}', r"input_ids is empty"),
    "ids text": ('{"input_ids": "12"}', r"input_ids = '12': a list of integers was expected"),
    "id text": ('{"input_ids": [1, "2"]}', r"input_ids\[1\] = '2': a list of integers"),
    "id float": ('{"input_ids": [1, 2.0]}', r"input_ids\[1\] = 2\.0: a list of integers"),
    "id bool": ('{"input_ids": [1, true]}', r"input_ids\[1\] = True: a list of integers"),
    "id null": ('{"input_ids": [null]}', r"input_ids\[0\] = None: a list of integers"),
    "id beyond": ('{"input_ids": [1, 61]}', r"input_ids\[1\] = 61 is outside the vocabulary: ids from 0 to 60"),
    "id negative": ('{"input_ids": [1, 2, -1]}', r"input_ids\[2\] = -1 is outside the vocabulary"),
    "id 65 bits": ('{"input_ids": [18446744073709551616]}', r"input_ids\[0\] = 18446744073709551616 is outside"),
    "labels null": ('{"input_ids": [1], "labels": null}', r"labels = None: a list of integers"),
    "labels bool": ('{"input_ids": [1], "labels": [true]}', r"labels\[0\] = True: a list of integers"),
    "labels short": ('{"input_ids": [1, 2], "labels": [1]}', r"labels has 1 entries, but input_ids has 2"),
    "labels shifted": ('{"input_ids": [1, 2], "labels": [2, -100]}', r"labels\[0\] = 2, but input_ids\[0\] = 1: a label is its own"),
    "labels -1": ('{"input_ids": [1, 2], "labels": [-1, 2]}', r"labels\[0\] = -1, but input_ids\[0\] = 1"),
    "verdict long": ('{"input_ids": [1], "verdict": [0, 1]}', r"verdict has 2 entries, but input_ids has 1"),
    "verdict 2": ('{"input_ids": [1, 2], "verdict": [0, 2]}', r"verdict\[1\] = 2: 0, 1, false or true was expected"),
    "verdict float": ('{"input_ids": [1], "verdict": [1.0]}', r"verdict\[0\] = 1\.0: a list of 0 and 1, or booleans, was expected"),
    "verdict number": ('{"input_ids": [1], "verdict": 1}', r"verdict = 1: a list of 0 and 1"),
    "weight NaN": ('{"input_ids": [1], "weight": NaN}', r"weight = nan: a finite number of at least 0 was expected"),
    "weight infinite": ('{"input_ids": [1], "weight": 1e999}', r"weight = inf: a finite"),
    "weight beyond float32": ('{"input_ids": [1], "weight": 1e39}', r"weight = 1e\+39: a finite"),
    "weight long": ('{"input_ids": [1], "weight": 1' + "0" * 400 + "}", r"weight = 10+\.\.\.0+: a finite"),
    "weight negative": ('{"input_ids": [1], "weight": -0.5}', r"weight = -0\.5: a finite"),
    "weight bool": ('{"input_ids": [1], "weight": true}', r"weight = True: a finite"),
    "weight text": ('{"input_ids": [1], "weight": "1"}', r"weight = '1': a finite"),
    "weight null": ('{"input_ids": [1], "weight": null}', r"weight = None: a finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_tokenised_says_what_is_wrong_and_where(tmp_path: Path, name: str) -> None:
    line, said = BAD[name]
    path = tmp_path / "data.jsonl"
    bad = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(GOOD.encode() + b"\n\n" + bad + b"\n" + GOOD.encode() + b"\n")
    with pytest.raises(MegamodError, match="^" + said) as caught:
        try:
            read(path)
        except MegamodError as error:
            where, text = f"{path}:3: ", str(error)
            assert text.startswith(where) and "\n" not in text and len(text) < len(where) + 200
            raise MegamodError(text.removeprefix(where)) from None
    assert caught.value


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_tokenised_refuses_a_file_without_documents(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(MegamodError, match=r"data\.jsonl:1: no rows"):
        read(tmp_path / "data.jsonl")


def test_tokenised_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(MegamodError, match=r"nowhere\.jsonl: No such file or directory: a JSONL file"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(MegamodError, match=r": Is a directory: a JSONL file"):
        read(tmp_path)


# ---- synthetic, load_documents


def test_synthetic_is_decided_by_its_arguments() -> None:
    cfg = SyntheticData(documents=20, mean_length=30)
    first, again, other = (synthetic(cfg, VOCAB, 100, seed) for seed in (1, 1, 2))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_synthetic_lengths_have_the_mean_and_the_spread() -> None:
    lengths = np.array(synthetic_lengths(SyntheticData(documents=4000, mean_length=200, sigma=0.8), longest=100_000))
    assert lengths.mean() == pytest.approx(200, rel=0.06)  # four standard errors
    assert np.log(lengths).std() == pytest.approx(0.8, rel=0.05)
    assert set(synthetic_lengths(SyntheticData(documents=5, mean_length=7, sigma=0.0), longest=100)) == {7}


@QUICK
@given(mean=st.integers(1, 40), sigma=st.floats(0, 3), labelled=st.floats(0, 1), longest=st.integers(2, 60), seed=st.integers(0, 99))
def test_synthetic_trains_the_end_of_each_document(mean: int, sigma: float, labelled: float, longest: int, seed: int) -> None:
    made = synthetic(SyntheticData(8, mean, sigma, labelled), VOCAB, longest, seed)
    assert len(made.lengths) == 8
    for d in made:  # type: ignore[attr-defined]
        length = len(d.tokens)
        assert 2 <= length <= longest
        assert d.tokens.dtype == np.int32 and d.tokens.min() >= 0 and d.tokens.max() < VOCAB
        trained = np.flatnonzero(d.labels != -100)
        assert len(trained) == max(1, round(labelled * length))
        assert trained.tolist() == list(range(length - len(trained), length))
        assert (d.labels[trained] == d.tokens[trained]).all()
        assert np.flatnonzero(d.verdict).tolist() == trained[: max(1, len(trained) // 4)].tolist()


def test_synthetic_tokens_are_spread_over_the_vocabulary() -> None:
    tokens = np.concatenate([d.tokens for d in synthetic(SyntheticData(documents=50), VOCAB, 1000, 0)])
    assert set(tokens.tolist()) == set(range(VOCAB))


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("data.train.documents = 0", {"documents": 0}),
        ("data.train.mean_length = 0", {"mean_length": 0}),
        ("data.train.sigma = nan", {"sigma": math.nan}),
        ("data.train.labelled = 1.5", {"labelled": 1.5}),
    ],
)
def test_synthetic_refuses_values_that_mean_nothing(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(MegamodError, match=f"^{key}: must be "):
        synthetic(SyntheticData(**changes), VOCAB, 100, 1)


def test_synthetic_refuses_rows_without_room_for_a_target() -> None:
    with pytest.raises(MegamodError, match=r"^data\.row_length = 1: must be at least 2"):
        synthetic(SyntheticData(), VOCAB, 1, 1)


def opened(cfg: DataConfig, into: Path, seed: int = 1) -> list[Document]:
    stores = prepare_all(cfg, "no model is needed", VOCAB, into)
    documents = open_documents(cfg, [store.path for store in stores], VOCAB, seed)
    return [documents[i] for i in range(len(documents.lengths))]


def test_open_documents_picks_the_source(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(GOOD)
    (one,) = opened(DataConfig(train=str(tmp_path / "data.jsonl")), tmp_path / "stores")
    assert_same(one, document([1, 2], [True] * 2, [False] * 2))
    (store,) = (tmp_path / "stores").iterdir()
    (again,) = opened(DataConfig(train=str(store)), tmp_path / "others")
    assert_same(again, one)
    assert not (tmp_path / "others").exists(), "a store is read where it is"
    cfg = SyntheticData(documents=3, mean_length=90)
    made = synthetic(cfg, VOCAB, 64, 4)
    for i, d in enumerate(opened(DataConfig(train=cfg, row_length=64), tmp_path, seed=4)):
        assert_same(d, made[i])


@QUICK
@given(weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.75, 3.0]), min_size=1, max_size=3), seed=st.integers(0, 5))
def test_a_mixture_takes_each_document_as_often_as_its_weight_says(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("mixed")
    sources, documents = [], 8
    for i, weight in enumerate(weights):
        path = folder / f"{i}.jsonl"
        path.write_text("".join(json.dumps({"input_ids": [i, n, n]}) + "\n" for n in range(documents)))
        sources.append(Source(str(path), weight))
    mixed = opened(DataConfig(train=tuple(sources)), folder / "stores", seed)
    for i, weight in enumerate(weights):
        seen = [int(d.tokens[1]) for d in mixed if d.tokens[0] == i]
        counts = [seen.count(n) for n in range(documents)]
        assert sum(counts) == round(weight * documents)
        assert set(counts) <= {int(weight), math.ceil(weight)}
    again = opened(DataConfig(train=tuple(sources)), folder / "stores", seed)
    assert [d.tokens.tolist() for d in again] == [d.tokens.tolist() for d in mixed]
