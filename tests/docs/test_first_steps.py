"""The commands of docs/first-steps.md, run in the order of the page with the program that a reader has."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from llmctl.command_table import CORE
from llmctl.starter.goals import GOALS

from .conftest import BLOCKS
from .test_examples import commands, matches

PAGE = [block for block in BLOCKS if block.page == "first-steps.md"]
SHOWN = [row for block in PAGE if block.language == "console" for row in commands(block) if row[1]]


def run(line: str, directory: Path) -> str:
    program = Path(sys.executable).with_name("llmctl")
    assert program.exists(), "llmctl is not installed beside this Python: make setup"
    words = shlex.split(line)
    assert words[0] == "llmctl"
    done = subprocess.run(
        [program, *words[1:]],
        cwd=directory,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout


def test_the_commands_print_what_is_shown(tmp_path):
    message = [{"role": "user", "content": "a"}]
    row = {"prompt": message, "chosen": message, "rejected": message}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert len(SHOWN) >= 3
    for line, output in SHOWN:
        found = run(line, tmp_path)
        assert matches(output.rstrip() + "\n", found.rstrip() + "\n"), found
    assert {path.name for path in tmp_path.glob("*.yaml")} == {"mini.yaml", "mine.yaml"}


def test_every_goal_is_in_the_table(pages):
    assert all(f"| `{name}` |" in pages["first-steps.md"] for name in GOALS)


def test_the_report_shown_has_every_check():
    """By the names of the checks; what stands beside them is of the machine it was made on."""
    from llmctl.doctor.commands import checks

    (report,) = [block.text for block in PAGE if block.language == "text" and "nothing to do" in block.text]
    assert (
        len(report.splitlines()) - 1 == len(checks()) - 3
    )  # cpu-build, conflicts and spec are silent when all is well
    assert {"init", "doctor", "completion"} <= {command.name for command in CORE}
