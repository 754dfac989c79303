from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from llmctl.spec.canonical import canonical, digest
from llmctl.spec.key_params import key_params
from llmctl.spec.params import Field, Params

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


def test_canonical_json_by_hand():
    value = {"b": 1.0, "a": [True, None, 0.0003, -0.0, 1e22], "ä": "ß\n"}
    assert canonical(value) == '{"a":[true,null,0.0003,0,10000000000000000000000],"b":1,"ä":"ß\\n"}'
    # echo -n '{"a":1}' | sha256sum
    assert digest({"a": 1.0}) == "sha256:015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            canonical([bad])


def test_other_types_have_one_form():
    class Color(enum.StrEnum):
        RED = "red"

    assert canonical({"p": Path("a/b"), "e": Color.RED, "t": (1, 2), "s": {3, 1, 2}}) == (
        '{"e":"red","p":"a/b","s":[1,2,3],"t":[1,2]}'
    )


@given(JSON)
def test_canonical_json_is_json_of_an_equal_value_and_a_fixed_point(value):
    text = canonical(value)
    assert json.loads(text) == value
    assert canonical(json.loads(text)) == text


def keys(load, *sets, stage="train"):
    text = """
llmctl: 1
name: t
stages:
  data: {uses: data}
  tok: {uses: tokenize, inputs: {text: data}}
  train: {uses: train-pretrain, inputs: {tokens: tok, tokenizer: tok}, with: {lr: 3e-3, max_steps: 50}}
"""
    spec = load(text, *sets).stages[stage]
    return spec.key_params(), spec.key_params(extent=False)


def test_non_default_output_affecting_values_only(load):
    assert keys(load) == ({"lr": 0.003, "max_steps": 50}, {"lr": 0.003})


@pytest.mark.parametrize(
    "sets",
    [
        ("train.lr=0.003",),
        ("train.lr=3.0e-03",),
        ("train.lr=+.003",),
        ("train.betas=[0.90, 9.5e-1]",),
        ("train.warmup_steps=0",),
        ("train.save_every=3",),
        ("train.weights={}",),
        ("train.max_steps=0x32",),
        ("train.optimizer=muon", "train.seed=0", "train.packing=true", "train.note=null"),
    ],
)
def test_the_same_value_written_differently_is_the_same_key(load, sets):
    assert keys(load, *sets) == keys(load)


def test_each_output_affecting_parameter_changes_the_key(load):
    changes = {
        "lr": "1", "betas": "[0.9, 0.99]", "max_steps": "51", "warmup_steps": "1", "optimizer": "adamw",
        "packing": "false", "run_tag": "x", "note": "x", "chunks": "1", "weights": "{a: 1}", "init": "x", "seed": "1",
    }  # fmt: skip
    from fake_params import TrainParams

    assert {*changes, "save_every"} == set(TrainParams.model_fields)
    found = [canonical(keys(load, f"train.{name}={value}")[0]) for name, value in changes.items()]
    assert len({*found, canonical(keys(load)[0])}) == len(changes) + 1
    resume = [canonical(keys(load, f"train.{name}={value}")[1]) for name, value in changes.items()]
    assert len(set(resume)) == len(changes)  # all but max_steps, which is equal to none of them
    assert keys(load, "train.max_steps=51")[1] == keys(load)[1]


@given(
    lr=st.floats(1e-6, 1), steps=st.integers(1, 10**6), weights=st.dictionaries(st.sampled_from("abc"), st.floats(0, 9))
)
def test_every_way_to_write_a_number_gives_one_key(lr, steps, weights):
    from fake_params import TrainParams

    texts = ({"lr": lr, "max_steps": steps, "weights": weights}, {"weights": dict(reversed(weights.items())),
             "max_steps": steps, "lr": float(f"{lr:.17e}"), "seed": 0})  # fmt: skip
    first, second = (canonical(key_params(TrainParams.model_validate(text))) for text in texts)
    assert first == second
    whole = {name: int(value) for name, value in weights.items()}
    as_int, as_float = (
        canonical(key_params(TrainParams(weights=values)))
        for values in (whole, {name: float(value) for name, value in whole.items()})
    )
    assert as_int == as_float


@given(a=st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 2)),
       b=st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 2)))  # fmt: skip
def test_keys_are_equal_exactly_if_the_output_affecting_values_are(a, b):
    from fake_params import CleanParams, DataParams

    first, second = (
        key_params(DataParams(seed=seed, clean=CleanParams(lang="en" if english else "", min_chars=chars)))
        for seed, english, chars in (a, b)
    )
    assert (first == second) == (a == b)


def test_nested_models_follow_the_same_rules():
    from fake_params import CleanParams, DataParams

    assert key_params(DataParams(clean=CleanParams(threads=8))) == {}
    assert key_params(DataParams(clean=CleanParams(threads=8, lang="en"))) == {"clean": {"lang": "en"}}


class Inner(Params):
    a: int = Field(1, description="a")
    far: int = Field(5, description="far", affects="extent")
    fast: int = Field(1, description="fast", affects="nothing")


class A(BaseModel):
    kind: Literal["a"] = "a"


class B(BaseModel):
    kind: Literal["b"] = "b"


class Outer(Params):
    inner: Inner = Field(Inner(a=2), description="a default that is not the model's own")
    many: list[Inner] = Field([], description="list")
    either: A | B | None = Field(None, description="one of two")
    off: Inner = Field(Inner(), description="speed", affects="nothing")
    made: dict[str, int] = Field(default_factory=dict, description="made anew")


def test_a_nested_default_is_not_mistaken_for_the_models_own():
    assert key_params(Outer()) == {}
    assert key_params(Outer(inner=Inner(a=1))) == {"inner": {}}
    assert key_params(Outer(inner=Inner(a=2, fast=9))) == {}
    assert key_params(Outer(inner=Inner(a=2, far=6))) == {"inner": {"a": 2, "far": 6}}
    assert key_params(Outer(inner=Inner(a=2, far=6)), extent=False) == {}
    assert key_params(Outer(off=Inner(a=7))) == {}
    assert key_params(Outer(many=[Inner(), Inner(a=3, fast=2)])) == {"many": [{}, {"a": 3}]}


def test_models_of_a_union_are_told_apart():
    assert key_params(Outer(either=A())) != key_params(Outer(either=B()))


def test_a_new_parameter_with_a_default_leaves_old_keys_alone():
    class Newer(Outer):
        extra: float = Field(0.5, description="new")

    assert key_params(Newer(inner=Inner(a=9))) == key_params(Outer(inner=Inner(a=9)))
