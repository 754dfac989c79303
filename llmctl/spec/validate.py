"""A node against a pydantic model: every mistake of it as a diagnostic at the exact place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from llmctl.spec.diagnostics import Mark, Report, did_you_mean, nearest
from llmctl.spec.fields import keys_at, types_at
from llmctl.spec.interpolate import UNKNOWN
from llmctl.spec.nodes import Map, Node, Scalar, scalar_value

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T", bound=BaseModel)
Path = tuple[str | int, ...]
_WORDS = {
    "valid array": "list",
    "valid list": "list",
    "an object": "a map",
    "valid dictionary": "map",
    "Dictionary should": "Map should",
    " after validation": "",
}
_QUOTED: Mapping[str, tuple[type, ...]] = {"int_type": (int,), "float_type": (int, float), "bool_type": (bool,)}


def plain(node: Node) -> Any:
    """The node as JSON types; map entries and lists that hold an `UNKNOWN` are left out."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Map):
        values = {key: plain(entry.value) for key, entry in node.entries.items()}
        return {key: value for key, value in values.items() if value is not UNKNOWN}
    values_ = [plain(item) for item in node.items]
    return UNKNOWN if UNKNOWN in values_ else values_


def has_unknown(node: Node) -> bool:
    """Whether a value below could not be found."""
    if isinstance(node, Scalar):
        return node.value is UNKNOWN
    inner = [entry.value for entry in node.entries.values()] if isinstance(node, Map) else node.items
    return any(has_unknown(item) for item in inner)


def validate(model: type[T], node: Node, owner: Mark, path: str, report: Report) -> T | None:
    """`node` as an instance of `model`, or None after reports.

    `owner` is the key that holds the node: mistakes of the whole are shown there. `path` leads to it in messages.
    The values are validated as JSON, so that a list may become a tuple and text a path, but `"8"` no integer.
    """
    if isinstance(node, Scalar) and node.value is None and node.text == "":
        node = Map(node.mark)  # `with:` and nothing behind it
    if not isinstance(node, Map):
        problem = f"Input should be a map (got {_shown(node)})"
        report.add("E102", f"{path}: {problem}", node.mark, essence=problem)
        return None
    try:
        result = model.model_validate_json(json.dumps(plain(node)))
    except ValidationError as error:
        _Errors(model, node, owner, path, report).add(error.errors(include_url=False))
        return None
    return None if has_unknown(node) else result


@dataclass(frozen=True)
class _Errors:
    model: type[BaseModel]
    node: Map
    owner: Mark
    path: str
    report: Report

    def add(self, errors: List[ErrorDetails]) -> None:
        """Report all errors; the alternatives of a union at one place become one message."""
        errors = [_of_the_tag(error) for error in errors]
        wrong: dict[Path, list[ErrorDetails]] = {}
        misspelt: set[Path] = set()
        for path in [self.real(error["loc"]) for error in errors if error["type"] == "extra_forbidden"]:
            misspelt.add((*path[:-1], self.unknown_key(path)))
        for error in errors:
            absent = error["type"] == "missing"
            path, key = self.real(error["loc"][:-1] if absent else error["loc"]), error["loc"][-1:]
            node = self.look(path)[1]
            if error["type"] == "extra_forbidden" or (absent and (*path, *key) in misspelt):
                continue
            if absent and isinstance(node, Map):
                self.missing_key(path, str(key[0]))
            elif not has_unknown(node):  # else a rule about values we do not all know
                wrong.setdefault(path, []).append(error)
        for path, group in wrong.items():
            self.wrong_value(path, group)

    def real(self, loc: tuple[str | int, ...]) -> Path:
        """`loc` without what is not in the text: names of union members, `[key]`, places in a list of one."""
        path: Path = ()
        node: Node | None = self.node
        for step in loc:
            inner = _step(node, step)
            if inner is not None:
                node, path = inner, (*path, step)
        return path

    def look(self, path: Path) -> tuple[Mark, Node]:
        """The key or item mark at `path`, and the value there."""
        mark, node = self.owner, self.node
        found: Node = node
        for step in path:
            inner = _step(found, step)
            assert inner is not None
            mark = found.entries[str(step)].key if isinstance(found, Map) else inner.mark
            found = inner
        return mark, found

    def name(self, *path: str | int) -> str:
        return ".".join(str(part) for part in (self.path, *path) if part != "")

    def unknown_key(self, path: Path) -> str:
        """Report a key that no model at its place has; returns the one that was probably meant, or nothing."""
        key, parent = str(path[-1]), path[:-1]
        mark, _ = self.look(path)
        if any(key in getattr(kind, "later", ()) for kind in types_at(self.model, parent)):
            self.report.add("E104", f"`{key}` is not supported yet by this version of llmctl", mark)
            return ""
        known = keys_at(self.model, parent)
        near = nearest(key, known)
        listed = f"known keys: {', '.join(known)}" if 0 < len(known) <= 16 else ""
        self.report.add("E101", f"unknown key `{key}`", mark, f"did you mean `{near}`?" if near else listed)
        return near

    def missing_key(self, path: Path, key: str) -> None:
        mark, node = self.look(path)
        later = {name for kind in types_at(self.model, path) for name in getattr(kind, "later", ())}
        assert isinstance(node, Map)
        given = node.entries.get(key)
        if later & set(node.entries) or (given is not None and has_unknown(given.value)):
            return  # told already: by the key of a later version, or by the value that is not known
        mark = given.key if given else mark
        where = self.name(*path)
        self.report.add("E103", f"missing key `{key}`" + (f" in {where}" if where else ""), mark)

    def wrong_value(self, path: Path, errors: list[ErrorDetails]) -> None:
        mark, node = self.look(path)
        messages = list(dict.fromkeys(_message(error) for error in errors))
        text = "; or ".join([messages[0], *(message.removeprefix("Input should be ") for message in messages[1:])])
        key_is_wrong = any(error["loc"][-1:] == ("[key]",) for error in errors)
        if isinstance(node, Scalar) and not key_is_wrong:
            mark, text = node.mark, f"{text} (got {_shown(node)})"
        elif any(error["type"] not in ("value_error", "assertion_error") for error in errors) and not key_is_wrong:
            mark, text = (node.mark if path else self.owner), f"{text} (got {_shown(node)})"
        where = self.name(*path)
        hint = next((found for error in errors if (found := _hint(error, node))), "")
        self.report.add("E102", f"{where}: {text}" if where else text, mark, hint, essence=text)


def _step(node: Node | None, step: str | int) -> Node | None:
    if isinstance(node, Map):
        return node.entries[str(step)].value if str(step) in node.entries else None
    if isinstance(node, Scalar) or node is None:
        return None
    return node.items[step] if isinstance(step, int) and step < len(node.items) else None


def _message(error: ErrorDetails) -> str:
    if error["type"] in ("value_error", "assertion_error"):
        return str(error["ctx"]["error"]) or "Value error"
    if error["type"] == "missing":  # of a tuple
        return f"item {error['loc'][-1]} is missing"
    text = error["msg"]
    for pydantic_word, word in _WORDS.items():
        text = text.replace(pydantic_word, word)
    return text


def _shown(node: Node) -> str:
    if isinstance(node, Map):
        return "a map"
    if not isinstance(node, Scalar):
        return "a list"
    if isinstance(node.value, str) or node.value is None:
        text = repr(node.value) if node.value is not None else "nothing"
    else:
        text = json.dumps(node.value)
    return text if len(text) <= 60 else text[:57] + "…'"


def _of_the_tag(error: ErrorDetails) -> ErrorDetails:
    """A union that knows no such tag, as a mistake in the value of the tag's own key."""
    if error["type"] != "union_tag_invalid":
        return error
    ctx = error["ctx"]
    place = (*error["loc"], str(ctx["discriminator"]).strip("'"))
    message = f"Input should be {ctx['expected_tags']}"
    return {**error, "type": "literal_error", "loc": place, "msg": message, "ctx": {"expected": ctx["expected_tags"]}}


def _hint(error: ErrorDetails, node: Node) -> str:
    """The way out where one can be told from the type of error and the text."""
    if not isinstance(node, Scalar):
        return ""
    kind = error["type"]
    if kind == "string_type" and isinstance(node.value, bool | int | float):
        return f'quote it: "{node.text}"'
    if kind in ("int_type", "float_type", "bool_type") and isinstance(node.value, str):
        if type(scalar_value(node.text)) in _QUOTED[kind]:
            return "remove the quotes"
        if kind == "bool_type":
            return "write true or false"
    choices: Mapping[str, Any] = error.get("ctx") or {}
    if kind in ("literal_error", "enum") and isinstance(node.value, str):
        expected = str(choices["expected"]).replace(" or ", ",").split(",")
        return did_you_mean(node.value, [part.strip("' ") for part in expected])
    return ""
