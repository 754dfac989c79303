"""The proof that an exported model answers as the original does: logits everywhere, and greedy tokens.

This module holds what all kinds share and the proof of decoders; `encoder_parity` and `seq2seq_parity` hold the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmctl.errors import StageError
from llmctl.ort import OrtGenerator
from llmctl.ort.cache import InPlaceRows
from llmctl.ort.generator import prefill

GREEDY_TOKENS = 64
RAGGED_ROWS = 4
ROUNDINGS = 32
EPSILONS = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance from 1 to the next number. float32 has none to spare: its errors are far below any tolerance."""

Reference = Callable[[list[int]], np.ndarray]
"""The original model: logits `(T, V)` float32 of one sequence of T tokens, computed without a cache."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Allowance:
    """How far a value may be off: `tolerance`, and in half precision ROUNDINGS roundings of the largest value.

    A value of a graph in half precision has been rounded some thousand times on its way, at random, which adds up like
    the root of their number: 32. A weight that is wrong is found before, bit by bit, in `graph.account_weights`.
    """

    tolerance: float
    dtype: str = "float32"

    def of(self, expected: np.ndarray) -> float:
        """The allowance among these values of the original."""
        return self.tolerance + ROUNDINGS * EPSILONS[self.dtype] * max(1.0, float(np.abs(expected).max(initial=0.0)))


@dataclass
class Differences:
    """Largest absolute differences, by what was compared, and whether each was allowed. NaN is never allowed."""

    allowance: Allowance
    largest: dict[str, float] = field(default_factory=dict)
    excess: float = -np.inf
    """How far the worst is above its allowance."""

    def add(self, name: str, got: np.ndarray, expected: np.ndarray) -> None:
        """Compare two arrays of one shape."""
        worst = float(np.abs(got - expected).max(initial=0.0))
        # Written so that NaN stays, once seen.
        self.largest[name] = float(np.maximum(self.largest.get(name, 0.0), worst))
        self.excess = float(np.maximum(self.excess, worst - self.allowance.of(expected)))

    def follows(self, chosen: Sequence[int], expected: np.ndarray) -> bool:
        """Whether `chosen` are the greedy tokens of `expected (len(chosen), V)`.

        In half precision, where two of the original's logits may be nearer to each other than their error, one of them.
        """
        best = expected.max(axis=1)
        behind = best - expected[np.arange(len(chosen)), list(chosen)]
        spare = 0.0 if self.allowance.dtype == "float32" else 2 * self.allowance.of(expected)
        return bool((behind <= spare).all())


@dataclass(frozen=True)
class Parity:
    """What was found: differences, and the prompts whose greedy tokens are equal (None where nothing is generated)."""

    differences: Mapping[str, float]
    excess: float
    prompts: int
    greedy_equal: int | None = None

    @property
    def max_abs_diff(self) -> float:
        """The largest of all; NaN if any is NaN."""
        return float(np.max([*self.differences.values(), 0.0]))

    def metrics(self) -> dict[str, float | int]:
        """Under the names that gates read."""
        greedy = {} if self.greedy_equal is None else {"parity.greedy_equal": self.greedy_equal}
        return {
            "parity.max_abs_diff": self.max_abs_diff,
            **{f"parity.{name}_max_abs_diff": value for name, value in self.differences.items()},
            **greedy,
            "parity.prompts": self.prompts,
        }

    def check(self, tolerance: float) -> None:
        """StageError if a value is further off than allowed or any greedy token differs."""
        # Written so that NaN fails.
        if not self.excess <= 0:
            name = max(self.differences, key=lambda key: np.nan_to_num(self.differences[key], nan=np.inf))
            raise StageError(
                f"the exported model's outputs differ by up to {self.max_abs_diff:.3g} ({name}), "
                f"tolerance is {tolerance:g}",
                hint="no bundle was written; a larger `tolerance` accepts it, but find out why first",
            )
        if self.greedy_equal is not None and self.greedy_equal < self.prompts:
            raise StageError(
                f"{self.prompts - self.greedy_equal} of {self.prompts} prompts give other greedy tokens than the model",
                hint="no bundle was written; are two tokens tied at some step?",
            )


def greedy_tokens(context: int) -> int:
    """How many tokens are generated per prompt: 64, or half of a smaller context."""
    return min(GREEDY_TOKENS, context // 2)


def compare(
    reference: Reference,
    generator: OrtGenerator,
    prompts: Sequence[list[int]],
    allowance: Allowance,
    progress: Progress,
) -> Parity:
    """Compare prefill, every cached step and, where the cache is in place, ragged batches with `reference`.

    The greedy tokens of both are equal exactly if the original's logits, after the prompt and the exported model's own
    tokens, have each next token as their argmax; so one uncached pass of the original judges a whole answer.
    """
    steps, found, equal = greedy_tokens(generator.context_length), Differences(allowance), 0
    judged: list[tuple[list[int], list[int], np.ndarray]] = []
    for done, prompt in enumerate(prompts):
        prompted, answer, stepped = _answer(generator, prompt, steps)
        expected = reference([*prompt, *answer[:-1]])
        found.add("prefill", prompted, expected[: len(prompt)])
        found.add("cached", stepped, expected[len(prompt) :])
        equal += found.follows(answer, expected[len(prompt) - 1 :])
        if len(judged) < RAGGED_ROWS:
            judged.append((prompt, answer, expected))
        progress(done + 1, len(prompts))
    if generator.in_place:
        _ragged(generator, judged, found)
    return Parity(found.largest, found.excess, len(prompts), equal)


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


def _ragged(generator: OrtGenerator, judged: list[tuple[list[int], list[int], np.ndarray]], found: Differences) -> None:
    """Prompts of different lengths side by side: padded in one prefill, then cached steps in one batch."""
    longest = max(len(prompt) for prompt, _, _ in judged)
    ids = np.zeros((len(judged), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, (prompt, _, _) in enumerate(judged):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = 1
    layout = generator.layout
    empty = np.zeros((len(judged), layout.kv_heads, 0, layout.head_dim), layout.cache_dtype)
    feeds = {"input_ids": ids, "attention_mask": mask, **dict.fromkeys(layout.past, empty), **generator.adapter_feeds}
    logits, *cache = generator.session.run(["logits", *layout.present], feeds)
    for row, (prompt, _, expected) in enumerate(judged):
        found.add("ragged", logits[row, : len(prompt)].astype(np.float32), expected[: len(prompt)])
    steps = len(judged[0][1])
    feeds = generator.adapter_feeds
    rows = InPlaceRows(generator.session, layout, len(judged), longest + steps, adapter=feeds)
    rows.fill(cache, [len(prompt) for prompt, _, _ in judged])
    for step in range(steps - 1):
        stepped = rows.step([answer[step] for _, answer, _ in judged])
        for row, (prompt, _, expected) in enumerate(judged):
            found.add("ragged", stepped[row], expected[len(prompt) + step])
