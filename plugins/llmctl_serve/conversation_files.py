"""A conversation as a file: JSON with its messages, as requests to servers have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llmctl import InputError, UsageError
from llmctl.spec.files import is_there
from llmctl_serve.files import replace_file
from llmctl_serve.line_input import check_text

FORCE = "--force"


def read_conversation(path: Path) -> tuple[str, list[dict[str, str]]]:
    """(system message, turns) of a file as /save writes it, or of any `{"messages": […]}`. InputError otherwise."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        messages = [{"role": str(turn["role"]), "content": turn["content"]} for turn in saved["messages"]]
        system = saved.get("system") or ""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no conversation: {error}", hint='write {"messages": […]}, as /save') from error
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    if not all(isinstance(turn["content"], str) for turn in messages) or not isinstance(system, str):
        raise InputError(f"{path} holds messages that are no text")
    for text in (system, *(turn["content"] for turn in messages)):
        check_text(text, f"a message of {path}")
    if [turn["role"] for turn in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise InputError(f"{path}: questions and answers do not alternate", hint="end it with an answer")
    return system, messages


def write_conversation(path: Path, model: str, system: str, turns: Sequence[dict[str, str]], over: bool) -> None:
    """Write the file whole or not at all, for its owner alone; a link stays one.

    UsageError where that cannot be, and for a file that is there unless it may be written `over`.
    """
    if is_there(path) and not is_there(path, Path.is_file):
        raise UsageError(f"{path} is no regular file", hint="name another")
    if is_there(path) and not over:
        raise UsageError(f"{path} is there already", hint=f"`/save {FORCE} {path}` writes over it")
    saved = {"model": model, "system": system, "messages": turns}
    try:
        replace_file(path.resolve(), json.dumps(saved, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
