"""`llmctl-plugin.json`: what a plugin's stages promised when they were last recorded, and examples to test them with.

A default is part of no action key, so a changed one would let old results pass for new ones unless `rev` rises with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.errors import InputError, StageError
from llmctl.stage import Stage
from llmctl.stage_check import nested_models

if TYPE_CHECKING:
    from pydantic import BaseModel

NAME = "llmctl-plugin.json"
FORMAT = 1


@dataclass
class PluginFile:
    """The file of one distribution. `examples` and `unread` are the author's, `recorded` is written by `--record`."""

    path: Path
    distribution: str
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By stage: `{"params": {…}, "inputs": {port: type or path}}`."""
    unread: dict[str, dict[str, str]] = field(default_factory=dict)
    """By stage: parameters that no example makes `run` read, each with the reason."""
    recorded: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage: what `describe` gave."""

    @classmethod
    def read(cls, path: Path) -> PluginFile:
        """The file at `path`; InputError says what is wrong with it."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"{path} is no valid JSON: {error}") from None
        if not isinstance(raw, dict) or raw.get("llmctl-plugin") != FORMAT:
            raise InputError(f'{path} does not begin with "llmctl-plugin": {FORMAT}', hint="is it another file?")
        known = {"llmctl-plugin", "distribution", "examples", "unread", "recorded"}
        if unknown := sorted(set(raw) - known):
            raise InputError(f"{path}: unknown key `{unknown[0]}`", hint=f"known: {', '.join(sorted(known))}")
        for name in ("examples", "unread", "recorded"):
            if not isinstance(raw.setdefault(name, {}), dict):
                raise InputError(f"{path}: `{name}` is no object", hint="it has an entry for each stage")
        for name, (fits, what) in SHAPES.items():
            for stage, value in raw[name].items():
                if not fits(value):
                    raise InputError(f"{path}: {name}.{stage} is no {what[0]}", hint=what[1])
        if not isinstance(raw.get("distribution"), str) or not raw["distribution"]:
            raise InputError(f"{path}: `distribution` is no text", hint="it names the distribution that has the stages")
        return cls(path, raw["distribution"], raw["examples"], raw["unread"], raw["recorded"])

    def mentioned(self) -> dict[str, list[str]]:
        """By stage: the sections of the file that have something about it."""
        found: dict[str, list[str]] = {}
        for section in SHAPES:
            for stage in getattr(self, section):
                found.setdefault(stage, []).append(section)
        return found

    def write(self) -> None:
        """Write the file; its order is fixed, so that a difference is one of content. StageError if that fails."""
        content = {
            "llmctl-plugin": FORMAT,
            "distribution": self.distribution,
            "examples": self.examples,
            "unread": self.unread,
            "recorded": {name: self.recorded[name] for name in sorted(self.recorded)},
        }
        text = json.dumps({name: value for name, value in content.items() if value != {}}, indent=2)
        try:
            self.path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise StageError(f"cannot write {self.path}: {error.strerror}", hint="give another --file") from error


def _are_examples(value: object) -> bool:
    return isinstance(value, list) and all(_is_example(example) for example in value)


def _is_example(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) <= {"params", "inputs"}
        and all(isinstance(part, dict) for part in value.values())
        and all(_is_bound(bound) for bound in value.get("inputs", {}).values())
    )


def _is_bound(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _are_reasons(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(reason, str) for reason in value.values())


def _is_record(value: object) -> bool:
    """Whether a value has the form of what `describe` gives."""
    return (
        isinstance(value, dict)
        and set(value) == {"rev", "outputs", "parameters"}
        and isinstance(value["rev"], int)
        and _are_reasons(value["outputs"])
        and isinstance(value["parameters"], dict)
        and all(isinstance(p, dict) and isinstance(p.get("affects"), str) for p in value["parameters"].values())
    )


SHAPES: dict[str, tuple[Callable[[object], bool], tuple[str, str]]] = {
    "examples": (_are_examples, ("list of {params, inputs}", "an input is a type that can be made, a path, or a list")),
    "unread": (_are_reasons, ("object of texts", "it has the reason for each parameter")),
    "recorded": (
        _is_record,
        ("record of a stage", "`llmctl plugins test --record` writes it; remove it to begin anew"),
    ),
}
"""By section: whether what it has about one stage can be used, and what that should be, with a hint."""


def describe(stage: Stage) -> dict[str, Any]:
    """What a stage promises: its revision, its outputs, and every parameter with its default and part in the keys."""
    outputs = {port: out.type or f"as {out.same_as}" for port, out in stage.outputs.items()}
    parameters = dict(sorted(_parameters(stage.load_params())))
    return {"rev": stage.rev, "outputs": outputs, "parameters": parameters}


def _parameters(model: type[BaseModel], prefix: str = "", affects: str = "output") -> Iterator[tuple[str, Any]]:
    from pydantic import BaseModel
    from pydantic_core import to_jsonable_python

    for name, info in model.model_fields.items():
        extra = info.json_schema_extra
        # What is below a parameter that affects nothing affects nothing either.
        part = str(extra.get("affects", "output")) if isinstance(extra, dict) else "output"
        part = affects if affects == "nothing" else part
        # A key holds only what differs from a nested model's own defaults, so those count like ours.
        nested = list(nested_models(info.annotation))
        if len(nested) == 1:
            yield from _parameters(nested[0], f"{prefix}{name}.", part)
        entry: dict[str, Any] = {"affects": part}
        if info.is_required():
            entry["required"] = True
        else:
            default = info.get_default(call_default_factory=True, validated_data={})
            whole = not isinstance(default, BaseModel)
            entry["default"] = to_jsonable_python(default, fallback=repr) if whole else _changes(default)
        yield prefix + name, entry


def _changes(default: BaseModel) -> Any:
    """A nested default by what differs from its class's own; those have entries of their own."""
    return default.model_dump(mode="json", exclude_defaults=True)


def breaches(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two descriptions of a stage so that cached results no longer fit, a phrase each."""
    found = []
    before, now = old.get("parameters", {}), new["parameters"]
    for name, entry in before.items():
        if name not in now:
            if entry.get("affects") != "nothing":
                found.append(f"the parameter `{name}` is gone")
        elif entry.get("affects") == "nothing":
            if now[name]["affects"] != "nothing":
                found.append(f"`{name}` affected nothing and now affects {now[name]['affects']}")
        elif not entry.get("required") and entry.get("default") != now[name].get("default"):
            default = "no default" if now[name].get("required") else json.dumps(now[name]["default"])
            found.append(f"the default of `{name}` went from {json.dumps(entry.get('default'))} to {default}")
    outputs = old.get("outputs", {})
    for port in sorted(set(outputs) | set(new["outputs"])):
        was, becomes = outputs.get(port), new["outputs"].get(port)
        if was != becomes:
            found.append(f"the output `{port}` went from {was or 'nothing'} to {becomes or 'nothing'}")
    return found


def compare(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> tuple[str, str]:
    """(`ok` or `failed`, why) of a stage against what was recorded of it."""
    record = "record it: llmctl plugins test --record"
    if old is None:
        return "failed", f"the stage is not recorded; {record}"
    if new["rev"] < old["rev"]:
        return "failed", f"rev went back from {old['rev']} to {new['rev']}, to keys that older results have"
    found = breaches(old, new)
    if new["rev"] > old["rev"]:
        return "ok", f"rev {old['rev']} → {new['rev']}; {record}"
    if found:
        return "failed", f"{'; '.join(found)}: raise rev to {old['rev'] + 1}, or old results pass for new ones"
    return "ok", "" if old == new else f"what changed leaves old results valid; {record}"
