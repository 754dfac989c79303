"""What a check has to say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llmctl.doctor.world import World

State = Literal["ok", "warning", "problem"]
Check = Callable[["World"], Iterable["Finding"]]


@dataclass(frozen=True)
class Finding:
    """One line of the report. With a warning things work, though not as well as they could; a problem stops something.

    `fix` is what to type; only findings that are not ok have one.
    """

    check: str
    state: State
    text: str
    fix: str = ""


def examine(checks: Iterable[Check], world: World) -> list[Finding]:
    """All findings of all checks, in order; a check that fails itself is a finding too."""
    found: list[Finding] = []
    for check in checks:
        try:
            found.extend(check(world))
        except Exception as error:  # a defect of ours must not hide what the other checks found
            text = f"this check failed: {type(error).__name__}: {' '.join(str(error).split())}"
            name = check.__name__.strip("_").replace("_", "-")
            found.append(Finding(name, "problem", text, "LLMCTL_DEBUG=1 llmctl doctor, and report what it prints"))
            _trace(error)
    return found


def _trace(error: Exception) -> None:
    import os
    import traceback

    if os.environ.get("LLMCTL_DEBUG"):
        traceback.print_exception(error)
