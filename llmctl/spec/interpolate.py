"""`${{ vars.x }}` and `${{ name }}`: values used in several places of a spec. No functions, no environment."""

from __future__ import annotations

import re
from collections.abc import Sequence as List
from dataclasses import dataclass, field

from llmctl.spec.diagnostics import Mark, Report, did_you_mean
from llmctl.spec.nodes import DEEPEST, MOST_NODES, Entry, Map, Node, Scalar, Sequence, fail

UNKNOWN = object()
"""Stands for a value that could not be found; it has been reported and must cause no further errors."""

LONGEST_TEXT = 1_000_000
_EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*\Z")
_LATER = ("matrix", "env")


def interpolate(document: Map, report: Report) -> Map:
    """`document` with every expression replaced; an expression that is a whole scalar keeps its value's type and mark.

    What is undefined is reported (E030) and becomes `UNKNOWN`.
    """
    scope = _Scope(document, report)
    entries = {key: Entry(entry.key, scope.expand(entry.value)) for key, entry in document.entries.items()}
    done = Map(document.mark, entries)
    if _size(done, {}) > MOST_NODES:
        fail("E002", f"more than {MOST_NODES} values once variables are filled in", document.mark)
    return done


@dataclass
class _Scope:
    document: Map
    report: Report
    found: dict[str, Node] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)

    def expand(self, node: Node) -> Node:
        if isinstance(node, Map):
            entries = {key: Entry(entry.key, self.expand(entry.value)) for key, entry in node.entries.items()}
            return Map(node.mark, entries)
        if isinstance(node, Sequence):
            return Sequence(node.mark, tuple(self.expand(item) for item in node.items))
        if isinstance(node.value, str) and "${{" in node.value:
            return self.expand_text(node)
        return node

    def expand_text(self, node: Scalar) -> Node:
        text = str(node.value)
        whole = _EXPRESSION.fullmatch(text)
        if whole and "${{" not in whole[1]:
            return self.look_up(whole[1].strip(), node.mark.part(whole[0]))
        parts: list[str] = []
        end = 0
        for match in _EXPRESSION.finditer(text):
            mark = node.mark.part(match[0])
            value = self.look_up(match[1].strip(), mark)
            if not isinstance(value, Scalar):
                self.report.add("E030", f"`{match[1].strip()}` is a map or list and cannot stand inside text", mark)
                return Scalar(node.mark, UNKNOWN, text)
            if value.value is UNKNOWN:
                return Scalar(node.mark, UNKNOWN, text)
            parts += [text[end : match.start()], value.text]
            end = match.end()
        if "${{" in text[end:]:
            self.report.add("E030", "`${{` has no `}}`", node.mark.part("${{"))
            return Scalar(node.mark, UNKNOWN, text)
        result = "".join([*parts, text[end:]])
        if len(result) > LONGEST_TEXT:
            fail("E002", f"a text of more than {LONGEST_TEXT} characters once variables are filled in", node.mark)
        return Scalar(node.mark, result, result)

    def look_up(self, name: str, mark: Mark) -> Node:
        """The value of an expression; its mark is where the value was written."""
        if name in self.found:
            return self.found[name]
        if name in self.open:
            circle = " → ".join([*self.open[self.open.index(name) :], name])
            return self.undefined(f"`{name}` is defined by itself: {circle}", name, mark)
        if len(self.open) >= DEEPEST:
            fail("E002", f"variables of variables, more than {DEEPEST} deep", mark)
        if not _PATH.match(name):
            hint = "write `vars.NAME` or `name`; there are no functions and no arithmetic"
            return self.undefined(f"`{name}` is not the name of a value", name, mark, hint)
        path = name.split(".")
        if path[0] in _LATER:
            message = f"`{path[0]}` in `${{{{ }}}}` is not supported yet by this version of llmctl"
            self.report.add("E104", message, mark)
            return Scalar(mark, UNKNOWN, name)
        raw = self.document.get(*path) if path == ["name"] or path[0] == "vars" and len(path) > 1 else None
        if raw is None:
            return self.undefined(f"`{name}` is not defined", name, mark, self.near(path))
        self.open.append(name)
        self.found[name] = value = self.expand(raw)
        self.open.pop()
        return value

    def undefined(self, message: str, name: str, mark: Mark, hint: str = "") -> Scalar:
        self.report.add("E030", message, mark, hint)
        return Scalar(mark, UNKNOWN, name)

    def near(self, path: List[str]) -> str:
        """The suggestion for a name that is not defined: the near last part if what stands before it exists."""
        if path[0] != "vars":
            return did_you_mean(path[0], ["name", "vars"]) or "only `vars.NAME` and `name` can be used"
        for depth in range(1, len(path)):
            parent = self.document.get(*path[:depth])
            if isinstance(parent, Map) and path[depth] not in parent.entries:
                return did_you_mean(path[depth], parent.entries)
        return ""


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
