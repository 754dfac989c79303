"""A model's `generation_config.json`, read as transformers' `generate` reads it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmctl.errors import InputError
from llmctl.rules import Rules

_log = logging.getLogger(__name__)

FILE = "generation_config.json"
IDS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")


def _int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _int(value) or isinstance(value, float)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_int, value))


HONOURED: dict[str, Callable[[Any], bool]] = {
    "num_beams": _int,
    "length_penalty": _number,
    "early_stopping": lambda value: isinstance(value, bool | str),
    "do_sample": lambda value: isinstance(value, bool),
    "temperature": _number,
    "top_k": _int,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "no_repeat_ngram_size": _int,
    "bad_words_ids": lambda value: isinstance(value, list) and all(map(_ids, value)),
    "min_length": _int,
    "min_new_tokens": _int,
    "forced_bos_token_id": _int,
    "forced_eos_token_id": lambda value: _int(value) or _ids(value),
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
}
"""What is kept to, and whether a value can be one of it."""

IGNORED: dict[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "sequence_bias": ({}, []),
    "guidance_scale": (1,),
    "exponential_decay_length_penalty": (),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "watermarking_config": (),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "stop_strings": ([], ""),
    "max_time": (),
}
"""What changes answers of transformers and not ours, with the values that change nothing; null is one of them."""
OF_DRAWS = ("typical_p", "epsilon_cutoff", "eta_cutoff")

HARMLESS = frozenset(
    {
        *IDS,
        # Whoever asks says how long an answer may be, which is stronger than these in transformers, too.
        *("max_length", "max_new_tokens"),
        *("use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "prefill_chunk_size"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "compile_config", "disable_compile", "low_memory"),
        *("_from_model_config", "_commit_hash", "transformers_version"),
    }
)
"""Keys that change no answer."""


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The values of the file that are not null. Without one, what `config.json` says of generation, as transformers
    takes it. InputError for a damaged file or a value of the wrong kind."""
    path = directory / FILE
    if path.is_file():
        said = _read(path)
    elif (path := directory / "config.json").is_file():
        said = of_config(_read(path))
    else:
        return {}
    for name, fits in HONOURED.items():
        if name in said and not fits(said[name]):
            raise InputError(f"{path}: {name} is {said[name]!r}", hint="correct it or leave it out")
    return said


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a `config.json` says of generation, and would be the model's `generation_config.json`."""
    return {name: config[name] for name in (*IDS, *HONOURED, *IGNORED) if config.get(name) is not None}


def _read(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object", hint="write {} for no defaults")
    return {name: value for name, value in config.items() if value is not None}


def rules_of(said: Mapping[str, Any]) -> Rules | None:
    """The rules among the values that `read_generation_config` gave; None if there are none."""
    found: dict[str, Any] = {
        name: said[name] for name in ("no_repeat_ngram_size", "min_length", "forced_bos_token_id") if name in said
    }
    if "min_new_tokens" in said:  # of the two it is the stronger one in transformers, 0 too
        found |= {"min_new_tokens": said["min_new_tokens"], "min_length": 0}
    found |= {name: tuple(said.get(name, ())) for name in ("suppress_tokens", "begin_suppress_tokens")}
    found["bad_words_ids"] = tuple(tuple(word) for word in said.get("bad_words_ids", ()))
    ends = said.get("forced_eos_token_id", ())
    found["forced_eos_token_id"] = (ends,) if _int(ends) else tuple(ends)
    rules = Rules(**found)
    return None if rules == Rules() else rules


def unhonoured(said: Mapping[str, Any]) -> list[str]:
    """The keys that are not kept to and would change an answer; those that nobody knows among them."""
    return [
        name
        for name, value in said.items()
        if name not in HONOURED
        and name not in HARMLESS
        and value not in IGNORED.get(name, ())
        and (name not in OF_DRAWS or said.get("do_sample"))
    ]


def warn_of_unhonoured(directory: Path) -> None:
    """Say in the log what a model's file asks for in vain; once, when the model is opened."""
    found = unhonoured(read_generation_config(directory))
    if found:
        _log.warning("%s: not honoured, answers may differ from transformers': %s", directory / FILE, ", ".join(found))
