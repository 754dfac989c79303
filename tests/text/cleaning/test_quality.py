"""Rules of quality: decisions as datatrove's (benchmarks/peers/datatrove_decisions.py), and each threshold."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llmctl.text.cleaning.quality import Quality
from llmctl.text.cleaning.quality_params import (
    C4Params,
    FineWebParams,
    GopherQualityParams,
    GopherRepetitionParams,
    QualityParams,
)

RULES = ("gopher-repetition", "gopher-quality", "fineweb", "c4")
REASONS = {
    "dup_para_frac": "repeated_paragraphs",
    "dup_para_char_frac": "repeated_paragraphs_chars",
    "dup_line_frac": "repeated_lines",
    "dup_line_char_frac": "repeated_lines_chars",
    "gopher_short_doc": "few_words",
    "gopher_too_many_hashes": "hashes",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullets",
    "gopher_below_alpha_threshold": "few_letters",
    "gopher_enough_stop_words": "few_stop_words",
    "line_punct_ratio": "few_sentence_ends",
    "short_line_ratio": "short_lines",
    "char_dup_ratio": "repeated_lines",
    "list_ratio": "list",
    "too_few_sentences": "few_sentences",
    "curly_bracket": "curly_bracket",
    **{f"top_{n}_gram": f"top_{n}_gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"repeated_{n}_grams" for n in range(5, 11)},
}
CLEAN = (
    "The river rises in the hills to the north of the town and flows for forty miles before it meets the sea. "
    "Its valley was settled early, and most of the villages that stand along the water today have names that are "
    "older than the first maps of the county. Farmers kept sheep on the slopes and grew barley on the flat land.\n"
    "In the last century a railway was built beside the river. It brought visitors who came to walk, to fish and to "
    "see the ruins of the abbey, which lie half a mile from the station. The line was closed later, but the path that "
    "follows it is still used by thousands of people every summer.\n"
    "Water from the upper river is clean enough to drink. Otters have been seen again since the weirs were taken away, "
    "and salmon return to the gravel beds in October of each year."
)


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    with gzip.open(Path(__file__).with_name("decisions.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def judge(text: str, rules: str, **bounds: Any) -> str:
    return Quality(QualityParams(name="quality", rules=[rules], **bounds), 0).judge(text)[0]  # type: ignore[list-item]


@pytest.mark.parametrize("rules", RULES)
def test_decisions_and_reasons_are_datatroves(rules: str, recorded: list[dict[str, Any]]) -> None:
    quality = Quality(QualityParams(name="quality", rules=[rules]), 0)  # type: ignore[list-item]
    for row in recorded:
        broken, left, _ = quality.judge(row["text"])
        theirs = row["decisions"][rules]
        assert broken == (f"{rules}:{REASONS[theirs]}" if theirs else "")
        if rules == "c4" and not theirs:
            assert left == row["c4"]
    kept = sum(not row["decisions"][rules] for row in recorded)
    assert 20 < kept < len(recorded) - 20, "the fixture must hold both kinds"


def test_another_tokenizer_decides_a_tenth_otherwise(recorded: list[dict[str, Any]]) -> None:
    """datatrove with spaCy's words: the rules that count words move, those that count lines do not."""
    agree = {}
    for rules in RULES[:3]:
        agree[rules] = sum(
            bool(row["decisions"][rules]) == bool(row["decisions"][f"{rules}, spaCy"]) for row in recorded
        ) / len(recorded)
    assert agree["fineweb"] == 1
    assert 0.8 < agree["gopher-quality"] < 1
    assert 0.8 < agree["gopher-repetition"] < 1


def test_clean_prose_loses_nothing() -> None:
    params = QualityParams(name="quality", rules=list(RULES))  # type: ignore[arg-type]
    assert Quality(params, 0).judge(CLEAN) == ("", CLEAN, {})


LOOSE = {"paragraphs": 1.0, "paragraph_chars": 1.0, "lines": 1.0, "line_chars": 1.0, "repeated_ngrams": {}}
SENTENCES = CLEAN.replace("\n", " ").split(". ")


@pytest.mark.parametrize(
    ("rules", "text", "reason"),
    [
        ("gopher-repetition", "\n\n".join([CLEAN] * 3), "repeated_paragraphs"),
        ("gopher-repetition", "\n".join(CLEAN.split("\n") * 2), "repeated_lines"),
        ("gopher-repetition", CLEAN + " buy now" * 200, "top_2_gram"),
        ("gopher-repetition", " ".join([CLEAN.replace("\n", " ")] * 2), "repeated_5_grams"),
        ("gopher-quality", "Too short to be a page.", "few_words"),
        ("gopher-quality", "a b c d e " * 30, "short_words"),
        ("gopher-quality", "incomprehensibilities notwithstanding " * 30, "long_words"),
        ("gopher-quality", CLEAN.replace(" ", " # "), "hashes"),
        ("gopher-quality", CLEAN.replace(" ", " … "), "ellipses"),
        ("gopher-quality", "\n".join(f"- {line}" for line in SENTENCES), "bullets"),
        ("gopher-quality", "\n".join(f"{line}..." for line in SENTENCES), "lines_end_in_ellipsis"),
        ("gopher-quality", CLEAN + " 17 ~ 4711 %" * 40, "few_letters"),
        ("gopher-quality", "Fluss Hügel Dorf Straße Bahnhof Kirche Abtei Wasser " * 10, "few_stop_words"),
        ("fineweb", CLEAN.replace(".", ""), "few_sentence_ends"),
        ("fineweb", CLEAN + "\nShort line." * 8, "short_lines"),
        ("fineweb", CLEAN + "\n" + CLEAN.split("\n")[2], "repeated_lines"),
        ("fineweb", "\n".join(f"Number {n} of all." for n in range(9)), "short_lines"),
        ("c4", "Lorem ipsum dolor sit amet and so on.\n" + CLEAN, "lorem_ipsum"),
        ("c4", CLEAN + "\nif (x) { return the value of it; }.", "curly_bracket"),
        ("c4", "Only one sentence here is left.", "few_sentences"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 25 and " " not in value else "text",
)
def test_planted_faults_are_found(rules: str, text: str, reason: str) -> None:
    assert judge(text, rules) == f"{rules}:{reason}"


def test_lines_that_c4_removes_are_counted() -> None:
    extra = ["Home", "No end mark here at all", "Please enable JavaScript to see this page.", "Two words."]
    extra += ["Our cookie policy tells you more about it.", "x" * 1001 + " is a long word."]
    text = "\n".join([*extra, CLEAN])
    broken, left, removed = Quality(QualityParams(name="quality", rules=["c4"]), 0).judge(text)
    assert (broken, left) == ("", CLEAN)
    assert removed == {"no_end_mark": 2, "javascript": 1, "short_line": 1, "policy": 1, "long_word": 1}


@pytest.mark.parametrize(
    ("rules", "text", "bounds"),
    [
        ("gopher-repetition", "\n\n".join([CLEAN] * 3), LOOSE),
        ("gopher-repetition", CLEAN + " buy now" * 200, {"top_ngrams": {}, "repeated_ngrams": {}}),
        ("gopher-quality", "That page of the weather is shorter than others.", {"min_words": 3}),
        ("gopher-quality", "a b c d e of to " * 30, {"min_mean_length": 1}),
        ("gopher-quality", "incomprehensibilities notwithstanding the to " * 30, {"max_mean_length": 40}),
        ("gopher-quality", CLEAN.replace(" ", " #tags "), {"max_symbols": 1, "min_alphabetic": 0.5}),
        ("gopher-quality", "\n".join(f"- {line}" for line in SENTENCES), {"max_bullets": 1.0}),
        ("gopher-quality", "\n".join(f"{line}..." for line in SENTENCES), {"max_ellipses": 1.0, "max_symbols": 1}),
        ("gopher-quality", CLEAN + " 17 4711" * 80, {"min_alphabetic": 0.1}),
        ("gopher-quality", "Fluss Hügel der Straße Bahnhof und Abtei Wasser " * 10, {"stop_words": ["der", "und"]}),
        ("fineweb", CLEAN.replace(".", ""), {"min_line_ends": 0.0}),
        ("fineweb", CLEAN + "\nShort line." * 8, {"max_short_lines": 1.0, "max_repeated_chars": 1.0}),
        ("fineweb", CLEAN + "\nShort line one." * 8, {"short_line": 5, "max_repeated_chars": 1.0}),
        ("fineweb", "\n".join(f"No. {n}." for n in range(9)), {"short_line": 2, "max_lines_per_word": 1}),
        ("c4", CLEAN.replace(".\n", "\n"), {"end_mark": False}),
        ("c4", "Only one sentence here is left.", {"min_sentences": 1}),
        ("c4", CLEAN + "\n{ is a curly bracket.", {"curly_bracket": False}),
        ("c4", "Lorem ipsum dolor sit amet and so on.\n" + CLEAN, {"lorem_ipsum": False}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "text" if " " in value else value,
)  # fmt: skip
def test_a_looser_bound_lets_the_same_text_pass(rules: str, text: str, bounds: dict[str, Any]) -> None:
    models = dict(zip(RULES, (GopherRepetitionParams, GopherQualityParams, FineWebParams, C4Params), strict=True))
    field = rules.replace("-", "_")
    assert judge(text, rules, **{field: models[rules](**bounds)}) == ""


def test_switches_of_c4_keep_their_lines() -> None:
    def left(text: str, **bounds: Any) -> str:
        return Quality(QualityParams(name="quality", rules=["c4"], c4=C4Params(**bounds)), 0).judge(text)[1]

    for line, switch in [
        ("Please enable JavaScript to see this page.", {"javascript": False}),
        ("Our cookie policy tells you more about it.", {"policies": False}),
        ("Two words.", {"min_line_words": 2}),
        ("x" * 1001 + " is a long word.", {"max_word_chars": 2000}),
    ]:
        assert line not in left(f"{line}\n{CLEAN}")
        assert line in left(f"{line}\n{CLEAN}", **switch)
    cited = CLEAN.replace("river", "river[12]", 1)
    assert left(cited) == CLEAN
    assert left(cited, citations=False) == cited
    assert judge("the to " + "word " * 200, "gopher-quality", gopher_quality=GopherQualityParams(max_words=100)) == (
        "gopher-quality:many_words"
    )


def test_prose_rules_leave_code_alone() -> None:
    from llmctl.text.documents import Document

    quality = Quality(QualityParams(name="quality"), 0)
    source = "def f(x):\n    return {x: 1}\n"
    assert not isinstance(quality(Document("1", "a.txt", source)), Document), "the rules would drop it"
    code = Document("1", "a.py", source, meta={"code": "python"})
    assert quality(code) is code
