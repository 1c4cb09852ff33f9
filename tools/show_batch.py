"""Show packed rows of a run as its loader makes them: what is read, what is trained, which tokens say the verdict, who holds them.

    python tools/show_batch.py configs/<run>.py [owner.key=value ...] --step 412 --rows 2 --cp 4
    python tools/show_batch.py configs/<run>.py --saved FILE      the micro-batches that a run has saved of a step

--step counts from 1, as the log does. Line breaks show as ⏎ and break the line; other control characters, and the parts of a
character that several spans share, show as Python's escapes (\\t, \\u200b, \\xe4). Without colours trained tokens stand in ⟦ ⟧
and verdict tokens in ⟪ ⟫; where the text itself holds one of these, it shows as an escape too. Nothing is written: a store
that the run has made is read, one that it has not made is made in a temporary directory.

Where context parallelism (--cp N, or else the config's parallel.cp) cuts a micro-batch, ▐cp 2▌ stands before the first token of
rank 2; between documents and inside padding it has a line of its own. The lines at the top say what each rank holds. The label
of a trained token lies one position before it, so that of the first token after a border counts for the rank before the border.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console, Group
from rich.text import Text
from transformers import AutoTokenizer

from megamod import config
from megamod.batch import Batch
from megamod.command import command
from megamod.config import RunConfig, SyntheticData
from megamod.data import saved_batch
from megamod.data.loader import peek
from megamod.errors import MegamodError
from megamod.train import model_shape

Style = Literal["context", "trained", "verdict"]
COLOURS: dict[Style, str] = {"context": "dim", "trained": "green", "verdict": "bold black on yellow"}
BRACKETS: dict[Style, str] = {"context": "", "trained": "⟦⟧", "verdict": "⟪⟫"}
SPECIAL = "underline"
BORDER = "bold magenta"
UNLABELLED = "yellow"  # a rank that holds none of a micro-batch's labels
WIDTH = 100
BREAK = "⏎"
EDGES = "▐▌"
SIGNS = frozenset(BREAK + "\\" + EDGES + "".join(BRACKETS.values()))  # have a meaning in what is printed
PAD_ID = 0  # packing.micro_batch's
FEW = 4  # weights of a document's tokens that are all shown


# --- the rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """A document of a packed row, or the padding at its end: tokens [start, stop) of the micro-batch."""

    start: int
    stop: int
    positions: tuple[int, int]  # of its first and last token, as the model is told
    trained: int
    weights: tuple[float, ...]  # of its trained tokens, each value once
    is_padding: bool
    ranks: tuple[int, ...]  # of context parallelism: who holds each of its tokens
    opens: bool  # whether its first rank's stretch begins with it, so that a border lies right before it

    def __len__(self) -> int:
        return self.stop - self.start


def holders(batch: Batch, cp: int) -> list[int]:
    """The context-parallel rank, of `cp`, that holds each token of a micro-batch: asked of `Batch.slice`."""
    places = replace(batch, tokens=torch.arange(len(batch.tokens)))  # each token is its own place
    held = torch.empty_like(places.tokens)
    for rank in range(cp):
        held[places.slice(rank, cp, None).tokens] = rank
    ranks: list[int] = held.tolist()
    return ranks


def passages(batch: Batch, row_length: int, cp: int = 1) -> list[list[Passage]]:
    """What lies in each row of a micro-batch, in order, and on which of `cp` ranks."""
    rows: list[list[Passage]] = [[] for _ in range(len(batch.tokens) // row_length)]
    held = holders(batch, cp)
    start = 0
    for number, length in enumerate(batch.lengths):
        stop = start + length
        weights = batch.weight[batch.sequence == number]
        # Padding is told from a document by what it is: the row's untrained rest, of one id.
        rest = not len(weights) and stop % row_length == 0 and not bool((batch.tokens[start:stop] != PAD_ID).any())
        positions = (int(batch.positions[start]), int(batch.positions[stop - 1]))
        ranks = tuple(held[start:stop])
        opens = start > 0 and held[start - 1] != ranks[0]
        found = Passage(start, stop, positions, len(weights), tuple(weights.unique().tolist()), rest, ranks, opens)
        rows[start // row_length].append(found)
        start = stop
    return rows


# --- the tokens --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """What tokens look like: the bytes of each id, and the ids that stand for no ordinary text."""

    spell: Callable[[int], bytes]
    special: frozenset[int] = frozenset()


IDS = Vocabulary(lambda token: b"%d " % token)  # where there is no tokenizer


def vocabulary(path: str) -> Vocabulary | None:
    """Of the tokenizer in a Hugging Face directory; None where there is none that can be read."""
    if not any(Path(path, name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        backend: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        decoder = json.dumps(json.loads(backend.backend_tokenizer.to_str())["decoder"])
    except Exception:  # transformers raises whatever its parsers raise
        return None
    added = {token: text.encode() for text, token in backend.get_added_vocab().items()}

    def spell(token: int) -> bytes:
        if token in added:
            return added[token]
        piece = backend.convert_ids_to_tokens(token)
        if piece is None:  # the model's vocabulary may be larger than the tokenizer's
            return f"<id {token}>".encode()
        if '"ByteLevel"' in decoder:  # each character stands for a byte
            return bytes(BYTES[character] for character in piece)
        if '"ByteFallback"' in decoder:  # SentencePiece
            is_byte = len(piece) == 6 and piece.startswith("<0x")
            return bytes.fromhex(piece[3:5]) if is_byte else piece.replace("▁", " ").encode()
        return str(backend.decode([token])).encode()

    return Vocabulary(spell, frozenset(added))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes are their own characters, the others are those from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(own))
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_alphabet()


class Mark(NamedTuple):
    """All that decides how a token is shown: tokens of equal marks are one span. What else is to be told apart is a field here."""

    style: Style
    special: bool
    rank: int  # of context parallelism: who holds it


class Span(NamedTuple):
    """Tokens of equal marks, one after the other, as bytes: a character that ends in another span is whole in neither."""

    mark: Mark
    data: bytes


def spans(batch: Batch, passage: Passage, vocabulary: Vocabulary) -> list[Span]:
    """A passage's tokens. Trained are those that a labelled position predicts, so never a document's first."""
    styles: dict[int, Style] = {
        at + 1: "verdict" if verdict else "trained" for at, verdict in zip(batch.rows.tolist(), batch.verdict.tolist(), strict=True)
    }
    ids = batch.tokens[passage.start : passage.stop].tolist()
    marks = [
        Mark(styles.get(at, "context"), token in vocabulary.special, rank)
        for at, (token, rank) in enumerate(zip(ids, passage.ranks, strict=True), passage.start)
    ]
    runs = groupby(zip(marks, ids, strict=True), key=itemgetter(0))
    return [Span(mark, b"".join(vocabulary.spell(token) for _, token in run)) for mark, run in runs]


def visible(data: bytes) -> str:
    """UTF-8 as text that can be printed: every character that cannot be seen, and every byte that is part of none, as an escape."""
    return "".join(map(_visible, data.decode("utf-8", "surrogateescape")))


def _visible(character: str) -> str:
    number = ord(character)
    if character == "\n":
        return BREAK + "\n"
    if 0xDC80 <= number <= 0xDCFF:  # a byte that is part of no whole character
        return f"\\x{number - 0xDC00:02x}"
    if character.isprintable() and character not in SIGNS:
        return character
    if number < 0x80:
        return ascii(character)[1:-1]
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


# --- on the screen -----------------------------------------------------------------------------------------------------------


def painted(found: Sequence[Span], *, coloured: bool) -> Text:
    """Spans as one text: in colours, or with brackets; with a sign wherever another rank's stretch begins."""
    text = Text()
    for i, (rank, held) in enumerate(groupby(found, key=attrgetter("mark.rank"))):
        if i:
            text.append(sign(rank), BORDER)
        if coloured:
            for mark, data in held:
                text.append(visible(data), f"{COLOURS[mark.style]} {SPECIAL}" if mark.special else COLOURS[mark.style])
        else:
            for style, run in groupby(held, key=attrgetter("mark.style")):
                left, right = BRACKETS[style][:1], BRACKETS[style][1:]
                whole = visible(b"".join(span.data for span in run))
                body = whole.removesuffix("\n")  # what is trained is the sign, not the line that it breaks
                text.append(left + body + right + whole[len(body) :])
    return text


def sign(rank: int | str) -> str:
    """Here begins the stretch of a context-parallel rank."""
    return f"{EDGES[0]}cp {rank}{EDGES[1]}"


def legend(cp: int, *, coloured: bool) -> Text:
    """What the styles and signs mean."""
    words = [painted([Span(Mark(style, False, 0), style.encode())], coloured=coloured) for style in COLOURS]
    if coloured:
        words.append(Text("special token", SPECIAL))
    if cp > 1:
        words.append(Text.assemble((sign("n"), BORDER), " from here on rank n"))
    return Text("  ").join([*words, Text(f"{BREAK} line break"), Text("\\xNN byte of a divided character")])


def heading(cfg: RunConfig, which: str, made: Sequence[Batch], rows: Sequence[Sequence[Passage]]) -> str:
    """A line about the whole step, which is called `which`."""
    tokens = sum(len(batch.tokens) for batch in made)
    counts = {
        "trained": sum(len(batch.labels) for batch in made),
        "verdict": sum(int(batch.verdict.sum()) for batch in made),
        "padding": sum(len(passage) for row in rows for passage in row if passage.is_padding),
    }
    shares = " · ".join(f"{name} {count:,} ({count / tokens:.1%})" for name, count in counts.items())
    return f"{which} · {len(rows)} rows of {cfg.data.row_length:,} = {tokens:,} tokens · {shares}"


def shares(made: Sequence[Batch], rows: Sequence[Sequence[Sequence[Passage]]], of: int, cp: int) -> list[Text]:
    """Lines about what each rank holds of micro-batches, `made` and cut into `rows`, which are the first of a step's `of`."""
    which = f"micro-batch 1 of {of}" if len(made) == 1 else f"micro-batches 1–{len(made)} of {of}, counted one by one"
    about = f"cp {cp} · {len(made[0].tokens):,} tokens of a micro-batch on {cp} ranks · {which}"
    ranks = range(cp)
    held = [rank for row in rows[0] for passage in row for rank in passage.ranks]  # the same in every micro-batch
    first, tokens = [held.index(rank) for rank in ranks], [held.count(rank) for rank in ranks]
    places = [f"{start}–{start + count - 1}" for start, count in zip(first, tokens, strict=True)]
    labelled = [[len(batch.slice(rank, cp, None).rows) for batch in made] for rank in ranks]
    touched = [Counter(rank for row in its for passage in row if not passage.is_padding for rank in set(passage.ranks)) for its in rows]
    documents = [[counts[rank] for counts in touched] for rank in ranks]
    wide = max(map(len, places))
    lines = [
        Text(f"cp {rank} · {count} tokens at {place:<{wide}} · labelled positions {labels} · documents {touches}")
        for rank, count, place, labels, touches in zip(
            _column(ranks), _column(tokens), places, _sums(labelled), _sums(documents), strict=True
        )
    ]  # fmt: skip
    for line, counts in zip(lines, labelled, strict=True):
        line.style = "" if all(counts) else UNLABELLED
    return [Text(about), *lines]


def _column(numbers: Iterable[int]) -> list[str]:
    """Of one width, so that what is larger is seen."""
    words = [f"{number:,}" for number in numbers]
    return [word.rjust(max(map(len, words))) for word in words]


def _sums(table: Sequence[Sequence[int]]) -> list[str]:
    """Each line's numbers with a plus between them, in columns."""
    columns = [_column(column) for column in zip(*table, strict=True)]
    return [" + ".join(cells) for cells in zip(*columns, strict=True)]


def title(number: int, passage: Passage, row_length: int, cp: int = 1) -> str:
    """A line about one passage."""
    first = passage.start % row_length
    place = f"at {first}–{first + len(passage) - 1}" + _held(passage.ranks[0], passage.ranks[-1], cp)
    if passage.is_padding:
        return f"padding · {len(passage):,} tokens · {place}"
    low, high = passage.positions
    some = passage.weights if len(passage.weights) <= FEW else (min(passage.weights), max(passage.weights))
    weight = f"weight {(' and ' if some is passage.weights else '–').join(f'{w:g}' for w in some)}" if some else "not trained"
    return f"document {number} · {len(passage):,} tokens, {passage.trained:,} trained · {weight} · positions {low}–{high} · {place}"


def _held(first: int, last: int, cp: int) -> str:
    """The ranks from `first` to `last`, as the end of a title; nothing where there is one rank."""
    return "" if cp == 1 else f" · cp {first}" + (f"–{last}" if last > first else "")


def check_cp(cfg: RunConfig) -> None:
    """Refuse context parallelism that cannot share a micro-batch evenly. Raises MegamodError."""
    d, cp = cfg.data, cfg.parallel.cp
    tokens = d.row_length * d.rows_per_micro_batch
    if tokens % cp:
        below = next(n for n in range(min(cp - 1, tokens), 0, -1) if tokens % n == 0)
        above = next((n for n in range(cp + 1, tokens + 1) if tokens % n == 0), None)
        raise MegamodError(
            f"parallel.cp = {cp} cannot share a micro-batch's {tokens} tokens (data.row_length {d.row_length} × "
            f"rows_per_micro_batch {d.rows_per_micro_batch}): use {below}" + (f" or {above}" if above else "")
        )


def saved(cfg: RunConfig, path: str) -> list[Batch]:
    """The micro-batches in the file at `path`, of a run of `cfg`. Raises MegamodError."""
    made = saved_batch.load(path)
    tokens = cfg.data.row_length * cfg.data.rows_per_micro_batch
    for batch in made:
        if len(batch.tokens) != tokens:
            raise MegamodError(
                f"{path}: micro-batches of {len(batch.tokens)} tokens, and the config's have {tokens} (data.row_length "
                f"{cfg.data.row_length} × rows_per_micro_batch {cfg.data.rows_per_micro_batch}): the config of its run was expected"
            )
    if not made:
        raise MegamodError(f"{path}: holds no micro-batch")
    return made


def page(cfg: RunConfig, which: str, made: Sequence[Batch], shown: int, words: Vocabulary, *, coloured: bool) -> Group:
    """The first `shown` rows of a step's micro-batches, below a header."""
    length, cp = cfg.data.row_length, cfg.parallel.cp
    cut = [passages(batch, length, cp) for batch in made]
    rows = [(which, batch, row) for which, (batch, its) in enumerate(zip(made, cut, strict=True), 1) for row in its]
    parts: list[Text] = [Text(heading(cfg, which, made, [row for *_, row in rows]), "bold")]
    if cp > 1:
        some, *_ = rows[:shown][-1]  # micro-batches of which a row is shown
        parts += shares(made[:some], cut[:some], len(made), cp)
    parts.append(legend(cp, coloured=coloured))
    for number, (which, batch, row) in enumerate(rows[:shown], 1):
        place = f" · tokens {row[0].start}–{row[-1].stop - 1} of micro-batch {which}" if cp > 1 else ""
        held = _held(row[0].ranks[0], row[-1].ranks[-1], cp)
        parts += [Text(), _rule(f"row {number} of {len(rows)}{place}{held}", "bold", "═")]
        for i, passage in enumerate(row, 1):
            first = passage.start % length
            if passage.opens:
                parts.append(_border(passage.ranks[0], first))
            parts.append(_rule(title(i, passage, length, cp), "cyan"))
            if passage.is_padding:
                inside = enumerate(pairwise(passage.ranks), first + 1)
                parts += [_border(after, at) for at, (before, after) in inside if after != before]
            else:
                text = painted(spans(batch, passage, words), coloured=coloured)
                if text.plain.endswith("\n"):  # the rule that follows breaks the line; the sign stays
                    text.right_crop(1)
                parts.append(text)
    return Group(*parts)


def _rule(words: str, style: str, line: str = "─") -> Text:
    return Text(f"{line * 2} {words} ".ljust(WIDTH, line), style)  # rich's Rule would cut the words to the terminal's width


def _border(rank: int, at: int) -> Text:
    """A border where there is no text for it to stand in."""
    return _rule(f"{sign(rank)} begins at {at}", BORDER)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="owner.key=value")
    parser.add_argument("--step", type=int, help="of the run, from 1 (default)")
    parser.add_argument("--saved", metavar="FILE", help="show what a run has saved of a step, instead of what the loader makes")
    parser.add_argument("--rows", type=int, default=1, help="how many of the step's rows are printed, at most (default: 1)")
    parser.add_argument("--cp", type=int, metavar="N", help="ranks that share a micro-batch (default: the config's parallel.cp)")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="auto: on a terminal, unless NO_COLOR is set")
    args = parser.parse_intermixed_args(argv)
    console = Console(highlight=False)
    coloured = args.color == "always" or (args.color == "auto" and console.color_system is not None and not console.no_color)
    if args.color != "auto":
        console = Console(
            highlight=False, force_terminal=coloured, color_system="standard" if coloured else None, no_color=not coloured
        )  # fmt: skip
    if args.rows < 1:
        raise MegamodError(f"--rows {args.rows}: at least 1 was expected")
    cfg = config.load(args.config, args.overrides + ([] if args.cp is None else [f"parallel.cp={args.cp}"]))
    words = None if isinstance(cfg.data.train, SyntheticData) else vocabulary(cfg.data.chat.tokenizer or cfg.model.path)
    if args.saved is not None and args.step is not None:
        raise MegamodError(f"--step {args.step}: the file of --saved holds one step: leave one of them out")
    check_cp(cfg)
    if args.saved is not None:
        which, made = Path(args.saved).name, saved(cfg, args.saved)
    else:
        step = 1 if args.step is None else args.step
        which, made = f"step {step} of {cfg.steps}", peek(cfg, model_shape(cfg), step)
    shown = page(cfg, which, made, args.rows, words or IDS, coloured=coloured)
    console.print(shown, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
