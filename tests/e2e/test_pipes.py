"""The pipe cases of pipeline.md 6.2 as subprocesses; T, P, S are sleepers of a really installed plugin."""

import contextlib
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

T, P, S = "llmctl fake-tok", "llmctl fake-pre", "llmctl fake-sft"


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def wait_for(condition, timeout=30.0):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def started(log: Path):
    return log.read_text().splitlines() if log.exists() else []


def test_1_three_stages_in_order(pipe, tmp_path):
    log = tmp_path / "log"
    done = pipe(f"{T} --sleep 0.3 --log {log}", f"{P} --sleep 0.3 --log {log}", f"{S} --log {log}")
    assert done.codes == [0, 0, 0], done.stderr
    assert [line.split()[:2] for line in started(log)] == [
        ["start", "fake-tok"], ["end", "fake-tok"], ["start", "fake-pre"], ["end", "fake-pre"],
        ["start", "fake-sft"], ["end", "fake-sft"],
    ]  # fmt: skip
    rows = records(done.stdout)
    assert rows[0]["llmctl"] == "hello"
    assert rows[0]["outputs"] == {"model": "fake.model", "metrics": "metrics"}
    assert rows[-1] == {"llmctl": "end", "v": 1, "stage": "fake-sft", "code": 0}
    assert {row["stage"] for row in rows if row["llmctl"] in ("hello", "end")} == {"fake-sft"}
    own = [row for row in rows if row["llmctl"] == "ref" and not row.get("via")]
    assert [row["port"] for row in own] == ["model", "metrics"]
    assert (Path(own[0]["path"]) / "content.txt").read_text() == "fake-sft model x model\n"
    again = pipe(T, P, S)
    assert again.codes == [0, 0, 0], again.stderr
    assert [row.get("id") for row in records(again.stdout)] == [row.get("id") for row in rows]
    assert "cached" in again.stderrs[2]
    passed_on = [row["port"] for row in rows if row.get("via")]
    assert passed_on == ["tokenizer", "tokens", "metrics", "model", "metrics"]


def test_2_a_typo_in_the_reader_stops_the_first_stage_before_any_work(pipe, tmp_path):
    log = tmp_path / "log"
    done = pipe(f"{T} --sleep 20 --log {log}", f"{P} --set sleeep=1", patient=True)
    assert done.codes == [141, 2]
    assert "sleeep" in done.stderrs[1]
    assert started(log) == []
    assert done.seconds < 20  # the first stage would have slept


def test_3_types_that_do_not_fit_are_seen_at_hello(pipe, tmp_path):
    log = tmp_path / "log"
    done = pipe(f"{T} --sleep 20 --log {log}", S, patient=True)
    assert done.codes == [141, 2]
    assert "input `model` wants fake.model, the pipe offers fake-tok.tokenizer (fake.tokenizer)" in done.stderrs[1]
    assert started(log) == []
    assert done.seconds < 20  # the first stage would have slept


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("stage", 3),
        pytest.param("input", 5, marks=pytest.mark.slow),
        pytest.param("machine", 7, marks=pytest.mark.slow),
    ],
)
def test_4_a_failed_stage_fails_the_pipe_with_its_code(how, code, pipe):
    done = pipe(f"{T} --fail {how}", P, S)
    assert done.codes == [code] * 3
    for stderr in done.stderrs[1:]:
        assert f"error: not run, upstream `fake-tok` failed with exit {code}" in stderr


def test_5_a_killed_stage_is_a_missing_input(start, tmp_path):
    log = tmp_path / "log"
    running = start(f"{T} --sleep 30 --log {log}", P, S)
    wait_for(lambda: started(log))
    running.processes[0].kill()
    done = running.wait()
    assert done.codes == [137, 5, 5]
    assert "upstream `fake-tok` was killed" in done.stderrs[1]
    wait_for(lambda: not orphans(log))


def orphans(log):
    """Processes whose command line or environment names this test's log."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(log).encode() in entry.read_bytes():
                found.append(entry)
        except OSError:
            continue
    return found


def test_6_an_empty_pipe_that_was_asked_for(pipe):
    done = pipe(["true"], f"{P} --input tokens=-")
    assert done.codes == [0, 5]
    assert "nothing arrived on stdin" in done.stderrs[1]
    assert pipe(["true"], f"{P} -").codes == [0, 5]


def test_7_an_empty_pipe_that_nobody_asked_for(pipe):
    done = pipe(["true"], P)
    assert done.codes == [0, 2]
    assert "tokens" in done.stderrs[1]


def test_8_no_stdin(pipe):
    done = pipe(P)
    assert done.codes == [2]
    assert "tokens" in done.stderr
    assert "stdin" not in done.stderr.split("waiting")[0] or "waiting" not in done.stderr


def test_9_data_in_the_pipe(pipe, tmp_path):
    data = tmp_path / "data.bin"
    data.write_bytes(bytes(range(256)) * 4096)
    for content in (data, Path(__file__)):
        done = pipe(["cat", str(content)], P)
        assert done.codes[1] == 2
        assert "did you pipe data?" in done.stderrs[1]
        assert "--input" in done.stderrs[1]


def test_10_the_path_or_the_id_and_nothing_else(pipe):
    path = pipe(f"{T} --format path")
    assert path.codes == [0], path.stderr
    tokenizer, tokens = path.stdout.splitlines()  # a stage with two products; `metrics` is none
    assert (Path(tokens) / "content.txt").read_text() == "fake-tok tokens x \n"
    one = pipe(T, f"{P} --format id")
    assert one.codes == [0, 0]
    assert one.stdout.startswith("sha256:")
    assert one.stdout.count("\n") == 1


@pytest.mark.slow
def test_11_a_reader_that_leaves_later_does_not_waste_the_work(start, tmp_path):
    log = tmp_path / "log"
    running = start(f"{T} --sleep 2 --log {log}", ["sleep", "30"])
    wait_for(lambda: started(log))
    running.processes[1].kill()
    done = running.wait()
    assert done.codes == [141, 137]
    assert [line.split()[0] for line in started(log)] == ["start", "end"]
    assert done.stderrs[0].count("the next command of the pipe has ended") == 1


def test_11_stop_on_reader_exit(start, tmp_path):
    log = tmp_path / "log"
    running = start(f"{T} --sleep 30 --log {log} --stop-on-reader-exit", ["sleep", "30"])
    wait_for(lambda: started(log))
    running.processes[1].kill()
    done = running.wait()
    assert done.codes == [141, 137]
    assert [line.split()[0] for line in started(log)] == ["start", "stopped"]


def test_12_head_takes_the_hello_and_cancels(pipe, tmp_path):
    log = tmp_path / "log"
    done = pipe(f"{T} --sleep 20 --log {log}", ["head", "-1"], patient=True)
    assert done.codes == [141, 0]
    assert records(done.stdout)[0]["llmctl"] == "hello"
    assert started(log) == []


def test_13_ctrl_c_stops_all(start, tmp_path):
    log = tmp_path / "log"
    running = start(f"{T} --sleep 30 --log {log}", P, S)
    wait_for(lambda: started(log))
    running.interrupt()
    done = running.wait()
    assert done.codes == [130, 130, 130], done.stderr
    assert [line.split()[0] for line in started(log)] == ["start", "stopped"]
    assert "Traceback" not in done.stderr


def test_13_ctrl_c_while_everyone_waits(start):
    running = start(["sleep", "30"], P, S)
    wait_for(lambda: "waiting for an upstream artifact on stdin" in running.logs[1].read_text())
    running.interrupt()
    done = running.wait()
    assert done.codes == [130, 130, 130]


@pytest.mark.slow
def test_13_sigint_ignored_on_entry_stays_ignored(start, tmp_path):
    log = tmp_path / "log"
    running = start(f"{T} --sleep 1.5 --log {log}", P, S, ignore_sigint=True)
    wait_for(lambda: started(log))
    running.interrupt()
    assert running.wait().codes == [0, 0, 0]


def shown(terminal):
    """All that a terminal is given until its last writer ends."""
    chunks = []
    with contextlib.suppress(OSError):  # Linux ends a terminal without writers with EIO
        while chunk := os.read(terminal, 65536):
            chunks.append(chunk)
    os.close(terminal)
    return b"".join(chunks).decode()


def test_14_a_terminal_gets_one_line_for_a_person(fake, llmctl_env, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llmctl", "fake-tok"]
    process = subprocess.Popen(
        command, env=llmctl_env, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE
    )
    os.close(theirs)
    text = shown(ours)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["fake-tok.tokenizer", "fake-tok.tokens", "fake-tok.metrics"]
    assert lines[1].split()[1] == "fake.tokens"
    assert lines[1].split()[2].startswith("sha256:")
    assert "{" not in text


def test_14_a_terminal_gets_a_bar_that_goes_away(fake, llmctl_env, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llmctl", "fake-tok", "--sleep", "1"]
    env = {**llmctl_env, "TERM": "xterm"}
    process = subprocess.Popen(
        command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    text = shown(ours)
    assert process.wait(60) == 0, text
    assert "━" in text
    assert "of 10" in text
    assert "fake-tok: done in" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_15_a_spec_error_in_the_middle(pipe, tmp_path):
    log = tmp_path / "log"
    done = pipe(f"{T} --sleep 20 --log {log}", f"{P} --size 0", S, patient=True)
    assert done.codes == [141, 2, 2]
    assert "error: not run, upstream `fake-pre` failed with exit 2" in done.stderrs[2]
    assert "missing" not in done.stderrs[2]
    assert started(log) == []


def test_16_an_unknown_command_at_the_head_is_an_upstream_that_failed(pipe):
    done = pipe("llmctl fake-tokk", P)
    assert done.codes == [2, 2]
    assert "did you mean `fake-tok`" in done.stderrs[0]
    assert "upstream `fake-tokk` failed with exit 2" in done.stderrs[1]


@pytest.mark.slow
def test_references_are_forwarded_past_a_stage_that_does_not_use_them(pipe):
    done = pipe(T, P, S, "llmctl fake-eval")
    assert done.codes == [0] * 4, done.stderr


def test_a_chain_that_can_never_fit_is_refused_at_once(pipe, tmp_path):
    log = tmp_path / "log"
    model = pipe(T, f"{P} --format path").stdout.strip()
    done = pipe(f"llmctl fake-sft --model {model} --sleep 20 --log {log}", "llmctl fake-eval", patient=True)
    assert done.codes == [141, 2]
    assert "input `tokenizer` wants fake.tokenizer" in done.stderrs[1]
    assert started(log) == []


def test_one_model_is_not_bound_to_two_ports_in_silence(pipe):
    done = pipe(T, P, "llmctl fake-pair")
    assert done.codes[-1] == 2
    assert "`teacher` and `student` would both be `model`" in done.stderrs[2]


def test_references_saved_in_a_file_work_later(start, pipe, tmp_path):
    saved = tmp_path / "refs.jsonl"
    assert pipe(T, ["tee", str(saved)]).codes == [0, 0]
    with saved.open() as file:
        done = start(f"{P} -", stdin=file).wait()
    assert done.codes == [0], done.stderr
    with saved.open() as file:  # a file is no pipe: it is read only if asked for
        assert start(P, stdin=file).wait().codes == [2]


def test_two_sides_may_use_different_stores(pipe, tmp_path):
    done = pipe(f"{T} --store {tmp_path / 'one'}", f"{P} --store {tmp_path / 'two'} --format path")
    assert done.codes == [0, 0], done.stderr
    assert done.stdout.startswith(str(tmp_path / "two"))


def test_prints_of_a_plugin_never_reach_stdout(pipe):
    done = pipe(f"{T} --mode loud", P)
    assert done.codes == [0, 0], done.stderr
    records(done.stdout)
    assert "a print in a plugin" not in done.stdout
    assert "a line of the log" in done.stderrs[0]
    assert "warning: fake-tok: a warning" in done.stderrs[0]


def test_listings_survive_a_reader_that_leaves(pipe):
    done = pipe("llmctl plugins", ["head", "-1"])
    assert done.codes[0] in (0, 141)
    assert done.stderr == ""
    done = pipe("llmctl --help", ["true"])
    assert done.codes[0] in (0, 141)
    assert done.stderr == ""


def test_waiting_is_announced(start):
    running = start(P, stdin=subprocess.PIPE)
    wait_for(running.logs[0].read_text)
    running.processes[0].stdin.close()
    done = running.wait()
    assert done.stderr.startswith("waiting for an upstream artifact on stdin (pass --input, or </dev/null)\n")
