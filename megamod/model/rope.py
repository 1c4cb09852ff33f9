"""Rotary position embedding on packed positions (Su et al. 2021, arXiv:2104.09864), with the scalings that checkpoints use.

Frequencies are computed in fp32, as the checkpoints were trained with; angles in at least fp32.
"""

import math

import torch
from torch import Tensor

from megamod.model.shape import Rope


def inverse_frequencies(rope: Rope, dim: int) -> tuple[Tensor, float]:
    """`[D/2]` fp32 inverse frequencies on the CPU, and the factor on cos and sin (1 except for YaRN)."""
    powers = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    plain = 1.0 / powers
    if rope.kind in ("default", "dynamic"):  # dynamic equals default up to max_position: Shape.longest_document
        return plain, 1.0
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    assert rope.kind == "yarn"
    return _yarn(rope, powers, dim)


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3 report, 2024)."""
    assert rope.original_max_position is not None
    length, low, high = rope.original_max_position, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    blend = (length / wavelength - low) / (high - low)
    between = (1 - blend) * plain / rope.factor + blend * plain
    result = torch.where(wavelength > length / low, plain / rope.factor, plain)
    return torch.where((wavelength >= length / high) & (wavelength <= length / low), between, result)


def _yarn(rope: Rope, powers: Tensor, dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp between interpolated and kept frequencies, and a temperature."""
    length = rope.original_max_position
    assert length is not None

    def dimension(rotations: float) -> float:  # the dimension that turns so often over the original context
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    result = 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    factor = rope.attention_factor
    if factor is None and rope.mscale and rope.mscale_all_dim:
        factor = temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return result, temperature(1.0) if factor is None else factor


def tables(rope: Rope, dim: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, `[T, D/2]` each, in at least fp32.

    Args:
        positions: `[T]`; with `rope.mrope_section` also `[3, T]`, a token's place in time, height and width (Qwen2-VL,
            arXiv:2409.12191), of which each frequency reads one. Text stands at the same place in all three.
    """
    frequencies, factor = inverse_frequencies(rope, dim)
    work = torch.promote_types(dtype, torch.float32)
    places = positions[:, None] if positions.dim() == 1 else positions[_mrope_rows(rope, dim)].t()  # [T, 1] or [T, D/2]
    angles = places.to(work) * frequencies.to(positions.device, work)
    return angles.cos() * factor, angles.sin() * factor


def _mrope_rows(rope: Rope, dim: int) -> Tensor:
    """`[D/2]`: which row of the positions each frequency reads, 0 time, 1 height, 2 width."""
    assert rope.mrope_section is not None, "three rows of positions are for models with mrope_section"
    if not rope.mrope_interleaved:  # Qwen2-VL, Qwen2.5-VL: stretches
        return torch.arange(3, device="cpu").repeat_interleave(torch.tensor(rope.mrope_section, device="cpu"))
    rows = torch.zeros(dim // 2, dtype=torch.long, device="cpu")  # Qwen3-VL: time, height, width in turn, then what time has left
    for row in (1, 2):
        rows[row : 3 * rope.mrope_section[row] : 3] = row
    return rows
