"""What differs between two pre-images of a key, value by value: the one comparison behind `plan` and `why`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = {"with": "default", "env": "unset", "key_deps": "none", "machine": "any"}
"""Parts of a pre-image that are maps of values, and what a value is called that only one side has."""
SHOWN = 6
"""Files of a directory that are listed in text."""
PREFIXES = {"env": "env ", "plugin": "plugin "}
"""How a phrase names what belongs to some parts; the names of other values say enough."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One difference. For an input `before` and `after` are lists of ids, until somebody knows what they are called."""

    part: str
    """`stage`, `plugin`, `inputs` or one of `ABSENT`."""
    name: str = ""
    before: Any
    after: Any
    title: str = ""
    """What an input is bound to now."""
    files: tuple[str, ...] = ()
    """For an input: which of its files differ, if that is known: `changed a.md`, `new b.md`, `gone c.md`."""

    @property
    def what(self) -> str:
        """`with.lr`, `inputs.text`, `env.X`, `key_deps.click`, `machine.torch`, `plugin.rev`, `stage`."""
        return f"{self.part}.{self.name}" if self.name else self.part

    @property
    def phrase(self) -> str:
        """A few words for a table."""
        if self.part == "plugin" and self.name == "src":
            return "the plugin's source changed"
        if self.part != "inputs":
            named = f"{PREFIXES.get(self.part, '')}{self.name}" if self.name else self.part
            return f"{named} {_short(self.before, 40)} → {_short(self.after, 40)}"
        if len(self.before) == len(self.after) == 1:
            return f"input {self.name} changed ({self.before[0][7:15]} → {self.after[0][7:15]})"
        return f"input {self.name} changed ({len(self.before)} → {len(self.after)} artifacts)"

    @property
    def text(self) -> str:
        """A line for a person, and one with the files."""
        title = f" ({self.title})" if self.title else ""
        line = f"{self.what}{title} {_short(self.before, 60)} → {_short(self.after, 60)}"
        if not self.files:
            return line
        more = f", and {len(self.files) - SHOWN} more" if len(self.files) > SHOWN else ""
        return f"{line}\n    {', '.join(self.files[:SHOWN])}{more}"

    def to_json(self) -> dict[str, Any]:
        """`{what, before, after, files}`."""
        what = f"{self.what} ({self.title})" if self.title else self.what
        return {"what": what, "before": self.before, "after": self.after, "files": list(self.files)}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """Every difference, in the order in which they should be told; inputs only if `new` knows them."""
    if old.get("stage") != new.get("stage"):
        yield Change(part="stage", before=old.get("stage"), after=new.get("stage"))
    before, after = old.get("plugin") or {}, new.get("plugin") or {}
    for name in ("dist", "rev", "src"):
        if before.get(name) != after.get(name):
            yield Change(part="plugin", name=name, before=before.get(name), after=after.get(name))
    for part, absent in ABSENT.items():
        yield from _values(part, "", old.get(part) or {}, new.get(part) or {}, absent)
    if "inputs" in new:
        was, now = old.get("inputs") or {}, new["inputs"]
        for port in sorted(set(was) | set(now)):
            ids = list(was.get(port, ())), list(now.get(port, ()))
            if ids[0] != ids[1]:
                yield Change(part="inputs", name=port, before=ids[0], after=ids[1])


def _values(part: str, prefix: str, old: Mapping[str, Any], new: Mapping[str, Any], absent: str) -> Iterator[Change]:
    if old == new:
        return
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name, absent), new.get(name, absent)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _values(part, f"{prefix}{name}.", before, after, absent)
        elif before != after:
            yield Change(part=part, name=f"{prefix}{name}", before=before, after=after)


def _short(value: Any, most: int) -> str:
    text = str(value)
    return text if len(text) <= most else text[: most - 3] + "..."
