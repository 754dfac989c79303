"""What exists: artifacts by content id, results by action key, names, all in one directory of plain files."""

from __future__ import annotations

from llmctl.store.store import Store

__all__ = ["Store"]
