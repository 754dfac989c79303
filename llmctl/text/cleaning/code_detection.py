"""Whether a text is source code, and in which language: by path, shebang, or what its lines look like."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

SUFFIXES = {
    ".py": "python", ".pyi": "python", ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++", ".cxx": "c++", ".hpp": "c++",
    ".cs": "c#", ".java": "java", ".kt": "kotlin", ".scala": "scala", ".go": "go", ".rs": "rust", ".swift": "swift",
    ".js": "javascript", ".mjs": "javascript", ".cjs": "javascript", ".jsx": "javascript", ".ts": "typescript",
    ".tsx": "typescript", ".php": "php", ".rb": "ruby", ".pl": "perl", ".pm": "perl", ".lua": "lua", ".r": "r",
    ".jl": "julia", ".hs": "haskell", ".ml": "ocaml", ".ex": "elixir", ".exs": "elixir", ".erl": "erlang",
    ".clj": "clojure", ".lisp": "lisp", ".el": "lisp", ".scm": "scheme", ".sh": "shell", ".bash": "shell",
    ".zsh": "shell", ".ps1": "powershell", ".sql": "sql", ".css": "css", ".scss": "css", ".m": "objective-c",
    ".f90": "fortran", ".f": "fortran", ".asm": "assembly", ".s": "assembly", ".zig": "zig", ".dart": "dart",
    ".vue": "javascript", ".proto": "protobuf", ".cmake": "cmake", ".gradle": "groovy", ".groovy": "groovy",
}  # fmt: skip
NAMES = {"makefile": "make", "dockerfile": "docker", "cmakelists.txt": "cmake", "rakefile": "ruby", "gemfile": "ruby"}
SHEBANG = re.compile(r"\A#!\s*/\S*?(?:env\s+)?(?:/?\S*/)?(?P<what>python|bash|sh|zsh|perl|ruby|node|php|lua)[\d.]*\b")
SHELLS = {"bash": "shell", "sh": "shell", "zsh": "shell", "node": "javascript"}
LINE = re.compile(
    r"""(?x)^\s*(?:
      (?:from\ [\w.]+\ )?import\ [\w{*"'].*                    # python, java, javascript
    | \#\s*(?:include|define|ifdef|ifndef|endif|pragma)\b.*
    | (?:async\ )?def\ \w+\s*\(.*:?\s*$ | class\ \w+\s*[(:{].* | @\w+(?:\.\w+)*(?:\(.*\))?\s*$
    | (?:(?:el)?if|while|for|with|try|except|elif|else|finally|switch|match)\b.*[:{]\s*$
    | (?:public|private|protected|static|export|extern|const|let|var|func|fn|function|struct|enum|impl|package|use
        |using|namespace|typedef|interface|trait|module|unsigned|void|int|char|double|float|bool|pub|mut)\b.*[;{(=,]\s*$
    | (?:return|raise|throw|yield|break|continue|pass|assert|delete)\b[^.!?]*;?\s*$
    | [\w.\[\]*&>"'-]+\s*(?:[+\-*/|&^%]|<<|>>|:)?=(?!=)\s*\S.*
    | [\w.:>-]+\(.*\)\s*[;{:]?\s*$
    | .*[;{}]\s*$ | [)\]}]+[;,)]*\s*$
    | (?://|/\*|\*/|\*\ |\#!|--\ |<!--|<\?php).*
    | (?:SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP)\ .*(?:FROM|INTO|SET|TABLE|VALUES).*
    | (?:if|elif|while)\ \[+\ .*\ \]+.* | (?:fi|done|esac|end|then|do)\s*;?\s*$ | echo\ .* | \$\{?\w+.*
    )"""
)
COMMENT = re.compile(r"^\s*(?:#(?!#)|//|\*|/\*|--|;|%)")
DOCSTRING = re.compile(r"^[ \t]*[rbuf]?(\"{3}|'{3}).*?\1[ \t]*$", re.MULTILINE | re.DOTALL)
SHARE = 0.5
"""Share of the lines that must look like code, comments left aside."""


def by_path(path: str) -> str:
    """The programming language of a file's name, "" if it tells none."""
    name = PurePosixPath(path.split("#")[0]).name.lower()
    return NAMES.get(name) or SUFFIXES.get(PurePosixPath(name).suffix, "")


def by_shebang(text: str) -> str:
    """The language of the interpreter in the first line, "" if there is none."""
    match = SHEBANG.match(text)
    return SHELLS.get(match["what"], match["what"]) if match else ""


def looks_like_code(text: str) -> bool:
    """Whether at least half of the lines look like code; nothing of less than 2 such lines, but for `;` and `{`."""
    lines = [line for line in DOCSTRING.sub("", text).splitlines()[:400] if line.strip()]
    judged = [line for line in lines if not COMMENT.match(line)] or lines
    hits = sum(LINE.match(line) is not None for line in judged)
    if not judged or hits / len(judged) < SHARE:
        return False
    return hits >= 2 or any(sign in text for sign in ("{", "};", "();", "= ", "SELECT ", "import "))
