"""Ranges of the activations that products read, from text: what static quantization is calibrated with.

`minmax` takes the whole range, `percentile` leaves out the outermost values, `entropy` clips where the rounded
distribution is closest to the original in Kullback-Leibler divergence (Migacz, GTC 2017). ONNX Runtime's calibrators
of these two hold every activation of all text in memory at once, and its `entropy` rounds expected counts to whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from llmctl.errors import InputError, StageError
from llmctl.ort.cache import read_layout
from llmctl.ort.sessions import open_session
from llmctl_quantize.activations import Range
from llmctl_quantize.matrices import products_of

BINS = 2048
"""Bins of a histogram, over magnitudes for `entropy`."""
ENTROPY_LEVELS = 128
"""Codes that a magnitude has: those of one sign."""
ACTIVATIONS = 2**27
"""Most numbers that are observed at once, 512 MB. A text with more is read in pieces, each from its beginning."""

Progress = Callable[[int, int], None]
Adapters = Sequence[Mapping[str, np.ndarray]]
"""For each reading of the texts the inputs that put an adapter to the graph; none of them for the model as it is."""
PLAIN: Adapters = ({},)


def read(
    model: onnx.ModelProto,
    texts: Sequence[Sequence[int]],
    scratch: Path,
    threads: int,
    progress: Progress,
    adapters: Adapters = PLAIN,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The lowest and the highest value of each channel, two `(K,)`, of every tensor that a product reads.

    With `adapters` over all of their readings. InputError for a tensor with numbers that are not finite.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, values in _observe(model, texts, scratch, threads, progress, adapters):
        low, high = values.min(axis=0), values.max(axis=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise InputError(
                f"`{name}` holds numbers that are not finite", hint="is the model damaged? `llmctl eval` it"
            )
        if name in found:
            low, high = np.minimum(low, found[name][0]), np.maximum(high, found[name][1])
        found[name] = low, high
    return found


def whole(channels: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Range]:
    """The range of each tensor, of all its channels."""
    return {name: (float(low.min()), float(high.max())) for name, (low, high) in channels.items()}


def clipped(
    model: onnx.ModelProto,
    texts: Sequence[Sequence[int]],
    ranges: Mapping[str, Range],
    method: str,
    percentile: float,
    scratch: Path,
    threads: int,
    progress: Progress,
    adapters: Adapters = PLAIN,
) -> dict[str, Range]:
    """The part of each of `ranges` that `method`, `percentile` or `entropy`, keeps of what `texts` leave there."""
    counts = {name: np.zeros(BINS, np.int64) for name in ranges}
    for name, values in _observe(model, texts, scratch, threads, progress, adapters):
        low, high = ranges[name]
        if method == "entropy":
            values, low, high = np.abs(values), 0.0, max(-low, high)
        if high > low:
            counts[name] += np.histogram(np.clip(values, low, high), BINS, (low, high))[0]
    if method == "entropy":
        return {name: entropy(counts[name], *found) for name, found in ranges.items()}
    return {name: quantiles(counts[name], *found, percentile) for name, found in ranges.items()}


def quantiles(counts: np.ndarray, low: float, high: float, percentile: float) -> Range:
    """The middle `percentile` of the values, as many left out below as above, in whole bins."""
    if not counts.sum():
        return low, high
    edges = np.linspace(low, high, BINS + 1)
    share, outside = np.cumsum(counts) / counts.sum(), (1 - percentile / 100) / 2
    first, last = int(np.searchsorted(share, outside, "right")), int(np.searchsorted(share, 1 - outside, "left"))
    return float(edges[min(first, BINS - 1)]), float(edges[min(last, BINS - 1) + 1])


def entropy(counts: np.ndarray, low: float, high: float) -> Range:
    """The range up to the magnitude at which clipping changes the distribution of magnitudes least."""
    if not counts.sum():
        return low, high
    sizes = range(ENTROPY_LEVELS, BINS + 1)
    best = min(sizes, key=lambda size: (divergence(counts, size), -size))
    limit = best * max(-low, high) / BINS
    return max(low, -limit), min(high, limit)


def divergence(counts: np.ndarray, size: int) -> float:
    """How far the first `size` bins in ENTROPY_LEVELS levels are from all of `counts`, in nats.

    Clipped values count in the last bin kept. A level's count is spread evenly over its bins that hold anything.
    Infinite where clipped values fall into an empty bin.
    """
    kept = counts[:size].astype(np.float64)
    reference = kept.copy()
    reference[-1] += counts[size:].sum()
    if reference[-1] and not kept[-1]:
        return np.inf
    level = np.arange(size) * ENTROPY_LEVELS // size
    held = np.bincount(level, kept > 0)
    spread = np.bincount(level, kept)[level] / np.maximum(held, 1)[level]
    some = kept > 0
    p, q = reference[some] / reference.sum(), spread[some] / kept.sum() if kept.sum() else spread[some]
    return float((p * np.log(p / q)).sum())


def _observe(
    model: onnx.ModelProto,
    texts: Sequence[Sequence[int]],
    scratch: Path,
    threads: int,
    progress: Progress,
    adapters: Adapters,
) -> Iterator[tuple[str, np.ndarray]]:
    """What each tensor that a product reads holds, `(tokens, K)`, reading by reading, text by text, one by one."""
    dims = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    widths = {node.input[0]: dims[name][1 if table else 0] for node, name, table in products_of(model.graph)}
    names = list(widths)
    window = max(1, ACTIVATIONS // sum(widths.values()))
    session = _session(model, names, scratch, threads)
    feed = _feeder(session, scratch)
    readings = [(adapter, ids) for adapter in adapters for ids in texts]
    for done, (adapter, ids) in enumerate(readings):
        for start in range(0, len(ids), window):
            found = session.run(names, {**feed(ids[start : start + window]), **adapter})
            for name, value in zip(names, found, strict=True):
                yield name, value.reshape(-1, widths[name])
        progress(done + 1, len(readings))


def _session(model: onnx.ModelProto, names: list[str], scratch: Path, threads: int) -> ort.InferenceSession:
    """A session of `model` in which the tensors `names` are outputs, too."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    known = {value.name for value in observed.graph.output}
    observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    path = scratch / "observed.onnx"
    try:
        onnx.save_model(observed, path, save_as_external_data=True, location="observed.data", size_threshold=1024)
    except OSError as error:
        raise StageError(f"cannot write {path}: {error}", hint="is the disk full?") from error
    try:
        return open_session(path, "cpu", threads)
    finally:
        for written in scratch.glob("observed.*"):
            written.unlink()


def _feeder(session: ort.InferenceSession, source: Path) -> Callable[[Sequence[int]], dict[str, np.ndarray]]:
    """What makes a decoder read a text from its beginning, with nothing in its cache."""
    layout = read_layout(session, source)
    empty = np.zeros((1, layout.kv_heads, 0, layout.head_dim), layout.cache_dtype)

    def feeds(ids: Sequence[int]) -> dict[str, np.ndarray]:
        found = {"input_ids": np.asarray([ids], np.int64), **dict.fromkeys(layout.past, empty)}
        if layout.attention_mask:
            found["attention_mask"] = np.ones((1, len(ids)), np.int64)
        if layout.position_ids:
            found["position_ids"] = np.arange(len(ids))[None]
        return found

    return feeds
