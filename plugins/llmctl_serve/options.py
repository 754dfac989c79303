"""The options that `chat` and `generate` share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click

from llmctl import UsageError
from llmctl_serve.candidates import Output
from llmctl_serve.forms import read_form

EARLY: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
OPTIONS = (
    click.argument("artifact", required=False),
    click.option("--model", help="With a server's URL: which of its models."),
    click.option("--adapter", help="Answer with this adapter of the model; default: the model as it is."),
    click.option("--api-key-env", help="With a URL: environment variable with the key; default OPENAI_API_KEY."),
    click.option("--prompt", help="Answer this and exit."),
    click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True),
    click.option("--temperature", type=click.FloatRange(0), help="0 is greedy. Default: the model's own."),
    click.option("--top-k", type=click.IntRange(0), help="Choose among the k likeliest tokens; 0 for all."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Choose within this mass."),
    click.option("--min-p", type=click.FloatRange(0, 1), help="Drop tokens below this share of the likeliest."),
    click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), help="Above 1 avoids repetition."),
    click.option("--frequency-penalty", type=float, help="Taken off a logit per occurrence in the answer."),
    click.option("--presence-penalty", type=float, help="Taken off the logits of tokens in the answer."),
    click.option("--logit-bias", multiple=True, metavar="ID=VALUE", help="Added to a token's logit; repeatable."),
    click.option("--json-schema", "schema", metavar="FILE", help="Answers are JSON of this schema."),
    click.option("--regex", help="Answers match this expression (Rust's syntax)."),
    click.option("--grammar", metavar="FILE", help="Answers follow this grammar (Lark's notation, from `start`)."),
    click.option("--seed", type=click.IntRange(0), help="Makes sampling repeatable."),
    click.option("--beams", type=click.IntRange(1), help="Follow this many likeliest answers; 1 is greedy."),
    click.option("--length-penalty", type=float, help="Answers are ranked by log-probability / length ** this."),
    click.option(
        "--early-stopping",
        type=click.Choice(list(EARLY)),
        help="true ends the beam search with as many answers as beams, never only when none can get better.",
    ),
    click.option("-n", "n", type=click.IntRange(1), help="Print this many: the best beams, or draws."),
    click.option("--best-of", type=click.IntRange(2), help="Draw this many, print the one that is ranked best."),
    click.option(
        "--logprobs", type=click.IntRange(0, 20), help="Print each token's log-probability, and the k likeliest."
    ),
    click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True),
    click.option("--stop", multiple=True, help="End before this text; may be given several times."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    click.option(
        "--threads", type=click.IntRange(0), default=0, help="0 takes one per physical core.", show_default=True
    ),
)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options; what belongs to printing comes to it as one `output`."""

    @functools.wraps(command)
    def run(
        format_: str,
        logprobs: int | None,
        best_of: int | None,
        early_stopping: str | None,
        logit_bias: Sequence[str],
        schema: str | None,
        regex: str | None,
        grammar: str | None,
        **given: Any,
    ) -> None:
        if best_of is not None:
            if given["n"] is not None or (given["beams"] or 1) > 1:
                raise UsageError(
                    "--best-of chooses among draws", hint="leave -n and --beams out; beams come best first anyway"
                )
            given["n"] = best_of
        if not all(given.get("stop") or ("x",)):
            raise UsageError("--stop is empty, and every answer would end before it begins", hint="leave it out")
        output = Output(json=format_ == "json", logprobs=logprobs, best_of=best_of is not None, n=given["n"] or 1)
        early = None if early_stopping is None else EARLY[early_stopping]
        given["form"] = read_form(schema, regex, grammar)
        command(output=output, early_stopping=early, logit_bias=parse_bias(logit_bias) or None, **given)

    wrapped: Callable[..., None] = run
    for option in reversed(OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def parse_bias(texts: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """`5=-100` as (token id, what is added to its logit). UsageError for anything else."""
    found = []
    for text in texts:
        token, _, value = text.partition("=")
        try:
            found.append((int(token), float(value)))
        except ValueError as error:
            raise UsageError(f"--logit-bias {text} is no ID=VALUE", hint="for example --logit-bias 5=-100") from error
    return tuple(found)
