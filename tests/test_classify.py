"""Classifiers, reward models and preferences from rows to verdicts: what becomes of a row, what is judged, whole runs."""

import gc
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import numpy as np
import oracle
import pytest
import torch
from complaints import complaint
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_chat import GUARD, WHERE, documents, made, row
from test_chat import oracle as template_ids
from torch import Tensor, nn
from written import write

from megamod import checkpoint, config, losses
from megamod.config import (
    ChatConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)  # fmt: skip
from megamod.config import ParallelConfig as P
from megamod.data import chat
from megamod.data.bilingual import generate
from megamod.data.chat import Encoder
from megamod.data.documents import IGNORED, Document
from megamod.data.jsonl import Row, read_rows, row_of
from megamod.data.loader import Loader
from megamod.data.store import Store, prepare
from megamod.evaluate.judge import _severities, judge, severities_of
from megamod.losses import LossFunction
from megamod.model.build import build
from megamod.model.shape import Problem, Score, read_config, read_shape, with_score
from megamod.moderator import Moderator
from megamod.parallel.grid import started
from megamod.train import train
from megamod.verdicts import Severity, Verdict
from megamod.weights import checksums
from megamod.weights.load import Safetensors, load
from megamod.weights.table import hf_shapes
from tools import make_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
QUICK = settings(max_examples=60, deadline=None)
TOLERANCE = 1e-11
SINGLE: Problem = "single_label_classification"
MULTI: Problem = "multi_label_classification"
CLASSES = Score(("safe", "controversial", "unsafe"), SINGLE)
KINDS = Score(("safe", "Violent", "PII"), MULTI)
STREAM = Score(("safe", "controversial", "unsafe", "Violent", "PII"), MULTI, every_token=True)
REWARD = Score(("reward",), "regression")
THINGS = (("Steal", "a car"), ("Break", "the lock"), ("偷", "钱"), ("Find", "her"), ("Burn", "it"), ("Hack", "a bank"))
PAIRS = [
    {"prompt": f"{what} {thing}?", "chosen": f"I will not {what.lower()} {thing}.", "rejected": f"Yes: {'first ' * n}take {thing}."}
    for n, (what, thing) in enumerate(THINGS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with labels, pairs, rated answers, and a small checkpoint to begin from."""
    folder = tmp_path_factory.mktemp("classify")
    train, held_out = generate(48, 10, seed=3)
    write(folder / "texts.jsonl", train)
    write(folder / "train.jsonl", train[:24])
    write(folder / "held_out.jsonl", held_out)
    write(folder / "pairs.jsonl", PAIRS)
    rated = [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"} for p in PAIRS for side in ("chosen", "rejected")]
    write(folder / "rated.jsonl", rated)
    make_checkpoint.make(folder / "base", folder / "texts.jsonl", vocab=400, layers=2, hidden=32, heads=4, seed=1)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return folder / "base"


def scored(path: Path, score: Score, limit: int | None = None, **cfg: Any) -> Encoder:
    """The encoder of a model with a head of scores."""
    return replace(made(path, limit=limit, **cfg), score=score)


# --- pairs and rated answers -------------------------------------------------------------------------------------------------

TALK = row("Is it open?", "It was.", "And now? 现在呢", system="Be kind.")
GOOD, BAD = Verdict("unsafe", ("Violent",), reason="Why."), Verdict("controversial", ("PII",), reason="So.")


def alone(encode: Encoder, one: Row, answer: str | Verdict) -> Document:
    """What supervised training makes of one of the answers."""
    plain = replace(one, chosen=None, rejected=None, desirable=None, margin=None)
    if isinstance(answer, Verdict):
        known = {"label": answer.severity, "categories": answer.categories, "reason": answer.reason}
        return documents(encode, replace(plain, **known))[-1]  # type: ignore[arg-type]
    return documents(encode, replace(plain, messages=(*one.messages, {"role": "assistant", "content": answer}), label=None))[-1]


def same(one: Document, other: Document) -> bool:
    """Whether they are the same tokens, trained alike."""
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "labels", "verdict"))


@pytest.mark.parametrize("cfg", [{}, {"controversial": "safe", "reasons": False}, {"turns": "last"}], ids=str)
@pytest.mark.parametrize("answers", [("It is.\n", "它不开"), (GOOD, BAD)], ids=["texts", "verdicts"])
def test_a_pair_is_what_supervised_training_makes_of_each_answer(base: Path, answers: Any, cfg: dict[str, Any]) -> None:
    encode = made(base, **cfg)
    pair = replace(TALK, chosen=answers[0], rejected=answers[1], weight=2.5, margin=0.75)
    better, worse = documents(encode, pair)
    assert same(better, alone(encode, pair, answers[0])) and same(worse, alone(encode, pair, answers[1]))
    assert (better.side, better.joined, worse.side, worse.joined) == (1, False, -1, True)
    assert (better.weight, worse.weight, better.margin, better.classes) == (2.5, 2.5, 0.75, None)
    prompt = template_ids(base, TALK.messages, prompt=True)
    for document in (better, worse):
        assert document.tokens[: len(prompt)].tolist() == prompt
        assert np.flatnonzero(document.labels != IGNORED).tolist() == list(range(len(prompt), len(document.tokens)))
    said = encode.tokenizer.decode(worse.tokens[len(prompt) :].tolist())
    if isinstance(answers[1], Verdict):
        assert said.startswith("Safety: Safe\nCategories: None<|im_end|>" if cfg.get("controversial") else "Safety: Controversial\n")
        assert ("Reason: So." in said) == cfg.get("reasons", True)
        assert worse.verdict.any()
    else:
        assert said == "它不开<|im_end|>\n" and not worse.verdict.any()


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("answer", ["It is.", GOOD], ids=["text", "verdict"])
def test_a_rated_answer_is_one_document_with_its_side(base: Path, answer: Any, desirable: bool) -> None:
    rated = replace(TALK, chosen=answer, desirable=desirable, weight=0.5)
    (found,) = documents(made(base), rated)
    assert same(found, alone(made(base), rated, answer))
    assert (found.side, found.joined, found.weight, found.margin) == (1 if desirable else -1, False, 0.5, 0.0)


def test_pairs_reach_the_batch(base: Path, tmp_path: Path) -> None:
    """Through a store, packed and shuffled: each pair is the row's two answers, the better one first, with its margin and its weight."""
    pairs = [{**p, "margin": i - 1.5, "weight": i + 1.0} for i, p in enumerate(PAIRS)]
    rated = [{"prompt": f"q{i}", "completion": "a" * (4 * i + 1), "label": i % 2 == 0} for i in range(12)]
    file = write(tmp_path / "rows.jsonl", [x for both in zip(pairs[:4], rated[:4], strict=True) for x in both] + pairs[4:] + rated[4:])
    encode = made(base, limit=120)
    wanted = {}
    for one in read_rows(file):
        for answer, side in ((one.chosen, -1 if one.desirable is False else 1), (one.rejected, -1)):
            if answer is not None:
                known = (side, one.weight, one.margin if one.is_preference and side == 1 else None)
                wanted[tuple(alone(encode, one, answer).tokens.tolist())] = known
    store = Store(prepare(file, tmp_path / "data", ChatConfig(), str(base), limit=120).path)
    assert len(store.lengths) == len(wanted) == 24
    options = {"row_length": 120, "rows_per_micro_batch": 2, "seed": 4, "dp_rank": 0, "dp_size": 1}
    rows = Loader(store, rows_per_step=2, **options).rows
    loader = Loader(store, rows_per_step=2 * rows, **options)  # two epochs
    seen, together = Counter[tuple[int, ...]](), Counter[str]()
    for batch in loader.step(0):
        texts = [tuple(tokens.tolist()) for tokens in batch.tokens.split(batch.lengths)]
        for text, side, weight in zip(texts, batch.side.tolist(), batch.document_weight.tolist(), strict=True):
            if side:
                assert (side, weight) == wanted[text][:2]
                seen[text] += 1
        for (better, worse), margin in zip(batch.pairs.t().tolist(), batch.margin.tolist(), strict=True):
            (source,) = [p for p in map(row_of, pairs) if tuple(alone(encode, p, str(p.chosen)).tokens.tolist()) == texts[better]]
            assert texts[worse] == tuple(alone(encode, source, str(source.rejected)).tokens.tolist())
            assert margin == source.margin
            together[str(source.chosen)] += 1
    assert seen == dict.fromkeys(wanted, 2) and together == {str(p["chosen"]): 2 for p in PAIRS}


def test_a_pair_that_is_too_long(base: Path) -> None:
    pair = replace(row("word " * 60), chosen="Yes, of course.", rejected="No.")
    better, worse = documents(made(base), pair)
    tokens = len(better.tokens) + len(worse.tokens)
    assert len(documents(made(base, limit=tokens), pair)) == 2, "as long as a row is not too long"

    counts = Counter[str]()
    assert made(base, limit=tokens - 1).documents(pair, counts) == []
    assert counts == {"rows": 1, "skipped": 1, "documents": 0}

    said = complaint(lambda: documents(made(base, limit=tokens - 1, too_long="error"), pair))
    assert said == (
        f"{WHERE}: {tokens} tokens in 2 answers with their prompts, but a row holds {tokens - 1}: raise data.row_length, or see "
        f"data.chat.too_long"
    )
    whole = better.tokens[better.labels == IGNORED]
    for limit in (tokens - 1, tokens - 2, tokens - 37, 90):
        counts = Counter[str]()
        cut = made(base, limit=limit, too_long="cut").documents(pair, counts)
        assert (counts["cut"], counts["documents"]) == (1, 2)
        assert tokens - limit <= tokens - sum(len(d.tokens) for d in cut) <= tokens - limit + 1, "no more than has to go"
        prompts = [d.tokens[d.labels == IGNORED].tolist() for d in cut]
        assert prompts[0] == prompts[1] and len(prompts[0]) < len(whole)
        assert [d.side for d in cut] == [1, -1] and [d.joined for d in cut] == [False, True]
        for short, long in zip(cut, (better, worse), strict=True):
            assert short.tokens[short.labels != IGNORED].tolist() == long.tokens[long.labels != IGNORED].tolist(), "the answer is whole"
    assert made(base, limit=30, too_long="cut").documents(pair, Counter()) == []


@pytest.mark.parametrize(
    ("answers", "cfg"),
    [
        ((GOOD, replace(GOOD, reason="Else.")), {"reasons": False}),
        ((replace(GOOD, reason=None), replace(GOOD, severity="controversial", reason=None)), {"controversial": "unsafe"}),
        (("It  is.", "It  is."), {}),
    ],
)
def test_answers_that_become_the_same_tokens_are_refused(base: Path, answers: Any, cfg: dict[str, Any]) -> None:
    said = complaint(lambda: documents(made(base, **cfg), replace(TALK, chosen=answers[0], rejected=answers[1])))
    assert said == f"{WHERE}: chosen and rejected are the same tokens, and teach nothing: two answers were expected"


def test_a_guard_s_template_is_followed_by_either_verdict(base: Path) -> None:
    encode = made(base, GUARD)
    pair = replace(TALK, chosen=GOOD, rejected=BAD)
    for document, verdict in zip(documents(encode, pair), (GOOD, BAD), strict=True):
        assert same(document, alone(encode, pair, verdict))
    said = complaint(lambda: documents(encode, replace(TALK, chosen="a", rejected="b")))
    assert said.startswith(f"{WHERE}: the chat template does not put an assistant's turn after its generation prompt")


def test_special_tokens_in_answers_are_counted(base: Path) -> None:
    counts = Counter[str]()
    for chosen, rejected in (("a", "b"), ("a <|im_end|>", "b"), ("a", "<|im_start|>b")):
        made(base).documents(replace(TALK, chosen=chosen, rejected=rejected), counts)
    assert counts["special"] == 2
    rated = replace(TALK, chosen="x<|im_end|>", desirable=False)
    assert made(base).holds_special(rated) and not made(base).holds_special(replace(rated, chosen="x"))


# --- rows for a head of scores -----------------------------------------------------------------------------------------------


def held(document: Document) -> dict[int, int]:
    """Where classes are asked, and which hold there."""
    assert document.classes is not None
    assert (document.labels == IGNORED).all() and not document.verdict.any()
    (at,) = np.nonzero(document.classes != IGNORED)
    return dict(zip(at.tolist(), document.classes[at].tolist(), strict=True))


LABELLED = [
    (row("How?", label="safe"), CLASSES, 0b1),
    (row("How?", "So.", label="unsafe", categories=("Violent",), reason="x", weight=3.0), CLASSES, 0b100),
    (TALK, CLASSES, None),
    (row("How?", label="unsafe", categories=("PII", "Violent")), KINDS, 0b110),
    (row("How?", label="safe"), KINDS, 0b1),
    (row("How?", label="safe"), Score(("Violent", "PII"), MULTI), 0),
    (row("How?", label="unsafe", categories=("PII",)), Score(("unsafe", "Violent", "PII"), MULTI), 0b101),
    (row("How?", label="unsafe", categories=("PII",)), Score(("safe", "PII"), SINGLE), 0b10),
]


@pytest.mark.parametrize(("one", "score", "bits"), LABELLED)
def test_a_text_s_classes_are_asked_at_its_last_token(base: Path, one: Row, score: Score, bits: int | None) -> None:
    encode = scored(base, score)
    if bits is None:
        assert complaint(lambda: documents(encode, one)) == (
            f"{WHERE}: no label, and the model's head has a score for each of safe, controversial, unsafe"
        )
        return
    (document,) = documents(encode, one)
    assert document.tokens.tolist() == template_ids(base, one.messages, prompt=False)
    assert held(document) == {len(document.tokens) - 1: bits}
    assert (document.weight, document.side, document.joined) == (one.weight, 0, False)
    prompts = encode.prompts(one)
    assert [window.tolist() for window in prompts.windows] == [document.tokens.tolist()]
    assert [asked.tolist() for asked in prompts.asked] == [[len(document.tokens) - 1]]


def test_a_doubtful_row_counts_as_the_config_says(base: Path) -> None:
    doubtful = row("x", label="controversial", categories=("PII",))
    for mapped, bits in (("keep", 0b10), ("safe", 0b1), ("unsafe", 0b100)):
        (document,) = documents(scored(base, CLASSES, controversial=mapped), doubtful)
        assert [*held(document).values()] == [bits]
    (document,) = documents(scored(base, STREAM, controversial="safe"), doubtful)
    assert {*held(document).values()} == {0b1}, "a safe text has no categories"


def test_a_text_for_a_classifier_that_is_too_long(base: Path) -> None:
    long = row("x", "so " * 60 + "end", label="unsafe", categories=("PII",))
    (whole,) = documents(scored(base, STREAM), long)
    limit = len(whole.tokens) - 5
    assert scored(base, STREAM, limit).documents(long, Counter()) == []
    said = complaint(lambda: documents(scored(base, CLASSES, limit, too_long="error"), long))
    assert said.startswith(f"{WHERE}: {len(whole.tokens)} tokens, but a row holds {limit}: ")
    (cut,) = documents(scored(base, STREAM, limit, too_long="cut"), long)
    assert len(cut.tokens) == limit and len(held(cut)) == len(held(whole)) - 5
    assert made(base).tokenizer.decode(cut.tokens[[*held(cut)]].tolist()).strip().endswith("so so")
    (cut,) = documents(scored(base, CLASSES, limit, too_long="cut"), long)
    assert held(cut) == {limit - 1: 0b100}


# What the template itself says after a message, or in it, is not the message; nor is a text's own repetition.
WORDS = st.lists(st.sampled_from(["end", "im", "_", "|", "<", "user", "\n", " ", "a", "色情", "🙂", "n", "\ue000"]), min_size=1, max_size=8)


@QUICK
@given(st.lists(WORDS.map("".join), min_size=1, max_size=3))
@example(["end"])
@example(["x", "|>"])
@example(["a  ", "  a b\n"])
def test_every_token_of_the_last_message_is_asked_and_no_other(base: Path, texts: list[str]) -> None:
    one = row(*texts, label="unsafe", categories=("PII",))
    (document,) = documents(scored(base, STREAM), one)
    tokenizer = made(base).tokenizer
    text = tokenizer.render(one.messages, prompt=False, where="")
    offsets = tokenizer.encode(text).offsets
    content = texts[-1].strip()
    assert document.tokens.tolist() == template_ids(base, one.messages, prompt=False)
    if not content:
        assert held(document) == {len(document.tokens) - 1: 0b10100}
        return
    stop = len(text) - len("<|im_end|>\n") - (len(texts[-1]) - len(texts[-1].rstrip()))
    start = stop - len(content)
    assert text[start:stop] == content
    own = [i for i, (first, end) in enumerate(offsets.tolist()) if any(start <= at < stop for at in range(first, end))]
    assert held(document) == dict.fromkeys(own, 0b10100)
    assert content in tokenizer.decode(document.tokens[own].tolist())


TRIMS = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} [end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
SHOUTS = "{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>{% endfor %}"


def test_other_templates_say_the_last_message_in_their_way(base: Path) -> None:
    one = row("x", "  the end \n", label="safe")
    encode = replace(made(base, TRIMS), score=STREAM)
    (document,) = documents(encode, one)
    assert encode.tokenizer.decode(document.tokens[[*held(document)]].tolist()).strip() == "the end"
    said = complaint(lambda: documents(replace(made(base, SHOUTS), score=STREAM), one))
    assert said == f"{WHERE}: the chat template does not say the last message as it is: its tokens cannot be found"


FAULTS: list[tuple[Row, Score, str]] = [
    (row("x"), KINDS, "no label, and the model's head has a score for each of safe, Violent, PII"),
    (
        row("x", label="controversial"),
        Score(("safe", "unsafe"), SINGLE),
        "controversial: one must be one of model.score.labels = safe, unsafe",
    ),
    (row("x", label="unsafe", categories=("Other",)), STREAM, "Other: each must be one of model.score.labels = safe, controversial, uns"),
    (row("x", label="unsafe"), KINDS, "unsafe: each must be one of model.score.labels = safe, Violent, PII"),
    (row("x", label="controversial", categories=("PII",)), Score(("safe", "unsafe", "PII"), MULTI, True), "controversial: each must be"),
    (row("x", label="unsafe", categories=("Violent", "PII")), Score(("safe", "Violent", "PII"), SINGLE), "unsafe, Violent, PII: one must"),
    (replace(row("x"), chosen="a", rejected="b"), CLASSES, "a label alone was expected, for a head of scores of problem 'single_label"),
    (replace(row("x", label="safe"), chosen=Verdict("safe"), desirable=True), CLASSES, "a label alone was expected"),
    (row("x", label="safe"), REWARD, "chosen and rejected were expected, for a head of scores of problem 'regression'"),
    (replace(row("x"), chosen="a", desirable=True), REWARD, "chosen and rejected were expected"),
]


@pytest.mark.parametrize(("one", "score", "what"), FAULTS)
def test_what_a_head_cannot_learn_names_the_row(base: Path, one: Row, score: Score, what: str) -> None:
    assert complaint(lambda: documents(scored(base, score), one)).startswith(f"{WHERE}: {what}")


@pytest.mark.parametrize("answers", [("It is.", "它不开"), (GOOD, BAD)], ids=["texts", "verdicts"])
def test_a_reward_is_asked_at_the_end_of_each_half(base: Path, answers: Any) -> None:
    pair = replace(TALK, chosen=answers[0], rejected=answers[1], margin=2.0, weight=0.5)
    halves = documents(scored(base, REWARD), pair)
    texts = [a if isinstance(a, str) else made(base).format.render(a).text for a in answers]
    for half, text in zip(halves, texts, strict=True):
        assert half.tokens.tolist() == template_ids(base, [*TALK.messages, {"role": "assistant", "content": text}])
        assert held(half) == {len(half.tokens) - 1: 0}
        assert half.weight == 0.5
    assert [half.side for half in halves] == [1, -1] and [half.joined for half in halves] == [False, True]
    assert halves[0].margin == 2.0


def test_classes_reach_the_batch(base: Path, folder: Path, tmp_path: Path) -> None:
    """Of the position itself, not of the one before it, as a next token is."""
    made_store = prepare(folder / "train.jsonl", tmp_path, ChatConfig(), str(base), limit=256, score=CLASSES)
    rows = {tuple(template_ids(base, one.messages)): one for one in read_rows(folder / "train.jsonl")}
    loader = Loader(Store(made_store.path), row_length=256, rows_per_step=8, rows_per_micro_batch=8, seed=2, dp_rank=0, dp_size=1)
    (batch,) = loader.step(0)
    ends = torch.tensor(batch.lengths).cumsum(0) - 1
    assert torch.equal(batch.rows, ends[batch.sequence])
    found = [tuple(batch.tokens.split(batch.lengths)[s].tolist()) for s in batch.sequence.tolist()]
    assert len(found) > 8
    assert batch.classes(3).tolist() == [[int(rows[text].label == label) for label in CLASSES.labels] for text in found]


# --- judging -----------------------------------------------------------------------------------------------------------------

TEXTS = ["I will find you.", "the end", "杀掉卡死的进程", "so " * 70, "", "hello " + "\n" * 200 + " you", "你好，我很好。"]
ROWS = [row_of({"text": text, "label": "safe"}, f"row {i}") for i, text in enumerate(TEXTS)]
ROWS.append(replace(row("q", "I cannot."), label="safe"))
ROW_LENGTH = 48
HEADS = {
    "classes": Score(("unsafe", "Violent", "safe", "controversial"), SINGLE),
    "kinds": KINDS,
    "stream": STREAM,
    "tokens": Score(("safe", "unsafe"), SINGLE, every_token=True),
}
GRIDS = [P(), P(tp=2), P(tp=2, sp=True), P(pp=2), P(cp=2)]


@pytest.fixture(scope="module")
def models(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classifiers as transformers has them, whose weights are large enough that texts differ."""
    root = tmp_path_factory.mktemp("models")
    for number, (name, score) in enumerate(HEADS.items()):
        path = root / name
        shutil.copytree(base, path, ignore=shutil.ignore_patterns("*.safetensors", checksums.SUMS))
        (path / "config.json").write_text(json.dumps(with_score(read_config(base), score, 0)))
        generator = torch.Generator().manual_seed(number)
        sizes = hf_shapes(read_shape(path))
        tensors = {n: torch.randn(*s, generator=generator, dtype=torch.float64) * 0.6 + n.endswith("norm.weight") for n, s in sizes.items()}
        save_file(tensors, path / "model.safetensors")
    return root


Said = tuple[dict[Severity, float], Verdict | None, tuple[str, ...]]


def judged_on(root: Path) -> dict[tuple[str, int], list[Said]]:
    """On a pool's rank: what each head says of ROWS on each grid."""
    found = {}
    for name in HEADS:
        shape = read_shape(root / name)
        for number, parallel in enumerate(GRIDS):
            with started(parallel, shape) as grid, torch.no_grad():
                chunks, _ = build(ModelConfig(path="", dtype="float64"), shape, grid)
                load(chunks, shape, grid, Safetensors(root / name))
                encode = chat.encoder(ChatConfig(), str(root / name), ROW_LENGTH, shape.score)
                judged = judge(chunks, grid, ROWS, encode, progress=False)
                found[name, number] = [(dict(one.scores), one.verdict, one.notes) for one in judged]
                assert all(one.text is None for one in judged)
    return found


def hf_model(path: Path, every_token: bool) -> nn.Module:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    kind = AutoModelForTokenClassification if every_token else AutoModelForSequenceClassification
    found, info = kind.from_pretrained(path, dtype=torch.float64, attn_implementation="sdpa", output_loading_info=True)
    assert not any(info.values()), info
    return oracle.in_double(found).eval()


def by_hand(score: Score, logits: Tensor) -> tuple[dict[Severity, float], tuple[str, ...]]:
    """Severities and categories from transformers' logits `[L]`, or `[n, L]` of every token."""
    names = [label for label in ("safe", "controversial", "unsafe") if label in score.labels]
    others = [label for label in score.labels if label not in names]
    if score is KINDS:
        chances = dict(zip(score.labels, logits.sigmoid().tolist(), strict=True))
        worst = max(chances["Violent"], chances["PII"])
        return {"safe": 1 - worst, "unsafe": worst}, tuple(label for label in others if chances[label] > 0.5)
    columns = [score.labels.index(name) for name in names]
    tokens = logits[:, columns].softmax(-1) if score.every_token else logits[columns].softmax(-1)[None]
    best = 0
    for i in range(1, len(tokens)):  # two neighbours: the safer of them speaks for both
        pair = (i - 1, i) if tokens[i - 1, 0] >= tokens[i, 0] else (i, i - 1)
        if i == 1 or tokens[pair[0], 0] < tokens[best, 0]:
            best = pair[0]
    z = dict(zip(score.labels, (logits[best] if score.every_token else logits).tolist(), strict=True))
    return dict(zip(names, tokens[best].tolist(), strict=True)), (max(others, key=lambda n: z[n]),) if others else ()


@torch.no_grad()
def expected(root: Path, name: str) -> list[Said]:
    """The same from transformers, window by window."""
    score = HEADS[name]
    result: list[Said] = []
    hf: Any = hf_model(root / name, score.every_token)
    encode = replace(made(root / name, limit=ROW_LENGTH), score=score)
    for one in ROWS:
        prompts, found = encode.prompts(one), []
        for window, asked in zip(prompts.windows, prompts.asked, strict=True):
            logits = hf(torch.from_numpy(window.astype(np.int64))[None]).logits[0]
            found.append(by_hand(score, logits[torch.from_numpy(asked)] if score.every_token else logits))
        scores, categories = min(found, key=lambda each: each[0]["safe"])
        severity = max(scores, key=lambda s: scores[s])
        verdict = None if name == "tokens" else Verdict(severity, categories if severity != "safe" else ())  # it has no categories
        result.append((scores, verdict, prompts.notes))
    return result


@pytest.fixture(scope="module")
def judged(models: Path) -> dict[tuple[str, int], list[Said]]:
    ranks = distributed.run(2, judged_on, models)
    assert ranks[0] == ranks[1], "every rank has the result"
    return ranks[0]


@pytest.mark.parametrize("name", HEADS)
def test_every_grid_says_what_transformers_says(models: Path, judged: dict[tuple[str, int], list[Said]], name: str) -> None:
    wanted = expected(models, name)
    assert len({max(scores, key=lambda s: scores[s]) for scores, _, _ in wanted}) > 1, "the test wants different verdicts"
    assert sum("windows" in " ".join(notes) for _, _, notes in wanted) >= 2, "and texts that are longer than a row"
    for number, parallel in enumerate(GRIDS):
        for (scores, verdict, notes), (theirs, said, told) in zip(judged[name, number], wanted, strict=True):
            assert scores.keys() == theirs.keys()
            assert max(abs(scores[s] - theirs[s]) for s in scores) < TOLERANCE, parallel
            assert (verdict, notes) == (said, told), parallel


def logits_of(chances: Sequence[float]) -> np.ndarray[Any, Any]:
    """Scores of STREAM by which each token is not safe with such a probability, unsafe more likely than controversial."""
    p = np.array(chances)
    severities = np.log(np.stack([1 - p, 0.2 * p, 0.8 * p], axis=1))
    return np.concatenate([severities, np.stack([p, 1 - p], axis=1)], axis=1)


@pytest.mark.parametrize(
    ("chances", "severity"),
    [
        ((0.1, 0.99, 0.1, 0.2), "safe"),
        ((0.1, 0.99, 0.9, 0.2), "unsafe"),
        ((0.99, 0.1, 0.99), "safe"),
        ((0.9, 0.9), "unsafe"),
        ((0.1, 0.2, 0.1, 0.9, 0.99), "unsafe"),
        ((0.9,), "unsafe"),
    ],
)
def test_one_unsafe_token_is_none(chances: tuple[float, ...], severity: str) -> None:
    found, categories = _severities(STREAM, severities_of(STREAM), logits_of(chances))
    assert max(found, key=lambda one: found[one]) == severity
    assert severity == "safe" or categories == ("Violent",)


@QUICK
@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=9), st.floats(0.01, 0.99))
def test_a_threshold_asks_for_two_neighbours_above_it(chances: list[float], t: float) -> None:
    assume(all(abs(p - t) > 1e-9 for p in chances))
    found, _ = _severities(STREAM, severities_of(STREAM), logits_of(chances))
    assert (1 - found["safe"] > t) == any(a > t and b > t for a, b in pairwise(chances))
    assert sum(found.values()) == pytest.approx(1)


def test_what_cannot_judge_is_refused(base: Path) -> None:
    one = SimpleNamespace(size=1, rank=0)
    grid: Any = SimpleNamespace(rank=0, cp=one, tp=one)

    def said(score: Score, **options: Any) -> str:
        return complaint(lambda: judge([], grid, ROWS, scored(base, score, limit=64), progress=False, **options))

    wanted = "scores of safe and of another severity, or of categories, were expected to judge with"
    for score in (
        REWARD, Score(("safe",), MULTI), Score(("Violent", "PII"), MULTI, every_token=True), Score(("safe", "Violent"), SINGLE),
        Score(("controversial", "unsafe"), SINGLE),
    ):  # fmt: skip
        assert said(score) == f"the model has {score}: {wanted}"
    for options in ({"decode": 3}, {"decode": None}, {"scoring": "first_token"}):
        assert "the model has a head of 3 scores, safe, controversial and unsafe, which say no text" in said(CLASSES, **options)


# --- whole runs --------------------------------------------------------------------------------------------------------------


def run_config(folder: Path, name: str, steps: int, data: str, loss: LossFunction, score: Score | None = None, **more: Any) -> RunConfig:
    cfg = RunConfig(
        str(folder / name), steps, ModelConfig(str(folder / "base"), dtype="float64", score=score),
        DataConfig(str(folder / data), row_length=256, rows_per_step=8), loss,
        optim=OptimConfig(lr=3e-3, schedule="constant"), log=LogConfig(tensorboard=False), seed=5, **more,
    )  # fmt: skip
    config.check(cfg)
    return cfg


CLASSIFICATION = partial(losses.classification)


def configs(folder: Path) -> list[RunConfig]:
    """All that the tests below train."""
    judged = EvalConfig(str(folder / "held_out.jsonl"), every=2, keep_best=False)
    export = CheckpointConfig(export=True)
    classify = partial(run_config, folder, data="train.jsonl", loss=CLASSIFICATION, score=CLASSES)
    return [
        classify(name="full", steps=4, parallel=P(tp=2), eval=judged, checkpoint=export),
        classify(name="parts", steps=2),
        classify(name="parts", steps=4, parallel=P(pp=2)),
        classify(name="lora", steps=3, lora=LoraConfig(r=4), parallel=P(tp=2), eval=judged, checkpoint=export),
        run_config(folder, "reward", 8, "pairs.jsonl", losses.reward, REWARD),
        run_config(folder, "stream", 2, "pairless.jsonl", losses.streaming, STREAM, parallel=P(cp=2)),
        run_config(folder, "dpo", 2, "pairs.jsonl", losses.dpo),
        run_config(folder, "kto", 2, "rated.jsonl", losses.kto, parallel=P(tp=2)),
    ]


def train_all(folder: Path) -> None:
    """On a pool's rank."""
    for cfg in configs(folder):
        train(cfg)
        gc.collect()


Lines = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(folder: Path) -> Lines:
    """What metrics.jsonl says of each run."""
    rows = [{"text": f"text {i}", "label": "unsafe", "categories": ["Violent", "PII"][: 1 + i % 2]} for i in range(4)]
    write(folder / "pairless.jsonl", [*rows, {"text": "fine", "label": "safe"}])
    distributed.run(2, train_all, folder)
    names = {Path(cfg.dir).name for cfg in configs(folder)}
    return {name: [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()] for name in names}


def of(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if key in line]


def test_a_classifier_learns_and_is_validated(runs: Lines) -> None:
    for name, validations in (("full", 2), ("lora", 2)):
        assert len(of(runs[name], "eval/macro_f1")) == validations
        assert all(0 <= value <= 1 for value in of(runs[name], "eval/macro_f1"))
        assert {"accuracy", "nll"} <= runs[name][0].keys()
        assert of(runs[name], "loss")[-1] < of(runs[name], "loss")[0]
    assert of(runs["full"], "nll")[0] == pytest.approx(math.log(3), abs=0.1), "a new head knows nothing"


def test_a_run_goes_on_elsewhere_with_the_same_losses(runs: Lines) -> None:
    assert [line["step"] for line in runs["parts"]] == [1, 2, 3, 4]
    for key in ("loss", "nll", "accuracy", "grad_norm"):
        assert of(runs["parts"], key) == pytest.approx(of(runs["full"], key), rel=1e-9), key


def test_a_reward_model_prefers_what_was_chosen(runs: Lines) -> None:
    assert of(runs["reward"], "loss")[0] == pytest.approx(math.log(2), abs=0.05)
    assert of(runs["reward"], "loss")[-1] < of(runs["reward"], "loss")[0] - 0.1
    assert of(runs["reward"], "rewards/accuracies")[-1] == 1.0


def test_preferences_begin_where_policy_and_reference_are_one(runs: Lines) -> None:
    assert of(runs["dpo"], "loss")[0] == pytest.approx(math.log(2), abs=1e-9)
    assert of(runs["kto"], "loss")[0] == pytest.approx(0.5, abs=1e-9)
    for name in ("dpo", "kto"):
        assert of(runs[name], "loss")[1] < of(runs[name], "loss")[0]


def test_every_token_s_loss_falls(runs: Lines) -> None:
    assert of(runs["stream"], "loss")[1] < of(runs["stream"], "loss")[0]


def moderated(folder: Path) -> dict[str, list[dict[Severity, float]]]:
    """On a pool's rank: the held-out rows by what each run has left."""
    saved = {name: checkpoint.latest(folder / name / "checkpoints") for name in ("full", "lora", "parts")}
    sources: dict[str, tuple[Path, dict[str, Path]]] = {
        "full, export": (folder / "full" / "hf" / "step-00000004", {}),
        "full, checkpoint": (saved["full"] or folder, {}),
        "parts, checkpoint": (saved["parts"] or folder, {}),
        "lora, checkpoint": (saved["lora"] or folder, {}),
        "lora, adapter": (folder / "base", {"own": folder / "lora" / "peft" / "step-00000003"}),
        "lora, checkpoint of it": (folder / "base", {"own": saved["lora"] or folder}),
    }
    rows, found = list(read_rows(folder / "held_out.jsonl")), {}
    for name, (path, adapters) in sources.items():
        with Moderator(path, P(tp=2), adapters=adapters, dtype="float64", row_length=256) as moderator:
            found[name] = [dict(one.scores) for one in moderator.judge(rows)]
    return found


@pytest.fixture(scope="module")
def verdicts(folder: Path, runs: Lines) -> dict[str, list[dict[Severity, float]]]:
    found: dict[str, list[dict[Severity, float]]] = distributed.run(2, moderated, folder)[0]
    return found


@torch.no_grad()
def softmaxes(folder: Path, hf: Any) -> list[dict[str, float]]:
    """The held-out rows by transformers, with its own tokenizer."""
    found = []
    for one in read_rows(folder / "held_out.jsonl"):
        logits = hf(torch.tensor([template_ids(folder / "base", one.messages)])).logits[0]
        found.append(dict(zip(CLASSES.labels, logits.softmax(-1).tolist(), strict=True)))
    return found


def apart(some: Sequence[Any], others: Sequence[Any]) -> float:
    return max(abs(a[key] - b[key]) for a, b in zip(some, others, strict=True) for key in a)


def test_a_trained_classifier_is_the_same_everywhere(folder: Path, verdicts: dict[str, list[dict[Severity, float]]]) -> None:
    export = folder / "full" / "hf" / "step-00000004"
    hf: Any = hf_model(export, every_token=False)
    assert hf.config.id2label == dict(enumerate(CLASSES.labels))
    wanted = softmaxes(folder, hf)
    assert apart(wanted, wanted[::-1]) > 1e-3, "the test wants different rows"
    for name in ("full, export", "full, checkpoint"):
        assert apart(verdicts[name], wanted) < TOLERANCE, name
    assert apart(verdicts["parts, checkpoint"], wanted) < 1e-8


def test_a_trained_adapter_is_the_same_everywhere(folder: Path, verdicts: dict[str, list[dict[Severity, float]]]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(
        folder / "base", num_labels=3, dtype=torch.float64, attn_implementation="sdpa"
    )
    adapter = folder / "lora" / "peft" / "step-00000003"
    adapted: Any = PeftModel.from_pretrained(plain, adapter, autocast_adapter_dtype=False)
    wanted = softmaxes(folder, oracle.in_double(adapted.double()).eval())
    assert apart(wanted, wanted[::-1]) > 1e-3, "the test wants different rows"
    for name in ("lora, checkpoint", "lora, adapter", "lora, checkpoint of it"):
        assert apart(verdicts[name], wanted) < TOLERANCE, name
