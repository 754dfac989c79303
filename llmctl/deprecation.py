"""How a name of the plugin API goes away: it works and warns for one minor version, then it is removed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Deprecated:
    """A name that is to go: its import string meanwhile, what to write instead, and the version without it."""

    target: str
    instead: str
    removed_in: str


def deprecated_attribute(module: str, name: str, table: Mapping[str, Deprecated]) -> Any:
    """The value of a deprecated name of a module, with the warning; AttributeError for one that is not in `table`.

    For a module's `__getattr__`.
    """
    if name not in table:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    from llmctl.stage import load_string

    entry = table[name]
    warn_deprecated(f"{module}.{name}", instead=entry.instead, removed_in=entry.removed_in, stacklevel=4)
    return load_string(entry.target)


def warn_deprecated(what: str, *, instead: str, removed_in: str, stacklevel: int = 3) -> None:
    """Warn the caller's caller that `what` (a name, an argument) is removed in llmctl `removed_in`."""
    warnings.warn(deprecation_text(what, instead, removed_in), DeprecationWarning, stacklevel=stacklevel)


def deprecation_text(what: str, instead: str, removed_in: str) -> str:
    """What is said of whoever uses `what`."""
    return f"{what} is deprecated and will be removed in llmctl {removed_in}; use {instead}"
