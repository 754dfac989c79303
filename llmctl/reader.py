"""What it means to read a text and say something about it, free of any framework: `eval` knows only this.

`Generator` is what answers with text; a `Reader` answers with numbers: classes, places, vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np


@runtime_checkable
class Reader(Protocol):
    """One opened model with a head for a task, or without one. Not thread-safe."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, where the head has classes."""

    @property
    def context_length(self) -> int:
        """Most tokens of one row."""

    @property
    def backend(self) -> str:
        """For a human: "torch cpu float32", "onnxruntime CPUExecutionProvider"."""

    def run(
        self, rows: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None
    ) -> dict[str, np.ndarray]:
        """What the head says of a batch, float32, padded on the right; what stands at padding means nothing.

        `logits`: `(B, C)` for classification, `(B, T, C)` for token classification; `start_logits` and `end_logits`
        `(B, T)` for question answering; `last_hidden_state (B, T, D)` without a head. `segments`: BERT's token types.
        Raises UsageError for an empty row, or one longer than the context.
        """
