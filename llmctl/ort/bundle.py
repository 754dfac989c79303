"""What an ONNX bundle says about itself: its files, its context, where its answers end."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import InputError

MODEL = "model.onnx"
"""The graph of a decoder or of an encoder."""
ENCODER, DECODER, DECODER_WITH_PAST = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
"""The graphs of an encoder-decoder, under Optimum's names."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bundle:
    """The facts of a bundle's JSON files; a graph's own facts are read from its session."""

    directory: Path
    context_length: int
    eos_ids: frozenset[int]
    config: dict[str, Any]
    """`config.json`, with what `generation_config.json` says instead."""
    in_place: bool
    """The graph takes one buffer as past and present (`past_present_share_buffer`), so keys are never copied."""

    @property
    def model(self) -> Path:
        """The graph of a decoder or of an encoder."""
        return self.directory / MODEL

    @property
    def has_pair(self) -> bool:
        """Whether this is an encoder-decoder."""
        return (self.directory / ENCODER).is_file()

    @property
    def pad_id(self) -> int:
        """What shorter rows are filled up with; any id will do where there is none, since it is masked."""
        return int(self.config.get("pad_token_id") or 0)

    @property
    def start_id(self) -> int:
        """The first id that the decoder of an encoder-decoder is given."""
        found = (self.config.get(key) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
        return next((int(token) for token in found if token is not None), 0)

    def ends(self, vocab_size: int) -> frozenset[int]:
        """The ids that end an answer, of a model that can give `vocab_size` ids: it never gives the others."""
        beyond = sorted(token for token in self.eos_ids if not 0 <= token < vocab_size)
        if beyond:
            _log.warning("%s: eos_token_id %s is none of the model's %d ids", self.directory, beyond, vocab_size)
        return self.eos_ids - set(beyond)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes of a classification head, in the order of its logits."""
        names = self.config.get("id2label") or {}
        if not isinstance(names, dict) or not all(str(key).isdigit() for key in names):
            raise InputError(f"`id2label` in {self.directory / 'config.json'} does not number its labels")
        return tuple(names[key] for key in sorted(names, key=int))


def read_bundle(directory: Path | str) -> Bundle:
    """Read `config.json` and, where they exist, `generation_config.json` and `genai_config.json`.

    Raises InputError, naming the file, if something is missing or no valid JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory", hint="give the directory of an ONNX bundle")
    if not any((directory / name).is_file() for name in (MODEL, ENCODER)):
        raise InputError(f"{directory / MODEL} is missing", hint="`llmctl export-onnx` makes a bundle")
    config = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    values = {**config, **(_read_json(generation) if generation.is_file() else {})}
    genai = directory / "genai_config.json"
    search = _read_json(genai).get("search", {}) if genai.is_file() else {}
    in_place = bool(search.get("past_present_share_buffer", False))
    return Bundle(directory, _context(directory, config), _ids(values.get("eos_token_id")), values, in_place)


# In the order of trust: GPT-2 writes n_positions, some families n_ctx beside it.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx")
_TRAINED = {"bloom": 2048, "mt5": 512, "t5": 512, "umt5": 512}
"""Families with relative positions, whose config.json need not say how long a context was trained."""
_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Families whose table of positions begins behind the padding id."""


def _context(directory: Path, config: dict[str, Any]) -> int:
    found = next((config[key] for key in _CONTEXT_KEYS if isinstance(config.get(key), int)), None)
    found = found or _TRAINED.get(str(config.get("model_type")))
    if found is None:
        raise InputError(
            f"{directory / 'config.json'} does not say how long a context may be",
            hint=f"it should hold one of {', '.join(_CONTEXT_KEYS)}",
        )
    padding = config.get("pad_token_id")
    unused = (1 if padding is None else int(padding)) + 1 if config.get("model_type") in _BEHIND_PADDING else 0
    return int(found) - unused


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing", hint="was the bundle copied completely?") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no valid JSON: {error}", hint="export the model again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object", hint="export the model again")
    return value


def _ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(id, int) for id in ids):
        raise InputError(f"`eos_token_id` of the bundle is {value!r}, no token id", hint="export the model again")
    return frozenset(ids)
