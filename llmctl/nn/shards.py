"""Tensors in safetensors files: one, or shards with the index that transformers reads and writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmctl.errors import InputError, StageError

NAME = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
"""The size above which a model is written in several files; transformers' own default."""


def write_shards(tensors: Mapping[str, Tensor], directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` with an index; the bytes of all tensors.

    Every name gets bytes of its own: tensors that share memory are written once per name. A tensor that is larger has a
    shard to itself. Equal tensors give equal files. StageError if they cannot be written.
    """
    parts = _split(tensors, max_shard_bytes)
    names = [NAME]
    if len(parts) > 1:
        stem, _, ending = NAME.partition(".")
        names = [f"{stem}-{number:05d}-of-{len(parts):05d}.{ending}" for number in range(1, len(parts) + 1)]
    total = sum(tensor.nbytes for tensor in tensors.values())
    try:
        for name, part in zip(names, parts, strict=True):
            save_file(_apart(part), directory / name, metadata={"format": "pt"})
        if len(parts) > 1:
            places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
            count = sum(tensor.numel() for tensor in tensors.values())
            index = {"metadata": {"total_parameters": count, "total_size": total}, "weight_map": places}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (directory / f"{NAME}.index.json").write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StageError(f"cannot write {NAME}: {error}", hint="is the disk full?") from error
    return total


def _split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = []
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > limit:
            parts.append({name: tensor})
            continue
        if size + tensor.nbytes > limit:
            parts.append(part)
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    return [*parts, part] if part or not parts else parts


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous and on the CPU, none sharing memory with another: safetensors refuses those that do."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if place in seen or plain.untyped_storage().nbytes() > plain.nbytes else plain
        seen.add(place)
    return found


def read_shards(directory: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index names.

    Raises InputError if one is missing, damaged, or holds other tensors than the index says.
    """
    single, index = directory / NAME, directory / f"{NAME}.index.json"
    if single.exists() or not index.exists():
        return read_tensors(single, device)
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({Path(name).name for name in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} has no `weight_map`") from error
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = read_tensors(directory / file, device, f"{directory / file} is missing, though the index names it")
        stray = next((name for name in found if Path(places.get(name, "")).name != file), None)
        if stray is not None:
            raise InputError(f"{index.name} and its files differ in {stray}: {file} holds it")
        tensors |= found
    if missing := sorted(set(places) - set(tensors)):
        raise InputError(f"{index.name} and its files differ in {missing[0]}")
    return tensors


def read_tensors(path: Path, device: torch.device | str, missing: str = "") -> dict[str, Tensor]:
    """All tensors of one file. InputError for one that is missing, in the words of `missing` if given, or damaged."""
    if not path.exists():
        raise InputError(missing or f"{path.parent} has no {path.name}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}", hint="copy or download it again") from error
