"""The phases of one spec in order, and the `Pipeline` at their end. All mistakes of all phases are raised together."""

from __future__ import annotations

from collections.abc import Sequence as List
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llmctl.spec.diagnostics import Report, Text, did_you_mean, suggest
from llmctl.spec.drafting import Drafting
from llmctl.spec.fields import field_names
from llmctl.spec.files import Found, find, read
from llmctl.spec.includes import with_includes
from llmctl.spec.interpolate import Interpolation, variables_in
from llmctl.spec.layers import apply_defaults, apply_profiles, without
from llmctl.spec.nodes import Entry, Map, Node, Scalar, fail
from llmctl.spec.outside import Outside
from llmctl.spec.overrides import Overrides, Setting
from llmctl.spec.params import Params
from llmctl.spec.resolved import Pipeline
from llmctl.spec.resolving import Resolving
from llmctl.spec.skeleton import (
    FORMAT,
    BodyModel,
    FileModel,
    PipelineModel,
    SelectModel,
    SingleModel,
    StageModel,
)
from llmctl.spec.validate import validate
from llmctl.spec.wiring import Wiring
from llmctl.stage import Stage

if TYPE_CHECKING:
    from llmctl.spec.pipeline import Registry

BODY_KEYS = frozenset(field_names(BodyModel))
STAGE_KEYS = frozenset(field_names(StageModel)) | frozenset(field_names(SelectModel))


def bare_stage(stage: Stage) -> Map:
    """The document of a stage command without a file."""
    mark = Text("command line", f"llmctl {stage.name}", Path.cwd()).whole
    values: dict[str, object] = {"llmctl": FORMAT, "name": stage.name, "uses": stage.name}
    return Map(mark, {key: Entry(mark, Scalar(mark, value, str(value))) for key, value in values.items()})


def open_spec(
    path_or_name: str | Path, profiles: List[str], sets: List[str | Setting], registry: Registry
) -> tuple[Found, Reading]:
    """A spec with all its layers on it, not validated yet. Raises SpecError for what makes the rest meaningless."""
    found = find(path_or_name)
    reading = Reading(with_includes(read(found), found.path), registry, single=None)
    reading.overlay(profiles)
    reading.overrides().set(sets)
    return found, reading


class Reading:
    """One document on its way through the layers and phases."""

    def __init__(self, document: Map, registry: Registry, single: Stage | None) -> None:
        self.report = Report()
        self.registry = registry
        self.document = document
        self.single = "stages" not in document.entries
        self._overrides: Overrides | None = None
        self._check_kind(single)
        self.check_profiles()

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
        if uses and isinstance(uses.value, Scalar) and uses.value.text.partition("@")[0] != wanted.name:
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
        self.document = apply_profiles(self.document, profiles, self.report)

    def check_profiles(self) -> None:
        """The keys and names of every profile, chosen or not; its values are checked where they end up."""
        profiles = self.document.get("profiles")
        if profiles is not None and not isinstance(profiles, Map):
            self.report.add("E102", "profiles: Input should be a map of a name to its overlay", profiles.mark)
        known = {"vars", "sources", "secrets", "store", *(BODY_KEYS if self.single else ("stages", "defaults", "next"))}
        for name, entry in profiles.entries.items() if isinstance(profiles, Map) else ():
            overlay = entry.value
            if not isinstance(overlay, Map):
                self.report.add("E102", f"profiles.{name}: Input should be a map", overlay.mark)
                continue
            self._check_keys(overlay, known)
            stages = overlay.get("stages") if not self.single else None
            for id, stage in stages.entries.items() if isinstance(stages, Map) else ():
                self._check_keys(stage.value, STAGE_KEYS)
                self._check_stage(id, stage)
            self._check_vars(overlay)

    def _check_stage(self, id: str, entry: Entry) -> None:
        """A stage of a profile is one of the document, or says what it uses."""
        declared = self.document.get("stages")
        names = list(declared.entries) if isinstance(declared, Map) else []
        own = entry.value.entries if isinstance(entry.value, Map) else {}
        if id not in names and not {"uses", "select"} & set(own):
            self.report.add("E021", f"no stage `{id}`", entry.key, suggest(id, names, "stages"))

    def _check_vars(self, overlay: Map) -> None:
        """A variable of a profile is one of the document, or used somewhere."""
        declared, given = self.document.get("vars"), overlay.get("vars")
        names = list(declared.entries) if isinstance(declared, Map) else []
        for name, entry in given.entries.items() if isinstance(given, Map) else ():
            if name not in names and name not in variables_in(self.document):
                self.report.add("E030", f"no variable `{name}`", entry.key, did_you_mean(name, names))

    def _check_keys(self, node: Node, known: set[str] | frozenset[str]) -> None:
        for key, entry in node.entries.items() if isinstance(node, Map) else ():
            if key in known:
                continue
            if key in SingleModel.later | StageModel.later:
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

    @property
    def layered(self) -> Map:
        """The document with all its layers, expressions not filled in."""
        return self._overrides.document if self._overrides else self.document

    def finish(self, file: Path | None, base: Path, profiles: tuple[str, ...], stdin: bool = False) -> Pipeline:
        """Interpolate, validate, wire. Raises SpecError."""
        interpolation = Interpolation(apply_defaults(without(self.layered, "profiles")), self.report)
        document = interpolation.whole()
        head = self._skeleton(document)
        outside = Outside(document, base, self.report)
        sources = outside.sources(self.registry)
        drafting = Drafting(interpolation, self.registry, self.report)
        found = [drafting.single(document, BODY_KEYS)] if self.single else drafting.stages(document.get("stages"))
        drafts = {draft.id: draft for draft in found}
        wiring = Wiring(drafts, sources, outside.names("sources"), base, self.report, stdin)
        order = wiring.connect()
        resolving = Resolving(wiring, base, outside.names("secrets"), self.report)
        stages = [resolving(drafts[name]) for name in order]
        self.report.check()
        assert head is not None and len(order) == len(drafts) and all(stages), "a stage was lost without a report"
        store, remotes = outside.store(head)
        secrets = outside.secrets(head)
        self.report.check()
        return Pipeline(
            name=head.name,
            file=file,
            base=base,
            stages={stage.id: stage for stage in stages if stage},
            sources=sources,
            profiles=profiles,
            secrets=secrets,
            store=store,
            remotes=remotes,
            next=tuple(head.next) if isinstance(head, PipelineModel) else (),
            single=self.single,
        )

    def _skeleton(self, document: Map) -> FileModel | None:
        """Phase A of everything outside the stages; None if a mistake was reported."""
        of_the_stage = BODY_KEYS - {"uses"} if self.single else {"uses"}  # looked at as the stage's, or told already
        document = without(document, *of_the_stage)
        kind: type[FileModel] = SingleModel if self.single else PipelineModel
        return validate(kind, document, document.mark, "", self.report)
