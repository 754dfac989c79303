"""Position encodings against their closed forms and transformers' own functions."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from llmctl.errors import UsageError
from llmctl.nn.config import ModelConfig, RopeScaling
from llmctl.nn.positions import alibi_slopes, rotary_angles, rotary_rates, sinusoid, t5_bucket


def config(**changes) -> ModelConfig:
    return ModelConfig(
        arch="llama", **{"vocab_size": 9, "dim": 256, "layers": 1, "heads": 4, "context": 8192, **changes}
    )


def test_sinusoid_is_the_formula():
    table = sinusoid(torch.arange(40), 12)
    for position in (0, 1, 7, 39):
        for channel in range(12):
            angle = position / 10_000 ** (2 * (channel // 2) / 12)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert float(table[position, channel]) == pytest.approx(expected, abs=1e-5)


def test_sinusoid_of_a_shift_is_a_fixed_rotation():
    """PE(p + k) = R_k PE(p) for every p (1706.03762)."""
    table = sinusoid(torch.arange(50), 8).double()
    rotation = torch.zeros(8, 8, dtype=torch.float64)
    for pair in range(4):
        angle = 5 / 10_000 ** (2 * pair / 8)
        sin, cos = math.sin(angle), math.cos(angle)
        rotation[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = torch.tensor([[cos, sin], [-sin, cos]])
    torch.testing.assert_close(table[5:], table[:-5] @ rotation.T, rtol=0, atol=1e-5)
    assert (table[6:] - table[:-6] @ rotation.T).abs().max() > 0.1


def test_sinusoid_holds_what_transformers_concatenates():
    theirs = MarianSinusoidalPositionalEmbedding(30, 16)
    theirs._init_weight()
    ours = sinusoid(torch.arange(30), 16)
    torch.testing.assert_close(torch.cat((ours[:, 0::2], ours[:, 1::2]), 1), theirs.weight.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [8, 12, 16, 20, 1, 6])
def test_alibi_slopes_are_blooms(heads):
    alibi = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(heads), alibi[:, 0, 1], rtol=3e-7, atol=0)


def test_alibi_of_a_number_that_is_no_power_of_two_is_not_the_plain_series():
    plain = torch.tensor([2 ** (-8 * (i + 1) / 12) for i in range(12)])
    assert (alibi_slopes(12) - plain).abs().max() > 0.1


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (16, 64)])
def test_t5_buckets_are_transformers(both, buckets, furthest):
    distance = torch.arange(-200, 201)
    theirs = T5Attention._relative_position_bucket(distance, both, buckets, furthest)
    assert torch.equal(t5_bucket(distance, buckets, furthest, both), theirs)
    assert not torch.equal(t5_bucket(-distance, buckets, furthest, both), theirs)


SCALINGS = {
    "linear": (RopeScaling(kind="linear", factor=4, original_context=2048), {"factor": 4.0}),
    "yarn": (
        RopeScaling(kind="yarn", factor=4, original_context=2048),
        {"factor": 4.0, "original_max_position_embeddings": 2048},
    ),
    "yarn untruncated": (
        RopeScaling(kind="yarn", factor=16, original_context=512, beta_fast=20, beta_slow=2, truncate=False),
        {"factor": 16.0, "original_max_position_embeddings": 512, "beta_fast": 20, "beta_slow": 2, "truncate": False},
    ),
    "llama3": (
        RopeScaling(kind="llama3", factor=8, original_context=1024, low_freq_factor=1, high_freq_factor=4),
        {"factor": 8.0, "original_max_position_embeddings": 1024, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_transformers(name):
    scaling, theirs = SCALINGS[name]
    kind = name.split()[0]
    shape = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=8192, rope_scaling={"rope_type": kind, **theirs}
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](shape, "cpu")
    rates, ours = rotary_rates(config(rope_scaling=scaling))
    torch.testing.assert_close(rates, expected, rtol=1e-6, atol=0)
    assert ours == pytest.approx(factor)
    assert (rotary_rates(config())[0] - expected).abs().max() > 1e-4


def test_yarns_factor_is_the_papers():
    assert rotary_rates(config(rope_scaling=SCALINGS["yarn"][0]))[1] == pytest.approx(1.13863, abs=1e-5)


@pytest.mark.parametrize("length", [10, 2048, 2049, 5000])
def test_dynamic_frequencies_follow_the_length_as_in_transformers(length):
    shape = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_scaling={"rope_type": "dynamic", "factor": 3.0},
    )
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](shape, "cpu", seq_len=length)
    scaled = config(rope_scaling=RopeScaling(kind="dynamic", factor=3, original_context=2048))
    torch.testing.assert_close(rotary_rates(scaled, length=length)[0], expected, rtol=1e-6, atol=0)


def test_fixed_ntk_keeps_the_fastest_channel_and_stretches_the_slowest_by_the_factor():
    """The base is chosen so that the lowest frequency is interpolated by `factor`, and the highest not at all."""
    plain, _ = rotary_rates(config())
    scaled, _ = rotary_rates(config(rope_scaling=RopeScaling(kind="ntk", factor=4, original_context=2048)))
    assert float(scaled[0]) == float(plain[0])
    assert float(plain[-1] / scaled[-1]) == pytest.approx(4, rel=1e-5)


def test_local_layers_keep_their_own_unscaled_base():
    scaled = config(
        rope_theta=1e6, local_rope_theta=1e4, rope_scaling=SCALINGS["linear"][0], window=8, pattern="SL", layers=2
    )
    assert torch.equal(rotary_rates(scaled, local=True)[0], rotary_rates(config())[0])
    assert not torch.equal(rotary_rates(scaled)[0], rotary_rates(config(rope_theta=1e6))[0])


def test_angles_are_position_times_rate():
    rates, _ = rotary_rates(config())
    cos, sin = rotary_angles(torch.tensor([[3, 700]]), config())
    torch.testing.assert_close(cos[0, :, 0], (torch.tensor([[3.0], [700.0]]) * rates).cos())
    torch.testing.assert_close(sin[0, :, 0], (torch.tensor([[3.0], [700.0]]) * rates).sin())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "longrope"}, "unknown rope_scaling 'longrope'"),
        ({"factor": 0.5}, "must be at least 1"),
        ({"original_context": 0}, "must be at least 1"),
        ({"kind": "llama3", "high_freq_factor": 1.0}, "high_freq_factor must be larger"),
    ],
)
def test_scalings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        RopeScaling(**{"kind": "yarn", "factor": 2.0, "original_context": 64, **changes})
