"""Generation with the torch model: the `Generator` of `model.hf` artifacts, used by eval, rag and online RL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmctl.errors import MachineError, UsageError
from llmctl.generator import GREEDY, Sampling, check_prompt
from llmctl.nn.attention import KVCache
from llmctl.nn.hf import load_model
from llmctl.nn.transformer import Transformer

MAX_ROWS = 64
CACHE_BYTES = 1 << 30
"""A batch takes as many prompts as fit into a cache of this size, at most MAX_ROWS."""
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_model(directory: Path, device: str = "auto", threads: int = 0, dtype: str = "auto") -> TorchGenerator:
    """Open a `model.hf` directory.

    `auto` is CUDA where there is one, and float32 on a CPU, bfloat16 on CUDA. `threads > 0` sets torch's number of
    threads for the whole process. Raises MachineError without the device, InputError for a damaged model.
    """
    where = pick_device(device)
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of auto, {', '.join(DTYPES)}")
    if threads > 0:
        torch.set_num_threads(threads)
    return TorchGenerator(load_model(directory, where, DTYPES[dtype]))


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; MachineError if CUDA is asked for and missing."""
    has_cuda = torch.cuda.is_available()
    if name.startswith("cuda") and not has_cuda:
        raise MachineError("no CUDA device is available to torch", hint="use the device cpu or auto")
    return torch.device(name if name != "auto" else "cuda" if has_cuda else "cpu")


class TorchGenerator:
    """Implements `llmctl.generator.Generator` with a preallocated key/value cache.

    `eos_ids` default to the model's own. Results of `generate` equal those of `stream` up to the rounding of batched
    matrix products, which can decide only between two tokens whose logits are equal to about 1e-6.
    """

    def __init__(self, model: Transformer, eos_ids: Iterable[int] | None = None) -> None:
        self.model = model
        self.eos_ids = frozenset(model.config.eos_ids if eos_ids is None else eos_ids)
        self.context_length = model.config.context
        self.vocab_size = model.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device

    @property
    def backend(self) -> str:
        """`torch cpu float32`."""
        return f"torch {self.device} {str(self.model.embedding.weight.dtype).removeprefix('torch.')}"

    def stream(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> Iterator[int]:
        """Yield new ids one by one; see `Generator.stream`. A bad prompt is refused at the call."""
        self._check(prompt)
        return self._stream(list(prompt), sampling)

    def _stream(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        limit = self._limit(prompt, sampling)
        cache = self._cache(1, len(prompt) + limit)
        sampler = Sampler(sampling, self.device)
        fed = prompt
        for _ in range(limit):
            # The model runs inside a function of its own: a `with` around a yield would leave inference mode switched
            # on in the caller.
            token = sampler(self._last_logits(torch.tensor([fed], device=self.device), cache)[0])
            if token in self.eos_ids:
                return
            yield token
            fed = [token]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY) -> list[list[int]]:
        """New ids for many prompts, in order; prompts of similar length run together."""
        for prompt in prompts:
            self._check(prompt)
        results: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        rows = self._rows(max((len(p) + self._limit(p, sampling) for p in prompts), default=1))
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            answers = self._generate_batch([list(prompts[i]) for i in chosen], sampling)
            for i, answer in zip(chosen, answers, strict=True):
                results[i] = answer
        return results

    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        limits = [self._limit(prompt, sampling) for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        cache = self._cache(len(prompts), max(a + b for a, b in zip(lengths, limits, strict=True)))
        samplers = [Sampler(sampling, self.device) for _ in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        slots = list(range(len(prompts)))  # the prompt that each row of the cache belongs to
        alive = set(slots)
        logits = self._prefill(prompts, cache)
        while True:
            for row, index in enumerate(slots):
                if index in alive:
                    token = samplers[index](logits[row])
                    if token not in self.eos_ids:
                        answers[index].append(token)
                    if token in self.eos_ids or len(answers[index]) == limits[index]:
                        alive.remove(index)
            if not alive:
                return answers
            # Rows that are done go on with their last token until half of them can be dropped in one copy.
            if len(alive) <= len(slots) // 2:
                kept = [row for row, index in enumerate(slots) if index in alive]
                cache.select(torch.tensor(kept, device=self.device))
                slots = [slots[row] for row in kept]
            last = [answers[index][-1] if answers[index] else prompts[index][-1] for index in slots]
            where = [max(lengths[index], lengths[index] + len(answers[index]) - 1) for index in slots]
            where = [min(position, cache.capacity - 1) for position in where]
            logits = self._last_logits(
                torch.tensor(last, device=self.device)[:, None], cache, torch.tensor(where, device=self.device)[:, None]
            )

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities of `tokens[1:]`, `(len(tokens) - 1,)` float32."""
        scores = torch.from_numpy(self.logits(tokens)[:-1]).log_softmax(dim=-1)
        targets = torch.tensor(list(tokens[1:]), dtype=torch.int64)
        return scores.gather(1, targets[:, None])[:, 0].numpy()

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits at every position, `(len(tokens), vocab_size)` float32."""
        if not len(tokens):
            raise UsageError("no tokens to score", hint="give at least one token")
        self._check_ids(tokens)
        return self.model(torch.tensor([list(tokens)], device=self.device))[0].float().cpu().numpy()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _prefill(self, prompts: list[list[int]], cache: KVCache) -> Tensor:
        """Run prompts padded on the right; logits `(B, V)` after each one's last token.

        Padding stands after a row's tokens, so nothing sees it; the row's answer overwrites it in the cache.
        """
        longest = max(len(prompt) for prompt in prompts)
        padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
        hidden = self.model.hidden(torch.tensor(padded, device=self.device), cache=cache)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return self.model.head(hidden[torch.arange(len(prompts), device=self.device), last]).float()

    @torch.inference_mode()
    def _last_logits(self, tokens: Tensor, cache: KVCache, positions: Tensor | None = None) -> Tensor:
        """Logits `(B, V)`, float32, after the last of `tokens (B, T)`."""
        return self.model.head(self.model.hidden(tokens, positions, cache=cache)[:, -1]).float()

    def _cache(self, rows: int, capacity: int) -> KVCache:
        return KVCache(self.model.config, rows, capacity, self.device, self.model.embedding.weight.dtype)

    def _rows(self, capacity: int) -> int:
        config = self.model.config
        element = self.model.embedding.weight.element_size()
        per_row = 2 * config.layers * config.kv_heads * config.head_dim * capacity * element
        return max(1, min(MAX_ROWS, CACHE_BYTES // per_row))

    def _limit(self, prompt: Sequence[int], sampling: Sampling) -> int:
        return min(sampling.max_new_tokens, self.context_length - len(prompt))

    def _check(self, prompt: Sequence[int]) -> None:
        check_prompt(prompt, self.context_length)
        self._check_ids(prompt)

    def _check_ids(self, tokens: Sequence[int]) -> None:
        if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise UsageError(
                f"token id {max(tokens)} is outside the model's vocabulary of {self.vocab_size}",
                hint="use the tokenizer that the model was trained with",
            )


class Sampler:
    """Draws one token after another for one sequence.

    Equal to transformers' `generate(do_sample=True)` under the same seed and device: one `torch.multinomial` over the
    whole vocabulary per token.
    """

    def __init__(self, sampling: Sampling, device: torch.device | str = "cpu") -> None:
        self.sampling = sampling
        self.random = torch.Generator(device)
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token of `logits (V,)` float32: the argmax at temperature 0, else a draw."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = filtered(logits, self.sampling).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self.random))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """`logits (V,)` after temperature, top-k (arXiv 1805.04833) and top-p (1904.09751); -inf where cut.

    Top-p keeps the smallest set whose mass reaches p, the token that crosses p included.
    """
    scores = logits / sampling.temperature
    if not torch.isfinite(scores).all():  # a temperature near 0 overflows; the limit is greedy
        scores = torch.full_like(logits, -torch.inf)
        scores[logits.argmax()] = 0.0
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort()
        cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        cut[-1] = False
        scores = scores.masked_fill(cut.scatter(0, order, cut), -torch.inf)
    return scores
