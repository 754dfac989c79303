"""The events of a run (`pipeline.md` 3.7): numbered without gaps, kept in the run's directory, passed on."""

from __future__ import annotations

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


class EventLog:
    """Writes `events.jsonl` and `metrics.jsonl` of one run and hands every event to `emit`.

    Several threads may call it: events are numbered, written and handed on one at a time, in one order.
    """

    def __init__(self, run: str, directory: Path, emit: Callable[[Event], None] | None = None) -> None:
        self.run = run
        self.masker = Masker({})
        """Hides the secrets of the run, once they are known."""
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
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            event = {"ts": now, "seq": self._seq, "run": self.run, "type": type, **fields}
            self._seq += 1
            _write(self._events, event)
            if type == "metric":
                known: Event = {name: fields[name] for name in ("stage", "name", "value", "step") if name in fields}
                _write(self._metrics, known)
            if self._emit is not None:
                self._emit(event)

    def close(self) -> None:
        """Close the files."""
        self._events.close()
        self._metrics.close()


def _write(file: TextIO, value: Mapping[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()


def open_copy(target: str) -> TextIO:
    """The stream that `--events FILE|fd:N` names; UsageError if it cannot be written."""
    try:
        if target.startswith("fd:"):
            descriptor = int(target.removeprefix("fd:"))
            return os.fdopen(os.dup(descriptor), "a", encoding="utf-8")
        return Path(target).open("a", encoding="utf-8")  # noqa: SIM115  # the caller closes it
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot write events to `{target}`: {error}", hint="--events FILE, or fd:3 and 3>FILE"
        ) from error


def write_event(file: TextIO, event: Event) -> None:
    """Add one event to a copy."""
    _write(file, event)
