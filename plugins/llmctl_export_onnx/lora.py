"""LoRA adapters beside a decoder: inputs that the graph has for them, and the files with their values.

The convention is ONNX Runtime's own (multi-LoRA): the inputs have defaults of rank 0, so the graph without an adapter
computes what it computed before, plus empty products, which are zeros. Products that fusion has joined are adapted
together: what their weights share is multiplied once, and the rows of the parts keep apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from llmctl import Artifact, StageError, UsageError
from llmctl.nn.peft import Adapter, Factors, read_adapter
from llmctl.nn.transformer import Transformer
from llmctl.ort.adapters import DIRECTORY, DOWN, ENDING, INDEX, MASK, UP, kind_of
from llmctl_export_onnx.fusion import joined_name

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
DIGEST = re.compile(r"[0-9a-f]{64}\Z")
FORMAT = 1
"""The version that is written into a file, of the adapter and of the model."""
JOINED = (("attention.q", "attention.k", "attention.v"), ("ffn.gate", "ffn.up"))
"""The parts of a block that fusion may join, in its order."""


@dataclass(frozen=True, eq=False)
class Named:
    """An adapter, what it will be called, and where it came from."""

    name: str
    adapter: Adapter
    artifact: str
    """Its content id; empty if it is not known."""

    @property
    def idle(self) -> bool:
        """Whether it changes nothing: a fresh adapter that was never trained."""
        return not any(factors.up.any() for factors in self.adapter.values())

    def rounded(self, dtype: torch.dtype) -> Adapter:
        """The adapter as a file in this dtype holds it."""
        return {
            name: Factors(factors.down.to(dtype).float(), factors.up.to(dtype).float())
            for name, factors in self.adapter.items()
        }

    @property
    def rank(self) -> int:
        """The largest of its matrices."""
        return max(len(factors.down) for factors in self.adapter.values())


def read_all(adapters: Sequence[Artifact], names: Sequence[str], model: Transformer, base: str) -> list[Named]:
    """The adapters under their names, by default those of their directories.

    UsageError for names that are too few, double, or no names; InputError for an adapter that does not fit.
    """
    if names and len(names) != len(adapters):
        raise UsageError(
            f"adapter_names has {len(names)} names, and there are {len(adapters)} adapters", hint="name each, in order"
        )
    chosen = list(names) or [_own_name(one) for one in adapters]
    for name in chosen:
        if not NAME.match(name):
            raise UsageError(f"an adapter cannot be called `{name}`", hint="use letters, digits, `.`, `_` and `-`")
        if chosen.count(name) > 1:
            raise UsageError(f"two adapters are called `{name}`", hint="set adapter_names, one for each, in order")
    return [
        Named(name, read_adapter(one.path, model, base), one.id) for name, one in zip(chosen, adapters, strict=True)
    ]


def _own_name(artifact: Artifact) -> str:
    """The name of its directory; in the store that is a digest, of which the beginning is enough."""
    name = artifact.path.resolve().name
    return f"adapter-{name[:12]}" if DIGEST.match(name) else name


@dataclass(frozen=True, eq=False)
class Site:
    """A product of the graph that an adapter can change."""

    name: str
    node: ir.Node
    parts: tuple[str, ...]
    """Our weights in its matrix, from left to right."""
    widths: tuple[int, ...]
    """Columns of each."""

    @property
    def matrix(self) -> ir.TensorProtocol:
        """The stored matrix: `(in, out)`, or `(out, in)` for a FusedMatMul."""
        value = self.node.inputs[1]
        assert value is not None and value.const_value is not None
        return value.const_value

    def factors(self, adapter: Adapter) -> tuple[np.ndarray, np.ndarray] | None:
        """`(in, rank)` and `(rank, out)` float32 of an adapter; None where it leaves the product as it is."""
        groups: dict[int, list[tuple[int, Factors]]] = {}
        for place, part in enumerate(self.parts):
            if part in adapter:
                groups.setdefault(id(adapter[part].down), []).append((place, adapter[part]))
        if not groups:
            return None
        starts = np.cumsum((0, *self.widths))
        downs, ups = [], []
        for group in groups.values():
            down = group[0][1].down.numpy()
            up = np.zeros((len(down), int(starts[-1])), np.float32)
            for place, one in group:
                up[:, starts[place] : starts[place + 1]] = one.up.numpy().T
            downs.append(down.T)
            ups.append(up)
        return np.concatenate(downs, axis=1), np.concatenate(ups, axis=0)


def sites(model: ir.Model, weights: Mapping[str, torch.Tensor], wanted: set[str]) -> list[Site]:
    """The products whose matrices hold any of the weights `wanted`. StageError if one of these is in no product."""
    joined = _joined(weights)
    found = [
        Site(name.removesuffix(".weight"), node, parts, tuple(weights[part].shape[0] for part in parts))
        for node in model.graph
        if (name := _matrix(node))
        for parts in (joined.get(name, (name,)),)
        if wanted.intersection(parts)
    ]
    missing = wanted.difference(*(site.parts for site in found))
    if missing:
        raise StageError(f"the graph has no product with the weight {min(missing)} that an adapter changes")
    return found


def _matrix(node: ir.Node) -> str | None:
    """The name of the stored matrix that a product multiplies with."""
    matrix = node.inputs[1] if node.op_type in ("MatMul", "FusedMatMul") else None
    return matrix.name if matrix is not None and matrix.is_initializer() else None


def _joined(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """The names that fusion gives to joined weights, and what is in them."""
    prefixes = {match[0] for name in weights if (match := re.match(r"blocks\.\d+\.", name))}
    groups = [tuple(f"{prefix}{part}.weight" for part in group) for prefix in prefixes for group in JOINED]
    return {joined_name(group): group for group in groups if all(name in weights for name in group)}


def add_inputs(model: ir.Model, places: Sequence[Site]) -> None:
    """Add `mask * (x A) B` to every product, with defaults that make it nothing."""
    graph = model.graph
    masks: dict[str, ir.Value] = {}
    for site in places:
        source, dtype, kind = site.node.inputs[0], site.matrix.dtype, kind_of(site.name)
        assert source is not None
        rank, columns = f"rank.{site.name}", sum(site.widths)
        rows = site.matrix.shape.numpy()[1 if site.node.op_type == "FusedMatMul" else 0]
        down = _input(graph, site.name + DOWN, np.zeros((rows, 0)), (rows, rank), dtype)
        up = _input(graph, site.name + UP, np.zeros((0, columns)), (rank, columns), dtype)
        if kind not in masks:
            shape = ("adapted_rows", 1, f"rank.{kind}")
            masks[kind] = _input(graph, kind + MASK, np.ones((1, 1, 1)), shape, dtype)
        _add_product(graph, site.node, source, (down, masks[kind], up))


def _add_product(graph: ir.Graph, node: ir.Node, source: ir.Value, factors: tuple[ir.Value, ...]) -> None:
    down, mask, up = factors
    old = node.outputs[0]
    narrow = ir.node("MatMul", [source, down])
    own = ir.node("Mul", [narrow.outputs[0], mask])
    wide = ir.node("MatMul", [own.outputs[0], up])
    total = ir.node("Add", [old, wide.outputs[0]])
    for one in (narrow, own, wide, total):
        one.outputs[0].type = mask.type
    new = total.outputs[0]
    new.shape = old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    total.replace_input_with(0, old)
    if any(output is new for output in graph.outputs):  # a head: its name is the graph's own
        new.name, old.name = old.name, f"{old.name}_unadapted"
    graph.insert_after(node, [narrow, own, wide, total])


def _input(graph: ir.Graph, name: str, default: np.ndarray, shape: Sequence[int | str], dtype: ir.DataType) -> ir.Value:
    """An input that may be left out."""
    tensor = ir.tensor(default.astype(dtype.numpy()), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def write(directory: Path, places: Sequence[Site], adapters: Sequence[Named]) -> None:
    """Write `adapters/NAME.onnx_adapter` for each, and `adapters.json`, which says where they come from."""
    folder = directory / DIRECTORY
    folder.mkdir(parents=True, exist_ok=True)
    for named in adapters:
        file = ort.AdapterFormat()
        file.set_adapter_version(FORMAT)
        file.set_model_version(FORMAT)
        arrays = dict(_arrays(places, named.adapter))
        file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
        try:
            file.export_adapter(str((folder / f"{named.name}{ENDING}").resolve()))
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise StageError(f"cannot write into {folder}: {error}", hint="is the disk full?") from error
    index = {named.name: {"artifact": named.artifact, "rank": named.rank} for named in adapters}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _arrays(places: Sequence[Site], adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    for site in places:
        found = site.factors(adapter)
        if found is not None:
            for ending, array in zip((DOWN, UP), found, strict=True):
                yield site.name + ending, np.ascontiguousarray(array, site.matrix.dtype.numpy())
