"""A stage that is right, and a way to install it with one thing wrong."""

import json

import pytest

from llmctl.testing.fixtures import run_spec, store, tiny, tiny_text, tiny_tokens  # noqa: F401  # fixtures

INIT = """
{imports}
from llmctl import In, Out, Stage, hookimpl

@hookimpl
def register_stages():
    return [Stage(name="odd", help="Does a thing.", inputs={{"text": In("dataset.text")}},
                  outputs={{"text": Out("dataset.text"), "metrics": Out("metrics")}},
                  params="odd.params:OddParams", run="odd.run:run", rev={rev}{more})]
"""
PARAMS = """
{imports}
from llmctl import Field, Params

class Inner(Params):
    depth: int = Field({depth}, description="how deep")

class OddParams(Params):
    rows: int = Field({rows}, description="rows that are kept")
    every: int = Field({every}, affects="nothing", description="rows between two checkpoints")
    inner: Inner = Field(Inner(), description="nested")
    {fields}
"""
RUN = """
import json, os, sys, time
from pathlib import Path
from llmctl.text.datasets import DatasetWriter, read_rows

def run(ctx, params, text):
    state = ctx.resume_dir / "state.json"
    rows = list(read_rows(text))[: params.rows + params.inner.depth]
    kept = json.loads(state.read_text()) if state.exists() else []
    for row in rows[len(kept):]:
        kept.append(row["text"].upper())
        if len(kept) % params.every == 0:
            {checkpoint}
            ctx.progress(len(kept))
            if ctx.should_stop():
                raise ctx.stopped(len(kept))
    with DatasetWriter(ctx.output("text"), "dataset.text", ("train",)) as writer:
        for number, line in enumerate(kept):
            writer.add("train", {{"id": str(number), "text": line}})
    ctx.report({{"rows": len(kept), "time": time.time()}})
    {end}
"""
CHECKPOINT = """
            ctx.resume_dir.mkdir(parents=True, exist_ok=True)
            temporary = state.with_suffix(".tmp")
            temporary.write_text(json.dumps(kept))
            temporary.replace(state)
"""


@pytest.fixture
def odd(install, site, tmp_path):
    """Install the plugin `odd-dist`; a second call replaces its files. `run` replaces texts of `run.py`."""

    def put(
        *,
        rev=1,
        rows=20,
        every=4,
        depth=0,
        fields="",
        imports="",
        more="",
        params_imports="",
        checkpoint=CHECKPOINT,
        end="",
        run=(),
    ):
        source = RUN.format(checkpoint=checkpoint.strip(), end=end)
        for old, new in run:
            assert old in source
            source = source.replace(old, new)
        files = {
            "odd/__init__.py": INIT.format(imports=imports, rev=rev, more=more),
            "odd/params.py": PARAMS.format(rows=rows, every=every, depth=depth, fields=fields, imports=params_imports),
            "odd/run.py": source,
        }
        if (site / "odd").exists():
            for name, text in files.items():
                (site / name).write_text(text)
        else:
            install("odd-dist", {"odd": "odd"}, files)

    return put


@pytest.fixture
def check(llmctl, tmp_path):
    """`check("commit", examples=[…])`: the outcome of one check of `odd`, run as users run it."""

    def run(name, *args, examples=None, unread=None, file=True):
        path = tmp_path / "work" / "llmctl-plugin.json"
        if file:
            content = (
                json.loads(path.read_text()) if path.exists() else {"llmctl-plugin": 1, "distribution": "odd-dist"}
            )
            content |= {"examples": {"odd": examples}} if examples else {}
            content |= {"unread": {"odd": unread}} if unread else {}
            path.write_text(json.dumps(content))
        done = llmctl("plugins", "test", "odd-dist", "--only", name, "--format", "json", *args, timeout=120)
        assert done.returncode in (0, 3), done.stderr
        (row,) = json.loads(done.stdout)
        assert (row["status"] == "failed") == (done.returncode == 3)
        return row["status"], row["reason"]

    return run
