"""Which cleaning steps there are. A new one is a class `(params, seed)`, its parameters, and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmctl.stage import Artifact, load_string
from llmctl.text.cleaning.step import CorpusStep, Step

STEPS = {
    "code": "llmctl.text.cleaning.code:Code",
    "unicode": "llmctl.text.cleaning.unicode:UnicodeRepair",
    "length": "llmctl.text.cleaning.length:Length",
    "boilerplate": "llmctl.text.cleaning.boilerplate:Boilerplate",
    "repeated-lines": "llmctl.text.cleaning.boilerplate:RepeatedLines",
    "language": "llmctl.text.cleaning.language:Language",
    "quality": "llmctl.text.cleaning.quality:Quality",
    "toxicity": "llmctl.text.cleaning.toxicity:Toxicity",
    "pii": "llmctl.text.cleaning.pii:PersonalData",
    "exact-duplicates": "llmctl.text.cleaning.duplicates:ExactDuplicates",
    "near-duplicates": "llmctl.text.cleaning.near_duplicates:NearDuplicates",
    "decontaminate": "llmctl.text.cleaning.decontamination:Decontaminate",
    "select": "llmctl.text.cleaning.balance:Select",
    "balance": "llmctl.text.cleaning.balance:Balance",
    "augment": "llmctl.text.cleaning.augment:Augment",
    "associations": "llmctl.text.cleaning.associations:Associations",
}
"""Name → import string of the class."""


def build(
    params: Any, seed: int, evaluation: Sequence[Path] = (), models: Sequence[Artifact] = ()
) -> Step | CorpusStep:
    """The step that `params` (one entry of the stage's `steps`) describes; its modules are imported now.

    `evaluation` is where the input of that name lies, for the steps that look for it; `models` translate there and
    back.

    Raises MachineError, naming the extra, if one that the step needs is not installed.
    """
    make = load_string(STEPS[params.name])
    more: tuple[Any, ...] = {"decontaminate": (evaluation,), "augment": (evaluation, models)}.get(params.name, ())
    made: Step | CorpusStep = make(params, seed, *more)
    return made
