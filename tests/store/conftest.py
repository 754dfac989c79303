"""A store in a temporary directory, and artifacts to put into it."""

from __future__ import annotations

import json

import pytest

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
