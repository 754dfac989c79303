"""BFGS of many starts at once, and the objectives that it is given, against scipy."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize, rosen, rosen_der

from llmctl_train_pretrain.scaling import kaplan, parametric
from llmctl_train_pretrain.scaling.bfgs import minimise


def rosenbrock(points, rows):
    return np.array([rosen(point) for point in points]), np.array([rosen_der(point) for point in points])


def test_every_start_ends_in_a_minimum_of_scipys():
    starts = np.random.default_rng(0).uniform(-2, 2, (24, 4))
    found = minimise(rosenbrock, starts)
    assert found.gradients.max() < 1e-6
    theirs = [minimize(rosen, start, jac=rosen_der, method="BFGS", options={"gtol": 1e-6}) for start in starts]
    minima = sorted({round(one.fun, 6) for one in theirs})
    assert minima == [0.0, pytest.approx(3.701429, abs=1e-6)], "one besides (1, 1, 1, 1)"
    assert sorted(set(np.round(found.values, 6))) == pytest.approx(minima, abs=1e-6)
    assert found.points[found.values < 1] == pytest.approx(1.0, abs=1e-6)
    early = minimise(rosenbrock, starts, iterations=3)
    assert early.gradients.max() > 1e-2, "the control: three iterations are too few"


def test_rows_are_minimised_on_their_own():
    """A batch gives each row what it gets alone, and `rows` says whose problem a point belongs to."""
    centres = np.array([[1.0, 2.0], [-3.0, 0.5], [10.0, -7.0]])

    def bowl(points, rows):
        away = points - centres[rows]
        return (away**2).sum(axis=1), 2 * away

    found = minimise(bowl, np.zeros((3, 2)))
    assert found.points == pytest.approx(centres)


@pytest.mark.parametrize("kind", [parametric, kaplan])
def test_gradients_are_those_of_finite_differences(kind, scattered):
    runs = scattered(count=30)
    problem = kind._Problem(runs.parameters, runs.tokens, runs.loss)
    point = [-0.5, -0.4, 0.6, 0.34, 0.36] if kind is parametric else [-2.0, -1.8, 10.0, 12.0]
    weights = np.random.default_rng(1).integers(0, 3, (1, 30)).astype(float)
    for given in (None, weights):
        values, gradients = problem(np.array([point]), given)
        numeric = approx_fprime(point, lambda at, given=given: problem(np.array([at]), given)[0][0], 1e-7)
        assert gradients[0] == pytest.approx(numeric, rel=2e-4, abs=1e-4)
        assert gradients[0] * 1.01 != pytest.approx(numeric, rel=2e-4, abs=1e-4)
    assert values.shape == (1,)


def test_the_objective_is_the_sum_of_huber_losses_of_log_residuals(scattered, truth):
    from scipy.special import huber

    runs = scattered(count=50)
    problem = parametric._Problem(runs.parameters, runs.tokens, runs.loss)
    point = np.array([[np.log(truth.A), np.log(truth.B), np.log(truth.E), truth.alpha, truth.beta]])
    predicted = [truth.loss(n, d) for n, d in zip(runs.parameters, runs.tokens, strict=True)]
    expected = huber(1e-3, np.log(predicted) - np.log(runs.loss)).sum()
    assert problem(problem.centred(point))[0][0] * parametric.DELTA == pytest.approx(expected, rel=1e-9)
    assert problem.plain(problem.centred(point)) == pytest.approx(point)
