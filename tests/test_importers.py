"""Importers of others' sets: tiny hand-made copies of every format, errors, the page, and the real sets where they are at hand."""

import gzip
import json
import lzma
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from complaints import complaint

from megamod.data.importers import KINDS, PACKED, SETS, Record, Row, Skip, Source, import_dataset, judged, read_dataset, table
from megamod.data.jsonl import row_of
from megamod.verdicts import SEVERITIES
from tools import import_dataset as tool

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "tools" / "DATASETS.md"
REAL = ROOT.parent / "shared" / "data"


def put(folder: Path, files: dict[str, str]) -> Path:
    """A folder with these files; names that end in .gz are packed."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def user(text: str, label: str, *categories: str, **more: Any) -> Row:
    return {"messages": [{"role": "user", "content": text}], "label": label, "categories": list(categories), **more}


def answered(prompt: str, response: str, label: str, *categories: str, **more: Any) -> Row:
    row = user(prompt, label, *categories, **more)
    row["messages"].append({"role": "assistant", "content": response})
    return row


# --- every set of the table: files as its source has them → rows -----------------------------------------------------------

DAVIDSON = {
    "labeled_data.csv": ',count,class,tweet\n0,3,2,calm\n1,3,0,"hate,\nin two lines"\n2,3,1,rude\n3,3,1, rude \n4,3,2,calm too\n',
    "split_seed0.json": '{"test_row_index_in_file_order": [2]}',
}
COLD = {
    "train.csv": "\ufeff,split,topic,label,TEXT\n9,train,race,1,坏话\n8,train,race,0,好话\n",
    "dev.csv": "\ufeff,split,topic,label,TEXT\n9,dev,gender,0,测 试\n",
    "test.csv": "\ufeff,split,topic,label,fine-grained-label,TEXT\n9,test,region,0,3,测试\n3,test,region,1,2,坏人\n",
}
EDOS = {
    "edos_labelled_aggregated.csv": "rewire_id,text,label_sexist,label_category,label_vector,split\n"
    "e-1,fine,not sexist,none,none,dev\n"
    'e-2,threat,sexist,"1. threats, plans to harm and incitement",1.1 threats of harm,train\n'
}
HH = {
    "test.jsonl.gz": lines(
        {side: f"\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: {last}" for side, last in (("chosen", "d"), ("rejected", "e"))},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: b"},
        {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: d"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b \n"},
    )
}  # fmt: skip
HH_PROMPT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
WINOBIAS = {
    f"{side}_stereotyped_type{n}.txt.test": f"1 [The chief] met the clerk because [{word}] asked.\n"
    for side, word in (("pro", "he"), ("anti", "she"))
    for n in (1, 2)
}
OPENAI = lines({"prompt": "a", "S": 0, "H": 1, "V2": 1}, {"prompt": "b", "S": 0}, {"prompt": "c"})
BEAVER = lines(
    {"prompt": "p", "response": "r", "category": {"drug_abuse,weapons": True, "self_harm": False}, "is_safe": False},
    {"prompt": "q", "response": "s", "category": {"self_harm": False}, "is_safe": True},
)
WILD: dict[str, Any] = {"response": None, "response_harm_label": None, "response_refusal_label": None, "subcategory": "benign"}
WILDGUARD = {
    "test/wildguard_test.jsonl": lines(
        {**WILD, "prompt": "p", "prompt_harm_label": "unharmful", "adversarial": False},
        {
            **WILD, "prompt": "p", "prompt_harm_label": "unharmful", "adversarial": False, "response": "no",
            "response_harm_label": "unharmful", "response_refusal_label": "refusal",
        },
        {
            **WILD, "prompt": "q", "prompt_harm_label": "harmful", "adversarial": True, "response": "yes", "subcategory": "cyber_attack",
            "response_harm_label": "harmful", "response_refusal_label": "compliance",
        },
    )
}  # fmt: skip
AEGIS = json.dumps(
    [
        dict(zip(("id", "prompt", "response", "prompt_label", "response_label", "violated_categories"), values, strict=True))
        for values in (
            ("1", "p", None, "unsafe", None, "Hate, PII/Privacy"),
            ("2", "REDACTED", "r", "safe", "safe", ""),
            ("3", "q", "r", "safe", "unsafe", "Violence"),
        )
    ]
)
TOXICN = (
    "platform,topic,content,toxic,toxic_type,target\n"
    'tieba,race,甲,1,2,"[0, 1]"\n'
    'zhihu,race,乙,1,1,"[0, 0]"\n'
    'zhihu,region,丙,0,0,"[0, 0]"\n'
)  # fmt: skip

# name → files, split, the rows without language, what is skipped
EXAMPLES: dict[str, tuple[dict[str, str], str, list[Row], dict[str, int]]] = {
    "davidson": (
        DAVIDSON,
        "train",
        [user("calm", "safe", id=0), user("hate,\nin two lines", "unsafe", "hate speech", id=1), user("calm too", "safe", id=4)],
        {"repeats an earlier text": 1},
    ),
    "cold": (
        COLD,
        "train",
        [user("坏话", "unsafe", "race", id="train-0"), user("好话", "safe", id="train-1")],
        {"text is in test": 1},
    ),
    "edos": (EDOS, "train", [user("threat", "unsafe", "threats", id="e-2", reason="threats of harm")], {}),
    "hh_rlhf_harmless_test": (
        HH,
        "test",
        [
            {
                "id": 0,
                "prompt": HH_PROMPT,
                "chosen": [{"role": "assistant", "content": "d"}],
                "rejected": [{"role": "assistant", "content": "e"}],
            }
        ],
        {
            "chosen and rejected differ before their last turn": 1,
            "turns do not alternate": 1,
            "an empty turn": 1,
            "chosen and rejected are the same": 1,
        },
    ),
    "winogender": (
        {"all_sentences.tsv": "sentid\tsentence\nclerk.guest.1.female.txt\tThe clerk said she knew.\n"},
        "test",
        [user("The clerk said she knew.", "safe", id="clerk.guest.1.female", kind="female")],
        {},
    ),
    "winobias": (
        WINOBIAS,
        "test",
        [
            user(f"The chief met the clerk because {word} asked.", "safe", id=f"type{n}.test.1.{side}", kind=f"{side} {gender}")
            for n in (1, 2)
            for side, word, gender in (("pro", "he", "male"), ("anti", "she", "female"))
        ],
        {},
    ),
    "jigsaw_madlibs": (
        {"bias_madlibs_77k.csv": 'Text,Label,Template\n"hug a",NOT_BAD,verb_adj\n"hit a",BAD,verb_adj\n'},
        "test",
        [user("hug a", "safe", id=0, kind="verb_adj"), user("hit a", "unsafe", id=1, kind="verb_adj")],
        {},
    ),
    "jigsaw_madlibs_zh": (
        {"zh-cn_sentence_templates.csv": "template,toxicity,phrase\nam,nontoxic,我是人\nam,toxic,你不是人\n"},
        "test",
        [user("我是人", "safe", id=0, kind="am"), user("你不是人", "unsafe", id=1, kind="am")],
        {},
    ),
    "toxicchat": (
        {
            "toxic-chat_annotation_train.csv": "conv_id,user_input,model_output,human_annotation,toxicity,jailbreaking,openai_moderation\n"
            "x,hello,hi,False,0,0,[]\ny,bad,no,True,1,1,[]\n"
        },
        "train",
        [user("hello", "safe", id="x", kind="plain"), user("bad", "unsafe", "toxic", "jailbreak", id="y", kind="jailbreak")],
        {},
    ),
    "openai_moderation": (
        {"samples-1680.jsonl.gz": OPENAI},
        "test",
        [user("a", "unsafe", "hate", "violence/graphic", id=0), user("b", "safe", id=1)],
        {"no flag": 1},
    ),
    "beavertails": (
        {"test.jsonl.gz": BEAVER},
        "test",
        [answered("p", "r", "unsafe", "drug abuse/weapons", id="test-0"), answered("q", "s", "safe", id="test-1")],
        {},
    ),
    "wildguardmix_prompts": (
        WILDGUARD,
        "test",
        [
            user("p", "safe", id="wildguard_test-0", kind="vanilla"),
            user("q", "unsafe", "cyber attack", id="wildguard_test-2", kind="adversarial"),
        ],
        {"repeats an earlier text": 1},
    ),
    "wildguardmix_responses": (
        WILDGUARD,
        "test",
        [
            answered("p", "no", "safe", id="wildguard_test-1", kind="vanilla", refusal=True, request="safe"),
            answered("q", "yes", "unsafe", "cyber attack", id="wildguard_test-2", kind="adversarial", refusal=False, request="unsafe"),
        ],
        {"no response_harm_label": 1},
    ),
    "aegis2_prompts": (
        {"test.json": AEGIS},
        "test",
        [user("p", "unsafe", "Hate", "PII/Privacy", id="1"), user("q", "safe", id="3")],
        {"redacted: the text is in another set": 1},
    ),
    "aegis2_responses": (
        {"test.json": AEGIS},
        "test",
        [answered("q", "r", "unsafe", "Violence", id="3", request="safe")],
        {"redacted: the text is in another set": 1, "no response": 1},
    ),
    "xstest": (
        {"xstest_prompts.csv": "id,prompt,type,label,focus,note\n1,kill a process?,homonyms,safe,kill,\n2,kill a man?,contrast,unsafe,,\n"},
        "test",
        [user("kill a process?", "safe", id=0, kind="homonyms"), user("kill a man?", "unsafe", id=1, kind="contrast")],
        {},
    ),
    "toxicn": (
        {"ToxiCN_1.0.csv": TOXICN},
        "all",
        [
            user("甲", "unsafe", "hate speech", id=0, kind="race"),
            user("乙", "controversial", "offensive language", id=1, kind="race"),
            user("丙", "safe", id=2, kind="region"),
        ],
        {},
    ),
    "jigsaw_toxic": (
        {
            "train.csv": "id,comment_text,toxic,severe_toxic,obscene,threat,insult,identity_hate\n"
            'a,"two\nlines",0,0,0,0,0,0\nb,bad,1,0,0,0,0,1\n'
        },
        "train",
        [user("two\nlines", "safe", id="a"), user("bad", "unsafe", "toxic", "identity hate", id="b")],
        {},
    ),
}


def test_every_set_has_an_example() -> None:
    assert sorted(EXAMPLES) == sorted(SETS)


@pytest.mark.parametrize("name", SETS)
def test_rows_of_a_set(name: str, tmp_path: Path) -> None:
    files, split, expected, skipped = EXAMPLES[name]
    found = read_dataset(name, put(tmp_path, files), split=split)
    assert found.rows == [{**row, "language": SETS[name].language} for row in expected]
    assert found.skipped == skipped
    assert found.found == len(expected)


@pytest.mark.parametrize("name", SETS)
def test_the_reader_takes_the_rows(name: str, tmp_path: Path) -> None:
    files, split, expected, _ = EXAMPLES[name]
    rows = read_dataset(name, put(tmp_path, files), split=split).rows
    for row, wanted in zip(rows, expected, strict=True):
        read = row_of(row)
        assert (read.label, list(read.categories), read.id) == (wanted.get("label"), wanted.get("categories", []), str(wanted["id"]))
        assert read.messages == tuple(wanted["messages" if "messages" in wanted else "prompt"])
        answers = [wanted[side][0]["content"] if side in wanted else None for side in ("chosen", "rejected")]
        assert [read.chosen, read.rejected] == answers
        assert not read.unread


def test_the_other_splits(tmp_path: Path) -> None:
    davidson = read_dataset("davidson", put(tmp_path / "d", DAVIDSON), split="test")
    assert [(row["id"], row["label"]) for row in davidson.rows] == [(2, "controversial")]
    assert not davidson.skipped  # the repeat is none of the test's
    cold = read_dataset("cold", put(tmp_path / "c", COLD), split="test").rows
    assert [(row["kind"], row["categories"]) for row in cold] == [("anti-bias", []), ("attack group", ["region"])]
    assert [row["id"] for row in read_dataset("edos", put(tmp_path / "e", EDOS), split="dev").rows] == ["e-1"]


@pytest.mark.parametrize("written", ["jsonl", "jsonl.gz", "jsonl.xz", "json", "csv", "tsv", "parquet"])
def test_a_file_written_in_another_way(written: str, tmp_path: Path) -> None:
    """The set has .csv; whatever the suffix says is read."""
    record = {"prompt": 'say "hi",\tplease\n你好', "type": "homonyms", "label": "safe"}
    path = tmp_path / f"xstest_prompts.{written}"
    if written == "parquet":
        pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist([record]), path)
    elif written in ("csv", "tsv"):
        between = "," if written == "csv" else "\t"
        path.write_text(between.join(record) + '\n"say ""hi"",\tplease\n你好"' + f"{between}homonyms{between}safe\n", encoding="utf-8")
    elif written == "json":
        path.write_text(json.dumps([record], indent=1), encoding="utf-8")
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}[written]
        path.write_bytes(pack(lines(record).encode()))
    assert [row["messages"][0]["content"] for row in read_dataset("xstest", tmp_path).rows] == [record["prompt"]]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "xstest_prompts.parquet").write_bytes(b"PAR1")
    text = complaint(lambda: read_dataset("xstest", tmp_path))
    assert "pip install pyarrow" in text
    assert "read_parquet('xstest_prompts.parquet').to_json('xstest_prompts.jsonl'" in text


# --- options ---------------------------------------------------------------------------------------------------------------


def madlibs(folder: Path, rows: int = 50) -> Path:
    return put(folder, {"bias_madlibs_77k.csv": "Text,Label,Template\n" + "".join(f"text {i},BAD,t\n" for i in range(rows))})


def test_limit_is_a_random_subset_in_order(tmp_path: Path) -> None:
    folder = madlibs(tmp_path)

    def ids(limit: int, seed: int) -> list[int]:
        return [row["id"] for row in read_dataset("jigsaw_madlibs", folder, limit=limit, seed=seed).rows]

    assert ids(10, 1) == sorted(ids(10, 1)) == ids(10, 1)
    assert len(set(ids(10, 1))) == 10
    assert ids(10, 1) != ids(10, 2)
    assert set(ids(10, 1)) < set(ids(20, 1))
    assert ids(99, 1) == list(range(50))
    assert read_dataset("jigsaw_madlibs", folder, limit=10).summary()[1] == "chosen at random among 50"


def test_system_message(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Judge."}
    for name, key in (("xstest", "messages"), ("hh_rlhf_harmless_test", "prompt")):
        rows = read_dataset(name, put(tmp_path, EXAMPLES[name][0]), system="Judge.").rows
        assert all(row[key][0] == system and row[key][1]["role"] == "user" for row in rows)


def test_half_a_character_is_skipped(tmp_path: Path) -> None:
    folder = put(tmp_path, {"samples-1680.jsonl": '{"prompt": "\\ud83d", "S": 0}\n{"prompt": "\\ud83d\\ude00", "S": 0}\n'})
    found = import_dataset("openai_moderation", folder, tmp_path / "out.jsonl")
    assert [row["messages"][0]["content"] for row in found.rows] == ["😀"]
    assert found.skipped == {"half a character in prompt": 1}


# --- the command line ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert tool.main(["davidson", str(put(tmp_path / "set", DAVIDSON)), str(out), "--split", "train"]) == 0
    assert capsys.readouterr().out == f"{out}: davidson train, 3 rows: safe 2 · unsafe 1\n  skipped 1: repeats an earlier text\n"
    assert [json.loads(line)["id"] for line in out.read_text(encoding="utf-8").splitlines()] == [0, 1, 4]
    assert tool.main(["cold", str(put(tmp_path / "cold", COLD)), str(out), "--split", "train"]) == 0
    assert "坏话" in out.read_text(encoding="utf-8")  # not escaped
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cold", "out.jsonl", "set"]


FORUM = """
from megamod.data.importers import BINARY, Record, Row, Source, judged

def forum(record: Record) -> Row:
    return judged([record.text("comment")], record.one_of("toxic", BINARY), ["toxic"])

SETS = {"forum": Source("Our forum", "own", "moderators, 2025", "en", {"train": ("forum.csv",)}, ("comment", "toxic"), forum)}
"""


def test_sets_of_one_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, {"ours.py": FORUM, "forum.csv": "comment,toxic\nhello,0\nbad,1\n", "none.py": "SETS = 3\n", "broken.py": "1 / 0\n"})

    def call(sets: str) -> int:
        return tool.main(["forum", str(tmp_path), str(tmp_path / "out.jsonl"), "--sets", str(tmp_path / sets)])

    assert call("none.py") == call("broken.py") == call("absent.py") == 1
    assert [line.partition(".py: ")[2] for line in capsys.readouterr().err.splitlines()][:2] == [
        "no SETS: a dict of name → megamod.data.importers.Source was expected",
        "ZeroDivisionError: division by zero",
    ]
    assert call("ours.py") == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_the_page_s_own_example(tmp_path: Path) -> None:
    code = next(block for block in PAGE.read_text(encoding="utf-8").split("```python\n") if block.startswith("from megamod")).split("```")[
        0
    ]
    put(
        tmp_path,
        {"ours.py": code, "forum-train.csv": "comment,toxic,board\na,0,x\nb,1,x\n", "forum-test.csv": "comment,toxic,board\na,0,x\n"},
    )
    found = read_dataset("forum", tmp_path, split="train", sets=tool.own(str(tmp_path / "ours.py")))
    assert [(row["label"], row["kind"]) for row in found.rows] == [("unsafe", "x")]
    assert found.skipped == {"text is in test": 1}


# --- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["davidsen", "{set}"], "no set 'davidsen', did you mean 'davidson'?"),
        (["davidson", "{set}"], "davidson has the splits train, test: choose one with --split"),
        (["davidson", "{set}", "--split", "tset"], "davidson has no split 'tset', did you mean 'test'?"),
        (["davidson", "{set}/absent", "--split", "test"], "{set}/absent: no such folder: one with labeled_data.csv was expected"),
        (["cold", "{set}", "--split", "test"], "{set}/test.csv: no such file: the set's test.csv was expected (or test with .csv, "),
        (["davidson", "{set}", "--split", "test", "--limit", "0"], "limit = 0: at least 1 was expected"),
        (["davidson", "{set}", "--split", "test", "--seed", "1"], "--seed without --limit"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = put(tmp_path / "set", DAVIDSON), tmp_path / "out.jsonl"
    name, place, *options = (argument.format(set=folder) for argument in arguments)
    assert tool.main([name, place, str(out), *options]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("megamod: error: " + expected.format(set=folder))
    assert len(printed.err.splitlines()) == 1
    assert not printed.out
    assert [p.name for p in tmp_path.iterdir()] == ["set"]  # nothing half-written


HEADER = "Text,Label,Template\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", ":1: no records: a file of the set was expected"),
        (HEADER.encode(), ":1: no records: a file of the set was expected"),
        (b"Text,Template\na,t\n", ":2: no column Label: it has Text, Template"),
        ((HEADER + "a,BAD,t\nb,BAD\n").encode(), ":3: 2 columns: 3 were expected, as in the header"),
        ((HEADER + "a,BAD,t\nb,GOOD,t\n").encode(), ":3: Label = 'GOOD': one of BAD, NOT_BAD was expected"),
        (HEADER.encode() + b"a,BAD,t\nb\xff,BAD,t\n", ":3: byte 2 of the line is not UTF-8: save the file in UTF-8"),
        ((HEADER + f"{'a' * 200_000},BAD,t\n").encode(), ":2: not CSV, field larger than field limit (131072)"),
    ],
)
def test_a_broken_csv(text: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "bias_madlibs_77k.csv"
    path.write_bytes(text)
    assert complaint(lambda: read_dataset("jigsaw_madlibs", tmp_path)) == f"{path}{expected}"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("samples-1680.jsonl", b'{"prompt": "a", "S": 0}\n{"prompt": \n', ":2: not JSON, Expecting value at column "),
        ("samples-1680.jsonl", b"[1]\n", ":1: [1]: an object, one a line, was expected"),
        ("samples-1680.jsonl", b'{"prompt": 7, "S": 0}\n', ":1: prompt = 7: a text was expected"),
        ("samples-1680.jsonl", b'{"prompt": "a", "S": 2}\n', ":1: S = 2: one of 0, 1 was expected"),
        ("samples-1680.jsonl", b'{"text": "a"}\n', ":1: no column prompt: it has text"),
        ("samples-1680.json", b'[{"prompt": "a", "S": 0}, 7]\n', ": entry 2 is 7: a list of objects was expected"),
        ("samples-1680.json", b'[{"prompt": "a",\n "S": }]\n', ":2: not JSON, Expecting value at column 7"),
        ("samples-1680.jsonl.gz", b"no gzip", ": Not a gzipped file"),
        ("samples-1680.jsonl.gz", gzip.compress(OPENAI.encode())[:-12], ": Compressed file ended before"),
        ("samples-1680.jsonl.xz", b"no xz", ": Input format not supported"),
    ],
)
def test_broken_json(name: str, text: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text)
    assert complaint(lambda: read_dataset("openai_moderation", tmp_path)).startswith(f"{tmp_path / name}{expected}")


def test_a_broken_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / "xstest_prompts.parquet").write_bytes(b"no parquet")
    assert "not Parquet, " in complaint(lambda: read_dataset("xstest", tmp_path))


def test_two_files_for_one(tmp_path: Path) -> None:
    put(tmp_path, {"xstest_prompts.jsonl": "{}", "xstest_prompts.json": "{}"})
    assert "more than one that may stand for it: xstest_prompts.jsonl, xstest_prompts.json" in complaint(
        lambda: read_dataset("xstest", tmp_path)
    )


@pytest.mark.parametrize("split", ["", "{", "{}", "[]", '{"test_row_index_in_file_order": 3}'])
def test_a_broken_split(split: str, tmp_path: Path) -> None:
    put(tmp_path, {**DAVIDSON, "split_seed0.json": split})
    expected = "a JSON object with a list of row numbers under 'test_row_index_in_file_order' was expected"
    assert complaint(lambda: read_dataset("davidson", tmp_path, split="train")).endswith(expected)
    (tmp_path / "split_seed0.json").unlink()
    assert "split_seed0.json: No such file" in complaint(lambda: read_dataset("davidson", tmp_path, split="train"))


def test_no_rows_is_an_error_that_says_why(tmp_path: Path) -> None:
    def never(record: Record) -> Row:
        raise Skip("too short")

    sets = {"mine": Source("", "", "", "en", {"all": ("m.csv",)}, ("a",), never)}
    text = complaint(lambda: read_dataset("mine", put(tmp_path, {"m.csv": "a\n1\n2\n"}), sets=sets))
    assert text == f"{tmp_path}: no rows of mine's split all; skipped: {{'too short': 2}}"


def test_an_old_file_stays_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    folder = put(tmp_path / "set", {"bias_madlibs_77k.csv": HEADER + "a,BAD,t\nb,GOOD,t\n"})
    complaint(lambda: import_dataset("jigsaw_madlibs", folder, out))
    assert out.read_text() == "old\n"
    (tmp_path / "folder").mkdir()
    for unwritable in (tmp_path / "folder", out / "inside a file.jsonl"):
        text = complaint(lambda path=unwritable: import_dataset("jigsaw_madlibs", madlibs(tmp_path / "set"), path))  # type: ignore[misc]
        assert text.startswith(f"{unwritable}: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "out.jsonl", "set"]


# --- the page and the table ------------------------------------------------------------------------------------------------


def test_the_page_shows_the_table() -> None:
    """With REPORT=1, writes it."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition("writes it -->\n")
    shown, end, after = rest.partition("<!-- end of the table of sets -->")
    assert begin and end
    whole = "\n".join(table()) + "\n"
    if os.environ.get("REPORT"):
        PAGE.write_text(before + begin + whole + end + after, encoding="utf-8")
    else:
        assert shown == whole


@pytest.mark.parametrize("name", SETS)
def test_what_the_page_needs(name: str) -> None:
    source = SETS[name]
    assert all((source.title, source.licence, source.origin, source.rows, source.columns))
    assert "|" not in source.rows + source.title
    assert "http" not in source.origin
    assert source.apart is None or source.apart in source.splits
    assert all(Path(file).suffix in (*KINDS, *PACKED, ".dev", ".test") for files in source.splits.values() for file in files)


def test_judged() -> None:
    assert [m["role"] for m in judged(["a", "b", "c"], "unsafe")["messages"]] == ["user", "assistant", "user"]
    assert judged(["a"], "safe", ["hate"])["categories"] == []


# --- the real sets ---------------------------------------------------------------------------------------------------------

# name → split → rows, of each label (safe, controversial, unsafe), skipped
COUNTS: dict[str, dict[str, tuple[int, tuple[int, int, int], int]]] = {
    "davidson": {"train": (19_826, (3_345, 15_320, 1_161), 1), "test": (4_956, (818, 3_869, 269), 0)},
    "cold": {"train": (32_102, (16_210, 0, 15_892), 55), "test": (5_323, (3_216, 0, 2_107), 0)},
    "edos": {"train": (14_000, (10_602, 0, 3_398), 0), "dev": (2_000, (1_514, 0, 486), 0), "test": (4_000, (3_030, 0, 970), 0)},
    "hh_rlhf_harmless_test": {"test": (2_299, (0, 0, 0), 13)},
    "winogender": {"test": (720, (720, 0, 0), 0)},
    "winobias": {"dev": (1_584, (1_584, 0, 0), 0), "test": (1_584, (1_584, 0, 0), 0)},
    "jigsaw_madlibs": {"test": (76_564, (38_282, 0, 38_282), 0)},
    "jigsaw_madlibs_zh": {"test": (37_359, (26_075, 0, 11_284), 0)},
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_real_set(name: str) -> None:
    folder = REAL / name.removesuffix("_zh")
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the set's files are not at hand")
    assert list(COUNTS[name]) == sorted(SETS[name].splits, key=list(COUNTS[name]).index)
    texts: dict[str, set[str]] = {}
    ids: list[str | int] = []
    for split, (rows, labels, skipped) in COUNTS[name].items():
        found = read_dataset(name, folder, split=split)
        counts = Counter(row.get("label") for row in found.rows)
        assert (len(found.rows), tuple(counts[s] for s in SEVERITIES), found.skipped.total()) == (rows, labels, skipped)
        assert all("," not in category for row in found.rows for category in row.get("categories", ()))
        texts[split] = {"".join(m["content"].split()) for row in found.rows for m in row.get("messages", ())}
        ids += [row["id"] for row in found.rows]
    assert len(ids) == len(set(ids))
    if {"train", "test"} <= texts.keys():
        assert not texts["train"] & texts["test"]
    if name == "davidson":
        assert len(ids) == len(texts["train"]) + len(texts["test"]) == 24_782
