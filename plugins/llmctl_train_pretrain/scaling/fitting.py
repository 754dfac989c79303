"""All laws that a set of runs can tell, each with its coefficients and intervals, or why it could not be fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmctl_train_pretrain.scaling.envelope import EnvelopeFit, fit_envelope
from llmctl_train_pretrain.scaling.intervals import Estimate, estimate, resampled
from llmctl_train_pretrain.scaling.isoflop import ProfileFit, fit_profiles
from llmctl_train_pretrain.scaling.kaplan import fit_compute, fit_kaplan
from llmctl_train_pretrain.scaling.laws import Frontier, KaplanSurface, Surface, optimum, to_json
from llmctl_train_pretrain.scaling.parametric import SurfaceFit, fit_surface
from llmctl_train_pretrain.scaling.runs import BUDGET_TOLERANCE, Runs

APPROACHES = ("1", "2", "3", "kaplan")
TITLES = {
    "1": "envelope of training curves",
    "2": "isoFLOP profiles",
    "3": "loss = E + A / N^alpha + B / D^beta",
    "kaplan": "loss = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
}
LEAST_RUNS = 6
"""Runs that a surface with five coefficients needs at least."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to fit, and how to measure how sure a fit is."""

    approaches: tuple[str, ...] = APPROACHES
    resamples: int = 1000
    seed: int = 0
    level: float = 0.95
    tolerance: float = BUDGET_TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """One law with its numbers: coefficients, the exponent a of N ∝ C^a, and the best N at the largest budget."""

    approach: str
    law: Surface | KaplanSurface | Frontier
    estimates: dict[str, Estimate]
    facts: dict[str, float]
    detail: SurfaceFit | ProfileFit | EnvelopeFit | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `law` is what `llmctl scaling plan` reads."""
        numbers = {name: found.to_json() for name, found in self.estimates.items()}
        title = TITLES[self.approach]
        found: dict[str, Any] = {"title": title, "law": to_json(self.law), "estimates": numbers, "facts": self.facts}
        if isinstance(self.detail, ProfileFit):
            found["budgets"] = [profile.to_json() for profile in self.detail.profiles]
            found["left_out"] = list(self.detail.left_out)
        return found


@dataclass(frozen=True)
class Report:
    """Everything that was fitted to the runs."""

    runs: Runs
    settings: Settings
    fits: tuple[Fitted, ...]
    refused: dict[str, str] = field(default_factory=dict)
    """Approach → why these runs cannot tell it."""

    @property
    def largest(self) -> float:
        """The largest budget of the runs."""
        return _top(self.runs)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        settings = self.settings
        return {
            "schema": "llmctl.scaling/v1",
            "runs": len(self.runs),
            "counts": self.runs.counts,
            "flops": self.runs.flops,
            "range": {
                name: [float(values.min()), float(values.max())]
                for name, values in (
                    ("parameters", self.runs.parameters),
                    ("tokens", self.runs.tokens),
                    ("loss", self.runs.loss),
                    ("flops", self.runs.flops_used),
                )
            },
            "bootstrap": {"resamples": settings.resamples, "seed": settings.seed, "level": settings.level},
            "notes": list(self.runs.notes),
            "approaches": {found.approach: found.to_json() for found in self.fits},
            "refused": self.refused,
        }


def fit(runs: Runs, settings: Settings) -> Report:
    """Fit every approach that `settings` name; one that the runs cannot tell is refused with the reason."""
    fits, refused = [], {}
    for approach in settings.approaches:
        found = _FITS[approach](runs, settings)
        if isinstance(found, str):
            refused[approach] = found
        else:
            fits.append(found)
    return Report(runs, settings, tuple(fits), refused)


def _first(runs: Runs, settings: Settings) -> Fitted | str:
    found = fit_envelope(runs, top=_top(runs), resamples=settings.resamples, seed=settings.seed)
    if isinstance(found, str):
        return found
    facts = {"budgets": float(len(found.flops)), "sizes": float(found.sizes)}
    estimates = _frontier_estimates(found.frontier, runs, found.samples, settings)
    return Fitted(approach="1", law=found.frontier, estimates=estimates, facts=facts, detail=found)


def _second(runs: Runs, settings: Settings) -> Fitted | str:
    found = fit_profiles(
        runs, top=_top(runs), resamples=settings.resamples, seed=settings.seed, tolerance=settings.tolerance
    )
    if found is None:
        groups = [len(set(runs.parameters[rows])) for rows in runs.budgets(settings.tolerance)]
        most = f"{len(groups)} budgets with up to {max(groups)} sizes"
        return f"it needs two budgets with a minimum between at least three sizes each; there are {most}"
    facts = {"budgets": float(len(found.profiles)), "budgets_left_out": float(len(found.left_out))}
    estimates = _frontier_estimates(found.frontier, runs, found.samples, settings)
    return Fitted(approach="2", law=found.frontier, estimates=estimates, facts=facts, detail=found)


def _frontier_estimates(frontier: Frontier, runs: Runs, samples: np.ndarray, settings: Settings) -> dict[str, Estimate]:
    top = _top(runs)
    return {
        "exponent": estimate(frontier.exponent, samples[:, 0], settings.level),
        "parameters": estimate(frontier.parameters(top), np.exp(samples[:, 1]), settings.level),
    }


def _third(runs: Runs, settings: Settings) -> Fitted | str:
    if problem := _too_few(runs):
        return problem
    weights = resampled(len(runs), settings.resamples, settings.seed)
    found = fit_surface(runs.parameters, runs.tokens, runs.loss, weights=weights)
    if found is None:
        return "no start leads to a minimum with positive exponents: vary sizes and tokens more"
    surfaces = [Surface(*(float(value) for value in row)) for row in found.samples]
    law, names = found.surface, ("E", "A", "B", "alpha", "beta")
    estimates = {
        name: estimate(getattr(law, name), found.samples[:, index], settings.level) for index, name in enumerate(names)
    }
    facts = {"objective": found.objective, "gradient": found.gradient, "starts_agreeing": float(found.agreeing)}
    estimates |= _surface_estimates(law, surfaces, runs, settings)
    return Fitted(approach="3", law=law, estimates=estimates, facts=facts, detail=found)


def _kaplan(runs: Runs, settings: Settings) -> Fitted | str:
    if problem := _too_few(runs):
        return problem
    weights = resampled(len(runs), settings.resamples, settings.seed)
    found = fit_kaplan(runs.parameters, runs.tokens, runs.loss, weights=weights)
    if found is None:
        return "the losses have no finite minimum under this law: they hardly depend on one of size and data"
    surfaces = [KaplanSurface(*(float(value) for value in row)) for row in found.samples]
    law, names = found.surface, ("alpha_N", "alpha_D", "N_c", "D_c")
    estimates = {
        name: estimate(getattr(law, name), found.samples[:, index], settings.level) for index, name in enumerate(names)
    }
    facts = {"objective": found.objective}
    groups = [rows for rows in runs.budgets(settings.tolerance) if len(rows) > 1]
    if len(groups) > 1:
        best = [rows[np.argmin(runs.loss[rows])] for rows in groups]
        compute = fit_compute(runs.flops_used[best], runs.loss[best])
        facts |= {"alpha_C": compute.alpha_C, "C_c_pf_days": compute.C_c}
    estimates |= _surface_estimates(law, surfaces, runs, settings)
    return Fitted(approach="kaplan", law=law, estimates=estimates, facts=facts)


def _surface_estimates(
    law: Surface | KaplanSurface, samples: Sequence[Surface | KaplanSurface], runs: Runs, settings: Settings
) -> dict[str, Estimate]:
    top = _top(runs)
    best = optimum(law, top)
    return {
        "exponent": estimate(law.exponent, [found.exponent for found in samples], settings.level),
        "parameters": estimate(best.parameters, [found.parameters(top) for found in samples], settings.level),
    }


def _top(runs: Runs) -> float:
    return float(runs.flops_used.max())


def _too_few(runs: Runs) -> str:
    if len(runs) < LEAST_RUNS:
        return f"it needs at least {LEAST_RUNS} runs, there are {len(runs)}"
    for name, values in (("sizes", runs.parameters), ("numbers of tokens", runs.tokens)):
        if len(np.unique(values)) < 3:
            return f"it needs at least 3 different {name}, there are {len(np.unique(values))}"
    return ""


_FITS: dict[str, Callable[[Runs, Settings], Fitted | str]] = {"1": _first, "2": _second, "3": _third, "kaplan": _kaplan}
