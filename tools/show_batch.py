"""Show packed rows of a run as its loader makes them: what is read, what is trained, which tokens say the verdict.

    python tools/show_batch.py configs/<run>.py [owner.key=value ...] --step 412 --rows 2

--step counts from 1, as the log does. Line breaks show as ⏎ and break the line; other control characters, and the parts of a
character that several spans share, show as Python's escapes (\\t, \\u200b, \\xe4). Without colours trained tokens stand in ⟦ ⟧
and verdict tokens in ⟪ ⟫; where the text itself holds one of these, it shows as an escape too. Nothing is written: a store
that the run has made is read, one that it has not made is made in a temporary directory.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console, Group
from rich.text import Text
from transformers import AutoTokenizer

from megamod import config
from megamod.batch import Batch
from megamod.config import RunConfig, SyntheticData
from megamod.data.loader import Loader
from megamod.data.store import MANIFEST, open_documents, prepare_all
from megamod.errors import MegamodError
from megamod.train import model_shape

Style = Literal["context", "trained", "verdict"]
COLOURS: dict[Style, str] = {"context": "dim", "trained": "green", "verdict": "bold black on yellow"}
BRACKETS: dict[Style, str] = {"context": "", "trained": "⟦⟧", "verdict": "⟪⟫"}
SPECIAL = "underline"
WIDTH = 100
BREAK = "⏎"
SIGNS = frozenset(BREAK + "\\" + "".join(BRACKETS.values()))  # have a meaning in what is printed
PAD_ID = 0  # packing.micro_batch's


# --- the rows ----------------------------------------------------------------------------------------------------------------


def batches(cfg: RunConfig, step: int) -> list[Batch]:
    """The micro-batches of global step `step`, which counts from 1: all of them, in order. Raises MegamodError."""
    if not 1 <= step <= cfg.steps:
        raise MegamodError(f"--step {step}: a step from 1 to {cfg.steps} was expected")
    d, vocab = cfg.data, model_shape(cfg).vocab
    with tempfile.TemporaryDirectory(prefix="megamod-") as folder:
        for store in Path(cfg.dir, "data").glob(f"*/{MANIFEST}"):
            Path(folder, store.parent.name).symlink_to(store.parent.resolve(), target_is_directory=True)
        stores = prepare_all(d, cfg.model.path, vocab, folder)
        documents = open_documents(d, [store.path for store in stores], vocab, cfg.seed)
        loader = Loader(
            documents, row_length=d.row_length, rows_per_step=d.rows_per_step, rows_per_micro_batch=d.rows_per_micro_batch,
            seed=cfg.seed, dp_rank=0, dp_size=1,
        )  # fmt: skip
        return loader.step(step - 1)


@dataclass(frozen=True)
class Passage:
    """A document of a packed row, or the padding at its end: tokens [start, stop) of the micro-batch."""

    start: int
    stop: int
    positions: tuple[int, int]  # of its first and last token, as the model is told
    trained: int
    weights: tuple[float, ...]  # of its trained tokens, each value once
    is_padding: bool

    def __len__(self) -> int:
        return self.stop - self.start


def passages(batch: Batch, row_length: int) -> list[list[Passage]]:
    """What lies in each row of a micro-batch, in order."""
    rows: list[list[Passage]] = [[] for _ in range(len(batch.tokens) // row_length)]
    start = 0
    for number, length in enumerate(batch.lengths):
        stop = start + length
        weights = batch.weight[batch.sequence == number]
        # Padding is told from a document by what it is: the row's untrained rest, of one id.
        rest = not len(weights) and stop % row_length == 0 and not bool((batch.tokens[start:stop] != PAD_ID).any())
        positions = (int(batch.positions[start]), int(batch.positions[stop - 1]))
        found = Passage(start, stop, positions, len(weights), tuple(weights.unique().tolist()), rest)
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
    marks = [Mark(styles.get(at, "context"), token in vocabulary.special) for at, token in enumerate(ids, passage.start)]
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
    """Spans as one text: in colours, or with brackets."""
    text = Text()
    if coloured:
        for mark, data in found:
            text.append(visible(data), f"{COLOURS[mark.style]} {SPECIAL}" if mark.special else COLOURS[mark.style])
    else:
        for style, run in groupby(found, key=attrgetter("mark.style")):
            left, right = BRACKETS[style][:1], BRACKETS[style][1:]
            whole = visible(b"".join(span.data for span in run))
            body = whole.removesuffix("\n")  # what is trained is the sign, not the line that it breaks
            text.append(left + body + right + whole[len(body) :])
    return text


def legend(*, coloured: bool) -> Text:
    """What the styles mean."""
    words = [painted([Span(Mark(style, False), style.encode())], coloured=coloured) for style in COLOURS]
    if coloured:
        words.append(Text("special token", SPECIAL))
    return Text("  ").join([*words, Text(f"{BREAK} line break"), Text("\\xNN byte of a divided character")])


def heading(cfg: RunConfig, step: int, made: Sequence[Batch], rows: Sequence[Sequence[Passage]]) -> str:
    """A line about the whole step."""
    tokens = sum(len(batch.tokens) for batch in made)
    counts = {
        "trained": sum(len(batch.labels) for batch in made),
        "verdict": sum(int(batch.verdict.sum()) for batch in made),
        "padding": sum(len(passage) for row in rows for passage in row if passage.is_padding),
    }
    shares = " · ".join(f"{name} {count:,} ({count / tokens:.1%})" for name, count in counts.items())
    return f"step {step} of {cfg.steps} · {len(rows)} rows of {cfg.data.row_length:,} = {tokens:,} tokens · {shares}"


def title(number: int, passage: Passage, row_length: int) -> str:
    """A line about one passage."""
    first = passage.start % row_length
    place = f"at {first}–{first + len(passage) - 1}"
    if passage.is_padding:
        return f"padding · {len(passage):,} tokens · {place}"
    low, high = passage.positions
    weight = f"weight {' and '.join(f'{w:g}' for w in passage.weights)}" if passage.weights else "not trained"
    return f"document {number} · {len(passage):,} tokens, {passage.trained:,} trained · {weight} · positions {low}–{high} · {place}"


def page(cfg: RunConfig, step: int, shown: int, words: Vocabulary, *, coloured: bool) -> Group:
    """The first `shown` rows of a step, below a header. Raises MegamodError."""
    made = batches(cfg, step)
    length = cfg.data.row_length
    rows = [(batch, row) for batch in made for row in passages(batch, length)]
    parts: list[Text] = [Text(heading(cfg, step, made, [row for _, row in rows]), "bold"), legend(coloured=coloured)]
    for number, (batch, row) in enumerate(rows[:shown], 1):
        parts += [Text(), _rule(f"row {number} of {len(rows)}", "bold", "═")]
        for i, passage in enumerate(row, 1):
            parts.append(_rule(title(i, passage, length), "cyan"))
            if not passage.is_padding:
                text = painted(spans(batch, passage, words), coloured=coloured)
                if text.plain.endswith("\n"):  # the rule that follows breaks the line; the sign stays
                    text.right_crop(1)
                parts.append(text)
    return Group(*parts)


def _rule(words: str, style: str, line: str = "─") -> Text:
    return Text(f"{line * 2} {words} ".ljust(WIDTH, line), style)  # rich's Rule would cut the words to the terminal's width


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="owner.key=value")
    parser.add_argument("--step", type=int, default=1, help="of the run, from 1 (default)")
    parser.add_argument("--rows", type=int, default=1, help="how many of the step's rows are printed, at most (default: 1)")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="auto: on a terminal, unless NO_COLOR is set")
    args = parser.parse_intermixed_args(argv)
    console = Console(highlight=False)
    coloured = args.color == "always" or (args.color == "auto" and console.color_system is not None and not console.no_color)
    if args.color != "auto":
        console = Console(
            highlight=False, force_terminal=coloured, color_system="standard" if coloured else None, no_color=not coloured
        )  # fmt: skip
    try:
        if args.rows < 1:
            raise MegamodError(f"--rows {args.rows}: at least 1 was expected")
        cfg = config.load(args.config, args.overrides)
        words = None if isinstance(cfg.data.train, SyntheticData) else vocabulary(cfg.data.chat.tokenizer or cfg.model.path)
        shown = page(cfg, args.step, args.rows, words or IDS, coloured=coloured)
    except MegamodError as error:
        print(f"megamod: error: {error}", file=sys.stderr)
        return 1
    console.print(shown, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
