"""`llmctl chat` in a terminal: where prompts and answers go, and what keeps a conversation alive."""

from __future__ import annotations

import os
import subprocess

import pytest

from llmctl.text.tokenizer import Tokenizer

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
