"""The phases of one spec in order, and the `Pipeline` at their end. All mistakes of all phases are raised together."""

from __future__ import annotations

from collections.abc import Sequence as List
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llmctl.spec.diagnostics import Mark, Report, Text, did_you_mean, suggest
from llmctl.spec.draft import Draft
from llmctl.spec.fields import field_names
from llmctl.spec.interpolate import interpolate
from llmctl.spec.layers import apply_defaults, apply_profiles, without
from llmctl.spec.nodes import Entry, Map, Node, Scalar, fail
from llmctl.spec.overrides import Overrides
from llmctl.spec.params import Params
from llmctl.spec.references import NotAReference, located
from llmctl.spec.resolved import EnvValue, Pipeline, Resources, Source, StageSpec
from llmctl.spec.skeleton import FORMAT, SECTIONS, FileModel, PipelineModel, SingleModel, SourceModel, StageModel
from llmctl.spec.validate import validate
from llmctl.spec.wiring import Wiring, output_types
from llmctl.stage import NAME, Stage, missing_module

if TYPE_CHECKING:
    from llmctl.spec.pipeline import Registry

STAGE_KEYS = frozenset(field_names(StageModel))


def bare_stage(stage: Stage) -> Map:
    """The document of a stage command without a file."""
    mark = Text("command line", f"llmctl {stage.name}", Path.cwd()).whole
    values: dict[str, object] = {"llmctl": FORMAT, "name": stage.name, "uses": stage.name}
    return Map(mark, {key: Entry(mark, Scalar(mark, value, str(value))) for key, value in values.items()})


class Reading:
    """One document on its way through the layers and phases."""

    def __init__(self, document: Map, registry: Registry, single: Stage | None) -> None:
        self.report = Report()
        self.registry = registry
        self.document = document
        self.single = "stages" not in document.entries
        self._overrides: Overrides | None = None
        self._check_kind(single)

    def _check_kind(self, wanted: Stage | None) -> None:
        """Refuse a format of a later version, a file that is no spec, and the file of another stage."""
        version = self.document.get("llmctl")
        if isinstance(version, Scalar) and isinstance(version.value, int) and version.value > FORMAT:
            message = f"this spec has format {version.value}, this version of llmctl reads format {FORMAT}"
            fail("E102", message, version.mark, "install a newer llmctl")
        uses = self.document.entries.get("uses")
        if not self.single and uses is not None:
            self.report.add("E101", "a file has `stages` or `uses`, not both", uses.key)
        if self.single and uses is None:
            self._no_kind()
        if wanted is None:
            return
        if not self.single:
            mark = self.document.entries["stages"].key
            fail("E102", f"`{wanted.name}` takes the file of a single stage, this is a pipeline", mark, "llmctl run it")
        if uses and isinstance(uses.value, Scalar) and uses.value.text != wanted.name:
            fail("E102", f"this file is for `{uses.value.text}`, not for `{wanted.name}`", uses.value.mark)

    def _no_kind(self) -> NoReturn:
        """A file without `stages` and `uses`, perhaps because one of them is misspelt."""
        for key, entry in self.document.entries.items():
            if key not in field_names(SingleModel) and (hint := did_you_mean(key, ("stages", "uses"))):
                fail("E101", f"unknown key `{key}`", entry.key, hint)
        fail("E103", "missing key `stages` (a pipeline) or `uses` (a single stage)", self.document.mark)

    # -- layers -------------------------------------------------------------------------------------------------------

    def overlay(self, profiles: List[str]) -> None:
        """Put the profiles on top of the document."""
        self._check_profiles()
        self.document = apply_profiles(self.document, profiles, self.report)

    def _check_profiles(self) -> None:
        """The keys of every profile, chosen or not; its values are checked where they end up."""
        profiles = self.document.get("profiles")
        known = {"vars", "sources", *(STAGE_KEYS if self.single else ("stages", "defaults"))}
        for entry in profiles.entries.values() if isinstance(profiles, Map) else ():
            self._check_keys(entry.value, known)
            stages = entry.value.get("stages") if isinstance(entry.value, Map) and not self.single else None
            for stage in stages.entries.values() if isinstance(stages, Map) else ():
                self._check_keys(stage.value, STAGE_KEYS)

    def _check_keys(self, node: Node, known: set[str] | frozenset[str]) -> None:
        for key, entry in node.entries.items() if isinstance(node, Map) else ():
            if key in known:
                continue
            if key in SingleModel.later:
                self.report.add("E104", f"`{key}` is not supported yet by this version of llmctl", entry.key)
            else:
                self.report.add("E101", f"unknown key `{key}`", entry.key, did_you_mean(key, sorted(known)))

    def overrides(self) -> Overrides:
        """What puts command-line options on top of the document."""
        self._overrides = Overrides(self.document, self._params_class, self.report, self.single)
        return self._overrides

    def _params_class(self, uses: str) -> type[Params] | None:
        stage = self.registry.stages.get(uses)
        try:
            return stage.load_params() if stage else None
        except Exception:  # a plugin's import; reported in phase B
            return None

    # -- phases -------------------------------------------------------------------------------------------------------

    def finish(self, file: Path | None, base: Path, profiles: tuple[str, ...], stdin: bool = False) -> Pipeline:
        """Interpolate, validate, wire. Raises SpecError."""
        document = self._overrides.document if self._overrides else self.document
        document = interpolate(apply_defaults(without(document, "profiles")), self.report)
        head = self._skeleton(document)
        sources = self._sources(document, base)
        drafts = {draft.id: draft for draft in self._drafts(document)}
        for draft in drafts.values():
            self._parameters(draft)
        declared = document.get("sources")
        source_names = list(declared.entries) if isinstance(declared, Map) else []
        wiring = Wiring(drafts, sources, source_names, base, self.report, stdin)
        order = wiring.connect()
        stages = [self._resolved(wiring, drafts[name], base) for name in order]
        self.report.check()
        assert len(order) == len(drafts) and all(stages), "a stage was lost without a report"
        return Pipeline(
            name=head.name if head else "",
            file=file,
            base=base,
            stages={stage.id: stage for stage in stages if stage},
            sources=sources,
            profiles=profiles,
            next=tuple(head.next) if isinstance(head, PipelineModel) else (),
            single=self.single,
        )

    def _skeleton(self, document: Map) -> FileModel | None:
        """Phase A of everything outside the stages; None if a mistake was reported."""
        of_the_stage = STAGE_KEYS - {"uses"} if self.single else {"uses"}  # looked at as the stage's, or told already
        document = without(document, *of_the_stage)
        kind: type[FileModel] = SingleModel if self.single else PipelineModel
        return validate(kind, document, document.mark, "", self.report)

    def _sources(self, document: Map, base: Path) -> dict[str, Source]:
        """Phase A of each source; those with mistakes are left out."""
        node = document.get("sources")
        known = sorted(
            {kind for stage in self.registry.stages.values() for port in stage.inputs.values() for kind in port.types}
        )
        found = {}
        for name, entry in node.entries.items() if isinstance(node, Map) else ():
            model = validate(SourceModel, _long_form(entry.value), entry.key, f"sources.{name}", Report())
            uri = entry.value.get("uri") if isinstance(entry.value, Map) else entry.value
            if model is None or not isinstance(uri, Scalar):
                continue
            if known and model.type not in known:
                kind = entry.value.get("type") if isinstance(entry.value, Map) else None
                message = f"sources.{name}.type: no stage takes `{model.type}`"
                mark = kind.mark if kind else entry.key
                self.report.add("E102", message, mark, suggest(model.type, known, "types"))
                continue
            try:
                found[name] = Source(name=name, uri=located(uri, base), type=model.type, where=str(uri.mark))
            except NotAReference as wrong:
                self.report.add(wrong.code, str(wrong), uri.mark, wrong.hint)
        return found

    def _drafts(self, document: Map) -> list[Draft]:
        """Phase A of each stage."""
        if self.single:
            entries = {key: entry for key, entry in document.entries.items() if key in STAGE_KEYS}
            name = document.get("name")
            key = document.entries["uses"].key
            id_ = name.text if isinstance(name, Scalar) else ""
            drafts = [Draft(id_, key, Map(document.mark, entries), "")]
        else:
            stages = document.get("stages")
            drafts = []
            for id_, entry in stages.entries.items() if isinstance(stages, Map) else ():
                self._check_id(id_, entry.key)
                node = entry.value if isinstance(entry.value, Map) else Map(entry.key)
                drafts.append(Draft(id_, entry.key, node, f"stages.{id_}"))
        for draft in drafts:
            draft.model = validate(StageModel, draft.node, draft.key, draft.path, self.report)
        return drafts

    def _check_id(self, name: str, mark: Mark) -> None:
        if not NAME.match(name):
            self.report.add("E102", f"stages.{name}: a stage id is made of a-z, 0-9 and -, as in `eval-base`", mark)
        elif name in SECTIONS:
            self.report.add("E102", f"stages.{name}: a stage id may not be the name of a section", mark)

    def _parameters(self, draft: Draft) -> None:
        """Phase B: the stage that is used, and its parameters."""
        uses = draft.node.get("uses")
        if not isinstance(uses, Scalar) or not isinstance(uses.value, str):
            return
        name, version, _ = uses.text.partition("@")
        if version:
            message = f"`{uses.text}`: a version after `@` is not supported yet by this version of llmctl"
            self.report.add("E104", message, uses.mark, f"write {name}")
            return
        stage = self.registry.stages.get(name)
        if stage is None:
            failure = getattr(self.registry, "failures", {}).get(name)
            if failure is not None:
                self.report.add("E110", f"stage `{name}` is unavailable: {failure.reason}", uses.mark, failure.hint)
                return
            installed = sorted(self.registry.stages)
            hint = suggest(name, installed, "installed stages")
            self.report.add("E110", f"no stage `{name}` is installed", uses.mark, hint)
            return
        try:
            model = stage.load_params()
        except Exception as error:  # a plugin's import
            problem = f"the parameters of stage `{name}` cannot be imported: {type(error).__name__}: {error}"
            missing = missing_module(error, stage, name) if isinstance(error, ModuleNotFoundError) else None
            self.report.add("E110", problem, uses.mark, getattr(missing, "hint", None) or "")
            return
        draft.stage = stage
        mark, node = draft.entry("with")
        draft.params = validate(model, node or Map(mark), mark, draft.where("with"), self.report)

    def _resolved(self, wiring: Wiring, draft: Draft, base: Path) -> StageSpec | None:
        """The frozen form of a stage, None if there is a mistake in it."""
        model = draft.model
        if model is None or draft.stage is None or draft.params is None:
            return None
        output: Path | None = None
        node = draft.node.get("output")
        if isinstance(node, Scalar) and model.output is not None:
            try:
                output = (base / located(node, base)).absolute()
            except NotAReference as wrong:
                self.report.add(wrong.code, str(wrong), node.mark, wrong.hint)
        return StageSpec(
            id=draft.id,
            stage=draft.stage,
            params=draft.params,
            inputs={name: draft.inputs[name] for name in draft.stage.inputs if name in draft.inputs},
            outputs=output_types(wiring, draft),
            needs=tuple(model.needs),
            gates=tuple(draft.gates),
            output=output,
            env={key: EnvValue(**dict(value)) for key, value in model.env.items()},
            resources=Resources(**dict(model.resources)),
            cache=model.cache,
            tag=model.tag,
        )


def _long_form(node: Node) -> Node:
    """A source that is only its URI, as the map it stands for."""
    return Map(node.mark, {"uri": Entry(node.mark, node)}) if isinstance(node, Scalar) else node
