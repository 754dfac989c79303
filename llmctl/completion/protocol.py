"""The line before the cursor in, candidates out: what the three scripts and llmctl say to each other.

A script sets `_LLMCTL_COMPLETE=<shell>_complete` and `_LLMCTL_LINE`; bash also `_LLMCTL_WORD`, the part it will
replace. Each line of the answer is `plain`, `file`, `dir` or `nospace`, then, tab-separated, the value and a text
beside it. Whatever goes wrong, a broken spec or a plugin, the answer is empty: nobody in the middle of a line needs
a traceback.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, ShellComplete

from llmctl.completion import candidates
from llmctl.hookspecs import Command

VARIABLE, LINE, WORD = "_LLMCTL_COMPLETE", "_LLMCTL_LINE", "_LLMCTL_WORD"
SHELLS = ("bash", "zsh", "fish")
OPEN_ENDED = ("=", "/", ".")
"""A candidate that ends so is no whole word yet: no space follows it."""


def script(shell: str) -> str:
    """The completion script of one of `SHELLS`."""
    return (Path(__file__).parent / f"llmctl.{shell}").read_text(encoding="utf-8")


def respond(root: click.Group, instruction: str) -> int:
    """Answer `bash_complete` and the like on stdout, or print the script for `bash_source`; returns the exit code."""
    shell, _, wanted = instruction.partition("_")
    if shell not in SHELLS:
        from click.shell_completion import shell_complete

        return shell_complete(root, {}, "llmctl", VARIABLE, instruction)
    if wanted == "source":
        click.echo(script(shell), nl=False)
        return 0
    for line in _quietly(root, shell):
        click.echo(line)
    return 0


def _quietly(root: click.Group, shell: str) -> list[str]:
    """The answer; empty if anything fails, and whatever is printed on the way is dropped (LLMCTL_DEBUG shows it)."""
    import contextlib
    import io

    debug = bool(os.environ.get("LLMCTL_DEBUG"))
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.nullcontext() if debug else contextlib.redirect_stderr(printed),
    ):
        try:
            return answer(root, shell, os.environ.get(LINE, ""), os.environ.get(WORD, ""))
        except (Exception, SystemExit):
            if debug:
                raise
            return []


def answer(root: click.Group, shell: str, line: str, word: str = "") -> list[str]:
    """The lines that `shell` gets for the command line `line`, whose first word is the program."""
    words, token, quote = split(line)
    items = _Line(Offering(root), {}, "llmctl", VARIABLE).get_completions(words[1:], token)
    option = re.match(r"-[^=]*=", token)
    plain = [item for item in items if item.type == "plain" and _printable(item.value)]
    if option:
        for item in plain:
            item.value = option[0] + item.value
    lines = list(dict.fromkeys(item.type for item in items if item.type in ("file", "dir")))
    if plain and all(item.value.endswith(OPEN_ENDED) for item in plain):
        lines.append("nospace")
    if shell == "bash":
        return lines + [f"plain\t{value}" for value in _for_bash(plain, token, word, quote)]
    if shell == "zsh":
        return lines + [f"plain\t{item.value}\t{text}" for item, text in zip(plain, _side_by_side(plain), strict=True)]
    return lines + [f"plain\t{item.value}\t{_one_line(item.help)}" for item in plain]


def split(line: str) -> tuple[list[str], str, str]:
    """The whole words of a line, the one that the cursor is in (empty after a blank), and the quote it stands in."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    quote = ""
    try:
        words.extend(lexer)
    except ValueError:  # an open quote, or a backslash at the end: the part so far
        words.append(lexer.token)
        state = getattr(lexer, "state", "")  # the sign that the lexer waits for; not in its type stubs
        quote = state if state in ("'", '"') else ""
        return words[:-1], words[-1], quote
    blank = re.search(r"(?<!\\)(?:\\\\)*\s$", line)
    return (words, "", "") if blank or not words else (words[:-1], words[-1], "")


def _for_bash(items: Sequence[CompletionItem[str]], token: str, word: str, quote: str) -> Iterable[str]:
    """What bash puts in the place of `word`, which is only the end of `token` where that holds a `=`, `:` or `@`."""
    replaced = word.lstrip(quote) if quote else split(f"x {word}")[1] if word else ""
    kept = len(token) - len(replaced) if token.endswith(replaced) else 0
    for item in items:
        value = item.value[kept:]
        yield value if quote else re.sub(r"([^\w@%+=:,./~-])", r"\\\1", value)


def _side_by_side(items: Sequence[CompletionItem[str]]) -> list[str]:
    """The candidates as zsh lists them: help texts in a column."""
    width = max((len(item.value) for item in items), default=0)
    return [f"{item.value:<{width}}  {_one_line(item.help)}".rstrip() for item in items]


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _printable(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


class _Line(ShellComplete):
    """click's search for the parameter that the cursor stands at; the rest of its protocol is not used."""

    name = "llmctl"
    source_template = ""


class Offering(click.Group):
    """The root group as completion sees it: names from the declarations, so that nothing is imported to list them, and
    candidates attached to the parameters of a command once it is loaded."""

    def __init__(self, root: click.Group) -> None:
        super().__init__("llmctl", params=root.params, context_settings=root.context_settings)
        self.root = root

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself, its parameters with their candidates."""
        command = self.root.get_command(ctx, cmd_name)
        return None if command is None else _attached(command)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """Commands and stages, or the options of `llmctl` itself."""
        items = [
            CompletionItem(offer.name, help=offer.help) for offer in _offers() if offer.name.startswith(incomplete)
        ]
        return items + click.Command.shell_complete(self, ctx, incomplete)


class _Subgroup(click.Group):
    """A group of commands, those with candidates attached once they are loaded."""

    def __init__(self, group: click.Group) -> None:
        super().__init__(group.name, params=group.params, help=group.help, context_settings=group.context_settings)
        self.inner = group

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Those of the group."""
        return self.inner.list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself, its parameters with their candidates."""
        command = self.inner.get_command(ctx, cmd_name)
        return None if command is None else _attached(command)


def _attached(command: click.Command) -> click.Command:
    candidates.attach(command)
    return _Subgroup(command) if isinstance(command, click.Group) else command


def _offers() -> list[Command]:
    """Every name that can be used, in the order of `--help`."""
    from llmctl.command_table import CORE, stage_order
    from llmctl.registry import get_registry

    registry = get_registry()
    stages = [registry.stages[name] for name in stage_order(registry.stages)]
    as_commands = [Command(name=stage.name, help=stage.help, target="") for stage in stages]
    return [*CORE, *as_commands, *(registry.commands[name] for name in sorted(registry.commands))]
