"""What `llmctl bench` says of the server by the server's own `/metrics`: its memory, its counts, its batches."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from llmctl_serve.bench import exposition
from llmctl_serve.bench.command import bench
from llmctl_serve.bench.exposition import Watched, agrees, describe, describe_memory, parse_exposition
from llmctl_serve.bench.load import Record
from llmctl_serve.bench.summary import add_speed_up

from .stub import Plan, Stub

MIB = 2**20


def invoke(*args):
    result = CliRunner().invoke(bench, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def flags(stub, tmp_path, *more):
    own = ("--url", stub.url, "--api", "chat", "--prompt-tokens", 20, "--output-tokens", 3)
    return (*own, "--json", tmp_path / "x.json", "--html", tmp_path / "x.html", *more)


def loads(tmp_path):
    return json.loads((tmp_path / "x.json").read_text())["loads"]


def test_the_exposition_is_read_as_prometheus_client_reads_it():
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    counter = Counter("requests", "Help with a # and {braces}.", ["route", "status"], registry=registry)
    counter.labels('/v1/"quoted\\"', "200").inc(3)
    counter.labels("/v1/x,y={z}", "429").inc()
    Gauge("gauge", "A gauge.", registry=registry).set(-1.5e-7)
    Histogram("seconds", "A histogram.", ["model"], registry=registry).labels("a b").observe(2)
    text = generate_latest(registry).decode()
    theirs = [one for family in text_string_to_metric_families(text) for one in family.samples]
    ours = parse_exposition(text)
    assert len(ours.samples) == len(theirs) > 20
    for (name, labels, value), other in zip(ours.samples, theirs, strict=True):
        unescaped = {key: text.replace('\\"', '"').replace("\\\\", "\\") for key, text in labels.items()}
        assert (name, unescaped, value) == (other.name, other.labels, other.value)
    assert ours.total("requests_total") == 4
    assert ours.total("requests_total", status="429") == 1
    assert ours.total("process_resident_memory_bytes") > MIB
    assert parse_exposition("<html>no metrics</html>").samples == []


@pytest.mark.parametrize("leak", [0, 3 * MIB], ids=["flat", "leaking"])
def test_memory_is_followed_through_a_load(tmp_path, monkeypatch, leak):
    monkeypatch.setattr(exposition, "EVERY", 0.01)
    with Stub(lambda number, body: Plan(ttft=0.02)) as stub:
        stub.metrics = lambda: f"process_resident_memory_bytes {100 * MIB + leak * len(stub.bodies)}\n"
        # By a clock that counts requests it does not matter when the machine is busy.
        monkeypatch.setattr(exposition, "time", SimpleNamespace(perf_counter=lambda: float(len(stub.bodies))))
        result = invoke(*flags(stub, tmp_path, "--requests", 40, "--warmup", 0))
    memory = loads(tmp_path)[0]["server"]["memory"]
    before, sent = 100 * MIB + 2 * leak, 40 * leak  # two requests measured the length of words
    assert (memory["first"], memory["last"], memory["largest"]) == (before, before + sent, before + sent)
    assert len(memory["samples"]) > 20
    assert memory["samples"][0][1] == before
    # From a quarter of the second half to the last one: the middle of 20 to 25 requests, and that of 35 to 40.
    expected = (before + 37.5 * leak) / (before + 22.5 * leak) - 1
    assert memory["late_growth"] == pytest.approx(expected, abs=0.06)
    assert (memory["late_growth"] > 0.1) == bool(leak)
    row = result.stdout.splitlines()[-1]
    assert ("226 MiB" in row and "+0.0 %" not in row) if leak else ("100 MiB" in row and "+0.0 %" in row)
    assert "Resident memory of the server, MiB" in (tmp_path / "x.html").read_text()


def test_a_passing_peak_is_the_largest_and_no_growth():
    samples = [(float(at), 100.0 + (50 if at in (3, 14) else 0) + (20 if at > 2 else 0)) for at in range(21)]
    found = describe_memory(samples)
    assert (found["first"], found["last"], found["largest"], found["late_growth"]) == (100, 120, 170, 0)
    assert describe_memory(samples[:4])["late_growth"] is None, "too few to tell"


def test_a_server_without_metrics_is_measured_and_that_is_said(tmp_path):
    for metrics, why in ((None, "status 404"), (lambda: "<html>", "no Prometheus text")):
        with Stub() as stub:
            stub.metrics = metrics
            result = invoke(*flags(stub, tmp_path, "--requests", 4))
        assert f"memory and counts are not known: no /metrics ({why})" in result.stderr
        assert "own /metrics" not in result.stdout
        assert loads(tmp_path)[0]["server"] is None
        assert f"no /metrics ({why})" in (tmp_path / "x.html").read_text()


def test_a_server_that_hides_its_memory_only_is_said_so(tmp_path):
    """As one without /proc does."""
    with Stub() as stub:
        stub.metrics = lambda: 'vllm:num_requests_running{model_name="m"} 0\n'
        result = invoke(*flags(stub, tmp_path, "--requests", 4))
    assert result.stderr.splitlines()[-1] == (
        "the server's memory is not known: its /metrics has no process_resident_memory_bytes"
    )
    assert "own /metrics" not in result.stdout
    assert "has no process_resident_memory_bytes" in (tmp_path / "x.html").read_text()


def test_rejects_are_shown_in_the_table_and_the_page(tmp_path):
    # The first two requests measure the length of words.
    refused = Plan(fault="status", status=429, headers={"Retry-After": "3"})
    with Stub(lambda number, body: refused if number in (3, 5) else Plan()) as stub:
        result = invoke(*flags(stub, tmp_path, "--requests", 8, "--warmup", 0))
    lines = result.stdout.splitlines()
    assert lines[1].split()[:4] == ["load", "requests", "failed", "rejected"]
    assert lines[2].split()[:6] == ["1", "at", "a", "time", "8", "0"] and lines[2].split()[6] == "2"
    assert lines[3] == "1 at a time: 2 rejected, status 429, to come back in 3.0 s: planted"
    page = (tmp_path / "x.html").read_text()
    assert "<h2>Rejects</h2>" in page and "to come back in 3.0 s" in page and "<h2>Failures</h2>" not in page
    with Stub() as stub:
        result = invoke(*flags(stub, tmp_path, "--requests", 4))
    assert "rejected" not in result.stdout and "<h2>Rejects</h2>" not in (tmp_path / "x.html").read_text()


def test_a_server_that_only_rejects_is_an_error(tmp_path):
    from llmctl import StageError

    refused = Plan(fault="status", status=429, headers={"Retry-After": "3"})
    said = r"no request was answered \(status 429: planted\)"
    with (
        Stub(lambda number, body: refused if number > 1 else Plan()) as stub,
        pytest.raises(StageError, match=said),
    ):
        invoke(*flags(stub, tmp_path, "--requests", 3, "--warmup", 0))
    assert loads(tmp_path)[0]["rejected"]["requests"] == 3


def test_speed_up_is_over_the_first_load_and_drawn_against_concurrency(tmp_path):
    """Answers of 40 ms each: twelve users get twelve times as many, on a machine that does nothing else."""
    with Stub(lambda number, body: Plan(["a"] * 4, ttft=0.04)) as stub:
        result = invoke(*flags(stub, tmp_path, "--concurrency", "1,12", "--rate", 100, "--requests", 24))
    one, twelve, rate = loads(tmp_path)
    assert (one["speed_up"], rate["speed_up"]) == (1, None)
    assert twelve["speed_up"] == pytest.approx(twelve["output_tokens_per_s"] / one["output_tokens_per_s"])
    assert twelve["speed_up"] > 1.5
    header, *rows = result.stdout.splitlines()[1:5]
    assert "speed-up" in header
    assert "  1.00x  " in rows[0] and f"  {twelve['speed_up']:.2f}x  " in rows[1] and "  -  " in rows[2]
    assert "<h3>Throughput against concurrency" in (tmp_path / "x.html").read_text()
    with Stub() as stub:
        result = invoke(*flags(stub, tmp_path, "--rate", "50,100", "--requests", 4))
    assert "speed-up" not in result.stdout
    assert "against concurrency" not in (tmp_path / "x.html").read_text()


def test_a_first_load_without_an_answer_has_no_speed_up():
    rows = [{"kind": "closed", "output_tokens_per_s": value} for value in (0.0, 5.0)]
    add_speed_up(rows)
    assert [row["speed_up"] for row in rows] == [None, None]


def test_counts_agree_only_if_they_are_the_same_status_by_status():
    fine, empty, busy, cut = Record(0.0), Record(0.0), Record(0.0), Record(0.0)
    empty.error, busy.error, cut.error = "empty answer", "status 429", "timeout"
    assert agrees({"200": 2, "429": 1}, [fine, empty, busy]) is True
    assert agrees({"200": 3}, [fine, empty, busy]) is False
    assert agrees({"200": 3, "429": 1}, [fine, empty, busy]) is False
    assert agrees({"200": 2, "429": 1}, [fine, empty, busy, cut]) is None


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(30, marks=pytest.mark.slow, id="half a minute"),
        pytest.param(600, marks=[pytest.mark.soak, pytest.mark.timeout(900)], id="ten minutes"),
    ],
)
def test_the_memory_of_a_loaded_server_stays_flat(real_models, tmp_path, request, seconds):
    """`llmctl bench` of a bundle, as a user would look for a leak: no growth above 3 % in the second half.

    The bias is against EOS: an answer of nothing would count as failed.
    """
    if seconds > 60 and "soak" not in (request.config.option.markexpr or ""):
        pytest.skip("ten minutes: run by hand with -m soak")
    lengths = ("--prompt-tokens", "uniform:20:60", "--output-tokens", "uniform:8:60")
    result = invoke(
        real_models[1].path, "--concurrency", 8, "--seconds", seconds, "--threads", 1, *lengths,
        "--body", '{"logit_bias": {"1": -100}}', "--json", tmp_path / "x.json",
    )  # fmt: skip
    print(result.stdout)
    (load,) = loads(tmp_path)
    server, memory = load["server"], load["server"]["memory"]
    assert (load["failed"], load["rejected"]["requests"], server["agrees"]) == (0, 0, True)
    assert server["requests"] == {"200": load["answered"]}
    assert server["completion_tokens"] == load["output_tokens"]
    assert len(memory["samples"]) > 0.8 * seconds
    assert memory["largest"] >= memory["last"] > 20 * MIB
    assert memory["late_growth"] < 0.03, memory


def test_an_adapter_is_advanced_by_the_engine_of_its_model():
    """Its tokens are counted by its own id, the batches by that of the model."""
    text = (
        'llmctl_build_info{{version="1"}} 1\n'
        'llmctl_completion_tokens_total{{model="m"}} 90\nllmctl_completion_tokens_total{{model="m:a"}} {tokens}\n'
        'llmctl_batch_size_count{{model="m"}} {passes}\nllmctl_batch_size_sum{{model="m"}} {advanced}\n'
    )
    before = parse_exposition(text.format(tokens=5, passes=10, advanced=20))
    after = parse_exposition(text.format(tokens=65, passes=30, advanced=80))
    for name, tokens in (("m:a", 60), ("m", 0)):
        seen = describe(Watched(before, after), name, [])
        assert (seen["completion_tokens"], seen["passes"], seen["mean_batch"]) == (tokens, 20, 3.0)
