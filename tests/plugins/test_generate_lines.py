"""`llmctl generate --input`: JSON Lines in and out, in batches, in order, resumable, on a bundle and on a server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner

from llmctl import InputError, StageError, UsageError
from llmctl.generator import check_bias
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.chat import chat, generate

from .stub import Plan, Stub


@pytest.fixture
def model(model_dir, scripted):
    return scripted(Tokenizer.load(model_dir), {"dedent": "textwrap", "loads": "json"}, context_length=64)


@pytest.fixture
def bundle(model_dir, opens, model):
    """A directory that looks like a bundle; its model answers by script."""
    (model_dir / "model.onnx").touch()
    opens({model_dir: model})
    return model_dir


def invoke(*args, command=generate, **options):
    result = CliRunner().invoke(command, [str(arg) for arg in args], **options)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def ask(question, **more):
    return {"messages": [{"role": "user", "content": question}], **more}


def test_lines_are_answered_in_order_and_in_batches(bundle, model, tmp_path):
    rows = [ask("dedent?", id="a", label=3), ask("loads?"), {"prompt": "ab", "max_tokens": 5}, ask("x", id=9)]
    source = write_lines(tmp_path / "in.jsonl", [*rows, "", ask("loads again?")])
    result = invoke(bundle, "--input", source, "--batch", 2, "--max-new-tokens", 8)
    found = read_lines(result.stdout)
    assert [row["id"] for row in found] == ["a", 2, 3, 9, 6]
    assert [row["text"] for row in found][:2] == ["textwrap", "json"]
    assert [row["finish_reason"] for row in found] == ["length", "stop", "length", "stop", "stop"]
    assert found[0]["label"] == 3
    assert found[2]["tokens"] == 5
    assert found[0]["prompt_tokens"] == len("dedent?") + 4
    assert set(found[1]) == {"id", "text", "finish_reason", "tokens", "prompt_tokens"}
    assert model.batches == [2, 1, 1, 1]  # unlike sampling is not mixed, and a batch does not wait for another
    assert "5 answered, 0 failed, 0 there already" in result.stderr


def test_stdin_and_sampling_of_a_line(bundle, tmp_path):
    rows = [
        ask("q", temperature=1.0, seed=3), ask("q", temperature=1.0, seed=3, n=3), ask("loads?", stop="so"),
        ask("loads?", logprobs=2), ask("loads?", beams=2, n=2),
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    alone, three, stopped, scored, beams = read_lines(invoke(bundle, "--input", "-", input=text).stdout)
    assert three["candidates"][0]["text"] == alone["text"]
    assert len({one["text"] for one in three["candidates"]}) > 1
    assert (stopped["text"], stopped["finish_reason"]) == ("j", "stop")
    assert [len(one["top_logprobs"]) for one in scored["logprobs"]] == [2] * 4
    assert len(beams["candidates"]) == 2
    assert beams["candidates"][0]["score"] > beams["candidates"][1]["score"]


def test_bad_lines_have_errors_that_name_them_and_the_others_answers(bundle, tmp_path):
    rows = [
        "{oops", "[1]", {"id": "none"}, ask("loads?", temperature="hot"), ask("loads?", temperature=-1),
        {"prompt": "x" * 90}, {"prompt": "a", "messages": []}, ask("loads?", id="good"), ask("q", n=2),
        ask("q", logit_bias={"a": 1}),
    ]  # fmt: skip
    source = write_lines(tmp_path / "in.jsonl", rows)
    target = tmp_path / "out.jsonl"
    with pytest.raises(StageError, match=rf"9 lines have no answer; the first: {source}:1 is no JSON") as caught:
        invoke(bundle, "--input", source, "--output", target)
    assert caught.value.exit_code == 3
    found = read_lines(target.read_text())
    assert [row["id"] for row in found] == [1, 2, "none", 4, 5, 6, 7, "good", 9, 10]
    problems = [row.get("error", {}).get("message", "") for row in found]
    for number, words in enumerate(
        ("is no JSON", "no JSON object", "either", "`temperature`", "temperature must not", "context is 64", "either",
         "", "greedy decoding has one answer", "`logit_bias`"), start=1
    ):  # fmt: skip
        assert words in problems[number - 1]
        assert not words or f"in.jsonl:{number}" in problems[number - 1]


def test_a_line_that_no_model_can_answer_takes_no_other_with_it(bundle, model, tmp_path, monkeypatch):
    plain = model.generate

    def generate(prompts, sampling):
        for prompt in prompts:
            check_bias(sampling, model.vocab_size)
            if model.tokenizer.decode(prompt).endswith("?!"):
                raise RuntimeError("no such kernel")
        return plain(prompts, sampling)

    monkeypatch.setattr(model, "generate", generate)
    rows = [
        {"prompt": "a", "max_tokens": 3}, {"prompt": "what?!", "max_tokens": 3}, {"prompt": "b", "max_tokens": 3},
        ask("q", logit_bias={"999999": 1}), ask("q", temperature=1, seed=-1), ask("loads?"),
        '{"prompt": "\\ud800"}', '{"prompt": "a", "id": "\\udfff"}', '{"prompt": "a", "mine": ["\\ud800"]}',
        '{"prompt": "a", "mine": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"prompt": "a", "mine": NaN}',
        ask("dedent?"),
    ]  # fmt: skip
    source, target = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with pytest.raises(StageError, match="8 lines have no answer"):
        invoke(bundle, "--input", source, "--output", target)
    found = read_lines(target.read_text())
    assert [row["id"] for row in found] == [*range(1, 13)]
    problems = [row.get("error", {}).get("message", "") for row in found]
    half = "half of a surrogate pair"
    for number, words in enumerate(
        ("", "RuntimeError: no such kernel", "", "names token 999999", "seed must not be negative", "",
         half, half, half, "is no JSON: maximum recursion", "NaN", ""), start=1
    ):  # fmt: skip
        assert words in problems[number - 1]
        assert (f"in.jsonl:{number}" in problems[number - 1]) == bool(words)
    kinds = [row.get("error", {}).get("type") for row in found]
    assert kinds[1:5] == ["generation_failed", None, "invalid_request", "invalid_request"]
    assert [found[i]["text"] for i in (5, 11)] == ["json", "textwrap"]


def test_a_second_run_goes_on_where_the_first_one_was_killed(bundle, model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [ask(f"q{i}", id=f"r{i}") for i in range(6)])
    target = tmp_path / "out.jsonl"
    invoke(bundle, "--input", source, "--output", target)
    whole = target.read_bytes()
    lines = whole.splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:3]) + lines[3][:10])
    model.batches.clear()
    result = invoke(bundle, "--input", source, "--output", target)
    assert target.read_bytes() == whole
    assert model.batches == [3]
    assert "half written" in result.stderr
    assert "3 answered, 0 failed, 3 there already" in result.stderr
    model.batches.clear()
    invoke(bundle, "--input", source, "--output", target)
    assert (target.read_bytes(), model.batches) == (whole, [])


def test_errors_are_asked_again_when_that_is_wanted(bundle, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [ask("a"), {"prompt": "x" * 90, "id": "long"}, ask("b")])
    target = tmp_path / "out.jsonl"
    with pytest.raises(StageError, match="1 line has no answer"):
        invoke(bundle, "--input", source, "--output", target)
    before = target.read_bytes()
    with pytest.raises(StageError, match=rf"1 line has no answer; the first: {source}:2: .*context is 64") as caught:
        invoke(bundle, "--input", source, "--output", target)  # an error is an end too, but no success
    assert (caught.value.exit_code, target.read_bytes()) == (3, before)
    fewer = write_lines(tmp_path / "fewer.jsonl", [ask("a")])
    invoke(bundle, "--input", fewer, "--output", target)  # the failed line is not asked for here
    write_lines(source, [ask("a"), {"prompt": "x", "id": "long", "max_tokens": 2}, ask("b")])
    invoke(bundle, "--input", source, "--output", target, "--retry-errors")
    found = read_lines(target.read_text())
    assert [row["id"] for row in found] == [1, 3, "long"]
    assert not any("error" in row for row in found)


def test_fields_that_an_answer_has_are_refused_in_a_line(bundle, tmp_path):
    """Else a line's own `text` would be lost, and one with `error` would be asked again for ever."""
    names = [
        "text",
        "finish_reason",
        "tokens",
        "prompt_tokens",
        "logprob",
        "score",
        "candidates",
        "tool_calls",
        "error",
    ]
    rows = [ask("loads?", id="good", label=1), *(ask("loads?", id=name, label=2, **{name: "mine"}) for name in names)]
    target = tmp_path / "out.jsonl"
    with pytest.raises(StageError, match="9 lines have no answer"):
        invoke(bundle, "--input", write_lines(tmp_path / "in.jsonl", rows), "--output", target)
    good, *refused = read_lines(target.read_text())
    assert (good["text"], good["label"]) == ("json", 1)
    assert [set(row) for row in refused] == [{"id", "label", "error"}] * 9
    for row in refused:
        assert row["error"]["type"] == "bad_line"
        assert f"`{row['id']}` is a field of the answer" in row["error"]["message"]
    flags = ("--max-new-tokens", 3, "--temperature", 1, "--seed", 1, "--format", "json")
    shown = json.loads(invoke(bundle, "--prompt", "q", *flags).stdout)["candidates"][0]
    assert set(shown) <= set(names)  # no field of an answer is missing above


def test_answers_of_a_server_that_counts_nothing(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [ask("a", n=2, temperature=1.0), ask("b")])
    for usage, tokens in ((False, 0), (True, 9)):
        with Stub(lambda number, body, usage=usage: Plan(usage=usage)) as stub:
            result = invoke(stub.url, "--input", source)
        assert f"2 answered, 0 failed, 0 there already; {tokens} tokens" in result.stderr
        first, second = read_lines(result.stdout)
        assert [one["text"] for one in first["candidates"]] == ["one two three"] * 2
        assert second["text"] == "one two three"


def test_fail_fast_ends_at_the_first_failure(bundle, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [ask("a"), "{", ask("b")])
    target = tmp_path / "out.jsonl"
    with pytest.raises(StageError, match="in.jsonl:2"):
        invoke(bundle, "--input", source, "--output", target, "--fail-fast")
    assert [row["id"] for row in read_lines(target.read_text())] == [1, 2]


def test_what_cannot_be_is_refused_before_anything_runs(bundle, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [ask("a", id=1), ask("b", id=1)])
    with pytest.raises(InputError, match=r"in.jsonl:2 has the id 1 of .*in.jsonl:1"):
        invoke(bundle, "--input", source, "--output", tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match="one file"):
        invoke(bundle, "--input", source, "--output", source)
    with pytest.raises(InputError, match="cannot be read"):
        invoke(bundle, "--input", tmp_path / "none", "--output", tmp_path / "out.jsonl")
    foreign = write_lines(tmp_path / "foreign.jsonl", ["hello"])
    write_lines(source, [ask("a")])
    with pytest.raises(InputError, match="foreign.jsonl:1 is no answer"):
        invoke(bundle, "--input", source, "--output", foreign)
    assert foreign.read_text() == "hello\n"
    with pytest.raises(UsageError, match="--output is of the lines"):
        invoke(bundle, "--prompt", "a", "--output", tmp_path / "x")


def test_a_server_answers_lines_in_order_though_the_first_takes_longest(tmp_path):
    def plan(number, body):
        words = [message["content"] for message in body["messages"]][-1] if "messages" in body else body["prompt"]
        return Plan([words.upper()], ttft=0.4 if words == "q0" else 0.0, fault="status" if words == "q2" else "")

    source = write_lines(
        tmp_path / "in.jsonl", [*(ask(f"q{i}") for i in range(4)), {"prompt": "more", "temperature": 0.5, "top_k": 4}]
    )
    with (
        Stub(plan) as stub,
        pytest.raises(StageError, match="1 line has no answer; the first: .*in.jsonl:3: planted"),
    ):
        target = tmp_path / "out.jsonl"
        invoke(stub.url, "--input", source, "--output", target, "--batch", 3, "--system", "be kind", "--min-p", 0.1)
    found = read_lines(target.read_text())
    assert [row.get("text") for row in found] == ["Q0", "Q1", None, "Q3", "MORE"]
    assert found[2]["error"]["type"] == "status 500"
    assert found[0]["tokens"] == 1
    assert stub.bodies[0]["messages"][0] == {"role": "system", "content": "be kind"}
    last = stub.bodies[-1]
    assert (last["prompt"], last["temperature"], last["top_k"], last["min_p"]) == ("more", 0.5, 4, 0.1)
    assert "seed" not in last


def test_a_server_streams_a_text_and_answers_a_question():
    with Stub(lambda number, body: Plan(["to", " be"])) as stub:
        assert invoke("--url", stub.url, "--prompt", "or not").stdout == "to be\n"
        assert invoke(stub.url, "--prompt", "x", "--temperature", 0.5, command=chat).stdout == "to be\n"
        assert stub.bodies[-1]["temperature"] == 0.5
        with pytest.raises(UsageError, match="no beams"):
            invoke(stub.url, "--prompt", "x", "--beams", 2, command=chat)
        stub.models = ["a", "b"]
        with pytest.raises(UsageError, match="has 2 models"):
            invoke(stub.url, "--prompt", "x", command=chat)
        invoke(stub.url, "--prompt", "x", "--model", "b", command=chat)
        assert stub.bodies[-1]["model"] == "b"
    with Stub(lambda number, body: Plan(fault="broken")) as stub, pytest.raises(StageError, match="broken off"):
        invoke(stub.url, "--prompt", "x", command=chat)


def test_a_kill_loses_no_line_that_was_answered(tmp_path):
    """A real process, killed twice in the middle: in the end every line is answered once, in order."""
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"p{i}"} for i in range(40)])
    target = tmp_path / "out.jsonl"
    with Stub(lambda number, body: Plan([body["prompt"]], ttft=0.1)) as stub:
        command = [sys.executable, "-m", "llmctl", "generate", stub.url, "--batch", "2"]
        command += ["--input", str(source), "--output", str(target)]
        for _ in range(2):
            size = target.stat().st_size if target.exists() else 0
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 20
            while (not target.exists() or target.stat().st_size < size + 200) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        before = len(stub.bodies)
        assert 4 <= before < 40
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    found = read_lines(target.read_text())
    assert [(row["id"], row["text"]) for row in found] == [(i + 1, f"p{i}") for i in range(40)]
    assert len(stub.bodies) <= 40 + 2 * 4  # those under way were asked again, no others


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_answers_have_the_form_that_is_asked_for(real_models, tmp_path, engine):
    """A random model writes JSON of the schema all the same; on a server the form becomes a field of the request."""
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance")
    onnx = real_models[engine == "onnx"]
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "grammar.lark").write_text('start: "yes" | "no"')
    source = write_lines(
        tmp_path / "in.jsonl", [ask("q"), ask("r", temperature=1.0, seed=1), ask("s", temperature=1.0, n=2)]
    )
    space = Tokenizer.load(onnx.path).encode(" \n\t\r")  # JSON may go on with it for ever
    flags = ("--input", source, "--max-new-tokens", 40, *(f"--logit-bias={token}=-1000" for token in space))
    said = invoke(onnx.path, *flags, "--json-schema", tmp_path / "schema.json")
    rows = read_lines(said.stdout)
    assert re.search(r"tokens in [^,]+, masking [\de.-]+ ms a token, [\de.-]+ of the time$", said.stderr.strip())
    for text in [rows[0]["text"], rows[1]["text"], *(one["text"] for one in rows[2]["candidates"])]:
        jsonschema.validate(json.loads(text), schema)
    assert invoke(onnx.path, "--prompt", "q", "--regex", "[ab]{3}c").stdout.strip() in {
        x + y + z + "c" for x in "ab" for y in "ab" for z in "ab"
    }  # fmt: skip
    assert invoke(onnx.path, "--prompt", "q", "--grammar", tmp_path / "grammar.lark", command=chat).stdout in (
        "yes\n", "no\n",
    )  # fmt: skip
    line = json.loads(invoke(onnx.path, "--prompt", "q", "--regex", "[ab]{3}c", "--format", "json").stdout)
    assert line["masking"]["masks"] == line["candidates"][0]["tokens"] + 1  # and one for the end
    assert 0 < line["masking"]["seconds"] < 10
    assert "masking" not in json.loads(invoke(onnx.path, "--prompt", "q", "--format", "json").stdout)
    with Stub() as stub:
        invoke(stub.url, *flags, "--regex", "a+")
        assert stub.bodies[0]["guided_regex"] == "a+"
    with pytest.raises(UsageError, match="contradict"):
        invoke(onnx.path, "--prompt", "q", "--regex", "a", "--grammar", "b")
    with pytest.raises(InputError, match="cannot be read"):
        invoke(onnx.path, "--prompt", "q", "--json-schema", tmp_path / "none")


def test_penalties_and_bias_reach_the_model(real_models):
    _, onnx = real_models

    def text(*flags):
        return invoke(onnx.path, "--prompt", "ab", "--max-new-tokens", 12, "--format", "json", *flags).stdout

    biased = text("--logit-bias", "70=1000")
    assert biased != text()
    assert json.loads(biased)["candidates"][0]["tokens"] == 12
    assert text("--logit-bias", "70=1000", "--frequency-penalty", 2000) != biased
    with pytest.raises(UsageError, match="no ID=VALUE"):
        text("--logit-bias", "x=1")


def test_pipes_are_read_and_written_as_files_are(tmp_path):
    """`--input <(…)` and `--output >(…)`: what can be read but once is not counted before."""
    lines = b'{"prompt": "a"}\n{"prompt": "b"}\n'
    source, target = tmp_path / "source", tmp_path / "target"
    os.mkfifo(source)
    os.mkfifo(target)
    with Stub(lambda number, body: Plan([body["prompt"].upper()])) as stub:
        command = [sys.executable, "-m", "llmctl", "generate", stub.url, "--input", source, "--output", target]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            writing = threading.Thread(target=source.write_bytes, args=(lines,), daemon=True)
            writing.start()
            found = read_lines(target.read_text())
            writing.join(20)
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
        outside = [*command[:-3], "-", "--output", "/dev/stdout"]
        shown = subprocess.run(outside, input=lines, capture_output=True, timeout=60)
        again = subprocess.run([*command[:-3], "/dev/stdin"], input=lines, capture_output=True, timeout=60)
    assert process.returncode == 0, stderr
    assert [row["text"] for row in found] == ["A", "B"]
    for done in (again, shown):
        assert [row["text"] for row in read_lines(done.stdout.decode())] == ["A", "B"], done.stderr


def test_asking_errors_again_keeps_links_and_modes(bundle, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [ask("a"), {"prompt": "x" * 90, "id": "long"}])
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "out.jsonl", tmp_path / "link.jsonl"
    real.touch(0o600)
    real.chmod(0o640)
    link.symlink_to(real)
    with pytest.raises(StageError):
        invoke(bundle, "--input", source, "--output", link)
    write_lines(source, [ask("a"), {"prompt": "x", "id": "long", "max_tokens": 2}])
    invoke(bundle, "--input", source, "--output", link, "--retry-errors")
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert not any("error" in row for row in read_lines(real.read_text()))
    assert sorted(path.name for path in real.parent.iterdir()) == ["out.jsonl"]


def test_a_slow_line_keeps_no_place_but_its_own(tmp_path):
    """With four side by side, one slow line in four: the others go on meanwhile, and answers stay in order."""

    def plan(number, body):
        return Plan([body["prompt"]], ttft=1.0 if body["prompt"] == "p0" else 0.02)

    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"p{i}"} for i in range(30)])
    with Stub(plan) as stub:
        seen = []
        first = stub.plan
        stub.plan = lambda number, body: seen.append((body["prompt"], time.monotonic())) or first(number, body)
        found = read_lines(invoke(stub.url, "--input", source, "--batch", 4).stdout)
    assert [row["text"] for row in found] == [f"p{i}" for i in range(30)]
    begun = dict(seen)
    assert begun["p29"] < begun["p0"] + 1.0  # before the slow one was answered


def test_a_busy_server_is_asked_again_when_it_says(tmp_path):
    def plan(number, body):
        return Plan(["yes"]) if number else Plan(fault="status", status=429, headers={"Retry-After": "1.5"})

    source, times = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}]), []
    with Stub(lambda number, body: times.append(time.monotonic()) or plan(number, body)) as stub:
        assert read_lines(invoke(stub.url, "--input", source).stdout)[0]["text"] == "yes"
    assert times[1] - times[0] >= 1.5


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ({"choices": [None]}, "bad JSON", None),
        ({"choices": [{"message": "x"}]}, "bad JSON", None),
        ({"choices": [{"text": "\ud83d!"}], "usage": [1]}, None, "\ufffd!"),
        (
            {"choices": [{"text": "a", "logprobs": {"tokens": ["\ud83d"]}}], "usage": {"completion_tokens": "3"}},
            None,
            "a",
        ),
    ],
)
def test_strange_answers_are_failures_of_their_line(tmp_path, body, kind, text):
    class Strange(Stub):
        def _whole(self, path, asked, plan):
            return body if asked["prompt"] == "odd" else super()._whole(path, asked, plan)

    source, target = write_lines(tmp_path / "in.jsonl", [{"prompt": "odd"}, {"prompt": "b"}]), tmp_path / "out.jsonl"
    with Strange(lambda number, asked: Plan(["fine"])) as stub:
        if kind:
            with pytest.raises(StageError, match="1 line has no answer"):
                invoke(stub.url, "--input", source, "--output", target)
        else:
            invoke(stub.url, "--input", source, "--output", target)
    odd, fine = read_lines(target.read_text())
    assert (odd.get("error", {}).get("type"), odd.get("text")) == (kind, text)
    assert fine["text"] == "fine"


def test_options_without_effect_are_refused(bundle):
    for arguments, words in (
        (["http://x", "--device", "cuda", "--prompt", "a"], "opened here"),
        (["http://x", "--threads", 2, "--prompt", "a"], "opened here"),
        ([bundle, "--batch", 4, "--prompt", "a"], "--batch is of the lines"),
        ([bundle, "--stop", "", "--prompt", "a"], "--stop is empty"),
    ):
        with pytest.raises(UsageError, match=words):
            invoke(*arguments)
