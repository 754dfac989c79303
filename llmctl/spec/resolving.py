"""From a wired draft to a frozen `StageSpec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmctl.spec.diagnostics import Report, suggest
from llmctl.spec.draft import Draft
from llmctl.spec.nodes import Map, Scalar
from llmctl.spec.references import NotAReference, located
from llmctl.spec.resolved import EnvValue, Resources, StageSpec
from llmctl.spec.skeleton import BodyModel
from llmctl.spec.wiring import Wiring


@dataclass
class Resolving:
    """Makes the `StageSpec` of each draft of one spec; None if there is a mistake in it."""

    wiring: Wiring
    base: Path
    secrets: Sequence[str]
    """The names of the declared secrets."""
    report: Report
    _outputs: dict[Path, str] = field(default_factory=dict)
    _above: dict[Path, str] = field(default_factory=dict)
    """The directories that hold an output."""
    _shared: dict[int, tuple[Mapping[str, EnvValue], Resources]] = field(default_factory=dict)
    """By the model, which rows of a matrix may share."""

    def __call__(self, draft: Draft) -> StageSpec | None:
        """The frozen form of a stage."""
        model = draft.model
        if model is None or draft.stage is None or draft.params is None:
            return None
        body = draft.body
        env, resources = self._operational(draft, body) if body else ({}, Resources())
        named = {name: EnvValue(secret=name, affects_output=False) for name in sorted(draft.params.secrets())}
        self._check_processes(draft, draft.params.processes(), resources)
        rows = {key: value.value for key, value in draft.row.values.items()} if draft.row else {}
        return StageSpec(
            id=draft.id,
            stage=draft.stage,
            params=draft.params,
            inputs={name: draft.inputs[name] for name in draft.stage.inputs if name in draft.inputs},
            outputs=self.wiring.kinds(draft),
            needs=draft.needs,
            gates=tuple(draft.gates),
            output=self._output(draft),
            env={**named, **env},
            resources=resources,
            cache=body.cache if body else "auto",
            tag=model.tag,
            retries=body.retries if body else 0,
            ephemeral=getattr(body, "ephemeral", False),
            base=draft.base,
            row=rows,
            select=draft.select,
        )

    def _operational(self, draft: Draft, body: BodyModel) -> tuple[Mapping[str, EnvValue], Resources]:
        if id(body) not in self._shared:
            self._shared[id(body)] = self._env(draft, body), Resources(**dict(body.resources))
        return self._shared[id(body)]

    def _check_processes(self, draft: Draft, processes: int, resources: Resources) -> None:
        """E102 for machines or GPUs that the processes of the stage cannot be shared out to."""
        key, nodes = "nodes", resources.nodes or 1
        text = f"{nodes} machines for {'a stage of one process' if processes == 1 else f'{processes} processes'}"
        if processes % nodes == 0:
            if processes == 1 or resources.gpus in (None, 0, processes // nodes):
                return
            key, text = "gpus", f"{resources.gpus} GPUs for {processes // nodes} processes"
            text += " on each machine" if nodes > 1 else ""
        mark, node = draft.entry("resources")
        place = node.get(key) if isinstance(node, Map) else None
        hint = "the product of the sizes in `parallel` is the number of processes, one per GPU"
        path = draft.where("resources", key)
        self.report.add("E102", f"{path}: {text}", place.mark if place else mark, hint)

    def _env(self, draft: Draft, body: BodyModel) -> dict[str, EnvValue]:
        """The variables of a stage; E130 for a secret that is not declared."""
        found = {}
        _, node = draft.entry("env")
        for name, model in body.env.items():
            if model.secret is None:
                affects = True if model.affects_output is None else model.affects_output
                found[name] = EnvValue(value=model.value or "", affects_output=affects)
                continue
            if model.secret not in self.secrets:
                place = node.get(name, "secret") if isinstance(node, Map) else None
                hint = suggest(model.secret, self.secrets, "secrets") + (
                    "" if self.secrets else ": declare it under `secrets`"
                )
                self.report.add("E130", f"no secret `{model.secret}`", place.mark if place else draft.key, hint)
            found[name] = EnvValue(secret=model.secret, affects_output=False)
        return found

    def _output(self, draft: Draft) -> Path | None:
        """The absolute directory of `output`; E102 if another stage writes there too."""
        node = draft.node.get("output")
        if not isinstance(node, Scalar) or draft.model is None or draft.model.output is None:
            return None
        try:
            output = (self.base / located(node, self.base)).absolute()
        except NotAReference as wrong:
            self.report.add(wrong.code, str(wrong), node.mark, wrong.hint)
            return None
        other = self._beside(output)
        self._outputs[output] = draft.id
        self._above |= dict.fromkeys(output.parents, draft.id)
        if other is not None:
            keys = ", ".join(f"${{{{ matrix.{key} }}}}" for key in (draft.row.values if draft.row else ()))
            hint = f"write {keys} into it" if keys else "give each its own"
            where = draft.where("output")
            self.report.add(
                "E102",
                f"{where}: `{other}` is copied to the same place, above or below",
                node.mark,
                hint,
                essence="same place",
            )
        return output

    def _beside(self, output: Path) -> str | None:
        """The stage whose output is this directory, holds it or lies in it: a copy replaces all that is in its own."""
        inside = (self._outputs[path] for path in (output, *output.parents) if path in self._outputs)
        return next(inside, self._above.get(output))
