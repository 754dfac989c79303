"""Checkpoints of several ranks, written while training goes on: exact, whole or not there, for any number of ranks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from llmctl.errors import StageError, TempFail
from llmctl.train.checkpoint import Checkpoints, same_tensors
from llmctl.train.data import ExampleSource
from llmctl.train.loop import fit
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams
from llmctl.train.saving import Saver

PROGRAM = Path(__file__).with_name("saving_program.py")
Case = dict[str, Any]


def launch(cases: list[Case], out: Path, ranks: int) -> list[subprocess.CompletedProcess[str]]:
    """Run the cases in `ranks` processes; when one has failed the others are ended, as an agent would."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases.json").write_text(json.dumps(cases))
    port = random.SystemRandom().randrange(20000, 50000)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAM, out / "cases.json", out],
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    ends = []
    try:
        for process in started:
            said = process.communicate(timeout=200)[1]
            ends.append(subprocess.CompletedProcess(process.args, process.returncode, stderr=said))
            if process.returncode:
                break
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return ends


def well(cases: list[Case], out: Path, ranks: int) -> Path:
    ends = launch(cases, out, ranks)
    assert [end.returncode for end in ends] == [0] * ranks, "\n".join(end.stderr for end in ends)
    return out


def weights(out: Path, name: str) -> torch.Tensor:
    return torch.cat([value.flatten() for value in torch.load(out / name / "weights.pt").values()])


def losses(out: Path, base: str) -> list[float]:
    rows = [json.loads(line) for line in (out / base / "metrics/curves.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def said(out: Path, name: str) -> list[str]:
    return (out / name / "said.txt").read_text().splitlines()


def steps(out: Path, base: str) -> list[str]:
    return sorted(path.name for path in (out / base / "resume/ckpt").iterdir())


SCHEMES = {"zero-3": {"dp_shard": 2}, "zero-1": {"dp_replicate": 2, "shard_optimizer": True}, "tp": {"tp": 2}}
SCHEMES["ddp"] = {"dp_replicate": 2}
NOISY = {"dropout": 0.1, "ema": 0.9, "optimizer": "muon"}


def stopped(name: str, **params: Any) -> list[Case]:
    """A run, and the same with a stop after 5 steps, whose checkpoints take longer than some steps do."""
    halves = [{"name": f"{name} {part}", "base": f"{name} base", "params": params} for part in ("first", "second")]
    return [{"name": name, "params": params}, {**halves[0], "stop": 5, "fault": "slow"}, halves[1]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On 2 ranks, plain: a run, one that stops, one whose rank 0 is killed while it saves."""
    parallel = {"parallel": SCHEMES["zero-3"]}
    cases = [
        *stopped("zero-3", **parallel, **NOISY),
        {"name": "first of two", "base": "less", "stop": 5, "params": parallel},
        {"name": "killed", "params": parallel, "fault": "killed"},
    ]
    out = tmp_path_factory.mktemp("two")
    assert launch(cases, out, 2)[0].returncode == -9
    well([{"name": "after", "base": "killed", "params": parallel}], out, 2)
    return out


@pytest.fixture(scope="module")
def one(two: Path) -> Path:
    """On 1 rank, beside those: a run of its own, and the continuation of the one that was stopped, also in vain."""
    cases = [{"name": "alone"}, {"name": "second of one", "base": "less"}]
    copies = [("less", "confused"), ("less", "cut")]
    for source, target in copies:
        subprocess.run(["cp", "-r", two / source, two / target], check=True)
    next((two / "cut/resume/ckpt/step-5").glob("shard-00002*")).unlink()
    cases += [{"name": "lost", "base": "confused", "fault": "confused"}, {"name": "older", "base": "cut"}]
    return well(cases, two, 1)


def test_a_stopped_run_of_two_ranks_ends_as_an_undisturbed_one(two: Path) -> None:
    assert torch.equal(weights(two, "zero-3"), weights(two, "zero-3 second"))
    assert losses(two, "zero-3") == losses(two, "zero-3 base") and len(losses(two, "zero-3")) == 12
    assert said(two, "zero-3 second")[0] == "continuing from step 5 of 12"
    assert said(two, "zero-3 first") == ["checkpoint 0", "checkpoint 4", "checkpoint 5"]


def test_each_rank_writes_what_it_holds(two: Path) -> None:
    files = sorted((two / "less/resume/ckpt/step-4").glob("*.safetensors"))
    assert len(files) == 2
    whole = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                whole.setdefault(name, []).append(file.get_slice(name).get_shape())
    parts = whole["model/blocks.0.ffn.up.weight"]
    assert parts == [[24, 32], [24, 32]]
    assert len(whole["random/cpu"]) == len(whole["random/cpu.1"]) == 1


def test_a_checkpoint_of_two_ranks_is_continued_by_one(one: Path) -> None:
    expected, found = losses(one, "alone"), losses(one, "less")
    assert len(found) == 12
    assert found == pytest.approx(expected, abs=1e-6)
    assert losses(one, "confused")[:5] == found[:5]
    assert max(abs(a - b) for a, b in zip(losses(one, "confused"), expected, strict=True)) > 1e-3  # a lost state shows


def test_a_missing_part_is_no_checkpoint(one: Path) -> None:
    warning, going_on, *_ = said(one, "older")
    assert "step-5 is damaged" in warning and "shard-00002" in warning and "trying the one before" in warning
    assert going_on == "continuing from step 4 of 12"
    assert losses(one, "cut") == pytest.approx(losses(one, "alone"), abs=1e-6)


def test_a_kill_before_the_rename_leaves_the_checkpoint_before(two: Path, one: Path) -> None:
    assert said(two, "killed") == ["checkpoint 0", "checkpoint 4"]
    assert said(two, "after")[0] == "continuing from step 4 of 12"
    assert steps(two, "killed") == ["step-12"]
    assert losses(two, "killed") == pytest.approx(losses(one, "alone"), abs=1e-6)


@pytest.mark.slow
def test_every_scheme_and_another_number_of_ranks(one: Path, tmp_path: Path) -> None:
    rest = [name for name in SCHEMES if name != "zero-3"]
    parallel = {name: {"parallel": SCHEMES[name], **NOISY} for name in rest}
    well([case for name in rest for case in stopped(name, **parallel[name])], tmp_path, 2)
    for name in rest:
        assert torch.equal(weights(tmp_path, name), weights(tmp_path, f"{name} second")), name
        assert losses(tmp_path, name) == losses(tmp_path, f"{name} base")
    well([{"name": "one", "base": "more", "stop": 3}], tmp_path, 1)
    well([{"name": "two", "base": "more", "stop": 3, "params": {"parallel": SCHEMES["tp"]}}], tmp_path, 2)
    well([{"name": "four", "base": "more", "stop": 3, "params": {"parallel": {"dp_shard": 4}}}], tmp_path, 4)
    well([{"name": "two again", "base": "more", "params": {"parallel": SCHEMES["zero-1"]}}], tmp_path, 2)
    assert losses(tmp_path, "more") == pytest.approx(losses(one, "alone"), abs=2e-6)
    assert [said(tmp_path, name)[0] for name in ("two", "four", "two again")] == [
        f"continuing from step {step} of 12" for step in (3, 6, 9)
    ]


@pytest.mark.slow
def test_a_full_disk_is_one_error_on_every_rank(tmp_path: Path) -> None:
    (end, *_) = launch([{"name": "full", "params": {"parallel": SCHEMES["zero-3"]}, "fault": "full"}], tmp_path, 2)
    assert end.returncode == 1
    assert "llmctl.errors.StageError: cannot write the checkpoint" in end.stderr and "No space left" in end.stderr


def params(**changes: object) -> TrainParams:
    return TrainParams(**{"batch_size": 4, "max_steps": 12, "warmup_steps": 2, "save_every": 4, "lr": 0.01, **changes})


def test_training_goes_on_while_a_checkpoint_of_the_past_is_written(
    make_context, make_model, make_examples, monkeypatch, tmp_path
) -> None:
    examples = make_examples(11)
    with pytest.raises(TempFail):
        fit(make_context("plain", 4), make_model(), CausalLM(), ExampleSource(examples, 32, params()), params())
    expected = Checkpoints(tmp_path / "plain/resume/ckpt").load(4).tensors
    at, seen, go = [], {}, threading.Event()
    save, context = Checkpoints.save, make_context("late")
    emit = context._emit

    def late(self: Checkpoints, step: int, tensors: Any, *rest: Any) -> Path:
        if step == 4:
            assert go.wait(20)
            at.append(max(fields["step"] for kind, fields in context.events if kind == "progress"))
            seen.update({name: tensor.clone() for name, tensor in tensors.items()})
        return save(self, step, tensors, *rest)

    def heard(kind: str, fields: Any) -> None:
        emit(kind, fields)
        if kind == "progress" and fields["step"] == 7:
            go.set()

    context._emit = heard
    monkeypatch.setattr(Checkpoints, "save", late)
    fit(context, make_model(), CausalLM(), ExampleSource(examples, 32, params()), params())
    assert at == [7] and same_tensors(seen, expected)
    order = [(kind, fields["step"]) for kind, fields in context.events if kind in ("progress", "checkpoint")]
    assert order.index(("checkpoint", 4)) > order.index(("progress", 7))  # told of when it is there


def test_what_goes_wrong_in_the_thread_ends_the_training(make_context, make_model, make_examples, monkeypatch) -> None:
    commit = Checkpoints.commit

    def full(self: Checkpoints, step: int, *rest: Any) -> Path:
        with self.writing(step):
            if step == 4:
                raise OSError(28, "No space left on device")
        return commit(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "commit", full)
    source = ExampleSource(make_examples(11), 32, params())
    with pytest.raises(StageError, match="cannot write the checkpoint .*step-4.*No space left"):
        fit(make_context(), make_model(), CausalLM(), source, params())


def test_a_snapshot_that_is_no_copy_is_another_state(make_context, make_model, make_examples, monkeypatch) -> None:
    """The control of the test of snapshots."""
    kept: list[tuple[Any, Any]] = []
    start = Saver.start

    def watched(self: Saver, step: int, tensors: Any, *rest: Any) -> None:
        if step == 4:
            kept.append(({name: t.clone() for name, t in tensors.items()}, tensors))
        start(self, step, tensors, *rest)

    monkeypatch.setattr(Saver, "start", watched)
    fit(make_context(), make_model(), CausalLM(), ExampleSource(make_examples(11), 32, params()), params())
    ((then, now),) = kept
    assert not same_tensors(then, now)
