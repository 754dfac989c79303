"""`llmctl curves`: one page of one or several trainings, whole in itself."""

from __future__ import annotations

import json
import re

import pytest

from llmctl.pipeline.curves import of_rows, render

TRAINS = """
from llmctl import Out, Params, Stage, hookimpl
import json

class Rate(Params):
    lr: float = 0.1

def run(ctx, params):
    rows = []
    for step in range(1, 31):
        loss = 4 / (1 + params.lr * step)
        row = {"step": step, "loss": loss, "lr": params.lr, "grad_norm": 1 / step, "tokens_per_s": 1000.0 + step}
        if step % 10 == 0:
            row["loss.validation"] = loss + 0.1
        rows.append(row)
        for name in row:
            if name != "step":
                ctx.metric(name, row[name], step)
    (ctx.output("metrics") / "curves.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    ctx.report({"loss.train": loss})

@hookimpl
def register_stages():
    metrics = {"metrics": Out("metrics")}
    return [Stage(name="trains", help="Train.", params="training:Rate", run="training:run", outputs=metrics)]
"""


@pytest.fixture
def trained(install, llmctl, tmp_path):
    install("training", {"training": "training"}, {"training.py": TRAINS})
    spec = "llmctl: 1\nname: p\nstages:\n  a: {uses: trains}\n  b: {uses: trains, with: {lr: 0.5}}\n"
    (tmp_path / "work" / "p.yaml").write_text(spec)
    done = llmctl("run", "p.yaml")
    assert done.returncode == 0, done.stderr
    return tmp_path / "work"


def test_the_latest_run_and_results_side_by_side(trained, llmctl):
    done = llmctl("curves")
    assert done.returncode == 0, done.stderr
    assert "a of 20" in done.stdout and "30 steps, training loss, validation loss, learning rate" in done.stdout
    page = (trained / "curves.html").read_text()
    assert page.count("<svg") == 5 and page.count("<polyline") == 10
    # Whole in itself: nothing is fetched, nothing is run.
    assert not re.search(r"<script|<link|src=|@import|url\(", page)
    done = llmctl("curves", "p/a", "p/b", "--html", "two.html")
    assert done.returncode == 0 and "p/a: 30 steps" in done.stdout
    assert (trained / "two.html").read_text().count("<polyline") == 10
    # A run that still goes on: its last line is half written.
    (log,) = trained.glob(".llmctl/store/runs/*/metrics.jsonl")
    log.write_text(log.read_text()[:-7])
    assert llmctl("curves").returncode == 0


def test_what_has_no_curves_says_so(llmctl, trained):
    assert llmctl("curves", "p/c").returncode == 5
    done = llmctl("curves", "--store", trained / "none")
    assert done.returncode == 5 and "nothing has run" in done.stderr


def test_names_are_escaped_and_what_is_no_number_is_left_out():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": True, "other": 1.0}]
    page = render([of_rows("<b>x</b>", iter(json.loads(json.dumps(rows))))])
    assert "<b>x" not in page and page.count("<svg") == 1 and "<circle" in page
