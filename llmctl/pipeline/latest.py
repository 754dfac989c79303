"""The latest results of a pipeline's stages by name, found with one look at the directory of names."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from llmctl.store.layout import Layout
from llmctl.store.names import read_json


class LatestKeys:
    """The action key that each stage of one pipeline had last."""

    def __init__(self, layout: Layout, pipeline: str) -> None:
        self._folder = layout.refs / pipeline

    def __getitem__(self, stage: str) -> str:
        """The key, empty for a stage that has no result."""
        refs = [ref for path in self._files.get(stage, ()) if (ref := read_json(path))]
        latest = max(refs, key=lambda ref: str(ref.get("time", "")), default=None)
        return str(latest["key"]) if latest and "key" in latest else ""

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """Stage → the files of its names, but for those with a tag."""
        found: dict[str, list[Path]] = {}
        try:
            names = sorted(entry.name for entry in os.scandir(self._folder))
        except OSError:
            return found
        for name in names:
            if name.endswith(".json") and "@" not in name:
                found.setdefault(name.removesuffix(".json").rpartition(".")[0], []).append(self._folder / name)
        return found
