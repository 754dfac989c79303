from __future__ import annotations

import pytest

from llmctl.spec.matrix import row_order

TEXT = """
llmctl: 1
name: t
vars: {seeds: [1, 2]}
stages:
  data: {uses: data}
  tok: {uses: tokenize, inputs: {text: data}}
  train: {uses: train-pretrain, inputs: {tokens: tok, tokenizer: tok}}
  sft:
    uses: sft
    inputs: {model: train, data: data.chat}
    matrix: {lr: [1e-5, 3e-5], seed: "${{ vars.seeds }}"}
    with: {lr: "${{ matrix.lr }}", seed: "${{ matrix.seed }}", run_tag: "lr ${{ matrix.lr }} of ${{ name }}"}
  eval:
    uses: eval
    foreach: sft
    inputs: {model: sft, data: data.chat}
  best:
    select: {model: "sft[*]", metrics: "eval[*]"}
    by: {metric: exact_match, mode: max}
  onnx: {uses: export-onnx, inputs: {model: best}}
"""

IDS = ["lr=1e-5,seed=1", "lr=1e-5,seed=2", "lr=3e-5,seed=1", "lr=3e-5,seed=2"]


def test_a_grid_becomes_an_instance_per_row(load):
    pipeline = load(TEXT)
    assert [id for id in pipeline.stages if id.startswith("sft[")] == [f"sft[{row}]" for row in IDS]
    spec = pipeline.stages["sft[lr=3e-5,seed=2]"]
    assert (spec.base, spec.row, spec.params.lr, spec.params.seed) == ("sft", {"lr": 3e-5, "seed": 2}, 3e-5, 2)
    assert spec.params.run_tag == "lr 3e-5 of t", "text takes the source text"
    assert pipeline.stages["train"].base == "train" and pipeline.stages["train"].row == {}


def test_foreach_follows_row_by_row(load):
    pipeline = load(TEXT)
    for row in IDS:
        (model,) = pipeline.stages[f"eval[{row}]"].inputs["model"]
        assert (model.stage, model.port, model.type) == (f"sft[{row}]", "model", "model.hf")
        assert pipeline.stages[f"eval[{row}]"].row == pipeline.stages[f"sft[{row}]"].row


def test_select_declares_outputs_of_the_types_that_it_picks_from(load):
    best = load(TEXT).stages["best"]
    assert (best.select.metric, best.select.mode, best.select.port) == ("exact_match", "max", "metrics")
    assert best.outputs == {"model": "model.hf", "metrics": "metrics"}
    assert [str(ref) for ref in best.inputs["model"]] == [f"sft[{row}].model" for row in IDS]
    assert [str(ref) for ref in best.inputs["metrics"]] == [f"eval[{row}].metrics" for row in IDS]
    (model,) = load(TEXT).stages["onnx"].inputs["model"]
    assert (str(model), model.type) == ("best.model", "model.hf")


def test_fan_in_is_ordered_by_instance_id_whatever_the_order_of_the_text(load):
    shuffled = TEXT.replace("[1e-5, 3e-5]", "[3e-5, 1e-5]").replace("seeds: [1, 2]", "seeds: [2, 1]")
    pipeline = load(shuffled)
    assert [id for id in pipeline.stages if id.startswith("sft[")][0] == "sft[lr=3e-5,seed=2]", (
        "run order is as written"
    )
    assert [str(ref) for ref in pipeline.stages["best"].inputs["model"]] == [f"sft[{row}].model" for row in IDS]


def test_fan_in_is_ordered_by_numbers_as_numbers(load):
    many = TEXT.replace("[1e-5, 3e-5]", "[1e-5, 3e-5, 1e-4]").replace("seeds: [1, 2]", "seeds: [10, 2, -1]")
    rows = [f"lr={lr},seed={seed}" for lr in ("1e-5", "3e-5", "1e-4") for seed in (-1, 2, 10)]
    best = load(many).stages["best"]
    assert [str(ref) for ref in best.inputs["model"]] == [f"sft[{row}].model" for row in rows]
    assert [str(ref) for ref in best.inputs["metrics"]] == [f"eval[{row}].metrics" for row in rows]


def test_the_order_of_rows_is_total() -> None:
    ids = ["a=b", "a=nan", "a=10", "a=2", "a=1e1", "a=inf", "a=2,b=x", "a=-0.5", "b=1"]
    expected = ["a=-0.5", "a=2", "a=2,b=x", "a=10", "a=1e1", "a=b", "a=inf", "a=nan", "b=1"]
    for shuffled in (ids, ids[::-1], sorted(ids)):
        assert sorted(shuffled, key=row_order) == expected


@pytest.mark.parametrize(
    ("matrix", "rows"),
    [
        ("{lr: [1], exclude: [{lr: 2}]}", ["lr=1"]),
        ("{lr: [1, 2], seed: [1, 2], exclude: [{lr: 1, seed: 2}, {lr: 2, seed: 1}]}", ["lr=1,seed=1", "lr=2,seed=2"]),
        ("{lr: [1, 2], exclude: [{lr: 1}]}", ["lr=2"]),
        ("{lr: [1], include: [{lr: 5, seed: 9}]}", ["lr=1", "lr=5,seed=9"]),
        ("{include: [{lr: 1, seed: 1}, {lr: 2, seed: 3}]}", ["lr=1,seed=1", "lr=2,seed=3"]),
        ("{lr: [0.10, 1.0e-3]}", ["lr=0.10", "lr=1.0e-3"]),
        ("{lr: [1], tag: [a/b, 'x y', '[]']}", ["lr=1,tag=a%2Fb", "lr=1,tag=x%20y", "lr=1,tag=%5B%5D"]),
    ],
)
def test_rules_of_the_grid(load, matrix, rows):
    text = TEXT.replace('{lr: [1e-5, 3e-5], seed: "${{ vars.seeds }}"}', matrix)
    head, _, rest = text.partition('", seed: "${{ matrix.seed }}"')
    text = head + '"}' + rest[rest.index("\n") :]
    assert [id for id in load(text).stages if id.startswith("sft[")] == [f"sft[{row}]" for row in rows]


def test_include_extends_the_rows_that_it_fits(load):
    text = TEXT.replace('seed: "${{ vars.seeds }}"}', "include: [{lr: 3e-5, seed: 7}, {seed: 1}]}")
    specs = {id: spec for id, spec in load(text).stages.items() if id.startswith("sft[")}
    assert {id: spec.params.seed for id, spec in specs.items()} == {"sft[lr=1e-5]": 1, "sft[lr=3e-5]": 1}
    text = TEXT.replace('seed: "${{ vars.seeds }}"}', "include: [{seed: 1}, {lr: 3e-5, seed: 7}]}")
    specs = {id: spec for id, spec in load(text).stages.items() if id.startswith("sft[")}
    assert {id: spec.params.seed for id, spec in specs.items()} == {"sft[lr=1e-5]": 1, "sft[lr=3e-5]": 7}


def test_a_long_value_is_cut_and_told_apart(load):
    text = TEXT.replace("[1e-5, 3e-5], seed:", "[1e-5], text: [" + "x" * 80 + "a, " + "x" * 80 + "b], seed:")
    ids = [id for id in load(text).stages if id.startswith("sft[")]
    assert len(set(ids)) == 4 and all(len(id) < 80 for id in ids)


def test_needs_and_gates_follow_the_row(load):
    text = TEXT.replace("    foreach: sft\n", "    foreach: sft\n    needs: [sft]\n").replace(
        "onnx: {uses: export-onnx,", "onnx: {uses: export-onnx, needs: [eval],"
    )
    pipeline = load(text)
    assert pipeline.stages["eval[lr=1e-5,seed=2]"].needs == ("sft[lr=1e-5,seed=2]",)
    assert pipeline.stages["onnx"].needs == tuple(f"eval[{row}]" for row in IDS), "outside of the family all of them"
    gated = TEXT.replace(
        "    foreach: sft\n", "    foreach: sft\n    gates: [{metric: m, baseline: sft.metrics, max_drop: 1}]\n"
    )
    (gate,) = load(gated).stages["eval[lr=3e-5,seed=1]"].gates
    assert str(gate.baseline) == "sft[lr=3e-5,seed=1].metrics"


def test_an_instance_can_be_named(load):
    pipeline = load(TEXT.replace("inputs: {model: best}", 'inputs: {model: "sft[lr=3e-5,seed=1]"}'))
    assert str(pipeline.stages["onnx"].inputs["model"][0]) == "sft[lr=3e-5,seed=1].model"


def test_what_rows_share_is_validated_once_and_shared(load):
    pipeline = load(TEXT)
    params = {id(spec.params) for spec in pipeline.stages.values() if spec.base == "eval"}
    assert len(params) == 1
    assert len({id(spec.params) for spec in pipeline.stages.values() if spec.base == "sft"}) == 4


def test_a_mistake_in_a_row_is_told_once_at_its_value(mistakes):
    assert mistakes(TEXT.replace("[1e-5, 3e-5]", "[1e-5, -3e-5]")) == [
        "E102 spec.yaml:11:25 stages.sft.with.lr: Input should be greater than 0 (got -3e-05)"
    ]
    assert mistakes(TEXT.replace("uses: eval", "uses: eval\n    with: {task: [x]}")) == [
        "E101 spec.yaml:15:12 unknown key `task` [did you mean `tasks`?]"
    ]


CASES = [
    ("foreach: sft", "foreach: train", "E031", "`foreach` of a stage without a matrix: `train`"),
    ("foreach: sft", "foreach: sfd", "E122", "no stage `sfd`"),
    ("foreach: sft", "foreach: eval", "E126", "stages follow each other's rows: eval → eval"),
    ("matrix: {lr: [1e-5, 3e-5]", "matrix: {lr: []", "E102", "stages.sft.matrix.lr: an empty list gives no rows"),
    ("matrix: {lr: [1e-5, 3e-5]", "matrix: {lr: 3", "E102", "stages.sft.matrix.lr: Input should be a list of values"),
    ("matrix: {lr: [1e-5, 3e-5]", "matrix: {lr: [[1]]", "E102", "stages.sft.matrix.lr: a value of a matrix is"),
    ("matrix: {lr: [1e-5, 3e-5]", "matrix: {lr: [1e-5, 1e-5]", "E102", "has the row `lr=1e-5,seed=1` twice"),
    ("seeds: [1, 2]", f"seeds: [{', '.join(map(str, range(6000)))}]", "E002", "more than 10000 rows"),
    ('"${{ matrix.lr }}"', '"${{ matrix.rl }}"', "E030", "`matrix.rl` is not defined [keys of its row: lr, seed]"),
    ("tok: {uses: tokenize,", 'tok: {uses: tokenize, with: {vocab_size: "${{ matrix.v }}"},', "E030",
     "`matrix.v` is not defined here [only a stage with `matrix` or `foreach` has a row]"),
    ("inputs: {model: best}", "inputs: {model: sft}", "E129", "`sft` has 4 instances"),
    ("inputs: {model: best}", 'inputs: {model: "sft[*]"}', "E102", "this port takes one input (got 4)"),
    ("inputs: {model: best}", 'inputs: {model: "sft[lr=3e-5,seed=9]"}', "E122", "no instance `sft[lr=3e-5,seed=9]`"),
    ("foreach: sft", "foreach: sft\n    matrix: {a: [1]}", "E102", "a stage has `matrix` or `foreach`, not both"),
    ("uses: sft\n", "uses: sft\n    output: ./out\n", "E102", "`sft[lr=1e-5,seed=1]` is copied to the same place"),
    ('metrics: "eval[*]"', 'metrics: eval.metrics, other: train.metrics', "E102", "have different lengths"),
    ('metrics: "eval[*]"', 'other: "eval[*].metrics", metrics: "sft[*]"', "E127", "it has 2 lists of metrics"),
    (', metrics: "eval[*]"', "", "E127", "it has no list of metrics to decide by"),
    ("mode: max", "mode: most", "E102", "stages.best.by.mode: Input should be 'min' or 'max' (got 'most')"),
    ("by: {metric: exact_match, mode: max}", "uses: eval", "E101", "a stage has `uses` or `select`, not both"),
    ("select: {model:", "select: {my-model:", "E102", "`my-model` is no name of an output"),
    ("matrix: {lr:", "matrix: {'a]../b': [1], lr:", "E102", "`a]../b` is no name of a value"),
    ("uses: export-onnx,", "uses: export-onnx, output: ./out/a/b, inputs: {model: ./m}}\n  more: {uses: export-onnx, "
     "output: ./out,", "E102", "`onnx` is copied to the same place, above or below"),
    ("inputs: {model: best}", "inputs: {model: best.modle}", "E122", "`best` has no output `modle`"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "code", "message"), CASES, ids=lambda value: str(value)[:30])
def test_mistakes_with_rows(mistakes, old, new, code, message):
    assert old in TEXT
    found = mistakes(TEXT.replace(old, new))
    assert any(line.startswith(code) and message in line for line in found), found


def test_one_mistake_in_a_matrix_causes_no_others(mistakes):
    assert len(mistakes(TEXT.replace("matrix: {lr: [1e-5, 3e-5]", "matrix: {lr: []"))) == 1
    assert len(mistakes(TEXT.replace("foreach: sft", "foreach: train"))) == 1


def test_a_profile_or_an_option_changes_the_matrix(load):
    profiles = TEXT + "profiles: {one: {stages: {sft: {matrix: !replace {lr: [2e-5], seed: [5]}}}}}\n"
    assert [id for id in load(profiles, profiles=("one",)).stages if id.startswith("sft[")] == ["sft[lr=2e-5,seed=5]"]
    assert len(load(TEXT, "stages.sft.matrix.lr+=9e-5").stages) == len(load(TEXT).stages) + 4
    assert len(load(TEXT, "vars.seeds=[1]").stages) == len(load(TEXT).stages) - 4


@pytest.mark.parametrize("line", ["matrix:", "foreach:", "matrix: null"])
def test_a_key_with_nothing_behind_it_asks_for_no_rows(load, line):
    text = f"llmctl: 1\nname: t\nstages:\n  data:\n    uses: data\n    {line}\n"
    assert list(load(text).stages) == ["data"]


def test_true_is_not_one_where_rows_are_excluded(load):
    text = "llmctl: 1\nname: t\nstages:\n  data:\n    uses: data\n    matrix: {s: [1, true, 2], exclude: [{s: 1}]}\n"
    assert list(load(text).stages) == ["data[s=true]", "data[s=2]"]


def test_a_list_whose_type_only_the_run_can_know_is_told(mistakes):
    text = """
        llmctl: 1
        name: t
        stages:
          q: {uses: quantize, inputs: {model: ./some}}
          best: {select: {model: q.model, metrics: q.metrics}, by: {metric: m, mode: min}}
    """
    (found,) = mistakes(text)
    assert found.startswith("E123 spec.yaml:5:10 the type of `best.model` is known only when it runs")
