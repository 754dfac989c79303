"""llmctl's own commands, and the order in which `--help` lists the stages: data only, nothing is imported for it."""

from __future__ import annotations

from collections.abc import Iterable

from llmctl.hookspecs import Command

CORE = (
    Command(
        name="run",
        help="Run a pipeline; what is done already is not done again.",
        target="llmctl.pipeline.commands:run",
    ),
    Command(name="plan", help="Say what a run would do, and why.", target="llmctl.pipeline.commands:plan"),
    Command(name="check", help="Check spec files without running anything.", target="llmctl.spec.commands:check"),
    Command(
        name="render",
        help="Print a spec with all its layers in one, or where each value comes from.",
        target="llmctl.spec.commands:render",
    ),
    Command(name="schema", help="Print the JSON Schema of spec files.", target="llmctl.spec.commands:schema"),
    Command(name="ls", help="List the artifacts in the store.", target="llmctl.store.commands:ls"),
    Command(
        name="show", help="Show an artifact: what it is, its numbers, its files.", target="llmctl.store.commands:show"
    ),
    Command(name="lineage", help="Show what an artifact was made from.", target="llmctl.store.commands:lineage"),
    Command(name="get", help="Copy an artifact out of the store.", target="llmctl.store.commands:get"),
    Command(name="plugins", help="List, check, start and test plugins.", target="llmctl.plugin_commands:plugins"),
    Command(name="init", help="Write a spec for a goal, to begin with.", target="llmctl.starter.commands:init"),
    Command(
        name="doctor", help="Look for what is wrong with this installation.", target="llmctl.doctor.commands:doctor"
    ),
    Command(
        name="completion",
        help="Complete commands, stages and parameters in the shell.",
        target="llmctl.completion.commands:completion",
    ),
)
HIDDEN = (Command(name="stage", help="Run one stage of a request (internal).", target="llmctl.launch.commands:stage"),)

ORDER = (
    "data", "tokenize", "embed", "train-pretrain", "sft", "rlhf", "prune", "distill", "quantize", "export-onnx",
    "serve", "eval", "rag", "prompt", "monitor",
)  # fmt: skip
"""The order of stages in `--help`; others follow by name."""


def stage_order(names: Iterable[str]) -> list[str]:
    """Stage names in pipeline order, then the others by name."""
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
