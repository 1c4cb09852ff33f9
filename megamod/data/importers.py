"""Labelled sets of others, turned into rows that train and judge: a table, SETS, of files, columns and one function each.

    python tools/import_dataset.py davidson folder/of/davidson train.jsonl --split train

A set of your own is one more row of the table, in a file of yours that `--sets` names (or in a notebook, `SETS["forum"] = …`):

    from megamod.data.importers import BINARY, Record, Row, Source, judged

    def forum(record: Record) -> Row:
        return judged([record.text("comment")], record.one_of("toxic", BINARY), ["toxic"])

    SETS = {"forum": Source("Our forum", "own", "moderators, 2025", "en", {"train": ("forum.csv",)}, ("comment", "toxic"), forum)}

Files are CSV, TSV, JSON, JSONL (plain, .gz or .xz), text, and Parquet where pyarrow is installed. tools/DATASETS.md shows the table.
"""

import csv
import gzip
import json
import lzma
import os
import random
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megamod import foreign
from megamod.errors import MegamodError, listed, nearest
from megamod.files import replace_text
from megamod.verdicts import SEVERITIES, Severity

T = TypeVar("T")
Row = dict[str, Any]  # one line of the JSONL that is written
Member = Callable[[Path, str], Callable[["Record"], bool]]  # (folder, split) → whether a record is in that split

PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
LARGEST_LIST = 1 << 30  # characters
KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON may hold one, UTF-8 cannot


class Skip(Exception):
    """Raised by a set's row function: this record gives no row. Its text is the reason, counted and printed."""


class Record(dict[str, Any]):
    """One record of a file: its columns by name, and where it stands."""

    def __init__(self, columns: Mapping[str, Any], path: Path, number: int, line: int) -> None:
        super().__init__(columns)
        self.path = path
        self.number = number  # among the file's records, from 0
        self.where = f"{path}:{line}"

    def text(self, column: str) -> str:
        """The text of a column; a record without any is skipped."""
        value = self[column]
        if not isinstance(value, str | None):
            raise MegamodError(f"{self.where}: {column} = {reprlib.repr(value)}: a text was expected")
        if not value or value.isspace():
            raise Skip(f"no {column}")
        if SURROGATE.search(value):
            raise Skip(f"half a character in {column}")
        return value

    def one_of(self, column: str, meanings: Mapping[str, T]) -> T:
        """What the value of a column means; letter case does not matter. A record without a value is skipped."""
        value = self[column]
        if value is None or value == "":
            raise Skip(f"no {column}")
        for word, meaning in meanings.items():
            if word.lower() == str(value).lower():  # True, of Parquet and JSON, is "true" in CSV
                return meaning
        raise MegamodError(f"{self.where}: {column} = {reprlib.repr(value)}: one of {', '.join(meanings)} was expected")


@dataclass(frozen=True)
class Source:
    """A labelled set: where it is from, its files, and how a record of them becomes a row."""

    title: str
    licence: str
    origin: str
    language: str  # of the texts
    splits: Mapping[str, tuple[str, ...]]  # split → its files, relative to the set's folder
    columns: tuple[str, ...]  # those that `row` and `member` read: each record has them
    row: Callable[[Record], Row]
    rows: str = ""  # what `row` does, in words, for the page
    member: Member | None = None  # where splits share a file: which records are a split's
    unique: bool = False  # drop texts that repeat an earlier one, before the split
    apart: str | None = None  # a split whose texts the others must not repeat


@dataclass(frozen=True)
class Imported:
    """Rows of one split of a set, and why the others are not there."""

    rows: list[Row]
    found: int  # before `limit`
    skipped: Counter[str] = field(default_factory=Counter)  # reason → how many

    def summary(self) -> list[str]:
        """Lines for a person: rows, rows of each label, what was skipped."""
        labels = Counter(row.get("label", "without label") for row in self.rows)
        counts = " · ".join(f"{name} {labels[name]:,}" for name in (*SEVERITIES, "without label") if labels[name])
        lines = [f"{len(self.rows):,} rows: {counts}"]
        if self.found > len(self.rows):
            lines.append(f"chosen at random among {self.found:,}")
        return lines + [f"skipped {number:,}: {reason}" for reason, number in self.skipped.most_common()]


def import_dataset(
    name: str,
    folder: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    system: str | None = None,
    balance: float = 0.0,
    sets: Mapping[str, Source] | None = None,
) -> Imported:
    """Write one split of a set as JSONL, whole or not at all. The arguments are those of `read_dataset`."""
    found = read_dataset(name, folder, split=split, limit=limit, seed=seed, system=system, balance=balance, sets=sets)
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows))
    except (OSError, UnicodeEncodeError) as error:
        raise MegamodError(f"{path}: {getattr(error, 'strerror', None) or error}: a JSONL file that can be written was expected") from None
    return found


def read_dataset(
    name: str,
    folder: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    system: str | None = None,
    balance: float = 0.0,
    sets: Mapping[str, Source] | None = None,
) -> Imported:
    """The rows of one split of a set, in its files' order.

    Args:
        name: a row of the table.
        folder: where the set's files are.
        split: one of the set's; may be left out where it has one only.
        limit: keep this many rows, chosen at random. A larger limit with the same seed keeps those and more.
        seed: of that choice.
        system: a system message put before each conversation.
        balance: rows weigh (rows ÷ (labels · rows of their label))^balance: 0 alike, 1 so that labels weigh alike.
        sets: the table; None: SETS.

    Raises:
        MegamodError: no such set, split, file or column, or a value that the set does not have.
    """
    table = SETS if sets is None else sets
    if name not in table:
        raise MegamodError(f"no set {name!r}, {nearest(name, table)}")
    if limit is not None and limit < 1:
        raise MegamodError(f"limit = {limit}: at least 1 was expected")
    source, folder = table[name], Path(folder)
    if split is None:
        if len(source.splits) > 1:
            raise MegamodError(f"{name} has the splits {', '.join(source.splits)}: choose one with --split")
        (split,) = source.splits
    if split not in source.splits:
        raise MegamodError(f"{name} has no split {split!r}, {nearest(split, source.splits)}")
    if not folder.is_dir():
        raise MegamodError(f"{folder}: no such folder: one with {listed(source.splits[split])} was expected")

    skipped: Counter[str] = Counter()
    rows = list(_rows(source, folder, split, skipped))
    if source.apart not in (None, split):
        elsewhere = {_key(row) for row in _rows(source, folder, source.apart, Counter())}
        kept = [row for row in rows if _key(row) not in elsewhere]
        skipped[f"text is in {source.apart}"] += len(rows) - len(kept)
        rows = kept
    if not rows:
        raise MegamodError(f"{folder}: no rows of {name}'s split {split}; skipped: {dict(+skipped) or 'none'}")
    found = len(rows)
    if limit is not None:
        draw = random.Random(seed)  # random() alone is promised to be the same in every version of Python
        chosen = sorted(range(found), key=[draw.random() for _ in rows].__getitem__)[:limit]
        rows = [rows[i] for i in sorted(chosen)]
    for row in rows:
        if system is not None:
            row["messages" if "messages" in row else "prompt"].insert(0, {"role": "system", "content": system})
    if balance:
        labels = Counter(row.get("label") for row in rows)
        if None in labels:
            raise MegamodError(f"balance = {balance}: rows of {name} have no label to weigh them by")
        for row in rows:
            row["weight"] = round((len(rows) / (len(labels) * labels[row["label"]])) ** balance, 4)
    return Imported(rows, found, +skipped)


def table(sets: Mapping[str, Source] | None = None) -> list[str]:
    """The table of sets in Markdown, as tools/DATASETS.md has it."""
    lines = ["| name | set, licence, source | files of a split | columns | rows |", "|---|---|---|---|---|"]
    for name, source in (SETS if sets is None else sets).items():
        files = "<br>".join(f"{split}: {', '.join(f'`{file}`' for file in files)}" for split, files in source.splits.items())
        about = f"{source.title} ({source.language}). {source.licence}. {source.origin}"
        lines.append(f"| `{name}` | {about} | {files} | {', '.join(f'`{c}`' for c in source.columns)} | {source.rows} |")
    return lines


# --- what row functions are made of ----------------------------------------------------------------------------------------

BINARY: dict[str, Severity] = {"0": "safe", "1": "unsafe"}
SAME: dict[str, Severity] = {"safe": "safe", "unsafe": "unsafe"}


def judged(turns: Iterable[str], label: Severity, categories: Iterable[str] = (), **more: Any) -> Row:
    """A row with a verdict. `turns`: user, assistant, user, …; what is safe has no categories.

    `more`: id, reason, refusal, request (the severity of the prompt whose response is judged), kind (for tables of slices).
    """
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages, "label": label, "categories": [] if label == "safe" else list(categories), **more}


def by_column(column: str) -> Member:
    """A column holds the split's name."""
    return lambda folder, split: lambda record: record[column] == split


def by_number(file: str, key: str, split: str) -> Member:
    """A JSON file lists, under `key`, the numbers of the records that are in `split`; all others are in the other one."""

    def member(folder: Path, wanted: str) -> Callable[[Record], bool]:
        path = folder / file
        try:
            numbers = set(foreign.read_json(path)[key])
        except OSError as error:
            raise MegamodError(f"{path}: {error.strerror}: the JSON file of the split was expected") from None
        except (ValueError, KeyError, TypeError):
            raise MegamodError(f"{path}: a JSON object with a list of row numbers under {key!r} was expected") from None
        return lambda record: (record.number in numbers) == (wanted == split)

    return member


# --- the sets --------------------------------------------------------------------------------------------------------------


Judgement = tuple[Severity, tuple[str, ...]]
HATE: Judgement = ("unsafe", ("hate speech",))
OFFENSIVE: Judgement = ("controversial", ("offensive language",))
HARMLESS: Judgement = ("safe", ())


def _davidson(record: Record) -> Row:
    return judged([record.text("tweet")], *record.one_of("class", {"0": HATE, "1": OFFENSIVE, "2": HARMLESS}))


def _cold(record: Record) -> Row:
    row = judged([record.text("TEXT")], record.one_of("label", BINARY), [record.text("topic")])
    fine = {"0": "plain", "1": "attack individual", "2": "attack group", "3": "anti-bias"}
    return row | ({"kind": record.one_of("fine-grained-label", fine)} if "fine-grained-label" in record else {})


def _edos(record: Record) -> Row:
    label: Severity = record.one_of("label_sexist", {"not sexist": "safe", "sexist": "unsafe"})
    names = {  # the paper's; the file's have commas, which separate categories in verdicts
        "none": "none",
        "1. threats, plans to harm and incitement": "threats",
        "2. derogation": "derogation",
        "3. animosity": "animosity",
        "4. prejudiced discussions": "prejudiced discussion",
    }
    row = judged([record.text("text")], label, [record.one_of("label_category", names)], id=record.text("rewire_id"))
    vector = record.text("label_vector").lstrip("0123456789. ")
    return row | ({} if label == "safe" else {"reason": vector})


def _hh(record: Record) -> Row:
    chosen, rejected = (_dialogue(record.text(side)) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Skip("chosen and rejected differ before their last turn")
    if chosen == rejected:
        raise Skip("chosen and rejected are the same")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _dialogue(text: str) -> list[dict[str, str]]:
    """Anthropic's `\\n\\nHuman: …\\n\\nAssistant: …` as messages."""
    first, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    if first.strip() or roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise Skip("turns do not alternate")
    turns = [turn.strip() for turn in parts[1::2]]
    if not all(turns):
        raise Skip("an empty turn")
    return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]


def _winogender(record: Record) -> Row:
    name = record.text("sentid").removesuffix(".txt")
    gender = name.rpartition(".")[2]
    return judged([record.text("sentence")], "safe", id=name, kind=gender)


def _winobias(record: Record) -> Row:
    number, _, marked = record.text("line").partition(" ")
    gender = {"he": "male", "him": "male", "his": "male", "she": "female", "her": "female", "hers": "female"}
    pronouns = [gender[word] for word in re.findall(r"\[(\w+)\]", marked.lower()) if word in gender]
    side, _, rest = record.path.name.partition("_stereotyped_")
    if not number.isdecimal() or not pronouns:
        raise MegamodError(f"{record.where}: a number and a sentence with a pronoun in brackets were expected")
    return judged([re.sub(r"[\[\]]", "", marked)], "safe", id=f"{rest.replace('.txt', '')}.{number}.{side}", kind=f"{side} {pronouns[0]}")


def _madlibs(record: Record) -> Row:
    label: Severity = record.one_of("Label", {"BAD": "unsafe", "NOT_BAD": "safe"})
    return judged([record.text("Text")], label, kind=record["Template"])


def _madlibs_zh(record: Record) -> Row:
    label: Severity = record.one_of("toxicity", {"toxic": "unsafe", "nontoxic": "safe"})
    return judged([record.text("phrase")], label, kind=record["template"])


def _toxicchat(record: Record) -> Row:
    jailbreak = record.one_of("jailbreaking", {"0": False, "1": True})
    categories = ["toxic", "jailbreak"] if jailbreak else ["toxic"]
    row = judged([record.text("user_input")], record.one_of("toxicity", BINARY), categories, id=record.text("conv_id"))
    return row | {"kind": "jailbreak" if jailbreak else "plain"}


OPENAI = {
    "S": "sexual", "H": "hate", "V": "violence", "HR": "harassment", "SH": "self-harm",
    "S3": "sexual/minors", "H2": "hate/threatening", "V2": "violence/graphic",
}  # fmt: skip


def _openai(record: Record) -> Row:
    # A flag that is left out is not known: a text is safe when all that is known of it is.
    flags = {name: record.one_of(flag, {"0": False, "1": True}) for flag, name in OPENAI.items() if record.get(flag) is not None}
    if not flags:
        raise Skip("no flag")
    return judged([record.text("prompt")], "unsafe" if any(flags.values()) else "safe", [name for name, on in flags.items() if on])


def _beavertails(record: Record) -> Row:
    flags = record["category"]
    if not isinstance(flags, dict):
        raise MegamodError(f"{record.where}: category = {reprlib.repr(flags)}: an object of booleans by name was expected")
    categories = [name.replace("_", " ").replace(",", "/") for name, on in flags.items() if on]  # a comma separates categories
    label: Severity = record.one_of("is_safe", {"true": "safe", "false": "unsafe"})
    return judged([record.text("prompt"), record.text("response")], label, categories)


HARM: dict[str, Severity] = {"unharmful": "safe", "harmful": "unsafe"}


def _wildguard_prompts(record: Record) -> Row:
    kind = record.one_of("adversarial", {"true": "adversarial", "false": "vanilla"})
    return judged([record.text("prompt")], record.one_of("prompt_harm_label", HARM), [_category(record, "subcategory")], kind=kind)


def _wildguard_responses(record: Record) -> Row:
    label = record.one_of("response_harm_label", HARM)
    kind = record.one_of("adversarial", {"true": "adversarial", "false": "vanilla"})
    row = judged([record.text("prompt"), record.text("response")], label, [_category(record, "subcategory")], kind=kind)
    if record["response_refusal_label"]:
        row["refusal"] = record.one_of("response_refusal_label", {"refusal": True, "compliance": False})
    if record["prompt_harm_label"]:
        row["request"] = record.one_of("prompt_harm_label", HARM)
    return row


def _category(record: Record, column: str) -> str:
    return record.text(column).replace("_", " ").replace(",", "/")  # a comma separates categories


def _aegis2(record: Record, turns: list[str], label: Severity) -> Row:
    if turns[0] == "REDACTED":
        raise Skip("redacted: the text is in another set")
    names = (name.strip() for name in (record["violated_categories"] or "").split(","))
    return judged(turns, label, [name for name in names if name], id=record.text("id"))


def _aegis2_prompts(record: Record) -> Row:
    return _aegis2(record, [record.text("prompt")], record.one_of("prompt_label", SAME))


def _aegis2_responses(record: Record) -> Row:
    row = _aegis2(record, [record.text("prompt"), record.text("response")], record.one_of("response_label", SAME))
    return row | {"request": record.one_of("prompt_label", SAME)}


def _xstest(record: Record) -> Row:
    return judged([record.text("prompt")], record.one_of("label", SAME), kind=record.text("type"))


def _toxicn(record: Record) -> Row:
    judgement = record.one_of("toxic_type", {"0": HARMLESS, "1": OFFENSIVE, "2": HATE})
    return judged([record.text("content")], *judgement, kind=record.text("topic"))


JIGSAW = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")


def _jigsaw(record: Record) -> Row:
    on = [name.replace("_", " ") for name in JIGSAW if record.one_of(name, {"0": False, "1": True})]
    return judged([record.text("comment_text")], "unsafe" if on else "safe", on, id=record.text("id"))


AEGIS2 = "huggingface.co/datasets/nvidia/Aegis-AI-Content-Safety-Dataset-2.0"
WILDGUARD = {"train": ("train/wildguard_train.parquet",), "test": ("test/wildguard_test.parquet",)}

SETS: dict[str, Source] = {
    "davidson": Source(
        "Davidson et al. 2017, tweets", "MIT", "github.com/t-davidson/hate-speech-and-offensive-language", "en",
        {"train": ("labeled_data.csv",), "test": ("labeled_data.csv",)}, ("class", "tweet"), _davidson,
        "class 0 hate speech → unsafe, 1 offensive language → controversial, 2 → safe; id: row number; "
        "test: the row numbers in `split_seed0.json`, train: all others; repeated texts dropped",
        member=by_number("split_seed0.json", "test_row_index_in_file_order", "test"), unique=True,
    ),
    "cold": Source(
        "COLD, Chinese offensive language", "Apache-2.0", "github.com/thu-coai/COLDataset", "zh",
        {"train": ("train.csv", "dev.csv"), "test": ("test.csv",)}, ("topic", "label", "TEXT"), _cold,
        "label 1 → unsafe, 0 → safe; category: topic; kind: the test's fine label (plain, attack individual, attack group, anti-bias); "
        "train: without the texts that the test repeats",
        apart="test",
    ),
    "edos": Source(
        "EDOS, online sexism", "CC0-1.0", "github.com/rewire-online/edos", "en",
        dict.fromkeys(("train", "dev", "test"), ("edos_labelled_aggregated.csv",)),
        ("rewire_id", "text", "label_sexist", "label_category", "label_vector", "split"), _edos,
        "sexist → unsafe, not sexist → safe; category: one of four; reason: the vector, one of eleven; split by its column",
        member=by_column("split"),
    ),
    "hh_rlhf_harmless_test": Source(
        "Anthropic HH-RLHF, harmless-base, test", "MIT", "github.com/anthropics/hh-rlhf", "en",
        {"test": ("test.jsonl.gz",)}, ("chosen", "rejected"), _hh,
        "pairs: `prompt`, `chosen` and `rejected` are lists of messages; no label; skipped: dialogues that differ before their last turn "
        "or whose turns do not alternate, answers that are empty or the same",
    ),
    "winogender": Source(
        "Winogender schemas", "MIT", "github.com/rudinger/winogender-schemas", "en",
        {"test": ("all_sentences.tsv",)}, ("sentid", "sentence"), _winogender,
        "every sentence is safe: a flag is a false alarm; kind: gender of the pronoun; id: occupation.participant.answer.gender",
    ),
    "winobias": Source(
        "WinoBias", "MIT", "github.com/uclanlp/corefBias", "en",
        {split: tuple(f"{side}_stereotyped_type{n}.txt.{split}" for n in (1, 2) for side in ("pro", "anti")) for split in ("dev", "test")},
        ("line",), _winobias,
        "every sentence is safe: a flag is a false alarm; brackets removed; kind: pro or anti stereotype, and gender of the pronoun; "
        "id: the same but for its last part in both of a pair",
    ),
    "jigsaw_madlibs": Source(
        "Jigsaw's identity templates, English", "CC-BY-4.0", "github.com/conversationai/unintended-ml-bias-analysis", "en",
        {"test": ("bias_madlibs_77k.csv",)}, ("Text", "Label", "Template"), _madlibs,
        "BAD → unsafe, NOT_BAD → safe; kind: the template",
    ),
    "jigsaw_madlibs_zh": Source(
        "Jigsaw's identity templates, Chinese", "CC-BY-4.0", "github.com/conversationai/unintended-ml-bias-analysis", "zh",
        {"test": ("zh-cn_sentence_templates.csv",)}, ("template", "toxicity", "phrase"), _madlibs_zh,
        "toxic → unsafe, nontoxic → safe; kind: the template",
    ),
    "toxicchat": Source(
        "ToxicChat, prompts to a chatbot", "CC-BY-NC-4.0", "huggingface.co/datasets/lmsys/toxic-chat, folder data/0124", "en",
        {split: (f"toxic-chat_annotation_{split}.csv",) for split in ("train", "test")},
        ("conv_id", "user_input", "toxicity", "jailbreaking"), _toxicchat,
        "toxicity 1 → unsafe, 0 → safe; category: toxic, and jailbreak; kind: jailbreak or plain",
    ),
    "openai_moderation": Source(
        "OpenAI's moderation evaluation set", "MIT", "github.com/openai/moderation-api-release, folder data", "en",
        {"test": ("samples-1680.jsonl.gz",)}, ("prompt",), _openai,
        "any of the flags `S` `H` `V` `HR` `SH` `S3` `H2` `V2` is 1 → unsafe, with their names as categories; else safe; "
        "a flag may be left out",
    ),
    "beavertails": Source(
        "BeaverTails, responses", "CC-BY-NC-4.0", "huggingface.co/datasets/PKU-Alignment/BeaverTails, folder round0/30k", "en",
        {split: (f"{split}.jsonl.gz",) for split in ("train", "test")}, ("prompt", "response", "category", "is_safe"), _beavertails,
        "is_safe false → unsafe, true → safe; categories: those of `category` that are true; the response is judged",
    ),
    "wildguardmix_prompts": Source(
        "WildGuardMix, prompts", "ODC-BY", "huggingface.co/datasets/allenai/wildguardmix", "en",
        WILDGUARD, ("prompt", "prompt_harm_label", "subcategory", "adversarial"), _wildguard_prompts,
        "harmful → unsafe, unharmful → safe; category: subcategory; kind: adversarial or vanilla; a prompt once",
        unique=True,
    ),
    "wildguardmix_responses": Source(
        "WildGuardMix, responses", "ODC-BY", "huggingface.co/datasets/allenai/wildguardmix", "en", WILDGUARD,
        ("prompt", "response", "prompt_harm_label", "response_harm_label", "response_refusal_label", "subcategory", "adversarial"),
        _wildguard_responses,
        "as wildguardmix_prompts, of the response; request: the prompt's label; refusal: refusal or compliance; "
        "records without a response are skipped",
    ),
    "aegis2_prompts": Source(
        "Aegis 2.0 (Nemotron Content Safety V2), prompts", "CC-BY-4.0", AEGIS2,
        "en", {split: (f"{split}.json",) for split in ("train", "validation", "test")},
        ("id", "prompt", "prompt_label", "violated_categories"), _aegis2_prompts,
        "unsafe and safe as they are; categories: of the whole dialogue; redacted prompts are skipped",
    ),
    "aegis2_responses": Source(
        "Aegis 2.0 (Nemotron Content Safety V2), responses", "CC-BY-4.0",
        AEGIS2, "en",
        {"train": ("train.json", "refusals_train.json"), "validation": ("validation.json", "refusals_validation.json"),
         "test": ("test.json",)},
        ("id", "prompt", "response", "prompt_label", "response_label", "violated_categories"), _aegis2_responses,
        "as aegis2_prompts, of the response; request: the prompt's label; records without a response are skipped",
    ),
    "xstest": Source(
        "XSTest, exaggerated safety", "CC-BY-4.0", "github.com/paul-rottger/xstest", "en",
        {"test": ("xstest_prompts.csv",)}, ("prompt", "type", "label"), _xstest,
        "safe and unsafe as they are; kind: type",
    ),
    "toxicn": Source(
        "ToxiCN, Chinese toxic language", "CC-BY-NC-ND-4.0", "github.com/DUT-lujunyu/ToxiCN", "zh",
        {"all": ("ToxiCN_1.0.csv",)}, ("topic", "content", "toxic_type"), _toxicn,
        "toxic_type 0 → safe, 1 offensive language → controversial, 2 hate speech → unsafe; kind: topic",
    ),
    "jigsaw_toxic": Source(
        "Jigsaw's toxic comments of Wikipedia", "CC0-1.0, the comments CC-BY-SA-3.0",
        "kaggle.com/c/jigsaw-toxic-comment-classification-challenge", "en",
        {"train": ("train.csv",)}, ("id", "comment_text", *JIGSAW), _jigsaw,
        "any flag 1 → unsafe, with their names as categories; else safe",
    ),
}  # fmt: skip


# --- records and rows ------------------------------------------------------------------------------------------------------


def _rows(source: Source, folder: Path, split: str, skipped: Counter[str]) -> Iterator[Row]:
    """Every row of a split, repeated texts dropped where the set says so."""
    belongs = source.member(folder, split) if source.member else lambda record: True
    alone = len({file for files in source.splits.values() for file in files}) == 1
    seen: set[str] = set()
    for name in source.splits[split]:
        path = _find(folder, name)
        for record in records(path):
            missing = [column for column in source.columns if column not in record]
            if missing:
                there = f"it has {listed(record)}" if record else "it has none"
                raise MegamodError(f"{record.where}: no column {', '.join(missing)}: {there}")
            row: Row | None = None
            reason = "repeats an earlier text"
            try:
                row = source.row(record)
            except Skip as skip:
                reason = str(skip)
            if row is not None and source.unique:
                key = _key(row)
                if key in seen:
                    row = None
                seen.add(key)
            if not belongs(record):
                continue
            if row is None:
                skipped[reason] += 1
            else:
                number = record.number if alone else f"{_stem(path.name)}-{record.number}"
                yield {"id": number, **row, "language": source.language}


def _key(row: Row) -> str:
    """Equal for rows whose texts are equal but for white space."""
    messages = row["messages"] if "messages" in row else row["prompt"] + row["chosen"] + row["rejected"]
    return "\0".join("".join(message["content"].split()) for message in messages)


def _stem(name: str) -> str:
    """A file's name without the suffixes that say how it is written: `ToxiCN_1.0.csv.gz` → `ToxiCN_1.0`."""
    for suffixes in (PACKED, KINDS):
        for suffix in suffixes:
            name = name.removesuffix(suffix)
    return name


def _find(folder: Path, name: str) -> Path:
    """The file `name` of a set, or the same written in another way: `train.csv` or `train.jsonl` for `train.jsonl.gz`."""
    path = folder / name
    if path.is_file():
        return path
    stem = _stem(path.name)
    others = [path.with_name(stem + kind + packed) for kind in KINDS for packed in ("", *PACKED)] if stem != path.name else []
    there = [other for other in others if other.is_file()]
    if len(there) > 1:
        raise MegamodError(f"{path}: no such file, and more than one that may stand for it: {listed(p.name for p in there)}")
    if not there:
        hint = f" (or {stem} with {', '.join(KINDS)})" if others else ""
        raise MegamodError(f"{path}: no such file: the set's {name} was expected{hint}")
    return there[0]


def records(path: Path) -> Iterator[Record]:
    """The records of a file, by its suffix: CSV and TSV with a header, JSON, JSONL, Parquet; any other is text, a `line` each."""
    kind = Path(path.name.removesuffix(".gz").removesuffix(".xz")).suffix
    reader = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}.get(kind, _text)
    number = 0
    try:
        for line, columns in reader(path):
            yield Record(columns, path, number, line)
            number += 1
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise MegamodError(f"{path}: {getattr(error, 'strerror', None) or error}: a whole file that can be read was expected") from None
    if not number:
        raise MegamodError(f"{path}:1: no records: a file of the set was expected")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad one can be named."""
    opener: Callable[..., Any] = PACKED.get(path.suffix, open)
    with opener(path, "rb") as file:
        for number, line in foreign.lines(file, path):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise MegamodError(f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8: save the file in UTF-8") from None


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader((line for _, line in _lines(path)), delimiter="\t" if ".tsv" in path.suffixes else ",")
    start = 1
    try:
        header = next(reader, [])
        start = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):  # an empty line is no record
                raise MegamodError(f"{path}:{start}: {len(values)} columns: {len(header)} were expected, as in the header")
            if values:
                yield start, dict(zip(header, values, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise MegamodError(f"{path}:{start}: not CSV, {error}") from None


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if line.strip():
            value = _parsed(line.rstrip(), path, number)
            if not isinstance(value, dict):
                raise MegamodError(f"{path}:{number}: {reprlib.repr(value)}: an object, one a line, was expected")
            yield number, value


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A list of objects; or one object a line, as some tools name .json too."""
    parts, size = [], 0
    for _, line in _lines(path):
        parts.append(line)
        size += len(line)
        if size > LARGEST_LIST:  # a packed file may hold a thousand times what it takes on the disk
            raise MegamodError(f"{path}: a list of more than {LARGEST_LIST:,} characters: write one object a line")
    text = "".join(parts)
    if not text.lstrip().startswith("["):
        yield from _jsonl(path)
        return
    for number, item in enumerate(_parsed(text, path, 1), 1):
        if not isinstance(item, dict):
            raise MegamodError(f"{path}: entry {number} is {reprlib.repr(item)}: a list of objects was expected")
        yield number, item


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MegamodError(
            f"{path}: reading Parquet needs pyarrow: pip install pyarrow, or convert it where pandas is: "
            f"pandas.read_parquet('{path.name}').to_json('{_stem(path.name)}.jsonl', orient='records', lines=True, force_ascii=False)"
        ) from None
    try:
        yield from enumerate(pyarrow.parquet.read_table(os.fspath(path)).to_pylist(), 1)
    except pyarrow.ArrowException as error:
        raise MegamodError(f"{path}: not Parquet, {error}") from None


def _text(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if line.strip():
            yield number, {"line": line.rstrip("\r\n")}


def _parsed(text: str, path: Path, line: int) -> Any:
    """The JSON value that begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MegamodError(f"{path}:{line + error.lineno - 1}: not JSON, {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise MegamodError(f"{path}:{line}: not JSON that can be read, {error}") from None
