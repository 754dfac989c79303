"""Records as text, and back: a line `name: value` for each field, the values in JSON, so that nothing is lost.

Strings of one line without a look-alike stand as they are; everything else is JSON: numbers keep their digits, a string
that looks like a number keeps its quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

PLAIN = re.compile(r"[^\W\d_][^\n\r\x00-\x1f]*\Z")
"""A string that may stand without quotes: it begins with a letter and is one line."""
WORDS = frozenset({"null", "true", "false", "nan", "infinity"})
NAME = re.compile(r"[^:\n\r\"][^:\n\r]*\Z")


def record_to_text(record: Mapping[str, Any]) -> str:
    """The record as text. `text_to_record` gives equal values of equal types in equal order."""
    return "".join(f"{_name(name)}: {_value(value)}\n" for name, value in record.items())


def text_to_record(text: str) -> dict[str, Any]:
    """The reverse. Numbers with a point become Decimal if a float would not print the same digits.

    ValueError, with the line, for text that is no record.
    """
    found: dict[str, Any] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            name, rest = _split(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no field of a record: {error}") from error
        if name in found:
            raise ValueError(f"line {number} names the field {name!r} a second time")
        found[name] = _parse(rest, number)
    return found


def _name(name: str) -> str:
    return name if NAME.match(name) and name == name.strip() else json.dumps(name, ensure_ascii=False)


def _split(line: str) -> tuple[str, str]:
    if line.startswith('"'):
        name, end = json.JSONDecoder().raw_decode(line)
        if line[end : end + 2] != ": ":
            raise ValueError("no `: ` after its name")
        return name, line[end + 2 :]
    name, colon, rest = line.partition(": ")
    if not colon:
        raise ValueError("no `: ` after its name")
    return name, rest


def _value(value: Any) -> str:
    if isinstance(value, str):
        plain = (
            PLAIN.match(value)
            and value.lower() not in WORDS
            and value == value.rstrip()
            and value.splitlines() == [value]
        )
        return value if plain else json.dumps(value, ensure_ascii=False)
    return _json(value)


def _json(value: Any) -> str:
    """JSON, with the digits of a Decimal at any depth; what JSON has no type for becomes a string."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_json(str(name))}: {_json(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_json, value)) + "]"
    if isinstance(value, bytes):
        value = text_of(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def text_of(value: bytes) -> str:
    """The text that bytes are in UTF-8, else their hex."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()


def _parse(text: str, line: int) -> Any:
    if PLAIN.match(text) and text.lower() not in WORDS:
        return text
    try:
        return json.loads(text, parse_float=number)
    except ValueError as error:
        raise ValueError(f"line {line}: no value: {error}") from error


def number(digits: str) -> float | Decimal:
    """The number of a JSON literal with a point or an exponent: a float where it prints the same digits."""
    value = float(digits)
    return value if repr(value) == digits else Decimal(digits)
