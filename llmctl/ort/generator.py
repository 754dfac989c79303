"""Generation from an ONNX bundle: prefill in chunks, one token per step, one answer or many at once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from llmctl.beams import BeamSearch
from llmctl.decoding import Answer, draw, search_beams
from llmctl.engine import Constraint, Engine, EngineOptions, Request
from llmctl.errors import InputError, MachineError, UsageError
from llmctl.generator import GREEDY, Candidate, Sampling, Tokens, check_bias, check_single, prompt_room
from llmctl.one_by_one import OneByOne
from llmctl.ort.adapters import number_of, open_adapters
from llmctl.ort.bundle import DECODER, DECODER_WITH_PAST, ENCODER, Bundle, read_bundle
from llmctl.ort.cache import GrowingRows, InPlaceRows, Rows, read_layout
from llmctl.ort.sampling import Sampler, check_ids, choose, log_probabilities, log_probability, rank, state
from llmctl.ort.scheduler import OrtEngine
from llmctl.ort.seq2seq import OrtSeq2Seq
from llmctl.ort.sessions import open_session, provider

PREFILL_CHUNK = 256
"""Tokens fed at once: bounds the logits in memory to 256 x V."""
BATCH = 16
"""Most prompts answered side by side: a step reads the same weights for 16 rows as for one."""
_ROUND = 64

_log = logging.getLogger(__name__)


def open_generator(directory: Path | str, device: str = "auto", threads: int = 0) -> OrtGenerator | OrtSeq2Seq:
    """Open the bundle in `directory` for generation; needs neither torch nor onnx.

    Raises InputError naming the file that is missing, damaged or generates no text, and MachineError if `device` is
    "cuda" and there is none, or the bundle's cache is int8, which CUDA's operator has beside half precision only.
    """
    bundle = read_bundle(directory)
    if bundle.has_pair:
        names = (ENCODER, DECODER, DECODER_WITH_PAST)
        return OrtSeq2Seq(bundle, *(open_session(bundle.directory / name, device, threads) for name in names))
    generator = OrtGenerator(bundle, open_session(bundle.model, device, threads))
    if generator.layout.device == "cpu" or generator.layout.cache_dtype is not np.int8:
        return generator
    problem = f"{bundle.model}: an int8 cache is for the CPU"
    if device == "cuda":
        raise MachineError(problem, hint="use --device cpu, or the bundle before `quantize`")
    _log.warning("%s; running there", problem)
    return OrtGenerator(bundle, open_session(bundle.model, "cpu", threads))


def open_bundle(directory: Path | str, device: str = "auto", threads: int = 0) -> OrtGenerator:
    """`open_generator` for decoders alone; InputError for an encoder-decoder too."""
    generator = open_generator(directory, device, threads)
    if isinstance(generator, OrtSeq2Seq):
        raise InputError(f"{directory} holds an encoder-decoder", hint="give a bundle of a decoder")
    return generator


class OrtGenerator:
    """A `llmctl.generator.Generator` over one ONNX Runtime session."""

    encoder_decoder = False

    def __init__(self, bundle: Bundle, session: ort.InferenceSession) -> None:
        self.session = session
        self.layout = read_layout(session, bundle.model)
        self.in_place = bundle.in_place
        self.context_length = bundle.context_length
        self.vocab_size = self.layout.vocab_size
        self.eos_ids = bundle.ends(self.vocab_size)
        self.backend = f"onnxruntime {provider(session)}"
        self.adapters = open_adapters(session, bundle.directory, self.layout.device)
        if self.adapters is not None and not self.in_place:
            raise InputError(
                f"{bundle.directory} has adapters, and its graph no in-place cache",
                hint="export the model and its adapters again, without `exporter: optimum`",
            )
        self.adapter: str | None = None
        """Which of `adapter_names` answers; `with_adapter` gives another generator with another one."""
        self._idle: Rows | None = None

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that the bundle has beside its graph."""
        return () if self.adapters is None else self.adapters.names

    def with_adapter(self, name: str | None) -> OrtGenerator:
        """The same model over the same session with another adapter, or none; UsageError if there is no such one."""
        number_of(self.adapters, name)
        chosen = copy.copy(self)
        chosen.adapter, chosen._idle = name, None
        return chosen

    @property
    def adapter_feeds(self) -> dict[str, np.ndarray]:
        """The graph's inputs that make it answer with `adapter`; none without one."""
        return {} if self.adapters is None else self.adapters.feeds(self.adapters.number(self.adapter))

    def rows(self, batch: int, capacity: int) -> Rows:
        """Empty rows for `batch` sequences of up to `capacity` tokens; graphs that concatenate have batch 1."""
        capacity = min(-(-capacity // _ROUND) * _ROUND, self.context_length)
        if self.in_place:
            return InPlaceRows(self.session, self.layout, batch, capacity, adapter=self.adapter_feeds)
        if batch != 1:
            raise ValueError(f"this graph has no in-place cache, so no batch of {batch}")
        return GrowingRows(self.session, self.layout, 1, capacity)

    def engine(self, options: EngineOptions) -> Engine:
        """Open an engine that answers many requests side by side, over the same session.

        Graphs that concatenate their cache hold rows of one length only, so they answer one request after the other.
        Which adapter answers each request says: the engine has all of them, whichever this generator has.
        Raises UsageError for options that make no sense.
        """
        if not self.in_place:
            return OneByOne(self, options)
        return OrtEngine(self, options)

    def room(self, prompt: Sequence[int]) -> int:
        """Most tokens that may follow; see `Generator.room`."""
        room = prompt_room(prompt, self.context_length)
        check_ids(prompt, self.vocab_size)
        return room

    def stream(
        self, prompt: Sequence[int], sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> Iterator[int]:
        """Yield new token ids; see `Generator.stream`. Checks the prompt at once."""
        check_single(sampling)
        check_bias(sampling, self.vocab_size)
        return self._stream(prompt, sampling, min(sampling.max_new_tokens, self.room(prompt)), constraint)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> list[list[int]]:
        """The new ids for many prompts, in order, each equal to `list(self.stream(prompt, sampling))`."""
        check_single(sampling)
        limits = [min(sampling.max_new_tokens, self.room(prompt)) for prompt in prompts]
        if not self.in_place or len(prompts) <= 1 or sampling.beams > 1:
            return [
                list(self._stream(p, sampling, limit, constraint)) for p, limit in zip(prompts, limits, strict=True)
            ]
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        options = EngineOptions(slots=min(BATCH, len(prompts)), max_queue=len(prompts), context=longest)
        common = {"sampling": sampling, "constraint": constraint, "adapter": self.adapter}
        requests = [Request(prompt=prompt, **common) for prompt in prompts]  # type: ignore[arg-type]
        return run_all(self.engine(options), requests)

    def candidates(
        self, prompt: Sequence[int], sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> list[Candidate]:
        """Several answers to one prompt with their scores; see `Generator.candidates`."""
        limit = min(sampling.max_new_tokens, self.room(prompt))
        singles = [sampling] if sampling.beams > 1 else sampling.draws()
        states = [state(one, prompt, self.vocab_size, constraint, self.eos_ids, limit) for one in singles]
        rows = self._borrow(len(prompt) + limit)
        try:
            # A copy: the next prompt overwrites the logits.
            logits = prefill(rows, 0, prompt)[None].copy()
            if sampling.beams > 1:
                search = BeamSearch(sampling, self.eos_ids, limit)
                return search_beams(rows.keep([0]), logits, search, rank, states[0])[: sampling.n]
            answers = [Answer(one, limit) for one in states]
            for start in range(0, len(answers), BATCH):
                some = answers[start : start + BATCH]
                copies = np.repeat(logits, len(some), axis=0)
                draw(rows.keep([0] * len(some)), copies, some, self.eos_ids, choose, log_probability)
            return [answer.candidate(sampling.length_penalty) for answer in answers]
        finally:
            self._idle = rows

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """Logits that each token of `answer` was chosen from, `(len(answer), vocab_size)` float32."""
        return self.logits([*prompt, *answer])[len(prompt) - 1 : -1]

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """Natural log-probability of `tokens[1:]` given what stands before, `(len(tokens) - 1,)` float32."""
        parts = []
        for start, logits in self._chunks(tokens):
            following = np.asarray(tokens[start + 1 : start + 1 + len(logits)], np.int64)
            scores = log_probabilities(logits[: len(following)])
            parts.append(scores[np.arange(len(following)), following])
        return np.concatenate(parts).astype(np.float32)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits at every position of one sequence, `(len(tokens), V)` float32."""
        return np.concatenate([logits for _, logits in self._chunks(tokens)])

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

    def _stream(self, prompt: Sequence[int], sampling: Sampling, limit: int, constraint: Constraint | None) -> Tokens:
        if sampling.beams > 1:
            best = self.candidates(prompt, sampling, constraint)[0]
            yield from best.ids
            return best.end
        sample = Sampler(sampling, prompt, self.vocab_size, constraint, self.eos_ids, limit)
        rows = self._borrow(len(prompt) + limit)
        try:
            logits = prefill(rows, 0, prompt)
            for left in reversed(range(limit)):
                token = sample(logits)
                if token in self.eos_ids:
                    return token
                yield token
                if left:
                    logits = rows.step((token,))[0]
            return None
        finally:
            self._idle = rows


def run_all(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """The tokens of one answer for each request, in order; the engine is closed."""
    try:
        found: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise event.error
                found[event.ticket] += event.tokens
        return list(found.values())
    finally:
        engine.close()


def prefill(rows: Rows, row: int, prompt: Sequence[int]) -> np.ndarray:
    """Feed a prompt in chunks; the logits `(V,)` after its last token."""
    for start in range(0, len(prompt), PREFILL_CHUNK):
        logits = rows.feed(row, prompt[start : start + PREFILL_CHUNK], last=True)
    return logits[-1]  # type: ignore[no-any-return]
