"""The token store: documents as columns in memory-mapped files, made once from JSONL, read by every rank.

    <store>/
        store.json      the columns, how many documents and tokens, what they were made from, and their fingerprint
        offsets.bin     int64 [S+1]: where each document begins in the per-token columns
        <column>.bin    one number for each token, or for each document

COLUMNS is the schema. A new column is a row there, and a field of Document.
"""

import hashlib
import json
import multiprocessing
import os
import queue
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megamod import files
from megamod.config import ChatConfig, DataConfig, Source, SyntheticData
from megamod.data.chat import Encoder, encoder, matches_of
from megamod.data.documents import IGNORED, Document, Documents, document_of, synthetic
from megamod.data.jsonl import json_object, no_rows, row_of
from megamod.data.packing import grouped
from megamod.errors import MegamodError, listed
from megamod.model.shape import Score

FORMAT = 1
PART_LINES = 2000  # of the JSONL file: what one process does at a time, and what a kill loses
MANIFEST = "store.json"
COUNTS = ("rows", "documents", "skipped", "cut", "special", "tokens", "trained", "verdicts", "largest")  # largest: of the token ids
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Column:
    """One number for each token, or for each sequence (document)."""

    name: str
    per: Literal["token", "sequence"]
    dtype: str
    of: Callable[[Document], Any]  # the document's share: an array, or a number
    absent: int | float | None = None  # what a document without it has; where all have that, no file is written


def _classes(document: Document) -> Array:
    return np.full(len(document.tokens), IGNORED, np.int64) if document.classes is None else document.classes


def _weights(document: Document) -> Array:
    return np.ones(len(document.tokens), np.float32) if document.weights is None else document.weights


COLUMNS = (
    Column("tokens", "token", "<i4", lambda d: d.tokens),
    Column("trained", "token", "|b1", lambda d: d.labels != IGNORED),
    Column("verdict", "token", "|b1", lambda d: d.verdict),
    Column("classes", "token", "<i8", _classes, absent=IGNORED),
    Column("weights", "token", "<f4", _weights, absent=1),
    Column("weight", "sequence", "<f8", lambda d: d.weight),
    Column("side", "sequence", "|i1", lambda d: d.side, absent=0),
    Column("joined", "sequence", "|b1", lambda d: d.joined, absent=0),
    Column("margin", "sequence", "<f8", lambda d: d.margin, absent=0),
)


class Store:
    """A token store, memory-mapped: Documents.

    Raises:
        MegamodError: no store there, or one that is damaged or of another format.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        counts = self.manifest["counts"]
        self.trained, self.verdicts, self.largest = counts["trained"], counts["verdicts"], counts["largest"]
        sizes = {"token": counts["tokens"], "sequence": counts["documents"]}
        self._offsets = self._map("offsets", "<i8", counts["documents"] + 1)
        written = self.manifest["columns"]
        left_out = {column.name for column in COLUMNS if column.name not in written or written[column.name].get("left_out", False)}
        self._columns = {
            column.name: np.broadcast_to(np.array(column.absent, column.dtype), sizes[column.per])
            if column.name in left_out
            else self._map(column.name, column.dtype, sizes[column.per])
            for column in COLUMNS
        }
        self._has_classes, self.weighed = "classes" not in left_out, "weights" not in left_out
        self.lengths = np.diff(self._offsets)
        self.joined, self.side = (np.array(self._columns[name]) for name in ("joined", "side"))

    def __getitem__(self, number: int) -> Document:
        part = slice(int(self._offsets[number]), int(self._offsets[number + 1]))
        tokens = np.array(self._columns["tokens"][part])
        columns = self._columns
        return Document(
            tokens,
            np.where(columns["trained"][part], tokens.astype(np.int64), IGNORED),
            np.array(columns["verdict"][part]),
            float(columns["weight"][number]),
            int(columns["side"][number]),
            bool(columns["joined"][number]),
            float(columns["margin"][number]),
            np.array(columns["classes"][part]) if self._has_classes else None,
            weights=np.array(columns["weights"][part]) if self.weighed else None,
        )

    def fingerprint(self) -> str:
        """Of the columns, taken when they were written."""
        return str(self.manifest["fingerprint"])

    def _map(self, name: str, dtype: str, size: int) -> Array:
        file, expected = self.directory / f"{name}.bin", size * np.dtype(dtype).itemsize
        found = file.stat().st_size if file.is_file() else None
        if found != expected:
            raise MegamodError(f"{file}: {'missing' if found is None else f'{found} bytes'}, {expected} were expected: prepare it again")
        return np.memmap(file, dtype, "r", shape=(size,))


class Mixed:
    """Several sources as one: Documents. Each document comes as often as its source's weight says.

    Args:
        parts: sources and their weights. A weight of 2.5 takes every document twice, and half of them, drawn once, a third time.
        seed: of what is drawn.
    """

    def __init__(self, parts: Sequence[tuple[Documents, float]], seed: int) -> None:
        self._parts, self._seed = parts, seed
        numbers = []  # of each source's documents; what is joined is repeated together
        for i, (documents, weight) in enumerate(parts):
            groups = grouped(documents.joined)
            numbers.append(groups.take(_repeated(len(groups), weight, (seed, i))).order)
        self._part = np.repeat(np.arange(len(parts)), [len(n) for n in numbers])
        self._number = np.concatenate(numbers)
        self.lengths = np.concatenate([documents.lengths[n] for (documents, _), n in zip(parts, numbers, strict=True)])
        self.joined = np.concatenate([documents.joined[n] for (documents, _), n in zip(parts, numbers, strict=True)])
        self.side = np.concatenate([documents.side[n] for (documents, _), n in zip(parts, numbers, strict=True)])
        self.trained = sum(documents.trained for documents, _ in parts)
        self.verdicts = sum(documents.verdicts for documents, _ in parts)
        self.weighed = any(documents.weighed for documents, _ in parts)

    def __getitem__(self, number: int) -> Document:
        documents, _ = self._parts[self._part[number]]
        return documents[int(self._number[number])]

    def fingerprint(self) -> str:
        """Of the sources, their weights and the seed."""
        parts = [[documents.fingerprint(), weight] for documents, weight in self._parts]
        return hashlib.sha256(json.dumps([parts, self._seed]).encode()).hexdigest()


def _repeated(documents: int, weight: float, seed: tuple[int, int]) -> npt.NDArray[np.int64]:
    whole = int(weight)
    extra = np.random.default_rng(seed).permutation(documents)[: round((weight - whole) * documents)]
    return np.concatenate([np.tile(np.arange(documents), whole), np.sort(extra)])


class Prepared(NamedTuple):
    """A store that `prepare` has made, or found made."""

    path: str
    counts: dict[str, int]  # rows, documents, skipped, cut, tokens, trained, verdicts, …
    unread: dict[str, int]  # keys of the rows that nothing reads, and how often they came

    def __str__(self) -> str:
        """For the log: what became of the rows."""
        counts = self.counts
        parts = [f"{self.path}: {counts['rows']:,} rows, {counts['documents']:,} documents, {counts['tokens']:,} tokens"]
        parts += [f"{counts[key]:,} {what}" for key, what in (("skipped", "too long: skipped"), ("cut", "too long: cut")) if counts[key]]
        if counts["special"]:
            parts.append(f"{counts['special']:,} rows hold the text of special tokens, which is read as the tokens")
        parts += [f"{count:,} tokens by {key}" for key, count in counts.items() if key.startswith(matches_of(""))]
        if self.unread:
            parts.append(f"keys that nothing reads: {listed(f'{key} ({count:,})' for key, count in self.unread.items())}")
        return " · ".join(parts)


def prepare_all(cfg: DataConfig, model: str, vocab: int, into: str | Path, score: Score | None = None) -> list[Prepared]:
    """Make, or find made, the store of every file that `cfg.train` names, below `into`; those that are stores stay where they are.

    Args:
        score: the model's head of scores, if it has one.

    Raises:
        MegamodError: see `prepare`; one of `cfg.chat.weights` that weighs no token in any of them.
    """
    if isinstance(cfg.train, SyntheticData):
        if score is not None:
            raise MegamodError(f"data.train: made-up documents have no classes, and the model has {score}: use conversations with labels")
        return []

    def one(source: Source) -> Prepared:
        if (Path(source.path) / MANIFEST).exists():
            store = Store(source.path)
            _check_encoder(store, cfg.chat, model, score)
            return Prepared(source.path, store.manifest["counts"], {})
        return prepare(source.path, into, cfg.chat, model, limit=cfg.row_length, vocab=vocab, score=score)

    made = [one(source) for source in (cfg.train if isinstance(cfg.train, tuple) else (Source(cfg.train),))]
    for pattern in cfg.chat.weights or ():
        if not sum(store.counts.get(matches_of(pattern), 0) for store in made):
            raise MegamodError(
                f"data.chat.weights: {pattern!r} matches nothing that is trained in {listed(store.path for store in made)}: a regular "
                f"expression for what the assistant says was expected"
            )
    return made


def _check_encoder(store: Store, chat: ChatConfig, model: str, score: Score | None) -> None:
    """Refuse a store of conversations that this run would have tokenised otherwise."""
    made = store.manifest["identity"]["encoder"]
    if "tokenizer" not in made:  # it was made of tokenised documents
        if score is not None:
            raise MegamodError(f"{store.directory}: tokenised documents have no classes, and the model has {score}")
        return
    ours = json.loads(json.dumps(encoder(chat, model, score=score).identity()))
    differ = [key for key in sorted({*ours, *made}) if key != "limit" and ours.get(key) != made.get(key)]
    if differ:
        raise MegamodError(
            f"{store.directory}: prepared with another {listed(differ)} than data.chat and model.path ask for: prepare it again"
        )


def open_documents(cfg: DataConfig, stores: Sequence[str | Path], vocab: int, seed: int) -> Documents:
    """The documents that `cfg.train` names, from the stores that `prepare_all` has made of them.

    Raises:
        MegamodError: a store that holds nothing to train, or ids outside the vocabulary.
    """
    if isinstance(cfg.train, SyntheticData):
        return synthetic(cfg.train, vocab, cfg.row_length, seed)
    opened = [Store(path) for path in stores]
    for store in opened:
        if store.largest >= vocab:
            raise MegamodError(f"{store.directory}: holds token id {store.largest}, the model has {vocab}: it was made for another model")
        if not store.trained:
            raise MegamodError(f"{store.directory}: no document has a token to train: labels are all {IGNORED}, or documents of one token")
    if not isinstance(cfg.train, tuple):
        return opened[0]

    def part(store: Store, source: Source) -> tuple[Store, float]:
        return store, source.weight

    return Mixed([part(*pair) for pair in zip(opened, cfg.train, strict=True)], seed)


def prepare(
    path: str | Path,
    into: str | Path,
    chat: ChatConfig,
    model: str,
    *,
    limit: int | None = None,
    vocab: int | None = None,
    processes: int = 1,
    name: str | None = None,
    score: Score | None = None,
) -> Prepared:
    """Make the token store of a JSONL file; what an earlier, killed attempt has done is not done again.

    Args:
        path: conversations (data/jsonl.py) or tokenised documents (data/documents.py); the first line decides.
        into: the folder in which the store is made.
        chat: how conversations become tokens.
        model: the Hugging Face directory whose tokenizer is used.
        limit: the tokens that a document may have: a row's. None: any number.
        vocab: of the model, for tokenised documents.
        processes: that encode at the same time. The store does not depend on it.
        score: the model's head of scores, if it has one: documents then have classes in place of labels.
        name: of the store; None: the file's, with a digest of what decides its content. So another tokenizer, template or
            file makes another store, and the same ones find this one.

    Raises:
        MegamodError: a fault in the file, with `file:line:`; nothing to train in it; or a store of that name made from
            something else.
    """
    scan = _scan(Path(path))
    made = None if scan.is_tokenised else encoder(chat, model, limit, score)
    if made is None and score is not None:
        raise MegamodError(f"{path}: tokenised documents have no classes, and the model has {score}: use conversations with labels")
    if made is None and chat != ChatConfig(too_long=chat.too_long):
        raise MegamodError(f"{path}: tokenised documents: data.chat would not be read, but for too_long")
    how = {"limit": limit, "too_long": chat.too_long, "vocab": vocab} if made is None else made.identity()
    identity = {"format": FORMAT, "sha256": scan.sha256, "columns": [[c.name, c.per, c.dtype] for c in COLUMNS], "encoder": how}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    target = Path(into) / (name or f"{Path(path).stem}-{digest[:12]}")
    if (target / MANIFEST).exists():
        found = _read_manifest(target)
        if found["digest"] != digest:
            raise MegamodError(f"{target}: a store of another file, tokenizer, template or option: remove it, or use another name")
        return Prepared(str(target), found["counts"], found["unread"])
    if target.exists():
        raise MegamodError(f"{target}: exists and is no store: use another name")
    parts = target.with_name(f".{target.name}.{digest[:12]}.parts")
    new = [folder for folder in (parts, *parts.parents) if not folder.exists()]
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MegamodError(f"{into}: {error.strerror or error}: a folder that can be made was expected") from None
    tasks = [_Task(str(path), start, line, PART_LINES, parts / f"{i:06d}.npz") for i, (start, line) in enumerate(scan.parts)]
    todo = [task for task in tasks if not task.part.exists()]
    work = _Work(todo, chat, model, limit, vocab, scan.is_tokenised, score)
    bar = tqdm(total=len(tasks) * PART_LINES, initial=(len(tasks) - len(todo)) * PART_LINES, desc=f"encoding {path}", unit=" rows", delay=3)
    try:
        with bar:
            for _ in _in_processes(work, processes) if processes > 1 and len(todo) > 1 else work.run(made, 0, 1):
                bar.update(PART_LINES)
        counts, unread = _assemble(tasks, target, {"digest": digest, "identity": identity, "source": str(path)})
    except _Died:
        raise  # the parts that are done wait for the next attempt
    except MegamodError:
        shutil.rmtree(parts, ignore_errors=True)  # the file will be another one when it is mended
        for folder in new[1:]:
            with suppress(OSError):  # it holds something by now
                folder.rmdir()
        raise
    shutil.rmtree(parts, ignore_errors=True)
    return Prepared(str(target), counts, unread)


class _Scan(NamedTuple):
    sha256: str
    parts: list[tuple[int, int]]  # byte and line at which every part of PART_LINES lines begins
    is_tokenised: bool


class _Task(NamedTuple):
    path: str
    start: int  # byte
    line: int  # counts from 1
    lines: int  # at most
    part: Path


def _scan(path: Path) -> _Scan:
    """One pass over the file's bytes: its checksum, and where its parts begin."""
    digest, parts, start, first = hashlib.sha256(), [], 0, None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if number % PART_LINES == 0:
                    parts.append((start, number + 1))
                digest.update(line)
                start += len(line)
                if first is None and line.strip():
                    first = (line, f"{path}:{number + 1}")
    except OSError as error:
        raise MegamodError(f"{path}: {error.strerror or error}: a JSONL file, or a store, was expected") from None
    if first is None:
        raise no_rows(path)
    return _Scan(digest.hexdigest(), parts, "input_ids" in json_object(*first))


@dataclass(frozen=True)
class _Work:
    """Parts to encode, and how; it pickles, so that other processes can take their share of it."""

    tasks: list[_Task]
    chat: ChatConfig
    model: str
    limit: int | None
    vocab: int | None
    is_tokenised: bool
    score: Score | None = None

    def run(self, made: Encoder | None, first: int, stride: int) -> Iterator[None]:
        """Encode every `stride`-th part from `first` on."""
        for task in self.tasks[first::stride]:
            self._encode(task, made)
            yield

    def _encode(self, task: _Task, made: Encoder | None) -> None:
        documents: list[Document] = []
        counts: Counter[str] = Counter()
        unread: Counter[str] = Counter()
        with open(task.path, "rb") as file:
            file.seek(task.start)
            for number in range(task.line, task.line + task.lines):
                line = file.readline()
                if not line:
                    break
                if not line.strip():
                    continue
                where = f"{task.path}:{number}"
                record = json_object(line, where)
                if made is None:
                    documents += self._tokenised(record, where, counts)
                else:
                    row = row_of(record, where)
                    unread.update(row.unread)
                    documents += made.documents(row, counts)
        _write_part(task.part, documents, counts, unread)

    def _tokenised(self, record: Mapping[str, Any], where: str, counts: Counter[str]) -> list[Document]:
        if "input_ids" not in record:
            raise MegamodError(f"{where}: no input_ids: every document needs its list of token ids, as the file's first line has")
        document = document_of(record, where, self.vocab)
        counts["rows"] += 1
        if self.limit is not None and len(document.tokens) > self.limit:
            if self.chat.too_long != "skip":
                advice = "raise data.row_length, or set data.chat.too_long to 'skip'"
                raise MegamodError(f"{where}: {len(document.tokens)} tokens, but a row holds {self.limit}: {advice}")
            counts["skipped"] += 1
            return []
        counts["documents"] += 1
        return [document]


class _Died(MegamodError):
    """A process that encodes has ended without a word."""


def _in_processes(work: _Work, processes: int) -> Iterator[None]:
    """Encode with several processes: process p takes parts p, p + processes, …"""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    workers = [context.Process(target=_serve, args=(work, p, processes, answers), daemon=True) for p in range(processes)]
    for worker in workers:
        worker.start()
    try:
        done = 0
        while done < len(work.tasks):
            try:
                fault = answers.get(timeout=5)
            except queue.Empty:
                if all(worker.exitcode is not None for worker in workers) and answers.empty():
                    raise _Died("a process that encodes has died (killed for its memory?): use fewer processes") from None
                continue
            if fault is not None:
                raise fault
            done += 1
            yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _serve(work: _Work, first: int, stride: int, answers: Any) -> None:
    try:
        made = None if work.is_tokenised else encoder(work.chat, work.model, work.limit, work.score)
        for _ in work.run(made, first, stride):
            answers.put(None)
    except MegamodError as error:
        answers.put(error)
    except Exception:
        answers.put(RuntimeError(traceback.format_exc()))


def _write_part(part: Path, documents: Sequence[Document], counts: Mapping[str, int], unread: Mapping[str, int]) -> None:
    arrays: dict[str, Array] = {"lengths": np.array([len(d.tokens) for d in documents], np.int64)}
    for column in COLUMNS:
        values = [column.of(document) for document in documents]
        joined = np.concatenate(values) if column.per == "token" and values else np.array(values)
        arrays[column.name] = joined.astype(column.dtype)
    arrays["about"] = np.frombuffer(json.dumps([counts, unread]).encode(), np.uint8)
    draft = part.with_suffix(f".{os.getpid()}.tmp")  # a process of an attempt that was killed may still be writing its own
    with draft.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    files.sync(draft)
    os.replace(draft, part)


def _assemble(tasks: Sequence[_Task], target: Path, about: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """The parts one after the other, into a directory that is renamed when it is whole."""
    draft = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    unread: Counter[str] = Counter()
    digests = {column.name: hashlib.sha256() for column in COLUMNS}
    left_out = {column.name for column in COLUMNS if column.absent is not None}
    lengths = []
    writers = {column.name: (draft / f"{column.name}.bin").open("wb") for column in COLUMNS}
    try:
        for task in tasks:
            with np.load(task.part, allow_pickle=False) as part:
                for column in COLUMNS:
                    digests[column.name].update(part[column.name].tobytes())
                    writers[column.name].write(part[column.name].tobytes())
                    if (part[column.name] != column.absent).any():
                        left_out.discard(column.name)
                lengths.append(part["lengths"])
                part_counts, part_unread = json.loads(part["about"].tobytes())
                counts.update(part_counts)
                unread.update(part_unread)
                counts["tokens"] += len(part["tokens"])
                firsts = np.cumsum(part["lengths"]) - part["lengths"]
                counts["trained"] += int(part["trained"].sum() - part["trained"][firsts].sum())  # a first token is never predicted
                counts["trained"] += int((part["classes"] != IGNORED).sum())
                counts["verdicts"] += int(part["verdict"].sum())
                counts["largest"] = max(counts["largest"], int(part["tokens"].max(initial=0)))
    finally:
        for writer in writers.values():
            writer.close()
    for name in left_out:
        (draft / f"{name}.bin").unlink()
    offsets = np.concatenate([[0], *lengths]).cumsum()
    offsets.astype("<i8").tofile(draft / "offsets.bin")
    if not counts["documents"]:
        shutil.rmtree(draft)
        raise MegamodError(f"{about['source']}: no documents: all {counts['skipped']} are longer than a row: see data.chat.too_long")
    whole = hashlib.sha256(
        json.dumps(
            [hashlib.sha256(offsets.tobytes()).hexdigest(), *(d.hexdigest() for name, d in digests.items() if name not in left_out)]
        ).encode()
    )
    manifest = {
        "format": FORMAT, "columns": {c.name: {"per": c.per, "dtype": c.dtype, "left_out": c.name in left_out} for c in COLUMNS},
        "counts": dict(counts), "unread": dict(unread), "fingerprint": whole.hexdigest(), **about,
    }  # fmt: skip
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in draft.iterdir():
        files.sync(file)
    os.rename(draft, target)
    files.sync(target.parent)
    return manifest["counts"], manifest["unread"]


def _read_manifest(directory: Path) -> dict[str, Any]:
    file = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        columns = {name: (entry["per"], entry["dtype"]) for name, entry in manifest["columns"].items()}
        if manifest["format"] != FORMAT:
            raise MegamodError(f"{file}: format {manifest['format']}, this megamod reads {FORMAT}: prepare it again")
        numbers = [manifest["counts"][key] for key in COUNTS]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"counts {numbers}")
        str(manifest["digest"] + manifest["fingerprint"]), dict(manifest["unread"])
    except OSError as error:
        raise MegamodError(f"{file}: {error.strerror or error}: a store made by tools/prepare_data.py was expected") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MegamodError(f"{file}: damaged ({error}): prepare it again") from None
    # A store of before there was a column has what its documents have without it.
    missing = [c.name for c in COLUMNS if columns.get(c.name, None if c.absent is None else (c.per, c.dtype)) != (c.per, c.dtype)]
    if missing:
        raise MegamodError(f"{file}: made with other columns than {listed(missing)}: prepare it again")
    return manifest
