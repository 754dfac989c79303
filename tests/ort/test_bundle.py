from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from llmctl.errors import InputError, MachineError, UsageError
from llmctl.ort import open_bundle, sessions

DAMAGE = {
    "model.onnx missing": ("model.onnx", lambda p: p.unlink()),
    "model.onnx truncated": ("model.onnx", lambda p: p.write_bytes(p.read_bytes()[:3000])),
    "weights missing": ("model.onnx.data", lambda p: p.unlink()),
    "weights truncated": ("model.onnx.data", lambda p: p.write_bytes(p.read_bytes()[:5000])),
    "config missing": ("config.json", lambda p: p.unlink()),
    "config no JSON": ("config.json", lambda p: p.write_text("{")),
    "config a list": ("config.json", lambda p: p.write_text("[]")),
    "config without context": ("config.json", lambda p: p.write_text("{}")),
    "generation config no JSON": ("generation_config.json", lambda p: p.write_text("nope")),
    "genai config no JSON": ("genai_config.json", lambda p: p.write_bytes(b"\xff")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_refused_by_name(broken: Path, damage: str) -> None:
    name, spoil = DAMAGE[damage]
    spoil(broken / name)
    with pytest.raises(InputError) as caught:
        open_bundle(broken, "cpu", threads=1)
    assert str(broken / name) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no directory"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"model\.onnx is missing"):
        open_bundle(tmp_path)


def test_a_graph_that_does_not_generate_is_refused(broken: Path) -> None:
    from onnx import TensorProto, helper, save

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", value[:1], value[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), broken / "model.onnx")
    with pytest.raises(InputError, match="is no decoder that generates text"):
        open_bundle(broken, "cpu")


def test_several_eos_ids_come_from_the_generation_config(broken: Path) -> None:
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert open_bundle(broken, "cpu", threads=1).eos_ids == {1, 7}


def test_ids_that_the_model_cannot_give_end_nothing(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 50_000]}))
    assert open_bundle(broken, "cpu", threads=1).eos_ids == {1}
    assert "eos_token_id [50000]" in caplog.text


def test_options_out_of_range(bundle: Path) -> None:
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        open_bundle(bundle, "tpu")
    with pytest.raises(UsageError, match="threads must not be negative"):
        open_bundle(bundle, "cpu", threads=-1)


def test_threads_reach_the_session(bundle: Path) -> None:
    assert open_bundle(bundle, "cpu", threads=1).session.get_session_options().intra_op_num_threads == 1


@pytest.mark.skipif(sessions.gpu_present(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error_and_never_silently_the_cpu(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MachineError, match="no NVIDIA GPU"):
        open_bundle(bundle, "cuda")
    # A driver that reports a GPU, but a provider that does not start: ONNX Runtime then runs on the CPU without a word.
    monkeypatch.setattr(sessions, "gpu_present", lambda: True)
    with pytest.raises(MachineError, match="cannot use the GPU"):
        open_bundle(bundle, "cuda")
    with caplog.at_level(logging.WARNING):
        assert open_bundle(bundle, "auto").backend == "onnxruntime CPUExecutionProvider"
    assert "running on the CPU" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not sessions.gpu_present(), reason="no NVIDIA GPU")
def test_cuda_gives_the_same_greedy_tokens(bundle: Path) -> None:
    answers = [open_bundle(bundle, device).generate([[5, 6, 7], [9]]) for device in ("cpu", "cuda")]
    assert answers[0] == answers[1]
