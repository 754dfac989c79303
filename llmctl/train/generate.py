"""Generation with the torch model: the `Generator` of `model.hf` artifacts, used by eval, rag and online RL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmctl.beams import BeamSearch
from llmctl.decoding import Answer, draw, search_beams
from llmctl.engine import Constraint
from llmctl.errors import MachineError, UsageError
from llmctl.generator import GREEDY, Candidate, Sampling, Tokens, check_bias, check_single, prompt_room
from llmctl.nn.attention import Memory
from llmctl.nn.foreign import ForeignModel
from llmctl.nn.opening import open_network
from llmctl.nn.transformer import Transformer
from llmctl.train.rows import TorchRows, inference, remember
from llmctl.train.sampling import Sampler, choose, log_probability, rank

MAX_ROWS = 64
CACHE_BYTES = 1 << 30
"""A batch takes as many prompts as fit into a cache of this size, at most MAX_ROWS."""
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_model(directory: Path, device: str = "auto", threads: int = 0, dtype: str = "auto") -> TorchGenerator:
    """Open a `model.hf` directory.

    `auto` is CUDA where there is one, and float32 on a CPU, bfloat16 on CUDA. `threads > 0` sets torch's number of
    threads for the whole process. Raises MachineError without the device, InputError for a damaged model,
    UsageError for one that does not generate.
    """
    where = pick_device(device)
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of auto, {', '.join(DTYPES)}")
    if threads > 0:
        torch.set_num_threads(threads)
    generator = make_generator(open_network(directory, where, DTYPES[dtype]).eval())
    generator.check_head()
    return generator


def make_generator(model: Transformer, eos_ids: Iterable[int] | None = None) -> TorchGenerator:
    """The generator of a model that `open_network` gave, ours or one of transformers."""
    if isinstance(model, ForeignModel):
        from llmctl.train.foreign_rows import ForeignGenerator

        return ForeignGenerator(model, eos_ids)
    return TorchGenerator(model, eos_ids)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; MachineError if CUDA is asked for and missing."""
    has_cuda = torch.cuda.is_available()
    if name.startswith("cuda") and not has_cuda:
        raise MachineError("no CUDA device is available to torch", hint="use the device cpu or auto")
    return torch.device(name if name != "auto" else "cuda" if has_cuda else "cpu")


class TorchGenerator:
    """Implements `llmctl.generator.Generator` with a preallocated key/value cache, for decoders and encoder-decoders.

    `eos_ids` default to the model's own. Results of `generate` equal those of `stream` up to the rounding of batched
    matrix products, which can decide only between two tokens whose logits are equal to about 1e-6.
    """

    def __init__(self, model: Transformer, eos_ids: Iterable[int] | None = None) -> None:
        self.model = model
        self.eos_ids = frozenset(model.config.eos_ids if eos_ids is None else eos_ids)
        self.context_length = model.config.context
        self.vocab_size = model.config.vocab_size
        self.encoder_decoder = model.config.traits.kind == "encoder-decoder"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device

    @property
    def backend(self) -> str:
        """`torch cpu float32`."""
        return f"torch {self.device} {str(self.model.embedding.weight.dtype).removeprefix('torch.')}"

    def room(self, prompt: Sequence[int]) -> int:
        """Most tokens that may follow; see `Generator.room`."""
        self.check_head()
        room = prompt_room(prompt, self.context_length, self.encoder_decoder)
        self._check_ids(prompt)
        return room

    def stream(
        self, prompt: Sequence[int], sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> Iterator[int]:
        """Yield new ids one by one; see `Generator.stream`. A bad prompt is refused at the call."""
        check_single(sampling)
        limit = min(sampling.max_new_tokens, self.room(prompt))
        sampler = self._sampler(prompt, sampling, constraint, limit)
        return self._stream(list(prompt), sampling, limit, constraint, sampler)

    def _sampler(self, prompt: Sequence[int], sampling: Sampling, constraint: Constraint | None, limit: int) -> Sampler:
        """Penalties and rules count what the decoder is given, as in transformers: not what an encoder reads."""
        check_bias(sampling, self.vocab_size)
        given = list(prompt)
        if self.encoder_decoder:
            given = [start for start in (self.model.config.decoder_start_id,) if start is not None]
        return Sampler(sampling, self.device, given, constraint, self.eos_ids, limit, self.vocab_size)

    def _stream(
        self, prompt: list[int], sampling: Sampling, limit: int, constraint: Constraint | None, sampler: Sampler
    ) -> Tokens:
        if sampling.beams > 1:
            best = self.candidates(prompt, sampling, constraint)[0]
            yield from best.ids
            return best.end
        # The model runs inside functions of its own: a `with` around a yield would leave inference mode switched on
        # in the caller.
        rows, logits = self._start([prompt], limit)
        for left in reversed(range(limit)):
            token = sampler(logits[0])
            if token in self.eos_ids:
                return token
            yield token
            if left:
                logits = rows.step([token])
        return None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> list[list[int]]:
        """New ids for many prompts, in order; prompts of similar length run together."""
        return [answer.ids for answer in self.answers(prompts, [sampling] * len(prompts), constraint)]

    def answers(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], constraint: Constraint | None = None
    ) -> list[Candidate]:
        """An answer to each of many prompts with a sampling of its own, in order: how it ended, and no scores but
        those of beams. Prompts of similar length run together."""
        for sampling in samplings:
            check_single(sampling)
        limits = [
            min(sampling.max_new_tokens, self.room(prompt)) for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        found: dict[int, Candidate] = {
            i: self.candidates(prompts[i], sampling, constraint)[0]
            for i, sampling in enumerate(samplings)
            if sampling.beams > 1
        }
        order = sorted((i for i in range(len(prompts)) if i not in found), key=lambda i: len(prompts[i]))
        count = self._rows(max((len(prompts[i]) + limits[i] for i in order), default=1))
        for start in range(0, len(order), count):
            chosen = order[start : start + count]
            rows, logits = self._start([prompts[i] for i in chosen], max(limits[i] for i in chosen))
            answers = [
                Answer(self._sampler(prompts[i], samplings[i], constraint, limits[i]), limits[i]) for i in chosen
            ]
            draw(rows, logits, answers, self.eos_ids, choose)
            for i, answer in zip(chosen, answers, strict=True):
                found[i] = answer.candidate(samplings[i].length_penalty)
        return [found[i] for i in range(len(prompts))]

    def candidates(
        self, prompt: Sequence[int], sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> list[Candidate]:
        """Several answers to one prompt with their scores; see `Generator.candidates`."""
        limit = min(sampling.max_new_tokens, self.room(prompt))
        rows, logits = self._start([prompt], limit)
        if sampling.beams > 1:
            sampler = self._sampler(prompt, sampling, constraint, limit)
            return search_beams(rows, logits, BeamSearch(sampling, self.eos_ids, limit), rank, sampler)[: sampling.n]
        answers = [Answer(self._sampler(prompt, single, constraint, limit), limit) for single in sampling.draws()]
        count = self._rows(len(prompt) + limit)
        for start in range(0, len(answers), count):
            some = answers[start : start + count]
            copies = logits.expand(len(some), -1)
            draw(rows.keep([0] * len(some)), copies, some, self.eos_ids, choose, log_probability)
        return [answer.candidate(sampling.length_penalty) for answer in answers]

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """Logits that each token of `answer` was chosen from, `(len(answer), vocab_size)` float32."""
        if not self.encoder_decoder:
            return self.logits([*prompt, *answer])[len(prompt) - 1 : -1]
        self.room(prompt)
        if not answer:
            return np.zeros((0, self.vocab_size), np.float32)
        self._check_ids(answer)
        said = [self.model.config.decoder_start_id, *answer[:-1]]
        return self._logits(said, remember(self.model, [prompt]))

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities of `tokens[1:]`, `(len(tokens) - 1,)` float32."""
        scores = torch.from_numpy(self.logits(tokens)[:-1]).log_softmax(dim=-1)
        targets = torch.tensor(list(tokens[1:]), dtype=torch.int64)
        return scores.gather(1, targets[:, None])[:, 0].numpy()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits at every position, `(len(tokens), vocab_size)` float32."""
        if not len(tokens):
            raise UsageError("no tokens to score", hint="give at least one token")
        self.check_head()
        if self.encoder_decoder:
            raise UsageError(
                "an encoder-decoder scores an answer to a text, not a text alone",
                hint="choose a decoder, or a task with answers",
            )
        self._check_ids(tokens)
        return self._logits(tokens)

    def _logits(self, tokens: Sequence[int | None], memory: Memory | None = None) -> np.ndarray:
        with inference(self.model):
            row = torch.tensor([list(tokens)], device=self.device)
            return self.model(row, memory=memory)[0].float().cpu().numpy()  # type: ignore[no-any-return]

    def _start(self, prompts: Sequence[Sequence[int]], limit: int) -> tuple[TorchRows, Tensor]:
        return TorchRows.start(self.model, prompts, limit)

    def _rows(self, capacity: int) -> int:
        """How many rows of `capacity` tokens, the prompt included, run together."""
        config = self.model.config
        if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
            return 1  # the frequencies follow the longest row of a batch, and would be wrong for the others
        element = self.model.embedding.weight.element_size()
        per_row = 2 * config.layers * config.kv_heads * config.head_dim * capacity * element
        return max(1, min(MAX_ROWS, CACHE_BYTES // per_row))

    def check_head(self) -> None:
        """UsageError for a model whose logits are not of the token that comes next."""
        config = self.model.config
        if config.traits.kind == "encoder" or config.head != "lm":
            raise UsageError(
                f"this {config.arch} model has the head {config.head}: it generates no text",
                hint="choose a decoder or an encoder-decoder with a language-model head",
            )

    def _check_ids(self, tokens: Sequence[int]) -> None:
        if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise UsageError(
                f"token id {max(tokens)} is outside the model's vocabulary of {self.vocab_size}",
                hint="use the tokenizer that the model was trained with",
            )
