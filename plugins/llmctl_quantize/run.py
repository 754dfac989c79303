"""Quantize, write, measure; a bundle that became too much worse is not left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from llmctl import Artifact, Context, InputError, StageError
from llmctl.ort import OrtGenerator, open_bundle, open_encoder
from llmctl.ort.adapters import DIRECTORY as ADAPTERS
from llmctl.ort.cache_memory import token_bytes
from llmctl.text.pooling import POOLING_FILES
from llmctl_quantize import activations, adapter_files, cache, halves, quality, ranges, saturation, smooth, weights
from llmctl_quantize.params import QuantizeParams
from llmctl_quantize.tables import METHODS

DATA = "model.onnx.data"
NOTICED = 0.01
"""Share of weights that may become 0 unmentioned."""
PROBED = 64
"""Drawn ids on which the logits of a graph in float16 are compared."""
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
    problem = _too_much_worse(params, values)
    if problem is not None:
        shutil.rmtree(target, ignore_errors=True)
        raise problem


def _too_much_worse(params: QuantizeParams, values: dict[str, float]) -> StageError | None:
    """What is wrong with a bundle of these metrics, with any adapter; nothing where quality was not measured."""
    measured = "bits_per_byte.ratio"
    for prefix in (key.removesuffix(measured) for key in values if key.endswith(measured)):
        adapter = prefix.removeprefix("adapters.").removesuffix(".")
        where = f" with the adapter `{adapter}`" if adapter else ""
        rise, agreement = values[prefix + measured] - 1, values[f"{prefix}top1_agreement"]
        if not rise <= params.budget:
            found = f"bits per byte by {rise:.2%}{where}, the budget is {params.budget:.2%}"
            hint = f"{_remedy(params)}, or raise `max_bits_per_byte_rise`"
            return StageError(f"{_verb(params, 'raise')} {found}", hint=hint)
        if not agreement >= params.agreement:
            found = f"top-1 agreement at {agreement:.2%}{where}, at least {params.agreement:.2%} is asked"
            hint = f"{_remedy(params)}, or lower `min_top1_agreement`"
            return StageError(f"{_verb(params, 'leave')} {found}", hint=hint)
    return None


def _remedy(params: QuantizeParams) -> str:
    """What may cost less quality."""
    if params.half:
        return "keep the bundle in float32, or try `bits: 8`"
    if not params.bits:
        return "take the scales from more and other text (`calibration_tokens`)"
    if params.activations == "static":
        return "try another `calibration`, `smooth: 0.5` or `activations: dynamic`"
    return "leave `activations` out" if params.integer else "try a smaller `block_size` or more bits"


def _facts(params: QuantizeParams, source: Artifact) -> dict[str, Any]:
    """What the bundle is described by, beside its size: what it was, where nothing changed it."""
    found = {
        "bits": params.bits or source.metadata.get("bits"),
        "activations": params.activations if params.integer else source.metadata.get("activations"),
        # Whether the answers are the same on processors without VNNI, too.
        "reduce_range": params.reduce_range if params.integer else source.metadata.get("reduce_range"),
        "kv_cache_dtype": "int8" if params.int8_cache else source.metadata.get("kv_cache_dtype"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _verb(params: QuantizeParams, verb: str) -> str:
    """What was done, as the beginning of a sentence."""
    weights_are = f"{params.bits} bits" + (f" with {params.activations} activations" if params.integer else "")
    if not params.int8_cache:
        return f"{weights_are} {verb}"
    return f"{weights_are} and an int8 cache {verb}" if params.bits else f"an int8 cache {verb}s"


def _quantize(
    ctx: Context, params: QuantizeParams, artifact: Artifact, data: Artifact | None, target: Path
) -> dict[str, float]:
    ctx.progress(0, 1)
    source = artifact.path
    model = _load(source)
    parameters = artifact.metadata.get("parameters") or _parameters(model)
    learned = _calibrate(ctx, params, model, source, data) if params.calibrated else NOTHING
    if params.int8_cache:
        cache.quantize(model, learned.scales)
    rounded: dict[str, float] = {}
    if params.half:
        rounded = _halve(ctx, model)
    elif params.integer:
        _integer_products(ctx, params, model, learned, target)
    elif params.bits:
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
    if params.half:
        adapter_files.halve(target)
    before, after = _bytes(source), _bytes(target)
    sizes = {"bytes": after, "bytes.before": before, "bytes.ratio": after / before}
    return {"parameters": parameters, **sizes, **rounded}


def _halve(ctx: Context, model: onnx.ModelProto) -> dict[str, float]:
    """Make the whole graph float16; the share of its weights that became 0."""
    found = halves.halve(model)
    if found.share > NOTICED:
        ctx.warn(f"{found.share:.2%} of the weights are too small for float16 and became 0")
    return {"weights.zeroed": found.share}


def _integer_products(
    ctx: Context, params: QuantizeParams, model: onnx.ModelProto, learned: Learned, scratch: Path
) -> None:
    """Weights per channel, and activations per tensor with ranges from text or found at run time."""
    activations.prepare(model)
    found = _ranges(ctx, params, model, learned, scratch) if params.activations == "static" else None
    embeddings = params.embedding_bits == 8
    activations.quantize(model, found, embeddings=embeddings, reduce_range=params.reduce_range)
    if not params.reduce_range and not saturation.exact():
        ctx.warn("this processor cuts sums of products off at 16 bits: set `reduce_range: true` for exact ones")


def _ranges(
    ctx: Context, params: QuantizeParams, model: onnx.ModelProto, learned: Learned, scratch: Path
) -> dict[str, activations.Range]:
    """The ranges of what the products of `model` read in the texts; `smooth` moves part of them to the weights."""
    texts, adapters = learned.texts, learned.adapters
    channels = ranges.read(model, texts, scratch, params.threads, ctx.progress, adapters)
    if params.smooth is not None:
        channels = smooth.migrate(model, channels, params.smooth)
    found = ranges.whole(channels)
    if params.calibration == "minmax":
        return found
    method = params.calibration
    return ranges.clipped(
        model, texts, found, method, params.percentile, scratch, params.threads, ctx.progress, adapters
    )


class Learned(NamedTuple):
    """What the text of the training split says of a bundle as it came."""

    texts: list[list[int]]
    adapters: ranges.Adapters
    """The model alone, then each adapter of the bundle."""
    scales: dict[str, np.ndarray]
    """Those of an int8 cache, if it is to be one: see `cache.calibrate`."""


NOTHING = Learned([], ranges.PLAIN, {})


def _calibrate(
    ctx: Context, params: QuantizeParams, model: onnx.ModelProto, source: Path, data: Artifact | None
) -> Learned:
    """Read the text once for all that is learned from it."""
    what = (
        "an int8 cache takes its scales" if params.activations != "static" else "static activations take their ranges"
    )
    if params.int8_cache:
        cache.refuse(model, source)
    if data is None:
        raise InputError(f"{what} from text, and there is no `data`", hint="give the input")
    names = quality.split_names(data)
    if quality.training(names) == quality.held_out(names):
        ctx.warn(f"`data` has one split: the bundle is judged on the text of its calibration, `{names[0]}`")
    try:
        generator = open_bundle(source, "cpu", params.threads)
    except InputError as error:
        hint = "take `activations: dynamic`" if params.activations == "static" else error.hint
        raise InputError(f"{what} from text that a decoder reads: {error.message}", hint=hint) from error
    texts = [text.ids for text in _texts(generator, source, data, quality.training, params.calibration_tokens)]
    adapters = [generator.with_adapter(name).adapter_feeds for name in (None, *generator.adapter_names)]
    scales = cache.calibrate(generator, texts, ctx.progress) if params.int8_cache else {}
    return Learned(texts, adapters, scales)


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
        return _compare_encoders(params, source, target)
    after = open_bundle(target, "cpu", params.threads)
    values = _logits(before, after) if params.half else {}
    values |= quality.speed(before, after, params.speed_rounds)
    if params.int8_cache:
        values |= {
            "cache.bytes_per_token": token_bytes(after.layout),
            "cache.bytes_per_token.before": token_bytes(before.layout),
        }
    if data is None:
        ctx.warn("no `data`: what quantization costs in quality was not measured, and no budget applied")
        return values
    texts = _texts(before, source, data, quality.held_out, params.eval_tokens)
    adapters = (None, *before.adapter_names)
    for turn, name in enumerate(adapters):

        def progress(done: int, total: int, turn: int = turn) -> None:
            ctx.progress(turn * total + done, len(adapters) * total)

        found = quality.measure(before.with_adapter(name), after.with_adapter(name), texts, progress)
        values |= {_metric(key, name): value for key, value in found.items()}
    return values


def _metric(key: str, adapter: str | None) -> str:
    """What a number is called that is measured with each adapter."""
    return key if adapter is None else f"adapters.{adapter}.{key}"


def _logits(before: OrtGenerator, after: OrtGenerator) -> dict[str, float]:
    """The largest difference of the logits on drawn ids, with each adapter, too.

    StageError beyond what the roundings of float16 explain.
    """
    count = min(PROBED, before.context_length)
    ids = np.random.default_rng(0).integers(before.vocab_size, size=count).tolist()
    away = []
    for name in (None, *before.adapter_names):
        expected, found = before.with_adapter(name).logits(ids), after.with_adapter(name).logits(ids)
        _check_half("logits" if name is None else f"logits of {name}", found, expected)
        away.append(float(np.abs(found - expected).max()))
    return {"logits.max_abs_diff": max(away)}


def _check_half(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    """StageError, written so that NaN fails, for an output that is further off than rounding explains."""
    times = halves.excess(found, expected)
    if not times <= 1:
        raise StageError(
            f"`{name}` in float16 is {times:.3g} times as far off as rounding explains",
            hint="do activations leave the range of float16? Keep the bundle in float32, or try `bits: 8`",
        )


def _compare_encoders(params: QuantizeParams, source: Path, target: Path) -> dict[str, float]:
    """How far the outputs of a quantized encoder are from the model's own, on two rows of ids: at least it runs.

    Nothing for a graph that is neither a decoder nor an encoder of ours.
    """
    try:
        before = open_encoder(source, "cpu", params.threads)
    except InputError:
        return {}
    after = open_encoder(target, "cpu", params.threads)
    rows = [[0, 1, 2, 3], [3, 2, 1, 0]]
    expected, found = before.run(rows), after.run(rows)
    if params.half:
        for name, value in expected.items():
            _check_half(name, found[name], value)
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
