"""`llmctl chat` and `llmctl generate`: a model in the terminal, or in a pipe, one question per line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl import Artifact, InputError, LlmctlError, UsageError

if TYPE_CHECKING:
    from llmctl.generator import Generator, Sampling
    from llmctl.text.tokenizer import Tokenizer

DEFAULT = Path("exports/quickstart")
HELP = "/reset forgets the conversation, /exit ends (as does Ctrl-D)"


@dataclass
class Session:
    """An opened model, how it is sampled, and what has been said so far."""

    generator: Generator
    tokenizer: Tokenizer
    sampling: Sampling
    stop: Sequence[str] = ()
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def ask(self, question: str) -> Iterator[str]:
        """Stream the answer and remember it. Old turns are dropped while they leave no room for an answer.

        UsageError if the question alone does not fit.
        """
        from llmctl.generator import check_prompt
        from llmctl.text.streaming import stream_text

        asked = [*self.turns, {"role": "user", "content": question}]
        ids = self._ids(asked)
        context = self.generator.context_length
        room = min(self.sampling.max_new_tokens, context // 4)
        while len(ids) + room > context and len(asked) > 1:
            asked = asked[2:]
            ids = self._ids(asked)
        check_prompt(ids, context)
        answer = ""
        for delta in stream_text(self.generator, self.tokenizer, ids, self.sampling, self.stop):
            answer += delta.text
            yield delta.text
        self.turns = [*asked, {"role": "assistant", "content": answer}]

    def _ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.tokenizer.encode_chat([*system, *turns], add_generation_prompt=True).ids

    def continue_text(self, text: str) -> Iterator[str]:
        """Stream the continuation of a text that begins like a training document."""
        from llmctl.text.streaming import stream_text

        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        ids = bos + self.tokenizer.encode(text)
        for delta in stream_text(self.generator, self.tokenizer, ids, self.sampling, self.stop):
            yield delta.text


def find_model(text: str | None) -> Artifact:
    """The model that `text` names: an existing path, else a reference or id in the store; default the quickstart's.

    InputError if it is no model.
    """
    if text is None:
        if not DEFAULT.is_dir():
            raise UsageError(
                "no model is named, and there is no exports/quickstart", hint="llmctl chat PATH, or `make quickstart`"
            )
        text = str(DEFAULT)
    path = Path(text).expanduser()
    if path.is_dir():
        return Artifact(path, model_type(path))
    if path.exists():
        raise InputError(f"{path} is a file; a model is a directory", hint=f"try {path.parent}")
    from llmctl.store import Store

    return Store.open().resolve(text, ("model.onnx", "model.hf"))


def model_type(path: Path) -> str:
    """`model.onnx` or `model.hf` by the files of a directory; InputError if it is neither."""
    if (path / "model.onnx").is_file():
        return "model.onnx"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return "model.hf"
    raise InputError(
        f"{path} holds no model", hint="a model directory has model.onnx, or config.json with model.safetensors"
    )


def open_session(
    artifact: str | None, device: str, threads: int, stop: Sequence[str], given: dict[str, Any], system: str = ""
) -> Session:
    """Open a model; `given` overrides its `generation_config.json`, None leaves a value as it is."""
    from llmctl.registry import get_registry
    from llmctl.text.tokenizer import Tokenizer
    from llmctl_serve.defaults import default_sampling

    found = find_model(artifact)
    tokenizer = Tokenizer.load(found.path)
    sampling = replace(
        default_sampling(found.path), **{key: value for key, value in given.items() if value is not None}
    )
    generator = get_registry().open_generator(found, device=device, threads=threads)
    return Session(generator, tokenizer, sampling, stop, system)


def show(parts: Iterator[str]) -> None:
    """Write an answer as it comes, and end the line."""
    for part in parts:
        click.echo(part, nl=False)
        sys.stdout.flush()
    click.echo()


def lines() -> Iterator[str]:
    """The lines of stdin that are not empty."""
    return (line.strip() for line in sys.stdin if line.strip())


def options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `chat` and `generate` share."""
    for option in reversed(
        (
            click.argument("artifact", required=False),
            click.option("--prompt", help="Answer this and exit."),
            click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True),
            click.option("--temperature", type=click.FloatRange(0), help="0 is greedy. Default: the model's own."),
            click.option("--top-k", type=click.IntRange(0), help="Choose among the k likeliest tokens; 0 for all."),
            click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Choose within this mass."),
            click.option("--seed", type=click.IntRange(0), help="Makes sampling repeatable."),
            click.option("--stop", multiple=True, help="End before this text; may be given several times."),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
            click.option("--threads", type=click.IntRange(0), default=0, help="0 takes all cores.", show_default=True),
        )
    ):
        command = option(command)
    return command


@click.command()
@options
@click.option("--system", default="", help="System message.")
def chat(
    artifact: str | None, prompt: str | None, stop: Sequence[str], device: str, threads: int, system: str, **given: Any
) -> None:
    """Talk to a model: ARTIFACT is a model directory, a reference or an id (default exports/quickstart).

    Without a terminal on stdin every line is a question of its own.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty", hint="give a question")
    session = open_session(artifact, device, threads, stop, given, system)
    if prompt is not None:
        show(session.ask(prompt))
    elif sys.stdin.isatty():
        converse(session)
    else:
        for question in lines():
            session.reset()
            show(session.ask(question))


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
    artifact: str | None, prompt: str | None, stop: Sequence[str], device: str, threads: int, **given: Any
) -> None:
    """Continue a text with a model: ARTIFACT is a model directory, a reference or an id (default exports/quickstart).

    The text is --prompt, or all of stdin.
    """
    if prompt is None and sys.stdin.isatty():
        raise UsageError("there is no text to continue", hint="give --prompt, or pipe a text into the command")
    text = sys.stdin.read() if prompt is None else prompt
    if not text:
        raise UsageError("the text to continue is empty", hint="give --prompt, or pipe a text into the command")
    show(open_session(artifact, device, threads, stop, given).continue_text(text))
