"""Personal data in text: patterns, each with the check that tells it from what only looks alike."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Any

from llmctl.errors import MachineError
from llmctl.text.cleaning.params import PiiKind
from llmctl.text.cleaning.secrets import secrets

Span = tuple[int, int]
EMAIL = re.compile(
    r"(?<![\w.%+\-/])[A-Za-z0-9](?:[A-Za-z0-9._%+'\-]{0,62}[A-Za-z0-9_+\-])?@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}(?P<top>[A-Za-z]{2,24}|xn--[A-Za-z0-9\-]{2,59})(?![\w@])"
)
CARD = re.compile(r"(?<![\w.,+\-/])[2-6]\d{3}(?:(?P<gap>[ \-]?)\d{4}){2}(?P=gap)\d{1,7}(?![\w/]|[.,\-]\d)|"
                  r"(?<![\w.,+\-/])3[47]\d{2}[ \-]?\d{6}[ \-]?\d{5}(?![\w/]|[.,\-]\d)")  # fmt: skip
ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
    r"|(?:5018|5020|5038|6304|6759|676[1-3])\d{8,15}"
)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?![A-Za-z0-9])")
IBAN_LENGTHS = dict(
    AD=24, AE=23, AL=28, AT=20, AZ=28, BA=20, BE=16, BG=22, BH=22, BR=29, BY=28, CH=21, CR=22, CY=28, CZ=24, DE=22,
    DK=18, DO=28, EE=20, EG=29, ES=24, FI=18, FO=18, FR=27, GB=22, GE=22, GI=23, GL=18, GR=27, GT=28, HR=21, HU=28,
    IE=22, IL=23, IQ=23, IS=26, IT=27, JO=30, KW=30, KZ=20, LB=28, LC=32, LI=21, LT=20, LU=20, LV=21, LY=25, MC=27,
    MD=24, ME=22, MK=19, MR=27, MT=31, MU=30, NL=18, NO=15, PK=24, PL=28, PS=29, PT=25, QA=29, RO=24, RS=22, SA=24,
    SC=31, SE=24, SI=19, SK=24, SM=27, ST=25, SV=28, TL=23, TN=24, TR=26, UA=29, VA=22, VG=24, XK=20,
)  # fmt: skip  # ISO 13616 registry
IPV4 = re.compile(r"(?<![\w.\-/:])(?:\d{1,3}\.){3}\d{1,3}(?![\w\-]|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f]*:[0-9A-Fa-f:]*:)[0-9A-Fa-f:]{2,39}(?:(?:\d{1,3}\.){3}\d{1,3})?(?![\w:])")
VERSION = re.compile(
    r"(?:version|release|(?<![A-Za-z])"  # the others are words of their own: a server has an address
    r"(?:ver|rev|build|section|chapter|clause|oid|firmware|driver|upgrade[ds]? to|python|v|§))"
    r"[\s.:=#(]*\Z",
    re.IGNORECASE,
)
HOST = re.compile(r"\b(?:ip|address|host|server|from|client|dns|ping|gateway|peer)\b", re.IGNORECASE)
SSN = re.compile(r"(?<![\w.\-])(?P<area>\d{3})(?P<gap>[ \-])(?P<group>\d{2})(?P=gap)(?P<serial>\d{4})(?![\w\-]|\.\d)")
ADVERTISED = {"078-05-1120", "219-09-9999", "123-45-6789"}  # used in advertisements and manuals, never issued again
CREDENTIALS = re.compile(
    r"(?<![\w+.\-])[A-Za-z][A-Za-z0-9+.\-]{1,20}://"
    r"(?P<pair>[^\s/:@?#'\"<>]{1,128}:[^\s/@?#'\"<>]{1,128})@(?=[\w\[])"
)
PHONE_HINT = re.compile(r"(?:\+|\(|\b)\d[\d\s().\-/]{5,}\d")
PHONE_LINE = re.compile(r"\d(?:[^\d\n]{0,40}\d){6}")
"""Seven digits in one line: no telephone number that counts has less, and none goes over the end of a line."""
PLACEHOLDERS = re.compile(r"user(?:name)?:pass(?:word|wd)?|<.*|\$\{?.*|x+:x+|\*+:\*+", re.IGNORECASE)


def emails(text: str, region: str) -> Iterator[Span]:
    """E-mail addresses (the common part of RFC 5321); `name@2x.png` and the like are files."""
    if "@" in text:
        for match in EMAIL.finditer(text):
            if ".." not in match.group() and match["top"].lower() not in ("png", "jpg", "jpeg", "gif", "svg", "webp"):
                yield match.span()


def phones(text: str, region: str) -> Iterator[Span]:
    """Telephone numbers that are valid in their country; those without +country are read as of `region`."""
    hint = PHONE_HINT.search(text)
    if hint is None:
        return
    matcher, leniency = _matcher()
    done = 0
    while hint := PHONE_LINE.search(text, done):
        first = text.rfind("\n", 0, hint.start()) + 1
        end = text.find("\n", hint.end())
        done = len(text) if end < 0 else end
        for match in matcher(text[first:done], region or None, leniency=leniency.VALID):
            yield from _phone(text, first + match.start, match.raw_string)


def _phone(text: str, place: int, raw: str) -> Iterator[Span]:
    """The span of a number that the matcher found, if it is no price, identifier or bare count."""
    start = place + (raw.startswith("(") and ")" not in raw)  # the bracket is the sentence's
    before = text[start - 1 : start] if start else ""
    digits = sum(map(str.isdigit, raw))
    announced = not raw.isdigit() or _is_announced(text, start)
    dotted = IPV4.fullmatch(raw) is not None  # an address, or a version
    if digits >= 7 and announced and not dotted and not (before and before in "$€£#=_/.@-"):
        yield start, place + len(raw)


def _is_announced(text: str, start: int) -> bool:
    """Whether a bare run of digits is called a telephone number."""
    before = text[max(0, start - 24) : start].lower()
    return any(word in before for word in ("phone", "tel", "call", "fax", "mobile", "cell", "whatsapp", "ring", "dial"))


def cards(text: str, region: str) -> Iterator[Span]:
    """Payment cards: an issuer's prefix and length (ISO/IEC 7812), Luhn's check digit."""
    for match in CARD.finditer(text):
        digits = re.sub(r"[ \-]", "", match.group())
        if ISSUERS.fullmatch(digits) and luhn(digits) and len(set(digits)) > 1:
            yield match.span()


def luhn(digits: str) -> bool:
    """Whether the last digit is Luhn's check digit (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def ibans(text: str, region: str) -> Iterator[Span]:
    """Bank accounts: the country's length, remainder 1 modulo 97 (ISO 13616)."""
    for match in IBAN.finditer(text):
        value = match.group()
        length = IBAN_LENGTHS.get(value[:2])
        if length is None:
            continue
        end = _end_of(value, length)
        if end and is_iban(value[:end].replace(" ", "")) and not value[end : end + 1].isalnum():
            yield match.start(), match.start() + end


def _end_of(value: str, length: int) -> int:
    """Where the first `length` characters other than blanks end, 0 if there are fewer."""
    count = 0
    for place, character in enumerate(value, start=1):
        count += character != " "
        if count == length:
            return place
    return 0


def is_iban(value: str) -> bool:
    """Whether letters as numbers from 10, the first four characters last, leave 1 modulo 97."""
    return int("".join(str(int(character, 36)) for character in value[4:] + value[:4])) % 97 == 1


def addresses(text: str, region: str) -> Iterator[Span]:
    """IPv4 and IPv6 addresses of hosts: no versions, no masks, not the loopback or the unspecified address."""
    if "." in text:
        for match in IPV4.finditer(text):
            before = text[max(0, match.start() - 24) : match.start()]
            if _is_host(match.group(), before) and not VERSION.search(before):
                yield match.span()
    if "::" in text or text.count(":") > 6:
        for match in IPV6.finditer(text):
            value = match.group().rstrip(":") if not match.group().endswith("::") else match.group()
            if len(value) > 3 and any(map(str.isdigit, value)) and _is_host(value):
                yield match.start(), match.start() + len(value)


def _is_host(value: str, before: str = "") -> bool:
    """Whether this is the address of a host. 1.2.3.4 looks like a version and needs a word that says otherwise."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified or value.startswith(("255.", "0.")):
        return False
    small = isinstance(address, ipaddress.IPv4Address) and value[1] == "." and max(map(int, value.split("."))) < 100
    return not small or value == "8.8.8.8" or HOST.search(before) is not None


def security_numbers(text: str, region: str) -> Iterator[Span]:
    """US social security numbers as the administration issues them."""
    for match in SSN.finditer(text):
        area, group, serial = match["area"], match["group"], match["serial"]
        if area in ("000", "666") or area >= "900" or group == "00" or serial == "0000":
            continue
        if f"{area}-{group}-{serial}" not in ADVERTISED:
            yield match.span()


def credentials(text: str, region: str) -> Iterator[Span]:
    """`user:password` in URLs, without the rest of the URL; placeholders are none."""
    if "://" in text:
        for match in CREDENTIALS.finditer(text):
            if not PLACEHOLDERS.fullmatch(match["pair"]):
                yield match.span("pair")


def _keys(text: str, region: str) -> Iterator[Span]:
    return secrets(text)


FINDERS: dict[PiiKind, Callable[[str, str], Iterator[Span]]] = {
    "key": _keys,
    "url_credentials": credentials,
    "email": emails,
    "iban": ibans,
    "credit_card": cards,
    "ssn": security_numbers,
    "ip_address": addresses,
    "phone": phones,
}
"""In order of precedence: where two overlap, the earlier kind has the place."""


def find(text: str, kinds: frozenset[PiiKind], region: str) -> list[tuple[int, int, PiiKind]]:
    """(start, end, kind) of all personal data, in order, without overlap."""
    taken: list[tuple[int, int, PiiKind]] = []
    digits = any(map(text.__contains__, "0123456789"))
    for kind, finder in FINDERS.items():
        if kind not in kinds or not (digits or kind in ("email", "url_credentials", "key")):
            continue
        for start, end in finder(text, region):
            if all(end <= other or start >= stop for other, stop, _ in taken):
                taken.append((start, end, kind))
    return sorted(taken)


def _matcher() -> tuple[Any, Any]:
    try:
        from phonenumbers import Leniency, PhoneNumberMatcher
    except ImportError as error:
        raise MachineError("phonenumberslite is not installed", hint="pip install 'llmctl[data]'") from error
    return PhoneNumberMatcher, Leniency
