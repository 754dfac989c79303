"""Generation with an encoder-decoder: random T5s of transformers against its own `generate`, token for token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from llmctl.errors import UsageError
from llmctl.generation_config import rules_of
from llmctl.generator import Generator, Sampling
from llmctl.nn.attention import Memory
from llmctl.train.generate import TorchGenerator, open_model

VOCAB, PAD, EOS = 10, 0, 1
FAMILIES = {"t5": {}, "t5v1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}}
BEAMS = [
    Sampling(max_new_tokens=10, beams=4, n=4, length_penalty=penalty, early_stopping=early)
    for penalty in (0.0, 1.0, 2.0)
    for early in (True, False)
]


def fresh(family: str) -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,  # of both stacks: transformers 4.57 sizes its cache by the encoder's
        num_heads=4,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
        **FAMILIES[family],
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TorchGenerator]:
    theirs = fresh(request.param)
    with torch.no_grad():  # as initialised, all answers are alike; these are flat and yet mind the source
        for name, parameter in theirs.named_parameters():
            if "Attention" in name or "DenseReluDense" in name:
                parameter.normal_(0, 0.35 if "Attention" in name else 0.3)
        theirs.shared.weight.normal_(0, 0.4)
        if request.param != "t5":
            theirs.lm_head.weight.normal_(0, 0.3)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    return theirs, open_model(directory, "cpu")


@pytest.fixture(scope="module")
def sources() -> list[list[int]]:
    torch.manual_seed(1)
    return [[*torch.randint(2, VOCAB, (size,)).tolist(), EOS] for size in (3, 7, 1, 12, 5, 5, 9, 2, 4, 6)]


def theirs_say(model: Any, source: list[int], **options: Any) -> list[tuple[list[int], bool]]:
    tokens = torch.tensor([source])
    rows = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, 1:].tolist()
    return [(row[: row.index(EOS)], True) if EOS in row else (row, False) for row in rows]


def said(generator: Generator, source: list[int], sampling: Sampling) -> list[tuple[list[int], bool]]:
    return [(one.ids, one.ended) for one in generator.candidates(source, sampling)]


def test_greedy_is_that_of_transformers_alone_and_in_a_padded_batch(pair, sources) -> None:
    theirs, ours = pair
    assert isinstance(ours, Generator)
    greedy = Sampling(max_new_tokens=15)
    expected = [theirs_say(theirs, source, max_new_tokens=15, do_sample=False)[0] for source in sources]
    assert len({tuple(ids) for ids, _ in expected}) > 5, "the answers must depend on the source"
    assert [said(ours, source, greedy)[0] for source in sources] == expected
    assert [list(ours.stream(source, greedy)) for source in sources] == [ids for ids, _ in expected]
    assert ours.generate(sources, greedy) == [ids for ids, _ in expected]


def test_padding_that_is_seen_is_noticed(pair, sources, monkeypatch) -> None:
    _, ours = pair
    right = ours.generate(sources, Sampling(max_new_tokens=15))
    remember = type(ours.model).remember
    monkeypatch.setattr(type(ours.model), "remember", lambda self, source, documents=None: remember(self, source))
    assert ours.generate(sources, Sampling(max_new_tokens=15)) != right


def test_beams_are_those_of_transformers(pair, sources) -> None:
    theirs, ours = pair
    ended = 0
    for source in sources:
        for sampling in BEAMS:
            expected = theirs_say(
                theirs,
                source,
                do_sample=False,
                num_beams=4,
                num_return_sequences=4,
                max_new_tokens=10,
                length_penalty=sampling.length_penalty,
                early_stopping=sampling.early_stopping,
            )
            assert said(ours, source, sampling) == expected
            ended += expected[0][1]
    assert 0 < ended < len(sources) * len(BEAMS)


def test_a_memory_that_is_not_reordered_is_noticed(pair, sources, monkeypatch) -> None:
    """Ending on many tokens drops rows on the way; the memory of a source must leave with its row."""
    eager = TorchGenerator(pair[1].model, (1, 2, 4, 7))
    expected = [list(eager.stream(source, Sampling(max_new_tokens=15))) for source in sources]
    assert len({len(answer) for answer in expected}) > 2
    assert eager.generate(sources, Sampling(max_new_tokens=15)) == expected
    monkeypatch.setattr(Memory, "select", lambda self, rows: _first(self, len(rows)))
    assert eager.generate(sources, Sampling(max_new_tokens=15)) != expected


def _first(memory: Memory, count: int) -> None:
    memory.keys = [keys[:count] for keys in memory.keys]
    memory.values = [values[:count] for values in memory.values]
    memory.documents = None if memory.documents is None else memory.documents[:count]


def test_sampling_is_that_of_transformers_under_one_seed(pair, sources) -> None:
    theirs, ours = pair
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 6, "top_p": 0.9}
    for seed, source in enumerate(sources):
        torch.manual_seed(seed)
        expected = theirs_say(theirs, source, do_sample=True, **options)
        assert said(ours, source, Sampling(seed=seed, **options)) == expected


def test_penalties_count_what_the_decoder_is_given_as_in_transformers(pair, sources) -> None:
    theirs, ours = pair
    options = {"max_new_tokens": 12, "temperature": 0.8, "min_p": 0.1, "top_k": 0, "repetition_penalty": 1.6}
    for seed, source in enumerate(sources):
        torch.manual_seed(seed)
        expected = theirs_say(theirs, source, do_sample=True, **options)
        assert said(ours, source, Sampling(seed=seed, **options)) == expected


def test_a_models_rules_are_kept_to_as_in_transformers(pair, sources) -> None:
    theirs, ours = pair
    options = {"forced_bos_token_id": 7, "forced_eos_token_id": EOS, "bad_words_ids": [[PAD], [7, 4]]}
    options |= {"no_repeat_ngram_size": 2, "min_length": 5, "begin_suppress_tokens": [5], "suppress_tokens": [9]}
    rules = rules_of(options)
    for source in sources:
        greedy = Sampling(max_new_tokens=10, rules=rules)
        expected = theirs_say(theirs, source, max_new_tokens=10, do_sample=False, **options)
        assert said(ours, source, greedy) == expected
        assert list(ours.stream(source, greedy)) == expected[0][0]
        beams = Sampling(max_new_tokens=10, beams=2, n=2, rules=rules)
        more = {"do_sample": False, "num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 10}
        assert said(ours, source, beams) == theirs_say(theirs, source, **more, **options)
    with_rules = ours.generate(sources, Sampling(max_new_tokens=10, rules=rules))
    assert with_rules == [list(ours.stream(source, Sampling(max_new_tokens=10, rules=rules))) for source in sources]


def test_the_encoder_runs_once_for_all_draws_and_steps(pair, sources, monkeypatch) -> None:
    _, ours = pair
    runs = []
    encode = type(ours.model).encode
    monkeypatch.setattr(type(ours.model), "encode", lambda self, *given: (runs.append(1), encode(self, *given))[1])
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=5, n=6)
    together = said(ours, sources[0], sampling)
    assert len(runs) == 1
    assert together == [said(ours, sources[0], replace(sampling, n=1, seed=5 + i))[0] for i in range(6)]
    assert len({tuple(ids) for ids, _ in together}) > 1
    assert len(runs) == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_decoder(family: str, sources, tmp_path) -> None:
    """With weights as initialised: T5 does not scale its scores, so on those of `pair` float32 itself is off by 3e-5
    from float64, transformers' as ours."""
    theirs = fresh(family)
    theirs.save_pretrained(tmp_path)
    ours = open_model(tmp_path, "cpu")
    for one in ours.candidates(sources[3], BEAMS[2]):
        answer = [*one.ids, *([EOS] if one.ended else [])]
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([sources[3]]), labels=torch.tensor([answer])).logits[0]
        scores = logits.log_softmax(-1)[range(len(answer)), answer]
        assert one.logprobs == pytest.approx(scores.tolist(), abs=1e-5)
        torch.testing.assert_close(torch.from_numpy(ours.answer_logits(sources[3], answer)), logits, rtol=0, atol=1e-5)
    assert ours.answer_logits(sources[3], []).shape == (0, VOCAB)


def test_what_an_encoder_decoder_cannot_do_is_said(pair) -> None:
    _, ours = pair
    assert (ours.encoder_decoder, ours.context_length, ours.room([5] * 512)) == (True, 512, 511)
    with pytest.raises(UsageError, match="513 tokens, the model's context is 512"):
        ours.room([5] * 513)
    for call in (ours.logits, ours.logprobs):
        with pytest.raises(UsageError, match="scores an answer to a text"):
            call([5, 6])
