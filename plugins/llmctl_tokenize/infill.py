"""Fill in the middle (Bavarian et al. 2022, 2207.14255): a document is cut in three, and its middle is learnt last.

With `P`, `S`, `M` the three special tokens, a document prefix + middle + suffix becomes one of

    PSM: P prefix S suffix M middle
    SPM: P S suffix M prefix middle

SPM is the paper's second variant (appendix D), which reads as PSM with an empty prefix, so that both can be mixed.
Cuts are at characters, not at tokens: what a person asks to complete ends anywhere in a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from llmctl import InputError
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize.params import TokenizeParams

Order = Literal["plain", "psm", "spm"]
UNIT = float(1 << 64)


@dataclass(frozen=True)
class Infill:
    """Which documents are cut, where, and what stands between the parts; equal for equal numbers, whoever asks."""

    rate: float
    spm: float
    seed: int
    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, params: TokenizeParams, tokenizer: Tokenizer) -> Infill | None:
        """As `params` say, None without infill. InputError if a token is no special one of the tokenizer."""
        if not params.infill:
            return None
        special = tokenizer.special_tokens()
        if missing := [name for name in params.infill_tokens if name not in special]:
            raise InputError(
                f"infill: the tokenizer has no special token {missing[0]!r}",
                hint=f"name its prefix, suffix and middle in infill_tokens; it has: {', '.join(special) or 'none'}",
            )
        return cls(
            params.infill, params.infill_spm, params.infill_seed, *map(special.__getitem__, params.infill_tokens)
        )

    def order(self, number: int) -> Order:
        """What becomes of the document `number`, counted from 0 in its split."""
        return self._drawn(number)[0]

    def cut(self, number: int, text: str) -> tuple[str, str, str]:
        """Prefix, middle and suffix: two cuts, each anywhere from before the first character to after the last."""
        start, end = sorted(draw % (len(text) + 1) for draw in self._drawn(number)[1])
        return text[:start], text[start:end], text[end:]

    def _drawn(self, number: int) -> tuple[Order, tuple[int, int]]:
        digest = hashlib.blake2b(f"infill {self.seed} {number}".encode(), digest_size=32).digest()
        chosen, spm, *cuts = (int.from_bytes(digest[at : at + 8], "big") for at in range(0, 32, 8))
        if chosen / UNIT >= self.rate:
            return "plain", (cuts[0], cuts[1])
        return ("spm" if spm / UNIT < self.spm else "psm"), (cuts[0], cuts[1])

    def parts(self, number: int, text: str) -> list[int | str]:
        """The document in the order in which it is learnt: ids of special tokens, and texts between them."""
        order = self.order(number)
        if order == "plain":
            return [text]
        prefix, middle, suffix = self.cut(number, text)
        if order == "psm":
            return [self.prefix, prefix, self.suffix, suffix, self.middle, middle]
        return [self.prefix, self.suffix, suffix, self.middle, prefix, middle]

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str], first: int) -> list[list[int]]:
        """Ids of documents, the first of them number `first`; each part is encoded on its own, as in a prompt."""
        documents = [self.parts(number, text) for number, text in enumerate(texts, start=first)]
        encoded = iter(tokenizer.encode_batch([part for parts in documents for part in parts if isinstance(part, str)]))
        return [
            [id for part in parts for id in ([part] if isinstance(part, int) else next(encoded))] for parts in documents
        ]

    def counts(self, documents: int) -> dict[Order, int]:
        """How many of so many documents have each order."""
        found: dict[Order, int] = {"plain": 0, "psm": 0, "spm": 0}
        for number in range(documents):
            found[self.order(number)] += 1
        return found

    def check(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        """InputError if the ids of the parts, joined, do not stand for the text: the tokenizer adds or loses some."""
        for number, text in enumerate(texts):
            ids = [id for part in self.cut(number, text) for id in tokenizer.encode(part)]
            if tokenizer.decode(ids, skip_special=False) != text:
                raise InputError(
                    f"infill: the tokenizer does not give back document {number + 1} of `train` from its parts",
                    hint="use one that keeps every byte and puts no space before a text, such as kind: bpe",
                )
