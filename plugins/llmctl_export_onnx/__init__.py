"""Export a model to an ONNX bundle and prove that it gives the same answers."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

EXPORT_ONNX = Stage(
    name="export-onnx",
    help="Export a model to an ONNX bundle and prove that it gives the same answers.",
    inputs={
        "model": In("model.hf"),
        "data": In("dataset.chat", "dataset.tokens", optional=True, help="prompts of the parity check"),
    },
    outputs={"model": Out("model.onnx"), "metrics": Out("metrics")},
    params="llmctl_export_onnx.params:ExportParams",
    run="llmctl_export_onnx.run:run",
    extra="optimum",
    headline=("parity.max_abs_diff",),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `export-onnx`."""
    return [EXPORT_ONNX]
