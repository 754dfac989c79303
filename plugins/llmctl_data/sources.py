"""Sources to pieces: which files there are, which entry of `sources` each belongs to, and how large ones are cut.

What cannot be a piece (a loop of links, an unknown format, a folder that may not be opened) is a reject at once. The
order of pieces is that of the files' names, those from URLs last; it depends on nothing else.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmctl import Artifact, InputError
from llmctl.text.datasets import split_files
from llmctl_data import remote
from llmctl_data.params import DataParams, SourceParams
from llmctl_data.readers.formats import CUT, PIECEMEAL, ending_of, format_of, known_endings, packing_of, rows_of
from llmctl_data.readers.listing import names
from llmctl_data.readers.piece import SPOOL, Piece, Reject
from llmctl_data.readers.streams import is_binary, is_url, mark_of

FEW = 20
"""With so many text files a whole file goes to one split, with fewer its pieces do."""
BLOCK = 8 << 20
DEFAULT = "files"
"""Name of the source of bound files that no entry of `sources` names."""


@dataclass
class Found:
    """All pieces in order, and what was rejected on the way."""

    pieces: list[Piece] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    hidden: int = 0
    spooled: bool = False
    """Whether the documents are of the stage's own making, with their splits and in their order."""
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the user says of each source: license, weight, limit."""


@dataclass(frozen=True)
class File:
    """A file with the entry of `sources` that it belongs to."""

    name: str
    path: str
    size: int
    entry: SourceParams | None


def find_files(inputs: Sequence[Artifact], params: DataParams) -> Found:
    """The pieces of everything bound and of every URL. InputError for an entry of `sources` that matches nothing."""
    found = Found()
    files = list(_bound(inputs, params, found))
    used = {id(file.entry) for file in files}
    for entry in params.sources:
        if is_url(entry.path):
            files += [File(name, path, size, entry) for name, path, size in remote.expand(entry.path)]
        elif id(entry) not in used:
            raise InputError(
                f"sources: `{entry.path}` matches none of the bound files",
                hint="bind files that it fits as input `files`, or give a URL",
            )
    known: list[tuple[File, str]] = []
    for file in files:
        format = (file.entry.format if file.entry and file.entry.format else "") or format_of(file.name)
        if format and file.entry and file.entry.rows == "record" and not rows_of(format, file.name):
            detail = f"rows: record asks for its rows, and {format} has none"
            hint = "narrow the pattern in sources, or set `format`"
            found.rejects.append(Reject(file.name, "no rows", detail, hint=hint))
        elif format:
            records = file.entry is not None and file.entry.rows == "record"
            known.append((file, rows_of(format, file.name) if records else format))
        else:
            detail = f"is of a type that cannot be read ({ending_of(file.name)})"
            hint = f"supported: {known_endings()}; choose files with a glob such as 'notes/**/*.md', or set `format`"
            found.rejects.append(Reject(file.name, f"unknown format {ending_of(file.name)}", detail, hint=hint))
    whole = sum(format in (*PIECEMEAL, "pdf", "html", "code") for _, format in known) >= FEW
    for file, format in known:
        found.sources.setdefault(_source_name(file.entry), _declared(file.entry))
        found.pieces += _cut(_piece(file, format, params, whole and format in PIECEMEAL), params.task_bytes)
    return found


def find_text(source: Artifact, params: DataParams) -> Found:
    """A piece for every file of a `dataset.text`, whose splits stay as they are."""
    found = Found(sources={"text": {}})
    options = {"max_document_bytes": params.max_document_bytes}
    for split, files in split_files(source.path).items():
        for part, path in enumerate(files):
            told = {**options, "split": split}
            size = path.stat().st_size
            found.pieces.append(Piece(path.name, str(path), "dataset.text", "text", size, part=part, options=told))
    return found


def find_spool(path: Path, name: str, params: DataParams) -> Found:
    """The piece for a file of documents that the stage itself has made."""
    options = {"max_document_bytes": params.max_document_bytes, "digest": ""}
    piece = Piece(name, str(path), SPOOL, name, path.stat().st_size, options=options)
    return Found([piece], spooled=True, sources={name: {}})


def _bound(inputs: Sequence[Artifact], params: DataParams, found: Found) -> Iterator[File]:
    for artifact in inputs:
        if artifact.path.is_dir():
            _faults(artifact.path, found)
    local = [entry for entry in params.sources if not is_url(entry.path)]
    for name, path in names(inputs):
        entry = next((entry for entry in local if fnmatch.fnmatchcase(name, entry.path)), None)
        try:
            yield File(name, str(path), path.stat().st_size, entry)
        except OSError as error:
            found.rejects.append(_unreadable(name, error))


def _faults(root: Path, found: Found) -> None:
    """Report what a walk through a directory leaves out: links to directories, broken links, closed directories."""

    def closed(error: OSError) -> None:
        found.rejects.append(_unreadable(os.path.relpath(error.filename or str(root), root), error))

    for folder, directories, files in os.walk(root, onerror=closed):
        here = Path(folder)
        visible = [name for name in directories if not name.startswith(".")]
        found.hidden += len(directories) - len(visible) + sum(name.startswith(".") for name in files)
        directories[:] = sorted(visible)
        for name in sorted([*visible, *(name for name in files if not name.startswith("."))]):
            path = here / name
            if fault := _fault(path, path.relative_to(root).as_posix(), root):
                found.rejects.append(fault)


def _fault(path: Path, name: str, root: Path) -> Reject | None:
    try:
        status = path.stat()
    except OSError as error:
        if not path.is_symlink():
            return _unreadable(name, error)
        try:
            target = str(path.readlink())
        except OSError:
            target = "?"
        reason = "link loop" if error.errno == 40 or _is_loop(path) else "broken link"
        return Reject(name, reason, f"is a link to {target} that leads nowhere", hint="remove the link")
    if stat.S_ISDIR(status.st_mode) and path.is_symlink():
        loop = root.resolve().is_relative_to(path.resolve()) or path.parent.resolve().is_relative_to(path.resolve())
        if loop:
            return Reject(name, "link loop", "is a link to a directory that it lies in; it is not followed")
        return Reject(
            name, "link to a directory", "is a link to a directory; it is not followed", hint="bind its target"
        )
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        return Reject(name, "no regular file", "is a device, a socket or a pipe")
    return None


def _is_loop(path: Path) -> bool:
    """Whether links lead back to where they began."""
    seen = set()
    while path.is_symlink():
        if path in seen:
            return True
        seen.add(path)
        path = Path(os.path.normpath(path.parent / path.readlink()))
    return False


def _unreadable(name: str, error: OSError) -> Reject:
    return Reject(name, "unreadable", f"cannot be read: {error.strerror or error}", hint="check its permissions")


def _source_name(entry: SourceParams | None) -> str:
    return DEFAULT if entry is None else entry.name or entry.path


def _declared(entry: SourceParams | None) -> dict[str, Any]:
    """What the user says of a source, for the audit."""
    if entry is None:
        return {}
    told = {"license": entry.license, "language": entry.language, "limit": entry.limit}
    weight = {"weight": entry.weight} if entry.weight != 1 else {}
    return {key: value for key, value in told.items() if value is not None} | weight


def _piece(file: File, format: str, params: DataParams, whole: bool) -> Piece:
    entry = file.entry
    fields = {"text": params.column, **params.fields, **(entry.fields if entry else {})}
    options: dict[str, Any] = {
        "fields": fields,
        "piece_chars": params.piece_chars,
        "max_document_bytes": params.max_document_bytes,
        "encoding": (entry.encoding if entry else None) or params.encoding,
        "html": params.html,
    }
    if entry is not None:
        meta = {"license": entry.license, "language": entry.language, "corpus": entry.name}
        options["meta"] = {key: value for key, value in meta.items() if value is not None}
        options |= {"rows": entry.rows, "weight": entry.weight, "limit": entry.limit}
    return Piece(file.name, file.path, format, _source_name(entry), file.size, whole=whole, options=options)


def _cut(piece: Piece, task_bytes: int) -> list[Piece]:
    """The parts of a large file: at line ends, between row groups; all others are one piece."""
    if piece.size <= task_bytes or is_url(piece.path) or piece.options.get("limit"):
        return [piece]
    try:
        if piece.format == "parquet":
            return _row_groups(piece, task_bytes)
        if piece.format in CUT and not packing_of(piece.name):
            return _line_ranges(piece, task_bytes)
    except OSError:
        return [piece]  # its reader says what is wrong
    return [piece]


def _line_ranges(piece: Piece, task_bytes: int) -> list[Piece]:
    """The parts of a file of lines; the first knows the digest of the whole, which this pass gives for nothing."""
    digest = hashlib.sha256()
    ranges: list[Piece] = []
    start, first, lines, position = 0, 1, 0, 0
    with Path(piece.path).open("rb") as file:
        while block := file.read(BLOCK):
            if position == 0 and (is_binary(block[:8192]) or mark_of(block)[0] not in ("", "utf-8")):
                return [piece]
            digest.update(block)
            counted = 0
            while start + task_bytes < position + len(block):
                at = block.find(b"\n", max(counted, start + task_bytes - 1 - position))
                if at < 0:
                    break
                lines += block.count(b"\n", counted, at + 1)
                counted = at + 1
                ranges.append(replace(piece, start=start, end=position + at + 1, first=first, part=len(ranges)))
                start, first = position + at + 1, lines + 1
            lines += block.count(b"\n", counted)
            position += len(block)
    if start < position or not ranges:
        ranges.append(replace(piece, start=start, end=position, first=first, part=len(ranges)))
    ranges[0] = replace(ranges[0], options={**piece.options, "digest": f"sha256:{digest.hexdigest()}"})
    return [replace(part, size=(part.end or 0) - part.start) for part in ranges]


def _row_groups(piece: Piece, task_bytes: int) -> list[Piece]:
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(piece.path)
    except pyarrow.ArrowException:
        return [piece]
    ranges: list[Piece] = []
    start, first, rows, size = 0, 1, 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        rows += group.num_rows
        size += sum(group.column(number).total_compressed_size for number in range(group.num_columns))
        if size >= task_bytes or index == metadata.num_row_groups - 1:
            ranges.append(replace(piece, start=start, end=index + 1, first=first, part=len(ranges), size=size))
            start, first, size = index + 1, rows + 1, 0
    return ranges or [piece]
