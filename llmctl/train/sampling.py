"""How the next token is chosen from logits: one definition, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmctl.beams import Continuation
from llmctl.generator import Sampling


class Sampler:
    """Draws one token after another for one sequence.

    Equal to transformers' `generate(do_sample=True)` under the same seed and device: one `torch.multinomial` over the
    whole vocabulary per token.
    """

    def __init__(self, sampling: Sampling, device: torch.device | str = "cpu") -> None:
        self.sampling = sampling
        self.random = torch.Generator(device)
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token of `logits (V,)` float32: the argmax at temperature 0, else a draw."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = filtered(logits, self.sampling).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self.random))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """`logits (V,)` after temperature, top-k (arXiv 1805.04833) and top-p (1904.09751); -inf where cut.

    Top-p keeps the smallest set whose mass reaches p, the token that crosses p included.
    """
    scores = logits / sampling.temperature
    if not torch.isfinite(scores).all():  # a temperature near 0 overflows; the limit is greedy
        scores = torch.full_like(logits, -torch.inf)
        scores[logits.argmax()] = 0.0
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort()
        cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        cut[-1] = False
        scores = scores.masked_fill(cut.scatter(0, order, cut), -torch.inf)
    return scores


def log_probability(logits: Tensor, token: int) -> float:
    """Natural log-probability of `token` under `logits (V,)`, nothing scaled or filtered."""
    return float(logits.log_softmax(dim=-1)[token])


def rank(logits: Tensor, totals: Sequence[float], wanted: int) -> list[Continuation]:
    """The `wanted` likeliest continuations of beams with `logits (B, V)`, `totals` added to each beam's; best first."""
    scores = logits.log_softmax(dim=-1)
    sums = scores + torch.tensor(totals, dtype=scores.dtype, device=scores.device)[:, None]
    best = sums.flatten().topk(min(wanted, sums.numel())).indices
    beams, tokens = best // scores.shape[1], best % scores.shape[1]
    logprobs = scores[beams, tokens]
    return [Continuation(*found) for found in zip(beams.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)]
