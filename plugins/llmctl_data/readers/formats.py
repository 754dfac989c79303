"""Which format a file has, by the endings of its name."""

from __future__ import annotations

from functools import cache
from pathlib import PurePosixPath

from llmctl import UsageError
from llmctl.hookspecs import Reader

PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
FORMATS: dict[str, tuple[str, ...]] = {
    "txt": (".txt", ".text"),
    "markdown": (".md", ".markdown"),
    "html": (".html", ".htm", ".xhtml"),
    "pdf": (".pdf",),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
}
LANGUAGES: dict[str, str] = {
    ".py": "python", ".pyi": "python", ".ipynb": "jupyter", ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++",
    ".cxx": "c++", ".hpp": "c++", ".hh": "c++", ".cu": "cuda", ".java": "java", ".kt": "kotlin", ".scala": "scala",
    ".go": "go", ".rs": "rust", ".js": "javascript", ".mjs": "javascript", ".jsx": "javascript", ".ts": "typescript",
    ".tsx": "typescript", ".rb": "ruby", ".php": "php", ".pl": "perl", ".lua": "lua", ".r": "r", ".jl": "julia",
    ".swift": "swift", ".m": "objective-c", ".cs": "c#", ".fs": "f#", ".hs": "haskell", ".ml": "ocaml", ".ex": "elixir",
    ".erl": "erlang", ".clj": "clojure", ".lisp": "lisp", ".el": "lisp", ".sh": "shell", ".bash": "shell",
    ".zsh": "shell", ".ps1": "powershell", ".sql": "sql", ".css": "css", ".scss": "css", ".vue": "javascript",
    ".dart": "dart", ".zig": "zig", ".nim": "nim", ".f90": "fortran", ".f": "fortran", ".asm": "assembly",
    ".s": "assembly",
    ".tex": "tex", ".bib": "tex", ".rst": "restructuredtext", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml",
    ".ini": "ini", ".cfg": "ini", ".xml": "xml", ".proto": "protobuf", ".cmake": "cmake", ".tf": "hcl",
    ".dockerfile": "docker", ".makefile": "make", ".v": "verilog", ".vhd": "vhdl", ".sol": "solidity",
}  # fmt: skip
"""Endings of source code, and of what is kept like it: never repaired, never judged by the rules of prose.
Languages have the names that the step `code` gives them, in lower case."""
CODE_NAMES = {"makefile": "make", "dockerfile": "docker", "cmakelists.txt": "cmake", "rakefile": "ruby"}

RECORDS = (".jsonl", ".jsonl.gz", ".parquet")
"""Files of rows that labelled examples may come from, beside tables."""
TEXT, MARKDOWN = (".txt", ".txt.gz"), (".md", ".markdown", ".md.gz")
SUPPORTED = (*TEXT, *MARKDOWN, *RECORDS)
"""The endings that `llmctl init` looks for; `known_endings` has all."""
CUT = frozenset({"txt", "markdown", "jsonl"})
"""Formats of lines: a large file that is not packed is read in parts."""
ROWS = frozenset({"jsonl", "json", "csv", "tsv", "parquet", "xml", "html-tables"})
"""Formats of rows."""
PIECEMEAL = frozenset({"txt", "markdown"})
"""Formats of which one file may become several documents."""


def format_of(name: str) -> str:
    """The format of a file, "" if its name does not tell; one of a plugin's reader is called `reader:NAME`."""
    lower = PurePosixPath(name.lower()).name
    bare = unpacked(lower)
    if bare in CODE_NAMES:
        return "code"
    for reader in readers().values():
        if lower.endswith(reader.endings) or bare.endswith(reader.endings):
            return f"reader:{reader.name}"
    for format, endings in FORMATS.items():
        if bare.endswith(endings):
            return format
    return "code" if PurePosixPath(bare).suffix in LANGUAGES else ""


def rows_of(format: str, name: str) -> str:
    """The format by which a file is read as records; "" if it has no rows."""
    if format == "html":
        return "html-tables"
    if format == "code":
        return "xml" if language_of(name) == "xml" else ""
    return format if format in ROWS or format.startswith("reader:") else ""


def language_of(name: str) -> str:
    """The programming language of a source file."""
    bare = unpacked(PurePosixPath(name.lower()).name)
    return CODE_NAMES.get(bare) or LANGUAGES.get(PurePosixPath(bare).suffix, "unknown")


def unpacked(name: str) -> str:
    """The name without the ending of its compression."""
    suffix = PurePosixPath(name).suffix.lower()
    return name[: -len(suffix)] if suffix in PACKED else name


def packing_of(name: str) -> str:
    """How a file is compressed, "" if it is not."""
    return PACKED.get(PurePosixPath(name).suffix.lower(), "")


def ending_of(name: str) -> str:
    """The ending by which a file of unknown format is counted."""
    return PurePosixPath(name.lower()).suffix or "(no ending)"


def known_endings() -> str:
    """All endings that are read, for a hint."""
    shown = [ending for endings in FORMATS.values() for ending in endings]
    shown += [ending for reader in readers().values() for ending in reader.endings]
    return f"{', '.join(shown)}, source code, and each of them with {', '.join(PACKED)}"


@cache
def readers() -> dict[str, Reader]:
    """What plugins offer by the hook `register_readers`; UsageError for a name or an ending that two of them claim."""
    from llmctl.registry import get_registry

    found: dict[str, Reader] = {}
    claimed: dict[str, str] = {}
    for offered in get_registry().hook.register_readers():
        for reader in offered:
            clash = reader.name if reader.name in found else next((e for e in reader.endings if e in claimed), "")
            if clash:
                raise UsageError(
                    f"`{clash}` is claimed by two readers of plugins", hint="hide one plugin with LLMCTL_DISABLE"
                )
            found[reader.name] = reader
            claimed |= dict.fromkeys(reader.endings, reader.name)
    return found


def title_of(source: str) -> str:
    """What a person calls a source: the file's name without its endings."""
    name = PurePosixPath(source).name
    for ending in sorted(SUPPORTED, key=len, reverse=True):
        name = name.removesuffix(ending)
    return name or source
