"""Action keys of the shipped specs, kept: an upgrade that changes one makes every user's finished work run again.

Inputs stand for themselves (the id of an output is the digest of its name), Python and libraries have fixed versions.
After a change that is meant, raise `rev` of the stage and run with LLMCTL_UPDATE_GOLDEN=1.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmctl.registry import Origin, get_registry
from llmctl.spec.canonical import digest
from llmctl.spec.files import shipped
from llmctl.spec.pipeline import load_pipeline
from llmctl.store import keys

GOLDEN = Path(__file__).parent / "golden_keys.json"
SPECS = [(name, ()) for name in shipped()] + [("quickstart", ("files",)), ("sweep", ("smoke",))]


def found(name: str, profiles: tuple[str, ...], *sets: str) -> dict[str, str]:
    pipeline = load_pipeline(name, profiles, sets, registry=get_registry())
    origin = Origin(dist="llmctl", version="any", editable=True)
    ids = {
        spec.id: {port: [digest(str(ref)) for ref in refs] for port, refs in spec.inputs.items()}
        for spec in pipeline.stages.values()
    }
    return {id: keys.make_keys(spec, origin, ids[id]).action for id, spec in pipeline.stages.items()}


@pytest.fixture(autouse=True)
def fixed_versions(monkeypatch):
    monkeypatch.setattr(keys, "_version", lambda name: "1.0")


def title(name: str, profiles: tuple[str, ...]) -> str:
    return " ".join([name, *(f"--profile {profile}" for profile in profiles)])


def test_keys_are_those_of_the_release_before():
    now = {title(*spec): found(*spec) for spec in SPECS}
    if os.environ.get("LLMCTL_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
    kept = json.loads(GOLDEN.read_text())
    for name, stages in kept.items():
        for stage, key in stages.items():
            assert now[name].get(stage, key) == key, f"`{stage}` of {name} would run again for everybody"
    assert kept.keys() == now.keys()


def test_a_changed_parameter_is_noticed():
    kept = json.loads(GOLDEN.read_text())["quickstart"]
    changed = found("quickstart", (), "sft.lr=0.01")
    assert [stage for stage in kept if kept[stage] != changed[stage]] == ["sft"]
