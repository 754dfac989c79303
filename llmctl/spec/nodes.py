"""Text to nodes: YAML with the position of every key and value, and the scalars of YAML 1.2's core schema.

PyYAML's own constructors are never used: its YAML 1.1 rules read `3e-4` as text, `on` as true and `1:30` as 90.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from llmctl.spec.diagnostics import Diagnostic, Mark, SpecError, Text

if TYPE_CHECKING:
    from yaml.events import Event

MOST_NODES = 200_000
DEEPEST = 100
REPLACE = "!replace"
"""The one tag that is known: the map behind it replaces a map of a lower layer."""

_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)\Z")
_WORDS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True)
class Scalar:
    """A leaf. `text` is the source text without quotes."""

    mark: Mark
    value: object
    text: str
    via: Mark | None = None
    """Where the expression stands that this value was filled in for."""


@dataclass(frozen=True)
class Sequence:
    """A list."""

    mark: Mark
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Entry:
    """One key of a map and its value."""

    key: Mark
    value: Node


@dataclass(frozen=True)
class Map:
    """A map; keys are text."""

    mark: Mark
    entries: Mapping[str, Entry] = field(default_factory=dict)
    replaces: bool = False
    """Whether it was written with `!replace`: it takes the place of a map below it instead of being merged into it."""

    def get(self, *path: str) -> Node | None:
        """The value at a path of keys, or None."""
        node: Node = self
        for key in path:
            if not isinstance(node, Map) or key not in node.entries:
                return None
            node = node.entries[key].value
        return node


Node = Scalar | Sequence | Map


def scalar_value(text: str) -> object:
    """The value of a plain scalar by the YAML 1.2 core schema.

    Raises ValueError for an integer of more than 4300 digits.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        return int(text)
    if _OCTAL.match(text) or _HEX.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    if _INFINITE.match(text):
        return float(text.replace(".", "", 1))
    return text


def parse(text: Text, content: str | None = None) -> Node | None:
    """The one document in `text`, or None if it is empty. Raises `SpecError` (E001 to E004).

    `content` is read in place of the text's own; it must have the same layout, since marks point into the text.
    """
    import yaml

    reader = _Reader(text)
    try:
        content = text.content if content is None else content
        for event in yaml.parse(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            reader.take(event)
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        mark = _at(text, place.line, place.column) if place else None
        problem = ", ".join(part for part in (error.problem, error.context) if part)
        fail("E001", f"not YAML: {problem}", mark, _yaml_hint(text, mark))
    except yaml.reader.ReaderError as error:
        before = text.content[: error.position].split("\n")
        fail("E001", f"not YAML: {error.reason}", _at(text, len(before) - 1, len(before[-1])))
    return reader.root


def texts(node: Node | None) -> list[Scalar]:
    """The texts of a scalar or a list; whatever else stands there is left out."""
    items = node.items if isinstance(node, Sequence) else [node]
    return [item for item in items if isinstance(item, Scalar) and isinstance(item.value, str)]


def maps(node: Node | None) -> list[Map]:
    """The maps of a list."""
    return [item for item in node.items if isinstance(item, Map)] if isinstance(node, Sequence) else []


def node_of(value: object, mark: Mark, depth: int = 0) -> Node:
    """Plain JSON values as nodes that all stand at `mark`. Raises SpecError (E002)."""
    if depth > DEEPEST:
        fail("E002", f"nested deeper than {DEEPEST} levels", mark)
    if isinstance(value, Mapping):
        return Map(mark, {str(key): Entry(mark, node_of(item, mark, depth + 1)) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return Sequence(mark, tuple(node_of(item, mark, depth + 1) for item in value))
    return Scalar(mark, value, "" if value is None else str(value))


def fail(code: str, message: str, mark: Mark | None, hint: str = "") -> NoReturn:
    """Stop at a mistake that makes the rest of the text meaningless."""
    raise SpecError([Diagnostic(code, message, mark, hint)])


def _at(text: Text, line: int, column: int) -> Mark:
    if line >= len(text.lines):  # libyaml points behind the last line where something is missing at the end
        line, column = len(text.lines) - 1, len(text.lines[-1])
    return Mark(text, line + 1, column + 1, line + 1, column + 2)


def _yaml_hint(text: Text, mark: Mark | None) -> str:
    if mark and "\t" in text.lines[mark.line - 1][: mark.column]:
        return "indent with spaces, not tabs"
    if mark and "${{" in text.lines[mark.line - 1]:
        return 'write "${{ … }}" with quotes inside { } and [ ]'
    return ""


@dataclass
class _Open:
    """A collection whose end has not come yet."""

    event: Any
    anchor: str | None
    items: list[Node] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    key: Scalar | None = None
    is_map: bool = False
    size: int = 1


class _Reader:
    """Builds nodes from PyYAML's events; every alias counts as often as it is used."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.root: Node | None = None
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Node, int]] = {}
        self.count = 0

    def mark(self, event: Any) -> Mark:
        start, end = event.start_mark, event.end_mark
        return Mark(self.text, start.line + 1, start.column + 1, end.line + 1, end.column + 1)

    def take(self, event: Event) -> None:
        """Handle one event, by the name of its class: `ScalarEvent` → `scalar`."""
        handler = getattr(self, type(event).__name__.removesuffix("Event").lower(), None)
        if handler is not None:
            handler(event)

    def documentstart(self, event: Any) -> None:
        if self.root is not None:
            fail(
                "E001",
                "a spec is one YAML document, a second one starts here",
                _at(self.text, event.start_mark.line, 0),
            )

    def scalar(self, event: Any) -> None:
        self.refuse_tag(event)
        mark = self.mark(event)
        if "\0" in event.value:
            fail("E001", "a text holds the character NUL", mark, "no path, variable or parameter can hold it")
        value: object = event.value
        if not event.style:  # plain; libyaml gives "", the pure-Python reader None
            try:
                value = scalar_value(event.value)
            except ValueError:
                fail("E001", f"a number of {len(event.value)} digits", mark, "quote it if it is text")
        self.finish(Scalar(mark, value, event.value), event.anchor, 1, 1)

    def alias(self, event: Any) -> None:
        if event.anchor not in self.anchors:
            inside = any(open_.anchor == event.anchor for open_ in self.stack)
            problem = "stands inside the value it names" if inside else "is not defined above"
            fail("E001", f"alias `*{event.anchor}` {problem}", self.mark(event))
        node, size = self.anchors[event.anchor]
        self.finish(node, None, size, size)

    def sequencestart(self, event: Any) -> None:
        self.open(event, is_map=False)

    def mappingstart(self, event: Any) -> None:
        self.open(event, is_map=True)

    def open(self, event: Any, is_map: bool) -> None:
        self.refuse_tag(event)
        if len(self.stack) >= DEEPEST:
            fail("E002", f"nested deeper than {DEEPEST} levels", self.mark(event))
        self.stack.append(_Open(event, event.anchor, is_map=is_map))

    def sequenceend(self, event: Any) -> None:
        done = self.stack.pop()
        self.finish(Sequence(self.span(done, event), tuple(done.items)), done.anchor, done.size, 1)

    def mappingend(self, event: Any) -> None:
        done = self.stack.pop()
        replaces = done.event.tag == REPLACE
        self.finish(Map(self.span(done, event), done.entries, replaces), done.anchor, done.size, 1)

    def span(self, done: _Open, event: Any) -> Mark:
        start, end = done.event.start_mark, event.end_mark
        return Mark(self.text, start.line + 1, start.column + 1, end.line + 1, end.column + 1)

    def finish(self, node: Node, anchor: str | None, size: int, new: int) -> None:
        """A value of `size` nodes, `new` of them not counted yet, becomes a key, an item, an entry or the root."""
        if anchor is not None:
            self.anchors[anchor] = (node, size)
        self.count += new
        if self.count > MOST_NODES:
            fail("E002", f"more than {MOST_NODES} values", node.mark, "aliases count as often as they are used")
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1]
        parent.size += size
        if not parent.is_map:
            parent.items.append(node)
        elif parent.key is None:
            parent.key = self.check_key(parent, node)
        else:
            parent.entries[parent.key.text] = Entry(parent.key.mark, node)
            parent.key = None

    def check_key(self, parent: _Open, node: Node) -> Scalar:
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            shown = f"`{node.text}`" if isinstance(node, Scalar) else "a map or list"
            fail("E003", f"a key must be plain text, not {shown}", node.mark, "quote it")
        if node.value in parent.entries:
            first = parent.entries[node.value].key
            fail("E004", f"duplicate key `{node.value}`, first on line {first.line}", node.mark)
        return node

    def refuse_tag(self, event: Any) -> None:
        if event.tag is None:
            return
        mark = self.mark(event)
        if event.tag == REPLACE:
            if type(event).__name__ == "MappingStartEvent":
                return
            hint = "lists and single values replace what is below them anyway"
            fail("E001", f"`{REPLACE}` stands before a map only", mark.part(REPLACE), hint)
        fail("E001", f"tags are not allowed: `{event.tag}`", mark, "a spec holds plain values only")
