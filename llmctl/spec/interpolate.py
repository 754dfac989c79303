"""`${{ vars.x }}`, `${{ matrix.x }}`, `${{ name }}`, `${{ env.X }}`: values by path, without functions or arithmetic.

Variables and the pipeline's name can stand anywhere; the values of a matrix row in the stages that have one; the
environment of the command only where it cannot change a result unseen: `store`, `secrets` and `env`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace

from llmctl.spec.diagnostics import Mark, Report, did_you_mean, suggest
from llmctl.spec.nodes import DEEPEST, MOST_NODES, Entry, Map, Node, Scalar, Sequence, fail

UNKNOWN = object()
"""Stands for a value that could not be found; it has been reported and must cause no further errors."""

LONGEST_TEXT = 1_000_000
_EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*\Z")
_VARIABLE = re.compile(r"\$\{\{\s*vars\.([\w-]+)")
_OF_A_ROW = re.compile(r"\$\{\{\s*matrix\b")
_WITH_ENVIRONMENT = ("store", "secrets", "env")


def has_rows(stage: Map) -> bool:
    """Whether a stage asks for rows; a key with nothing behind it is a key not given."""
    asked = (stage.get("matrix"), stage.get("foreach"))
    return any(node is not None and not (isinstance(node, Scalar) and node.value is None) for node in asked)


def variables_in(node: Node) -> set[str]:
    """The first names of all `${{ vars.… }}` below a node."""
    if isinstance(node, Map):
        return {name for entry in node.entries.values() for name in variables_in(entry.value)}
    if isinstance(node, Sequence):
        return {name for item in node.items for name in variables_in(item)}
    return set(_VARIABLE.findall(node.value)) if isinstance(node.value, str) else set()


class Interpolation:
    """Fills in the expressions of one document. What is undefined is reported (E030) and becomes `UNKNOWN`.

    An expression that is a whole scalar keeps the type and the mark of the value; `Scalar.via` is where it stood.
    """

    def __init__(self, document: Map, report: Report) -> None:
        self._document = document
        self._report = report
        self._found: dict[str, Node] = {}
        self._open: list[str] = []
        self._varying: dict[int, bool] = {}

    def whole(self) -> Map:
        """The document with every expression replaced but those of matrix rows, which `row` fills in per stage."""
        entries = dict(self._document.entries)
        for key, entry in entries.items():
            entries[key] = Entry(entry.key, self._section(key, entry.value))
        done = Map(self._document.mark, entries)
        if _size(done, {}) > MOST_NODES:
            fail("E002", f"more than {MOST_NODES} values once variables are filled in", self._document.mark)
        return done

    def row(self, node: Node, values: Mapping[str, Node]) -> Node:
        """`node` with the expressions of its matrix row filled in; parts without any are shared, not copied."""
        if not self.varies(node):
            return node
        if isinstance(node, Map):
            entries = {key: Entry(entry.key, self.row(entry.value, values)) for key, entry in node.entries.items()}
            return Map(node.mark, entries, node.replaces)
        if isinstance(node, Sequence):
            return Sequence(node.mark, tuple(self.row(item, values) for item in node.items))
        return _Scope(self, matrix=values).expand(node)

    def varies(self, node: Node) -> bool:
        """Whether an expression of a matrix row stands in `node`, which must be part of the document."""
        known = self._varying.get(id(node))
        if known is None:
            if isinstance(node, Scalar):
                known = isinstance(node.value, str) and _OF_A_ROW.search(node.value) is not None
            else:
                inner = [entry.value for entry in node.entries.values()] if isinstance(node, Map) else node.items
                known = any([self.varies(item) for item in inner])
            self._varying[id(node)] = known
        return known

    def _section(self, key: str, node: Node) -> Node:
        if key == "stages" and isinstance(node, Map):
            entries = {name: Entry(entry.key, self._stage(entry.value)) for name, entry in node.entries.items()}
            return Map(node.mark, entries, node.replaces)
        if key == "defaults":
            return self._stage(node)
        return _Scope(self, environment=key in _WITH_ENVIRONMENT).expand(node)

    def _stage(self, node: Node) -> Node:
        rows = isinstance(node, Map) and has_rows(node)
        scope = _Scope(self, keeps_rows=rows)
        if not isinstance(node, Map):
            return scope.expand(node)
        entries = {}
        for key, entry in node.entries.items():
            inner = replace(scope, environment=key in _WITH_ENVIRONMENT, keeps_rows=rows and key != "matrix")
            entries[key] = Entry(entry.key, inner.expand(entry.value))
        return Map(node.mark, entries, node.replaces)

    def variable(self, name: str, mark: Mark) -> Node:
        """The value of `vars.…` or `name`, itself filled in."""
        if name in self._found:
            return self._found[name]
        if name in self._open:
            circle = " → ".join([*self._open[self._open.index(name) :], name])
            return self.undefined(f"`{name}` is defined by itself: {circle}", name, mark)
        if len(self._open) >= DEEPEST:
            fail("E002", f"variables of variables, more than {DEEPEST} deep", mark)
        path = name.split(".")
        raw = self._document.get(*path) if path == ["name"] or path[0] == "vars" and len(path) > 1 else None
        if raw is None:
            return self.undefined(f"`{name}` is not defined", name, mark, self._near(path))
        self._open.append(name)
        self._found[name] = value = _Scope(self).expand(raw)
        self._open.pop()
        return value

    def undefined(self, message: str, name: str, mark: Mark, hint: str = "") -> Scalar:
        """Report E030; the value that stands for it."""
        self._report.add("E030", message, mark, hint)
        return Scalar(mark, UNKNOWN, name)

    def _near(self, path: List[str]) -> str:
        """The suggestion for a name that is not defined: the near last part if what stands before it exists."""
        if path[0] != "vars":
            return (
                did_you_mean(path[0], ["name", "vars", "matrix", "env"]) or "write `vars.NAME`, `matrix.KEY` or `name`"
            )
        for depth in range(1, len(path)):
            parent = self._document.get(*path[:depth])
            if isinstance(parent, Map) and path[depth] not in parent.entries:
                return did_you_mean(path[depth], parent.entries)
        return ""


@dataclass(frozen=True)
class _Scope:
    """What can be named at one place of the document."""

    owner: Interpolation
    matrix: Mapping[str, Node] = field(default_factory=dict)
    environment: bool = False
    keeps_rows: bool = False
    """Leave scalars with an expression of a matrix row as they are, for later."""

    def expand(self, node: Node) -> Node:
        if isinstance(node, Map):
            entries = {key: Entry(entry.key, self.expand(entry.value)) for key, entry in node.entries.items()}
            return Map(node.mark, entries, node.replaces)
        if isinstance(node, Sequence):
            return Sequence(node.mark, tuple(self.expand(item) for item in node.items))
        if isinstance(node.value, str) and "${{" in node.value:
            if self.keeps_rows and _OF_A_ROW.search(node.value):
                return node
            return self.expand_text(node)
        return node

    def expand_text(self, node: Scalar) -> Node:
        text = str(node.value)
        whole = _EXPRESSION.fullmatch(text)
        if whole and "${{" not in whole[1]:
            place = node.mark.part(whole[0])
            value = self.look_up(whole[1].strip(), place)
            return replace(value, via=place) if isinstance(value, Scalar) else value
        parts: list[str] = []
        end = 0
        for match in _EXPRESSION.finditer(text):
            mark = node.mark.part(match[0])
            value = self.look_up(match[1].strip(), mark)
            if not isinstance(value, Scalar):
                what = f"`{match[1].strip()}` is a map or list and cannot stand inside text"
                return self.owner.undefined(what, text, mark)
            if value.value is UNKNOWN:
                return Scalar(node.mark, UNKNOWN, text)
            parts += [text[end : match.start()], value.text]
            end = match.end()
        if "${{" in text[end:]:
            return self.owner.undefined("`${{` has no `}}`", text, node.mark.part("${{"))
        result = "".join([*parts, text[end:]])
        if len(result) > LONGEST_TEXT:
            fail("E002", f"a text of more than {LONGEST_TEXT} characters once variables are filled in", node.mark)
        return Scalar(node.mark, result, result)

    def look_up(self, name: str, mark: Mark) -> Node:
        """The value of an expression; its mark is where the value was written."""
        if not _PATH.match(name):
            hint = "write `vars.NAME` or `name`; there are no functions and no arithmetic"
            return self.owner.undefined(f"`{name}` is not the name of a value", name, mark, hint)
        head, _, rest = name.partition(".")
        if head == "matrix":
            return self._of_the_row(name, rest, mark)
        if head == "env":
            return self._of_the_environment(name, rest, mark)
        return self.owner.variable(name, mark)

    def _of_the_row(self, name: str, key: str, mark: Mark) -> Node:
        if key in self.matrix:
            return self.matrix[key]
        if self.matrix:
            hint = suggest(key, list(self.matrix), "keys of its row")
            return self.owner.undefined(f"`{name}` is not defined", name, mark, hint)
        message = f"`{name}` is not defined here"
        return self.owner.undefined(message, name, mark, "only a stage with `matrix` or `foreach` has a row")

    def _of_the_environment(self, name: str, variable: str, mark: Mark) -> Node:
        if not self.environment:
            hint = "use `vars` and --set; the environment is read in `store`, `secrets` and `env` only"
            return self.owner.undefined(f"`{name}` cannot be used here", name, mark, hint)
        if variable not in os.environ:
            return self.owner.undefined(f"`{name}` is not set", name, mark, f"export {variable}=…" if variable else "")
        return Scalar(mark, os.environ[variable], os.environ[variable])


def _size(node: Node, known: dict[int, int]) -> int:
    """The number of values of the tree, a shared node counted as often as it is used."""
    if id(node) not in known:
        inner = (
            [entry.value for entry in node.entries.values()]
            if isinstance(node, Map)
            else list(node.items)
            if isinstance(node, Sequence)
            else []
        )
        known[id(node)] = 1 + sum(_size(child, known) for child in inner)
    return known[id(node)]
