"""`pipeline.md` 2.5, "What invalidates, what does not", a test per row that belongs to keys and runs."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import sys

import pytest

from llmctl.pipeline import drift
from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.plan import Planner
from llmctl.registry import discover
from llmctl.spec.pipeline import load_pipeline
from llmctl.spec.resolved import EnvValue, Resources, Secret
from llmctl.stage import Artifact
from llmctl.store import Store

PLUGIN = "fake_stages.py"
CHAIN = """
a: {uses: make, inputs: {files: ./in.txt}, with: {rows: 5}, env: {MODE: x}}
b: {uses: upper, inputs: {text: a}}
"""


@pytest.fixture
def keys(run, spec, work, fake_stages, monkeypatch):
    """`keys(change=…)` → stage id → (action key, resume key), as a run would compute them now; nothing runs."""
    (work / "in.txt").write_text("one")
    spec(CHAIN)

    def compute(text=CHAIN, change=lambda pipeline: pipeline, sets=(), strict=False):
        spec(text)
        for name in [name for name in sys.modules if name.startswith("fake_")]:
            del sys.modules[name]  # a test may have changed them
        registry = discover()
        pipeline = change(load_pipeline("p.yaml", sets=sets, registry=registry))
        planner = Planner(pipeline, Store.open(), registry, strict=strict)
        found = {}
        inputs, outputs = Inputs(pipeline, Store.open()), {}
        for stage in pipeline.stages.values():
            decided = planner.decide(stage, inputs.bind(stage, outputs)).keys
            found[stage.id] = (decided.action, decided.resume)
            # Stands for bytes that a stage without randomness makes: they follow from its key.
            outputs[stage.id] = {
                port: Artifact(work, type, f"sha256:{decided.action[7:39]}{port:>32}")
                for port, type in stage.outputs.items()
            }
        return found

    return compute


def altered(**fields):
    def change(pipeline):
        stages = {id: dataclasses.replace(stage, **fields) for id, stage in pipeline.stages.items()}
        return dataclasses.replace(pipeline, stages=stages)

    return change


@pytest.mark.parametrize(
    ("row", "how"),
    [
        ("an output-affecting parameter", {"sets": ["a.rows=6"]}),
        ("declared env value", {"text": CHAIN.replace("MODE: x", "MODE: y")}),
        ("another name of a declared variable", {"text": CHAIN.replace("MODE: x", "MODES: x")}),
    ],
)
def test_that_stage_and_those_below_run_again(row, how, keys):
    before, after = keys(), keys(**how)
    assert all(before[id] != after[id] for id in "ab")


def test_below_means_below(keys):
    before, after = keys(), keys(sets=["b.mark=x"])
    assert before["a"] == after["a"] and before["b"] != after["b"]


@pytest.mark.parametrize(
    ("row", "how"),
    [
        ("same value written differently", {"text": CHAIN.replace("rows: 5", "rows: 0x5")}),
        ("key order", {"text": CHAIN.replace("with: {rows: 5}, env: {MODE: x}", "env: {MODE: x}, with: {rows: 5}")}),
        ("comments and whitespace", {"text": CHAIN.replace("{rows: 5}", "{ rows:  5 }") + "# more\n"}),
        ("explicit default", {"text": CHAIN.replace("rows: 5", "rows: 5, word: a, seed: 1.0")}),
        ("resources", {"change": altered(resources=Resources(cpus=1, memory=1 << 30, time=60))}),
        ("retries", {"change": altered(retries=5)}),
        ("ephemeral and tag", {"change": altered(ephemeral=True, tag="best")}),
        ("cache", {"change": altered(cache="refresh")}),
        ('parameters marked affects="nothing"', {"sets": ["a.threads=8", "b.sleep=1"]}),
        ("affects_output: false", {"text": CHAIN.replace("MODE: x", "MODE: x, T: {value: y, affects_output: false}")}),
        ("output path", {"text": CHAIN.replace("b: {uses: upper,", "b: {uses: upper, output: ./out,")}),
        ("gates", {"text": CHAIN.replace("b: {uses: upper,", "b: {uses: upper, gates: [{metric: rows, min: 1}],")}),
    ],
)
def test_nothing_runs_again(row, how, keys):
    assert keys() == keys(**how)


def test_which_secret_is_in_no_key(keys):
    def secret(name):
        def change(pipeline):
            spec = pipeline.stages["a"]
            env = {**spec.env, "TOKEN": EnvValue(secret=name, affects_output=False)}
            stages = {**pipeline.stages, "a": dataclasses.replace(spec, env=env)}
            return dataclasses.replace(pipeline, stages=stages, secrets={name: Secret(name=name, origin="env")})

        return change

    assert keys() == keys(change=secret("ONE")) == keys(change=secret("OTHER"))


def test_variables_of_the_runner_are_in_no_key(keys, monkeypatch):
    before = keys()
    monkeypatch.setenv("PATH", f"/elsewhere:{os.environ['PATH']}")
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert keys() == before


def test_input_bytes(keys, work):
    before = keys()
    path = work / "in.txt"
    os.utime(path, (1, 1))
    assert keys() == before  # the same bytes with a new mtime
    path.write_text("two")
    assert keys()["a"] != before["a"]
    path.write_text("one")
    assert keys() == before


def changed_plugin(fake_stages, old, new, name=PLUGIN):
    path = fake_stages / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_plugin_rev(keys, fake_stages):
    before = keys()
    changed_plugin(fake_stages, 'name="upper",', 'name="upper", rev=2,')
    after = keys()
    assert before["a"] == after["a"] and before["b"] != after["b"]


def test_plugin_version_with_the_same_rev_and_new_defaulted_parameters(keys, fake_stages):
    before = keys()
    (fake_stages / "fake-0.1.dist-info").rename(fake_stages / "fake-0.2.dist-info")
    changed_plugin(fake_stages / "fake-0.2.dist-info", "Version: 0.1", "Version: 0.2", "METADATA")
    new = 'class MakeParams(Params):\n    extra: int = Field(7, description="new")\n'
    new += '    more: str = Field("", description="new")\n'
    changed_plugin(fake_stages, "class MakeParams(Params):\n", new, "fake_params.py")
    assert keys() == before


def test_an_editable_plugin_counts_by_its_source(keys, fake_stages):
    (fake_stages / "fake-0.1.dist-info/RECORD").unlink()
    before = keys()
    path = fake_stages / PLUGIN
    path.write_text(path.read_text() + "\n# changed\n")
    assert keys() != before


def test_key_deps(keys, fake_stages, monkeypatch):
    changed_plugin(fake_stages, 'name="make",', 'name="make", key_deps=("click",),')
    before = keys()
    monkeypatch.setattr("llmctl.store.keys.metadata.version", lambda name: "99.1.2")
    other = keys()
    assert other["a"] != before["a"]
    monkeypatch.setattr("llmctl.store.keys.metadata.version", lambda name: "99.1.3")
    assert keys() == other  # a patch release


# -- drift and --strict-env -------------------------------------------------------------------------------------------


def test_torch_cuda_driver_host_count_with_strict_env_only(keys, monkeypatch):
    loose = keys()
    facts = {"python": "3.11.7", "torch": "2.12.0", "driver": "550.1"}
    monkeypatch.setattr("llmctl.pipeline.plan.circumstances", lambda: dict(facts))
    strict = keys(strict=True)
    assert strict["a"] != loose["a"]
    assert keys(strict=True) == strict
    for name in facts:
        old = facts[name]
        facts[name] = "another"
        assert keys(strict=True)["a"] != strict["a"], name
        assert keys() == loose
        facts[name] = old


def test_the_facts_of_a_machine(monkeypatch, tmp_path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
    )
    monkeypatch.setattr(drift, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(drift, "_version", {"torch": "2.13.0+cpu"}.get)
    facts = drift.circumstances()
    assert facts["driver"] == "550.54.15"
    assert facts["torch"] == "2.13.0+cpu"
    assert re.fullmatch(r"3\.\d+\.\d+\S*", facts["python"])
    assert "cuda" not in facts


def test_plan_says_what_has_drifted(run, llmctl, work):
    assert run("a: {uses: make}").code == 0

    def why():
        return json.loads(llmctl("plan", "p.yaml", "--format", "json").stdout)[0]["why"]

    assert why() == []
    for path in (work / ".llmctl/store/artifacts").glob("sha256/*/*/llmctl.json"):
        path.chmod(0o644)
        manifest = json.loads(path.read_text())
        manifest["provenance"]["observed"] |= {"python": "3.9.1"}
        path.write_text(json.dumps(manifest))
    assert why() == [f"made with python 3.9.1, now {platform.python_version()}"]
    rows = json.loads(llmctl("plan", "p.yaml", "--format", "json", "--strict-env").stdout)
    assert rows[0]["action"] == "run"
    assert rows[0]["why"][0].startswith("platform any → linux")
    assert list(drift.drift({"torch": "2.13.0"})) == [], "builds of one release are equal"
    assert list(drift.drift({"torch": "2.12.0", "git": "abc"}, ("torch",))) == [("torch", "2.12.0", "2.13.0+cpu")]


# -- runs -------------------------------------------------------------------------------------------------------------


def test_run_id_and_log_settings(fake_stages, llmctl, spec, actions):
    spec("a: {uses: make}")
    assert llmctl("run", "p.yaml").returncode == 0
    done = llmctl("run", "p.yaml", "--log-format", "json", "--events", "e.jsonl", "--jobs", "2", "--keep-going")
    assert done.returncode == 0
    assert actions() == {"a": "cached"}


def test_a_stage_that_failed_last_time_is_never_cached(run, actions):
    for _ in range(2):
        assert run("w: {uses: wrong, with: {how: stage}}").code == 3
        assert actions() == {"w": "run"}
