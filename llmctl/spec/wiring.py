"""Phase C: inputs, `needs` and gates against the ports of the stages used; types; order.

A stage with a mistake has unknown outputs, so that one mistake causes no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from pathlib import Path

from llmctl.spec.diagnostics import Mark, Report, did_you_mean, suggest
from llmctl.spec.draft import Draft
from llmctl.spec.nodes import Map, Node, Scalar, Sequence
from llmctl.spec.references import NotAReference, parse_reference
from llmctl.spec.resolved import Gate, Ref, Source, SourceRef, StageRef
from llmctl.stage import In

METRICS = In("metrics")


@dataclass
class Wiring:
    """The stages of one spec, while they are being connected."""

    drafts: Mapping[str, Draft]
    sources: Mapping[str, Source]
    source_names: List[str]
    """All declared sources; those with mistakes are not in `sources`."""
    base: Path
    report: Report
    stdin: bool = False
    """Whether a required input may stay open."""
    edges: dict[str, dict[str, Mark]] = field(default_factory=dict)
    """For each stage the stages it waits for, with the mark of the text that says so."""

    def connect(self) -> list[str]:
        """Bind every stage; returns the stage ids in topological order, as far as there is one."""
        self.edges = {name: {} for name in self.drafts}
        for draft in self.drafts.values():
            self._needs(draft)
            for reference, mark in self._texts(draft):
                self.edges[draft.id].setdefault(reference.stage, mark)
        order = self._order()
        # Sources of a stage come before it, so that `same_as` types are known; stages on a cycle come last.
        for name in [*order, *(name for name in self.drafts if name not in order)]:
            self._bind(self.drafts[name])
            self._gates(self.drafts[name])
        return order

    # -- order --------------------------------------------------------------------------------------------------------

    def _needs(self, draft: Draft) -> None:
        _, node = draft.entry("needs")
        for item in _scalars(node):
            if item.text in self.drafts:
                self.edges[draft.id].setdefault(item.text, item.mark)
            else:
                hint = suggest(item.text, [name for name in self.drafts if name != draft.id], "stages")
                self.report.add("E125", f"`needs` names no stage: `{item.text}`", item.mark, hint)

    def _texts(self, draft: Draft) -> Iterator[tuple[StageRef, Mark]]:
        """Every text of a stage that names another stage of the spec; a single stage has no others."""
        if not draft.path:
            return
        _, inputs = draft.entry("inputs")
        _, gates = draft.entry("gates")
        nodes = [entry.value for entry in inputs.entries.values()] if isinstance(inputs, Map) else []
        nodes += [entry.value for gate in _maps(gates) for key, entry in gate.entries.items() if key == "baseline"]
        for item in (item for node in nodes for item in _scalars(node)):
            try:
                reference = parse_reference(item, self.base)
            except NotAReference:
                continue  # reported where it is bound
            if isinstance(reference, StageRef) and reference.stage in self.drafts:
                yield reference, item.mark

    def _order(self) -> list[str]:
        """Each stage after what it waits for, otherwise as written; what lies on or behind a cycle is left out."""
        rank = {name: number for number, name in enumerate(self.drafts)}
        waits = {name: len(edges) for name, edges in self.edges.items()}
        followers: dict[str, list[str]] = {name: [] for name in self.drafts}
        for name, edges in self.edges.items():
            for before in edges:
                followers[before].append(name)
        ready = [rank[name] for name, count in waits.items() if count == 0]
        heapify(ready)
        names = list(self.drafts)
        done: list[str] = []
        while ready:
            name = names[heappop(ready)]
            done.append(name)
            for follower in followers[name]:
                waits[follower] -= 1
                if waits[follower] == 0:
                    heappush(ready, rank[follower])
        if len(done) < len(names):
            self._cycle([name for name in names if name not in set(done)])
        return done

    def _cycle(self, left: list[str]) -> None:
        """Report one cycle among the stages that could not be ordered."""
        path = [left[0]]
        remaining = set(left)
        while True:
            following = next(name for name in self.edges[path[-1]] if name in remaining)
            if following in path:
                break
            path.append(following)
        circle = path[path.index(following) :]
        start = min(range(len(circle)), key=lambda index: list(self.drafts).index(circle[index]))
        circle = circle[start:] + circle[:start]
        way = " → ".join(f"`{name}`" for name in [*circle, circle[0]])
        mark = self.edges[circle[0]][circle[1 % len(circle)]]
        self.report.add("E126", f"stages wait for each other: {way}", mark)

    # -- inputs -------------------------------------------------------------------------------------------------------

    def _bind(self, draft: Draft) -> None:
        """Resolve the inputs of one stage."""
        if draft.stage is None:
            return
        mark, node = draft.entry("inputs")
        entries = node.entries if isinstance(node, Map) else {}
        for name, entry in entries.items():
            if name not in draft.stage.inputs:
                hint = suggest(name, list(draft.stage.inputs), "ports")
                self.report.add("E120", f"stage `{draft.stage.name}` has no input `{name}`", entry.key, hint)
        for name, port in draft.stage.inputs.items():
            if name in entries:
                self._bind_port(draft, name, port, entries[name].value)
            elif not port.optional and not self.stdin and (node is None or isinstance(node, Map)):
                kinds = " or ".join(port.types)
                message = f"required input `{name}` ({kinds}) of `{draft.stage.name}` is missing"
                self.report.add("E124", message, mark, self._offer(draft, name, port))

    def _offer(self, draft: Draft, name: str, port: In) -> str:
        """How a missing input could be given: by the one earlier output that fits, else in general."""
        if not draft.path:
            return f"give it: inputs: {{{name}: ./PATH}}, or --input {name}=PATH"
        fitting = [
            f"{other.id}.{out}"
            for other in self.drafts.values()
            if other is not draft
            for out, kind in (other.ports() or {}).items()
            if kind in port.types
        ]
        return f"give it: inputs: {{{name}: {fitting[0] if len(fitting) == 1 else 'STAGE or ./PATH'}}}"

    def _bind_port(self, draft: Draft, name: str, port: In, node: Node) -> None:
        items = _scalars(node)
        if len(items) > 1 and not port.many:
            where = draft.where("inputs", name)
            self.report.add("E102", f"{where}: this port takes one input (got {len(items)})", node.mark)
            return
        bound = []
        for item in items:
            try:
                found = self._resolve(draft, f"{draft.id}.{name}", port, item)
            except NotAReference as wrong:
                self.report.add(wrong.code, str(wrong), item.mark, wrong.hint)
            else:
                bound += [found] if found else []
        if bound:
            draft.inputs[name] = tuple(bound)

    def _resolve(self, draft: Draft, wanted: str, port: In, item: Scalar) -> Ref | None:
        """The reference with port and type, None if that cannot be known because of another mistake.

        Raises NotAReference.
        """
        found = parse_reference(item, self.base)
        if isinstance(found, StageRef):
            return self._stage_output(draft, wanted, port, found, item.text)
        if isinstance(found, SourceRef):
            return self._source(wanted, port, found)
        return replace(found, type=port.types[0]) if len(port.types) == 1 else found

    def _source(self, wanted: str, port: In, found: SourceRef) -> SourceRef | None:
        if found.name not in self.source_names:
            hint = suggest(found.name, self.source_names, "sources")
            raise NotAReference("E121", f"no source `{found.name}`", hint)
        source = self.sources.get(found.name)
        if source is None:
            return None
        if source.type not in port.types:
            message = f"type mismatch: `{wanted}` wants {' or '.join(port.types)}, `{found}` is {source.type}"
            hint = f"declare it: {found.name}: {{uri: {source.uri}, type: {port.types[0]}}}"
            raise NotAReference("E123", message, hint if source.type == "files" else "")
        return replace(found, type=source.type)

    def _stage_output(self, draft: Draft, wanted: str, port: In, found: StageRef, text: str) -> StageRef | None:
        if not draft.path:  # a single stage has no others
            message = f"`{text}` is no source, path or artifact"
            raise NotAReference("E102", message, f"a path starts with ./: ./{text}")
        producer = self.drafts.get(found.stage)
        if producer is None:
            path_hint = f"a path starts with ./: ./{text}" if "." in text else ""
            names = [name for name in self.drafts if name != draft.id]
            hint = did_you_mean(found.stage, names) or path_hint or suggest(found.stage, names, "stages")
            raise NotAReference("E122", f"no stage `{found.stage}`", hint)
        ports = producer.ports()
        if ports is None:
            return None
        kinds = {name: kind or self.same_as(producer, name) for name, kind in ports.items()}
        if found.port:
            return self._named_output(wanted, port, found, kinds, producer)
        fitting = [name for name, kind in kinds.items() if kind in port.types]
        open_ = [name for name, kind in kinds.items() if not kind]
        if len(fitting) > 1:
            choices = ", ".join(f"{found.stage}.{name}" for name in fitting)
            raise NotAReference("E128", f"several outputs of `{found.stage}` fit `{wanted}`: {choices}", "name one")
        chosen = fitting or open_
        if len(chosen) == 1:
            return StageRef(stage=found.stage, port=chosen[0], type=kinds[chosen[0]])
        if chosen:
            return None
        raise NotAReference("E123", self._mismatch(wanted, port, found.stage, kinds))

    def _named_output(
        self, wanted: str, port: In, found: StageRef, kinds: Mapping[str, str], producer: Draft
    ) -> StageRef:
        assert producer.stage is not None
        if found.port not in kinds:
            hint = suggest(found.port, list(kinds), "outputs")
            if found.port in producer.stage.outputs:
                message = f"`{found.stage}` does not produce `{found.port}` with these parameters"
                raise NotAReference("E122", message, f"it produces: {', '.join(kinds) or 'nothing'}")
            raise NotAReference("E122", f"`{found.stage}` has no output `{found.port}`", hint)
        kind = kinds[found.port]
        if kind and kind not in port.types:
            message = f"type mismatch: `{wanted}` wants {' or '.join(port.types)}, `{found}` is {kind}"
            fitting = [name for name, other in kinds.items() if other in port.types]
            raise NotAReference("E123", message, f"did you mean `{found.stage}.{fitting[0]}`?" if fitting else "")
        return replace(found, type=kind)

    def _mismatch(self, wanted: str, port: In, stage: str, kinds: Mapping[str, str]) -> str:
        has = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "no outputs with these parameters"
        return f"type mismatch: `{wanted}` wants {' or '.join(port.types)}, `{stage}` has {has}"

    def same_as(self, producer: Draft, output: str) -> str:
        """The type of an output that takes its input's type, empty if that is not known before the run."""
        assert producer.stage is not None
        refs = producer.inputs.get(producer.stage.outputs[output].same_as, ())
        return refs[0].type if refs else ""

    # -- gates --------------------------------------------------------------------------------------------------------

    def _gates(self, draft: Draft) -> None:
        """Check that gates have metrics to read, and resolve their baselines."""
        mark, node = draft.entry("gates")
        nodes = _maps(node)
        ports = draft.ports()
        if nodes and ports is not None and "metrics" not in ports.values():
            assert draft.stage is not None
            self.report.add("E127", f"a gate needs metrics, and `{draft.stage.name}` produces none here", mark)
        for model, gate in zip(draft.model.gates if draft.model else (), nodes, strict=False):
            baseline = gate.get("baseline")
            found = self._baseline(draft, baseline) if isinstance(baseline, Scalar) else None
            draft.gates.append(Gate(**{**dict(model), "baseline": found}))

    def _baseline(self, draft: Draft, item: Scalar) -> StageRef | None:
        try:
            found = parse_reference(item, self.base)
            if not isinstance(found, StageRef):
                raise NotAReference("E127", f"a baseline is the metrics of a stage, not `{item.text}`")
            return self._stage_output(draft, "baseline", METRICS, found, item.text)
        except NotAReference as wrong:
            code = "E127" if wrong.code in ("E123", "E102") else wrong.code
            message = f"`{item.text}` is not metrics" if code == "E127" else str(wrong)
            self.report.add(code, message, item.mark, wrong.hint or "write STAGE.metrics")
        return None


def output_types(wiring: Wiring, draft: Draft) -> dict[str, str]:
    """The outputs of a stage that is bound, with their types."""
    return {name: kind or wiring.same_as(draft, name) for name, kind in (draft.ports() or {}).items()}


def _scalars(node: Node | None) -> list[Scalar]:
    """The texts of a scalar or a list; anything else was reported in phase A."""
    items = node.items if isinstance(node, Sequence) else [node]
    return [item for item in items if isinstance(item, Scalar) and isinstance(item.value, str)]


def _maps(node: Node | None) -> list[Map]:
    return [item for item in node.items if isinstance(item, Map)] if isinstance(node, Sequence) else []
