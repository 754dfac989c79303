"""The command line as the highest layer: `--set` in its forms, and the flags of a stage command."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, NamedTuple

from llmctl.spec.diagnostics import Mark, Report, SpecError, Text, did_you_mean, suggest
from llmctl.spec.fields import default_at, takes_text, types_at
from llmctl.spec.layers import at, merge_maps, option
from llmctl.spec.nodes import Map, Node, Scalar, parse
from llmctl.spec.nodes import Sequence as List
from llmctl.spec.placing import file_text, json_node, placed
from llmctl.spec.skeleton import FileModel, PipelineModel, SourceModel, StageModel
from llmctl.stage import SECTIONS

FIRST_RANK = 100  # profiles come before
Path = list[tuple[str | int, Mark]]
ParamsOf = Callable[[str], Any]
"""The `Params` class of a stage's name, or None if there is no such stage."""
_PART = re.compile(r"(?P<name>[^\[\]+]+)(?P<places>(\[\d{1,9}\])*)\Z")


_NAMED = {
    "vars": ("variable", "E030"),
    "sources": ("source", "E121"),
    "stages": ("stage", "E021"),
    "secrets": ("secret", "E130"),
}
"""Sections of names: what each names, and the code for one that is not there."""


class Setting(NamedTuple):
    """One `--set KEY=VALUE`, `--set-file KEY=PATH` or `--set-json KEY=JSON`; `--set` also takes `KEY+=VALUE`."""

    option: str
    text: str


@dataclass
class Overrides:
    """Puts options on top of a document. Paths of a `single` stage start at `with`."""

    document: Map
    params_of: ParamsOf
    report: Report
    single: bool
    rank: int = FIRST_RANK

    def _option(self, name: str, content: str) -> Text:
        """The text of the next option."""
        self.rank += 1
        return option(name, content, self.rank)

    def set(self, options: Sequence[str | Setting]) -> None:
        """Apply settings in order; a plain text is one of `--set`."""
        counts: dict[str, int] = {}
        for item in options:
            setting = Setting("--set", item) if isinstance(item, str) else item
            number = counts[setting.option] = counts.get(setting.option, 0) + 1
            source = self._option(f"{setting.option}#{number}", setting.text)
            key, equals, raw = setting.text.partition("=")
            if not equals:
                message = f"`{setting.option} {setting.text}` has no `=`"
                self.report.add("E020", message, source.whole, "write KEY=VALUE")
                continue
            appends = key.endswith("+") and setting.option == "--set"
            path = self._split(source, key.removesuffix("+") if appends else key)
            if path is None:
                continue
            try:
                value = self._given(setting.option, path, source, raw, len(key) + 1, appends)
                self.document = placed(self.document, path, value, self._default, appends=appends)
            except SpecError as error:
                self.report.diagnostics.extend(error.diagnostics)

    def _given(self, option: str, path: Path, source: Text, raw: str, start: int, appends: bool) -> Node:
        """The value that a setting gives, by its option. Raises SpecError."""
        steps = [step for step, _ in path] + ([0] if appends and not raw.lstrip().startswith("[") else [])
        if option == "--set":
            return self._value(steps, source, raw, start)
        mark = replace(source.whole, column=start + 1)
        if option == "--set-json":
            return json_node(raw, mark)
        file = file_text(raw, mark, source.rank)
        annotation, rest = self._schema(steps)
        if takes_text(annotation, rest):
            return Scalar(file.whole, file.content, file.content)
        node = parse(file)
        return Scalar(file.whole, None, "") if node is None else node

    def _default(self, path: Sequence[str | int]) -> Any:
        """What a parameter is where nothing sets it, as plain JSON; None if that is not known."""
        annotation, rest = self._schema(path)
        return default_at(annotation, rest)

    def inputs(self, options: Sequence[str]) -> None:
        """Apply `PORT=REF` texts; several for one port become its list."""
        ports: dict[str, tuple[Mark, list[Node]]] = {}
        for number, text in enumerate(options, 1):
            source = self._option(f"--input#{number}", text)
            port, equals, reference = text.partition("=")
            if not (port and equals and reference):
                self.report.add("E020", f"`--input {text}` binds nothing", source.whole, "write PORT=REF")
                continue
            key = replace(source.whole, end_column=len(port) + 1)
            value = Scalar(replace(source.whole, column=len(port) + 2), reference, reference)
            ports.setdefault(port, (key, []))[1].append(value)
        for port, (key, values) in ports.items():
            value_ = values[0] if len(values) == 1 else List(key, tuple(values))
            self.document = merge_maps(self.document, at([("inputs", key), (port, key)], value_))

    def text(self, key: str, name: str, value: str) -> None:
        """Apply an option that sets one key of the stage."""
        mark = self._option(name, value).whole
        self.document = merge_maps(self.document, at([(key, mark)], Scalar(mark, value, value)))

    def flags(self, values: Mapping[str, Any]) -> None:
        """Apply top-level parameters of a stage command; a text is read as `--set` reads it, None is not given."""
        for name, value in values.items():
            if value is None:
                continue
            flag = "--" + name.replace("_", "-")
            source = self._option(flag, f"{flag} {value}")
            key = replace(source.whole, end_column=len(flag) + 1)
            path: Path = [("with", source.whole), (name, key)]
            if isinstance(value, str):
                self._put(path, source, value, len(flag) + 1)
            else:
                mark = replace(source.whole, column=len(flag) + 2)
                leaf = Scalar(mark, value, str(value))
                self.document = merge_maps(self.document, at([("with", source.whole), (name, key)], leaf))

    def _put(self, path: Path, source: Text, raw: str, start: int) -> None:
        """Set `path` to the value written as `raw`, which begins at character `start` of `source`."""
        try:
            value = self._value([step for step, _ in path], source, raw, start)
        except SpecError as error:
            self.report.diagnostics.extend(error.diagnostics)
        else:
            self.document = placed(self.document, path, value, self._default)

    def _value(self, path: Sequence[str | int], source: Text, raw: str, start: int) -> Node:
        mark = replace(source.whole, column=start + 1)
        annotation, rest = self._schema(path)
        if takes_text(annotation, rest):
            none = raw in ("null", "~") and NoneType in types_at(annotation, rest)
            return Scalar(mark, None if none else raw, raw)
        # Blanks in place of the key keep the columns of the value right.
        node = parse(source, " " * start + raw)
        return Scalar(mark, None, "") if node is None else node

    def _schema(self, path: Sequence[str | int]) -> tuple[Any, Sequence[str | int]]:
        """The type that knows the rest of `path`, and that rest."""
        if path[0] == "with":
            return self._params_at("uses"), path[1:]
        if path[0] == "stages" and len(path) > 2:
            if path[2] == "with":
                return self._params_at("stages", str(path[1]), "uses"), path[3:]
            return StageModel, path[2:]
        if path[0] == "sources" and len(path) > 1:
            return SourceModel, path[2:]
        return PipelineModel, path

    def _params_at(self, *path: str) -> Any:
        uses = self.document.get(*path)
        return self.params_of(uses.text.partition("@")[0]) if isinstance(uses, Scalar) else None

    def _split(self, source: Text, key: str) -> Path | None:
        """The full path that a key means, or None after a report."""
        path: Path = []
        column = 1
        for part in key.split("."):
            mark = Mark(source, 1, column, 1, column + max(1, len(part)))
            match = _PART.match(part)
            if match is None:
                self.report.add(
                    "E020", f"`{key}` is not a key", mark if part else source.whole, "as in a.b or a.list[0].b"
                )
                return None
            path.append((match["name"], mark))
            path += [(int(place), mark) for place in re.findall(r"\d+", match["places"])]
            column += len(part) + 1
        return [("with", path[0][1]), *path] if self.single else self._full(path)

    def _full(self, path: Path) -> Path | None:
        """`STAGE.PARAM` → `stages.STAGE.with.PARAM`; other keys are full paths already."""
        stages = self._keys("stages")
        head, mark = path[0]
        if head in stages:
            if len(path) == 1:
                self.report.add("E020", f"`{head}` is a stage, not a parameter", mark, f"write {head}.PARAM=VALUE")
                return None
            return [("stages", mark), path[0], ("with", mark), *path[1:]]
        if head in FileModel.later:
            self.report.add("E104", f"`{head}` is not supported yet by this version of llmctl", mark)
            return None
        if head == "profiles":
            self.report.add("E021", "a profile cannot be set", mark, "set the value itself, or choose with --profile")
            return None
        if head == "include":
            self.report.add("E021", "`include` cannot be set", mark, "files are read before the command line counts")
            return None
        if head not in SECTIONS:
            known = [name for name in SECTIONS if name not in (*FileModel.later, "include")]
            hint = suggest(str(head), [*stages, *known], "stages and sections")
            self.report.add("E021", f"no stage or section `{head}`", mark, hint)
            return None
        return path if self._exists(path) else None

    def _exists(self, path: Path) -> bool:
        """Whether the variable, source or stage that a full path names is there: a misspelt one would do nothing."""
        section = str(path[0][0])
        what, code = _NAMED.get(section, ("", ""))
        if not what:
            return True
        name, mark = path[1] if len(path) > 1 else path[0]
        known = self._keys(section)
        if len(path) > 1 and name in known:
            return True
        message = f"no {what} `{name}`" if len(path) > 1 else f"`{section}` is a section, not a value"
        self.report.add(code if len(path) > 1 else "E020", message, mark, did_you_mean(str(name), known))
        return False

    def _keys(self, section: str) -> list[str]:
        node = self.document.get(section)
        return list(node.entries) if isinstance(node, Map) else []
