"""What a person sees while a run goes on, and how tables, sizes and times are written; rich is imported late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO


class Reporter(Protocol):
    """Shows the events of a run (`pipeline.md` 3.7) on stderr."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Show one event: a dict with `type` and the fields of that type; unknown types are ignored."""

    def close(self) -> None:
        """Take the bars down and repeat the warnings; may be called twice."""


def open_reporter(*, stream: TextIO | None = None, quiet: bool = False) -> Reporter:
    """A live display on a terminal, plain lines elsewhere; `stream` is stderr by default."""
    raise NotImplementedError


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Left-aligned columns two spaces apart, numbers right-aligned, without a trailing newline."""
    raise NotImplementedError


def human_bytes(count: float) -> str:
    """`1.5 MiB`; bytes below 1024 as `512 B`."""
    raise NotImplementedError


def human_seconds(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3:05 min`, `2:01:40 h`."""
    raise NotImplementedError
