"""A map of vectors in two dimensions, as one HTML page that needs nothing else: names show under the pointer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import cycle
from pathlib import Path

import numpy as np

from llmctl import MachineError

SIZE, MARGIN = 800, 40
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, which the colour-blind can tell apart."""
NAMED = 60
"""Points up to which names are drawn beside them all the time."""


def pca(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(`(N, 2)` coordinates, shares `(2,)` of the variance); each axis points where its largest weight is positive."""
    centred = matrix.astype(np.float64) - matrix.mean(axis=0, dtype=np.float64)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    axes, values = axes[:2], values**2
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    placed = np.zeros((len(matrix), 2))
    placed[:, : len(axes)] = centred @ (axes * signs[:, None]).T
    shares = np.zeros(2)
    shares[: len(values[:2])] = values[:2] / max(float(values.sum()), 1e-300)
    return placed, shares


def tsne(matrix: np.ndarray, seed: int) -> np.ndarray:
    """`(N, 2)` coordinates by scikit-learn, from PCA's. MachineError without it."""
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise MachineError("t-SNE needs the module `sklearn`", hint="pip install scikit-learn, or take pca") from error
    perplexity = min(30.0, (len(matrix) - 1) / 3)
    return np.asarray(TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(matrix))


def page(title: str, note: str, placed: np.ndarray, names: Sequence[str], groups: Sequence[str]) -> str:
    """The HTML: a point for each row of `placed (N, 2)`, coloured by its group, with its name as a title."""
    colour = dict(zip(dict.fromkeys(groups), cycle(COLOURS), strict=False))
    low, span = placed.min(axis=0), np.maximum(np.ptp(placed, axis=0).max(), 1e-12)
    spots = MARGIN + (placed - low) / span * (SIZE - 2 * MARGIN)
    marks = []
    for (x, y), name, group in zip(spots, names, groups, strict=True):
        at = f'cx="{x:.1f}" cy="{SIZE - y:.1f}"'
        shown = f"{name} ({group})" if group else name
        marks.append(f'<circle {at} r="4" fill="{colour[group]}"><title>{escape(shown)}</title></circle>')
        if len(names) <= NAMED:
            marks.append(f'<text x="{x + 6:.1f}" y="{SIZE - y + 4:.1f}">{escape(name)}</text>')
    legend = "".join(f'<li style="color:{shade}">{escape(group)}</li>' for group, shade in colour.items() if group)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        "<style>body{font:15px system-ui,sans-serif;margin:2em}svg{max-width:100%;border:1px solid #ccc}"
        "text{font-size:11px}circle:hover{stroke:#000;stroke-width:2}</style>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(note)}</p>\n<ul>{legend}</ul>\n"
        f'<svg viewBox="0 0 {SIZE} {SIZE}" width="{SIZE}" height="{SIZE}" role="img" aria-label="{escape(title)}">\n'
        + "\n".join(marks)
        + "\n</svg>\n</html>\n"
    )


def write_page(path: Path, html: str) -> None:
    """Write the page."""
    path.write_text(html, encoding="utf-8")
