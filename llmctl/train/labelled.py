"""Labelled rows as sequences to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl.errors import InputError, UsageError
from llmctl.nn.config import Head, ModelConfig
from llmctl.stage import Artifact, Context
from llmctl.text.inputs import answer_places, frame_question, frame_text, frame_words
from llmctl.text.labelled import Task, checked, read_labelled
from llmctl.text.tokenizer import Framed, Tokenizer
from llmctl.train.batches import Batch, Piece, lay_out
from llmctl.train.conversations import Dropped, Row, read_examples
from llmctl.train.data import Pick, Source
from llmctl.train.params import AnswerParams
from llmctl.train.pieces import Frame, translation

Item = tuple[Piece, ...]
"""The sequences of one row: one, or both texts of a pair to embed."""
HEADS: dict[Task, Head] = {
    "classification": "classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "embedding": "features",
    "seq2seq": "lm",
}


FOR_SEQ2SEQ = {
    "decoder": "write the rows as conversations",
    "encoder": "train a t5",
    "encoder-decoder": "use task: seq2seq",
}
"""The way out where rows and kind of model do not fit."""


def find_labels(data: Artifact, task: Task) -> tuple[str, ...]:
    """The names of all classes in the training split, in the order of the alphabet; () for a task without classes.

    InputError if there is but one.
    """
    if task not in ("classification", "token-classification"):
        return ()
    found: set[str] = set()
    for row in read_labelled(data, "train", task):
        found.update(row["labels"] if task == "token-classification" else [row["label"]])
    if len(found) < 2:
        raise InputError(
            f"the split `train` of {data.path} has {len(found)} label, so there is nothing to tell apart",
            hint="give rows of at least two labels",
        )
    return tuple(sorted(found))


@dataclass(frozen=True)
class Labeller:
    """Turns rows of a task into sequences; raises Dropped for those that cannot be used."""

    task: Task
    tokenizer: Tokenizer
    config: ModelConfig
    """With the head of the task."""
    params: AnswerParams

    def item(self, row: Row) -> Item:
        """The sequences of one row."""
        where = f"row {row.get('id')!r}"
        return {
            "classification": self._text,
            "token-classification": self._words,
            "question-answering": self._question,
            "embedding": self._pair,
            "seq2seq": self._translation,
        }[self.task](checked(self.task, row, where), where)

    def _text(self, row: dict[str, Any], where: str) -> Item:
        framed = frame_text(self.tokenizer, row)
        # An encoder sees all from its first token, a decoder from its last.
        place = 0 if self.config.traits.kind == "encoder" else len(framed.ids) - 1
        return (self._piece(framed, where, [place], [self._label(row["label"], where)]),)

    def _words(self, row: dict[str, Any], where: str) -> Item:
        words = frame_words(self.tokenizer, row["tokens"])
        classes = [self._label(label, where) for label in row["labels"]]
        pairs = zip(words.places, classes, strict=True)
        found = [(place, label) for place, label in pairs if place is not None]
        return (self._piece(words.framed, where, [place for place, _ in found], [label for _, label in found]),)

    def _question(self, row: dict[str, Any], where: str) -> Item:
        asked = frame_question(self.tokenizer, row["question"], row["context"])
        self._check_length(len(asked.framed.ids), where)
        places = answer_places(asked, row["start"], row["start"] + len(row["answer"]))
        if places is None:
            raise Dropped("whose answer no token covers")
        return (self._piece(asked.framed, where, list(places), [0, 0], asked.candidates),)

    def _pair(self, row: dict[str, Any], where: str) -> Item:
        framed = (self.tokenizer.frame(row[name]) for name in ("text", "positive"))
        first, second = (self._piece(one, where, [], [], label=0) for one in framed)
        return first, second

    def _translation(self, row: dict[str, Any], where: str) -> Item:
        start = self.config.decoder_start_id
        assert start is not None  # the stage asks for an encoder-decoder
        source, target = (np.array(self.tokenizer.encode(row[name]), np.int64) for name in ("source", "target"))
        piece = translation(source, target, Frame.of(self.tokenizer), start)
        assert piece.source is not None
        self._check_length(max(len(piece.source), len(piece.ids)), where)
        return (piece,)

    def _piece(
        self,
        framed: Framed,
        where: str,
        places: list[int],
        targets: list[int],
        candidates: np.ndarray | None = None,
        label: int | None = None,
    ) -> Piece:
        self._check_length(len(framed.ids), where)
        ids, segments = np.array(framed.ids, np.int64), np.array(framed.segments, np.int64)
        return Piece(
            ids,
            np.array(places, np.int64),
            np.array(targets, np.int64),
            segments=segments if self.config.token_types > 1 else None,
            candidates=candidates,
            label=label,
        )

    def _label(self, name: str, where: str) -> int:
        if name not in self.config.labels:
            few = ", ".join(self.config.labels[:8])
            raise InputError(f"{where} has the label {name!r}, which no training row has", hint=f"labels: {few}")
        return self.config.labels.index(name)

    def _check_length(self, length: int, where: str) -> None:
        if length <= self.config.context:
            return
        if self.params.too_long == "error":
            raise InputError(
                f"{where} has {length} tokens, the model's context is {self.config.context}",
                hint="shorten it, use a longer context, or set too_long: drop",
            )
        raise Dropped("too long")


def read_items(ctx: Context, data: Artifact, split: str, labeller: Labeller) -> list[Item]:
    """The rows of a split as sequences; InputError if it is empty, StageError if too many drop out."""
    return read_examples(ctx, data, split, labeller.item, labeller.params.max_dropped)


class ItemSource(Source):
    """Rows of one or several sequences, packed afresh for every forward pass."""

    def __init__(self, items: Sequence[Item], config: ModelConfig, params: AnswerParams) -> None:
        super().__init__(len(items), params)
        self.items, self.length, self.causal = items, config.context, config.traits.kind != "encoder"

    def batch(self, picks: Sequence[Pick]) -> Batch:
        """The sequences of the rows at `picks`, in that order."""
        chosen = [piece for epoch, place in picks for piece in self.items[int(self.order(epoch)[place])]]
        return lay_out(chosen, self.length, self.packed, self.causal)


def check_kind(task: Task, config: ModelConfig) -> None:
    """UsageError if a model of this kind cannot learn the task."""
    kind = config.traits.kind
    if (task == "seq2seq") != (kind == "encoder-decoder"):
        needs = "an encoder-decoder" if task == "seq2seq" else "an encoder or a decoder"
        raise UsageError(
            f"task {task} needs {needs}, {config.arch} is {'an' if kind[0] == 'e' else 'a'} {kind}",
            hint=FOR_SEQ2SEQ[kind],
        )
    if kind == "decoder" and task in ("question-answering", "embedding"):
        raise UsageError(f"task {task} needs an encoder, {config.arch} is a decoder", hint="train a bert or roberta")
