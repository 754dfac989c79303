"""Line charts and the graph of stages as inline SVG: no library, no script, colours from the page's own style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
MOST_POINTS = 240
ROW, ARCS, NAMES = 32, 170, 390


def line_chart(title: str, series: Mapping[str, Points], x_label: str = "step") -> str:
    """One chart with a line per series; the first is drawn first. Series without points are left out."""
    lines = {name: thin(points) for name, points in series.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1e-9)
    low_y, high_y = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x or 1)
        up = (y - low_y) / (high_y - low_y or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        row = at(low_x, y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{row + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in (x for x in x_ticks if low_x <= x <= high_x):
        column = at(x, low_y)[0]
        parts.append(f'<text class="tick" x="{column:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    for index, points in enumerate(lines.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        if len(points) == 1:
            x, y = at(*points[0])
            parts.append(f'<circle class="dot s{index % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        parts.append(f'<polyline class="line s{index % 6}" points="{path}"/>')
    parts.append("</svg>")
    names = "".join(f'<span class="key s{i % 6}">{escape(name)}</span>' for i, name in enumerate(lines))
    return f"{''.join(parts)}<div class='legend'>{names}</div>"


def thin(points: Points) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: the mean of each stretch, the first and the last point as they are."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretch = len(points) / (MOST_POINTS - 2)
    cuts = [points[int(i * stretch) : int((i + 1) * stretch)] for i in range(MOST_POINTS - 2)]
    means = [(sum(x for x, _ in cut) / len(cut), sum(y for _, y in cut) / len(cut)) for cut in cuts if cut]
    return [points[0], *means, points[-1]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from at or below `low` to at or above `high`."""
    if high <= low:
        high = low + (abs(low) or 1) * 0.1
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: `0.25`, `1200`, `20k`."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def graph(edges: Mapping[str, Sequence[str]], labels: Mapping[str, str], kinds: Mapping[str, str]) -> str:
    """Stages one below the other, in order, and an arc to each from all that it was made from: no line crosses a name.

    `edges` maps a stage to its inputs, `labels` is what stands beside its name, `kinds` the CSS class of its dot.
    """
    row = {stage: ROW // 2 + index * ROW for index, stage in enumerate(edges)}
    longest = max((row[stage] - row[source] for stage in edges for source in edges[stage] if source in row), default=0)
    height = len(row) * ROW
    name = f'<svg class="graph" viewBox="0 0 {ARCS + NAMES} {height}" style="max-width:{ARCS + NAMES}px" role="img">'
    parts = [name]
    for stage in edges:
        for source in (source for source in edges[stage] if source in row):
            parts.append(_arc(source, stage, row[source], row[stage], longest))
    for stage, y in row.items():
        parts.append(
            f'<g class="node {escape(kinds.get(stage, ""))}"><circle cx="{ARCS}" cy="{y}" r="6"/>'
            f'<text x="{ARCS + 16}" y="{y + 5}" class="name">{escape(stage)}</text>'
            f'<text x="{ARCS + 130}" y="{y + 5}" class="sub">{escape(labels.get(stage, ""))}</text></g>'
        )
    return "".join(parts) + "</svg>"


def _arc(source: str, stage: str, y1: float, y2: float, longest: float) -> str:
    """A bow to the left, the wider the further; neighbours are joined by a straight line."""
    reach = 0.0 if y2 - y1 == ROW else (ARCS - 10) * 4 / 3 * math.sqrt((y2 - y1) / longest)
    path = f"M{ARCS} {y1} C{ARCS - reach:.1f} {y1} {ARCS - reach:.1f} {y2} {ARCS} {y2}"
    return f'<path class="edge" d="{path}"><title>{escape(source)} → {escape(stage)}</title></path>'
