"""Named points as inline SVG."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from html import escape

from llmctl.pipeline.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, number, ticks


def scatter(points: Mapping[str, tuple[float, float]], filled: Collection[str]) -> str:
    """A dot with its name for each point, full where it is in `filled`, else a ring. Lower left is best."""
    across = ticks(0, max(x for x, _ in points.values()))
    up = ticks(min(y for _, y in points.values()), max(y for _, y in points.values()))

    def at(x: float, y: float) -> tuple[float, float]:
        right = (x - across[0]) / (across[-1] - across[0])
        above = (y - up[0]) / (up[-1] - up[0])
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - above * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for y in up:
        row = at(across[0], y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{row + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in across:
        column = at(x, up[0])[0]
        parts.append(f'<text class="tick" x="{column:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{number(x)}</text>')
    for index, (name, point) in enumerate(points.items()):
        x, y = at(*point)
        ring = "" if name in filled else ' style="fill:none;stroke:currentColor"'
        parts.append(f'<circle class="dot s{index % 6}" cx="{x:.1f}" cy="{y:.1f}" r="4"{ring}/>')
        side = ("end", -8) if x > WIDTH / 2 else ("start", 8)
        parts.append(
            f'<text class="tick" x="{x + side[1]:.1f}" y="{y + 4:.1f}" text-anchor="{side[0]}">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>"])
