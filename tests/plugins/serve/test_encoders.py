"""Vectors over HTTP against transformers, and an encoder-decoder behind the same server."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from llmctl import Artifact, InputError
from llmctl.testing import run_stage
from llmctl_serve.opening import Opener
from llmctl_serve.params import ServeParams

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytestmark = pytest.mark.slow  # two exports

TEXTS = ["a loom", "Which module provides dedent?", "naïve"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, write_tokenizer) -> dict[str, tuple[Artifact, Artifact]]:
    """A sentence encoder and a T5, random: as transformers' directories and as bundles with a tokenizer of bytes."""
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer
    from llmctl_export_onnx import EXPORT_ONNX

    shape = {
        "vocab_size": 262,
        "dim": 32,
        "layers": 1,
        "heads": 4,
        "context": 64,
        "bos_id": 0,
        "eos_id": 1,
        "pad_id": 2,
    }
    bert = {"arch": "bert", "token_types": 2, "head": "features"}
    made = {}
    for name, kind, params in (
        ("encoder", bert, {"pooling": "mean"}),
        ("pair", {"arch": "t5", "decoder_start_id": 2}, {}),
    ):
        where = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**shape, **kind))
        with torch.no_grad():
            for parameter in model.parameters():  # answers depend on the source
                parameter += torch.randn_like(parameter) * 0.1
        save_model(model, where / "hf", write_tokenizer(where / "tokenizer"))
        hf = Artifact(where / "hf", "model.hf")
        given = {"parity_prompts": 2, "threads": 1, **params}
        made[name] = (hf, run_stage(EXPORT_ONNX, where / "out", given, model=hf, data=None).outputs["model"])
    return made


@pytest.fixture(scope="module")
def server(exported, serving_models):
    """One server with both."""
    opener = Opener(ServeParams(port=0, device="cpu", threads=1, max_new_tokens=12))

    def find(name: str) -> Artifact:
        if name not in exported:
            raise InputError(f"no such model: {name}")
        return exported[name][1]

    with serving_models(opener.open, {"encoder": "encoder", "pair": "pair"}, find) as found:
        yield found


def expected(model: Artifact, rows: list[list[int]]) -> np.ndarray:
    """Mean of transformers' last states of each row alone, without padding; of length 1 if the bundle says so."""
    import transformers

    from llmctl.text.pooling import normalises

    bert = transformers.AutoModel.from_pretrained(model.path).eval()
    with torch.inference_mode():
        found = np.stack([bert(torch.tensor([row])).last_hidden_state[0].mean(0).numpy() for row in rows])
    return found / np.linalg.norm(found, axis=1, keepdims=True) if normalises(model.path) else found


def frames(server: Any, texts: list[str]) -> list[list[int]]:
    return [server.models.find("encoder").service.tokenizer.frame(text).ids for text in texts]


@pytest.mark.parametrize("form", ["float", "base64", None], ids=["float", "base64", "the client's own choice"])
def test_vectors_are_those_of_transformers(server, exported, form) -> None:
    given = {} if form is None else {"encoding_format": form}
    answer = server.client.embeddings.create(model="encoder", input=TEXTS, **given)
    rows = [one.embedding for one in answer.data]
    if form == "base64":  # the client gives the text as it came
        rows = [np.frombuffer(base64.b64decode(row), "<f4").tolist() for row in rows]
    hf, bundle = exported["encoder"]
    ids = frames(server, TEXTS)
    truth = expected(hf, ids)
    from llmctl.text.pooling import normalises

    if normalises(bundle.path) and not normalises(hf.path):
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    np.testing.assert_allclose(rows, truth, atol=2e-5)
    assert np.abs(truth[0] - truth[1]).max() > 1e-2, "texts differ"
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))


def test_one_text_several_and_ids_give_the_same(server) -> None:
    create = server.client.embeddings.create
    several = [one.embedding for one in create(model="encoder", input=TEXTS).data]
    ids = frames(server, TEXTS)
    np.testing.assert_allclose(create(model="encoder", input=TEXTS[1]).data[0].embedding, several[1], atol=1e-6)
    np.testing.assert_allclose(create(model="encoder", input=ids[1]).data[0].embedding, several[1], atol=1e-6)
    assert len(create(model="encoder", input=ids).data) == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": [[5] * 80]}, "input"),
        ({"input": [[5, 400]]}, "input"),
        ({"input": []}, None),
        ({"input": "a", "dimensions": 7}, "dimensions"),
        ({"input": "a", "model": "pair"}, "model"),
    ],
)
def test_what_cannot_be_embedded_is_a_400(server, body, param) -> None:
    status, answer, _ = server.post({"model": "encoder", **body}, "/v1/embeddings")
    assert status == 400
    if param:
        assert answer["error"]["param"] == param


def test_a_text_is_cut_where_max_seq_length_says_so(server) -> None:
    """The bundle says 64: the opening token, 62 bytes and the closing one."""
    create = server.client.embeddings.create
    long, fitting = create(model="encoder", input=["a" * 80, "a" * 62]).data
    assert long.embedding == pytest.approx(fitting.embedding, abs=1e-6)
    assert create(model="encoder", input="a" * 80).usage.prompt_tokens == 64


def test_an_encoder_does_not_chat(server) -> None:
    with pytest.raises(openai.BadRequestError, match="is an encoder"):
        server.client.completions.create(model="encoder", prompt="a")


def test_an_encoder_decoder_answers_as_transformers_does(server, exported) -> None:
    import transformers

    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(exported["pair"][0].path).eval()
    tokenizer = server.models.find("pair").service.tokenizer
    said = set()
    for text in TEXTS:
        ids = tokenizer.encode_document(text)
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, 1:].tolist()
        ids_out = out[: out.index(1)] if 1 in out else out
        answer = server.client.completions.create(model="pair", prompt=text, temperature=0)
        assert answer.choices[0].text == tokenizer.decode(ids_out)
        assert answer.usage.prompt_tokens == len(ids)
        streamed = server.client.completions.create(model="pair", prompt=text, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text
        said.add(answer.choices[0].text)
    assert len(said) > 1, "the answers depend on the source"
    status, body, _ = server.post({"model": "pair", "prompt": "a", "echo": True}, "/v1/completions")
    assert (status, body["error"]["param"]) == (400, "echo")


def test_a_bundle_without_a_head_for_either_is_refused_in_one_line(exported, tmp_path) -> None:
    broken = Path(shutil.copytree(exported["encoder"][1].path, tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError) as caught:
        Opener(ServeParams(port=0, device="cpu", threads=1)).open("x", Artifact(broken, "model.onnx"))
    assert "\n" not in caught.value.message
