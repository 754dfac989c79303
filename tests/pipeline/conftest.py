"""A really installed plugin with tiny stages, and helpers to run pipelines of them through the real command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from llmctl.pipeline.result import RunResult
from llmctl.pipeline.run import run_pipeline
from llmctl.registry import discover
from llmctl.spec.pipeline import load_pipeline
from llmctl.store import Store

FAKE = Path(__file__).parent / "fake"


@pytest.fixture
def fake_stages(install):
    """The plugin of `tests/pipeline/fake`, installed as the distribution `fake`."""
    files = {path.name: path.read_text() for path in FAKE.glob("*.py")}
    return install("fake", {"fake": "fake_stages"}, files, record=True)


@pytest.fixture
def work(llmctl, tmp_path):
    """The directory that `llmctl` runs in; its store is `.llmctl/store`."""
    return tmp_path / "work"


@pytest.fixture
def spec(work):
    """Write a pipeline `p.yaml` from the text of its stages."""

    def write(stages: str, name: str = "p") -> Path:
        path = work / f"{name}.yaml"
        lines = "\n".join("  " + line for line in stages.strip("\n").splitlines())
        path.write_text(f"llmctl: 1\nname: {name}\nstages:\n{lines}\n")
        return path

    return write


@pytest.fixture
def events(work):
    """The events of the latest run, in order."""

    def read() -> list[dict]:
        latest = max((work / ".llmctl/store/runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return [json.loads(line) for line in (latest / "events.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def actions(events):
    """Stage id → what happened to it in the latest run: `run`, `cached`, `skipped`."""
    kinds = {"stage.start": "run", "stage.cached": "cached", "stage.skipped": "skipped"}

    def read() -> dict[str, str]:
        return {event["stage"]: kinds[event["type"]] for event in events() if event["type"] in kinds}

    return read


@pytest.fixture
def run(fake_stages, work, spec, monkeypatch, llmctl_env):
    """`llmctl run` within this process, which saves its start-up: `run(stages, "b.mark=x", to=["b"])` → RunResult.

    `change` may alter the loaded pipeline. The stages still run in processes of their own. Without `stages` the
    `p.yaml` of before is read again.
    """
    for name in [name for name in os.environ if name not in llmctl_env]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(fake_stages))
    monkeypatch.syspath_prepend(str(fake_stages))
    monkeypatch.chdir(work)

    def call(stages: str | None = None, *sets: str, change=lambda pipeline: pipeline, **options) -> RunResult:
        if stages is not None:
            spec(stages)
        found = discover()
        monkeypatch.setattr("llmctl.pipeline.run.get_registry", lambda: found)
        return run_pipeline(change(load_pipeline("p.yaml", sets=sets, registry=found)), Store.open(), **options)

    _forget_fakes()  # other tests import modules of the same name
    yield call
    _forget_fakes()


def _forget_fakes() -> None:
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]
