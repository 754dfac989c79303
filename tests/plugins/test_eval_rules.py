"""What a model's `generation_config.json` forbids holds in evaluations, too: answers are those that it would give."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmctl import Artifact
from llmctl.rules import Rules
from llmctl_eval import conversations, decoding, labelled
from llmctl_eval.params import EvalParams
from llmctl_eval.subject import Subject

RULES = Rules(bad_words_ids=((7,),), no_repeat_ngram_size=3)


class Asked(Exception):
    """Carries the sampling that the model was asked with."""


def ask(prompts: Any, sampling: Any) -> Any:
    raise Asked(sampling)


def subject() -> Any:
    ids = SimpleNamespace(ids=[5, 6])
    return SimpleNamespace(
        rules=RULES,
        generator=SimpleNamespace(context_length=64, generate=ask, candidates=ask),
        tokenizer=SimpleNamespace(
            encode=lambda text: [5, 6], frame_document=lambda ids: ids, encode_chat=lambda *_, **__: ids
        ),
    )


@pytest.mark.parametrize(
    "answer",
    [
        lambda one, params: next(labelled.translate(one, params, [{"source": "a", "target": "b"}])),
        lambda one, params: next(
            conversations.generate_answers(
                one, params, [conversations.Question("1", "", [{"role": "user", "content": "a"}], ("b",))]
            )
        ),
        lambda one, params: decoding.answer(one, params, "greedy", 0, [5, 6]),
    ],
    ids=["translations", "questions", "strategies"],
)
def test_answers_keep_to_the_models_rules(answer: Any) -> None:
    with pytest.raises(Asked) as caught:
        answer(subject(), EvalParams())
    assert caught.value.args[0].rules == RULES


def test_rules_are_read_from_the_model(tmp_path: Path) -> None:
    said = {"bad_words_ids": [[7]], "no_repeat_ngram_size": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    one = Subject(Artifact(tmp_path, "model.hf"), None, "model", "cpu", 1)  # type: ignore[arg-type]
    assert one.rules == RULES


def test_the_greatest_seed_is_no_mistake() -> None:
    params = EvalParams(seed=2**63 - 1, answers=2)
    with pytest.raises(Asked) as caught:
        decoding.answer(subject(), params, "greedy", 3, [5, 6])
    assert caught.value.args[0].seed == 5
