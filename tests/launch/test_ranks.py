"""A stage in several processes, as a user meets it: one result, one error with its rank, restarts, stops."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmctl.errors import MachineError, UsageError
from llmctl.launch.ranks import meeting_point, per_node
from llmctl.launch.worker import is_loss
from llmctl.store import Store


def wait_for(condition, seconds=30.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.02)
    return found


def ranks_of(work):
    """Process ids of the ranks that run stages of the store in `work`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"llmctl.launch.worker" in words and str(work / ".llmctl/store").encode() in words:
            found.append(int(path.parent.name))
    return found


def result(work):
    return json.loads((Store(work / ".llmctl/store").resolve("p/w") / "env.json").read_text())


def test_all_run_it_and_rank_0_leaves_the_result(llmctl, one, work):
    done = llmctl("run", one("gang"), env={"OMP_NUM_THREADS": "4"})
    assert done.returncode == 0, done.stderr
    assert result(work) == {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "2", "restart": 0}
    assert "w: rank 0" in done.stderr and "rank 1" not in done.stderr
    assert not list((work / ".llmctl/store/work").iterdir()), "nothing unfinished is left"
    # How many they are is in no key.
    assert "cached" in llmctl("run", one("gang", "count: 1")).stdout


@pytest.mark.parametrize(
    ("how", "code", "message", "hint"),
    [
        ("stage", 3, "error: `w`: rank 1: what happened", "hint: do better; log: "),
        pytest.param(
            "die always",
            3,
            "error: `w`: rank 1: it was killed (SIGKILL)",
            "use a smaller batch",
            marks=pytest.mark.slow,
        ),
        pytest.param("bug", 1, "rank 1: ValueError: what happened", "this is a bug in fake", marks=pytest.mark.slow),
    ],
)
def test_a_failure_is_told_once_with_its_rank(how, code, message, hint, llmctl, one, work):
    begun = time.monotonic()
    # Starting again would not mend what a rank has raised itself, so that is not tried.
    done = llmctl("run", one("gang", f"how: {how}, again: {0 if how == 'die always' else 3}"))
    assert time.monotonic() - begun < 45, "rank 0 sleeps for a minute"
    assert done.returncode == code, done.stderr
    assert done.stderr.count("rank 1: ") == 1
    error, way_out = done.stderr.strip().splitlines()[-2:]
    assert message in error and hint in way_out
    wait_for(lambda: not ranks_of(work))  # the kernel ends them with their agent


def test_all_are_started_again_when_one_is_killed(llmctl, one, work):
    done = llmctl("run", one("gang", "how: die, again: 1"))
    assert done.returncode == 0, done.stderr
    assert result(work)["restart"] == 1
    assert "warning: w: a rank was lost: all were started again, 1 of at most 1 times" in done.stderr


@pytest.mark.slow
def test_a_signal_reaches_rank_0_as_a_request_and_all_leave(start, one, work):
    process = start("run", one("gang", "how: wait"))
    wait_for(lambda: list((work / ".llmctl/store/work").glob("*/state.json")))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 143, stderr
    assert "error: stopped; finished stages are kept" in stderr
    wait_for(lambda: not ranks_of(work))
    # The request was for this run: the next one works.
    (left,) = (work / ".llmctl/store/work").iterdir()
    assert [path.name for path in left.iterdir()] == ["state.json"]


def test_no_rank_outlives_the_command(start, one, work):
    process = start("run", one("gang", "how: wait"))
    wait_for(lambda: list((work / ".llmctl/store/work").glob("*/state.json")))
    assert ranks_of(work)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not ranks_of(work))


SRUN = """#!/bin/sh
# Starts a command as srun does with --ntasks-per-node=1: once per machine, each with its number.
for word in "$@"; do case "$word" in --nodes=*) nodes=${word#--nodes=};; esac; done
while case "$1" in --*) true;; *) false;; esac; do shift; done
for number in $(seq 0 $((nodes - 1))); do SLURM_NODEID=$number "$@" & done
wait
"""


@pytest.mark.slow
def test_in_a_slurm_job_srun_starts_an_agent_on_each_machine(llmctl, one, work):
    tools = work / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}
    done = llmctl("run", one("gang", "count: 4", resources="{nodes: 2}"), env=env)
    assert done.returncode == 0, done.stderr
    assert result(work)["WORLD_SIZE"] == "4"


@pytest.mark.slow
def test_another_machine_joins_by_key(llmctl, start, one, work, free_port):
    env = {"LLMCTL_RDZV": f"127.0.0.1:{free_port}"}
    spec = one("gang", resources="{nodes: 2}")
    key = json.loads(llmctl("plan", spec, "--format", "json").stdout)[0]["key"]
    process = start("run", spec, env=env)
    store = work / ".llmctl/store"
    wait_for(lambda: list((store / "work").glob("*/ranks/plan.json")))
    assert llmctl("stage", "join", "--key", key, "--store", store).returncode == 0
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert result(work)["WORLD_SIZE"] == "2"
    late = llmctl("stage", "join", "--key", key, "--store", store, "--wait", "0.1")
    assert late.returncode == 7 and "nobody works on" in late.stderr


@pytest.fixture
def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_processes_are_shared_out_to_machines(monkeypatch):
    assert per_node(8, 2) == 4
    with pytest.raises(UsageError, match="8 processes cannot be shared out evenly to 3 nodes"):
        per_node(8, 3)
    monkeypatch.delenv("LLMCTL_RDZV", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert meeting_point(1) == ""
    with pytest.raises(MachineError, match="2 nodes: nobody has said where they meet"):
        meeting_point(2)
    monkeypatch.setenv("LLMCTL_RDZV", "node1:29400")
    assert meeting_point(2) == "node1:29400"


def test_the_loss_of_a_neighbour_is_told_from_a_failure_of_ones_own():
    assert is_loss(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:48047"))
    assert not is_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_loss(ValueError("connection closed by peer"))


@pytest.mark.parametrize(("agent", "code"), [(1, 137), (os.getpid(), 1)], ids=["gone", "there"])
def test_a_rank_whose_agent_died_while_it_was_loaded_ends_at_once(agent, code, tmp_path):
    words = ["--key", "sha256:0", "--store", tmp_path / "store", "--reports", tmp_path / "reports"]
    variables = {**os.environ, "RANK": "0", "LLMCTL_AGENT": str(agent)}
    command = [sys.executable, "-m", "llmctl.launch.worker", *words]
    assert subprocess.run(command, env=variables, capture_output=True).returncode == code
