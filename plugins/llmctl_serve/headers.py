"""Headers of every answer: who may show it, what a page may load, which request it belongs to."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable

from starlette.types import Scope

from llmctl_serve.exchange import Exchange

Headers = list[tuple[bytes, bytes]]

ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""The policy of what is no page."""
INLINE = {
    "script": re.compile(r"<script>(.*?)</script>", re.DOTALL),
    "style": re.compile(r"<style>(.*?)</style>", re.DOTALL),
}


def page_policy(html: str) -> str:
    """The Content-Security-Policy of a page whose only scripts and styles are its own and this server's.

    Inline ones are allowed by their hashes, so text that a model or a user puts into the page never runs.
    """
    allowed = {kind: " ".join(["'self'", *(_hash(text) for text in tag.findall(html))]) for kind, tag in INLINE.items()}
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src 'self' data:; "
        "font-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def security_headers(scope: Scope, given: Iterable[tuple[bytes, bytes]], exchange: Exchange) -> Headers:
    """The headers of an answer, completed; what the application has set stays."""
    headers = [(bytes(name), bytes(value)) for name, value in given]
    there = {name.lower() for name, _ in headers}

    def add(name: bytes, value: bytes) -> None:
        if name not in there:
            headers.append((name, value))

    for name, value in ALWAYS:
        add(name, value)
    add(b"content-security-policy", NOTHING.encode())
    add(b"cache-control", b"no-store")
    add(b"x-request-id", exchange.request_id.encode())
    for own, text in exchange.headers.items():
        add(own.lower().encode(), text.encode("latin-1"))
    return headers
