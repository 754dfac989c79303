"""`pipeline.md` 3.6: a test per exit code, of a whole command as a shell sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOK = "fake-tok"
SPEC = """
llmctl: 1
name: p
stages:
  t: {uses: fake-tok, with: {WITH}, EXTRA}
"""


@pytest.fixture
def work(fake, llmctl, tmp_path) -> Path:
    return tmp_path / "work"


def spec(work, with_="{}", extra="retries: 0"):
    text = SPEC.replace("{WITH}", with_).replace(", EXTRA", f", {extra}" if extra != "retries: 0" else "")
    (work / "p.yaml").write_text(text)
    return "p.yaml"


def wait_for(condition, timeout=30.0):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_0_done_and_0_all_cached(work, llmctl):
    assert llmctl(TOK).returncode == 0
    again = llmctl(TOK)
    assert again.returncode == 0
    assert "cached" in again.stderr


def test_1_a_bug_and_its_traceback_is_in_the_directory_of_the_run(work, llmctl):
    done = llmctl(TOK, "--fail", "bug")
    assert done.returncode == 1
    assert "this is a bug in fake; the traceback is in the log" in done.stderr
    log = Path(done.stderr.strip().rpartition("log: ")[2])
    assert "KeyError: 'a bug'" in log.read_text()
    assert log.is_relative_to(work / ".llmctl/store/runs")


@pytest.mark.parametrize(
    "args",
    [("fake-tok", "--no-such"), ("fake-tok", "--size", "0"), ("run", "bad.yaml"), ("run", "p.yaml", "--jobs", "0")],
)
def test_2_usage_and_spec_errors(args, work, llmctl):
    spec(work)
    (work / "bad.yaml").write_text("llmctl: 1\nname: p\nstages:\n  t: {uses: fake-tok, with: {sise: 1}}\n")
    assert llmctl(*args).returncode == 2
    assert not (work / ".llmctl").exists()  # nothing ran


def test_3_a_stage_failed(work, llmctl):
    done = llmctl(TOK, "--fail", "stage")
    assert (done.returncode, "it went wrong" in done.stderr) == (3, True)


def test_4_a_gate_failed(work, llmctl):
    done = llmctl("run", spec(work, extra="gates: [{metric: answer, min: 50}]"))
    assert done.returncode == 4
    assert "error: gate failed: `t`: answer is 42, must be >= 50" in done.stderr


@pytest.mark.parametrize(
    "args", [("fake-tok", "--fail", "input"), ("fake-sft", "--model", "./no-such"), ("fake-sft", "-")]
)
def test_5_input_missing_or_damaged(args, work, llmctl):
    assert llmctl(*args).returncode == 5


def test_6_busy_and_7_no_such_machine(work, llmctl, llmctl_env):
    command = [sys.executable, "-m", "llmctl", TOK, "--sleep", "20"]
    first = subprocess.Popen(
        command, cwd=work, env=llmctl_env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        wait_for(lambda: list((work / ".llmctl/store/locks").glob("*.lock")))
        busy = llmctl(TOK, "--sleep", "20", "--on-busy", "fail")
        assert busy.returncode == 6
        assert f"another process does the same work: pid {first.pid} on" in busy.stderr
    finally:
        first.kill()
        first.communicate()
    done = llmctl("run", spec(work, extra="resources: {cpus: 9999}"))
    assert (done.returncode, "asks for 9999 CPU cores" in done.stderr) == (7, True)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGUSR1, 75, id="75"),
        pytest.param(signal.SIGINT, 130, id="130", marks=pytest.mark.slow),  # `test_pipes.py` has it, too
        pytest.param(signal.SIGTERM, 143, id="143"),
        pytest.param(signal.SIGHUP, 143, id="143-SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal(number, code, work, llmctl_env, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "llmctl", TOK, "--sleep", "30", "--log", str(log)]
    process = subprocess.Popen(
        command, cwd=work, env=llmctl_env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for(log.exists)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["start", "stopped"]


def test_124_the_time_is_over(work, llmctl):
    assert llmctl("run", spec(work, "{sleep: 60}", "resources: {time: 1s}")).returncode == 124


@pytest.mark.parametrize("command", ["fake-tok", "ls", "plugins", "--help", "plan p.yaml"])
def test_141_nobody_reads(command, work, llmctl_env, llmctl):
    """The reader is gone before the first byte: no traceback, and 141 where anything was to be written."""
    spec(work)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "llmctl", *command.split()],
        cwd=work, env=llmctl_env, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


# -- the same errors for machines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("fake-tok", "--fail", "stage", "--log-format", "json"), 3, "`fake-tok`: it went wrong"),
        (("fake-tok", "--no-such", "--log-format=json"), 2, "no such option `--no-such`"),
        (("run", "nowhere.yaml", "--log-format", "json"), 2, "cannot read nowhere.yaml"),
    ],
)
def test_errors_as_json(args, code, message, work, llmctl):
    done = llmctl(*args)
    assert done.returncode == code
    rows = [json.loads(line) for line in done.stderr.splitlines()]
    assert rows[-1]["type"] == "error"
    place = {"file", "line", "column", "end_column"}
    assert set(rows[-1]) == {"type", "code", "exit_code", "message", "hint", *place}
    assert rows[-1]["exit_code"] == code
    assert message in rows[-1]["message"]
    assert all("type" in row for row in rows)
    assert "\x1b" not in done.stderr


def test_the_log_as_json(work, llmctl):
    env = {"LLMCTL_LOG_FORMAT": "json", "CLICOLOR_FORCE": "1"}
    done = llmctl(TOK, "--mode", "loud", "--events", "copy.jsonl", env=env)
    assert done.returncode == 0
    assert done.stderr == (work / "copy.jsonl").read_text()
    kinds = [json.loads(line)["type"] for line in done.stderr.splitlines()]
    assert kinds[0] == "run.start" and kinds[-1] == "run.end" and "warning" in kinds
    plain = llmctl("run", spec(work), "--log-format", "text", env=env)
    assert "t: done in" in plain.stderr  # the flag wins
    spec_error = llmctl("plan", "nowhere.yaml", env=env)
    assert json.loads(spec_error.stderr.splitlines()[-1])["type"] == "error"
