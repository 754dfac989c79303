"""The proof that an exported model answers as the original does: logits everywhere, and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.errors import StageError
from llmctl.ort import OrtGenerator
from llmctl.ort.cache import InPlaceRows
from llmctl.ort.engine import prefill

GREEDY_TOKENS = 64
RAGGED_ROWS = 4

Reference = Callable[[list[int]], np.ndarray]
"""The original model: logits `(T, V)` float32 of one sequence of T tokens, computed without a cache."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences of any logit, by how they were computed, and the prompts with equal tokens."""

    prefill: float
    cached: float
    ragged: float
    greedy_equal: int
    prompts: int

    @property
    def max_abs_diff(self) -> float:
        """The largest of all; NaN if any is NaN."""
        return float(np.max([self.prefill, self.cached, self.ragged]))

    def metrics(self) -> dict[str, float | int]:
        """Under the names that gates read."""
        return {
            "parity.max_abs_diff": self.max_abs_diff,
            "parity.prefill_max_abs_diff": self.prefill,
            "parity.cached_max_abs_diff": self.cached,
            "parity.ragged_max_abs_diff": self.ragged,
            "parity.greedy_equal": self.greedy_equal,
            "parity.prompts": self.prompts,
        }

    def check(self, tolerance: float) -> None:
        """StageError if a logit is further off than `tolerance` or any greedy token differs."""
        # Written so that NaN fails.
        if not self.max_abs_diff <= tolerance:
            raise StageError(
                f"the exported model's logits differ by up to {self.max_abs_diff:.3g}, tolerance is {tolerance:g}",
                hint="no bundle was written; a larger `tolerance` accepts it, but find out why first",
            )
        if self.greedy_equal < self.prompts:
            raise StageError(
                f"{self.prompts - self.greedy_equal} of {self.prompts} prompts give other greedy tokens than the model",
                hint="no bundle was written; are two tokens tied at some step?",
            )


def greedy_tokens(context: int) -> int:
    """How many tokens are generated per prompt: 64, or half of a smaller context."""
    return min(GREEDY_TOKENS, context // 2)


def compare(reference: Reference, generator: OrtGenerator, prompts: Sequence[list[int]], progress: Progress) -> Parity:
    """Compare prefill, every cached step and, where the cache is in place, ragged batches with `reference`.

    The greedy tokens of both are equal exactly if the original's logits, after the prompt and the exported model's own
    tokens, have each next token as their argmax; so one uncached pass of the original judges a whole answer.
    """
    steps = greedy_tokens(generator.context_length)
    worst_prefill, worst_cached, equal = 0.0, 0.0, 0
    judged: list[tuple[list[int], list[int], np.ndarray]] = []
    for done, prompt in enumerate(prompts):
        prompted, answer, stepped = _answer(generator, prompt, steps)
        expected = reference([*prompt, *answer[:-1]])
        worst_prefill = _worst(worst_prefill, prompted, expected[: len(prompt)])
        worst_cached = _worst(worst_cached, stepped, expected[len(prompt) :])
        equal += expected[len(prompt) - 1 :].argmax(axis=1).tolist() == answer
        if len(judged) < RAGGED_ROWS:
            judged.append((prompt, answer, expected))
        progress(done + 1, len(prompts))
    ragged = _ragged(generator, judged) if generator.in_place else 0.0
    return Parity(worst_prefill, worst_cached, ragged, equal, len(prompts))


def _answer(generator: OrtGenerator, prompt: list[int], steps: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Logits of the prompt, `steps` greedy tokens, and the logits of all but the last of them, step by step."""
    prompted = generator.logits(prompt)
    rows = generator.rows(1, len(prompt) + steps)
    answer = [int(prefill(rows, 0, prompt).argmax())]
    stepped = np.empty((steps - 1, generator.vocab_size), np.float32)
    for i in range(steps - 1):
        stepped[i] = rows.step(answer[-1:])[0]
        answer.append(int(stepped[i].argmax()))
    return prompted, answer, stepped


def _ragged(generator: OrtGenerator, judged: list[tuple[list[int], list[int], np.ndarray]]) -> float:
    """Prompts of different lengths side by side: padded in one prefill, then cached steps in one batch."""
    longest = max(len(prompt) for prompt, _, _ in judged)
    ids = np.zeros((len(judged), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, (prompt, _, _) in enumerate(judged):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = 1
    layout = generator.layout
    empty = np.zeros((len(judged), layout.kv_heads, 0, layout.head_dim), layout.cache_dtype)
    feeds = {"input_ids": ids, "attention_mask": mask, **dict.fromkeys(layout.past, empty)}
    logits, *cache = generator.session.run(["logits", *layout.present], feeds)
    worst = 0.0
    for row, (prompt, _, expected) in enumerate(judged):
        worst = _worst(worst, logits[row, : len(prompt)], expected[: len(prompt)])
    steps = len(judged[0][1])
    rows = InPlaceRows(generator.session, layout, len(judged), longest + steps)
    for index, value in enumerate(cache):
        slots = np.zeros((len(judged), layout.kv_heads, longest + steps, layout.head_dim), layout.cache_dtype)
        slots[:, :, :longest] = value
        rows.replace(index, slots)
    rows.lengths[:] = [len(prompt) for prompt, _, _ in judged]
    for step in range(steps - 1):
        stepped = rows.step([answer[step] for _, answer, _ in judged])
        for row, (prompt, _, expected) in enumerate(judged):
            worst = _worst(worst, stepped[row], expected[len(prompt) + step])
    return worst


def _worst(so_far: float, got: np.ndarray, expected: np.ndarray) -> float:
    """NaN, once seen, stays."""
    return float(np.maximum(so_far, np.abs(got - expected).max(initial=0.0)))
