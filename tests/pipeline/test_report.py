"""The report and what is printed at the end."""

import html.parser
import json
import re

import pytest

from llmctl.pipeline import charts
from llmctl.pipeline.next_steps import next_steps
from llmctl.pipeline.report import render
from llmctl.pipeline.result import GateResult, RunResult, StageResult
from llmctl.spec.params import Params
from llmctl.spec.resolved import Pipeline, StageRef, StageSpec
from llmctl.stage import Artifact, In, Out, Stage

EVIL = "<script>alert('x')</script>"


class Page(html.parser.HTMLParser):
    """Collects tags and text, and refuses tags that are not closed in order."""

    VOID = {"meta", "line", "circle", "polyline", "rect"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def run(tmp_path):
    """A pipeline train → eval of hand-made results, with curves and samples."""
    train = Stage(
        name="train", help="", params="", run="", outputs={"model": Out("model.hf"), "metrics": Out("metrics")}
    )
    score = Stage(
        name="eval", help="", params="", run="", inputs={"model": In("model.hf")}, outputs={"metrics": Out("metrics")}
    )
    specs = {
        "train": StageSpec(
            id="train", stage=train, params=Params(), inputs={}, outputs={}, output=tmp_path / "exports/mine"
        ),
        "eval": StageSpec(
            id="eval",
            stage=score,
            params=Params(),
            inputs={"model": (StageRef(stage="train", port="model"),)},
            outputs={},
        ),
    }
    specs["train"].outputs.update(model="model.hf", metrics="metrics")
    specs["eval"].outputs.update(metrics="metrics")

    def artifact(name, type, **files):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file.replace("_", ".")).write_text(text)
        return Artifact(tmp_path / name, type, f"sha256:{name:0<64}", {"parameters": 1_234_567})

    curve = "".join(json.dumps({"step": i, "loss": 5 - i / 100, "lr": 1}) + "\n" for i in range(300))
    curve += json.dumps({"step": 300, "loss.validation": 2.5}) + "\n"
    samples = [{"question": f"q{i}", "answer": EVIL, "expected": "e", "ok": i % 3 == 0} for i in range(20)]
    rows = "".join(json.dumps(sample) + "\n" for sample in samples)
    model, numbers = artifact("m", "model.hf", weights="x" * 2048), artifact("n", "metrics", curves_jsonl=curve)
    scores = artifact("s", "metrics", samples_jsonl=rows)
    stages = {
        "train": StageResult(id="train", status="done", outputs={"model": model, "metrics": numbers}, seconds=61.0),
        "eval": StageResult(
            id="eval", status="cached", outputs={"metrics": scores}, metrics={"exact_match.value": 0.75}
        ),
    }
    gate = {
        "stage": "eval",
        "metric": "exact_match.value",
        "value": 0.75,
        "limit": 0.8,
        "relation": ">=",
        "message": "m",
    }
    stages["eval"].gates = (GateResult(ok=False, on_fail="warn", **gate),)
    pipeline = Pipeline(name="mine", file=None, base=tmp_path, stages=specs)
    return pipeline, RunResult(run="r", directory=tmp_path, code=0, stages=stages, seconds=62.0)


def test_the_page_is_whole_and_needs_nothing_else(run):
    text = render(*run)
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "img" not in page.tags
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert not re.findall(r"url\(|@import|https?://", text)
    assert EVIL in "".join(page.words)  # as text, not as a tag
    assert "prefers-color-scheme: dark" in text


def test_the_page_shows_numbers_gates_curves_and_answers(run):
    page = Page(render(*run))
    words = [" ".join(word.split()) for word in page.words if word.strip()]
    for expected in ("0.75", "≥ 0.8", "missed", "1.23M", "2.0 KiB", "1:01 min", "train", "validation", "train → eval"):
        assert expected in words, expected
    assert words.count("expected: e") == 6
    assert page.tags.count("polyline") == 2
    assert [words[words.index("Models") + i] for i in range(1, 6)] == [
        "Stage",
        "Type",
        "Size",
        "Parameters",
        "exact match",
    ]


def test_ticks_are_round_and_cover_the_range():
    assert charts.ticks(0.13, 0.92) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(0, 300) == [0, 100, 200, 300]
    assert charts.ticks(7, 7)[0] <= 7 <= charts.ticks(7, 7)[-1]
    assert charts.ticks(-3, 4) == [-4, -2, 0, 2, 4]


def test_a_long_curve_keeps_its_ends_and_its_mean():
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    thinned = charts.thin(points)
    assert len(thinned) == charts.MOST_POINTS
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(3, abs=0.1)
    assert charts.thin(points[:50]) == points[:50]


def test_an_empty_chart_is_nothing():
    assert charts.line_chart("x", {"a": []}) == ""
    assert "<circle" in charts.line_chart("x", {"a": [(1, 2)]})


def test_next_steps_name_the_exported_model(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / "venv/bin/llmctl")])
    lines = next_steps(*run, "mine.yaml")
    assert lines[1:3] == [
        "  venv/bin/llmctl chat exports/mine",
        "  venv/bin/llmctl serve --model exports/mine --port 8000",
    ]
    body = json.loads(lines[3].rpartition(" -d ")[2].strip("'"))
    assert body == {"model": "mine", "messages": [{"role": "user", "content": "q0"}]}
    assert lines[5:] == ["  q0", "  q3", "  q6"]
    run[1].stages["train"].status = "failed"
    assert next_steps(*run, "mine.yaml") == []


def test_only_what_the_model_answered_itself_is_proposed(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = tmp_path / "found"
    found.mkdir()
    row = {"expected": "e", "ok": True}
    rows = [
        {**row, "question": "found in a document", "citations": [{"number": 1}]},
        {**row, "question": "chosen among four", "task": "accuracy", "chance": 0.25},
    ]
    (found / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rag = StageResult(id="rag", status="done", outputs={"metrics": Artifact(found, "metrics", "sha256:r")})
    run[1].stages["rag"] = rag
    run[0].stages["rag"] = run[0].stages["eval"]
    assert next_steps(*run, "mine.yaml")[5:] == ["  q0", "  q3", "  q6"]


def test_a_run_ends_with_a_table_and_a_report(llmctl, fake_stages, spec, work):
    spec("a: {uses: make, output: ./exports/text}\nc: {uses: count, inputs: {text: a}}")
    done = llmctl("run", "p.yaml")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["STAGE", "RESULT", "TIME", "ARTIFACT"]
    assert lines[1].split()[:3] == ["a", "rows", "3"]
    assert re.search(r"sha256:[0-9a-f]{8}$", lines[1])
    assert lines[-1] == f"report: {work / 'exports/p-report.html'}"
    Page((work / "exports/p-report.html").read_text())
    spec("w: {uses: wrong}", name="q")
    done = llmctl("run", "q.yaml")
    (path,) = [line.removeprefix("report: ") for line in done.stdout.splitlines() if line.startswith("report: ")]
    assert "runs/" in path
    assert "Exit 1: `w`: ValueError: what happened" in (work / path).read_text()
