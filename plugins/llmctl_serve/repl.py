"""A conversation in a terminal: lines in, answers as they come, and commands that begin with a slash."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from llmctl import InputError, LlmctlError, UsageError
from llmctl.console import wants_colour
from llmctl.spec.files import home_path
from llmctl_serve.remote import RemoteSession
from llmctl_serve.session import Session

HISTORY = 2000
"""Lines that are remembered."""
FENCE = '"""'
SETTABLE: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "seed": lambda text: None if text == "none" else int(text),
}
COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message; without TEXT remove it",
    "/set NAME=VALUE": "change sampling, as in /set temperature=0.7; without NAME list it",
    "/show": "print the conversation",
    "/undo": "take back the last question and its answer",
    "/retry": "ask the last question again",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "go on with a conversation from a file",
    "/model NAME": "talk to another model; without NAME say which it is",
    "/tokens": "count the conversation",
    "/quit": "end, as Ctrl-D does",
}
NO_TEXT = "write it in UTF-8, as `iconv -f LATIN1 -t UTF-8` does with western Europe's old files"
HELP = "/help lists the commands, /reset forgets the conversation, /quit ends (as does Ctrl-D)"


def check_text(text: str, what: str) -> str:
    """The text. InputError if it holds what no encoding was found for: bytes that are no UTF-8, half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is no text in UTF-8", hint=NO_TEXT) from error
    return text


def show(parts: Iterator[str]) -> None:
    """Write an answer as it comes, and end the line; an interrupt ends the answer too."""
    try:
        for part in parts:
            click.echo(part, nl=False)
            sys.stdout.flush()
    finally:
        close = getattr(parts, "close", None)
        if close is not None:
            close()  # what came is remembered
    click.echo()


class Repl:
    """Reads, answers, repeats. What cannot be answered is explained, and the conversation goes on."""

    def __init__(self, session: Session | RemoteSession) -> None:
        self.session = session
        self.asked: str | None = None
        """The last question, answered or not; None: that of the conversation."""
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/show": self._show,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/load": self._load,
            "/model": self._model,
            "/tokens": lambda _: self._say(self.session.tokens()),
        }

    def run(self) -> None:
        """Until /quit, Ctrl-D, or a second Ctrl-C in a row."""
        self._say(f"{self.session.backend}. {HELP}")
        interrupted = False
        while True:
            try:
                text, fenced = read_text()
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo()
                if interrupted:
                    return
                self._say("Ctrl-C again ends, as do /quit and Ctrl-D")
                interrupted = True
                continue
            try:
                if text in ("/quit", "/exit") and not fenced:
                    return
                self._answer(text, fenced)
                interrupted = False
            except KeyboardInterrupt:
                click.echo()
                self._say("(interrupted)")
                interrupted = True
            except LlmctlError as error:
                self._say(f"error: {error.message}" + (f"\n  hint: {error.hint}" if error.hint else ""))
                interrupted = False
            except Exception as error:  # whatever a model raises: it is told, and the conversation is not lost
                self._say(f"error: {type(error).__name__}: {error}")
                interrupted = False

    def _answer(self, text: str, fenced: bool) -> None:
        word, _, rest = text.partition(" ")
        if text.startswith("/") and not fenced:  # what stands between fences may be a comment of C, or a path
            if word not in self.commands:
                raise UsageError(f"unknown command {word}", hint=HELP)
            self.commands[word](rest.strip())
        elif text:
            self._ask(text)

    def _ask(self, question: str) -> None:
        self.asked = question
        show(self.session.ask(question))
        if self.session.spent is not None:
            self._say(self.session.spent.line(), dim=True)

    @staticmethod
    def _say(text: str, dim: bool = False) -> None:
        click.echo(f"\x1b[2m{text}\x1b[0m" if dim and wants_colour(sys.stderr) else text, err=True)

    # -- commands -------------------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        self._say("\n".join(f"{name:{width}}  {text}" for name, text in COMMANDS.items()))
        self._say(
            f"Several lines: end a line with \\, or write them between two lines of {FENCE}. Ctrl-C stops an answer."
        )

    def _reset(self, _: str) -> None:
        self.session.reset()
        self.asked = None

    def _system(self, text: str) -> None:
        self.session.system = text
        self._say("the system message is set" if text else "there is no system message")

    def _set(self, text: str) -> None:
        if not text:
            found = self.session.values()
            self._say("\n".join(f"{name}={found.get(name)}" for name in SETTABLE))
            return
        name, _, value = (part.strip() for part in text.partition("="))
        name = "max_new_tokens" if name == "max_tokens" else name
        if name not in SETTABLE:
            raise UsageError(f"`{name}` cannot be set", hint=f"one of {', '.join(SETTABLE)}")
        try:
            self.session.set(name, SETTABLE[name](value))
        except ValueError as error:
            raise UsageError(f"{name} cannot be `{value}`", hint=f"for example /set {name}=1") from error

    def _show(self, _: str) -> None:
        if self.session.system:
            click.echo(f"[system] {self.session.system}")
        for turn in self.session.turns:
            click.echo(f"[{turn['role']}] {turn['content']}")

    def _undo(self, _: str) -> None:
        turns = self.session.turns
        if not turns:
            raise UsageError("there is nothing to take back")
        while turns and turns.pop()["role"] != "user":
            pass
        self.asked = None
        self._say(f"{len(turns)} messages are left")

    def _retry(self, _: str) -> None:
        kept = list(self.session.turns)
        at = max((i for i, turn in enumerate(kept) if turn["role"] == "user"), default=len(kept))
        answered = kept[at]["content"] if at < len(kept) else None
        question = answered if self.asked is None else self.asked
        if question is None:
            raise UsageError("there is no question to ask again")
        before = self.session.turns = kept[:at] if question == answered else list(kept)
        try:
            self._ask(question)
        finally:
            if self.session.turns is before:  # no new answer: the old one stays
                self.session.turns = kept

    def _save(self, name: str) -> None:
        path = _path(name)
        saved = {"model": self.session.backend, "system": self.session.system, "messages": self.session.turns}
        try:
            path.write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from error
        self._say(f"{len(self.session.turns)} messages are in {path}")

    def _load(self, name: str) -> None:
        path = _path(name)
        system, turns = read_conversation(path)
        self.session.system, self.session.turns, self.asked = system, turns, None
        self._say(f"{len(turns)} messages from {path}")

    def _model(self, name: str) -> None:
        if name:
            self.session.switch(name)
        self._say(self.session.backend)


def _path(name: str) -> Path:
    if not name:
        raise UsageError("no file is named", hint="/save FILE, /load FILE")
    return home_path(name)


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


def read_text() -> tuple[str, bool]:
    """What is typed, and whether between two fences: else a line, or lines that end in a backslash and one more."""
    text = input("> ").strip()
    if text == FENCE:
        lines = []
        while (line := input(". ")).strip() != FENCE:
            lines.append(line)
        return "\n".join(lines), True
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input(". ").rstrip()
    return text, False


def use_history(wanted: bool) -> Callable[[], None]:
    """Line editing, with the lines of earlier conversations unless they are not `wanted`; what saves them at the end.

    The file is `$XDG_STATE_HOME/llmctl/chat_history` and readable by its owner alone.
    """
    import readline

    if not wanted:
        return lambda: None
    path = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "llmctl" / "chat_history"
    with suppress(OSError):  # there is none yet, or it cannot be read: then there is no history
        readline.read_history_file(path)
    readline.set_history_length(HISTORY)

    def save() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            path.chmod(0o600)
            readline.write_history_file(path)
        except OSError as error:
            click.echo(f"warning: the history cannot be saved in {path}: {error.strerror}", err=True)

    return save
