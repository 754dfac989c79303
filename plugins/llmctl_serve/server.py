"""A running server: the port taken early, uvicorn in a thread, requests drained at the end."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import uvicorn
from fastapi import FastAPI

from llmctl import MachineError, StageError

STARTUP_SECONDS = 30
SEND_BUFFER = 1 << 18
"""Bytes of the kernel for one connection; it inherits them from the listening socket."""
GRACE_SECONDS = 5
"""After the drain: for clients that do not take what was sent to them."""


def listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded, so that a taken one costs nothing. MachineError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise MachineError(f"no address to listen on is called `{host}`", hint="use 127.0.0.1 or 0.0.0.0") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What a client that does not read can make us hold: this, and 64 KiB in uvicorn.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listener.bind(address)
        # Listening now, because two processes may bind one port with SO_REUSEADDR, but only one may listen.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            hint = f"stop the process that has it, or use --port {port + 1 if port < 65535 else 0}"
            raise MachineError(f"port {port} on {host} is in use", hint=hint) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise MachineError(f"port {port} needs more rights", hint="use a port above 1023") from error
        raise MachineError(f"cannot listen on {host}:{port}: {error.strerror}", hint="use --host 127.0.0.1") from error
    return listener


def endpoint(listener: socket.socket) -> tuple[str, int]:
    """Host and port that a client on this machine connects to."""
    host, port = listener.getsockname()[:2]
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def url(listener: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = endpoint(listener)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer:
    """Serves `app` on a socket within a `with` block.

    `limits` are further settings of uvicorn (`Guard.uvicorn`).

    Leaving it takes no new requests, lets the running ones finish for `drain_seconds`, then calls `give_up`, which must
    end them, and waits for that.
    """

    def __init__(
        self, app: FastAPI, listener: socket.socket, drain_seconds: int, give_up: Callable[[], None], **limits: Any
    ) -> None:
        self._drain_seconds, self._give_up = drain_seconds, give_up
        config = uvicorn.Config(
            app,
            log_config=None,  # the root logger belongs to the caller
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=drain_seconds + GRACE_SECONDS,
            **limits,
        )
        self._server = uvicorn.Server(config)
        self._listener = listener
        # In a thread uvicorn leaves the signals alone: they are the stage's, which polls `should_stop`.
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="http", daemon=True)

    def __enter__(self) -> HttpServer:
        self._thread.start()
        deadline = time.monotonic() + STARTUP_SECONDS
        while not self._server.started:
            if not self.alive or time.monotonic() > deadline:
                raise StageError("the HTTP server did not start", hint="see the log of this stage")
            time.sleep(0.005)
        return self

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._thread.is_alive()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join(self._drain_seconds)
        if self._thread.is_alive():
            self._give_up()
            self._thread.join()
