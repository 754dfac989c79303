"""The tiny stages of `tests/pipeline`, run through the real command line in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = Path(__file__).parents[1] / "pipeline" / "fake"


@pytest.fixture(autouse=True)
def fake_stages(install):
    """The plugin of `tests/pipeline/fake`, installed as the distribution `fake`."""
    return install(
        "fake", {"fake": "fake_stages"}, {path.name: path.read_text() for path in FAKE.glob("*.py")}, record=True
    )


@pytest.fixture
def work(llmctl, tmp_path):
    """The directory that `llmctl` runs in."""
    return tmp_path / "work"


@pytest.fixture
def one(work):
    """Write `p.yaml` with the one stage `w`: `one("count", "max_steps: 3")`; returns its name."""

    def write(stage, params="", **fields):
        extra = "".join(f", {name}: {value}" for name, value in fields.items())
        text = f"llmctl: 1\nname: p\nstages:\n  w: {{uses: {stage}, with: {{{params}}}{extra}}}\n"
        (work / "p.yaml").write_text(text)
        return "p.yaml"

    return write


@pytest.fixture
def start(llmctl_env, work):
    """Start `llmctl …` without waiting for it; what is left at the end is killed."""
    started = []

    def popen(*args, **options):
        env = {**llmctl_env, **options.pop("env", {})}
        options.setdefault("start_new_session", True)
        process = subprocess.Popen(
            [sys.executable, "-m", "llmctl", *args],
            cwd=work,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def mount(tmp_path):
    """Mount a small disk: `mount("1m")` → its directory; skips where that is not permitted."""
    disk = tmp_path / "disk"

    def tmpfs(size):
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a small disk")
        return disk

    yield tmpfs
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def small_disk(mount):
    """A disk of one megabyte."""
    return mount("1m")
