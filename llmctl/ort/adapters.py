"""LoRA adapters beside one graph: in memory at once, for calls whose rows want one or another.

The graph is one of ONNX Runtime's multi-LoRA convention: a product `x W` that can be adapted has the further inputs
`NAME.lora_A.weight (in, rank)` and `NAME.lora_B.weight (rank, out)` with empty defaults, and adds `x A B`. A file
`adapters/NAME.onnx_adapter` of the bundle holds their values. ONNX Runtime itself applies an adapter to a whole call
(`RunOptions.add_active_adapter`), and not to one with bound memory, as the engine's are.

Here rows of one batch may have different adapters. Those that a call needs stand side by side (`adapter_rows`), so that
their ranks add up, and the graph's input `KIND.lora_mask (rows, 1, rank)` says which of the columns of `x A` are a
row's own: the others are multiplied by 0, which changes no sum. A batch is one call, however many adapters it has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from llmctl.errors import InputError
from llmctl.generator import unknown_adapter

DIRECTORY, ENDING, INDEX = "adapters", ".onnx_adapter", "adapters.json"
"""Where a bundle has its adapters, and what says where they come from."""
DOWN, UP, MASK = ".lora_A.weight", ".lora_B.weight", ".lora_mask"

_NUMBER = re.compile(r"\.\d+(?=\.)")
_FLOATS: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}


def kind_of(site: str) -> str:
    """What one product in every layer shares, its rank and its mask: that of `blocks.3.ffn.up` is `blocks.ffn.up`."""
    return _NUMBER.sub("", site)


class Adapters:
    """The adapters of one session. They are numbered from 1 on, in the order of `names`; 0 is the model as it is."""

    def __init__(self, session: ort.InferenceSession, files: Mapping[str, Path], device: str = "cpu") -> None:
        inputs = {value.name: value for value in session.get_overridable_initializers()}
        self.names = tuple(files)
        self.device = device
        sites = sorted(name.removesuffix(DOWN) for name in inputs if name.endswith(DOWN))
        for name in (wanted for site in sites for wanted in (site + UP, kind_of(site) + MASK)):
            if name not in inputs:  # graphs of other programs have no masks
                raise InputError(
                    f"{next(iter(files.values()))} cannot be used: its graph has no input `{name}`",
                    hint="export the model and its adapters together with `llmctl export-onnx`",
                )
        self.dtypes: dict[str, np.dtype[Any]] = {
            name: _FLOATS[value.type] for name, value in inputs.items() if value.type in _FLOATS
        }
        self.sites: dict[str, tuple[int, int]] = {
            site: (inputs[site + DOWN].shape[0], inputs[site + UP].shape[1]) for site in sites
        }
        """The products that can be adapted, with their widths (in, out)."""
        self._factors = [self._read(path) for path in files.values()]
        self._ones = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ones((1, 1, 1), self.dtypes[name]))
            for name in {kind_of(site) + MASK for site in self.sites}
        }
        self._ranks = [{kind_of(site): one[site + DOWN].shape[1] for site in self.sites} for one in self._factors]
        self._bytes = [sum(matrix.nbytes for matrix in one.values()) for one in self._factors]
        self._own: dict[int, Mapping[str, ort.OrtValue]] = {}

    def number(self, name: str | None) -> int:
        """Of the adapter called `name`; UsageError if there is none."""
        if name is None:
            return 0
        if name not in self.names:
            raise unknown_adapter(name, self.names)
        return self.names.index(name) + 1

    def feeds(self, number: int) -> dict[str, np.ndarray]:
        """The inputs of a call whose rows all have one adapter; none for 0."""
        return dict(self._factors[number - 1]) if number else {}

    def ranks(self, number: int) -> dict[str, int]:
        """Columns that this adapter's products have, by their kinds."""
        return self._ranks[number - 1]

    def size(self, number: int) -> int:
        """Bytes of its matrices."""
        return self._bytes[number - 1]

    def memory_bytes(self, count: int) -> int:
        """Most bytes of all adapters, and of those that `count` rows can have side by side.

        On a device they are twice: there, and in the host's memory.
        """
        several = sorted(self._bytes, reverse=True)[:count]
        held = sum(self._bytes) + (sum(several) if len(several) > 1 else 0)
        return held if self.device == "cpu" else 2 * held

    def own(self, number: int) -> Mapping[str, ort.OrtValue]:
        """The inputs of calls with no other adapter than this one; for 0 they are empty."""
        if number not in self._own:
            self._own[number] = {
                name: ort.OrtValue.ortvalue_from_numpy(matrix, self.device, 0)  # on the CPU the same memory
                for name, matrix in (self._factors[number - 1] if number else self._padded({})).items()
            }
        return self._own[number]

    def own_masks(self, number: int, rows: np.ndarray) -> Mapping[str, ort.OrtValue]:
        """The masks beside them, where the rows have this adapter or none, `rows (B,)`."""
        if (rows == rows[0]).all():
            return self._ones
        own = (rows == number)[:, None, None]
        return {name: ort.OrtValue.ortvalue_from_numpy(own.astype(self.dtypes[name])) for name in self._ones}

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        """The matrices of a file, by the graph's inputs; InputError unless they are this graph's."""
        try:
            stored = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
            found = {name: value.numpy() for name, value in sorted(stored.items())}
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}", hint="export it again") from error
        for name, array in found.items():
            problem = self._misfit(name, array, found)
            if problem:
                raise InputError(
                    f"{path} does not fit the graph: {problem}", hint="export the model and its adapters together"
                )
        return self._padded(found)

    def _padded(self, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """With one rank for all products of a kind, as they share a mask: zeros where an adapter has less."""
        ranks: dict[str, int] = {}
        for name, array in found.items():
            if name.endswith(UP):
                kind = kind_of(name.removesuffix(UP))
                ranks[kind] = max(ranks.get(kind, 0), len(array))
        padded = {}
        for site, (rows, columns) in self.sites.items():
            rank, dtype = ranks.get(kind_of(site), 0), self.dtypes[site + DOWN]
            down, up = np.zeros((rows, rank), dtype), np.zeros((rank, columns), dtype)
            if site + UP in found:
                own = len(found[site + UP])
                down[:, :own], up[:own] = found[site + DOWN], found[site + UP]
            padded[site + DOWN], padded[site + UP] = down, up
        return padded

    def _misfit(self, name: str, array: np.ndarray, others: Mapping[str, np.ndarray]) -> str:
        site = name.removesuffix(DOWN) if name.endswith(DOWN) else name.removesuffix(UP)
        if site not in self.sites:
            return f"it has no input `{name}`"
        other = others.get(site + (UP if name.endswith(DOWN) else DOWN))
        down, up = (array, other) if name.endswith(DOWN) else (other, array)
        if down is None or up is None:
            return f"only one of the two matrices of `{site}` is there"
        rows, columns = self.sites[site]
        if down.ndim != 2 or up.ndim != 2 or down.shape != (rows, up.shape[0]) or up.shape[1] != columns:
            return f"`{site}` is {list(down.shape)} x {list(up.shape)}, the graph's is [{rows}, r] x [r, {columns}]"
        if array.dtype != self.dtypes[name]:
            return f"`{name}` is {array.dtype}, the graph computes in {self.dtypes[name]}"
        return ""


def number_of(adapters: Adapters | None, name: str | None) -> int:
    """The number of the adapter called `name`, 0 for None; UsageError if there is none, or no adapter at all."""
    if adapters is not None:
        return adapters.number(name)
    if name is not None:
        raise unknown_adapter(name, ())
    return 0


def open_adapters(session: ort.InferenceSession, directory: Path, device: str) -> Adapters | None:
    """The adapters of the bundle in `directory`; None where it has none. InputError for one that does not fit."""
    files = {path.name.removesuffix(ENDING): path for path in sorted((directory / DIRECTORY).glob(f"*{ENDING}"))}
    return Adapters(session, files, device) if files else None


def adapter_sources(directory: Path) -> dict[str, dict[str, Any]]:
    """What the bundle says of its adapters, by name: `artifact`, the id that each was made from, and its `rank`."""
    path = directory / DIRECTORY / INDEX
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}
