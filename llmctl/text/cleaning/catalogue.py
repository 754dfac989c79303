"""Which cleaning steps there are. A new one is a class `(params, seed)`, its parameters, and a line here."""

from __future__ import annotations

from typing import Any

from llmctl.stage import load_string
from llmctl.text.cleaning.step import CorpusStep, Step

STEPS = {
    "length": "llmctl.text.cleaning.length:Length",
    "exact-duplicates": "llmctl.text.cleaning.duplicates:ExactDuplicates",
}
"""Name → import string of the class."""


def build(params: Any, seed: int) -> Step | CorpusStep:
    """The step that `params` (one entry of the stage's `steps`) describes; its modules are imported now.

    Raises MachineError, naming the extra, if one that the step needs is not installed.
    """
    made: Step | CorpusStep = load_string(STEPS[params.name])(params, seed)
    return made
