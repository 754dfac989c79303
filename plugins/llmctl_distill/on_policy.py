"""On-policy distillation (GKD, 2306.13649): the student writes, and the teacher says what it would have said there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from llmctl.nn.transformer import Transformer
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.batches import Batch, Example, pack
from llmctl.train.conversations import render
from llmctl.train.data import ExampleSource, Pick
from llmctl.train.generate import make_generator
from llmctl_distill.losses import LogitDistillation
from llmctl_distill.params import DistillParams
from llmctl_distill.writing import example, sampling

STEPS = 1
"""Stands before a step where its seed is drawn, so that it is not that of an answer."""


@dataclass(frozen=True)
class PromptedBatch(Batch):
    """A batch of conversations with what is needed to write others in their place."""

    prompts: tuple[tuple[int, ...], ...] = ()
    """In the order of the sequences."""
    places: tuple[Pick, ...] = ()
    """Where each stands in the training data: its seed follows from that, however a step is split."""
    written: bool = False
    """Whether the student wrote the answers."""


class PromptSource(ExampleSource):
    """Conversations whose last answer can be replaced."""

    def __init__(self, rows: Sequence[tuple[list[int], Example]], length: int, params: DistillParams) -> None:
        super().__init__([made for _, made in rows], length, params)
        self.prompts, self.longest = [prompt for prompt, _ in rows], params.max_new_tokens

    def batch(self, picks: Sequence[Pick]) -> PromptedBatch:
        """The conversations at `picks`, with their prompts."""
        numbers = [int(self.order(epoch)[place]) for epoch, place in picks]
        return prompted(super().batch(picks), [tuple(self.prompts[i]) for i in numbers], picks)

    def heaviest(self) -> Batch:
        """Of the longest prompts, with answers as long as they can get, where that is more than the data has."""
        room = [min(len(prompt) + self.longest, self.length) for prompt in self.prompts]
        most = sorted(range(self.size), key=lambda i: -max(room[i], len(self.examples[i])))
        made = []
        for i in (most[n % self.size] for n in range(self.at_once)):
            prompt = self.prompts[i]
            ids = np.asarray(prompt + [0] * (room[i] - len(prompt)), np.int64)
            written = Example(ids, np.arange(len(ids)) >= len(prompt))
            made.append(max(self.examples[i], written, key=len))
        return pack(made, self.length, self.packed)


def prompted(
    batch: Batch, prompts: Sequence[tuple[int, ...]], places: Sequence[Pick], written: bool = False
) -> PromptedBatch:
    """`batch` with its prompts."""
    values = {item.name: getattr(batch, item.name) for item in fields(Batch)}
    return PromptedBatch(**values, prompts=tuple(prompts), places=tuple(places), written=written)


@dataclass(frozen=True, kw_only=True)
class OnPolicyDistillation(LogitDistillation):
    """The divergence from the teacher, at some of the steps on answers that the student itself has just written.

    The answers are data: no gradient goes through their choice. Which steps these are, and what is drawn, follows from
    the seed, the step and the places in the data, so nothing but the step and the weights is needed to continue.
    """

    params: DistillParams
    length: int
    """Tokens that both models can read."""
    show: Callable[[Example], None] = field(default=lambda made: None)
    """Is given the first answer that a step writes."""

    def writes(self, step: int) -> bool:
        """Whether the student writes the answers of `step`."""
        draw = np.random.default_rng([self.params.seed, STEPS, step]).random()
        return bool(draw < self.params.on_policy_share)

    def write(self, model: Transformer, step: int, batches: list[Batch]) -> list[Batch]:
        """See `WritingObjective`."""
        if not self.writes(step):
            return batches
        given = [batch for batch in batches if isinstance(batch, PromptedBatch)]
        prompts = [prompt for batch in given for prompt in batch.prompts]
        samplings = [sampling(self.params, *place) for batch in given for place in batch.places]
        with _plain(model):
            answers = make_generator(model).answers(prompts, samplings)
        made = [example(prompt, answer, self.length) for prompt, answer in zip(prompts, answers, strict=True)]
        if made:
            self.show(made[0])
        found: list[Batch] = []
        for batch in given:
            own, made = made[: len(batch.prompts)], made[len(batch.prompts) :]
            packed = pack(own, self.length, self.params.packing != "none")
            found.append(prompted(packed, batch.prompts, batch.places, written=True))
        return found

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As of logits, without the cross-entropy of tokens that nobody gave. `on_policy`: targets that are the
        student's own."""
        loss, further = super().loss(model, batch)
        del further["ce"]
        own = len(batch.targets) if isinstance(batch, PromptedBatch) and batch.written else 0
        return loss, {**further, "on_policy": torch.tensor(float(own), device=loss.device)}


@contextmanager
def _plain(model: Transformer) -> Iterator[None]:
    """With the attention that knows a cache."""
    before = model.backend
    model.backend = "sdpa"
    try:
        yield
    finally:
        model.backend = before


def shower(log: Callable[[str], None], tokenizer: Tokenizer, every: int) -> Callable[[Example], None]:
    """Logs one answer in so many that it is given, from the first on."""
    count = 0

    def show(made: Example) -> None:
        nonlocal count
        if count % every == 0:
            log(f"the student's own: {render(tokenizer, made)}")
        count += 1

    return show
