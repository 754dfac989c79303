"""What the user has: the kind of data at a path, the model in a directory. Names, headers and first rows are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmctl.errors import InputError
from llmctl.spec.files import home_path
from llmctl.store import types

READABLE = (".txt", ".txt.gz", ".md", ".markdown", ".md.gz", ".jsonl", ".jsonl.gz", ".parquet")
"""Endings that the stage `data` reads."""
ENCODERS = ("bert", "distilbert", "roberta")
"""`model_type` of architectures that read and do not write: no goal here trains one."""
KINDS = {
    "files": "texts (.txt, .md, .jsonl with `text`, .parquet)",
    "dataset.text": "texts (.txt, .md, .jsonl with `text`, .parquet)",
    "dataset.chat": 'conversations (.jsonl or .parquet, rows {"messages": [{"role": …, "content": …}, …]})',
    "dataset.preference": "preferences (.jsonl or .parquet, rows {prompt, chosen, rejected}, each a list of messages)",
    "dataset.tokens": "token shards",
}
FOUND = {
    "dataset.text": "texts (column `text`)",
    "dataset.chat": "conversations (column `messages`)",
    "dataset.preference": "preferences (columns `prompt`, `chosen`, `rejected`)",
    "dataset.labelled": "labelled examples (columns such as `text` and `label`, or `source` and `target`)",
    "dataset.tokens": "token shards",
    "model.hf": "a model",
    "model.onnx": "an ONNX bundle",
    "model.adapter": "an adapter",
    "tokenizer": "a tokenizer",
    "index.rag": "an index of documents",
    "metrics": "metrics",
    "deployment": "the receipt of a deployment",
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What lies at a path: its kind (an artifact type, or empty if nothing can use it) and that in words."""

    path: Path
    kind: str
    text: str
    hint: str = ""
    uri: str = ""
    """As the spec must name it, for what is not there yet."""
    splits: tuple[str, ...] = ()
    bytes: int = 0


def look(text: str) -> Found:
    """The kind of data at a path or a glob. InputError if there is nothing, or it cannot be read."""
    if not text.strip():
        raise InputError("the path of the data is empty", hint="give a file, a folder or a glob")
    path = home_path(text)
    try:
        if not path.exists() and any(sign in text for sign in "*?["):
            return _look_at_glob(path)
        _must_exist(path)
        kind = types.guess(path)
        return _look_at_files(path) if kind == "files" or _plain_folder(path, kind) else _look_at_data(path, kind)
    except types.Unfit as error:
        raise InputError(f"{text} cannot be used: {error}", hint="see docs/artifacts.md for the formats") from error
    except OSError as error:
        raise InputError(f"cannot read {error.filename or text}: {error.strerror}") from error


def look_at_model(text: str, kinds: Sequence[str], *, trains: bool) -> Found:
    """The model in a directory. InputError says what is there instead, or which architecture cannot be trained."""
    if not text.strip():
        raise InputError("the path of the model is empty", hint="give the directory with its config.json")
    path = home_path(text)
    try:
        _must_exist(path)
        kind = types.guess(path)
        if kind not in kinds:
            kind = _broken_model(path, kind, kinds)
        types.check(kind, path)
        config = types.read_json(path / "config.json")
    except types.Unfit as error:
        raise InputError(f"{text} is no model that can be used: {error}", hint="give a model directory") from error
    except OSError as error:
        raise InputError(f"cannot read {error.filename or text}: {error.strerror}") from error
    name = str(config.get("model_type") or "unknown") if isinstance(config, dict) else "unknown"
    if trains and name in ENCODERS:
        raise InputError(
            f"{text} is a model of type `{name}`, an encoder: it reads texts and writes none",
            hint="give a model that generates text, or train encoders with specs like specs/bert.yaml",
        )
    if not (path / "tokenizer.json").is_file():
        raise InputError(f"{text} has no tokenizer.json", hint="copy the one it was trained with into the directory")
    return Found(path=path, kind=kind, text=f"a model of type {name}")


def _broken_model(path: Path, kind: str, kinds: Sequence[str]) -> str:
    """`model.hf` for what was meant as one, so that its own check says what is missing; InputError for all else."""
    if path.is_dir() and (path / "config.json").is_file() and kind in ("files", "tokenizer") and "model.hf" in kinds:
        return "model.hf"
    what = FOUND.get(kind) or ("a file" if path.is_file() else "no config.json and no model.safetensors")
    raise InputError(
        f"{path} holds {what}, {' or '.join(kinds)} is wanted",
        hint="give the directory with config.json, model.safetensors and tokenizer.json",
    )


def _must_exist(path: Path) -> None:
    if path.exists():
        return
    if path.is_symlink():
        raise InputError(f"{path} is a link to nothing", hint=f"it points at {path.readlink()}")
    there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, there, 1)
    raise InputError(
        f"no such file or directory: {path}", hint=f"did you mean `{path.parent / near[0]}`?" if near else None
    )


def _plain_folder(path: Path, kind: str) -> bool:
    """Whether a directory of JSON Lines is just files with text, and no dataset with splits."""
    if kind != "dataset.text" or (path / "dataset_info.json").is_file():
        return False
    return path.is_file() or not any(entry.name.startswith("train") for entry in path.iterdir())


def _look_at_data(path: Path, kind: str) -> Found:
    types.check(kind, path)
    if fault := _fault(path, kind):
        return Found(path=path, kind="", text=fault, hint='a message is {"role": "user", "content": "…"}')
    size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in _files(path))
    if path.is_file():
        splits: tuple[str, ...] = ("train",)
    else:
        matches = (types.DATASET_FILE.match(file.name) for file in sorted(path.iterdir()))
        splits = tuple(dict.fromkeys(match["split"] for match in matches if match))
    return Found(path=path, kind=kind, text=FOUND.get(kind, kind), splits=splits, bytes=size)


def _fault(path: Path, kind: str) -> str:
    """What is wrong with the first row of conversations or preferences: their columns hold lists of messages."""
    columns = types.COLUMNS.get(kind, ())
    files = [path] if path.is_file() else [file for file in _files(path) if types.DATASET_FILE.match(file.name)]
    row = types.first_row(files[0]) if files and kind != "dataset.text" else None
    for name in columns if row else ():
        value = (row or {}).get(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) and "role" in item for item in value):
            return f"rows whose `{name}` is no list of messages"
    return ""


def _look_at_glob(pattern: Path) -> Found:
    fixed = next(number for number, part in enumerate(pattern.parts) if any(sign in part for sign in "*?["))
    matches = sorted(Path(*pattern.parts[:fixed]).glob(str(Path(*pattern.parts[fixed:]))))
    if not matches:
        raise InputError(f"nothing matches {pattern}", hint="quote a pattern: 'notes/**/*.md'")
    return _summary(pattern, [path for path in matches if path.is_file()])


def _look_at_files(path: Path) -> Found:
    """Text files, or rows of columns that no stage knows."""
    if path.is_file() and path.name.endswith(types.DATASET_SUFFIXES):
        columns = _columns(path)
        kind = next((kind for kind, names in types.COLUMNS.items() if set(names) <= set(columns)), "")
        if kind and kind != "dataset.text":
            return Found(path=path, kind=kind, text=FOUND[kind], splits=("train",), bytes=path.stat().st_size)
        if not kind:
            listed = ", ".join(f"`{name}`" for name in columns) or "no columns"
            hint = "rename them: `text`; or `messages`; or `prompt`, `chosen` and `rejected`"
            return Found(path=path, kind="", text=f"rows with the columns {listed}", hint=hint)
    return _summary(path, [path] if path.is_file() else _files(path))


def _files(folder: Path) -> list[Path]:
    """All files below, without hidden ones, as the stage `data` reads a directory."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _summary(path: Path, files: Sequence[Path]) -> Found:
    """Text files if every one can be read, else what is in the way."""
    others = [file for file in files if not file.name.lower().endswith(READABLE)]
    if not files:
        return Found(path=path, kind="", text="no files", hint=f"readable are {', '.join(READABLE)}")
    if others:
        endings = ", ".join(sorted({file.suffix or file.name for file in others})[:5])
        hint = f"readable are {', '.join(READABLE)}; choose them with a glob: --data '{path}/**/*.md'"
        return Found(path=path, kind="", text=f"{len(others)} files that are no text ({endings})", hint=hint)
    count = f"{len(files)} text file{'s' if len(files) > 1 else ''}"
    return Found(path=path, kind="files", text=count, bytes=sum(file.stat().st_size for file in files))


def _columns(path: Path) -> list[str]:
    """Column names of the first row; InputError where Parquet cannot be read here."""
    if not path.name.endswith(".parquet"):
        return sorted(types.first_row(path) or {})
    try:
        import pyarrow.parquet as parquet

        schema: Any = parquet.read_schema(path)
        return list(schema.names)
    except ModuleNotFoundError as error:
        raise InputError(f"{path} needs pyarrow to be read", hint="pip install 'llmctl[data]'") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no Parquet file: {' '.join(str(error).split())}") from error
