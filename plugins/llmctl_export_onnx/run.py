"""Trace, write, compare; a bundle that does not answer as the model does is not left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from llmctl import Artifact, Context, InputError
from llmctl.nn.families import from_hf
from llmctl.ort import OrtGenerator, open_bundle
from llmctl_export_onnx import bundle, parity, prompts
from llmctl_export_onnx.params import ExportParams


def run(ctx: Context, params: ExportParams, model: Artifact, data: Artifact | None) -> None:
    """Export `model` natively or through Optimum, prove it and report."""
    config = bundle.read_config(model.path)
    target = ctx.output("model")
    native = params.exporter == "native" or (params.exporter == "auto" and _is_ours(config))
    ctx.log(f"exporting through {'our own tracer' if native else 'Optimum'}")
    try:
        if native:
            values = _native(ctx, params, model.path, config, data)
        else:
            from llmctl_export_onnx import foreign

            values = foreign.export(ctx, params, model.path, config, data)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in target.glob("model.onnx*"))
    ctx.report({**values, "bytes": size})
    ctx.describe("model", parameters=values["parameters"], exporter="native" if native else "optimum")


def _is_ours(config: dict[str, Any]) -> bool:
    """Whether our transformer computes this model; a LLaMA with scaled rotary positions, say, goes through Optimum."""
    try:
        from_hf(config)
    except InputError:
        return False
    return True


def _native(
    ctx: Context, params: ExportParams, source: Path, config: dict[str, Any], data: Artifact | None
) -> dict[str, float | int]:
    import torch

    from llmctl.nn.hf import load_model
    from llmctl.nn.onnx_attention import cache_width
    from llmctl_export_onnx import graph

    model = load_model(source).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    target, shape = ctx.output("model"), model.config
    ctx.progress(0, params.parity_prompts)
    traced = graph.trace(model, params.opset)
    graph.account_weights(traced, model)
    graph.save(traced, target)
    bundle.copy_files(source, target)
    bundle.write_genai_config(
        target,
        config,
        context=shape.context,
        head_size=cache_width(shape),
        kv_heads=shape.kv_heads,
        in_place=True,
        positions=False,
    )

    def reference(tokens: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([tokens]))[0].numpy()  # type: ignore[no-any-return]

    found = prove(ctx, params, reference, open_bundle(target, "cpu", params.threads), source, data)
    return {
        **found.metrics(),
        "gqa_nodes": graph.count_operators(traced, "GroupQueryAttention"),
        "layers": shape.layers,
        "parameters": shape.parameters(),
    }


def prove(
    ctx: Context,
    params: ExportParams,
    reference: parity.Reference,
    generator: OrtGenerator,
    source: Path,
    data: Artifact | None,
) -> parity.Parity:
    """Compare a text generator with the original; StageError if it is not the same."""
    context, vocab = generator.context_length, generator.vocab_size
    limit = max(1, context - parity.greedy_tokens(context))
    drawn = prompts.draw(data, source, vocab, limit, params.parity_prompts, params.seed)
    found = parity.compare(reference, generator, drawn, lambda done, total: ctx.progress(done, total))
    found.check(params.tolerance)
    return found
