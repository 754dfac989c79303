"""Whatever is in a spec, the answer is a pipeline or diagnostics that can be shown; never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmctl.spec.diagnostics import SpecError

TEXT = """
llmctl: 1
name: t
vars: {seed: 3, deep: {list: [0.5, 0.9]}}
sources: {chat: {uri: raw/chat.jsonl, type: dataset.chat}, more: ./x}
defaults: {env: {A: "1"}, resources: {cpus: 2}}
stages:
  data: {uses: data, inputs: {files: [sources.more, ./y]}, with: {clean: {lang: en}, produce: [text, chat]}}
  tok: {uses: tokenize, inputs: {text: data}}
  train:
    uses: train-pretrain
    inputs: {tokens: tok, tokenizer: tok}
    with: {lr: 1e-5, betas: "${{ vars.deep.list }}", run_tag: "x-${{ vars.seed }}", weights: {a: 1}, chunks: 3}
    resources: {memory: 1GiB, time: 2h}
    env: {B: {value: "~", affects_output: false}}
    output: ./out
  q: {uses: quantize, inputs: {model: train}}
  eval:
    uses: eval
    needs: [data]
    inputs: {model: q, data: [tok, sources.chat]}
    gates: [{metric: a.b, min: 0.5}, {metric: c, baseline: other, max_drop: 0.1, on_fail: warn}]
  other: {uses: eval, inputs: {model: ./m, data: sources.chat}}
  tuned:
    uses: sft
    inputs: {model: train, data: sources.chat}
    matrix: {lr: [1e-5, 3e-5], seed: [1, 2], exclude: [{lr: 1e-5, seed: 2}], include: [{lr: 7, seed: 7}]}
    with: {lr: "${{ matrix.lr }}", seed: "${{ matrix.seed }}", run_tag: "r ${{ matrix.lr }}"}
    env: {T: {secret: TOKEN}, H: "${{ env.HOME }}"}
    retries: 2
  judged: {uses: eval, foreach: tuned, inputs: {model: tuned, data: sources.chat}, ephemeral: true}
  best: {select: {model: "tuned[*]", metrics: "judged[*]"}, by: {metric: acc, mode: max}}
  final: {uses: export-onnx, needs: [judged], inputs: {model: best}}
secrets: {TOKEN: {from: env}, FILE: {from: file, path: ./f}}
store: {uri: ./s, remotes: {a: "s3://b"}}
profiles: {p: {stages: {train: {with: {max_steps: 5}}}}}
"""

PIECES = st.sampled_from(
    ["", "null", "3", "1.5", "x", "[]", "{}", "[x, 3]", "{a: 1}", "true", "'1'", ".nan", "-", "./p", "train", "data",
     "sources.chat", "${{ vars.seed }}", "${{ vars.nope }}", "${{ vars.deep }}", "eval", "uses: x", "*a", "&a x",
     "\t", "!replace", "!replace {a: 1}", "tuned[*]", "tuned[lr=7]", "${{ matrix.lr }}", "${{ env.NO }}",
     "foreach:", "select:", "matrix:", "include:", "tuned"]
)  # fmt: skip
OPTIONS = st.sampled_from(
    ["train.lr=1", "train.betas=x", "vars.deep=3", "sources.more=5", "stages.train=3", "stages.train.with=[1]",
     "stages=1", "vars={}", "sources.chat.type=files", "train.weights.a.b=1", "name=", "llmctl=x", "defaults.env=3",
     "eval.tasks=[x]", "stages.eval.gates=[{}]", "stages.eval.gates=[3]", "stages.eval.needs=[[a]]",
     "stages.data.inputs=3", "stages.data.inputs.files=[[x]]", "data.clean=", "data.clean.lang=", "train.chunks={a: 1}",
     "stages.tuned.matrix={}", "stages.tuned.matrix.lr=3", "stages.tuned.matrix.lr+=[4, 4]",
     "stages.judged.foreach=best", "stages.best.by=3", "stages.best.select={}", "stages.best.select.model=[[1]]",
     "train.betas[0]=x", "data.produce+=3", "eval.tasks[9]=1", "secrets.TOKEN=3", "store=3", "store.remotes.a=[1]",
     "stages.tuned.env.T.secret=NO", "train.weights+=1",
     "stages.tuned.matrix.include[0].lr=[1]", "stages.tuned.uses=data@>=9", "stages.tuned.uses=sft@!!"]
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, derandomize=True)
@given(data=st.data())
def test_damaged_specs_give_diagnostics(load, data):
    words = TEXT.replace("${{ ", "${{_").replace(" }}", "_}}").split(" ")
    for _ in range(data.draw(st.integers(0, 3))):
        words[data.draw(st.integers(0, len(words) - 1))] = data.draw(PIECES)
    text = " ".join(words).replace("${{_", "${{ ").replace("_}}", " }}")
    options = data.draw(st.lists(OPTIONS, max_size=2))
    profiles = data.draw(st.sampled_from([(), ("p",), ("zz",)]))
    try:
        pipeline = load(text, *options, profiles=profiles)
    except SpecError as error:
        assert error.diagnostics and error.render()
        assert all(found.as_json()["code"].startswith("E") for found in error.diagnostics)
    else:
        assert all(not spec.unbound() for spec in pipeline.stages.values())


def test_the_undamaged_spec_is_good(load):
    assert len(load(TEXT).stages) == 6 + 4 + 4 + 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, derandomize=True)
@given(data=st.data())
def test_bytes_changed_at_random_give_diagnostics(load, registry, data):
    """Single characters of a whole spec: deleted, doubled, exchanged for others that mean something in YAML."""
    text = TEXT.lstrip()
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        piece = data.draw(st.sampled_from(list("{}[]:,#&*!|>'\"%@`-?\n\t\\ \x00\x85é\ud7ff$") + ["", text[place] * 2]))
        text = text[:place] + piece + text[place + 1 :]
    try:
        load(text)
    except SpecError as error:
        assert error.diagnostics and error.render()


def test_a_stage_of_a_broken_plugin_says_what_is_broken(mistakes, registry):
    registry.failures = {"summarize": SimpleNamespace(reason="plugin `x` fails to import", hint="pip install -U x")}
    text = "llmctl: 1\nname: t\nstages:\n  s: {uses: summarize}\n"
    assert mistakes(text) == [
        "E110 spec.yaml:4:13 stage `summarize` is unavailable: plugin `x` fails to import [pip install -U x]"
    ]


def test_parameters_that_need_a_missing_extra_name_it(mistakes, registry, tmp_path, monkeypatch):
    from fake_stages import stage

    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    registry.stages["more"] = stage("more", "X", {}, {}, extra="train")
    object.__setattr__(registry.stages["more"], "params", "needs_more:X")
    (found,) = mistakes("llmctl: 1\nname: t\nstages:\n  s: {uses: more}\n")
    assert found.endswith("No module named 'surely_not_installed' [pip install 'llmctl[train]']")


def test_reading_specs_needs_no_heavy_import_and_no_yaml_before_use():
    import subprocess

    code = (
        "import sys, llmctl.spec.pipeline, llmctl.spec.resolved, llmctl.spec.canonical, llmctl.spec.commands\n"
        "print(sorted({'yaml', 'pydantic', 'torch', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path("/"))
    assert done.stdout == "[]\n"


def test_a_machine_without_any_stage_says_so(load, registry):
    registry.stages = {}
    with pytest.raises(SpecError, match="there are no installed stages"):
        load("llmctl: 1\nname: t\nstages: {a: {uses: b}}\n")
