"""The text of an input → what it refers to."""

from __future__ import annotations

import re
from pathlib import Path

from llmctl.spec.hub_address import FORM, BadAddress, is_hub, parse_hub
from llmctl.spec.nodes import Scalar
from llmctl.spec.resolved import IdRef, NameRef, PathRef, Ref, SourceRef, StageRef, StdinRef

_ID = re.compile(r"sha256:[0-9a-f]{8,64}\Z")
_NAMED = re.compile(r"(?P<name>[A-Za-z0-9][\w./-]*(\[[^\]]*\])?(\.[\w-]+)?)@(?P<tag>[\w.-]+)\Z")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_STAGE = re.compile(r"(?P<stage>[a-z][a-z0-9-]*(\[[^\]]*\])?)(\.(?P<port>[a-z][a-z0-9_-]*))?\Z")
_PATH_STARTS = ("./", "../", "/", "~/")


class NotAReference(ValueError):
    """What is wrong with a text: diagnostic code, message and hint."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


def parse_reference(node: Scalar, base: Path) -> Ref:
    """The reference that `node` writes; types are not known yet, a bare stage name has no port yet.

    The stage of a StageRef is as written: `sft`, one instance `sft[lr=3e-5]`, or all of them `sft[*]`. Relative paths
    become relative to `base`. Raises NotAReference.
    """
    text = node.text
    if text == "-":
        return StdinRef()
    if text.startswith("sha256:"):
        if not _ID.match(text):
            raise NotAReference("E102", f"`{text}` is no content id", "sha256: and 8 to 64 digits 0-9a-f")
        return IdRef(id=text)
    if text.startswith(_PATH_STARTS) or text in (".", "..") or _SCHEME.match(text):
        return PathRef(uri=outside(node, base), where=str(node.mark))
    if match := _NAMED.match(text):
        return NameRef(name=match["name"], tag=match["tag"])
    if text.startswith("sources."):
        return SourceRef(name=text.removeprefix("sources."))
    if match := _STAGE.match(text):
        return StageRef(stage=match["stage"], port=match["port"] or "")
    raise NotAReference("E102", f"`{text}` is no stage, source, path or artifact", f"a path starts with ./: ./{text}")


def outside(node: Scalar, base: Path) -> str:
    """What lies outside the store: the address of a model on the hub, or a path or glob as `located` gives it.

    Raises NotAReference.
    """
    if not is_hub(node.text):
        return located(node, base)
    try:
        return str(parse_hub(node.text))
    except BadAddress as bad:
        raise NotAReference("E104" if bad.known else "E102", str(bad), "" if bad.known else FORM) from None


def located(node: Scalar, base: Path) -> str:
    """A path or glob as it reads from `base`; one that was written elsewhere (`--set`) becomes absolute.

    Raises NotAReference for a scheme other than `file`.
    """
    text = node.text
    if match := _SCHEME.match(text):
        if match[0] != "file://":
            raise NotAReference("E104", f"`{match[0]}` is not supported yet by this version of llmctl", "use a path")
        text = text.removeprefix("file://")
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    if path.is_absolute():
        return str(path)
    return text if node.mark.text.base == base else str((node.mark.text.base / path).absolute())
