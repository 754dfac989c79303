"""What is typed in a terminal: a line, or a text of several, edited with the lines of earlier conversations at hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from llmctl import InputError

HISTORY = 2000
"""Lines that are remembered."""
FENCE = '"""'
NO_TEXT = "write it in UTF-8, as `iconv -f LATIN1 -t UTF-8` does with western Europe's old files"


def check_text(text: str, what: str, hint: str = NO_TEXT) -> str:
    """The text. InputError if it holds what no encoding was found for: bytes that are no UTF-8, half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is no text in UTF-8", hint=hint) from error
    return text


def read_text() -> tuple[str, bool]:
    """What is typed, and whether between two fences: else a line, or lines that end in a backslash and one more.

    InputError for bytes that are no text, once all of it is read: the rest of it is no question of its own.
    """
    text, fenced = _line("> ").strip(), False
    if text == FENCE:
        lines = []
        while (line := _line(". ")).strip() != FENCE:
            lines.append(line)
        text, fenced = "\n".join(lines), True
    while text.endswith("\\") and not fenced:
        text = text[:-1] + "\n" + _line(". ").rstrip()
    return check_text(text, "what is typed", "set the terminal to UTF-8"), fenced


def _line(prompt: str) -> str:
    """One line. Bytes that are no text become halves of surrogate pairs."""
    with _prompts_on_the_terminal():
        try:
            return input(prompt)
        except UnicodeDecodeError as error:
            return error.object.decode(errors="surrogateescape").removesuffix("\n")
        except (EOFError, KeyboardInterrupt):
            click.echo()  # what is said next begins a line
            raise


@contextmanager
def _prompts_on_the_terminal() -> Iterator[None]:
    """Within it stdout is stderr, unless it is a terminal: `llmctl chat MODEL > answers` shall hold no prompts.

    `input` edits lines only where the descriptor 1 is a terminal, so that another `sys.stdout` would not do.
    """
    if sys.stdout.isatty():
        yield
        return
    sys.stdout.flush()
    answers = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(answers, 1)
        os.close(answers)


def use_history(wanted: bool) -> Callable[[], None]:
    """Line editing, with the lines of earlier conversations unless they are not `wanted`; what saves them at the end.

    The file is `$XDG_STATE_HOME/llmctl/chat_history` and readable by its owner alone. A conversation adds its own lines
    to what is there when it ends: another may have ended since it began.
    """
    import readline

    if not wanted:
        return lambda: None
    path = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "llmctl" / "chat_history"
    try:
        with suppress(FileNotFoundError):  # there is none yet
            readline.read_history_file(path)
    except OSError as error:  # nor is it written: what could not be read would be lost
        click.echo(f"warning: the history in {path} cannot be read: {error.strerror}", err=True)
        return lambda: None
    readline.set_history_length(HISTORY)
    known = readline.get_current_history_length()

    def save() -> None:
        own = [readline.get_history_item(number + 1) for number in range(known, readline.get_current_history_length())]
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            path.chmod(0o600)
            readline.clear_history()
            readline.read_history_file(path)
            for line in own:
                readline.add_history(line)
            readline.write_history_file(path)
        except OSError as error:
            click.echo(f"warning: the history cannot be saved in {path}: {error.strerror}", err=True)

    return save
