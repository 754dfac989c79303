"""The quickstart as users run it, against the acceptance limits, beside sabotaged twins that must miss them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quickstart.py"


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What `benchmarks/quickstart.py` measures for one seed, about eight minutes on two cores."""
    spec = importlib.util.spec_from_file_location("quickstart_benchmark", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.measure(1, tmp_path_factory.mktemp("quickstart"))


LIMITS = [
    ("eval-base: perplexity.nats_below_bigram", 0.3, None),
    ("eval-base: exact_match.value", None, 0.05),
    ("eval-sft: exact_match.value", 0.6, None),
    ("eval-dpo: ranking.rise_low", 0.0, None),
    ("prune: parameters.removed", 0.25, None),
    ("onnx: parity.max_abs_diff", None, 1e-4),
    ("onnx: parity.greedy_equal", 20, None),
    ("int8: bits_per_byte.ratio", None, 1.01),
    ("int8: bytes.ratio", None, 0.30),
    ("int4: bits_per_byte.ratio", None, 1.05),
    ("rag: recall@5.source", 0.9, None),
    ("rag: citations.resolved", 1, None),
    ("rag: refusal.value", 0.9, None),
    ("largest process, MiB", None, 6 * 1024),
    ("second run, seconds", None, 2),
    ("shuffled answers: exact_match.value", None, 0.10),
    ("swapped preferences: ranking.rise", None, 0.0),
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "low", "high"), LIMITS, ids=lambda value: str(value))
def test_a_figure_keeps_its_limit(name, low, high, figures):
    value = figures[name]
    assert low is None or value >= low, f"{name} is {value}"
    assert high is None or value <= high, f"{name} is {value}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_distilled_model_keeps_what_was_learned_and_random_pruning_keeps_less(figures):
    kept = figures["eval-distill: exact_match.value"]
    assert kept >= 0.9 * figures["eval-sft: exact_match.value"]
    assert kept > figures["random pruning: exact_match.value"]
