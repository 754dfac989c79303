"""Put one value into a document: at a path of keys and places in lists, or at the end of a list."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from llmctl.spec.diagnostics import Mark, Text
from llmctl.spec.files import display, home_path
from llmctl.spec.layers import at, long_forms, merge, merge_maps
from llmctl.spec.nodes import Map, Node, Scalar, fail, node_of
from llmctl.spec.nodes import Sequence as List

Steps = Sequence[tuple[str | int, Mark]]
Default = Callable[[Sequence[str | int]], Any]
"""What a parameter is where nothing sets it, as plain JSON; None if it is not known."""


def placed(document: Map, path: Steps, value: Node, default: Default, *, appends: bool = False) -> Map:
    """`document` with `value` at `path`, or with its items behind those of the list that is there.

    A list that nothing sets is that of the parameter's default. Raises SpecError (E020) for a place that is not there.
    """
    keys = [(step, mark) for step, mark in _leading_keys(path)]
    rest = path[len(keys) :]
    if rest or appends:
        mark = path[-1][1]
        names = [step for step, _ in keys]
        below = document.get(*names)
        if below is None:
            plain = default(names)
            below = None if plain is None else node_of(plain, mark)
        value = _inside(below, rest, value, ".".join(names), mark, appends)
    return merge_maps(document, long_forms(at(keys, value)))


def _leading_keys(path: Steps) -> list[tuple[str, Mark]]:
    found = []
    for step, mark in path:
        if isinstance(step, int):
            break
        found.append((step, mark))
    return found


def _inside(node: Node | None, path: Steps, value: Node, where: str, mark: Mark, appends: bool) -> Node:
    """`node` with the value at the rest of a path that leads through places of lists."""
    if not path:
        return _appended(node, value, where, mark) if appends else value if node is None else merge(node, value)
    (step, here), rest = path[0], path[1:]
    if isinstance(step, int):
        items = node.items if isinstance(node, List) else ()
        if step >= len(items):
            has = f"it has {len(items)} items" if isinstance(node, List) else "it is no list"
            fail(
                "E020",
                f"there is no `{where}[{step}]`: {has}",
                here,
                f"{where}+=… appends" if isinstance(node, List) else "",
            )
        changed = _inside(items[step], rest, value, f"{where}[{step}]", mark, appends)
        return List(node.mark if node else here, (*items[:step], changed, *items[step + 1 :]))
    inner = node.get(step) if isinstance(node, Map) else None
    below = node if isinstance(node, Map) else Map(here)
    return merge(below, at([(step, here)], _inside(inner, rest, value, f"{where}.{step}", mark, appends)))


def _appended(node: Node | None, value: Node, where: str, mark: Mark) -> List:
    """The list `node` and behind it `value`, or the items of `value` if it is a list itself."""
    more = value.items if isinstance(value, List) else (value,)
    if isinstance(node, Map) or (isinstance(node, Scalar) and "${{" in node.text):
        what = f"`{node.text}`" if isinstance(node, Scalar) else "a map"
        fail("E020", f"cannot append to `{where}`: it is {what}, not a list", mark, "give the whole list")
    if node is None:
        return List(mark, more)
    there = node.items if isinstance(node, List) else (node,)  # one reference, where a list may stand
    return List(node.mark, (*there, *more))


def json_node(text: str, mark: Mark) -> Node:
    """The value of a JSON text, every part of it at `mark`. Raises SpecError (E001)."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        fail("E001", f"not JSON: {error}", mark, """as in --set-json 'stage.list=[1, "two"]'""")
    return node_of(value, mark)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def file_text(name: str, mark: Mark, rank: int) -> Text:
    """The text of a file that an option names. Raises SpecError (E011)."""
    path = home_path(name)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        fail("E011", f"{name} is not UTF-8", mark, "save it as UTF-8")
    except (OSError, ValueError) as error:
        fail("E011", f"cannot read {name or 'a file without a name'}: {getattr(error, 'strerror', error)}", mark)
    return Text(display(path.absolute()), content, path.absolute().parent, rank)
