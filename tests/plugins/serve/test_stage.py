"""The stage `serve`: its port, its receipt, its smoke questions."""

from __future__ import annotations

import gc
import json

import pytest

from llmctl import Artifact, MachineError, StageError, UsageError
from llmctl.testing import run_stage
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve import SERVE, run
from llmctl_serve.params import ServeParams
from llmctl_serve.server import listen


def test_the_port_in_use_stops_before_the_model_loads(tmp_path, model_dir, opens, scripted):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        opens({})  # opening any model would be a KeyError
        with pytest.raises(MachineError, match=f"port {port} on 127.0.0.1 is in use") as caught:
            run_stage(SERVE, tmp_path / "out", {"port": port}, model=Artifact(model_dir, "model.onnx"))
    assert caught.value.exit_code == 7
    assert str(port + 1) in caught.value.hint


def test_an_unknown_host_is_explained(tmp_path, model_dir):
    with pytest.raises(MachineError, match="no address"):
        run_stage(
            SERVE, tmp_path, {"host": "no.such.host.invalid", "insecure": True}, model=Artifact(model_dir, "model.onnx")
        )


def test_foreground_serves_until_stopped(tmp_path, model_dir, opens, scripted):
    opens({model_dir: scripted(Tokenizer.load(model_dir))})
    result = run_stage(
        SERVE,
        tmp_path / "out",
        {"port": 0, "model_name": "tiny"},
        stop_after=3,
        model=Artifact(model_dir, "model.onnx"),
    )
    lines = [fields["text"] for kind, fields in result.events if kind == "log"]
    assert lines[0].startswith("serving tiny at http://127.0.0.1:")
    assert lines[1].startswith("curl http://127.0.0.1:")
    receipt = json.loads((result.outputs["receipt"] / "receipt.json").read_text())
    assert receipt["model"]["id"] == "tiny"
    assert receipt["questions"] == []


def test_smoke_asks_over_http_and_leaves_a_receipt(tmp_path, model_dir, opens, scripted, monkeypatch):
    opens({model_dir: scripted(Tokenizer.load(model_dir), {"dedent": "textwrap"})})
    monkeypatch.setenv("SMOKE_KEY", "k")
    params = {
        "port": 0,
        "mode": "smoke",
        "smoke_questions": ["Where is dedent?", "And now?"],
        "api_key_env": "SMOKE_KEY",
    }
    result = run_stage(SERVE, tmp_path / "out", params, model=Artifact(model_dir, "model.onnx", "sha256:abc"))
    assert result.metrics["smoke.questions"] == result.metrics["smoke.answered"] == 2
    assert result.metrics["smoke.streamed"] is True
    assert result.metrics["smoke.tokens_per_s"] > 0
    receipt = json.loads((result.outputs["receipt"] / "receipt.json").read_text())
    assert [one["answer"] for one in receipt["questions"]] == ["textwrap", "textwrap", "yes"]
    assert receipt["questions"][0]["streamed"]
    assert receipt["model"] == {"id": "byte-model", "artifact": "sha256:abc", "type": "model.onnx"}
    samples = [json.loads(line) for line in (result.outputs["metrics"] / "samples.jsonl").read_text().splitlines()]
    assert [sample["ok"] for sample in samples] == [True, True]


def test_modules_are_no_part_of_collections_and_models_are(tmp_path, model_dir, opens, scripted, monkeypatch):
    opens({model_dir: scripted(Tokenizer.load(model_dir), default="yes")})
    frozen: list[int] = []
    opened = run.open_models
    monkeypatch.setattr(run, "open_models", lambda *args: frozen.append(gc.get_freeze_count()) or opened(*args))
    params = {"port": 0, "mode": "smoke", "smoke_questions": ["?"]}
    run_stage(SERVE, tmp_path / "out", params, model=Artifact(model_dir, "model.onnx"))
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0


def test_smoke_fails_on_an_empty_answer(tmp_path, model_dir, opens, scripted):
    opens({model_dir: scripted(Tokenizer.load(model_dir), default="")})
    params = {"port": 0, "mode": "smoke", "smoke_questions": ["?"]}
    with pytest.raises(StageError, match="2 smoke questions got no answer"):
        run_stage(SERVE, tmp_path / "out", params, model=Artifact(model_dir, "model.onnx"))


def test_parameters_that_contradict_each_other():
    with pytest.raises(ValueError, match="go together"):
        ServeParams(mode="smoke")
    with pytest.raises(ValueError, match="go together"):
        ServeParams(smoke_questions=["?"])


def test_a_key_that_is_not_set(tmp_path, model_dir):
    with pytest.raises(UsageError, match="LLMCTL_NO_SUCH"):
        run_stage(SERVE, tmp_path, {"api_key_env": "LLMCTL_NO_SUCH"}, model=Artifact(model_dir, "model.onnx"))
