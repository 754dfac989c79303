"""One stage as a process on this machine: started in a session of its own, watched, stopped, explained."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import TempFail
from llmctl.launch.failures import Failure, killed
from llmctl.launch.masking import MaskedStream, Masker
from llmctl.launch.signals import Stop
from llmctl.launch.stopping import GRACE
from llmctl.store.layout import Layout
from llmctl.store.locks import Lock

NO_SECRETS = Masker({})
PAUSE = 0.25
TIMED_OUT = 124


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to start: the request of `key`, and how. `work` and `lock` belong together."""

    key: str
    instance: str
    run: str
    log: Path
    environment: Mapping[str, str]
    owner: str
    """The distribution of the plugin, for the message of a bug."""
    work: int = 1
    publish: str = "first"
    attempt: int = 1
    stop_at: int = 0
    """The step after which it is asked to stop; 0 for none."""
    lock: Lock | None = None
    time_limit: float | None = None
    masker: Masker = NO_SECRETS
    """Hides the secrets of the run in what the stage says."""
    masks_log: bool = False
    """Whether the stage was given secrets, so that its prints go through this process on their way to the log."""


@dataclass(kw_only=True)
class Outcome:
    """How a stage's process ended. `outputs` are content ids by port, empty unless `failure` is None."""

    outputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    stopped: bool = False
    """It ended because it was asked to."""


class StageProcess:
    """A running stage. Supervise it in the thread that started it: Linux's parent-death signal follows the thread."""

    def __init__(self, layout: Layout, job: Job, grace: float = GRACE) -> None:
        self.job = job
        self._grace = grace
        self._signalled = False
        self._heard = False
        """Whether it has said anything: before that it may not know what SIGUSR2 means, and would die of it."""
        self._saves = 0
        self._deadline: float | None = None
        self._ends = time.monotonic() + job.time_limit if job.time_limit else None
        self._timed_out = False
        self._buffer = b""
        self._final: dict[str, Any] = {}
        self._prints: _MaskedLog | None = None
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self._events, write_events = os.pipe()
        read_heartbeat, self._heartbeat = os.pipe()
        try:
            with job.log.open("ab") as log:
                target = log.fileno()
                if job.masks_log:
                    self._prints = _MaskedLog(job.log, job.masker)
                    target = self._prints.target
                lock = [job.lock.descriptor] if job.lock else []
                self._process = subprocess.Popen(
                    command(layout, job, write_events, read_heartbeat),
                    stdin=subprocess.DEVNULL,
                    stdout=target,
                    stderr=target,
                    env=dict(job.environment),
                    start_new_session=True,
                    pass_fds=(write_events, read_heartbeat, *lock),
                )
        finally:
            os.close(write_events)
            os.close(read_heartbeat)
            if self._prints is not None:
                self._prints.started()
        os.set_blocking(self._events, False)

    @property
    def pid(self) -> int:
        """Process id, and id of the process group."""
        return self._process.pid

    def supervise(
        self,
        on_event: Callable[[dict[str, Any]], None],
        stop: Stop | None = None,
        tick: Callable[[], None] | None = None,
    ) -> Outcome:
        """Pass events on until the process has ended, forward requests to stop; the group is gone on return.

        The first request is SIGTERM for the stage alone, which may need its own workers for a last checkpoint; the
        second, or the end of the grace period, is SIGKILL for its whole group.
        """
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._events, selectors.EVENT_READ)
                if self._prints is not None:
                    selector.register(self._prints, selectors.EVENT_READ)
                if stop is not None:
                    selector.register(stop, selectors.EVENT_READ)
                while not self._exited():
                    ready = {key.fd for key, _ in selector.select(PAUSE)}
                    if self._events in ready and not self._read(on_event):
                        selector.unregister(self._events)
                    if self._prints is not None and self._prints.fileno() in ready and not self._prints.copy():
                        selector.unregister(self._prints)
                    self._check_stop(stop)
                    if tick is not None:
                        tick()
            self._read(on_event)
        finally:
            self._end()
        return self._outcome(stop)

    def _exited(self) -> bool:
        """Whether the process has ended; it stays a zombie, so that its group id cannot be taken by another."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _read(self, on_event: Callable[[dict[str, Any]], None]) -> bool:
        """Pass on what lies in the pipe; False at its end."""
        while True:
            try:
                data = os.read(self._events, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                self._take(line, on_event)

    def _take(self, line: bytes, on_event: Callable[[dict[str, Any]], None]) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # not ours: something in the stage wrote to a descriptor that it did not open
        event = self.job.masker.plain(event)
        self._heard = True
        if event.get("type") in ("result", "failure"):
            self._final = event
        else:
            on_event(event)

    def _check_stop(self, stop: Stop | None) -> None:
        now = time.monotonic()
        requests = 0
        if stop is not None:
            stop.drain()
            requests = stop.requests
            if stop.saves > self._saves and self._heard:
                self._saves = stop.saves
                self._process.send_signal(signal.SIGUSR2)
        if self._ends is not None and now >= self._ends and not self._signalled:
            self._timed_out = True
        if (requests or self._timed_out) and not self._signalled:
            self._signalled = True
            self._deadline = now + self._grace
            self._process.send_signal(signal.SIGTERM)
        if requests > 1 or (self._deadline is not None and now >= self._deadline):
            self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _end(self) -> None:
        """End what is left of the group, then let go of everything."""
        self._kill()
        self._process.wait()
        if self._prints is not None:
            self._prints.close()
        os.close(self._events)
        os.close(self._heartbeat)

    def _outcome(self, stop: Stop | None) -> Outcome:
        final, code = self._final, self._process.returncode
        if final.get("type") == "result" and code == 0:
            return Outcome(outputs=final["outputs"], metrics=final["metrics"])
        if self._timed_out:
            text = f"it did not end within its time limit of {self.job.time_limit:g} s"
            failure = Failure(code=TIMED_OUT, message=text, hint="raise resources.time; a checkpoint is continued")
            return Outcome(failure=failure)
        if final.get("type") == "failure":
            found = {name: final[name] for name in ("code", "message", "hint", "bug")}
            return Outcome(failure=Failure(**found), stopped=self._signalled and final["code"] == 75)
        if self._signalled and stop is not None:
            text = "it was ended on request before it had written a checkpoint"
            hint = "run the same command again; it continues from the last checkpoint there is"
            return Outcome(failure=Failure(code=TempFail.exit_code, message=text, hint=hint), stopped=True)
        return Outcome(failure=killed(code, self.job.owner))


class _MaskedLog:
    """A pipe whose contents go to a log with every secret masked."""

    def __init__(self, path: Path, masker: Masker) -> None:
        self._read, self.target = os.pipe()
        os.set_blocking(self._read, False)
        self._log = path.open("ab", buffering=0)
        self._stream = MaskedStream(masker)

    def fileno(self) -> int:
        """Becomes readable when the stage prints."""
        return self._read

    def started(self) -> None:
        """The stage has its end of the pipe by now."""
        os.close(self.target)

    def copy(self) -> bool:
        """Copy what has arrived; False at the end of the pipe."""
        while True:
            try:
                data = os.read(self._read, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._log.write(self._stream.feed(data))

    def close(self) -> None:
        """Copy the rest; all processes of the stage have ended."""
        self.copy()
        self._log.write(self._stream.end())
        self._log.close()
        os.close(self._read)


def command(layout: Layout, job: Job, events: int, heartbeat: int) -> list[str]:
    """The command line of a stage's process, given its ends of the two pipes."""
    words = [sys.executable, "-P", "-m", "llmctl", "stage", "exec", "--key", job.key, "--store", str(layout.root)]
    words += ["--run", job.run, "--work", str(job.work), "--publish", job.publish, "--attempt", str(job.attempt)]
    words += ["--stop-at", str(job.stop_at)] if job.stop_at else []
    words += ["--events", str(events), "--parent", str(os.getpid()), "--heartbeat", str(heartbeat)]
    return words + (["--lock", str(job.lock.descriptor)] if job.lock else [])
