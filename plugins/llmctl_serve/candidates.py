"""Several answers to one prompt, or one with the log-probabilities of its tokens: as text for people, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from llmctl.generator import Candidate
from llmctl.text.masking import MaskingTime
from llmctl.text.streaming import Completion, completion_of
from llmctl_serve.logprobs import TokenScore, score_tokens
from llmctl_serve.session import Session


@dataclass(frozen=True)
class Said:
    """A finished answer as text."""

    completion: Completion
    candidate: Candidate
    """Cut where the text is, so that its numbers are those of what is shown."""
    scores: Sequence[TokenScore] | None = None
    """Of each token, if they were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `logprobs` is as in a chat completion over HTTP."""
        found = {
            "text": self.completion.text,
            "finish_reason": self.completion.finish_reason,
            "tokens": len(self.candidate.ids),
            "logprob": self.candidate.logprob,
            "score": self.candidate.score if self.candidate.logprobs else None,
        }
        return found if self.scores is None else {**found, "logprobs": [score.to_chat() for score in self.scores]}


@dataclass(frozen=True)
class Output:
    """What is printed of the answers to a prompt, and how."""

    json: bool = False
    logprobs: int | None = None
    """Print the log-probability of every token, beside that many of the likeliest at its place."""
    best_of: bool = False
    """Print only the answer with the best score."""
    n: int = 1

    @property
    def option(self) -> str | None:
        """The option for which answers must be finished before they are printed, if there is one."""
        wanted = {
            "--best-of": self.best_of,
            "-n": self.n > 1,
            "--logprobs": self.logprobs is not None,
            "--format json": self.json,
        }
        return next((name for name, given in wanted.items() if given), None)

    @property
    def streams(self) -> bool:
        """Whether an answer is printed as it comes: one, and nothing but its text."""
        return self.option is None

    def write(self, session: Session, prompt: Sequence[int]) -> None:
        """Generate and print."""
        masking = MaskingTime()
        found = answers(session, prompt, masking, self.logprobs)
        if self.best_of:
            found = [max(found, key=lambda said: said.candidate.score)]
        click.echo(as_json(found, masking) if self.json else as_text(found))


def answers(session: Session, prompt: Sequence[int], masking: MaskingTime, scored: int | None = None) -> list[Said]:
    """All answers to a prompt; `scored` asks for the scores of tokens, with that many alternatives.

    What following their form takes is noted in `masking`. A stop string cuts what is shown; beams are compared as they
    were found, whole.
    """
    generator, tokenizer = session.generator, session.tokenizer
    found = []
    for whole in generator.candidates(prompt, session.sampling, *session.followed(masking)):
        completion = completion_of(tokenizer, whole, session.stop)
        candidate = whole.cut(len(completion.token_ids))
        scores = None
        if scored is not None:
            scores = score_tokens(generator, tokenizer, prompt, candidate.ids, completion.text, scored)
        found.append(Said(completion, candidate, scores))
    return found


def as_json(found: Sequence[Said], masking: MaskingTime) -> str:
    """One line; `masking` is in it where the answers have a form."""
    line: dict[str, Any] = {"candidates": [said.to_dict() for said in found]}
    if masking.steps:
        line["masking"] = masking.to_dict()
    return json.dumps(line, ensure_ascii=False)


def as_text(found: Sequence[Said]) -> str:
    """One answer as it is; several under a line each that says which and how likely. Tokens below, if scored."""
    blocks = []
    for number, said in enumerate(found, start=1):
        lines = [said.completion.text]
        if len(found) > 1:
            one = said.candidate
            size = f"{len(one.ids)} token{'' if len(one.ids) == 1 else 's'}"
            lines.insert(0, f"[{number}] score {one.score:.4f}, log-probability {one.logprob:.4f}, {size}")
        if said.scores is not None:
            lines += ["", *_table(said.scores)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _table(scores: Sequence[TokenScore]) -> Iterator[str]:
    """A line for each token: log-probability, the token, and the likeliest at its place."""
    width = max([len("token"), *(len(_quoted(score.text)) for score in scores)])
    top = any(score.top for score in scores)
    yield f"log-prob  {'token':{width}}  likeliest here" if top else "log-prob  token"
    for score in scores:
        others = ", ".join(f"{_quoted(other.text)} {other.logprob:.4f}" for other in score.top)
        yield f"{score.logprob:8.4f}  {_quoted(score.text):{width}}  {others}".rstrip()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
