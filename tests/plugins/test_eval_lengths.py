"""Task `lengths` of `eval`: perplexity by position beyond the context, with and without scaled rotary positions."""

from __future__ import annotations

import json
import math

import pytest

from llmctl import Artifact, InputError, UsageError
from llmctl.testing import run_stage
from llmctl.text.shards import ShardWriter
from llmctl.text.tokenizer import Tokenizer
from llmctl_eval import EVAL

pytest.importorskip("torch")


@pytest.fixture
def data(tmp_path, real_models):
    """Two documents long enough for 300 tokens, one short one."""
    tokenizer = Tokenizer.load(real_models[0].path)
    with ShardWriter(tmp_path / "tokens", vocab_size=262, tokenizer=tokenizer.digest) as writer:
        for text in ("some words that go on " * 20, "short", "and other words, too; " * 20):
            writer.add("validation", tokenizer.encode_document(text), len(text))
    return Artifact(tmp_path / "tokens", "dataset.tokens")


def test_the_curve_and_its_means(tmp_path, real_models, data):
    params = {"tasks": ["lengths"], "scalings": ["yarn", "linear"], "max_length": 300}
    result = run_stage(EVAL, tmp_path / "run", params, model=real_models[0], data=[data])
    metrics = result.metrics
    assert (metrics["lengths.rows"], metrics["lengths.context"]) == (2, 128)
    curves = json.loads((result.outputs["metrics"].path / "lengths.json").read_text())
    assert [curve["name"] for curve in curves] == ["as trained", "yarn x2.34375", "linear x2.34375"]
    for name, curve in zip(("lengths", "lengths.yarn", "lengths.linear"), curves, strict=True):
        behind = [part for part in curve["stretches"] if part["first"] >= 128]
        mean = sum(part["nats"] * part["tokens"] for part in behind) / sum(part["tokens"] for part in behind)
        assert metrics[f"{name}.beyond_nats"] == pytest.approx(mean)
        assert curve["stretches"][-1]["last"] == 299
        assert all(part["perplexity"] == pytest.approx(math.exp(part["nats"])) for part in curve["stretches"])
    assert metrics["lengths.beyond_nats"] != pytest.approx(metrics["lengths.linear.beyond_nats"], abs=1e-4)
    page = (result.outputs["metrics"].path / "lengths.html").read_text()
    assert page.count("<polyline") == 3 and "http" not in page


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"tasks": ["lengths"], "max_length": 5000}, InputError, "no document has 5000 tokens, the longest has 44"),
        ({"scalings": ["yarn"]}, UsageError, "belong to task lengths"),
        ({"max_length": 100}, UsageError, "belong to task lengths"),
    ],
)
def test_what_is_refused(tmp_path, real_models, data, params, error, message):
    with pytest.raises(error, match=message):
        run_stage(EVAL, tmp_path / "run", params, model=real_models[0], data=[data])


def test_an_exported_model_is_refused(tmp_path, real_models, data):
    with pytest.raises(UsageError, match="an exported graph ends at its context"):
        run_stage(EVAL, tmp_path / "run", {"tasks": ["lengths"]}, model=real_models[1], data=[data])
