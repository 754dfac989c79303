"""The server against all that its OpenAPI description makes possible, by schemathesis, and against what it does not."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from urllib.parse import urlencode

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse

from llmctl_serve import tokens

LOOSER = "positive_data_acceptance"
"""Not checked: rules that span fields, and the vocabulary, are in no schema, so what fits one may be a 400."""
WITHOUT_KEY = ("--exclude-path-regex", "^/admin")
"""Without an admin's key nothing is said of those routes but 403, whatever the method."""
CHAT = {"messages": [{"role": "user", "content": "dedent?"}], "max_tokens": 3}
BODIES = {
    "/v1/chat/completions": CHAT | {"temperature": 0.5, "logprobs": True, "top_logprobs": 2, "stop": ["x"], "n": 2},
    "/v1/completions": {"prompt": "ab", "max_tokens": 3, "logprobs": 1, "echo": True, "logit_bias": {"70": 2}},
    "/v1/embeddings": {"input": ["ab", "c"], "encoding_format": "float"},
    "/v1/tokenize": {"prompt": "ab", "add_special_tokens": True},
    "/v1/detokenize": {"tokens": [70, 71], "skip_special_tokens": True},
    "/admin/models": {"name": "other", "ref": "nowhere"},
}


def schemathesis(server, folder, *more: str) -> tuple[int, str, int]:
    """(exit code, report, number of requests) of a run of schemathesis' own command, the same for the same seed."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.base}/openapi.json", "--url", server.base]
    command += ["--seed", "1", "--request-timeout", "30", "--suppress-health-check", "all", "--no-shrink"]
    command += ["--checks", "all", "--exclude-checks", LOOSER, *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)
    tried = re.search(r"(\d+) generated", done.stdout)
    return done.returncode, done.stdout[-5000:] + done.stderr[-2000:], int(tried[1]) if tried else 0


def answered(server, route: str, status: int = 200) -> int:
    """How many requests of a route have ended with this status so far."""
    samples = next(m.samples for m in server.metrics.registry.collect() if m.name == "llmctl_requests")
    wanted = {"route": route, "status": str(status)}
    return int(sum(s.value for s in samples if s.name.endswith("_total") and wanted.items() <= s.labels.items()))


@pytest.fixture(scope="module")
def real(real_models, serving):
    with serving(real_models[1], max_new_tokens=8) as found:
        yield found


def check_run(server, folder, *more: str, least: int) -> None:
    code, report, tried = schemathesis(server, folder, *more)
    assert code == 0, report
    assert tried >= least
    assert not server.warnings, server.warnings[:3]


def test_schemathesis_finds_no_failure(real, tmp_path):
    """Bodies that are right and wrong for every operation, unknown methods, links from answer to request."""
    check_run(real, tmp_path, "--max-examples", "10", *WITHOUT_KEY, least=1000)
    for route in ("/v1/completions", "/v1/tokenize", "/v1/detokenize", "/v1/models"):
        assert answered(real, route), f"{route} was never asked for something that it does"


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_schemathesis_finds_no_failure_in_a_long_run(real, tmp_path):
    check_run(real, tmp_path, "--max-examples", "25", "--max-time", "90", *WITHOUT_KEY, least=3000)


@pytest.mark.slow
def test_administration_withstands_it_too(scripted, byte_tokenizer, running, tmp_path):
    key = ("--header", "Authorization: Bearer secret")
    with running(scripted(byte_tokenizer), api_key="secret") as server:
        check_run(server, tmp_path, "--include-path-regex", "^/admin", "--max-examples", "10", *key, least=100)
        assert answered(server, "/admin/models", 400) > 3


@pytest.mark.parametrize(
    ("fault", "title"),
    [("raises", "server error"), ("type", "violates schema"), ("status", "undocumented status code")],
)
@pytest.mark.slow
def test_a_planted_fault_is_found(scripted, byte_tokenizer, running, monkeypatch, tmp_path, fault, title):
    """The control: a route that goes wrong on some inputs alone, texts of more than five tokens."""

    def response(content):
        if content["count"] <= 5:
            return JSONResponse(content)
        if fault == "raises":
            raise KeyError("planted")
        if fault == "type":
            content["count"] = str(content["count"])
        return JSONResponse(content, 206 if fault == "status" else 200)

    monkeypatch.setattr(tokens, "JSONResponse", response)
    with running(scripted(byte_tokenizer)) as server:
        more = ("--include-path", "/v1/tokenize", "--phases", "fuzzing", "--max-examples", "60")
        code, report, _ = schemathesis(server, tmp_path, *more)
    assert code == 1
    assert title in report.lower()


# -- what no schema describes: bytes, kinds of content, headers, queries ----------------------------------------------

CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**400, "\ud800", "\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KINDS = st.sampled_from(
    ["application/json", "application/json; charset=utf-16", "APPLICATION/JSON", "text/plain", "application/xml", ""]
    + ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/problem+json", "/;=,"]
) | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)
NAMES = st.sampled_from(
    ["Accept", "Accept-Encoding", "Authorization", "Content-Encoding", "Cookie", "Expect", "If-None-Match", "Origin"]
    + ["Range", "Referer", "traceparent", "tracestate", "User-Agent", "X-Forwarded-For", "X-Request-Id", "X-Odd"]
)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=60)
QUERIES = st.dictionaries(CHARACTERS, CHARACTERS, max_size=3)


@st.composite
def damaged(draw, path: str) -> bytes:
    """A right body with something else in one place; or any JSON, cut JSON, nesting without end, or any bytes."""
    body = json.loads(json.dumps(BODIES.get(path, CHAT)))
    how = draw(st.sampled_from(["value", "key", "any", "cut", "deep", "bytes", "right"]))
    if how == "value":
        body[draw(st.sampled_from(sorted(body)))] = draw(ANY)
    elif how == "key":
        body[draw(st.text(max_size=12))] = draw(ANY)
    elif how == "any":
        body = draw(ANY)
    elif how == "deep":
        return b'{"messages":' + b"[" * draw(st.sampled_from([100, 1000, 100_000]))
    elif how == "bytes":
        return draw(st.binary(max_size=80))
    raw = json.dumps(body).encode()
    return raw[: draw(st.integers(0, len(raw)))] if how == "cut" else raw


def conforms(described: dict, operation: dict, status: int, headers: dict, text: str) -> None:
    """A documented status, and a body of the form that is documented for it."""
    if status == 503:
        assert headers.get("retry-after")
    assert status < 500 or status == 503, text
    expected = operation["responses"].get(str(status))
    assert expected is not None or status == 405, (status, text)
    kind = headers["content-type"].partition(";")[0]
    schema = {"$ref": "#/components/schemas/ErrorBody"}
    if status != 405:
        schema = expected["content"][kind]["schema"]
    if kind == "application/json":
        judge(described, schema).validate(json.loads(text))
    elif kind == "text/event-stream":
        chunk = schema["properties"]["data"]["anyOf"][1]["contentSchema"]
        *events, last = [line.removeprefix("data: ") for line in text.split("\n") if line]
        for event in events:
            judge(described, chunk).validate(json.loads(event))
        assert last == "[DONE]"
    else:
        assert kind == "text/plain"


def judge(described: dict, schema: dict) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**schema, "components": described["components"]})


@settings(max_examples=400, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
@pytest.mark.slow
def test_what_no_schema_describes_is_answered_in_form(real, data):
    described = real.app.openapi()
    operations = [(path, method) for path, found in described["paths"].items() for method in found]
    path, method = data.draw(st.sampled_from(operations))
    filled = re.sub(r"\{[^}]*\}", lambda _: data.draw(st.sampled_from(["byte-model", "x", "a%2Fb", "%ff"])), path)
    query = data.draw(st.just("") | QUERIES.map(lambda found: "?" + urlencode(found)))
    headers = data.draw(st.dictionaries(NAMES, VALUES, max_size=2))
    body = None
    if method == "post" or data.draw(st.integers(0, 4)) == 0:
        body = data.draw(damaged(path))
        headers["Content-Type"] = data.draw(st.just("application/json") | KINDS)
    status, text, found = ask(real, method.upper(), filled + query, body, headers)
    if status == 400 and json.loads(text)["error"]["code"] == "invalid_http":  # no route has seen it
        return
    conforms(described, described["paths"][path][method], status, found, text)


def ask(server, method, path, body, headers) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    try:
        connection.request(method, path, body, {k: v.encode("latin-1") for k, v in headers.items()})
        response = connection.getresponse()
        return response.status, response.read().decode(), {k.lower(): v for k, v in response.getheaders()}
    finally:
        connection.close()


# -- right requests: fields that fit together ------------------------------------------------------------------------

COMMON = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(0, 2**31 - 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 10),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 255).map(str), st.floats(-100, 100), max_size=3),
    "n": st.integers(1, 3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": CHARACTERS.filter(bool) | st.lists(CHARACTERS.filter(bool), max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 255), max_size=4),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "max_tokens": st.integers(1, 2**31 - 1),
    "metadata": ANY,
}
FORMS = st.sampled_from(
    [{"guided_json": {"type": "integer"}}, {"guided_regex": "[ab]+"}, {"guided_choice": ["é", "no"]}]
    + [{"guided_grammar": 'start: "a" start?'}, {"structured_outputs": {"json_object": True}}]
)
CHATS = FORMS | st.sampled_from(
    [{"response_format": {"type": "json_object"}}, {"logprobs": True, "top_logprobs": 20}, {"logprobs": True}]
    + [{"stream": True, "stream_options": {}}, {"stream": True, "stream_options": {"include_usage": True}}]
)
TEXTS = FORMS | st.sampled_from(
    [{"echo": True}, {"echo": True, "logprobs": 3, "max_tokens": 0}, {"logprobs": 0}, {"stream": False, "best_of": 4}]
)


@settings(max_examples=80, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_right_requests_are_answered_as_described(real, data):
    fields = {"max_tokens": 4, **data.draw(st.fixed_dictionaries({}, optional=COMMON))}
    if data.draw(st.booleans()):
        path = "/v1/chat/completions"
        says = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": CHARACTERS})
        body = {"messages": data.draw(st.lists(says, min_size=1, max_size=2)), **fields, **data.draw(CHATS)}
    else:
        path = "/v1/completions"
        ids = st.lists(st.integers(0, 261), min_size=1, max_size=20)
        prompts = CHARACTERS | ids | st.lists(CHARACTERS, min_size=1, max_size=3)
        body = {"prompt": data.draw(prompts), **fields, **data.draw(TEXTS)}
    status, text, headers = ask(real, "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    described = real.app.openapi()
    assert status == 200, text
    conforms(described, described["paths"][path]["post"], status, headers, text)
