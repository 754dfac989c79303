"""A model's generation_config.json: the rules it sets, and what is told of those that are not kept to."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from llmctl.errors import InputError
from llmctl.generation_config import (
    HARMLESS,
    HONOURED,
    IGNORED,
    read_generation_config,
    rules_of,
    unhonoured,
    warn_of_unhonoured,
)
from llmctl.rules import Rules

MARIAN = {
    "bad_words_ids": [[58100]],
    "decoder_start_token_id": 58100,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "max_length": 512,
    "num_beams": 4,
    "pad_token_id": 58100,
    "renormalize_logits": None,
}


def write(directory: Path, name: str, value: object) -> None:
    (directory / name).write_text(json.dumps(value))


def test_rules_are_those_of_the_file(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    assert rules_of({}) is None
    write(tmp_path, "generation_config.json", MARIAN)
    said = read_generation_config(tmp_path)
    assert rules_of(said) == Rules(bad_words_ids=((58100,),), forced_eos_token_id=(0,))
    assert unhonoured(said) == []
    every = {
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[1, 2], [3]],
        "min_length": 5,
        "forced_bos_token_id": 7,
        "forced_eos_token_id": [2, 3],
        "suppress_tokens": [4],
        "begin_suppress_tokens": [5, 6],
    }
    rules = {name: tuple(map(tuple, v)) if name == "bad_words_ids" else v for name, v in every.items()}
    rules |= {name: tuple(v) for name, v in rules.items() if isinstance(v, list)}
    assert rules_of(every) == Rules(**rules)
    assert rules_of({**every, "min_new_tokens": 2}) == Rules(**{**rules, "min_new_tokens": 2, "min_length": 0})
    assert rules_of({"min_length": 0, "no_repeat_ngram_size": 0, "suppress_tokens": []}) is None


def test_without_the_file_config_json_counts_as_in_transformers(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {**MARIAN, "vocab_size": 58101, "model_type": "marian"})
    assert rules_of(read_generation_config(tmp_path)) == Rules(bad_words_ids=((58100,),), forced_eos_token_id=(0,))
    write(tmp_path, "generation_config.json", {})
    assert read_generation_config(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forced_bos_token_id", "de_DE"),
        ("bad_words_ids", [3]),
        ("suppress_tokens", 3),
        ("min_length", True),
        ("forced_eos_token_id", [1.5]),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(name: str, value: object, tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {name: value})
    with pytest.raises(InputError, match=rf"generation_config.json: {name} is "):
        read_generation_config(tmp_path)


def test_what_is_not_honoured_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    idle = {name: value for name, values in IGNORED.items() for value in values[:1]}
    asked = {"sequence_bias": [[[3], 1.0]], "penalty_alpha": 0.6, "guidance_scale": 1.5, "typical_p": 0.9, "new": 1}
    write(tmp_path, "generation_config.json", {**idle, **asked, "max_length": 40})
    with caplog.at_level(logging.WARNING):
        warn_of_unhonoured(tmp_path)
    (record,) = caplog.records
    assert record.getMessage().endswith("not honoured, answers may differ from transformers': "
                                        "sequence_bias, guidance_scale, penalty_alpha, new")  # fmt: skip
    assert "typical_p" in unhonoured({**asked, "do_sample": True}), "it is of draws"
    caplog.clear()
    write(tmp_path, "generation_config.json", {**idle, **MARIAN})
    warn_of_unhonoured(tmp_path)
    assert not caplog.records


def test_every_option_of_transformers_is_sorted() -> None:
    transformers = pytest.importorskip("transformers")
    known = {*HONOURED, *IGNORED, *HARMLESS}
    assert set(vars(transformers.GenerationConfig())) <= known
    defaults = {name: value for name, value in vars(transformers.GenerationConfig()).items() if value is not None}
    assert unhonoured(defaults) == []
    assert rules_of(defaults) is None
