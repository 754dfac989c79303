"""Errors as JSON lines, for editors, CI annotations and programs that read the log."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from llmctl.errors import LlmctlError

ERRORS, LOG = ("--error-format", "LLMCTL_ERROR_FORMAT"), ("--log-format", "LLMCTL_LOG_FORMAT")
"""Options with their variables; `json` in either gives JSON. They are read from the words as they were typed: the
error may be that these cannot be parsed."""
PLACE = ("file", "line", "column", "end_column")


def wants_json(args: Sequence[str]) -> bool:
    """Whether errors are to be told as JSON."""
    return "json" in (typed(args, *ERRORS), typed(args, *LOG) or _configured())


def _configured() -> str:
    """The `log_format` of the user's configuration; of one that is broken nothing: that may be the error to tell."""
    with contextlib.suppress(Exception):
        from llmctl.spec.user_config import user_config

        return user_config().log_format
    return ""


def typed(args: Sequence[str], option: str, variable: str) -> str:
    """The last value of an option in a command line that may be wrong elsewhere, else that of its variable."""
    value = os.environ.get(variable, "")
    words = iter(args)
    for word in words:
        if word == option:
            value = next(words, value)
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def json_lines(error: LlmctlError) -> Iterator[str]:
    """One line per mistake: `{type: error, code, message, file, line, column, end_column, hint, exit_code}`."""
    diagnostics: Sequence[Any] = getattr(error, "diagnostics", ())
    if not diagnostics:
        yield json_line(error.message, error.hint, error.exit_code, error.code)
    for found in diagnostics:
        yield _line({**found.as_json(), "exit_code": error.exit_code})


def json_line(message: str, hint: str | None, exit_code: int, code: str | None = None) -> str:
    """The line of an error without a place."""
    place = dict.fromkeys(PLACE)
    return _line({"code": code, "message": message, **place, "hint": hint, "exit_code": exit_code})


def _line(fields: dict[str, Any]) -> str:
    return json.dumps({"type": "error", **fields}, ensure_ascii=False)
