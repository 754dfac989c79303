"""`/version` leads from what answers back to what it was made from, without a path of this machine."""

from __future__ import annotations

import json
import shutil

from llmctl.store import Store
from llmctl.store.hashing import plain_files


def test_the_lineage_of_a_stored_model(
    tmp_path, model_dir, scripted, byte_tokenizer, monkeypatch, serving_models, service_of
):
    monkeypatch.setenv("LLMCTL_STORE", str(tmp_path / "store"))
    store = Store(tmp_path / "store")
    store.create()

    def commit(name, type, inputs):
        directory = tmp_path / name
        shutil.copytree(model_dir, directory)
        (directory / "name.txt").write_text(name)
        provenance = {"stage": name, "instance": name, "run": "r1", "inputs": inputs}
        return store.commit(directory, type, plain_files(directory), metadata={}, provenance=provenance)

    text = commit("text", "dataset.text", {})
    base = commit("train-pretrain", "model.hf", {"data": [text.id]})
    model = commit("export-onnx", "model.onnx", {"model": [base.id]})
    commit("other", "model.onnx", {})

    def open_(name, artifact):
        return service_of(scripted(byte_tokenizer), name, artifact)

    with serving_models(open_, {"m": model.id}, store.resolve) as server:
        answered = server.post({"messages": [{"role": "user", "content": "?"}]})[2]["x-llmctl-model"]
        status, body = server.get("/version")
        assert (status, answered) == (200, model.id)
        (found,) = json.loads(body)["models"]
        assert found["artifact"] == model.id
        assert [(node["id"], node["type"], node["stage"]) for node in found["lineage"]] == [
            (model.id, "model.onnx", "export-onnx"),
            (base.id, "model.hf", "train-pretrain"),
            (text.id, "dataset.text", "text"),
        ]
        assert found["lineage"][0]["inputs"] == {"model": [base.id]}
        assert str(tmp_path) not in body
