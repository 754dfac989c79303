"""Quantize, write, measure; a bundle that became too much worse is not left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from llmctl import Artifact, Context, InputError, StageError
from llmctl.ort import OrtGenerator, open_bundle, open_encoder
from llmctl.ort.adapters import DIRECTORY as ADAPTERS
from llmctl.ort.cache_memory import token_bytes
from llmctl.text.pooling import POOLING_FILES
from llmctl_quantize import cache, quality, weights
from llmctl_quantize.params import QuantizeParams
from llmctl_quantize.tables import METHODS

DATA = "model.onnx.data"
HARD_LINKS = "the file has several hard links, as `cp -al` makes them: copy the bundle with `cp -r` instead"


def run(ctx: Context, params: QuantizeParams, model: Artifact, data: Artifact | None) -> None:
    """Quantize the bundle `model`, compare it with the original and report."""
    target = ctx.output("model")
    try:
        values = _quantize(ctx, params, model, data, target)
        values |= _compare(ctx, params, model.path, target, data)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    ctx.report(values)
    ctx.describe("model", parameters=values["parameters"], **_facts(params, model))
    rise = values.get("bits_per_byte.ratio", 1.0) - 1
    if not rise <= params.budget:
        shutil.rmtree(target, ignore_errors=True)
        raise StageError(
            f"{_verb(params)} bits per byte by {rise:.2%}, the budget is {params.budget:.2%}",
            hint="try a smaller `block_size` or more bits, or raise `max_bits_per_byte_rise`"
            if params.bits
            else "take the scales from more and other text (`calibration_tokens`), or raise `max_bits_per_byte_rise`",
        )


def _facts(params: QuantizeParams, source: Artifact) -> dict[str, Any]:
    """What the bundle is described by, beside its size: what it was, where nothing changed it."""
    found = {
        "bits": params.bits or source.metadata.get("bits"),
        "kv_cache_dtype": "int8" if params.int8_cache else source.metadata.get("kv_cache_dtype"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _verb(params: QuantizeParams) -> str:
    """What was done, as the beginning of a sentence."""
    if not params.int8_cache:
        return f"{params.bits} bits raise"
    return f"{params.bits} bits and an int8 cache raise" if params.bits else "an int8 cache raises"


def _quantize(
    ctx: Context, params: QuantizeParams, artifact: Artifact, data: Artifact | None, target: Path
) -> dict[str, float]:
    ctx.progress(0, 1)
    source = artifact.path
    model = _load(source)
    parameters = artifact.metadata.get("parameters") or _parameters(model)
    if params.int8_cache:
        cache.refuse(model, source)
        cache.quantize(model, _scales(ctx, params, source, data))
    if params.bits:
        weights.quantize(
            model,
            METHODS[params.rounding],
            bits=params.bits,
            block=params.block,
            symmetric=params.symmetric,
            embedding_bits=params.embedding_bits,
            accuracy=params.accuracy_level,
        )
    _write(model, source, target)
    before, after = _bytes(source), _bytes(target)
    return {"parameters": parameters, "bytes": after, "bytes.before": before, "bytes.ratio": after / before}


def _scales(ctx: Context, params: QuantizeParams, source: Path, data: Artifact | None) -> dict[str, np.ndarray]:
    """The scales of the cache, from what the bundle as it came keeps there while it reads `data`."""
    if data is None:
        raise InputError("an int8 cache takes its scales from text, and there is no `data`", hint="give the input")
    names = quality.split_names(data)
    if quality.training(names) == quality.held_out(names):
        ctx.warn(f"`data` has one split: the int8 cache is judged on the text that its scales come from, `{names[0]}`")
    generator = open_bundle(source, "cpu", params.threads)
    texts = _texts(generator, source, data, quality.training, params.calibration_tokens)
    return cache.calibrate(generator, [text.ids for text in texts], lambda done, total: ctx.progress(done, total))


def _texts(
    generator: OrtGenerator, source: Path, data: Artifact, split: quality.Split, limit: int
) -> list[quality.Text]:
    window = min(generator.context_length, limit)
    return quality.sequences(data, split, source, window, generator.vocab_size, limit)


def _write(model: onnx.ModelProto, source: Path, target: Path) -> None:
    """The bundle with another graph."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith("model.onnx"):
            shutil.copyfile(path, target / path.name)
    if (source / ADAPTERS).is_dir():
        shutil.copytree(source / ADAPTERS, target / ADAPTERS)
    for name in POOLING_FILES:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    try:
        onnx.save_model(model, target / "model.onnx", save_as_external_data=True, location=DATA, size_threshold=1024)
    except OSError as error:
        raise StageError(f"cannot write {target / 'model.onnx'}: {error}", hint="is the disk full?") from error
    if (target / DATA).is_file():
        shutil.copymode(target / "model.onnx", target / DATA)  # onnx makes it readable by its owner only


def _compare(
    ctx: Context, params: QuantizeParams, source: Path, target: Path, data: Artifact | None
) -> dict[str, float]:
    try:
        before = open_bundle(source, "cpu", params.threads)
    except InputError as error:
        if data is not None:
            raise InputError(
                f"the loss on `data` cannot be measured: {error.message}",
                hint="leave `data` out to quantize unmeasured",
            ) from error
        ctx.warn(f"neither quality nor speed were measured: {error.message}")
        return _compare_encoders(source, target, params.threads)
    after = open_bundle(target, "cpu", params.threads)
    values = quality.speed(before, after, params.speed_rounds)
    if params.int8_cache:
        values |= {
            "cache.bytes_per_token": token_bytes(after.layout),
            "cache.bytes_per_token.before": token_bytes(before.layout),
        }
    if data is None:
        ctx.warn("no `data`: what quantization costs in quality was not measured, and no budget applied")
        return values
    texts = _texts(before, source, data, quality.held_out, params.eval_tokens)
    return values | quality.measure(before, after, texts, lambda done, total: ctx.progress(done, total))


def _compare_encoders(source: Path, target: Path, threads: int) -> dict[str, float]:
    """How far the outputs of a quantized encoder are from the model's own, on two rows of ids: at least it runs.

    Nothing for a graph that is neither a decoder nor an encoder of ours.
    """
    try:
        before = open_encoder(source, "cpu", threads)
    except InputError:
        return {}
    after = open_encoder(target, "cpu", threads)
    rows = [[0, 1, 2, 3], [3, 2, 1, 0]]
    expected, found = before.run(rows), after.run(rows)
    away = [float(np.abs(found[name] - value).max() / (np.abs(value).max() or 1.0)) for name, value in expected.items()]
    if not np.isfinite(away).all():
        raise StageError("the quantized encoder gives no numbers", hint="try more bits, or a smaller `block_size`")
    return {"outputs.relative_difference": max(away)}


def _load(source: Path) -> onnx.ModelProto:
    path = source / "model.onnx"
    if (source / "encoder_model.onnx").is_file():
        raise InputError(f"{source} holds an encoder-decoder", hint="quantize takes bundles of one graph, model.onnx")
    if not path.is_file():
        raise InputError(f"{path} is missing", hint="give an ONNX bundle, as `llmctl export-onnx` makes it")
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf, onnx and the file system each have their own
        # Against links to files of others onnx refuses external data with several names; ONNX Runtime reads them.
        hint = HARD_LINKS if "hard link" in str(error) else "export the model again"
        raise InputError(f"{path} cannot be read: {error}", hint=hint) from error


def _parameters(model: onnx.ModelProto) -> int:
    """Float weights of the graph; rotary tables (`cos_cache`, `sin_cache`) and defaults of inputs are no parameters."""
    given = {value.name for value in model.graph.input}
    return sum(
        int(np.prod(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
        and tensor.dims
        and tensor.name not in given
        and not tensor.name.endswith("_cache")
    )


def _bytes(directory: Path) -> int:
    """The graph and its weights."""
    return sum(path.stat().st_size for path in directory.glob("model.onnx*"))
