"""Vectors of texts, or of a word in each of them, from the states of an encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from llmctl import Artifact, Context, InputError
from llmctl.encoders import open_states
from llmctl.reader import Reader
from llmctl.text.pooling import normalises, read_longest, read_pooling
from llmctl.text.tokenizer import Framed, Tokenizer
from llmctl.text.vectors import WORD, Vectors
from llmctl_embed.params import EmbedParams

BATCH, READ = 32, 1024
"""Texts that the model reads at once, and texts that are ordered by length before that."""
SHOWN = 200
"""Characters of a text that `ids.jsonl` keeps."""


def encode(ctx: Context, params: EmbedParams, texts: Iterable[tuple[str, str]], model: Artifact) -> Vectors:
    """The vectors of all texts that fit the model, in their order; what was left out is reported.

    Of a text of a sentence encoder whose directory says how much it reads, the rest is cut off, as
    sentence-transformers does; a word is looked for in the whole context.
    """
    tokenizer = Tokenizer.load(model.path)
    reader = open_states(model, params.device, params.threads)
    pooling = read_pooling(model.path) if params.pooling == "auto" else params.pooling
    normalise = normalises(model.path) if params.normalise is None else params.normalise
    most = None if params.word else read_longest(model.path)
    rows: list[dict[str, Any]] = []
    vectors: list[np.ndarray] = []
    counts = {"too_long": 0, "cut": 0, "without_word": 0}
    incoming = iter(texts)
    while part := list(islice(incoming, READ)):
        framed = [(name, text, tokenizer.frame(text)) for name, text in part]
        wanted = []
        for name, text, whole in framed:
            frame = whole if most is None else whole.within(min(most, reader.context_length))
            counts["cut"] += frame is not whole
            places = _places(frame, text, params.word, params.lowercase)
            if not 1 <= len(frame.ids) <= reader.context_length:
                counts["too_long"] += 1
            elif params.word and not places:
                counts["without_word"] += 1
            else:
                wanted.append((name, text, frame, places))
        for number, vector in _read(reader, [(frame, places) for *_, frame, places in wanted], pooling):
            vectors.append(vector / max(float(np.linalg.norm(vector)), 1e-12) if normalise else vector)
            rows.append({"id": wanted[number][0], "text": wanted[number][1][:SHOWN]})
        ctx.progress(len(rows))
        if ctx.should_stop():
            raise ctx.stopped(len(rows))
    ctx.report(counts)
    if not rows:
        why = f"holds the word {params.word!r}" if params.word and counts["without_word"] else "fits the model"
        raise InputError(f"no text {why}", hint=f"the model reads up to {reader.context_length} tokens")
    info = {"method": "encode", "pooling": pooling, "normalised": normalise, "word": params.word}
    return Vectors([row["id"] for row in rows], np.stack(vectors).astype(np.float32), info, rows)


def _places(frame: Framed, text: str, word: str, lowercase: bool) -> list[int]:
    """Tokens that are pooled: all, or those of the first occurrence of the word."""
    if not word:
        return list(range(len(frame.ids)))
    wanted = word.lower() if lowercase else word
    said = ((match.group(), match.span()) for match in WORD.finditer(text))
    found = next((span for one, span in said if (one.lower() if lowercase else one) == wanted), None)
    if found is None:
        return []
    return [n for n, (begin, end) in enumerate(frame.spans) if begin < end and begin < found[1] and end > found[0]]


def _read(reader: Reader, wanted: list[tuple[Framed, list[int]]], pooling: str) -> Iterator[tuple[int, np.ndarray]]:
    """(number, vector) of each text in order; texts of like length are read together."""
    pooled: dict[int, np.ndarray] = {}
    order = sorted(range(len(wanted)), key=lambda n: len(wanted[n][0].ids))
    for begin in range(0, len(order), BATCH):
        chosen = order[begin : begin + BATCH]
        frames = [wanted[n][0] for n in chosen]
        segments = [frame.segments for frame in frames]
        states = reader.run([frame.ids for frame in frames], segments if any(map(any, segments)) else None)
        for row, n in enumerate(chosen):
            own = states["last_hidden_state"][row][wanted[n][1]]
            pooled[n] = own[0] if pooling == "cls" else own.mean(axis=0)
    yield from sorted(pooled.items())
