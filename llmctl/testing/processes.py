"""A stage as users run it: by the command line, in a store, in processes that may be killed at any instant."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import LlmctlError
from llmctl.stage import Artifact, Stage
from llmctl.store import Store

MARKER = "LLMCTL_CONFORMANCE"
"""A variable by which everything that an example has started is known again."""
PATIENCE = 5.0
"""Seconds after a kill within which everything that was started must be gone."""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    events: int
    """Events of the stage that arrived, progress included."""
    began: float = 0.0
    """Seconds until the stage itself began."""

    def ids(self) -> dict[str, tuple[str, str]]:
        """(content id, type) of the outputs by port, from the records on stdout."""
        rows = [json.loads(line) for line in self.stdout.splitlines() if line.strip()]
        return {row["port"]: (row["id"], row["type"]) for row in rows if row.get("llmctl") == "ref"}

    def error(self) -> str:
        """The line that says what went wrong."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error")]
        return lines[-1] if lines else f"exit {self.code}"


@dataclass
class Runner:
    """Runs one example of one stage below `directory`: `work` is the current directory, `store` the store."""

    stage: Stage
    params: Mapping[str, Any]
    inputs: Mapping[str, Artifact | Sequence[Artifact]]
    directory: Path
    timeout: float = 600.0
    work: Path = field(init=False)
    store: Path = field(init=False)

    def __post_init__(self) -> None:
        self.work, self.store = self.directory / "work", self.directory / "store"
        self.work.mkdir(parents=True)
        paths = {
            port: [str(a.path) for a in bound] if not isinstance(bound, Artifact) else str(bound.path)
            for port, bound in self.inputs.items()
        }
        spec = {"llmctl": 1, "name": "conformance", "uses": self.stage.name, "inputs": paths, "with": dict(self.params)}
        (self.directory / "stage.yaml").write_text(json.dumps(spec), encoding="utf-8")

    def opened(self) -> Store:
        """The store; there may be nothing in it yet."""
        return Store.open(self.store)

    def run(self, kill_after: float | None = None, kill_at: int | None = None) -> Ended:
        """Run to the end, or `kill -9` after that many seconds or at that event of the stage, whichever comes first."""
        reading, writing = os.pipe()
        command = [sys.executable, "-P", "-m", "llmctl", self.stage.name, "-c", str(self.directory / "stage.yaml")]
        command += ["--store", str(self.store), "--format", "json", "--events", f"fd:{writing}"]
        env = {name: value for name, value in os.environ.items() if name not in ("LLMCTL_STORE", "LLMCTL_EVENTS")}
        env[MARKER] = str(self.directory)
        begun = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.work,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        watch = _Watch(reading, process, kill_at, begun)
        timer = threading.Timer(self.timeout if kill_after is None else kill_after, process.kill)
        watch.start()
        timer.start()
        try:
            stdout, stderr = process.communicate()
        finally:
            timer.cancel()
            process.kill()
            watch.join(PATIENCE)
        seconds = time.monotonic() - begun
        return Ended(process.returncode, stdout, stderr, seconds, watch.count, watch.began)

    def left_behind(self) -> list[str]:
        """The command lines of this example's processes that are still there `PATIENCE` seconds after everything
        should have ended; they are ended then.
        """
        ends, marker = time.monotonic() + PATIENCE, f"{MARKER}={self.directory}".encode()
        while (found := _processes(marker)) and time.monotonic() < ends:
            time.sleep(0.05)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return list(found.values())

    def damage(self) -> str:
        """The first artifact in the store that is not whole; empty if all are."""
        store = self.opened()
        for path in sorted((store.root / "artifacts" / "sha256").glob("*/*")):
            if not (path / "llmctl.json").is_file():
                return f"{path} has no manifest"
            try:
                store.verify(path.name)
            except LlmctlError as error:
                return error.message
        return ""


class _Watch(threading.Thread):
    """Counts the events of the stage, and kills the command at the one that was asked for."""

    def __init__(self, descriptor: int, process: subprocess.Popen[str], kill_at: int | None, begun: float) -> None:
        super().__init__(daemon=True)
        self._descriptor, self._process, self._kill_at, self._begun = descriptor, process, kill_at, begun
        self.count = 0
        self.began = 0.0

    def run(self) -> None:
        """Read until the last holder of the other end is gone."""
        with os.fdopen(self._descriptor, "rb") as events:
            for line in events:
                kind = _kind(line)
                if kind == "stage.start":
                    self.began = time.monotonic() - self._begun
                if kind in ("stage.progress", "stage.checkpoint", "metric", "artifact", "log"):
                    self.count += 1
                    if self.count == self._kill_at:
                        with contextlib.suppress(ProcessLookupError):
                            self._process.send_signal(signal.SIGKILL)


def _kind(line: bytes) -> str:
    try:
        return str(json.loads(line).get("type", ""))
    except ValueError:
        return ""  # cut off by the kill


def _processes(marker: bytes) -> dict[int, str]:
    """Pid → command line of the processes whose environment holds `marker`; needs /proc."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                marker in (entry / "environ").read_bytes().split(b"\0")
                and b"\nState:\tZ" not in (entry / "status").read_bytes()
            ):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found[int(entry.name)] = words[:80]
    return found
