"""Runs made from a surface whose coefficients are known: what a right fit must find again."""

from __future__ import annotations

import numpy as np
import pytest

from llmctl_train_pretrain.scaling.laws import Surface
from llmctl_train_pretrain.scaling.published import PUBLISHED
from llmctl_train_pretrain.scaling.runs import Run, Runs

BESIROGLU = PUBLISHED["besiroglu"].law
NOISE = 0.003


@pytest.fixture(scope="session")
def truth() -> Surface:
    """The surface behind all runs here."""
    return BESIROGLU


@pytest.fixture(scope="session")
def scattered():
    """240 runs, N 5e7 to 1.6e10 and C 6e18 to 3e21, log-uniform, .3 % noise: `scattered(seed)`."""

    def make(seed=0, noise=NOISE, law=BESIROGLU, count=240):
        generator = np.random.default_rng(seed)
        n = np.exp(generator.uniform(np.log(5e7), np.log(1.6e10), count))
        c = np.exp(generator.uniform(np.log(6e18), np.log(3e21), count))
        return Runs(tuple(_run(i, n[i], c[i], law, noise, generator) for i in range(count)), "total")

    return make


@pytest.fixture(scope="session")
def profiles():
    """15 sizes at each of 7 budgets, from the best over `window` to the best times `window`."""

    def make(seed=0, noise=NOISE, law=BESIROGLU, window=8.0):
        generator = np.random.default_rng(seed)
        rows = [
            _run(f"{c:.3e} {n:.3e}", n, c, law, noise, generator)
            for c in np.geomspace(1e18, 1e21, 7)
            for n in np.geomspace(law.parameters(c) / window, law.parameters(c) * window, 15)
        ]
        return Runs(tuple(rows), "total")

    return make


@pytest.fixture(scope="session")
def curves():
    """15 sizes, each with its loss at 40 numbers of tokens on the way to 3e21 operations."""

    def make(seed=0, noise=NOISE, law=BESIROGLU):
        generator = np.random.default_rng(seed)
        rows = []
        for n in np.geomspace(5e7, 1.6e10, 15):
            d = np.geomspace(6e17, 3e21, 40) / (6 * n)
            points = [(x, law.loss(n, x) * np.exp(noise * generator.standard_normal())) for x in d]
            rows.append(Run(f"{n:.0e}", n, d[-1], points[-1][1], 6 * n * d[-1], tuple(points)))
        return Runs(tuple(rows), "total")

    return make


def _run(name, n, c, law, noise, generator):
    d = c / (6 * n)
    return Run(
        str(name), float(n), float(d), float(law.loss(n, d) * np.exp(noise * generator.standard_normal())), float(c)
    )
