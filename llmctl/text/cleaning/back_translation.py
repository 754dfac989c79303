"""A text into another language and back (Sennrich et al. 1511.06709), by two models with an encoder and a decoder."""

from __future__ import annotations

import re

from llmctl.errors import UsageError
from llmctl.generation_config import read_generation_config, rules_of
from llmctl.generator import GREEDY, Sampling
from llmctl.registry import get_registry
from llmctl.stage import Artifact
from llmctl.text.tokenizer import Tokenizer

SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")
TEMPERATURE = 0.8
"""Of draws; the first translation is the likeliest."""


class Translator:
    """One direction."""

    def __init__(self, artifact: Artifact) -> None:
        self._tokenizer = Tokenizer.load(artifact.path)
        self._rules = rules_of(read_generation_config(artifact.path))
        """The target language, for instance, of a model with several."""
        self._model = get_registry().open_generator(artifact, device="cpu", threads=1)
        if not self._model.encoder_decoder:
            raise UsageError(
                f"{artifact.path} has no encoder, back-translation needs one that translates",
                hint="bind a model that was trained as seq2seq",
            )

    def __call__(self, texts: list[str], seed: int | None) -> list[str]:
        """Translations; a text that does not fit the model stays as it is. `seed`: draw, None: the likeliest."""
        prompts = [self._tokenizer.frame_document(self._tokenizer.encode(text)) for text in texts]
        fits = [n for n, prompt in enumerate(prompts) if 0 < len(prompt) <= self._model.context_length]
        found = list(texts)
        for n in fits:
            longest = max(8, min(2 * len(prompts[n]), self._model.context_length - 1))
            sampling = (
                Sampling(max_new_tokens=longest, temperature=TEMPERATURE, seed=seed, rules=self._rules)
                if seed is not None
                else Sampling(max_new_tokens=longest, temperature=GREEDY.temperature, rules=self._rules)
            )
            found[n] = self._tokenizer.decode(self._model.generate([prompts[n]], sampling)[0]).strip()
        return found


class BackTranslator:
    """There and back, sentence by sentence."""

    def __init__(self, there: Artifact, back: Artifact) -> None:
        self._there, self._back = Translator(there), Translator(back)

    def __call__(self, text: str, seed: int | None) -> str:
        """The text in other words; its own sentences where a model answers nothing."""
        sentences = [part for part in SENTENCES.split(text) if part.strip()]
        middle = self._there(sentences, seed)
        home = self._back([part or own for part, own in zip(middle, sentences, strict=True)], seed)
        return " ".join(part or own for part, own in zip(home, sentences, strict=True))
