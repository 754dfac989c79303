"""The scores that requests ask for: of the tokens their answers go on with, and of their prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmctl.engine import TokenScores
from llmctl.ort.sampling import scores
from llmctl.ort.tasks import Lane, Task


def score_lanes(lanes: Sequence[Lane], logits: np.ndarray, chosen: Sequence[int]) -> dict[int, TokenScores]:
    """Those of the lanes that go on and whose request asks for them, by place."""
    by_count: dict[int, list[int]] = {}
    for i, lane in enumerate(lanes):
        if not lane.done and lane.task.request.logprobs is not None:
            by_count.setdefault(lane.task.request.logprobs, []).append(i)
    found: dict[int, TokenScores] = {}
    for count, places in by_count.items():
        found.update(zip(places, scores(logits[places], [chosen[i] for i in places], count), strict=True))
    return found


def score_prompt(task: Task, start: int, logits: np.ndarray) -> None:
    """Of the tokens that follow those at `start` and behind, which gave `logits (T, V)`."""
    following = task.prompt[start + 1 : start + 1 + len(logits)].tolist()
    count = task.request.prompt_logprobs or 0
    if not start:
        task.prompt_scores.append(None)
    if following:
        task.prompt_scores += scores(logits[: len(following)], following, count)
