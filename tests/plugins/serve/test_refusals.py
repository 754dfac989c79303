"""What the server refuses, each with the field or the reason, in the form of OpenAI's errors."""

from __future__ import annotations

import http.client
import json

import openai
import pytest
from pydantic import ValidationError

from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.bodies import NEUTRAL
from llmctl_serve.conversations import ChatRequest
from llmctl_serve.embeddings import EmbeddingRequest
from llmctl_serve.requests import CompletionRequest
from llmctl_serve.tokens import DetokenizeRequest

QUESTION = [{"role": "user", "content": "Which module provides dedent?"}]
TOOL = {"type": "function"}
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.fixture(scope="module")
def byte_tokenizer(write_tokenizer, tmp_path_factory):
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def server(running, scripted, byte_tokenizer):
    """One for all: what is refused leaves nothing behind."""
    with running(scripted(byte_tokenizer, {"dedent": "textwrap"}, default="naïve ☃")) as found:
        yield found


def called(arguments):
    """A conversation in which a function was called."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "tool", "tool_call_id": "c", "content": "x"}
    return [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}, answer]


REFUSED = [
    ({"temperature": False}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.2}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": "x"}, "seed"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"stop": "a" * 257}, "stop"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty"),  # logits over it are no numbers
    ({"presence_penalty": False}, "presence_penalty"),
    ({"logit_bias": {"99999": 5}}, "logit_bias"),
    ({"temprature": 0.5}, "temprature"),
    ({"retrieval": True}, "retrieval"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages.0.tool_calls"),
    ({"model": 5}, "model"),
    ({"repetition_penalty": 1e-50}, "repetition_penalty"),
    (
        {"tools": [{**TOOL, "function": {"name": "f", "parameters": {"title": "\ud800"}}}]},
        "tools.0.function.parameters",
    ),
    ({"tools": [{**TOOL, "function": {"name": "f", "parameters": {"\udfff": 1}}}]}, "tools.0.function.parameters"),
    ({"tools": [{**TOOL, "function": {"name": "f", "parameters": {"enum": DEEP}}}]}, "tools.0.function.parameters"),
    ({"guided_json": {"title": "\ud800"}}, "guided_json"),
    ({"guided_json": '{"title": "\\ud800"}'}, "guided_json"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"\ud800": 1}}}}, "response"),
    ({"messages": called('{"a": "\\ud800"}')}, ""),
    ({"messages": called("[" * 50_000)}, ""),
    ({"messages": called("[" * 400 + "]" * 400)}, ""),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_wrong_fields_are_named_with_400(server, fields, param):
    status, body, _ = server.post({"model": "byte-model", "messages": QUESTION, **fields})
    assert status == 400, body
    error = body["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param), error
    assert param.rpartition(".")[2] in error["message"] or error["param"]


HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


def test_every_listed_field_is_harmless_neutral_or_refused(server):
    plain = server.post({"messages": QUESTION})[1]["choices"]
    neutral = {name: values for name, values in NEUTRAL.items() if name != "suffix"}
    accepted = {name: "x" for name in HARMLESS} | {name: values[-1] for name, values in neutral.items()}
    assert server.post({"messages": QUESTION, **accepted})[1]["choices"] == plain
    for name in neutral:
        status, body, _ = server.post({"messages": QUESTION, name: {"strange": 1}})
        assert (status, body["error"]["param"]) == (400, name)
    status, body, _ = server.post({"prompt": "a", "suffix": "b"}, "/v1/completions")
    assert (status, body["error"]["param"]) == (400, "suffix")


@pytest.mark.parametrize(
    ("raw", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[1]", {}, 400),
        (b'"text"', {}, 400),
        (b"null", {}, 400),
        (b"", {}, 400),
        (b"[" * 20_000, {}, 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', {}, 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": 1e400}', {}, 400),
        (b'{"messages": [{"role": "user", "content": "a"}]}', {"Content-Type": "text/plain"}, 415),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_bodies_are_400(server, raw, headers, status):
    found, body, _ = server.post(raw, headers=headers)
    assert found == status, body
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_unknown_model_is_404(server):
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert caught.value.code == "model_not_found"


def test_prompt_longer_than_the_context_is_400(server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(model="byte-model", messages=[{"role": "user", "content": "x" * 600}])
    assert caught.value.code == "context_length_exceeded"
    assert "604 tokens" in caught.value.message
    status, _, _ = server.post({"messages": [{"role": "user", "content": "x" * 600}], "stream": True})
    assert status == 400  # before a stream begins
    status, body, _ = server.post({"prompt": []}, "/v1/completions")
    assert status == 400, body
    status, body, _ = server.post({"prompt": [5, 99999]}, "/v1/completions")
    assert (status, body["error"]["param"]) == (400, "prompt")


def test_too_large_a_body_is_413(scripted, byte_tokenizer, running):
    with running(scripted(byte_tokenizer), max_request_bytes=2000) as server:
        status, body, _ = server.post({"messages": [{"role": "user", "content": "x" * 3000}]})
        assert status == 413
        assert "2000 bytes" in body["error"]["message"]
        connection = http.client.HTTPConnection(*server.address, timeout=20)
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        connection.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        assert connection.getresponse().status == 413
        connection.close()
        assert server.client.chat.completions.create(model="byte-model", messages=QUESTION).choices


def test_api_key(scripted, byte_tokenizer, running):
    with running(scripted(byte_tokenizer), api_key="sécret") as server:
        assert server.post({"messages": QUESTION})[0] == 401
        assert server.post({"messages": QUESTION}, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert server.get("/v1/models")[0] == 401
        right = {"Authorization": "Bearer sécret".encode()}
        assert server.post({"messages": QUESTION}, headers=right)[0] == 200
        assert server.get("/healthz")[0] == 200


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [1] * 500}),
        (ChatRequest, {"messages": [{}] * 500}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 500}]}),
        (ChatRequest, {"messages": QUESTION, "tools": [{}] * 100}),
        (ChatRequest, {"messages": QUESTION, "stop": [1] * 500}),
        (CompletionRequest, {"prompt": [1.5] * 500}),
        (CompletionRequest, {"prompt": [[1.5] * 500] * 2}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [1.5] * 500}),
        (EmbeddingRequest, {"input": [1.5] * 500}),
        (EmbeddingRequest, {"input": [[1.5] * 500] * 2}),
        (DetokenizeRequest, {"tokens": [1.5] * 500}),
    ],
)
def test_of_many_mistakes_the_first_is_enough(kind, body):
    """A megabyte of wrong values would take seconds to describe, and nobody else be answered meanwhile."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 5
