"""Flags generated from a params class: which there are, how they are typed, what their help says."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import annotated_types
import click
import pytest
from pydantic import BaseModel

from llmctl import Field, In, InputError, Out, Params, Stage, UsageError
from llmctl.registry import get_registry
from llmctl.shell import Stream
from llmctl.spec.pipeline import single_stage
from llmctl.stage_command import StageCommand, bind_upstream, given_inputs
from llmctl.stage_flags import PARAM, PORT, by_set, option_type, param_options
from llmctl.store import Store, names


class Colour(Enum):
    RED = "red"


class Inner(BaseModel):
    depth: int = Field(3, description="how deep", ge=1)


class Example(Params):
    steps: int = Field(10, ge=1, description="how far")
    rate: float = Field(1e-3, gt=0, lt=1, description="how fast")
    name: str = Field("x", description="how called")
    where: Path | None = Field(None, description="where")
    packing: bool = Field(True, description="whether packed")
    kind: Literal["a", "b"] = Field("a", description="which")
    level: Literal[1, 2] | None = Field(None, description="which level")
    either: int | Literal["auto"] = Field("auto", description="a number or auto")
    bounded: Annotated[int, annotated_types.Ge(2)] = Field(2, description="two or more")
    needed: int = Field(description="has no default")
    several: tuple[str, ...] = Field(("a", "b"), description="a list")
    table: dict[str, float] = Field({"a": 1.0}, description="a map")
    inner: Inner = Field(Inner(), description="a model")
    colour: Colour = Field(Colour.RED, description="an enum")
    format: str = Field("", description="shares its name with an option")


FIELDS = Example.model_fields
STAGE = Stage(
    name="example",
    help="An example.",
    params=f"{__name__}:Example",
    run="x:y",
    inputs={
        "files": In("files", many=True, optional=True, help="what to read"),
        "name": In("model.hf"),
        "base": In("m"),
    },
    outputs={"model": Out("model.hf"), "other": Out(same_as="base")},
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("steps", click.IntRange), ("rate", click.FloatRange), ("name", type(click.STRING)),
        ("where", type(click.STRING)),
        ("packing", type(click.BOOL)), ("kind", click.Choice), ("level", click.Choice), ("either", type(click.STRING)),
        ("bounded", click.IntRange), ("needed", type(click.INT)), ("several", type(None)), ("table", type(None)),
        ("inner", type(None)), ("colour", type(None)),
    ],
)  # fmt: skip
def test_types(name, kind):
    assert type(option_type(FIELDS[name])) is kind


def test_every_parameter_is_reachable_exactly_once():
    flags = {str(option.name).removeprefix(PARAM) for option in param_options(FIELDS)}
    rows = {name.partition(".")[0] for name, _ in by_set(FIELDS)}
    assert flags | rows == set(FIELDS)
    assert not flags & rows
    assert rows == {"several", "table", "inner", "colour", "format"}


def test_help_rows_of_parameters_without_a_flag():
    assert dict(by_set(FIELDS)) == {
        "several": "a list  [default: [a, b]]",
        "table": "a map  [default: {a: 1.0}]",
        "inner.depth": "how deep  [default: 3]",
        "colour": "an enum  [default: Colour.RED]",
        "format": "shares its name with an option",
    }


def parse(*args, monkeypatch):
    monkeypatch.setattr(Stage, "load_params", lambda stage: Example)
    command = StageCommand(STAGE)
    with command.make_context("example", list(args)) as context:
        return context.params


def test_values_are_typed_and_absence_is_no_value(monkeypatch):
    given = parse("--steps", "3", "--no-packing", "--kind", "b", "--rate=0.5", "--level", "2", monkeypatch=monkeypatch)
    values = {key.removeprefix(PARAM): value for key, value in given.items() if key.startswith(PARAM)}
    assert {key: value for key, value in values.items() if value is not None} == {
        "steps": 3,
        "packing": False,
        "kind": "b",
        "rate": 0.5,
        "level": "2",
    }


@pytest.mark.parametrize(
    "args", [["--steps", "0"], ["--steps", "x"], ["--rate", "0"], ["--rate", "1"], ["--kind", "c"]]
)
def test_values_out_of_bounds_are_refused(args, monkeypatch):
    with pytest.raises(click.BadParameter) as caught:
        parse(*args, monkeypatch=monkeypatch)
    assert args[0] in caught.value.format_message()
    assert "range." not in caught.value.message


def test_ports_are_flags_unless_the_name_is_taken(monkeypatch):
    given = parse("--files", "a", "--files", "b", "--name", "me", "-i", "name=./m", "-", monkeypatch=monkeypatch)
    assert given[PORT + "files"] == ("a", "b")
    assert given[PARAM + "name"] == "me"
    assert PORT + "name" not in given
    assert given[PORT] == ("name=./m",)
    assert given["rest"] == ("-",)


def values(stage=STAGE, rest=(), pairs=(), **ports):
    return {"rest": rest, PORT: pairs, **{PORT + name: value for name, value in ports.items()}}


def test_paths_are_absolute_and_other_references_untouched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    pairs = ("base=sha256:0123456789", "base=name@best", "base=./x", "files=data", "files=docs/*.md", "base=s3://b/x")
    explicit, inputs = given_inputs(STAGE, values(pairs=pairs, files=("data", "-")), Store(tmp_path / "store"))
    assert explicit
    assert inputs == [
        "base=sha256:0123456789", "base=name@best", f"base={tmp_path}/x", f"files={tmp_path}/data",
        f"files={tmp_path}/docs/*.md", "base=s3://b/x", f"files={tmp_path}/data", "files=-",
    ]  # fmt: skip


def test_names_in_the_store_become_ids_unless_a_path_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, model, other = Store(tmp_path / "store"), f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"
    names.write(store, "mine", "sft", {"model": (model, "model.hf"), "metrics": (other, "metrics")}, key="k", run="r")
    pairs = ("base=mine/sft", "base=mine/sft.model", "base=mine/sft.metrics")
    _, inputs = given_inputs(STAGE, values(pairs=pairs), store)
    assert inputs == [f"base={model}", f"base={model}", f"base={other}"]
    Path("mine/sft").mkdir(parents=True)
    assert given_inputs(STAGE, values(pairs=pairs[:1]), store)[1] == [f"base={tmp_path}/mine/sft"]


def test_wrong_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="unexpected argument `a.md`") as caught:
        given_inputs(STAGE, values(rest=("a.md", "b.md")), Store(Path("none")))
    assert "quote patterns" in caught.value.hint
    with pytest.raises(UsageError, match="--input wants PORT=REF, got `x`"):
        given_inputs(STAGE, values(pairs=("x",)), Store(Path("none")))
    with pytest.raises(InputError, match=r"no such file or directory: nothing \(for input `base`\)"):
        given_inputs(STAGE, values(pairs=("base=nothing",)), Store(Path("none")))


def test_help_names_everything(monkeypatch):
    monkeypatch.setattr(Stage, "load_params", lambda stage: Example)
    text = StageCommand(STAGE).get_help(click.Context(StageCommand(STAGE), info_name="example", max_content_width=100))
    for part in (
        "An example.", "--files REF", "what to read", "--base REF", "required unless piped", "--steps INTEGER",
        "[default: 10; x>=1]", "--packing / --no-packing", "[default: true]", "--kind [a|b]", "0<x<1",
        "[default: required]",
        "inner.depth", "how deep", "model  model.hf", "other  as base", "--set NAME=VALUE", "--stop-on-reader-exit",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(("retrieval", "bound"), [("lexical", {"text"}), ("dense", {"text", "encoder"})])
def test_a_pipe_binds_no_input_that_would_have_no_effect(tmp_path, monkeypatch, retrieval, bound):
    def fed(upstream, stream, *, explicit):
        for port, kind in (("text", "dataset.text"), ("vectors", "embeddings")):
            record = {"llmctl": "ref", "v": 1, "port": port, "type": kind, "id": f"sha256:{port}", "store": "file:///s"}
            upstream.feed(json.dumps({**record, "path": str(tmp_path)}).encode())

    monkeypatch.setattr("llmctl.upstream.read_upstream", fed)
    registry = get_registry()
    pipeline = single_stage(registry.stages["rag"], flags={"retrieval": retrieval}, stdin=True, registry=registry)
    store = Store(tmp_path / "store")
    found = bind_upstream(pipeline, store, Stream("rag", "json"), lambda stdin: pipeline, explicit=False)
    assert set(found.stages["rag"].inputs) == bound
