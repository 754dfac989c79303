"""The queue before an encoder: bounded, charged, left by those who leave; over an encoder that waits to be told."""

from __future__ import annotations

import json
import socket
import threading
import time

import numpy as np
import pytest

from llmctl import Artifact
from llmctl_serve.params import ServeParams
from llmctl_serve.service import Service


class Encoder:
    """Vectors of three numbers, as soon as `go` is set."""

    outputs = ("sentence_embedding",)
    context_length, longest, backend, embedding_size = 512, None, "script", 3

    def __init__(self):
        self.go, self.begun, self.most, self._now = threading.Event(), 0, 0, 0
        self.go.set()

    def embed(self, rows):
        self.begun += 1
        self._now += 1
        self.most = max(self.most, self._now)
        assert self.go.wait(20)
        self._now -= 1
        return np.ones((len(rows), 3), np.float32)


@pytest.fixture
def encoding(byte_tokenizer, serving_models):
    """`with encoding(encoder, **params) as server:`."""

    def serve(encoder, **params):
        def open_(name, artifact):
            return Service(name, artifact, byte_tokenizer, ServeParams(port=0, **params), encoder=encoder)

        artifact = Artifact(byte_tokenizer.directory, "model.onnx", "sha256:" + "1" * 64)
        return serving_models(open_, {"e": "e"}, lambda _: artifact, **params)

    return serve


def embed(server, text="abc", **more):
    return server.post({"input": text, **more}, "/v1/embeddings")


def test_tokens_of_embeddings_are_charged(encoding):
    with encoding(Encoder(), tokens_per_minute=100) as server:
        status, body, headers = embed(server, "x" * 40)
        assert status == 200
        used = body["usage"]["prompt_tokens"]
        assert 40 <= used < 50
        assert embed(server, "x" * 40)[0] == 200
        status, body, _ = embed(server, "x" * 40)
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")


def test_a_wrong_size_is_refused_before_the_work(encoding):
    encoder = Encoder()
    with encoding(encoder) as server:
        status, body, _ = embed(server, dimensions=7)
        assert (status, body["error"]["param"], encoder.begun) == (400, "dimensions", 0)
        assert embed(server, dimensions=3)[0] == 200


def test_the_queue_is_bounded_and_a_batch_runs_alone(encoding, wait_until):
    encoder, answers = Encoder(), []
    encoder.go.clear()
    with encoding(encoder, max_queue=2, first_token_timeout=0.2) as server:
        threads = [threading.Thread(target=lambda: answers.append(embed(server)[0])) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: json.loads(server.get("/healthz")[1])["queue_depth"] == 2)
        status, body, headers = embed(server)
        assert (status, body["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
        time.sleep(0.4)  # no first token is to come: nothing ends for the lack of it
        encoder.go.set()
        for thread in threads:
            thread.join()
        assert answers == [200] * 3
        assert encoder.most == 1
        assert embed(server)[0] == 200


def test_who_leaves_the_queue_is_not_embedded(encoding, wait_until):
    encoder = Encoder()
    encoder.go.clear()
    with encoding(encoder, tokens_per_minute=1000) as server:
        running = threading.Thread(target=embed, args=(server,))
        running.start()
        wait_until(lambda: encoder.begun == 1)
        raw = json.dumps({"input": "left"}).encode()
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(raw)}"
        client = socket.create_connection(server.address)
        client.sendall(head.encode() + b"\r\n\r\n" + raw)
        wait_until(lambda: server.models.all()[0].depth == 1)
        client.close()
        wait_until(lambda: server.models.all()[0].depth == 0)
        encoder.go.set()
        running.join()
        assert embed(server)[0] == 200
        assert encoder.begun == 2
        assert 'llmctl_cancelled_total{model="e",reason="client_left"} 1.0' in server.get("/metrics")[1]


def test_those_who_wait_are_told_of_the_end(encoding, wait_until):
    encoder, answers = Encoder(), []
    encoder.go.clear()
    with encoding(encoder) as server:
        threads = [threading.Thread(target=lambda: answers.append(embed(server))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.models.all()[0].depth == 1)
        closing = threading.Thread(target=server.models.close)
        closing.start()
        wait_until(lambda: answers)  # before the batch that runs is done
        encoder.go.set()
        for thread in (*threads, closing):
            thread.join()
    assert [status for status, _, _ in answers] == [503, 200]
