"""Find passages by what they mean: vectors of chunks, cosines with a question's, and two rankings fused into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from llmctl.errors import InputError
from llmctl.text.vectors import Vectors, split_words

FILE = "chunks.safetensors"
RARE = 1e-3
"""Words with a larger share of the corpus weigh less: a/(a + p) of Arora et al. 2017, with their a."""
COMPARED = 16
"""Chunks that an encoder embeds again to show that it is the one of the index."""
ALIKE = 0.999
"""Least cosine with the saved vector: the same weights in torch or ONNX, in 32 or 16 bits, stay above it."""


class Encoder(Protocol):
    """What makes one vector of a text."""

    cut: int
    """Texts so far that were too long and were read in part."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """`(N, D)` float32, zeros for a text in which nothing is known."""


class WordEncoder:
    """The mean of the vectors of a text's words, each brought to length 1; frequent ones weigh less. Thread-safe."""

    cut = 0

    def __init__(self, vectors: Vectors, path: Path) -> None:
        if vectors.rows:
            raise InputError(
                f"{path} holds vectors of texts, which say nothing about another text",
                hint="give vectors of words (embed, method: word2vec or glove), or the encoder itself",
            )
        self._vectors = vectors
        counts = np.asarray(vectors.info.get("counts") or [0] * len(vectors.names), np.float64)
        self._weights = RARE / (RARE + counts / max(counts.sum(), 1.0))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder.embed`: words are told apart as they were when the vectors were made."""
        found = np.zeros((len(texts), self._vectors.matrix.shape[1]), np.float32)
        for number, text in enumerate(texts):
            rows = [self._vectors.index[word] for word in self._words(text) if word in self._vectors.index]
            if rows:
                found[number] = np.average(self._vectors.unit[rows], axis=0, weights=self._weights[rows])
        return found

    def _words(self, text: str) -> list[str]:
        info = self._vectors.info
        return split_words(text, info.get("split_words", "unicode"), lowercase=bool(info.get("lowercase", True)))


@dataclass(frozen=True)
class DenseSettings:
    """How an index with vectors is searched, as `index.json` keeps it."""

    retrieval: Literal["dense", "hybrid"]
    similar_above: float
    """A chunk with this cosine supports a question whatever its words are."""
    rrf_k: float


class Dense:
    """`matrix (N, D)` float32 of a vector per chunk, each of length 1 or 0, and the encoder that made them."""

    def __init__(self, matrix: np.ndarray, encoder: Encoder, settings: DenseSettings) -> None:
        self.matrix, self.encoder, self.settings = matrix, encoder, settings

    def cosines(self, text: str, others: Sequence[str] | None = None) -> np.ndarray:
        """`(N,)` float32 with every chunk, or with each of `others`; 0 where either has nothing that is known."""
        vector = unit(self.encoder.embed([text]))[0]
        matrix = self.matrix if others is None else unit(self.encoder.embed(others))
        if matrix.shape[-1] != vector.shape[-1]:  # an encoder's answer to empty texts has no width
            return np.zeros(len(matrix), np.float32)
        return np.asarray(matrix @ vector, np.float32)

    def rank(self, lexical: np.ndarray, cosines: np.ndarray) -> np.ndarray:
        """The score `(N,)` by which chunks are ordered, 0 for one that is not found: cosines, or both ranks fused."""
        if self.settings.retrieval == "dense":
            return np.asarray(np.maximum(cosines, 0))
        return reciprocal_rank_fusion([lexical, cosines], self.settings.rrf_k)

    def facts(self) -> dict[str, Any]:
        """For `index.json`."""
        return {**asdict(self.settings), "dim": int(self.matrix.shape[1])}

    def save(self, directory: Path) -> None:
        """Write the vectors."""
        from safetensors.numpy import save_file

        save_file({"vectors": np.ascontiguousarray(self.matrix, np.float32)}, directory / FILE)

    @classmethod
    def load(cls, directory: Path, facts: Mapping[str, Any], texts: Sequence[str], encoder: Encoder) -> Dense:
        """Read the vectors of chunks whose `texts` are given.

        InputError if they are missing or damaged, or `encoder` does not make these vectors of these texts.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            matrix = load_file(directory / FILE)["vectors"]
            settings = DenseSettings(facts["retrieval"], float(facts["similar_above"]), float(facts["rrf_k"]))
            fits = matrix.shape == (len(texts), int(facts["dim"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"{directory} holds no readable vectors: {error}", hint="make the index again") from error
        if not fits:
            raise InputError(
                f"{directory} is damaged: {len(texts)} chunks, vectors of shape {matrix.shape}",
                hint="make the index again",
            )
        check_encoder(directory, matrix, texts, encoder)
        return cls(matrix, encoder, settings)


def check_encoder(directory: Path, matrix: np.ndarray, texts: Sequence[str], encoder: Encoder) -> None:
    """InputError unless `encoder` gives some of the texts their rows of `matrix`, as the same model in ONNX does."""
    places = np.unique(np.linspace(0, len(texts) - 1, COMPARED).astype(int))
    again, saved = unit(encoder.embed([texts[place] for place in places])), matrix[places]
    hint = "give the encoder that `rag` was given, or make the index again with this one"
    if again.shape != saved.shape:
        raise InputError(
            f"the index in {directory} has vectors of {saved.shape[1]} numbers, the encoder gives {again.shape[1]}",
            hint=hint,
        )
    # Of texts without anything known both are zero.
    cosines = np.where((again == 0).all(axis=1) & (saved == 0).all(axis=1), 1.0, (again * saved).sum(axis=1))
    if not cosines.min() >= ALIKE:  # NaN is not
        raise InputError(
            f"the index in {directory} was made with another encoder: a chunk has a cosine of {cosines.min():.2f} "
            "with its own vector",
            hint=hint,
        )


def unit(matrix: np.ndarray) -> np.ndarray:
    """Rows brought to length 1; zeros stay."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.asarray(matrix / np.where(norms > 0, norms, 1), np.float32)


def reciprocal_rank_fusion(scores: Sequence[np.ndarray], k: float) -> np.ndarray:
    """The sum of 1/(k + rank) over rankings, `(N,)` float64 (Cormack, Clarke and Büttcher 2009, with their k = 60).

    `scores`: of each ranking, `(N,)`; ranks count from 1, equal scores are in their order, and what has no score above
    0 is in that ranking not found.
    """
    fused = np.zeros(len(scores[0]))
    for one in scores:
        order = np.argsort(-one, kind="stable")
        found = order[one[order] > 0]
        fused[found] += 1 / (k + np.arange(1, len(found) + 1))
    return fused
