"""A `Pipeline` back to YAML, so that a command line can be frozen into a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.spec.nodes import scalar_value
from llmctl.spec.resolved import EnvValue, Gate, Pipeline, Ref, Resources, StageSpec
from llmctl.spec.skeleton import FORMAT


def spec_text(pipeline: Pipeline) -> str:
    """The YAML of a spec that reads as `pipeline`."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what our reader, unlike PyYAML's, takes for a number, and leaves maps short and in order."""

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        plain = isinstance(scalar_value(value), str) if len(value) < 4000 else True
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')

    Dumper.add_representer(str, text)
    return str(
        yaml.dump(
            _document(pipeline), Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
        )
    )


def _document(pipeline: Pipeline) -> dict[str, Any]:
    head: dict[str, Any] = {"llmctl": FORMAT, "name": pipeline.name}
    sources = {name: {"uri": source.uri, "type": source.type} for name, source in pipeline.sources.items()}
    stages = {name: _stage(stage, pipeline.base) for name, stage in pipeline.stages.items()}
    if pipeline.single:
        return head | ({"sources": sources} if sources else {}) | next(iter(stages.values()))
    last = {"next": list(pipeline.next)} if pipeline.next else {}
    return head | ({"sources": sources} if sources else {}) | {"stages": stages} | last


def _stage(spec: StageSpec, base: Path) -> dict[str, Any]:
    written = {
        "uses": spec.stage.name,
        "needs": list(spec.needs),
        "inputs": {port: _references(refs) for port, refs in spec.inputs.items()},
        "with": spec.params.model_dump(mode="json", exclude_unset=True, by_alias=True),
        "env": {name: _env(value) for name, value in spec.env.items()},
        "resources": _resources(spec.resources),
        "gates": [_gate(gate) for gate in spec.gates],
        "output": _path(spec.output, base) if spec.output else None,
        "cache": spec.cache if spec.cache != "auto" else None,
        "tag": spec.tag,
    }
    return {key: value for key, value in written.items() if value}


def _references(refs: Sequence[Ref]) -> str | list[str]:
    texts = [str(ref) for ref in refs]
    return texts[0] if len(texts) == 1 else texts


def _env(value: EnvValue) -> str | dict[str, Any]:
    return value.value if value.affects_output else {"value": value.value, "affects_output": False}


def _resources(resources: Resources) -> dict[str, Any]:
    texts: Mapping[str, Any] = {
        "cpus": resources.cpus,
        "memory": None if resources.memory is None else f"{resources.memory}B",
        "gpus": resources.gpus,
        "time": None if resources.time is None else f"{resources.time}s",
    }
    return {key: value for key, value in texts.items() if value is not None}


def _gate(gate: Gate) -> dict[str, Any]:
    limits: Mapping[str, Any] = {
        "min": gate.min,
        "max": gate.max,
        "baseline": gate.baseline and str(gate.baseline),
        "max_drop": gate.max_drop,
        "max_rise": gate.max_rise,
        "min_ratio": gate.min_ratio,
        "max_ratio": gate.max_ratio,
        "on_fail": None if gate.on_fail == "stop" else gate.on_fail,
    }
    return {"metric": gate.metric, **{key: value for key, value in limits.items() if value is not None}}


def _path(path: Path, base: Path) -> str:
    return f"./{path.relative_to(base).as_posix()}" if path.is_relative_to(base) else str(path)
