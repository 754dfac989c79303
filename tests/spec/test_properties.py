"""Laws of merging, filling in, setting and keys, over values that nobody chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmctl.registry import Origin
from llmctl.spec.diagnostics import Text
from llmctl.spec.layers import merge
from llmctl.spec.nodes import node_of
from llmctl.spec.overrides import Setting
from llmctl.spec.validate import plain
from llmctl.store.keys import make_keys

MARK = Text("t", "", Path("/")).whole
QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, derandomize=True)
KEY = st.text("abcdef_", min_size=1, max_size=3)
LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(-1e9, 1e9)
    | st.text("ab 1.:#-{}'\"é", max_size=6)
)
VALUE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3), max_leaves=8
)
TREE = st.dictionaries(KEY, VALUE, max_size=4)

TEXT = """
llmctl: 1
name: t
vars: {x: %s}
stages:
  data: {uses: data}
  tok: {uses: tokenize, inputs: {text: data}}
  train: {uses: train-pretrain, inputs: {tokens: tok, tokenizer: tok}, with: {%s}}
"""


def merged(low, high):
    return plain(merge(node_of(low, MARK), node_of(high, MARK)))


def leaves(value, path=()):
    """Every path that leads to something that is no map."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def at(value, path):
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return KeyError
        value = value[key]
    return value


@QUICK
@given(low=TREE, high=TREE)
def test_merge_keeps_all_of_the_higher_and_what_it_leaves_of_the_lower(low, high):
    found = merged(low, high)
    for path, value in leaves(high):
        assert at(found, path) == value
    for path, value in leaves(low):
        shadowed = any(
            at(high, path[:n]) is not KeyError and not isinstance(at(high, path[:n]), dict)
            for n in range(1, len(path) + 1)
        )
        covered = isinstance(at(high, path), dict)
        assert shadowed or covered or at(found, path) == value
    assert {path for path, _ in leaves(found)} <= {path for tree in (low, high) for path, _ in leaves(tree)}
    assert list(found)[: len(low)] == list(low), "keys keep their order"


@QUICK
@given(low=TREE, high=TREE)
def test_merge_of_equals_and_of_nothing_changes_nothing_and_replace_forgets(low, high):
    assert merged(low, low) == low and merged(low, {}) == low and merged({}, high) == high
    marked = node_of(high, MARK)
    object.__setattr__(marked, "replaces", True)
    assert plain(merge(node_of(low, MARK), marked)) == high


@QUICK
@given(value=LEAF.filter(lambda value: value is not None and not isinstance(value, str)))
def test_a_whole_expression_keeps_value_and_type(load, value):
    written = json.dumps(value)
    field = "packing" if isinstance(value, bool) else "weights"
    text = '"${{ vars.x }}"' if field == "packing" else '{a: "${{ vars.x }}"}'
    found = getattr(load(TEXT % (written, f"{field}: {text}")).stages["train"].params, field)
    assert (found if field == "packing" else found["a"]) == value


@QUICK
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=10))
def test_text_is_filled_in_as_it_is(load, text):
    assume("${{" not in text and "}}" not in text)
    pipeline = load(TEXT % (json.dumps(text, ensure_ascii=False), 'run_tag: "<${{ vars.x }}|${{ vars.x }}>"'))
    assert pipeline.stages["train"].params.run_tag == f"<{text}|{text}>"


@QUICK
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_set_keeps_any_text_for_a_parameter_of_text(load, text):
    assume("${{" not in text)
    assert load(TEXT % ("1", ""), f"train.run_tag={text}").stages["train"].params.run_tag == text
    as_json = Setting("--set-json", f"train.run_tag={json.dumps(text)}")
    assert load(TEXT % ("1", ""), as_json).stages["train"].params.run_tag == text


@QUICK
@given(weights=st.dictionaries(KEY, st.floats(-1e6, 1e6), max_size=4), again=st.dictionaries(KEY, st.floats(-1e6, 1e6)))
def test_settings_merge_maps_and_the_last_one_wins(load, weights, again):
    settings_ = [Setting("--set-json", f"train.weights={json.dumps(each)}") for each in (weights, again)]
    assert load(TEXT % ("1", ""), *settings_).stages["train"].params.weights == {**weights, **again}


ORIGIN = Origin(dist="fakes", version="1", editable=False)
INPUTS = {"tokens": ["sha256:1"], "tokenizer": ["sha256:2"]}
FIELDS = {
    "lr": st.floats(1e-9, 10.0),
    "betas": st.tuples(st.floats(0, 1), st.floats(0, 1)),
    "max_steps": st.integers(1, 10**6),
    "optimizer": st.sampled_from(["muon", "adamw"]),
    "packing": st.booleans(),
    "run_tag": st.text("ab", max_size=3),
    "weights": st.dictionaries(KEY, st.floats(0, 9), max_size=2),
    "seed": st.integers(0, 9),
}
PARAMS = st.fixed_dictionaries({}, optional=FIELDS)


def key(load, params, *sets):
    text = ", ".join(f"{name}: {json.dumps(value)}" for name, value in params.items())
    return make_keys(load(TEXT % ("1", text), *sets).stages["train"], ORIGIN, INPUTS)


@QUICK
@given(params=PARAMS, data=st.data())
def test_keys_depend_on_values_and_not_on_how_they_are_written(load, params, data):
    first = key(load, params)
    shuffled = dict(data.draw(st.permutations(list(params.items()))))
    assert key(load, shuffled) == first
    defaults = load(TEXT % ("1", "")).stages["train"].params
    spelled = {name: getattr(defaults, name) for name in FIELDS} | params
    assert key(load, spelled).action == first.action, "a default that is spelled out is the same value"
    assert key(load, params, "train.save_every=77", "stages.train.resources.cpus=1", "stages.train.retries=3") == first
    options = [Setting("--set-json", f"train.{name}={json.dumps(value)}") for name, value in params.items()]
    assert key(load, {}, *options) == first


@QUICK
@given(params=PARAMS, data=st.data())
def test_every_other_value_gives_another_key(load, params, data):
    name = data.draw(st.sampled_from(sorted(FIELDS)))
    value = data.draw(FIELDS[name])
    before = load(TEXT % ("1", "")).stages["train"].params.model_copy(update=params)
    was = getattr(before, name)
    assume(
        json.dumps(value) != json.dumps(was)
        and tuple(value if isinstance(value, tuple) else [value]) != tuple(was if isinstance(was, tuple) else [was])
    )
    first, second = key(load, params), key(load, {**params, name: value})
    assert first.action != second.action
    assert (first.resume == second.resume) == (name == "max_steps"), "only how far to go is not in the resume key"


@pytest.mark.parametrize("written", ["3e-4", "0.0003", "3.0E-4", ".0003", "0.00030", "3.e-4"])
def test_one_number_written_in_many_ways_is_one_key(load, written):
    text = TEXT % ("1", f"lr: {written}, seed: 0x1")
    assert make_keys(load(text).stages["train"], ORIGIN, INPUTS) == key(load, {"lr": 3e-4, "seed": 1})
