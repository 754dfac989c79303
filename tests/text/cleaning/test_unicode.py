from __future__ import annotations

import unicodedata

import ftfy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmctl.text.cleaning.params import UnicodeParams
from llmctl.text.cleaning.unicode import UnicodeRepair

CORRECT = [
    "Der Bär läuft über die Straße – „schön“, sagte er.\n\nZweiter Absatz: 3 × 4 = 12 €.",
    "می‌خواهم بروم",  # a joiner between Persian letters
    "क्‍ष और 👩‍👩‍👧 emoji",  # joiners that shape letters and emoji
    "ภาษา\u200bไทย",  # words of Thai
    "C’est l’été ; déjà « vu » ?",
    "Привет, мир! 你好，世界。 こんにちは。 안녕하세요",
    "a\tb\n\n\nc  d",
    "",
]
DAMAGED = [
    ("schÃ¶n", "schön"),
    ("â€œquoteâ€\x9d â€” dash", "“quote” — dash"),
    ("Ð¿Ñ\x80Ð¸Ð²ÐµÑ‚", "привет"),
    ("sÃƒÂ¼ÃƒÅ¸", "süß"),
    ("l’Ã©tÃ©", "l’été"),
]


def step(**params: object) -> UnicodeRepair:
    return UnicodeRepair(UnicodeParams(name="unicode", **params), 0)


@pytest.mark.parametrize(("damaged", "text"), DAMAGED)
def test_wrong_decodings_are_undone_as_ftfy_does(damaged: str, text: str) -> None:
    assert step().repair(damaged)[0] == text == ftfy.fix_encoding(damaged)
    assert step(repair=False, controls=False).repair(damaged)[0] == unicodedata.normalize("NFC", damaged)


@pytest.mark.parametrize("text", CORRECT)
def test_correct_text_is_left_byte_identical(text: str) -> None:
    assert step().repair(text) == (text, {})


# Letters whose UTF-8 bytes are no text in Windows-1252, so that no sentence of them can look like a wrong decoding.
LETTERS = st.sampled_from("abc XYZ äöüß éèç ñ 0123 абв γδε 漢字 かな . , ; ! ?".replace(" ", "") + "     ")


@given(st.lists(st.text(LETTERS, min_size=1, max_size=40).map(str.strip), min_size=1, max_size=5))
@settings(max_examples=300)
def test_any_correct_text_is_left_byte_identical(lines: list[str]) -> None:
    text = unicodedata.normalize("NFC", "\n".join(lines)).strip()
    assume("\n" * 4 not in text)  # `white_space: trim` leaves two empty lines of three
    assert step().repair(text) == (text, {})


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["keep", "trim", "collapse"]))
@settings(max_examples=500)
def test_repair_is_idempotent(text: str, white_space: str) -> None:
    repair = step(white_space=white_space, form="NFKC")
    once = repair.repair(text)[0]
    assert repair.repair(once) == (once, {})


@pytest.mark.parametrize(
    ("params", "text", "repaired", "counted"),
    [
        ({"repair": False}, "a\x00b\x07\x9fc", "abc", {"controls": 3}),
        ({"controls": False}, "a\x07b", "a\x07b", {}),
        ({}, "so\u200bft\u00adware\ufeff te\u200dxt", "software text", {"zero_width": 4}),
        ({"zero_width": False}, "so\u00adft", "so\u00adft", {}),
        ({}, "a\r\nb\rc\u2028d", "a\nb\nc\nd", {"line_ends": 3}),
        ({"line_ends": False, "controls": False}, "a\r\nb", "a\r\nb", {}),
        ({}, "a  \nb\t\n", "a\nb\n", {"trailing_blanks": 2}),
        ({}, "a\n\n\n\n\nb", "a\n\n\nb", {"blank_lines": 1}),
        ({"white_space": "keep"}, "a  \n\n\n\n\nb  c", "a  \n\n\n\n\nb  c", {}),
        ({"white_space": "collapse"}, "  a   b\u00a0\u00a0c", "  a b c", {"blanks": 2}),
        ({}, "e\u0301", "é", {"normalised": 1}),
        ({"form": "NFKC"}, "ﬁ ² Ａ", "fi 2 A", {"normalised": 1}),
        ({"form": "none"}, "e\u0301", "e\u0301", {}),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)) or "default",
)
def test_each_parameter(params: dict[str, object], text: str, repaired: str, counted: dict[str, int]) -> None:
    assert step(**params).repair(text) == (repaired, counted)
