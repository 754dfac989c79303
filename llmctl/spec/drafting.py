"""Phases A and B of the stages: their keys, their rows, the stage that each uses and its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from llmctl.spec.diagnostics import Mark, Report, suggest
from llmctl.spec.draft import Draft
from llmctl.spec.interpolate import Interpolation, has_rows
from llmctl.spec.matrix import Family, families
from llmctl.spec.nodes import Map, Node, Scalar
from llmctl.spec.params import Params
from llmctl.spec.skeleton import BodyModel, NodeModel, SelectModel, StageModel
from llmctl.spec.validate import validate
from llmctl.stage import NAME, SECTIONS, Stage, missing_module

if TYPE_CHECKING:
    from llmctl.spec.pipeline import Registry

T = TypeVar("T")


@dataclass
class Drafting:
    """Makes the drafts of one document. What rows of a matrix have in common is validated once and shared."""

    interpolation: Interpolation
    registry: Registry
    report: Report
    _shared: dict[tuple[str, int], object] = field(default_factory=dict)

    def single(self, document: Map, keys: frozenset[str]) -> Draft:
        """The draft of a single-stage file, whose keys of a stage are `keys`."""
        entries = {key: entry for key, entry in document.entries.items() if key in keys}
        name = document.get("name")
        id = name.text if isinstance(name, Scalar) else ""
        draft = Draft(id, id, document.entries["uses"].key, Map(document.mark, entries), "")
        draft.model = validate(BodyModel, draft.node, draft.key, draft.path, self.report)
        self._use(draft)
        return draft

    def stages(self, node: Node | None) -> list[Draft]:
        """The drafts of a pipeline, rows of one stage next to each other."""
        entries = node.entries if isinstance(node, Map) else {}
        maps = {id: entry.value for id, entry in entries.items() if isinstance(entry.value, Map)}
        known = families(maps, self.report)
        drafts: list[Draft] = []
        for id, entry in entries.items():
            self._check_id(id, entry.key)
            stage = entry.value if isinstance(entry.value, Map) else Map(entry.key)
            base = Draft(id, id, entry.key, stage, f"stages.{id}")
            family = known.get(id)
            if family is None:
                drafts.append(self._draft(base))
            else:
                drafts += self._rows(base, family)
        return drafts

    def _check_id(self, name: str, mark: Mark) -> None:
        if not NAME.match(name):
            self.report.add("E102", f"stages.{name}: a stage id is made of a-z, 0-9 and -, as in `eval-base`", mark)
        elif name in SECTIONS:
            self.report.add("E102", f"stages.{name}: a stage id may not be the name of a section", mark)

    def _draft(self, draft: Draft) -> Draft:
        """Phases A and B of a stage without rows. One whose rows could not be made out stays without a model."""
        draft.model = validate(self._kind(draft), draft.node, draft.key, draft.path, self.report)
        if has_rows(draft.node):
            draft.model = None
            return draft
        self._use(draft)
        return draft

    def _kind(self, draft: Draft) -> type[NodeModel]:
        select, uses = draft.node.entries.get("select"), draft.node.entries.get("uses")
        if select and uses:
            self.report.add("E101", "a stage has `uses` or `select`, not both", uses.key)
        return SelectModel if draft.selects else StageModel

    def _rows(self, base: Draft, family: Family) -> Iterator[Draft]:
        """A draft per row."""
        varies = any(
            self.interpolation.varies(entry.value) for key, entry in base.node.entries.items() if key != "with"
        )
        kind = self._kind(base)
        model = None if varies else validate(kind, base.node, base.key, base.path, self.report)
        for row in family.rows:
            node = self.interpolation.row(base.node, row.values)
            assert isinstance(node, Map)
            draft = Draft(f"{base.id}[{row.id}]", base.id, base.key, node, base.path, row, family.root)
            draft.model = validate(kind, node, base.key, base.path, self.report) if varies else model
            self._use(draft)
            yield draft

    # -- phase B ------------------------------------------------------------------------------------------------------

    def _use(self, draft: Draft) -> None:
        """The stage that is used, and its parameters."""
        uses = draft.node.get("uses")
        if not isinstance(uses, Scalar) or not isinstance(uses.value, str):
            return
        found = self._once("uses", uses, lambda: self._stage(uses))
        if found is None:
            return
        draft.stage, model = found
        mark, node = draft.entry("with")
        where = draft.where("with")
        draft.params = self._once(
            where, node or uses, lambda: validate(model, node or Map(mark), mark, where, self.report)
        )

    def _once(self, what: str, node: Node, make: Callable[[], T]) -> T:
        """The value made of a node, made once for all rows that share the node."""
        key = (what, id(node))
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]  # type: ignore[return-value]  # what is under a key is what its `make` gave

    def _stage(self, uses: Scalar) -> tuple[Stage, type[Params]] | None:
        """The declaration and the class of the parameters, None after a report."""
        name, at, wanted = uses.text.partition("@")
        stage = self.registry.stages.get(name)
        if stage is None:
            failure = getattr(self.registry, "failures", {}).get(name)
            if failure is not None:
                self.report.add("E110", f"stage `{name}` is unavailable: {failure.reason}", uses.mark, failure.hint)
                return None
            hint = suggest(name, sorted(self.registry.stages), "installed stages")
            self.report.add("E110", f"no stage `{name}` is installed", uses.mark, hint)
            return None
        if at and not self._has_version(stage, wanted, uses):
            return None
        try:
            return stage, stage.load_params()
        except Exception as error:  # a plugin's import
            problem = f"the parameters of stage `{name}` cannot be imported: {type(error).__name__}: {error}"
            missing = missing_module(error, stage, name) if isinstance(error, ModuleNotFoundError) else None
            self.report.add("E110", problem, uses.mark, getattr(missing, "hint", None) or "")
            return None

    def _has_version(self, stage: Stage, wanted: str, uses: Scalar) -> bool:
        """Whether the distribution of a stage is of a version that `NAME@SPECIFIER` asks for."""
        from packaging.specifiers import InvalidSpecifier, SpecifierSet

        try:
            versions = SpecifierSet(wanted)
        except InvalidSpecifier:
            self.report.add("E102", f"`{wanted}` is no version specifier", uses.mark, f"such as {stage.name}@>=1.2,<2")
            return False
        origin = self.registry.origin(stage.name)
        if not wanted or versions.contains(origin.version, prereleases=True):
            return True
        message = f"stage `{stage.name}` is of {origin.dist} {origin.version}, the spec wants {wanted}"
        self.report.add("E110", message, uses.mark, f"pip install '{origin.dist}{wanted}'")
        return False
