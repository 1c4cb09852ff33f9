"""A head of scores in the vocabulary's place: transformers' classifiers on every grid, both ways through files, and under LoRA."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import distributed
import lora_parity
import oracle
import parity
import pytest
import rows
import tiny
import torch
import torch.nn.functional as F
from complaints import complaint
from lora_parity import LoraCase
from parity import Case
from safetensors.torch import load_file, save_file
from test_weights import differences, read, write, write_tokenizer
from torch import Tensor, nn

from megamod.batch import Batch
from megamod.config import LoraConfig, ModelConfig
from megamod.config import ParallelConfig as P
from megamod.errors import MegamodError
from megamod.losses import Loss
from megamod.model.build import build
from megamod.model.head import Head, ScoreHead
from megamod.model.lora import Adapters
from megamod.model.shape import Score, read_shape, shape_of
from megamod.parallel.grid import Grid, started
from megamod.step import collect
from megamod.weights import peft
from megamod.weights.export import export, padding
from megamod.weights.load import Safetensors, Scored, Tensors, check_keys, load, weights_at
from megamod.weights.table import hf_shapes, table

MODELS = sorted(tiny.SCORED)
TOLERANCE = 1e-11


def scored(head: Any, batch: Batch) -> Loss:
    """What classifiers and reward models ask of a head: classes, values, and a sum over a document."""
    z = head.scores()
    nll = -z.log_softmax(-1).gather(-1, batch.labels[:, None] % z.shape[1])[:, 0]
    square = (z.sum(-1) - batch.weight.to(z.dtype)).square()
    of_documents = F.softplus(batch.per_sequence(z[:, 0])) * (batch.per_sequence(torch.ones_like(nll)) > 0)
    return Loss(batch.mean(nll + square, over="tokens") + batch.mean(of_documents, over="samples"), {"nll": batch.mean_of(nll)})


def made_rows(model: str) -> list[Batch]:
    """Packed rows: labels where rows.rows has them for a head of tokens, else at the last token of documents, not of all."""
    shape = tiny.shape(model)
    assert shape.score is not None
    made = rows.rows(shape.vocab)
    return made if shape.score.every_token else [at_the_ends(batch, number) for number, batch in enumerate(made)]


def at_the_ends(batch: Batch, number: int) -> Batch:
    ends = torch.tensor(batch.lengths).cumsum(0) - 1
    keep = torch.arange(max(1, len(ends) - number % 3))  # filler has no label
    generator = torch.Generator().manual_seed(number)
    weight = torch.rand(len(keep), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 6, (len(keep),), generator=generator)
    return Batch(
        batch.tokens, batch.positions, batch.lengths, ends[keep], labels, torch.zeros(len(keep), dtype=torch.bool), weight, sequence=keep
    )


# --- transformers, document by document ------------------------------------------------------------------------------------


def hf_class(every_token: bool) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    return AutoModelForTokenClassification if every_token else AutoModelForSequenceClassification


def hf_model(model: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """transformers' own classifier with `tiny.weights`."""
    from transformers import AutoConfig

    config = tiny.config(model)
    kind, every_token = config.pop("model_type"), "Token" in config["architectures"][0]
    hf = hf_class(every_token).from_config(AutoConfig.for_model(kind, **config), attn_implementation="sdpa").to(dtype).eval()
    hf.load_state_dict(tiny.weights(model, dtype))
    return oracle.in_double(hf) if dtype is torch.float64 else hf


class Plain:
    """The head that transformers' own logits make."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def scores(self) -> Tensor:
        return self.z


def hf_scores(hf: Any, batch: Batch) -> Tensor:
    """`[N, L]` at the labelled positions, each document through the model alone."""
    logits = [hf(tokens[None]).logits for tokens in batch.tokens.split(batch.lengths)]
    if logits[0].dim() == 3:
        return torch.cat([each[0] for each in logits])[batch.rows]
    return torch.cat(logits)[batch.sequence]


def expected(hf: nn.Module, batches: list[Batch]) -> Tensor:
    """The objective over all `batches`; its gradients are then in the parameters."""
    units = list(batches[0].counts())
    totals: Any = {unit: sum(batch.counts()[unit] for batch in batches) for unit in units}
    value = torch.stack([scored(Plain(hf_scores(hf, b)), replace(b, totals=totals)).value for b in batches]).sum()
    value.backward()
    return value.detach()


ADAPTERS = {
    "qwen2-classes": LoraConfig(r=3, modules_to_save=("embed_tokens",), target_modules=("q_proj", "down_proj")),
    "qwen3-tokens": LoraConfig(r=3),
    "llama-reward": LoraConfig(r=2, target_modules=("v_proj", "gate_proj"), modules_to_save=("score",)),
}


def adapted(model: str) -> Any:
    """peft's model with `lora_parity.weights`."""
    from peft import LoraConfig as Peft
    from peft import get_peft_model

    cfg, shape = ADAPTERS[model], tiny.shape(model)
    words = {**peft.config_json(cfg, shape, "base"), "inference_mode": False}
    result = get_peft_model(hf_model(model), Peft(**words), autocast_adapter_dtype=False).double().eval()
    own, named = lora_parity.weights(cfg, model), trained(result)
    assert named.keys() == own.keys()
    for name, param in named.items():
        param.data.copy_(own[name])
    return result


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Its trained parameters, as a PEFT directory names them."""
    named = {name.replace(".modules_to_save.default", "").replace(".default", ""): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if p.requires_grad}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> str:
    """(model, whether under LoRA) → loss and gradients, in a file that the ranks read."""
    results = {}
    for model in MODELS:
        hf: Any = hf_model(model)
        results[model, False] = expected(hf, made_rows(model)), {name: p.grad for name, p in hf.named_parameters()}
        hf = adapted(model)
        results[model, True] = expected(hf, made_rows(model)), {name: p.grad for name, p in trained(hf).items()}
    path = tmp_path_factory.mktemp("scores") / "expected.pt"
    torch.save(results, path)
    return str(path)


# --- on every grid ---------------------------------------------------------------------------------------------------------

GRIDS = [
    P(), P(pp=2), P(cp=2, pp=2, vpp=2), P(tp=2), P(tp=2, sp=True), P(tp=2, pp=2, vpp=2, sp=True), P(tp=2, cp=2, pp=2, sp=True),
    P(tp=4, cp=2), P(tp=4, pp=2, sp=True),
]  # fmt: skip


@dataclass(frozen=True)
class ScoreCase(Case):
    def batches(self, grid: Grid) -> list[Batch]:
        fewest = grid.pp.size if grid.vpp > 1 else min(grid.pp.size, 2)
        return rows.shared(made_rows(self.model), grid.dp.rank, grid.dp.size, min(fewest, len(rows.LENGTHS) // grid.dp.size))


def compare(parallel: P, file: str, recompute: str) -> list[tuple[float, float, int]]:
    """For each model on this rank, in full and under LoRA: error of the loss, worst of a gradient, elements owned."""
    known, results = torch.load(file, weights_only=True), []
    with started(parallel, tiny.shape(MODELS[0])) as grid:  # as many kv heads as the others
        for (model, is_lora), (value, gradients) in known.items():
            case = ScoreCase(model, parallel, recompute)
            run = lora_parity.prepare(LoraCase(ADAPTERS[model], case), grid)[0] if is_lora else parity.prepare(case, grid)
            run.step(scored)
            off = abs(float(run.metrics["loss"] - value) / float(value)) if run.metrics else 0.0
            results.append((off, parity.worst(run, gradients, parity.gradient), parity.owned(run)))
    return results


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_grid(grid: P, known: str) -> None:
    recompute = "full" if grid.sp and grid.pp > 1 else "none"
    for number, answers in enumerate(zip(*distributed.run(distributed.WORLD, compare, grid, known, recompute), strict=True)):
        model, is_lora = MODELS[number // 2], bool(number % 2)
        losses, gradients, owned = zip(*answers, strict=True)
        assert max(*losses, *gradients) <= TOLERANCE, (model, is_lora, max(losses), max(gradients))
        shape = tiny.shape(model)
        sizes = peft.tensors(ADAPTERS[model], shape) if is_lora else hf_shapes(shape)
        assert sum(owned) == sum(torch.Size(size).numel() for size in sizes.values())
        assert is_lora or sum(owned) == shape.parameters()


# --- files -----------------------------------------------------------------------------------------------------------------

CLASSES = Score(("safe", "unsafe"), "single_label_classification")
SEED = 11
Cases = dict[str, tuple[str, Score | None, dict[str, Any]]]


def exports(root: Path, cases: Cases) -> list[list[Tensor]]:
    """On every rank: load each case's source, which lies in root, with its head or with a new one, and export it to root/<case>.
    Returns the scores of the first row, as the last stage has them."""
    found = []
    for case, (source, score, parallel) in cases.items():
        shape = read_shape(root / source).scored(score)
        with started(P(**parallel), shape) as grid:
            chunks, _ = build(ModelConfig(path="", dtype="float32"), shape, grid)
            load(chunks, shape, grid, weights_at(root / source, shape, SEED), case)
            found.append(collect(chunks, [rows.rows(shape.vocab)[0]], lambda head, batch: head.scores(), grid))
            export(chunks, shape, grid, root / case, source=root / source, shard_bytes=20_000)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds classifiers as transformers itself writes them, and a model with a vocabulary, tied and not; each exported."""
    root = tmp_path_factory.mktemp("scores")
    for model in MODELS:
        hf: Any = hf_model(model, torch.float32)
        hf.save_pretrained(root / f"{model}-source")
    for model in ("qwen2", "qwen3-tied"):
        write(root / model, tiny.config(model), tiny.weights(model, torch.float32))
        write_tokenizer(root / model, 61)
    cases: Cases = {model: (f"{model}-source", None, {"tp": 4, "pp": 2, "sp": True}) for model in MODELS}
    cases |= {
        "new": ("qwen2", CLASSES, {"tp": 2, "pp": 2, "cp": 2}),
        "new-again": ("qwen2", CLASSES, {"tp": 4}),
        "new-tied-tokens": ("qwen3-tied", replace(CLASSES, every_token=True), {"tp": 2, "pp": 2, "sp": True}),
    }
    found = distributed.run(distributed.WORLD, exports, root, cases)
    torch.save({case: next(each[i] for each in found if each[i])[0] for i, case in enumerate(cases)}, root / "scores.pt")
    return root


def loaded(directory: Path, every_token: bool) -> Any:
    """The export as transformers reads it; every tensor must have been there, and no other."""
    hf, info = hf_class(every_token).from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return hf.eval()


@pytest.mark.parametrize("model", MODELS)
def test_a_classifier_of_transformers_comes_back(root: Path, model: str) -> None:
    source, shape = root / f"{model}-source", tiny.shape(model)
    assert shape.score is not None
    assert read_shape(source) == read_shape(root / model) == shape
    assert differences(read(root / model), load_file(source / "model.safetensors")) == []
    check_keys(Safetensors(root / model), shape, model)
    hf, theirs = loaded(root / model, shape.score.every_token), hf_class(shape.score.every_token).from_pretrained(source)
    assert hf.config.architectures == theirs.config.architectures
    assert hf.config.id2label == theirs.config.id2label == dict(enumerate(shape.score.labels))
    assert hf.config.label2id == {label: i for i, label in enumerate(shape.score.labels)}
    assert hf.config.problem_type == shape.score.problem
    tokens = torch.arange(24)[None] * 7 % 61
    with torch.no_grad():
        assert torch.equal(hf(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(("case", "source"), [("new", "qwen2"), ("new-again", "qwen2"), ("new-tied-tokens", "qwen3-tied")])
def test_a_model_with_a_vocabulary_gets_a_new_head(root: Path, case: str, source: str) -> None:
    """The decoder is the source's to the bit, the head a small draw that no grid changes, and transformers' scores are ours."""
    tensors, before = read(root / case), load_file(root / source / "model.safetensors")
    weight, bias = tensors.pop("score.weight"), tensors.pop("score.bias", torch.zeros(2))
    before.pop("lm_head.weight", None)
    assert differences(tensors, before) == []
    assert weight.shape == (2, 32)
    assert 0.01 < float(weight.std()) < 0.03
    assert not bias.any()
    assert torch.equal(weight, read(root / "new")["score.weight"])
    shape = read_shape(root / case)
    assert shape == tiny.shape(source).scored(shape.score)
    assert shape.score is not None
    config = json.loads((root / case / "config.json").read_text())
    assert config["num_labels"] == 2
    assert config["pad_token_id"] == 0
    assert config["tie_word_embeddings"] is False

    batch = rows.rows(61)[0]
    hf = loaded(root / case, shape.score.every_token)
    with torch.no_grad():
        hidden = [hf.model(tokens[None]).last_hidden_state[0] for tokens in batch.tokens.split(batch.lengths)]
        theirs = hf.score(torch.cat(hidden)[batch.rows])
    torch.testing.assert_close(torch.load(root / "scores.pt")[case], theirs, rtol=0, atol=1e-6)


def test_texts_of_one_batch_are_read_at_their_ends(root: Path) -> None:
    """transformers finds a text's end by `pad_token_id`: with the tokenizer's own padding, whichever side it fills."""
    from transformers import AutoTokenizer

    hf, tokenizer = loaded(root / "new", every_token=False), AutoTokenizer.from_pretrained(root / "new")
    texts = ["w1 w2 w3 <eos>", "w4 w5 w6 w7 w8 w9 <eos>"]
    with torch.no_grad():
        alone = torch.cat([hf(**tokenizer(text, return_tensors="pt")).logits for text in texts])
        for side in ("right", "left"):
            tokenizer.padding_side = side
            together = hf(**tokenizer(texts, return_tensors="pt", padding=True)).logits
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_a_token_that_ends_texts_is_no_padding(root: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 61)
    config: dict[str, Any] = {"vocab_size": 61}
    assert padding(tmp_path, config) == 0
    assert padding(tmp_path, {**config, "eos_token_id": [4, 0]}) is None
    assert padding(tmp_path, {"vocab_size": 0}) is None  # beyond the embedding
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for changes in ({"pad_token": "<eos>"}, {"pad_token": None}, {"pad_token": "unknown"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | changes))
        assert padding(tmp_path, config) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | {"pad_token": {"content": "<unk>"}}))
    assert padding(tmp_path, config) == 1
    assert padding(tmp_path / "nowhere", config) is None
    # transformers then refuses what it could only read wrongly.
    hf = loaded(root / "llama-reward", every_token=False)
    assert hf.config.pad_token_id is None
    with pytest.raises(ValueError, match="no padding token"):
        hf(torch.zeros(2, 3, dtype=torch.long))


# --- adapters --------------------------------------------------------------------------------------------------------------


def adapter_scores(model: str, directory: str, parallel: P) -> list[Tensor]:
    """The scores at made_rows' first row of the adapter in `directory` on the model."""
    shape = tiny.shape(model)
    with started(parallel, shape) as grid:
        chunks, _ = build(ModelConfig(path="", dtype="float64"), shape, grid)
        load(chunks, shape, grid, Tensors(tiny.weights(model)))
        found = peft.opened(directory, shape)
        Adapters(chunks, shape, grid, {"default": found.config}).fill("default", found)
        return collect(chunks, [made_rows(model)[0]], lambda head, batch: head.scores(), grid)


@pytest.mark.parametrize("model", MODELS)
def test_peft_reads_our_adapter_and_we_peft_s(model: str, tmp_path: Path) -> None:
    from peft import PeftModel

    cfg, shape = ADAPTERS[model], tiny.shape(model)
    tensors = lora_parity.weights(cfg, model)
    assert {name for name in tensors if ".score." in name} == {f"{peft.PREFIX}{name}" for name in hf_shapes(shape) if "score" in name}
    peft.write(tmp_path / "ours", tensors, cfg, shape, base="base")
    theirs = PeftModel.from_pretrained(hf_model(model), str(tmp_path / "ours"), autocast_adapter_dtype=False).eval()
    assert type(theirs).__name__ == f"PeftModelFor{'Token' if 'tokens' in model else 'Sequence'}Classification"
    with torch.no_grad():
        logits = hf_scores(theirs, made_rows(model)[0])
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    said = json.loads((tmp_path / "theirs" / peft.CONFIG).read_text())
    assert set(said["modules_to_save"]) >= {"classifier", "score"}  # as PEFT writes it, whatever the head is called
    assert differences(peft.whole(peft.opened(tmp_path / "theirs", shape)), tensors) == []
    for directory in ("ours", "theirs"):
        answers = distributed.run(distributed.WORLD, adapter_scores, model, str(tmp_path / directory), P(tp=2, pp=2, sp=True))
        found = [answer[0] for answer in answers if answer]
        assert len(found) == 4
        for scores in found:
            torch.testing.assert_close(scores, logits, rtol=TOLERANCE, atol=TOLERANCE)


def test_an_adapter_says_which_head_it_has(tmp_path: Path) -> None:
    model, plain = "qwen2-classes", tiny.shape("qwen2")
    cfg, shape = ADAPTERS[model], tiny.shape(model)
    assert shape.score is not None
    tensors = lora_parity.weights(cfg, model)
    write(tmp_path / "base", tiny.config("qwen2"), tiny.weights("qwen2", torch.float32))
    peft.write(tmp_path / "a", tensors, cfg, shape, base="base")
    assert peft.shape_with(tmp_path / "a", plain) == plain.scored(shape.score)
    adopted = peft.adopt(tmp_path / "a", tmp_path / "base", tmp_path / "checkpoints")
    assert peft.shape_with(adopted, plain) == plain.scored(shape.score)
    assert differences(peft.whole(peft.opened(adopted, plain.scored(shape.score))), tensors) == []
    # PEFT's own directories say no names.
    save_file(load_file(tmp_path / "a" / peft.TENSORS), tmp_path / "a" / peft.TENSORS)
    assert peft.shape_with(tmp_path / "a", plain).score == Score(("LABEL_0", "LABEL_1", "LABEL_2"), "single_label_classification")
    text = complaint(lambda: peft.shape_with(tmp_path / "a", plain.scored(CLASSES)))
    assert "an adapter with a head of 3 scores, LABEL_0, LABEL_1 and LABEL_2, and the base has a head of 2 scores, safe and unsafe" in text
    for said in ("{", "[]", '{"labels": []}', '{"labels": [], "problem": "regression", "every_token": false}'):
        save_file(load_file(tmp_path / "a" / peft.TENSORS), tmp_path / "a" / peft.TENSORS, metadata={peft.NAMES: said})
        assert f"{peft.TENSORS}: {peft.NAMES}" in complaint(lambda: peft.Peft(tmp_path / "a"))


def test_a_classifier_s_adapter_is_none_of_a_model_with_a_vocabulary(tmp_path: Path) -> None:
    cfg, shape = ADAPTERS["llama-reward"], tiny.shape("llama-reward")
    peft.write(tmp_path / "a", lora_parity.weights(cfg, "llama-reward"), cfg, shape, base="base")
    text = complaint(lambda: peft.opened(tmp_path / "a", replace(shape, score=None)))
    assert "1 unexpected: base_model.model.score.weight" in text
    assert complaint(lambda: peft.tensors(LoraConfig(modules_to_save=("lm_head",)), shape)) == (
        "lora.modules_to_save: 'lm_head', choose from: embed_tokens, score"
    )


# --- a notebook, and faults ------------------------------------------------------------------------------------------------


def test_whole_heads() -> None:
    hidden, weight, bias = torch.randn(5, 8, dtype=torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16), torch.ones(2)
    z = ScoreHead.whole(hidden, weight, bias).scores()
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, hidden.float() @ weight.float().t() + 1)
    assert ScoreHead.whole(hidden.double(), weight.double()).scores().dtype == torch.float64


QUESTIONS = ("logprobs", "statistics", "logsumexp", "entropy", "topk", "greedy", "logits")


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_head_of_scores_has_no_vocabulary(question: str) -> None:
    head = ScoreHead(torch.zeros(1, 8), torch.zeros(2, 8), None, CLASSES, torch.zeros(1, dtype=torch.long))
    assert complaint(getattr(head, question)) == (
        f"this model has a head of 2 scores, safe and unsafe: a loss asks head.scores(), not head.{question}()"
    )
    text = complaint(Head.whole(torch.zeros(1, 8), torch.zeros(9, 8)).scores)
    assert text == "this model's head is the vocabulary, which has no scores: set model.score for a head that has"


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (Score((), "regression"), "no labels"),
        (Score(tuple(map(str, range(64))), "regression"), "64 labels: at most 63"),
        (Score(("a", "b", "a"), "regression"), "the label 'a': names, each once, were expected"),
        (Score(("a", ""), "regression"), "the label '': names"),
        (Score(("a",), "single_label_classification"), "single_label_classification of one label"),
        (Score(("a",), "regresion"), "problem = 'regresion', did you mean 'regression'?"),  # type: ignore[arg-type]
    ],
)
def test_a_head_that_cannot_be(score: Score, words: str) -> None:
    text = complaint(lambda: tiny.shape("qwen2").scored(score))
    assert text.startswith("model.score: ")
    assert words in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label = {'0': 'a', '2': 'b'}: an object with a name for each of 0, 1, … was expected"),
        ({"id2label": ["a"]}, "id2label = ['a']: an object"),
        ({"id2label": {"0": "a", "1": "a"}}, "the label 'a': names, each once, were expected"),
        ({"id2label": {}}, "no labels"),
        ({"id2label": None, "num_labels": "2"}, "num_labels = '2': a positive integer was expected"),
        ({"problem_type": "ranking"}, "problem = 'ranking', choose from: "),
        ({"id2label": {"0": "a"}, "problem_type": "single_label_classification"}, "single_label_classification of one label"),
        (
            {"architectures": ["Qwen2ForTokenClassification"], "token_classification_bias": False},
            "token_classification_bias = false is not supported: only true",
        ),
    ],
)
def test_a_config_with_scores_that_megamod_cannot_compute(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("qwen2-classes", **changes)))
    text = complaint(lambda: read_shape(tmp_path))
    assert text.startswith(f"{tmp_path}: config.json: ")
    assert words in text


def test_what_transformers_leaves_out_of_a_config() -> None:
    def score(**changes: Any) -> Score | None:
        return shape_of(tiny.config("llama-reward", **changes)).score

    assert score() == Score(("reward",), "regression")
    assert score(id2label=None) == Score(("LABEL_0", "LABEL_1"), "single_label_classification")
    assert score(id2label=None, num_labels=1) == Score(("LABEL_0",), "regression")
    assert score(architectures=["LlamaForCausalLM"]) is score(architectures=None) is None
    assert not shape_of(tiny.config("llama-reward", tie_word_embeddings=True)).tied


def test_a_checkpoint_s_own_head_may_be_named_and_not_changed() -> None:
    own = shape_of(tiny.config("qwen2-classes", id2label=None))
    assert own.scored(CLASSES).score == CLASSES
    assert own.scored(None) is own
    for shape, score in (
        (own, replace(CLASSES, labels=("a", "b", "c"))),
        (own, replace(CLASSES, every_token=True)),
        (own.scored(CLASSES), replace(CLASSES, labels=("unsafe", "safe"))),
    ):
        text = complaint(lambda shape=shape, score=score: shape.scored(score))  # type: ignore[misc]
        assert text.startswith(f"model.score is {score}, and the checkpoint has {shape.score}: leave model.score out")
    assert str(Score(("reward",), "regression")) == "a head of 1 score, reward"
    assert str(Score(("a", "b", "c"), "regression", every_token=True)) == "a head of 3 scores for every token, a, b and c"
    assert str(Score(tuple(map(str, range(9))), "regression")).endswith("0, 1, 2, 3, 4, 5, 6, 7 and 1 more")


def test_a_new_head_beside_another_is_refused(tmp_path: Path) -> None:
    shape = tiny.shape("qwen2").scored(CLASSES)
    with pytest.raises(MegamodError, match=r"score.weight is \(3, 32\), and a head of 2 scores, safe and unsafe needs \(2, 32\)"):
        Scored(Tensors({**tiny.weights("qwen2"), "score.weight": torch.zeros(3, 32)}), shape, SEED)


def test_a_head_of_scores_is_counted() -> None:
    plain, shape = tiny.shape("qwen2"), tiny.shape("qwen2").scored(replace(CLASSES, every_token=True))
    assert shape.parameters() == plain.parameters() - 61 * 32 + 2 * 32 + 2 == sum(torch.Size(s).numel() for s in hf_shapes(shape).values())
    assert plain.flops([4, 3], 5) - shape.flops([4, 3], 5) == 2 * 32 * (61 - 2) * 5
    assert [row.ours for row in table(shape)][-2:] == ["output_layer.weight", "output_layer.bias"]
