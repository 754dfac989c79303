"""How a directory says that its states make one vector: the files that sentence-transformers writes and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from llmctl.errors import InputError

Pooling = Literal["mean", "cls"]
FILE = Path("1_Pooling", "config.json")
POOLING_FILES = ("modules.json", "sentence_bert_config.json", str(FILE))
_FLAGS: dict[Pooling, str] = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def write_pooling(directory: Path, pooling: Pooling, dim: int, context: int) -> None:
    """Say that the states are pooled like this and brought to length 1."""
    kinds = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(_MODULES)
        ],
        "sentence_bert_config.json": {"do_lower_case": False, "max_seq_length": context},
        str(FILE): {"word_embedding_dimension": dim, **{flag: name == pooling for name, flag in _FLAGS.items()}},
    }
    (directory / FILE.parent).mkdir(exist_ok=True)
    for name, content in kinds.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_pooling(directory: Path) -> Pooling:
    """What the directory says, `mean` where it says nothing. InputError for a pooling that is neither mean nor cls."""
    path = directory / FILE
    if not path.is_file():
        return "mean"
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(flags, dict):
        raise InputError(f"{path} holds no JSON object", hint="it names the ways of pooling that are on")
    found = [name for name, flag in _FLAGS.items() if flags.get(flag)]
    others = [key for key, on in flags.items() if key.startswith("pooling_mode_") and on and key not in _FLAGS.values()]
    if len(found) != 1 or others:
        raise InputError(f"{path} asks for {', '.join([*found, *others]) or 'no pooling'}", hint="mean or cls is known")
    return found[0]
