"""Several draws from one prompt, by both engines: those of single runs, from one prefill; and torch's against peers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llmctl_export_onnx
from llmctl import Artifact
from llmctl.generator import Sampling
from llmctl.ort import generator as ort_engine
from llmctl.ort import open_bundle
from llmctl.ort.cache import InPlaceRows
from llmctl.testing import run_stage
from llmctl.train import generate as torch_engine
from llmctl.train.rows import TorchRows

from .conftest import Flat

VOCAB = 97
SAMPLING = Sampling(max_new_tokens=20, temperature=0.7, top_k=20, top_p=0.9, seed=11, n=6)


@pytest.fixture(scope="module")
def model(flat) -> Flat:
    return flat(VOCAB, 0.1)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    torch.manual_seed(0)
    return [torch.randint(3, VOCAB, (size,)).tolist() for size in (1, 4, 9)]


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_n_draws_equal_n_single_runs_with_following_seeds(engine: str, model: Flat, prompts) -> None:
    generator = model.open(engine)
    # Ending on a fifth of the vocabulary gives answers of many lengths, so rows are held and dropped on the way.
    generator.eos_ids = frozenset(range(0, VOCAB, 5))
    for prompt in prompts:
        found = generator.candidates(prompt, SAMPLING)
        assert [one.ids for one in found] == [
            list(generator.stream(prompt, replace(SAMPLING, n=1, seed=11 + i))) for i in range(6)
        ]
        assert len({tuple(one.ids) for one in found}) > 3
        assert len({len(one.ids) for one in found}) > 1
        for one in found:
            assert one.ended == (len(one.ids) < 20)
            assert len(one.logprobs) == len(one.ids) + one.ended
            assert one.logprobs[: len(one.ids)] == pytest.approx(
                generator.logprobs([*prompt, *one.ids])[len(prompt) - 1 :], abs=1e-5
            )


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_the_seed_after_the_greatest_is_0(engine: str, model: Flat) -> None:
    sampling = replace(SAMPLING, seed=2**63 - 2, n=4)
    assert [one.seed for one in sampling.draws()] == [2**63 - 2, 2**63 - 1, 0, 1]
    generator = model.open(engine)
    last = generator.candidates([5, 6, 7], sampling)[2]
    assert last.ids == list(generator.stream([5, 6, 7], replace(sampling, n=1, seed=0)))


@pytest.mark.parametrize("engine", ["torch", "ort"])
@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(max_new_tokens=8, beams=6, n=6)])
def test_the_prompt_is_run_once(engine: str, sampling: Sampling, model: Flat, monkeypatch) -> None:
    prefills = []
    if engine == "torch":
        run = TorchRows._prefill
        monkeypatch.setattr(TorchRows, "_prefill", lambda self, prompts: (prefills.append(1), run(self, prompts))[1])
    else:
        feed = InPlaceRows.feed
        monkeypatch.setattr(InPlaceRows, "feed", lambda *fed, **how: (prefills.append(1), feed(*fed, **how))[1])
    generator = model.open(engine)
    assert len(generator.candidates([5, 6, 7], sampling)) == 6
    assert len(prefills) == 1
    for i in range(6):  # the control: single runs share nothing
        list(generator.stream([5, 6, 7], replace(sampling, n=1, seed=i)))
    assert len(prefills) == 7


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_more_draws_than_fit_side_by_side(engine: str, model: Flat, monkeypatch) -> None:
    generator = model.open(engine)
    whole = generator.candidates([5, 6], SAMPLING)
    monkeypatch.setattr(torch_engine, "MAX_ROWS", 4)
    monkeypatch.setattr(ort_engine, "BATCH", 4)
    assert [one.ids for one in generator.candidates([5, 6], SAMPLING)] == [one.ids for one in whole]


def test_without_a_seed_draws_differ(model: Flat) -> None:
    for engine in ("torch", "ort"):
        found = model.open(engine).candidates([5, 6], replace(SAMPLING, seed=None))
        assert len({tuple(one.ids) for one in found}) > 1


def test_a_graph_that_concatenates_its_cache_gives_the_same(model: Flat, tmp_path: Path) -> None:
    """Optimum's graphs have no cache in place: their rows are run one by one."""
    pytest.importorskip("optimum.exporters.onnx")
    params = {"exporter": "optimum", "task": "text-generation-with-past", "parity_prompts": 2, "threads": 1}
    exported = run_stage(llmctl_export_onnx.EXPORT_ONNX, tmp_path, params, model=Artifact(model.directory, "model.hf"))
    growing = open_bundle(exported.outputs["model"].path, "cpu", 1)
    assert growing.in_place is False
    in_place = model.open("ort")
    for sampling in (SAMPLING, SAMPLING, Sampling(max_new_tokens=12, beams=4, n=4)):
        found, expected = (generator.candidates([5, 6, 7], sampling) for generator in (growing, in_place))
        assert [one.ids for one in found] == [one.ids for one in expected]
        assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)
        growing.eos_ids = in_place.eos_ids = frozenset(range(0, VOCAB, 5))  # rows end one after the other
