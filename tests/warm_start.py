"""`llmctl` in forks of one process that has imported it: each a process of its own, without half a second of imports.

A test session runs the command line a thousand times, and most of these runs do less than their imports cost. What a
fork does not repeat is the start of the interpreter, so a run that sets variables it reads (`PYTHON…`) or hands on more
than the three standard streams is not for this: `tests/conftest.py` starts an interpreter for it, as does every test
that measures a start.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

READ_AT_START = ("PYTHON", "LC_", "LANG", "TZ", "LD_")
"""How the names of variables begin that an interpreter reads once; PYTHONPATH is made good for."""
COMMANDS = ("llmctl.cli", "llmctl.stage_command", "llmctl.spec.commands", "llmctl.store.commands")
"""Modules of the commands that tests run most, besides all of the two packages that read and run a spec."""
LARGEST = 1 << 20
"""Bytes of a request: arguments and environment."""


class WarmStart:
    """The process that forks; a context manager. It runs one command at a time, and `fits` none beside it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = dict(env)
        self.turn = threading.Lock()
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                env=self.env,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def __enter__(self) -> WarmStart:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.process.wait()

    def fits(self, env: Mapping[str, str]) -> bool:
        """Whether nothing is running, and an interpreter that starts with `env` begins as this one did."""
        return not self.turn.locked() and _read_at_start(env) == _read_at_start(self.env)

    def run(
        self, args: Sequence[str], env: Mapping[str, str], cwd: Path, stdin: IO[bytes] | int, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run([python, "-m", "llmctl", *args], …, capture_output=True, text=True)`.

        subprocess.TimeoutExpired after `timeout` seconds; the command is dead then.
        """
        request = json.dumps({"args": list(args), "env": dict(env), "cwd": str(cwd)}).encode()
        command = [sys.executable, "-m", "llmctl", *args]
        readers = [_Reader(), _Reader()]
        with self.turn:
            with Path(os.devnull).open("rb") as nothing:
                source = nothing if stdin == subprocess.DEVNULL else stdin
                place = source if isinstance(source, int) else source.fileno()
                socket.send_fds(self.ours, [request], [place, *(reader.end for reader in readers)])
            for reader in readers:
                os.close(reader.end)
            code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, code, *(reader.text() for reader in readers))

    def _wait(self, timeout: float) -> int | None:
        """The exit code; None for a command that had to be killed."""
        child = int(self.ours.recv(64))
        self.ours.settimeout(timeout)
        try:
            return int(self.ours.recv(64))
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            self.ours.settimeout(None)
            self.ours.recv(64)
            return None
        finally:
            self.ours.settimeout(None)


class _Reader(threading.Thread):
    """Reads a pipe to its end, so that whoever writes there never waits."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.pipe, self.end = os.pipe()
        self.read = b""
        self.start()

    def run(self) -> None:
        with os.fdopen(self.pipe, "rb") as pipe:
            self.read = pipe.read()

    def text(self) -> str:
        self.join()
        return self.read.decode().replace("\r\n", "\n")


def _read_at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: env[name] for name in env if name.startswith(READ_AT_START) and name != "PYTHONPATH"}


def _preload() -> None:
    """Import what commands import, and nothing that looks at the environment or starts a thread."""
    for package in ("llmctl.spec", "llmctl.pipeline", "llmctl.launch"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    for name in COMMANDS:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork has none of the threads that modules start"


def _serve(control: socket.socket) -> None:
    """Fork for each request; returns in the fork alone, which is then to run the command."""
    while True:
        request, streams, _, _ = socket.recv_fds(control, LARGEST, 3)
        if not request:
            os._exit(0)
        child = os.fork()
        if not child:
            _become(json.loads(request), streams)
            control.close()
            return
        for stream in streams:
            os.close(stream)
        control.send(str(child).encode())
        control.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def _become(request: dict[str, object], streams: Sequence[int]) -> None:
    """Take over what a new interpreter would have begun with."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        old = getattr(sys, name)  # knows whether it can seek, as the new file may not
        new = os.fdopen(old.fileno(), mode, encoding=old.encoding, errors=old.errors, closefd=False)
        new.reconfigure(line_buffering=name == "stderr")
        setattr(sys, name, new)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    roots = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [str(Path.cwd()), *roots]
    sys.argv = ["llmctl", *request["args"]]


if __name__ == "__main__":
    _preload()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever stops the tests closes the socket, too
    _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module("llmctl", run_name="__main__", alter_sys=True)
