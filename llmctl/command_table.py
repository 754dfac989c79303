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
    Command(name="ls", help="List the artifacts in the store.", target="llmctl.store.commands:ls"),
    Command(
        name="show", help="Show an artifact: what it is, its numbers, its files.", target="llmctl.store.commands:show"
    ),
    Command(name="lineage", help="Show what an artifact was made from.", target="llmctl.store.commands:lineage"),
    Command(name="why", help="Say what differs from the last result.", target="llmctl.pipeline.explaining:why"),
    Command(name="get", help="Copy an artifact out of the store.", target="llmctl.store.commands:get"),
    Command(name="verify", help="Check artifacts against their manifests.", target="llmctl.store.checking:verify"),
    Command(name="sign", help="Sign artifacts with an SSH key.", target="llmctl.store.checking:sign"),
    Command(name="refs", help="List names and tags.", target="llmctl.store.tagging:refs"),
    Command(name="tag", help="Give an artifact a name that stays.", target="llmctl.store.tagging:tag"),
    Command(name="push", help="Copy artifacts to a remote store.", target="llmctl.store.transferring:push"),
    Command(name="pull", help="Copy artifacts from a remote store.", target="llmctl.store.transferring:pull"),
    Command(name="gc", help="Throw away what nothing needs any more.", target="llmctl.store.collecting:gc"),
    Command(name="store", help="Check what a store's place can do.", target="llmctl.store.transferring:store"),
    Command(name="plugins", help="List plugins: stages, hooks, failures.", target="llmctl.cli:plugins"),
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
