"""The token store holds the documents, whole, whatever was killed when; what is damaged or another one's is said in a line."""

import dataclasses
import itertools
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st

from megamod.batch import Batch
from megamod.config import ChatConfig, DataConfig
from megamod.data import store as module
from megamod.data.chat import encoder
from megamod.data.documents import Document, InMemory
from megamod.data.jsonl import read_rows
from megamod.data.loader import Loader
from megamod.data.store import COLUMNS, MANIFEST, Store, open_documents, prepare, prepare_all
from megamod.errors import MegamodError
from tools import make_checkpoint

ROOT = Path(__file__).parents[1]
VOCAB = 61
QUICK = settings(max_examples=25, deadline=None)
CHAT = ChatConfig()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer, byte-level BPE."""
    folder = tmp_path_factory.mktemp("model")
    conversations(folder / "rows.jsonl", 8)
    make_checkpoint.learn(folder / "rows.jsonl", 360).save_pretrained(str(folder / "small"))
    return folder / "small"


def conversations(path: Path, count: int, **extra: Any) -> Path:
    """Rows of which no two are alike: prompts, responses, and talk without a label."""
    labels = ("safe", "unsafe", "controversial")
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            texts = [f"Message {i} 你好 " + "go " * (i * 7 % 11), f"No, {i}."][: 1 + (i % 3 == 1)]
            record = {"messages": [{"role": ("user", "assistant")[t % 2], "content": text} for t, text in enumerate(texts)], **extra}
            if i % 5 != 1:
                record |= {"label": labels[i % 3], "categories": ["PII"] if i % 3 else [], "weight": 1 + i % 4 / 4}
            elif len(texts) == 1:
                record["messages"].append({"role": "assistant", "content": f"Yes {i}"})
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def tokenised(path: Path, items: Sequence[Document]) -> Path:
    with path.open("w") as file:
        for d in items:
            record = {"input_ids": d.tokens.tolist(), "labels": d.labels.tolist(), "verdict": d.verdict.tolist(), "weight": d.weight}
            file.write(json.dumps(record) + "\n")
    return path


@st.composite
def drawn(draw: st.DrawFn) -> Document:
    length = draw(st.integers(1, 6))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    tokens = np.array(draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length)), np.int32)
    labels = np.where(draw(flags), tokens.astype(np.int64), -100)
    return Document(tokens, labels, np.array(draw(flags), np.bool_), draw(st.floats(0, 3e38)))


def contents(directory: str | Path) -> dict[str, bytes]:
    """Every file of a store; of the manifest, all but where it was made from."""
    found = {file.name: file.read_bytes() for file in Path(directory).iterdir()}
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["source"]
    return {**found, MANIFEST: json.dumps(manifest).encode()}


def assert_same(found: Document, written: Document) -> None:
    for name in ("tokens", "labels", "verdict"):
        a, b = getattr(found, name), getattr(written, name)
        assert a.dtype == b.dtype and a.tolist() == b.tolist(), name
    assert found.weight == written.weight


@pytest.fixture
def parts_of_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_LINES", 3)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are encoded, as they are."""
    names: list[str] = []
    write = module._write_part

    def told(part: Path, *rest: Any) -> None:
        names.append(part.name)
        write(part, *rest)

    monkeypatch.setattr(module, "_write_part", told)
    return names


# ---- what goes in comes out


@QUICK
@given(items=st.lists(drawn(), min_size=1, max_size=12), lines=st.integers(1, 4))
def test_a_store_is_its_documents(tmp_path_factory: pytest.TempPathFactory, items: list[Document], lines: int) -> None:
    folder = tmp_path_factory.mktemp("store")
    path = tokenised(folder / "rows.jsonl", items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_LINES", lines)
        made = prepare(path, folder / "stores", CHAT, "none", vocab=VOCAB)
    store, memory = Store(made.path), InMemory(items)
    assert len(store.lengths) == len(items)
    for i, item in enumerate(items):
        assert_same(store[i], item)
    assert store.lengths.tolist() == memory.lengths.tolist()
    assert (store.trained, store.verdicts) == (memory.trained, memory.verdicts)
    assert store.largest == max(int(item.tokens.max()) for item in items)
    assert [file.name for file in (folder / "stores").iterdir()] == [Path(made.path).name], "nothing is left beside it"
    whole = prepare(path, folder / "whole", CHAT, "none", vocab=VOCAB)
    assert contents(whole.path) == contents(made.path), "however it was cut into parts"


@pytest.mark.usefixtures("parts_of_3")
def test_conversations_are_what_the_encoder_makes_of_them(model: Path, tmp_path: Path) -> None:
    path = conversations(tmp_path / "rows.jsonl", 20, source="web")
    limit, counts = 50, Counter[str]()
    encode = encoder(CHAT, str(model), limit)
    expected = [document for row in read_rows(path) for document in encode.documents(row, counts)]
    made = prepare(path, tmp_path / "stores", CHAT, str(model), limit=limit)
    store = Store(made.path)
    assert len(store.lengths) == len(expected) > 0 and counts["skipped"] > 0, "the test wants both"
    for i, document in enumerate(expected):
        assert_same(store[i], document)
    for key in ("rows", "documents", "skipped", "cut"):
        assert made.counts[key] == counts[key], key
    assert made.unread == {"source": 20}
    told = str(made)
    assert f"20 rows, {len(expected)} documents" in told and f"{counts['skipped']} too long: skipped" in told
    assert told.endswith("keys that nothing reads: source (20)")


def test_columns_are_mapped_not_read(model: Path, tmp_path: Path) -> None:
    store = Store(prepare(conversations(tmp_path / "rows.jsonl", 4), tmp_path, CHAT, str(model)).path)
    assert set(store._columns) == {column.name for column in COLUMNS}
    for column in (store._offsets, *store._columns.values()):
        assert (isinstance(column, np.memmap) and column.mode == "r") or column.strides == (0,), "mapped, or one value for all"
    document = store[0]
    assert not isinstance(document.tokens, np.memmap) and document.tokens.flags.writeable, "a document is a copy"


@pytest.mark.usefixtures("parts_of_3")
def test_processes_do_not_change_a_byte(model: Path, tmp_path: Path) -> None:
    path = conversations(tmp_path / "rows.jsonl", 17, source="web")
    one = prepare(path, tmp_path / "one", CHAT, str(model))
    three = prepare(path, tmp_path / "three", CHAT, str(model), processes=3)
    assert contents(one.path) == contents(three.path)
    assert (one.counts, one.unread) == (three.counts, three.unread)


def test_a_fault_comes_back_from_another_process(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [1, 2]}\n{"input_ids": []}\n')
    work = module._Work([module._Task(str(tmp_path / "rows.jsonl"), 0, 1, 5, tmp_path / "0.npz")], CHAT, "none", None, VOCAB, True)
    answers: queue.Queue[Any] = queue.Queue()
    module._serve(work, 0, 1, answers)
    fault = pickle.loads(pickle.dumps(answers.get_nowait()))
    assert isinstance(fault, MegamodError) and answers.empty()
    assert str(fault) == f"{tmp_path}/rows.jsonl:2: input_ids is empty: a document has at least one token"


# ---- killed, and made again


@pytest.mark.usefixtures("parts_of_3")
def test_parts_that_are_done_are_not_done_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[str]) -> None:
    path = conversations(tmp_path / "rows.jsonl", 17)
    clean = prepare(path, tmp_path / "clean", CHAT, str(model))
    parts = [f"{i:06d}.npz" for i in range(6)]
    assert written == parts
    with monkeypatch.context() as patch:
        patch.setattr(module, "_assemble", lambda *_: 1 / 0)  # all parts, no store
        with pytest.raises(ZeroDivisionError):
            prepare(path, tmp_path / "again", CHAT, str(model))
    (left,) = (tmp_path / "again").iterdir()
    assert sorted(file.name for file in left.iterdir()) == parts and left.name.startswith(".")
    for name in (parts[1], parts[4]):
        (left / name).unlink()
    (left / "000001.1.tmp").write_bytes(b"half a part")
    written.clear()
    again = prepare(path, tmp_path / "again", CHAT, str(model))
    assert written == [parts[1], parts[4]]
    assert contents(again.path) == contents(clean.path)
    assert [file.name for file in (tmp_path / "again").iterdir()] == [Path(again.path).name]


KILLED = """
import sys
from megamod.config import ChatConfig
from megamod.data import store
store.PART_LINES = 20
write = store._write_part
def told(part, *rest):
    write(part, *rest)
    print(part.name, flush=True)
store._write_part = told
store.prepare(sys.argv[1], sys.argv[2], ChatConfig(), sys.argv[3])
"""


def test_a_killed_preparation_goes_on_where_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[str]
) -> None:
    monkeypatch.setattr(module, "PART_LINES", 20)
    path = conversations(tmp_path / "rows.jsonl", 3000)
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "stores"), str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        done = [child.stdout.readline().strip() for _ in range(3)]
        child.send_signal(signal.SIGKILL)
        done += child.stdout.read().split()
    assert child.returncode == -signal.SIGKILL and len(done) < 150, "it was killed before its end"
    (left,) = (tmp_path / "stores").iterdir()
    assert left.name.startswith("."), "no store yet"
    made = prepare(path, tmp_path / "stores", CHAT, str(model))
    assert not set(written) & set(done) and len(written) >= 150 - len(done) - 1
    assert contents(made.path) == contents(prepare(path, tmp_path / "clean", CHAT, str(model)).path)
    assert [file.name for file in (tmp_path / "stores").iterdir()] == [Path(made.path).name]


# ---- which store


def test_what_decides_the_content_decides_the_store(model: Path, tmp_path: Path, written: list[str]) -> None:
    path = conversations(tmp_path / "rows.jsonl", 6)
    into = tmp_path / "stores"
    first = prepare(path, into, CHAT, str(model))
    (tmp_path / "model").symlink_to(model)
    copy = tmp_path / "elsewhere" / "rows.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    written.clear()
    assert prepare(path, into, CHAT, str(model)) == first
    assert prepare(copy, into, CHAT, str(tmp_path / "model"), processes=2) == first, "the same bytes, wherever they are"
    assert written == [], "nothing is encoded again"
    (tmp_path / "own.jinja").write_text("{# another #}" + make_checkpoint.TEMPLATE)
    other = conversations(tmp_path / "rows2.jsonl", 7).rename(copy)
    make_checkpoint.learn(path, 340).save_pretrained(str(tmp_path / "tokenizer"))
    options = [ChatConfig(**change) for change in ({"too_long": "cut"}, {"reasons": False}, {"template": str(tmp_path / "own.jinja")})]
    made = [
        prepare(other, into, CHAT, str(model)), prepare(path, into, CHAT, str(tmp_path / "tokenizer")),
        prepare(path, into, CHAT, str(model), limit=500), *(prepare(path, into, option, str(model)) for option in options),
    ]  # fmt: skip
    assert len({first.path, *(one.path for one in made)}) == 1 + len(made)


def test_a_name_belongs_to_one_content(model: Path, tmp_path: Path) -> None:
    path = conversations(tmp_path / "rows.jsonl", 5)
    made = prepare(path, tmp_path, CHAT, str(model), name="mine")
    assert made.path == str(tmp_path / "mine") == prepare(path, tmp_path, CHAT, str(model), name="mine").path
    before = contents(made.path)
    said = complaint(lambda: prepare(path, tmp_path, CHAT, str(model), name="mine", limit=400))
    assert said == f"{made.path}: a store of another file, tokenizer, template or option: remove it, or use another name"
    assert contents(made.path) == before
    (tmp_path / "folder").mkdir()
    assert (
        complaint(lambda: prepare(path, tmp_path, CHAT, str(model), name="folder"))
        == f"{tmp_path}/folder: exists and is no store: use another name"
    )
    assert complaint(lambda: prepare(path, path, CHAT, str(model))).startswith(f"{path}: ")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "mine", "rows.jsonl"]


def test_the_fingerprint_sees_every_column(tmp_path: Path) -> None:
    first = Document(np.array([1, 2, 3], np.int32), np.array([1, 2, 3]), np.array([False, False, True]))
    second = Document(np.array([4, 5], np.int32), np.array([4, 5]), np.array([False, False]))
    variants = [
        [first, second],
        [dataclasses.replace(first, tokens=np.array([1, 2, 9], np.int32), labels=np.array([1, 2, 9])), second],
        [dataclasses.replace(first, labels=np.array([1, -100, 3])), second],
        [dataclasses.replace(first, verdict=np.array([False, True, True])), second],
        [dataclasses.replace(first, weight=2.0), second],
        [second, first],
        [first],
        [
            Document(np.array([1, 2], np.int32), np.array([1, 2]), np.array([False, False])),
            Document(np.array([3, 4, 5], np.int32), np.array([3, 4, 5]), np.array([True, False, False])),
        ],
    ]
    prints = [
        Store(prepare(tokenised(tmp_path / f"{i}.jsonl", items), tmp_path, CHAT, "none").path).fingerprint()
        for i, items in enumerate(variants)
    ]
    assert len(set(prints)) == len(variants) and all(len(one) == 64 for one in prints)
    spaced = (tmp_path / "0.jsonl").read_text().replace("\n", "\n\n")
    (tmp_path / "spaced.jsonl").write_text(spaced)
    assert Store(prepare(tmp_path / "spaced.jsonl", tmp_path, CHAT, "none").path).fingerprint() == prints[0], "of the content alone"


# ---- damaged


def edited(directory: Path, **changes: Any) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    for key, value in changes.items():
        place = manifest["counts"] if key in manifest["counts"] else manifest
        place[key] = value
        if value is ...:
            del place[key]
    (directory / MANIFEST).write_text(json.dumps(manifest))


DAMAGE: dict[str, Any] = {
    "truncated tokens": lambda d: os.truncate(d / "tokens.bin", 8),
    "truncated offsets": lambda d: os.truncate(d / "offsets.bin", 8),
    "longer weights": lambda d: os.truncate(d / "weight.bin", 8000),
    "no verdicts": lambda d: (d / "verdict.bin").unlink(),
    "no offsets": lambda d: (d / "offsets.bin").unlink(),
    "more tokens said": lambda d: edited(d, tokens=10**6),
    "fewer documents said": lambda d: edited(d, documents=1),
    "negative documents": lambda d: edited(d, documents=-1),
    "documents text": lambda d: edited(d, documents="5"),
    "no count of tokens": lambda d: edited(d, tokens=...),
    "no largest": lambda d: edited(d, largest=...),
    "no counts": lambda d: edited(d, counts=...),
    "no fingerprint": lambda d: edited(d, fingerprint=...),
    "no digest": lambda d: edited(d, digest=...),
    "no unread keys": lambda d: edited(d, unread=...),
    "another format": lambda d: edited(d, format=0),
    "no columns": lambda d: edited(d, columns=...),
    "other columns": lambda d: edited(d, columns={"tokens": {"per": "token", "dtype": "<i8"}}),
    "columns text": lambda d: edited(d, columns="tokens"),
    "half a manifest": lambda d: os.truncate(d / MANIFEST, 40),
    "empty manifest": lambda d: os.truncate(d / MANIFEST, 0),
    "a list": lambda d: (d / MANIFEST).write_text("[]"),
    "not UTF-8": lambda d: (d / MANIFEST).write_bytes(b"\xff"),
    "no manifest": lambda d: (d / MANIFEST).unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_store_is_one_line(tmp_path: Path, what: str) -> None:
    items = [Document(np.arange(1, n + 2, dtype=np.int32), np.arange(1, n + 2), np.zeros(n + 1, np.bool_)) for n in range(5)]
    directory = Path(prepare(tokenised(tmp_path / "rows.jsonl", items), tmp_path, CHAT, "none").path)
    Store(directory)
    DAMAGE[what](directory)
    said = complaint(lambda: Store(directory))
    assert said.startswith(f"{directory}/")
    assert said.endswith(": prepare it again" if what != "no manifest" else ": a store made by tools/prepare_data.py was expected")


def test_a_store_of_another_vocabulary(model: Path, tmp_path: Path) -> None:
    store = Store(prepare(conversations(tmp_path / "rows.jsonl", 5), tmp_path, CHAT, str(model)).path)
    cfg = DataConfig(train=str(store.directory))
    stores = [made.path for made in prepare_all(replace(cfg, chat=CHAT), str(model), VOCAB, tmp_path)]
    assert stores == [str(store.directory)]
    said = complaint(lambda: open_documents(cfg, stores, store.largest, 1))
    assert said == f"{store.directory}: holds token id {store.largest}, the model has {store.largest}: it was made for another model"
    assert open_documents(cfg, stores, store.largest + 1, 1).fingerprint() == store.fingerprint()


def test_a_store_that_was_tokenised_otherwise_is_refused(model: Path, tmp_path: Path) -> None:
    store = Store(prepare(conversations(tmp_path / "rows.jsonl", 5), tmp_path, CHAT, str(model), limit=900).path)
    cfg = DataConfig(train=str(store.directory), chat=CHAT)
    assert prepare_all(cfg, str(model), VOCAB, tmp_path)[0].path == str(store.directory), "the limit may differ"
    for chat, what in ((replace(CHAT, reasons=not CHAT.reasons), "reasons"), (replace(CHAT, format="wildguard"), "format")):
        said = complaint(lambda chat=chat: prepare_all(replace(cfg, chat=chat), str(model), VOCAB, tmp_path))  # type: ignore[misc]
        assert said.startswith(f"{store.directory}: prepared with another {what} than data.chat and model.path ask for")


# ---- faults of the rows


def test_rows_that_are_all_too_long_leave_nothing_behind(model: Path, tmp_path: Path) -> None:
    path = conversations(tmp_path / "rows.jsonl", 5)
    said = complaint(lambda: prepare(path, tmp_path / "stores", CHAT, str(model), limit=10))
    assert said == f"{path}: no documents: all 5 are longer than a row: see data.chat.too_long"
    assert list((tmp_path / "stores").glob("*")) == []


def test_a_fault_in_a_row_leaves_no_store(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_LINES", 1)
    path = conversations(tmp_path / "rows.jsonl", 2)
    with path.open("a") as file:
        file.write('{"text": "x", "label": "toxic"}\n')
    said = complaint(lambda: prepare(path, tmp_path / "stores", CHAT, str(model)))
    assert said == f"{path}:3: label = 'toxic': safe, controversial or unsafe was expected"
    assert list((tmp_path / "stores").glob("*")) == []


# ---- the command line


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_tool_as_a_user_runs_it(model: Path, tmp_path: Path) -> None:
    path = conversations(tmp_path / "rows.jsonl", 12, source="web")
    done = tool(path, tmp_path / "store", "--model", model, "too_long=cut", "--row-length", "200", "controversial=unsafe")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/store: 12 rows, 12 documents, ")
    assert done.stdout.endswith(" · keys that nothing reads: source (12)\n") and done.stderr == ""
    same = prepare(path, tmp_path / "api", ChatConfig(too_long="cut", controversial="unsafe"), str(model), limit=200)
    assert contents(tmp_path / "store") == contents(same.path)


def test_the_tool_says_what_is_wrong(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "x", "label": "safe"}\n{"text"\n')
    done = tool(path, tmp_path / "store", "--model", model)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"megamod: error: {path}:2: not JSON, Expecting") and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


# ---- read by ranks


def loader(store: Store, rank: int = 0, size: int = 1) -> Loader:
    return Loader(store, row_length=128, rows_per_step=4, rows_per_micro_batch=1, seed=3, dp_rank=rank, dp_size=size)


def told(batches: Sequence[Batch]) -> list[Any]:
    fields = ("tokens", "positions", "rows", "labels", "verdict", "weight", "sequence")
    return [[batch.lengths, *(getattr(batch, name).tolist() for name in fields)] for batch in batches]


def test_ranks_and_a_new_start_read_the_same_rows(model: Path, tmp_path: Path) -> None:
    path = conversations(tmp_path / "rows.jsonl", 40)
    store = Store(prepare(path, tmp_path / "stores", CHAT, str(model), limit=128).path)
    old = loader(store)
    assert old.rows % 4 and old.rows > 8, "the test wants steps that straddle epochs"
    steps = [told(old.step(number)) for number in range(12)]
    assert len({json.dumps(step) for step in steps}) == 12
    for size in (2, 4):
        ranks = [loader(store, rank, size) for rank in range(size)]
        for number, step in enumerate(steps):
            shares = [told(one.step(number)) for one in ranks]
            assert [len(share) for share in shares] == [4 // size] * size
            assert sorted(map(json.dumps, itertools.chain(*shares))) == sorted(map(json.dumps, step))
    again = Store(prepare(path, tmp_path / "stores", CHAT, str(model), limit=128).path)
    for number in (7, 3, 11):
        assert told(loader(again).step(number)) == steps[number], "after a kill, step n is step n"
