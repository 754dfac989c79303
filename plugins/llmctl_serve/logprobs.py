"""Log-probabilities of tokens with their texts: those that an engine gave, or of one more pass over an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmctl.engine import TokenScores
from llmctl.generator import Generator
from llmctl.text.streaming import Detokenizer
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


def named(tokenizer: Tokenizer, scores: TokenScores) -> TokenScore:
    """An engine's scores with the texts of the tokens."""

    def text(token: int) -> str:
        return tokenizer.decode([token], skip_special=False)

    others = [TokenScore(text(token), logprob) for token, logprob in scores.top]
    return TokenScore(text(scores.token), scores.logprob, others)


def offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Where in the text of `ids` each token begins."""
    words, found, at = Detokenizer(tokenizer), [], 0
    for token in ids:
        found.append(at)
        at += len(words.add(token))
    return found


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
