"""`select`: a node that picks one row of fan-in lists. Its declaration follows from what it picks from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmctl.spec.draft import Draft
from llmctl.spec.nodes import Map, Node, texts
from llmctl.spec.params import Params
from llmctl.spec.references import NotAReference
from llmctl.spec.resolved import Select, StageRef
from llmctl.stage import PORT, In, Out, Stage

if TYPE_CHECKING:
    from llmctl.spec.wiring import Wiring

METRICS = "metrics"
Lists = Mapping[str, tuple[StageRef, ...]]


def declare_select(wiring: Wiring, draft: Draft) -> None:
    """Resolve the lists of a `select` and declare its ports; after a mistake its outputs stay unknown."""
    model = draft.selection
    _, node = draft.entry("select")
    if model is None or not isinstance(node, Map):
        return
    lists: dict[str, tuple[StageRef, ...]] = {}
    for name, entry in node.entries.items():
        refs = _list(wiring, draft, name, entry.value)
        if not PORT.match(name):
            message = f"{draft.where('select')}: `{name}` is no name of an output"
            wiring.report.add("E102", message, entry.key, "a-z, 0-9 and _, as in best_model")
        elif refs:
            lists[name] = refs
    if len(lists) < len(node.entries) or not _fit_together(wiring, draft, lists):
        return
    ports = [name for name, refs in lists.items() if refs[0].type == METRICS]
    if len(ports) != 1:
        found = f"it has {len(ports)} lists of metrics" if ports else "it has no list of metrics to decide by"
        wiring.report.add("E127", f"`{draft.id}`: {found}", draft.entry("select")[0], 'e.g. metrics: "eval[*]"')
        return
    kinds = {name: refs[0].type for name, refs in lists.items()}
    draft.inputs = dict(lists)
    draft.params = Params()
    draft.select = Select(metric=model.by.metric, mode=model.by.mode, port=ports[0])
    draft.stage = Stage(
        name="select",
        help="Pick one row.",
        params="llmctl.spec.params:Params",
        run="",
        inputs={name: In(kind, many=True) for name, kind in kinds.items()},
        outputs={name: Out(kind) for name, kind in kinds.items()},
        headline=(model.by.metric,),
    )


def _list(wiring: Wiring, draft: Draft, name: str, node: Node) -> tuple[StageRef, ...]:
    """The references of one list; empty after a report, or if they are not known because of another mistake."""
    found: list[StageRef] = []
    for item in texts(node):
        try:
            ref = wiring.reference(item)
            if not isinstance(ref, StageRef):
                raise NotAReference("E102", f"`{item.text}` is no stage", "a select picks among results of stages")
            producers = wiring.instances(draft, ref.stage, every=True)
            if any(producer.ports() is None for producer in producers):
                return ()
            port = ref.port or _port(name, producers[0])
            named = StageRef(stage=ref.stage if ref.stage.endswith("]") else f"{ref.stage}[*]", port=port)
            wanted = In(*{kind for producer in producers for kind in wiring.kinds(producer).values()})
            found += wiring.outputs_of(draft, f"{draft.base}.{name}", wanted, named, item.text)
        except NotAReference as wrong:
            wiring.report.add(wrong.code, str(wrong), item.mark, wrong.hint)
            return ()
    return tuple(found)


def _port(name: str, producer: Draft) -> str:
    """The output that a list called `name` takes from a stage that is named without one: that of its own name, else
    the only one that is metrics, or is none, as the name says."""
    ports = producer.ports() or {}
    if name in ports:
        return name
    fitting = [port for port, kind in ports.items() if (kind == METRICS) == (name == METRICS)]
    if len(fitting) == 1:
        return fitting[0]
    choices = ", ".join(f"{producer.base}.{port}" for port in fitting or ports)
    raise NotAReference("E128", f"several outputs of `{producer.base}` fit `{name}`: {choices}", "name one")


def _fit_together(wiring: Wiring, draft: Draft, lists: Lists) -> bool:
    """Whether every list has one type, and all of them the same rows; reports what does not fit."""
    mark, _ = draft.entry("select")
    for name, refs in lists.items():
        kinds = sorted({ref.type for ref in refs})
        if "" in kinds:
            message = f"the type of `{draft.id}.{name}` is known only when it runs"
            wiring.report.add("E123", message, mark, "give the input that decides it as a source with a `type`")
            return False
        if len(kinds) > 1:
            wiring.report.add("E123", f"`{draft.id}.{name}` mixes {' and '.join(kinds)}", mark)
            return False
    lengths = {name: len(refs) for name, refs in lists.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
        wiring.report.add("E102", f"the lists of `{draft.id}` have different lengths: {counts}", mark)
        return False
    for rows in zip(*lists.values(), strict=True):
        brackets = {ref.stage.partition("[")[2] for ref in rows}
        if "" not in brackets and len(brackets) > 1:
            pair = " and ".join(sorted(f"`{ref.stage}`" for ref in rows))
            wiring.report.add("E102", f"the lists of `{draft.id}` have different rows: {pair}", mark)
            return False
    return True
