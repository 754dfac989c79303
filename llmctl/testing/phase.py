"""One part of a training that is stopped and gone on with, in a process of its own: `python -m llmctl.testing.phase`.

On stdin the JSON of `Phase`. Exit code of the stage; what it raised is a JSON line on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import LlmctlError
from llmctl.stage import Artifact
from llmctl.testing.execution import execute


@dataclass(frozen=True)
class Phase:
    """A stage by name, what it gets, where it works, and after how many steps it is told to stop (0: never)."""

    stage: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Sequence[Mapping[str, Any]]]
    """The fields of each artifact, by bound port."""
    directory: str
    resume: str
    stop: int = 0

    def run(self) -> None:
        """Execute it in this process; raises what the stage raises."""
        from llmctl.registry import get_registry

        stage = get_registry().stages[self.stage]
        values = stage.load_params().model_validate(dict(self.params))
        bound: dict[str, Artifact | list[Artifact] | None] = {}
        for port, declared in stage.inputs.items():
            given = [Artifact(**{**row, "path": Path(row["path"])}) for row in self.inputs.get(port, ())]
            bound[port] = given if declared.many else next(iter(given), None)
        # It is asked at the head of every step, first before step 1.
        execute(stage, values, bound, Path(self.directory), Path(self.resume), self.stop + 1 if self.stop else None)


def main() -> int:
    """Run the phase that stdin describes."""
    phase = Phase(**json.load(sys.stdin))
    try:
        phase.run()
    except LlmctlError as error:
        sys.stdout.write(json.dumps({"message": error.message, "hint": error.hint}) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
