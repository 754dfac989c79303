"""Export a model to an ONNX bundle and prove that it gives the same answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmctl import Artifact, In, Out, Stage, hookimpl

if TYPE_CHECKING:
    from llmctl.generator import Generator

EXPORT_ONNX = Stage(
    name="export-onnx",
    help="Export a model to an ONNX bundle and prove that it gives the same answers.",
    inputs={
        "model": In("model.hf"),
        "adapters": In("model.adapter", optional=True, many=True, help="LoRA adapters to serve beside the model"),
        "data": In("dataset.chat", "dataset.tokens", optional=True, help="prompts of the parity check"),
    },
    outputs={"model": Out("model.onnx"), "metrics": Out("metrics")},
    params="llmctl_export_onnx.params:ExportParams",
    run="llmctl_export_onnx.run:run",
    extra="optimum",
    rev=5,  # decoders take `num_logits_to_keep`
    headline=("parity.max_abs_diff",),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `export-onnx`."""
    return [EXPORT_ONNX]


@hookimpl
def open_generator(artifact: Artifact, options: Mapping[str, Any]) -> Generator | None:
    """Open `model.onnx` bundles; needs nothing but the base installation."""
    if artifact.type != "model.onnx":
        return None
    from llmctl.ort import generator as engine

    return engine.open_generator(artifact.path, options.get("device", "auto"), options.get("threads", 0))
