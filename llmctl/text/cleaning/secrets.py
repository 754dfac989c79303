"""Keys and passwords in text: shapes that providers fixed, and assignments whose value looks random."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<what>(?:RSA |EC |DSA |OPENSSH |ENCRYPTED |PGP )?PRIVATE KEY(?: BLOCK)?)-----"
    r".{1,20000}?-----END (?P=what)-----",
    re.DOTALL,
)
PREFIXED = re.compile(
    r"(?<![A-Za-z0-9_\-/+])(?:"
    r"(?:AKIA|ASIA|AROA|AIDA)[A-Z2-7]{16}"  # AWS: access key ids
    r"|gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"
    r"|glpat-[A-Za-z0-9_\-]{20,}"
    r"|xox[abprs]-[A-Za-z0-9\-]{10,}"  # Slack
    r"|sk_(?:live|test)_[A-Za-z0-9]{16,}|sk-(?:proj-|ant-)?[A-Za-z0-9_\-]{32,}"  # Stripe; model providers
    r"|AIza[A-Za-z0-9_\-]{35}"  # Google
    r"|hf_[A-Za-z]{34}|npm_[A-Za-z0-9]{36}|pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_\-]{50,}"
    r"|SG\.[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43}"  # SendGrid
    r")(?![A-Za-z0-9_\-])"
)
PREFIX_HINTS = (
    "AKIA", "ASIA", "AROA", "AIDA", "gh", "glpat-", "xox", "sk_", "sk-", "AIza", "hf_", "npm_", "pypi-", "SG.",
)  # fmt: skip
TOKEN = re.compile(r"(?<![\w\-.])eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{16,}(?![\w\-])")
ASSIGNED = re.compile(
    r"""(?ix) (?<![a-z0-9])(?:[a-z0-9]+[_\-.])*
    (?:secret|passwd|password|token|api[_\-]?key|access[_\-]?key|secret[_\-]?key|private[_\-]?key|auth|credentials?)
    (?:[_\-.](?:key|id|token|value))? ["']?\s*(?:=|:|=>|:=)\s*
    (?: (?P<quote>["'`])(?P<quoted>[^\s"'`]{8,256})(?P=quote) | (?P<bare>[A-Za-z0-9+/=_\-.]{16,256})(?![\w(\[]) )"""
)
ASSIGNED_HINTS = ("secret", "passw", "token", "key", "auth", "credential")
MIN_BITS = 3.0
"""Shannon entropy in bits per character from which a value in quotes may be a secret; a bare one needs half more."""


def secrets(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every secret; only the value of an assignment."""
    if "-----BEGIN " in text:
        yield from (match.span() for match in PRIVATE_KEY.finditer(text))
    if any(hint in text for hint in PREFIX_HINTS):
        yield from (match.span() for match in PREFIXED.finditer(text))
    if "eyJ" in text:
        yield from (match.span() for match in TOKEN.finditer(text) if _is_jwt(match.group()))
    lowered = text.lower()
    if any(hint in lowered for hint in ASSIGNED_HINTS):
        for match in ASSIGNED.finditer(text):
            group = "quoted" if match["quoted"] else "bare"
            if looks_random(match[group], MIN_BITS if group == "quoted" else MIN_BITS + 0.5):
                yield match.span(group)


def looks_random(value: str, min_bits: float = MIN_BITS) -> bool:
    """Whether a value mixes letters and digits as words, paths, versions and placeholders do not."""
    letters, digits = sum(map(str.isalpha, value)), sum(map(str.isdigit, value))
    if letters < 3 or digits < 2 or value.count(".") > 1 or "${" in value or "{{" in value or value[0] in "<$%":
        return False
    if re.fullmatch(r"[a-z]+(?:[_\-./][a-z]+)*[_\-]?\d{0,4}", value, re.IGNORECASE):
        return False  # my_secret_2024
    return entropy(value) >= min_bits


def entropy(value: str) -> float:
    """Shannon entropy of the characters, bits per character."""
    counts = Counter(value)
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())


def _is_jwt(token: str) -> bool:
    """Whether the first part is JSON that names an algorithm (RFC 7519)."""
    head = token.split(".")[0]
    try:
        decoded = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (binascii.Error, ValueError):
        return False
    return isinstance(decoded, dict) and "alg" in decoded
