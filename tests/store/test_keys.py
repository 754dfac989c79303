"""Action and resume keys: what is in them, what is not, and that they never change by accident."""

import dataclasses
import hashlib
import json
from types import SimpleNamespace

import pytest

from llmctl import Field, Params, Stage
from llmctl.registry import Origin
from llmctl.spec.resolved import EnvValue, Gate, Resources, StageSpec
from llmctl.store.keys import make_keys


class TrainParams(Params):
    lr: float = Field(1e-3, description="")
    steps: int = Field(10, affects="extent", description="")
    threads: int = Field(1, affects="nothing", description="")


class WiderParams(TrainParams):
    """The same after an upgrade that added a parameter."""

    warmup: int = Field(0, description="")


STAGE = Stage(name="train", help="", params="x:y", run="x:y", key_deps=("click",))
ORIGIN = Origin(dist="llmctl", version="0.1.0", editable=False)
BASE = StageSpec(id="a", stage=STAGE, params=TrainParams(lr=3e-4), inputs={}, outputs={"model": "model.hf"})
INPUTS = {"model": ["sha256:11"], "data": ["sha256:22", "sha256:33"]}


def keys(origin=ORIGIN, inputs=INPUTS, **changes):
    return make_keys(dataclasses.replace(BASE, **changes), origin, inputs)


def stage(**changes):
    return dataclasses.replace(STAGE, **changes)


def test_the_key_is_the_digest_of_the_canonical_preimage(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "8.2.1")
    text = (
        '{"env":{"MODE":"x"},"inputs":{"data":["sha256:22","sha256:33"],"model":["sha256:11"]},'
        '"key_deps":{"click":"8.2"},"plugin":{"dist":"llmctl","rev":1},"stage":"train","v":1,"with":{"lr":0.0003}}'
    )
    found = keys(env={"MODE": EnvValue(value="x"), "TRACE": EnvValue(value="1", affects_output=False)})
    assert found.action == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    assert json.loads(json.dumps(found.preimage)) == json.loads(text)


@pytest.mark.parametrize(
    "changed",
    [
        {"params": TrainParams(lr=1e-4)},
        {"params": TrainParams()},
        {"params": TrainParams(lr=3e-4, steps=11)},
        {"stage": stage(name="other")},
        {"stage": stage(rev=2)},
        {"stage": stage(key_deps=("pluggy",))},
        {"origin": Origin(dist="acme", version="0.1.0", editable=False)},
        {"origin": Origin(dist="llmctl", version="0.1.0", editable=True, source_digest="sha256:1")},
        {"inputs": {**INPUTS, "model": ["sha256:12"]}},
        {"inputs": {**INPUTS, "data": ["sha256:33", "sha256:22"]}},
        {"inputs": {"model": ["sha256:11"]}},
        {"env": {"MODE": EnvValue(value="x")}},
    ],
)
def test_what_decides_the_result_changes_the_key(changed):
    assert keys(**changed).action != keys().action


@pytest.mark.parametrize(
    "changed",
    [
        {"params": TrainParams(lr=0.0003, steps=10, threads=8)},
        {"params": WiderParams(lr=3e-4)},
        {"id": "b"},
        {"origin": Origin(dist="llmctl", version="0.2.0", editable=False)},
        {"resources": Resources(cpus=2, gpus=1, memory=1 << 30, time=60)},
        {"gates": (Gate(metric="x", min=1),)},
        {"needs": ("z",)},
        {"cache": "refresh"},
        {"tag": "best"},
        {"env": {"MODE": EnvValue(value="x", affects_output=False)}},
        {"stage": stage(help="other words", extra="train", headline=("loss",))},
        {"inputs": dict(reversed(INPUTS.items()))},
    ],
)
def test_what_does_not_leaves_both_keys(changed):
    assert (keys(**changed).action, keys(**changed).resume) == (keys().action, keys().resume)


def test_how_far_to_go_is_not_in_the_resume_key():
    longer, other = keys(params=TrainParams(lr=3e-4, steps=99)), keys(params=TrainParams(lr=1e-4))
    assert longer.resume == keys().resume
    assert other.resume != keys().resume
    assert keys().resume != keys().action


def test_python_counts_in_full_others_by_major_and_minor(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.12.4")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.22.3rc1")
    assert keys(stage=stage(key_deps=("python", "tokenizers"))).preimage["key_deps"] == {
        "python": "3.12.4",
        "tokenizers": "0.22",
    }
    monkeypatch.undo()
    assert keys(stage=stage(key_deps=("no-such-thing",))).preimage["key_deps"] == {"no-such-thing": "not installed"}


def test_nothing_of_the_spec_but_the_parameters_is_read():
    """A stand-in without any other attribute is enough, so nothing else can get into a key."""
    spec = SimpleNamespace(stage=STAGE, env={}, params=Params(), key_params=lambda extent=True: {"lr": 1})
    assert make_keys(spec, ORIGIN, {}).preimage["with"] == {"lr": 1}


def test_a_secret_is_in_no_key():
    """Neither its value nor its name, even where somebody forgot to say that it does not affect the output."""
    for secret in (EnvValue(secret="TOKEN"), EnvValue(value="canary-7c1d", secret="TOKEN")):
        made = keys(env={"HF_TOKEN": secret})
        assert made == keys()
        assert "canary-7c1d" not in json.dumps(made.preimage)
