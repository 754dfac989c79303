"""Which file a spec is, by path or by name, and its bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import UsageError
from llmctl.spec.diagnostics import Mark, Text, suggest
from llmctl.spec.nodes import Map, fail, parse

_SHIPPED_NAME = re.compile(r"[A-Za-z0-9][\w-]*\Z")


@dataclass(frozen=True)
class Found:
    """A spec file, and the absolute directory that its relative paths start from."""

    path: Path | None
    base: Path
    name: str
    """As a person knows it."""


def shipped() -> dict[str, Path]:
    """The specs that come with llmctl, by name: those of the installed package, else those of the checkout."""
    package = Path(__file__).parent.parent
    for directory in (package / "specs", package.parent / "specs"):
        if directory.is_dir():
            return {path.stem: path for path in sorted(directory.glob("*.yaml"))}
    return {}


def find(path_or_name: str | Path) -> Found:
    """An existing file wins; else a shipped spec of that name, which acts as if it lay in `./specs`.

    Raises SpecError (E011) for what is neither.
    """
    text = str(path_or_name)
    if is_there(Path(text), Path.is_file) or not _SHIPPED_NAME.match(text):
        return find_file(Path(text))
    known = shipped()
    if text not in known:
        hint = suggest(text, list(known), "shipped specs")
        fail("E011", f"no file and no shipped spec is called `{text}`", None, hint)
    return Found(known[text], Path.cwd() / "specs", display(known[text]))


def find_file(path: Path) -> Found:
    """A spec by its path. Raises SpecError (E011)."""
    if not is_there(path) or path.is_dir():
        problem = "is a directory" if is_there(path, Path.is_dir) else "no such file"
        near = [entry.name for entry in path.parent.glob("*.y*ml")] if is_there(path.parent, Path.is_dir) else []
        fail("E011", f"cannot read {path}: {problem}", None, suggest(path.name, sorted(near), "specs there"))
    return Found(path, path.absolute().parent, str(path))


def is_there(path: Path, test: Callable[[Path], bool] = Path.exists) -> bool:
    """`test(path)`, and False for what cannot be looked at: a name that is too long, a directory of somebody else."""
    try:
        return test(path)
    except (OSError, ValueError):
        return False


def home_path(text: str) -> Path:
    """A path with `~` and `~user` filled in. UsageError for a user that there is not."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(
            f"there is no home directory for {text.partition('/')[0]}", hint="write the whole path"
        ) from None


def read(found: Found) -> Map:
    """The map in a spec file. Raises SpecError (E001 to E004, E011, E012)."""
    assert found.path is not None
    try:
        data = found.path.read_bytes()
    except OSError as error:
        fail("E011", f"cannot read {found.name}: {error.strerror}", None)
    return document(data, found.name, found.base)


def document(data: bytes, name: str, base: Path) -> Map:
    """The map that the bytes of a spec hold. Raises SpecError (E001 to E004, E011, E012).

    `name` is how a person knows the file, `base` where its relative paths start from.
    """
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig").split("\n")
        line, column = len(before), len(before[-1]) + 1
        text = Text(name, data.decode("utf-8-sig", "replace"), base)
        mark = Mark(text, line, column, line, column + 1)
        fail("E011", f"{name} is not UTF-8 (byte 0x{data[error.start]:02x})", mark, "save it as UTF-8")
    node = parse(Text(name, content.replace("\r\n", "\n"), base))
    if node is None:
        fail("E012", f"{name} is empty", None, "start it with `llmctl: 1` and `name:`")
    if not isinstance(node, Map):
        fail("E012", "a spec is a map of keys, such as `llmctl: 1`", node.mark)
    return node


def display(path: Path) -> str:
    """A path as a person would type it: relative to the current directory if it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
