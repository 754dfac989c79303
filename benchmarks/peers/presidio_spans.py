"""What presidio's recognisers find in planted texts: the fixture of tests/text/cleaning/test_personal_data.py.

    python -m venv peers && peers/bin/pip install 'presidio-analyzer==2.2.366' 'phonenumbers==9.0.43'
    peers/bin/python benchmarks/peers/presidio_spans.py tests/text/cleaning/presidio_spans.jsonl.gz

A row holds a text, the places [start, end, kind] of what was planted in it, and what presidio's recognisers say
about it: [start, end, kind, score]. They are asked one by one, without a language model and without the words
around a match, which is what they have in common with llmctl's. Telephone numbers are those of the United States,
and those of any country that begin with +. presidio has no recogniser of keys, tokens or credentials in URLs.
"""

from __future__ import annotations

import gzip
import json
import random
import string
import sys
from pathlib import Path
from typing import Any

VALUES = 3
"""Values planted in a text, of different kinds."""
TEXTS = 600
WORDS = [
    "the", "river", "was", "high", "and", "nobody", "in", "town", "remembered", "such", "a", "spring", "so", "they",
    "wrote", "to", "our", "office", "again", "last", "week", "about", "it",
]  # fmt: skip
FRAMES = ["{}", "{}.", "{},", "({})", '"{}"', "{};", "{}\n", "<{}>", "{}!", ": {}"]
LOOK_ALIKES = [
    "Card 4111 1111 1111 1112 fails Luhn's check, as do 5500-0000-0000-0005 and 378282246310006.",
    "1234567890123456 is only a number, order 4000123412341235 too.",
    "Version 10.20.30.40 replaced version 1.2.3.4; python 3.11.7.1 and v2.0.0.1 are out, see section 4.3.2.1.",
    "On 2024-01-31 at 12:30:45, and on 31.01.2024 or 01/31/2024, something was printed.",
    "ISBN 978-3-16-148410-0, ISBN 0-306-40615-2, ISSN 2049-3630.",
    "DE89 3704 0044 0532 0130 01 has a wrong check, GB00WEST12345698765432 too, XX12 3456 7890 1234 no country.",
    "The numbers 000-12-3456, 666-12-3456, 123-00-4567 and 123-45-0000 were never issued.",
    "078-05-1120 was printed in advertisements, 987-65-4321 is none yet.",
    "Hosts 127.0.0.1 and ::1 and 0.0.0.0, the mask 255.255.255.0, the impossible 300.1.2.3.",
    "In C++, std::vector and a::b are names.",
    "Write user@ or @handle or image@2x.png.",
    "3.14159265358979, 1,234,567.89, 6.02214076e23, pages 100-200-300.",
    "UUID 123e4567-e89b-12d3-a456-426614174000, commit da39a3ee5e6b4b0d3255bfef95601890afd80709, 10:20:30:40:50:60.",
]


def digits(rng: random.Random, count: int) -> str:
    """So many decimal digits."""
    return "".join(rng.choice(string.digits) for _ in range(count))


def card(rng: random.Random) -> str:
    """A number of an issuer's prefix and length with Luhn's digit, in one piece or grouped as it is printed."""
    prefix, length = rng.choice([("4", 16), ("51", 16), ("55", 16), ("6011", 16), ("37", 15)])
    body = prefix + digits(rng, length - 1 - len(prefix))
    doubled = [int(digit) * (2 - place % 2) for place, digit in enumerate(reversed(body))]
    number = body + str(-sum(value - 9 * (value > 9) for value in doubled) % 10)
    cuts = [0, 4, 8, 12, 16] if length == 16 else [0, 4, 10, 15]
    groups = [number[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    return rng.choice(["", " ", "-"]).join(groups)


def iban(rng: random.Random) -> str:
    """An account with the check digits of ISO 13616, in one piece or in groups of four."""
    country, bank = rng.choice([("DE", 18), ("AT", 16), ("ES", 20), ("PL", 24), ("BE", 12), ("FR", 23), ("IT", None)])
    body = digits(rng, bank) if bank else rng.choice(string.ascii_uppercase) + digits(rng, 22)
    check = 98 - int("".join(str(int(letter, 36)) for letter in f"{body}{country}00")) % 97
    value = f"{country}{check:02}{body}"
    return value if rng.random() < 0.5 else " ".join(value[start : start + 4] for start in range(0, len(value), 4))


def email(rng: random.Random) -> str:
    """An address with dots, dashes or a tag in it."""
    local = rng.choice(["jane.roe", "j_roe", "jane+news", "roe-77", "J.R", "x"]) + digits(rng, rng.randint(0, 3))
    return f"{local}@{rng.choice(['example.com', 'mail.uni-x.de', 'a-b.co.uk', 'news.example.org', 'shop.museum'])}"


def phone(rng: random.Random) -> str:
    """A number that its country's plan holds to be valid."""
    area, line = rng.choice(["212", "415", "312", "206"]), digits(rng, 4)
    return rng.choice(
        [f"({area}) 736-{line}", f"{area}-736-{line}", f"{area}.736.{line}", f"+1 {area} 736 {line}",
         f"+49 30 {digits(rng, 6)}", f"+44 20 7946 0{digits(rng, 3)}", f"+33 1 70 18 {line[:2]} {line[2:]}"]
    )  # fmt: skip


def address(rng: random.Random) -> str:
    """An address of a host, IPv4 or IPv6."""
    four = f"{rng.randint(11, 200)}.{rng.randint(100, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}"
    groups = [f"{rng.randint(1, 65535):x}" for _ in range(5)]
    return rng.choice([four, f"2001:db8::{groups[0]}:{groups[1]}", f"2a00:1450:4001:{':'.join(groups)}"])


def security_number(rng: random.Random) -> str:
    """A number as the social security administration issues them."""
    return f"{rng.choice([301, 536, 219, 457])}-{rng.randint(10, 99)}-{rng.randint(1000, 9998)}"


MAKERS = {
    "email": email,
    "phone": phone,
    "credit_card": card,
    "iban": iban,
    "ip_address": address,
    "ssn": security_number,
}


def planted(rng: random.Random) -> dict[str, Any]:
    """A text of words with values of different kinds in it, in brackets, quotes, and before all kinds of signs."""
    text, places = "", []
    for kind in rng.sample(sorted(MAKERS), VALUES):
        before, _, after = rng.choice(FRAMES).partition("{}")
        value = MAKERS[kind](rng)
        text += " ".join(rng.choices(WORDS, k=rng.randint(2, 9))) + " " + before
        places.append([len(text), len(text) + len(value), kind])
        text += value + after + ("" if after.endswith("\n") else " ")
    return {"text": text + " ".join(rng.choices(WORDS, k=4)), "planted": places}


def recognisers() -> dict[str, tuple[Any, str]]:
    """presidio's recogniser of each kind, and the name that it has for it."""
    import tldextract
    from presidio_analyzer import predefined_recognizers as theirs

    # Else it asks the network for the list of top-level domains; the one in the package is the same each time.
    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=())
    return {
        "email": (theirs.EmailRecognizer(), "EMAIL_ADDRESS"),
        "phone": (theirs.PhoneRecognizer(supported_regions=("US",)), "PHONE_NUMBER"),
        "credit_card": (theirs.CreditCardRecognizer(), "CREDIT_CARD"),
        "iban": (theirs.IbanRecognizer(), "IBAN_CODE"),
        "ip_address": (theirs.IpRecognizer(), "IP_ADDRESS"),
        "ssn": (theirs.UsSsnRecognizer(), "US_SSN"),
    }


def main(target: Path) -> None:
    """Write the fixture."""
    rng = random.Random(0)
    rows = [planted(rng) for _ in range(TEXTS)] + [{"text": text, "planted": []} for text in LOOK_ALIKES]
    known = recognisers()
    for row in rows:
        row["presidio"] = sorted(
            [match.start, match.end, kind, match.score]
            for kind, (recogniser, name) in known.items()
            for match in recogniser.analyze(row["text"], [name], None)
        )
    # No time stamp and no name in the archive: the same texts and findings are the same bytes.
    with target.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
