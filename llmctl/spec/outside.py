"""What a spec says outside its stages: sources, secrets, the store and its remotes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.spec.diagnostics import Report, suggest
from llmctl.spec.hub_address import is_hub
from llmctl.spec.nodes import Entry, Map, Node, Scalar
from llmctl.spec.references import NotAReference, located, outside
from llmctl.spec.resolved import Secret, Source
from llmctl.spec.skeleton import FileModel, SourceModel
from llmctl.spec.user_config import user_config
from llmctl.spec.validate import validate

if TYPE_CHECKING:
    from llmctl.spec.pipeline import Registry


class Outside:
    """Phase A of the sections beside `stages`, one document's."""

    def __init__(self, document: Map, base: Path, report: Report) -> None:
        self._document = document
        self._base = base
        self._report = report

    def names(self, section: str) -> list[str]:
        """Everything that a section declares, mistakes or not."""
        node = self._document.get(section)
        return list(node.entries) if isinstance(node, Map) else []

    def sources(self, registry: Registry) -> dict[str, Source]:
        """Every source; those with mistakes are left out."""
        node = self._document.get("sources")
        known = sorted(
            {kind for stage in registry.stages.values() for port in stage.inputs.values() for kind in port.types}
        )
        found = {}
        for name, entry in node.entries.items() if isinstance(node, Map) else ():
            model = validate(SourceModel, _long_form(entry.value), entry.key, f"sources.{name}", Report())
            uri = entry.value.get("uri") if isinstance(entry.value, Map) else entry.value
            if model is None or not isinstance(uri, Scalar):
                continue
            # What the hub has is a model, unless it is said to be its tokenizer.
            type = "model.hf" if is_hub(uri.text) and "type" not in model.model_fields_set else model.type
            if known and type not in known:
                kind = entry.value.get("type") if isinstance(entry.value, Map) else None
                message = f"sources.{name}.type: no stage takes `{type}`"
                mark = kind.mark if kind else entry.key
                self._report.add("E102", message, mark, suggest(type, known, "types"))
                continue
            place = self._located(uri, outside)
            if place is not None:
                found[name] = Source(
                    name=name,
                    uri=place,
                    type=type,
                    identity=model.identity,
                    digest=model.digest or "",
                    where=str(uri.mark),
                )
        return found

    def secrets(self, head: FileModel) -> dict[str, Secret]:
        """The secrets that the spec names. Where the user's own configuration says how to get one, that counts."""
        own = user_config().secrets
        found = {}
        for name, model in head.secrets.items():
            path = self._document.get("secrets", name, "path")
            place = self._located(path) if isinstance(path, Scalar) else None
            mark = self._mark("secrets", name)
            if (mine := own.get(name)) is not None:
                # What the spec names is hidden too: it may hold another value of the same secret.
                found[name] = replace(mine, variable=mine.variable or model.variable or name)
                continue
            found[name] = Secret(
                name=name,
                origin=model.origin,
                variable=(model.variable or name) if model.origin == "env" else "",
                path=(self._base / place).absolute() if place else None,
                where=mark,
            )
        return found

    def store(self, head: FileModel) -> tuple[str, Mapping[str, str]]:
        """The absolute path of the store, empty if the spec does not say, and the remotes with absolute paths."""
        uri = self._document.get("store", "uri") or self._document.get("store")
        place = self._located(uri) if isinstance(uri, Scalar) and head.store.uri else None
        remotes = {}
        for name, remote in head.store.remotes.items():
            node = self._document.get("store", "remotes", name)
            if "://" in remote or not isinstance(node, Scalar):
                remotes[name] = remote
            elif (there := self._located(node)) is not None:
                remotes[name] = str((self._base / there).absolute())
        return str((self._base / place).absolute()) if place else "", {**user_config().remotes, **remotes}

    def _located(self, uri: Scalar, read: Callable[[Scalar, Path], str] = located) -> str | None:
        """A path as it reads from the spec's directory, or what else `read` takes; None after a report."""
        try:
            return read(uri, self._base)
        except NotAReference as wrong:
            self._report.add(wrong.code, str(wrong), uri.mark, wrong.hint)
            return None

    def _mark(self, *path: str) -> str:
        *parents, key = path
        parent = self._document.get(*parents)
        return str(parent.entries[key].key) if isinstance(parent, Map) and key in parent.entries else ""


def _long_form(node: Node) -> Node:
    """A source that is only its URI, as the map it stands for."""
    return Map(node.mark, {"uri": Entry(node.mark, node)}) if isinstance(node, Scalar) else node
