"""The user's own configuration, `~/.config/llmctl/config.yaml`: only what cannot change a result.

A value that affects results never comes from outside a spec and its command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from llmctl.spec.resolved import Secret

ENVIRONMENT = "LLMCTL_CONFIG"


@dataclass(frozen=True)
class UserConfig:
    """Secrets by name, remote stores by name, and the store that is used where nothing else says so."""

    store: str = ""
    remotes: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    log_format: Literal["", "text", "json"] = ""


def config_path() -> Path:
    """`$LLMCTL_CONFIG`, else `llmctl/config.yaml` in `$XDG_CONFIG_HOME` or `~/.config`."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "llmctl" / "config.yaml"


def user_config() -> UserConfig:
    """What the user's configuration says; the defaults if there is none. Raises SpecError for mistakes in it."""
    path = config_path()
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else UserConfig()


def chosen_log_format(typed: str | None) -> str:
    """What `--log-format` says, else the user's configuration, else `text`."""
    return typed or user_config().log_format or "text"


@cache
def _read(path: Path, _changed: int) -> UserConfig:
    from llmctl.spec.diagnostics import Report
    from llmctl.spec.files import display, document
    from llmctl.spec.nodes import fail
    from llmctl.spec.skeleton import UserModel
    from llmctl.spec.validate import validate

    report = Report()
    node = document(path.read_bytes(), display(path), path.parent)
    found = validate(UserModel, node, node.mark, "", report)
    report.check()
    assert found is not None
    secrets = {
        name: Secret(
            name=name,
            origin=model.origin,
            variable=(model.variable or name) if model.origin == "env" else "",
            path=_beside(path, model.path) if model.path else None,
            command=model.command or "",
            where=str(path),
        )
        for name, model in found.secrets.items()
    }
    if "://" in (found.store.uri or ""):
        uri = node.get("store", "uri") or node.get("store")
        fail("E104", f"`{found.store.uri}` is not supported yet as a store", uri.mark if uri else None, "use a path")
    store = str(_beside(path, found.store.uri)) if found.store.uri else ""
    remotes = {name: uri if "://" in uri else str(_beside(path, uri)) for name, uri in found.store.remotes.items()}
    return UserConfig(store=store, remotes=remotes, secrets=secrets, log_format=found.log_format)


def _beside(path: Path, name: str) -> Path:
    """A path of the file, which counts from the file's directory."""
    from llmctl.spec.files import home_path

    return (path.parent / home_path(name)).absolute()
