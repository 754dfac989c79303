"""`llmctl completion`: print the script of a shell, or put it where the shell looks."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import click

from llmctl.completion.protocol import SHELLS, script
from llmctl.errors import InputError, UsageError

MARK = "Made by `llmctl completion"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.option("--install", is_flag=True, help="Write the script where SHELL finds it, by default for this shell.")
def completion(shell: str | None, install: bool) -> None:
    """Print the completion script of SHELL, or install it.

    This shell alone: `source <(llmctl completion bash)`, the same with zsh, `llmctl completion fish | source`.
    """
    if not install:
        if shell is None:
            raise UsageError("which shell?", hint=f"llmctl completion {'|'.join(SHELLS)}, or --install for this one")
        click.echo(script(shell), nl=False)
        return
    shell = shell or running_shell()
    target = place(shell, os.environ)
    click.echo(write(shell, target.path))
    for line in target.activation:
        click.echo(line)


@dataclass(frozen=True)
class Place:
    """Where the script of a shell goes, and what the user does then."""

    path: Path
    activation: tuple[str, ...]


def running_shell() -> str:
    """The shell that started this process, else the login shell. UsageError if it is none of ours."""
    try:
        parent = Path(f"/proc/{os.getppid()}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        parent = ""
    for name in (parent, Path(os.environ.get("SHELL", "")).name):
        if name in SHELLS:
            return name
    raise UsageError("cannot tell which shell this is", hint=f"name it: llmctl completion --install {'|'.join(SHELLS)}")


def place(shell: str, environ: os._Environ[str] | dict[str, str]) -> Place:
    """The file of the user's own, never of the system, that the shell reads on the first completion of `llmctl`."""
    home = Path(environ.get("HOME") or Path.home())
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local/share")
    if shell == "fish":
        path = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "fish/completions/llmctl.fish"
        return Place(path, ("fish reads it by itself, in shells that are open too",))
    if shell == "zsh":
        path = data / "zsh/site-functions/_llmctl"
        return Place(path, _for_zsh(path, Path(environ.get("ZDOTDIR") or home) / ".zshrc"))
    path = Path(environ.get("BASH_COMPLETION_USER_DIR") or data / "bash-completion") / "completions/llmctl"
    return Place(path, _for_bash(path))


def _for_zsh(path: Path, rc: Path) -> tuple[str, ...]:
    try:
        known = str(path.parent) in rc.read_text(encoding="utf-8", errors="replace")
    except OSError:
        known = False
    if known:
        return (f"{rc} names that directory: new shells have it", f"here and now: source {shlex.quote(str(path))}")
    line = f"fpath=({shlex.quote(str(path.parent))} $fpath); autoload -Uz compinit; compinit"
    return (f"put this line into {rc}, in place of its `compinit` if it has one, and start a new shell:", f"  {line}")


def _for_bash(path: Path, package: Path = Path("/usr/share/bash-completion/bash_completion")) -> tuple[str, ...]:
    here = f"source {shlex.quote(str(path))}"
    if package.exists():
        return ("new shells have it, through the package bash-completion", f"here and now: {here}")
    return ("the package bash-completion is not installed; put this line into ~/.bashrc:", f"  {here}")


def write(shell: str, path: Path) -> str:
    """Write the script and say so. A file that is not ours is left alone (InputError)."""
    text = script(shell)
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else None
        if old == text:
            return f"{path} is up to date"
        if old is not None and MARK not in old:
            raise InputError(
                f"{path} was not made by llmctl", hint=f"move it away, or: llmctl completion {shell} > FILE"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"cannot write {path}: {reason}", hint=f"llmctl completion {shell} > FILE") from error
    return f"{'updated' if old is not None else 'wrote'} {path}"
