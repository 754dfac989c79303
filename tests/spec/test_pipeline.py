from __future__ import annotations

import dataclasses
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmctl.spec import files
from llmctl.spec.diagnostics import SpecError
from llmctl.spec.pipeline import PathRef, load_pipeline, print_spec, single_stage

PIPELINE = "llmctl: 1\nname: p\nstages:\n  data: {uses: data, output: ../out}\n"
SINGLE = """
llmctl: 1
name: sft-chat
uses: sft
vars: {rate: 2e-5}
inputs: {model: ./base, data: sources.chat}
sources: {chat: {uri: ./chat.jsonl, type: dataset.chat}}
with: {lr: "${{ vars.rate }}", max_steps: 5}
env: {HF_HUB_OFFLINE: {value: "1", affects_output: false}}
output: ./out
profiles: {quick: {with: {max_steps: 2}}}
"""


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A package with one shipped spec; the current directory is elsewhere."""
    package = tmp_path / "site" / "llmctl"
    (package / "specs").mkdir(parents=True)
    (package / "specs" / "quickstart.yaml").write_text(PIPELINE)
    monkeypatch.setattr(files, "__file__", str(package / "spec" / "files.py"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return package


def test_a_shipped_spec_run_by_name_acts_as_if_it_lay_in_specs_here(shipped, registry, tmp_path):
    pipeline = load_pipeline("quickstart", registry=registry)
    assert pipeline.base == tmp_path / "work" / "specs"
    assert pipeline.stages["data"].output.resolve() == tmp_path / "work" / "out"
    assert pipeline.file == shipped / "specs" / "quickstart.yaml"


def test_the_checkout_is_searched_where_the_package_has_no_specs(shipped, registry):
    (shipped / "specs" / "quickstart.yaml").rename(shipped.parent / "moved.yaml")
    (shipped / "specs").rmdir()
    (shipped.parent / "specs").mkdir()
    (shipped.parent / "moved.yaml").rename(shipped.parent / "specs" / "other.yaml")
    assert load_pipeline("other", registry=registry).name == "p"


def test_an_existing_file_wins_over_a_shipped_name_and_a_directory_does_not(shipped, registry):
    Path("quickstart").mkdir()
    assert load_pipeline("quickstart", registry=registry).name == "p"
    Path("quickstart").rmdir()
    Path("quickstart").write_text(PIPELINE.replace("name: p", "name: mine"))
    assert load_pipeline("quickstart", registry=registry).name == "mine"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("quikstart", "no file and no shipped spec is called `quikstart`", "did you mean `quickstart`?"),
        ("zzz", "no file and no shipped spec is called `zzz`", "shipped specs: quickstart"),
        ("./no.yaml", "cannot read no.yaml: no such file", "there are no specs there"),
        ("no/such/x.yaml", "cannot read no/such/x.yaml: no such file", "there are no specs there"),
        (".", "cannot read .: is a directory", "there are no specs there"),
    ],
)
def test_an_unknown_name_lists_what_exists(shipped, registry, name, message, hint):
    with pytest.raises(SpecError) as caught:
        load_pipeline(name, registry=registry)
    (found,) = caught.value.diagnostics
    assert (found.code, found.message, found.hint) == ("E011", message, hint)
    assert str(caught.value) == f"error[E011]: {message}\n  hint: {hint}"


def test_a_near_file_is_suggested(shipped, registry):
    Path("mine.yaml").write_text(PIPELINE)
    with pytest.raises(SpecError, match="did you mean `mine.yaml`"):
        load_pipeline("mien.yaml", registry=registry)


# -- single stages -----------------------------------------------------------------------------------------------------


def test_a_single_stage_file(load, tmp_path):
    pipeline = load(SINGLE)
    (spec,) = pipeline.stages.values()
    assert (pipeline.single, pipeline.name, spec.id, spec.stage.name) == (True, "sft-chat", "sft-chat", "sft")
    assert (spec.params.lr, spec.params.max_steps, spec.output) == (2e-5, 5, tmp_path / "out")
    assert load(SINGLE, "lr=1", "weights.a=2").stages["sft-chat"].params.weights == {"a": 2}
    assert load(SINGLE, profiles=("quick",)).stages["sft-chat"].params.max_steps == 2


def test_mistakes_in_a_single_stage_file(mistakes):
    text = SINGLE.replace("max_steps: 5", "max_stpes: 5").replace("model: ./base", "model: sft-chat")
    found = mistakes(text, "lr=x", "trian.lr=3")
    assert found[-1].startswith("E101 --set#2:1:1 unknown key `trian`")
    assert found[:-1] == [
        "E102 spec.yaml:5:17 `sft-chat` is no source, path or artifact [a path starts with ./: ./sft-chat]",
        "E101 spec.yaml:7:32 unknown key `max_stpes` [did you mean `max_steps`?]",
        "E102 --set#1:1:4 with.lr: Input should be a valid number (got 'x')",
    ]


def test_a_stage_command_without_a_file(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = single_stage(
        registry.stages["sft"],
        inputs=["model=./base", "data=./a.jsonl"],
        sets=["max_steps=3", "lr=2"],
        flags={"lr": 1.0, "run_tag": "007", "max_steps": None, "packing": False, "chunks": "8"},
        output="out",
        registry=registry,
    )
    (spec,) = pipeline.stages.values()
    params = spec.params
    assert (spec.id, pipeline.base, pipeline.file, spec.output) == ("sft", tmp_path, None, tmp_path / "out")
    assert (params.lr, params.run_tag, params.max_steps, params.packing, params.chunks) == (2, "007", 3, False, 8)
    assert spec.inputs["model"] == (PathRef(uri="./base", type="model.hf"),)


def test_a_stage_command_over_a_file(registry, tmp_path, monkeypatch):
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "sft.yaml").write_text(SINGLE)
    monkeypatch.chdir(tmp_path)
    file = Path("specs/sft.yaml")
    pipeline = single_stage(
        registry.stages["sft"], file=file, inputs=["model=./mine"], flags={"max_steps": 9}, registry=registry
    )
    (spec,) = pipeline.stages.values()
    assert (spec.params.lr, spec.params.max_steps) == (2e-5, 9)
    assert pipeline.resolve(spec.inputs["model"][0].uri) == tmp_path / "mine"  # typed here, so from here
    assert pipeline.resolve(pipeline.sources["chat"].uri) == tmp_path / "specs" / "chat.jsonl"
    assert spec.output == tmp_path / "specs" / "out"


def test_several_inputs_of_one_port(registry):
    pipeline = single_stage(registry.stages["data"], inputs=["files=./a", "files=./b/*.txt"], registry=registry)
    assert [ref.uri for ref in pipeline.stages["data"].inputs["files"]] == ["./a", "./b/*.txt"]


def test_open_inputs_are_allowed_only_if_stdin_can_bring_them(registry):
    spec = single_stage(registry.stages["sft"], inputs=["data=./d"], stdin=True, registry=registry).stages["sft"]
    assert spec.unbound() == ("model",)
    with pytest.raises(SpecError) as caught:
        single_stage(registry.stages["sft"], inputs=["data=./d"], registry=registry)
    (found,) = caught.value.diagnostics
    assert (found.code, found.message) == ("E124", "required input `model` (model.hf) of `sft` is missing")
    assert "--input model=PATH" in found.hint


def test_an_input_that_the_parameters_require_is_open_too(registry):
    tokenize = registry.stages["tokenize"]
    given = {"inputs": ["text=./t"], "stdin": True, "registry": registry}
    assert single_stage(tokenize, **given).stages["tokenize"].unbound() == ()
    assert single_stage(tokenize, flags={"extend": True}, **given).stages["tokenize"].unbound() == ("tokenizer",)


@pytest.mark.parametrize(
    ("given", "place", "message"),
    [
        ({"flags": {"lr": -1.0}}, "--lr:1:6", "with.lr: Input should be greater than 0 (got -1.0)"),
        ({"flags": {"lr": "fast"}}, "--lr:1:6", "with.lr: Input should be a valid number (got 'fast')"),
        ({"inputs": ["model"]}, "--input#1:1:1", "`--input model` binds nothing"),
        ({"inputs": ["modl=./x"]}, "--input#1:1:1", "stage `sft` has no input `modl`"),
        ({"inputs": ["model=base/x.y"]}, "--input#1:1:7", "`base/x.y` is no stage, source, path or artifact"),
        ({"inputs": ["model=base"]}, "--input#1:1:7", "`base` is no source, path or artifact"),
        ({"inputs": ["model=./a", "model=./b"]}, "--input#1:1:1", "inputs.model: this port takes one input (got 2)"),
        ({"sets": ["lrr=1"]}, "--set#1:1:1", "unknown key `lrr`"),
    ],
)
def test_mistakes_on_the_command_line_of_a_stage(registry, given, place, message):
    with pytest.raises(SpecError) as caught:
        single_stage(registry.stages["sft"], stdin=True, registry=registry, **given)
    (found,) = caught.value.diagnostics
    assert (str(found.mark), found.message) == (place, message)


def test_the_file_must_be_for_the_stage(load, registry):
    load(SINGLE)
    with pytest.raises(SpecError, match="this file is for `sft`, not for `eval`"):
        single_stage(registry.stages["eval"], file=Path("spec.yaml"), registry=registry)
    load(PIPELINE)
    with pytest.raises(SpecError, match="takes the file of a single stage"):
        single_stage(registry.stages["data"], file=Path("spec.yaml"), registry=registry)


# -- printing ----------------------------------------------------------------------------------------------------------

FULL = """
llmctl: 1
name: t
vars: {seed: 3}
sources: {chat: {uri: raw/chat.jsonl, type: dataset.chat}, more: ./x}
stages:
  data: {uses: data, inputs: {files: [sources.more, ./y]}, with: {clean: {lang: "no"}}}
  tok: {uses: tokenize, inputs: {text: data}}
  train:
    uses: train-pretrain
    inputs: {tokens: tok, tokenizer: tok}
    with: {lr: 1e-5, betas: [0.5, 0.9], run_tag: "0o17", note: "1e-4", seed: "${{ vars.seed }}", weights: {"on": 1}}
    resources: {memory: 1GiB, time: 2h, gpus: 1}
    env: {A: "1", B: {value: "~", affects_output: false}}
    output: ./out
    cache: off
    tag: best
  eval:
    uses: eval
    needs: [data]
    inputs: {model: train, data: [tok, sources.chat]}
    gates: [{metric: a.b, min: 0.5}, {metric: c, baseline: other, max_drop: 0.1, on_fail: warn}]
  other: {uses: eval, inputs: {model: ./m, data: sources.chat}}
"""


def same(first, second):
    return dataclasses.replace(first, file=None) == dataclasses.replace(second, file=None)


def test_a_printed_pipeline_reads_as_itself(load):
    first = load(FULL, "train.max_steps=4")
    second = load(print_spec(first))
    assert same(first, second)
    assert print_spec(second) == print_spec(first)


def test_a_printed_stage_command_is_a_short_file(load, registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = single_stage(
        registry.stages["sft"], inputs=["model=./base", "data=-"], sets=["lr=2e-5", "run_tag=007"], registry=registry
    )
    text = print_spec(first)
    assert text == dedent("""\
        llmctl: 1
        name: sft
        uses: sft
        inputs: {model: ./base, data: '-'}
        with:
          lr: 2.0e-05
          run_tag: "007"
        """)
    assert same(first, load(text))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["0o17", "1e-4", "on", "~", "null", "0x1F", "1_000", "=", "<<", "- a", "#", "1:30", ".inf", "2024-01-01", "'", "\n"]
), rate=st.floats(1e-9, 1e9))  # fmt: skip
def test_any_text_and_number_survives_printing(load, text, rate):
    from hypothesis import assume

    assume("${{" not in text)
    first = load(SINGLE)
    params = type(first.stages["sft-chat"].params)(lr=rate, note=text, weights={text: 1.0} if text else {})
    spec = dataclasses.replace(first.stages["sft-chat"], params=params)
    changed = dataclasses.replace(first, stages={"sft-chat": spec})
    assert load(print_spec(changed)).stages["sft-chat"].params == params


def test_the_one_character_that_no_spec_holds_is_refused_when_it_is_read_back(load):
    first = load(SINGLE)
    for values in ({"note": "a\0b"}, {"weights": {"\0": 1.0}}):
        params = type(first.stages["sft-chat"].params)(**values)
        spec = dataclasses.replace(first.stages["sft-chat"], params=params)
        text = print_spec(dataclasses.replace(first, stages={"sft-chat": spec}))
        assert "\0" not in text  # it is written as an escape, so the place of the mistake can be shown
        with pytest.raises(SpecError) as caught:
            load(text)
        assert [d.message for d in caught.value.diagnostics] == ["a text holds the character NUL"]


def test_next_lines_are_kept_and_printed_back(load):
    text = PIPELINE + 'next: ["try:", "  {llmctl} run {spec} --profile files"]\n'
    pipeline = load(text)
    assert pipeline.next == ("try:", "  {llmctl} run {spec} --profile files")
    assert load(print_spec(pipeline)).next == pipeline.next


def test_remotes_of_the_spec_are_printed_and_those_of_the_user_are_not(load, tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text('store: {remotes: {home: "file:///mnt/home"}}\n')
    monkeypatch.setenv("LLMCTL_CONFIG", str(config))
    for remotes in ('{uri: ./s, remotes: {team: "s3://b/p", disk: ./remote}}', '{remotes: {team: "s3://b/p"}}'):
        first = load(f"{PIPELINE}store: {remotes}\n")
        text = print_spec(first)
        assert same(first, load(text)) and first.remotes["home"] == "file:///mnt/home"
        assert "s3://b/p" in text and "home" not in text
    assert "store" not in print_spec(load(PIPELINE))
