"""llmctl's own commands, and the order in which `--help` lists the stages: data only, nothing is imported for it."""

from __future__ import annotations

from collections.abc import Iterable

from llmctl.hookspecs import Command

SECTIONS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "Pipelines": (
        ("init", "Write a spec for a goal, to begin with.", "llmctl.starter.commands:init"),
        ("check", "Check spec files without running anything.", "llmctl.spec.commands:check"),
        ("plan", "Say what a run would do, and why.", "llmctl.pipeline.commands:plan"),
        ("run", "Run a pipeline; what is done already is not done again.", "llmctl.pipeline.commands:run"),
        ("ps", "List the processes of trainings that run now.", "llmctl.launch.processes:ps"),
        ("curves", "Draw loss, rate and speed of trainings as a page.", "llmctl.pipeline.curves:curves"),
        ("verify-resume", "Check that a stop changes no training.", "llmctl.pipeline.rehearsal:verify_resume"),
        ("checkpoint", "Make a model of a checkpoint.", "llmctl.pipeline.checkpoints:checkpoint"),
        ("why", "Say what differs from the last result.", "llmctl.pipeline.explaining:why"),
        ("render", "Print a spec with all its layers in one.", "llmctl.spec.commands:render"),
        ("lock", "Write down what a spec takes from outside.", "llmctl.pipeline.locking:lock"),
        ("schema", "Print the JSON Schema of spec files.", "llmctl.spec.commands:schema"),
    ),
    "Artifacts": (
        ("ls", "List the artifacts in the store.", "llmctl.store.commands:ls"),
        ("show", "Show an artifact: what it is, its numbers, its files.", "llmctl.store.commands:show"),
        ("lineage", "Show what an artifact was made from.", "llmctl.store.commands:lineage"),
        ("get", "Copy an artifact out of the store.", "llmctl.store.commands:get"),
        ("refs", "List names and tags.", "llmctl.store.tagging:refs"),
        ("tag", "Give an artifact a name that stays.", "llmctl.store.tagging:tag"),
        ("verify", "Check artifacts against their manifests.", "llmctl.store.checking:verify"),
        ("sign", "Sign artifacts with an SSH key.", "llmctl.store.checking:sign"),
        ("push", "Copy artifacts to a remote store.", "llmctl.store.transferring:push"),
        ("pull", "Copy artifacts from a remote store.", "llmctl.store.transferring:pull"),
        ("gc", "Throw away what nothing needs any more.", "llmctl.store.collecting:gc"),
        ("store", "Check what a store's place can do.", "llmctl.store.transferring:store"),
    ),
    "Installation": (
        ("doctor", "Look for what is wrong with this installation.", "llmctl.doctor.commands:doctor"),
        ("plugins", "List, check, start and test plugins.", "llmctl.plugin_commands:plugins"),
        (
            "completion",
            "Complete commands, stages and parameters in the shell.",
            "llmctl.completion.commands:completion",
        ),
    ),
}
"""What `--help` lists under each heading: name, sentence, import string."""

CORE = tuple(Command(name=name, help=text, target=target) for rows in SECTIONS.values() for name, text, target in rows)
HIDDEN = (Command(name="stage", help="Run one stage of a request (internal).", target="llmctl.launch.commands:stage"),)

ORDER = (
    "data", "tokenize", "embed", "train-pretrain", "sft", "rlhf", "prune", "distill", "quantize", "export-onnx",
    "serve", "eval", "compare", "probe", "rag", "prompt", "monitor",
)  # fmt: skip
"""The order of stages in `--help`; others follow by name."""


def stage_order(names: Iterable[str]) -> list[str]:
    """Stage names in pipeline order, then the others by name."""
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
