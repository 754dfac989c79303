"""Models that our own transformer computes: traced, written, proved against torch; one way per kind of model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from llmctl import Artifact, Context, MachineError, StageError, UsageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.hf import load_model
from llmctl.nn.onnx_attention import cache_layers, cache_width
from llmctl.nn.peft import merged
from llmctl.nn.transformer import Transformer
from llmctl.ort import OrtGenerator, open_bundle, open_encoder, open_generator
from llmctl.ort.bundle import MODEL
from llmctl.ort.seq2seq import OrtSeq2Seq
from llmctl.text.pooling import normalises, read_pooling, says_pooling, write_pooling
from llmctl_export_onnx import (
    bundle,
    decoder,
    encoder,
    encoder_parity,
    fusion,
    graph,
    lora,
    parity,
    prompts,
    seq2seq,
    seq2seq_parity,
)
from llmctl_export_onnx.params import ExportParams

Metrics = dict[str, float | int]
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Job:
    """One export: what every kind needs."""

    ctx: Context
    params: ExportParams
    source: Path
    data: Artifact | None
    config: dict[str, Any]
    model: Transformer
    """In float32, its weights rounded to the graph's dtype: what the graph must compute."""
    pooling: encoder.Pooling
    normalise: bool

    @property
    def target(self) -> Path:
        """Where the bundle is written."""
        return self.ctx.output("model")

    @property
    def allowance(self) -> parity.Allowance:
        """How far off an output may be."""
        return parity.Allowance(self.params.tolerance, self.params.dtype)

    def progress(self, done: int, total: int) -> None:
        """Report proved prompts."""
        self.ctx.progress(done, total)


def export(
    ctx: Context,
    params: ExportParams,
    artifact: Artifact,
    config: dict[str, Any],
    data: Artifact | None,
    adapters: Sequence[Artifact] = (),
) -> Metrics:
    """Write the bundle and prove it, with each of the adapters too; the metrics to report."""
    _check(params)
    source = artifact.path
    model = load_model(source).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kind, head = model.config.traits.kind, model.config.head
    generates = kind == "decoder" and head == "lm"
    if adapters and not generates:
        raise UsageError(
            "adapters are served beside a decoder that generates text, and this model is none",
            hint="merge the adapter with peft (`merge_and_unload`) and export the result",
        )
    beside = lora.read_all(adapters, params.adapter_names, model, artifact.id)
    pooling, normalise = choose_pooling(params, source, model.config)
    ctx.progress(0, params.parity_prompts)
    lower = model if params.dtype == "float32" else copy.deepcopy(model).to(DTYPES[params.dtype])
    for parameter, rounded in zip(model.parameters(), lower.parameters(), strict=True):
        parameter.copy_(rounded)
    job = Job(ctx, params, source, data, config, model, pooling, normalise)
    graphs = _write(job, lower, beside, generates)
    prove = _prove_decoder if generates else _prove_seq2seq if kind == "encoder-decoder" else _prove_encoder
    found = prove(job)
    found.check(params.tolerance)
    proved = _prove_adapters(job, beside)
    operators = sum(graph.count_operators(g, "GroupQueryAttention") for g in graphs.values())
    return {
        **found.metrics(),
        **proved,
        "gqa_nodes": operators,
        "layers": model.config.layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _check(params: ExportParams) -> None:
    """MachineError (7) or UsageError for what cannot be exported here."""
    if params.dtype not in DTYPES:
        raise MachineError(
            "an export is proved on the CPU, and ONNX Runtime multiplies bfloat16 matrices on CUDA only",
            hint="set `dtype: float16`, as small and proved here, or serve the model.hf directory, on CUDA in bfloat16",
        )
    if params.task != "auto":
        raise UsageError(
            f"task {params.task} is for exports through Optimum; here the model's own head decides",
            hint="leave `task` out, or set `exporter: optimum`",
        )


def _write(job: Job, lower: Transformer, beside: Sequence[lora.Named], generates: bool) -> dict[str, ir.Model]:
    """Trace `lower`, the model in the dtype of the export, and write the bundle; its graphs, by their files."""
    with _tracing(lower):
        graphs = _graphs(lower, job, generates)
    graph.account_weights(list(graphs.values()), lower)
    if generates:
        fusion.fuse(graphs[MODEL])
        decoder.keep_last(graphs[MODEL])
    if beside:
        wanted = {name for one in beside for name in one.adapter}
        places = lora.sites(graphs[MODEL], dict(lower.named_parameters()), wanted)
        lora.add_inputs(graphs[MODEL], places)
        lora.write(job.target, places, beside)
    graph.save(graphs, job.target)
    bundle.copy_files(job.source, job.target)
    if job.pooling != "none" and (job.pooling, job.normalise) != _pooling_of(job.source):
        shape = job.model.config
        write_pooling(job.target, job.pooling, shape.dim, shape.context, normalise=job.normalise)
    return graphs


def choose_pooling(params: ExportParams, source: Path, config: ModelConfig) -> tuple[encoder.Pooling, bool]:
    """How the graph embeds, and whether its embeddings have length 1: as asked, else as the directory `source` says.

    UsageError for what has no effect, InputError for a pooling that is neither mean nor cls.
    """
    pooling = params.pooling
    if pooling == "auto":
        said = _pooling_of(source) if config.head == "features" else None
        pooling = said[0] if said else "none"
    elif pooling != "none" and (config.traits.kind == "encoder-decoder" or config.head == "lm"):
        raise UsageError("`pooling` makes embeddings of an encoder's states, and this model generates text")
    if pooling == "none":
        if params.normalise is not None:
            raise UsageError("`normalise` is about embeddings, and there is no `pooling`", hint="leave normalise out")
        return "none", False
    return pooling, normalises(source) if params.normalise is None else params.normalise


def _pooling_of(source: Path) -> tuple[encoder.Pooling, bool] | None:
    """What the directory says of it, None where it is no sentence encoder."""
    return (read_pooling(source), normalises(source)) if says_pooling(source) else None


@contextmanager
def _tracing(model: Transformer) -> Iterator[None]:
    before, model.backend = model.backend, "onnx"
    try:
        yield
    finally:
        model.backend = before


def _graphs(model: Transformer, job: Job, generates: bool) -> dict[str, ir.Model]:
    opset = job.params.opset
    if generates:
        return {MODEL: decoder.trace(model, opset)}
    if model.config.traits.kind == "encoder-decoder":
        return seq2seq.trace(model, opset)
    return {MODEL: encoder.trace(model, opset, job.pooling, job.normalise)}


def _prove_decoder(job: Job) -> parity.Parity:
    shape = job.model.config
    bundle.write_genai_config(
        job.target,
        job.config,
        bundle.Shape(
            context=shape.context,
            dim=shape.dim,
            heads=shape.heads,
            head_size=cache_width(shape),
            kv_heads=shape.kv_heads,
            layers=cache_layers(shape),
        ),
        in_place=True,
        positions=False,
    )

    return _compare(job, open_bundle(job.target, "cpu", job.params.threads))


def _compare(job: Job, generator: OrtGenerator) -> parity.Parity:
    def reference(tokens: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return job.model(torch.tensor([tokens]))[0].numpy()  # type: ignore[no-any-return]

    context = job.model.config.context
    drawn = _draw(job, max(1, context - parity.greedy_tokens(context)))
    return parity.compare(reference, generator, drawn, job.allowance, job.progress)


def _prove_adapters(job: Job, adapters: Sequence[lora.Named]) -> Metrics:
    """Compare the bundle with each adapter against the model with that adapter merged into its weights."""
    if not adapters:
        return {}
    generator, worst = open_bundle(job.target, "cpu", job.params.threads), 0.0
    for named in adapters:
        if named.idle:
            job.ctx.warn(f"the adapter `{named.name}` changes nothing: its matrices B are all zero")
        with merged(job.model, named.rounded(DTYPES[job.params.dtype])):
            found = _compare(job, generator.with_adapter(named.name))
        try:
            found.check(job.params.tolerance)
        except StageError as error:
            raise StageError(f"with the adapter `{named.name}` {error.message}", hint=error.hint) from error
        worst = max(worst, found.max_abs_diff)
    return {"adapters": len(adapters), "parity.adapters_max_abs_diff": worst}


def _prove_encoder(job: Job) -> parity.Parity:
    shape = job.model.config
    traced = encoder.Traced(job.model, job.pooling, job.normalise)
    names = encoder.outputs(shape, job.pooling)

    def reference(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            found = traced(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        return {name: value.numpy() for name, value in zip(names, found, strict=True)}

    return encoder_parity.compare(
        reference,
        open_encoder(job.target, "cpu", job.params.threads),
        shape.vocab_size,
        shape.token_types,
        job.params.parity_prompts,
        job.params.seed,
        job.allowance,
        job.progress,
    )


def _prove_seq2seq(job: Job) -> parity.Parity:
    generator = open_generator(job.target, "cpu", job.params.threads)
    assert isinstance(generator, OrtSeq2Seq)

    def reference(source: list[int], said: list[int]) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            states = job.model.encode(torch.tensor([source]))
            logits = job.model(torch.tensor([said]), memory=job.model.memory(states))
        return states[0].numpy(), logits[0].numpy()

    drawn = _draw(job, job.model.config.context)
    return seq2seq_parity.compare(reference, generator, drawn, job.allowance, job.progress)


def _draw(job: Job, limit: int) -> list[list[int]]:
    shape, params = job.model.config, job.params
    return prompts.draw(job.data, job.source, shape.vocab_size, limit, params.parity_prompts, params.seed)
