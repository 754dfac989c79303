"""`llmctl check`: read specs, run nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from llmctl.spec.diagnostics import SpecError
from llmctl.spec.pipeline import Pipeline, load_pipeline


@click.command()
@click.argument("specs", metavar="SPEC...", nargs=-1, required=True)
@click.option("--profile", "profiles", metavar="NAME", multiple=True, help="Put this profile on top; may be repeated.")
@click.option(
    "--set", "sets", metavar="KEY=VALUE", multiple=True, help="Set a value, as STAGE.PARAM=VALUE; may be repeated."
)
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", help="How to print the result."
)
def check(specs: Sequence[str], profiles: Sequence[str], sets: Sequence[str], format_: str) -> int:
    """Validate specs: keys, parameters, wiring. Each SPEC is a file or the name of a shipped spec.

    Nothing runs, no network and no torch is needed. Exits with 0, or with 2 and all mistakes.
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
        for failed in errors:
            click.echo(failed.render() + "\n", err=True)
        if errors:
            count = sum(len(failed.diagnostics) for failed in errors)
            click.echo(f"{count} error{'s' if count > 1 else ''}", err=True)
    return 2 if errors else 0


def _inputs(pipeline: Pipeline, stage: str) -> dict[str, list[str]]:
    return {port: [str(ref) for ref in refs] for port, refs in pipeline.stages[stage].inputs.items()}


def _table(pipeline: Pipeline) -> str:
    """Stages in the order in which they run, with what each uses and gets."""
    rows = [
        (stage.id, stage.stage.name, " ".join(f"{p}={','.join(r)}" for p, r in _inputs(pipeline, stage.id).items()))
        for stage in pipeline.stages.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {id_:<{widths[0]}}  {uses:<{widths[1]}}  {inputs}".rstrip() for id_, uses, inputs in rows]
    count = f"{len(rows)} stage{'s' if len(rows) > 1 else ''}"
    return "\n".join([f"{pipeline.name}: {count}, no mistakes", *lines])


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
