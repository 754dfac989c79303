"""Stages in a shell pipe: references as JSON lines on stdout, early failure, lost readers (`pipeline.md` 3).

The shell starts all stages of a pipe at once; data never goes through it. Order in every stage: validate the own spec,
say `hello`, read stdin to its end (`llmctl.upstream`), then work. One record is one `write(2)`.
"""

from __future__ import annotations

import json
import os
import select
import stat
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmctl.console import json_line
from llmctl.errors import LlmctlError

VERSION = 1
FORMATS = ("auto", "text", "json", "path", "id")
READER_WAIT = 0.5
"""Seconds that the first stage of a pipe waits for a reader that dies at once, before it begins any work."""
STDIN, STDOUT = 0, 1

Format = Literal["text", "json", "path", "id"]


class ReaderGone(LlmctlError):
    """The next stage of the pipe died before any work began: nothing was started."""

    exit_code = 141

    def __init__(self) -> None:
        super().__init__("not run, the next command of the pipe has ended", hint="its own message says why")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A committed artifact as it travels through a pipe. `via` marks one that the sender only passed on."""

    port: str
    type: str
    id: str
    store: str
    path: str
    via: bool = False

    def record(self, *, via: bool) -> dict[str, Any]:
        """The `ref` record for stdout."""
        own = {name: getattr(self, name) for name in ("port", "type", "id", "store", "path")}
        return {"llmctl": "ref", "v": VERSION, **own, **({"via": True} if via else {})}


class Stream:
    """What this process says on stdout. With a format other than `json` it writes no records, only the result."""

    def __init__(self, stage: str, format: Format, log_format: str = "text") -> None:
        self.stage = stage
        self.format = format
        self.log_format = log_format
        self.reader_gone = False
        self.cause = ""
        """The stage at fault if it is not this one; the `end` record passes it on."""
        self._said_hello = 0.0
        self._told = False
        self._ended = False

    @property
    def watches(self) -> bool:
        """Whether the death of a reader can be seen: records into a pipe or a socket."""
        return self.format == "json" and is_pipe(STDOUT)

    def hello(self, outputs: Mapping[str, str], *, stdin: bool) -> None:
        """Name the outputs to come. `stdin` says that references from further up may follow."""
        self._said_hello = time.monotonic()
        self._write(
            {"llmctl": "hello", "stage": self.stage, "outputs": dict(outputs), "stdin": stdin, "pid": os.getpid()}
        )

    def forward(self, record: Mapping[str, Any]) -> None:
        """Pass a record from upstream on: references marked `via`, the announcements as `upstream`."""
        if record["llmctl"] in ("hello", "upstream"):
            fields = {name: record.get(name) for name in ("stage", "outputs", "stdin")}
            self._write({"llmctl": "upstream", **fields})
        elif record["llmctl"] == "ref":
            self._write({**record, "via": True})

    def refs(self, references: Iterable[Reference]) -> None:
        """The committed outputs of this stage, in the chosen format."""
        references = list(references)
        main = [ref for ref in references if ref.type != "metrics"] or references
        if self.format == "json":
            for ref in references:
                self._write(ref.record(via=False))
        elif self.format == "text":
            self._print(f"{self.stage}.{ref.port}  {ref.type}  {ref.id}" for ref in references)
        else:
            self._print(ref.path if self.format == "path" else ref.id for ref in main)

    def end(self, code: int) -> None:
        """The last record, once; a reader learns from it whether to go on."""
        if not self._ended and (code or self._said_hello):
            self._ended = True
            self._write(
                {"llmctl": "end", "stage": self.stage, "code": code, **({"cause": self.cause} if self.cause else {})}
            )

    def lost(self) -> bool:
        """Whether the reader is gone; asked while the stage works."""
        if not self.reader_gone and self.watches:
            poller = select.poll()
            poller.register(STDOUT, 0)
            self.reader_gone = any(event & (select.POLLERR | select.POLLNVAL) for _, event in poller.poll(0))
        return self.reader_gone

    def tell_lost(self, *, stops: bool = False) -> bool:
        """Warn, once, that the reader is gone and what follows from it; True if this call did."""
        first, self._told = not self._told, True
        if first:
            then = "stops with a checkpoint" if stops else "finishes and keeps its result"
            self.tell(f"the next command of the pipe has ended; this stage {then}", kind="warning")
        return first

    def tell(self, text: str, *, kind: str = "log") -> None:
        """One line on stderr, in the format of the log."""
        warning = "warning: " if kind == "warning" else ""
        line = json_line({"type": kind, "stage": self.stage, "text": text})
        sys.stderr.write(line if self.log_format == "json" else f"{warning}{text}\n")
        sys.stderr.flush()

    def wait_for_reader(self) -> None:
        """Give the reader `READER_WAIT` seconds after `hello` to die of its own mistakes; raises ReaderGone."""
        while self.watches:
            left = self._said_hello + READER_WAIT - time.monotonic()
            if self.lost():
                raise ReaderGone
            if left <= 0:
                return
            poller = select.poll()
            poller.register(STDOUT, 0)
            poller.poll(left * 1000)

    def _write(self, record: dict[str, Any]) -> None:
        if self.format != "json":
            return
        kind = {"llmctl": record.pop("llmctl"), "v": VERSION}
        self._send(json.dumps(kind | record, separators=(",", ":")) + "\n")

    def _print(self, lines: Iterable[str]) -> None:
        self._send("".join(line + "\n" for line in lines))

    def _send(self, text: str) -> None:
        """One unbuffered write; a lost reader is remembered, never an exception: the stage has committed by then."""
        if self.reader_gone:
            return
        try:
            os.write(STDOUT, text.encode())
        except BrokenPipeError:
            self.reader_gone = True


_stream: Stream | None = None


def open_stream(stage: str, format: str, log_format: str = "text") -> Stream:
    """The stream of this process; `finish` closes it whatever happens in between."""
    global _stream  # one process, one stdout
    _stream = Stream(stage, resolve_format(format), log_format)
    return _stream


def resolve_format(format: str) -> Format:
    """`auto` is a line for a person on a terminal, records elsewhere."""
    if format == "auto":
        return "text" if os.isatty(STDOUT) else "json"
    return format  # type: ignore[return-value]  # click has checked the choice


def finish(stage: str, args: Sequence[str], code: int) -> int:
    """Write `end` if stdout carries records; returns the exit code (141 if a reader was lost and all else went well).

    A stage that failed before it could say hello, by a typo in its options, is known by its name and `args` only.
    """
    stream = _stream
    if stream is None:
        if code == 0 or not is_pipe(STDOUT):
            return code
        stream = Stream(stage, resolve_format(_format_of(args)))
    stream.end(code)
    return 141 if stream.reader_gone and code == 0 else code


def _format_of(args: Sequence[str]) -> str:
    """The value of `--format` in a command line that may be wrong elsewhere."""
    values = [arg.partition("=")[2] for arg in args if arg.startswith("--format=")]
    values += [value for flag, value in zip(args, args[1:], strict=False) if flag == "--format"]
    return values[-1] if values and values[-1] in FORMATS else "auto"


def is_pipe(descriptor: int) -> bool:
    """Whether a descriptor is a FIFO or a socket; a closed one is neither."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
