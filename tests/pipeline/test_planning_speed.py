"""Planning two thousand stage instances takes a moment: CPU time of hand-built pipelines, best of three."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import pytest

from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.plan import Planner
from llmctl.pipeline.selection import select
from llmctl.registry import Origin
from llmctl.spec.resolved import Pipeline, StageRef, StageSpec
from llmctl.store import Store
from llmctl.store.manifest import FileEntry, Manifest, content_id
from llmctl.store.store import Pointer

pytestmark = pytest.mark.budget

COUNT = 2000


class Origins:
    """Stands in for the registry; counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def origin(self, name):
        self.asked += 1
        return Origin(dist="fake", version="0.1", editable=False)


@pytest.fixture
def stages(monkeypatch):
    """The declarations and parameters of `tests/pipeline/fake`."""
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        monkeypatch.delitem(sys.modules, name)  # other tests have modules of these names
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake"))
    import fake_params
    import fake_stages

    yield fake_stages, fake_params
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]


def wide(stages, count=COUNT) -> Pipeline:
    """One text, a row of the matrix each that writes it in capitals, and a fan-in of all of them."""
    declared, params = stages
    texts = {"text": "dataset.text", "metrics": "metrics"}
    specs = [StageSpec(id="a", stage=declared.MAKE, params=params.MakeParams(), inputs={}, outputs=texts)]
    for number in range(count - 2):
        own = params.UpperParams(mark=str(number))
        inputs = {"text": (StageRef(stage="a", port="text"),)}
        row = {"id": f"b[mark={number}]", "base": "b", "row": {"mark": number}}
        specs.append(StageSpec(stage=declared.UPPER, params=own, inputs=inputs, outputs=texts, **row))
    found = sorted((StageRef(stage=spec.id, port="text") for spec in specs[1:]), key=str)
    last = {"stage": declared.SCORE, "params": params.ScoreParams(), "outputs": {"metrics": "metrics"}}
    specs.append(StageSpec(id="c", inputs={"text": tuple(found)}, **last))
    return Pipeline(name="p", file=None, base=Path.cwd(), stages={spec.id: spec for spec in specs})


def alone(stages) -> Pipeline:
    """Stages without inputs: every key can be computed at once."""
    declared, params = stages
    texts = {"text": "dataset.text", "metrics": "metrics"}
    made = [params.MakeParams(rows=number + 1) for number in range(COUNT)]
    specs = [
        StageSpec(id=f"a[rows={own.rows}]", stage=declared.MAKE, params=own, inputs={}, outputs=texts, base="a")
        for own in made
    ]
    return Pipeline(name="p", file=None, base=Path.cwd(), stages={spec.id: spec for spec in specs})


def planned(pipeline, store, origins):
    planner = Planner(pipeline, store, origins)
    return planner.plan(select(pipeline).specs, Inputs(pipeline, store))


def cpu(pipeline, store) -> float:
    """CPU seconds of one plan, best of three."""
    found = []
    for _ in range(3):
        begun = time.process_time()
        planned(pipeline, store, Origins())
        found.append(time.process_time() - begun)
    return min(found)


def fill(pipeline, store) -> None:
    """Put a tiny result of every stage into the store, without the flushes of a real commit."""
    planner, done = Planner(pipeline, store, Origins()), {}
    for spec in pipeline.stages.values():
        keys = planner.decide(spec, Inputs(pipeline, store).bind(spec, done)).keys
        outputs = {}
        for port, type in spec.outputs.items():
            data = json.dumps([spec.id, port]).encode()
            files = (FileEntry(path="x.json", size=len(data), sha256=hashlib.sha256(data).hexdigest()),)
            manifest = Manifest(id=content_id(type, files), type=type, files=files, metadata={}, provenance={})
            directory = store.artifact(manifest.id)
            directory.mkdir(parents=True)
            (directory / "x.json").write_bytes(data)
            (directory / "llmctl.json").write_text(json.dumps(manifest.to_json()))
            outputs[port] = manifest.id
        path = store.key(keys.action)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(Pointer(key=keys.action, preimage=keys.preimage, outputs=outputs).to_json()))
        done[spec.id] = planner.decide(spec, Inputs(pipeline, store).bind(spec, done)).outputs


@pytest.mark.parametrize("build", [wide, alone])
def test_two_thousand_new_stages(build, stages, tmp_path, budget):
    pipeline, store = build(stages), Store(tmp_path / "store")
    assert len(pipeline.stages) == COUNT
    assert cpu(pipeline, store) < budget(0.15)
    decisions = planned(pipeline, store, origins := Origins())
    assert {decision.action for decision in decisions} <= {"run", "unknown"}
    assert origins.asked <= 3  # once per kind of stage: it reads the metadata of a distribution


def test_five_hundred_cached_stages(stages, tmp_path, budget):
    """Three files are read for each, so a tenth of a second is the files' own."""
    pipeline, store = wide(stages, 500), Store(tmp_path / "store")
    fill(pipeline, store)
    assert {decision.action for decision in planned(pipeline, store, Origins())} == {"cached"}
    assert cpu(pipeline, store) < budget(0.25)


def test_two_thousand_stages_with_names(stages, tmp_path, budget):
    """Each stage has an older result to compare with: the names are listed once, not once per stage."""
    pipeline, store = alone(stages), Store(tmp_path / "store")
    folder = store.refs / "p"
    folder.mkdir(parents=True)
    for id in pipeline.stages:
        (folder / f"{id}.text.json").write_text('{"id": "sha256:0", "key": "sha256:0", "time": "2026"}')
    assert cpu(pipeline, store) < budget(0.4)
