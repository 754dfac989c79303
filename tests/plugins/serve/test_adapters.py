"""Adapters over HTTP and in the terminal: each is a model of its own id, answered by one engine."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from llmctl import Artifact, UsageError
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.chat import chat, generate
from llmctl_serve.endpoint import pick_model
from llmctl_serve.opening import Opener
from llmctl_serve.params import ServeParams

QUESTION = [{"role": "user", "content": "Which module?"}]
IDS = ["m", "m:polite", "m:terse"]


def expected(hf: Path, adapter: Path | None, question: str, count: int) -> str:
    """What transformers answers greedily, with the adapter merged by hand."""
    import lora
    import torch
    from transformers import AutoModelForCausalLM

    model = lora.merged(hf, adapter) if adapter else AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    tokenizer = Tokenizer.load(hf)
    ids = tokenizer.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True).ids
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
    return tokenizer.decode([token for token in out[0, len(ids) :].tolist() if token != tokenizer.eos_id])


@pytest.fixture(scope="session")
def answers(real_models, adapted_models) -> dict[str, str]:
    """By the server's ids, what transformers answers to `QUESTION` in 24 tokens."""
    adapters = {None: None, **adapted_models[0]}
    texts = {name: expected(real_models[0].path, path, QUESTION[0]["content"], 24) for name, path in adapters.items()}
    assert len(set(texts.values())) == 3
    return {"m" if name is None else f"m:{name}": text for name, text in texts.items()}


@pytest.fixture
def bundles(adapted_models, real_models, monkeypatch, tmp_path) -> dict[str, Artifact]:
    """What the server's names lead to: the bundle with both adapters, one without any, one with one of them."""
    monkeypatch.setenv("LLMCTL_STORE", str(tmp_path / "store"))
    whole = adapted_models[1].path
    fewer = Path(shutil.copytree(whole, tmp_path / "fewer"))
    (fewer / "adapters" / "terse.onnx_adapter").unlink()
    paths = {"whole": whole, "plain": real_models[1].path, "fewer": fewer}
    return {
        name: Artifact(path, "model.onnx", f"sha256:{number}" + "0" * 63)
        for number, (name, path) in enumerate(paths.items())
    }


@pytest.fixture
def server(bundles, serving_models, tmp_path):
    opener = Opener(ServeParams(port=0, max_new_tokens=24, threads=1, slots=4, device="cpu"))
    log = str(tmp_path / "access.jsonl")
    with serving_models(opener.open, {"m": "whole"}, bundles.__getitem__, access_log=log) as found:
        yield found


def ask(server, model: str | None, **more) -> SimpleNamespace:
    body = {"messages": QUESTION, "temperature": 0, **({} if model is None else {"model": model}), **more}
    status, found, headers = server.post(body)
    return SimpleNamespace(status=status, body=found, headers=headers)


def said(found: SimpleNamespace) -> str:
    assert found.status == 200, found.body
    return found.body["choices"][0]["message"]["content"]


def test_every_adapter_is_a_model_with_answers_of_its_own(server, answers):
    listed = json.loads(server.get("/v1/models")[1])["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("m", None), ("m:polite", "m"), ("m:terse", "m")]
    assert json.loads(server.get("/v1/models/m:terse")[1])["parent"] == "m"
    for model in IDS:
        found = ask(server, model)
        assert (said(found), found.body["model"]) == (answers[model], model)
    assert said(ask(server, None)) == answers["m"]
    assert [one.id for one in server.client.models.list()] == IDS  # the openai client


def test_requests_to_all_of_them_at_once(server, answers):
    found: dict[int, str] = {}

    def one(number: int) -> None:
        found[number] = said(ask(server, IDS[number % 3]))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: answers[IDS[number % 3]] for number in range(24)}


def test_an_unknown_adapter_is_404_with_the_ids_that_exist(server):
    for model in ("m:polit", "polite", "other:polite", "m:"):
        found = ask(server, model)
        assert (found.status, found.body["error"]["code"]) == (404, "model_not_found")
        assert found.body["error"]["message"].endswith("this server has `m`, `m:polite`, `m:terse`")


def test_metrics_and_the_access_log_name_the_adapter(server, tmp_path, wait_until):
    said(ask(server, "m:polite"))
    log = tmp_path / "access.jsonl"
    wait_until(lambda: log.is_file() and log.read_text())
    assert json.loads(log.read_text().splitlines()[0])["model"] == "m:polite"
    text = server.get("/metrics")[1]
    assert 'llmctl_answers_total{finish_reason="length",model="m:polite"} 1.0' in text
    assert 'llmctl_answers_total{finish_reason="length",model="m"}' not in text
    assert 'llmctl_engine_steps_total{model="m"}' in text  # one engine for all


def test_version_leads_to_the_adapters(server, adapted_models):
    models = json.loads(server.get("/version")[1])["models"]
    assert [(one["id"], one["parent"], one["type"]) for one in models] == [
        ("m", None, "model.onnx"),
        ("m:polite", "m", "model.adapter"),
        ("m:terse", "m", "model.adapter"),
    ]
    assert [one["artifact"][:8] for one in models] == ["sha256:0", "sha256:a", "sha256:b"]
    assert models[0]["system_fingerprint"] == models[1]["system_fingerprint"]


def test_adapters_come_and_go_with_their_model(server, answers):
    assert said(ask(server, "m:terse")) == answers["m:terse"]
    server.models.load("m", "fewer")
    assert said(ask(server, "m:polite")) == answers["m:polite"]
    assert ask(server, "m:terse").status == 404
    server.models.load("m", "plain")
    assert said(ask(server, "m")) == answers["m"]  # a plain bundle's answers are those without an adapter
    assert ask(server, "m:polite").status == 404
    server.models.load("m", "whole")
    assert [said(ask(server, model)) for model in IDS] == [answers[model] for model in IDS]


def test_a_swap_under_load_ends_what_the_old_adapters_began(server, answers):
    stop, wrong, done = threading.Event(), [], []

    def keep_asking(number: int) -> None:
        while not stop.is_set():
            model = IDS[number % 2]  # both have m and m:polite
            text = said(ask(server, model))
            done.append(model)
            if text != answers[model]:
                wrong.append((model, text))

    threads = [threading.Thread(target=keep_asking, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for source in ("fewer", "whole", "fewer"):
        server.models.load("m", source)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(done) == {"m", "m:polite"}


def test_an_adapter_is_not_unloaded_apart_from_its_model(server):
    from llmctl_serve.errors import ApiError

    server.models.load("other", "plain")
    with pytest.raises(ApiError, match="`m:polite` is an adapter of `m`") as refused:
        server.models.unload("m:polite")
    assert refused.value.status == 409
    server.models.unload("m")
    assert ask(server, "m:polite").status == 404


def test_no_id_is_that_of_two_models(server, answers):
    with pytest.raises(UsageError, match="`m:terse` would be the id of two models"):
        server.models.load("m:terse", "plain")
    server.models.load("m", "fewer")
    server.models.load("m:terse", "plain")  # now it is free
    with pytest.raises(UsageError, match="`m:terse` would be"):
        server.models.load("m", "whole")
    assert [one["id"] for one in json.loads(server.get("/v1/models")[1])["data"]] == ["m", "m:polite", "m:terse"]
    assert (said(ask(server, "m:polite")), said(ask(server, "m:terse"))) == (answers["m:polite"], answers["m"])


def invoke(command, *args):
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_chat_and_generate_take_an_adapter(adapted_models, answers, tmp_path, server):
    bundle = adapted_models[1].path
    common = ("--max-new-tokens", 24, "--device", "cpu", "--threads", 1)
    asked = ("--prompt", QUESTION[0]["content"])
    assert invoke(chat, bundle, *asked, *common, "--adapter", "polite") == answers["m:polite"] + "\n"
    assert invoke(chat, bundle, *asked, *common) == answers["m"] + "\n"
    with pytest.raises(UsageError, match="there is no adapter `rude`") as refused:
        invoke(chat, bundle, *asked, "--adapter", "rude")
    assert refused.value.hint == "the model has polite, terse"
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"messages": QUESTION}) + "\n")
    row = json.loads(invoke(generate, bundle, "--input", lines, *common, "--adapter", "terse").splitlines()[0])
    assert row["text"] == answers["m:terse"]
    url = server.base
    assert invoke(chat, url, *asked, "--max-new-tokens", 24, "--adapter", "terse") == answers["m:terse"] + "\n"
    assert invoke(chat, url, *asked, "--max-new-tokens", 24) == answers["m"] + "\n"  # the only model, adapters apart


def test_the_only_model_is_found_beside_its_adapters():
    listed = [{"id": "m", "parent": None}, {"id": "m:polite", "parent": "m"}]
    assert pick_model({"data": listed}, "http://x") == "m"
    with pytest.raises(UsageError, match="has 2 models"):
        pick_model({"data": [*listed, {"id": "n"}]}, "http://x")
