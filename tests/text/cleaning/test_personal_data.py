"""Personal data: precision and recall on planted values, exact spans, and look-alikes that stay.

What presidio finds in the same texts is recorded by benchmarks/peers/presidio_spans.py.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest

from llmctl.text.cleaning import personal_data
from llmctl.text.cleaning.params import PiiKind, PiiParams
from llmctl.text.cleaning.personal_data import IBAN_LENGTHS, find, is_iban, luhn, phones
from llmctl.text.cleaning.pii import PersonalData, masked
from llmctl.text.cleaning.step import Drop, Noted
from llmctl.text.documents import Document

KINDS = frozenset(PiiParams(name="pii").actions())
WORDS = [
    "the",
    "report",
    "was",
    "sent",
    "to",
    "our",
    "office",
    "last",
    "week",
    "nobody",
    "has",
    "answered",
    "so",
    "please",
]


def check_digit(digits: str) -> str:
    return next(digits + last for last in string.digits if luhn(digits + last))


def iban(rng: random.Random) -> str:
    country = rng.choice(["DE", "AT", "ES", "PL", "BE"])
    body = "".join(rng.choice(string.digits) for _ in range(IBAN_LENGTHS[country] - 4))
    value = next(f"{country}{n:02}{body}" for n in range(2, 99) if is_iban(f"{country}{n:02}{body}"))
    return value if rng.random() < 0.5 else " ".join(value[i : i + 4] for i in range(0, len(value), 4))


def token(rng: random.Random, size: int, letters: str = string.ascii_letters + string.digits) -> str:
    return "".join(rng.choice(letters) for _ in range(size))


def jwt(rng: random.Random) -> str:
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').decode().rstrip("=")
    return f"{head}.{token(rng, 40)}.{token(rng, 43)}"


def planted(kind: str, rng: random.Random) -> str:
    def digits(count: int) -> str:
        return token(rng, count, string.digits)

    card = check_digit(rng.choice(["4", "51", "55"]).ljust(15, "0")[:2] + digits(13))
    makers = {
        "email": lambda: f"{rng.choice(WORDS)}.{token(rng, 5)}@{rng.choice(['example.com', 'uni-x.de', 'a.co.uk'])}",
        "phone": lambda: rng.choice(
            [f"+49 30 {digits(6)}", f"(212) 736-{digits(4)}", f"+44 20 7946 0{digits(3)}", f"415-736-{digits(4)}"]
        ),
        "credit_card": lambda: rng.choice([card, " ".join(card[i : i + 4] for i in range(0, 16, 4))]),
        "iban": lambda: iban(rng),
        "ip_address": lambda: rng.choice(
            [f"{rng.randint(11, 200)}.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}",
             f"2001:db8::{rng.randint(1, 65535):x}:{rng.randint(1, 65535):x}"]
        ),
        "ssn": lambda: f"{rng.choice([301, 536, 219, 457])}-{rng.randint(10, 99)}-{rng.randint(1000, 9998)}",
        "key": lambda: rng.choice(
            [f"AKIA{token(rng, 16, string.ascii_uppercase + '234567')}", f"ghp_{token(rng, 36)}", jwt(rng)]
        ),
        "url_credentials": lambda: f"{rng.choice(WORDS)}:{token(rng, 10)}",
    }  # fmt: skip
    return makers[kind]()


FRAMES = {"url_credentials": "postgres://{}@db.local/main"}
INNOCENT = [
    "Card 4111 1111 1111 1112 fails Luhn's check, and 1234567890123456 is only a number.",
    "Version 10.20.30.40 replaced version 1.2.3.4; python 3.11.7.1 and v2.0.0.1 are out, see section 4.3.2.1.",
    "On 2024-01-31 at 12:30:45, and on 31.01.2024 or 01/31/2024, ISBN 978-3-16-148410-0 was printed.",
    "DE89 3704 0044 0532 0130 01 has a wrong check, GB00WEST12345698765432 too, XX12 3456 7890 1234 no country.",
    "The numbers 000-12-3456, 666-12-3456, 912-12-3456, 123-00-4567 and 078-05-1120 were never issued.",
    "Hosts 127.0.0.1 and ::1 and 0.0.0.0, the mask 255.255.255.0, the impossible 300.1.2.3, std::vector, a::b.",
    "Write user@ or @handle or image@2x.png; 3.14159265358979, 1,234,567.89, 6.02214076e23, pages 100-200-300.",
    'Set password = "changeme" or token = "your_token_here"; postgres://user:password@host/db is a pattern.',
    "sk-learn and AKIA are words; the key: value pairs and secret_santa_2024 too; eyJ is no token.",
    "UUID 123e4567-e89b-12d3-a456-426614174000, commit da39a3ee5e6b4b0d3255bfef95601890afd80709, 10:20:30:40:50:60.",
]


def test_precision_and_recall_on_planted_values() -> None:
    rng = random.Random(7)
    hits = missed = wrong = 0
    for number in range(1600):
        kind = sorted(KINDS)[number % len(KINDS)]
        value = planted(kind, rng)
        before = " ".join(rng.choices(WORDS, k=rng.randint(2, 12))) + rng.choice([" ", ": ", " ("])
        before, _, after_value = (before + FRAMES.get(kind, "{}")).partition("{}")
        text = before + value + after_value + rng.choice([" ", ". ", ", ", ")\n"]) + " ".join(rng.choices(WORDS, k=5))
        if number % 4 == 0:
            text += " " + rng.choice(INNOCENT)
        found = find(text, KINDS, "US")
        expected = (len(before), len(before) + len(value), kind)
        hits += expected in found
        missed += expected not in found
        wrong += len([one for one in found if one != expected])
    assert hits / (hits + missed) >= 0.98
    assert hits / (hits + wrong) >= 0.98


@pytest.mark.parametrize("text", INNOCENT, ids=lambda text: text.split()[0])
def test_look_alikes_stay(text: str) -> None:
    assert find(text, KINDS, "US") == []


def test_checks_are_the_standards() -> None:
    assert luhn("4539578763621486") and not luhn("4539578763621487")
    assert is_iban("GB82WEST12345698765432") and not is_iban("GB83WEST12345698765432")
    rng = random.Random(1)
    for _ in range(200):  # one wrong digit is always noticed
        number = check_digit(token(rng, 15, string.digits))
        place = rng.randrange(16)
        changed = number[:place] + str((int(number[place]) + rng.randint(1, 9)) % 10) + number[place + 1 :]
        assert luhn(number) and not luhn(changed)


TEXT = "Mail me@example.com or ring +49 30 901820 today; card 4111 1111 1111 1111."


def step(**params: object) -> PersonalData:
    return PersonalData(PiiParams(name="pii", **params), 0)


def test_the_rest_of_the_text_is_byte_equal_and_no_value_is_told() -> None:
    outcome = step()(Document("1", "s", TEXT))
    assert isinstance(outcome, Noted)
    assert outcome.document.text == "Mail <EMAIL> or ring <PHONE> today; card <CREDIT_CARD>."
    assert outcome.found == {"email": 1, "phone": 1, "credit_card": 1}
    told = repr((outcome.found, outcome.document.meta))
    assert all(value not in told for value in ("me@example.com", "901820", "4111"))
    for tag in outcome.document.meta["pii"]:
        assert outcome.document.text[tag["start"] : tag["end"]] == f"<{tag['kind'].upper()}>"
        assert len(tag["hash"]) == 16


def test_hashes_depend_on_the_whole_text() -> None:
    """Else a number could be found by hashing all of them."""
    first, second = (step()(Document("1", "s", text)).document.meta["pii"][0]["hash"] for text in (TEXT, TEXT + "!"))  # type: ignore[union-attr]
    assert first != second


def test_actions_by_kind() -> None:
    tagged = step(action="tag")(Document("1", "s", TEXT))
    assert isinstance(tagged, Noted) and tagged.document.text == TEXT
    assert [TEXT[tag["start"] : tag["end"]] for tag in tagged.document.meta["pii"]][0] == "me@example.com"
    dropped = step(credit_card="drop")(Document("1", "s", TEXT))
    assert isinstance(dropped, Drop) and dropped.reason == "holds credit_card" and "4111" not in dropped.detail
    kept = step(email="keep", phone="keep", replacement="[{kind}]", hashes=False)(Document("1", "s", TEXT))
    assert isinstance(kept, Noted) and kept.document.meta == {}
    assert kept.document.text == TEXT.replace("4111 1111 1111 1111", "[CREDIT_CARD]")


def test_the_region_reads_numbers_without_a_country() -> None:
    text = "Ring 030 901820 now."
    assert find(text, KINDS, "DE") == [(5, 15, "phone")]
    assert find(text, KINDS, "") == []


def test_secrets_of_several_shapes() -> None:
    block = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nxyz\n-----END RSA PRIVATE KEY-----"
    text = f'{block}\napi_key = "a8Fk29xQ0zLmP4"\nexport TOKEN=9f8e7d6c5b4a39281706f5e4d3c2b1a0\n'
    assert masked(text) == '<KEY>\napi_key = "<KEY>"\nexport TOKEN=<KEY>\n'


def test_telephone_numbers_of_lines_are_those_of_the_text():
    """Only lines with seven digits are read closely; phonenumbers over the whole text finds the same places."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    dice = random.Random(0)
    numbers = ["+1 212-555-0142", "(020) 7946 0958", "+49 30 901820", "tel. 650.253.0000", "+1 650 253 0000 ext. 123"]
    numbers += [
        "650\u2013253\u20130000",
        "2024-01-15 10:11:12",
        "+44\n20 7946 0958",
        "12 34",
        "phone +33 (0)1 70 18 99 00",
    ]
    words = ["otters", "swim,", "\n", "\n\n", "at 12:30", "for 5 km.", "and"]
    for _ in range(40):
        text = " ".join(dice.choice(numbers) if dice.random() < 0.3 else dice.choice(words) for _ in range(50))
        ends = {match.end for match in PhoneNumberMatcher(text, "US", leniency=Leniency.VALID)}
        assert {end for _, end in phones(text, "US")} == ends


THEIRS: frozenset[PiiKind] = frozenset({"email", "phone", "credit_card", "iban", "ip_address", "ssn"})
"""What presidio has recognisers of."""
STAY = {
    "10.20.30.40", "1.2.3.4", "3.11.7.1", "4.3.2.1",  # called versions and sections by the words before
    "127.0.0.1", "::1", "0.0.0.0", "255.255.255.0",  # no host's
    "a::b",
    "987-65-4321",  # no number is issued from 900 on
}  # fmt: skip
"""What presidio, which sees no words around a match, takes for personal data and llmctl does not."""


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    with gzip.open(Path(__file__).with_name("presidio_spans.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def presidios(row: dict[str, Any]) -> set[tuple[int, int, str]]:
    """What presidio found: of two that overlap the surer one, then the longer one, as presidio's anonymizer has it.

    A bracket that opens before a telephone number and closes after it is not counted in: presidio takes the
    first and leaves the second.
    """
    taken: list[tuple[int, int, str]] = []
    for start, end, kind, _ in sorted(row["presidio"], key=lambda found: (-found[3], found[0] - found[1])):
        value = row["text"][start:end]
        opened = kind == "phone" and value.startswith("(") and ")" not in value
        if all(end <= other or start >= stop for other, stop, _ in taken):
            taken.append((start + opened, end, kind))
    return set(taken)


def test_spans_are_presidios(recorded: list[dict[str, Any]]) -> None:
    rows = [row for row in recorded if row["planted"]]
    assert len(rows) == 600
    for row in rows:
        found = find(row["text"], THEIRS, "US")
        assert found == [tuple(place) for place in row["planted"]]
        assert {*found} == presidios(row), row["text"]


def test_look_alikes_that_presidio_takes_are_known(recorded: list[dict[str, Any]]) -> None:
    rows = [row for row in recorded if not row["planted"]]
    assert {row["text"][start:end] for row in rows for start, end, _ in presidios(row)} == STAY
    assert [find(row["text"], KINDS, "US") for row in rows] == [[]] * len(rows)


@pytest.mark.parametrize(
    ("check", "fault", "taken"),
    [
        ("luhn", lambda digits: True, "4111 1111 1111 1112"),
        ("is_iban", lambda value: True, "DE89 3704 0044 0532 0130 01"),
        ("VERSION", re.compile("(?!)"), "10.20.30.40"),
    ],
)
def test_without_a_check_a_look_alike_is_taken(
    recorded: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, check: str, fault: Any, taken: str
) -> None:
    monkeypatch.setattr(personal_data, check, fault)
    texts = [row["text"] for row in recorded if not row["planted"]]
    assert taken in {text[start:end] for text in texts for start, end, _ in find(text, KINDS, "US")}


def test_all_between_planted_values_stays_byte_equal(recorded: list[dict[str, Any]]) -> None:
    for row in recorded:
        text, done, expected = row["text"], 0, ""
        for start, end, kind in row["planted"]:
            expected += text[done:start] + f"<{kind.upper()}>"
            done = end
        document = Document("1", "s", text)
        outcome = step()(document)
        cleaned = outcome.document if isinstance(outcome, Noted) else outcome
        assert isinstance(cleaned, Document)
        assert cleaned.text == expected + text[done:]
        assert not any(text[start:end] in json.dumps(cleaned.meta) for start, end, _ in row["planted"])


@pytest.mark.parametrize("word", ["river", "server", "Tel Aviv", "the clever"])
def test_only_whole_words_call_an_address_a_version(word: str) -> None:
    assert find(f"{word} 93.184.216.34", KINDS, "US") == [(len(word) + 1, len(word) + 14, "ip_address")]
    assert find("ver. 93.184.216.34, FileVersion=93.184.216.34", KINDS, "US") == []
