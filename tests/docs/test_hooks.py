"""docs/plugins.md documents every hook with the arguments it really has, and the API that plugins may use."""

from __future__ import annotations

import inspect
import re

import llmctl
from llmctl import hookspecs
from llmctl.registry import HOOKS
from llmctl.stage import Context, Stage


def signatures(text: str) -> dict[str, tuple[str, ...]]:
    """`### name(a, b)` headings of a page: hook → arguments."""
    found = re.findall(r"^### `(\w+)\(([^)]*)\)`$", text, re.MULTILINE)
    return {name: tuple(part.strip() for part in arguments.split(",") if part.strip()) for name, arguments in found}


def test_every_hook_has_a_heading_with_its_exact_arguments(pages):
    expected = {name: tuple(inspect.signature(getattr(hookspecs, name)).parameters) for name in HOOKS}
    assert signatures(pages["plugins.md"]) == expected


def test_a_missing_hook_is_noticed(pages):
    text = pages["plugins.md"]
    for name in HOOKS:
        without = "\n".join(line for line in text.splitlines() if not line.startswith(f"### `{name}("))
        assert set(signatures(text)) - set(signatures(without)) == {name}


def test_a_missing_argument_is_noticed(pages):
    text = pages["plugins.md"].replace("`log_metrics(stage, values, step)`", "`log_metrics(stage, values)`")
    assert signatures(text) != signatures(pages["plugins.md"])


def test_every_method_of_the_context_is_documented(pages):
    public = [name for name, value in vars(Context).items() if not name.startswith("_") and callable(value)]
    missing = [name for name in [*public, "resume_dir"] if f"`ctx.{name}" not in pages["plugins.md"]]
    assert missing == []


def test_every_field_of_a_stage_is_documented(pages):
    missing = [name for name in Stage.__dataclass_fields__ if f"| `{name}` |" not in pages["plugins.md"]]
    assert missing == []


def test_every_public_name_is_listed(pages):
    missing = [name for name in llmctl.__all__ if f"`{name}`" not in pages["plugins.md"]]
    assert missing == []
