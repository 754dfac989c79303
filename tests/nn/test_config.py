"""ModelConfig: counts against torch and published numbers, messages, and the config.json that transformers reads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from llmctl.errors import InputError, UsageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.families import from_hf, to_hf
from llmctl.nn.presets import PRESETS, preset
from llmctl.nn.transformer import Transformer

SMALL = {"arch": "llama", "vocab_size": 64, "dim": 32, "layers": 2, "heads": 4}


def count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_closed_form_is_the_count(arch, tied):
    kv_heads = 0 if arch == "gpt2" else 2
    config = ModelConfig(**{**SMALL, "arch": arch, "ff_dim": 56, "kv_heads": kv_heads, "tie_embeddings": tied})
    assert config.parameters() == count(config)


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        ({"dim": 4096, "layers": 32, "heads": 32, "ff_dim": 11008}, 6_738_415_616),
        ({"dim": 5120, "layers": 40, "heads": 40, "ff_dim": 13824}, 13_015_864_320),
        ({"dim": 6656, "layers": 60, "heads": 52, "ff_dim": 17920}, 32_528_943_616),
        ({"dim": 8192, "layers": 80, "heads": 64, "ff_dim": 22016}, 65_285_660_672),
    ],
)
def test_published_llama_sizes(shape, published):
    assert ModelConfig(arch="llama", vocab_size=32000, tie_embeddings=False, **shape).parameters() == published


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "published"),
    [
        (768, 12, 12, 124_439_808),
        (1024, 24, 16, 354_823_168),
        (1280, 36, 20, 774_030_080),
        (1600, 48, 25, 1_557_611_200),
    ],
)
def test_published_gpt2_sizes(dim, layers, heads, published):
    config = ModelConfig(arch="gpt2", vocab_size=50257, dim=dim, layers=layers, heads=heads, context=1024)
    assert config.parameters() == published == count(config)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"dim": 30}, "dim 30 is not divisible by heads 4", "1, 2, 3, 5, 6, 10"),
        ({"heads": 6, "dim": 48, "kv_heads": 4}, "heads 6 is not divisible by kv_heads 4", "1, 2, 3, 6"),
        ({"dim": 36}, "9 channels of each head are rotated", "dim / heads is even"),
        ({"arch": "rnn"}, "unknown architecture 'rnn'", "bert, gpt1, roberta"),
        ({"layers": 0}, "layers must be at least 1, got 0", ""),
        ({"ff_dim": -8}, "ff_dim must not be negative", ""),
        ({"norm_eps": 0.0}, "must be positive", ""),
        ({"eos_id": 64}, "eos_id 64 is outside the vocabulary of 64", ""),
    ],
)
def test_a_shape_that_does_not_fit_says_what_to_change(changes, message, hint):
    with pytest.raises(UsageError) as caught:
        ModelConfig(**{**SMALL, **changes})
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("others", [(), (5, 6)])
def test_config_json_round_trip_and_transformers_reads_it(arch, others, tmp_path):
    config = ModelConfig(
        **{**SMALL, "arch": arch, "context": 77, "ff_dim": 88, "norm_eps": 3e-6},
        rope_theta=10_000.0 if arch == "gpt2" else 123.0,
        bos_id=1,
        eos_id=2,
        other_eos_ids=others,
    )
    written = to_hf(config)
    assert from_hf(written) == config
    assert "rope_scaling" not in written
    import json

    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.vocab_size) == (32, 2, 64)
    assert theirs.max_position_embeddings == 77
    assert theirs.eos_token_id == ([2, *others] if others else 2)
    # What transformers itself writes for that configuration means the same to us.
    assert from_hf(theirs.to_dict()) == config


REFUSED = [
    ("llama", "rope_scaling", {"rope_type": "longrope", "factor": 8.0}),
    ("llama", "rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4}),
    ("llama", "attention_bias", True),
    ("llama", "mlp_bias", True),
    ("llama", "hidden_act", "gelu"),
    ("llama", "quantization_config", {"bits": 4}),
    ("smollm3", "use_sliding_window", True),
    ("llama", "layer_types", ["full_attention", "sliding_attention"]),
    ("qwen3", "layer_types", ["full_attention", "linear_attention"]),
    ("bert", "position_embedding_type", "relative_key"),
    ("roberta", "pad_token_id", 7),
    ("gpt2", "activation_function", "relu"),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True),
]


@pytest.mark.parametrize(("arch", "key", "value"), REFUSED, ids=[f"{arch}-{key}" for arch, key, _ in REFUSED])
def test_a_feature_we_do_not_compute_is_named(arch, key, value):
    written = to_hf(ModelConfig(**{**SMALL, "arch": arch}))
    with pytest.raises(InputError, match=f"`{key}`"):
        from_hf({**written, key: value})


def test_foreign_architectures_and_missing_keys_are_named():
    with pytest.raises(InputError, match="`architectures` in config.json is \\['MambaForCausalLM'\\]"):
        from_hf({"architectures": ["MambaForCausalLM"]})
    written = to_hf(ModelConfig(**SMALL))
    del written["hidden_size"]
    with pytest.raises(InputError, match="lacks `hidden_size`"):
        from_hf(written)
    with pytest.raises(InputError, match="not divisible"):
        from_hf({**to_hf(ModelConfig(**SMALL)), "num_key_value_heads": 3})


def test_rope_theta_where_transformers_5_keeps_it():
    written = to_hf(ModelConfig(**SMALL))
    del written["rope_theta"]
    written["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert from_hf(written).rope_theta == 5e5


def test_presets_build_and_take_overrides():
    for name in PRESETS:
        assert preset(name, vocab_size=2048).arch == PRESETS[name]["arch"]
    config = preset("llama", vocab_size=100, overrides={"dim": 96, "layers": None})
    assert (config.dim, config.layers) == (96, PRESETS["llama"]["layers"])
    with pytest.raises(UsageError, match="unknown preset"):
        preset("nope", vocab_size=10)


def test_importing_the_configuration_loads_no_torch():
    code = "import sys, llmctl.nn.config, llmctl.nn.presets; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
