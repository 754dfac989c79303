"""`llmctl chat` and `llmctl generate`: a model in the terminal, in a pipe, or over the lines of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from llmctl import InputError, UsageError
from llmctl_serve.candidates import Output
from llmctl_serve.endpoint import is_url
from llmctl_serve.forms import Form
from llmctl_serve.line_input import NO_TEXT, check_text, use_history
from llmctl_serve.options import options
from llmctl_serve.remote import RemoteSession, open_remote
from llmctl_serve.repl import Repl, show
from llmctl_serve.session import Session, find_model, open_session


def lines() -> Iterator[str]:
    """The lines of stdin that are not empty. InputError for bytes that are no text."""
    number = 0
    try:
        for number, line in enumerate(sys.stdin, start=1):  # noqa: B007  # the error names it
            if line.strip():
                yield check_text(line.strip(), f"line {number} of stdin")
    except UnicodeDecodeError as error:
        raise InputError(f"line {number + 1} of stdin is no text in UTF-8", hint=NO_TEXT) from error


def read_all() -> str:
    """All of stdin. InputError for bytes that are no text."""
    try:
        return check_text(sys.stdin.read(), "stdin")
    except UnicodeDecodeError as error:
        raise InputError("stdin is no text in UTF-8", hint=NO_TEXT) from error


def open_either(
    artifact: str | None,
    model: str | None,
    api_key_env: str | None,
    device: str,
    threads: int,
    stop: Sequence[str],
    given: dict[str, Any],
    form: Form | None,
    adapter: str | None,
    system: str = "",
) -> Session | RemoteSession:
    """A model that is opened here, or one of the server at a URL."""
    if artifact is not None and is_url(artifact):
        if device != "auto" or threads:
            raise UsageError("--device and --threads are of a model that is opened here", hint="leave them out")
        session = open_remote(artifact, model, api_key_env, stop, given, system, adapter)
        session.form = form.fields() if form else {}
        return session
    if model is not None or api_key_env is not None:
        raise UsageError("--model and --api-key-env are for a server", hint="give its URL: llmctl chat http://…")
    return open_session(artifact, device, threads, stop, given, system, form, adapter)


def write_answers(session: Session | RemoteSession, output: Output, prompt: Callable[[Session], list[int]]) -> None:
    """Answers that are finished before they are printed: several, scored, or as JSON."""
    if isinstance(session, RemoteSession):
        raise UsageError(
            f"{output.option} prints finished answers of a model that is opened here",
            hint="ask a server with llmctl generate URL --input FILE",
        )
    output.write(session, prompt(session))


@click.command()
@options
@click.option("--system", default="", help="System message.")
@click.option("--history/--no-history", default=True, help="Remember what is typed, for the next conversation.")
def chat(
    artifact: str | None,
    prompt: str | None,
    stop: Sequence[str],
    device: str,
    threads: int,
    system: str,
    output: Output,
    model: str | None,
    adapter: str | None,
    api_key_env: str | None,
    form: Form | None,
    history: bool,
    **given: Any,
) -> None:
    """Talk to a model: ARTIFACT is a model directory, a reference, an id, or a server's URL.

    Without ARTIFACT it is exports/quickstart. Without a terminal on stdin every line is a question of its own.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty", hint="give a question")
    check_text(prompt or "", "--prompt")
    conversation = prompt is None and sys.stdin.isatty()
    if conversation and output.option:
        raise UsageError(
            f"{output.option} is not for a conversation, which goes on from one answer",
            hint="ask one question with --prompt, or pipe questions into the command",
        )
    session = open_either(artifact, model, api_key_env, device, threads, stop, given, form, adapter, system)
    if conversation:
        save = use_history(history)
        try:
            Repl(session).run()
        finally:
            save()
    for question in () if conversation else lines() if prompt is None else (prompt,):
        session.reset()
        if output.streams:
            show(session.ask(question))
        else:
            write_answers(session, output, lambda opened, asked=question: opened.question(asked)[1])  # type: ignore[misc]


@click.command()
@options
@click.option("--input", "source", help="JSON Lines of prompts or messages; - is stdin.")
@click.option("--output", "target", default="-", show_default=True, help="Append answers here; what is there is kept.")
@click.option("--batch", type=click.IntRange(1), show_default="16", help="Lines answered side by side.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first line without an answer.")
@click.option("--retry-errors", is_flag=True, help="Ask again what failed in an earlier run.")
@click.option("--system", default="", help="System message of messages that have none.")
@click.option("--url", help="A server's URL; the same as giving it as ARTIFACT.")
def generate(
    artifact: str | None,
    prompt: str | None,
    stop: Sequence[str],
    device: str,
    threads: int,
    output: Output,
    model: str | None,
    adapter: str | None,
    api_key_env: str | None,
    form: Form | None,
    source: str | None,
    target: str,
    batch: int | None,
    fail_fast: bool,
    retry_errors: bool,
    system: str,
    url: str | None,
    **given: Any,
) -> None:
    """Continue a text, or answer the lines of a file: ARTIFACT is a model directory, a reference, an id, or a URL.

    The text is --prompt, or all of stdin. With --input every line is {"prompt": …} or {"messages": […]}.
    """
    if url is not None and artifact is not None:
        raise UsageError("both ARTIFACT and --url are given", hint="leave one of them out")
    artifact = url or artifact
    if source is not None:
        if prompt is not None:
            raise UsageError("both --prompt and --input are given", hint="leave one of them out")
        session = open_either(artifact, model, api_key_env, device, threads, stop, given, form, adapter, system)
        answer_lines(session, artifact, given, output, source, target, batch or 16, fail_fast, retry_errors)
        return
    for name, used in (
        ("--output", target != "-"),
        ("--batch", batch is not None),
        ("--fail-fast", fail_fast),
        ("--retry-errors", retry_errors),
    ):
        if used:
            raise UsageError(f"{name} is of the lines of a file", hint="give --input FILE")
    if system:
        raise UsageError("--system is of messages, and a text is continued as it is", hint="give --input FILE")
    if prompt is None and sys.stdin.isatty():
        raise UsageError("there is no text to continue", hint="give --prompt, or pipe a text into the command")
    text = read_all() if prompt is None else check_text(prompt, "--prompt")
    if not text:
        raise UsageError("the text to continue is empty", hint="give --prompt, or pipe a text into the command")
    session = open_either(artifact, model, api_key_env, device, threads, stop, given, form, adapter)
    if output.streams:
        show(session.continue_text(text))
    else:
        write_answers(session, output, lambda opened: opened.beginning(text))


def answer_lines(
    session: Session | RemoteSession,
    artifact: str | None,
    given: dict[str, Any],
    output: Output,
    source: str,
    target: str,
    batch: int,
    fail_fast: bool,
    retry_errors: bool,
) -> None:
    """Answer the lines of a file."""
    from llmctl_serve.batch import Answerer, LocalAnswers, RemoteAnswers, answer_file

    if isinstance(session, RemoteSession):
        if output.best_of:
            raise UsageError("--best-of compares scores, which a server does not give", hint="use -n and choose")
        answerer: Answerer = RemoteAnswers(session, output, batch)
    else:
        wanted = {name: value for name, value in given.items() if value is not None}
        answerer = LocalAnswers(session, wanted, output, find_model(artifact).path, batch)
    answer_file(answerer, source, target, fail_fast, retry_errors)
