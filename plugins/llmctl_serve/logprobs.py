"""Log-probabilities of a finished answer, from one more pass over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmctl.generator import Generator
from llmctl.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TokenScore:
    """A token, its natural log-probability under the model itself (temperature 1), and the likeliest alternatives."""

    text: str
    logprob: float
    top: list[TokenScore] = field(default_factory=list)

    def to_chat(self) -> dict[str, Any]:
        """As in `logprobs.content` of a chat completion."""
        return {**self._plain(), "top_logprobs": [other._plain() for other in self.top]}

    def _plain(self) -> dict[str, Any]:
        half = "\ufffd" in self.text  # part of a character: its bytes are not those of the text
        return {"token": self.text, "logprob": self.logprob, "bytes": None if half else list(self.text.encode())}


def score_tokens(
    generator: Generator, tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], text: str, top: int
) -> list[TokenScore]:
    """Score the tokens of an answer that are part of `text` (those of a stop string are not)."""
    sizes = range(len(ids) + 1)
    shown = next((size for size in sizes if tokenizer.decode(ids[:size]).startswith(text)), len(ids))
    if not shown:
        return []
    logits = generator.answer_logits(prompt, ids[:shown])
    return [_score(tokenizer, row, token, top) for row, token in zip(logits, ids, strict=False)]


def _score(tokenizer: Tokenizer, logits: np.ndarray, token: int, top: int) -> TokenScore:
    import numpy as np

    wide = logits.astype(np.float64)
    scores = wide - wide.max()
    scores -= np.log(np.exp(scores).sum())
    best = np.argsort(-scores, kind="stable")[:top]
    others = [TokenScore(tokenizer.decode([int(i)], skip_special=False), float(scores[i])) for i in best]
    return TokenScore(tokenizer.decode([token], skip_special=False), float(scores[token]), others)
