"""Which licence a source file names: SPDX tags, notes such as `@license MIT`, and phrases of the common texts."""

from __future__ import annotations

import re
from collections.abc import Set

HEAD = 6000
"""Characters of a file that are searched."""
TAG = re.compile(r"SPDX-License-Identifier:\s*(?P<id>[\w.\-+() ]+?)\s*(?:\*/|-->|$)", re.MULTILINE)
ID = (
    r"(?:MIT|ISC|0BSD|Zlib|Unlicense|Apache-2\.0|MPL-2\.0|BSD-[23]-Clause"
    r"|(?:A?GPL-[23]\.0|LGPL-(?:2\.1|3\.0))(?:-only|-or-later|\+)?)(?![\w.+-]*\w)"
)
FURTHER = (
    rf"(?:\s(?:and|or)\s(?:the\s)?{ID}|\s(?:AND|OR)\s(?:[\w.+-]*[\w+]|\([\w.+\-\s]*\))"
    r"|\s(?i:with)\s[\w.-]+-(?:exception|note)(?:-[\d.]*\d)?)"
)
"""What an expression goes on with. In small letters it may be prose, so that only a known id is taken."""
NOTE = re.compile(
    r"(?i:licen[cs]e[ds]?)(?:__)?(?!\n(?!under\b))(?:\sunder)?(?:\sthe)? ?[:=]?\s?[\"']?"
    rf"(?P<id>\(?{ID}{FURTHER}*(?:\){FURTHER}+)?)"
)
"""A licence named by its SPDX id, or an expression: `@license MIT`, `License: MIT OR ISC`, `__license__ = "MIT"`.

A line break alone joins nothing: `see LICENSE`, and `MIT students` on the next line.
"""
TEXTS = (
    ("AGPL-3.0", r"GNU Affero General Public License"),
    ("LGPL-3.0", r"GNU Lesser General Public License.{0,200}version 3"),
    ("LGPL-2.1", r"GNU (?:Lesser|Library) General Public License"),
    ("GPL-3.0", r"GNU General Public License.{0,200}version 3"),
    ("GPL-2.0", r"GNU General Public License"),
    ("Apache-2.0", r"Apache License,? Version 2\.0|apache\.org/licenses/LICENSE-2\.0"),
    ("MPL-2.0", r"Mozilla Public License,? v(?:ersion|\.) ?2\.0"),
    ("EPL-2.0", r"Eclipse Public License(?: -)? v(?:ersion)? ?\.?2\.0"),
    ("BSL-1.0", r"Boost Software License"),
    ("Unlicense", r"free and unencumbered software released into the public domain"),
    ("CC0-1.0", r"CC0 1\.0|Creative Commons Zero"),
    ("0BSD", r"Permission to use, copy, modify, and(?:/or)? distribute this software for any purpose with or"
     r" without fee is hereby granted\."),
    ("HPND", r"Permission to use, copy, modify,? and distribute this software and its documentation for any purpose"),
    ("ISC", r"Permission to use, copy, modify, and(?:/or)? distribute this software for any purpose with"),
    ("Zlib", r"This software is provided .as-is., without any express or implied warranty\.\s*In no event"),
    ("WTFPL", r"DO WHAT THE FUCK YOU WANT TO PUBLIC LICENSE"),
    ("MIT-0", r"MIT No Attribution"),
    ("MIT", r"Permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("MIT", r"under the (?:terms of the )?MIT Licen[cs]e"),
    ("BSD-3-Clause", r"Redistribution and use in source and binary forms.{0,1500}(?:Neither the name|names? of)"),
    ("BSD-2-Clause", r"Redistribution and use in source and binary forms"),
    ("BSD-3-Clause", r"(?:BSD-style|BSD 3-Clause|New BSD|Modified BSD) licen[cs]e"),
    ("PSF-2.0", r"Licensed to (?:the )?PSF under a Contributor Agreement|Python Software Foundation License"),
    ("proprietary", r"All rights reserved\W{0,5}(?:Unauthori[sz]ed copying|Confidential|Proprietary)"),
    ("proprietary", r"Proprietary and confidential"),
)  # fmt: skip
PHRASES = tuple((spdx, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for spdx, pattern in TEXTS)
MARKS = re.compile(r"^[\s#*/;%!\-]+", re.MULTILINE)
WORDS = ("licen", "permission", "redistribut", "reserved", "proprietary", "public domain", "as-is")
"""One of these is in whatever a phrase or note finds."""


def license_of(text: str) -> str:
    """The SPDX expression that the file's tag, text or note names first, `proprietary`, or "" if it names none."""
    head = text[:HEAD]
    if tag := TAG.search(head):
        return tag["id"].strip()
    lowered = head.lower()
    if not any(word in lowered for word in WORDS):
        return ""
    lines = "\n".join(filter(None, (" ".join(MARKS.sub(" ", line).split()) for line in head.split("\n"))))
    plain = lines.replace("\n", " ")
    # The first place decides: the text of the MPL names the GPL further down, and so do lists of bundled files.
    named = [(match.start(), n, spdx) for n, (spdx, phrase) in enumerate(PHRASES) if (match := phrase.search(plain))]
    if note := NOTE.search(lines):
        named.append((note.start(), len(PHRASES), _expression(note["id"])))
    return min(named)[2] if named else ""


def _expression(found: str) -> str:
    """A note's id as SPDX writes it: operators in capitals, no bracket that is not closed."""
    words = [word for word in found.split() if word != "the"]
    words = [word.upper() if word in ("and", "or", "with") else word for word in words]
    told = " ".join(words)
    return told if told.count("(") == told.count(")") else told.removeprefix("(")


def allowed(expression: str, licenses: Set[str]) -> bool:
    """Whether an SPDX expression can be met with `licenses`: one side of OR is enough, AND needs both and binds closer.

    `A WITH exception` is a licence of its own. An expression that cannot be read is allowed only if it stands there.
    """
    if expression in licenses:
        return True
    words = re.findall(r"[()]|[^\s()]+", expression)
    met = _either(words, licenses)
    return met and not words


def _either(words: list[str], licenses: Set[str]) -> bool:
    """Whether what `words` begin with is allowed; takes it off them."""
    met = _both(words, licenses)
    while words and words[0].upper() == "OR":
        del words[0]
        met = _both(words, licenses) or met  # the right side is always read
    return met


def _both(words: list[str], licenses: Set[str]) -> bool:
    met = _single(words, licenses)
    while words and words[0].upper() == "AND":
        del words[0]
        met = _single(words, licenses) and met
    return met


def _single(words: list[str], licenses: Set[str]) -> bool:
    if not words:
        words.append("")  # what is missing is left over, so that the whole is not read
        return False
    word = words.pop(0)
    if word == "(":
        met = _either(words, licenses)
        closed = words[:1] == [")"]
        del words[:1]
        return met and closed
    if len(words) > 1 and words[0].upper() == "WITH":
        word = f"{word} WITH {words[1]}"
        del words[:2]
    return word in licenses
