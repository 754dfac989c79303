"""The step `language`: what language a document is in, and whether it stays."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from llmctl.errors import MachineError
from llmctl.text.cleaning.code_detection import looks_like_code
from llmctl.text.cleaning.kinds import Routed, with_meta
from llmctl.text.cleaning.params import LanguageParams
from llmctl.text.cleaning.step import Drop, Noted, Outcome
from llmctl.text.documents import Document

NONE = "none"
NOT_LANGUAGE = "zxx"  # ISO 639-2: no linguistic content
WINDOW = 6
"""Bytes of the longest feature of the classifier."""


class Language(Routed):
    """Names the language (meta.language, meta.language_confidence) and keeps or drops the document by it."""

    name = "language"

    def __init__(self, params: LanguageParams, seed: int) -> None:
        super().__init__(params)
        self._params = params
        self._keep, self._drop = frozenset(params.keep), frozenset(params.drop)
        self._identifier = load_identifier()

    def clean(self, document: Document) -> Outcome:
        """The document with its language, or why it goes. Every language is counted."""
        language, confidence = self.identify(document.text)
        if (self._keep and language not in self._keep) or language in self._drop:
            what = "no language" if language == NONE else f"language {language}"
            return Drop(what, f"confidence {confidence:.2f}")
        known = with_meta(document, language=language, language_confidence=round(confidence, 3))
        return Noted(known, {language: 1})

    def identify(self, text: str) -> tuple[str, float]:
        """(code or `none`, probability); long texts are judged by a piece from their middle."""
        sample = self._params.sample_chars
        if len(text) > sample:
            start = (len(text) - sample) // 2
            text = text[start : start + sample]
        if not any(map(str.isalpha, text)):
            return NONE, 1.0
        language, confidence = self._identifier.classify(text)
        if language == NOT_LANGUAGE or confidence < self._params.min_confidence or looks_like_code(text):
            return NONE, float(confidence)
        return str(language), float(confidence)


@functools.cache
def load_identifier() -> Any:
    """py3langid's classifier with probabilities; its model is part of the package, and unpacked once in a process."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise MachineError("py3langid is not installed", hint="pip install 'llmctl[data]'") from error

    class Identifier(LanguageIdentifier):  # type: ignore[misc]  # the package has no types
        """The same scores, bit for bit, from a walk over all places of the text at once."""

        __slots__ = ("_moves", "_outputs", "_rows")

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._moves, self._outputs = np.asarray(self.tk_nextmove), np.asarray(self.tk_output)
            self._rows = np.asarray(self.tk_row, dtype=np.int64) << 8

        def _raw_score(self, text: bytes) -> Any:
            """Its features are of at most six bytes, so the state at a place depends on the last six alone."""
            if len(text) < WINDOW:
                return super()._raw_score(text)
            letters = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
            states = np.zeros(len(letters) - WINDOW + 1, dtype=np.int64)
            head = [int(states[0])]
            for offset in range(WINDOW):
                states = self._moves[self._rows[states] + letters[offset : offset + len(states)]].astype(np.int64)
                head.append(int(states[0]))
            features = self._outputs[np.concatenate((head[1:WINDOW], states))]
            features = features[features >= 0]
            if not len(features):
                return super()._raw_score(text)
            found, first, counts = np.unique(features, return_index=True, return_counts=True)
            order = np.argsort(first)  # sums of floats depend on it
            return self._sparse_score(
                dict(zip(found[order].tolist(), counts[order].tolist(), strict=True)), self.nb_ptc
            )

    return Identifier.from_model_file(MODEL_FILE, norm_probs=True)
