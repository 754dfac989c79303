"""A conversation in a terminal: lines in, answers as they come, and commands that begin with a slash."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from llmctl import InputError, LlmctlError, UsageError
from llmctl.console import wants_colour
from llmctl.spec.files import home_path, is_there
from llmctl_serve.conversation_files import FORCE, read_conversation, write_conversation
from llmctl_serve.line_input import FENCE, read_text
from llmctl_serve.remote import RemoteSession
from llmctl_serve.session import Session

SETTABLE: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "seed": int,
}
COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message; without TEXT remove it",
    "/set NAME=VALUE": "change sampling, as in /set temperature=0.7 or seed=none; without NAME list it",
    "/show": "print the conversation",
    "/undo": "take back the last question and its answer",
    "/retry": "ask the last question again",
    "/save FILE": "write the conversation as JSON; without FILE where it was saved or loaded before",
    "/load FILE": "go on with a conversation from a file",
    "/model NAME": "talk to another model; without NAME say which it is",
    "/tokens": "count the conversation",
    "/quit": "end, as Ctrl-D does",
}
SIGNS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | dict.fromkeys(
    range(127, 160), 0xFFFD
)
"""Unicode's pictures of C0's control characters, U+FFFD for DEL and C1's."""
QUIT = ("/quit", "/exit")
HELP = "/help lists the commands, /reset forgets the conversation, /quit ends (as does Ctrl-D)"


def visible(text: str) -> str:
    """The text with signs for control characters: a terminal obeys them, and a model or a server may send any."""
    return text.translate(SIGNS)


def show(parts: Iterator[str]) -> None:
    """Write an answer as it comes, and end its line, also where it breaks off; an interrupt ends the answer too."""
    begun, terminal = False, sys.stdout.isatty()
    try:
        for part in parts:
            click.echo(visible(part) if terminal else part, nl=False)
            sys.stdout.flush()
            begun = True
    except BaseException as error:
        if begun and not (isinstance(error, KeyboardInterrupt) and terminal):  # `^C` stands there
            click.echo()
        raise
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
        self.file: Path | None = None
        """Where this conversation was saved or loaded; other files are not written over."""
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
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                self._say("Ctrl-C again ends, as do /quit and Ctrl-D")
                interrupted = True
                continue
            except InputError as error:
                self._explain(error)
                continue
            if not fenced and text.partition(" ")[0] in QUIT:
                return
            interrupted = self._is_interrupted(text, fenced)

    def _is_interrupted(self, text: str, fenced: bool) -> bool:
        """Answer; whether Ctrl-C ended it."""
        try:
            self._answer(text, fenced)
        except KeyboardInterrupt:
            self._say("\n(interrupted)")
            return True
        except LlmctlError as error:
            self._explain(error)
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except Exception as error:  # whatever a model raises: it is told, and the conversation is not lost
            self._say(f"error: {type(error).__name__}: {error}")
        return False

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

    def _explain(self, error: LlmctlError) -> None:
        self._say(f"error: {error.message}" + (f"\n  hint: {error.hint}" if error.hint else ""))

    @staticmethod
    def _say(text: str, dim: bool = False) -> None:
        text = visible(text)
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
        self.asked = self.file = None

    def _system(self, text: str) -> None:
        self.session.system = text
        self._say("the system message is set" if text else "there is no system message")

    def _set(self, text: str) -> None:
        if not text:
            found = self.session.values()
            self._say("\n".join(f"{name}={'none' if found.get(name) is None else found[name]}" for name in SETTABLE))
            return
        name, _, value = (part.strip() for part in text.partition("="))
        name = "max_new_tokens" if name == "max_tokens" else name
        if name not in SETTABLE:
            raise UsageError(f"`{name}` cannot be set", hint=f"one of {', '.join(SETTABLE)}")
        try:
            self.session.set(name, None if value == "none" else SETTABLE[name](value))
        except ValueError as error:
            raise UsageError(f"{name} cannot be `{value}`", hint=f"for example /set {name}=1") from error

    def _show(self, _: str) -> None:
        if self.session.system:
            self._say(f"[system] {self.session.system}")
        for turn in self.session.turns:
            self._say(f"[{turn['role']}] {turn['content']}")

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

    def _save(self, text: str) -> None:
        force, _, rest = text.partition(" ")
        forced = force == FORCE
        name = rest.strip() if forced else text
        path = self.file if self.file and not name else _path(name)
        there, known = is_there(path), self.file is not None and path.resolve() == self.file.resolve()
        write_conversation(path, self.session.backend, self.session.system, self.session.turns, forced or known)
        self.file = path
        self._say(f"{len(self.session.turns)} messages are in {path}{', over what was there' if there else ''}")

    def _load(self, name: str) -> None:
        path = _path(name)
        system, turns = read_conversation(path)
        self.session.system, self.session.turns, self.asked, self.file = system, turns, None, path
        self._say(f"{len(turns)} messages from {path}")

    def _model(self, name: str) -> None:
        if name:
            self.session.switch(name)
        self._say(self.session.backend)


def _path(name: str) -> Path:
    if not name:
        raise UsageError("no file is named", hint="/save FILE, /load FILE")
    return home_path(name)
