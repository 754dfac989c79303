"""What an ONNX bundle says about itself: its files, its context, where its answers end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import InputError

MODEL = "model.onnx"


@dataclass(frozen=True)
class Bundle:
    """The facts of a bundle's JSON files; the graph's own facts are read from its session."""

    directory: Path
    context_length: int
    eos_ids: frozenset[int]
    config: dict[str, Any]
    in_place: bool
    """The graph takes one buffer as past and present (`past_present_share_buffer`), so keys are never copied."""

    @property
    def model(self) -> Path:
        """The graph."""
        return self.directory / MODEL


def read_bundle(directory: Path | str) -> Bundle:
    """Read `config.json` and, where they exist, `generation_config.json` and `genai_config.json`.

    Raises InputError, naming the file, if something is missing or no valid JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory", hint="give the directory of an ONNX bundle")
    if not (directory / MODEL).is_file():
        raise InputError(f"{directory / MODEL} is missing", hint="`llmctl export-onnx` makes a bundle")
    config = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    values = {**config, **(_read_json(generation) if generation.is_file() else {})}
    context = next((config[key] for key in _CONTEXT_KEYS if isinstance(config.get(key), int)), None)
    if context is None:
        raise InputError(
            f"{directory / 'config.json'} does not say how long a context may be",
            hint=f"it should hold one of {', '.join(_CONTEXT_KEYS)}",
        )
    genai = directory / "genai_config.json"
    search = _read_json(genai).get("search", {}) if genai.is_file() else {}
    in_place = bool(search.get("past_present_share_buffer", False))
    return Bundle(directory, context, _ids(values.get("eos_token_id")), config, in_place)


# In the order of trust: GPT-2 writes n_positions, some families n_ctx beside it.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


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
    return frozenset(value) if isinstance(value, list) else frozenset((int(value),))
