"""Made-up labelled data whose rule is known: sentences to translate by a lexicon and a word order, texts to sum up,
opinions to sort.

Every row is a function of (seed, number), so the same parameters give the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmctl_data.facts import rank

Row = dict[str, Any]

ARTICLES = ("the", "a", "this", "every")
NOUNS = [
    "dog",
    "cat",
    "bird",
    "horse",
    "child",
    "woman",
    "man",
    "farmer",
    "teacher",
    "river",
    "house",
    "tree",
    "garden",
    "book",
    "letter",
    "song",
    "door",
    "window",
    "ship",
    "cloud",
]
ADJECTIVES = ["small", "big", "red", "old", "young", "quiet", "clever", "hungry", "lost", "green"]
VERBS = [
    "sees",
    "finds",
    "likes",
    "paints",
    "follows",
    "hears",
    "remembers",
    "draws",
    "washes",
    "carries",
    "loses",
    "needs",
]
ADVERBS = ["today", "often", "slowly", "never", "gladly", "again"]
ONSETS, VOWELS = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"], ["a", "e", "i", "o", "u"]

THINGS = ["film", "meal", "hotel", "book", "concert", "lecture", "garden", "journey", "coat", "bridge", "phone", "soup"]
GOOD = ["wonderful", "excellent", "charming", "delightful", "superb", "lovely", "brilliant", "pleasant"]
BAD = ["terrible", "awful", "boring", "dreadful", "poor", "horrible", "dull", "disappointing"]
DEGREES = ("", "really ", "quite ", "very ", "truly ")
OPENINGS = (
    "I think the {} was {}.",
    "The {} was {}, we all said.",
    "For me the {} was {}!",
    "My aunt says the {} is {}.",
)
MARK = "above all"
"""What the sentence begins with that a text is about."""
SENTENCES = 3


def choose(options: Any, *key: Any) -> Any:
    """One of `options`, depending on nothing but `key`."""
    return options[rank(*key) % len(options)]


def lexicon(seed: int) -> dict[str, str]:
    """An invented word of two or three syllables for every English one; no two are alike."""
    found: dict[str, str] = {}
    for word in (*ARTICLES, *NOUNS, *ADJECTIVES, *VERBS, *ADVERBS):
        attempt = 0
        while word not in found:
            key = (seed, "word", word, attempt)
            syllables = range(2 + rank(*key) % 2)
            made = "".join(choose(ONSETS, *key, n, "onset") + choose(VOWELS, *key, n, "vowel") for n in syllables)
            if made not in found.values():
                found[word] = made
            attempt += 1
    return found


def translation(count: int, seed: int) -> Iterator[Row]:
    """`count` different pairs {source, target}: English into a language with adverb, subject, object, verb.

    Adjectives and then articles follow their noun, so no word can be translated where it stands.
    """
    words = lexicon(seed)
    seen: set[str] = set()
    number = 0
    while len(seen) < count:
        subject, thing = (_phrase(seed, number, part) for part in ("subject", "object"))
        verb = choose(VERBS, seed, number, "verb")
        adverb = choose((None, *ADVERBS), seed, number, "adverb")
        number += 1
        source = " ".join([*subject, verb, *thing, *([adverb] if adverb else [])])
        if source in seen:
            continue
        seen.add(source)
        order = [*([adverb] if adverb else []), *reversed(subject), *reversed(thing), verb]
        yield {"source": source, "target": " ".join(words[word] for word in order)}


def _phrase(seed: int, number: int, part: str) -> list[str]:
    adjective = choose((None, *ADJECTIVES), seed, number, part, "adjective")
    noun = choose(NOUNS, seed, number, part, "noun")
    return [choose(ARTICLES, seed, number, part, "article"), *([adjective] if adjective else []), noun]


def sentiment(count: int, seed: int) -> Iterator[Row]:
    """`count` different rows {text, label}: an opinion that is positive or negative, a third of them negated."""
    seen: set[str] = set()
    number = 0
    while len(seen) < count:
        good = bool(rank(seed, number, "good") % 2)
        negated = rank(seed, number, "not") % 3 == 0
        word = choose(GOOD if good else BAD, seed, number, "word")
        opinion = ("not " if negated else "") + choose(DEGREES, seed, number, "degree") + word
        text = choose(OPENINGS, seed, number, "opening").format(choose(THINGS, seed, number, "thing"), opinion)
        number += 1
        if text not in seen:
            seen.add(text)
            yield {"text": text, "label": "positive" if good != negated else "negative"}


def summary(count: int, seed: int) -> Iterator[Row]:
    """`count` different rows {source, target}: a text of SENTENCES, and the nouns and the verb of the marked one.

    It stands in every place equally often, so the first sentence is the right one of a text in three.
    """
    seen: set[str] = set()
    number = 0
    while len(seen) < count:
        marked = rank(seed, number, "marked") % SENTENCES
        told, target = [], ""
        for place in range(SENTENCES):
            subject, thing = (_phrase(seed, number, f"{part} {place}") for part in ("subject", "object"))
            verb = choose(VERBS, seed, number, f"verb {place}")
            told.append(" ".join([*([MARK] if place == marked else []), *subject, verb, *thing]) + ".")
            target = f"{subject[-1]} {verb} {thing[-1]}" if place == marked else target
        number += 1
        source = " ".join(told)
        if source not in seen:
            seen.add(source)
            yield {"source": source, "target": target}


TOYS = {"toy-translation": translation, "toy-summary": summary, "toy-sentiment": sentiment}
LARGEST = {"toy-translation": 1_000_000, "toy-summary": 1_000_000, "toy-sentiment": 5000}
"""How many different rows a toy can safely make: about half of all there are, so that drawing ends."""
