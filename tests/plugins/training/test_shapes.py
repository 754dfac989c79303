"""train-pretrain: every decoder's small preset, what overrides it, and models that go on with longer contexts."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llmctl.errors import UsageError
from llmctl.nn.hf import load_model
from llmctl.nn.presets import PRESETS, preset
from llmctl_train_pretrain.params import PretrainParams

DECODERS = sorted(name for name in PRESETS if preset(name).traits.kind == "decoder")


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_trains(train, name: str) -> None:
    shape = {"heads": 4, "kv_heads": 4, "layers": 2, "dim": 32}
    result = train("train-pretrain", params={"max_steps": 1, "preset": name, **shape})
    config = load_model(result.outputs["model"].path).config
    assert config.arch == PRESETS[name]["arch"]
    assert (config.layers, config.dim) == (2, 32)


def test_what_overrides_a_preset(train) -> None:
    shape = {"preset": "gpt3", "window": 5, "pattern": "SL", "positions": "alibi", "norm_eps": 1e-3, "kv_heads": 4}
    config = load_model(train("train-pretrain", params={"max_steps": 1, **shape}).outputs["model"].path).config
    assert (config.window, config.pattern, config.norm_eps) == (5, "SL", 1e-3)
    assert config.traits.positions == "alibi"
    scaled = {"max_steps": 1, "context": 64, "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_context": 16}}
    config = load_model(train("train-pretrain", "yarn", scaled).outputs["model"].path).config
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor, config.rope_scaling.original_context) == (
        "yarn",
        4.0,
        16,
    )


def test_options_of_speedrun_are_options_of_every_decoder(train) -> None:
    options = {
        "qk_norm": True, "qk_gain": 1.2, "activation": "relu2", "gated": False, "value_pattern": "V-",
        "stream_weights": True, "backout": True, "smear": True, "logit_softcap": 15.0,
    }  # fmt: skip
    params = {"max_steps": 2, "preset": "llama", "groups": {"value_embedding": {"lr": 0.1}}, **options}
    first = train("train-pretrain", params=params).outputs["model"]
    config = load_model(first.path).config
    assert (config.qk_gain, config.value_pattern, config.logit_softcap) == (1.2, "V-", 15.0)
    traits = config.traits
    assert traits.qk_norm and traits.stream_weights and traits.backout and traits.smear
    assert (traits.activation, traits.gated) == ("relu2", False)
    # To go on with it they may be said again, but not changed.
    train("train-pretrain", "again", {"max_steps": 1, "backout": True, "qk_gain": 1.2}, model=first)
    with pytest.raises(UsageError, match="backout is False, the model to continue has True"):
        train("train-pretrain", "other", {"max_steps": 1, "backout": False}, model=first)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "lama"}, "there is no preset 'lama'; did you mean `llama`"),
        ({"preset": "nothing"}, "`llmctl models` lists them"),
        ({"preset": "phi-4-mini"}, "phi-4-mini goes through transformers"),
        ({"rope_scaling": {"factor": 3.0}}, "factor has no effect with kind: none"),
        (
            {"rope_scaling": {"kind": "linear", "attention_factor": 1.0}},
            "attention_factor has no effect with kind: linear",
        ),
        ({"rope_scaling": {"kind": "yarn", "low_freq_factor": 2.0}}, "low_freq_factor has no effect with kind: yarn"),
        ({"rope_scaling": {"kind": "llama3", "low_freq_factor": 4.0}}, "must be larger"),
        ({"positions": "rotary"}, "Input should be"),
    ],
)
def test_wrong_shapes_are_refused(values, message) -> None:
    with pytest.raises(ValidationError) as caught:
        PretrainParams(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["none", "linear", "yarn", "llama3"])
def test_parameters_survive_being_handed_over(kind) -> None:
    params = PretrainParams(rope_scaling={"kind": kind})
    assert PretrainParams.model_validate_json(params.model_dump_json()) == params


def test_a_model_goes_on_with_a_longer_context(train, world) -> None:
    scaling = {"kind": "yarn", "factor": 2.0}
    more = train(
        "train-pretrain", "longer", {"max_steps": 1, "context": 96, "rope_scaling": scaling}, model=world.model
    )
    before, after = load_model(world.model.path).config, load_model(more.outputs["model"].path).config
    assert (before.context, after.context, after.dim) == (48, 96, before.dim)
    assert after.rope_scaling is not None and after.rope_scaling.original_context == 48


def test_a_table_of_positions_cannot_grow(train) -> None:
    learned = train("train-pretrain", "learned", {"max_steps": 1, "preset": "gpt2", "kv_heads": 4}).outputs["model"]
    with pytest.raises(UsageError, match="context is 96, the model to continue has 48"):
        train("train-pretrain", "grown", {"context": 96, "preset": "gpt2"}, model=learned)
    with pytest.raises(UsageError, match="positions is alibi, the model to continue has learned"):
        train("train-pretrain", "other", {"positions": "alibi", "preset": "gpt2"}, model=learned)
