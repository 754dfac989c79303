"""Vectors of the words of labelled rows: the states of their tokens in one layer of a model, averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from llmctl import Artifact, InputError
from llmctl.text.inputs import frame_words
from llmctl.text.labelled import read_labelled
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.reading import TorchReader

BATCH = 32


@dataclass(frozen=True)
class Sentence:
    """A row: its words, and for each column the label of every word."""

    words: list[str]
    labels: dict[str, list[str]]


def read_sentences(data: Artifact, split: str, columns: Sequence[str], limit: int | None) -> list[Sentence]:
    """The rows of a split; InputError for a column that is missing or does not fit the words."""
    found = []
    for number, row in enumerate(islice(read_labelled(data, split, "token-classification"), limit), start=1):
        where = f"{data.path}: row {number} of `{split}`"
        words = row["tokens"]
        found.append(Sentence(words, {name: _labels(row, name, len(words), where) for name in columns}))
    if not found:
        raise InputError(f"split `{split}` of {data.path} has no rows", hint="give rows of tokens with labels")
    return found


def _labels(row: Any, name: str, count: int, where: str) -> list[str]:
    """A label for each word: those of the column, or its only one for all."""
    value = row.get(name)
    if isinstance(value, str | int):
        return [str(value)] * count
    if not isinstance(value, list) or not all(isinstance(one, str | int) for one in value):
        hint = f"columns here: {', '.join(sorted(map(str, row)))}"
        raise InputError(f"{where}: column `{name}` holds no label, and no list of them", hint=hint)
    if len(value) != count:
        raise InputError(f"{where}: `{name}` has {len(value)} labels for {count} words", hint="give one for each word")
    return [str(one) for one in value]


@dataclass(frozen=True)
class WordStates:
    """`vectors (N, D)` of the words that the model has read, and where each stands: (sentence, word)."""

    vectors: np.ndarray
    places: list[tuple[int, int]]
    too_long: int
    """Sentences that do not fit the model's context and are left out."""


def word_states(
    reader: TorchReader, tokenizer: Tokenizer, sentences: Sequence[Sentence], layer: int | None
) -> WordStates:
    """The mean of the states of each word's tokens. A word without a token of its own is left out."""
    framed = [frame_words(tokenizer, sentence.words) for sentence in sentences]
    fitting = [number for number, one in enumerate(framed) if 1 <= len(one.framed.ids) <= reader.context_length]
    found: dict[tuple[int, int], np.ndarray] = {}
    order = sorted(fitting, key=lambda number: len(framed[number].framed.ids))
    with states_of(reader, layer) as read:
        for begin in range(0, len(order), BATCH):
            chosen = order[begin : begin + BATCH]
            states = read([framed[number].framed.ids for number in chosen])
            for row, number in enumerate(chosen):
                for word, tokens in enumerate(framed[number].tokens):
                    if tokens:
                        found[number, word] = states[row][tokens].mean(axis=0)
    places = sorted(found)
    if not places:
        raise InputError("no word has a state", hint=f"the model reads up to {reader.context_length} tokens")
    return WordStates(np.stack([found[place] for place in places]), places, len(sentences) - len(fitting))


@contextmanager
def states_of(reader: TorchReader, layer: int | None) -> Iterator[Any]:
    """A function from rows of ids to states `(B, T, D)`: those that enter block `layer`, or the last ones."""
    if layer is None:
        yield lambda rows: reader.run(rows)["last_hidden_state"]
        return
    blocks = reader.model.blocks
    if layer >= len(blocks):
        raise InputError(f"the model has no layer {layer}", hint=f"it has {len(blocks)} blocks, counted from 0")
    seen: list[np.ndarray] = []

    def keep(_: Any, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0].float().cpu().numpy())

    def read(rows: list[list[int]]) -> np.ndarray:
        seen.clear()
        reader.run(rows)
        return seen[0]

    handle = blocks[layer].register_forward_pre_hook(keep)
    try:
        yield read
    finally:
        handle.remove()
