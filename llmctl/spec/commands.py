"""`llmctl check`, `render` and `schema`: read specs, run nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from llmctl.error_output import json_lines, wants_json
from llmctl.errors import UsageError
from llmctl.spec.diagnostics import SpecError
from llmctl.spec.options import spec_layers
from llmctl.spec.pipeline import Pipeline, load_pipeline

if TYPE_CHECKING:
    from llmctl.spec.overrides import Setting

WIDEST = 48
"""Characters of a value in a table."""


@click.command()
@click.argument("specs", metavar="SPEC...", nargs=-1, required=True)
@spec_layers
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", help="How to print the result."
)
def check(specs: Sequence[str], profiles: Sequence[str], sets: Sequence[Setting], format_: str) -> int:
    """Validate specs: keys, parameters, wiring. Each SPEC is a file or the name of a shipped spec.

    Nothing runs and no torch is needed; only an `include` with a `url` is downloaded. Exits with 0,
    or with 2 and all mistakes.
    """
    from llmctl.registry import get_registry

    registry = get_registry()
    results: list[Pipeline | SpecError] = []
    for spec in specs:
        try:
            results.append(load_pipeline(spec, profiles, sets, registry=registry))
        except SpecError as error:
            results.append(error)
    errors = [result for result in results if isinstance(result, SpecError)]
    if format_ == "json":
        click.echo(json.dumps(_report(specs, results), indent=2, ensure_ascii=False))
    else:
        pipelines = [pipeline for pipeline in results if isinstance(pipeline, Pipeline)]
        for pipeline in pipelines:
            click.echo(_table(pipeline))
        _say(errors)
    return 2 if errors else 0


def _say(errors: Sequence[SpecError]) -> None:
    """The mistakes on stderr, in the form that `--error-format` asks for."""
    if wants_json(sys.argv[1:]):
        for failed in errors:
            for line in json_lines(failed):
                click.echo(line, err=True)
        return
    for failed in errors:
        click.echo(failed.render() + "\n", err=True)
    if errors:
        count = sum(len(failed.diagnostics) for failed in errors)
        click.echo(f"{count} error{'s' if count > 1 else ''}", err=True)


def _inputs(pipeline: Pipeline, stage: str) -> dict[str, list[str]]:
    return {port: [str(ref) for ref in refs] for port, refs in pipeline.stages[stage].inputs.items()}


def _table(pipeline: Pipeline) -> str:
    """Stages in the order in which they run, with what each uses and gets."""
    rows = [
        (stage.id, stage.stage.name, " ".join(f"{p}={_brief(r)}" for p, r in _inputs(pipeline, stage.id).items()))
        for stage in pipeline.stages.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {id_:<{widths[0]}}  {uses:<{widths[1]}}  {inputs}".rstrip() for id_, uses, inputs in rows]
    count = f"{len(rows)} stage{'s' if len(rows) > 1 else ''}"
    return "\n".join([f"{pipeline.name}: {count}, no mistakes", *lines])


def _brief(refs: Sequence[str]) -> str:
    """References on one line; a fan-in of more than two as its stage with `[*]` and their number."""
    bases = {f"{ref.partition('[')[0]}[*].{ref.rpartition('].')[2]}" for ref in refs if "]." in ref}
    return f"{bases.pop()} ({len(refs)})" if len(refs) > 2 and len(bases) == 1 else ",".join(refs)


def _report(specs: Sequence[str], results: Sequence[Pipeline | SpecError]) -> dict[str, Any]:
    """The JSON form: one entry per spec, and all diagnostics."""
    entries: list[dict[str, Any]] = []
    for spec, result in zip(specs, results, strict=True):
        if isinstance(result, Pipeline):
            stages = [
                {
                    "id": stage.id,
                    "uses": stage.stage.name,
                    "inputs": _inputs(result, stage.id),
                    "outputs": stage.outputs,
                }
                for stage in result.stages.values()
            ]
            entries.append({"spec": spec, "ok": True, "name": result.name, "stages": stages})
        else:
            entries.append({"spec": spec, "ok": False})
    diagnostics = [
        found.as_json() for result in results if isinstance(result, SpecError) for found in result.diagnostics
    ]
    return {"ok": not diagnostics, "specs": entries, "diagnostics": diagnostics}


@click.command()
@click.argument("spec", metavar="SPEC")
@spec_layers
@click.option("--explain", is_flag=True, help="Show for every value the file, line and column that it comes from.")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", help="How to print it.")
def render(spec: str, profiles: Sequence[str], sets: Sequence[Setting], explain: bool, format_: str) -> None:
    """Print SPEC with includes, profiles, settings and variables worked in: a spec again.

    With --explain every value, defaults included, with the place of the layer that sets it.
    """
    from llmctl.console import table
    from llmctl.registry import get_registry
    from llmctl.spec.rendering import origin_rows
    from llmctl.spec.rendering import render as rendered

    found = rendered(spec, profiles, sets, registry=get_registry())
    if not explain:
        text = json.dumps(found.plain(), indent=2, ensure_ascii=False) if format_ == "json" else found.yaml().rstrip()
        click.echo(text)
    elif format_ == "json":
        click.echo(json.dumps(origin_rows(found.origins()), indent=2, ensure_ascii=False))
    else:
        rows = [
            (item.path, _short(json.dumps(item.value, ensure_ascii=False)), _from(item.place, item.through))
            for item in found.origins()
        ]
        click.echo(table(("VALUE", "IS", "FROM"), rows))


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def _from(place: str, through: str) -> str:
    return f"{place}, through {through}" if through else place


@click.command()
@click.argument("kind", type=click.Choice(["pipeline", "stage"]))
@click.argument("name", required=False)
def schema(kind: str, name: str | None) -> None:
    """Print the JSON Schema of spec files, for editors: `pipeline`, or `stage NAME` for the file of a single stage."""
    from llmctl.registry import get_registry
    from llmctl.spec.schema import pipeline_schema, stage_schema

    registry = get_registry()
    if kind == "stage" and name is None:
        raise UsageError("`llmctl schema stage` needs the name of a stage", hint="e.g. llmctl schema stage sft")
    if kind == "pipeline" and name is not None:
        raise UsageError(f"unexpected argument `{name}`", hint=f"llmctl schema stage {name}")
    found = stage_schema(registry.stage(name)) if name else pipeline_schema(registry)
    click.echo(json.dumps(found, indent=2, ensure_ascii=False))
