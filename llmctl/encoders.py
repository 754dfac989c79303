"""Vectors of texts by whatever gives them: an encoder of texts in torch or ONNX, or vectors of words."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from llmctl.errors import UsageError
from llmctl.reader import Reader
from llmctl.stage import Artifact
from llmctl.text.dense import Encoder, WordEncoder
from llmctl.text.pooling import normalises, pool, read_longest, read_pooling
from llmctl.text.tokenizer import Tokenizer
from llmctl.text.vectors import load

ENCODERS = ("model.onnx", "model.hf", "embeddings")
"""Types of artifacts that give vectors of texts."""
BATCH = 32


def open_text_encoder(artifact: Artifact, device: str = "auto", threads: int = 0) -> Encoder:
    """Open an artifact of one of `ENCODERS`.

    InputError if it is damaged, UsageError for a bundle without states and for vectors of texts, which cannot be
    applied to another one.
    """
    if artifact.type == "embeddings":
        return WordEncoder(load(artifact.path), artifact.path)
    return SentenceEncoder(open_states(artifact, device, threads), artifact)


def open_states(model: Artifact, device: str, threads: int) -> Reader:
    """What reads a text into states. UsageError for a bundle that was exported with a head and gives none."""
    if model.type == "model.onnx":
        from llmctl.ort import open_encoder

        encoder = open_encoder(model.path, device, threads)
        if "last_hidden_state" not in encoder.outputs:
            raise UsageError(f"{model.path} gives {', '.join(encoder.outputs)}", hint="export the model without a head")
        return encoder
    from llmctl.train import reading

    return reading.open_reader(model.path, device, threads, states=True)


class SentenceEncoder:
    """Pools the states of a model as its directory says; a text that is too long is cut. Thread-safe."""

    def __init__(self, reader: Reader, artifact: Artifact) -> None:
        self._reader = reader
        self._tokenizer = Tokenizer.load(artifact.path)
        self._pooling = read_pooling(artifact.path)
        self._normalise = normalises(artifact.path)
        self._most = min(read_longest(artifact.path) or reader.context_length, reader.context_length)
        self._lock = threading.Lock()  # a Reader is for one thread
        self.cut = 0

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder.embed`. Texts of like length are read together, which changes no vector."""
        rows = [self._fitting(text) for text in texts]
        vectors: dict[int, np.ndarray] = {}
        order = sorted((number for number, row in enumerate(rows) if row), key=lambda number: len(rows[number]))
        for begin in range(0, len(order), BATCH):
            chosen = order[begin : begin + BATCH]
            with self._lock:
                states = self._reader.run([rows[number] for number in chosen])["last_hidden_state"]
            lengths = [len(rows[number]) for number in chosen]
            vectors |= dict(zip(chosen, pool(states, lengths, self._pooling, self._normalise), strict=True))
        size = len(next(iter(vectors.values()))) if vectors else 0
        found = np.zeros((len(rows), size), np.float32)
        for number, vector in vectors.items():
            found[number] = vector
        return found

    def _fitting(self, text: str) -> list[int]:
        """The ids, cut to what the model reads."""
        framed = self._tokenizer.frame(text)
        self.cut += len(framed.ids) > self._most
        return framed.within(self._most).ids
