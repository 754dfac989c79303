"""The JSON Schema against a validator that we did not write: good specs pass, bad ones fail at the same keys."""

from __future__ import annotations

import dataclasses
import functools
import json
from copy import deepcopy
from pathlib import Path

import jsonschema
import pytest

from llmctl.registry import get_registry
from llmctl.spec.diagnostics import SpecError, Text
from llmctl.spec.files import find, read, shipped
from llmctl.spec.nodes import parse
from llmctl.spec.pipeline import load_pipeline, single_stage
from llmctl.spec.printing import yaml_text
from llmctl.spec.schema import pipeline_schema, stage_schema
from llmctl.spec.validate import plain

FULL = """
llmctl: 1
name: t
include: [{url: "https://x.org/a.yaml", sha256: abc}, ./b.yaml]
vars: {size: 3, list: [1, 2]}
secrets: {TOKEN: {from: env}, FILE: {from: file, path: ./token}, SHORT: env}
sources: {raw: ./raw, chat: {uri: ./chat.jsonl, type: dataset.chat}}
store: {uri: ./store, remotes: {team: "s3://b/p"}}
defaults: {env: {A: x}, retries: 1, resources: {cpus: 2}}
stages:
  data: {uses: data, inputs: {files: [sources.raw, ./more]}, with: {seed: "${{ vars.size }}", clean: {lang: en}}}
  tok: {uses: "tokenize@>=1.0", inputs: {text: data}, with: {vocab_size: 300}, cache: "off"}
  train:
    uses: train-pretrain
    inputs: {tokens: tok, tokenizer: tok}
    matrix: {lr: [1e-4, "${{ vars.size }}"], include: [{lr: 1}], exclude: [{lr: 2}]}
    with: {lr: "${{ matrix.lr }}", betas: [0.1, "${{ vars.size }}"], packing: "${{ vars.x }}", note: null}
    env: {A: "1", B: {value: x, affects_output: false}, C: {secret: TOKEN}}
    resources: {cpus: "${{ vars.size }}", memory: 8GiB, gpus: 1, gpu_type: H100, disk: 1GB, time: 24h}
    gates: [{metric: loss, max: 3}, {metric: loss, baseline: eval.metrics, max_rise: 0.1, on_fail: warn}]
    retries: 2
    ephemeral: true
    output: ./out
    tag: best
  eval: {uses: eval, foreach: train, inputs: {model: train, data: tok.tokens}, with: }
  best: {select: {model: "train[*]", metrics: "eval[*]"}, by: {metric: acc, mode: max}, needs: [data]}
profiles:
  small: {vars: {size: 1}, stages: {train: {with: {lr: 1}, resources: {gpus: 8}}}}
next: [one]
"""


@pytest.fixture(scope="module")
def schema():
    from fake_stages import FakeRegistry

    return pipeline_schema(FakeRegistry())


def mistakes(schema, text: str) -> list[tuple]:
    """The paths at which the validator complains, of a combination those of its parts."""

    def leaves(error):
        inner = [leaf for child in error.context or () for leaf in leaves(child)]
        return inner or [error]

    value = plain(parse(Text("t.yaml", text, Path("/"))))
    errors = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [(tuple(error.absolute_path), error.message) for top in errors for error in [top, *leaves(top)]]


def test_the_schema_is_one(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema


def test_everything_the_format_has_is_valid(schema):
    assert mistakes(schema, FULL) == []


BAD = [
    ("max_steps", "with: {lr: ", "with: {max_stpes: 3, lr: ", ("stages", "train", "with")),
    ("wrong type", "vocab_size: 300", "vocab_size: many", ("stages", "tok", "with", "vocab_size")),
    ("too small", "vocab_size: 300", "vocab_size: 3", ("stages", "tok", "with", "vocab_size")),
    ("choice", "packing:", "optimizer: adamw2, packing:", ("stages", "train", "with", "optimizer")),
    ("nested", "clean: {lang: en}", "clean: {lnag: en}", ("stages", "data", "with", "clean")),
    ("no such stage", "uses: eval", "uses: evall", ("stages", "eval", "uses")),
    ("no such port", "inputs: {text: data}", "inputs: {txt: data}", ("stages", "tok", "inputs")),
    ("no such key", "cache:", "cahce:", ("stages", "tok")),
    ("no such section", "vars:", "var:", ()),
    ("gate", "on_fail: warn", "on_fail: maybe", ("stages", "train", "gates", 1, "on_fail")),
    ("resources", "gpus: 1,", "gpus: -1,", ("stages", "train", "resources", "gpus")),
    ("select", "mode: max", "mode: most", ("stages", "best", "by", "mode")),
    ("secret", "SHORT: env", "SHORT: command", ("secrets", "SHORT")),
    ("version", "llmctl: 1", "llmctl: 2", ("llmctl",)),
    ("retries", "retries: 2", "retries: two", ("stages", "train", "retries")),
    ("profile", "train: {with: {lr: 1}", "train: {wiht: {lr: 1}", ("profiles", "small", "stages", "train")),
    ("missing", "name: t\n", "", ()),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "path"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_spec_fails_at_the_same_key_as_in_our_reader(schema, old, new, path, registry, tmp_path, monkeypatch):
    """The schema speaks of the map that holds an unknown key, our reader of the key itself."""
    assert old in FULL
    found = mistakes(schema, FULL.replace(old, new))
    assert any(place[: len(path)] == path for place, _ in found), found
    (tmp_path / "spec.yaml").write_text(
        FULL.replace(old, new).replace('{url: "https://x.org/a.yaml", sha256: abc}, ./b.yaml', "")
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        load_pipeline("spec.yaml", registry=registry)
    changed = {
        number
        for number, (a, b) in enumerate(zip(FULL.replace(old, new).splitlines(), FULL.splitlines(), strict=False), 1)
        if a != b
    }
    lines = {mark.line for mark in (d.mark for d in caught.value.diagnostics) if mark}
    assert lines & changed or not path


# -- both directions, at every place of a spec ------------------------------------------------------------------------

SMALL = {
    "llmctl": 1,
    "name": "t",
    "include": ["./b.yaml"],
    "vars": {"size": 300},
    "secrets": {"TOKEN": {"from": "env", "variable": "T"}, "SHORT": "env"},
    "sources": {"raw": "./raw", "chat": {"uri": "./chat.jsonl", "type": "dataset.chat", "identity": "sha256"}},
    "store": {"uri": "./store", "remotes": {"team": "s3://b/p"}},
    "defaults": {"env": {"A": "x"}, "retries": 1, "resources": {"cpus": 2}},
    "stages": {
        "data": {"uses": "data", "inputs": {"files": ["sources.raw"]}, "with": {"seed": 3, "clean": {"lang": "en"}}},
        "tok": {"uses": "tokenize", "inputs": {"text": "data"}, "with": {"vocab_size": 300}, "cache": "off"},
        "train": {
            "uses": "train-pretrain",
            "inputs": {"tokens": "tok", "tokenizer": "tok"},
            "matrix": {"seed": [1, 2], "include": [{"seed": 3}], "exclude": [{"seed": 2}]},
            "env": {"B": {"value": "x", "affects_output": False}, "C": {"secret": "TOKEN"}},
            "resources": {"cpus": 3, "memory": "8GiB", "gpus": 1, "time": "24h"},
            "gates": [{"metric": "loss", "max": 3, "on_fail": "warn"}],
            "retries": 2,
            "tag": "best",
            "ephemeral": True,
            "needs": ["data"],
        },
        "best": {"select": {"model": "train[*]", "metrics": "train[*].metrics"}, "by": {"metric": "a", "mode": "max"}},
    },
    "next": ["one"],
}


def places(node, at=()):
    """The path of every value of a document, the inner ones too."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*at, key)
        yield from places(value, (*at, key))


def changed(path, value, **variables):
    """`SMALL` with another value at `path`."""
    found = deepcopy(SMALL)
    found["vars"] |= variables
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return found


def value_at(path):
    return functools.reduce(lambda node, key: node[key], path, SMALL)


@pytest.fixture
def refused(registry, tmp_path, monkeypatch):
    """What our reader says of a document; nothing if it is good."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.yaml").write_text("vars: {z: 1}\n")

    def refused(document):
        (tmp_path / "spec.yaml").write_text(yaml_text(document).replace(": null", ":"))
        try:
            load_pipeline("spec.yaml", registry=registry)
        except SpecError as error:
            return error.diagnostics[0].message
        return ""

    return refused


def test_what_check_accepts_is_not_underlined(registry, refused):
    """Nothing, an expression of the same value, one item in place of a list, a few values: at every place of a spec."""
    few = {
        name: registry.stages[name] for name in ("data", "tokenize", "train-pretrain")
    }  # the schema is slow to apply
    validator = jsonschema.Draft202012Validator(pipeline_schema(dataclasses.replace(registry, stages=few)))
    assert not refused(SMALL) and validator.is_valid(SMALL)
    wrong, underlined = [], 0
    for path in places(SMALL):
        was = value_at(path)
        documents = {"nothing": changed(path, None), "a number": changed(path, 7), "a map": changed(path, {"a": "b"})}
        if path[0] != "vars":
            documents["an expression"] = changed(path, "${{ vars.x }}", x=was)
        if isinstance(was, list):
            documents["an item"] = changed(path, was[0])
        for name, document in documents.items():
            if not validator.is_valid(document):
                underlined += 1
                if not refused(document):
                    wrong.append((path, name))
    assert wrong == [] and underlined > 100


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seed",), 3),
        (("seed",), None),
        (("seed",), []),
        (("seed",), {"a": 1}),
        (("seed",), [None]),
        (("seed",), [[1]]),
        (("include",), [3]),
        (("include",), [{}]),
        (("include",), [{"seed": [1]}]),
        (("exclude",), "text"),
        (("exclude",), [{"seed": None}]),
        ((), {}),
        ((), 3),
        ((), ["seed"]),
    ],
    ids=str,
)
def test_a_matrix_that_check_refuses_is_underlined(schema, refused, path, value):
    path = ("stages", "train", "matrix", *path)
    document = changed(path, value)
    assert refused(document)
    assert any(place[: len(path)] == path for place, _ in mistakes(schema, yaml_text(document)))


def test_the_file_of_a_stage_is_as_open(registry):
    found = stage_schema(registry.stages["train-pretrain"])
    text = "llmctl: 1\nname: t\nuses: train-pretrain\ninputs: {tokens: ./a, tokenizer: ./b}\ngates:\nresources:\n"
    more = 'include: ./x.yaml\nwith: "${{ vars.x }}"\nenv: "${{ vars.y }}"\n'
    assert mistakes(found, text + more) == []
    assert mistakes(found, text + "profiles: {small: {with: {lr: 1}, resources: {gpus: 0}}}\n") == []
    assert mistakes(found, text + "profiles: {small: {wiht: {lr: 1}}}\n")
    assert mistakes(found, text.replace("tokens: ./a, ", ""))


def test_every_shipped_spec_is_valid_and_so_is_the_file_of_each_stage():
    registry = get_registry()
    validator = jsonschema.Draft202012Validator(pipeline_schema(registry))
    for name in shipped():
        assert list(validator.iter_errors(plain(read(find(name))))) == []
    for stage in registry.stages.values():
        jsonschema.Draft202012Validator.check_schema(stage_schema(stage))


def test_the_file_of_a_single_stage(registry, tmp_path, monkeypatch):
    schema = stage_schema(registry.stages["train-pretrain"])
    text = "llmctl: 1\nname: t\nuses: train-pretrain\ninputs: {tokens: ./a, tokenizer: ./b}\nwith: {lr: 1e-3}\n"
    assert mistakes(schema, text) == []
    (tmp_path / "s.yaml").write_text(text)
    assert single_stage(registry.stages["train-pretrain"], file=tmp_path / "s.yaml", registry=registry)
    assert mistakes(schema, text.replace("lr:", "rl:")) and mistakes(schema, text.replace("tokens: ./a, ", ""))
    assert mistakes(schema, text.replace("uses: train-pretrain", "uses: sft"))


def test_the_commands(llmctl):
    found = json.loads(llmctl("schema", "pipeline").stdout)
    assert found["$schema"].endswith("2020-12/schema") and "sft.with" in found["$defs"]
    assert json.loads(llmctl("schema", "stage", "sft").stdout)["properties"]["uses"] == {
        "type": "string",
        "pattern": "^sft(@.+)?$",
    }
    wrong = llmctl("schema", "stage", "sftt")
    assert wrong.returncode == 2 and "did you mean `sft`?" in wrong.stderr
    assert "needs the name of a stage" in llmctl("schema", "stage").stderr
    assert "unexpected argument `sft`" in llmctl("schema", "pipeline", "sft").stderr
