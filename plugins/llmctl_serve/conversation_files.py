"""A conversation as a file: JSON with its messages, as requests to servers have them."""

from __future__ import annotations

import json
from pathlib import Path

from llmctl import InputError
from llmctl_serve.line_input import check_text


def read_conversation(path: Path) -> tuple[str, list[dict[str, str]]]:
    """(system message, turns) of a file as /save writes it, or of any `{"messages": […]}`. InputError otherwise."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        messages = [{"role": str(turn["role"]), "content": turn["content"]} for turn in saved["messages"]]
        system = saved.get("system") or ""
    except (OSError, ValueError, KeyError, TypeError) as error:
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
