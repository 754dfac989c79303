"""Trace, write, compare; a bundle that does not answer as the model does is not left behind."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.nn.families import from_hf
from llmctl_export_onnx import bundle
from llmctl_export_onnx.params import ExportParams


def run(
    ctx: Context,
    params: ExportParams,
    model: Artifact,
    data: Artifact | None,
    adapters: Sequence[Artifact] | None = None,
) -> None:
    """Export `model` natively or through Optimum, prove it and report."""
    adapters = adapters or ()
    config = bundle.read_config(model.path)
    if params.adapter_names and not adapters:
        raise UsageError("`adapter_names` names the input `adapters`, and there is none", hint="give --adapters")
    target = ctx.output("model")
    native = params.exporter == "native" or (params.exporter == "auto" and _is_ours(config))
    ctx.log(f"exporting through {'our own tracer' if native else 'Optimum'}")
    try:
        if native:
            from llmctl_export_onnx import native as exporter

            values = exporter.export(ctx, params, model, config, data, adapters)
        else:
            from llmctl_export_onnx import foreign

            if adapters:
                raise UsageError(
                    "adapters are exported beside a decoder of our own architectures, not through Optimum",
                    hint="merge the adapter with peft (`merge_and_unload`) and export the result",
                )
            values = foreign.export(ctx, params, model.path, config, data)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in target.glob("*.onnx*"))
    ctx.report({**values, "bytes": size})
    ctx.describe("model", parameters=values["parameters"], exporter="native" if native else "optimum")


def _is_ours(config: dict[str, Any]) -> bool:
    """Whether our transformer computes this model; any other goes through Optimum."""
    try:
        from_hf(config)
    except InputError:
        return False
    return True
