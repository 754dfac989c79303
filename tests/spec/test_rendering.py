from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmctl.spec.diagnostics import SpecError, Text
from llmctl.spec.nodes import parse
from llmctl.spec.params import Field, Params
from llmctl.spec.rendering import _unset, render

TEXT = """
llmctl: 1
name: t
include: [./shared/base.yaml]
vars: {size: 3}
stages:
  data: {uses: data, inputs: {files: sources.corpus}, with: {seed: "${{ vars.size }}"}}
  tok: {uses: tokenize, inputs: {text: data}, with: {vocab_size: "${{ vars.vocab }}"}}
  train:
    uses: train-pretrain
    inputs: {tokens: tok, tokenizer: tok}
    matrix: {lr: [1e-4, 3e-4]}
    with: {lr: "${{ matrix.lr }}", run_tag: "007"}
    output: "./out/${{ matrix.lr }}"
  best: {select: {model: train.model, metrics: train.metrics}, by: {metric: loss, mode: min}}
profiles:
  small: {stages: {train: {with: {max_steps: 5}}}, vars: {size: 4}}
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text("vars: {vocab: 99}\nsources: {corpus: ./raw}\n")
    (tmp_path / "spec.yaml").write_text(TEXT.lstrip())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "spec.yaml"


def same(pipeline, other):
    assert pipeline.stages == other.stages and pipeline.name == other.name
    assert {n: pipeline.resolve(s.uri) for n, s in pipeline.sources.items()} == {
        n: other.resolve(s.uri) for n, s in other.sources.items()
    }


def test_what_is_printed_is_the_same_spec(spec, registry, load):
    from llmctl.spec.pipeline import load_pipeline

    sets = ("train.betas=[0.1, 0.2]", "stages.data.inputs.files=./mine")
    first = load_pipeline(spec, ("small",), sets, registry=registry)
    found = render(spec, ("small",), sets, registry=registry)
    again = load(found.yaml())
    assert [stage.params for stage in again.stages.values()] == [stage.params for stage in first.stages.values()]
    assert list(again.stages) == list(first.stages) == ["data", "tok", "train[lr=1e-4]", "train[lr=3e-4]", "best"]
    assert again.stages["train[lr=3e-4]"].output == first.stages["train[lr=3e-4]"].output
    assert {n: again.resolve(s.uri) for n, s in again.sources.items()} == {"corpus": spec.parent / "shared" / "raw"}, (
        "a path of an included file still counts from there"
    )
    assert json.loads(json.dumps(found.plain()))["stages"]["train"]["with"]["lr"] == "${{ matrix.lr }}"


def test_every_value_is_explained_with_the_layer_that_sets_it(spec, registry):
    found = render(spec, ("small",), ("train.seed=5",), registry=registry)
    origins = {item.path: item for item in found.origins()}
    tok = origins["stages.tok.with.vocab_size"]
    assert (tok.value, tok.place, tok.through) == (99, "shared/base.yaml:1:15", f"{spec}:7:67")
    assert (origins["stages.data.with.seed"].value, origins["stages.data.with.seed"].place) == (4, f"{spec}:16:65")
    assert origins["stages.train.with.max_steps"].place == f"{spec}:16:46"
    assert origins["stages.train.with.seed"].place == "--set#1:1:12"
    assert (origins["stages.train.with.optimizer"].value, origins["stages.train.with.optimizer"].place) == (
        "muon",
        "default",
    )
    assert origins["sources.corpus.uri"].place == "shared/base.yaml:2:19"


def test_every_parameter_is_explained_exactly_once(spec, registry):
    paths = [item.path for item in render(spec, registry=registry).origins()]
    assert len(paths) == len(set(paths))
    names = set(registry.stages["train-pretrain"].load_params().model_fields)
    assert {path.split(".")[3].partition("[")[0] for path in paths if path.startswith("stages.train.with.")} == names


def test_a_nested_parameter_that_nothing_sets_is_explained_too(spec, registry):
    found = render(spec, sets=("data.clean.lang=en",), registry=registry)
    rows = {item.path: (item.value, item.place) for item in found.origins() if ".clean" in item.path}
    assert rows == {
        "stages.data.with.clean.lang": ("en", "--set#1:1:17"),
        "stages.data.with.clean.min_chars": (0, "default"),
        "stages.data.with.clean.threads": (1, "default"),
    }


def test_models_in_lists_and_maps_have_defaults_too():
    class Inner(Params):
        a: int = Field(1, description="a")
        b: int = Field(description="required")

    class Outer(Params):
        rows: list[Inner] = Field([], description="rows")
        named: dict[str, Inner] = Field({}, description="named")
        either: Inner | None = Field(None, description="perhaps")
        free: dict[str, dict[str, int]] = Field({}, description="no model")

    node = parse(Text("t", "rows: [{b: 2}, {a: 3, b: 2}]\nnamed: {x: {b: 2}}\nfree: {a: {b: 1}}\n", Path("/")))
    rows = {item.path: item.value for item in _unset([Outer], node, "with")}
    assert rows == {"with.rows[0].a": 1, "with.named.x.a": 1, "with.either": None}
    node = parse(Text("t", "rows: []\nnamed: {}\nfree: {}\neither: {b: 1}\n", Path("/")))
    assert {item.path: item.value for item in _unset([Outer], node, "with")} == {"with.either.a": 1}


def test_a_broken_spec_is_not_rendered(spec, registry):
    with pytest.raises(SpecError, match="E101"):
        render(spec, sets=("train.lrr=1",), registry=registry)


def test_the_commands(llmctl, tmp_path):
    found = llmctl("render", "quickstart", "--set", "sft.lr=0.5")
    assert found.returncode == 0
    (tmp_path / "work" / "again.yaml").write_text(found.stdout)
    assert "quickstart: 17 stages, no mistakes" in llmctl("check", "again.yaml").stdout
    rows = json.loads(llmctl("render", "quickstart", "--set", "sft.lr=0.5", "--explain", "--format", "json").stdout)
    (lr,) = [row for row in rows if row["path"] == "stages.sft.with.lr"]
    assert lr == {"path": "stages.sft.with.lr", "value": 0.5, "from": "--set#1:1:8", "through": None}
    table = llmctl("render", "quickstart", "--explain").stdout
    assert "stages.train.with.dim" in table and "default" in table
    wrong = llmctl("render", "quickstart", "--set", "sft.lrr=1", "--error-format", "json")
    assert wrong.returncode == 2
    assert json.loads(wrong.stderr)["code"] == "E101"


def test_an_input_that_a_row_names_is_left_to_be_made(registry, tmp_path, monkeypatch):
    text = (
        'llmctl: 1\nname: t\nstages:\n  d: {uses: data, matrix: {s: [./a, ./b]}, inputs: {files: "${{ matrix.s }}"}}\n'
    )
    (tmp_path / "m.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert render("m.yaml", registry=registry).plain()["stages"]["d"]["inputs"] == {"files": "${{ matrix.s }}"}
