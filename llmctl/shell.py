"""Stages in a shell pipe: references as JSON lines on stdout and stdin, early failure, lost readers."""

from __future__ import annotations

from collections.abc import Sequence


def finish(stage: str, args: Sequence[str], code: int) -> int:
    """Write the `end` record if stdout carries records; returns the exit code (141: reader gone)."""
    return code
