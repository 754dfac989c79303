"""How a directory says that its states make one vector: the files that sentence-transformers writes and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from llmctl.errors import InputError

Pooling = Literal["mean", "cls"]
FILE = Path("1_Pooling", "config.json")
MODULES = "modules.json"
POOLING_FILES = (MODULES, "sentence_bert_config.json", str(FILE))
_FLAGS: dict[Pooling, str] = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def write_pooling(directory: Path, pooling: Pooling, dim: int, context: int, *, normalise: bool = True) -> None:
    """Say that the states are pooled like this and, with `normalise`, brought to length 1."""
    modules = _MODULES if normalise else _MODULES[:-1]
    kinds = {
        MODULES: [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"do_lower_case": False, "max_seq_length": context},
        str(FILE): {"word_embedding_dimension": dim, **{flag: name == pooling for name, flag in _FLAGS.items()}},
    }
    (directory / FILE.parent).mkdir(exist_ok=True)
    for name, content in kinds.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_pooling(directory: Path) -> Pooling:
    """What the directory says, `mean` where it says nothing.

    InputError for a pooling that is neither mean nor cls, and for further layers behind it.
    """
    path = directory / FILE
    _modules(directory)
    if not path.is_file():
        return "mean"
    flags = _read_json(path)
    if not isinstance(flags, dict):
        raise InputError(f"{path} holds no JSON object", hint="it names the ways of pooling that are on")
    found = [name for name, flag in _FLAGS.items() if flags.get(flag)]
    others = [key for key, on in flags.items() if key.startswith("pooling_mode_") and on and key not in _FLAGS.values()]
    if len(found) != 1 or others:
        raise InputError(f"{path} asks for {', '.join([*found, *others]) or 'no pooling'}", hint="mean or cls is known")
    return found[0]


def says_pooling(directory: Path) -> bool:
    """Whether the directory is a sentence encoder: one that says how its states are pooled."""
    return (directory / FILE).is_file()


def normalises(directory: Path) -> bool:
    """Whether the directory's embeddings have length 1; so they have where it does not list its modules."""
    return not (directory / MODULES).is_file() or "Normalize" in _modules(directory)


def _modules(directory: Path) -> list[str]:
    """The kinds of module that `modules.json` lists, none without it. InputError for one that is not computed here."""
    path = directory / MODULES
    if not path.is_file():
        return []
    listed = _read_json(path)
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in listed]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lists no modules", hint="sentence-transformers writes it") from error
    known = [kind for _, kind in _MODULES]
    if other := next((kind for kind in kinds if kind not in known), None):
        raise InputError(f"{path} asks for a module {other}", hint=f"{', '.join(known)} are known")
    return kinds


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
