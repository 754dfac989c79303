"""Every hook that llmctl calls, on one screen. A plugin implements any of them with `llmctl.hookimpl`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from llmctl.generator import Generator
    from llmctl.stage import Artifact, Context, Stage

hookspec = pluggy.HookspecMarker("llmctl")
hookimpl = pluggy.HookimplMarker("llmctl")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that is no stage: its name, one sentence, and the import string of a `click.Command`."""

    name: str
    help: str
    target: str
    extra: str = ""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A format that the stage `data` can read: its name, the endings of its files, and the import string of a function.

    The function takes a `pathlib.Path` and yields a mapping for every document, the text under `text` unless the user's
    `fields` say otherwise. What it raises is reported as a fault of that file, after the documents before it.
    """

    name: str
    endings: tuple[str, ...]
    read: str
    install: str = ""
    """The command that installs what `read` imports."""


@hookspec
def register_stages() -> Sequence[Stage]:
    """Return the stages this plugin offers."""
    raise NotImplementedError


@hookspec
def register_commands() -> Sequence[Command]:
    """Return the commands, other than stages, that this plugin offers."""
    raise NotImplementedError


@hookspec
def register_readers() -> Sequence[Reader]:
    """Return the file formats, other than those it knows, that the stage `data` is to read."""
    raise NotImplementedError


@hookspec(firstresult=True)
def run_stage(stage: Stage, context: Context, call: Callable[[], None]) -> bool | None:
    """Run one stage by `call()` and return True; wrap it (`wrapper=True`) to time, log or retry."""


@hookspec
def log_metrics(stage: str, values: Mapping[str, float], step: int | None) -> None:
    """Receive the numbers of a running stage; an exception here is reported and never stops the stage."""


@hookspec(firstresult=True)
def open_generator(artifact: Artifact, options: Mapping[str, Any]) -> Generator | None:
    """Open a model for generation, or return None if the artifact's type is not yours.

    `options` may hold `device` ("cpu", "cuda", "auto"), `threads` (int, 0 = all cores) and `dtype`.
    """
