"""`llmctl lock`: what a spec takes from outside, written down line by line, and compared with what is there now.

One line per source and per stage's plugin, sorted, so that git can merge two branches line by line. Results are not in
it: two people who work on different stages never meet in this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.errors import InputError
from llmctl.spec.options import spec_layers
from llmctl.store.commands import store_option

if TYPE_CHECKING:
    from llmctl.registry import Registry
    from llmctl.spec.overrides import Setting
    from llmctl.spec.resolved import Pipeline
    from llmctl.store import Store

NAME = "sources.lock.jsonl"
Line = Mapping[str, Any]


@click.command()
@click.argument("spec", metavar="SPEC")
@spec_layers
@click.option("--check", is_flag=True, help="Compare with the file instead of writing it; exit 5 if anything differs.")
@click.option("--file", type=click.Path(path_type=Path), help=f"The file; by default {NAME} beside the spec.")
@store_option
def lock(
    spec: str,
    profiles: tuple[str, ...],
    sets: tuple[Setting, ...],
    check: bool,
    file: Path | None,
    store_path: Path | None,
) -> None:
    """Write down what SPEC takes from outside: the content of every source, the plugin behind every stage."""
    from llmctl.pipeline.commands import spec_store
    from llmctl.registry import get_registry
    from llmctl.spec.files import display
    from llmctl.spec.pipeline import load_pipeline
    from llmctl.store import Store

    pipeline = load_pipeline(spec, profiles, sets, registry=get_registry())
    store = Store.open(store_path or spec_store(pipeline))
    place = file or lock_file(pipeline)
    if check:
        check_lock(pipeline, store, get_registry(), place)
        click.echo(f"{display(place.absolute())}: everything is as it was")
        return
    lines = list(outside_lines(pipeline, store, get_registry()))
    text = "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines)
    fresh = place.with_name(f".{place.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(place)
    click.echo(f"{display(place.absolute())}: {len(lines)} lines")


def lock_file(pipeline: Pipeline) -> Path:
    """Where the lock of a spec lies: beside it, or in the current directory for one that is shipped."""
    beside = pipeline.base if pipeline.base.is_dir() else Path.cwd()
    return beside / NAME


def outside_lines(pipeline: Pipeline, store: Store, registry: Registry) -> Iterator[Line]:
    """The lines of a spec as things are now, sorted by kind and name. Raises what a run raises for its inputs."""
    from llmctl.pipeline.inputs import Inputs, outside_id

    specs = list(pipeline.stages.values())
    inputs = Inputs(pipeline, store)
    found = {str(ref): (ref, artifacts) for ref, artifacts in inputs.outside(specs).items()}
    for name in sorted(found):
        ref, artifacts = found[name]
        line = {"kind": "source", "name": name, "type": artifacts[0].type, "digest": outside_id(artifacts)}
        commit = inputs.revision(ref)
        yield {**line, "revision": commit} if commit else line
    for stage in sorted({spec.stage.name: spec.stage for spec in specs if spec.select is None}.items()):
        yield {"kind": "stage", "name": stage[0], "dist": registry.origin(stage[0]).dist, "rev": stage[1].rev}


def check_lock(pipeline: Pipeline, store: Store, registry: Registry, place: Path) -> None:
    """InputError that names everything in which the lock differs from what is there."""
    kept = {_title(line): line for line in read_lock(place)}
    now = {_title(line): line for line in outside_lines(pipeline, store, registry)}
    changes = [f"{title} is new" for title in now if title not in kept]
    changes += [f"{title} is gone" for title in kept if title not in now]
    changes += [
        f"{title}: {key} {_short(kept[title].get(key))} → {_short(value)}"
        for title, line in now.items()
        for key, value in line.items()
        if title in kept and kept[title].get(key) != value
    ]
    if changes:
        raise InputError(f"{place} does not fit: {'; '.join(changes)}", hint="if that is meant: llmctl lock SPEC")


def read_lock(place: Path) -> Sequence[Line]:
    """The lines of a lock; InputError if there is none, a line is damaged, or two lines speak of one thing."""
    try:
        lines = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"there is no {place}", hint="llmctl lock SPEC writes it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{place} is damaged: {error}", hint="llmctl lock SPEC writes it anew") from error
    if not all(isinstance(line, dict) and {"kind", "name"} <= set(line) for line in lines):
        raise InputError(f"{place} holds a line without kind and name", hint="llmctl lock SPEC writes it anew")
    titles = [_title(line) for line in lines]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice:
        raise InputError(f"{place} has two lines for {twice}", hint="choose one, or write it anew: llmctl lock SPEC")
    return lines


def _title(line: Line) -> str:
    return f"{line['kind']} `{line['name']}`"


def _short(value: Any) -> str:
    text = str(value)
    return text[:19] if text.startswith("sha256:") else text
