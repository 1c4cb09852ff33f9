"""What only a GPU can show. Run by launch/gpu_check.sh; one GPU is enough."""

from collections.abc import Iterator
from dataclasses import replace

import lora_parity
import oracle
import parity
import pytest
import rows
import tiny
import torch
from parity import Case, Run
from torch import Tensor

from megamod.config import Attention, LoraConfig, OptimConfig
from megamod.config import ParallelConfig as P
from megamod.errors import MegamodError
from megamod.model import backends
from megamod.model.backends import Documents, attend_reference
from megamod.parallel import grid as grids
from megamod.parallel.grid import Grid
from megamod.weights.table import boxes
from megamod_kernels import lora as kernel

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def grid() -> Iterator[Grid]:
    """A world of this process, on NCCL."""
    with grids.started(P(), tiny.shape("qwen2"), device=CUDA) as started:
        yield started


@pytest.mark.parametrize("name", ["varlen_attn", "flash_attn", "flash_attn_3"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 8, 64), (8, 1, 128), (64, 8, 128), (28, 4, 128)])
def test_attention(name: str, heads: int, kv_heads: int, dim: int) -> None:
    """Packed attention in bf16, forward and backward: off the fp32 reference by at most twice what the bf16 reference is."""
    try:
        _, attend = backends.attention(name, CUDA, torch.bfloat16, deterministic=False)
    except MegamodError as error:
        pytest.skip(str(error))
    lengths = (1, 700, 37, 256, 2, 1052)
    generator = torch.Generator(CUDA).manual_seed(1)
    whole = [torch.randn(sum(lengths), n, dim, device=CUDA, generator=generator) for n in (heads, kv_heads, kv_heads, heads)]
    documents = Documents.of(lengths, CUDA)

    def run(attend: backends.Attend, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in whole[:3])
        out = attend(q, k, v, documents)
        out.backward(whole[3].to(dtype))
        return [x.float() for x in (out.detach(), *(y.grad for y in (q, k, v) if y.grad is not None))]

    exact, plain, fast = run(attend_reference, torch.float32), run(attend_reference, torch.bfloat16), run(attend, torch.bfloat16)
    for e, p, f in zip(exact, plain, fast, strict=True):
        assert float((f - e).norm()) <= 2 * float((p - e).norm())


@pytest.mark.parametrize("model", sorted({**tiny.CONFIGS, **tiny.VISION}))
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_float64_parity(model: str, recompute: str, tmp_path: object) -> None:
    """The model on NCCL and CUDA equals transformers on the CPU, loss and every gradient, in float64."""
    value, gradients = oracle.run(oracle.model(model), parity.made_rows(model), parity.everything)
    with grids.started(P(), tiny.shape(model), device=CUDA) as grid:
        run = parity.prepare(Case(model, P(), recompute), grid, attention="reference")
        run.step()
        assert float(run.metrics["loss"]) == pytest.approx(float(value), rel=1e-11)
        assert parity.worst(run, gradients, lambda s: s.grad.cpu()) <= 1e-11


@pytest.mark.parametrize("attention", ["reference", "varlen_attn", "flash_attn", "flash_attn_3"])
def test_bf16_parity(attention: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, gradients are off the float64 oracle's by at most twice what transformers' own in bf16 are."""
    big = {"model_type": "qwen2", "hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(tiny.CONFIGS, "gpu", {**big, "rope_theta": 1e6})
    try:
        backends.attention(attention, CUDA, torch.bfloat16, deterministic=False)
    except MegamodError as error:
        pytest.skip(str(error))
    batches = rows.rows(61)
    _, exact = oracle.run(oracle.model("gpu"), batches, parity.everything)
    _, rounded = oracle.run(oracle.model("gpu", torch.bfloat16), batches, parity.everything)
    with grids.started(P(), tiny.shape("gpu"), device=CUDA) as grid:
        run = parity.prepare(Case("gpu", P(), dtype="bfloat16"), grid, attention=attention)
        run.step()
        ours = whole_gradients(run)
    assert off(ours, exact) <= 2 * off(rounded, exact)


def whole_gradients(run: Run) -> dict[str, Tensor]:
    """Of one rank, by name, on the CPU in float64."""
    found = {s.piece.hf: torch.zeros(s.piece.shape, dtype=torch.float64) for s in run.optimizer.segments}
    for segment in run.optimizer.segments:
        for start, stop, (offset, size) in boxes(segment.piece, segment.start, segment.stop):
            part = segment.grad[start - segment.start : stop - segment.start].view(size).cpu().double()
            found[segment.piece.hf][tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))] = part
    return found


def off(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return sum(float((gradients[name].double() - g).norm() / g.norm()) for name, g in exact.items())


@pytest.mark.parametrize("cfg", [LoraConfig(r=16), LoraConfig(r=10, lora_dropout=0.1), LoraConfig(r=3, use_dora=True)], ids=str)
def test_lora(cfg: LoraConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the fused kernels, gradients are off peft's in float64 by at most twice what they are through torch's products."""
    big = {"model_type": "qwen2", "hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(tiny.CONFIGS, "gpu", {**big, "rope_theta": 1e6})
    seeded = [replace(row, seed=lora_parity.seed_of(i)) for i, row in enumerate(parity.made_rows("gpu"))]
    _, exact = lora_parity.expected(cfg, "gpu", seeded if cfg.lora_dropout else parity.made_rows("gpu"))
    found = {}
    with grids.started(P(), tiny.shape("gpu"), device=CUDA) as grid:
        for path in ("triton", "addmm"):
            if path == "addmm":
                monkeypatch.setattr(kernel, "_runs", lambda device, dtype: False)
            run, adapters = lora_parity.prepare(lora_parity.LoraCase(cfg, Case("gpu", P(), dtype="bfloat16")), grid)
            assert set(adapters.paths.values()) == {path}
            run.step()
            found[path] = off(whole_gradients(run), exact)
    assert found["triton"] <= 2 * found["addmm"]


@pytest.mark.parametrize("attention", ["auto", "reference", "varlen_attn", "flash_attn"])
def test_deterministic(grid: Grid, attention: Attention) -> None:
    """A deterministic run gives the same bits twice."""
    try:
        backends.attention(attention, CUDA, torch.bfloat16, deterministic=True)
    except MegamodError as error:
        pytest.skip(str(error))
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            run = parity.prepare(Case("qwen3", P(), dtype="bfloat16"), grid, OptimConfig(lr=1e-3), attention=attention, deterministic=True)
            for _ in range(3):
                run.step()
                run.optimizer.step(1e-3)
            results.append([s.master.detach().clone() for s in run.optimizer.segments])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
