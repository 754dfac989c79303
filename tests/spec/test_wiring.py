from __future__ import annotations

import pytest

from llmctl.spec.pipeline import IdRef, NameRef, PathRef, SourceRef, StageRef, StdinRef

HEAD = "llmctl: 1\nname: t\nstages:\n"
DATA = "  data: {uses: data}\n"
TOK = DATA + "  tok: {uses: tokenize, inputs: {text: data}}\n"
TRAIN = TOK + "  train: {uses: train-pretrain, inputs: {tokens: tok, tokenizer: tok}}\n"
FULL = TRAIN + "  sft: {uses: sft, inputs: {model: train, data: data.chat}}\n"


def test_a_bare_stage_name_is_the_one_output_that_fits_the_port(load):
    stages = load(HEAD + FULL).stages
    assert stages["tok"].inputs == {"text": (StageRef(stage="data", port="text", type="dataset.text"),)}
    assert stages["train"].inputs == {
        "tokens": (StageRef(stage="tok", port="tokens", type="dataset.tokens"),),
        "tokenizer": (StageRef(stage="tok", port="tokenizer", type="tokenizer"),),
    }
    assert stages["sft"].dependencies == ("data", "train")


def test_every_form_of_reference(load, tmp_path):
    text = f"""\
llmctl: 1
name: t
sources:
  chat: {{uri: raw/chat.jsonl, type: dataset.chat}}
  files: "raw/*.txt"
stages:
  data: {{uses: data, inputs: {{files: [sources.files, ./more, ../x.txt, {tmp_path}/y]}}}}
  a: {{uses: sft, inputs: {{model: "sha256:{"0a" * 32}", data: sources.chat}}}}
  b: {{uses: sft, inputs: {{model: tiny-en/sft@best, data: "-"}}}}
  c: {{uses: eval, inputs: {{model: ./m, data: [sources.chat, data.chat]}}}}
"""
    pipeline = load(text)
    paths = [PathRef(uri=uri, type="files") for uri in ("./more", "../x.txt", f"{tmp_path}/y")]
    assert pipeline.stages["data"].inputs["files"] == (SourceRef(name="files", type="files"), *paths)
    assert pipeline.stages["a"].inputs == {
        "model": (IdRef(id="sha256:" + "0a" * 32, type="model.hf"),),
        "data": (SourceRef(name="chat", type="dataset.chat"),),
    }
    assert pipeline.stages["b"].inputs == {
        "model": (NameRef(name="tiny-en/sft", tag="best", type="model.hf"),),
        "data": (StdinRef(type="dataset.chat"),),
    }
    (model,) = pipeline.stages["c"].inputs["model"]
    assert (model.type, model.where) == ("", "spec.yaml:10:35")  # the port takes two types: only the run can tell
    assert [str(ref) for ref in pipeline.stages["c"].inputs["data"]] == ["sources.chat", "data.chat"]
    assert pipeline.sources["files"].uri == "raw/*.txt"
    assert pipeline.resolve("raw/*.txt") == tmp_path / "raw/*.txt"


def test_order_is_topological_and_otherwise_as_written(load):
    text = HEAD + (
        "  sft: {uses: sft, inputs: {model: train, data: data.chat}}\n"
        "  serve: {uses: serve, needs: [eval], inputs: {model: onnx}}\n"
        "  onnx: {uses: export-onnx, inputs: {model: sft}}\n"
        "  eval: {uses: eval, inputs: {model: sft, data: data.chat}}\n"
    )
    assert list(load(text + TRAIN).stages) == ["data", "tok", "train", "sft", "onnx", "eval", "serve"]


def test_out_same_as_takes_the_type_of_the_bound_input(load):
    text = HEAD + FULL + (
        "  q1: {uses: quantize, inputs: {model: sft}}\n"
        "  onnx: {uses: export-onnx, inputs: {model: sft}}\n"
        "  q2: {uses: quantize, inputs: {model: onnx}}\n"
        "  q3: {uses: quantize, inputs: {model: q2}}\n"
        "  q4: {uses: quantize, inputs: {model: ./somewhere}}\n"
        "  serve: {uses: serve, inputs: {model: q3}}\n"
        "  serve4: {uses: serve, inputs: {model: q4}}\n"
    )  # fmt: skip
    stages = load(text).stages
    kinds = {name: stages[name].outputs["model"] for name in ("q1", "q2", "q3", "q4")}
    assert kinds == {"q1": "model.hf", "q2": "model.onnx", "q3": "model.onnx", "q4": ""}
    assert stages["serve4"].inputs["model"] == (StageRef(stage="q4", port="model", type=""),)


def test_a_type_mismatch_through_same_as_is_found(mistakes):
    text = HEAD + FULL + "  q: {uses: quantize, inputs: {model: sft}}\n  s: {uses: serve, inputs: {model: q}}\n"
    assert mistakes(text) == [
        "E123 spec.yaml:9:36 type mismatch: `s.model` wants model.onnx, `q` has model (model.hf), metrics (metrics)"
    ]


def test_outputs_that_are_switched_off_are_unknown_to_the_rest(load, mistakes):
    text = HEAD + TRAIN + "  sft: {uses: sft, inputs: {model: train, data: data.extra}}\n"
    assert mistakes(text) == [
        "E122 spec.yaml:7:49 `data` does not produce `extra` with these parameters [it produces: text, chat, metrics]"
    ]
    assert "extra" in load(text, "data.produce=[text, extra]").stages["data"].outputs


EVAL = "  q: {uses: eval, inputs: {model: train, data: tok}, "

CASES = [
    (TRAIN + "  s: {uses: sft, inputs: {modl: train, data: data}}\n",
     "E124 spec.yaml:7:18 required input `model` (model.hf) of `sft` is missing "
     "[give it: inputs: {model: train.model}]",
     "E120 spec.yaml:7:27 stage `sft` has no input `modl` [did you mean `model`?]"),
    ("  s: {uses: tokenize}\n",
     "E124 spec.yaml:4:3 required input `text` (dataset.text) of `tokenize` is missing "
     "[give it: inputs: {text: STAGE or ./PATH}]"),
    (DATA + "  s: {uses: tokenize, inputs: {text: data}, with: {extend: true}}\n",
     "E124 spec.yaml:5:23 required input `tokenizer` (tokenizer) of `tokenize` is missing: `extend: true` needs it "
     "[give it: inputs: {tokenizer: STAGE or ./PATH}]"),
    (TRAIN + "  s: {uses: sft, inputs: {model: train, data: sources.chta}}\nsources: {chat: ./x}\n",
     "E121 spec.yaml:7:47 no source `chta` [did you mean `chat`?]"),
    (TRAIN + "  s: {uses: sft, inputs: {model: train, data: sources.chat}}\nsources: {chat: ./x}\n",
     "E123 spec.yaml:7:47 type mismatch: `s.data` wants dataset.chat, `sources.chat` is files "
     "[declare it: chat: {uri: ./x, type: dataset.chat}]"),
    (TRAIN + "  s: {uses: sft, inputs: {model: train, data: data.chta}}\n",
     "E122 spec.yaml:7:47 `data` has no output `chta` [did you mean `chat`?]"),
    (TRAIN + "  s: {uses: sft, inputs: {model: train.metrics, data: data}}\n",
     "E123 spec.yaml:7:34 type mismatch: `s.model` wants model.hf, `train.metrics` is metrics "
     "[did you mean `train.model`?]"),
    (TRAIN + "  s: {uses: sft, inputs: {model: trian, data: data}}\n",
     "E122 spec.yaml:7:34 no stage `trian` [did you mean `train`?]"),
    (TRAIN + "  s: {uses: sft, inputs: {model: train, data: questions.jsonl}}\n",
     "E122 spec.yaml:7:47 no stage `questions` [a path starts with ./: ./questions.jsonl]"),
    (TRAIN + "  s: {uses: sft, inputs: {model: Base/model, data: data}}\n",
     "E102 spec.yaml:7:34 `Base/model` is no stage, source, path or artifact [a path starts with ./: ./Base/model]"),
    (TRAIN + "  s: {uses: sft, inputs: {model: 'sha256:xyz', data: data}}\n",
     "E102 spec.yaml:7:34 `sha256:xyz` is no content id [sha256: and 8 to 64 digits 0-9a-f]"),
    (TRAIN + "  s: {uses: sft, inputs: {model: [train, ./m], data: data}}\n",
     "E102 spec.yaml:7:34 stages.s.inputs.model: this port takes one input (got 2)"),
    (TRAIN + "  s: {uses: sft, inputs: {model: train, data: data}, needs: [tik]}\n",
     "E125 spec.yaml:7:62 `needs` names no stage: `tik` [did you mean `tok`?]"),
    ("  a: {uses: sft, inputs: {model: b, data: ./d}}\n  b: {uses: sft, inputs: {model: c, data: ./d}}\n"
     "  c: {uses: sft, inputs: {model: a, data: ./d}}\n",
     "E126 spec.yaml:4:34 stages wait for each other: `a` → `b` → `c` → `a`"),
    ("  a: {uses: sft, inputs: {model: a, data: ./d}}\n",
     "E126 spec.yaml:4:34 stages wait for each other: `a` → `a`"),
    (DATA + "  a: {uses: eval, inputs: {model: ./m, data: data}}\n  b: {uses: data, needs: [c]}\n"
     "  c: {uses: data, needs: [b]}\n", "E126 spec.yaml:6:27 stages wait for each other: `b` → `c` → `b`"),
    (DATA + "  a: {uses: sft, inputs: {model: ./m, data: data}}\n  b: {uses: data, with: {produce: [chat, extra]}}\n"
     "  c: {uses: sft, inputs: {model: ./m, data: b}}\n",
     "E128 spec.yaml:7:45 several outputs of `b` fit `c.data`: b.chat, b.extra [name one]"),
    (TRAIN + "  q: {uses: serve, inputs: {model: ./m}, gates: [{metric: a, min: 1}]}\n",
     "E127 spec.yaml:7:42 a gate needs metrics, and `serve` produces none here"),
    (TRAIN + EVAL + "gates: [{metric: a, baseline: train.model, max_drop: 1}]"
     "}\n", "E127 spec.yaml:7:84 `train.model` is not metrics [did you mean `train.metrics`?]"),
    (TRAIN + EVAL + "gates: [{metric: a, baseline: ./m, max_drop: 1}]}\n",
     "E127 spec.yaml:7:84 `./m` is not metrics [write STAGE.metrics]"),
    (TRAIN + EVAL + "gates: [{metric: a, baseline: tran, max_drop: 1}]}\n",
     "E122 spec.yaml:7:84 no stage `tran` [did you mean `train`?]"),
    (TRAIN + EVAL + "gates: [{metric: a}, {metric: b, min: 3, max: 1}, "
     "{metric: c, baseline: train}, {metric: d, max_drop: 1}]}\n",
     "E102 spec.yaml:7:62 stages.q.gates.0: a gate needs `min`, `max`, or `baseline` with one of `max_drop`, "
     "`max_rise`, `min_ratio`, `max_ratio`",
     "E102 spec.yaml:7:75 stages.q.gates.1: `min` 3 is above `max` 1, no value can pass",
     "E102 spec.yaml:7:104 stages.q.gates.2: `baseline` needs one of `max_drop`, `max_rise`, `min_ratio`, `max_ratio`",
     "E102 spec.yaml:7:134 stages.q.gates.3: `max_drop`, `max_rise`, `min_ratio`, `max_ratio` need a `baseline`"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1].partition(" ")[0])
def test_wiring_mistakes(mistakes, case):
    text, *expected = case
    assert mistakes(HEAD + text) == expected


def test_one_mistake_causes_no_others_downstream(mistakes):
    text = "llmctl: 1\nname: t\nvars: {v: 1}\nstages:\n" + FULL.replace(
        "inputs: {text: data}", 'inputs: {text: data}, with: {vocab_size: "${{ vars.w }}"}'
    )
    assert mistakes(text) == ["E030 spec.yaml:6:67 `vars.w` is not defined"]


def test_gates_keep_every_limit(load):
    text = HEAD + TRAIN + (
        "  q:\n    uses: eval\n    inputs: {model: train, data: tok}\n    gates:\n"
        "      - {metric: a, min: 1, max: 2.5}\n"
        "      - {metric: b, baseline: train, max_drop: 0.1, max_rise: 1, on_fail: warn}\n"
    )  # fmt: skip
    first, second = load(text).stages["q"].gates
    assert (first.metric, first.min, first.max, first.baseline, first.on_fail) == ("a", 1, 2.5, None, "stop")
    assert second.baseline == StageRef(stage="train", port="metrics", type="metrics")
    assert (second.max_drop, second.max_rise, second.on_fail, second.min) == (0.1, 1, "warn", None)


def test_a_baseline_is_waited_for(load):
    text = HEAD + (
        "  q: {uses: eval, inputs: {model: ./m, data: ./d}, gates: [{metric: a, baseline: p, max_drop: 0}]}\n"
        "  p: {uses: eval, inputs: {model: ./m, data: ./d}}\n"
    )
    pipeline = load(text)
    assert list(pipeline.stages) == ["p", "q"] and pipeline.stages["q"].dependencies == ("p",)


def test_operational_keys_arrive_typed(load, tmp_path):
    text = HEAD + (
        "  data:\n    uses: data\n    output: ../out\n    cache: refresh\n    tag: best\n"
        "    resources: {memory: 1.5GiB, time: 1h30m, cpus: 2, gpus: 0}\n"
        "    env: {A: x, B: {value: y, affects_output: false}}\n"
        "defaults: {resources: {cpus: 8, memory: 500MB}, env: {A: z, C: w}}\n"
    )
    spec = load(text).stages["data"]
    assert spec.output is not None and spec.output.resolve() == tmp_path.parent / "out"
    assert (spec.cache, spec.tag) == ("refresh", "best")
    resources = spec.resources
    assert (resources.memory, resources.time, resources.cpus, resources.gpus) == (3 * 2**29, 5400, 2, 0)
    assert {name: (value.value, value.affects_output) for name, value in spec.env.items()} == {
        "A": ("x", True),
        "B": ("y", False),
        "C": ("w", True),
    }


def test_two_thousand_stages_stay_quick(load):
    import time

    lines = ["  s0: {uses: sft, inputs: {model: ./m, data: ./d}}"]
    lines += [f"  s{n}: {{uses: sft, inputs: {{model: s{n - 1}, data: ./d}}}}" for n in range(1, 2000)]
    start = time.process_time()
    assert len(load(HEAD + "\n".join(lines)).stages) == 2000
    assert time.process_time() - start < 6  # linear; 1.2 s measured
