"""The proof of an encoder: every output of its graph, on batches whose rows differ in length."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from llmctl.ort import OrtEncoder
from llmctl_export_onnx.parity import Allowance, Differences, Parity, Progress

LONGEST = 64
ROWS = 3

Reference = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""The original model: inputs by name, each `(B, T)` int64, to outputs by name, float32."""


def compare(
    reference: Reference,
    encoder: OrtEncoder,
    vocab_size: int,
    token_types: int,
    batches: int,
    seed: int,
    allowance: Allowance,
    progress: Progress,
) -> Parity:
    """Compare every output on random tokens: one batch as long as may be, then shorter ones. Padding is left out."""
    random, found = np.random.default_rng(seed), Differences(allowance)
    longest = min(LONGEST, encoder.context_length)
    for done in range(batches):
        length = longest if done == 0 else int(random.integers(1, longest + 1))
        # A whole row, a single token, and something in between.
        lengths = np.array([length, 1, int(random.integers(1, length + 1))][:ROWS])
        real = np.arange(length) < lengths[:, None]
        feeds = {
            "input_ids": random.integers(0, vocab_size, real.shape),
            "attention_mask": real.astype(np.int64),
            "token_type_ids": random.integers(0, max(1, token_types), real.shape),
        }
        feeds = {name: value for name, value in feeds.items() if name in encoder.inputs}
        expected = reference(feeds)
        for name, got in zip(encoder.outputs, encoder.session.run(list(encoder.outputs), feeds), strict=True):
            # Not by the shape: as many features or classes as tokens would pass for tokens.
            per_token = expected[name].ndim == 3 or name in ("start_logits", "end_logits")
            chosen = real if per_token else slice(None)
            found.add(name, np.asarray(got, np.float32)[chosen], expected[name][chosen])
        progress(done + 1, batches)
    return Parity(found.largest, found.excess, batches)
