"""Queues, departures, failures and the end, under real requests."""

from __future__ import annotations

import json
import socket
import threading
import time

import openai
import pytest

QUESTION = [{"role": "user", "content": "Which module provides dedent?"}]


def test_full_queue_is_429_and_the_event_loop_stays_free(scripted, byte_tokenizer, running, wait_until):
    generator = scripted(byte_tokenizer, default="x" * 400, delay=0.03)
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
        assert time.monotonic() - started < 5  # nine seconds of tokens are still to come
    # Nothing is drained here: both are told that the server stops.
    for thread in threads:
        thread.join()
    assert [(status, body["error"]["code"]) for status, body, _ in answers] == [(503, "shutting_down")] * 2


def raw_request(body):
    head = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_generation(scripted, byte_tokenizer, stream, running, wait_until):
    generator = scripted(byte_tokenizer, default="x" * 5000, context_length=8192, delay=0.005)
    with running(generator) as server:
        body = json.dumps({"messages": QUESTION, "max_tokens": 4000, "stream": stream}).encode()
        client = socket.create_connection(server.address)
        client.sendall(raw_request(body))
        wait_until(lambda: generator.generated > 20)
        client.close()
        line = 'llmctl_cancelled_total{model="byte-model",reason="client_left"} 1.0'
        wait_until(lambda: line in server.get("/metrics")[1])
        assert generator.generated < 2000
        generator.default = "ok"
        assert server.client.chat.completions.create(model="byte-model", messages=QUESTION).choices


def test_a_waiting_request_whose_client_leaves_is_dropped(scripted, byte_tokenizer, running, wait_until):
    # Fifteen seconds, longer than anything is waited for: its turn does not come.
    generator = scripted(byte_tokenizer, default="x" * 200, delay=0.1)
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


def test_a_model_that_fails_is_a_500_and_the_server_lives(scripted, byte_tokenizer, running):
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


def test_running_requests_are_finished_at_the_end(scripted, byte_tokenizer, running, wait_until):
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
