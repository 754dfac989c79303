"""The step `toxicity`: offensive sentences, by a linear classifier, with what only looks offensive left alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from llmctl.errors import MachineError
from llmctl.text.cleaning.kinds import Routed, with_meta, with_text
from llmctl.text.cleaning.params import ToxicityParams
from llmctl.text.cleaning.step import Drop, Noted, Outcome
from llmctl.text.documents import Document

SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+[\"'”’)]*)?\s*|[.!?]+\s*|\n+")
QUOTED = re.compile(r"\"[^\"\n]{1,300}\"|“[^”\n]{1,300}”|„[^“\n]{1,300}“|«[^»\n]{1,300}»|(?<!\w)'[^'\n]{1,300}'(?!\w)")
# Words with a second, harmless meaning: of anatomy and medicine, animals, places, names, and the usual computing terms.
INNOCENT = (
    "anal", "anatomy", "anus", "areola", "ass", "asses", "ballsack", "bitter", "boob", "boobies", "booby", "bowel",
    "breast", "breasts", "butt", "buttocks", "butts", "cervix", "circumcised", "climax", "clitheroe", "clitoral",
    "clitoris", "cock", "cockburn", "cockerel", "cockpit", "cocks", "coitus", "condom", "condoms", "copulate",
    "copulation", "cum", "cummings", "dam", "damn", "damned", "dick", "dickens", "dickinson", "dicks", "dyke",
    "dykes", "ejaculate", "ejaculation", "erect", "erectile", "erection", "erotic", "essex", "fanny", "feces",
    "gay", "gays", "genital", "genitalia", "genitals", "gonads", "groin", "hancock", "hell", "homosexual",
    "homosexuality", "hooker", "hookers", "hymen", "intercourse", "kill", "killed", "killing", "knob", "labia",
    "lesbian", "lesbians", "lightwater", "lust", "masturbation", "matsushita", "menstrual", "menstruation",
    "middlesex", "naked", "niggardly", "nipple", "nipples", "nude", "orgasm", "orgasms", "ovary", "pecker",
    "peckerwood", "penal", "penile", "penis", "penises", "penistone", "pricked", "prostate", "prostitute",
    "prostitutes", "prostitution", "puberty", "pubic", "queer", "queers", "rape", "raped", "rapeseed", "rectal",
    "rectum", "scrotum", "scunthorpe", "semen", "sex", "sexes", "sexual", "sexuality", "sexually", "shag", "shags",
    "shiitake", "shitake", "snigger", "spank", "sperm", "stool", "sucked", "sucking", "suicidal", "suicide",
    "sussex", "swallow", "testes", "testicle", "testicles", "testicular", "tit", "titmouse", "tits", "urethra",
    "urinary", "urine", "uterus", "vagina", "vaginal", "virgin", "vulva", "wang", "weiner", "willy",
)  # fmt: skip
ADDRESSED = re.compile(
    r"\b(?:you|your|you're|youre|ya|u|ur|yourself|my|me|him|her|them|this|he's|she's|they're)\b", re.IGNORECASE
)
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
REPLACED = "thing"


class Toxicity(Routed):
    """Scores sentences, many documents at once: one at a time the classifier is thirty times slower."""

    name = "toxicity"

    def __init__(self, params: ToxicityParams, seed: int) -> None:
        super().__init__(params)
        self._params = params
        self._innocent = frozenset([*INNOCENT, *params.innocent])
        self._score = load_classifier()

    def clean(self, document: Document) -> Outcome:
        """The outcome for one document."""
        return self.batch([document])[0]

    def batch(self, documents: Sequence[Document]) -> list[Outcome]:
        """One outcome for every document, in order."""
        pieces = [SENTENCE.findall(document.text) if self.touches(document) else [] for document in documents]
        scores = iter(self.scores([piece for some in pieces for piece in some]))
        return [
            self._outcome(document, some, [next(scores) for _ in some])
            for document, some in zip(documents, pieces, strict=True)
        ]

    def scores(self, sentences: Sequence[str]) -> list[float]:
        """The probability that each sentence is offensive."""
        plain = [sentence if self._params.quotations else QUOTED.sub(" ", sentence) for sentence in sentences]
        found = [0.0] * len(plain)
        asked = [place for place, sentence in enumerate(plain) if any(map(str.isalpha, sentence))]
        for place, score in zip(asked, self._score([plain[place] for place in asked]) if asked else (), strict=True):
            found[place] = float(score)
        doubted = [place for place in asked if found[place] >= self._params.threshold]
        second = [self._neutral(plain[place]) for place in doubted]
        for place, score in zip(doubted, self._score(second) if second else (), strict=True):
            found[place] = min(found[place], float(score))
        return found

    def _neutral(self, sentence: str) -> str:
        """The sentence without words that may be harmless, unless it speaks to or of someone in them."""
        if ADDRESSED.search(sentence):
            innocent: frozenset[str] = frozenset(self._params.innocent)
        else:
            innocent = self._innocent
        return WORD.sub(lambda word: REPLACED if word.group().lower() in innocent else word.group(), sentence)

    def _outcome(self, document: Document, sentences: list[str], scores: list[float]) -> Outcome:
        hits = [place for place, score in enumerate(scores) if score >= self._params.threshold]
        if not hits:
            return document
        worst = max(scores)
        judged = sum(map(bool, map(str.strip, sentences)))
        if self._params.action == "tag":
            tag = {"score": round(worst, 3), "sentences": len(hits)}
            return Noted(with_meta(document, toxicity=tag), {"sentences": len(hits)})
        if self._params.action == "cut":
            gone = frozenset(hits)
            text = "".join(
                ("\n" if sentence.endswith("\n") else "") if place in gone else sentence
                for place, sentence in enumerate(sentences)
            )
            if not text.strip():
                return Drop("offensive", f"score {worst:.2f}")
            return Noted(with_text(document, text), {"sentences": len(hits)})
        if len(hits) / judged >= self._params.share:
            return Drop("offensive", f"score {worst:.2f}, {len(hits)} of {judged} sentences")
        return Noted(document, {"sentences": len(hits)})


def load_classifier() -> Callable[[list[str]], Any]:
    """alt-profanity-check's probabilities for a list of texts."""
    try:
        with warnings.catch_warnings():  # its model was stored by another version of scikit-learn
            warnings.simplefilter("ignore")
            from profanity_check import predict_prob
    except ImportError as error:
        raise MachineError("alt-profanity-check is not installed", hint="pip install 'llmctl[toxicity]'") from error
    score: Callable[[list[str]], Any] = predict_prob
    return score
