from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmctl.text.cleaning.language import Language
from llmctl.text.cleaning.params import LanguageParams
from llmctl.text.cleaning.step import Drop, Noted
from llmctl.text.documents import Document

SENTENCES: dict[str, list[str]] = json.loads(Path(__file__).with_name("sentences.json").read_text(encoding="utf-8"))
CODE = [
    "import os\n\ndef main(argv):\n    for name in argv:\n        print(os.path.join('a', name))\n    return 0\n",
    "#include <stdio.h>\nint main(void) {\n    printf(\"hello\");\n    return 0;\n}\n",
    "SELECT a, b FROM t WHERE c = 1;\nUPDATE t SET a = 2 WHERE b = 3;",
    "const x = [1, 2, 3];\nfunction f(a) {\n  return a.map(y => y * 2);\n}\nexport default f;",
    "12.5;17;99\n1;2;3\n4;5;6",
    "!!! ??? ... 2024-01-01 12:00",
]  # fmt: skip


def step(**params: object) -> Language:
    return Language(LanguageParams(name="language", **params), 0)


def test_languages_are_told_on_long_and_short_texts() -> None:
    assert len(SENTENCES) >= 20
    language = step()
    right = [language.identify(text)[0] == code for code, texts in SENTENCES.items() for text in texts]
    long = [language.identify(" ".join(texts * 3))[0] == code for code, texts in SENTENCES.items()]
    assert sum(right) / len(right) >= 0.95
    assert sum(long) / len(long) >= 0.95


def test_code_and_random_letters_are_no_language() -> None:
    rng = random.Random(2)
    noise = [
        " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 9))) for _ in range(40))
        for _ in range(20)
    ]
    language = step()
    found = [language.identify(text)[0] for text in CODE + noise]
    assert found == ["none"] * len(found)


def test_keep_and_drop_and_counts() -> None:
    english, german = (Document(code, "s", SENTENCES[code][0]) for code in ("en", "de"))
    kept = step(keep=["en"])(english)
    assert isinstance(kept, Noted) and kept.found == {"en": 1}
    assert kept.document.meta["language"] == "en" and kept.document.text == english.text
    dropped = step(keep=["en"])(german)
    assert isinstance(dropped, Drop) and dropped.reason == "language de"
    assert isinstance(step(drop=["de"])(german), Drop) and isinstance(step(drop=["fr"])(german), Noted)
    number = Document("n", "s", "17 42 99")
    assert step(drop=["none"])(number) == Drop("no language", "confidence 1.00")
    unsure = step(min_confidence=1.0)(english)
    assert isinstance(unsure, Noted) and unsure.found == {"none": 1}


def test_long_texts_are_judged_by_their_middle() -> None:
    text = "\n".join(SENTENCES["de"] * 3) + "\n".join(SENTENCES["fr"] * 60) + "\n".join(SENTENCES["de"] * 3)
    assert step(sample_chars=500).identify(text)[0] == "fr"
    assert step(sample_chars=500).identify("\n".join(SENTENCES["de"] * 60))[0] == "de"


def test_code_is_not_asked() -> None:
    code = Document("c", "c.py", CODE[0], meta={"code": "python"})
    assert step(keep=["en"])(code) is code


def test_unknown_codes_are_refused() -> None:
    with pytest.raises(ValidationError, match="`english` is no known language"):
        LanguageParams(name="language", keep=["english"])
    with pytest.raises(ValidationError, match="in keep and in drop"):
        LanguageParams(name="language", keep=["en"], drop=["en"])


def test_scores_are_py3langids_bit_for_bit():
    """Its own walk takes a byte at a time; ours takes all places at once. Short texts, and bytes of any kind."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    from llmctl.text.cleaning.language import load_identifier

    theirs, ours = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True), load_identifier()
    dice = random.Random(0)
    kinds = [(32, 127), (0x370, 0x600), (0x4E00, 0x5000), (0x0, 0x250)]
    texts = ["", "a", "Hello", "Hello.", "Où est la gare ?"]
    for _ in range(60):
        low, high = dice.choice(kinds)
        texts.append("".join(chr(dice.randrange(low, high)) for _ in range(dice.randrange(1, 200))))
    assert [ours.classify(text) for text in texts] == [theirs.classify(text) for text in texts]
    assert ours.rank(texts[-1]) == theirs.rank(texts[-1])
