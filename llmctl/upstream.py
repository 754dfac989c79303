"""What arrives on stdin from the stages before this one in a pipe: which reference goes to which input, who failed."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmctl.errors import InputError, LlmctlError, UsageError
from llmctl.shell import STDIN, STDOUT, VERSION, ReaderGone, Reference, Stream
from llmctl.stage import In

SILENCE = 1.0
"""Seconds without data on stdin after which the user is told what is being waited for."""
NOT_RECORDS = "stdin does not hold llmctl references, did you pipe data?"


class UpstreamFailed(LlmctlError):
    """The stage before this one in the pipe failed; this one leaves with the same code, without having run."""

    def __init__(self, stage: str, code: int) -> None:
        super().__init__(f"not run, upstream `{stage}` failed with exit {code}")
        self.stage = stage
        self.exit_code = code


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

        A port that takes several gets one per type. An optional port does not take by type alone what another has: the
        model that is served is not its own draft. Raises UsageError if a required port finds nothing although there
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
        return self._without_doubles(bound)

    def _without_doubles(self, bound: dict[str, list[Reference]]) -> dict[str, list[Reference]]:
        def by_type_alone(port: str) -> bool:
            return port not in self.required and not self.ports[port].many and bound[port][0].port != port

        taken = {ref.id for port, refs in bound.items() if not by_type_alone(port) for ref in refs}
        kept = {}
        for port, refs in bound.items():
            if by_type_alone(port):
                if refs[0].id in taken:
                    continue
                taken.add(refs[0].id)
            kept[port] = refs
        return kept

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
                    stream.tell("waiting for an upstream artifact on stdin (pass --input, or </dev/null)")
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
