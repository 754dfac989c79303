"""Stage processes as a user meets them: failures explained, signals, resume, no orphans, full disks."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llmctl.store import Store


def wait_for(condition, seconds=20.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)
    return found


def alive(pid):
    """Whether a process runs; a zombie that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def runs(work):
    return sorted((work / ".llmctl/store/runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def events(work):
    return [json.loads(line) for line in (runs(work)[-1] / "events.jsonl").read_text().splitlines()]


def progressed(work):
    """Whether a stage has told of progress."""
    files = (work / ".llmctl/store/runs").glob("*/events.jsonl")
    return any('"stage.progress"' in file.read_text() for file in files)


def tmp(work):
    return [path for path in (work / ".llmctl/store/tmp").glob("*") if path.is_dir()]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code", "message", "hint"),
    [
        ("raise", 1, "ValueError: what happened", "this is a bug in fake; the traceback is in the log"),
        ("input", 5, "nothing in it", "log: "),
        ("machine", 7, "no GPU", "buy one; log: "),
        ("memory", 3, "out of memory", "use a smaller batch"),
        ("kill", 3, "it was killed (SIGKILL), most likely by the kernel because memory ran out", "smaller batch"),
        ("segv", 3, "it crashed with SIGSEGV", "the log names the place"),
        ("exit", 1, "it called sys.exit(0)", "this is a bug in fake"),
        ("nothing", 3, "output `result` is no valid report: nothing was written", "nothing was committed"),
        ("nan", 3, "value.json is no valid JSON: NaN is not JSON", "nothing was committed"),
        ("symlink", 3, "`link` is a symbolic link", "nothing was committed"),
    ],
)
def test_a_failure_is_one_line_with_a_hint_and_a_log(how, code, message, hint, llmctl, one, work):
    done = llmctl("run", one("wrong", f"how: {how}"))
    assert done.returncode == code
    error, way_out = done.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: `w`: ")
    assert message in error
    assert hint in way_out
    log = Path(way_out.rpartition("log: ")[2])
    assert log == runs(work)[-1] / "logs/w.log"
    if how in ("raise", "exit"):
        assert "Traceback" in log.read_text()
    if how == "segv":
        assert "Fatal Python error: Segmentation fault" in log.read_text()
    assert not list((work / ".llmctl/store").glob("artifacts/*/*/*"))
    assert not list((work / ".llmctl/store").glob("keys/*/*"))
    assert tmp(work) == []


def test_prints_and_odd_writes_do_not_mix_with_events(llmctl, one, work):
    assert llmctl("run", one("wrong", "how: noise")).returncode == 0
    found = events(work)
    assert [event["seq"] for event in found] == list(range(len(found)))
    assert {"name": "odd", "value": None, "step": 1}.items() <= next(e for e in found if e["type"] == "metric").items()
    assert "x" * 1000 in (runs(work)[-1] / "logs/w.log").read_text()


def test_a_full_disk(llmctl, one, work, mount):
    disk = mount("40m")
    done = llmctl("run", one("wrong", "how: fill, size: 60"), "--store", disk / "store")
    assert done.returncode == 3
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error == f"error: `w`: no space left on device, in {disk / 'store'}"
    assert "free some space" in hint
    assert not list((disk / "store").glob("artifacts/*/*/*"))
    assert [path for path in (disk / "store/tmp").iterdir() if path.is_dir()] == []
    # What was staged is gone again, so a smaller result fits.
    assert llmctl("run", one("wrong", "how: fill, size: 2"), "--store", disk / "store").returncode == 0
    (disk / "ballast").write_bytes(bytes(20 << 20))
    done = llmctl("run", one("wrong", "how: fill, size: 3"), "--store", disk / "store")
    assert done.returncode == 3
    assert "no space left on device" in done.stderr
    assert "w: start" not in done.stderr


def test_the_environment_of_a_stage(llmctl, one, work):
    env = {"SECRET_TOKEN": "hunter2", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "7"}
    assert llmctl("run", one("wrong", "how: env", env="{MODE: x}"), env=env).returncode == 0
    artifact = Store(work / ".llmctl/store").resolve("p/w")
    seen = json.loads((artifact / "env.json").read_text())
    assert "SECRET_TOKEN" not in seen
    expected = {"MODE": "x", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "7", "PYTHONHASHSEED": "0"}
    assert {name: seen.get(name) for name in expected} == expected
    assert seen["TOKENIZERS_PARALLELISM"] == "false"
    assert (
        llmctl("run", one("wrong", "how: env", resources="{cpus: 1, gpus: 0}", cache="refresh"), env=env).returncode
        == 0
    )
    seen = json.loads((Store(work / ".llmctl/store").resolve("p/w") / "env.json").read_text())
    assert (seen["OMP_NUM_THREADS"], seen["CUDA_VISIBLE_DEVICES"]) == ("1", "")


def test_more_than_the_machine_has(llmctl, one):
    done = llmctl("run", one("wrong", "how: env", resources="{cpus: 9999}"))
    assert done.returncode == 7
    assert "`w` asks for 9999 CPU cores, this machine has" in done.stderr


def test_a_module_in_the_current_directory_shadows_nothing(llmctl, one, work):
    (work / "gzip.py").write_text("raise RuntimeError('shadowed')")
    done = llmctl("run", one("make"), env={"PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr
    (work / "fake_run.py").write_text("raise RuntimeError('shadowed')")
    assert llmctl("run", one("make", "rows: 7"), env={"PYTHONSAFEPATH": "1"}).returncode == 0


# -- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 143, marks=pytest.mark.slow),
        (signal.SIGUSR1, 75),
    ],
)
def test_a_signal_means_checkpoint_and_leave(number, code, start, one, work):
    process = start("run", one("count", "max_steps: 2000, pause: 0.02"))
    wait_for(lambda: list((work / ".llmctl/store/work").glob("*/state.json")))
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    assert "error: stopped; finished stages are kept" in stderr
    assert "run the same command again to continue" in stderr
    kinds = [event["type"] for event in events(work)]
    assert kinds.count("stage.checkpoint") == 1
    assert kinds[-1] == "run.end"
    (state,) = (work / ".llmctl/store/work").glob("*/state.json")
    done = json.loads(state.read_text())[0]
    assert 0 < done < 2000
    # Going on costs only what is left, and less far is a prefix of the same work.
    again = start("run", one("count", f"max_steps: {done + 3}, pause: 0.02"))
    again.communicate(timeout=20)
    assert again.returncode == 0
    metrics = json.loads((Store(work / ".llmctl/store").resolve("p/w.metrics") / "metrics.json").read_text())
    assert metrics == {"begun": done, "steps": done + 3}
    # What it left stays for a run that goes further.
    assert json.loads(state.read_text())[0] == done + 3


@pytest.mark.slow
def test_sigusr2_means_checkpoint_and_go_on(start, one, work):
    process = start("run", one("count", "max_steps: 150, pause: 0.02"))
    wait_for(lambda: list((work / ".llmctl/store/work").glob("*/state.json")))
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=20)
    assert process.returncode == 0
    saved = [event["step"] for event in events(work) if event["type"] == "stage.checkpoint"]
    assert len(saved) == 1 and 0 < saved[0] < 150
    assert not list((work / ".llmctl/store/work").glob("*/SAVE"))


def test_a_stage_that_never_asks_is_stopped_where_it_reports(start, work):
    spec = "llmctl: 1\nname: p\nstages:\n  a: {uses: make}\n  b: {uses: upper, inputs: {text: a}, with: {sleep: 60}}\n"
    (work / "p.yaml").write_text(spec)
    process = start("run", "p.yaml")
    wait_for(lambda: progressed(work))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)  # it sleeps for a minute
    assert process.returncode == 130


def test_the_second_signal_kills(start, one, work):
    process = start("run", one("wrong", f"how: deaf, path: {work / 'pid'}"))
    pid = int(wait_for(lambda: (work / "pid").exists() and (work / "pid").read_text()))
    process.send_signal(signal.SIGINT)
    said = next(line for line in process.stderr if "waiting" in line)
    assert "waiting up to 30 s for a checkpoint, again to stop at once" in said
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not alive(pid)


@pytest.mark.parametrize("command", ["run", "stage"])
def test_the_time_for_a_checkpoint_can_be_chosen(command, start, one, work):
    args = ["run", one("wrong", f"how: deaf, path: {work / 'pid'}")]
    if command == "stage":
        args = ["wrong", "--how", "deaf", "--path", str(work / "pid")]
    process = start(*args, "--grace", "0.4")
    pid = int(wait_for(lambda: (work / "pid").exists() and (work / "pid").read_text()))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "waiting up to 0.4 s for a checkpoint" in stderr
    assert not alive(pid)


def test_an_ignored_interrupt_stays_ignored(start, one, work):
    process = start(
        "run",
        one("count", "max_steps: 40, pause: 0.02"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    wait_for(lambda: list((work / ".llmctl/store/work").glob("*/state.json")))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_a_time_limit(llmctl, one):
    done = llmctl("run", one("count", "max_steps: 2000, pause: 0.02", resources="{time: 1s}"))
    assert done.returncode == 124
    assert "it did not end within its time limit of 1 s" in done.stderr


# -- killing ----------------------------------------------------------------------------------------------------------


def test_no_orphan_when_the_runner_is_killed(start, one, work):
    process = start("run", one("wrong", f"how: workers, size: 600, path: {work / 'pids'}"))
    text = wait_for(lambda: (work / "pids").exists() and (work / "pids").read_text())
    pids = [int(word) for word in text.split()]
    assert all(map(alive, pids))
    group = os.getpgid(pids[0])
    assert group == pids[0]
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(map(alive, pids)))
    wait_for(lambda: not any(in_group(int(path.name), group) for path in Path("/proc").glob("[0-9]*")))


def in_group(pid, group):
    try:
        return os.getpgid(pid) == group and alive(pid)
    except OSError:
        return False


def test_no_worker_outlives_its_stage(llmctl, one, work):
    assert llmctl("run", one("wrong", f"how: workers, size: 0, path: {work / 'pids'}")).returncode == 0
    _, worker = (work / "pids").read_text().split()
    assert not alive(int(worker))


def test_a_runner_killed_before_the_stage_has_begun(llmctl_env, work, one, start, tmp_path):
    """The stage finds another parent than the one it was told, and leaves without a trace."""
    read, write = os.pipe()
    args = ["stage", "exec", "--key", "sha256:" + "0" * 64, "--store", str(tmp_path / "s"), "--parent", "1"]
    process = start(*args, "--heartbeat", str(read), pass_fds=(read,))
    process.communicate(timeout=20)
    assert process.returncode == 137
    os.close(read)
    os.close(write)


def test_kill_at_random_instants_then_go_on(start, one, work, llmctl):
    """Whatever is killed when, the next run goes on, and the result is that of an uninterrupted run."""
    whole = llmctl("run", one("count", "max_steps: 60"), "--store", work / "other")
    assert whole.returncode == 0
    expected = Store(work / "other").resolve("p/w.result").id
    seeds, spec = random.Random(3), one("count", "max_steps: 60, pause: 0.02")
    steps = []
    for _ in range(4):
        process = start("run", spec)
        time.sleep(seeds.uniform(0.3, 1.5))
        process.kill()
        process.communicate()
        steps += [json.loads(p.read_text())[0] for p in (work / ".llmctl/store/work").glob("*/state.json")]
    done = llmctl("run", spec)
    assert done.returncode == 0, done.stderr
    store = Store(work / ".llmctl/store")
    assert store.resolve("p/w.result").id == expected
    assert steps == sorted(steps)
    assert tmp(work) == []


# -- two at once ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_runs_of_the_same_work(start, llmctl, one, work):
    spec = one("count", "max_steps: 250, pause: 0.02")
    first = start("run", spec)
    wait_for(lambda: list((work / ".llmctl/store/work").glob("*/state.json")))
    refused = llmctl("run", spec, "--on-busy", "fail")
    assert refused.returncode == 6
    assert f"another process does the same work: pid {first.pid} on " in refused.stderr
    beside = start("run", spec, "--on-busy", "run")
    waiting = llmctl("run", spec)
    assert waiting.returncode == 0
    assert f"waiting for it: pid {first.pid} on " in waiting.stderr
    assert "w: cached" in waiting.stderr
    assert first.wait(20) == beside.wait(20) == 0
    texts = [(run / "events.jsonl").read_text() for run in runs(work)]
    assert sum(text.count('"type": "stage.start"') for text in texts) == 2
