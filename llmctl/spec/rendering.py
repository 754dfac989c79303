"""A spec with all its layers in one: as a spec again, or value by value with the place that each comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.spec.diagnostics import Report
from llmctl.spec.fields import field_names, is_model, types_at
from llmctl.spec.interpolate import Interpolation
from llmctl.spec.layers import apply_defaults, changed_at, without
from llmctl.spec.nodes import Map, Node, Scalar, scalar_value
from llmctl.spec.nodes import Sequence as List
from llmctl.spec.printing import Verbatim, yaml_text
from llmctl.spec.reading import Reading, open_spec
from llmctl.spec.references import NotAReference, located, parse_reference
from llmctl.spec.resolved import PathRef
from llmctl.spec.validate import plain

if TYPE_CHECKING:
    from llmctl.spec.overrides import Setting
    from llmctl.spec.pipeline import Registry


@dataclass(frozen=True)
class Origin:
    """One value of a rendered spec. `place` is `file:line:column`, or `default` for a parameter that nothing sets."""

    path: str
    value: Any
    place: str
    through: str = ""
    """Where the expression stands that the value was filled in for."""


@dataclass(frozen=True)
class Rendered:
    """The layers of a valid spec in one document, with variables filled in; rows of a matrix stay to be made."""

    document: Map
    reading: Reading
    base: Path

    def plain(self) -> dict[str, Any]:
        """As JSON values, relative paths counting from the spec's directory; a valid spec again."""
        value = plain(_rebased(self.document, self.base))
        assert isinstance(value, dict)
        return value

    def yaml(self) -> str:
        """`plain` as YAML, numbers as they were written."""
        return yaml_text(_written(_rebased(self.document, self.base)))

    def origins(self) -> Iterator[Origin]:
        """Every value with the place it comes from, those of parameters that nothing sets included."""
        yield from _origins(self.document, "")
        stages = self.document.get("stages")
        nodes = {"": self.document} if self.reading.single else {}
        if isinstance(stages, Map):
            maps = {id: entry.value for id, entry in stages.entries.items() if isinstance(entry.value, Map)}
            nodes |= {f"stages.{id}.": node for id, node in maps.items()}
        for prefix, node in nodes.items():
            yield from self._defaults(f"{prefix}with", node)

    def _defaults(self, path: str, node: Map) -> Iterator[Origin]:
        uses, given = node.get("uses"), node.get("with")
        if not isinstance(uses, Scalar):
            return
        model = self.reading.registry.stages[uses.text.partition("@")[0]].load_params()
        yield from _unset([model], given if isinstance(given, Map) else Map(node.mark), path)


def render(
    path_or_name: str | Path, profiles: Sequence[str] = (), sets: Sequence[str | Setting] = (), *, registry: Registry
) -> Rendered:
    """Read a spec as `load_pipeline` does and keep the document. Raises SpecError."""
    found, reading = open_spec(path_or_name, profiles, sets, registry)
    reading.finish(found.path, found.base, tuple(profiles))
    layered = apply_defaults(without(reading.layered, "profiles"))
    return Rendered(without(Interpolation(layered, Report()).whole(), "defaults"), reading, found.base)


def _unset(kinds: Sequence[Any], node: Node, path: str) -> Iterator[Origin]:
    """The defaults of what no layer sets below `node`, whose type is one of `kinds`, in the models inside it too."""
    inside: dict[str | int, Node] = {}
    if isinstance(node, Map):
        inside = {key: entry.value for key, entry in node.entries.items()}
    elif isinstance(node, List):
        inside = dict(enumerate(node.items))
    for key, value in inside.items():
        below = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}"
        yield from _unset([inner for kind in kinds for inner in types_at(kind, [key])], value, below)
    models = [kind for kind in kinds if is_model(kind)]
    if len(models) != 1 or not isinstance(node, Map):
        return
    for key, name in field_names(models[0]).items():
        info = models[0].model_fields[name]
        if key not in inside and not info.is_required():
            default = info.get_default(call_default_factory=True, validated_data={})
            yield Origin(f"{path}.{key}", _json(default), "default")


def _written(node: Node) -> Any:
    """The node as JSON types, numbers with their source text."""
    if isinstance(node, Map):
        return {key: _written(entry.value) for key, entry in node.entries.items()}
    if isinstance(node, List):
        return [_written(item) for item in node.items]
    is_number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
    return Verbatim(node.text) if is_number and scalar_value(node.text) == node.value else node.value


def _origins(node: Node, path: str) -> Iterator[Origin]:
    if isinstance(node, Map) and node.entries:
        for key, entry in node.entries.items():
            yield from _origins(entry.value, f"{path}.{key}" if path else key)
    elif isinstance(node, List) and node.items:
        for number, item in enumerate(node.items):
            yield from _origins(item, f"{path}[{number}]")
    else:
        through = str(node.via) if isinstance(node, Scalar) and node.via else ""
        yield Origin(path, plain(node), str(node.mark), through)


def _json(value: Any) -> Any:
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, by_alias=True)


# -- relative paths ---------------------------------------------------------------------------------------------------

PLACES: tuple[tuple[str, ...], ...] = (
    ("sources", "*", "uri"),
    ("store", "uri"),
    ("store", "remotes", "*"),
    ("secrets", "*", "path"),
    ("stages", "*", "output"),
    ("output",),
)
"""Where a spec holds a path."""
REFERENCES: tuple[tuple[str, ...], ...] = (("stages", "*", "inputs", "*"), ("inputs", "*"))
"""Where it holds a reference, which may be a path."""


def _rebased(document: Map, base: Path) -> Map:
    """`document` with every path of an included file or an option as it reads from `base`."""
    result: Node = document
    for place in PLACES:
        result = changed_at(result, place, lambda node: _path(node, base))
    for reference in REFERENCES:
        result = changed_at(result, reference, lambda node: _reference(node, base))
    assert isinstance(result, Map)
    return result


def _path(node: Node, base: Path) -> Node:
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        return node
    try:
        text = located(node, base)
    except NotAReference:  # a URI, which starts nowhere
        return node
    return Scalar(node.mark, text, text)


def _reference(node: Node, base: Path) -> Node:
    if isinstance(node, List):
        return List(node.mark, tuple(_reference(item, base) for item in node.items))
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        return node
    try:
        found = parse_reference(node, base)
    except NotAReference:  # an expression of a matrix row
        return node
    return Scalar(node.mark, found.uri, found.uri) if isinstance(found, PathRef) else node


def origin_rows(origins: Iterator[Origin]) -> list[Mapping[str, Any]]:
    """Origins as JSON objects."""
    return [
        {"path": item.path, "value": item.value, "from": item.place, "through": item.through or None}
        for item in origins
    ]
