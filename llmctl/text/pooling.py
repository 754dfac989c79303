"""How a directory says that its states make one vector: the files that sentence-transformers writes and reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmctl.errors import InputError

Pooling = Literal["mean", "cls"]
FILE = Path("1_Pooling", "config.json")
MODULES = "modules.json"
LENGTHS = "sentence_bert_config.json"
POOLING_FILES = (MODULES, LENGTHS, str(FILE))
_FLAGS: dict[Pooling, str] = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
_MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
"""Kinds of module that are computed here, and the directory of each."""


def write_pooling(directory: Path, pooling: Pooling, dim: int, context: int, *, normalise: bool = True) -> None:
    """Say that the states are pooled like this and, with `normalise`, brought to length 1.

    How long a text may be is left as it stands where the directory says that already.
    """
    kinds = [kind for kind in _MODULES if normalise or kind != "Normalize"]
    modules = [
        {"idx": number, "name": str(number), "path": _MODULES[kind], "type": f"sentence_transformers.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    flags = {flag: name == pooling for name, flag in _FLAGS.items()}
    (directory / FILE.parent).mkdir(exist_ok=True)
    _write_json(directory / MODULES, modules)
    _write_json(directory / FILE, {"word_embedding_dimension": dim, **flags})
    if not (directory / LENGTHS).exists():
        _write_json(directory / LENGTHS, {"do_lower_case": False, "max_seq_length": context})


def read_pooling(directory: Path) -> Pooling:
    """What the directory says, `mean` where it says nothing.

    InputError for a pooling that is neither mean nor cls, and for layers before or behind it that are not known here.
    """
    path, kinds = directory / FILE, _modules(directory)
    if not path.is_file():
        if "Pooling" in kinds:
            raise InputError(f"{path} is missing, though {MODULES} names it", hint="take the whole directory")
        return "mean"
    config = _read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object", hint="it names the ways of pooling that are on")
    asked = _asked(config)
    found = next((name for name in _FLAGS if asked == [name]), None)
    if found is None:
        raise InputError(f"{path} asks for {', '.join(asked) or 'no pooling'}", hint="mean or cls is known")
    return found


def _asked(config: dict[str, Any]) -> list[str]:
    """The ways of pooling that are on: a flag for each, or their names under `pooling_mode`."""
    names = {flag: name for name, flag in _FLAGS.items()}
    on = [str(names.get(key, key)) for key, value in config.items() if key.startswith("pooling_mode_") and value]
    named = config.get("pooling_mode")
    return [*on, *(str(name) for name in ([named] if isinstance(named, str) else named or []))]


def says_pooling(directory: Path) -> bool:
    """Whether the directory is a sentence encoder: one that says how its states are pooled."""
    return (directory / FILE).is_file()


def normalises(directory: Path) -> bool:
    """Whether the directory's embeddings have length 1; so they have where it does not list its modules.

    InputError for modules that are not known here.
    """
    return not (directory / MODULES).is_file() or "Normalize" in _modules(directory)


def read_longest(directory: Path) -> int | None:
    """Most tokens, special ones included, that are read of a text, as sentence-transformers cuts it.

    `max_seq_length`, or else the `model_max_length` of the tokenizer of a sentence encoder; None where the directory
    says neither, so that the model's context is all there is. InputError for what is no number of tokens.
    """
    path, key = directory / LENGTHS, "max_seq_length"
    said = _entry(path, key)
    if said is None and (path.is_file() or says_pooling(directory)):
        path, key = directory / "tokenizer_config.json", "model_max_length"
        said = _entry(path, key)
        if isinstance(said, int | float) and said >= 1e9:  # transformers writes 1e30 for no limit
            return None
    if said is None:
        return None
    if isinstance(said, bool) or not isinstance(said, int) or said < 1:
        raise InputError(f"{path} has the {key} {said!r}", hint="it is a number of tokens, or null for the context")
    return said


def _entry(path: Path, key: str) -> Any:
    if not path.is_file():
        return None
    config = _read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object", hint="take the whole directory again")
    return config.get(key)


def pool(states: np.ndarray, lengths: Sequence[int], pooling: Pooling, normalise: bool) -> np.ndarray:
    """`states (B, T, D)` of rows with `lengths` real tokens to `(B, D)`: their mean, or the first token's."""
    if pooling == "cls":
        vectors = states[:, 0]
    else:
        real = np.arange(states.shape[1]) < np.asarray(lengths)[:, None]
        vectors = (states * real[..., None]).sum(1) / np.asarray(lengths, np.float32)[:, None]
    if normalise:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors.astype(np.float32)


def _modules(directory: Path) -> list[str]:
    """The kinds of module that `modules.json` lists, none without it. InputError for one that is not computed here."""
    path = directory / MODULES
    if not path.is_file():
        return []
    try:
        places = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in _read_json(path)}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lists no modules", hint="sentence-transformers writes it") from error
    for kind, place in places.items():
        if kind not in _MODULES:
            raise InputError(f"{path} asks for a module {kind}", hint=f"{', '.join(_MODULES)} are known")
        if kind != "Normalize" and place != _MODULES[kind]:  # that one has no files
            there = _MODULES[kind] or "the directory itself"
            raise InputError(f"{path} has its {kind} in {place!r}", hint=f"it is read from {there}")
    return list(places)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
