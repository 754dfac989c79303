"""The step `code`: source files keep their bytes and have rules of their own (StarCoder, 2305.06161, 3)."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter

from llmctl.text.cleaning.code_detection import by_path, by_shebang, looks_like_code
from llmctl.text.cleaning.kinds import Routed, kind_of, with_meta
from llmctl.text.cleaning.licenses import license_of
from llmctl.text.cleaning.params import CodeParams
from llmctl.text.cleaning.step import Drop, Noted, Outcome
from llmctl.text.documents import Document

GENERATED = re.compile(
    r"@generated|auto-?generated|automatically generated|generated (?:by|from|with|automatically)"
    r"|do not (?:edit|modify)|code generated .{0,80}do not edit",
    re.IGNORECASE,
)
HEAD_LINES = 10
VENDORED = re.compile(
    r"(?:^|/)(?:node_modules|bower_components|vendor|vendored|_vendor|third[_-]?party|external|site-packages|dist)/"
    r"|[.\-]min\.(?:js|css)$|(?:^|/)(?:package-lock\.json|yarn\.lock|poetry\.lock|cargo\.lock|go\.sum)$",
    re.IGNORECASE,
)
ENCODED = re.compile(r"[A-Za-z0-9+/]{64,}={0,2}|(?:0x[0-9A-Fa-f]{2}[,\s]+){16,}|(?:\\x[0-9A-Fa-f]{2}){16,}")


class Code(Routed):
    """Tells source code from prose, notes its language and licence, and drops what no person wrote."""

    name = "code"

    def __init__(self, params: CodeParams, seed: int) -> None:
        super().__init__(params)
        self._params = params
        self._licenses = frozenset(params.licenses)

    def clean(self, document: Document) -> Outcome:
        """The same text with meta.code and meta.license, or why it goes; prose passes."""
        language = self._language(document)
        if not language:
            return document
        license_id = license_of(document.text) or str(document.meta.get("license") or "")
        if reason := self._fault(document, language, license_id):
            return Drop(*reason)
        known = with_meta(document, code=language, **({"license": license_id} if license_id else {}))
        return Noted(known, Counter({f"code:{language}": 1, f"license:{license_id or 'none'}": 1}))

    def _language(self, document: Document) -> str:
        """The programming language, `unknown` for code that does not tell, "" for what is no code."""
        if known := document.meta.get("code"):
            return str(known).lower()  # a corpus may write `Python`
        if not self._params.detect:
            return "unknown" if kind_of(document) == "code" else ""
        path = str(document.meta.get("path") or document.source)
        found = by_path(path) or by_shebang(document.text)
        return found or ("unknown" if looks_like_code(document.text) else "")

    def _fault(self, document: Document, language: str, license_id: str) -> tuple[str, str] | None:
        params, text = self._params, document.text
        path = str(document.meta.get("path") or document.source)
        if params.vendored and VENDORED.search(path):
            return "vendored", path
        head = "\n".join(text.split("\n", HEAD_LINES)[:HEAD_LINES])
        if params.generated and (match := GENERATED.search(head)):
            return "generated", match.group()
        lines = text.split("\n")
        longest = max(map(len, lines))
        if longest > params.max_line:
            return "long line", f"{longest} characters"
        if (mean := len(text) / len(lines)) > params.max_mean_line:
            return "long lines", f"{mean:.0f} characters on average"
        alphanumeric = sum(map(str.isalnum, text)) / max(1, len(text) - sum(map(str.isspace, text)))
        if alphanumeric < params.min_alphanumeric:
            return "few letters and digits", f"{alphanumeric:.0%}"
        encoded = sum(len(match) for match in ENCODED.findall(text)) / max(1, len(text))
        if encoded > params.max_encoded:
            return "encoded data", f"{encoded:.0%}"
        if params.parses and not parses(text, language):
            return "does not parse", language
        if self._licenses and (license_id or "none") not in self._licenses:
            return "license", license_id or "none"
        return None


def parses(text: str, language: str) -> bool:
    """Whether Python or JSON parses; other languages do."""
    try:
        if language == "python":
            with warnings.catch_warnings():  # about the file's own escapes and comparisons
                warnings.simplefilter("ignore")
                ast.parse(text)
        elif language == "json":
            json.loads(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
