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
LOOSE = re.compile(
    rf"(?:the\s)?(?:terms of the )?(?P<id>{ID}"
    r"|(?:[AL]?GPL|Apache|BSD|MIT|MPL|EPL|EUPL|CDDL|CC0|CC-BY|Artistic|X11|Expat|SSPL)"
    r"(?:[ -]?v?\d[\w.]*\w|[ -]?v?\d)?(?:-[\w.+-]*\w)?)(?!\w)"
)
"""A further licence of a list, which need not be named by its id: `MIT/GPL`, `MIT, Apache 2.0`."""
JOINT = re.compile(
    r"[\"']?(?:\slicen[cs]es?)?\s?(?:[<(][^<>()]{0,120}[>)]\s?)?"
    r"(?P<sign>[/|]|[,;&+])?\s?(?P<word>and/or\b|and\b|or\b)?\s?(?:under\s)?[\"']?",
    re.IGNORECASE,
)
"""What may stand between two licences of a list; one of the groups has matched where it is one."""
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
    named = [
        (match.start(), n, spdx, match.end())
        for n, (spdx, phrase) in enumerate(PHRASES)
        if (match := phrase.search(plain))
    ]
    if note := NOTE.search(lines):
        named.append((note.start(), len(PHRASES), _expression(note["id"]), note.end()))
    if not named:
        return ""
    _, _, first, end = min(named)
    return _listed(first, plain, end)


def _listed(first: str, plain: str, end: int) -> str:
    """The expression of a list that begins with `first`, which ends at `end` of `plain`: all of it, never one alone.

    A slash is a choice, as in Cargo's older manifests. What commas mean the `and` or `or` among them says; without one
    every licence counts.
    """
    groups, joints = [[first]], []
    while (joint := JOINT.match(plain, end)) and (joint["sign"] or joint["word"]):
        if not (found := _named_at(plain, joint.end())):
            break
        spdx, end = found
        if joint["sign"] in ("/", "|"):
            groups[-1].append(spdx)
            continue
        groups.append([spdx])
        joints.append({"or": "OR", "": ""}.get((joint["word"] or "").lower(), "AND"))
    told = next(filter(None, joints), "AND")
    joints = [joint or told for joint in joints]
    parts = [" OR ".join(dict.fromkeys(group)) for group in groups]
    if "AND" in joints:
        parts = [f"({part})" if " OR " in part else part for part in parts]
    return parts[0] + "".join(f" {joint} {part}" for joint, part in zip(joints, parts[1:], strict=True))


def _named_at(plain: str, at: int) -> tuple[str, int] | None:
    """The licence whose name stands at `at`, and where it ends."""
    if match := LOOSE.match(plain, at):
        return "-".join(match["id"].split()), match.end()
    at += len(article[0]) if (article := re.compile("the ", re.IGNORECASE).match(plain, at)) else 0
    return next(((spdx, match.end()) for spdx, phrase in PHRASES if (match := phrase.match(plain, at))), None)


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
