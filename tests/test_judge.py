"""Scores and greedy verdicts on every kind of grid, against transformers, text by text."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import oracle
import pytest
import tiny
import torch
from complaints import complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megamod.config import ChatConfig, ModelConfig
from megamod.config import ParallelConfig as P
from megamod.data import chat
from megamod.data.chat import Candidate, Encoder
from megamod.data.jsonl import Row, row_of
from megamod.evaluate.judge import Drafts, Plan, judge
from megamod.model.build import build
from megamod.model.shape import read_shape
from megamod.parallel.grid import started
from megamod.verdicts import FORMATS, SEVERITIES, Severity, Verdict
from megamod.weights.load import Safetensors, load
from megamod.weights.table import hf_shapes

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "I will find you.",
    "He said “I will find you”, and I called the police.",
    "杀掉卡死的进程",
    "hello",
    "so " * 40,
    "你好，我很好。",
    "a b c d",
]
ROWS = [row_of({"text": text, "label": SEVERITIES[i % 3], "language": "en"}, f"row {i}") for i, text in enumerate(TEXTS)]
ROWS.append(
    row_of({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "I cannot help."}], "label": "safe"}, "last")
)
ROW_LENGTH, NEW_TOKENS = 128, 10
GRIDS = [P(), P(tp=2), P(tp=4, sp=True), P(pp=2), P(tp=2, pp=2, vpp=2), P(cp=2), P(tp=2, cp=2, sp=True), P(tp=8)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer of its own, whose weights are large enough that its verdicts differ from text to text."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    verdicts = [FORMATS["qwen3guard"].render(Verdict(s, ("Violent",))).text for s in ("safe", "unsafe", "unsafe")]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS + verdicts * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)
    fast.save_pretrained(str(path))
    config = tiny.config("qwen2", vocab_size=len(fast), max_position_embeddings=512)
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    sizes = hf_shapes(read_shape(path))
    tensors = {n: torch.randn(*s, generator=generator, dtype=torch.float64) * 0.6 + n.endswith("norm.weight") for n, s in sizes.items()}
    save_file(tensors, path / "model.safetensors")
    return path


def encoder(directory: Path, **options: Any) -> Encoder:
    return chat.encoder(ChatConfig(**options), str(directory), ROW_LENGTH)


def judged_on(grids: list[P], directory: Path, **options: Any) -> list[list[tuple[dict[Severity, float], str | None, bool]]]:
    """On a pool's rank: what each grid says of ROWS."""
    shape, found = read_shape(directory), []
    for parallel in grids:
        with started(parallel, shape) as grid, torch.no_grad():
            chunks, _ = build(ModelConfig(path="", dtype="float64"), shape, grid)
            load(chunks, shape, grid, Safetensors(directory))
            made = judge(chunks, grid, ROWS, encoder(directory), decode=None, max_new_tokens=NEW_TOKENS, progress=False, **options)
            found.append([(dict(one.scores), one.text, one.verdict is None) for one in made])
    return found


@pytest.fixture(scope="module")
def hf(directory: Path) -> Any:
    return oracle.in_double(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="sdpa"))


@torch.no_grad()
def expected_scores(hf: Any, made: Encoder, row: Row) -> dict[Severity, float]:
    """Each label's whole string through the model, alone, and the softmax over the labels."""
    prompt = made.prompts(row).windows[0].tolist()
    sums: dict[Severity, list[float]] = defaultdict(list)
    for severity, ids in made.candidates(row):
        log_p = hf(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        sums[severity].append(sum(float(log_p[len(prompt) - 1 + j, token]) for j, token in enumerate(ids)))
    totals = {severity: float(np.logaddexp.reduce(x)) for severity, x in sums.items()}
    whole = float(np.logaddexp.reduce(list(totals.values())))
    return {severity: math.exp(x - whole) for severity, x in totals.items()}


@torch.no_grad()
def expected_text(hf: Any, made: Encoder, row: Row) -> str:
    """One token at a time."""
    ids = made.prompts(row).windows[0].tolist()
    first = len(ids)
    while len(ids) < first + NEW_TOKENS and (len(ids) == first or ids[-1] != made.tokenizer.end):
        ids.append(int(hf(torch.tensor([ids])).logits[0, -1].argmax()))
    return made.tokenizer.decode([token for token in ids[first:] if token != made.tokenizer.end]).strip()


def test_every_grid_says_what_transformers_says(directory: Path, hf: Any) -> None:
    made = encoder(directory)
    scores = [expected_scores(hf, made, row) for row in ROWS]
    texts = [expected_text(hf, made, row) for row in ROWS]
    assert len({max(s, key=lambda severity: s[severity]) for s in scores}) > 1, "the test wants different verdicts"
    assert len(set(texts)) > 3, "the test wants different texts"
    for rank in distributed.run(8, judged_on, GRIDS, directory):
        for parallel, found in zip(GRIDS, rank, strict=True):
            for (said, text, _), score, wanted in zip(found, scores, texts, strict=True):
                assert said.keys() == score.keys()
                assert max(abs(said[s] - score[s]) for s in score) < 1e-11, parallel
                assert text == wanted, parallel


def test_the_first_token_suffices_where_labels_differ_in_it(directory: Path, hf: Any) -> None:
    made = encoder(directory)
    first = {ids[0] for _, ids in made.candidates(ROWS[0])}
    assert len(first) == 1, "all begin with Safety:"
    ((found,), *_) = distributed.run(8, judged_first, directory)
    for row, (said, _, _) in zip(ROWS, found, strict=True):
        prompt = made.prompts(row).windows[0].tolist()
        own = {severity: list(ids) for severity, ids in made.candidates(row)}
        alike = next(i for i in range(99) if len({ids[i] for ids in own.values()}) > 1)
        with torch.no_grad():
            logits = hf(torch.tensor([[*prompt, *next(iter(own.values()))[:alike]]])).logits[0, -1]
        p = torch.softmax(logits[[ids[alike] for ids in own.values()]], -1).tolist()
        assert max(abs(said[s] - x) for s, x in zip(own, p, strict=True)) < 1e-11


def judged_first(directory: Path) -> Any:
    return judged_on([P(tp=2)], directory, scoring="first_token")


def test_labels_that_begin_alike_need_their_whole_strings() -> None:
    alike = [Candidate("safe", (1, 2, 3)), Candidate("unsafe", (1, 2, 4)), Candidate("controversial", (1, 5))]
    text = complaint(lambda: Plan.of(alike, "first_token"))
    assert "begin with the same token here: use scoring 'whole'" in text
    assert len(Plan.of(alike, "whole").paths) == 1, "one document asks all: [1, 2]"


IDS = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)


@settings(max_examples=200, deadline=None)
@given(st.lists(IDS, min_size=1, max_size=5, unique=True), st.integers(0, 99))
def test_a_plan_asks_every_edge_once_and_adds_up_every_string(strings: list[tuple[int, ...]], seed: int) -> None:
    candidates = [Candidate(SEVERITIES[i % 3], ids) for i, ids in enumerate(strings)]
    plan = Plan.of(candidates, "whole")
    prompt = np.arange(4, dtype=np.int32) + 100
    rng = np.random.default_rng(seed)
    table: dict[tuple[tuple[int, ...], int], float] = {}

    def logprob(context: tuple[int, ...], token: int) -> float:
        return table.setdefault((context, token), float(np.log(rng.uniform(0.01, 1))))

    answers, asked = [], []
    for query in plan.queries(prompt):
        assert query.tokens[:4].tolist() == prompt.tolist()
        assert sorted(query.at.tolist()) == query.at.tolist()
        fed = tuple(query.tokens[4:].tolist())
        edges = [(fed[: at - 3], token) for at, token in zip(query.at.tolist(), query.ids.tolist(), strict=True)]
        asked += edges
        answers.append(np.array([logprob(*edge) for edge in edges]))
    assert len(asked) == len(set(asked)) == len({(ids[:j], ids[j]) for ids in strings for j in range(len(ids))})
    sums: dict[Severity, float] = defaultdict(lambda: -math.inf)
    for severity, ids in candidates:
        total = sum(logprob(ids[:j], ids[j]) for j in range(len(ids)))
        sums[severity] = float(np.logaddexp(sums[severity], total))
    whole = float(np.logaddexp.reduce(list(sums.values())))
    found = plan.scores(answers)
    assert found == pytest.approx({severity: math.exp(x - whole) for severity, x in sums.items()}, abs=1e-12)


def test_one_document_scores_qwen3_s_labels() -> None:
    """Two of the three are single tokens there, so only the third is fed."""
    plan = Plan.of([Candidate("safe", (7, 1)), Candidate("unsafe", (7, 2)), Candidate("controversial", (7, 3, 4, 5))], "whole")
    assert [path for path, _ in plan.paths] == [(7, 3, 4)]


@given(st.lists(IDS, max_size=8), IDS)
def test_a_draft_is_the_most_usual_continuation(seen: list[tuple[int, ...]], begun: tuple[int, ...]) -> None:
    drafts = Drafts()
    for ids in seen:
        drafts.add(ids)
    guess = drafts.after(begun)
    for i, token in enumerate(guess):
        after = [ids[len(begun) + i] for ids in seen if len(ids) > len(begun) + i and ids[: len(begun) + i] == (*begun, *guess[:i])]
        assert after.count(token) == max(map(after.count, after))
    assert not any(len(ids) > len(begun) + len(guess) and ids[: len(begun) + len(guess)] == (*begun, *guess) for ids in seen)
