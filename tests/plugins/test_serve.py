"""`serve` over real HTTP: the official client, strict requests, limits, cancellation, drain."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import openai
import pytest

from llmctl import Artifact, MachineError, StageError, UsageError
from llmctl.generator import Sampling
from llmctl.testing import run_stage
from llmctl.text.retrieval import Chunk, Index
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve import SERVE
from llmctl_serve.app import create_app
from llmctl_serve.defaults import default_sampling
from llmctl_serve.guard import Guard
from llmctl_serve.metrics import ServerMetrics
from llmctl_serve.params import ServeParams
from llmctl_serve.server import HttpServer, endpoint, listen, url
from llmctl_serve.service import Service
from llmctl_serve.worker import Worker

QUESTION = [{"role": "user", "content": "Which module provides dedent?"}]


class Running:
    """A server with its parts at hand."""

    def __init__(self, service, worker, metrics, listener):
        self.service, self.worker, self.metrics = service, worker, metrics
        self.address, self.base = endpoint(listener), url(listener)
        self.client = openai.OpenAI(base_url=f"{self.base}/v1", api_key="none", max_retries=0, timeout=20)

    def post(self, body, path="/v1/chat/completions", headers=None):
        """(status, JSON body, headers) of a raw request."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        connection.request("POST", path, raw, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, json.loads(text), dict(response.getheaders())

    def get(self, path, headers=None):
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text


@contextmanager
def running(generator, index=None, api_key="", default=None, tracing=None, **params):
    params = ServeParams(port=0, **{"drain_seconds": 5, **params})
    warnings = []
    metrics = ServerMetrics(params.metrics_per_key)
    with (
        closing(Guard(params, metrics, api_key, warnings.append, tracing)) as guard,
        listen(params.host, 0) as listener,
    ):
        service = Service(generator, generator.tokenizer, "byte-model", params, default or Sampling(), index)
        worker = Worker(generator, generator.tokenizer, params.max_queue, warnings.append)
        metrics.watch("byte-model", worker.stats)
        worker.start()
        app = create_app(service, worker, guard, warnings.append)
        try:
            with HttpServer(app, listener, params.drain_seconds, worker.stop, **guard.uvicorn()):
                found = Running(service, worker, metrics, listener)
                found.warnings = warnings
                yield found
        finally:
            worker.stop()


@pytest.fixture
def server(scripted, byte_tokenizer):
    with running(scripted(byte_tokenizer, {"dedent": "textwrap"}, default="naïve ☃")) as found:
        yield found


def test_chat_with_the_official_client(server, byte_tokenizer):
    answer = server.client.chat.completions.create(
        model="byte-model", messages=QUESTION, user="me", metadata={"a": "b"}
    )
    assert answer.choices[0].message.content == "textwrap"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    prompt = byte_tokenizer.encode_chat(QUESTION, add_generation_prompt=True).ids
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), 8, len(prompt) + 8)
    assert answer.model == "byte-model"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")


def test_content_as_parts_equals_content_as_text(server):
    parts = [{"type": "text", "text": "Which module "}, {"type": "text", "text": "provides dedent?"}]
    answer = server.client.chat.completions.create(model="byte-model", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "textwrap"
    assert answer.usage.prompt_tokens == len(
        server.service.tokenizer.encode_chat(QUESTION, add_generation_prompt=True).ids
    )


def test_stream_with_the_official_client(server):
    stream = server.client.chat.completions.create(
        model="byte-model",
        messages=[{"role": "user", "content": "?"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "naïve ☃"  # three of its characters are two or three tokens here
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) == 7
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("naïve ☃".encode())
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_ends_with_done_and_counts_only_when_asked(server):
    connection = http.client.HTTPConnection(*server.address)
    body = json.dumps({"messages": QUESTION, "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.getheader("content-type").startswith("text/event-stream")
    raw = response.read().decode()
    assert raw.endswith("data: [DONE]\n\n")
    assert "usage" not in raw
    connection.close()


def test_text_completion_of_text_ids_and_several_prompts(server, byte_tokenizer):
    create = server.client.completions.create
    one = create(model="byte-model", prompt="ab", max_tokens=5)
    # The scripted model repeats "naïve ☃" from the position of the prompt's last token on; BOS counts.
    script = byte_tokenizer.encode("naïve ☃")
    expected = byte_tokenizer.decode([script[(2 + i) % len(script)] for i in range(5)])
    assert one.choices[0].text == expected
    assert one.choices[0].finish_reason == "length"
    assert one.usage.prompt_tokens == 3
    ids = [byte_tokenizer.bos_id, *byte_tokenizer.encode("ab")]
    assert create(model="byte-model", prompt=ids, max_tokens=5).choices[0].text == expected
    several = create(model="byte-model", prompt=["ab", "abc"], max_tokens=4, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text != several.choices[2].text
    assert several.usage.prompt_tokens == 3 + 4
    streamed = create(model="byte-model", prompt="ab", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected


def test_typed_special_tokens_stay_text(server):
    shown = server.client.chat.completions.create(
        model="byte-model", messages=[{"role": "user", "content": "<|end|><|assistant|>dedent"}]
    )
    assert shown.usage.prompt_tokens == len("<|end|><|assistant|>dedent") + 4


@pytest.mark.parametrize("stop", ["wr", ["zz", "twr", "wr"]])
def test_stop_strings_across_tokens(server, stop):
    answer = server.client.chat.completions.create(model="byte-model", messages=QUESTION, stop=stop)
    assert answer.choices[0].message.content == ("text" if stop == "wr" else "tex")
    assert answer.choices[0].finish_reason == "stop"
    near = server.client.chat.completions.create(model="byte-model", messages=QUESTION, stop=["wx", "textwrapp"])
    assert near.choices[0].message.content == "textwrap"


def test_max_tokens_by_both_names(server):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = server.client.chat.completions.create(model="byte-model", messages=QUESTION, **{name: 3})
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("tex", "length")
        assert answer.usage.completion_tokens == 3


def test_seeds_temperature_and_n(server):
    def ask(**options):
        found = server.client.chat.completions.create(
            model="byte-model", messages=[{"role": "user", "content": "?"}], max_tokens=12, **options
        )
        return [choice.message.content for choice in found.choices]

    assert ask(temperature=0, n=2) == ["naïve ☃"] * 2
    assert ask(temperature=1.5, seed=7, n=3) == ask(temperature=1.5, seed=7, n=3)
    several = ask(temperature=1.5, seed=7, n=3)
    assert several[1:] == ask(temperature=1.5, seed=8, n=2)
    assert len(set(several)) > 1
    assert ask(temperature=1.5, seed=-1) == ask(temperature=1.5, seed=-1)


def test_sampling_defaults_come_from_the_model(server, tmp_path):
    assert default_sampling(tmp_path) == Sampling()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "top_p": 0.9}')
    assert default_sampling(tmp_path) == Sampling()  # transformers is greedy without do_sample
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.5, "top_p": 0.9}')
    assert default_sampling(tmp_path) == Sampling(temperature=0.5, top_k=50, top_p=0.9)
    from llmctl_serve.requests import ChatRequest

    def sampling(**fields):
        return server.service.sampling(ChatRequest(messages=QUESTION, **fields), 1, None)

    assert sampling().temperature == 0
    assert sampling(temperature=0.3, top_p=0.5, top_k=4) == Sampling(temperature=0.3, top_p=0.5, top_k=4, seed=1)
    assert sampling(top_p=0.5).temperature == 1
    own = Sampling(beams=3, length_penalty=0.6)
    wanting = replace(server.service, default=own)

    def sampling(**fields):
        return wanting.sampling(ChatRequest(messages=QUESTION, **fields), 1, None)

    assert sampling() == sampling(temperature=0) == replace(own, seed=1)
    assert sampling(temperature=0.3) == Sampling(temperature=0.3, seed=1)
    assert sampling(top_p=0.5) == Sampling(temperature=1.0, top_p=0.5, seed=1)


def test_logprobs_are_those_of_the_model(server):
    answer = server.client.chat.completions.create(
        model="byte-model", messages=QUESTION, logprobs=True, top_logprobs=3, max_tokens=4
    )
    content = answer.choices[0].logprobs.content
    assert "".join(score.token for score in content) == "text"
    assert [score.logprob for score in content] == pytest.approx([np.log(0.9)] * 4, abs=1e-6)
    assert content[0].top_logprobs[0].token == "t"
    assert content[0].bytes == [ord("t")]
    assert content[0].top_logprobs[1].logprob == pytest.approx(np.log(0.1 / 261), abs=1e-5)
    plain = server.client.completions.create(model="byte-model", prompt="ab", max_tokens=2, logprobs=2)
    assert plain.choices[0].logprobs.token_logprobs == pytest.approx([np.log(0.9)] * 2, abs=1e-6)
    assert plain.choices[0].logprobs.text_offset == [0, 1]  # "ï" in two halves


def test_models_health_and_docs(server):
    assert [model.id for model in server.client.models.list()] == ["byte-model"]
    assert server.client.models.retrieve("byte-model").owned_by == "llmctl"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4o")
    status, text = server.get("/healthz")
    assert (status, json.loads(text)["status"]) == (200, "ok")
    assert "/v1/chat/completions" in json.loads(server.get("/openapi.json")[1])["paths"]
    status, text = server.get("/nowhere")
    assert status == 404
    assert json.loads(text)["error"]["message"] == "Not Found"


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
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "stream": True}, "logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": False}, "presence_penalty"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"temprature": 0.5}, "temprature"),
    ({"retrieval": True}, "retrieval"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages.0.tool_calls"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_wrong_fields_are_named_with_400(server, fields, param):
    status, body, _ = server.post({"model": "byte-model", "messages": QUESTION, **fields})
    assert status == 400, body
    error = body["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param), error
    assert param.rpartition(".")[2] in error["message"] or error["param"]


def test_every_listed_field_is_harmless_neutral_or_refused(server):
    from llmctl_serve.requests import HARMLESS, NEUTRAL

    plain = server.post({"messages": QUESTION})[1]["choices"]
    accepted = {name: "x" for name in HARMLESS} | {name: values[-1] for name, values in NEUTRAL.items()}
    assert server.post({"messages": QUESTION, **accepted})[1]["choices"] == plain
    for name in NEUTRAL:
        status, body, _ = server.post({"messages": QUESTION, name: {"strange": 1}})
        assert (status, body["error"]["param"]) == (400, name)


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
        (b'{"messages": [{"role": "user", "content": "a"}]}', {"Content-Type": "text/plain"}, 400),
    ],
    ids=str,
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


def test_too_large_a_body_is_413(scripted, byte_tokenizer):
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


def test_api_key(scripted, byte_tokenizer):
    with running(scripted(byte_tokenizer), api_key="sécret") as server:
        assert server.post({"messages": QUESTION})[0] == 401
        assert server.post({"messages": QUESTION}, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert server.get("/v1/models")[0] == 401
        right = {"Authorization": "Bearer sécret".encode()}
        assert server.post({"messages": QUESTION}, headers=right)[0] == 200
        assert server.get("/healthz")[0] == 200


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_full_queue_is_429_and_the_event_loop_stays_free(scripted, byte_tokenizer):
    generator = scripted(byte_tokenizer, default="x" * 400, delay=0.01)
    answers = []
    with running(generator, max_queue=1, drain_seconds=0) as server:
        body = {"messages": QUESTION, "max_tokens": 300}
        threads = [threading.Thread(target=lambda: answers.append(server.post(body))) for _ in range(2)]
        for thread in threads:
            thread.start()
            wait_until(lambda: generator.generated > 0)
        wait_until(lambda: server.worker.depth == 1)
        status, answer, headers = server.post(body)
        assert status == 429
        assert answer["error"]["code"] == "queue_full"
        assert int(headers["retry-after"]) >= 1
        started = time.monotonic()
        assert json.loads(server.get("/healthz")[1])["queue_depth"] == 1
        assert time.monotonic() - started < 1  # three seconds of tokens are still to come
    # Nothing is drained here: both are told that the server stops.
    for thread in threads:
        thread.join()
    assert [(status, body["error"]["code"]) for status, body, _ in answers] == [(503, "shutting_down")] * 2


def raw_request(body):
    head = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_generation(scripted, byte_tokenizer, stream):
    generator = scripted(byte_tokenizer, default="x" * 5000, context_length=8192, delay=0.005)
    with running(generator) as server:
        body = json.dumps({"messages": QUESTION, "max_tokens": 4000, "stream": stream}).encode()
        client = socket.create_connection(server.address)
        client.sendall(raw_request(body))
        wait_until(lambda: generator.generated > 20)
        client.close()
        wait_until(
            lambda: 'llmctl_cancelled_total{model="byte-model",reason="client_left"} 1.0' in server.get("/metrics")[1]
        )
        assert generator.generated < 2000
        generator.default = "ok"
        assert server.client.chat.completions.create(model="byte-model", messages=QUESTION).choices


def test_a_waiting_request_whose_client_leaves_is_dropped(scripted, byte_tokenizer):
    generator = scripted(byte_tokenizer, default="x" * 200, delay=0.01)
    with running(generator, drain_seconds=0) as server:
        body = json.dumps({"messages": QUESTION, "max_tokens": 150}).encode()
        clients = [socket.create_connection(server.address) for _ in range(2)]
        for client in clients:
            client.sendall(raw_request(body))
            wait_until(lambda: generator.generated > 0)
        wait_until(lambda: server.worker.depth == 1)
        clients[1].close()
        wait_until(lambda: server.worker.depth == 0)
        clients[0].close()


def test_metrics_count_what_happened(server):
    server.client.chat.completions.create(model="byte-model", messages=QUESTION)
    server.post({"messages": []})
    text = server.get("/metrics")[1]
    prompt = len(server.service.tokenizer.encode_chat(QUESTION, add_generation_prompt=True).ids)
    for line in (
        'llmctl_requests_total{model="byte-model",route="/v1/chat/completions",status="200"} 1.0',
        'llmctl_requests_total{model="none",route="/v1/chat/completions",status="400"} 1.0',
        'llmctl_completion_tokens_total{model="byte-model"} 8.0',
        f'llmctl_prompt_tokens_total{{model="byte-model"}} {prompt}.0',
        'llmctl_time_to_first_token_seconds_count{model="byte-model"} 1.0',
        'llmctl_inter_token_seconds_count{model="byte-model"} 7.0',
        'llmctl_queue_depth{model="byte-model"} 0.0',
    ):
        assert line in text.splitlines(), line
    assert "python_gc" not in text  # a registry of its own


def test_a_model_that_fails_is_a_500_and_the_server_lives(scripted, byte_tokenizer):
    generator = scripted(byte_tokenizer)
    good = generator.stream
    with running(generator) as server:
        generator.stream = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
        status, body, _ = server.post({"messages": QUESTION})
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "out of memory" not in json.dumps(body)
        assert any("out of memory" in line for line in server.warnings)
        with pytest.raises(openai.APIError):
            list(server.client.chat.completions.create(model="byte-model", messages=QUESTION, stream=True))
        generator.stream = good
        assert server.post({"messages": QUESTION})[0] == 200


def test_running_requests_are_finished_at_the_end(scripted, byte_tokenizer):
    generator = scripted(byte_tokenizer, default="x" * 60, delay=0.01)
    answers = []
    with running(generator, drain_seconds=10) as server:
        thread = threading.Thread(target=lambda: answers.append(server.post({"messages": QUESTION})))
        thread.start()
        wait_until(lambda: generator.generated > 3)
    thread.join()
    assert answers[0][0] == 200
    assert answers[0][1]["choices"][0]["message"]["content"] == "x" * 60
    with pytest.raises(ConnectionRefusedError):
        server.get("/healthz")


# Answers from documents


DEDENT = [{"role": "user", "content": "What does `dedent` do?"}]


@pytest.fixture
def index():
    return Index.build(
        [
            Chunk(
                "textwrap#0", "textwrap", 0, 58, "The function dedent removes common leading whitespace. It", "textwrap"
            ),
            Chunk("json#0", "json", 0, 40, "The function loads parses a JSON text.", "json"),
            Chunk("gzip#0", "gzip", 0, 40, "Reads and writes compressed files.", "gzip"),
        ]
    )


def test_grounded_answers_cite_and_refuse(scripted, byte_tokenizer, index):
    generator = scripted(byte_tokenizer, {"[1] The function dedent": "It removes whitespace [1] [7]."}, default="hm")
    with running(generator, index) as server:
        status, body, _ = server.post({"messages": DEDENT})
        assert status == 200
        assert body["choices"][0]["message"]["content"] == "It removes whitespace [1] ."
        assert [(cited["number"], cited["id"]) for cited in body["citations"]] == [(1, "textwrap#0")]
        assert body["refused"] is False
        answer = server.client.chat.completions.create(
            model="byte-model", messages=[{"role": "user", "content": "What is `frobnicate`?"}]
        )
        assert answer.refused
        assert answer.citations == []
        assert answer.usage.completion_tokens == 0
        free = server.post({"messages": DEDENT, "retrieval": False})[1]
        assert free["choices"][0]["message"]["content"] == "hm"
        assert "citations" not in free
        lenient = {"messages": [{"role": "user", "content": "frobnicate function"}], "retrieval": {"refuse_below": 0.0}}
        assert server.post(lenient)[1]["refused"] is False


def test_grounded_stream_equals_the_whole_answer(scripted, byte_tokenizer, index):
    generator = scripted(byte_tokenizer, {"[1] The function dedent": "whitespace [12], a[1] and [2"}, default="hm")
    with running(generator, index) as server:
        whole = server.post({"messages": DEDENT})[1]
        chunks = list(server.client.chat.completions.create(model="byte-model", messages=DEDENT, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole["choices"][0]["message"]["content"] == "whitespace , a[1] and [2 [1]"
        assert chunks[-1].citations[0]["id"] == "textwrap#0"


def test_a_context_that_holds_no_passage_refuses_in_words_too(scripted, byte_tokenizer, index):
    generator = scripted(byte_tokenizer, context_length=100)
    with running(generator, index) as server:
        body = server.post({"messages": DEDENT})[1]
        assert body["choices"][0]["message"]["content"] == "I cannot answer that from these documents."
        assert (body["refused"], body["citations"]) == (True, [])
        assert generator.generated == 0


def test_extractive_answers_need_no_generation(scripted, byte_tokenizer, index):
    generator = scripted(byte_tokenizer)
    with running(generator, index, answers="extractive") as server:
        body = server.post({"messages": DEDENT})[1]
        assert body["choices"][0]["message"]["content"] == "The function dedent removes common leading whitespace. [1]"
        assert generator.generated == 0


def test_closed_book_answers_are_refused_and_cited_without_being_shown_the_passages(scripted, byte_tokenizer, index):
    generator = scripted(byte_tokenizer, {"[1]": "saw a passage", "dedent": "textwrap"}, default="made up")
    with running(generator, index, answers="closed-book") as server:
        body = server.post({"messages": DEDENT})[1]
        assert body["choices"][0]["message"]["content"] == "textwrap [1]"
        assert body["citations"][0]["document"] == "textwrap"
        unknown = [{"role": "user", "content": "What is `frobnicate`?"}]
        assert server.post({"messages": unknown})[1]["refused"] is True


# The stage


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


# Real models

WITHOUT_TORCH = """
import importlib.util, json, sys
from pathlib import Path
from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl_serve import SERVE
params = {"port": 0, "mode": "smoke", "smoke_questions": ["Hello?", "Why?"], "max_new_tokens": 12, "threads": 1}
result = run_stage(SERVE, Path(sys.argv[2]), params, model=Artifact(Path(sys.argv[1]), "model.onnx"))
answers = json.loads((result.outputs["receipt"] / "receipt.json").read_text())["questions"]
heavy = [name for name in ("torch", "transformers", "onnx", "optimum") if name in sys.modules]
installed = importlib.util.find_spec("torch") is not None
print(json.dumps([[one["answer"] for one in answers], heavy, installed]))
"""


@contextmanager
def serving(artifact):
    from llmctl.registry import get_registry

    generator = get_registry().open_generator(artifact, device="cpu", threads=1)
    generator.tokenizer = Tokenizer.load(artifact.path)
    with running(generator, max_new_tokens=24) as server:
        yield server


def greedy(hf, question, count):
    """What transformers answers."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf.path, dtype=torch.float32).eval()
    tokenizer = Tokenizer.load(hf.path)
    ids = tokenizer.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True).ids
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
    answer = [token for token in out[0, len(ids) :].tolist() if token != tokenizer.eos_id]
    with torch.inference_mode():
        scores = model(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)[len(ids) - 1 : -1]
    return tokenizer.decode(answer), [float(row[token]) for row, token in zip(scores, answer, strict=True)]


@pytest.mark.parametrize("kind", [0, 1], ids=["torch", "onnx"])
def test_http_gives_the_answers_and_logprobs_of_transformers(real_models, kind):
    text, scores = greedy(real_models[0], "Which module?", 24)
    with serving(real_models[kind]) as server:
        answer = server.client.chat.completions.create(
            model="byte-model",
            messages=[{"role": "user", "content": "Which module?"}],
            temperature=0,
            logprobs=True,
            top_logprobs=1,
        )
        assert answer.choices[0].message.content == text
        content = answer.choices[0].logprobs.content
        assert [score.logprob for score in content] == pytest.approx(scores[: len(content)], abs=1e-4)
        assert all(score.top_logprobs[0].logprob == score.logprob for score in content)  # greedy takes the likeliest
        stream = server.client.chat.completions.create(
            model="byte-model", messages=[{"role": "user", "content": "Which module?"}], temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_a_bundle_is_served_without_importing_torch(tmp_path, real_models):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, real_models[1].path, tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers, heavy, _ = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    assert answers[1] == greedy(real_models[0], "Hello?", 12)[0]


@pytest.mark.slow
def test_an_environment_without_torch_serves_a_bundle(tmp_path, real_models):
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "-c", root / "constraints.txt", f"{root}[serve]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [python, "-c", WITHOUT_TORCH, real_models[1].path, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    answers, heavy, installed = json.loads(done.stdout.splitlines()[-1])
    assert (heavy, installed) == ([], False)
    assert answers[1] == greedy(real_models[0], "Hello?", 12)[0]
