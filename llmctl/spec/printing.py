"""A `Pipeline` back to YAML, so that a command line can be frozen into a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.spec.nodes import scalar_value
from llmctl.spec.resolved import EnvValue, Gate, Pipeline, Ref, Resources, Secret, Source, StageSpec
from llmctl.spec.skeleton import FORMAT
from llmctl.spec.user_config import user_config

BREAKS = set("\x85\u2028\u2029\ufeff")
"""Characters that YAML 1.1 takes for ends of lines, and the byte order mark: only an escape brings them back."""


def spec_text(pipeline: Pipeline) -> str:
    """The YAML of a spec that reads as `pipeline`, which has no rows of a matrix and no `select`."""
    return yaml_text(_document(pipeline))


class Verbatim(str):
    """A number as its source writes it: `1e-4` in the id of a matrix row is not `0.0001`."""


def yaml_text(value: Any) -> str:
    """JSON values, numbers perhaps `Verbatim`, as YAML that our reader reads back as they are."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what our reader, unlike PyYAML's, takes for a number, and leaves maps short and in order."""

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        plain = isinstance(scalar_value(value), str) if len(value) < 4000 else True
        plain = plain and not BREAKS & set(value)
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')

    def verbatim(dumper: yaml.SafeDumper, value: Verbatim) -> yaml.ScalarNode:
        # Whatever PyYAML takes it for, it is left alone.
        tag = dumper.resolve(yaml.ScalarNode, str(value), (True, False))  # type: ignore[no-untyped-call]  # PyYAML
        return yaml.ScalarNode(tag, str(value))

    Dumper.add_representer(str, text)
    Dumper.add_representer(Verbatim, verbatim)
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None, "width": 110}
    return str(yaml.dump(value, Dumper=Dumper, **options))


def _document(pipeline: Pipeline) -> dict[str, Any]:
    head: dict[str, Any] = {"llmctl": FORMAT, "name": pipeline.name}
    if pipeline.secrets:
        head["secrets"] = {name: _secret(secret, pipeline.base) for name, secret in pipeline.secrets.items()}
    own = user_config().remotes  # they are put into every pipeline, and are no part of any spec
    remotes = {name: uri for name, uri in pipeline.remotes.items() if own.get(name) != uri}
    store = {"uri": pipeline.store, "remotes": remotes}
    if given := {key: value for key, value in store.items() if value}:
        head["store"] = given
    sources = {name: _source(source) for name, source in pipeline.sources.items()}
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
        "retries": spec.retries,
        "ephemeral": spec.ephemeral,
        "tag": spec.tag,
    }
    return {key: value for key, value in written.items() if value}


def _source(source: Source) -> dict[str, Any]:
    pinned = {"identity": source.identity} if source.identity != "sha256" else {}
    return {"uri": source.uri, "type": source.type, **pinned, **({"digest": source.digest} if source.digest else {})}


def _secret(secret: Secret, base: Path) -> dict[str, Any]:
    if secret.path is not None:
        return {"from": "file", "path": _path(secret.path, base)}
    return {"from": "env", "variable": secret.variable or secret.name}


def _references(refs: Sequence[Ref]) -> str | list[str]:
    texts = [str(ref) for ref in refs]
    return texts[0] if len(texts) == 1 else texts


def _env(value: EnvValue) -> str | dict[str, Any]:
    if value.secret:
        return {"secret": value.secret}
    return value.value if value.affects_output else {"value": value.value, "affects_output": False}


def _resources(resources: Resources) -> dict[str, Any]:
    texts: Mapping[str, Any] = {
        "cpus": resources.cpus,
        "memory": None if resources.memory is None else f"{resources.memory}B",
        "gpus": resources.gpus,
        "nodes": resources.nodes,
        "gpu_type": resources.gpu_type,
        "disk": None if resources.disk is None else f"{resources.disk}B",
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
