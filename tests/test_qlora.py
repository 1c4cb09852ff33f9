"""QLoRA under Megatron against transformers, peft and bitsandbytes in one process, in float64 to 1e-11.

What is in 4 bits is made and read by bitsandbytes. Blocks of 32 to 1,024 numbers on weights of 32 × 32 to 48 × 32: every cut of tensor
parallelism falls inside blocks, and blocks go over rows.
"""

import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import distributed
import lora_parity as lora
import numpy as np
import oracle
import parity
import preferences
import pytest
import tiny
import torch
from lora_parity import LoraCase
from parity import Case
from safetensors.torch import save_file

from megamod.config import LoraConfig, OptimConfig
from megamod.config import ParallelConfig as P
from megamod.data.documents import IGNORED, Document
from megamod.data.packing import micro_batch
from megamod.model.shape import shape_of
from megamod.weights import bitsandbytes, fingerprint, peft
from megamod.weights.bitsandbytes import Quantizing
from megamod.weights.load import SINGLE, Random, Tensors
from megamod.weights.quantization import Quantization

TOLERANCE = 1e-11
GRIDS = [
    P(), P(tp=2), P(tp=2, sp=True), P(tp=4), P(pp=2), P(tp=2, pp=2, sp=True), P(tp=4, pp=2, sp=True), P(cp=2), P(tp=2, cp=2, sp=True),
    P(tp=2, pp=2, cp=2, sp=True), P(pp=2, vpp=2), P(tp=2, pp=2, vpp=2, sp=True), P(tp=8, sp=True), P(pp=4),
    P(tp=2, cp=2, sp=True, shard_base=True), P(pp=2, vpp=2, shard_base=True),
]  # fmt: skip
RECOMPUTE = [("none", None), ("full", None), ("selective", ("core_attn", "mlp"))]
ADAPTERS = {
    "all": LoraConfig(r=3, lora_alpha=7),
    "dropout": LoraConfig(r=10, lora_alpha=16, lora_dropout=0.3),
    "dora": LoraConfig(r=10, lora_alpha=16, use_dora=True, use_rslora=True),
    "some": LoraConfig(r=4, target_modules=("q_proj", "v_proj", "down_proj"), layers_to_transform=(0, 3)),  # linears without adapters
}
QUANTIZATIONS = [
    Quantization(),
    Quantization("fp4", use_double_quant=False, blocksize=32),
    Quantization("nf4", blocksize=1024),
    Quantization(blocksize=128, modules_to_not_convert=("k_proj", "model.layers.1", "down_proj")),  # beside others in a fused weight
]
MODELS = ("qwen2-1kv", "qwen3", "llama-bias-tied")
FULL = bool(os.environ.get("FULL"))
# By turns: each adapter and each quantization twice, each model.
TURNS = [
    (model, list(ADAPTERS.values())[i % 4], QUANTIZATIONS[(i + i // 4) % 4]) for i, model in zip(range(8), MODELS * 3, strict=False)
]  # fmt: skip
COMBINED = list(product(MODELS, ADAPTERS.values(), QUANTIZATIONS)) if FULL else TURNS


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    results = {}
    for model, cfg, q in COMBINED:
        rows = parity.made_rows(model)
        if cfg.lora_dropout:
            rows = [replace(row, seed=lora.seed_of(i)) for i, row in enumerate(rows)]
        results[LoraCase(cfg, Case(model, P()), q).key] = lora.expected(cfg, model, rows, quantization=q)
    path = tmp_path_factory.mktemp("bitsandbytes") / "expected.pt"
    torch.save(results, path)
    return str(path)


@pytest.mark.parametrize(
    "number",
    range(len(GRIDS)),
    ids=lambda n: f"{GRIDS[n].tp}-{GRIDS[n].pp}-{GRIDS[n].vpp}-{GRIDS[n].cp}-{GRIDS[n].sp}" + "-sliced" * GRIDS[n].shard_base,
)
def test_grid(number: int, expected: str) -> None:
    """Loss and every gradient on each grid: without FULL three of the combinations, with recomputation by turns."""
    faults = []
    for model in MODELS:
        cases = [
            LoraCase(cfg, Case(model, GRIDS[number], recompute, modules), q)
            for i, (of, cfg, q) in enumerate(COMBINED)
            for j, (recompute, modules) in enumerate(RECOMPUTE)
            if of == model and (FULL or ((i - 3 * number) % 8 < 3 and (number + i) % 3 == j))
        ]
        if not cases:
            continue
        answers = distributed.run(distributed.WORLD, lora.compare, cases, expected)
        for at, one in enumerate(cases):
            losses, gradients, _ = zip(*(answer[at] for answer in answers), strict=True)
            if not max(*losses, *gradients) <= TOLERANCE:
                faults.append(f"{one}: loss off by {max(losses):.1e}, a gradient by {max(gradients):.1e}")
    assert not faults, "\n".join(faults)


OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.5)


@pytest.mark.parametrize(("adapter", "grid"), [("all", P(tp=2, pp=2, sp=True)), ("dora", P(tp=4, cp=2))], ids=["all", "dora"])
def test_ten_steps(adapter: str, grid: P, tmp_path: Path) -> None:
    """The norm at each of ten steps of AdamW with clipping, and the weights after them."""
    model, cfg, q = "qwen2-1kv", ADAPTERS[adapter], QUANTIZATIONS[0]
    one = LoraCase(cfg, Case(model, grid, "full"), q)
    torch.save({one.key: lora.steps(cfg, model, OPTIM, 10, q)}, tmp_path / "steps.pt")
    for ((norm, weight),) in distributed.run(distributed.WORLD, lora.optimize, [one], OPTIM, str(tmp_path / "steps.pt")):
        assert max(norm, weight) <= TOLERANCE


@pytest.mark.parametrize(
    "grid",
    [P(tp=2, pp=2, sp=True), P(tp=2, cp=2), P(tp=4, sp=True), P(tp=2, pp=2, shard_base=True)],
    ids=["tp-pp-sp", "tp-cp", "tp-sp", "tp-pp-sliced"],
)
def test_dpo(grid: P, tmp_path: Path) -> None:
    """DPO on a base in 4 bits, which is the reference: loss and every gradient."""
    model, cfg, q = "qwen2-1kv", ADAPTERS["all"], QUANTIZATIONS[0]
    made, policy = preferences.loader(model), lora.oracle_of(cfg, model, lora.weights(cfg, model), {}, q)
    batches = preferences.completed(lora.Plain(policy), lora.in_4_bits(oracle.model(model), q), made.step(0), made.mismatched(0))
    value, gradients = oracle.run(lora.Plain(policy), batches, preferences.LOSSES["dpo"])
    assert float(value) != pytest.approx(float(np.log(2)), rel=1e-2)  # as it would be if the policy were the reference
    found = {name: param.grad for name, param in lora.trained(policy).items()}
    torch.save((value, found), tmp_path / "dpo.pt")
    assert gradients
    one = LoraCase(cfg, Case(model, grid), q)
    assert max(max(answer) for answer in distributed.run(distributed.WORLD, lora.preferring, one, str(tmp_path / "dpo.pt"))) <= TOLERANCE


def test_transformers_with_bitsandbytes_and_peft_say_the_same(tmp_path: Path) -> None:
    """Their own 4-bit linears, which compute in fp32 at most, in a model that transformers has loaded from our directory."""
    import bitsandbytes as bnb
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = tiny.config("qwen3", hidden_size=64, intermediate_size=192, head_dim=16)  # rows of whole blocks
    shape = shape_of(config)
    cfg, q = LoraConfig(r=4, lora_alpha=8), Quantization()
    drawn = Random(shape, 3, std=0.15)
    base = tmp_path / "base"
    base.mkdir()
    save_file({name: drawn.read(name, [0] * len(size), size).bfloat16() for name, size in drawn.shapes().items()}, base / SINGLE)
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}))
    bitsandbytes.quantize(base, tmp_path / "in_4_bits", q)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(*size, generator=generator) * 0.1 for name, size in peft.tensors(cfg, shape).items()}
    peft.write(tmp_path / "adapter", tensors, cfg, shape, base=str(base))

    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "in_4_bits", dtype=torch.float32)
    for param in hf.parameters():  # all is in bfloat16 otherwise, whatever dtype was asked for
        param.data = param.data.float() if param.is_floating_point() else param.data
    for module in hf.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    theirs = PeftModel.from_pretrained(hf, str(tmp_path / "adapter"), is_trainable=True).train()
    batch = micro_batch([[document(20, shape.vocab, seed) for seed in range(3)]], 60)
    losses_of_theirs, first = [], 0
    for n in batch.lengths:
        ids = batch.tokens[first : first + n].long()[None]
        losses_of_theirs.append(theirs(input_ids=ids, labels=ids).loss)
        first += n
    value = torch.stack(losses_of_theirs).mean()
    value.backward()
    grads = {name: param.grad for name, param in lora.trained(theirs).items()}
    assert len(grads) == len(tensors)
    torch.save((value.item(), grads), tmp_path / "expected.pt")
    for origin in ("base", "in_4_bits"):  # quantised on the way, and as they are
        where = (str(tmp_path / origin), str(tmp_path / "adapter"), q, batch, str(tmp_path / "expected.pt"))
        for loss, gradient in distributed.run(2, lora.beside_transformers, *where):
            assert loss < 1e-5
            assert gradient < 1e-4


@pytest.mark.parametrize("adapter", ["all", "dora", "some"])
@pytest.mark.parametrize(("recompute", "modules"), RECOMPUTE)
def test_nothing_keeps_a_dense_weight(adapter: str, recompute: str, modules: tuple[str, ...] | None) -> None:
    """Between forward and backward, with recomputation or not: the codes alone, and one buffer."""
    one = LoraCase(ADAPTERS[adapter], Case("qwen3", P(tp=2, sp=True), recompute, modules), QUANTIZATIONS[0])
    assert distributed.run(distributed.WORLD, lora.dense_copies, one) == [0] * distributed.WORLD


def document(length: int, vocab: int, seed: int) -> Document:
    """All of whose tokens but the first are trained, as transformers' `labels=input_ids` has it."""
    tokens = np.random.default_rng(seed).integers(vocab, size=length).astype(np.int32)
    return Document(tokens, np.concatenate([[IGNORED], tokens[1:]]), np.zeros(length, np.bool_))


def test_a_base_in_4_bits_has_one_fingerprint() -> None:
    """From every grid and from the values that bitsandbytes leaves; training leaves it as it is."""
    model, q = "llama-bias-tied", Quantization(modules_to_not_convert=("o_proj",))
    known = fingerprint.of_source(Quantizing(Tensors(lora.base_of(model, q)), q), tiny.shape(model))
    for grid in (P(), P(tp=4, pp=2)):
        for before, after in distributed.run(distributed.WORLD, lora.fingerprints_in_4_bits, grid, model, q):
            assert before == after == known
