"""Speculation end to end: the same answers over HTTP, and counts of what was proposed and confirmed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from llmctl import Artifact
from llmctl.errors import UsageError
from llmctl.ort.speculation import Speculation
from llmctl.testing import run_stage
from llmctl_serve import SERVE


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is proposed is judged: on a model this small time would decide otherwise."""
    monkeypatch.setattr(Speculation, "pays", lambda *_: True)
    monkeypatch.setattr(Speculation, "_gains", lambda _, lane, count: count > 0)


def answers(server) -> tuple[list[object], list[float]]:
    """What several kinds of requests get; the log-probabilities of all tokens."""
    found: list[object] = []
    scores: list[float] = []
    chat = server.client.chat.completions
    messages = [{"role": "user", "content": "abcabcabcabc"}]
    for options in (
        {"temperature": 0},
        {"temperature": 0.8, "seed": 3, "n": 2},
        {"temperature": 0, "stop": ["a", "e"]},
    ):
        answer = chat.create(model="byte-model", messages=messages, logprobs=True, top_logprobs=2, **options)
        found.append([choice.message.content for choice in answer.choices])
        found.append([choice.finish_reason for choice in answer.choices])
        found.append(answer.usage.completion_tokens)
        found += [[score.token for score in choice.logprobs.content] for choice in answer.choices]
        scores += [score.logprob for choice in answer.choices for score in choice.logprobs.content]
    stream = chat.create(model="byte-model", messages=messages, temperature=0, stream=True)
    found.append("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}, "strict": True}}
    answer = chat.create(model="byte-model", messages=messages, temperature=0, response_format=form)
    found.append(json.loads(answer.choices[0].message.content))
    return found, scores


@pytest.mark.usefixtures("always")
def test_http_says_the_same_with_speculation(real_models, serving) -> None:
    with serving(real_models[1]) as server:
        expected, scores = answers(server)
    with serving(real_models[1], speculation="prompt-lookup", draft_tokens=6) as server:
        assert answers(server) == (expected, pytest.approx(scores, abs=1e-4))
        text = server.get("/metrics")[1]
    counts = {
        name: float(re.search(rf"^llmctl_speculation_{name}_tokens_total\{{.*}} (\S+)$", text, re.MULTILINE)[1])
        for name in ("drafted", "accepted")
    }
    assert counts["drafted"] > counts["accepted"] > 0


@pytest.mark.usefixtures("always")
def test_the_stage_takes_a_draft(real_models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[tuple[int, int]] = []
    learn = Speculation._learn
    monkeypatch.setattr(
        Speculation, "_learn", lambda self, lane, *counts: (learned.append(counts), learn(self, lane, *counts))[1]
    )
    params = {"port": 0, "mode": "smoke", "smoke_questions": ["Hello?"], "max_new_tokens": 12, "threads": 1}
    said = []
    for name, further, inputs in (
        ("plain", {}, {}),
        ("draft", {"speculation": "draft"}, {"draft": real_models[1]}),
    ):
        result = run_stage(SERVE, tmp_path / name, {**params, **further}, model=real_models[1], **inputs)
        receipt = json.loads((result.outputs["receipt"] / "receipt.json").read_text())
        said.append([one["answer"] for one in receipt["questions"]])
    assert said[0] == said[1]
    proposed, accepted = (sum(one) for one in zip(*learned, strict=True))
    assert 0 < 0.9 * proposed <= accepted, "the model agrees with itself"


def test_a_draft_with_another_tokenizer_is_refused(real_models, tmp_path: Path) -> None:
    path = Path(shutil.copytree(real_models[1].path, tmp_path / "other"))
    with (path / "tokenizer.json").open("a") as file:
        file.write("\n")
    params = {"port": 0, "mode": "smoke", "smoke_questions": ["?"], "threads": 1}
    other = Artifact(path, "model.onnx")
    with pytest.raises(UsageError, match="the draft's tokenizer is sha256:"):
        run_stage(SERVE, tmp_path / "out", {**params, "speculation": "draft"}, model=real_models[1], draft=other)
    for further, inputs in (({"speculation": "draft"}, {}), ({}, {"draft": real_models[1]})):
        with pytest.raises(UsageError, match="give both or neither|needs the input `draft`"):
            run_stage(SERVE, tmp_path / "none", {**params, **further}, model=real_models[1], **inputs)
