"""The standard library of the running interpreter as a corpus: its source files read by `ast`, never imported."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

from llmctl import InputError, MachineError, UsageError

FOREIGN = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
EXCLUDED = FOREIGN | {
    *("idlelib", "lib2to3", "turtledemo", "encodings", "ensurepip", "pydoc_data"),
    # Gone in 3.12 or 3.13: leaving them out keeps the corpus alike between versions, and the answers useful.
    *("distutils", "asynchat", "asyncore", "imp", "smtpd", "aifc", "cgi", "cgitb", "chunk", "crypt", "imghdr"),
    *("mailcap", "nntplib", "pipes", "sndhdr", "sunau", "telnetlib", "uu", "xdrlib", "tix"),
}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
COMPILED = (
    *("sys", "os", "time", "math", "cmath", "itertools", "gc", "array", "binascii", "zlib", "unicodedata", "select"),
    *("errno", "faulthandler", "marshal", "mmap", "fcntl", "resource", "termios", "atexit", "pyexpat", "winreg"),
)
"""Modules without source, or (os) with names from one; they are harmless to import, so the interpreter is asked."""
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Entity:
    """A public function or class at the top level of a module.

    `signature` is what `inspect.signature` would print. `certain` is False where the name is bound again later (a C
    implementation takes its place), so that only its module is sure; `plain` is True for a function without decorators
    and annotations whose defaults are literals.
    """

    name: str
    module: str
    kind: str
    signature: str
    doc: str
    certain: bool
    plain: bool
    methods: tuple[tuple[str, str], ...] = ()
    """Signature and first paragraph of the documented public methods."""

    @property
    def qualified(self) -> str:
        """Module and name: `shutil.copytree`."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Module:
    """One module: what it says about itself, what it defines, and which names it offers."""

    name: str
    doc: str
    source: str
    entities: tuple[Entity, ...]
    offers: frozenset[str]
    methods: frozenset[str]
    """Names of the methods and attributes of all its classes, private ones included."""
    stars: tuple[str, ...] = ()
    """Modules whose public names it offers too (`from .tasks import *`)."""


def library() -> Path:
    """The directory of the interpreter's own library."""
    return Path(sysconfig.get_paths()["stdlib"])


def module_files(patterns: Sequence[str] = ()) -> dict[str, Path]:
    """Source file of every public module, by dotted name, sorted; `patterns` (`json`, `email.*`) choose among them.

    UsageError for a pattern that fits nothing, MachineError if the library has no source files.
    """
    root = library()
    found: dict[str, Path] = {}
    for path in source_files():
        parts = path.relative_to(root).parts
        names = [part.removesuffix(".py") for part in parts]
        if names[-1] == "__init__":
            names.pop()
        if not names or any(_hidden(name) for name in names) or parts[0].startswith("config-"):
            continue
        found[".".join(names)] = path
    if not found:
        raise MachineError(f"no source files of the standard library in {root}", hint="use a Python with its library")
    if not patterns:
        return dict(sorted(found.items()))
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in found if fnmatchcase(name, pattern)}
        if not fitting:
            raise UsageError(
                f"no module of the standard library is called `{pattern}`",
                hint="names are dotted, * fits any part; private and C modules have no source to read",
            )
        chosen |= fitting
    return {name: found[name] for name in sorted(chosen)}


def source_files() -> list[Path]:
    """Every source file of the library, private ones included, without tests and installed packages."""
    found = []
    for directory, names, files in os.walk(library()):
        names[:] = [name for name in names if name not in FOREIGN]
        found += [Path(directory, file) for file in files if file.endswith(".py")]
    return sorted(found)


def _hidden(name: str) -> bool:
    return name in EXCLUDED or name.startswith("_") or not name.isidentifier()


def read_module(name: str, path: Path) -> Module:
    """Parse one source file; InputError if it is none."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(
            f"{path} is no readable Python source: {error}", hint="repair the Python installation"
        ) from error
    bound: dict[str, int] = {}
    stars: list[tuple[int, str]] = []
    offered: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _statements(tree.body):
        for found in _bindings(node):
            bound[found] = bound.get(found, 0) + 1
        if isinstance(node, ast.ImportFrom):
            origin = _origin(node, package)
            if any(alias.name == "*" for alias in node.names):
                stars.append((node.lineno, origin))
            elif origin.partition(".")[0] == name.partition(".")[0]:
                offered |= {alias.asname or alias.name for alias in node.names}
    exported = _exported(tree)
    moved = _moved(tree)
    starred = bool(stars)
    entities = tuple(
        _entity(node, name, certain=bound[node.name] == 1 and not starred)
        for node in tree.body
        if isinstance(node, Definition) and _public(node.name, exported) and node.name not in moved
    )
    offers = exported if exported is not None else {n for n in offered if not n.startswith("_")}
    if exported is None and "__all__" in bound:  # computed, so any name that it mentions may be among them
        offers |= {part.value for part in ast.walk(tree) if isinstance(part, ast.Constant) and type(part.value) is str}
    return Module(
        name=name,
        doc=inspect.cleandoc(ast.get_docstring(tree) or ""),
        source=source,
        entities=_last_of_each(entities),
        offers=frozenset(offers | {entity.name for entity in entities}),
        methods=frozenset(
            bound
            for owner in ast.walk(tree)
            if isinstance(owner, ast.ClassDef)
            for part in owner.body
            for bound in _bindings(part)
        ),
        stars=tuple(origin for _, origin in stars),
    )


def _last_of_each(entities: Sequence[Entity]) -> tuple[Entity, ...]:
    """Entities in order of their names' first appearance; a later definition replaces an earlier one."""
    return tuple({entity.name: entity for entity in entities}.values())


def _public(name: str, exported: set[str] | None) -> bool:
    return not name.startswith("_") and (exported is None or name in exported)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, those under `if`, `try`, `with` and loops included."""
    for node in body:
        yield node
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _bindings(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, Definition):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Delete):
        targets = [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else node.targets
        for target in targets:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def _origin(node: ast.ImportFrom, package: str) -> str:
    """Absolute name of the module that is imported from."""
    if not node.level:
        return node.module or ""
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _moved(tree: ast.Module) -> set[str]:
    """Names that a top-level statement handles through `globals()`: `ast` of 3.12 takes its deprecated classes away."""
    return {
        part.value
        for node in tree.body
        if not isinstance(node, Definition)
        and any(isinstance(part, ast.Name) and part.id == "globals" for part in ast.walk(node))
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }


def _exported(tree: ast.Module) -> set[str] | None:
    """The names in `__all__` if all of them stand there literally, else None: then every public name counts."""
    names: set[str] = set()
    known = False
    for node in _statements(tree.body):
        value: ast.expr | None = None
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                value = node.value
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "__all__" and call.args:
                value = ast.List(call.args) if call.func.attr == "append" else call.args[0]
        if value is None:
            continue
        try:
            names |= set(ast.literal_eval(value))
        except (ValueError, TypeError):
            return None
        known = True
    return names if known else None


def _entity(node: Definition, module: str, certain: bool) -> Entity:
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    if isinstance(node, FUNCTION):
        signature, plain = signature_of(node.args), _literal(node.args) and not node.decorator_list
        return Entity(node.name, module, "function", signature, doc, certain, plain and node.returns is None)
    methods = [part for part in node.body if isinstance(part, FUNCTION)]
    start = next((part for part in methods if part.name == "__init__"), None)
    shown = [part for part in methods if not part.name.startswith("_") and ast.get_docstring(part)]
    return Entity(
        name=node.name,
        module=module,
        kind="class",
        signature=signature_of(start.args, bound=True) if start else "",
        doc=doc,
        certain=certain,
        plain=False,
        methods=tuple(
            (f"{node.name}.{part.name}{signature_of(part.args)}", first_paragraph(ast.get_docstring(part) or ""))
            for part in shown
        ),
    )


def signature_of(arguments: ast.arguments, bound: bool = False) -> str:
    """The parameters as `inspect.signature` prints them, without annotations; without the first one if `bound`."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts: list[str] = []
    for index, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        if not (bound and index == 0):
            parts.append(argument.arg + (f"={ast.unparse(default)}" if default else ""))
        if index + 1 == len(arguments.posonlyargs) and parts:
            parts.append("/")
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(argument.arg + (f"={ast.unparse(value)}" if value else ""))
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(parts)})"


def _literal(arguments: ast.arguments) -> bool:
    """Whether `signature_of` is exactly what `inspect.signature` prints: literal defaults, no annotations."""
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    defaults = [value for value in [*arguments.defaults, *arguments.kw_defaults] if value]
    return all(argument.annotation is None for argument in every if argument) and all(
        isinstance(value, ast.Constant) and type(value.value) in (int, str, bool, type(None)) for value in defaults
    )


def first_paragraph(doc: str) -> str:
    """The docstring up to its first blank line, on one line."""
    return " ".join(re.split(r"\n\s*\n", inspect.cleandoc(doc).strip(), maxsplit=1)[0].split())


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring, on one line, with its full stop if it has one."""
    return re.split(r"(?<=[.!?])\s", first_paragraph(doc), maxsplit=1)[0]


def providers(modules: Sequence[Module]) -> dict[str, set[str]]:
    """For every public name the modules that offer it, by definition, re-export or `from … import *`."""
    by_name = {module.name: module for module in modules}

    def offers(module: Module, seen: frozenset[str]) -> set[str]:
        names = set(module.offers)
        for star in module.stars:
            if star in by_name and star not in seen:
                names |= offers(by_name[star], seen | {star})
        return names

    found: dict[str, set[str]] = {}
    for module in modules:
        for name in offers(module, frozenset({module.name})):
            found.setdefault(name, set()).add(module.name)
    return found


def compiled_names() -> set[str]:
    """Public names of the modules that have no source to read, as far as this platform has them."""
    names: set[str] = set()
    for module in COMPILED:
        with suppress(ImportError):
            names |= {name for name in dir(import_module(module)) if not name.startswith("_")}
    return names


def identifiers(paths: Sequence[Path]) -> set[str]:
    """Every word that could be an identifier in the given source files, comments and strings included."""
    word = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
    return {name for path in paths for name in word.findall(path.read_text(encoding="utf-8", errors="replace"))}
