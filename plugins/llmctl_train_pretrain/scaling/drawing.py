"""Plots with logarithmic axes, points and lines, in the style of `llmctl.pipeline.charts`: inline SVG, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from llmctl.pipeline.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Points, ticks
from llmctl_train_pretrain.scaling.planning import size

COLOURS = 6
"""Classes `s0` to `s5` of the shared style."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Something to draw under one name and colour."""

    name: str
    line: Points = ()
    dots: Points = ()
    faint: bool = False
    """Drawn thin and left out of the legend: one of many of a kind."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A label, and whether the axis is logarithmic."""

    label: str
    log: bool = False
    ends: tuple[float, float] | None = None
    """Bounds; by default those of the points."""

    def place(self, value: float) -> float:
        """Where a value lies, before the axis is fitted to the page."""
        return math.log10(value) if self.log else value

    def ticks(self, low: float, high: float) -> list[tuple[float, str]]:
        """(place, label) of the marks between two places."""
        if not self.log:
            return [(value, f"{value:.4g}") for value in ticks(low, high, 7)]
        decades = high - low
        steps = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1, 3) if decades < 3.5 else (1,)
        values = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
        every = max(1, math.ceil(sum(low <= math.log10(value) <= high for value in values) / 8))
        return [(math.log10(value), _power(value)) for value in values[::every]]


def _power(value: float) -> str:
    """`50 k`, `1.2 B`; powers of ten where the field has no word."""
    return size(value) if value < 1e15 else f"{value:.0e}".replace("e+", "e")


def plot(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """One plot with its legend; empty if there is nothing to draw. Points outside of an axis's ends are cut off."""
    drawn = [one for one in series if one.line or one.dots]
    points = [point for one in drawn for point in (*one.line, *one.dots)]
    if not points:
        return ""
    low_x, high_x = _ends(x, [point[0] for point in points])
    low_y, high_y = _ends(y, [point[1] for point in points])

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = (x.place(point[0]) - low_x) / (high_x - low_x)
        up = (y.place(point[1]) - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts += _axes(x, y, (low_x, high_x), (low_y, high_y))
    names, colour = [], 0
    for one in drawn:
        style = "faint" if one.faint else f"s{colour % COLOURS}"
        inside = [at(point) for point in one.line if _within(x, point[0], low_x, high_x)]
        inside = [point for point in inside if TOP - 1 <= point[1] <= HEIGHT - BOTTOM + 1]
        if inside:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in inside)
            parts.append(f'<polyline class="line {style}" points="{path}"><title>{escape(one.name)}</title></polyline>')
        for point in one.dots:
            px, py = at(point)
            text = f"{one.name}: {_power(point[0])}, {point[1]:.4g}"
            parts.append(
                f'<circle class="dot {style}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{escape(text)}</title></circle>'
            )
        if not one.faint:
            names.append(f'<span class="key {style}">{escape(one.name)}</span>')
            colour += 1
    return f"{''.join(parts)}</svg><div class='legend'>{''.join(names)}</div>"


def _ends(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    low, high = axis.ends or (min(values), max(values))
    low, high = axis.place(low), axis.place(high)
    margin = (high - low) * 0.04 or abs(low) * 0.05 or 1.0
    return low - margin, high + margin


def _within(axis: Axis, value: float, low: float, high: float) -> bool:
    return low <= axis.place(value) <= high


def _axes(x: Axis, y: Axis, ends_x: tuple[float, float], ends_y: tuple[float, float]) -> list[str]:
    parts = []
    for place, label in y.ticks(*ends_y):
        if ends_y[0] <= place <= ends_y[1]:
            row = HEIGHT - BOTTOM - (place - ends_y[0]) / (ends_y[1] - ends_y[0]) * (HEIGHT - TOP - BOTTOM)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{row + 4:.1f}" text-anchor="end">{label}</text>')
    for place, label in x.ticks(*ends_x):
        if ends_x[0] <= place <= ends_x[1]:
            column = LEFT + (place - ends_x[0]) / (ends_x[1] - ends_x[0]) * (WIDTH - LEFT - RIGHT)
            parts.append(f'<text class="tick" x="{column:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x.label)}</text>')
    parts.append(f'<text class="tick" x="{LEFT}" y="{TOP - 2}">{escape(y.label)}</text>')
    return parts
