"""The records of a pipe, line by line; the processes themselves are in tests/e2e/test_pipes.py."""

import json

import pytest

from llmctl.errors import InputError, UsageError
from llmctl.stage import In
from llmctl.upstream import Upstream, UpstreamFailed, parse_record

TOKENS, TOKENIZER = In("dataset.tokens"), In("tokenizer")
MODEL, CHAT = In("model.hf"), In("dataset.chat")


def hello(stage, stdin=False, kind="hello", **outputs):
    return json.dumps({"llmctl": kind, "v": 1, "stage": stage, "outputs": outputs, "stdin": stdin, "pid": 1}).encode()


def ref(port, type, id="sha256:1", **more):
    fields = {
        "llmctl": "ref",
        "v": 1,
        "port": port,
        "type": type,
        "id": id,
        "store": "file:///s",
        "path": "/s/a",
        **more,
    }
    return json.dumps(fields).encode()


def end(stage, code=0, **more):
    return json.dumps({"llmctl": "end", "v": 1, "stage": stage, "code": code, **more}).encode()


def upstream(*lines, ports, explicit=False):
    up = Upstream(ports, frozenset(name for name, port in ports.items() if not port.optional))
    for line in lines:
        up.feed(line)
    up.close(explicit=explicit)
    return up


def ids(bound):
    return {port: [found.id for found in refs] for port, refs in bound.items()}


def test_binding_is_by_name_then_by_type():
    up = upstream(
        hello("x", other="dataset.tokens", tokens="dataset.tokens", words="tokenizer"),
        ref("tokens", "dataset.tokens", "sha256:named"),
        ref("other", "dataset.tokens", "sha256:later"),
        ref("words", "tokenizer", "sha256:typed"),
        end("x"),
        ports={"tokens": TOKENS, "tokenizer": TOKENIZER},
    )
    assert ids(up.bind()) == {"tokens": ["sha256:named"], "tokenizer": ["sha256:typed"]}


def test_the_nearest_producer_wins():
    up = upstream(
        ref("model", "model.hf", "sha256:far", via=True),
        ref("model", "model.hf", "sha256:near", via=True),
        ref("metrics", "metrics"),
        ports={"model": MODEL},
    )
    assert ids(up.bind()) == {"model": ["sha256:near"]}


def test_a_port_for_several_takes_the_nearest_of_each_type():
    port = In("dataset.tokens", "dataset.chat", many=True)
    up = upstream(
        ref("chat", "dataset.chat", "sha256:a"),
        ref("chat", "dataset.chat", "sha256:b"),
        ref("tokens", "dataset.tokens", "sha256:c"),
        ports={"data": port},
    )
    assert ids(up.bind()) == {"data": ["sha256:b", "sha256:c"]}


def test_an_optional_port_may_stay_open():
    up = upstream(ref("model", "model.hf"), ports={"model": MODEL, "data": In("dataset.chat", optional=True)})
    assert set(up.bind()) == {"model"}


def test_one_reference_for_two_required_ports_is_refused():
    up = upstream(ref("model", "model.hf"), ports={"teacher": MODEL, "student": MODEL})
    with pytest.raises(UsageError, match="`teacher` and `student` would both be `model`"):
        up.bind()


def test_what_cannot_fit_is_refused_at_the_hello_of_the_head():
    with pytest.raises(
        UsageError, match=r"input `model` wants model.hf, the pipe offers tokenize.tokens \(dataset.tokens"
    ):
        upstream(hello("tokenize", tokens="dataset.tokens"), ports={"model": MODEL})


def test_a_hello_that_reads_stdin_itself_is_no_reason_to_refuse_yet():
    chain = [hello("train", stdin=True, model="model.hf"), hello("tokenize", stdin=True, kind="upstream")]
    ports = {"model": MODEL, "data": CHAT}
    up = Upstream(ports, frozenset(ports))
    for line in chain:
        up.feed(line)
    with pytest.raises(UsageError, match="input `data` wants dataset.chat"):
        up.feed(hello("data", kind="upstream", text="dataset.text"))


def test_an_unknown_or_open_type_may_fit():
    for kind in ("", "model.hf|model.onnx"):
        upstream(hello("quantize", model=kind), end("quantize"), ports={"model": MODEL})


def test_references_that_do_not_fit_are_refused_at_the_end():
    up = upstream(ref("tokens", "dataset.tokens"), ports={"model": MODEL})
    with pytest.raises(UsageError, match="input `model` wants model.hf"):
        up.bind()


def test_a_model_is_not_its_own_draft_or_encoder():
    ports = {"model": MODEL, "draft": In("model.hf", optional=True), "encoder": In("model.hf", optional=True)}
    piped = [hello("train", model="model.hf"), ref("model", "model.hf", "sha256:m"), end("train")]
    assert ids(upstream(*piped, ports=ports).bind()) == {"model": ["sha256:m"]}
    named = [*piped[:2], ref("draft", "model.hf", "sha256:d"), end("train")]
    assert ids(upstream(*named, ports=ports).bind()) == {"model": ["sha256:m"], "draft": ["sha256:d"]}
    # Where nothing else takes it, one optional port does; another would only be guessed.
    optional = {name: ports[name] for name in ("draft", "encoder")}
    assert ids(upstream(*piped, ports=optional).bind()) == {"draft": ["sha256:m"]}


@pytest.mark.parametrize("code", [1, 2, 3, 7, 75, 130])
def test_the_code_of_a_failed_upstream_is_ours(code):
    with pytest.raises(UpstreamFailed, match=f"upstream `tokenize` failed with exit {code}") as caught:
        upstream(hello("tokenize", tokens="dataset.tokens"), end("tokenize", code), ports={"tokens": TOKENS})
    assert caught.value.exit_code == code


def test_the_culprit_is_named_not_the_messenger():
    with pytest.raises(UpstreamFailed, match="upstream `data` failed with exit 3"):
        upstream(hello("tokenize", stdin=True), end("tokenize", 3, cause="data"), ports={"tokens": TOKENS})


def test_a_failure_before_hello_is_understood():
    with pytest.raises(UpstreamFailed, match="`train-pretrain` failed with exit 2"):
        upstream(end("train-pretrain", 2), ports={"model": MODEL})


def test_a_stream_without_end_is_an_upstream_that_was_killed():
    with pytest.raises(InputError, match="upstream `tokenize` was killed"):
        upstream(hello("tokenize", tokens="dataset.tokens"), ref("tokens", "dataset.tokens"), ports={"tokens": TOKENS})


def test_two_streams_in_one_file():
    both = [hello("a", model="model.hf"), ref("model", "model.hf", "sha256:m"), end("a")]
    both += [hello("b", chat="dataset.chat"), ref("chat", "dataset.chat", "sha256:c"), end("b")]
    with pytest.raises(UsageError):  # the first head alone cannot satisfy `data`, and there is no telling of a second
        upstream(*both, ports={"model": MODEL, "data": CHAT})


def test_nothing_on_a_stdin_that_was_asked_for():
    with pytest.raises(InputError, match="nothing arrived on stdin"):
        upstream(ports={"model": MODEL}, explicit=True)
    assert upstream(ports={"model": MODEL}).records == 0


def test_unknown_kinds_and_fields_are_skipped():
    up = upstream(
        b'{"llmctl":"weather","v":1,"sun":true}', b"", ref("model", "model.hf", colour="blue"), ports={"model": MODEL}
    )
    assert ids(up.bind()) == {"model": ["sha256:1"]}
    assert Upstream({}, frozenset()).feed(b'{"llmctl":"weather","v":1}') is None


@pytest.mark.parametrize(
    "line", [b"\x00\xff\xfe", b"hello", b"[1, 2]", b'{"text": "a row of data"}', b'{"llmctl": 1}', b"[" * 100_000]
)
def test_what_is_not_ours_is_taken_for_data(line):
    with pytest.raises(UsageError, match="did you pipe data"):
        parse_record(line)


@pytest.mark.parametrize("version", ["2", "1e9", '"1"', "null"])
def test_a_newer_version_is_refused(version):
    with pytest.raises(UsageError, match="version"):
        parse_record(b'{"llmctl":"hello","v":%s}' % version.encode())


@pytest.mark.parametrize(
    "line", [b'{"llmctl":"end","v":1,"stage":"x","code":"three"}', b'{"llmctl":"hello","v":1,"outputs":[1]}']
)
def test_damaged_records_are_an_error_of_usage(line):
    with pytest.raises(UsageError, match="damaged record"):
        upstream(line, ports={})
