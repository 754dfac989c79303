"""`hf://ORG/NAME@REVISION`: a model on the Hugging Face hub, as a text and as a value."""

from __future__ import annotations

import re
from dataclasses import dataclass

SCHEME = "hf://"
FORM = "hf://ORG/NAME@REVISION"
_ADDRESS = re.compile(
    r"hf://(?P<repo>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)"
    r"(@(?P<revision>[A-Za-z0-9][\w.-]*|refs/pr/\d+))?(\?(?P<option>\w+))?\Z",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_OTHERS = ("hf://datasets/", "hf://spaces/")


class BadAddress(ValueError):
    """A text that begins with `hf://` and names no model; `known` if it is something that may come later."""

    def __init__(self, message: str, *, known: bool = False) -> None:
        super().__init__(message)
        self.known = known


@dataclass(frozen=True, kw_only=True)
class HubAddress:
    """One model repository at one revision."""

    repo: str
    revision: str = ""
    """A branch, a tag or a commit; empty for the repository's main branch."""
    allow_pickle: bool = False
    """`?allow_pickle`: weights that exist as a pickle only are read all the same, and become safetensors."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{revision}{'?allow_pickle' if self.allow_pickle else ''}"

    @property
    def is_commit(self) -> bool:
        """Whether it names a commit, so that it can never mean anything else."""
        return _COMMIT.match(self.revision) is not None


def is_hub(text: str) -> bool:
    """Whether a text is meant as the address of something on the hub."""
    return text.startswith(SCHEME)


def parse_hub(text: str) -> HubAddress:
    """The address that a text writes; raises BadAddress."""
    for other in _OTHERS:
        if text.startswith(other):
            raise BadAddress(f"`{other}` is not supported yet by this version of llmctl", known=True)
    match = _ADDRESS.match(text)
    if match is None:
        raise BadAddress(f"`{text}` is no address of a model")
    if match["option"] not in (None, "allow_pickle"):
        raise BadAddress(f"`{text}` ends in `?{match['option']}`; the only option is `?allow_pickle`")
    return HubAddress(
        repo=match["repo"], revision=match["revision"] or "", allow_pickle=match["option"] == "allow_pickle"
    )
