"""A variable that a stage's parameters name reaches the stage, as a secret."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmctl.errors import MachineError
from llmctl.launch import secrets
from llmctl.launch.environment import stage_environment
from llmctl.registry import get_registry
from llmctl.spec.pipeline import load_pipeline
from llmctl_serve.params import ServeParams

SPEC = """llmctl: 1
name: one
stages:
  serve:
    uses: serve
    inputs: {model: ./model}
    with: {api_key_env: FRONT_DOOR}
"""


def test_the_variable_of_a_key_is_given_to_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    spec = load_pipeline(tmp_path / "spec.yaml", registry=get_registry()).stages["serve"]
    assert spec.env["FRONT_DOOR"].secret == "FRONT_DOOR"
    assert not spec.env["FRONT_DOOR"].affects_output
    with pytest.raises(MachineError, match="FRONT_DOOR is not set"):
        secrets.resolve({}, secrets.names_of([spec]))
    monkeypatch.setenv("FRONT_DOOR", "open sesame")
    assert secrets.resolve({}, secrets.names_of([spec])) == {"FRONT_DOOR": "open sesame"}
    assert "FRONT_DOOR" not in stage_environment({})  # only to the stage that names it
    assert secrets.names_of([replace(spec, env={})]) == []


def test_without_a_named_variable_there_is_no_secret() -> None:
    assert ServeParams().secrets() == set()


def test_telemetry_is_seen_but_not_what_opens_its_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=x")
    seen = stage_environment({})
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in seen
    assert "OTEL_EXPORTER_OTLP_HEADERS" not in seen
