"""HTTP at its edges, byte by byte on a real socket: what could be read in two ways is refused, or read once."""

from __future__ import annotations

import gzip
import json
import re
import socket
import time

import pytest

BODY = json.dumps({"messages": [{"role": "user", "content": "?"}], "max_tokens": 9}).encode()
POST = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
GET = ("GET /healthz HTTP/1.1", "Host: localhost")
LENGTH = f"Content-Length: {len(BODY)}"
CLOSE = "Connection: close"
CHUNKED = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"


def head(*lines):
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.fixture
def server(byte_tokenizer, scripted, running):
    with running(scripted(byte_tokenizer), max_header_bytes=4000, body_timeout=5, header_timeout=1) as found:
        yield found


def sent(server, *parts, pause=0.05):
    """All that comes back until the server closes; between two parts so many seconds."""
    with socket.create_connection(server.address, 10) as client:
        received = b""
        try:
            for number, part in enumerate(parts):
                time.sleep(pause if number else 0)
                client.sendall(part)
            while data := client.recv(1 << 16):
                received += data
        except ConnectionError:
            pass
        return received


def statuses(answer):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


REFUSED = {
    "two lengths": head(*POST, LENGTH, LENGTH, CLOSE) + BODY,
    "two lengths that differ": head(*POST, LENGTH, "Content-Length: 3", CLOSE) + BODY,
    "a list of lengths": head(*POST, f"{LENGTH}, {len(BODY)}", CLOSE) + BODY,
    "length and chunks": head(*POST, LENGTH, "Transfer-Encoding: chunked", CLOSE) + CHUNKED,
    "chunks and length": head(*POST, "Transfer-Encoding: chunked", LENGTH, CLOSE) + CHUNKED,
    "two codings": head(*POST, "Transfer-Encoding: gzip, chunked", CLOSE) + CHUNKED,
    "an unknown coding": head(*POST, "Transfer-Encoding: xchunked", CLOSE) + CHUNKED,
    "a blank before the colon": head(*POST, "Transfer-Encoding : chunked", CLOSE) + CHUNKED,
    "a signed length": head(*POST, f"Content-Length: +{len(BODY)}", CLOSE) + BODY,
    "a folded header": head(*POST, LENGTH, "X-A: b\r\n c", CLOSE) + BODY,
    "bare line feeds": head(*POST, LENGTH, CLOSE).replace(b"\r\n", b"\n") + BODY,
    "a NUL": head(*POST, LENGTH, "X-A: b\0c", CLOSE) + BODY,
    "no host": head(POST[0], POST[2], LENGTH, CLOSE) + BODY,
    "two hosts": head(*POST, "Host: evil.example", LENGTH, CLOSE) + BODY,
    "CONNECT": head("CONNECT a:443 HTTP/1.1", "Host: a", CLOSE),
}


@pytest.mark.parametrize("what", REFUSED)
def test_heads_that_could_be_read_in_two_ways_are_refused(server, what):
    answer = sent(server, REFUSED[what])
    assert statuses(answer) == [400]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_the_control_is_answered(server):
    assert statuses(sent(server, head(*POST, LENGTH, CLOSE) + BODY)) == [200]
    assert statuses(sent(server, head(*POST, "Transfer-Encoding: chunked", CLOSE) + CHUNKED)) == [200]
    assert statuses(sent(server, head("GET /healthz HTTP/1.0"))) == [200]  # 1.0 knows no Host


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "body apart"])
def test_a_wish_for_another_protocol_costs_no_body_and_is_no_second_request(server, apart):
    """Java's client sends it with its first request."""
    wish = ("Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    parts = [head(*POST, LENGTH, *wish), BODY]
    answer = sent(server, *(parts if apart else [b"".join(parts)]))
    assert statuses(answer) == [200] and b'"content":"yes"' in answer
    inner = head(*GET)
    hidden = head(POST[0], POST[1], POST[2], f"Content-Length: {len(inner)}", *wish)
    assert statuses(sent(server, *([hidden, inner] if apart else [hidden + inner]))) == [400], "a body, and no request"
    socketed = head("GET /healthz HTTP/1.1", POST[1], "Connection: Upgrade, close", "Upgrade: websocket")
    assert statuses(sent(server, socketed)) == [200]


def test_each_of_several_requests_may_wish_for_another_protocol(server, caplog):
    wish = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    one = head(*POST, LENGTH, *wish) + BODY
    assert statuses(sent(server, one * 3 + head(*GET, *wish) + head(*GET, CLOSE))) == [200] * 5
    assert statuses(sent(server, one + head("CONNECT a:443 HTTP/1.1", "Host: a"))) in ([], [200])  # cut, at the latest
    assert not caplog.records


def test_a_body_is_waited_for_where_the_client_asks(server):
    with socket.create_connection(server.address, 10) as client:
        client.sendall(head(*POST, LENGTH, "Expect: 100-continue", CLOSE))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        client.sendall(BODY)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    large = head(*POST, "Content-Length: 99999999999", "Expect: 100-continue", CLOSE)
    assert statuses(sent(server, large)) == [413], "nobody is told to go on"


def test_a_head_request_is_a_get_without_its_body(server):
    got, asked = (sent(server, head(f"{method} /v1/models HTTP/1.1", *GET[1:], CLOSE)) for method in ("GET", "HEAD"))
    assert statuses(got) == statuses(asked) == [200]
    top, _, body = asked.partition(b"\r\n\r\n")
    length = next(line for line in top.split(b"\r\n") if line.startswith(b"content-length"))
    assert body == b"" and length in got
    assert statuses(sent(server, head("HEAD /v1/chat/completions HTTP/1.1", *GET[1:], CLOSE))) == [405]
    assert 'llmctl_requests_total{model="none",route="/v1/models",status="200"} 2.0' in server.get("/metrics")[1]


def test_requests_sent_ahead_are_answered_in_order_and_their_bodies_are_no_heads(server):
    first, last = head(*POST, LENGTH) + BODY, head(*GET, CLOSE)
    text = json.dumps({"messages": [{"role": "user", "content": "x" * 9000}], "max_tokens": 2}).encode()
    second = head(*POST, f"Content-Length: {len(text)}")
    assert statuses(sent(server, head(*POST, LENGTH, CLOSE) + BODY)) == [200]  # what is done once is done
    # A body of more bytes than a head may have goes on after the answer before it is out.
    answer = sent(server, first + second + text[:10], text[10:5000], text[5000:] + last, pause=0.3)
    assert statuses(answer) == [200, 400, 200]  # the second is longer than the context


def test_too_many_requests_sent_ahead_cut_the_connection(server):
    slow = head(*POST, LENGTH) + BODY
    answer = sent(server, slow + head(*GET) * 1000)
    assert len(statuses(answer)) < 300
    assert server.get("/healthz")[0] == 200


def test_trailers_say_nothing_and_end(server):
    chunks = CHUNKED[:-2] + b"X-Request-Id: trailer\r\n\r\n"
    answer = sent(server, head(*POST, "Transfer-Encoding: chunked", CLOSE) + chunks)
    assert statuses(answer) == [200] and b"trailer" not in answer
    begun = head(*POST, "Transfer-Encoding: chunked") + CHUNKED[:-2]
    endless = b"".join(b"X-%d: %s\r\n" % (n, b"y" * 90) for n in range(100))
    assert statuses(sent(server, begun, endless, pause=0.2)) == [431]
    assert statuses(sent(server, begun, b"X-Long: " + b"y" * 9000, pause=0.2)) == [431]


def test_a_fault_behind_a_request_writes_nothing_into_its_answer(server):
    """The rest of a head that never comes, and bytes that are no head, while an answer streams."""
    text = json.dumps({"messages": [{"role": "user", "content": "?"}], "max_tokens": 90, "stream": True}).encode()
    generator = server.service.generator
    default, generator.default, generator.delay = generator.default, "x" * 80, 0.03
    try:
        for behind in (b"GET /healthz HTTP/1.1\r\nX-Slow: ", b"\x16\x03\x01 hello\r\n\r\n"):
            answer = sent(server, head(*POST, f"Content-Length: {len(text)}") + text, behind, pause=0.3)
            assert statuses(answer) == [200] and b"invalid_http" not in answer and b"timeout" not in answer
    finally:
        generator.default, generator.delay = default, 0.0


def test_a_compressed_or_missing_body_is_told_so(server):
    packed = gzip.compress(BODY)
    answer = sent(server, head(*POST, f"Content-Length: {len(packed)}", "Content-Encoding: gzip", CLOSE) + packed)
    assert statuses(answer) == [415] and b"may not be compressed" in answer
    answer = sent(server, head(*POST, "Content-Length: 0", CLOSE))
    assert statuses(answer) == [400] and b"the request has no body" in answer
