"""Architectures that are not ours, through Optimum; the result is proved against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmctl import Artifact, Context, InputError, StageError
from llmctl.ort import open_bundle
from llmctl.ort.sessions import open_session
from llmctl_export_onnx import bundle
from llmctl_export_onnx.params import ExportParams
from llmctl_export_onnx.silence import quiet

TALKERS = ("optimum", "transformers", "torch.onnx")

TASKS = {
    "CausalLM": "text-generation-with-past",
    "LMHeadModel": "text-generation-with-past",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "Model": "feature-extraction",
}
"""Ending of a transformers class name to Optimum's task."""

OPTIMUM_OPSET = 18
"""The newest operator set that Optimum 2.1's tracer writes for every family."""


def export(
    ctx: Context, params: ExportParams, source: Path, config: dict[str, Any], data: Artifact | None
) -> dict[str, float | int]:
    """Write the bundle and prove it; the metrics to report."""
    task = choose_task(config) if params.task == "auto" else params.task
    ctx.log(f"task {task}")
    target = ctx.output("model")
    _export(source, target, task, min(params.opset, OPTIMUM_OPSET))
    bundle.copy_files(source, target)
    if task.startswith("text-generation"):
        return _prove_generator(ctx, params, source, target, config, data)
    return _prove_encoder(ctx, params, source, target, task)


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
    with quiet(*TALKERS):
        from optimum.exporters.onnx import main_export

        try:
            main_export(str(source), target, task=task, opset=opset, do_validation=False, local_files_only=True)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise InputError(
                f"Optimum cannot export {source} as {task}: {str(error).splitlines()[0]}",
                hint="see Optimum's list of supported architectures, or set another `task`",
            ) from error
    if not (target / "model.onnx").is_file():
        names = ", ".join(sorted(path.name for path in target.glob("*.onnx")))
        raise InputError(
            f"{source} became several graphs ({names}), a bundle holds one",
            hint="encoder-decoder models cannot be exported yet",
        )


def _prove_generator(
    ctx: Context, params: ExportParams, source: Path, target: Path, config: dict[str, Any], data: Artifact | None
) -> dict[str, float | int]:
    import torch
    from transformers import AutoModelForCausalLM

    from llmctl_export_onnx.run import prove

    generator = open_bundle(target, "cpu", params.threads)
    layout = generator.layout
    bundle.write_genai_config(
        target,
        config,
        context=generator.context_length,
        head_size=layout.head_dim,
        kv_heads=layout.kv_heads,
        in_place=False,
        positions=layout.position_ids,
    )
    with quiet(*TALKERS):
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
        model.eval()

    def reference(tokens: list[int]) -> np.ndarray:
        with torch.inference_mode(), quiet(*TALKERS):
            return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()  # type: ignore[no-any-return]

    found = prove(ctx, params, reference, generator, source, data)
    return {**found.metrics(), "parameters": model.num_parameters()}


def _prove_encoder(ctx: Context, params: ExportParams, source: Path, target: Path, task: str) -> dict[str, float | int]:
    """Every output of the graph against transformers, on random batches whose rows differ in length."""
    import torch
    from optimum.exporters.tasks import TasksManager

    with quiet(*TALKERS):
        model: Any = TasksManager.get_model_from_task(task, str(source), framework="pt", local_files_only=True)
        model.eval()
    session = open_session(target / "model.onnx", "cpu", params.threads)
    inputs = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    random, worst = np.random.default_rng(params.seed), 0.0
    longest = min(64, getattr(model.config, "max_position_embeddings", 64))
    for done in range(params.parity_prompts):
        length = int(random.integers(2, longest + 1))
        ids = random.integers(0, model.config.vocab_size, (2, length))
        mask = np.ones_like(ids)
        mask[1, length // 2 :] = 0
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        feeds = {name: value for name, value in feeds.items() if name in inputs}
        with torch.inference_mode(), quiet(*TALKERS):
            expected = model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        for name, got in zip(names, session.run(None, feeds), strict=True):
            worst = float(np.maximum(worst, np.abs(got - expected[name].numpy()).max()))
        ctx.progress(done + 1, params.parity_prompts)
    if not worst <= params.tolerance:
        raise StageError(
            f"the exported model's outputs differ by up to {worst:.3g}, tolerance is {params.tolerance:g}",
            hint="no bundle was written; a larger `tolerance` accepts it, but find out why first",
        )
    return {
        "parity.max_abs_diff": worst,
        "parity.prompts": params.parity_prompts,
        "parameters": model.num_parameters(),
    }
