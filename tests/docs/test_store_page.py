"""The commands of docs/store.md, run in order in one directory, print what the page shows.

Ids, times and sizes differ from run to run and are not compared. `LLMCTL_UPDATE_GOLDEN=1 pytest
tests/docs/test_store_page.py` writes the outputs anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import DOCS, read_blocks
from .test_examples import commands

PAGE = DOCS / "store.md"
VARYING = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ-[0-9a-f]{4}"), "RUN"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "TIME"),
    (re.compile(r"sha256:[0-9a-f]{4,64}"), "ID"),
    (re.compile(r"SHA256:\S+|[\w-]{43}\.sig"), "KEY"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "DIGEST"),
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,12}\b"), "SHORT"),
    (re.compile(r"[\d.]+ (B|KiB|MiB)\b"), "SIZE"),
    (re.compile(r"observed, in no key: .*\n"), ""),
    (re.compile(r"[ \t]+"), " "),
)


def normal(text: str) -> str:
    """The text without what differs from run to run."""
    for pattern, word in VARYING:
        text = pattern.sub(word, text)
    return text.strip()


class Shell:
    """Runs lines as a person types them, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tools = directory / ".bin"
        tools.mkdir()
        (tools / "llmctl").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m llmctl "$@"\n')
        (tools / "llmctl").chmod(0o755)
        dropped = ("LLMCTL_", "FORCE_COLOR", "CLICOLOR", "AWS_", "XDG_", "PYTHONPATH", "SSH_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        self.env = {
            **kept, "PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(directory), "COLUMNS": "100", "NO_COLOR": "1",
        }  # fmt: skip

    def __call__(self, line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.directory, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
        )  # fmt: skip
        return done.stdout.replace(str(self.directory), "/work")


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell where the spec of the page and its two files are."""
    (tmp_path / "notes").mkdir()
    for name, text in (
        ("one", "A first sentence about words. " * 20),
        ("two", "Another sentence, of other words. " * 20),
    ):
        (tmp_path / f"notes/{name}.md").write_text(f"# {name}\n\n{text}\n")
    for block in read_blocks(PAGE):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    return Shell(tmp_path)


def test_every_command_prints_what_is_shown(shell):
    fresh = PAGE.read_text(encoding="utf-8")
    wrong = []
    for block in read_blocks(PAGE):
        if block.language != "console":
            continue
        lines = []
        for line, shown in commands(block):
            printed = shell(line)
            lines += [f"$ {line}", *printed.rstrip("\n").splitlines()] if printed.strip() else [f"$ {line}"]
            if normal(printed) != normal(shown):
                wrong.append(f"{block.where}: {line}\n{printed}")
        fresh = fresh.replace(block.text, "\n".join(lines) + "\n")
    if os.environ.get("LLMCTL_UPDATE_GOLDEN"):
        PAGE.write_text(fresh, encoding="utf-8")
    else:
        assert not wrong, "\n".join(wrong)


def test_what_differs_is_noticed():
    assert normal("a  2026-01-01T00:00:00Z 12 KiB sha256:00ff00ff") == normal(
        "a 2026-02-01T00:00:01Z 9 B sha256:11ff00ff"
    )
    assert normal("2 of 3 pushed") != normal("3 of 3 pushed")
    assert normal("text  dataset.text") != normal("tokens  dataset.text")
