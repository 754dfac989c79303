"""`llmctl bench` and Ctrl-C: loads that have ended are reported, the one that runs is broken off without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmctl_serve.bench import command
from llmctl_serve.bench.load import Runner
from llmctl_serve.bench.results import write_whole

from .stub import Plan, Stub

PROBES = 2
"""Requests that measure the length of words, before all others."""


@contextmanager
def started(*arguments, env=None, group=False):
    """The real command in development mode, which tells of tasks, sockets and coroutines that nobody has closed."""
    line = [sys.executable, "-X", "dev", "-W", "error", "-m", "llmctl", "bench", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, env={**os.environ, **(env or {})}, start_new_session=group, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def interrupted(tmp_path, loads, answered, label, waiting=1, metrics=None, env=None):
    """(process, its stdout, its stderr) of a measurement that gets Ctrl-C once the load `label` runs, and so many wait.

    The server answers `answered` requests before.
    """
    waits = threading.Semaphore(0)

    def plan(number, body):
        if number < PROBES + answered:
            return Plan()
        waits.release()
        return Plan(fault="hang")

    with Stub(plan) as stub:
        stub.metrics = metrics
        own = ("--url", stub.url, "--api", "chat", "--warmup", 0, "--requests", 4, "--prompt-tokens", 20)
        files = ("--json", tmp_path / "x.json", "--html", tmp_path / "x.html")
        with started(*own, *files, *loads, env=env) as process:
            before = []
            while not before or before[-1] != f"{label} …\n":
                before.append(process.stderr.readline())
                assert before[-1], before
            assert all(waits.acquire(timeout=30) for _ in range(waiting))
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
    return process, stdout, "".join(before) + stderr


def memory():
    return "process_resident_memory_bytes 1048576\n"


@pytest.mark.parametrize(
    ("loads", "waiting", "first", "missing"),
    [
        (("--concurrency", "1,3,4", "--rate", 9), 3, "1 at a time", ["3 at a time", "4 at a time", "9/s"]),
        (("--rate", "100,50"), 4, "100/s", ["50/s"]),
        (("--rate", "100,0.01"), 0, "100/s", ["0.01/s"]),  # while the next arrival is waited for
    ],
    ids=["closed", "open", "between arrivals"],
)
def test_loads_that_have_ended_are_reported(tmp_path, loads, waiting, first, missing):
    process, stdout, stderr = interrupted(tmp_path, loads, 4, missing[0], waiting, memory)
    assert process.returncode == 130
    head, names, row, *server = stdout.splitlines()
    assert head.startswith("stub at http://") and names.startswith("load ")
    assert row.startswith(f"{first}  4 ") and len(server) == 3
    *begun, ended = stderr.splitlines()[:3]
    assert begun == [f"{first} …", f"{missing[0]} …"]
    assert ended == f"interrupted; missing loads: {', '.join(missing)}"
    assert all("this client began requests" in line for line in stderr.splitlines()[3:])  # where the machine is busy
    written = json.loads((tmp_path / "x.json").read_text())
    (load,) = written["loads"]
    assert (load["load"], load["answered"], len(load["records"])) == (first, 4, 4)
    assert load["server"]["memory"]["last"] == 1048576
    assert written["prompts"]["asked"] == 4
    page = (tmp_path / "x.html").read_text()
    assert "<svg" in page and page.rstrip().endswith("</html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.html", "x.json"]


def test_before_a_load_has_ended_nothing_is_reported(tmp_path):
    (tmp_path / "x.json").write_text("old")
    process, stdout, stderr = interrupted(
        tmp_path, ("--concurrency", "2,4"), answered=1, label="2 at a time", waiting=2
    )
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "2 at a time …\ninterrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "old"


def test_it_is_told_as_json_where_errors_are(tmp_path):
    env = {"LLMCTL_LOG_FORMAT": "json"}
    process, _, stderr = interrupted(tmp_path, ("--concurrency", "1,2"), answered=4, label="2 at a time", env=env)
    (line,) = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    assert (line["message"], line["exit_code"]) == ("interrupted; missing loads: 2 at a time", 130)
    assert process.returncode == 130


def run_here(*arguments):
    with command.bench.make_context("bench", ["--api", "chat", *map(str, arguments)]) as ctx:
        return command.bench.invoke(ctx)


@pytest.mark.parametrize("times", [1, 2])
def test_after_the_last_load_the_first_waits_for_the_report_and_the_second_does_not(
    tmp_path, monkeypatch, capsys, times
):
    whole = command.summarise

    def summarise(*given):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return whole(*given)

    monkeypatch.setattr(command, "summarise", summarise)
    with Stub() as stub, pytest.raises(KeyboardInterrupt):
        run_here("--url", stub.url, "--requests", 4, "--json", tmp_path / "x.json")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert ("1 at a time" in capsys.readouterr().out) == (tmp_path / "x.json").exists() == (times == 1)


def test_a_second_one_while_requests_are_cancelled_loses_nothing(monkeypatch, capsys):
    """As of a program that hands on what its group has got already."""
    whole = Runner.run

    async def run(self, load, *given):
        if load.value == 3:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        return await whole(self, load, *given)

    monkeypatch.setattr(Runner, "run", run)
    with Stub() as stub:
        assert run_here("--url", stub.url, "--concurrency", "1,3", "--requests", 4) == 130
    said = capsys.readouterr()
    assert "1 at a time  4" in said.out and "interrupted; missing loads: 3 at a time" in said.err


def test_files_are_replaced_whole_with_their_links_and_modes(tmp_path, monkeypatch):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    with real.open() as before:
        write_whole(link, "new")
        assert before.read() == "old"
    assert (link.is_symlink(), real.read_text(), real.stat().st_mode & 0o777) == (True, "new", 0o640)
    reading, writing = os.pipe()
    write_whole(Path(f"/dev/fd/{writing}"), "piped")
    assert os.read(reading, 9) == b"piped"
    os.close(reading), os.close(writing)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(real, "newer")
    assert (real.read_text(), len(list(tmp_path.iterdir()))) == ("new", 2)


@pytest.mark.slow
def test_a_server_here_gets_the_same_ctrl_c_and_is_gone_afterwards(real_models, tmp_path):
    """At a terminal it goes to the whole group."""
    arguments = (real_models[1].path, "--concurrency", "1,2", "--requests", 4, "--output-tokens", 30, "--threads", 1)
    endless = ("--body", '{"logit_bias": {"1": -100}}', "--json", tmp_path / "x.json")
    with started(*arguments, *endless, group=True) as process:
        for line in process.stderr:
            if line.startswith("2 at a time"):
                break
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert (process.returncode, stderr.splitlines()[0]) == (130, "interrupted; missing loads: 2 at a time")
    assert "served here" in stdout and "1 at a time  4" in stdout
    assert len(json.loads((tmp_path / "x.json").read_text())["loads"]) == 1
