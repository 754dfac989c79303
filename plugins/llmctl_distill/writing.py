"""Answers that a model writes, as examples: their sampling, their seeds, and what of them is learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmctl.generator import Candidate, Sampling
from llmctl.train.batches import Example
from llmctl_distill.params import DistillParams


def sampling(params: DistillParams, *place: int) -> Sampling:
    """How the answer at `place` is chosen: its seed follows from the run's and from the place."""
    seed = int(np.random.SeedSequence([params.seed, *place]).generate_state(1, np.uint64)[0] >> 1)
    return Sampling(
        max_new_tokens=params.max_new_tokens,
        temperature=params.drawn_at,
        top_k=params.top_k,
        top_p=params.top_p,
        beams=params.beams,
        seed=seed,
    )


def example(prompt: Sequence[int], answer: Candidate, length: int) -> Example:
    """A prompt and the answer to it, of which the answer is learned, with the token that ended it if one did.

    At most `length` tokens are read: a writer with a longer context may have gone on where the other cannot follow.
    """
    ids = [*prompt, *answer.ids, *([] if answer.end is None else [answer.end])][: length + 1]
    return Example(np.asarray(ids, np.int64), np.arange(len(ids)) >= len(prompt))
