"""How the next token is chosen from logits: one definition, in torch.

The order is that of transformers; see `llmctl.ort.sampling`, which does the same in numpy.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from llmctl.beams import Continuation
from llmctl.engine import Constraint
from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.rules import NOTHING_LEFT, NOTHING_LEFT_HINT, RuleState


class Sampler:
    """Chooses one token after another for one answer, and remembers what was said.

    Equal to transformers' `generate(do_sample=True)` under the same seed and device: one `torch.multinomial` over the
    whole vocabulary per token. Penalties count `prompt` as `Sampling` says; `constraint` is copied.
    """

    def __init__(
        self,
        sampling: Sampling,
        device: torch.device | str = "cpu",
        prompt: Sequence[int] = (),
        constraint: Constraint | None = None,
        eos_ids: frozenset[int] = frozenset(),
        limit: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.sampling = sampling
        self.constraint = constraint and constraint.copy()
        self.prompt = frozenset(prompt)
        self.said: Counter[int] = Counter()
        self.random = torch.Generator(device)
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(sampling.seed)
        self.rules: RuleState | None = None
        if sampling.rules is not None:
            self.rules = RuleState(sampling.rules, prompt, eos_ids, limit or sampling.max_new_tokens, vocab_size)
        penalised = sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty
        self.adjusts = bool(sampling.logit_bias or penalised or constraint is not None or self.rules)

    def __call__(self, logits: Tensor) -> int:
        """The next token of `logits (V,)` float32: the argmax at temperature 0, else a draw."""
        if self.adjusts:
            logits = self.adjusted(logits)
            if self.rules is not None and logits.max().isneginf():
                raise UsageError(NOTHING_LEFT, hint=NOTHING_LEFT_HINT)
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = filtered(logits, self.sampling).softmax(dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=self.random))
        if self.adjusts:
            self.accept(token)
        return token

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self.said[token] += 1
        forced = None
        if self.rules is not None:
            forced = self.rules.forced()
            self.rules.accept(token)
        # What is forced need not be of the form that was asked for, a language's token for instance.
        if self.constraint is not None and (forced is None or self.constraint.mask()[token]):
            self.constraint.accept(token)

    def copy(self) -> Sampler:
        """A second answer that begins like this one."""
        other = copy.copy(self)
        other.said = self.said.copy()
        other.constraint = self.constraint and self.constraint.copy()
        other.rules = self.rules and self.rules.copy()
        other.random = self.random.clone_state()
        return other

    def adjusted(self, scores: Tensor, *, dead_ends: bool = False) -> Tensor:
        """`scores (V,)` after bias, penalties, the constraint and the rules, in this order; a new tensor.

        Raises UsageError where the constraint allows nothing; with `dead_ends` all of it is -inf.
        """
        sampling = self.sampling
        scores = scores.clone()
        if sampling.logit_bias:
            ids, bias = zip(*sampling.logit_bias, strict=True)
            scores[list(ids)] += scores.new_tensor(bias)
        if sampling.repetition_penalty != 1:
            seen = list(self.prompt | self.said.keys())
            values, penalty = scores[seen], sampling.repetition_penalty
            scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
        if self.said and (sampling.frequency_penalty or sampling.presence_penalty):
            counts = scores.new_tensor(list(self.said.values()))
            scores[list(self.said)] -= counts * sampling.frequency_penalty + sampling.presence_penalty
        return self._restricted(scores, dead_ends=dead_ends)

    def _restricted(self, scores: Tensor, *, dead_ends: bool) -> Tensor:
        """What the constraint and the rules leave; as `llmctl.ort.history` has it."""
        rules = self.rules
        forced = None if rules is None else rules.forced()
        if forced is not None:
            scores.fill_(-torch.inf)
            scores[list(forced)] = 0
            return scores
        if self.constraint is not None:
            allowed = torch.from_numpy(self.constraint.mask()).to(scores.device)
            if not (dead_ends or allowed.any()):
                raise UsageError("the constraint allows no token here", hint="relax the schema, regex or grammar")
            scores.masked_fill_(~allowed, -torch.inf)
        if rules is None:
            return scores
        ruled = scores.clone()
        ruled[[*rules.always, *rules.banned()]] = -torch.inf
        return scores if self.constraint is not None and ruled.max().isneginf() else ruled


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of every answer, from `logits (B, V)` float32."""
    return [sampler(row) for row, sampler in zip(logits, samplers, strict=True)]


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """`logits (V,)` after temperature, top-k (1805.04833), top-p (1904.09751), min-p (2407.01082); -inf where cut.

    Top-p keeps the smallest set whose mass reaches p, the token that crosses p included; min-p what is at least `min_p`
    times as likely as the likeliest token.
    """
    scores = logits / sampling.temperature
    if not torch.isfinite(scores.max()):  # a temperature near 0 overflows; the limit is greedy
        scores = torch.full_like(logits, -torch.inf)
        scores[logits.argmax()] = 0.0
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort()
        cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        cut[-1] = False
        scores = scores.masked_fill(cut.scatter(0, order, cut), -torch.inf)
    if sampling.min_p > 0:
        likely = scores.softmax(dim=-1)
        cut = likely < sampling.min_p * likely.max()
        cut[scores.argmax()] = False
        scores = scores.masked_fill(cut, -torch.inf)
    return scores


def log_probability(logits: Tensor, token: int) -> float:
    """Natural log-probability of `token` under `logits (V,)`, nothing scaled or filtered."""
    return float(logits.log_softmax(dim=-1)[token])


def rank(logits: Tensor, totals: Sequence[float], wanted: int, samplers: Sequence[Sampler] = ()) -> list[Continuation]:
    """The `wanted` likeliest continuations of beams with `logits (B, V)`, `totals` added to each beam's; best first.

    With `samplers`, one for each beam, bias, penalties, constraints and rules change the log-probabilities that beams
    are ranked by, as in transformers; fewer come back where fewer are allowed, none of a beam that has none.
    """
    likely = scored = logits.log_softmax(dim=-1)
    if samplers:
        rows = zip(likely, samplers, strict=True)
        scored = torch.stack([sampler.adjusted(row, dead_ends=True) for row, sampler in rows])
    sums = scored + torch.tensor(totals, dtype=scored.dtype, device=scored.device)[:, None]
    best = sums.flatten().topk(min(wanted, sums.numel())).indices
    best = best[sums.flatten()[best].isfinite()]
    beams, tokens = best // scored.shape[1], best % scored.shape[1]
    columns = (beams, tokens, likely[beams, tokens], scored[beams, tokens])
    return [Continuation(*found) for found in zip(*(column.tolist() for column in columns), strict=True)]
