"""Noise as people and scanners make it: a share of the words of a text, each changed in one place or left out."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

WORD = re.compile(r"\w+(?:['’]\w+)*")
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LOOK_ALIKES = {
    "rn": ("m",), "m": ("rn",), "cl": ("d",), "d": ("cl",), "vv": ("w",), "w": ("vv",), "l": ("1", "I"),
    "1": ("l",), "I": ("l", "1"), "i": ("l", "j"), "O": ("0", "Q"), "0": ("O",), "o": ("0", "c"), "e": ("c",),
    "c": ("e",), "h": ("b",), "b": ("h", "6"), "S": ("5",), "5": ("S",), "s": ("5",), "B": ("8",), "8": ("B",),
    "u": ("v", "ii"), "v": ("u",), "n": ("ri",), "t": ("f",), "f": ("t",), "a": ("o",), "g": ("q", "9"),
    "q": ("g",), "Z": ("2",), "2": ("Z",), "y": ("v",), "E": ("F",), "D": ("O",), "r": ("t",), "k": ("lc",),
}  # fmt: skip


def _neighbours() -> dict[str, str]:
    """Letter → the keys beside it: in its row and, half a key apart, in those above and below."""
    places = {letter: (x + y / 2, y) for y, row in enumerate(ROWS) for x, letter in enumerate(row)}
    return {
        letter: "".join(
            other
            for other, (ox, oy) in places.items()
            if other != letter and abs(ox - x) <= 1 and abs(oy - y) <= 1
        )
        for letter, (x, y) in places.items()
    }  # fmt: skip


NEIGHBOURS = _neighbours()


def swap(word: str, rng: random.Random) -> str:
    """Two neighbouring letters that differ, exchanged."""
    places = [n for n in range(len(word) - 1) if word[n] != word[n + 1]]
    if not places:
        return word
    n = rng.choice(places)
    return word[:n] + word[n + 1] + word[n] + word[n + 2 :]


def keyboard(word: str, rng: random.Random) -> str:
    """A letter replaced by one whose key is next to its own (QWERTY)."""
    places = [n for n, letter in enumerate(word) if letter.lower() in NEIGHBOURS]
    if not places:
        return word
    n = rng.choice(places)
    other = rng.choice(NEIGHBOURS[word[n].lower()])
    return word[:n] + (other.upper() if word[n].isupper() else other) + word[n + 1 :]


def ocr(word: str, rng: random.Random) -> str:
    """A letter, or two, replaced by what looks like it."""
    places = [(n, part) for part in LOOK_ALIKES for n in range(len(word)) if word.startswith(part, n)]
    if not places:
        return word
    n, part = rng.choice(places)
    return word[:n] + rng.choice(LOOK_ALIKES[part]) + word[n + len(part) :]


def delete(word: str, rng: random.Random) -> str:
    """A letter left out; a word of one letter stays."""
    if len(word) < 2:
        return word
    n = rng.randrange(len(word))
    return word[:n] + word[n + 1 :]


def dropout(word: str, rng: random.Random) -> str:
    """The word left out."""
    return ""


KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "swap": swap,
    "keyboard": keyboard,
    "ocr": ocr,
    "delete": delete,
    "dropout": dropout,
}


def noisy(text: str, kinds: Sequence[str], rate: float, rng: random.Random) -> str:
    """`text` with about `rate` of its words, and at least one, changed; the last word that is left is not dropped."""
    words = list(WORD.finditer(text))
    if not words:
        return text
    chosen = [n for n in range(len(words)) if rng.random() < rate] or [rng.randrange(len(words))]
    parts: list[str] = []
    end = 0
    for n in chosen:
        word = words[n]
        kind = rng.choice(kinds)
        changed = word[0] if kind == "dropout" and len(words) == 1 else KINDS[kind](word[0], rng)
        between = text[end : word.start()]
        if not changed and between.endswith(" "):
            between = between[:-1]  # the blank goes with its word
        parts += [between, changed]
        end = word.end()
    result = "".join([*parts, text[end:]])
    return result if result.strip() else text
