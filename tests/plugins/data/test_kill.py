"""kill -9 in the middle of a run, of the stage and of one of its workers: what follows gives the same dataset."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import json, sys
from pathlib import Path
from llmctl import Artifact, LlmctlError
from llmctl.testing import run_stage
from llmctl_data import DATA
steps = [{"name": "unicode"}, {"name": "exact-duplicates"}, {"name": "pii"}, {"name": "near-duplicates"}]
params = {"emit": ["text"], "task_bytes": 1 << 16, "workers": 2, "steps": steps}
try:
    run_stage(DATA, Path(sys.argv[2]), params, files=[Artifact(Path(sys.argv[1]), "files")])
except LlmctlError as error:
    sys.stderr.write(f"error: {error.message}\\n")
    sys.exit(error.exit_code)
"""
PATIENCE = 120.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Some twenty tasks' worth of rows with addresses, doubles and near doubles."""
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    rows = [f"Letter {n % 1450} to ann{n % 7}@lake.org: " + "the otter swam on. " * (n % 31 + 5) for n in range(2900)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    assert end(start(corpus, out))[0] == 0
    return digests(out)


def start(corpus: Path, out: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CODE, str(corpus), str(out)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """How it ended, and what it said."""
    _, said = process.communicate(timeout=PATIENCE)
    return process.returncode, said.splitlines()


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "text").iterdir())}


def workers(out: Path) -> list[int]:
    """The processes that work for a run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"llmctl_data.tasks" in command and any(os.fsencode(out) in word for word in command):
                found.append(int(entry.name))
    return found


def wait_for_tasks(out: Path, count: int) -> list[int]:
    """Inode numbers of the first tasks that are done, as soon as there are `count`."""
    latest = time.monotonic() + PATIENCE
    while time.monotonic() < latest:
        done = sorted(path for path in (out / ".resume/shards/read-0").glob("0*")) if out.exists() else []
        if len(done) >= count:
            return [path.stat().st_ino for path in done[:count]]
        time.sleep(0.005)
    raise AssertionError("no task was done")


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("victim", ["stage", "worker"])
def test_a_kill_in_the_middle_costs_no_byte(corpus, straight, tmp_path, victim):
    first = start(corpus, tmp_path)
    done = wait_for_tasks(tmp_path, 3)
    if victim == "stage":
        first.kill()
        assert end(first)[0] == -signal.SIGKILL
    else:
        os.kill(workers(tmp_path)[0], signal.SIGKILL)
        code, said = end(first)
        assert code == 3
        assert said[-1].startswith("error: a worker ended with code -9 in task read-")
    assert not (tmp_path / "text/info.json").exists()
    latest = time.monotonic() + 5
    while left := workers(tmp_path):
        assert time.monotonic() < latest, f"left after the kill: {left}"
        time.sleep(0.02)
    assert end(start(corpus, tmp_path))[0] == 0
    tasks = sorted((tmp_path / ".resume/shards/read-0").glob("0*"))
    assert len(tasks) > 10
    assert [path.stat().st_ino for path in tasks if path.stat().st_ino in done] == done  # they were not done again
    assert digests(tmp_path) == straight


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Ten times the corpus takes at most 48 MiB more, in the stage and in each worker; both stay below 500 MiB."""
    measured = [peaks(tmp_path, size) for size in (20, 200)]
    (small, small_worker), (large, large_worker) = measured
    assert large <= small + (48 << 10) and large_worker <= small_worker + (48 << 10), measured
    assert max(large, large_worker) < 500 << 10, measured


def peaks(root: Path, megabytes: int) -> tuple[int, int]:
    """(largest resident memory of the stage, of a worker) in KiB over a corpus of that size."""
    path, out = root / f"{megabytes}.jsonl", root / str(megabytes)
    with path.open("w") as file:
        for number in range(megabytes * 100):
            words = " ".join(f"w{(number * 7919 + place * place) % 50021}" for place in range(1600))
            file.write(json.dumps({"text": words}) + "\n")
    code = """
import resource, sys
from pathlib import Path
from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl_data import DATA
params = {"emit": ["text"], "task_bytes": 4 << 20, "workers": 2, "steps": [{"name": "exact-duplicates"}]}
run_stage(DATA, Path(sys.argv[2]), params, files=[Artifact(Path(sys.argv[1]), "files")])
# Not ru_maxrss of the program itself, which begins with that of the process that started it.
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    words = [sys.executable, "-c", code, str(path), str(out)]
    told = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=580).stdout.split()
    path.unlink()
    return int(told[0]), int(told[1])
