"""One command per stage, generated from its ports and its `Params` class when it is invoked."""

from __future__ import annotations

import click

from llmctl.stage import Stage


class StageCommand(click.Command):
    """`llmctl STAGE`: scalar parameters and input ports as flags, everything else by `--set`; records on stdout."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        super().__init__(stage.name, help=stage.help)
