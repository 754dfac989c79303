"""The events of a run (`pipeline.md` 3.7): numbered without gaps, kept in the run's directory, passed on."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from llmctl.errors import UsageError
from llmctl.launch.masking import Masker

Event = dict[str, Any]
Emit = Callable[[Event], str | None]
"""Gets every event; a text that it returns is told as a warning."""


class EventLog:
    """Writes `events.jsonl` and `metrics.jsonl` of one run and hands every event to `emit`.

    Several threads may call it: events are numbered, written and handed on one at a time, in one order.
    """

    def __init__(self, run: str, directory: Path, emit: Emit | None = None, masker: Masker | None = None) -> None:
        self.run = run
        self.masker = masker or Masker({})
        """Hides the secrets of the run, as far as they are known."""
        self._emit = emit
        self._seq = 0
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True)
        self._events = (directory / "events.jsonl").open("a", encoding="utf-8")
        self._metrics = (directory / "metrics.jsonl").open("a", encoding="utf-8")

    def __call__(self, type: str, **fields: Any) -> None:
        """Add one event."""
        fields = dict(self.masker.plain(fields))
        with self._lock:
            warning = self._add(type, fields)
            while warning:
                warning = self._add("warning", {"text": warning})

    def _add(self, type: str, fields: Mapping[str, Any]) -> str | None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event = {"ts": now, "seq": self._seq, "run": self.run, "type": type, **fields}
        self._seq += 1
        _write(self._events, event)
        if type == "metric":
            _write(self._metrics, {name: fields[name] for name in ("stage", "name", "value", "step") if name in fields})
        return self._emit(event) if self._emit is not None else None

    def close(self) -> None:
        """Close the files."""
        self._events.close()
        self._metrics.close()


def _write(file: TextIO, value: Mapping[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()


class EventCopy:
    """The copy that `--events FILE|fd:N` names; UsageError if it cannot be opened.

    Nobody's work depends on it: when it cannot be written any more it ends, and the run goes on.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._file: TextIO | None = _open(target)

    def write(self, event: Event) -> str | None:
        """Add one event; returns what to warn of if this was no longer possible."""
        if self._file is None:
            return None
        try:
            _write(self._file, event)
        except OSError as error:
            self.close()
            return f"events are no longer written to `{self._target}`: {error.strerror}"
        return None

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written is tried once more
                self._file.close()
            self._file = None


def _open(target: str) -> TextIO:
    try:
        if target.startswith("fd:"):
            descriptor = int(target.removeprefix("fd:"))
            return os.fdopen(os.dup(descriptor), "a", encoding="utf-8")
        return Path(target).open("a", encoding="utf-8")  # noqa: SIM115  # the caller closes it
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot write events to `{target}`: {error}", hint="--events FILE, or fd:3 and 3>FILE"
        ) from error
