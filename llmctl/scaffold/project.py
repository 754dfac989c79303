"""A new plugin project: which name it may have, which files it consists of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llmctl.command_table import ORDER
from llmctl.errors import InputError, StageError, UsageError
from llmctl.plugin_check import pinned
from llmctl.registry import RESERVED, Registry
from llmctl.stage import SECTIONS

TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\Z")
LONGEST = 40
PREFIX = "llmctl-"


@dataclass(frozen=True)
class Project:
    """A project by the name of its stage, `demo` or `text-cleaner`; every other name follows from it."""

    name: str

    @property
    def dist(self) -> str:
        """`llmctl-text-cleaner`."""
        return PREFIX + self.name

    @property
    def package(self) -> str:
        """`llmctl_text_cleaner`."""
        return self.dist.replace("-", "_")

    @property
    def variables(self) -> dict[str, str]:
        """What the templates may name."""
        title = "".join(part.capitalize() for part in self.name.split("-"))
        names = {"name": self.name, "dist": self.dist, "package": self.package}
        return {**names, "title": title, "requirement": pinned()}

    def files(self) -> dict[str, str]:
        """Path in the project → text."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        # Autoescaping is for HTML; these are Python, TOML, YAML and Markdown.
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
        )
        return {
            path: environment.get_template(template).render(self.variables)
            for path, template in self._templates().items()
        }

    def _templates(self) -> Mapping[str, str]:
        return {
            "pyproject.toml": "pyproject.toml.jinja",
            "README.md": "README.md.jinja",
            ".gitignore": "gitignore.jinja",
            "llmctl-plugin.json": "llmctl-plugin.json.jinja",
            f"{self.name}.yaml": "spec.yaml.jinja",
            f"{self.package}/__init__.py": "package/__init__.py.jinja",
            f"{self.package}/params.py": "package/params.py.jinja",
            f"{self.package}/run.py": "package/run.py.jinja",
            "tests/conftest.py": "tests/conftest.py.jinja",
            f"tests/test_{self.name.replace('-', '_')}.py": "tests/test_stage.py.jinja",
        }


def project(text: str, registry: Registry) -> Project:
    """The project that `text` names; `llmctl-demo` means `demo`. UsageError for a name that is wrong or taken."""
    name = text.removeprefix(PREFIX)
    if not NAME.match(name) or len(name) > LONGEST:
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").lstrip("0123456789-")[:LONGEST].rstrip("-")
        hint = f"how about `{near}`?" if near else "for example: text-cleaner"
        rule = f"a-z, 0-9 and single hyphens, at most {LONGEST} characters"
        raise UsageError(f"`{text}` is no name for a stage: {rule}", hint=hint)
    other = f"choose another, such as `my-{name}`"
    if name in RESERVED:
        raise UsageError(f"`{name}` is a command of llmctl", hint=other)
    if name in SECTIONS:
        raise UsageError(f"`{name}` is a section of spec files", hint=other)
    for taken, kind in ((registry.stages, "stage"), (registry.commands, "command"), (registry.failures, "plugin")):
        if name in taken:
            raise UsageError(
                f"`{name}` is the name of an installed {kind}", hint=f"{other}; `llmctl plugins` lists them"
            )
    found = Project(name)
    if name in ORDER or find_spec(found.package) is not None:
        raise UsageError(f"`{name}` is a name that llmctl keeps for itself, or an installed package", hint=other)
    return found


def write(project: Project, directory: Path, *, into_existing: bool = False) -> tuple[list[str], list[str]]:
    """Write the project's files; returns (written, kept). Nothing that exists is ever overwritten.

    InputError if `directory` exists and is not empty, unless `into_existing`: then files that are there are kept.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file", hint="give another --directory")
    if directory.is_dir() and any(directory.iterdir()) and not into_existing:
        hint = "give another --directory, or --force to add what is missing; files that exist are kept"
        raise InputError(f"{directory} is not empty", hint=hint)
    written, kept = [], []
    for name, text in project.files().items():
        path = directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            written.append(name)
        except FileExistsError:
            kept.append(name)
        except OSError as error:
            raise StageError(f"cannot write {path}: {error.strerror}", hint="give another --directory") from error
    return written, kept
