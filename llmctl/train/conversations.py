"""Conversations and preference pairs as examples: what is supervised, what is dropped, shown before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np

from llmctl.errors import InputError, StageError
from llmctl.stage import Artifact, Context
from llmctl.text.datasets import read_rows
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.batches import Example
from llmctl.train.params import AnswerParams

SHOWN = 3
Row = Mapping[str, Any]
T = TypeVar("T")


class Dropped(Exception):  # noqa: N818  # no error: the example is counted and left out
    """Why an example cannot be used."""


@dataclass(frozen=True)
class Encoder:
    """Turns rows into examples by the tokenizer's chat template; raises Dropped for those that cannot be used."""

    tokenizer: Tokenizer
    context: int
    eos_ids: frozenset[int]
    params: AnswerParams

    def conversation(self, row: Row) -> Example:
        """All assistant turns with their closing tokens supervised."""
        encoded = self.tokenizer.encode_chat(_messages(row, "messages"))
        return self._checked(row, encoded.ids, np.asarray(encoded.mask, bool))

    def prompt(self, row: Row) -> list[int]:
        """What stands before the last message of the assistant, or all where another has the last word: the ids up to
        where an answer begins. None of the row's own answer is read."""
        messages = asked(_messages(row, "messages"))
        if not messages:
            raise Dropped("without a question")
        ids = self.tokenizer.encode_chat(messages, add_generation_prompt=True).ids
        if len(ids) >= self.context:
            self._refuse(row, len(ids), "its question leaves no room for an answer")
        return ids

    def asked(self, row: Row) -> tuple[list[int], Example]:
        """A conversation, and what another answer than its last one would follow."""
        prompt, example = self.prompt(row), self.conversation(row)
        if example.ids[: len(prompt)].tolist() != prompt:
            raise InputError(
                f"row {row.get('id')!r}: the chat template writes the prompt differently once an answer follows",
                hint="answers can be written only with a template that only appends",
            )
        return prompt, example

    def pair(self, row: Row) -> tuple[Example, Example]:
        """(chosen, rejected): the prompt and each answer, only the answer supervised."""
        chosen, rejected = self._answer(row, "chosen"), self._answer(row, "rejected")
        if np.array_equal(chosen.ids, rejected.ids):
            raise Dropped("with equal answers")
        return chosen, rejected

    def _answer(self, row: Row, key: str) -> Example:
        prompt = _messages(row, "prompt")
        start = self.tokenizer.encode_chat(prompt, add_generation_prompt=True).ids
        encoded = self.tokenizer.encode_chat([*prompt, *_messages(row, key)])
        if encoded.ids[: len(start)] != start:
            raise InputError(
                f"row {row.get('id')!r}: the chat template writes the prompt differently once an answer follows",
                hint="preference training needs a template that only appends",
            )
        mask = np.asarray(encoded.mask, bool)
        mask[: len(start)] = False
        return self._checked(row, encoded.ids, mask)

    def _checked(self, row: Row, ids: list[int], mask: np.ndarray) -> Example:
        example = Example(np.asarray(ids, np.int64), mask)
        if len(ids) > self.context + 1:
            self._refuse(row, len(ids))
        if example.supervised == 0:
            raise Dropped("without an answer")
        if not self.eos_ids.intersection(example.ids[example.mask].tolist()):
            raise InputError(
                f"row {row.get('id')!r}: no supervised token ends the answer, so the model would never learn to stop",
                hint=f"the chat template must close the assistant's turn with EOS ({sorted(self.eos_ids)})",
            )
        return example

    def _refuse(self, row: Row, length: int, why: str = "") -> None:
        """Drop a row of too many tokens, or stop because of it."""
        if self.params.too_long == "error":
            raise InputError(
                f"row {row.get('id')!r} has {length} tokens, the model's context is {self.context}"
                + (f": {why}" if why else ""),
                hint="shorten it, use a longer context, or set too_long: drop",
            )
        raise Dropped("too long")


def asked(messages: Sequence[Any]) -> list[Any]:
    """The messages before the assistant's last one; all of them where another has the last word."""
    last = bool(messages) and messages[-1].get("role") == "assistant"
    return list(messages[:-1] if last else messages)


def read_conversations(ctx: Context, data: Artifact, split: str, encoder: Encoder) -> list[Example]:
    """The examples of a split of `dataset.chat`; InputError if it is empty, StageError if too many drop out."""
    return read_examples(ctx, data, split, encoder.conversation, encoder.params.max_dropped)


def read_pairs(ctx: Context, data: Artifact, split: str, encoder: Encoder) -> list[tuple[Example, Example]]:
    """(chosen, rejected) of a split of `dataset.preference`; errors as `read_conversations`."""
    return read_examples(ctx, data, split, encoder.pair, encoder.params.max_dropped)


def read_examples(ctx: Context, data: Artifact, split: str, encode: Callable[[Row], T], max_dropped: float) -> list[T]:
    """`encode` of every row of a split, those left out that raise Dropped.

    InputError if the split is empty, StageError if more than the share `max_dropped` drops out.
    """
    found: list[T] = []
    dropped: Counter[str] = Counter()
    for row in read_rows(data, split):
        if (len(found) + dropped.total()) % 1000 == 0:
            ctx.progress(len(found) + dropped.total(), None, reading=split)
        try:
            found.append(encode(row))
        except Dropped as reason:
            dropped[str(reason)] += 1
    total = len(found) + dropped.total()
    if not total:
        raise InputError(f"the split `{split}` of {data.path} is empty", hint="give at least one row")
    if dropped:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
        text = f"{dropped.total()} of {total} examples of the split `{split}` dropped ({reasons})"
        if not found or dropped.total() > max_dropped * total:
            raise StageError(
                f"{text}, more than max_dropped {max_dropped:g} allows",
                hint="check that the answers are there (of conversations: assistant messages) and fit the context, or "
                "raise max_dropped",
            )
        ctx.warn(text)
    return found


def show_examples(ctx: Context, tokenizer: Tokenizer, examples: Sequence[Example]) -> None:
    """Log the first examples as the model will see them, what is supervised in ⟦ ⟧, and how much that is."""
    for number, example in enumerate(examples[:SHOWN], start=1):
        ctx.log(f"example {number}: {render(tokenizer, example)}")
    supervised = sum(example.supervised for example in examples)
    tokens = sum(len(example) for example in examples)
    ctx.log(f"{len(examples)} examples, {tokens} tokens, {supervised} of them supervised")


def render(tokenizer: Tokenizer, example: Example) -> str:
    """One line: the example's text with special tokens, supervised spans in ⟦ ⟧."""
    mask = example.mask.copy()
    mask[0] = False  # nothing stands before it to predict it from
    parts = []
    for supervised, places in groupby(range(len(example)), key=lambda place: bool(mask[place])):
        text = tokenizer.decode([int(example.ids[place]) for place in places], skip_special=False)
        parts.append(f"⟦{text}⟧" if supervised else text)
    return "".join(parts).replace("\n", "\\n")


def _messages(row: Row, key: str) -> list[Any]:
    found = row.get(key)
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise InputError(
            f"row {row.get('id')!r} has no list of messages `{key}`",
            hint='a message is {"role": "user" or "assistant", "content": "…"}',
        )
    return found
