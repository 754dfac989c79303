"""Phase C: inputs, `needs` and gates against the ports of the stages used; types; order.

A stage with a mistake has unknown outputs, so that one mistake causes no others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from pathlib import Path

from llmctl.spec.diagnostics import Mark, Report, did_you_mean, suggest
from llmctl.spec.draft import Draft
from llmctl.spec.matrix import row_order
from llmctl.spec.nodes import Map, Node, Scalar, maps, texts
from llmctl.spec.references import NotAReference, parse_reference
from llmctl.spec.resolved import Gate, Ref, Source, SourceRef, StageRef
from llmctl.spec.selecting import declare_select
from llmctl.stage import In

METRICS = In("metrics")
FEW = 12
"""Instances up to which a hint lists all of them."""


@dataclass
class Wiring:
    """The stages of one spec, while they are being connected."""

    drafts: Mapping[str, Draft]
    """By instance id."""
    sources: Mapping[str, Source]
    source_names: List[str]
    """All declared sources; those with mistakes are not in `sources`."""
    base: Path
    report: Report
    stdin: bool = False
    """Whether a required input may stay open."""
    edges: dict[str, dict[str, Mark]] = field(default_factory=dict)
    """For each stage the stages it waits for, with the mark of the text that says so."""
    _rows: dict[str, list[Draft]] = field(default_factory=dict)
    """The instances of every stage of the spec."""
    _parsed: dict[int, Ref | NotAReference] = field(default_factory=dict)
    """By the scalar, which the rows of a stage share."""

    def connect(self) -> list[str]:
        """Bind every stage; returns the stage ids in topological order, as far as there is one."""
        for draft in self.drafts.values():
            self._rows.setdefault(draft.base, []).append(draft)
        self.edges = {name: {} for name in self.drafts}
        for draft in self.drafts.values():
            self._needs(draft)
            for reference, mark in self._texts(draft):
                with contextlib.suppress(NotAReference):  # reported where it is bound
                    for other in self.instances(draft, reference.stage):
                        self.edges[draft.id].setdefault(other.id, mark)
        order = self._order()
        # Sources of a stage come before it, so that `same_as` types are known; stages on a cycle come last.
        placed = set(order)
        for name in [*order, *(name for name in self.drafts if name not in placed)]:
            draft = self.drafts[name]
            if draft.selects:
                declare_select(self, draft)
            else:
                self._bind(draft)
            self._gates(draft)
        return order

    def instances(self, draft: Draft, name: str, *, every: bool = False) -> list[Draft]:
        """What `name` means in `draft`: `sft`, `sft[lr=3e-5]` or `sft[*]`, whose order is `row_order`.

        In a stage that follows the same matrix a bare name means the same row; elsewhere it means all rows with
        `every`, and is a mistake without. Raises NotAReference.
        """
        base, bracket, row = name.partition("[")
        rows = self._rows.get(base)
        if rows is None:
            known = [other for other in self._rows if other != draft.base]
            raise NotAReference(
                "E122", f"no stage `{base}`", did_you_mean(base, known) or suggest(base, known, "stages")
            )
        if row == "*]":
            return sorted(rows, key=lambda other: row_order(other.row.id if other.row else ""))
        if bracket:
            return [self._instance(name, rows)]
        if len(rows) == 1 and rows[0].row is None:
            return rows
        if draft.row is not None and draft.family == rows[0].family:
            return [self.drafts[f"{base}[{draft.row.id}]"]]
        if every:
            return rows
        raise NotAReference("E129", f"`{base}` has {len(rows)} instances", f'all of them: "{base}[*]", or name one')

    def _instance(self, name: str, rows: List[Draft]) -> Draft:
        if name in self.drafts:
            return self.drafts[name]
        hint = suggest(name, [other.id for other in rows], "instances") if len(rows) < FEW else f"e.g. {rows[0].id}"
        raise NotAReference("E122", f"no instance `{name}`", hint)

    # -- order --------------------------------------------------------------------------------------------------------

    def _needs(self, draft: Draft) -> None:
        _, node = draft.entry("needs")
        found: dict[str, None] = {}
        for item in texts(node):
            try:
                instances = self.instances(draft, item.text, every=True)
            except NotAReference as wrong:
                self.report.add("E125", f"`needs` names no stage: `{item.text}`", item.mark, wrong.hint)
            else:
                found |= dict.fromkeys(other.id for other in instances)
                for other in instances:
                    self.edges[draft.id].setdefault(other.id, item.mark)
        draft.needs = tuple(found)

    def _texts(self, draft: Draft) -> Iterator[tuple[StageRef, Mark]]:
        """Every text of a stage that names another stage of the spec; a single stage has no others."""
        if not draft.path:
            return
        nodes: list[Node] = []
        for key in ("inputs", "select"):
            _, inputs = draft.entry(key)
            nodes += [entry.value for entry in inputs.entries.values()] if isinstance(inputs, Map) else []
        _, gates = draft.entry("gates")
        nodes += [entry.value for gate in maps(gates) for key, entry in gate.entries.items() if key == "baseline"]
        for item in (item for node in nodes for item in texts(node)):
            found = self._look_at(item)
            if isinstance(found, StageRef):
                yield found, item.mark

    def _look_at(self, item: Scalar) -> Ref | NotAReference:
        """What a text refers to; texts that the rows of a stage share are read once."""
        found = self._parsed.get(id(item))
        if found is None:
            try:
                found = parse_reference(item, self.base)
            except NotAReference as wrong:
                found = wrong
            self._parsed[id(item)] = found
        return found

    def reference(self, item: Scalar) -> Ref:
        """What a text refers to; raises NotAReference."""
        found = self._look_at(item)
        if isinstance(found, NotAReference):
            raise found
        return found

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
        needed = draft.params.required_inputs() if draft.params is not None else {}
        unused = draft.params.unused_inputs() if draft.params is not None else {}
        for name, port in draft.stage.inputs.items():
            if name in entries:
                self._bind_port(draft, name, port, entries[name].value)
            elif (not port.optional or name in needed) and not self.stdin and (node is None or isinstance(node, Map)):
                kinds = " or ".join(port.types)
                message = f"required input `{name}` ({kinds}) of `{draft.stage.name}` is missing"
                why = f": `{needed[name]}` needs it" if name in needed else ""
                self.report.add("E124", message + why, mark, self._offer(draft, name, port))
            if name in entries and name in unused:
                message = f"the input `{name}` of `{draft.stage.name}` has no effect with `{unused[name]}`"
                self.report.add("E102", message, entries[name].key, "leave it out, or change the setting")

    def _offer(self, draft: Draft, name: str, port: In) -> str:
        """How a missing input could be given: by the one earlier output that fits, else in general."""
        if not draft.path:
            return f"give it: inputs: {{{name}: ./PATH}}, or --input {name}=PATH"
        fitting = {
            f"{other.base}.{out}"
            for other in self.drafts.values()
            if other.base != draft.base
            for out, kind in (other.ports() or {}).items()
            if kind in port.types
        }
        return f"give it: inputs: {{{name}: {fitting.pop() if len(fitting) == 1 else 'STAGE or ./PATH'}}}"

    def _bind_port(self, draft: Draft, name: str, port: In, node: Node) -> None:
        bound: list[Ref] = []
        items = texts(node)
        for item in items:
            try:
                bound += self._resolve(draft, f"{draft.base}.{name}", port, item)
            except NotAReference as wrong:
                self.report.add(wrong.code, str(wrong), item.mark, wrong.hint)
        if max(len(items), len(bound)) > 1 and not port.many:
            where = draft.where("inputs", name)
            count = max(len(items), len(bound))
            self.report.add("E102", f"{where}: this port takes one input (got {count})", node.mark)
        elif bound:
            draft.inputs[name] = tuple(bound)

    def _resolve(self, draft: Draft, wanted: str, port: In, item: Scalar) -> List[Ref]:
        """The references with port and type, none if that cannot be known because of another mistake.

        Raises NotAReference.
        """
        found = self.reference(item)
        if isinstance(found, StageRef):
            return self.outputs_of(draft, wanted, port, found, item.text)
        if isinstance(found, SourceRef):
            source = self._source(wanted, port, found)
            return [source] if source else []
        return [replace(found, type=port.types[0]) if len(port.types) == 1 else found]

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

    def outputs_of(self, draft: Draft, wanted: str, port: In, found: StageRef, text: str) -> list[StageRef]:
        """The output that fits `port`, of every instance that a reference names; raises NotAReference."""
        if not draft.path:  # a single stage has no others
            message = f"`{text}` is no source, path or artifact"
            raise NotAReference("E102", message, f"a path starts with ./: ./{text}")
        try:
            producers = self.instances(draft, found.stage)
        except NotAReference as wrong:
            if wrong.code == "E122" and "." in text and "did you mean" not in wrong.hint:
                wrong.hint = f"a path starts with ./: ./{text}"
            raise
        refs = (self._output(wanted, port, found.port, producer) for producer in producers)
        return [ref for ref in refs if ref is not None]

    def _output(self, wanted: str, port: In, output: str, producer: Draft) -> StageRef | None:
        ports = producer.ports()
        if ports is None:
            return None
        kinds = self.kinds(producer)
        if output:
            return self._named_output(wanted, port, output, kinds, producer)
        fitting = [name for name, kind in kinds.items() if kind in port.types]
        open_ = [name for name, kind in kinds.items() if not kind]
        if len(fitting) > 1:
            choices = ", ".join(f"{producer.base}.{name}" for name in fitting)
            raise NotAReference("E128", f"several outputs of `{producer.base}` fit `{wanted}`: {choices}", "name one")
        chosen = fitting or open_
        if len(chosen) == 1:
            return StageRef(stage=producer.id, port=chosen[0], type=kinds[chosen[0]])
        if chosen:
            return None
        raise NotAReference("E123", self._mismatch(wanted, port, producer.base, kinds))

    def _named_output(self, wanted: str, port: In, output: str, kinds: Mapping[str, str], producer: Draft) -> StageRef:
        assert producer.stage is not None
        stage = producer.base
        if output not in kinds:
            hint = suggest(output, list(kinds), "outputs")
            if output in producer.stage.outputs:
                message = f"`{stage}` does not produce `{output}` with these parameters"
                raise NotAReference("E122", message, f"it produces: {', '.join(kinds) or 'nothing'}")
            raise NotAReference("E122", f"`{stage}` has no output `{output}`", hint)
        kind = kinds[output]
        if kind and kind not in port.types:
            message = f"type mismatch: `{wanted}` wants {' or '.join(port.types)}, `{stage}.{output}` is {kind}"
            fitting = [name for name, other in kinds.items() if other in port.types]
            raise NotAReference("E123", message, f"did you mean `{stage}.{fitting[0]}`?" if fitting else "")
        return StageRef(stage=producer.id, port=output, type=kind)

    def _mismatch(self, wanted: str, port: In, stage: str, kinds: Mapping[str, str]) -> str:
        has = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "no outputs with these parameters"
        return f"type mismatch: `{wanted}` wants {' or '.join(port.types)}, `{stage}` has {has}"

    def kinds(self, producer: Draft) -> dict[str, str]:
        """The type of every output of a stage, empty where only the run can know it."""
        return {name: kind or self.same_as(producer, name) for name, kind in (producer.ports() or {}).items()}

    def same_as(self, producer: Draft, output: str) -> str:
        """The type of an output that takes its input's type, empty if that is not known before the run."""
        assert producer.stage is not None
        refs = producer.inputs.get(producer.stage.outputs[output].same_as, ())
        return refs[0].type if refs else ""

    # -- gates --------------------------------------------------------------------------------------------------------

    def _gates(self, draft: Draft) -> None:
        """Check that gates have metrics to read, and resolve their baselines."""
        mark, node = draft.entry("gates")
        nodes = maps(node)
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
            found = self.reference(item)
            if not isinstance(found, StageRef):
                raise NotAReference("E127", f"a baseline is the metrics of a stage, not `{item.text}`")
            outputs = self.outputs_of(draft, "baseline", METRICS, found, item.text)
            if len(outputs) > 1:
                raise NotAReference("E127", f"a baseline is one stage, `{item.text}` are {len(outputs)}")
            return outputs[0] if outputs else None
        except NotAReference as wrong:
            code = "E127" if wrong.code in ("E123", "E102") else wrong.code
            message = f"`{item.text}` is not metrics" if code == "E127" else str(wrong)
            self.report.add(code, message, item.mark, wrong.hint or "write STAGE.metrics")
        return None
