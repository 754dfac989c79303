"""`llmctl chat` in a real terminal, with the model of the test that runs it: the process is a fork."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmctl_serve.chat import chat


def read_until(master: int, *texts: bytes, seconds: float = 20) -> str:
    """What is shown until each of the texts has come, one after the other, in whatever pieces."""
    found, end, deadline = b"", 0, time.monotonic() + seconds
    for text in texts:
        while (start := found.find(text, end)) < 0:
            ready, _, _ = select.select([master], [], [], max(0, deadline - time.monotonic()))
            assert ready, (text, found)
            found += os.read(master, 4096)
        end = start + len(text)
    return found.decode(errors="backslashreplace")


def exit_code(child: int, seconds: float = 20) -> int:
    """Of a process that is about to end; one that does not is killed."""
    deadline = time.monotonic() + seconds
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the program did not end")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


class Typist:
    """Types into a terminal: `typist(text, answer)` types a line, or the keys of bytes, and waits for what is shown."""

    def __init__(self, child: int, master: int) -> None:
        self.child, self.master = child, master
        self.screen = read_until(master, b"> ")

    def __call__(self, text: str | bytes, answer: str = "", end: bytes = b"> ") -> str:
        self.press(text) if isinstance(text, bytes) else os.write(self.master, text.encode() + b"\n")
        return read_until(self.master, answer.encode(), end)

    def press(self, key: bytes) -> None:
        """Press a key once the program waits: between prompt and read its signal would wait for a line."""
        time.sleep(0.3)
        while Path(f"/proc/{self.child}/stat").read_text().rpartition(")")[2].split()[0] not in "SZ":
            time.sleep(0.01)
        os.write(self.master, key)


@contextlib.contextmanager
def open_chat(
    *arguments: object, stdout: Path | int | None = None, errors: str = "strict", code: int = 0
) -> Iterator[Typist]:
    """`llmctl chat` in a pty, its stdout in a file or a descriptor if one is named; it must end with this exit code."""
    child, master = pty.fork()
    if child == 0:  # the fork has the fixture's scripted model
        os.dup2(1, 2)
        if stdout is not None:
            os.dup2(stdout if isinstance(stdout, int) else os.open(stdout, os.O_CREAT | os.O_WRONLY), 1)
        sys.stdin = io.TextIOWrapper(io.FileIO(0), errors=errors)
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
        sys.stderr = sys.__stderr__ = io.TextIOWrapper(io.FileIO(2, "w"), write_through=True)
        ended = 1
        try:
            chat.main([str(argument) for argument in arguments], standalone_mode=False)
            ended = 0
        finally:
            os._exit(ended)
    try:
        yield Typist(child, master)
        assert exit_code(child) == code
    finally:
        os.close(master)
