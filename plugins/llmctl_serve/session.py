"""A model opened for the terminal, and the conversation with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl import Artifact, UsageError
from llmctl.text.masking import MaskingTime, TimedConstraint
from llmctl_serve.endpoint import is_url
from llmctl_serve.forms import Form
from llmctl_serve.spent import Spent

if TYPE_CHECKING:
    from llmctl.engine import Constraint
    from llmctl.generator import Generator, Sampling
    from llmctl.text.tokenizer import Tokenizer

DEFAULT = Path("exports/quickstart")


@dataclass
class Session:
    """An opened model, how it is sampled, and what has been said so far."""

    generator: Generator
    tokenizer: Tokenizer
    sampling: Sampling
    stop: Sequence[str] = ()
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    form: Form | None = None
    """What every answer must look like."""
    constraint: Constraint | None = None
    """What follows the form."""
    spent: Spent | None = None
    """On the last answer."""
    device: str = "auto"
    threads: int = 0
    name: str = ""
    """What a person calls the model."""
    chosen: dict[str, Any] = field(default_factory=dict)
    """What a person has set of `sampling`; the rest is the model's own."""

    @property
    def backend(self) -> str:
        """For a human."""
        return f"{self.name} on {self.generator.backend}"

    def followed(self, masking: MaskingTime) -> tuple[Constraint, ...]:
        """The form as the last argument of a generator, its time noted in `masking`; empty where there is none."""
        return () if self.constraint is None else (TimedConstraint(self.constraint, masking),)

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def set(self, name: str, value: Any) -> None:
        """Change how answers are chosen. UsageError for a value out of range, or that contradicts another."""
        if value is None and name != "seed":
            raise UsageError(f"{name} needs a value", hint=f"for example /set {name}=1")
        self.sampling = replace(self.sampling, **{name: value})
        self.chosen = {**self.chosen, name: value}

    def values(self) -> dict[str, Any]:
        """How answers are chosen."""
        return asdict(self.sampling)

    def switch(self, name: str) -> None:
        """Talk to another model, which goes on with this conversation; what was set stays set, but biases of token ids.

        UsageError for a server's: what is set means something else there.
        """
        if is_url(name):
            raise UsageError(
                f"{name} is a server, this conversation is with a model that is opened here",
                hint="take it there: /save FILE, then `llmctl chat URL` and /load FILE",
            )
        kept = {key: value for key, value in self.chosen.items() if key != "logit_bias"}
        other = open_session(name, self.device, self.threads, self.stop, kept, form=self.form)
        self.generator, self.tokenizer, self.sampling = other.generator, other.tokenizer, other.sampling
        self.constraint, self.name, self.chosen = other.constraint, other.name, other.chosen

    def tokens(self) -> str:
        """How much of the context the conversation takes."""
        return f"{len(self._ids(self.turns))} of {self.generator.context_length} tokens"

    def ask(self, question: str) -> Iterator[str]:
        """Stream the answer and remember it, as far as it came.

        Old turns are dropped while they leave no room for an answer. UsageError if the question alone does not fit.
        """
        asked, ids = self.question(question)
        answer = ""
        try:
            for text in self._stream(ids):
                answer += text
                yield text
        finally:
            if answer:  # a part of it, where it was interrupted
                self.turns = [*asked, {"role": "assistant", "content": answer}]

    def question(self, text: str) -> tuple[list[dict[str, str]], list[int]]:
        """The turns that a question stands after, itself included, and their ids."""
        asked = [*self.turns, {"role": "user", "content": text}]
        ids = self._ids(asked)
        context = self.generator.context_length
        room = min(self.sampling.max_new_tokens, context // 4)
        while len(ids) + room > context and len(asked) > 1:
            asked = asked[2:]
            ids = self._ids(asked)
        self.generator.room(ids)  # refuses a question that does not fit
        return asked, ids

    def _ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.tokenizer.encode_chat([*system, *turns], add_generation_prompt=True).ids

    def beginning(self, text: str) -> list[int]:
        """The ids of a text that begins like a training document; an encoder reads a whole one."""
        if self.generator.encoder_decoder:
            return self.tokenizer.encode_document(text)
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(text)

    def continue_text(self, text: str) -> Iterator[str]:
        """Stream the continuation of a text."""
        return self._stream(self.beginning(text))

    def _stream(self, ids: Sequence[int]) -> Iterator[str]:
        from llmctl.text.streaming import stream_text

        spent = Spent(prompt=len(ids))
        form = self.followed(spent.masking)
        try:
            for delta in stream_text(self.generator, self.tokenizer, ids, self.sampling, self.stop, *form):
                spent.note(len(delta.token_ids))
                spent.cut = delta.finish_reason == "length"
                yield delta.text
        finally:
            spent.end()
            self.spent = spent


def find_model(text: str | None) -> Artifact:
    """The model that `text` names, or the quickstart's. InputError if it is none."""
    if text is None:
        if not DEFAULT.is_dir():
            raise UsageError(
                "no model is named, and there is no exports/quickstart", hint="llmctl chat PATH, or `make quickstart`"
            )
        text = str(DEFAULT)
    from llmctl.store import models

    return models.find_model(text)


def open_session(
    artifact: str | None,
    device: str,
    threads: int,
    stop: Sequence[str],
    given: dict[str, Any],
    system: str = "",
    form: Form | None = None,
    adapter: str | None = None,
) -> Session:
    """Open a model, with an adapter if one is named; `given` overrides its `generation_config.json` where not None."""
    from llmctl.generation_config import warn_of_unhonoured
    from llmctl.generator import choose_adapter
    from llmctl.registry import get_registry
    from llmctl.text.tokenizer import Tokenizer
    from llmctl_serve.defaults import default_sampling

    found = find_model(artifact)
    chosen = {key: value for key, value in given.items() if value is not None}
    sampling = default_sampling(found.path, **chosen)
    warn_of_unhonoured(found.path)
    tokenizer = Tokenizer.load(found.path)
    generator = choose_adapter(get_registry().open_generator(found, device=device, threads=threads), adapter)
    session = Session(generator, tokenizer, sampling, stop, system, form=form, device=device, threads=threads)
    session.name = (artifact or str(DEFAULT)) + (f":{adapter}" if adapter else "")
    session.chosen = chosen
    if form is not None:
        session.constraint = form.constraint(generator, tokenizer)
    return session
