"""What it means to generate text, free of any framework: `serve`, `eval`, `rag` and `chat` know only this.

A `Generator` deals in token ids and knows no text; `llmctl.text.streaming` turns ids into text and applies stop
strings. For a model with an encoder the prompt is what the encoder reads, and the answer is all that the decoder says.
Both the torch model (`llmctl.train.generate`) and the ONNX engine (`llmctl.ort`) implement it; which one opens a given
artifact is decided by the hook `open_generator`.
"""

from __future__ import annotations

import collections.abc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from llmctl.errors import UsageError
from llmctl.rules import Rules

if TYPE_CHECKING:
    import numpy as np

    from llmctl.engine import Constraint

LEAST_PENALTY = 0.01
"""Of repetition. Logits are divided by it in float32, which a number near zero would make infinite."""
LARGEST = 1e30
"""Of biases and penalties: sums with a beam's score, and quotients by `LEAST_PENALTY`, stay in float32's range."""

Tokens = collections.abc.Generator[int, None, int | None]
"""The ids of an answer one by one; what it returns is the EOS id that ended it, None at a limit."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: penalties and bias, temperature, top-k, top-p, min-p, as in transformers.

    `temperature=0` is greedy, or beam search if `beams` is above 1. `top_k=0`, `top_p=1` and `min_p=0` switch those
    filters off. `repetition_penalty` divides positive and multiplies negative logits of tokens in prompt or answer
    (Keskar et al. 1909.05858); `frequency_penalty` is subtracted once per occurrence in the answer, `presence_penalty`
    once for every token that occurs in it, and `logit_bias` added, all three as OpenAI's API has them. `rules` are what
    the model's own `generation_config.json` forbids and forces.
    Equal seeds give equal tokens on one device and build; without a seed every call differs.

    `n` answers to one prompt come from `Generator.candidates`: the n best beams, or n draws with the seeds `seed`,
    `seed + 1`, … (0 after the greatest), so that each equals a single run with its seed. An answer's score is its
    log-probability divided by its length to the power `length_penalty` (0: the sum, 1: the mean; above 1 favours long
    answers); beams are ranked by it. `early_stopping` says when a beam search ends that has `beams` finished answers:
    True at once, False when the best unfinished beam scores below the worst of them at its present length, "never" when
    it would do so even at the greatest length.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    seed: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    n: int = 1
    rules: Rules | None = None

    def __post_init__(self) -> None:
        for ok, text in (
            (self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}"),
            (self.temperature >= 0, f"temperature must not be negative, got {self.temperature}"),
            (self.top_k >= 0, f"top_k must not be negative, got {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}"),
            (0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}"),
            (
                self.repetition_penalty >= LEAST_PENALTY,
                f"repetition_penalty must be at least {LEAST_PENALTY}, got {self.repetition_penalty}",
            ),
            *(
                (abs(value) <= LARGEST, f"{name} must be in [-{LARGEST:g}, {LARGEST:g}], got {value}")
                for name, value in (
                    ("repetition_penalty", self.repetition_penalty),
                    ("frequency_penalty", self.frequency_penalty),
                    ("presence_penalty", self.presence_penalty),
                )
            ),
            *(
                (
                    token >= 0 and abs(value) <= LARGEST,
                    f"logit_bias of token {token} is {value}: give an id and a number in [-{LARGEST:g}, {LARGEST:g}]",
                )
                for token, value in self.logit_bias
            ),
            (
                len({token for token, _ in self.logit_bias}) == len(self.logit_bias),
                "logit_bias names a token twice",
            ),
            (self.seed is None or self.seed >= 0, f"seed must not be negative, got {self.seed}"),
            (self.seed is None or self.seed < 2**63, f"seed must be below 2**63, got {self.seed}"),
            (self.beams >= 1, f"beams must be at least 1, got {self.beams}"),
            (self.n >= 1, f"n must be at least 1, got {self.n}"),
            # Beyond it, length ** penalty leaves the range of a float for long answers.
            (-10 <= self.length_penalty <= 10, f"length_penalty must be in [-10, 10], got {self.length_penalty}"),
            (
                isinstance(self.early_stopping, bool) or self.early_stopping == "never",
                f'early_stopping must be true, false or "never", got {self.early_stopping!r}',
            ),
        ):
            if not ok:
                raise UsageError(text)
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        """An option that the others would leave without effect is a mistake to be told, not to be ignored."""
        several = self.beams > 1
        for wrong, text, hint in (
            (
                several and self.temperature > 0,
                f"beam search follows the likeliest beams and draws nothing, but temperature is {self.temperature}",
                "set temperature to 0, or beams to 1",
            ),
            (
                several and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0),
                f"beam search filters no tokens, but top_k is {self.top_k}, top_p {self.top_p}, min_p {self.min_p}",
                "leave top_k, top_p and min_p out, or set beams to 1",
            ),
            (
                several and self.n > self.beams,
                f"{self.beams} beams cannot give {self.n} answers",
                f"set beams to {self.n} or more, or n to {self.beams} or less",
            ),
            (
                not several and self.early_stopping is not False,
                "early_stopping says when a beam search ends, but beams is 1",
                "set beams above 1, or leave early_stopping out",
            ),
            (
                not several and self.n > 1 and self.temperature == 0,
                f"greedy decoding has one answer, but n is {self.n}",
                "set temperature above 0 for draws, or beams for the best beams",
            ),
        ):
            if wrong:
                raise UsageError(text, hint=hint)

    def cuts(self, said: int, limit: int) -> bool:
        """Whether the model's rules force an end behind `said` tokens of at most `limit`; see `Rules.cuts`."""
        return self.rules is not None and self.rules.cuts(said, limit)

    def draws(self) -> list[Sampling]:
        """The `n` single runs that the answers equal, each with its own seed."""
        seeds = (None if self.seed is None else (self.seed + i) % 2**63 for i in range(self.n))
        return [replace(self, n=1, seed=seed) for seed in seeds]


GREEDY = Sampling()


@dataclass(frozen=True)
class Candidate:
    """One answer to a prompt, scored by the model itself: temperature 1, nothing filtered."""

    ids: list[int]
    """Without the EOS id."""
    logprobs: list[float]
    """Natural log-probabilities of `ids`, and after them of the EOS id if the answer ended with one."""
    ended: bool
    """Ended with an EOS id, not at a limit."""
    length_penalty: float = 1.0
    end: int | None = None
    """The EOS id it ended with, where that is known."""
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """The likeliest tokens in the place of each that `logprobs` scores, if an engine was asked for them."""

    @property
    def logprob(self) -> float:
        """Of the whole answer."""
        return math.fsum(self.logprobs)

    @property
    def score(self) -> float:
        """`logprob / length ** length_penalty`, the EOS counted; -inf for an answer without a token."""
        length = len(self.logprobs)
        return self.logprob / math.pow(length, self.length_penalty) if length else -math.inf

    def cut(self, count: int) -> Candidate:
        """The answer up to its token `count`; itself if it is no longer."""
        if count >= len(self.ids):
            return self
        logprobs, tops = self.logprobs[:count], self.tops[:count]
        return replace(self, ids=self.ids[:count], logprobs=logprobs, ended=False, end=None, tops=tops)


@runtime_checkable
class Generator(Protocol):
    """One opened model. Not thread-safe: a server serialises calls or opens one per worker."""

    @property
    def context_length(self) -> int:
        """Most tokens, prompt and answer together, that the model can attend to."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Generation ends after one of these; it is not yielded."""

    @property
    def backend(self) -> str:
        """For a human: "torch cpu float32", "onnxruntime CPUExecutionProvider"."""

    @property
    def encoder_decoder(self) -> bool:
        """The prompt is read by an encoder, framed as a document of its own; the answer does not continue it."""

    def room(self, prompt: Sequence[int]) -> int:
        """Most tokens that may follow this prompt.

        Raises UsageError if the prompt is empty or leaves no room in the context.
        """

    def stream(
        self, prompt: Sequence[int], sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> Iterator[int]:
        """Yield new token ids one by one; ends at an EOS id, `max_new_tokens` or the context length.

        With beams all of them come at the end. A generator (`Tokens`) returns the EOS id. `constraint`, in its first
        state, says what the answer must look like; it is copied. Raises UsageError for a prompt as `room` does, and for
        `n > 1`.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> list[list[int]]:
        """The new ids for many prompts, in order, each equal to `list(self.stream(prompt, sampling))`."""

    def candidates(
        self, prompt: Sequence[int], sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> list[Candidate]:
        """`sampling.n` answers with their scores: beams best first, draws in the order of their seeds.

        The prompt runs through the model once. Fewer beams come back only where fewer answers exist.
        """

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """Logits that each token of `answer` was chosen from, shape `(len(answer), vocab_size)`, float32."""

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """Natural log-probability of `tokens[1:]` given what stands before, shape `(len(tokens) - 1,)`, float32.

        As `logits`, for decoders only: an encoder-decoder raises UsageError.
        """

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits at every position of one sequence, shape `(len(tokens), vocab_size)`, float32."""


def check_prompt(prompt: Sequence[int], context_length: int, encoder_decoder: bool = False) -> None:
    """Refuse a prompt that cannot be answered, with the numbers a user needs."""
    if not prompt:
        raise UsageError("the prompt is empty", hint="give at least one token of text")
    if len(prompt) >= context_length + encoder_decoder:  # an encoder's prompt may fill the context
        raise UsageError(
            f"the prompt has {len(prompt)} tokens, the model's context is {context_length}",
            hint="shorten the prompt or use a model with a longer context",
        )


def prompt_room(prompt: Sequence[int], context_length: int, encoder_decoder: bool = False) -> int:
    """Most tokens that may follow a prompt that `check_prompt` accepts.

    A decoder's context holds prompt and answer. An encoder-decoder's holds the prompt, and another one the answer after
    its start token.
    """
    check_prompt(prompt, context_length, encoder_decoder)
    return context_length - (1 if encoder_decoder else len(prompt))


def check_bias(sampling: Sampling, vocab_size: int | None) -> None:
    """UsageError if the logit bias or a forced token names an id that is not below `vocab_size`."""
    for token in () if sampling.rules is None else sampling.rules.forced:
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            raise UsageError(
                f"token {token} is to be forced, the model's vocabulary has {vocab_size}",
                hint="correct forced_bos_token_id and forced_eos_token_id in the model's generation_config.json",
            )
    for token, _ in sampling.logit_bias:
        if vocab_size is not None and token >= vocab_size:
            raise UsageError(
                f"logit_bias names token {token}, the model's vocabulary has {vocab_size}",
                hint="give ids of the model's own tokenizer",
            )


def choose_adapter(generator: Generator, name: str | None) -> Generator:
    """The generator with its adapter `name`, or as it is for None. UsageError for an adapter that it does not have."""
    if name is None:
        return generator
    chosen = getattr(generator, "with_adapter", None)
    if chosen is None:
        raise unknown_adapter(name, ())
    return chosen(name)  # type: ignore[no-any-return]


def unknown_adapter(name: str, names: Sequence[str]) -> UsageError:
    """The error for an adapter that a model does not have; it has `names`."""
    if not names:
        hint = "export the model with it: llmctl export-onnx --model MODEL --adapters ADAPTER"
        return UsageError(f"there is no adapter `{name}`: the model has none", hint=hint)
    return UsageError(f"there is no adapter `{name}`", hint=f"the model has {', '.join(names)}")


def check_single(sampling: Sampling) -> None:
    """Refuse `n > 1` where one answer is given."""
    if sampling.n > 1:
        raise UsageError(f"one answer is given here, but n is {sampling.n}", hint="set n to 1")
