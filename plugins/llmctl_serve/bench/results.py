"""The files of a measurement: every number and request as JSON, and a page."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl_serve.bench.load import Record


def write_files(
    result: Mapping[str, Any], records: Sequence[Sequence[Record]], json_: Path | None, html: Path | None
) -> None:
    """Write those that are asked for, `records` being those of the result's loads."""
    if json_ is not None:
        rows = [
            {**load, "records": [record.to_dict() for record in some]}
            for load, some in zip(result["loads"], records, strict=True)
        ]
        write_whole(json_, json.dumps({**result, "loads": rows}, indent=1) + "\n")
    if html is not None:
        from llmctl_serve.bench.page import render

        write_whole(html, render(result, records))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one. Links and modes stay.

    What cannot be replaced, a pipe, a device or a file in a directory of somebody else, is written to as it is.
    """
    if path.exists() and not (path.is_file() and os.access(path.resolve().parent, os.W_OK)):
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, fresh)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
