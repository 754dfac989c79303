"""`llmctl bench` against a server whose delays and faults are planned: it must find them again."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import re
import subprocess
import sys
import time
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from llmctl import InputError, StageError, UsageError
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve import endpoint, http_client
from llmctl_serve.bench import load as load_module
from llmctl_serve.bench.command import bench, token_counter
from llmctl_serve.bench.load import Load, Record, Runner
from llmctl_serve.bench.prompts import Lengths, Prompt, linear_counter, make_prompts, parse_lengths, read_prompts
from llmctl_serve.bench.summary import meets, parse_limits, pooled_quantiles, quantile, summarise
from llmctl_serve.endpoint import parse_endpoint, read_retry_after
from llmctl_serve.http_client import HttpClient

from .stub import Plan, Stub

NEAR = 0.03
"""Seconds that this machine may add to a planned delay."""


def measured(stub, load, plan_prompts=None, timeout=10.0, **limits):
    """(summary, records) of one load."""

    async def run():
        client = HttpClient(parse_endpoint(stub.url), timeout)
        try:
            prompts = plan_prompts or [Prompt("hello", 8)]
            return await Runner(client, "stub", True).run(load, prompts, 0, lambda *_: None)
        finally:
            await client.close()

    records = asyncio.run(run())
    return summarise(load, records, limits), records


def invoke(*args):
    result = CliRunner().invoke(bench, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_planted_percentiles_are_found():
    # 20 requests, one in ten of them slow: p50 is that of the fast, p95 and p99 those of the slow.
    def plan(number, body):
        return Plan(["a"] * 5, ttft=0.3 if number % 10 == 0 else 0.1, itl=0.02)

    with Stub(plan) as stub:
        found, _ = measured(stub, Load("closed", 4, requests=20))
    assert found["answered"] == found["requests"] == 20
    assert 0.1 <= found["ttft"]["p50"] < 0.1 + NEAR
    assert 0.3 - 0.001 <= found["ttft"]["p99"] < 0.3 + 40 * NEAR  # the largest of all: one stall is enough
    assert 0.015 <= found["itl"]["p50"] < 0.02 + NEAR / 2
    assert found["tpot"]["p50"] == pytest.approx(0.02, abs=NEAR / 2)
    assert 0.18 <= found["e2e"]["p50"] < 0.18 + 2 * NEAR
    assert found["output_tokens"] == 100
    assert found["output_tokens_per_s"] == pytest.approx(100 / found["seconds"])


def test_a_stall_is_charged_to_all_who_would_have_waited():
    # Arrivals every 20 ms; the server answers nothing for a second, beginning with the first request, so that a busy
    # machine only makes the others wait longer. In a closed loop one request would suffer.
    ends = []

    def plan(number, body):
        ends.append(time.perf_counter() + 1.0)
        return Plan(["a"], ttft=max(0.0, ends[0] - time.perf_counter()))

    with Stub(plan) as stub:
        found, records = measured(stub, Load("poisson", 50, requests=50))
    assert found["ttft"]["p50"] > 0.3
    assert found["ttft"]["max"] > 0.9
    assert sum(record.ttft > 0.1 for record in records) > 35
    # Hardly one waited for the answer before.
    assert sum(later.sent < earlier.end for earlier, later in pairwise(records)) > 30
    assert found["client_lag"]["max"] == max(record.sent - record.intended for record in records)


def test_arrivals_are_those_of_a_poisson_process_and_come_again_with_their_seed():
    from scipy import stats

    load = Load("poisson", 10, requests=2000)
    times = list(load.arrivals(1))
    assert times == list(load.arrivals(1)) != list(load.arrivals(2))
    assert stats.kstest(np.diff(times), "expon", args=(0, 0.1)).pvalue > 0.01
    bursts = list(Load("poisson", 10, requests=2000, burst=8).arrivals(1))
    assert [bursts.count(at) for at in sorted(set(bursts))] == [8] * 250
    assert max(bursts) == pytest.approx(200, rel=0.2)  # the rate is still 10 a second
    assert max(Load("poisson", 10, seconds=5).arrivals(1)) < 5


def test_failures_are_counted_by_kind_and_the_rest_is_measured():
    faults = ["", "status", "broken", "cut", "error event", "garbage", "close", "hang", "", ""]
    with Stub(lambda number, body: Plan(fault=faults[number])) as stub:
        found, records = measured(stub, Load("closed", 1, requests=10), timeout=0.5, e2e=10.0)
    assert found["errors"] == {
        "broken off": 3, "status 500": 1, "error event": 1, "protocol": 1, "timeout": 1,
    }  # fmt: skip
    assert [record.error is None for record in records] == [not fault for fault in faults]
    assert found["answered"] == 3
    assert found["goodput"]["share"] == 0.3
    assert "planted" in found["error_examples"]["status 500"]
    assert found["ttft"]["n"] == 3


def test_rejects_are_counted_apart_with_their_hints():
    """429, and 503 that says when to come back; one that does not is a server that stops or has failed."""
    plans = {
        1: Plan(fault="status", status=429, headers={"Retry-After": "2"}),
        3: Plan(fault="status", status=429, headers={"Retry-After": "3", "retry-after-ms": "2500"}),
        4: Plan(fault="status", status=503, headers={"Retry-After": "7"}),
        6: Plan(fault="status", status=503),
        7: Plan(fault="status", status=429),
        8: Plan(fault="status", status=500, headers={"Retry-After": "1"}),
    }
    with Stub(lambda number, body: plans.get(number, Plan())) as stub:
        found, records = measured(stub, Load("closed", 1, requests=10), e2e=10.0)
    assert (found["answered"], found["failed"], found["rejected"]["requests"]) == (4, 2, 4)
    assert found["errors"] == {"status 503": 1, "status 500": 1}
    assert found["rejected"]["kinds"] == {
        "status 429": {
            "requests": 3, "hinted": 2, "retry_after": {"min": 2, "median": 2.25, "max": 2.5}, "example": "planted",
        },
        "status 503": {
            "requests": 1, "hinted": 1, "retry_after": {"min": 7, "median": 7, "max": 7}, "example": "planted",
        },
    }  # fmt: skip
    assert [number for number, record in enumerate(records) if record.rejected] == [1, 3, 4, 7]
    assert found["goodput"]["share"] == 0.4


def test_retry_hints_are_read_as_they_may_be_written():
    def later(seconds):
        return formatdate(time.time() + seconds, usegmt=True)

    for headers, seconds in (
        ({}, None),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "300", "retry-after": "1"}, 0.3),
        ({"retry-after-ms": "x", "retry-after": "1"}, 1),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": later(-100)}, 0),
    ):
        assert read_retry_after(headers) == seconds, headers
    assert read_retry_after({"retry-after": later(90)}) == pytest.approx(90, abs=2)


def test_every_kind_of_failure_is_documented():
    sources = [http_client, endpoint, load_module]
    raised = {
        kind for module in sources for kind in re.findall(r'HttpFailure\(\s*f?"([a-zA-Z ]+)', inspect.getsource(module))
    }
    assert {"status ", "timeout", "no stream", "bad event", "too large", "empty answer", "protocol"} <= raised
    page = (Path(__file__).parents[2] / "docs" / "chat-and-bench.md").read_text(encoding="utf-8")
    line = page[page.index("* Failures are counted by kind") :]
    for kind in raised:
        assert f"`{kind}" in line, kind


def test_a_server_that_is_not_there():
    with Stub() as stub:
        url = stub.url
    with pytest.raises(StageError, match="no connection"):
        invoke("--url", url)


def test_connections_are_used_again():
    with Stub() as stub:
        measured(stub, Load("closed", 2, requests=20))
    assert len(stub.bodies) == 20
    assert stub.connections == 2


def test_goodput_of_records_whose_times_are_known():
    def record(first, gap, count=4):
        return Record(1.0, 1.0, [1 + first + i * gap for i in range(count)], 1 + first + count * gap)

    fine, late, halting = record(0.1, 0.02), record(0.5, 0.02), record(0.1, 0.2)
    limits = parse_limits("ttft=200ms, itl=0.05s")
    assert limits == {"ttft": 0.2, "itl": 0.05}
    assert [meets(one, limits) for one in (fine, late, halting)] == [True, False, False]
    assert meets(halting, {"ttft": 0.2})
    failed = record(0.1, 0.02)
    failed.error = "timeout"
    found = summarise(Load("closed", 1, requests=4), [fine, late, halting, failed], limits)
    assert found["goodput"]["share"] == 0.25
    assert found["goodput"]["requests_per_s"] == pytest.approx(0.25 * 4 / found["seconds"])
    assert fine.tpot == pytest.approx(0.02)
    for wrong in ("ttft=200", "speed=1s", "ttft=0ms", "ttft", ",", "", "ttft=1s,", "ttft=nans", "ttft=infs"):
        with pytest.raises(UsageError, match="is no limit"):
            parse_limits(wrong)
    with pytest.raises(UsageError, match="`ttft` has two limits"):
        parse_limits("ttft=1s,ttft=2s")


@pytest.mark.parametrize("size", [5, 37, 400])
def test_intervals_are_those_of_scipy(size):
    from scipy import stats

    values = list(np.random.default_rng(size).exponential(size=size))
    for level in (50, 90, 95, 99):
        ours = quantile(values, level)
        theirs = stats.quantile_test(values, p=level / 100).confidence_interval(0.95)
        assert ours.value == pytest.approx(np.percentile(values, level))
        for mine, other in ((ours.low, theirs.low), (ours.high, theirs.high)):
            assert (mine is None and np.isnan(other)) or mine == other


def test_the_interval_of_gaps_knows_that_those_of_one_answer_are_alike():
    rng = np.random.default_rng(0)
    groups = [list(np.full(50, level)) for level in rng.exponential(size=30)]
    grouped = pooled_quantiles(groups)[50]
    alone = quantile([value for group in groups for value in group], 50)
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_lengths_follow_their_distributions():
    def draw(text):
        rng = random.Random(0)
        return [parse_lengths(text).draw(rng) for _ in range(4000)]

    assert set(draw("12")) == {12}
    assert (min(draw("uniform:3:9")), max(draw("uniform:3:9"))) == (3, 9)
    logs = np.log(draw("lognormal:200:0.5"))
    assert np.median(logs) == pytest.approx(np.log(200), abs=0.05)
    assert logs.std() == pytest.approx(0.5, abs=0.03)
    for wrong in (
        "0", "-1", "uniform:9:3", "lognormal:5", "normal:1:2", "x", "", "9" * 9, f"uniform:1:{'9' * 9}",
        "lognormal:inf:1", "lognormal:nan:1", "lognormal:9:nan", "12,", "nan",
    ):  # fmt: skip
        with pytest.raises(UsageError, match="no length in tokens"):
            parse_lengths(wrong)


def test_made_up_prompts_have_their_lengths_and_their_shared_beginning(byte_tokenizer):
    counter = token_counter(byte_tokenizer, True)
    prompts = make_prompts(20, Lengths("uniform", 60, 90), Lengths("fixed", 7), 0.5, counter, 3)
    counts = [counter(prompt.content) for prompt in prompts]
    assert all(50 <= count <= 90 for count in counts)
    assert len({prompt.content[:20] for prompt in prompts}) == 1
    assert len({prompt.content for prompt in prompts}) == 20
    apart = make_prompts(20, Lengths("fixed", 60), Lengths("fixed", 7), 0.0, counter, 3)
    assert len({prompt.content[:12] for prompt in apart}) > 15
    assert [p.content for p in apart] == [
        p.content for p in make_prompts(20, Lengths("fixed", 60), Lengths("fixed", 7), 0.0, counter, 3)
    ]
    exact = make_prompts(5, Lengths("fixed", 100), Lengths("fixed", 7), 0.25, linear_counter(5, 1), 0)
    assert [len(prompt.content.split()) for prompt in exact] == [95] * 5


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"messages": [{"role": "user", "content": "b"}], "max_tokens": 3}\n')
    first, second = read_prompts(path, True, Lengths("fixed", 9), 0)
    assert (first.content, first.max_tokens, second.max_tokens) == ("a", 9, 3)
    with pytest.raises(InputError, match=r"prompts.jsonl:3 holds messages"):
        read_prompts(path, False, Lengths("fixed", 9), 0)
    path.write_text(
        '{"prompt": "a", "id": 7, "topic": "t", "temperature": 0.5, "stop": "x", "logprobs": 2, "seed": 1}\n'
    )
    for chat, scores in ((True, {"logprobs": True, "top_logprobs": 2}), (False, {"logprobs": 2})):
        (only,) = read_prompts(path, chat, Lengths("fixed", 9), 0)
        sent = json.loads(only.payload(chat, "m", {"temperature": 1, "top_k": 3}))
        assert {name: sent[name] for name in ("max_tokens", "temperature", "top_k", "stop", "seed")} == {
            "max_tokens": 9, "temperature": 0.5, "top_k": 3, "stop": ["x"], "seed": 1,
        }  # fmt: skip
        assert {name: sent[name] for name in scores} == scores and not {"id", "topic"} & set(sent)
    for wrong, fault in (
        ('"max_tokens": null', "`max_tokens` is null"), ('"max_tokens": "x"', "`max_tokens` is"),
        ('"max_tokens": [1]', "`max_tokens` is"), ('"max_tokens": 0', "at least 1"),
        ('"temperature": -1', "temperature"), ('"beams": 2', "no beams"), ('"stop": [1]', "`stop` is no list"),
    ):  # fmt: skip
        path.write_text(f'{{"prompt": "a"}}\n{{"prompt": "b", {wrong}}}\n')
        with pytest.raises(InputError, match=rf"prompts.jsonl:2: .*{fault}"):
            read_prompts(path, True, Lengths("fixed", 9), 0)
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(InputError, match=r"prompts.jsonl:2 is no JSON"):
        read_prompts(path, True, Lengths("fixed", 9), 0)


def test_no_load_is_asked_what_an_earlier_one_was():
    """A server that keeps prefixes would else answer the later loads faster."""
    with Stub() as stub:
        result = invoke(
            "--url", stub.url, "--api", "chat", "--concurrency", "1,2", "--rate", 500, "--requests", 6, "--warmup", 3,
            "--prompt-tokens", 40,
        )  # fmt: skip
    asked = [body["messages"][-1]["content"] for body in stub.bodies[2:]]  # after those that measure words
    assert len(asked) == len(set(asked)) == 3 + 3 * 6
    assert "different prompts" not in result.stderr  # that a busy client was late may be said


def test_prompts_of_a_short_file_come_again_and_that_is_said(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(8)))
    flags = ("--api", "completions", "--requests", 4, "--warmup", 1, "--input", path)
    for loads, warned in (("1", ""), ("1,1", "warning: 9 requests had 8 different prompts")):
        with Stub() as stub:
            result = invoke("--url", stub.url, "--concurrency", loads, *flags, "--json", tmp_path / "x.json")
        asked = [body["prompt"] for body in stub.bodies]
        assert asked == [f"p{n % 8}" for n in range(len(asked))]
        assert warned in result.stderr and bool(warned) == ("different prompts" in result.stderr)
        written = json.loads((tmp_path / "x.json").read_text())["prompts"]
        assert (written["different"], written["asked"]) == (8, len(asked))
    path.write_text('{"prompt": "same"}\n' * 9)
    with Stub() as stub:
        assert "warning: 5 requests had 1 different" in invoke("--url", stub.url, *flags).stderr


@pytest.mark.parametrize("usage", [True, False])
def test_times_are_of_one_answer_where_several_are_asked_for(usage):
    with Stub(lambda number, body: Plan(["a"] * 5, itl=0.02, usage=usage)) as stub:
        found, records = measured(stub, Load("closed", 1, requests=2), [Prompt("hello", 8, {"n": 3})])
    assert found["output_tokens"] == 2 * 3 * 5  # all were made
    assert [len(record.tokens) for record in records] == [5, 5]
    assert found["tpot"]["p50"] > 0.01
    assert found["tpot"]["p50"] == pytest.approx(np.mean(records[0].gaps + records[1].gaps), rel=0.01)


def test_the_command_prints_a_table_and_writes_numbers_and_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_KEY", "secret")
    plan = lambda number, body: Plan(["a"] * 4, ttft=0.01, itl=0.002)  # noqa: E731
    with Stub(plan) as stub:
        result = invoke(
            "--url", stub.url, "--concurrency", "1,4", "--rate", "40", "--burst", 2, "--requests", 8, "--warmup", 3,
            "--prompt-tokens", 25, "--output-tokens", 4, "--api-key-env", "BENCH_KEY", "--slo", "ttft=1s",
            "--body", '{"temperature": 0}', "--json", tmp_path / "x.json", "--html", tmp_path / "x.html",
        )  # fmt: skip
    lines = result.stdout.splitlines()
    assert lines[0].startswith("stub at http://127.0.0.1:")
    assert [line.split("  ")[0] for line in lines[2:]] == ["1 at a time", "4 at a time", "40/s in bursts of 2"]
    assert all("100.0 %" in line for line in lines[2:])
    written = json.loads((tmp_path / "x.json").read_text())
    assert [load["requests"] for load in written["loads"]] == [8, 8, 8]  # the warm-up is not counted
    assert [len(load["records"]) for load in written["loads"]] == [8, 8, 8]
    assert written["loads"][0]["prompt_tokens"] == 8 * 25
    real = [body for body in stub.bodies if body.get("stream") and body["max_tokens"] == 4]
    assert len(real) == 3 * 8 + 3
    assert all(body["temperature"] == 0 and body["model"] == "stub" for body in real)
    assert {headers["authorization"] for headers in stub.headers} == {"Bearer secret"}
    page = (tmp_path / "x.html").read_text()
    assert page.count("<svg") == 7
    assert "Throughput against" in page
    assert "http" not in page.replace(stub.url, "")  # nothing is fetched


def test_a_load_that_ends_by_time():
    with Stub(lambda number, body: Plan(ttft=0.05)) as stub:
        found, records = measured(stub, Load("closed", 2, seconds=0.5))
    assert 4 <= found["requests"] <= 22  # 20 on a machine that does nothing else
    assert max(record.intended for record in records) < 0.5 <= found["seconds"] + 0.06


def test_the_client_is_cheap():
    """Its own cost per token, against a server that says everything at once: below a fifth of a millisecond."""
    with Stub(lambda number, body: Plan(["word"] * 200)) as stub:
        _, records = measured(stub, Load("closed", 1, requests=10))
    assert min(record.tpot for record in records) < 0.0002


def test_as_many_users_ask_at_a_time_as_the_table_says():
    running = most = 0

    def plan(number, body):
        return Plan(["a"], ttft=0.2)

    with Stub(plan) as stub:
        whole = stub._answer

        async def answer(path, *given):
            nonlocal running, most
            running += path.endswith("completions")
            most = max(most, running)
            try:
                return await whole(path, *given)
            finally:
                running -= path.endswith("completions")

        stub._answer = answer
        result = invoke("--url", stub.url, "--concurrency", 100, "--warmup", 0)
    assert most == 100
    assert "100 at a time  400" in result.stdout.splitlines()[2]


def test_a_narrow_terminal_loses_no_digit(tmp_path):
    with Stub(lambda number, body: Plan(["a"] * 4)) as stub:
        code = (
            "import sys; sys.stdout.isatty = lambda: True\nfrom llmctl_serve.bench.command import bench; bench.main()"
        )
        arguments = ["--url", stub.url, "--concurrency", "1,4", "--requests", "8", "--slo", "ttft=1s"]
        env = {**os.environ, "COLUMNS": "60", "TERM": "xterm"}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    assert done.stdout.count("100.0 %") == 2


def test_what_was_measured_is_written_before_it_is_shown(tmp_path, monkeypatch):
    """`llmctl bench … | head -1` ends the command in the middle of its table."""

    def gone(_):
        raise BrokenPipeError

    monkeypatch.setattr("llmctl_serve.bench.command.show", gone)
    with Stub() as stub, pytest.raises(BrokenPipeError):
        invoke("--url", stub.url, "--requests", 2, "--json", tmp_path / "x.json", "--html", tmp_path / "x.html")
    assert json.loads((tmp_path / "x.json").read_text())["loads"][0]["answered"] == 2
    assert "<svg" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ({"choices": [None]}, "bad event"),
        ({"choices": [{"delta": "x"}]}, "bad event"),
        ({"choices": [{"delta": {"content": 5}}]}, "bad event"),
        ({"choices": [{"delta": None, "text": "a"}], "usage": [1]}, None),
        ({"choices": [{"delta": {"content": "a"}}], "usage": {"completion_tokens": "3"}}, None),
    ],
)
def test_strange_events_are_failures_of_their_request(event, error):
    class Strange(Stub):
        def _choice(self, *given, **more):
            return event

    with Strange(lambda number, body: Plan(["a"], usage=False)) as stub:
        found, records = measured(stub, Load("closed", 1, requests=2))
    assert [record.error for record in records] == [error] * 2
    assert found["output_tokens"] == (0 if error else sum(len(record.tokens) for record in records))


def test_an_answer_ends_where_it_says_so_and_one_piece_has_no_pace():
    class Late:
        async def stream(self, path, payload, take):
            event = {"choices": [{"delta": {"content": "a b c"}}], "usage": {"completion_tokens": 64}}
            take(b"data: " + json.dumps(event).encode())
            take(b"data: [DONE]")
            await asyncio.sleep(0.5)

    record = asyncio.run(Runner(Late(), "m", True).ask(Prompt("hello", 8), time.perf_counter(), 0.0))
    assert record.e2e < 0.5
    assert (record.count, record.tpot) == (64, None)


def test_tokens_that_a_server_does_not_count_are_said_to_be_pieces(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    for usage in (True, False):
        with Stub(lambda number, body, usage=usage: Plan(usage=usage)) as stub:
            said = invoke("--url", stub.url, "--requests", 3, "--input", tmp_path / "in.jsonl").stderr
        assert ("warning: the server does not say how many tokens 3 answers have" in said) != usage


def test_options_that_make_no_sense(tmp_path):
    for arguments, text in (
        (["--url", "ftp://x"], "no address of a server"),
        (["--url", "http://x", "model"], "both a model and --url"),
        (["--url", "http://x", "--concurrency", "0"], "no positive number"),
        (["--url", "http://x", "--rate", ","], "--rate `,` holds what is no positive number"),
        (["--url", "http://x", "--rate", "", "--concurrency", "2"], "--rate `` holds"),
        (["--url", "http://x", "--concurrency", " , "], "no positive number"),
        (["--url", "http://x", "--concurrency", "1,,4"], "--concurrency `1,,4` holds"),
        (["--url", "http://x", "--concurrency", "1,4,"], "--concurrency `1,4,` holds"),
        (["--url", "http://x", "--concurrency", "1.5"], "no positive number"),
        (["--url", "http://x", "--concurrency", "nan"], "no positive number"),
        (["--url", "http://x", "--concurrency", "1,99999999"], "more than the 65535 connections"),
        (["--url", "http://x", "--rate", "1,nan"], "no positive number"),
        (["--url", "http://x", "--rate", "inf"], "no positive number"),
        (["--url", "http://x", "--rate", "1,-2"], "no positive number"),
        (["--url", "http://x", "--slo", ","], "`` is no limit"),
        (["--url", "http://x", "--slo", ""], "`` is no limit"),
        (["--url", "http://x", "--slo", "ttft=1s,,itl=1s"], "`` is no limit"),
        (["--url", "http://x", "--seconds", "nan"], "--seconds nan is no number"),
        (["--url", "http://x", "--seconds", "inf"], "--seconds inf is no number"),
        (["--url", "http://x", "--timeout", "nan"], "--timeout nan is no number"),
        (["--url", "http://x", "--prefix-share", "nan"], "--prefix-share nan is no number"),
        (["--url", "http://x", "--input", "x", "--prompt-tokens", "9"], "--prompt-tokens is of made-up prompts"),
        (["--url", "http://x", "--input", "x", "--prefix-share", "0.5"], "--prefix-share is of made-up prompts"),
        (["--url", "http://x", "--device", "cpu"], "of a server here"),
        (["--url", "http://x", "--threads", "2"], "of a server here"),
        (["model", "--model", "other"], "of a server elsewhere"),
        (["model", "--api-key-env", "HOME"], "of a server elsewhere"),
        (["--url", "http://x", "--burst", "2"], "--burst is of arrivals"),
        (["--url", "http://x", "--concurrency", "1,16", "--requests", "4"], "4 requests do not keep 16 users busy"),
        (["--url", "http://x", "--rate", "9,0.001", "--seconds", "1"], "no request falls into the 1 s of 0.001/s"),
        (["--url", "http://x", "--body", "[1]"], "no JSON object"),
        (["--url", "http://x", "--body", '{"temperature": NaN}'], "NaN is no number of JSON"),
        (["--url", "http://x", "--body", '{"stream": false}'], "--body gives `stream`"),
        (["--url", "http://x", "--body", '{"model": "m"}'], "--body gives `model`"),
        (["--url", "http://x", "--api-key-env", "NOT_THERE"], "NOT_THERE is not set"),
        (["--url", "http://x", "--json", str(tmp_path / "no" / "x")], "no directory"),
        (["--url", "http://x", "--html", str(tmp_path)], "cannot be written"),
        (["--url", "http://x", "--json", str(tmp_path / "x"), "--html", str(tmp_path / "x")], "name the same file"),
    ):
        with pytest.raises(UsageError, match=text) as caught:
            invoke(*arguments)
        assert caught.value.hint, arguments


@pytest.mark.slow
def test_a_bundle_is_served_and_measured(real_models, tmp_path):
    _, onnx = real_models
    result = invoke(
        onnx.path, "--concurrency", "1,2", "--requests", 6, "--prompt-tokens", 30, "--output-tokens", 8, "--threads", 1,
        "--json", tmp_path / "x.json",
    )  # fmt: skip
    assert "served here (chat)" in result.stdout
    written = json.loads((tmp_path / "x.json").read_text())
    tokenizer = Tokenizer.load(onnx.path)
    assert tokenizer.vocab_size == 262
    for load in written["loads"]:
        assert (load["answered"], load["errors"]) == (6, {})
        assert 6 * 15 <= load["prompt_tokens"] <= 6 * 30
