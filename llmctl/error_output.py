"""Errors as JSON lines, for editors, CI annotations and programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from llmctl.errors import LlmctlError

OPTION = "--error-format"
ENVIRONMENT = "LLMCTL_ERROR_FORMAT"
PLACE = ("file", "line", "column", "end_column")


def wants_json(args: Sequence[str]) -> bool:
    """Whether errors are to be told as JSON: the last `--error-format`, else `$LLMCTL_ERROR_FORMAT`.

    Read from the words as they were typed: the error may be that they cannot be parsed.
    """
    values = [os.environ.get(ENVIRONMENT, "")]
    for word, following in zip(args, [*args[1:], ""], strict=False):
        if word == OPTION:
            values.append(following)
        elif word.startswith(f"{OPTION}="):
            values.append(word.partition("=")[2])
    return values[-1] == "json"


def json_lines(error: LlmctlError) -> Iterator[str]:
    """One line per mistake: `{code, message, file, line, column, end_column, hint, exit_code}`."""
    diagnostics: Sequence[Any] = getattr(error, "diagnostics", ())
    own: dict[str, Any] = {"code": error.code, "message": error.message, **dict.fromkeys(PLACE), "hint": error.hint}
    for row in [found.as_json() for found in diagnostics] or [own]:
        yield json.dumps({**row, "exit_code": error.exit_code}, ensure_ascii=False)
