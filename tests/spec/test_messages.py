"""Golden error texts: the five mistakes of the format's documentation, and one of each other code."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from llmctl.errors import UsageError
from llmctl.spec.diagnostics import Diagnostic, Mark, SpecError, Text
from llmctl.spec.pipeline import load_pipeline

SPEC = """
llmctl: 1
name: tiny
vars: {vocab: 512}
stages:
  data: {uses: data}
  tokenize:
    uses: tokenize
    inputs: {text: data}
    with:
      vocab_size: "${{ vars.vocb }}"
  train:
    uses: train-pretrain
    inputs: {tokens: tokenize, tokenizer: tokenize}
    with:
      lr: -3e-4
      max_stpes: 20000
  onnx:
    uses: export-onnx
    inputs: {model: data}
"""

GOLDEN = """\
error[E030]: `vars.vocb` is not defined
  --> spec.yaml:10:20
    |
 10 |       vocab_size: "${{ vars.vocb }}"
    |                    ^^^^^^^^^^^^^^^^ did you mean `vocab`?

error[E102]: stages.train.with.lr: Input should be greater than 0 (got -0.0003)
  --> spec.yaml:15:11
    |
 15 |       lr: -3e-4
    |           ^^^^^

error[E101]: unknown key `max_stpes`
  --> spec.yaml:16:7
    |
 16 |       max_stpes: 20000
    |       ^^^^^^^^^ did you mean `max_steps`?

error[E123]: type mismatch: `onnx.model` wants model.hf, `data` has text (dataset.text), chat (dataset.chat), \
metrics (metrics)
  --> spec.yaml:19:21
    |
 19 |     inputs: {model: data}
    |                     ^^^^

error[E021]: no stage or section `trian`
  --> --set#1:1:1
   |
 1 | trian.lr=1
   | ^^^^^ did you mean `train`?"""


def test_five_mistakes_in_three_phases_and_the_command_line_at_once(load):
    with pytest.raises(SpecError) as caught:
        load(SPEC, "trian.lr=1")
    assert str(caught.value) == GOLDEN
    assert isinstance(caught.value, UsageError) and caught.value.exit_code == 2


def test_json_form_names_the_range(load):
    with pytest.raises(SpecError) as caught:
        load(SPEC)
    assert caught.value.diagnostics[0].as_json() == {
        "code": "E030",
        "message": "`vars.vocb` is not defined",
        "file": "spec.yaml",
        "line": 10,
        "column": 20,
        "end_column": 36,
        "hint": "did you mean `vocab`?",
    }


HEAD = "llmctl: 1\nname: t\n"
DATA = "stages:\n  data: {uses: data}\n"
TOK = DATA + "  tok: {uses: tokenize, inputs: {text: data}}\n"
TRAIN = TOK + "  train: {uses: train-pretrain, inputs: {tokens: tok, tokenizer: tok}"

CASES = [
    # skeleton
    ("- a\n", "E012 spec.yaml:1:1 a spec is a map of keys, such as `llmctl: 1`"),
    ("", "E012 - spec.yaml is empty [start it with `llmctl: 1` and `name:`]"),
    (HEAD, "E103 spec.yaml:1:1 missing key `stages` (a pipeline) or `uses` (a single stage)"),
    (HEAD + "stags: {}\n", "E101 spec.yaml:3:1 unknown key `stags` [did you mean `stages`?]"),
    ("name: t\n" + DATA, "E103 spec.yaml:1:1 missing key `llmctl`"),
    ("llmctl: 2\nname: t\n" + DATA, "E102 spec.yaml:1:9 this spec has format 2, this version of llmctl reads format 1 "
     "[install a newer llmctl]"),
    ("llmctl: 1.5\nname: t\n" + DATA, "E102 spec.yaml:1:9 llmctl: Input should be 1 (got 1.5)"),
    ("llmctl: 1\nname: a/b\n" + DATA, "E102 spec.yaml:2:7 name: String should match pattern "
     "'^[A-Za-z0-9][A-Za-z0-9._-]*$' (got 'a/b')"),
    (HEAD + "stages: {}\n", "E102 spec.yaml:3:9 stages: Map should have at least 1 item, not 0 (got a map)"),
    (HEAD + "vars: 3\n" + DATA, "E102 spec.yaml:3:7 vars: Input should be a map (got 3)"),
    (HEAD + "uses: data\n" + DATA, "E101 spec.yaml:3:1 a file has `stages` or `uses`, not both"),
    (HEAD + DATA + "  train: 3\n", "E103 spec.yaml:5:3 missing key `uses` in stages.train"),
    (HEAD + "stages:\n  Data: {uses: data}\n", "E102 spec.yaml:4:3 stages.Data: a stage id is made of a-z, 0-9 and -, "
     "as in `eval-base`"),
    (HEAD + "stages:\n  vars: {uses: data}\n", "E102 spec.yaml:4:3 stages.vars: a stage id may not be the name of a "
     "section"),
    (HEAD + "stages:\n  data: {use: data}\n", "E101 spec.yaml:4:10 unknown key `use` [did you mean `uses`?]"),
    (HEAD + "stages:\n  data: {uses: data, needs: 3}\n", "E102 spec.yaml:4:29 stages.data.needs: Input should be a "
     "list (got 3)"),
    (HEAD + "stages:\n  data: {uses: data, cache: never}\n", "E102 spec.yaml:4:29 stages.data.cache: Input should be "
     "'auto', 'off' or 'refresh' (got 'never')"),
    (HEAD + "stages:\n  data: {uses: data, resources: {memory: 8}}\n", "E102 spec.yaml:4:42 "
     "stages.data.resources.memory: Input should be a valid string (got 8) [quote it: \"8\"]"),
    (HEAD + "stages:\n  data: {uses: data, resources: {memory: lots}}\n", "E102 spec.yaml:4:42 "
     "stages.data.resources.memory: Input should be a size such as `8GiB` or `500MB` (got 'lots')"),
    (HEAD + "stages:\n  data: {uses: data, resources: {time: 24}}\n", "E102 spec.yaml:4:40 "
     "stages.data.resources.time: Input should be a valid string (got 24) [quote it: \"24\"]"),
    (HEAD + "stages:\n  data: {uses: data, resources: {cpus: 0}}\n", "E102 spec.yaml:4:40 "
     "stages.data.resources.cpus: Input should be greater than or equal to 1 (got 0)"),
    (HEAD + "stages:\n  data: {uses: data, env: {N: 4}}\n", "E102 spec.yaml:4:31 stages.data.env.N: Input should be "
     "a valid string (got 4) [quote it: \"4\"]"),
    (HEAD + "sources: {a: ./x}\n" + DATA + "defaults: {cache: off}\n", "E101 spec.yaml:6:12 unknown key `cache` "
     "[known keys: env, resources, retries]"),
    (HEAD + "sources: {a: {uri: ./x, type: dataset.chta}}\n" + DATA, "E102 spec.yaml:3:31 sources.a.type: no stage "
     "takes `dataset.chta` [did you mean `dataset.chat`?]"),
    (HEAD + "sources: {a: {type: files}}\n" + DATA, "E103 spec.yaml:3:11 missing key `uri` in sources.a"),
    # keys of the format that come later
    (HEAD + "launchers: {a: {kind: slurm}}\n" + DATA, "E104 spec.yaml:3:1 `launchers` is not supported yet by this "
     "version of llmctl"),
    (HEAD + "stages:\n  data: {uses: data, launcher: a}\n", "E104 spec.yaml:4:22 `launcher` is not supported yet by "
     "this version of llmctl"),
    (HEAD + "stages:\n  data: {uses: data, resources: {shards: 4}}\n", "E104 spec.yaml:4:34 `shards` is not supported "
     "yet by this version of llmctl"),
    (HEAD + "stages:\n  data: {uses: data, inputs: {files: s3://b/x}}\n", "E104 spec.yaml:4:38 `s3://` is not "
     "supported yet by this version of llmctl [use a path]"),
    # versions of a stage
    (HEAD + "stages:\n  data: {uses: data@>=1.5}\n", "E110 spec.yaml:4:16 stage `data` is of fakes 1.4.0, the spec "
     "wants >=1.5 [pip install 'fakes>=1.5']"),
    (HEAD + "stages:\n  data: {uses: data@new}\n", "E102 spec.yaml:4:16 `new` is no version specifier [such as "
     "data@>=1.2,<2]"),
    # parameters
    (HEAD + DATA + "  q: {uses: nothing}\n", "E110 spec.yaml:5:13 no stage `nothing` is installed [installed stages: "
     "broken, data, eval, export-onnx, quantize, serve, sft, ship, tokenize, train-pretrain]"),
    (HEAD + DATA + "  q: {uses: tokenise}\n", "E110 spec.yaml:5:13 no stage `tokenise` is installed [did you mean "
     "`tokenize`?]"),
    (HEAD + DATA + "  q: {uses: broken}\n", "E110 spec.yaml:5:13 the parameters of stage `broken` cannot be imported: "
     "AttributeError: module 'fake_params' has no attribute 'NoSuchClass'"),
    (HEAD + TRAIN + ", with: {lr: '3e-4'}}\n", "E102 spec.yaml:6:83 stages.train.with.lr: Input should be a valid "
     "number (got '3e-4') [remove the quotes]"),
    (HEAD + TRAIN + ", with: {packing: on}}\n", "E102 spec.yaml:6:88 stages.train.with.packing: Input should be a "
     "valid boolean (got 'on') [write true or false]"),
    (HEAD + TRAIN + ", with: {max_steps: 1.5}}\n", "E102 spec.yaml:6:90 stages.train.with.max_steps: Input should be "
     "a valid integer (got 1.5)"),
    (HEAD + TRAIN + ", with: {run_tag: 1.10}}\n", "E102 spec.yaml:6:88 stages.train.with.run_tag: Input should be a "
     "valid string (got 1.1) [quote it: \"1.10\"]"),
    (HEAD + TRAIN + ", with: {lr: .nan}}\n", "E102 spec.yaml:6:83 stages.train.with.lr: Input should be a finite "
     "number (got NaN)"),
    (HEAD + TRAIN + ", with: {lr: .inf}}\n", "E102 spec.yaml:6:83 stages.train.with.lr: Input should be a finite "
     "number (got Infinity)"),
    (HEAD + TRAIN + ", with: {optimizer: adamW}}\n", "E102 spec.yaml:6:90 stages.train.with.optimizer: Input should "
     "be 'muon' or 'adamw' (got 'adamW') [did you mean `adamw`?]"),
    (HEAD + TRAIN + ", with: {chunks: 1.5}}\n", "E102 spec.yaml:6:87 stages.train.with.chunks: Input should be a "
     "valid integer; or a valid string (got 1.5) [quote it: \"1.5\"]"),
    (HEAD + TRAIN + ", with: {betas: [0.9]}}\n", "E102 spec.yaml:6:86 stages.train.with.betas: item 1 is "
     "missing (got a list)"),
    (HEAD + TRAIN + ", with: {betas: [0.9, x]}}\n", "E102 spec.yaml:6:92 stages.train.with.betas.1: Input should be a "
     "valid number (got 'x')"),
    (HEAD + TRAIN + ", with: [1]}\n", "E102 spec.yaml:6:78 stages.train.with: Input should be a map (got a list)"),
    (HEAD + TRAIN + ", with: {warmup_steps: 9, max_steps: 3}}\n", "E102 spec.yaml:6:72 stages.train.with: "
     "warmup_steps (9) is more than max_steps (3)"),
    (HEAD + "stages:\n  data: {uses: data, with: {clean: {min_chars: -1, lnag: en}}}\n", "E102 spec.yaml:4:48 "
     "stages.data.with.clean.min_chars: Input should be greater than or equal to 0 (got -1)",
     "E101 spec.yaml:4:52 unknown key `lnag` [did you mean `lang`?]"),
    (HEAD + DATA + "  s: {uses: ship, inputs: {model: ./m}}\n", "E103 spec.yaml:5:3 missing key `to` in stages.s.with"),
    (HEAD + DATA + "  s: {uses: ship, inputs: {model: ./m}, with: {to: }}\n", "E102 spec.yaml:5:52 stages.s.with.to: "
     "Input should be a valid string (got nothing)"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1].partition(" ")[0])
def test_each_mistake_has_its_code_its_place_and_a_way_out(mistakes, case):
    text, *expected = case
    assert mistakes(text) == expected


def test_a_text_that_is_not_utf_8_has_a_place(load, tmp_path, registry):
    Path("bad.yaml").write_bytes("llmctl: 1\nname: ä".encode() + b"\xff\n")
    with pytest.raises(SpecError, match="is not UTF-8") as caught:
        load_pipeline("bad.yaml", registry=registry)
    assert str(caught.value.diagnostics[0].mark) == "bad.yaml:2:8"
    Path("utf16.yaml").write_text("llmctl: 1", encoding="utf-16")
    with pytest.raises(SpecError, match="E011"):
        load_pipeline("utf16.yaml", registry=registry)


def test_a_byte_order_mark_and_windows_line_ends_are_read(load, registry):
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbf" + (HEAD + DATA).replace("\n", "\r\n").encode())
    assert list(load_pipeline("bom.yaml", registry=registry).stages) == ["data"]


def test_a_very_long_line_is_cut_around_the_place():
    text = Text("t", "x" * 300 + "BAD" + "y" * 300, Path("/"))
    shown = Diagnostic("E101", "m", Mark(text, 1, 301, 1, 304)).render().splitlines()
    assert len(shown[3]) < 200
    start = shown[4].index("^")
    assert shown[3][start : start + 3] == "BAD" and shown[4].count("^") == 3


def test_tabs_before_the_place_keep_the_carets_under_it():
    text = Text("t", "\ta: b", Path("/"))
    assert Diagnostic("E101", "m", Mark(text, 1, 5, 1, 6)).render().splitlines()[4] == "   | \t   ^"


def test_an_error_in_a_merged_value_points_at_the_layer_that_set_it(mistakes):
    text = dedent("""\
        llmctl: 1
        name: t
        vars: {seed: 1}
        stages:
          data: {uses: data, with: {seed: "${{ vars.seed }}"}}
        profiles:
          big: {stages: {data: {with: {seed: x}}}}
          var: {vars: {seed: y}}
        """)
    problem = "stages.data.with.seed: Input should be a valid integer"
    assert mistakes(text, profiles=("big",)) == [f"E102 spec.yaml:7:38 {problem} (got 'x')"]
    assert mistakes(text, profiles=("var",)) == [f"E102 spec.yaml:8:22 {problem} (got 'y')"]
    assert mistakes(text, "data.seed=z") == [f"E102 --set#1:1:11 {problem} (got 'z')"]
    assert mistakes(text, "data.clean={lang: en}", "vars.seed=z") == [f"E102 --set#2:1:11 {problem} (got 'z')"]


@pytest.mark.parametrize("end", ["\r", "\x85", "\u2028", "\r\n"])
def test_line_ends_of_other_systems_are_counted_as_yaml_does(registry, end, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd.yaml").write_bytes((HEAD + "stages:\n  data: {uses: dta}\n").replace("\n", end).encode())
    with pytest.raises(SpecError) as caught:
        load_pipeline("odd.yaml", registry=registry)
    assert str(caught.value.diagnostics[0].mark) == "odd.yaml:4:16" and "error[E110]" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "include: ['~nobody-of-this-name/x.yaml']\n" + DATA,
        'include: ["./a\\0b"]\n' + DATA,
        "include: [{url: 'http://h/a b', sha256: aa}]\n" + DATA,
        'stages: {data: {uses: data, env: {X: "a\\0b"}}}\n',
    ],
)
def test_what_no_path_can_be_is_a_mistake_and_no_crash(load, text):
    with pytest.raises(UsageError):
        load(HEAD + text)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-this-name/x.yaml"])
def test_a_name_that_no_file_can_have(registry, name):
    with pytest.raises(UsageError):
        load_pipeline(name, registry=registry)
