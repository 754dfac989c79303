"""Which projects use a store that is not their own, and the names that each of them last wrote.

A project's own store lies in its `.llmctl/`. In any other one, two projects may have pipelines of one name: what the
second run writes over the first one's names must not make the first one's results garbage. So each project keeps its
names under `roots/<digest of its directory>/` as well, and garbage collection takes them as roots.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.store.layout import HOME, Layout

PROJECT = "project.json"


@dataclass(frozen=True, kw_only=True)
class Root:
    """A project that is registered in a store."""

    folder: Path
    directory: str
    host: str

    @property
    def gone(self) -> bool:
        """Whether this host should have the project's directory and has not."""
        return self.host == socket.gethostname() and not Path(self.directory).is_dir()

    def refs(self) -> Iterator[dict[str, Any]]:
        """What the project's names point at."""
        from llmctl.store.names import read_json

        for path in sorted(self.folder.glob("*/*.json")):
            if ref := read_json(path):
                yield ref


def project_directory() -> Path:
    """The nearest parent directory that has `.llmctl/`, else the current one."""
    here = Path.cwd()
    return next((parent for parent in (here, *here.parents) if (parent / HOME).is_dir()), here)


def project_refs(layout: Layout) -> tuple[Path, ...]:
    """Where this project keeps its own copy of its names, registering it; nowhere in its own store."""
    directory = project_directory()
    return () if _is_own(layout, directory) else (register(layout, directory),)


def may_own_names(layout: Layout) -> bool:
    """Whether names in `refs/` may be taken for this project's: not in the own store of another one."""
    return layout.root.parent.name != HOME or _is_own(layout, project_directory())


def _is_own(layout: Layout, directory: Path) -> bool:
    return layout.root.resolve().is_relative_to((directory / HOME).resolve())


def register(layout: Layout, directory: Path) -> Path:
    """Make a project known to the store; the folder of its names, laid out like `refs/`."""
    from llmctl.store.commit import create_json
    from llmctl.store.names import timestamp

    folder = _folder(layout, directory)
    if not (folder / PROJECT).exists():
        value = {"directory": str(directory.resolve()), "host": socket.gethostname(), "since": timestamp()}
        create_json(layout, folder / PROJECT, value)
    return folder


def own_folder(layout: Layout) -> Path:
    """Where this project would keep its names, whether or not it is registered."""
    return _folder(layout, project_directory())


def _folder(layout: Layout, directory: Path) -> Path:
    return layout.roots / hashlib.sha256(f"{socket.gethostname()}:{directory.resolve()}".encode()).hexdigest()[:16]


def registered(layout: Layout) -> list[Root]:
    """All projects that have used the store from outside."""
    from llmctl.store.names import read_json

    found = []
    for folder in sorted(path for path in layout.roots.glob("*") if path.is_dir()):
        about = read_json(folder / PROJECT)
        found.append(Root(folder=folder, directory=str(about.get("directory", "?")), host=str(about.get("host", ""))))
    return found
