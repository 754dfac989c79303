"""The proof of an encoder-decoder: encoder states, the decoder's first and cached steps, ragged batches, tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmctl.ort import OrtSeq2Seq
from llmctl_export_onnx.parity import RAGGED_ROWS, Allowance, Differences, Parity, Progress, greedy_tokens

Reference = Callable[[list[int], list[int]], tuple[np.ndarray, np.ndarray]]
"""The original model, without a cache: a source of S tokens and T tokens said, the start among them, to the encoder's
states `(S, D)` and the decoder's logits `(T, V)`, float32."""


def compare(
    reference: Reference,
    generator: OrtSeq2Seq,
    sources: Sequence[list[int]],
    allowance: Allowance,
    progress: Progress,
) -> Parity:
    """Compare everything that the three graphs give with `reference`; tokens are judged as in `parity.compare`."""
    steps, found, equal = greedy_tokens(generator.context_length), Differences(allowance), 0
    judged: list[tuple[list[int], list[int], np.ndarray]] = []
    for done, source in enumerate(sources):
        answer, logits = _answer(generator, source, steps)
        states, expected = reference(source, [generator.start_id, *answer[:-1]])
        found.add("encoder", np.asarray(generator.read([source])[0][0], np.float32), states)
        found.add("prefill", generator.answer_logits(source, answer), expected)
        found.add("cached", logits, expected)
        equal += found.follows(answer, expected)
        if len(judged) < RAGGED_ROWS:
            judged.append((source, answer, expected))
        progress(done + 1, len(sources))
    _ragged(generator, judged, found)
    return Parity(found.largest, found.excess, len(sources), equal)


def _answer(generator: OrtSeq2Seq, source: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """`steps` greedy tokens, and the logits that they were chosen from, step by step."""
    rows, logits = generator.begin([source], [[generator.start_id]], steps)
    seen = [logits[0, -1]]
    answer = [int(seen[0].argmax())]
    while len(answer) < steps:
        seen.append(rows.step(answer[-1:])[0].copy())
        answer.append(int(seen[-1].argmax()))
    return answer, np.stack(seen)


def _ragged(generator: OrtSeq2Seq, judged: list[tuple[list[int], list[int], np.ndarray]], found: Differences) -> None:
    """Sources of different lengths side by side."""
    steps = len(judged[0][1])
    start = [[generator.start_id]] * len(judged)
    rows, logits = generator.begin([source for source, _, _ in judged], start, steps)
    stepped = logits[:, -1]
    for step in range(steps):
        for row, (_, _, expected) in enumerate(judged):
            found.add("ragged", stepped[row], expected[step])
        if step + 1 < steps:
            stepped = rows.step([answer[step] for _, answer, _ in judged])
