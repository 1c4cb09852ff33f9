"""Preference and reward losses on grids against TRL's trainers in one process, in float64 to 1e-11; classifiers' losses against torch.

TRL reads the same documents as texts, all of a step in one batch. Compared: the value, every gradient, what both report; ten steps of
LoRA, each with its norm, and the weights after them. Nothing of ours is used by TRL but the order in which a step has its documents:
KTO's KL takes each prompt with the answer of the one before it.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import lora_parity
import numpy as np
import oracle
import parity
import preferences
import pytest
import tiny
import torch
import torch.nn.functional as F
from parity import Case, Run
from torch import Tensor, nn
from trl_oracle import EOS, SPECIAL, Texts, Trl, in_double, inputs_of, metrics_of, pairs_of, value_of

from megamod import losses
from megamod.batch import Batch
from megamod.config import LoraConfig, ModelConfig, OptimConfig, ReferenceConfig
from megamod.config import ParallelConfig as P
from megamod.data.documents import IGNORED, Document, InMemory
from megamod.data.loader import Loader
from megamod.data.packing import micro_batch
from megamod.losses import LossFunction
from megamod.model.build import build, data_parallel
from megamod.model.head import ScoreHead
from megamod.model.lora import Plan
from megamod.optim import Optimizer
from megamod.parallel.grid import Grid, started
from megamod.reference import Reference, adapter_beside
from megamod.step import train_step
from megamod.weights import peft
from megamod.weights.load import Tensors, load

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*", "ignore::UserWarning:peft.*")
TOLERANCE = 1e-11
ROWS, ROW = 8, 48  # of a step, which is an epoch: TRL has all documents in one batch
VOCAB = tiny.BASE["vocab_size"]

# --- documents -------------------------------------------------------------------------------------------------------------

# Tokens of the prompt, of the better and of the worse answer. No prompt and answer together are longer than a row: nothing is cut.
PAIRS = (
    (2, 3, 25), (5, 11, 22), (14, 1, 15), (3, 31, 1), (1, 1, 2), (10, 6, 6), (3, 2, 7), (1, 28, 2), (6, 16, 10), (2, 2, 2), (3, 4, 5),
    (1, 33, 12),
)  # fmt: skip
ALONE = ((4, 9, True), (1, 2, False), (8, 2, False))  # rated answers that are no pair's


def documents(kind: str) -> list[Document]:
    """What a trainer of TRL's reads: pairs, for KTO rated answers beside them, for a reward model with margins."""
    rng = np.random.default_rng(5)

    def document(prompt: Sequence[int], answer: int, **more: Any) -> Document:
        tokens = np.array([*prompt, *rng.integers(SPECIAL, VOCAB, size=answer - 1), EOS])
        labels, classes = np.full(len(tokens), IGNORED), None
        if kind == "Reward":
            classes = labels.copy()
            classes[-1] = 0
        else:
            labels[len(prompt) :] = tokens[len(prompt) :]
        return Document(tokens, labels, np.zeros(len(tokens), np.bool_), classes=classes, **more)

    made = []
    for number, (length, better, worse) in enumerate(PAIRS):
        prompt = rng.integers(SPECIAL, VOCAB, size=length).tolist()
        # Of a pair megamod takes both mismatched answers from the pair before; TRL's KTO knows no pairs. TRL's margins are fp32.
        made += [document(prompt, better, side=1, margin=number / 4), document(prompt, worse, side=-1, joined=kind != "KTO")]
    for length, answer, wanted in ALONE if kind == "KTO" else ():
        made.append(document(rng.integers(SPECIAL, VOCAB, size=length).tolist(), answer, side=1 if wanted else -1))
    return made


def loader(kind: str, dp_rank: int = 0, dp_size: int = 1, micro_batches: int = ROWS) -> Loader:
    rows = ROWS // (dp_size * micro_batches)
    made = InMemory(documents(kind))
    result = Loader(made, row_length=ROW, rows_per_step=ROWS, rows_per_micro_batch=rows, seed=1, dp_rank=dp_rank, dp_size=dp_size)
    assert result.rows == ROWS
    return result


def texts_of(batch: Batch) -> list[tuple[int, ...]]:
    """The tokens of each document, and what is left of the rows."""
    return [tuple(tokens.tolist()) for tokens in batch.tokens.split(batch.lengths)]


def in_order(kind: str, step: int) -> list[Document]:
    """The documents of a step, each once, in the order in which it has them."""
    known = {(tuple(d.tokens.tolist()), d.side): d for d in documents(kind)}
    batches = loader(kind).step(step)
    found = [known[text, side] for b in batches for text, side in zip(texts_of(b), b.side.tolist(), strict=True) if side]
    assert len(found) == len(known) == len(documents(kind)) == len(set(map(id, found)))
    return found


# --- losses: TRL's and ours ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Same:
    """A loss of ours, and how TRL is told to compute the same."""

    kind: str
    loss: LossFunction
    trl: dict[str, Any]
    model: str = "qwen3-tied"
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    swapped: bool = False  # the two models' weights: what the policy had, the reference has

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The policy's and the reference's."""
        own, other = tiny.weights(self.model), preferences.other_weights(self.model)
        return (other, own) if self.swapped else (own, other)


E = 0.2  # how often labels are the wrong way round
KTO: dict[str, Any] = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
LOSSES = {
    "dpo": Same("DPO", partial(losses.dpo, beta=0.3), {"beta": 0.3}),
    "dpo, swapped": Same("DPO", losses.dpo, {}, model="llama-bias-tied", swapped=True),
    "dpo + sft": Same(
        "DPO", partial(losses.dpo, beta=0.3, sft_weight=0.5), {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    ),
    # With a = -log σ(βΔ) and b = -log σ(-βΔ), TRL's robust loss is ((1 - ε)·a - ε·b) / (1 - 2ε), so (1 - ε)·a + ε·b is a sum of both.
    "dpo, smoothed": Same(
        "DPO", partial(losses.dpo, beta=0.3, label_smoothing=E),
        {"beta": 0.3, "loss_type": ["sigmoid", "robust"], "loss_weights": [2 * (1 - E), 2 * E - 1], "label_smoothing": E},
    ),
    "dpo, reference-free": Same("DPO", partial(losses.dpo, beta=0.3), {"beta": 0.3}, reference=ReferenceConfig(kind="uniform")),
    "ipo": Same("DPO", partial(losses.ipo, beta=0.4), {"beta": 0.4, "loss_type": ["ipo"]}),
    "ipo + sft": Same(
        "DPO", partial(losses.ipo, beta=0.4, sft_weight=0.5), {"beta": 0.4, "loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]},
        model="llama-bias-tied",
    ),
    "kto": Same("KTO", partial(losses.kto, **KTO), KTO),
    "kto, swapped": Same("KTO", partial(losses.kto, **KTO), KTO, swapped=True),
    "reward": Same("Reward", losses.reward, {}, model="llama-reward"),
    "reward, centred": Same("Reward", partial(losses.reward, centering=0.3), {"center_rewards_coefficient": 0.3}, model="llama-reward"),
}  # fmt: skip
CLAMPED = {"kto": True, "kto, swapped": False}  # whether the estimate of KL is below 0
WORLD = 4
GRIDS = {"tp 2 · pp 2 · sp": P(tp=2, pp=2, sp=True), "cp 2 · dp 2": P(cp=2)}


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Trl:
    # Imported here: the ranks import this module, and need neither.
    from test_weights import write_tokenizer
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("trl")
    write_tokenizer(folder, VOCAB)
    return Trl(folder, AutoTokenizer.from_pretrained(folder))


def texts(trl: Trl, kind: str, order: Sequence[Document]) -> list[dict[str, Any]]:
    of = Texts(trl.tokenizer)
    return {"DPO": of.pairs, "KTO": of.rated, "Reward": of.scored}[kind](order)


def trainer_of(trl: Trl, same: Same) -> Any:
    """TRL's trainer of one loss, that sees step 0."""
    from test_score_head import hf_model

    def model(weights: Mapping[str, Tensor]) -> nn.Module:
        made = hf_model(same.model) if same.kind == "Reward" else oracle.model(same.model)
        assert set(made.load_state_dict(weights, strict=False).missing_keys) <= {"lm_head.weight"}
        return made

    policy, other = (model(weights) for weights in same.weights())
    reference = None if same.kind == "Reward" else other
    made = trl.trainer(same.kind, texts(trl, same.kind, in_order(same.kind, 0)), policy, reference=reference, **same.trl)
    made.precompute_ref_logps = same.reference.kind == "uniform"  # it is told the reference's log-probabilities with the batch
    return made


def batch_of(trainer: Any, same: Same) -> dict[str, Any]:
    inputs = inputs_of(trainer)
    if same.reference.kind == "uniform":
        inputs |= {f"ref_{side}_logps": torch.zeros(len(inputs["input_ids"]) // 2, dtype=torch.float64) for side in ("chosen", "rejected")}
    return inputs


def gradients_of(trainer: Any) -> dict[str, Tensor]:
    return {name: param.grad for name, param in trainer.model.named_parameters() if param.grad is not None}


@dataclass
class Known:
    """What TRL says, and where the ranks read the numbers."""

    metrics: dict[str, dict[str, float]]  # loss → what its trainer has noted
    file: str


@pytest.fixture(scope="module")
def known(trl: Trl, tmp_path_factory: pytest.TempPathFactory) -> Known:
    numbers, metrics = {}, {}
    with in_double():
        for name, same in LOSSES.items():
            trainer = trainer_of(trl, same)
            numbers[name] = value_of(trainer, batch_of(trainer, same)), gradients_of(trainer)
            metrics[name] = metrics_of(trainer)
    path = tmp_path_factory.mktemp("expected") / "losses.pt"
    torch.save(numbers, path)
    return Known(metrics, str(path))


def prepared(same: Same, parallel: P, grid: Grid) -> tuple[Run, Reference]:
    shape, (own, other) = tiny.shape(same.model), same.weights()
    chunks, _ = build(ModelConfig(path="", dtype="float64"), shape, grid)
    items = load(chunks, shape, grid, Tensors(own))
    wrapped = data_parallel(chunks, grid, overlap=False)
    run = Run(grid, Case(same.model, parallel), Optimizer(OptimConfig(), wrapped, items, grid))
    return run, Reference(preferences.config(same.loss, same.reference), shape, grid, wrapped, items, None, Tensors(other))


def stepped(run: Run, reference: Reference, same: Same, step: int) -> None:
    grid = run.grid
    # Two micro-batches a rank, where there are rows for them: what is of a step must not be of a micro-batch.
    made = loader(same.kind, grid.dp.rank, grid.dp.size, min(2, ROWS // grid.dp.size))
    batches = reference.complete(made.step(step), partial(made.mismatched, step, grid.pp.size))
    run.metrics = train_step(run.optimizer.chunks, batches, same.loss, grid)


Found = tuple[float, int, dict[str, float]]  # the worst error of a gradient, elements owned, metrics: none but on the last stage


def compare(parallel: P, names: Sequence[str], file: str) -> list[Found]:
    """What a rank finds for each of the losses."""
    numbers, found = torch.load(file, weights_only=True), []
    with started(parallel, tiny.shape(LOSSES[names[0]].model)) as grid:  # as many kv heads as the others
        for name in names:
            run, reference = prepared(LOSSES[name], parallel, grid)
            stepped(run, reference, LOSSES[name], 0)
            metrics = {key: float(value) for key, value in run.metrics.items()}
            found.append((parity.worst(run, numbers[name][1], parity.gradient), parity.owned(run), metrics))
            del run, reference
    gc.collect()
    return found


# Ours → TRL's, where they are not called alike.
RENAMED = {"Reward": {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}}
IN_FP32 = ("rewards/accuracies",)  # TRL's mean of a truth
OURS = {"DPO": {"loss", "log_ratio"}, "KTO": {"loss"}, "Reward": {"loss", "rewards/chosen", "rewards/rejected"}}  # TRL has no such metric


def off(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-30) if found != expected else 0.0


def check(world: int, parallel: P, known: Known) -> None:
    names = list(LOSSES)
    values = {name: float(value) for name, (value, _) in torch.load(known.file, weights_only=True).items()}
    answers = distributed.run(world, compare, parallel, names, known.file)
    faults = []
    for name, ranks in zip(names, zip(*answers, strict=True), strict=True):
        same = LOSSES[name]
        gradients, owned, metrics = zip(*ranks, strict=True)
        report = next(filter(None, metrics))
        errors = {"loss": off(report["loss"], values[name]), "a gradient": max(gradients)}
        for key in report.keys() - OURS[same.kind]:
            there = known.metrics[name][RENAMED.get(same.kind, {}).get(key, key)]
            errors[key] = off(report[key], there) if key not in IN_FP32 else float(abs(report[key] - there) > 1e-6)
        faults += [f"{name}: {what} is off by {error:.1e}" for what, error in errors.items() if not error <= TOLERANCE]
        assert all(m == report for m in metrics if m)
        assert sum(owned) == tiny.shape(same.model).parameters()
    assert not faults, "\n".join(faults)


def test_single(known: Known) -> None:
    """One process."""
    check(1, P(), known)


@pytest.mark.parametrize("grid", GRIDS)
def test_grid(grid: str, known: Known) -> None:
    check(WORLD, GRIDS[grid], known)


def test_kl_is_clamped_in_one_case_alone(known: Known) -> None:
    for name, clamped in CLAMPED.items():
        assert (known.metrics[name]["kl"] == 0) is clamped
    assert known.metrics["kto, swapped"]["kl"] > 0.1


def test_trl_s_kernel_says_the_same(trl: Trl, known: Known) -> None:
    """As TRL comes, with its kernel in fp32: what `in_double` puts in its place changes nothing but the precision."""
    numbers = torch.load(known.file, weights_only=True)
    for name in ("dpo", "ipo + sft", "kto, swapped"):
        trainer = trainer_of(trl, LOSSES[name])
        value = trainer.compute_loss(trainer.model, inputs_of(trainer))
        value.backward()
        assert float(value.detach()) == pytest.approx(float(numbers[name][0]), rel=1e-5)
        gradients = gradients_of(trainer)
        assert gradients.keys() == numbers[name][1].keys()
        for key, there in numbers[name][1].items():
            assert float((gradients[key] - there).abs().max() / there.abs().max()) < 1e-4, (name, key)


def test_mismatched_pairs_are_trl_s(trl: Trl) -> None:
    """Prompt i and answer i - 1, the first one with the last answer: the same texts, each as often."""
    for step in (0, 1):
        order = in_order("KTO", step)
        trainer = trl.trainer("KTO", texts(trl, "KTO", order), oracle.model("qwen3-tied"), reference=oracle.model("qwen3-tied"))
        inputs = inputs_of(trainer)
        columns = zip(inputs["KL_input_ids"], inputs["KL_attention_mask"], inputs["KL_completion_mask"], strict=True)
        theirs = [(tuple(ids[mask > 0].tolist()), int(answer.sum())) for ids, mask, answer in columns]
        ours = []
        for batch in loader("KTO").mismatched(step, multiple=3):
            trained = batch.per_sequence(torch.ones(len(batch.labels))).tolist()
            ours += [(text, int(n)) for text, n, side in zip(texts_of(batch), trained, batch.side.tolist(), strict=True) if side]
        assert sorted(ours) == sorted(theirs)
        assert len(theirs) == len(order)


def test_uniform_is_free_of_a_reference(known: Known) -> None:
    """Mean of -log σ(β·(log π⁺ - log π⁻)), from transformers alone."""
    same = LOSSES["dpo, reference-free"]
    hf = oracle.model(same.model)

    def logprob(document: Document) -> Tensor:
        tokens = torch.from_numpy(document.tokens)
        logp = hf(tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        return logp[torch.from_numpy(document.labels[1:] != IGNORED)].sum()

    value = torch.stack([-F.logsigmoid(0.3 * (logprob(a) - logprob(b))) for a, b in pairs_of(documents("DPO"))]).mean()
    assert float(torch.load(known.file, weights_only=True)["dpo, reference-free"][0]) == pytest.approx(float(value.detach()), rel=TOLERANCE)


# --- adapters: a new one compares with the base, one gone on from with what it was ----------------------------------------------


@dataclass(frozen=True)
class Adapted:
    """Ten steps of a loss on an adapter."""

    same: Same
    is_new: bool = True  # else trained already, and gone on from
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(r=3, lora_alpha=6))
    begins: int = 5  # seed of the weights: not zero, also a new one's, so that the place of each matters

    @property
    def own(self) -> dict[str, Tensor]:
        return lora_parity.weights(self.lora, self.same.model, self.begins)


STEPS = 10
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.5)
ADAPTED = {
    "dpo": Adapted(replace(LOSSES["dpo"], model="llama-bias-tied")),
    "kto": Adapted(LOSSES["kto"]),
    "dpo after sft": Adapted(replace(LOSSES["dpo + sft"], model="llama-bias-tied"), is_new=False),
    "kto after sft": Adapted(LOSSES["kto"], is_new=False, lora=LoraConfig(r=4, use_rslora=True, target_modules=("q_proj", "down_proj"))),
}
ADAPTED_ON = {"tp 2 · pp 2 · sp": ("kto", "dpo after sft"), "cp 2 · dp 2": ("dpo", "kto after sft")}


def ran(trl: Trl, one: Adapted, path: Path) -> dict[str, Any]:
    """TRL's run: what it compares with, its norms before clipping, its estimates of KL, and the weights after it."""
    from peft import LoraConfig as Peft
    from peft import PeftModel

    same, shape = one.same, tiny.shape(one.same.model)
    peft.write(path, one.own, one.lora, shape, base="base")
    orders = [in_order(same.kind, step) for step in range(STEPS)]
    rows = [row for order in orders for row in texts(trl, same.kind, order)]
    batch, base = len(rows) // STEPS, oracle.model(same.model)
    options = {**same.trl, "max_grad_norm": OPTIM.clip_grad, "num_train_epochs": 1, "logging_steps": 1, "lr_scheduler_type": "constant"}
    if one.is_new:
        said: Any = Peft(**{**peft.config_json(one.lora, shape, "base"), "inference_mode": False})
        trainer = trl.trainer(same.kind, rows, base, batch=batch, peft=said, **options)
    else:
        begun = PeftModel.from_pretrained(base, str(path), is_trainable=True, autocast_adapter_dtype=False)
        trainer = trl.trainer(same.kind, rows, begun, batch=batch, **options)
    params = lora_parity.trained(trainer.model)
    assert params.keys() == one.own.keys()
    for name, param in params.items():
        param.data = one.own[name].clone()
    trainer.optimizer = torch.optim.AdamW(params.values(), OPTIM.lr, OPTIM.betas, OPTIM.eps, OPTIM.weight_decay)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)
    inputs = inputs_of(trainer)
    with torch.no_grad():
        compared = trainer.compute_ref_log_probs(trainer.model, inputs)
    sums = torch.stack(compared, 1).flatten() if same.kind == "DPO" else compared[0]  # in the order of the documents
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)
    log = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(log) == STEPS
    return {
        "reference": dict(zip((tuple(d.tokens.tolist()) for d in orders[0]), sums.tolist(), strict=True)),
        "norms": [line["grad_norm"] for line in log],
        "kl": [line["kl"] for line in log if "kl" in line],
        "weights": {name: param.detach().clone() for name, param in params.items()},
    }


@pytest.fixture(scope="module")
def runs(trl: Trl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with TRL's runs, and the adapters they began with."""
    folder = tmp_path_factory.mktemp("runs")
    with in_double():
        torch.save({name: ran(trl, one, folder / name) for name, one in ADAPTED.items()}, folder / "known.pt")
    return folder


def optimize(parallel: P, names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """For each of the runs on this rank: worst errors of norms, KL and weights, and what the reference says, at first and at the end."""
    known, found = torch.load(folder / "known.pt", weights_only=True), []
    with started(parallel, tiny.shape(ADAPTED[names[0]].same.model)) as grid:  # as many kv heads as the others
        for name in names:
            found.append(optimized(ADAPTED[name], grid, folder / name, known[name]))
    gc.collect()
    return found


def adapted(one: Adapted, grid: Grid, path: Path) -> tuple[Run, Reference]:
    """As megamod.train does it; a new adapter would begin with B = 0, so it is filled here."""
    same, shape = one.same, tiny.shape(one.same.model)
    lora = one.lora if one.is_new else LoraConfig(path=str(path))
    cfg = preferences.config(same.loss, same.reference, lora=lora)
    base, plan = Tensors(tiny.weights(same.model)), Plan.of(lora, shape)
    beside = adapter_beside(cfg, shape, plan)
    chunks, _ = build(cfg.model, shape, grid)
    load(chunks, shape, grid, base)
    adapters = plan.attach(chunks, shape, grid, base, 0, path, beside)
    if one.is_new:
        adapters.fill("default", Tensors(one.own))
    wrapped = data_parallel(chunks, grid, overlap=False)
    run = Run(grid, Case(same.model, P()), Optimizer(OPTIM, wrapped, adapters.items, grid))
    return run, Reference(cfg, shape, grid, wrapped, adapters.items, adapters, base)


def optimized(one: Adapted, grid: Grid, path: Path, known: dict[str, Any]) -> dict[str, Any]:
    same = one.same
    run, reference = adapted(one, grid, path)
    compared = {"first": sums_of(run, reference, same)}
    worst = {"norm": 0.0, "kl": 0.0}
    for step, norm in enumerate(known["norms"]):
        stepped(run, reference, same, step)
        worst["norm"] = max(worst["norm"], off(run.optimizer.step(OPTIM.lr).grad_norm, norm))
        if known["kl"] and run.metrics:
            worst["kl"] = max(worst["kl"], off(float(run.metrics["kl"]), known["kl"][step]))
        reference.follow(step + 1)
    compared["last"] = sums_of(run, reference, same)
    if not one.is_new:
        against_base = replace(one, same=replace(same, reference=ReferenceConfig(kind="base")))
        compared["base"] = sums_of(*adapted(against_base, grid, path), same)
    return {**worst, "weights": parity.worst(run, known["weights"], lambda s: s.master.detach()), "reference": compared}


def sums_of(run: Run, reference: Reference, same: Same) -> dict[tuple[int, ...], float]:
    """The reference's log-probability of each answer of step 0 that this rank knows of."""
    dp = run.grid.dp
    made = loader(same.kind, dp.rank, dp.size, min(2, ROWS // dp.size))
    found: dict[tuple[int, ...], float] = {}
    for batch in reference.complete(made.step(0), partial(made.mismatched, 0, run.grid.pp.size)):
        if run.grid.is_last_stage:
            sums = torch.zeros(batch.sequences, dtype=torch.float64).index_add(0, batch.sequence, batch.reference)
            found |= {text: float(sums[i]) for i, text in enumerate(texts_of(batch)) if batch.side[i]}
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_ten_steps(grid: str, runs: Path) -> None:
    """The norm of every step, KTO's KL, the weights after the last; the reference is TRL's, and stays."""
    known, names = torch.load(runs / "known.pt", weights_only=True), ADAPTED_ON[grid]
    answers = distributed.run(WORLD, optimize, GRIDS[grid], names, runs)
    for name, ranks in zip(names, zip(*answers, strict=True), strict=True):
        errors = {what: max(rank[what] for rank in ranks) for what in ("norm", "kl", "weights")}
        assert max(errors.values()) <= TOLERANCE, (name, errors)
        for moment in ranks[0]["reference"]:
            found = {text: value for rank in ranks for text, value in rank["reference"][moment].items()}
            theirs = known[name.partition(" ")[0] if moment == "base" else name]["reference"]  # a new adapter's is the base
            assert found == pytest.approx(theirs, rel=TOLERANCE), (name, moment)


def test_what_was_gone_on_from_is_far_from_the_base(runs: Path) -> None:
    """So one cannot pass for the other as a reference; and KTO's KL is not always 0."""
    known = torch.load(runs / "known.pt", weights_only=True)
    for name in ("dpo", "kto"):
        base, begun = known[name]["reference"], known[f"{name} after sft"]["reference"]
        assert base.keys() == begun.keys()
        assert sum(abs(base[text] - begun[text]) for text in base) / len(base) > 0.1
    assert max(known["kto"]["kl"]) > 0


# --- classifiers: torch's own losses, or the papers' formulas, in one process ----------------------------------------------------

CHANNELS = 6


def classes_batch(classes: Sequence[int]) -> Batch:
    """One document for each, of one to three tokens, with a weight; what is left of the row has no class."""
    made = []
    for number, bits in enumerate(classes):
        length = number % 3 + 1
        asked = np.full(length, IGNORED)
        asked[-1] = bits
        nothing = np.full(length, IGNORED)
        made.append(Document(np.full(length, 7), nothing, np.zeros(length, np.bool_), weight=0.5 + number / 8, classes=asked))
    return micro_batch([made], sum(len(d.tokens) for d in made) + 5)


def check_classes(
    loss: Callable[..., losses.Loss],
    classes: Sequence[int],
    labels: int,
    expected: Callable[[Tensor], Tensor],
    names: tuple[str, ...] | None = None,
) -> None:
    """Value and gradients against the weighted mean of `expected`: scores `[N, L]` → `[N]`."""
    generator = torch.Generator().manual_seed(labels)
    batch = classes_batch(classes)
    assert len(batch.rows) == len(classes)
    tensors = [
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((len(classes), CHANNELS), (labels, CHANNELS), (labels,))
    ]
    ours, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    value = loss(ScoreHead.whole(*ours, names), batch).value
    hidden, weight, bias = theirs
    share = torch.tensor([0.5 + i / 8 for i in range(len(classes))], dtype=torch.float64)
    known = (share * expected(hidden @ weight.t() + bias)).sum() / share.sum()
    torch.testing.assert_close(value, known, rtol=1e-12, atol=0)
    value.backward()
    known.backward()
    for mine, there in zip(ours, theirs, strict=True):
        assert mine.grad is not None and there.grad is not None
        assert float((mine.grad - there.grad).abs().max() / there.grad.abs().max()) < 1e-12


ONE_OF = [0, 1, 2, 3, 1, 0, 2, 2, 3]
WEIGHTS = (1.0, 0.3, 2.7, 1.1)


def truths(classes: Sequence[int], labels: int) -> Tensor:
    """`[N, L]` of bits."""
    return torch.tensor([[float(bits >> i & 1) for i in range(labels)] for bits in classes], dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_classification(weights: tuple[float, ...] | None, gamma: float) -> None:
    """torch's cross-entropy, each class with its weight, and the focal loss."""
    target = torch.tensor(ONE_OF)

    def expected(z: Tensor) -> Tensor:
        own = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        p = z.softmax(-1).gather(-1, target[:, None])[:, 0]
        return (1 - p) ** gamma * F.cross_entropy(z, target, weight=own, reduction="none")

    check_classes(partial(losses.classification, class_weights=weights, gamma=gamma), [1 << c for c in ONE_OF], 4, expected)


ANY_OF = [0, 1, 5, 10, 15, 8, 3, 0, 6]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_multilabel(weights: tuple[float, ...] | None) -> None:
    """torch's binary cross-entropy with its pos_weight."""

    def expected(z: Tensor) -> Tensor:
        own = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        return F.binary_cross_entropy_with_logits(z, truths(ANY_OF, 4), pos_weight=own, reduction="none").mean(-1)

    check_classes(partial(losses.multilabel, pos_weight=weights), ANY_OF, 4, expected)


@pytest.mark.parametrize(
    ("positive", "negative", "clip"), [(2.0, 2.0, 0.0), (0.5, 1.5, 0.0), (1.0, 4.0, 0.05), (0.0, 2.0, 0.3), (0.0, 0.0, 0.2)]
)
def test_asymmetric(positive: float, negative: float, clip: float) -> None:
    """The focal and the asymmetric loss, written with probabilities; some of the negatives are easy, and count nothing."""
    y = truths(ANY_OF, 4)

    def expected(z: Tensor) -> Tensor:
        p = z.sigmoid()
        lowered = (p - clip).clamp(min=0)
        assert not clip or bool((lowered == 0).any())
        each = y * (1 - p) ** positive * p.log() + (1 - y) * lowered**negative * (1 - lowered).log()
        return -each.mean(-1)

    check_classes(partial(losses.multilabel, gamma_positive=positive, gamma_negative=negative, clip=clip), ANY_OF, 4, expected)


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_streaming(weight: float) -> None:
    """Two softmaxes; of a safe token the second counts nothing, of two categories each a half."""
    severity = [0, 1, 2, 0, 2, 1, 0, 2, 1]
    categories = [0, 0b0001, 0b1010, 0b0100, 0b1111, 0b1000, 0, 0b0010, 0]  # also of a safe one, and none of one that is not

    def expected(z: Tensor) -> Tensor:
        each = []
        for scores, level, kinds in zip(z, severity, categories, strict=True):
            value = F.cross_entropy(scores[:3], torch.tensor(level))
            named = [i for i in range(4) if kinds >> i & 1]
            if level and named:
                value = value + weight * torch.stack([F.cross_entropy(scores[3:], torch.tensor(i)) for i in named]).mean()
            each.append(value)
        return torch.stack(each)

    bits = [1 << level | kinds << 3 for level, kinds in zip(severity, categories, strict=True)]
    names = ("safe", "controversial", "unsafe", "a", "b", "c", "d")
    check_classes(partial(losses.streaming, category_weight=weight), bits, 7, expected, names)


@pytest.mark.parametrize(
    "loss",
    [
        partial(losses.classification, gamma=0.5), partial(losses.multilabel, gamma_positive=0.5, gamma_negative=0.5),
        partial(losses.multilabel, gamma_negative=0.5, clip=0.05), partial(losses.multilabel, gamma_negative=2.0, clip=0.05),
    ],
    ids=["one class", "any", "clipped", "clipped, squared"],
)  # fmt: skip
def test_certain_answers_have_finite_gradients(loss: Callable[..., losses.Loss]) -> None:
    """Probabilities that are 1 or 0 to the last bit, as fp32 soon has them, where x^γ is as steep as can be."""
    weight = torch.eye(4).requires_grad_()
    hidden = torch.tensor([[200.0, -200, -200, -200], [-200, 200, -200, -200]]).requires_grad_()
    value = loss(ScoreHead.whole(hidden, weight), classes_batch([1, 1])).value
    value.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert bool(value.isfinite()) and bool(hidden.grad.isfinite().all()) and bool(weight.grad.isfinite().all())
