"""`llmctl chat` and `llmctl generate`: a model in the terminal, or in a pipe, one question per line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from llmctl import LlmctlError, UsageError
from llmctl_serve.candidates import Output
from llmctl_serve.options import options
from llmctl_serve.session import Session, open_session

HELP = "/reset forgets the conversation, /exit ends (as does Ctrl-D)"


def show(parts: Iterator[str]) -> None:
    """Write an answer as it comes, and end the line."""
    for part in parts:
        click.echo(part, nl=False)
        sys.stdout.flush()
    click.echo()


def lines() -> Iterator[str]:
    """The lines of stdin that are not empty."""
    return (line.strip() for line in sys.stdin if line.strip())


@click.command()
@options
@click.option("--system", default="", help="System message.")
def chat(
    artifact: str | None,
    prompt: str | None,
    stop: Sequence[str],
    device: str,
    threads: int,
    system: str,
    output: Output,
    **given: Any,
) -> None:
    """Talk to a model: ARTIFACT is a model directory, a reference or an id (default exports/quickstart).

    Without a terminal on stdin every line is a question of its own.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty", hint="give a question")
    conversation = prompt is None and sys.stdin.isatty()
    if conversation and output.option:
        raise UsageError(
            f"{output.option} is not for a conversation, which goes on from one answer",
            hint="ask one question with --prompt, or pipe questions into the command",
        )
    session = open_session(artifact, device, threads, stop, given, system)
    if conversation:
        converse(session)
    for question in () if conversation else lines() if prompt is None else (prompt,):
        session.reset()
        if output.streams:
            show(session.ask(question))
        else:
            output.write(session, session.question(question)[1])


def converse(session: Session) -> None:
    """Read, answer, repeat. What cannot be answered is explained and the conversation goes on."""
    import readline  # noqa: F401  # gives input() line editing and history

    click.echo(f"{session.generator.backend}. {HELP}", err=True)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            click.echo()
            return
        if question in ("/exit", "/quit"):
            return
        if question == "/reset":
            session.reset()
        elif question.startswith("/"):
            click.echo(f"unknown command {question.split()[0]}; {HELP}", err=True)
        elif question:
            try:
                show(session.ask(question))
            except KeyboardInterrupt:
                click.echo("\n(interrupted)", err=True)
            except LlmctlError as error:
                click.echo(f"error: {error.message}" + (f"\n  hint: {error.hint}" if error.hint else ""), err=True)


@click.command()
@options
def generate(
    artifact: str | None,
    prompt: str | None,
    stop: Sequence[str],
    device: str,
    threads: int,
    output: Output,
    **given: Any,
) -> None:
    """Continue a text with a model: ARTIFACT is a model directory, a reference or an id (default exports/quickstart).

    The text is --prompt, or all of stdin.
    """
    if prompt is None and sys.stdin.isatty():
        raise UsageError("there is no text to continue", hint="give --prompt, or pipe a text into the command")
    text = sys.stdin.read() if prompt is None else prompt
    if not text:
        raise UsageError("the text to continue is empty", hint="give --prompt, or pipe a text into the command")
    session = open_session(artifact, device, threads, stop, given)
    if output.streams:
        show(session.continue_text(text))
    else:
        output.write(session, session.beginning(text))
