"""Make vectors by the method that was asked for, and write them with their names."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from llmctl import Artifact, Context, StageError, UsageError
from llmctl.text.vectors import Vectors
from llmctl_embed.corpus import Corpus, build, read_texts, sentences
from llmctl_embed.params import EmbedParams

if TYPE_CHECKING:
    from torch import Tensor


def run(ctx: Context, params: EmbedParams, text: Artifact, model: Artifact | None = None) -> None:
    """Write `vectors`; report how many, of how many words or texts, and the loss. UsageError for a missing model."""
    if (params.method == "encode") != (model is not None):
        need = "needs an encoder" if model is None else "trains on the text alone and takes no model"
        raise UsageError(f"method: {params.method} {need}", hint="method: encode goes with the input `model`")
    if model is not None:
        from llmctl_embed.encoding import encode

        vectors = encode(ctx, params, read_texts(text, params), model)
    else:
        vectors = of_words(ctx, params, text)
    vectors.save(ctx.output("vectors"))
    ctx.report({"vectors": len(vectors.names), "dim": int(vectors.matrix.shape[1])})


def of_words(ctx: Context, params: EmbedParams, text: Artifact) -> Vectors:
    """Count the words, train, and take the vectors that `matrix` names."""
    import torch

    if params.threads:
        torch.set_num_threads(params.threads)
    found = sentences((said for _, said in read_texts(text, params)), params)
    corpus = build(found, params.min_count, params.max_vocab, text.path)
    ctx.log(f"{len(corpus.ids)} words, {len(corpus.words)} different ones")
    began = time.perf_counter()
    (inputs, outputs), loss, passes = _train(ctx, params, corpus)
    seconds = time.perf_counter() - began
    kept = {"input": inputs, "output": outputs, "sum": inputs + outputs}
    default = "sum" if params.method == "glove" else "input"
    matrix = kept[default if params.matrix == "auto" else params.matrix].numpy()
    if not np.isfinite(matrix).all():
        raise StageError(f"training diverged: vectors are not finite, the loss is {loss:g}", hint="set a lower lr")
    ctx.report({"words": len(corpus.ids), "loss": loss, "words_per_s": passes * len(corpus.ids) / max(seconds, 1e-9)})
    if params.normalise:
        matrix = Vectors(corpus.words, matrix).unit
    info = {
        "method": params.method,
        "counts": corpus.counts.tolist(),
        "normalised": bool(params.normalise),
        "split_words": params.split_words,
        "lowercase": params.lowercase,
    }
    return Vectors(corpus.words, matrix, info)


def _train(ctx: Context, params: EmbedParams, corpus: Corpus) -> tuple[tuple[Tensor, Tensor], float, int]:
    """((input and output vectors), loss, passes)."""
    if params.method == "word2vec":
        from llmctl_embed import word2vec

        passes = 5 if params.epochs is None else params.epochs
        weights, loss = word2vec.train(corpus, params, passes, params.lr or 0.025, _reporter(ctx))
        return (weights.inputs, weights.outputs), loss, passes
    from llmctl_embed import glove

    counts = glove.count(corpus.ids, corpus.sentences, len(corpus.words), params.window)
    ctx.report({"pairs": len(counts.values)})
    if params.shuffled:
        counts = glove.shuffle(counts, len(corpus.words), params.seed)
    passes = 25 if params.epochs is None else params.epochs
    trained, loss = glove.train(
        corpus,
        counts,
        size=params.vector_size,
        epochs=passes,
        lr=params.lr or 0.05,
        x_max=params.x_max,
        exponent=params.weight_exponent,
        batch=params.batch,
        seed=params.seed,
        report=_reporter(ctx),
    )
    return (trained.values[0, :, :-1], trained.values[1, :, :-1]), loss, passes


def _reporter(ctx: Context) -> Callable[[int, int, float], None]:
    def report(done: int, total: int, loss: float) -> None:
        ctx.progress(done, total, loss=loss)
        if ctx.should_stop():
            raise ctx.stopped(done)

    return report
