"""A store in a temporary directory, and artifacts to put into it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from llmctl.cli import root
from llmctl.errors import LlmctlError
from llmctl.store import Store
from llmctl.store.hashing import plain_files


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    found = Store(tmp_path / "store")
    found.create()
    return found


@pytest.fixture
def put(store):
    """Commit files: `put({"a.json": "1"}, type="report")` → Artifact."""

    def commit(files, type="report", metadata=None, **provenance):
        directory = store.staging() / "out"
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        names = plain_files(directory)
        artifact = store.commit(directory, type, names, metadata=metadata or {}, provenance=provenance)
        directory.parent.rmdir()
        return artifact

    return commit


@pytest.fixture
def rows():
    """The text of a JSON Lines file."""
    return lambda *values: "".join(json.dumps(value) + "\n" for value in values)


@dataclass
class Done:
    """What a command gave: its exit code, what it printed, and its error's line and hint."""

    code: int
    out: str
    err: str
    error: str
    hint: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run a command in this process, which saves its start-up: `call("gc", "--store", store.root)` → Done.

    Nothing of the developer's own settings is seen.
    """
    for name in [name for name in os.environ if name.startswith(("LLMCTL_", "AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "cwd").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home/.config"))

    def invoke(*args):
        result = CliRunner().invoke(root, [str(arg) for arg in args])
        error = result.exception
        if error is None or isinstance(error, SystemExit):
            return Done(result.exit_code, result.stdout, result.stderr, "", "")
        if not isinstance(error, LlmctlError):
            raise error
        return Done(error.exit_code, result.stdout, result.stderr, error.message, error.hint or "")

    return invoke


@pytest.fixture
def aged():
    """Make files and directories look as if they had not been touched for some days: `aged(40, path, …)`."""

    def age(days, *paths):
        then = time.time() - days * 86_400
        for path in paths:
            for found in (path, *(path.rglob("*") if path.is_dir() else ())):
                os.utime(found, (then, then))

    return age
