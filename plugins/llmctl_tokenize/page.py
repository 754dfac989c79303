"""The comparison of tokenizers as one HTML page without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from llmctl.console import human_bytes
from llmctl.pipeline.charts import line_chart
from llmctl.pipeline.report import fill_page
from llmctl_tokenize.comparison import Measures, WorstCase


def render(
    measures: Sequence[Measures], worst: Sequence[WorstCase], words: Mapping[str, Sequence[tuple[str, int]]]
) -> str:
    """The page; plots show each text as a line over the size of the vocabulary."""
    plots = {
        "Sequence length: tokens per document": "sequence_length",
        "Bytes per token": "bytes_per_token",
        "Tokens per word": "fertility",
        "Unknown tokens": "unknown_rate",
    }
    charts = [(title, _chart(title, measures, name)) for title, name in plots.items()]
    return fill_page(
        Path(__file__).with_name("page.html"),
        measures=measures,
        worst=worst,
        words=words,
        charts=charts,
        size=human_bytes,
        most=max((found.bytes_per_token for found in measures), default=1.0),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _chart(title: str, measures: Sequence[Measures], name: str) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for found in sorted(measures, key=lambda found: found.vocab_size):
        series.setdefault(found.text, []).append((found.vocab_size, getattr(found, name)))
    return line_chart(title, series, "vocabulary")
