"""How tokens are told their order: every position encoding as a pure function, with its source.

Positions are given, not counted: packed documents restart, cached keys stand where they were written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmctl.nn.config import ModelConfig, RopeScaling
from llmctl.nn.kernels import fits, turn


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Fixed encodings of `positions (…)`, any sign, as `(…, dim)` float32 (1706.03762, section 3.5).

    Channels 2i and 2i + 1 hold sine and cosine of position / 10000^(2i / dim), so a shift by k is a fixed rotation.
    """
    rates = 10_000.0 ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions[..., None].float() * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def alibi_slopes(heads: int) -> Tensor:
    """Each head's slope, `(heads,)` float32 (2108.12409): 2^(-8/n), 2^(-16/n), … for a power of two n.

    For another number, those of the next smaller power and then every second one of the next larger.
    """
    near = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / near) for i in range(near)]
    slopes += [2 ** (-8 * (i + 1) / (2 * near)) for i in range(0, 2 * (heads - near), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


def t5_bucket(distance: Tensor, buckets: int, furthest: int, bidirectional: bool) -> Tensor:
    """The bucket of `distance (…)` int64, key position less query position, in `[0, buckets)` (1910.10683, 2.1).

    Half of the buckets hold one distance each, the others grow logarithmically up to `furthest`. With `bidirectional`
    half of all are for keys behind the query; else all of those share bucket 0.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    # In float32, as transformers computes it: at the bounds between buckets the last bit decides.
    grown = torch.log(distance.float().clamp(min=1) / exact) / math.log(furthest / exact) * (buckets - exact)
    return offset + torch.where(distance < exact, distance, (exact + grown.long()).clamp(max=buckets - 1))


def rotary_angles(
    positions: Tensor, config: ModelConfig, local: bool = False, length: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles of `positions (…, T)`, each `(…, T, 1, rotary_dim / 2)` (RoPE, 2104.09864).

    In float32, or the dtype of floating positions, whatever the model's: in bfloat16 those beyond 256 would collide.
    `local`: those of layers with a sliding window, where the family gives them a base of their own. `length`: of the
    whole sequence, for scaling that depends on it.
    """
    rates, factor = rotary_rates(config, local, length)
    where = positions if positions.is_floating_point() else positions.float()
    angles = where[..., None, None] * rates.to(positions.device)
    return angles.cos() * factor, angles.sin() * factor


def rotary_rates(config: ModelConfig, local: bool = False, length: int = 0) -> tuple[Tensor, float]:
    """Radians per position of each pair of channels, `(rotary_dim / 2,)` float32, and the factor of cos and sin."""
    theta, scaling, width = config.rope_theta, config.rope_scaling, config.rotary_dim
    if local and config.local_rope_theta:
        theta, scaling = config.local_rope_theta, None
    if scaling is None:
        return _rates(theta, width), 1.0
    if scaling.kind == "linear":
        return _rates(theta, width) / scaling.factor, 1.0
    if scaling.kind in ("ntk", "dynamic"):
        factor = scaling.factor
        if scaling.kind == "dynamic":
            factor = factor * max(length, scaling.original_context) / scaling.original_context - (factor - 1)
        return _rates(theta * factor ** (width / (width - 2)), width), 1.0
    if scaling.kind == "yarn":
        return _yarn(theta, width, scaling), scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    return _llama3(_rates(theta, width), scaling), 1.0


def _rates(theta: float, width: int) -> Tensor:
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / theta**exponents


def _yarn(theta: float, width: int, scaling: RopeScaling) -> Tensor:
    """Channels that turn more than `beta_fast` times within the original context stay; under `beta_slow`, all of
    `factor` is taken; in between, linearly more (2309.00071, section 3.2)."""

    def channel(turns: float) -> float:
        return width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    share = 1 - ramp.clamp(0, 1)
    rates = _rates(theta, width)
    return rates / scaling.factor * (1 - share) + rates * share


def _llama3(rates: Tensor, scaling: RopeScaling) -> Tensor:
    """Wavelengths above original_context / low_freq_factor are stretched by `factor`, those below original_context /
    high_freq_factor stay, the ones in between mix both (Llama 3.1's published code)."""
    turns = scaling.original_context * rates / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return rates / scaling.factor * (1 - share) + rates * share


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + r/2) of the first r channels of `x (B, T, H, d)` by the angle of their position.

    r is twice the width of `cos`; the half-split layout of Hugging Face. `interleaved_to_half` converts the other.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if 2 * cos.shape[-1] == x.shape[-1] and fits(x):
        return turn(x, cos, sin)
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def interleaved_to_half(weight: Tensor, head_dim: int) -> Tensor:
    """A query or key projection `(H * d, D)` for pairs (2i, 2i + 1), as Meta's checkpoints have it, for pairs
    (i, i + d/2)."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)
