"""A model's own rules by both engines: greedy answers and beams are those of transformers, however they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import llmctl_export_onnx
from llmctl import Artifact
from llmctl.engine import EngineOptions, Request
from llmctl.generation_config import rules_of
from llmctl.generator import Sampling
from llmctl.one_by_one import OneByOne
from llmctl.ort import open_generator
from llmctl.ort.generator import run_all
from llmctl.ort.speculation import Speculation
from llmctl.rules import Rules
from llmctl.testing import run_stage
from llmctl_serve.defaults import default_sampling

from .conftest import EOS, Flat
from .test_beams import prompt_of

VOCAB, NEW = 97, 12
PROMPTS = [prompt_of(seed) * 2 for seed in range(5)]


@pytest.fixture(scope="module")
def model(flat) -> Flat:
    return flat(VOCAB, 0.1)


def says(model: Any, prompt: list[int], **options: Any) -> list[list[int]]:
    """Answers of transformers, without their ends."""
    tokens = torch.tensor([prompt])
    rows = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False, **options
    ).tolist()
    start, end = (1 if model.config.is_encoder_decoder else len(prompt)), model.generation_config.eos_token_id
    return [row[start : row.index(end, start)] if end in row[start:] else row[start:] for row in rows]


@pytest.fixture(scope="module", params=["repetition", "bans", "lengths"])
def asked(request: pytest.FixtureRequest, model: Flat) -> dict[str, Any]:
    """Options of transformers that change what the model would say."""
    plain = [says(model.theirs, prompt)[0] for prompt in PROMPTS]
    return {
        "repetition": {"no_repeat_ngram_size": 2, "min_new_tokens": 6},
        "bans": {
            "bad_words_ids": [[EOS], [plain[0][2]], plain[1][1:3], plain[2][3:6]],
            "suppress_tokens": [plain[3][4]],
            "begin_suppress_tokens": [plain[0][0], plain[4][0]],
        },
        "lengths": {"min_length": 14, "forced_eos_token_id": EOS, "bad_words_ids": [[plain[0][1]]]},
    }[request.param]


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_a_decoder_answers_as_transformers(engine: str, model: Flat, asked: dict[str, Any]) -> None:
    generator, rules = model.open(engine), rules_of(asked)
    greedy = Sampling(max_new_tokens=NEW, rules=rules)
    expected = [says(model.theirs, prompt, **asked)[0] for prompt in PROMPTS]
    assert expected != [says(model.theirs, prompt)[0] for prompt in PROMPTS], "the rules must matter"
    assert [list(generator.stream(prompt, greedy)) for prompt in PROMPTS] == expected
    assert generator.generate(PROMPTS, greedy) == expected
    beams = Sampling(max_new_tokens=NEW, beams=3, n=3, rules=rules)
    for prompt in PROMPTS:
        found = [one.ids for one in generator.candidates(prompt, beams)]
        assert found == says(model.theirs, prompt, num_beams=3, num_return_sequences=3, **asked)


@pytest.mark.parametrize("speculation", ["none", "prompt-lookup"])
def test_requests_side_by_side_keep_to_their_own_rules(
    speculation: str, model: Flat, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache of prefixes, with drafts, and with requests without rules between them."""
    monkeypatch.setattr(Speculation, "pays", lambda *_: True)
    monkeypatch.setattr(Speculation, "_gains", lambda _, lane, count: count > 0)
    generator, rules = model.open("ort"), rules_of(asked)
    draws = Sampling(max_new_tokens=NEW, temperature=0.9, seed=3, rules=rules)
    samplings = [Sampling(max_new_tokens=NEW, rules=rules), Sampling(max_new_tokens=NEW), draws]
    if speculation == "none":
        samplings.append(Sampling(max_new_tokens=NEW, beams=3, rules=rules))
    wanted = [(prompt, one) for prompt in [*PROMPTS, *PROMPTS[:2]] for one in samplings]
    engine = generator.engine(EngineOptions(slots=4, context=64, speculation=speculation))  # type: ignore[arg-type]
    found = run_all(engine, [Request(prompt=prompt, sampling=one) for prompt, one in wanted])
    assert found == [list(generator.stream(prompt, one)) for prompt, one in wanted]
    if speculation != "none":
        assert engine.stats().drafted > 0


@pytest.mark.parametrize("beams", [1, 2])
def test_an_end_is_forced_where_the_context_ends(beams: int, model: Flat) -> None:
    generator, rules = model.open("ort"), Rules(forced_eos_token_id=(EOS,))
    prompt = (PROMPTS[0] * 10)[:60]
    sampling = Sampling(max_new_tokens=NEW, beams=beams, rules=rules)
    answers = [list(generator.stream(prompt, sampling)), list(model.open("torch").stream(prompt, sampling))]
    engine = generator.engine(EngineOptions(slots=2))
    engine.submit(Request(prompt=prompt, sampling=sampling))
    events = []
    while engine.busy:
        events += engine.step()
    answers.append([token for event in events for token in event.tokens])
    assert [len(answer) for answer in answers] == [3] * 3, "of 64 positions one is for the end"
    assert answers[0] == answers[1] == answers[2]
    assert events[-1].finish_reason == "length"


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A Marian whose padding is its likeliest token, as its config forbids it, and its bundle."""
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=VOCAB,
        decoder_vocab_size=VOCAB,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        init_std=0.3,
        pad_token_id=96,
        eos_token_id=0,
        bos_token_id=None,
        decoder_start_token_id=96,
        forced_eos_token_id=0,
    )
    model = transformers.MarianMTModel(config).eval()
    model.final_logits_bias[0, 96] = 30.0
    rules = {"bad_words_ids": [[96], [61, 40]], "forced_bos_token_id": 50, "forced_eos_token_id": 0}
    rules |= {"no_repeat_ngram_size": 2, "min_length": 9, "begin_suppress_tokens": [61], "suppress_tokens": [13]}
    model.generation_config.update(**rules)
    directory = tmp_path_factory.mktemp("marian")
    model.save_pretrained(directory)
    params = {"parity_prompts": 2, "threads": 1}
    exported = run_stage(
        llmctl_export_onnx.EXPORT_ONNX,
        tmp_path_factory.mktemp("export"),
        params,
        model=Artifact(directory, "model.hf"),
    )
    return model, exported.outputs["model"].path


def test_a_translation_is_that_of_transformers(marian: tuple[Any, Path]) -> None:
    model, bundle = marian
    generator, sources = open_generator(bundle, "cpu", 1), [[5, 9, 20, 0], [31, 7, 0], [8, 44, 3, 70, 12, 0]]
    greedy = default_sampling(bundle, max_new_tokens=NEW)
    expected = [says(model, source)[0] for source in sources]
    assert all(answer[0] == 50 and 96 not in answer for answer in expected)
    assert set(map(len, expected)) & {NEW - 1}, "one of them must be ended by force"
    assert generator.generate(sources, greedy) == expected
    engine = OneByOne(generator)
    for source, answer in zip(sources, expected, strict=True):
        engine.submit(Request(prompt=source, sampling=greedy))
        events = []
        while engine.busy:
            events += engine.step()
        assert [token for event in events for token in event.tokens] == answer
        assert events[-1].finish_reason == ("length" if len(answer) == NEW - 1 else "stop")
    beams = default_sampling(bundle, max_new_tokens=NEW, beams=3, n=3)
    for source in sources:
        found = [one.ids for one in generator.candidates(source, beams)]
        assert found == says(model, source, num_beams=3, num_return_sequences=3)
