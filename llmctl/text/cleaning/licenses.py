"""Which licence a source file names: SPDX tags, and phrases of the common texts."""

from __future__ import annotations

import re

HEAD = 6000
"""Characters of a file that are searched."""
TAG = re.compile(r"SPDX-License-Identifier:\s*(?P<id>[\w.\-+() ]+?)\s*(?:\*/|-->|$)", re.MULTILINE)
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
    ("ISC", r"Permission to use, copy, modify, and(?:/or)? distribute this software for any purpose with"),
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


def license_of(text: str) -> str:
    """The SPDX expression that the file's tag or text names, `proprietary`, or "" if it names none."""
    head = text[:HEAD]
    if tag := TAG.search(head):
        return tag["id"].strip()
    if "icen" not in head and "ermission" not in head and "edistribut" not in head and "eserved" not in head.lower():
        return ""
    plain = " ".join(MARKS.sub(" ", head).split())
    return next((spdx for spdx, phrase in PHRASES if phrase.search(plain)), "")
