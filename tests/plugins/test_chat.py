"""`llmctl chat` and `llmctl generate`: one-shot, piped, and as a conversation in a real terminal."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
from click.testing import CliRunner

from llmctl import InputError, UsageError
from llmctl.generator import Sampling
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.chat import chat, generate
from llmctl_serve.session import Session, find_model

from .stub import Plan, Stub
from .terminal import read_until


@pytest.fixture
def bundle(model_dir, opens, scripted):
    """A directory that looks like a bundle; its model answers by script."""
    (model_dir / "model.onnx").touch()
    generator = scripted(Tokenizer.load(model_dir), {"dedent": "textwrap ☃", "loads": "json"}, context_length=64)
    opens({model_dir: generator})
    return model_dir


def invoke(command, *args, **options):
    result = CliRunner().invoke(command, [str(arg) for arg in args], **options)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_one_question(bundle):
    assert invoke(chat, bundle, "--prompt", "dedent?").output == "textwrap ☃\n"
    assert invoke(chat, bundle, "--prompt", "dedent?", "--stop", "wr").output == "text\n"
    assert invoke(chat, bundle, "--prompt", "dedent?", "--max-new-tokens", 4).output == "text\n"


def test_each_piped_line_is_a_question_of_its_own(bundle):
    # In one conversation the second answer would be the first one's, as the script looks for "dedent" first.
    assert invoke(chat, bundle, input="dedent?\n\nloads?\n").output == "textwrap ☃\njson\n"


def test_sampling_flags_reach_the_generator(bundle):
    def ask(*flags):
        return invoke(chat, bundle, "--prompt", "q", "--max-new-tokens", 20, *flags).output

    assert ask("--temperature", 1, "--seed", 3) == ask("--temperature", 1, "--seed", 3)
    assert len({ask("--temperature", 1, "--seed", seed) for seed in range(6)}) > 1
    assert ask() == "yes\n"


def test_flags_override_the_models_own_sampling(bundle, monkeypatch):
    (bundle / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "top_k": 9}')
    seen = []
    monkeypatch.setattr(Session, "ask", lambda self, question: seen.append(self.sampling) or iter(()))
    invoke(chat, bundle, "--prompt", "q")
    invoke(chat, bundle, "--prompt", "q", "--temperature", 0.2, "--top-k", 0, "--top-p", 0.5, "--seed", 4)
    assert seen == [
        Sampling(temperature=0.7, top_k=9),
        Sampling(temperature=0.2, top_k=0, top_p=0.5, seed=4),
    ]


def test_a_question_longer_than_the_context(bundle):
    with pytest.raises(UsageError, match="context is 64") as caught:
        invoke(chat, bundle, "--prompt", "x" * 100)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="--prompt is empty"):
        invoke(chat, bundle, "--prompt", " ")


def test_conversation_remembers_and_forgets_what_no_longer_fits(bundle, scripted):
    tokenizer = Tokenizer.load(bundle)
    session = Session(scripted(tokenizer, context_length=64), tokenizer, Sampling(), system="be kind")
    assert "".join(session.ask("one")) == "yes"
    assert session.turns == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}]
    list(session.ask("two"))
    assert len(session.turns) == 4
    list(session.ask("x" * 40))
    assert [turn["content"] for turn in session.turns] == ["x" * 40, "yes"]
    assert len(session._ids([{"role": "user", "content": "a"}])) == len("be kinda") + 6  # the system message stays
    with pytest.raises(UsageError, match="context"):
        list(session.ask("x" * 60))
    session.reset()
    assert session.turns == []


def test_generate_continues_a_text(bundle):
    tokenizer = Tokenizer.load(bundle)
    script = tokenizer.encode("yes")
    expected = tokenizer.decode([script[(2 + i) % 3] for i in range(5)]) + "\n"
    assert invoke(generate, bundle, "--prompt", "ab", "--max-new-tokens", 5).output == expected
    assert invoke(generate, bundle, "--max-new-tokens", 5, input="ab").output == expected
    with pytest.raises(UsageError, match="empty"):
        invoke(generate, bundle, input="")


def test_what_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no model is named"):
        find_model(None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no model"):
        find_model("empty")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        find_model("file")
    hf = tmp_path / "exports" / "quickstart"
    hf.mkdir(parents=True)
    (hf / "config.json").write_text("{}")
    (hf / "model.safetensors").touch()
    assert find_model(None).type == find_model("exports/quickstart").type == "model.hf"
    (hf / "model.onnx").touch()
    assert find_model(None).type == "model.onnx"


def test_a_real_terminal(bundle, terminal, tmp_path):
    with terminal(bundle) as typed:
        assert "scripted" in typed.screen
        typed("dedent?", "textwrap ☃")
        typed("/tokens", "of 64 tokens")
        typed("/reset")
        assert "tokens/s" in typed("loads?", "json")
        typed("/nonsense", "unknown command /nonsense")
        typed("x" * 70, "context is 64")
        typed("/help", "/retry")
        os.write(typed.master, b"/exit\n")
    history = tmp_path / "state" / "llmctl" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "dedent?" in history.read_text()


def test_commands_of_a_conversation(bundle, terminal, tmp_path):
    saved = tmp_path / "talk.json"
    with terminal(bundle, "--no-history") as typed:
        typed("/system be kind", "is set")
        typed("loads?", "json")
        assert "[system] be kind" in typed("/show", "[assistant] json")
        typed("/retry", "json")
        typed(f"/save {saved}", "2 messages")
        typed("/undo", "0 messages are left")
        typed("/undo", "nothing to take back")
        typed("/retry", "no question")
        typed(f"/load {saved}", "2 messages from")
        typed("/show", "[assistant] json")
        typed(f"/load {tmp_path}/none", "none cannot be read: No such file")
        typed("/set max_new_tokens=2")
        typed("/set", "max_new_tokens=2")
        typed("/reset")
        typed("dedent?", "\nte\r\n")
        typed("/set temperature=-1", "must not be negative")
        typed("/set colour=red", "cannot be set")
        typed("/set top_k=many", "cannot be")
        typed("/model", "scripted")
        typed("/reset")
        typed('"""', "", b". ")
        typed("two", "", b". ")
        typed("lines", "", b". ")
        typed('"""', "ye")
        typed("/show", "[user] two\r\nlines")
        typed('"""', "", b". ")
        typed("/* what is this */", "", b". ")
        typed('"""', "ye")
        os.write(typed.master, b"\x04")  # Ctrl-D
    assert json.loads(saved.read_text())["messages"][1] == {"role": "assistant", "content": "json"}
    assert not (tmp_path / "state").exists()


def test_an_interrupt_stops_the_answer_and_a_second_one_the_program(model_dir, opens, scripted, terminal):
    (model_dir / "model.onnx").touch()
    slow = scripted(Tokenizer.load(model_dir), {"long": "abcdefghij" * 20}, context_length=400, delay=0.05)
    opens({model_dir: slow})
    with terminal(model_dir, "--no-history") as typed:
        os.write(typed.master, b"long\n")
        read_until(typed.master, b"abcdefghij")
        assert "(interrupted)" in typed(b"\x03", "(interrupted)")
        assert "[assistant] abcdefghij" in typed("/show", "[assistant] abcdefghij")  # what came is remembered
        typed(b"\x03", "Ctrl-C again ends")
        typed.press(b"\x03")


def test_what_has_no_answer_is_what_is_asked_again(terminal):
    answers = iter(["first", "", "second", "third"])

    def plan(number, body):
        text = next(answers)
        return Plan([text]) if text else Plan(fault="status")

    with Stub(plan) as stub, terminal(stub.url, "--no-history") as typed:
        typed("one?", "first")
        typed("two?", "planted")
        typed("/retry", "second")
        assert "[user] one?" in typed("/show", "[assistant] second")
        typed("/retry", "third")  # the answer is there: it is the one that goes
        shown = typed("/show", "[assistant] third")
        assert "second" not in shown
        os.write(typed.master, b"/exit\n")
        assert [body["messages"][-1]["content"] for body in stub.bodies] == ["one?", "two?", "two?", "two?"]
        assert [len(body["messages"]) for body in stub.bodies] == [1, 3, 3, 3]


def test_whatever_a_model_raises_does_not_end_the_conversation(model_dir, opens, scripted, terminal):
    class Odd(scripted):
        def script(self, question):
            if "odd" in question:
                raise RuntimeError("no such kernel")
            return super().script(question)

    (model_dir / "model.onnx").touch()
    opens({model_dir: Odd(Tokenizer.load(model_dir), default="yes")})
    with terminal(model_dir, "--no-history") as typed:
        typed("odd", "error: RuntimeError: no such kernel")
        typed("even", "yes")
        typed("/set seed=99999999999999999999", "seed must be below")
        os.write(typed.master, b"/exit\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii:surrogateescape"])
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_bytes_that_are_no_text_are_refused_by_their_line(tmp_path, command, encoding):
    with Stub(lambda number, body: Plan(["fine"])) as stub:
        done = subprocess.run(
            [sys.executable, "-m", "llmctl", command, stub.url],
            input=b"good\nca\xe9\nmore\n",
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=60,
        )
    assert done.returncode == 5
    assert b"stdin is no text in UTF-8" in done.stderr
    assert b"unexpected" not in done.stderr


def test_a_conversation_with_a_server(terminal):
    with Stub(lambda number, body: Plan(["Answer", f" {number}"], ttft=0.01)) as stub:
        stub.models = ["one", "two"]
        with terminal(stub.url, "--model", "one", "--no-history", "--temperature", 0.5) as typed:
            assert f"one at {stub.url}/v1" in typed.screen
            typed("hello", "Answer 0")
            typed("/system short", "is set")
            typed("/set temperature=0.2")
            typed("/model two", "two at")
            typed("/model three", "no model `three`")
            assert "2 tokens after" in typed("again", "Answer 1")
            os.write(typed.master, b"/quit\n")
    first, second = stub.bodies
    assert (first["model"], first["temperature"], first["stream"]) == ("one", 0.5, True)
    assert (second["model"], second["temperature"]) == ("two", 0.2)
    assert [turn["role"] for turn in second["messages"]] == ["system", "user", "assistant", "user"]
