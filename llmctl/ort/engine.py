"""Generation from an ONNX bundle: prefill in chunks, one token per step, one answer or many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from llmctl.errors import InputError, UsageError
from llmctl.generator import GREEDY, Sampling, check_prompt
from llmctl.ort.bundle import DECODER, DECODER_WITH_PAST, ENCODER, Bundle, read_bundle
from llmctl.ort.cache import GrowingRows, InPlaceRows, Rows, read_layout
from llmctl.ort.decoding import answer, answers, check_ids, chosen_logprobs
from llmctl.ort.seq2seq import OrtSeq2Seq
from llmctl.ort.sessions import open_session, provider

PREFILL_CHUNK = 256
"""Tokens fed at once: bounds the logits in memory to 256 x V."""
BATCH = 16
"""Most prompts answered side by side: a step reads the same weights for 16 rows as for one."""
_ROUND = 64


def open_generator(directory: Path | str, device: str = "auto", threads: int = 0) -> OrtGenerator | OrtSeq2Seq:
    """Open the bundle in `directory` for generation; needs neither torch nor onnx.

    Raises InputError naming the file that is missing, damaged or generates no text, and MachineError if `device` is
    "cuda" and there is none.
    """
    bundle = read_bundle(directory)
    if not bundle.has_pair:
        return OrtGenerator(bundle, open_session(bundle.model, device, threads))
    names = (ENCODER, DECODER, DECODER_WITH_PAST)
    return OrtSeq2Seq(bundle, *(open_session(bundle.directory / name, device, threads) for name in names))


def open_bundle(directory: Path | str, device: str = "auto", threads: int = 0) -> OrtGenerator:
    """`open_generator` for decoders alone; InputError for an encoder-decoder too."""
    generator = open_generator(directory, device, threads)
    if isinstance(generator, OrtSeq2Seq):
        raise InputError(f"{directory} holds an encoder-decoder", hint="give a bundle of a decoder")
    return generator


class OrtGenerator:
    """A `llmctl.generator.Generator` over one ONNX Runtime session."""

    def __init__(self, bundle: Bundle, session: ort.InferenceSession) -> None:
        self.session = session
        self.layout = read_layout(session, bundle.model)
        self.in_place = bundle.in_place
        self.context_length = bundle.context_length
        self.vocab_size = self.layout.vocab_size
        self.eos_ids = bundle.eos_ids
        self.backend = f"onnxruntime {provider(session)}"
        self._idle: Rows | None = None

    def rows(self, batch: int, capacity: int) -> Rows:
        """Empty rows for `batch` sequences of up to `capacity` tokens; graphs that concatenate have batch 1."""
        capacity = min(-(-capacity // _ROUND) * _ROUND, self.context_length)
        if self.in_place:
            return InPlaceRows(self.session, self.layout, batch, capacity)
        if batch != 1:
            raise ValueError(f"this graph has no in-place cache, so no batch of {batch}")
        return GrowingRows(self.session, self.layout, 1, capacity)

    def stream(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> Iterator[int]:
        """Yield new token ids; ends at an EOS id, `max_new_tokens` or the context length. Checks the prompt at once."""
        self._check(prompt)
        return self._stream(prompt, sampling)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY) -> list[list[int]]:
        """The new ids for many prompts, in order, each equal to `list(self.stream(prompt, sampling))`."""
        for prompt in prompts:
            self._check(prompt)
        if not self.in_place or len(prompts) == 1:
            return [list(self._stream(prompt, sampling)) for prompt in prompts]
        answers: dict[int, list[int]] = {}
        # Prompts of like length end at like times, so batches stay full.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            answers.update(zip(chosen, self._batch([prompts[i] for i in chosen], sampling), strict=True))
        return [answers[i] for i in range(len(prompts))]

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """Natural log-probability of `tokens[1:]` given what stands before, `(len(tokens) - 1,)` float32."""
        parts = [np.zeros(0, np.float32)]
        for start, logits in self._chunks(tokens):
            following = tokens[start + 1 : start + 1 + len(logits)]
            parts.append(chosen_logprobs(logits[: len(following)], following))
        return np.concatenate(parts)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits at every position of one sequence, `(len(tokens), V)` float32."""
        return np.concatenate([logits for _, logits in self._chunks(tokens)])

    def _check(self, prompt: Sequence[int]) -> None:
        check_prompt(prompt, self.context_length)
        check_ids(prompt, self.vocab_size)

    def _chunks(self, tokens: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """The logits of one sequence piece by piece, each with the position of its first token."""
        if not tokens or len(tokens) > self.context_length:
            raise UsageError(
                f"{len(tokens)} tokens cannot be scored, the model's context is {self.context_length}",
                hint="give at least one token and at most a context of them",
            )
        check_ids(tokens, self.vocab_size)
        rows = self._borrow(len(tokens))
        for start in range(0, len(tokens), PREFILL_CHUNK):
            yield start, rows.feed(0, tokens[start : start + PREFILL_CHUNK])
        self._idle = rows

    def _borrow(self, capacity: int) -> Rows:
        """One empty row, the idle one if it is large enough; two streams at a time get one each."""
        rows, self._idle = self._idle, None
        if rows is None or rows.capacity < capacity:
            rows = self.rows(1, capacity)
        rows.restart()
        return rows

    def _stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        room = min(sampling.max_new_tokens, self.context_length - len(prompt))
        rows = self._borrow(len(prompt) + room)
        try:
            yield from answer(rows, prefill(rows, 0, prompt), room, sampling, self.eos_ids)
        finally:
            self._idle = rows

    def _batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Up to BATCH answers side by side. Prefill runs row by row, so no prompt is padded to another's length."""
        rooms = [min(sampling.max_new_tokens, self.context_length - len(prompt)) for prompt in prompts]
        needed = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
        rows = InPlaceRows(self.session, self.layout, len(prompts), min(needed, self.context_length))
        logits = np.stack([prefill(rows, row, prompt) for row, prompt in enumerate(prompts)])
        return answers(rows, logits, rooms, sampling, self.eos_ids)


def prefill(rows: Rows, row: int, prompt: Sequence[int]) -> np.ndarray:
    """Feed a prompt in chunks; the logits `(V,)` after its last token."""
    for start in range(0, len(prompt), PREFILL_CHUNK):
        logits = rows.feed(row, prompt[start : start + PREFILL_CHUNK])
    return logits[-1]  # type: ignore[no-any-return]
