"""One text for one value: canonical JSON, the form of everything that is hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from typing import Any


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no white space, numbers normalised. NaN and infinity raise ValueError."""
    return json.dumps(normalised(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """`sha256:` and the hexadecimal digest of the canonical JSON of `value`."""
    return "sha256:" + hashlib.sha256(canonical(value).encode()).hexdigest()


def normalised(value: Any) -> Any:
    """Plain JSON types; whole floats become integers, so that 1.0 and 1 are one value; sets become sorted lists."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {str(normalised(key)): normalised(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [normalised(item) for item in value]
    if isinstance(value, Set):
        return sorted((normalised(item) for item in value), key=canonical)
    from pydantic_core import to_jsonable_python  # only parameters hold other types, and they bring pydantic along

    return normalised(to_jsonable_python(value))
