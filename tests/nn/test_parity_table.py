"""Every cell of the parity table within its tolerance, and what must push it out."""

from __future__ import annotations

import pytest
import torch

from llmctl.nn.families import FAMILIES, from_hf, in_transformers, to_hf

from .parity_table import COLUMNS, ROWS, TOLERANCE, logits, make_pair, padded, random_hf


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp("theirs"))


def above(pair, columns) -> dict[str, float]:
    """The cells that are beyond their tolerance."""
    found = {column: COLUMNS[column](pair) for column in columns}
    return {name: value for name, value in found.items() if value is not None and not value <= TOLERANCE[name]}


@pytest.mark.parametrize("pair", ROWS, indirect=True, ids=list(ROWS))
def test_equals_transformers(pair):
    assert above(pair, [column for column in COLUMNS if column != "onnx"]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("pair", ROWS, indirect=True, ids=list(ROWS))
def test_equals_transformers_in_onnx_runtime(pair):
    assert above(pair, ["onnx"]) == {}


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "bert", "t5"])
def test_one_weight_off_by_a_percent_is_seen(name, tmp_path):
    pair = make_pair(name, tmp_path)
    with torch.no_grad():
        pair.ours.blocks[1].ffn.down.weight[:, 3] *= 1.01
    assert logits(pair) > 3 * TOLERANCE["logits"]


@pytest.mark.parametrize(
    ("name", "trait", "value"),
    [
        ("bert", "activation", "gelu_tanh"),
        ("gpt2", "activation", "gelu"),
        ("gpt1", "order", "pre"),
        ("t5", "scaled", True),
        ("t5", "scale_tied_head", False),
        ("gemma2", "scale_embedding", False),
        ("smollm3", None, {"pattern": "L"}),
        ("mistral", None, {"window": 8}),
        ("llama yarn", None, {"rope_scaling": None}),
        ("gemma3", None, {"local_rope_theta": 0.0}),
        ("gemma2", None, {"attention_softcap": 0.0}),
        ("roberta", None, {"norm_eps": 1e-5}),
    ],
)
def test_any_trait_changed_is_seen(name, trait, value, tmp_path):
    """Each line of a family's traits matters: with another value the logits are others."""
    from dataclasses import replace

    from llmctl.nn.transformer import Transformer

    pair = make_pair(name, tmp_path)
    config = pair.ours.config
    changed = (
        replace(config, **value) if trait is None else replace(config, traits=replace(config.traits, **{trait: value}))
    )
    twin = Transformer(changed).eval()
    twin.load_state_dict(pair.ours.state_dict(), strict=False)
    pair.ours = twin
    assert logits(pair) > 2 * TOLERANCE["logits"]


def test_dropping_robertas_offset_breaks_parity(tmp_path):
    pair = make_pair("roberta", tmp_path)
    with torch.no_grad():
        table = pair.ours.positions.weight
        table.copy_(table.roll(1, 0))
    assert logits(pair) > 0.01


def test_padding_that_is_seen_is_noticed(tmp_path):
    pair = make_pair("bert", tmp_path)
    plain = type(pair.ours).hidden
    pair.ours.hidden = lambda *args, documents=None, **kw: plain(pair.ours, *args, **kw)
    assert padded(pair) > 0.01


@pytest.mark.parametrize("name", ROWS)
def test_config_json_means_the_same_both_ways(name):
    theirs = random_hf(name).config
    config = from_hf({**theirs.to_dict(), "architectures": [ROWS[name][0]]})
    assert in_transformers(config)
    assert from_hf(to_hf(config)) == config
    again = type(theirs).from_dict(to_hf(config))
    assert from_hf({**again.to_dict(), "architectures": [ROWS[name][0]]}) == config


def test_every_family_has_a_row():
    classes = {cls for family in FAMILIES.values() for head, cls in family.classes.items() if head in ("lm", "mlm")}
    assert classes <= {cls for cls, _ in ROWS.values()}


LAYER_NORMS = ["gpt1", "gpt2", "bert", "roberta", "distilbert"]  # BLOOM's slopes are float32 there


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_in_float64_nothing_is_left_of_a_difference(name, tmp_path):
    """Where transformers too computes norms in the model's dtype (its RMSNorms always take float32)."""
    pair = make_pair(name, tmp_path)
    pair.theirs, pair.ours = pair.theirs.double(), pair.ours.double()
    assert logits(pair) < 1e-9
    for module in pair.ours.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps += 1e-6
    assert logits(pair) > 1e-9
