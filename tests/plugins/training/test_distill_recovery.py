"""A teacher that lost a layer comes back nearer to itself by its own distributions than by the data alone (slowly)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def distill():
    """benchmarks/distill.py, which finds the anchor beside it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("distill_benchmark", BENCHMARKS / "distill.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def made(distill, tmp_path_factory):
    """A teacher and what pruning left of it, of seed 0."""
    directory = tmp_path_factory.mktemp("recovery")
    return directory, distill.prepare(directory, 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_at_equal_steps_the_divergence_is_below_six_tenths_and_shuffled_it_is_not(distill, made) -> None:
    directory, models = made
    names = ["cross-entropy", "forward KL", "jsd, beta .5", "hidden states", distill.SHUFFLED]
    found = {name: row["kl.validation"] for name, row in distill.measure(directory, models, 0, names).items()}
    bar = 0.6 * found["cross-entropy"]
    assert all(found[name] <= bar for name in names[1:-1]), found
    assert found[distill.SHUFFLED] > bar, found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_student_is_smaller_and_faster(distill, made) -> None:
    directory, models = made
    bundles = [
        distill.anchor.llmctl(directory, "export-onnx", "--model", str(models[name]))["model"]
        for name in ("teacher", "student")
    ]
    teacher, student = distill.speeds(bundles)
    assert student["megabytes"] < 0.8 * teacher["megabytes"]
    assert student["tokens_per_s"] > teacher["tokens_per_s"]
