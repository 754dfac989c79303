"""The model that a person names on the command line: a directory, or something in the store."""

from __future__ import annotations

from pathlib import Path

from llmctl.errors import InputError
from llmctl.spec.files import home_path, is_there
from llmctl.stage import Artifact
from llmctl.store.store import Store

GRAPHS = ("model.onnx", "encoder_model.onnx")
"""What an exported bundle holds: one graph, or the two of an encoder-decoder, of which this is the first."""


def find_model(text: str) -> Artifact:
    """The model that `text` names: an existing path, else a reference or id in the store. InputError if it is none."""
    path = home_path(text)
    if is_there(path, Path.is_dir):
        return Artifact(path, model_type(path))
    if is_there(path):
        raise InputError(f"{path} is a file; a model is a directory", hint=f"try {path.parent}")
    return Store.open().resolve(text, ("model.onnx", "model.hf"))


def model_type(path: Path) -> str:
    """`model.onnx` or `model.hf` by the files of a directory; InputError if it is neither."""
    if any((path / name).is_file() for name in GRAPHS):
        return "model.onnx"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return "model.hf"
    raise InputError(
        f"{path} holds no model", hint="a model directory has model.onnx, or config.json with model.safetensors"
    )
