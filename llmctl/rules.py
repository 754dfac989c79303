"""Which tokens may not come next, and which must: the rules of a model's `generation_config.json`, without a framework.

Names and meanings are those of transformers' `GenerationConfig` and its logits processors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmctl.errors import UsageError

NOTHING_LEFT = "the rules of the model's generation_config.json allow no token here"
NOTHING_LEFT_HINT = "ask for fewer tokens, or relax no_repeat_ngram_size, bad_words_ids and suppress_tokens there"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a model's answers keep to. The defaults ask for nothing; who wants no rules at all says None.

    Lengths and repetitions count what the decoder is given: a decoder's prompt, an encoder-decoder's start token.
    """

    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice, in prompt and answer together."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Runs that never come; an end-of-sequence token alone is none of them."""
    min_length: int = 0
    """No end before so many tokens, prompt and answer together."""
    min_new_tokens: int = 0
    """No end before so many tokens of the answer."""
    forced_bos_token_id: int | None = None
    """What comes where the decoder was given one token alone: the target language of mBART, M2M100 and NLLB."""
    forced_eos_token_id: tuple[int, ...] = ()
    """One of them is the last token that fits."""
    suppress_tokens: tuple[int, ...] = ()
    """They never come, not even where they are forced."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """They do not begin an answer; behind a forced beginning they are not its second token."""

    def __post_init__(self) -> None:
        for name in ("no_repeat_ngram_size", "min_length", "min_new_tokens"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def forced(self) -> tuple[int, ...]:
        """All tokens that are forced anywhere."""
        return (*(() if self.forced_bos_token_id is None else (self.forced_bos_token_id,)), *self.forced_eos_token_id)

    def cuts(self, said: int, limit: int) -> bool:
        """Whether an end behind `said` tokens is the forced one: the answer has come to its limit, as if cut there."""
        return bool(self.forced_eos_token_id) and said + 1 == limit


class RuleState:
    """Where an answer stands in its rules: told of every token, it says what may not and what must come next."""

    def __init__(
        self,
        rules: Rules,
        given: Sequence[int],
        eos_ids: Iterable[int] = (),
        limit: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """`given` is what the decoder is given, `limit` the most tokens of the answer; ids outside the vocabulary are
        never chosen and need no ban."""
        self.rules, self.limit = rules, limit
        self._eos_ids = tuple(sorted(eos_ids))
        self._given, self._said = len(given), 0
        size = vocab_size
        words = [word for word in rules.bad_words_ids if word and not (len(word) == 1 and word[0] in self._eos_ids)]
        single = (word[0] for word in words if len(word) == 1)
        self.always = tuple(sorted({one for one in (*single, *rules.suppress_tokens) if _inside(one, size)}))
        """What is banned at every position."""
        self._begin = tuple(one for one in rules.begin_suppress_tokens if _inside(one, size))
        self._runs = [word for word in words if len(word) > 1 and _inside(word[-1], size)]
        self._order = rules.no_repeat_ngram_size
        self._kept = max(0, self._order - 1, *(len(word) - 1 for word in self._runs))
        """Last tokens that matter; the index knows the others."""
        self._last: tuple[int, ...] = ()
        self._after: dict[tuple[int, ...], tuple[int, ...]] = {}
        """Each run of `no_repeat_ngram_size - 1` tokens -> what came behind it."""
        for token in given if self._kept or self._order else ():
            self._note(token)

    def _note(self, token: int) -> None:
        if self._order and len(self._last) >= self._order - 1:
            key = self._tail(self._order - 1)
            known = self._after.get(key, ())
            self._after[key] = known if token in known else (*known, token)
        if self._kept:
            self._last = (*self._last, token)[-self._kept :]

    def _tail(self, count: int) -> tuple[int, ...]:
        return self._last[len(self._last) - count :]

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self._said += 1
        if self._kept or self._order:
            self._note(token)

    def copy(self) -> RuleState:
        """A second answer that begins like this one."""
        other = copy.copy(self)
        other._after = dict(self._after)
        return other

    @property
    def length(self) -> int:
        """Tokens that the decoder was given and has said."""
        return self._given + self._said

    def forced(self) -> tuple[int, ...] | None:
        """The only tokens that may come next; None where nothing is forced."""
        rules = self.rules
        found: tuple[int, ...] | None = None
        if self.length == 1 and rules.forced_bos_token_id is not None:
            found = (rules.forced_bos_token_id,)
        if rules.forced_eos_token_id and self._said + 1 == self.limit:
            found = rules.forced_eos_token_id
        if found is None:
            return None
        never = {*rules.suppress_tokens, *(self._begin if self._begins() else ())}
        return tuple(token for token in found if token not in never)

    def banned(self) -> list[int]:
        """What may not come next where nothing is forced, besides `always`."""
        rules = self.rules
        found: list[int] = []
        if self._order and len(self._last) >= self._order - 1:
            found += self._after.get(self._tail(self._order - 1), ())
        for run in self._runs:  # as transformers: a run as long as all there is so far does not count yet
            if len(run) <= self.length and self._tail(len(run) - 1) == run[:-1]:
                found.append(run[-1])
        if self.length < rules.min_length or self._said < rules.min_new_tokens:
            found += self._eos_ids
        if self._begin and self._begins():
            found += self._begin
        return found

    def _begins(self) -> bool:
        """Whether what comes next is the first token that is not forced as a beginning."""
        behind = self._given <= 1 and self.rules.forced_bos_token_id is not None
        return self._said == int(behind)


def _inside(token: int, vocab_size: int | None) -> bool:
    return token >= 0 and (vocab_size is None or token < vocab_size)
