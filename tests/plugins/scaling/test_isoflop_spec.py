"""The shipped spec trains a grid that approach 2 can read; once in full it is slow."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from llmctl.nn.presets import preset
from llmctl.registry import get_registry
from llmctl.spec.pipeline import load_pipeline


@pytest.fixture(scope="module")
def trainings():
    pipeline = load_pipeline("isoflop", registry=get_registry())
    return {id: spec for id, spec in pipeline.stages.items() if id.startswith("train[")}


def test_the_steps_of_every_row_spend_its_budget(trainings):
    budgets = defaultdict(set)
    for id, spec in trainings.items():
        params = spec.params
        overrides = {name: getattr(params, name) for name in ("dim", "layers", "heads", "kv_heads", "context")}
        n = preset(params.preset, vocab_size=512, overrides=overrides).parameters()
        spent = 6 * n * params.max_steps * params.batch_size * params.context
        assert spent == pytest.approx(float(spec.row["budget"]), rel=0.012), id
        budgets[spec.row["budget"]].add(n)
    assert [len(sizes) for sizes in budgets.values()] == [5, 5, 5]
    assert max(map(max, budgets.values())) < 1e6


def test_no_training_goes_on_where_a_shorter_one_ended(trainings):
    """Runs of one shape that differ in their length alone share checkpoints: each budget has a seed of its own."""
    facts = [json.dumps(spec.params.resume_facts(), sort_keys=True, default=str) for spec in trainings.values()]
    assert len(set(facts)) == len(facts) == 15


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_laws_of_the_grid(llmctl):
    done = llmctl("run", "isoflop", "--jobs", "2", timeout=3500)
    assert done.returncode == 0, done.stderr
    done = llmctl("scaling", "fit", "isoflop/train", "--html", "isoflop.html", "--format", "json", timeout=300)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["runs"] == 15 and {"2", "3"} <= set(value["approaches"])
    budgets = value["approaches"]["2"]["budgets"]
    assert len(budgets) == 3, "each has a minimum among its sizes"
    for name, order in (("parameters", 1), ("loss", -1)):
        found = [row[name] for row in budgets]
        assert found == sorted(found, key=lambda number, order=order: order * number), name
    # Fifteen runs place the best size of the largest budget; its exponent they leave open.
    for approach in "23":
        found = value["approaches"][approach]["estimates"]
        assert 3e4 < found["parameters"]["value"] < 9e4
        assert found["exponent"]["low"] < 0.45 and found["exponent"]["high"] > 0.4
