"""`llmctl doctor` as a program, and its experiments with real and with broken libraries."""

from __future__ import annotations

import base64
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmctl.doctor import probes
from llmctl.doctor.world import run_program, start_probe


def test_the_environment_of_the_tests_is_healthy(llmctl, tmp_path):
    done = llmctl("doctor", timeout=200)
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("problem")]
    if not [line for line in lines if line.startswith("warning")]:  # a container or a slow disk may deserve one
        assert lines[-1] == "nothing to do"
    assert list((tmp_path / "work").iterdir()) == [], "nothing is left where the store would be"


DAMAGED = {
    "bad_url": {"METADATA": "Name: bad-url\nVersion: 1\n", "direct_url.json": "{"},
    "odd_url": {"METADATA": "Name: odd-url\nVersion: 1\n", "direct_url.json": "[1]"},
    "empty": {"METADATA": ""},
    "none": {},
    "odd": {"METADATA": "Name: odd\nVersion: ?\nRequires-Dist: what ever (\n"},
}


def test_what_is_really_installed_is_looked_at(llmctl, install, site):
    """Two runtimes, a broken plugin, an absent spec: each with its way out. Damaged records are no traceback."""
    install("onnxruntime", {}, {}, version="1.31.1")
    install("acme", {"acme": "acme"}, {"acme/__init__.py": "raise RuntimeError('boom')"})
    for name, files in DAMAGED.items():
        (site / f"{name}-1.dist-info").mkdir()
        for file, text in files.items():
            (site / f"{name}-1.dist-info" / file).write_text(text)
    done = llmctl("doctor", "absent.yaml", timeout=200)
    assert (done.returncode, done.stderr) == (7, "")
    assert "onnxruntime and onnxruntime-gpu overwrite each other's files" in done.stdout
    assert "uninstall -y onnxruntime onnxruntime-gpu" in done.stdout
    assert "acme 0.1 is broken: RuntimeError: boom" in done.stdout
    assert "cannot read absent.yaml" in done.stdout
    assert "check failed" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("3 problems")


def test_a_spec_that_asks_for_too_much(llmctl, tmp_path):
    (tmp_path / "work/s.yaml").write_text(
        "llmctl: 1\nname: s\nstages:\n  data: {uses: data, with: {reader: python-stdlib}, resources: {gpus: 99}}\n"
        "profiles: {small: {stages: {data: {resources: {gpus: 0}}}}}\n"
    )
    done = llmctl("doctor", "s.yaml", timeout=200)
    assert done.returncode == 7
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    refused = llmctl("run", "s.yaml")
    assert refused.returncode == 7
    assert refused.stderr.startswith(f"error: {said.partition('spec')[2].strip()}\n")
    assert "--set stages.data.resources.gpus=" in done.stdout
    assert llmctl("doctor", "s.yaml", "--profile", "small", timeout=200).returncode == 0


def test_as_json_with_little_cpu_and_nothing_heavy_in_this_process(llmctl_env, tmp_path):
    code = (
        "import sys, resource\nfrom llmctl.cli import main\n"
        "try: main(['doctor', '--format', 'json'])\nexcept SystemExit: pass\n"
        "own = resource.getrusage(resource.RUSAGE_SELF).ru_utime\n"
        "print([n for n in ('torch', 'onnxruntime', 'numpy') if n in sys.modules], own, file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], env=llmctl_env, cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    modules, own = done.stderr.splitlines()[-1].rsplit(" ", 1)
    assert modules == "[]" and float(own) < 2
    assert after.ru_utime - before.ru_utime < 15  # torch and ONNX Runtime are imported once each
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert {"python", "torch", "onnxruntime", "file-system"} <= {row["check"] for row in report["findings"]}
    assert all(set(row) == {"check", "state", "text", "fix"} for row in report["findings"])


# -- experiments ------------------------------------------------------------------------------------------------------


def test_the_written_out_model_is_a_model():
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(base64.b64decode(probes.IDENTITY))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


def test_onnxruntime_is_really_asked():
    found = start_probe("onnxruntime")
    assert found.fault == "" and found.values["providers"]["CPUExecutionProvider"] is None
    others = {name: fault for name, fault in found.values["providers"].items() if name != "CPUExecutionProvider"}
    if not Path("/proc/driver/nvidia").exists():
        assert all(others.values()), "listed without a GPU, and none of them loads"


def test_torch_is_really_asked():
    pytest.importorskip("torch")
    found = start_probe("torch")
    assert found.fault == "" and found.values["cpu"] is True


RUNTIME = """
print("a print")
__version__ = "9"
def set_default_logger_severity(level): pass
def get_available_providers(): return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class InferenceSession:
    def __init__(self, model, providers): pass
    def get_providers(self): return ["CPUExecutionProvider"]
"""


def test_a_session_that_falls_back_in_silence_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text(RUNTIME)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = start_probe("onnxruntime").values["providers"]
    assert found["CUDAExecutionProvider"] == "a session falls back to CPUExecutionProvider"
    assert found["CPUExecutionProvider"] is None


@pytest.mark.parametrize(
    ("code", "seconds", "fault"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 30, "it crashed (SIGSEGV)"),
        (
            "raise ImportError('libcudart.so.13: cannot open shared object file')",
            30,
            "ImportError: libcudart.so.13: cannot",
        ),
        ("import sys; sys.exit('no')", 30, "no"),
        ("import time; time.sleep(60)", 3, "no answer within 3 s"),
    ],
)
def test_a_library_that_is_broken_is_reported_not_suffered(code, seconds, fault, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    begun = time.monotonic()
    assert start_probe("torch", seconds=seconds).fault.startswith(fault)
    assert time.monotonic() - begun < 30


def test_the_file_system_is_really_tried(tmp_path):
    found = start_probe("place", str(tmp_path)).values
    assert {name: found[name] for name in ("case", "rename", "link", "flock", "fsync")} == dict.fromkeys(
        ("case", "rename", "link", "flock", "fsync"), True
    )
    assert abs(found["skew"]) < 5
    assert list(tmp_path.iterdir()) == []
    assert "FileNotFoundError" in start_probe("place", str(tmp_path / "absent")).fault


def test_a_file_system_without_links_locks_and_syncs_is_noticed(tmp_path, monkeypatch):
    import fcntl

    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(fcntl, "flock", lambda *args: None)  # says yes to everybody, as some network mounts do
    found = probes.place(str(tmp_path))
    assert (found["link"], found["fsync"], found["flock"]) == (False, False, False)
    assert found["rename"] is True
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert probes.place(str(tmp_path))["flock"] is False


def test_a_file_system_whose_renames_leave_a_gap_is_noticed(tmp_path, monkeypatch):
    """Some mounts rename by removing, copying and removing; the control: one that does it in one step."""

    def in_two_steps(self, target):
        text = self.read_text()
        target.unlink()
        time.sleep(0.01)
        target.write_text(text)
        self.unlink()

    assert probes._renames(_made(tmp_path / "control")) is True
    for name, replace in (("two-steps", in_two_steps), ("refused", _refuse)):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            assert probes._renames(_made(tmp_path / name)) is False, name
    monkeypatch.setattr(Path, "rename", _refuse)
    assert probes.place(str(tmp_path))["rename"] is False


def _made(folder):
    folder.mkdir()
    return folder


def _refuse(*args):
    raise OSError(95, "Operation not supported")


def test_programs_that_fail_or_are_not_there():
    assert run_program(["/no/such/program"]).code is None
    assert run_program(["sleep", "30"], seconds=0.2).text == "no answer within 0 s"
    assert run_program(["sh", "-c", "echo out; echo err >&2; exit 3"]).code == 3
