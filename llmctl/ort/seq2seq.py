"""Answers of an encoder-decoder bundle: the encoder reads the prompt once, the decoder says the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnxruntime as ort

from llmctl.beams import BeamSearch
from llmctl.decoding import Answer, draw, search_beams
from llmctl.engine import Constraint
from llmctl.errors import UsageError
from llmctl.generator import GREEDY, Candidate, Sampling, Tokens, check_bias, check_single, prompt_room
from llmctl.ort.bundle import DECODER_WITH_PAST, Bundle
from llmctl.ort.cache import GrowingRows, InPlaceRows, Rows, read_layout
from llmctl.ort.sampling import AnswerState, check_ids, choose, log_probability, rank, state
from llmctl.ort.sessions import provider

BATCH = 16
SHARED = "past_present_share_buffer"
"""Entry of a graph's metadata: past and present may be one buffer."""


class OrtSeq2Seq:
    """A `llmctl.generator.Generator` whose prompt is what the encoder reads, whose answer all that the decoder says.

    Three graphs, as Optimum lays them out: the encoder; the decoder's first step, which also computes the keys and
    values of all cross-attention; the decoder's further steps, which are given these.
    """

    encoder_decoder = True

    def __init__(
        self, bundle: Bundle, encoder: ort.InferenceSession, first: ort.InferenceSession, step: ort.InferenceSession
    ) -> None:
        self.encoder, self.first, self.further = encoder, first, step
        self.layout = read_layout(step, bundle.directory / DECODER_WITH_PAST)
        self.in_place = step.get_modelmeta().custom_metadata_map.get(SHARED) == "1"
        self.context_length = bundle.context_length
        self.vocab_size = self.layout.vocab_size
        self.eos_ids = bundle.ends(self.vocab_size)
        self.start_id, self._pad_id = bundle.start_id, bundle.pad_id
        self.backend = f"onnxruntime {provider(step)}"
        self._reads = {value.name for value in first.get_inputs()}

    def room(self, prompt: Sequence[int]) -> int:
        """Most tokens of an answer; see `Generator.room`."""
        room = prompt_room(prompt, self.context_length, encoder_decoder=True)
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
        """The answers to many prompts, in order, each equal to `list(self.stream(prompt, sampling))`."""
        check_single(sampling)
        limits = [min(sampling.max_new_tokens, self.room(prompt)) for prompt in prompts]
        if sampling.beams > 1:
            return [self.candidates(prompt, sampling, constraint)[0].ids for prompt in prompts]
        found = [Answer(self._state(sampling, constraint, limit), limit) for limit in limits]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            rows, logits = self.begin([prompts[i] for i in chosen], [[self.start_id]] * len(chosen), limits[0])
            draw(rows, logits[:, -1], [found[i] for i in chosen], self.eos_ids, choose)
        return [answer.ids for answer in found]

    def candidates(
        self, prompt: Sequence[int], sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> list[Candidate]:
        """Several answers to one prompt with their scores; see `Generator.candidates`."""
        limit = min(sampling.max_new_tokens, self.room(prompt))
        rows, logits = self.begin([prompt], [[self.start_id]], limit)
        if sampling.beams > 1:
            search = BeamSearch(sampling, self.eos_ids, limit)
            answer = self._state(sampling, constraint, limit)
            return search_beams(rows, logits[:, -1], search, rank, answer)[: sampling.n]
        found = [Answer(self._state(single, constraint, limit), limit) for single in sampling.draws()]
        for start in range(0, len(found), BATCH):
            some = found[start : start + BATCH]
            copies = np.repeat(logits[:, -1], len(some), axis=0)
            draw(rows.keep([0] * len(some)), copies, some, self.eos_ids, choose, log_probability)
        return [answer.candidate(sampling.length_penalty) for answer in found]

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """Logits that each token of `answer` was chosen from, `(len(answer), V)` float32."""
        self.room(prompt)
        if not answer:
            return np.zeros((0, self.vocab_size), np.float32)
        check_ids(answer, self.vocab_size)
        if len(answer) > self.context_length:
            raise UsageError(
                f"{len(answer)} tokens of an answer cannot be scored, the model's context is {self.context_length}",
                hint="shorten the answer",
            )
        _, logits = self.begin([prompt], [[self.start_id, *answer[:-1]]], 1)
        return logits[0]  # type: ignore[no-any-return]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """UsageError: an encoder-decoder scores an answer, and only given a prompt; see `answer_logits`."""
        raise _no_continuation()

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """UsageError, as `logits`."""
        raise _no_continuation()

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The encoder's states `(B, S, D)` and the mask of real tokens `(B, S)` int64; rows are padded on the right."""
        longest = max(len(prompt) for prompt in prompts)
        ids = np.full((len(prompts), longest), self._pad_id, np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        (states,) = self.encoder.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
        return states, mask

    def begin(
        self, prompts: Sequence[Sequence[int]], said: Sequence[Sequence[int]], room: int
    ) -> tuple[Rows, np.ndarray]:
        """Read `prompts`, feed `said`, all of one length; rows with space for `room` tokens more, and the logits
        `(B, len(said[0]), V)` float32."""
        states, mask = self.read(prompts)
        ids = np.asarray(said, np.int64)
        values = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
        }
        names = [value.name for value in self.first.get_outputs()]
        found = dict(
            zip(names, self.first.run(names, {n: v for n, v in values.items() if n in self._reads}), strict=True)
        )
        constants = {**values, **{name.replace("present", "past_key_values"): found[name] for name in names}}
        layout, count = self.layout, ids.shape[1]
        kind = InPlaceRows if self.in_place else GrowingRows
        rows = kind(
            self.further, layout, len(prompts), count + room, {name: constants[name] for name in layout.constants}
        )
        rows.fill([found[name] for name in layout.present], [count] * len(prompts))
        return rows, np.asarray(found["logits"], np.float32)

    def _state(self, sampling: Sampling, constraint: Constraint | None, limit: int) -> AnswerState:
        """Penalties and rules count what the decoder is given, as in transformers: not what the encoder reads."""
        return state(sampling, [self.start_id], self.vocab_size, constraint, self.eos_ids, limit)

    def _stream(self, prompt: Sequence[int], sampling: Sampling, limit: int, constraint: Constraint | None) -> Tokens:
        if sampling.beams > 1:
            best = self.candidates(prompt, sampling, constraint)[0]
            yield from best.ids
            return best.end
        answer = self._state(sampling, constraint, limit)
        rows, logits = self.begin([prompt], [[self.start_id]], limit)
        last = logits[0, -1]
        for left in reversed(range(limit)):
            token = int(choose(last[None], [answer])[0])
            if token in self.eos_ids:
                return token
            yield token
            if left:
                last = rows.step((token,))[0]
        return None


def _no_continuation() -> UsageError:
    return UsageError(
        "an encoder-decoder scores an answer to a text, not a text alone",
        hint="choose a decoder, or a task with answers",
    )
