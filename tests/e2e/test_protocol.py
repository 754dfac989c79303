"""`pipeline.md` 3.1-3.5 sentence by sentence, where `test_pipes.py` has no case of it: bytes on descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import subprocess
import sys
import time

import pytest

T, P, S = "llmctl fake-tok", "llmctl fake-pre", "llmctl fake-sft"
MODEL: list[dict] = []


@pytest.fixture
def llmctl_process(fake, llmctl_env, tmp_path):
    """Start one `llmctl …` with descriptors of the test's choice; what is left is killed."""
    started = []

    def begin(words, env=None, **options):
        command = [sys.executable, "-m", *words.split()]
        options.setdefault("stderr", subprocess.PIPE)
        process = subprocess.Popen(command, env={**llmctl_env, **(env or {})}, cwd=tmp_path, **options)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def model(pipe):
    """The records of a whole pipe that ends in a model; made once, later tests take them from another store."""
    if not MODEL:
        done = pipe(T, P)
        assert done.codes == [0, 0], done.stderr
        MODEL.extend(records(done.stdout))
    return MODEL


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# -- 3.2 records ------------------------------------------------------------------------------------------------------


def test_hello_comes_before_stdin_is_read(llmctl_process):
    process = llmctl_process(S, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    hello = json.loads(process.stdout.readline())  # and nothing was written to its stdin yet
    assert (hello["llmctl"], hello["v"], hello["stage"], hello["pid"]) == ("hello", 1, "fake-sft", process.pid)
    assert hello["outputs"] == {"model": "fake.model", "metrics": "metrics"}


def test_one_record_is_one_write_of_less_than_4096_bytes(llmctl_process):
    read, write = os.pipe2(os.O_DIRECT)  # a pipe of packets: one read gives what one write wrote
    process = llmctl_process(T, stdin=subprocess.DEVNULL, stdout=write)
    os.close(write)
    packets = list(iter(lambda: os.read(read, 1 << 16), b""))
    os.close(read)
    assert process.wait(30) == 0
    kinds = [json.loads(packet)["llmctl"] for packet in packets]
    assert kinds == ["hello", "ref", "ref", "ref", "end"]
    assert all(packet.endswith(b"\n") and packet.count(b"\n") == 1 and len(packet) < 4096 for packet in packets)


def test_unknown_kinds_and_fields_are_skipped_and_refs_passed_on(model, llmctl_process):
    strange = [{"llmctl": "greeting", "v": 1, "x": 1}, *({**row, "colour": "red"} for row in model)]
    process = llmctl_process(S, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    out, err = process.communicate(lines(strange), timeout=60)
    assert process.returncode == 0, err
    found = records(out)
    assert "greeting" not in {row["llmctl"] for row in found}
    passed = [row for row in found if row["llmctl"] == "ref" and row.get("via")]
    assert [row["port"] for row in passed] == [row["port"] for row in model if row["llmctl"] == "ref"]


@pytest.mark.parametrize(
    ("row", "code", "message"),
    [
        ({"llmctl": "hello", "v": 2, "stage": "x", "outputs": {}}, 2, "speaks version 2 of the pipe protocol"),
        ({"llmctl": "end", "v": 1, "stage": "x", "code": "many"}, 2, "a damaged record on stdin"),
        ({"kind": "hello"}, 2, "did you pipe data?"),
        ({"llmctl": "hello", "v": 1, "stage": "x", "outputs": {"model": "fake.model"}}, 5, "`x` was killed"),
        ({"llmctl": "hello", "v": 1, "stage": "x", "outputs": {"y": "fake.tokens"}}, 2, "type mismatch"),
    ],
    ids=["newer version", "damaged", "other JSON", "no end", "other types"],
)
def test_what_is_not_understood_is_refused(row, code, message, llmctl_process):
    process = llmctl_process(S, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    out, err = process.communicate(lines([row]), timeout=60)
    assert process.returncode == code
    assert message in err
    assert records(out)[-1] == {"llmctl": "end", "v": 1, "stage": "fake-sft", "code": code}


def test_the_end_is_written_by_a_stage_that_fails_before_hello(llmctl_process):
    process = llmctl_process(f"{S} --sise 1", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=60)
    assert records(out) == [{"llmctl": "end", "v": 1, "stage": "fake-sft", "code": 2}]


# -- 3.3 stdin --------------------------------------------------------------------------------------------------------


def test_a_socket_is_read_as_a_pipe_is(model, llmctl_process):
    ours, theirs = socket.socketpair()
    process = llmctl_process(S, stdin=theirs, stdout=subprocess.PIPE, text=True)
    theirs.close()
    ours.sendall(lines(model).encode())
    ours.close()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert records(out)[-1]["code"] == 0


def test_a_closed_stdin_is_none(fake, llmctl_env, tmp_path):
    command = f"{sys.executable} -m {S} <&-"
    done = subprocess.run(["sh", "-c", command], env=llmctl_env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "model" in done.stderr and "waiting" not in done.stderr


def test_an_explicit_port(model, llmctl_process):
    process = llmctl_process(f"{S} --input model=-", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    _, err = process.communicate(lines(model), timeout=60)
    assert process.returncode == 0, err


def test_waiting_is_announced_in_the_format_of_the_log(llmctl_process):
    begun = time.monotonic()
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    process = llmctl_process(S, env={"LLMCTL_LOG_FORMAT": "json"}, **options)
    row = json.loads(process.stderr.readline())
    assert row["type"] == "log" and row["text"].startswith("waiting for an upstream artifact on stdin")
    assert time.monotonic() - begun > 1.0


# -- 3.1 channels -----------------------------------------------------------------------------------------------------


def test_lines_for_a_person_where_asked_for(pipe):
    """`json` is in every other test, `path` and `id` are case 10 of `test_pipes.py`."""
    rows = pipe(f"{T} --format text").stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["fake-tok.tokenizer", "fake.tokenizer"], ["fake-tok.tokens", "fake.tokens"], ["fake-tok.metrics", "metrics"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("env", "bars", "colour"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
        pytest.param({"TERM": "xterm", "CI": "true"}, False, True, marks=pytest.mark.slow),
        pytest.param({"TERM": "xterm", "LLMCTL_LOG_FORMAT": "json"}, False, False, marks=pytest.mark.slow),
    ],
    ids=["terminal", "NO_COLOR", "dumb", "CI", "json"],
)
def test_what_a_terminal_shows(env, bars, colour, llmctl_process):
    ours, theirs = pty.openpty()
    process = llmctl_process(
        f"{T} --sleep 0.3 --mode loud", env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    chunks = []
    with contextlib.suppress(OSError):  # Linux ends a terminal without writers with EIO
        while chunk := os.read(ours, 65536):
            chunks.append(chunk)
    os.close(ours)
    assert process.wait(60) == 0
    text = b"".join(chunks).decode()
    assert ("━" in text) is bars
    assert ("\x1b[33m" in text) is colour  # the warning is yellow


def test_colour_can_be_forced_into_a_file(llmctl_process):
    process = llmctl_process(
        f"{T} --mode loud", env={"CLICOLOR_FORCE": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True
    )
    _, err = process.communicate(timeout=60)
    assert "\x1b[33mwarning: fake-tok: a warning" in err


# -- 3.5 signals ------------------------------------------------------------------------------------------------------


def test_a_stage_is_in_a_session_of_its_own(llmctl_process, tmp_path):
    """So Ctrl-C at the terminal does not hit its workers; the runner passes the request on."""
    log = tmp_path / "log"
    process = llmctl_process(f"{T} --sleep 20 --log {log}", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not log.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    children = []
    for entry in os.listdir("/proc"):  # noqa: PTH208  # numbers of processes, not paths
        with contextlib.suppress(OSError, ValueError):
            if entry.isdigit() and _parent(int(entry)) == process.pid:
                children.append(int(entry))
    assert children and all(os.getsid(pid) == pid != os.getsid(process.pid) for pid in children)


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123  # no path of ours
        return int(file.read().rpartition(")")[2].split()[1])
