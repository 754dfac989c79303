"""The torch generator against transformers' `generate`, token for token."""

from __future__ import annotations

import copy
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llmctl.errors import MachineError, UsageError  # noqa: E402
from llmctl.generator import Generator, Sampling  # noqa: E402
from llmctl.nn.hf import load_model  # noqa: E402
from llmctl.registry import get_registry  # noqa: E402
from llmctl.stage import Artifact  # noqa: E402
from llmctl.train import generate  # noqa: E402
from llmctl.train import sampling as draws  # noqa: E402
from llmctl.train.generate import TorchGenerator, open_model  # noqa: E402
from llmctl.train.sampling import filtered  # noqa: E402

VOCAB, EOS, PAD = 97, 3, 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random Llama, flat enough that a wrong order of the filters changes tokens, and ours with its weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    directory = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(directory)
    return theirs, TorchGenerator(load_model(directory)), directory


@pytest.fixture
def prompts() -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(4, VOCAB, size=n).tolist() for n in random.integers(1, 12, size=20)]


def cut(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids


def hf_tokens(model, prompt: list[int], **options) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), **options
    )
    return cut(output[0, len(prompt) :].tolist())


def test_is_a_generator(pair):
    _, ours, _ = pair
    assert isinstance(ours, Generator)
    assert (ours.context_length, ours.vocab_size, ours.eos_ids) == (64, VOCAB, {EOS})
    assert ours.backend == "torch cpu float32"


def test_greedy_is_token_identical_alone_and_in_a_batch(pair, prompts):
    theirs, ours, _ = pair
    sampling = Sampling(max_new_tokens=24)
    expected = [hf_tokens(theirs, prompt, max_new_tokens=24, do_sample=False) for prompt in prompts]
    assert [list(ours.stream(prompt, sampling)) for prompt in prompts] == expected
    assert ours.generate(prompts, sampling) == expected
    # transformers' own batch of 20 left-padded prompts.
    longest = max(map(len, prompts))
    tokens = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    batch = theirs.generate(tokens, attention_mask=mask, max_new_tokens=24, do_sample=False)[:, longest:]
    assert [cut(row.tolist()) for row in batch] == expected


def test_a_batch_ends_some_rows_early_and_splits_when_the_cache_is_small(pair, prompts, monkeypatch):
    _, ours, _ = pair
    # Ending on a third of the vocabulary gives answers of many lengths, so rows are dropped on the way.
    eager = TorchGenerator(ours.model, range(60, VOCAB))
    expected = [list(eager.stream(prompt, Sampling(max_new_tokens=30))) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 3
    assert [] in expected
    assert eager.generate(prompts, Sampling(max_new_tokens=30)) == expected
    monkeypatch.setattr(generate, "CACHE_BYTES", 50_000)
    assert 1 <= eager._rows(40) < len(prompts)
    assert eager.generate(prompts, Sampling(max_new_tokens=30)) == expected
    assert eager.generate([]) == []


SAMPLING = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}


CONTROLS = {
    "filters": SAMPLING,
    "min-p": {"temperature": 1.2, "min_p": 0.3},
    "all filters": {**SAMPLING, "min_p": 0.2},
    "repetition": {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.4},
    "rewarded repetition": {"temperature": 1.0, "repetition_penalty": 0.6},
    "bias": {
        "temperature": 0.9,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "logit_bias": ((40, 2.5), (41, -3.0), (42, 2.0)),
    },
}


def theirs_of(options: dict) -> dict:
    """Our options as transformers calls them, with nothing left to its defaults."""
    plain = {"top_k": 0, **{name: value for name, value in options.items() if name != "logit_bias"}}
    bias = {(token,): value for token, value in options.get("logit_bias", ())}
    return {**plain, **({"sequence_bias": bias} if bias else {})}


@pytest.mark.parametrize("name", CONTROLS)
def test_sampling_is_token_identical_to_transformers(name, pair, prompts):
    theirs, ours, _ = pair
    options = CONTROLS[name]
    for seed, prompt in enumerate(prompts):
        torch.manual_seed(seed)
        expected = hf_tokens(theirs, prompt, max_new_tokens=20, do_sample=True, **theirs_of(options))
        assert list(ours.stream(prompt, Sampling(max_new_tokens=20, seed=seed, **options))) == expected


def test_greedy_with_a_penalty_is_token_identical_to_transformers(pair, prompts):
    theirs, ours, _ = pair
    sampling = Sampling(max_new_tokens=24, repetition_penalty=1.5, logit_bias=((50, 1.0),))
    options = {"repetition_penalty": 1.5, "sequence_bias": {(50,): 1.0}}
    expected = [hf_tokens(theirs, prompt, max_new_tokens=24, do_sample=False, **options) for prompt in prompts]
    assert ours.generate(prompts, sampling) == expected
    assert ours.generate(prompts, Sampling(max_new_tokens=24)) != expected
    with pytest.raises(UsageError, match="logit_bias names token 97, the model's vocabulary has 97"):
        ours.stream(prompts[0], Sampling(logit_bias=((97, 1.0),)))


def _prompt_uncounted(self, scores):
    return ADJUSTED(_with(self, prompt=frozenset()), scores)


def _bias_last(self, scores):
    plain = _with(self, sampling=replace(self.sampling, logit_bias=()))
    return ADJUSTED(_with(self, sampling=Sampling(logit_bias=self.sampling.logit_bias)), ADJUSTED(plain, scores))


def _divided_always(self, scores):
    seen = list(self.prompt | self.said.keys())
    scores = ADJUSTED(_with(self, sampling=replace(self.sampling, repetition_penalty=1.0)), scores)
    scores[seen] /= self.sampling.repetition_penalty
    return scores


def _each_time(self, scores):
    for token, count in self.said.items():
        for _ in range(count - 1):
            scores = ADJUSTED(_with(self, prompt=frozenset([token]), said=Counter()), scores)
    return ADJUSTED(self, scores)


ADJUSTED = draws.Sampler.adjusted


def _with(sampler, **changed):
    other = copy.copy(sampler)
    for name, value in changed.items():
        setattr(other, name, value)
    return other


@pytest.mark.parametrize("fault", [_prompt_uncounted, _bias_last, _divided_always, _each_time])
def test_a_wrong_penalty_is_noticed(fault, pair, prompts, monkeypatch):
    theirs, ours, _ = pair
    options = CONTROLS["bias"] if fault is _bias_last else CONTROLS["rewarded repetition"]
    monkeypatch.setattr(draws.Sampler, "adjusted", fault)
    equal = 0
    for seed, prompt in enumerate(prompts):
        torch.manual_seed(seed)
        expected = hf_tokens(theirs, prompt, max_new_tokens=20, do_sample=True, **theirs_of(options))
        equal += list(ours.stream(prompt, Sampling(max_new_tokens=20, seed=seed, **options))) == expected
    assert equal < len(prompts)


def _late_temperature(logits, s):
    return filtered(logits, Sampling(temperature=1.0, top_k=s.top_k, top_p=s.top_p)) / s.temperature


def _top_p_first(logits, s):
    nucleus = filtered(logits, Sampling(temperature=s.temperature, top_p=s.top_p)) * s.temperature
    return filtered(nucleus.clamp(min=-1e30), Sampling(temperature=s.temperature, top_k=s.top_k))


def _without_crossing(logits, s):
    scores = filtered(logits, Sampling(temperature=s.temperature, top_k=s.top_k))
    descending, order = scores.sort(descending=True)
    cut = descending.softmax(-1).cumsum(-1) > s.top_p
    cut[0] = False
    return scores.masked_fill(cut.scatter(0, order, cut), -torch.inf)


def _one_too_many(logits, s):
    return filtered(logits, Sampling(temperature=s.temperature, top_k=s.top_k + 1, top_p=s.top_p))


@pytest.mark.parametrize("fault", [_late_temperature, _top_p_first, _without_crossing, _one_too_many])
def test_a_wrong_filter_is_noticed(fault, pair, prompts, monkeypatch):
    theirs, ours, _ = pair
    monkeypatch.setattr(draws, "filtered", fault)
    equal = 0
    for seed, prompt in enumerate(prompts):
        torch.manual_seed(seed)
        expected = hf_tokens(theirs, prompt, max_new_tokens=20, do_sample=True, **SAMPLING)
        equal += list(ours.stream(prompt, Sampling(max_new_tokens=20, seed=seed, **SAMPLING))) == expected
    assert equal < len(prompts)


def test_sampled_batches_equal_streams_and_seeds_matter(pair, prompts):
    _, ours, _ = pair
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=4)
    assert ours.generate(prompts, sampling) == [list(ours.stream(prompt, sampling)) for prompt in prompts]
    draw = Sampling(max_new_tokens=12, temperature=1.0)
    drawn = {tuple(ours.stream(prompts[0], draw)) for _ in range(5)}
    assert len(drawn) > 1  # two alone may both end at once


def test_answers_have_samplings_of_their_own_and_say_how_they_ended(pair, prompts):
    _, ours, _ = pair
    samplings = [Sampling(max_new_tokens=4 + n, temperature=1.0, seed=n) for n in range(len(prompts))]
    samplings[1] = Sampling(max_new_tokens=5, beams=2)
    found = ours.answers(prompts, samplings)
    for prompt, sampling, answer in zip(prompts, samplings, found, strict=True):
        stream = ours.stream(prompt, sampling)
        ids: list[int] = []
        while True:
            try:
                ids.append(next(stream))
            except StopIteration as stop:
                assert (answer.ids, answer.end, answer.ended) == (ids, stop.value, stop.value is not None)
                break
    # The control: one seed for all gives something else.
    assert [answer.ids for answer in found] != ours.generate(prompts, samplings[0])


def test_logits_and_logprobs_equal_transformers(pair, prompts):
    theirs, ours, _ = pair
    tokens = prompts[3] + prompts[4]
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    np.testing.assert_allclose(ours.logits(tokens), expected.numpy(), rtol=0, atol=1e-5)
    truth = expected.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
    logprobs = ours.logprobs(tokens)
    assert (logprobs.shape, logprobs.dtype) == ((len(tokens) - 1,), np.float32)
    np.testing.assert_allclose(logprobs, truth.numpy(), rtol=0, atol=1e-5)
    assert ours.logprobs(tokens[:1]).shape == (0,)


def test_ends_at_the_context(pair):
    _, ours, _ = pair
    endless = TorchGenerator(ours.model, ())
    for length in (60, 63):
        prompt = [5] * length
        answer = list(endless.stream(prompt, Sampling(max_new_tokens=100)))
        assert len(prompt) + len(answer) == 64
        assert endless.generate([prompt, [9]], Sampling(max_new_tokens=100)) == [
            answer,
            list(endless.stream([9], Sampling(max_new_tokens=100))),
        ]
    assert len(list(endless.stream([5], Sampling(max_new_tokens=7)))) == 7


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt is empty"), ([5] * 64, "64 tokens, the model's context is 64"), ([5, VOCAB], "outside the model's")],
)
def test_bad_prompts_are_refused_at_the_call(prompt, message, pair):
    _, ours, _ = pair
    with pytest.raises(UsageError, match=message):
        ours.stream(prompt)
    with pytest.raises(UsageError, match=message):
        ours.generate([[5], prompt])


def test_streaming_leaves_gradients_on_in_the_caller(pair):
    _, ours, _ = pair
    stream = ours.stream([5, 6])
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    ours.model(torch.tensor([[5, 6]])).sum().backward()  # between two tokens, as online RL does
    next(stream)


def test_the_registry_opens_model_directories(pair, monkeypatch):
    _, ours, directory = pair
    opened = get_registry().open_generator(Artifact(directory, "model.hf"), device="cpu", threads=1)
    assert opened.generate([[5, 6]], Sampling(max_new_tokens=5)) == ours.generate([[5, 6]], Sampling(max_new_tokens=5))
    assert open_model(directory, "cpu", dtype="bf16").backend == "torch cpu bfloat16"
    with pytest.raises(UsageError, match="unknown dtype 'int3'"):
        open_model(directory, "cpu", dtype="int3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="no CUDA device"):
        open_model(directory, "cuda")
