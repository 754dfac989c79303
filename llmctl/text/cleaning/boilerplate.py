"""The steps `boilerplate` and `repeated-lines`: lines that belong to the page and not to its text."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from llmctl.text.cleaning.kinds import Routed, with_text
from llmctl.text.cleaning.params import BoilerplateParams, RepeatedLinesParams
from llmctl.text.cleaning.pii import masked
from llmctl.text.cleaning.step import Drop, Finding, Noted, Outcome, Resolution, Signature, Signatures
from llmctl.text.documents import Document

LINES = {
    "cookies": r"(?=.*\bcookies?\b).*\b(?:we use|uses?|using|accept|consent|agree|preferences|settings|policy|reject|"
    r"personali[sz]e|wir verwenden|utilis(?:e|ons)|akzeptieren|utilizamos)\b.*",
    "rights": r"(?:copyright\s*)?(?:©|\(c\)|copyright)\s*(?:\d{4}|by\b).{0,120}|.{0,80}\ball rights reserved\.?",
    "links": r"(?:(?:privacy|cookie)s? policy|terms (?:of (?:use|service)|(?:and|&) conditions)|contact us|about us"
    r"|site ?map|impressum|datenschutz|imprint|legal notice)(?:\s*[|·•/–-]\s*.{0,120})?",
    "navigation": r"(?:skip to (?:main )?content|back to top|toggle navigation|main menu|menu|home|search|search\.{3}"
    r"|next (?:page|post|article)|previous (?:page|post|article)|(?:«|←)?\s*previous|next\s*(?:»|→)?|breadcrumbs?)",
    "trail": r"\w[\w &'’-]{0,30}(?:\s*[>»›]\s*\w[\w &'’-]{0,40}){2,}",
    "bar": r"\w[\w &'’-]{0,24}(?:\s*[|·•]\s*\w[\w &'’-]{0,24}){2,}",
    "newsletter": r".{0,60}\b(?:sign up|subscribe)\b.{0,40}\b(?:newsletter|mailing list|updates|inbox)\b.{0,60}",
    "account": r"(?:log ?in|sign ?in|sign ?up|register|log ?out|subscribe|create (?:an )?account|my account)"
    r"(?:\s*(?:[|·•/]|or|to|for)\s*.{0,60})?",
    "sharing": r"(?:share|tweet|pin|like|follow)(?: (?:this|us|on|via|it))*(?: (?:article|page|post|story))?"
    r"(?: (?:on|via|with) )?(?:\s*(?:facebook|twitter|x|linkedin|pinterest|whatsapp|reddit|instagram"
    r"|e-?mail|,|and|\|))*",
    "advertisement": r"advertisements?|sponsored(?: content)?|story continues below.{0,30}"
    r"|read (?:more|next|also)(?:\W.{0,80})?|related (?:articles|posts|stories)|you (?:may|might) also like.{0,40}"
    r"|(?:leave a )?(?:reply|comment)s?|\d+ comments?",
}
RULES = tuple((what, re.compile(pattern, re.IGNORECASE)) for what, pattern in LINES.items())
LONGEST = 300
"""A longer line is text, whatever words it holds."""
MENU_WORDS = 4
MENU_END = re.compile(r"[.!?:;,\"'”’)\]…。？！]\s*\Z")
MARKED = re.compile(r"\s*(?:[-*+#>|`~]|\d+[.)])")
PARTS = {"line": "\n", "paragraph": "\n\n"}


class Boilerplate(Routed):
    """Removes lines that look like navigation, cookie bars, notices or buttons, and menus: runs of short lines."""

    name = "boilerplate"

    def __init__(self, params: BoilerplateParams, seed: int) -> None:
        super().__init__(params)
        own = tuple(("pattern", re.compile(pattern)) for pattern in params.patterns)
        self._rules = (*RULES, *own)
        self._menus = params.menus

    def clean(self, document: Document) -> Outcome:
        """The document without those lines; dropped if nothing else is left."""
        removed: Counter[str] = Counter()
        lines = document.text.split("\n")
        reasons = [self._reason(line) for line in lines]
        for start, stop in _menus(lines, reasons, self._menus):
            reasons[start:stop] = ["menu"] * (stop - start)
        kept = [line for line, reason in zip(lines, reasons, strict=True) if not reason]
        removed.update(reason for reason in reasons if reason)
        if not removed:
            return document
        text = "\n".join(kept)
        if not text.strip():
            return Drop("nothing but boilerplate")
        return Noted(with_text(document, _closed(text)), removed)

    def _reason(self, line: str) -> str:
        stripped = line.strip()
        if not stripped or len(stripped) > LONGEST:
            return ""
        return next((what for what, rule in self._rules if rule.fullmatch(stripped)), "")


def _menus(lines: list[str], reasons: list[str], least: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of at least `least` short lines that end no sentence and begin no list."""
    start = None
    for place, line in enumerate([*lines, "The end."]):
        stripped = line.strip()
        short = 0 < len(stripped.split()) <= MENU_WORDS and len(stripped) <= 30
        item = short and not MENU_END.search(stripped) and not MARKED.match(line) and any(map(str.isalpha, stripped))
        if item or (place < len(reasons) and reasons[place]):
            start = place if start is None else start
        else:
            if start is not None and place - start >= least:
                yield start, place
            start = None


def _closed(text: str) -> str:
    """Without the empty lines that taking lines away has left side by side or at the ends."""
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


class RepeatedLines(Routed):
    """Removes lines, or paragraphs, that many documents of a source share."""

    name = "repeated-lines"

    def __init__(self, params: RepeatedLinesParams, seed: int) -> None:
        super().__init__(params)
        self._params = params
        self._join = PARTS[params.unit]

    def signatures(self, document: Document) -> Iterable[Signature]:
        """A key for each different line, and one for the document itself, to count the documents of its source."""
        if not self.touches(document):
            return
        place = self._place(document)
        yield _key(place, ""), place.encode()
        for part in {part for part in map(str.strip, document.text.split(self._join)) if self._counts(part)}:
            yield _key(place, part), place.encode() + b"\0" + part.encode("utf-8", "surrogatepass")[:400]

    def match(self, signatures: Signatures) -> Iterable[Finding]:
        """(key, documents, source, beginning of the line, first document) of what may be repeated often enough."""
        for key, refs, payloads in signatures.groups():
            place, _, part = payloads[0].partition(b"\0")
            if not part or len(refs) >= self._params.min_documents:
                yield key, len(refs), place.decode(), part.decode("utf-8", "replace")[:80], min(refs)

    def resolve(self, findings: Iterator[Finding]) -> Resolution:
        """The keys of lines that go, and for `keep_first` the documents that keep them."""
        sizes: dict[str, int] = {}
        lines: list[Finding] = []
        for finding in findings:
            if finding[3]:
                lines.append(finding)
            else:
                sizes[finding[2]] = finding[1]
        gone = [line for line in lines if line[1] >= self._params.min_share * sizes[line[2]]]
        verdicts: dict[int, list[int]] = {}
        for key, _, _, _, first in gone if self._params.keep_first else ():
            verdicts.setdefault(first, []).append(key)
        most = sorted(gone, key=lambda line: (-line[1], line[3]))[:20]
        facts = {"lines": len(gone), "most_frequent": [[masked(line[3]), line[1]] for line in most]}
        return Resolution(verdicts.items(), sorted(line[0] for line in gone), facts)

    def filter(self, document: Document, verdict: Any, shared: Any) -> Outcome:
        """The document without the repeated lines; dropped if it has no others."""
        if not shared or not self.touches(document):
            return document
        gone = self._set(shared) - frozenset(verdict or ())
        place = self._place(document)
        parts = document.text.split(self._join)
        kept = [part for part in parts if not self._counts(part.strip()) or _key(place, part.strip()) not in gone]
        if len(kept) == len(parts):
            return document
        text = self._join.join(kept)
        if not text.strip():
            return Drop("nothing but repeated lines")
        return Noted(with_text(document, _closed(text)), {f"{self._params.unit}s": len(parts) - len(kept)})

    def _set(self, shared: list[int]) -> frozenset[int]:
        """The shared keys as a set, made once."""
        if getattr(self, "_shared", None) is not shared:
            self._shared, self._keys = shared, frozenset(shared)
        return self._keys

    def _counts(self, part: str) -> bool:
        return len(part) >= self._params.min_chars and any(map(str.isalnum, part))

    def _place(self, document: Document) -> str:
        return place_of(document) if self._params.within == "source" else ""


def place_of(document: Document) -> str:
    """What documents are compared within: the site of a page, the folder or the file of rows of others."""
    if url := document.meta.get("url"):
        return urlsplit(str(url)).netloc
    source = document.source
    return str(PurePosixPath(source).parent) if "/" in source else source


def _key(place: str, part: str) -> int:
    digest = hashlib.blake2b(f"{place}\0{part}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
