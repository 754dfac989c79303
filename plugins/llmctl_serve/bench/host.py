"""A server of our own for the time of a measurement: `llmctl serve` in a process beside the client's."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from llmctl import StageError
from llmctl_serve.endpoint import Endpoint

START_SECONDS = 120
STOP_SECONDS = 30
NAME = "bench"


@contextmanager
def hosted(model: Path, device: str, threads: int) -> Iterator[Endpoint]:
    """Serve a model on a free port of this machine within a `with` block. StageError if it does not come up.

    What the server leaves behind, its log and its receipt, goes to a temporary directory.
    """
    port = _free_port()
    command = [sys.executable, "-m", "llmctl", "serve", "--model", str(model.resolve()), "--port", str(port)]
    command += ["--model-name", NAME, "--device", device, "--threads", str(threads)]
    with tempfile.TemporaryDirectory(prefix="llmctl-bench-") as work:
        log = Path(work) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=work,
                env={**os.environ, "LLMCTL_STORE": str(Path(work) / "store")},
            )
        try:
            _wait(process, port, log)
            yield Endpoint("127.0.0.1", port)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise StageError("the server did not start: " + "; ".join(said[-3:]), hint="llmctl serve --model …")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with closing(connection), suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.05)
    raise StageError(f"the server did not answer within {START_SECONDS} s", hint="llmctl serve --model …")
