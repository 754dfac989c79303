"""Whether cosines order pairs of words as people do: Spearman's and Pearson's correlation with a file of ratings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmctl import InputError, MachineError
from llmctl.text.datasets import read_lines
from llmctl.text.vectors import Vectors


@dataclass(frozen=True)
class Agreement:
    """Correlations over `pairs`; `unknown` pairs have a word without a vector and are left out."""

    spearman: float
    spearman_p: float
    pearson: float
    pairs: int
    unknown: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, in which nothing is NaN: a correlation that is not defined is null."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }


def read_ratings(path: Path, first: int = 0, second: int = 1, rating: int = 2) -> list[tuple[str, str, float]]:
    """(word, word, rating) by column, from 0, separated by tabs, or by commas where there is no tab.

    Lines that begin with # are comments; one first line whose rating is no number is the header. InputError names any
    other line that does not fit.
    """
    found: list[tuple[str, str, float]] = []
    begun = False
    for number, line in read_lines(path):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.rstrip("\n").split("\t" if "\t" in line else ",")]
        header, begun = not begun, True
        try:
            found.append((cells[first], cells[second], float(cells[rating])))
        except (IndexError, ValueError) as error:
            if header:
                continue
            raise InputError(
                f"{path}:{number}: no two words and a rating", hint="tab-separated; --columns names other columns"
            ) from error
    if not found:
        raise InputError(f"{path} holds no ratings", hint="word, word, rating a line, separated by tabs")
    return found


def agreement(vectors: Vectors, ratings: list[tuple[str, str, float]]) -> Agreement:
    """Compare cosines with ratings; words are looked up without case. MachineError without scipy, InputError if fewer
    than three pairs are known."""
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise MachineError("correlations need the module `scipy`", hint="pip install 'llmctl[eval]'") from error
    rows = {name.upper(): row for row, name in reversed(list(enumerate(vectors.names)))}
    known = [
        (rows[a.upper()], rows[b.upper()], rating)
        for a, b, rating in ratings
        if a.upper() in rows and b.upper() in rows
    ]
    if len(known) < 3:
        raise InputError(f"{len(known)} of {len(ratings)} pairs have vectors", hint="too few to correlate")
    left, right = [a for a, *_ in known], [b for _, b, _ in known]
    cosines = (vectors.unit[left] * vectors.unit[right]).sum(axis=1)
    said = np.array([rating for *_, rating in known])
    if np.ptp(said) == 0 or np.ptp(cosines) == 0:
        return Agreement(math.nan, math.nan, math.nan, len(known), len(ratings) - len(known))
    ranked, linear = stats.spearmanr(said, cosines), stats.pearsonr(said, cosines)
    return Agreement(
        float(ranked.statistic), float(ranked.pvalue), float(linear.statistic), len(known), len(ratings) - len(known)
    )
