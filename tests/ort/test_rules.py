"""The rules of a generation_config.json on logits: those of transformers' own list of processors, in its order."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.ort import sampling as batch
from llmctl.ort.history import adjust
from llmctl.ort.speculation import follow
from llmctl.rules import Rules, RuleState

VOCAB, EOS = 8, frozenset({2, 5})
TOKENS = st.integers(0, VOCAB - 1)
RULES = st.builds(
    Rules,
    no_repeat_ngram_size=st.integers(0, 4),
    bad_words_ids=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    min_length=st.integers(0, 7),
    min_new_tokens=st.integers(0, 4),
    forced_bos_token_id=st.none() | TOKENS,
    forced_eos_token_id=st.lists(TOKENS, max_size=2, unique=True).map(tuple),
    suppress_tokens=st.lists(TOKENS, max_size=3).map(tuple),
    begin_suppress_tokens=st.lists(TOKENS, max_size=3).map(tuple),
)


def theirs(rules: Rules, prompt: list[int], said: list[int], limit: int, logits: np.ndarray) -> np.ndarray:
    """What transformers' processors make of `logits (V,)`."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig
    from transformers.generation import GenerationMixin

    words = [list(word) for word in rules.bad_words_ids if not (len(word) == 1 and word[0] in EOS)]
    config = GenerationConfig(
        no_repeat_ngram_size=rules.no_repeat_ngram_size,
        bad_words_ids=words or None,  # transformers refuses a list that names nothing but ends
        min_length=rules.min_length,
        min_new_tokens=rules.min_new_tokens,
        forced_bos_token_id=rules.forced_bos_token_id,
        forced_eos_token_id=list(rules.forced_eos_token_id) or None,
        suppress_tokens=list(rules.suppress_tokens) or None,
        begin_suppress_tokens=list(rules.begin_suppress_tokens) or None,
        max_length=len(prompt) + limit,
    )
    config._eos_token_tensor = torch.tensor(sorted(EOS))
    mixin = SimpleNamespace(_merge_criteria_processor_list=lambda ours, custom: ours)
    found = GenerationMixin._get_logits_processor(mixin, config, input_ids_seq_length=len(prompt), device="cpu")
    scores: Any = found(torch.tensor([prompt + said]), torch.from_numpy(logits[None].copy()))
    return scores[0].numpy()


@settings(max_examples=400, deadline=None)
@given(
    rules=RULES,
    prompt=st.lists(TOKENS, min_size=1, max_size=6),
    said=st.lists(TOKENS, max_size=5),
    more=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_rule_is_that_of_transformers(rules: Rules, prompt, said, more: int, seed: int) -> None:
    import torch

    from llmctl.train.sampling import Sampler

    logits = np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)
    limit = len(said) + more
    expected = theirs(rules, prompt, said, limit, logits)
    state = batch.state(Sampling(rules=rules), prompt, VOCAB, None, EOS, limit)
    sampler = Sampler(Sampling(rules=rules), "cpu", prompt, None, EOS, limit, VOCAB)
    assert not state.plain
    for token in said:
        state.accept(token)
        sampler.accept(token)
    adjusted = logits[None].copy()
    adjust(adjusted, [0], [state.copy()])
    assert adjusted[0].tolist() == expected.tolist()
    assert sampler.copy().adjusted(torch.from_numpy(logits)).tolist() == expected.tolist()


def test_without_rules_an_answer_is_plain() -> None:
    assert batch.state(Sampling(), [1], VOCAB).plain
    assert batch.state(Sampling(), [1], VOCAB).rules is None


@settings(max_examples=60, deadline=None)
@given(rules=RULES, draft=st.lists(TOKENS, max_size=5), temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 9))
def test_a_draft_changes_no_token(rules: Rules, draft, temperature: float, seed: int) -> None:
    rules = replace(rules, no_repeat_ngram_size=rules.no_repeat_ngram_size and 4, suppress_tokens=())
    logits = np.random.default_rng(seed).normal(0, 2, (len(draft) + 1, VOCAB)).astype(np.float32)
    sampling = Sampling(rules=rules, temperature=temperature, seed=seed)
    alone, judged = (batch.state(sampling, [1, 3], VOCAB, None, EOS, 6) for _ in range(2))
    try:
        single = [int(batch.choose(row[None], [alone])[0]) for row in logits]
    except UsageError:  # a rule of so few tokens may leave none
        return
    found = follow(logits, draft, judged, EOS)
    assert found == single[: len(found)]
    assert len(found) == len(logits) or found[-1] in EOS or found[-1] != draft[len(found) - 1]


class Only:
    """A constraint: one token, again and again."""

    def __init__(self, token: int) -> None:
        self.token = token

    def mask(self) -> np.ndarray:
        return np.arange(VOCAB) == self.token

    def accept(self, token: int) -> None:
        assert token == self.token

    def copy(self) -> Only:
        return Only(self.token)


def test_the_form_that_was_asked_for_is_stronger_than_bans_and_weaker_than_what_is_forced() -> None:
    rules = Rules(min_new_tokens=9, no_repeat_ngram_size=1, forced_bos_token_id=7, forced_eos_token_id=(2,))
    flat = np.zeros((1, VOCAB), np.float32)
    for token in (2, 4):  # an end that is too early, and a token that repeats itself
        state = batch.state(Sampling(rules=rules), [1], VOCAB, Only(token), EOS, 4)
        assert [int(batch.choose(flat, [state])[0]) for _ in range(4)] == [7, token, token, 2]


def test_what_rules_cannot_do_is_said() -> None:
    flat = np.zeros((2, VOCAB), np.float32)
    none = batch.state(Sampling(rules=Rules(suppress_tokens=tuple(range(VOCAB)))), [1], VOCAB)
    with pytest.raises(UsageError, match="allow no token here"):
        batch.choose(flat[:1], [none])
    failed: dict[int, Exception] = {}
    assert batch.choose(flat, [none, batch.state(Sampling(), [1], VOCAB)], failed)[1] == 0
    assert list(failed) == [0]
    with pytest.raises(UsageError, match="token 8 is to be forced, the model's vocabulary has 8"):
        batch.state(Sampling(rules=Rules(forced_bos_token_id=8)), [1], VOCAB)
    with pytest.raises(UsageError, match="min_length must not be negative"):
        Rules(min_length=-1)
    # Ids that the model does not have cannot be said anyway.
    assert RuleState(Rules(suppress_tokens=(3, 99, -1), bad_words_ids=((99,),)), [1], (), 4, VOCAB).always == (3,)
