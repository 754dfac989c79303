"""`python -m llmctl.nn.unpickle SOURCE TARGET`: the `pytorch_model.bin` of a directory as safetensors.

A pickle can run any code when it is read. Here torch reads it with `weights_only`, which builds tensors and nothing
else, in a process of its own; no other module of llmctl reads one unless it is told to.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import torch
from torch import Tensor

from llmctl.errors import InputError, LlmctlError
from llmctl.nn.shards import write_shards

NAME = "pytorch_model.bin"


def read_pickles(directory: Path) -> dict[str, Tensor]:
    """The tensors of `pytorch_model.bin`, or of all files that its index names. InputError for anything but tensors."""
    index = directory / f"{NAME}.index.json"
    if (directory / NAME).is_file() or not index.is_file():
        return _read(directory / NAME)
    try:
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({Path(name).name for name in listed.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} has no `weight_map`") from error
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read(directory / file)
    if set(tensors) != set(listed):
        raise InputError(f"{index.name} and its files differ in {min(set(tensors) ^ set(listed))}")
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path.name} cannot be read as tensors alone: {line}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InputError(f"{path.name} holds something else than named tensors")
    return {str(name): tensor for name, tensor in found.items()}


def main(source: str, target: str) -> int:
    """Convert, and end with one line on stderr if that cannot be done."""
    try:
        write_shards(read_pickles(Path(source)), Path(target))
    except LlmctlError as error:
        sys.stderr.write(f"{error.message}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
