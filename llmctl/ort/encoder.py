"""What an encoder bundle says about texts: states, logits of its head, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from llmctl.errors import InputError, UsageError
from llmctl.ort.bundle import Bundle, read_bundle
from llmctl.ort.sampling import check_ids
from llmctl.ort.sessions import open_session, provider
from llmctl.text.pooling import Pooling, normalises, pool, read_longest, read_pooling

BATCH = 32
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


def open_encoder(directory: Path | str, device: str = "auto", threads: int = 0) -> OrtEncoder:
    """Open the encoder bundle in `directory`; needs neither torch nor onnx.

    Raises InputError naming the file that is missing, damaged or no encoder, MachineError if `device` is "cuda" and
    there is none.
    """
    bundle = read_bundle(directory)
    if bundle.has_pair:
        raise InputError(f"{bundle.directory} holds an encoder-decoder, not an encoder", hint="generate with it")
    return OrtEncoder(bundle, open_session(bundle.model, device, threads))


class OrtEncoder:
    """Reads batches of token ids through one ONNX Runtime session."""

    def __init__(self, bundle: Bundle, session: ort.InferenceSession) -> None:
        self.session = session
        self.inputs = {value.name for value in session.get_inputs()}
        self.outputs = tuple(value.name for value in session.get_outputs())
        """`last_hidden_state` (`pooler_output`, `sentence_embedding`), or `logits`, or `start_logits`, `end_logits`."""
        if self.inputs - _INPUTS or not {"input_ids", "attention_mask"} <= self.inputs:
            raise InputError(
                f"{bundle.model} is no encoder: its inputs are {', '.join(sorted(self.inputs))}",
                hint="export an encoder such as BERT; decoders generate",
            )
        self.context_length = bundle.context_length
        self.directory = bundle.directory
        longest = read_longest(bundle.directory)
        self.longest = None if longest is None else min(longest, self.context_length)
        """Tokens to which a text is to be cut, where the bundle says so (`max_seq_length`)."""
        self.labels = bundle.labels
        """Names of the classes, where the head has classes."""
        self.backend = f"onnxruntime {provider(session)}"
        self._pad_id = bundle.pad_id
        self._vocab_size = bundle.config.get("vocab_size")
        own = bundle.config.get("llmctl") or {}
        self._token_types = int(bundle.config.get("type_vocab_size") or own.get("token_types") or 2)

    @property
    def embedding_size(self) -> int | None:
        """Numbers of one vector of `embed`; None where the graph leaves it open."""
        shapes = {value.name: value.shape for value in self.session.get_outputs()}
        shape = shapes.get("sentence_embedding") or shapes.get("last_hidden_state")
        return shape[-1] if shape and isinstance(shape[-1], int) else None

    def run(
        self, rows: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None
    ) -> dict[str, np.ndarray]:
        """Every output for one batch, float32: per row `(B, …)` or per token `(B, longest, …)`, padded on the right.

        What stands at a shorter row's padding means nothing. `segments`: token types, 0 where left out. Raises
        UsageError for an empty row, one longer than the context, ids outside the vocabulary.
        """
        feeds = self._feeds(rows, segments)
        found = self.session.run(list(self.outputs), feeds)
        return {name: np.asarray(value, np.float32) for name, value in zip(self.outputs, found, strict=True)}

    def embed(
        self, rows: Sequence[Sequence[int]], pooling: Pooling | None = None, normalise: bool | None = None
    ) -> np.ndarray:
        """One vector per row, `(N, D)` float32, batched by length.

        The graph's own `sentence_embedding`, as it was exported; where it has none, or something else is asked for,
        its states, pooled as asked or as the bundle's `1_Pooling` says. UsageError without what that needs, InputError
        for a pooling that is not known here.
        """
        own = "sentence_embedding" in self.outputs and pooling is None and normalise is None
        if not own and "last_hidden_state" not in self.outputs:
            raise UsageError(
                f"the encoder gives {', '.join(self.outputs)}, and no states to embed with",
                hint="export the model without its head",
            )
        if not own:
            pooling = read_pooling(self.directory) if pooling is None else pooling
            normalise = normalises(self.directory) if normalise is None else normalise
        vectors: dict[int, np.ndarray] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = [rows[i] for i in chosen]
            found = self.run(batch)
            if pooling is None or normalise is None:
                pooled = found["sentence_embedding"]
            else:
                pooled = pool(found["last_hidden_state"], [len(row) for row in batch], pooling, normalise)
            vectors.update(zip(chosen, pooled, strict=True))
        return np.stack([vectors[i] for i in range(len(rows))]) if rows else np.zeros((0, 0), np.float32)

    def _feeds(self, rows: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None) -> dict[str, np.ndarray]:
        for row in rows:
            if not 1 <= len(row) <= self.context_length:
                raise UsageError(
                    f"a text of {len(row)} tokens cannot be read, the model's context is {self.context_length}",
                    hint="give at least one token and at most a context of them",
                )
            if self._vocab_size:
                check_ids(row, self._vocab_size)
        longest = max(len(row) for row in rows)
        ids = np.full((len(rows), longest), self._pad_id, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
            if segments is not None and self._token_types > 1:  # as in training: others know one kind of text
                types[i, : len(row)] = segments[i]
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return {name: value for name, value in feeds.items() if name in self.inputs}
