"""The page of a fit: isoFLOP profiles, lines of equal loss, frontiers, every number with its bounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llmctl.pipeline.report import fill_page
from llmctl.store.names import timestamp
from llmctl_train_pretrain.scaling.drawing import Axis, Series, plot
from llmctl_train_pretrain.scaling.envelope import EnvelopeFit
from llmctl_train_pretrain.scaling.fitting import TITLES, Fitted, Report
from llmctl_train_pretrain.scaling.isoflop import ProfileFit
from llmctl_train_pretrain.scaling.laws import Surface, optimum
from llmctl_train_pretrain.scaling.planning import size
from llmctl_train_pretrain.scaling.published import COUNTS

LEVELS = 8
"""Lines of equal loss."""
SIZE, COMPUTE = Axis(label="parameters", log=True), Axis(label="operations", log=True)


def render(report: Report) -> str:
    """The page; it needs nothing beside itself."""
    return fill_page(
        Path(__file__).with_name("page.html"),
        report=report,
        written=timestamp(),
        counts=COUNTS.get(report.runs.counts, report.runs.counts),
        charts=[(title, chart) for title, chart in _charts(report) if chart],
        fits=[(_title(found), _rows(found), found.facts) for found in report.fits],
        refused=[(name, why) for name, why in report.refused.items()],
        frontiers=[_frontier_row(report, found) for found in report.fits],
        size=size,
    )


def _title(found: Fitted) -> str:
    name = "Kaplan" if found.approach == "kaplan" else f"Approach {found.approach}"
    return f"{name}: {TITLES[found.approach]}"


def _rows(found: Fitted) -> list[tuple[str, str, str]]:
    """(name, value, interval)."""
    rows = []
    for name, value in found.estimates.items():
        between = "–" if value.low is None else f"{value.low:.4g} to {value.high:.4g}"
        label = {"exponent": "a in N ∝ C^a", "parameters": "N at the largest budget"}.get(name, name)
        rows.append((label, f"{value.value:.4g}", between))
    return rows


def _frontier_row(report: Report, found: Fitted) -> tuple[str, str, str, str]:
    best = optimum(found.law, report.largest)
    return _title(found), size(best.parameters), size(best.tokens), f"{best.tokens / best.parameters:.3g}"


def _charts(report: Report) -> Iterator[tuple[str, str]]:
    fits = {found.approach: found for found in report.fits}
    if "2" in fits and isinstance(fits["2"].detail, ProfileFit):
        yield "Loss at equal operations, and the parabola of each budget", _profiles(report, fits["2"].detail)
    if "3" in fits and isinstance(fits["3"].law, Surface):
        yield "The fitted surface: lines of equal loss, and the runs", _surface(report, fits["3"].law)
        yield "Loss predicted by approach 3 against measured", _residuals(report, fits["3"].law)
    yield "Best size of each budget", _frontier(report, fits)


def _profiles(report: Report, fit: ProfileFit) -> str:
    series = []
    for profile in fit.profiles:
        n, loss = report.runs.parameters[profile.rows], report.runs.loss[profile.rows]
        dots = [(float(a), float(b)) for a, b in zip(n, loss, strict=True)]
        line = [(float(x), profile.at(float(x))) for x in np.geomspace(n.min(), n.max(), 60)]
        series.append(Series(name=f"{profile.flops:.2g}", line=line, dots=dots))
    best = [(profile.parameters, profile.loss) for profile in fit.profiles]
    series.append(Series(name="minima", line=best, faint=True))
    return plot("isoFLOP profiles", SIZE, Axis(label="loss"), series)


def _surface(report: Report, law: Surface) -> str:
    """Along a line of equal loss D follows from N, and C from both: nothing has to be traced."""
    runs = report.runs
    low, high = float(runs.loss.min()), float(runs.loss.max())
    sizes = np.geomspace(runs.parameters.min(), runs.parameters.max(), 200)
    levels = law.E + np.geomspace(max(low - law.E, 1e-3), high - law.E, LEVELS)
    ends = (float(runs.flops_used.min()), float(runs.flops_used.max()))
    series = [
        Series(name="runs", dots=[(float(c), float(n)) for c, n in zip(runs.flops_used, runs.parameters, strict=True)]),
        Series(name="best size", line=[(float(c), law.parameters(float(c))) for c in np.geomspace(*ends, 60)]),
    ]
    for level in levels:
        found = [(6 * float(n) * law.tokens(float(n), float(level)), float(n)) for n in sizes]
        line = [(c, n) for c, n in found if np.isfinite(c)]
        series.append(Series(name=f"loss {level:.3g}", line=line, faint=True))
    return plot("fitted surface", Axis(label="operations", log=True, ends=ends), SIZE, series)


def _residuals(report: Report, law: Surface) -> str:
    runs = report.runs
    dots = [(row.loss, law.loss(row.parameters, row.tokens)) for row in runs.rows]
    ends = (float(runs.loss.min()), float(runs.loss.max()))
    line = Series(name="equal", line=[(value, value) for value in ends], faint=True)
    axis = Axis(label="measured loss")
    return plot("residuals", axis, Axis(label="predicted loss"), [Series(name="runs", dots=dots), line])


def _frontier(report: Report, fits: dict[str, Fitted]) -> str:
    grid = np.geomspace(report.runs.flops_used.min(), report.largest, 40)
    series = []
    for found in report.fits:
        dots: list[tuple[float, float]] = []
        if isinstance(found.detail, ProfileFit):
            dots = [(profile.flops, profile.parameters) for profile in found.detail.profiles]
        elif isinstance(found.detail, EnvelopeFit):
            pairs = zip(found.detail.flops[::60], found.detail.parameters[::60], strict=True)
            dots = [(float(c), float(n)) for c, n in pairs]
        line = [(float(c), found.law.parameters(float(c))) for c in grid]
        series.append(Series(name=_title(found).partition(":")[0], line=line, dots=dots))
    return plot("frontiers", COMPUTE, SIZE, series)
