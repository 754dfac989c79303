"""Architectures that are not ours, through Optimum; the result is proved against transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.ort import OrtEncoder, OrtGenerator, OrtSeq2Seq, open_bundle, open_encoder, open_generator
from llmctl.ort.bundle import ENCODER, MODEL
from llmctl_export_onnx import bundle, encoder_parity, parity, prompts, seq2seq_parity
from llmctl_export_onnx.params import ExportParams
from llmctl_export_onnx.silence import quiet

TALKERS = ("optimum", "transformers", "torch.onnx")

TASKS = {
    "CausalLM": "text-generation-with-past",
    "LMHeadModel": "text-generation-with-past",
    "ConditionalGeneration": "text2text-generation-with-past",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MTModel": "text2text-generation-with-past",  # Marian
    "Model": "feature-extraction",
}
"""Ending of a transformers class name to Optimum's task."""

OPTIMUM_OPSET = 18
"""The newest operator set that Optimum 2.1's tracer writes for every family."""


def export(
    ctx: Context, params: ExportParams, source: Path, config: dict[str, Any], data: Artifact | None
) -> dict[str, float | int]:
    """Write the bundle and prove it; the metrics to report."""
    _refuse(params)
    task = choose_task(config) if params.task == "auto" else params.task
    ctx.log(f"task {task}")
    target = ctx.output("model")
    _export(source, target, task, min(params.opset, OPTIMUM_OPSET))
    bundle.copy_files(source, target)
    with quiet(*TALKERS):
        model = _reference(source, task)
    if task == "text-generation-with-past":
        found = _prove_decoder(ctx, params, source, target, config, data, model)
    elif task == "text2text-generation-with-past":
        found = _prove_seq2seq(ctx, params, source, target, data, model)
    else:
        found = _prove_encoder(ctx, params, target, model)
    found.check(params.tolerance)
    return {**found.metrics(), "parameters": model.num_parameters()}


def _refuse(params: ExportParams) -> None:
    """What only our own tracer does."""
    asked = {
        "dtype": params.dtype != "float32",
        "pooling": params.pooling in ("mean", "cls"),
        "normalise": params.normalise is not None,
    }
    for name, wanted in asked.items():
        if wanted:
            raise UsageError(
                f"`{name}: {getattr(params, name)}` is not available through Optimum",
                hint="leave it out; only architectures of llmctl's own have it",
            )


def choose_task(config: dict[str, Any]) -> str:
    """The task of the first architecture named in `config.json`; InputError if there is none that we know."""
    names = list(config.get("architectures") or ())
    for name in names:
        for ending, task in TASKS.items():
            if name.endswith(ending):
                return task
    raise InputError(
        f"`architectures` in config.json is {names}, and none of them tells what to export",
        hint=f"set `task`; names that end in {', '.join(TASKS)} are recognised",
    )


def _export(source: Path, target: Path, task: str, opset: int) -> None:
    pair = task.startswith("text2text")
    with quiet(*TALKERS):
        from optimum.exporters.onnx import main_export

        try:
            main_export(
                str(source),
                target,
                task=task,
                opset=opset,
                do_validation=False,
                local_files_only=True,
                library_name="transformers",  # what a sentence encoder holds besides needs another library
                # It would merge both decoders into a third graph.
                no_post_process=pair,
            )
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise InputError(
                f"Optimum cannot export {source} as {task}: {str(error).splitlines()[0]}",
                hint="see Optimum's list of supported architectures, or set another `task`",
            ) from error
    if not (target / (ENCODER if pair else MODEL)).is_file():
        names = ", ".join(sorted(path.name for path in target.glob("*.onnx")))
        raise InputError(
            f"{source} became the graphs {names}, which are none of a text model", hint="set another `task`"
        )


def _reference(source: Path, task: str) -> Any:
    """The model in transformers."""
    import torch
    from optimum.exporters.tasks import TasksManager

    model: Any = TasksManager.get_model_from_task(
        task.removesuffix("-with-past"),
        str(source),
        framework="pt",
        library_name="transformers",
        local_files_only=True,
        dtype=torch.float32,
    )
    return model.eval()


def _prove_decoder(
    ctx: Context,
    params: ExportParams,
    source: Path,
    target: Path,
    config: dict[str, Any],
    data: Artifact | None,
    model: Any,
) -> parity.Parity:
    import torch

    generator = open_bundle(target, "cpu", params.threads)
    _write_genai_config(target, config, generator)

    def reference(tokens: list[int]) -> np.ndarray:
        with torch.inference_mode(), quiet(*TALKERS):
            return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()  # type: ignore[no-any-return]

    context = generator.context_length
    limit = max(1, context - parity.greedy_tokens(context))
    drawn = prompts.draw(data, source, generator.vocab_size, limit, params.parity_prompts, params.seed)
    return parity.compare(reference, generator, drawn, parity.Allowance(params.tolerance), ctx.progress)


def _write_genai_config(target: Path, config: dict[str, Any], generator: OrtGenerator) -> None:
    layout = generator.layout
    shape = bundle.Shape(
        context=generator.context_length,
        dim=_first(config, "hidden_size", "n_embd", "d_model"),
        heads=_first(config, "num_attention_heads", "n_head", "n_heads"),
        head_size=layout.head_dim,
        kv_heads=layout.kv_heads,
        layers=_first(config, "num_hidden_layers", "n_layer", "n_layers"),
    )
    bundle.write_genai_config(target, config, shape, in_place=False, positions=layout.position_ids)


def _first(config: dict[str, Any], *keys: str) -> Any:
    for key in keys:
        if key in config:
            return config[key]
    raise InputError(f"config.json has none of {', '.join(keys)}", hint="genai_config.json needs the model's shape")


def _prove_seq2seq(
    ctx: Context, params: ExportParams, source: Path, target: Path, data: Artifact | None, model: Any
) -> parity.Parity:
    import torch

    generator = open_generator(target, "cpu", params.threads)
    assert isinstance(generator, OrtSeq2Seq)

    def reference(read: list[int], said: list[int]) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode(), quiet(*TALKERS):
            ids = torch.tensor([said])
            found = model(input_ids=torch.tensor([read]), decoder_input_ids=ids, use_cache=False)
        return found.encoder_last_hidden_state[0].numpy(), found.logits[0].numpy()

    vocab, limit = generator.vocab_size, generator.context_length
    drawn = prompts.draw(data, source, vocab, limit, params.parity_prompts, params.seed)
    return seq2seq_parity.compare(reference, generator, drawn, parity.Allowance(params.tolerance), ctx.progress)


def _prove_encoder(ctx: Context, params: ExportParams, target: Path, model: Any) -> parity.Parity:
    import torch

    opened: OrtEncoder = open_encoder(target, "cpu", params.threads)

    def reference(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode(), quiet(*TALKERS):
            found = model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        return {name: found[name].numpy() for name in opened.outputs}

    return encoder_parity.compare(
        reference,
        opened,
        model.config.vocab_size,
        getattr(model.config, "type_vocab_size", 1),
        params.parity_prompts,
        params.seed,
        parity.Allowance(params.tolerance),
        ctx.progress,
    )
