"""`llmctl plan` of trainings: memory, time and cost; what cannot fit is refused, and says why."""

from __future__ import annotations

import json

import pytest

SPEC = """llmctl: 1
name: tiny
stages:
  data: {uses: data, with: {reader: python-stdlib}}
  tokenize: {uses: tokenize, inputs: {text: data}, with: {vocab_size: 512}}
  train:
    uses: train-pretrain
    inputs: {tokens: tokenize, tokenizer: tokenize}
    with: {dim: 64, layers: 2, heads: 2, kv_heads: 1, context: 64, max_steps: 10, batch_size: 64, device: cpu}
  sft: {uses: sft, inputs: {model: train, data: data.chat}, with: {max_steps: 5, device: cpu}}
"""


@pytest.fixture
def planned(llmctl, tmp_path):
    work = tmp_path / "work"

    def run(*words, text=SPEC):
        work.mkdir(exist_ok=True)
        (work / "tiny.yaml").write_text(text)
        return llmctl("plan", "tiny.yaml", *words)

    return run


def test_a_training_is_foretold_before_its_data_is_there(planned):
    done = planned("--format", "json", "--price", "3")
    assert done.returncode == 0, done.stderr
    rows = {row["stage"]: row["forecast"] for row in json.loads(done.stdout)}
    assert rows["data"] is None and rows["tokenize"] is None
    train = rows["train"]
    assert train["parameters"] == 512 * 64 + 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 192 + 2 * 64) + 64
    assert train["tokens"] == 10 * 64 * 64 and train["seconds"] is None and train["cost"] is None
    assert train["operations"] > 6 * (train["parameters"] - 1) * train["tokens"]
    assert train["memory"]["activations"] > train["memory"]["weights"] and train["fits"]
    # What a stage makes is what the next one goes on with.
    assert rows["sft"]["parameters"] == train["parameters"]


def test_what_cannot_fit_is_refused_and_the_largest_part_named(planned):
    refused = planned("--memory", "100MiB")
    assert refused.returncode == 7
    assert "error: `train` needs" in refused.stderr and "a process has 100 MiB" in refused.stderr
    assert "most of it are activations" in refused.stderr and "hint: a smaller micro_batch" in refused.stderr
    assert "no forecast" not in refused.stdout and "train: llama, 2 layers × 64" in refused.stdout
    assert planned("--memory", "1GiB").returncode == 0
    assert planned("--memory", "much").returncode == 2


def test_a_run_that_cannot_fit_is_not_begun(llmctl, planned, tmp_path):
    planned()
    huge = ["--set", "train.dim=16384", "--set", "train.layers=200", "--set", "train.heads=8"]
    done = llmctl("run", "tiny.yaml", *huge)
    assert done.returncode == 7 and "`train` needs" in done.stderr and "hint:" in done.stderr
    assert not list((tmp_path / "work" / ".llmctl/store").glob("runs/*"))


def test_several_processes_share_the_memory_of_the_machine(planned):
    text = SPEC.replace("device: cpu}\n  sft", "device: cpu, parallel: {dp_replicate: 4}}\n  sft")
    rows = {row["stage"]: row["forecast"] for row in json.loads(planned("--format", "json", text=text).stdout)}
    alone = {row["stage"]: row["forecast"] for row in json.loads(planned("--format", "json").stdout)}
    assert rows["train"]["processes"] == 4 and rows["train"]["limit"] == alone["train"]["limit"] // 4
    assert rows["train"]["memory"]["activations"] == pytest.approx(alone["train"]["memory"]["activations"] / 4, rel=0.2)


@pytest.mark.slow
def test_speed_is_measured_when_asked(planned):
    done = planned("--format", "json", "--measure", "--price", "3", "--to", "train")
    train = json.loads(done.stdout)[-1]["forecast"]
    assert train["seconds"] > 0 and "just measured" in train["speed"]
    assert train["cost"] == pytest.approx(train["seconds"] / 3600 * 3)


TRAINS = """
from llmctl import Field, Out, Params, Stage, hookimpl
from llmctl.forecast import Forecast, Unknown

class Size(Params):
    size: int = 10
    how: str = ""

def run(ctx, params):
    ctx.output("metrics")
    ctx.report({"tokens_per_s": 1000.0 / params.size})

def forecast(params, inputs):
    if params.how == "unknown":
        raise Unknown("it is too early")
    if params.how == "bug":
        raise KeyError("oops")
    memory = {"weights": params.size << 20, "activations": 1 << 20}
    return Forecast(
        model="a cube", parameters=params.size, operations_per_token=6 * params.size, memory=memory, moment="loss",
        advice={"weights": "take a smaller cube"}, tokens_per_step=100, steps=20, upper_bound=params.how == "bound",
    )

@hookimpl
def register_stages():
    metrics = {"metrics": Out("metrics")}
    at = {"params": "cubes:Size", "run": "cubes:run", "forecast": "cubes:forecast"}
    return [Stage(name="cube", help="Train.", outputs=metrics, **at)]
"""


@pytest.fixture
def cubes(install, llmctl, tmp_path):
    """Plan, or run, a stage whose forecast is its size."""
    install("cubes", {"cubes": "cubes"}, {"cubes.py": TRAINS})

    def do(command, *words):
        (tmp_path / "work" / "p.yaml").write_text("llmctl: 1\nname: p\nstages:\n  a: {uses: cube}\n")
        return llmctl(command, "p.yaml", *words)

    return do


def told(done):
    return json.loads(done.stdout)[0]["forecast"]


def test_time_and_cost_follow_from_the_last_result(cubes):
    before = told(cubes("plan", "--format", "json", "--price", "2"))
    assert before["seconds"] is None and before["tokens"] == 2000
    assert cubes("run").returncode == 0
    larger = told(cubes("plan", "--format", "json", "--price", "7200", "--set", "a.size=30"))
    # 100 tokens per second at size 10; three times the operations per token take three times as long.
    assert larger["seconds"] == pytest.approx(3 * 2000 / 100) and "in run 20" in larger["speed"]
    assert larger["cost"] == pytest.approx(2 * larger["seconds"])
    assert told(cubes("plan", "--format", "json")) is None  # nothing would run
    said = cubes("plan", "--set", "a.size=30").stdout
    assert "time        1:00 min by 100 tokens/s in run 20" in said


def test_a_stage_without_a_forecast_runs_all_the_same(cubes):
    assert "a: no forecast, it is too early" in cubes("plan", "--set", "a.how=unknown").stdout
    assert "KeyError: 'oops'" in cubes("plan", "--set", "a.how=bug").stdout
    assert cubes("run", "--set", "a.how=bug").returncode == 0


def test_the_doubt_and_upper_bounds_are_no_reason_to_refuse(cubes):
    limit = ["--memory", "1GiB"]
    assert cubes("plan", *limit, "--set", "a.size=600").returncode == 0
    tight = cubes("plan", *limit, "--set", "a.size=800")
    assert tight.returncode == 0 and "more than there is" in tight.stdout
    refused = cubes("plan", *limit, "--set", "a.size=1000")
    assert refused.returncode == 7 and "most of it are weights, 1000 MiB" in refused.stderr
    assert "hint: take a smaller cube" in refused.stderr
    assert cubes("plan", *limit, "--set", "a.size=1000", "--set", "a.how=bound").returncode == 7  # weights are no bound
