"""The artifact types: which files make one, what is checked, what can be derived. Standard library only.

`check` looks at names, JSON and headers and costs milliseconds; it guards commits and external inputs alike. `deep` is
an import string; it reads contents and runs in the stage's process before a commit.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.stage import load_string
from llmctl.store import safetensors

Metadata = dict[str, Any]
PICKLES = re.compile(r"(.*\.(pkl|pickle|pt|pth|ckpt)|pytorch_model.*\.bin|.*\.h5|.*\.msgpack)\Z", re.IGNORECASE)
DATASET_FILE = re.compile(r"(?P<split>.+?)(-\d{5})?(-of-\d{5})?(\.jsonl|\.jsonl\.gz|\.parquet)\Z")
DATASET_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
COLUMNS = {
    "dataset.text": ("text",),
    "dataset.chat": ("messages",),
    "dataset.preference": ("prompt", "chosen", "rejected"),
}

LABELLED = {
    "classification": ("text", "label"),
    "token-classification": ("tokens", "labels"),
    "question-answering": ("context", "question", "answer"),
    "seq2seq": ("source", "target"),
    "embedding": ("text", "positive"),
}
"""Columns of `dataset.labelled` by task; the columns tell the task."""


class Unfit(ValueError):
    """The files are not what the type asks for; the message begins with the file's name."""


@dataclass(frozen=True, kw_only=True)
class ArtifactType:
    """One row of the table. `check(path)` returns derived metadata or raises Unfit."""

    name: str
    check: Callable[[Path], Metadata]
    deep: str = ""
    single_file: bool = False
    """Whether one bare file is accepted too."""


def check(type: str, path: Path) -> Metadata:
    """Raise Unfit if `path` is no artifact of this type; returns what can be derived. Unknown types pass."""
    known = TYPES.get(type)
    if known is None:
        return {}
    if path.is_file() and not known.single_file:
        raise Unfit(f"{path.name} is a file, {type} is a directory")
    return known.check(path)


def check_commit(type: str, directory: Path, names: list[str]) -> Metadata:
    """What must hold in addition before a stage's output is committed; includes the type's `deep` check."""
    if not names:
        raise Unfit("nothing was written")
    for name in names:
        if PICKLES.match(Path(name).name) and type != "files":
            raise Unfit(f"{name} is a pickle or another format that can run code")
        if name.endswith(".json"):
            read_json(directory / name)
    metadata = check(type, directory)
    known = TYPES.get(type)
    if known and known.deep:
        load_string(known.deep)(directory)
    return metadata


def guess(path: Path, accepted: Sequence[str] = ()) -> str:
    """The most specific type that a file or directory looks like, by its names alone; `files` if like none.

    Rows of data may fit several types, so among them only those that are `accepted`, if any are named, are looked for.
    """
    if path.is_file():
        return _guess_rows(path, accepted) if path.name.endswith(DATASET_SUFFIXES) else "files"
    for type, names in SIGNS:
        if all((path / name).exists() for name in names):
            return type
    if (path / "dataset_info.json").is_file():
        format = _object(path / "dataset_info.json").get("format")
        if format in (*COLUMNS, "dataset.labelled"):
            return str(format)
    first = next((file for file in sorted(path.iterdir()) if DATASET_FILE.match(file.name)), None)
    return _guess_rows(first, accepted) if first else "files"


SIGNS = (
    ("model.onnx", ("model.onnx",)),
    ("model.onnx", ("encoder_model.onnx", "decoder_model.onnx")),
    ("model.adapter", ("adapter_config.json",)),
    ("model.hf", ("config.json", "model.safetensors")),
    ("model.hf", ("config.json", "model.safetensors.index.json")),
    ("dataset.tokens", ("meta.json", "train-00000.bin")),
    ("index.rag", ("index.json", "chunks.jsonl")),
    ("embeddings", ("embeddings.json", "vectors.safetensors")),
    ("tokenizer", ("tokenizer.json",)),
    ("deployment", ("receipt.json",)),
    ("metrics", ("metrics.json",)),
)
"""Files that tell a type, most specific first: a model directory holds a tokenizer too."""


def _guess_rows(path: Path, accepted: Sequence[str]) -> str:
    row = first_row(path) or {}
    known = [*COLUMNS.items(), *(("dataset.labelled", columns) for columns in LABELLED.values())]
    fitting = [type for type, columns in known if all(name in row for name in columns)]
    return next((type for type in fitting if not accepted or type in accepted), fitting[0] if fitting else "files")


# -- reading ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The value of a JSON file; Unfit if it is missing or no standard JSON (NaN included)."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise Unfit(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Unfit(f"{path.name} is no valid JSON: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise Unfit(f"{path.name} holds no JSON object")
    return value


def first_row(path: Path) -> dict[str, Any] | None:
    """The first record of a JSON Lines file; None for Parquet and for an empty file. Raises Unfit."""
    if path.name.endswith(".parquet"):
        return None
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            line = next((line for line in file if line.strip()), None)
        if line is None:
            return None
        row = json.loads(line.decode("utf-8"))
    except FileNotFoundError:
        raise Unfit(f"{path.name} is missing") from None
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise Unfit(f"{path.name} holds no JSON Lines: {error}") from error
    if not isinstance(row, dict):
        raise Unfit(f"{path.name} holds no JSON objects")
    return row


# -- the types --------------------------------------------------------------------------------------------------------


def _files(path: Path) -> Metadata:
    return {}


def _dataset(type: str) -> Callable[[Path], Metadata]:
    columns = COLUMNS[type]

    def check_dataset(path: Path) -> Metadata:
        files = _dataset_files(path)
        for file in files:
            row = first_row(file)
            if row is not None and not all(name in row for name in columns):
                missing = next(name for name in columns if name not in row)
                raise Unfit(f"{file.name} has no column `{missing}`, it has {', '.join(sorted(row)) or 'none'}")
        return {}

    return check_dataset


def _labelled(path: Path) -> Metadata:
    for file in _dataset_files(path):
        row = first_row(file)
        if row is None:
            continue
        task = next((task for task, columns in LABELLED.items() if all(name in row for name in columns)), None)
        if task is None:
            wanted = ", or ".join(" and ".join(columns) for columns in LABELLED.values())
            raise Unfit(f"{file.name} has the columns {', '.join(sorted(row)) or 'none'}, not {wanted}")
        return {"task": task}
    return {}


def _dataset_files(path: Path) -> list[Path]:
    """The first file of every split; a bare file is a split of its own."""
    if path.is_file():
        if not path.name.endswith(DATASET_SUFFIXES):
            raise Unfit(f"{path.name} is none of {', '.join(DATASET_SUFFIXES)}")
        return [path]
    info = path / "dataset_info.json"
    listed = _object(info).get("splits") if info.is_file() else None
    if isinstance(listed, Mapping):
        named = [split.get("files") or [] for split in listed.values() if isinstance(split, Mapping)]
        for name in (name for names in named for name in names):
            if not (path / name).is_file():
                raise Unfit(f"{name} is missing, though dataset_info.json lists it")
        return [path / names[0] for names in named if names]
    splits: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if match := DATASET_FILE.match(file.name):
            splits.setdefault(match["split"], file)
    if not splits:
        raise Unfit(f"no file named <split>{', <split>'.join(DATASET_SUFFIXES)}")
    return list(splits.values())


def _tokenizer(path: Path) -> Metadata:
    tokenizer = _object(path / "tokenizer.json")
    if "model" not in tokenizer:
        raise Unfit("tokenizer.json has no `model`")
    if (path / "tokenizer_config.json").exists():
        _object(path / "tokenizer_config.json")
    return {"tokenizer": _tokenizer_id(path)}


def _tokenizer_id(path: Path) -> str:
    from llmctl.store.hashing import hash_file

    return f"sha256:{hash_file(path / 'tokenizer.json')}"


def _tokens(path: Path) -> Metadata:
    meta = _object(path / "meta.json")
    if meta.get("dtype") not in ("uint16", "uint32"):
        raise Unfit("meta.json: dtype must be uint16 or uint32")
    missing = [name for name in ("vocab_size", "tokenizer", "splits") if name not in meta]
    if missing or not isinstance(meta["splits"], dict) or not meta["splits"]:
        raise Unfit(f"meta.json lacks {', '.join(missing) or 'splits'}")
    width = 2 if meta["dtype"] == "uint16" else 4
    for name, split in () if meta.get("url") else meta["splits"].items():
        _sized(path / f"{name}-00000.bin", int(split["tokens"]) * width)
        _sized(path / f"{name}-00000.idx", (int(split["documents"]) + 1) * 8)
    counts = {f"tokens.{name}": int(split["tokens"]) for name, split in meta["splits"].items()}
    return {"vocab_size": meta["vocab_size"], "tokenizer": meta["tokenizer"], "dtype": meta["dtype"], **counts}


def _sized(path: Path, size: int) -> None:
    if not path.is_file():
        raise Unfit(f"{path.name} is missing")
    if path.stat().st_size != size:
        raise Unfit(f"{path.name} has {path.stat().st_size} bytes, meta.json says {size}")


def _model_hf(path: Path) -> Metadata:
    config = _object(path / "config.json")
    tensors = _tensors(path, "model.safetensors")
    architecture = next(iter(config.get("architectures") or ()), None)
    found: Metadata = {
        "architecture": architecture,
        "parameters": sum(tensor.values for tensor in tensors),
        "dtype": next(iter(sorted({tensor.dtype for tensor in tensors})), None),
        "vocab_size": config.get("vocab_size"),
        "max_seq_len": config.get("max_position_embeddings"),
    }
    if (path / "tokenizer.json").is_file():
        _object(path / "tokenizer.json")
        found["tokenizer"] = _tokenizer_id(path)
    return {name: value for name, value in found.items() if value is not None}


def _tensors(path: Path, name: str) -> list[safetensors.Tensor]:
    """All tensors of one file or of the shards that `<name>.index.json` lists."""
    index = path / f"{name}.index.json"
    if index.is_file():
        shards = _object(index).get("weight_map")
        if not isinstance(shards, dict):
            raise Unfit(f"{index.name} has no weight_map")
        names = sorted(set(map(str, shards.values())))
    else:
        names = [name]
    found = []
    for shard in names:
        if not (path / shard).is_file():
            pickled = next((file.name for file in sorted(path.iterdir()) if PICKLES.match(file.name)), None)
            because = (
                f" ({pickled} is not read: that format can run code; `python -m llmctl.nn.unpickle` converts it)"
                if pickled
                else ""
            )
            raise Unfit(f"{shard} is missing{because}")
        try:
            found += safetensors.read_header(path / shard)
        except ValueError as error:
            raise Unfit(f"{shard} is damaged: {error}") from error
    return found


def _adapter(path: Path) -> Metadata:
    config = _object(path / "adapter_config.json")
    tensors = _tensors(path, "adapter_model.safetensors")
    base = config.get("base_model_name_or_path")
    return {"parameters": sum(tensor.values for tensor in tensors), **({"base": base} if base else {})}


ONNX_PAIR = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")
"""The graphs of an encoder-decoder; other models have one, `model.onnx`."""


def _model_onnx(path: Path) -> Metadata:
    pair = (path / ONNX_PAIR[0]).is_file()
    for name in ONNX_PAIR if pair else ("model.onnx",):
        if not (path / name).is_file():
            raise Unfit(f"{name} is missing")
        if (path / name).stat().st_size == 0:
            raise Unfit(f"{name} is empty")
    config = _object(path / "config.json")
    for name in ("generation_config.json", "genai_config.json"):
        if (path / name).exists():
            _object(path / name)
    found: Metadata = {"architecture": next(iter(config.get("architectures") or ()), None)}
    if (path / "tokenizer.json").is_file():
        found["tokenizer"] = _tokenizer_id(path)
    return {name: value for name, value in found.items() if value is not None}


def _metrics(path: Path) -> Metadata:
    for name, value in _object(path / "metrics.json").items():
        if not isinstance(value, int | float | str | bool):
            raise Unfit(f"metrics.json: `{name}` is no number, text or truth value")
    for name in ("curves.jsonl", "samples.jsonl"):
        if (path / name).exists():
            first_row(path / name)
    return {}


def _embeddings(path: Path) -> Metadata:
    """`vectors` is a matrix with one row for each line of the names."""
    facts = _object(path / "embeddings.json")
    name = facts.get("names")
    if name not in EMBEDDING_NAMES:
        raise Unfit(f"embeddings.json: names must be {' or '.join(EMBEDDING_NAMES)}")
    matrix = next((tensor for tensor in _tensors(path, "vectors.safetensors") if tensor.name == "vectors"), None)
    if matrix is None or len(matrix.shape) != 2 or matrix.dtype != "F32":
        raise Unfit("vectors.safetensors holds no float32 matrix `vectors`")
    if not (path / name).is_file():
        raise Unfit(f"{name} is missing")
    with (path / name).open("rb") as file:
        lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    if lines != matrix.shape[0]:
        raise Unfit(f"{name} has {lines} lines, vectors.safetensors {matrix.shape[0]} vectors")
    return {"method": facts.get("method"), "vectors": matrix.shape[0], "dim": matrix.shape[1]}


EMBEDDING_NAMES = ("vocab.txt", "ids.jsonl")
"""Where `embeddings` has its names: a word a line, or a JSON object with the `id` of each text."""


def _with_json(*names: str) -> Callable[[Path], Metadata]:
    def check_files(path: Path) -> Metadata:
        for name in names:
            if name.endswith(".json"):
                _object(path / name)
            elif first_row(path / name) is None:
                raise Unfit(f"{name} is empty")
        return {}

    return check_files


TYPES = {
    row.name: row
    for row in (
        ArtifactType(name="files", check=_files, single_file=True),
        *(ArtifactType(name=name, check=_dataset(name), single_file=True) for name in COLUMNS),
        ArtifactType(name="dataset.labelled", check=_labelled, single_file=True),
        ArtifactType(name="tokenizer", check=_tokenizer),
        ArtifactType(name="dataset.tokens", check=_tokens, deep="llmctl.store.tokens:check_ids"),
        ArtifactType(name="model.hf", check=_model_hf),
        ArtifactType(name="model.adapter", check=_adapter),
        ArtifactType(name="model.onnx", check=_model_onnx),
        ArtifactType(name="metrics", check=_metrics),
        ArtifactType(name="index.rag", check=_with_json("index.json", "chunks.jsonl")),
        ArtifactType(name="embeddings", check=_embeddings),
        ArtifactType(name="deployment", check=_with_json("receipt.json")),
        ArtifactType(name="report", check=_files),
    )
}
