"""`llmctl chat` in a terminal: where prompts and answers go, and what keeps a conversation alive."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from llmctl import UsageError
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.conversation_files import write_conversation

from .stub import Plan, Stub
from .terminal import read_until


@pytest.fixture
def bundle(model_dir, opens, scripted):
    """A directory that looks like a bundle; its model answers by script, slowly where it is long."""
    (model_dir / "model.onnx").touch()
    opens({model_dir: scripted(Tokenizer.load(model_dir), {"loads": "json"}, context_length=400, delay=0.005)})
    return model_dir


def test_a_file_of_answers_holds_no_prompts(bundle, terminal, tmp_path):
    answers = tmp_path / "answers"
    with terminal(bundle, stdout=answers) as typed:
        assert "tokens after" in typed("loads?")
        typed("\x1b[A", "loads?")  # lines are edited as ever, here with the last one
        typed("/show", "[assistant] json")
        typed('"""', "", b". ")
        typed("two", "", b". ")
        typed('"""', "tokens after")
        typed(b"\x03", "\r\nCtrl-C again ends")
        os.write(typed.master, b"\x04")
    assert answers.read_text() == "json\n" * 3  # the script looks at the whole conversation


def test_a_conversation_ends_when_nobody_reads_the_answers(bundle, terminal):
    head = subprocess.Popen(["head", "-n1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with terminal(bundle, stdout=head.stdin.fileno(), code=1) as typed:  # click's for EPIPE
        typed("loads?", "tokens after")
        assert head.communicate(timeout=20) == (b"json\n", None)
        os.write(typed.master, b"again\n")


def test_an_interrupted_answer_ends_its_line_where_it_stands(model_dir, opens, scripted, terminal, tmp_path):
    (model_dir / "model.onnx").touch()
    opens({model_dir: scripted(Tokenizer.load(model_dir), {"long": "ab" * 99}, context_length=400, delay=0.05)})
    for stdout in (None, tmp_path / "answers"):
        with terminal(model_dir, stdout=stdout) as typed:
            os.write(typed.master, b"long\n")
            if stdout is None:
                read_until(typed.master, b"abab")
            else:
                typed.press(b"")
            shown = typed(b"\x03", "(interrupted)")
            assert "^C\r\n(interrupted)" in shown
            typed("/reset")
            typed("yes", "tokens after")
            os.write(typed.master, b"/quit now\n")
    answer, second = (tmp_path / "answers").read_text().splitlines()
    assert (answer[:4], second) == ("abab", "yes")


def test_an_answer_that_breaks_off_ends_its_line(terminal):
    plans = {"cut": Plan(fault="cut"), "garbage": Plan(fault="garbage")}
    with Stub(lambda number, body: plans[body["messages"][-1]["content"]]) as stub, terminal(stub.url) as typed:
        typed("cut", "one two three\r\nerror: ")
        typed("garbage", "the connection broke: what? (broken off)\r\n")
        os.write(typed.master, b"/exit\n")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_typed_bytes_that_are_no_text_are_refused(bundle, terminal, tmp_path, errors):
    with terminal(bundle, stdout=tmp_path / "answers", errors=errors) as typed:
        # The library that edits lines keeps half a character for the next line, after which nothing is one.
        os.write(typed.master, b"caf\xe9\n\xff\n")
        typed("", "error: what is typed is no text in UTF-8")
        os.write(typed.master, b"\n")
        typed("loads?", "tokens after")
        os.write(typed.master, b"/exit\n")


def test_a_conversation_is_saved_over_its_own_file_only(bundle, terminal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other, link = tmp_path / "other.json", tmp_path / "link.json"
    other.write_text("mine")
    link.symlink_to("talk.json")
    with terminal(bundle, "--no-history") as typed:
        typed("loads?", "json")
        typed("/save", "no file is named")
        typed("/save talk.json", "2 messages are in talk.json\r\n")
        typed("/save link.json", "over what was there")  # the same file
        typed("/save other.json", "is there already\r\n  hint: `/save --force other.json` writes over it")
        typed("/load other.json", "holds no conversation")
        assert other.read_text() == "mine"
        typed("/save --force other.json", "2 messages are in other.json, over what was there")
        typed("again", "json")
        typed("/save", "4 messages are in other.json")
        typed(f"/save {bundle}", "is no regular file")
        typed("/save --force /dev/null", "is no regular file")
        typed("/save none/talk.json", "none/talk.json cannot be written: No such file")
        typed("/reset")
        typed("/save other.json", "is there already")  # it is another conversation's now
        typed("/load talk.json", "2 messages from talk.json")
        typed("/save talk.json", "2 messages are in talk.json, over")
        os.write(typed.master, b"/quit\n")
    assert len(json.loads(other.read_text())["messages"]) == 4
    assert stat.S_IMODE(other.stat().st_mode) == 0o600
    assert link.is_symlink()
    assert not list(tmp_path.glob(".*.json*"))


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match="cannot be written: No space left"):
        write_conversation(path, "m", "", [], over=True)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_set_stays_set_with_another_model(bundle, opens, scripted, terminal):
    other = Path(shutil.copytree(bundle, bundle.with_name("other")))
    tokenizer = Tokenizer.load(bundle)
    opens({path: scripted(tokenizer, default="abcdefgh", context_length=400) for path in (bundle, other)})
    with terminal(bundle, "--max-new-tokens", 7, "--no-history") as typed:
        assert f"{bundle} on scripted" in typed.screen
        typed("/set top_k=3")
        typed("/set temperature=none", "temperature needs a value")
        typed("/set seed=none")
        typed(f"/model {other}", f"{other} on scripted")
        typed("/set", "max_new_tokens=7\r\ntemperature=0.0\r\ntop_k=3")
        typed("/model http://127.0.0.1:1", "is a server, this conversation is with a model that is opened here")
        typed("/model", f"{other} on scripted")
        os.write(typed.master, b"/quit\n")


def test_what_a_server_does_not_know_can_be_unset(bundle, terminal):
    with Stub() as stub, terminal(stub.url, "--no-history") as typed:
        typed("/set top_k=3")
        typed("one", "three")
        typed("/set top_k=none")
        typed("/set", "top_k=none")
        typed("two", "three")
        typed(f"/model {bundle}", f"then `llmctl chat {bundle}` and /load FILE")
        os.write(typed.master, b"/quit\n")
    assert [body.get("top_k") for body in stub.bodies] == [3, None]


def test_an_answer_that_was_cut_says_so(bundle, terminal):
    with terminal(bundle, "--max-new-tokens", 2, "--no-history") as typed:
        assert "cut off by max_new_tokens or the end of the context" in typed("loads?", "js\r\n")
        typed("/set max_new_tokens=9")
        assert "cut off" not in typed("loads?", "json")
        os.write(typed.master, b"/quit\n")
    plans = {"long": Plan(finish="length"), "short": Plan()}
    with Stub(lambda number, body: plans[body["messages"][-1]["content"]]) as stub, terminal(stub.url) as typed:
        assert "cut off" in typed("long", "three")
        assert "cut off" not in typed("short", "three")
        os.write(typed.master, b"/quit\n")


def test_a_terminal_obeys_no_answer(terminal, tmp_path):
    text = "\x1b]0;title\x07red\x9b31m\tand\n"
    with Stub(lambda number, body: Plan([text])) as stub:
        with terminal(stub.url) as typed:
            typed("hello", "\u241b]0;title\u2407red\ufffd31m")
            typed("/show", "[assistant] \u241b]0;title")
            os.write(typed.master, b"/quit\n")
        with terminal(stub.url, stdout=tmp_path / "answers") as typed:
            typed("hello", "token after")
            os.write(typed.master, b"/quit\n")
    assert (tmp_path / "answers").read_text() == text + "\n"


def test_a_history_that_cannot_be_read_is_told_and_not_written(bundle, terminal, tmp_path):
    history = tmp_path / "state" / "llmctl" / "chat_history"
    history.mkdir(parents=True)
    with terminal(bundle) as typed:
        assert "chat_history cannot be read: " in typed.screen
        typed("loads?", "json")
        os.write(typed.master, b"\x04")
        assert "warning" not in read_until(typed.master, b"\n")


def test_conversations_side_by_side_keep_each_others_history(bundle, terminal, tmp_path):
    with terminal(bundle) as first:
        first("the first says", "tokens after")
        with terminal(bundle) as second:
            second("the second says", "tokens after")
            os.write(second.master, b"/quit\n")
        os.write(first.master, b"/quit\n")
    lines = (tmp_path / "state" / "llmctl" / "chat_history").read_text().splitlines()
    assert lines == ["the second says", "/quit", "the first says", "/quit"]
