"""Scaling laws that were published, by name, each with its source, what it counts and what to know before using it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmctl_train_pretrain.scaling.laws import PF_DAY, Frontier, KaplanSurface, Surface

COUNTS = {
    "total": "all parameters",
    "without-embedding": "parameters without embeddings and output head",
    "with-head": "parameters of matrix products: blocks and output head, no embeddings",
}
"""What N may count: name → words."""


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """A law with a name."""

    name: str
    law: Surface | KaplanSurface | Frontier
    source: str
    counts: str
    """A key of COUNTS, or what a table's column says."""
    largest: float = math.inf
    """The largest budget among the runs it was fitted to, in operations; infinite if that is not known."""
    note: str = ""
    warning: str = ""
    """What is wrong with it, said by every plan that uses it."""


CHINCHILLA_RUNS, CHINCHILLA_PROFILES = 1.3e22, 3e21
"""The largest budget of all runs of 2203.15556, as read from its figure 4, and of its isoFLOP profiles."""
_HOFFMANN = "Hoffmann et al. 2022, 2203.15556"
_KAPLAN = "Kaplan et al. 2020, 2001.08361"

PUBLISHED = {
    found.name: found
    for found in (
        Coefficients(
            name="besiroglu",
            law=Surface(E=1.8169, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
            source="Besiroglu et al. 2024, 2404.10102: approach 3 fitted again to 240 runs of Chinchilla",
            counts="total",
            largest=CHINCHILLA_RUNS,
            note="standard errors: A 124.58, B 1293.23, E .03, alpha .02, beta .02",
        ),
        Coefficients(
            name="hoffmann",
            law=Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
            source=f"{_HOFFMANN}, approach 3 as printed",
            counts="total",
            largest=CHINCHILLA_RUNS,
            warning="rounded to two figures: N grows as C^.4516, not as the unrounded C^.4565, and Chinchilla's own 20 "
            "tokens per parameter do not follow; `hoffmann-unrounded` and `besiroglu` are nearer to the runs",
        ),
        Coefficients(
            name="hoffmann-unrounded",
            law=Surface(
                E=math.exp(0.5267228), A=math.exp(6.0073404), B=math.exp(6.0179186), alpha=0.33917084, beta=0.2849083
            ),
            source=f"{_HOFFMANN}, approach 3 with the figures of its TeX source",
            counts="total",
            largest=CHINCHILLA_RUNS,
            warning="its fit ended early (mean objective, default tolerance) and misses its own runs (2404.10102)",
        ),
        Coefficients(
            name="chinchilla-1",
            law=Frontier.through((400e6, 1.92e19), (10e12, 1.30e28)),
            source=f"{_HOFFMANN}, approach 1 (envelope of training curves), the ends of table 3",
            counts="total",
            largest=CHINCHILLA_RUNS,
        ),
        Coefficients(
            name="chinchilla-2",
            law=Frontier.through((400e6, 1.84e19), (10e12, 1.75e28)),
            source=f"{_HOFFMANN}, approach 2 (isoFLOP profiles), the ends of table A3",
            counts="total",
            largest=CHINCHILLA_PROFILES,
        ),
        Coefficients(
            name="kaplan",
            law=Frontier(1.3e9, 0.73, PF_DAY, loss_flops=3.1e8 * PF_DAY, loss_exponent=0.050),
            source=f"{_KAPLAN}, compute-efficient training: N = 1.3e9 C^.73, loss = (3.1e8 / C)^.050, C in PF-days",
            counts="without-embedding",
            warning="too few tokens: found at small sizes, under rates that had not decayed (2406.12907, 2406.19146)",
        ),
        Coefficients(
            name="kaplan-joint",
            law=KaplanSurface(alpha_N=0.076, alpha_D=0.103, N_c=6.4e13, D_c=1.8e13),
            source=f"{_KAPLAN}, equation 1.5 with the coefficients of table 2",
            counts="without-embedding",
            note="of early stopping on limited data; its best split under C = 6 N D is not the paper's C^.73",
        ),
        Coefficients(
            name="nanochat",
            law=Frontier(math.sqrt(1 / (6 * 10.5)), 0.5),
            source="nanochat, runs/scaling_laws.sh and dev/LOG.md: 10.5 tokens per parameter",
            counts="with-head",
            note="a rule for nanochat's architecture and optimizer; the ratio depends on which parameters are counted",
        ),
    )
}
DEFAULT = "besiroglu"


def kaplan_of_size(parameters: float) -> float:
    """Loss of N parameters without embeddings and endless data, in nats per token (2001.08361, equation 1.1)."""
    return float((8.8e13 / parameters) ** 0.076)


def kaplan_of_tokens(tokens: float) -> float:
    """Loss of D tokens with a large model stopped early (2001.08361, equation 1.2)."""
    return float((5.4e13 / tokens) ** 0.095)
