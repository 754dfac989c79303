from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmctl.spec.commands import check

GOOD = "llmctl: 1\nname: p\nstages:\n  tok: {uses: tokenize, inputs: {text: data}}\n  data: {uses: data}\n"
BAD = GOOD.replace("text: data", "text: dta")


@pytest.fixture
def run(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmctl.registry.get_registry", lambda: registry)
    Path("good.yaml").write_text(GOOD)
    Path("bad.yaml").write_text(BAD)

    def run(*args: str):
        with check.make_context("check", list(args)) as context:
            return check.invoke(context)

    return run


def test_a_good_spec_is_a_short_table(run, capsys):
    assert run("good.yaml") == 0
    assert capsys.readouterr().out == "p: 2 stages, no mistakes\n  data  data\n  tok   tokenize  text=data.text\n"


def test_a_bad_spec_shows_every_mistake_on_stderr(run, capsys):
    assert run("good.yaml", "bad.yaml", "none.yaml", "--set", "tok.vocab_size=1") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error[E102]: stages.tok.with.vocab_size") == 2
    assert "error[E122]: no stage `dta`\n  --> bad.yaml:4:40\n" in captured.err
    assert "error[E011]: cannot read none.yaml" in captured.err
    assert captured.err.endswith("\n4 errors\n")


def test_the_json_form(run, capsys):
    assert run("good.yaml", "bad.yaml", "--format", "json") == 2
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "ok": False,
        "specs": [
            {
                "spec": "good.yaml",
                "ok": True,
                "name": "p",
                "stages": [
                    {
                        "id": "data",
                        "uses": "data",
                        "inputs": {},
                        "outputs": {"text": "dataset.text", "chat": "dataset.chat", "metrics": "metrics"},
                    },
                    {
                        "id": "tok",
                        "uses": "tokenize",
                        "inputs": {"text": ["data.text"]},
                        "outputs": {"tokenizer": "tokenizer", "tokens": "dataset.tokens", "metrics": "metrics"},
                    },
                ],
            },
            {"spec": "bad.yaml", "ok": False},
        ],
        "diagnostics": [
            {
                "code": "E122",
                "message": "no stage `dta`",
                "file": "bad.yaml",
                "line": 4,
                "column": 40,
                "end_column": 43,
                "hint": "did you mean `data`?",
            }
        ],
    }


def test_profiles_and_a_missing_argument(run):
    assert run("good.yaml", "--profile", "cpu") == 2
    assert CliRunner().invoke(check, []).exit_code == 2


SHIPPED = sorted((Path(__file__).parents[2] / "specs").glob("*.yaml"))

MEASURE = """
import resource, sys
from llmctl.__main__ import main
sys.argv = ["llmctl", "check", *sys.argv[1:]]
try:
    code = main()
except SystemExit as leave:
    code = leave.code
usage = resource.getrusage(resource.RUSAGE_SELF)
heavy = {"torch", "numpy", "onnx", "onnxruntime", "transformers", "tokenizers", "rich"} & set(sys.modules)
print(code or 0, round(usage.ru_utime + usage.ru_stime, 3), sorted(heavy), file=sys.stderr)
"""


def measure(*specs: Path) -> tuple[int, float, str]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, specs)], capture_output=True, text=True, check=False, timeout=60
    )
    code, seconds, heavy = done.stderr.strip().splitlines()[-1].split(maxsplit=2)
    return int(code), float(seconds), heavy + done.stderr if heavy != "[]" else heavy


@pytest.mark.parametrize("spec", SHIPPED, ids=lambda spec: spec.stem)
def test_every_shipped_spec_passes_check_without_heavy_imports_in_a_second_of_cpu(spec, budget):
    results = [measure(spec) for _ in range(2)]
    assert {(code, heavy) for code, _, heavy in results} == {(0, "[]")}
    assert min(seconds for _, seconds, _ in results) < budget(1)
