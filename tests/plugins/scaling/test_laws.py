"""The published laws: closed forms against numeric minimisation, the numbers of the papers."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from llmctl_train_pretrain.scaling.laws import (
    PF_DAY,
    Frontier,
    KaplanSurface,
    Surface,
    flops_of_tokens,
    from_json,
    optimum,
    to_json,
)
from llmctl_train_pretrain.scaling.published import PUBLISHED, kaplan_of_size, kaplan_of_tokens

SURFACES = {name: found.law for name, found in PUBLISHED.items() if not isinstance(found.law, Frontier)}


def best_size(law, flops):
    """log N at the least loss of a budget, by scipy alone."""
    found = minimize_scalar(
        lambda x: law.loss(math.exp(x), flops / (6 * math.exp(x))),
        bounds=(5, 40),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return found.x


@pytest.mark.parametrize("flops", [1e18, 5.76e23])
@pytest.mark.parametrize("name", SURFACES)
def test_the_closed_form_is_the_numeric_minimum(name, flops):
    law = SURFACES[name]
    best = optimum(law, flops)
    # A minimum is flat: scipy knows its place to the root of its precision.
    assert math.log(best.parameters) == pytest.approx(best_size(law, flops), abs=1e-5)
    assert best.flops == pytest.approx(flops, rel=1e-12)
    assert best.loss == pytest.approx(law.loss(best.parameters, best.tokens), rel=1e-12)
    # The control: the coefficients of another term in the closed form are no minimum.
    assert math.log(best.parameters * 1.001) != pytest.approx(best_size(law, flops), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "tokens", "ratio", "exponent"),
    [
        ("besiroglu", 72.2e9, 1.33e12, 18.4, 0.5126),
        ("hoffmann", 32.2e9, 2.98e12, 92.6, 0.4516),
        ("hoffmann-unrounded", 40.4e9, 2.38e12, 58.9, 0.4565),
    ],
)
def test_what_each_makes_of_chinchillas_budget(name, parameters, tokens, ratio, exponent):
    best = optimum(PUBLISHED[name].law, 5.76e23)
    assert (best.parameters, best.tokens) == (pytest.approx(parameters, rel=2e-3), pytest.approx(tokens, rel=2e-3))
    assert best.tokens / best.parameters == pytest.approx(ratio, rel=2e-3)
    assert PUBLISHED[name].law.exponent == pytest.approx(exponent, abs=5e-5)


TABLE_3 = [
    (400e6, 1.92e19, 8.0e9), (1e9, 1.21e20, 20.2e9), (10e9, 1.23e22, 205.1e9), (67e9, 5.76e23, 1.5e12),
    (175e9, 3.85e24, 3.7e12), (280e9, 9.90e24, 5.9e12), (520e9, 3.43e25, 11.0e12), (1e12, 1.27e26, 21.2e12),
    (10e12, 1.30e28, 216.2e12),
]  # fmt: skip
TABLE_A3 = [
    (400e6, 1.84e19, 7.7e9), (1e9, 1.20e20, 20.0e9), (10e9, 1.32e22, 219.5e9), (67e9, 6.88e23, 1.7e12),
    (175e9, 4.54e24, 4.3e12), (280e9, 1.18e25, 7.1e12), (520e9, 4.19e25, 13.4e12), (1e12, 1.59e26, 26.5e12),
    (10e12, 1.75e28, 292.0e12),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "table", "exponent"), [("chinchilla-1", TABLE_3, 0.50), ("chinchilla-2", TABLE_A3, 0.49)]
)
def test_the_lines_through_chinchillas_tables_hold_every_row(name, table, exponent):
    law = PUBLISHED[name].law
    assert round(law.exponent, 2) == exponent
    for parameters, flops, tokens in table:
        best = optimum(law, flops)
        assert best.parameters == pytest.approx(parameters, rel=0.04)
        assert best.tokens == pytest.approx(tokens, rel=0.06)  # printed with two figures
    # The control: the other table's budgets do not lie on this line.
    other = TABLE_A3 if table is TABLE_3 else TABLE_3
    assert abs(law.parameters(other[-1][1]) / other[-1][0] - 1) > 0.1


def test_kaplans_values():
    joint = PUBLISHED["kaplan-joint"].law
    assert kaplan_of_size(1e9) == pytest.approx(2.376, abs=5e-4)
    assert kaplan_of_tokens(1e10) == pytest.approx(2.262, abs=5e-4)
    assert joint.loss(1e9, 1e10) == pytest.approx(2.420, abs=5e-4)
    assert joint.loss(1e9, math.inf) == pytest.approx((6.4e13 / 1e9) ** 0.076)
    frontier = PUBLISHED["kaplan"].law
    assert frontier.parameters(PF_DAY) == pytest.approx(1.3e9)
    assert frontier.parameters(10 * PF_DAY) == pytest.approx(1.3e9 * 10**0.73)
    assert frontier.optimal_loss(PF_DAY) == pytest.approx(3.1e8**0.05)


@pytest.mark.parametrize("name", PUBLISHED)
def test_inverses(name):
    law = PUBLISHED[name].law
    for flops in (1e17, 1e21, 1e25):
        best = optimum(law, flops)
        assert law.flops(best.parameters) == pytest.approx(flops, rel=1e-9)
        assert flops_of_tokens(law, best.tokens) == pytest.approx(flops, rel=1e-9)
        loss = law.loss(best.parameters / 2, best.tokens)
        if loss is None:
            assert law.tokens(best.parameters / 2, 2.0) is None
        else:
            assert law.tokens(best.parameters / 2, loss) == pytest.approx(best.tokens, rel=1e-6)


def test_a_model_too_small_never_reaches_the_loss():
    law = PUBLISHED["besiroglu"].law
    assert law.tokens(1e6, 1.9) == math.inf
    assert PUBLISHED["kaplan-joint"].law.tokens(1e6, 1.9) == math.inf


@pytest.mark.parametrize(
    "law", [Surface(1.8, 400, 2000, 0.3, 0.4), KaplanSurface(0.07, 0.1, 1e13, 1e13), Frontier(2, 0.5)]
)
def test_laws_survive_json(law):
    assert from_json(to_json(law)) == law
    with pytest.raises((KeyError, TypeError, ValueError)):
        from_json({**to_json(law), "kind": "no such kind"})
    name = next(name for name in to_json(law) if name != "kind")
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match=f"{name} is {wrong}"):
            from_json({**to_json(law), name: wrong})


def test_laws_without_meaning_give_numbers_not_tracebacks():
    wild = Surface(E=1.0, A=1e300, B=1e-300, alpha=1e-3, beta=1e-3)
    best = optimum(wild, 1e20)
    assert best.parameters > 0 and wild.loss(best.parameters, best.tokens) >= 1.0


def test_every_law_names_its_source_and_its_count():
    for name, found in PUBLISHED.items():
        assert name == found.name
        assert found.source and found.counts in ("total", "without-embedding", "with-head")
    assert "rounded" in PUBLISHED["hoffmann"].warning
    assert np.isinf(PUBLISHED["kaplan"].largest)
