"""Stages in a shell pipe: references as JSON lines on stdout and stdin, early failure, lost readers (`pipeline.md` 3).

The shell starts all stages of a pipe at once; data never goes through it. Order in every stage: validate the own spec,
say `hello`, read stdin to its end, then work. One record is one `write(2)`.
"""

from __future__ import annotations

import json
import os
import select
import stat
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmctl.errors import InputError, LlmctlError, UsageError
from llmctl.stage import In

VERSION = 1
FORMATS = ("auto", "text", "json", "path", "id")
READER_WAIT = 0.5
"""Seconds that the first stage of a pipe waits for a reader that dies at once, before it begins any work."""
SILENCE = 1.0
"""Seconds without data on stdin after which the user is told what is being waited for."""
NOT_RECORDS = "stdin does not hold llmctl references, did you pipe data?"
STDIN, STDOUT = 0, 1

Format = Literal["text", "json", "path", "id"]


class UpstreamFailed(LlmctlError):
    """The stage before this one in the pipe failed; this one leaves with the same code, without having run."""

    def __init__(self, stage: str, code: int) -> None:
        super().__init__(f"not run, upstream `{stage}` failed with exit {code}")
        self.stage = stage
        self.exit_code = code


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


# -- stdout ----------------------------------------------------------------------------------------------------


class Stream:
    """What this process says on stdout. With a format other than `json` it writes no records, only the result."""

    def __init__(self, stage: str, format: Format) -> None:
        self.stage = stage
        self.format = format
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
            _tell(f"warning: the next command of the pipe has ended; this stage {then}")
        return first

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


def open_stream(stage: str, format: str) -> Stream:
    """The stream of this process; `finish` closes it whatever happens in between."""
    global _stream  # one process, one stdout
    _stream = Stream(stage, resolve_format(format))
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


# -- stdin -----------------------------------------------------------------------------------------------------


@dataclass
class Upstream:
    """What has arrived on stdin so far. Later references are nearer: every stage passes on before it adds its own."""

    ports: Mapping[str, In]
    """The ports that may be bound from stdin."""
    required: frozenset[str]
    """Those of them that must be."""
    refs: list[Reference] = field(default_factory=list)
    records: int = 0
    failed: UpstreamFailed | None = None
    _announced: dict[str, str] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)

    def feed(self, line: bytes) -> Mapping[str, Any] | None:
        """Take one line; returns the record, or None if it is empty or of a kind unknown here.

        Raises UsageError at once for what is not ours, for a newer version, and when the announced outputs cannot fit.
        """
        if not line.strip():
            return None
        record = parse_record(line)
        self.records += 1
        try:
            return record if self._take(record) else None
        except (TypeError, ValueError) as error:
            raise UsageError(f"a damaged record on stdin: {line[:80]!r}", hint="was the stream edited?") from error

    def _take(self, record: Mapping[str, Any]) -> bool:
        """Note one record; False if its kind is unknown here."""
        match record["llmctl"]:
            case "hello":
                self._open.append(str(record.get("stage")))
                self._announce(record)
            case "upstream":
                self._announce(record)
            case "ref":
                names = ("port", "type", "id", "store", "path")
                self.refs.append(Reference(**{n: str(record.get(n, "")) for n in names}, via=bool(record.get("via"))))
            case "end":
                self._end(record)
            case _:
                return False
        return True

    def _announce(self, record: Mapping[str, Any]) -> None:
        """Note what is to come; once the head of the pipe has spoken, a required port that nothing fits is an error."""
        stage = str(record.get("stage"))
        self._announced |= {f"{stage}.{port}": str(kind) for port, kind in dict(record.get("outputs") or {}).items()}
        if record.get("stdin"):
            return
        for port in sorted(self.required):
            if not any(_fits(self.ports[port], kind) for kind in self._announced.values()):
                raise self._no_fit(port, self._announced)

    def _no_fit(self, port: str, offered: Mapping[str, str]) -> UsageError:
        listed = ", ".join(f"{name} ({kind})" for name, kind in offered.items()) or "nothing"
        wanted = " or ".join(self.ports[port].types)
        return UsageError(
            f"type mismatch: input `{port}` wants {wanted}, the pipe offers {listed}",
            hint=f"check the order of the stages, or give it with --input {port}=PATH",
        )

    def _end(self, record: Mapping[str, Any]) -> None:
        stage, code = str(record.get("stage")), int(record.get("code") or 0)
        if stage in self._open:
            self._open.remove(stage)
        if code:
            self.failed = UpstreamFailed(str(record.get("cause") or stage), code)

    def close(self, *, explicit: bool) -> None:
        """Judge the stream at EOF: who failed, who was killed, did anything come. `explicit`: stdin was asked for."""
        if self.failed:
            raise self.failed
        if self._open:
            raise InputError(
                f"not run, upstream `{self._open[-1]}` was killed: its output ended without an `end` record",
                hint="its own message, or the kernel's log, says why",
            )
        if explicit and not self.refs:
            raise InputError("nothing arrived on stdin", hint="pipe a stage into this one, or give --input PORT=PATH")

    def bind(self) -> dict[str, list[Reference]]:
        """Which reference goes to which port: by port name, else by type; of several the nearest producer's.

        A port that takes several gets one per type. Raises UsageError if a required port finds nothing although there
        were references, or if two required ports would take the same one by type alone.
        """
        bound = {port: found for port, spec in self.ports.items() if (found := self._candidates(port, spec))}
        if self.records:
            for port in sorted(self.required - set(bound)):
                raise self._no_fit(port, {ref.port: ref.type for ref in self.refs})
        taken: dict[str, str] = {}
        for port in (port for port in bound if port in self.required):
            ref = bound[port][0]
            if ref.port == port or self.ports[port].many:
                continue
            other = taken.setdefault(ref.id, port)
            if other != port:
                raise UsageError(
                    f"inputs `{other}` and `{port}` would both be `{ref.port}` ({ref.type}) from the pipe",
                    hint=f"say which is which: --input {other}=PATH",
                )
        return bound

    def _candidates(self, port: str, spec: In) -> list[Reference]:
        fitting = [ref for ref in self.refs if _fits(spec, ref.type)]
        if spec.many:
            return list({ref.type: ref for ref in fitting}.values())
        named = [ref for ref in fitting if ref.port == port]
        return (named or fitting)[-1:]


def _fits(port: In, kind: str) -> bool:
    """Whether an announced type suits a port; an unknown one may, several possible ones are joined with `|`."""
    return not kind or bool(set(kind.split("|")) & set(port.types))


def parse_record(line: bytes) -> dict[str, Any]:
    """One line of stdin as a record; UsageError if it is not ours or of a version above `VERSION`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("llmctl"), str):
        raise UsageError(NOT_RECORDS, hint="use --input PORT=FILE for data; stdin takes references from another stage")
    version = record.get("v")
    if not isinstance(version, int) or version > VERSION:
        raise UsageError(
            f"the upstream speaks version {version} of the pipe protocol, this llmctl knows {VERSION}",
            hint="use the same llmctl on both sides of the pipe",
        )
    return record


def read_upstream(upstream: Upstream, stream: Stream, *, explicit: bool) -> None:
    """Read stdin to EOF into `upstream`, passing every record on; leaves at once when the own reader dies.

    Raises what `Upstream.feed` and `Upstream.close` raise, and ReaderGone.
    """
    poller = select.poll()
    poller.register(STDIN, select.POLLIN)
    if stream.watches:
        poller.register(STDOUT, 0)
    buffer, started, told = b"", time.monotonic(), False
    try:
        while True:
            ready = dict(poller.poll(None if told or upstream.records else SILENCE * 1000))
            if STDOUT in ready and stream.lost():
                raise ReaderGone
            if STDIN not in ready:
                if not told and not upstream.records and time.monotonic() - started >= SILENCE:
                    told = True
                    _tell("waiting for an upstream artifact on stdin (pass --input, or </dev/null)")
                continue
            data = os.read(STDIN, 65536)
            buffer = _take_lines(buffer + data, upstream, stream, at_end=not data)
            if not data:
                break
        upstream.close(explicit=explicit)
    except UpstreamFailed as failed:
        stream.cause = failed.stage
        raise


def _take_lines(buffer: bytes, upstream: Upstream, stream: Stream, *, at_end: bool) -> bytes:
    """Feed the whole lines of `buffer`, return the rest. A long line without an end is not one of our records."""
    *lines, rest = buffer.split(b"\n")
    if at_end or len(rest) > 65536 or not rest.startswith(b"{"[: len(rest)]):
        lines, rest = [*lines, rest], b""
    for line in lines:
        record = upstream.feed(line)
        if record is not None:
            stream.forward(record)
    return rest


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
