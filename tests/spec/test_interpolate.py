from __future__ import annotations

import pytest

TEXT = """
llmctl: 1
name: t-${{ vars.size }}
vars:
  size: 3
  rate: 3e-4
  flag: false
  deep: {list: [0.1, 0.2], text: "v${{ vars.size }}"}
  mix: {a: 1, b: 2.50}
stages:
  data: {uses: data}
  tok: {uses: tokenize, inputs: {text: data}}
  train:
    uses: train-pretrain
    inputs: {tokens: tok, tokenizer: tok}
    with: {%s}
"""


@pytest.mark.parametrize(
    ("written", "field", "value"),
    [
        ('lr: "${{ vars.rate }}"', "lr", 0.0003),
        ('max_steps: "${{vars.size}}"', "max_steps", 3),
        ('packing: "${{ vars.flag }}"', "packing", False),
        ('betas: "${{ vars.deep.list }}"', "betas", (0.1, 0.2)),
        ('weights: "${{ vars.mix }}"', "weights", {"a": 1.0, "b": 2.5}),
        ('run_tag: "${{ name }}/${{ vars.deep.text }}-${{ vars.rate }}-${{ vars.flag }}"', "run_tag",
         "t-3/v3-3e-4-false"),
        ('run_tag: "b=${{ vars.mix.b }}"', "run_tag", "b=2.50"),
        ('run_tag: "${HOME} $X {{ vars.size }} ${x}"', "run_tag", "${HOME} $X {{ vars.size }} ${x}"),
    ],
)  # fmt: skip
def test_a_whole_scalar_keeps_its_type_and_text_takes_the_source_text(load, written, field, value):
    pipeline = load(TEXT % written)
    got = getattr(pipeline.stages["train"].params, field)
    assert (type(got), got, pipeline.name) == (type(value), value, "t-3")


MISTAKES = [
    ("lr: ${{ vars.rate }}", "E001 spec.yaml:15:17 not YAML: did not find expected ',' or '}', while parsing a flow "
     'mapping [write "${{ … }}" with quotes inside { } and [ ]]'),
    ('lr: "${{ vars.rat }}"', "E030 spec.yaml:15:17 `vars.rat` is not defined [did you mean `rate`?]"),
    ('lr: "${{ vars.deep.lst }}"', "E030 spec.yaml:15:17 `vars.deep.lst` is not defined [did you mean `list`?]"),
    ('lr: "${{ var.rate }}"', "E030 spec.yaml:15:17 `var.rate` is not defined [did you mean `vars`?]"),
    ('lr: "${{ stages }}"', "E030 spec.yaml:15:17 `stages` is not defined [write `vars.NAME`, "
     "`matrix.KEY` or `name`]"),
    ('lr: "${{ vars.rate * 2 }}"', "E030 spec.yaml:15:17 `vars.rate * 2` is not the name of a value "
     "[write `vars.NAME` or `name`; there are no functions and no arithmetic]"),
    ('run_tag: "x ${{ vars.rate"', "E030 spec.yaml:15:24 `${{` has no `}}`"),
    ('run_tag: "x ${{ vars.mix }}"', "E030 spec.yaml:15:24 `vars.mix` is a map or list and cannot stand inside text"),
    ('lr: "${{ env.LR }}"', "E030 spec.yaml:15:17 `env.LR` cannot be used here [use `vars` and --set; the environment "
     "is read in `store`, `secrets` and `env` only]"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "expected"), MISTAKES)
def test_mistakes_in_expressions(mistakes, written, expected):
    assert mistakes(TEXT % written) == [expected]


def test_an_expression_inside_folded_text_has_its_own_line(mistakes):
    text = (TEXT % "X").replace("with: {X}", "with:\n      run_tag: >\n        one\n        two ${{ vars.nope }}\n")
    assert mistakes(text) == ["E030 spec.yaml:18:13 `vars.nope` is not defined"]


def test_circles_and_bombs_end(mistakes):
    circle = (TEXT % "").replace("size: 3", 'size: "${{ vars.other }}"\n  other: "${{ vars.size }}"')
    assert mistakes(circle) == [
        "E030 spec.yaml:5:11 `vars.size` is defined by itself: vars.size → vars.other → vars.size"
    ]
    lists = "".join(
        f"  l{n}: [{', '.join([chr(34) + '${{ vars.l' + str(n - 1) + ' }}' + chr(34)] * 10)}]\n" for n in range(1, 9)
    )
    bomb = (TEXT % "").replace("vars:\n", "vars:\n  l0: [x]\n" + lists)
    (found,) = mistakes(bomb)
    assert found.startswith("E002") and "once variables are filled in" in found
    texts = "".join(f'  t{n}: "{("${{ vars.t" + str(n - 1) + " }}") * 10}"\n' for n in range(1, 9))
    (found,) = mistakes((TEXT % "").replace("vars:\n", "vars:\n  t0: xx\n" + texts))
    assert found.startswith("E002") and "characters" in found
