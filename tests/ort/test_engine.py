from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmctl.engine import EngineOptions, Request
from llmctl.errors import UsageError
from llmctl.generator import Generator, Sampling
from llmctl.ort import OrtGenerator
from llmctl.ort import generator as ort_generator
from llmctl.ort.cache import InPlaceRows
from llmctl.ort.generator import run_all
from llmctl.ort.slots import Slots

RANDOM = np.random.default_rng(3)
PROMPTS = [RANDOM.integers(3, 97, int(n)).tolist() for n in RANDOM.integers(1, 30, 20)]


def hf_logits(hf, tokens: list[int]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return hf(torch.tensor([tokens])).logits[0].numpy()


def test_is_a_generator(generator: OrtGenerator) -> None:
    assert isinstance(generator, Generator)
    assert (generator.context_length, generator.vocab_size, generator.eos_ids) == (96, 97, {1})
    assert generator.backend == "onnxruntime CPUExecutionProvider"


def test_greedy_equals_transformers_on_a_left_padded_batch(generator: OrtGenerator, hf) -> None:
    import torch

    width = max(map(len, PROMPTS))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=2)[:, width:]
    expected = [row[: row.index(1)] if 1 in row else row for row in out.tolist()]
    assert any(len(row) < 40 for row in expected), "the test should see answers that end early"
    sampling = Sampling(max_new_tokens=40)
    assert generator.generate(PROMPTS, sampling) == expected
    assert [list(generator.stream(prompt, sampling)) for prompt in PROMPTS] == expected


@pytest.mark.parametrize("batch", [1, 2])
def test_the_last_logits_alone_are_those_of_all(generator: OrtGenerator, batch: int) -> None:
    assert generator.layout.keeps_last
    prompt = np.random.default_rng(5).integers(3, 97, 7).tolist()
    rows = generator.rows(batch, 32)
    every = rows.feed(batch - 1, prompt).copy()
    step = rows.step([5] * batch).copy()
    rows.restart()
    last = rows.feed(batch - 1, prompt, last=True)
    assert (every.shape, last.shape) == ((7, 97), (1, 97))
    np.testing.assert_allclose(last, every[-1:], atol=1e-5)
    # A step that follows has its own number of logits.
    np.testing.assert_allclose(rows.step([5] * batch)[batch - 1], step[batch - 1], atol=1e-5)
    slots = Slots(generator.session, generator.layout, 2, 32)
    ids = np.array(prompt, np.int32)
    np.testing.assert_allclose(slots.feed(1, ids), every, atol=1e-5)
    slots.lengths[1] = 0
    found = slots.feed(1, ids, last=True)
    assert found.shape == (1, 97)
    np.testing.assert_allclose(found, every[-1:], atol=1e-5)
    slots.close()


def test_a_prompt_is_read_without_the_logits_that_nobody_needs(generator: OrtGenerator) -> None:
    engine = generator.engine(EngineOptions(slots=2, prefill_tokens=16))
    prompt = np.random.default_rng(6).integers(3, 97, 40).tolist()
    engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=2)))
    while engine.busy:
        engine.step()
    assert len(engine._slots._scratch) == 1
    engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=2), prompt_logprobs=0))
    while engine.busy:
        engine.step()
    assert len(engine._slots._scratch) == 16  # the control: scores of a prompt need all of a chunk
    engine.close()


def test_rows_of_wrong_length_give_other_tokens(generator: OrtGenerator) -> None:
    """The control of the test above: positions that ignore a row's own length are noticed."""
    prompts = [PROMPTS[0][:5], [4] * 9]
    rows = generator.rows(2, 32)
    right = [rows.feed(i, prompt)[-1] for i, prompt in enumerate(prompts)]
    tokens = [int(logits.argmax()) for logits in right]
    good = rows.step(tokens).copy()
    rows.lengths[:] = 9
    assert np.abs(rows.step(tokens)[0] - good[0]).max() > 1e-3


def test_cached_logits_equal_uncached_ones_at_every_step(generator: OrtGenerator, hf) -> None:
    tokens = RANDOM.integers(0, 97, 60).tolist()
    expected = hf_logits(hf, tokens)
    rows = generator.rows(1, 60)
    assert np.abs(rows.feed(0, tokens[:7]) - expected[:7]).max() < 1e-5
    for i, token in enumerate(tokens[7:], start=7):
        assert np.abs(rows.step([token])[0] - expected[i]).max() < 1e-5


def test_prefill_in_chunks_changes_nothing(generator: OrtGenerator, hf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_generator, "PREFILL_CHUNK", 7)
    tokens = RANDOM.integers(0, 97, 96).tolist()
    assert np.abs(generator.logits(tokens) - hf_logits(hf, tokens)).max() < 1e-5
    prompt = tokens[:40]
    assert list(generator.stream(prompt, Sampling(max_new_tokens=1))) == [int(hf_logits(hf, prompt)[-1].argmax())]


def test_the_cache_is_updated_in_place_one_token_at_a_time(generator: OrtGenerator) -> None:
    rows = generator.rows(1, 64)
    assert isinstance(rows, InPlaceRows)
    rows.feed(0, [5, 6, 7])
    addresses = [value.data_ptr() for value in rows.cache]
    before = [value.numpy().copy() for value in rows.cache]
    fed = []
    run = generator.session.run_with_iobinding
    rows.session = type("Spy", (), {"run_with_iobinding": lambda _, b: (fed.append(rows._tokens.shape), run(b))})()
    rows.step([8])
    assert fed == [(1, 1)]
    outputs = dict(zip(["logits", *rows.layout.present], rows._binding.get_outputs(), strict=False))
    bound = sorted(value.data_ptr() for name, value in outputs.items() if value.shape()[1] != 1)
    assert bound == sorted(addresses) == sorted(value.data_ptr() for value in rows.cache)
    for old, value in zip(before, rows.cache, strict=True):
        changed = np.flatnonzero(np.abs(value.numpy() - old).sum(axis=(0, 1, 3)))
        assert changed.tolist() == [3], "exactly one slot is written"


class Counting:
    """A session that notes how many tokens each run was given, by the logits that the graph gave back."""

    def __init__(self, session) -> None:
        self.session, self.fed = session, []

    def __getattr__(self, name: str):
        return getattr(self.session, name)

    def run_with_iobinding(self, binding) -> None:
        self.session.run_with_iobinding(binding)
        (shape,) = [shape for value in binding.get_outputs() if len(shape := value.shape()) == 3]
        self.fed.append(shape[0] * shape[1])


def cached(generator: OrtGenerator, prompt: list[int], new: int) -> list[int]:
    return list(generator.stream(prompt, Sampling(max_new_tokens=new)))


def batched(generator: OrtGenerator, prompt: list[int], new: int) -> list[int]:
    return run_all(
        generator.engine(EngineOptions(slots=1, context=96)),
        [Request(prompt=prompt, sampling=Sampling(max_new_tokens=new))],
    )[0]


def recomputing(generator: OrtGenerator, prompt: list[int], new: int) -> list[int]:
    """The twin without a cache: greedy decoding that reads the whole prefix at every step."""
    rows, prefix = generator.rows(1, 96), list(prompt)
    for _ in range(new):
        rows.restart()
        prefix.append(int(rows.feed(0, prefix)[-1].argmax()))
    return prefix[len(prompt) :]


@pytest.mark.parametrize(
    ("decode", "fed"),
    [(cached, [9] + [1] * 19), (batched, [9] + [1] * 19), (recomputing, [*range(9, 29)])],
)
def test_a_step_feeds_one_token_and_the_twin_without_a_cache_the_whole_prefix(
    generator: OrtGenerator, hf, monkeypatch: pytest.MonkeyPatch, decode, fed
) -> None:
    """All say what transformers says; only the twin pays for the prefix again."""
    prompt, expected = [5, 6, 7, 8, 9, 10, 11, 12, 13], []
    for _ in range(20):
        expected.append(int(hf_logits(hf, prompt + expected)[-1].argmax()))
    counting = Counting(generator.session)
    monkeypatch.setattr(generator, "session", counting)
    # The logits of all tokens tell how many were given.
    monkeypatch.setattr(generator, "layout", replace(generator.layout, keeps_last=False))
    monkeypatch.setattr(generator, "_idle", None)
    assert decode(generator, prompt, 20) == expected
    assert counting.fed == fed


def test_logprobs_are_those_of_the_softmax(generator: OrtGenerator, hf) -> None:
    from scipy.special import log_softmax

    tokens = PROMPTS[0] + PROMPTS[1]
    expected = log_softmax(hf_logits(hf, tokens).astype(np.float64), axis=1)
    got = generator.logprobs(tokens)
    assert got.dtype == np.float32
    assert np.abs(got - expected[np.arange(len(tokens) - 1), tokens[1:]]).max() < 1e-5
    assert generator.logprobs([5]).shape == (0,)


def test_batches_equal_single_runs_when_sampling(generator: OrtGenerator) -> None:
    sampling = Sampling(max_new_tokens=25, temperature=1.0, top_k=20, top_p=0.9, seed=7)
    together = generator.generate(PROMPTS, sampling)
    assert together == [list(generator.stream(prompt, sampling)) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in together}) > 10
    assert generator.generate(PROMPTS[:3], Sampling(max_new_tokens=25, temperature=1.0, seed=8)) != together[:3]


def test_generation_ends_at_the_context(generator: OrtGenerator) -> None:
    generator.eos_ids = frozenset()
    prompt = RANDOM.integers(0, 97, 90).tolist()
    assert len(list(generator.stream(prompt, Sampling(max_new_tokens=50)))) == 6
    assert [len(x) for x in generator.generate([prompt, prompt[:80]], Sampling(max_new_tokens=10))] == [6, 10]


def test_an_eos_ends_the_answer_and_is_not_part_of_it(generator: OrtGenerator) -> None:
    generator.eos_ids = frozenset()
    answer = list(generator.stream(PROMPTS[2], Sampling(max_new_tokens=12)))
    generator.eos_ids = frozenset({answer[5]})
    cut = answer[: answer.index(answer[5])]
    assert list(generator.stream(PROMPTS[2], Sampling(max_new_tokens=12))) == cut
    assert generator.generate([PROMPTS[2], PROMPTS[3]], Sampling(max_new_tokens=12))[0] == cut


def test_streams_that_take_turns_do_not_disturb_each_other(generator: OrtGenerator) -> None:
    sampling = Sampling(max_new_tokens=10)
    alone = [list(generator.stream(prompt, sampling)) for prompt in PROMPTS[:2]]
    first, second = (generator.stream(prompt, sampling) for prompt in PROMPTS[:2])
    taken: list[list[int]] = [[], []]
    for _ in range(10):
        for stream, tokens in zip((first, second), taken, strict=True):
            tokens += [token for token in [next(stream, None)] if token is not None]
    assert taken == alone


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.stream([]), "the prompt is empty"),
        (lambda g: g.stream([3] * 96), "the prompt has 96 tokens, the model's context is 96"),
        (lambda g: g.generate([[3], [97]]), "token id 97 is outside the model's vocabulary of 97"),
        (lambda g: g.stream([-1]), "token id -1 is outside"),
        (lambda g: g.logits([]), "0 tokens cannot be scored"),
        (lambda g: g.logprobs([3] * 97), "97 tokens cannot be scored"),
    ],
)
def test_prompts_that_cannot_be_answered(generator: OrtGenerator, call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call(generator)
    assert caught.value.hint


def test_needs_no_torch(bundle: Path) -> None:
    code = """
        import sys
        for name in ("torch", "transformers", "onnx", "optimum", "onnx_ir"):
            sys.modules[name] = None  # importing any of them now fails
        from pathlib import Path
        from llmctl import Artifact
        from llmctl_export_onnx import open_generator
        from llmctl.generator import Sampling
        bundle = Artifact(Path(sys.argv[1]), "model.onnx")
        generator = open_generator(bundle, {"device": "cpu", "threads": 1})
        print(len(list(generator.stream([5, 6], Sampling(max_new_tokens=4, temperature=1.0, seed=0)))))
        assert open_generator(Artifact(Path(sys.argv[1]), "model.hf"), {}) is None
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(bundle)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
