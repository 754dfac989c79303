"""`python -m llmctl.nn.unpickle SOURCE TARGET`: a model directory with a `pytorch_model.bin`, as one with safetensors.

A pickle can run any code when it is read. Here torch reads it with `weights_only`, which builds tensors and nothing
else, in a process of its own; no other module of llmctl reads one unless it is told to.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from llmctl.errors import InputError, LlmctlError, StageError
from llmctl.nn.shards import write_shards
from llmctl.text.pooling import POOLING_FILES
from llmctl.text.tokenizer import FILES

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
    except Exception as error:  # the bytes decide what the reader stumbles over
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path.name} cannot be read as tensors alone: {line}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InputError(f"{path.name} holds something else than named tensors")
    return {str(name): tensor for name, tensor in found.items()}


def main(source: str, target: str) -> int:
    """Convert the weights, copy what is no weight and not there yet; one line on stderr if that cannot be done."""
    try:
        tensors = read_pickles(Path(source))
        Path(target).mkdir(parents=True, exist_ok=True)
        write_shards(tensors, Path(target))
        for name in ("config.json", "generation_config.json", *FILES, *POOLING_FILES):
            if (Path(source) / name).is_file() and not (Path(target) / name).exists():
                (Path(target) / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(Path(source) / name, Path(target) / name)
    except (LlmctlError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code if isinstance(error, LlmctlError) else StageError.exit_code
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m llmctl.nn.unpickle SOURCE TARGET")
    sys.exit(main(*sys.argv[1:]))
