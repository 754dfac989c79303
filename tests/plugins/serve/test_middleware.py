"""The middleware around stub applications: identity, headers, errors, deadlines, bodies, admission, logs, traces."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse, StreamingResponse

from llmctl.engine import EngineStats
from llmctl_serve import files
from llmctl_serve.access_log import AccessLog, RequestLog
from llmctl_serve.admission import Admissions, Origins
from llmctl_serve.errors import ApiError
from llmctl_serve.exchange import SCOPE
from llmctl_serve.files import LineLog
from llmctl_serve.keys import Keys, changing, make_key
from llmctl_serve.metrics import ServerMetrics
from llmctl_serve.middleware import Body, Deadlines, Observed
from llmctl_serve.rate_limits import Limits, RateLimiter
from llmctl_serve.tracing import Tracing

TOOLS = {"model": "m", "artifact": "sha256:ab", "operation": "chat"}


def ask(app, path="/v1/x", method="POST", headers=(), body=b"{}", chunks=None, hang=False):
    """(status, headers, body) that an ASGI application gives."""
    found = {"body": b""}
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in chunks or []]
    messages.append({"type": "http.request", "body": b"" if chunks else body, "more_body": hang})

    async def receive():
        if messages:
            return messages.pop(0)
        return await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.start":
            found["status"], found["headers"] = message["status"], dict(message["headers"])
        else:
            found["body"] += message.get("body", b"")

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "client": ("10.0.0.9", 1), "state": {}}
    asyncio.run(app(scope, receive, send))
    return found["status"], {k.decode(): v.decode() for k, v in found["headers"].items()}, found["body"]


async def generates(scope, receive, send):
    """An application that generates two answers of three and two tokens."""
    exchange = scope[SCOPE]
    exchange.asked(
        **TOOLS, prompt_tokens=7, max_tokens=20, settings={"max_tokens": 10, "seed": 3}, prompts=["secret q"]
    )
    exchange.admitted(cached=4)
    for tokens, choice in ((1, 0), (2, 1), (2, 0)):
        await asyncio.sleep(0.001)
        exchange.emitted(tokens, choice)
    for choice, (reason, text) in enumerate((("stop", "secret a"), ("length", "secret b"))):
        exchange.finished(reason, choice)
        exchange.said(choice, text)
    await JSONResponse({"ok": True})(scope, receive, send)


def observed(app, metrics=None, warnings=None, **more):
    warn = (warnings if warnings is not None else []).append
    return Observed(app, metrics or ServerMetrics(), warn, lambda: frozenset({"/v1/x"}), **more)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123:4", True),
        ("", False),
        ("a b", False),
        ("x" * 129, False),
        ('a"b', False),
        ("a\r\nb", False),
        ("é", False),
    ],
)
def test_a_sane_request_id_is_kept_and_another_is_replaced(given, kept):
    _, headers, _ = ask(observed(generates), headers=[("X-Request-Id", given)])
    assert (headers["x-request-id"] == given) is kept
    assert len(headers["x-request-id"]) >= 9


def test_every_answer_carries_the_headers_that_keep_browsers_safe():
    _, headers, _ = ask(observed(generates))
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after the status"])
def test_what_the_application_raises_is_no_traceback(late):
    async def breaks(scope, receive, send):
        if late:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("secret path /etc")

    warnings, metrics = [], ServerMetrics()
    status, _, body = ask(observed(breaks, metrics, warnings))
    assert b"secret" not in body
    if not late:
        assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
    assert warnings == ["POST /v1/x failed: RuntimeError: secret path /etc"]


def test_the_exposition_counts_what_happened():
    metrics = ServerMetrics(per_key=True)
    stats = EngineStats(waiting=3, running=2, slots=8, drafted=10, accepted=6, cached_tokens=4, cache_capacity=100)
    metrics.watch("m", lambda: stats, bytes_per_token=64, artifact="sha256:ab", backend="onnx")
    app = observed(generates, metrics)
    for _ in range(3):
        ask(app)
    ask(app, path="/v1/" + "x" * 50)
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert samples["llmctl_requests_total", "/v1/x", "200", "m"] == 3
    assert samples["llmctl_requests_total", "200", "m", "other"] == 1
    assert samples["llmctl_prompt_tokens_total", "m"] == 28
    assert samples["llmctl_completion_tokens_total", "m"] == 20
    assert samples["llmctl_cached_prompt_tokens_total", "m"] == 16
    assert samples["llmctl_time_to_first_token_seconds_count", "m"] == 4
    assert samples["llmctl_inter_token_seconds_count", "m"] == 4 * 3  # five tokens in two answers
    assert samples["llmctl_queue_seconds_count", "m"] == 4
    assert samples["llmctl_answers_total", "m", "stop"] == samples["llmctl_answers_total", "length", "m"] == 4
    assert samples["llmctl_queue_depth", "m"] == 3
    assert samples["llmctl_running", "m"] == 2
    assert samples["llmctl_speculation_accepted_tokens_total", "m"] == 6
    assert samples["llmctl_prefix_cache_hit_tokens_total", "m"] == 4
    assert samples["llmctl_cache_bytes", "m"] == 6400
    assert samples["llmctl_open_requests",] == 0
    assert samples["process_resident_memory_bytes",] > 0
    metrics.forget("m")
    assert 'llmctl_queue_depth{model="m"}' not in metrics.text().decode()


def test_rejections_are_counted_by_reason(tmp_path):
    metrics = ServerMetrics()
    app = observed(Admissions(generates, Keys(fixed="k"), RateLimiter(Limits()), ("/admin",)), metrics)
    assert ask(app)[0] == 401
    assert 'llmctl_rejected_total{reason="invalid_api_key"} 1.0' in metrics.text().decode()


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_the_access_log_says_how_it_went_and_never_what_was_said(tmp_path):
    log = tmp_path / "access.jsonl"
    app = observed(generates, access=AccessLog(LineLog(str(log))))
    ask(app, headers=[("X-Request-Id", "one")])
    (line,) = lines(log)
    assert "secret" not in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    expected = {
        "request_id": "one", "client": "10.0.0.9", "method": "POST", "route": "/v1/x", "model": "m",
        "artifact": "sha256:ab", "status": 200, "prompt_tokens": 7, "generated_tokens": 5, "cached_tokens": 4,
        "finish_reason": "length,stop", "error": None, "key": None, "stream": False, "cut": None,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert 0 <= line["queue_ms"] <= line["first_token_ms"] <= line["total_ms"]


def test_nobody_forges_a_line(tmp_path):
    log = tmp_path / "access.jsonl"
    ask(observed(generates, access=AccessLog(LineLog(str(log)))), path='/a\r\n{"status": 200}\x1b[2J\u2028\x7f\x00')
    raw = log.read_bytes()
    assert raw.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in raw[:-1])
    assert lines(log)[0]["path"].startswith("/a\r\n")


def test_the_request_log_holds_what_leads_one_reply_back(tmp_path):
    log = tmp_path / "requests.jsonl"
    ask(observed(generates, requests=RequestLog(LineLog(str(log)))))
    (line,) = lines(log)
    assert line["prompts"] == ["secret q"]
    assert [one["answer"] for one in line["answers"]] == ["secret a", "secret b"]
    assert (line["artifact"], line["settings"]["seed"]) == ("sha256:ab", 3)
    assert log.stat().st_mode & 0o777 == 0o600


def test_logs_rotate_by_size_and_follow_a_file_that_was_moved(tmp_path):
    path = tmp_path / "log"
    log = LineLog(str(path), max_bytes=100, keep=2)
    for number in range(30):
        log.write({"n": number, "x": "y" * 20})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert all(each.stat().st_size <= 100 for each in tmp_path.iterdir())
    assert lines(path)[-1]["n"] == 29
    path.rename(tmp_path / "moved")
    log.write({"n": 30})
    assert lines(path) == [{"n": 30}]
    log.close()


def test_a_disk_that_is_full_costs_lines_and_one_warning(tmp_path):
    warnings = []
    log = LineLog("/dev/full", warn=warnings.append)
    for _ in range(3):
        log.write({"n": 1})
    assert len(warnings) == 1
    log.close()


def test_traces_follow_the_conventions_and_the_clients_trace():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    _, headers, _ = ask(observed(generates, tracing=Tracing(provider)), headers=[("traceparent", parent)])
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"queue", "prefill", "decode", "chat m"}
    root = spans["chat m"]
    assert f"{root.context.trace_id:032x}" == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert f"{root.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert headers["traceparent"] == f"00-4bf92f3577b34da6a3ce929d0e0e4736-{root.context.span_id:016x}-01"
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent.span_id == root.context.span_id
        assert root.start_time <= spans[name].start_time <= spans[name].end_time <= root.end_time
    assert root.attributes[gen_ai_attributes.GEN_AI_REQUEST_MODEL] == "m"
    assert root.attributes[gen_ai_attributes.GEN_AI_OPERATION_NAME] == "chat"
    assert root.attributes[gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS] == 7
    assert root.attributes[gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS] == 5
    assert root.attributes[gen_ai_attributes.GEN_AI_REQUEST_MAX_TOKENS] == 10
    assert root.attributes[gen_ai_attributes.GEN_AI_RESPONSE_FINISH_REASONS] == ("stop", "length")
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    assert {name for name in root.attributes if name.startswith("gen_ai.")} <= known
    assert not any("secret" in str(value) for value in root.attributes.values())


def sleeps(seconds, started=False, token=False):
    async def app(scope, receive, send):
        scope[SCOPE].asked(**TOOLS, prompt_tokens=1, max_tokens=1)
        if token:
            scope[SCOPE].emitted(1)

        async def parts():
            yield b"data: 1\n\n"
            await asyncio.sleep(seconds)
            yield b"data: 2\n\n"

        if started:
            await StreamingResponse(parts(), media_type="text/event-stream")(scope, receive, send)
        else:
            await asyncio.sleep(seconds)
            await JSONResponse({})(scope, receive, send)

    return app


@pytest.mark.parametrize(
    ("app", "total", "first", "status", "code"),
    [
        (sleeps(30), 0.05, 0, 504, "timeout"),
        (sleeps(30), 0, 0.05, 503, "first_token_timeout"),
        (sleeps(30, started=True), 0.05, 0, 200, "timeout"),
        (sleeps(0.2, token=True), 5, 0.05, 200, None),
    ],
    ids=["total", "first token", "stream", "in time"],
)
def test_deadlines(app, total, first, status, code, tmp_path):
    log = tmp_path / "log"
    guarded = observed(Deadlines(app, total, first, 0), access=AccessLog(LineLog(str(log))))
    found, _, body = ask(guarded)
    assert found == status
    assert lines(log)[0]["error"] == code
    if status == 200 and code:
        assert body.startswith(b"data: 1\n\ndata: {")
        body = body.split(b"data: ")[2]
    assert json.loads(body).get("error", {}).get("code") == code


def test_bodies_are_limited_in_size_and_time():
    seen = []

    async def reads(scope, receive, send):
        seen.append((await receive())["body"])
        await JSONResponse({})(scope, receive, send)

    app = observed(Body(reads, 10, 0.05))
    assert ask(app, chunks=[b"abc", b"def"])[0] == 200
    assert seen == [b"abcdef"]
    assert ask(app, chunks=[b"x" * 6, b"x" * 6])[0] == 413
    assert ask(app, headers=[("Content-Length", "11")])[0] == 413
    status, headers, body = ask(app, hang=True)
    assert (status, headers["connection"], json.loads(body)["error"]["code"]) == (408, "close", "timeout")
    assert len(seen) == 1


HOSTS = ["localhost", "*.example.org"]


@pytest.mark.parametrize(
    ("host", "origin", "method", "status"),
    [
        ("localhost:8000", "", "POST", 200),
        ("127.0.0.1:8000", "", "POST", 200),
        ("[::1]:8000", "", "POST", 200),
        ("a.example.org", "", "GET", 200),
        ("LOCALHOST", "", "GET", 200),
        ("evil.example", "", "GET", 421),
        ("localhost.evil.example", "", "POST", 421),
        ("localhost:8000", "http://localhost:8000", "POST", 200),
        ("localhost:8000", "https://app.example", "POST", 200),
        ("localhost:8000", "https://evil.example", "POST", 403),
        ("localhost:8000", "null", "POST", 403),
        ("localhost:8000", "https://evil.example", "GET", 200),
    ],
)
def test_hosts_and_origins(host, origin, method, status):
    app = observed(Origins(generates, HOSTS, ["https://app.example"]))
    given = [("Host", host), *([("Origin", origin)] if origin else [])]
    assert ask(app, method=method, headers=given)[0] == status


@pytest.fixture
def keyring(tmp_path):
    """A file with a user's key and an administrator's, and both."""
    path = tmp_path / "keys.jsonl"
    texts = {}
    with changing(path) as file:
        for id, scopes in (("user", ("inference",)), ("root", ("inference", "admin"))):
            file.keys[id], texts[id] = make_key(id, scopes, Limits(tokens_per_minute=40, requests_per_minute=3))
        file.save()
    return Keys(path), texts


def test_keys_scopes_and_what_the_headers_say(keyring):
    keys, texts = keyring
    app = observed(Admissions(generates, keys, RateLimiter(Limits()), ("/admin", "/metrics")))

    def status(path, key=None, scheme="Bearer"):
        return ask(app, path, "GET", [("Authorization", f"{scheme} {key}")] if key else [])[0]

    assert [status(path) for path in ("/v1/models", "/admin/models", "/metrics", "/healthz", "/")] == [
        401,
        401,
        401,
        200,
        200,
    ]
    assert status("/v1/models", texts["user"]) == 200
    assert status("/v1/models", texts["user"], "Basic") == 401
    assert status("/admin/models", texts["user"]) == 403
    assert status("/admin/models", texts["root"]) == 200
    assert status("/administration") == 200  # no prefix of a name
    _, headers, body = ask(app)
    assert headers["www-authenticate"].startswith("Bearer")
    assert json.loads(body)["error"]["type"] == "authentication_error"


def test_limits_refuse_in_openais_way_and_refund_what_was_not_generated(keyring, tmp_path):
    keys, texts = keyring
    log = tmp_path / "log"
    limited = Admissions(generates, keys, RateLimiter(Limits()), ())
    app = observed(limited, access=AccessLog(LineLog(str(log))))
    right = [("Authorization", f"Bearer {texts['user']}")]
    status, headers, _ = ask(app, headers=right)
    assert status == 200
    # 27 of 40 tokens are reserved while the answer is made; 12 are kept, so the second fits too, and the third.
    assert headers["x-ratelimit-remaining-tokens"] == "13"
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("3", "2")
    assert ask(app, headers=right)[1]["x-ratelimit-remaining-tokens"] == "1"

    async def handler(scope, receive, send):
        try:
            await generates(scope, receive, send)
        except ApiError as error:  # as the application's handler does
            await error.response()(scope, receive, send)

    limited._app = handler
    status, headers, body = ask(app, headers=right)
    assert status == 429
    assert 1 <= int(headers["retry-after"]) <= 61
    assert "40 tokens per minute" in json.loads(body)["error"]["message"]
    status, headers, body = ask(app, headers=right)
    assert (status, json.loads(body)["error"]["code"]) == (429, "rate_limit_exceeded")
    assert [line["error"] for line in lines(log)] == [None, None, "rate_limit_tokens", "rate_limit_requests"]
    assert {line["key"] for line in lines(log)} == {"user"}
    assert texts["user"] not in log.read_text()


def test_a_key_appears_nowhere(keyring, tmp_path):
    keys, texts = keyring
    log, metrics, warnings = tmp_path / "log", ServerMetrics(per_key=True), []
    app = observed(
        Admissions(generates, keys, RateLimiter(Limits()), ()), metrics, warnings, access=AccessLog(LineLog(str(log)))
    )
    _, headers, body = ask(app, headers=[("Authorization", f"Bearer {texts['user']}")])
    _, wrong, refusal = ask(app, headers=[("Authorization", f"Bearer {texts['user']}x")])
    everything = f"{headers}{body}{wrong}{refusal}{log.read_text()}{metrics.text().decode()}{warnings}"
    assert texts["user"].removeprefix("llmctl-user-") not in everything
    assert 'key="user"' in metrics.text().decode()


def test_administration_needs_keys():
    app = observed(Admissions(generates, None, RateLimiter(Limits()), ("/admin",)))
    status, _, body = ask(app, "/admin/models")
    assert status == 403
    assert "llmctl keys create" in json.loads(body)["error"]["message"]
    assert ask(app, "/v1/models", "GET")[0] == 200


def test_a_slow_body_does_not_end_the_watch_for_the_first_token():
    async def slow(scope, receive, send):
        await asyncio.sleep(0.15)  # a body that trickles in
        scope[SCOPE].asked(**TOOLS, max_tokens=5)
        await asyncio.sleep(5)

    status, _, body = ask(observed(Deadlines(slow, 0, 0.1, 0)))
    assert (status, json.loads(body)["error"]["code"]) == (503, "first_token_timeout")


def test_what_has_no_first_token_is_not_timed_by_it():
    async def scores(scope, receive, send):
        scope[SCOPE].asked(**TOOLS, prompt_tokens=9, max_tokens=0)
        await asyncio.sleep(0.3)
        await JSONResponse({})(scope, receive, send)

    assert ask(observed(Deadlines(scores, 0, 0.05, 0)))[0] == 200


@pytest.mark.parametrize(("admitted", "status"), [(True, 200), (False, 503)])
def test_what_comes_at_once_is_timed_until_it_leaves_the_queue(admitted, status):
    async def beams(scope, receive, send):
        scope[SCOPE].asked(**TOOLS, max_tokens=9, at_once=True)
        if admitted:
            scope[SCOPE].admitted()
        await asyncio.sleep(0.4)
        await JSONResponse({})(scope, receive, send)

    assert ask(observed(Deadlines(beams, 0, 0.1, 0)))[0] == status


def test_a_line_that_a_full_disk_has_cut_takes_no_other_with_it(tmp_path, monkeypatch):
    warnings, write = [], os.write
    log = LineLog(str(tmp_path / "log"), warn=warnings.append)
    log.write({"n": 1})
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    log.write({"n": 2})
    monkeypatch.setattr(files.os, "write", write)
    log.write({"n": 3})
    log.write({"n": 4})
    log.close()
    assert (tmp_path / "log").read_text().splitlines() == ['{"n": 1}', '{"n":', '{"n": 3}', '{"n": 4}']
    assert "No space left" in warnings[0]
