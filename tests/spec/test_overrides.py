from __future__ import annotations

import pytest

from llmctl.spec.overrides import Setting

TEXT = """
llmctl: 1
name: t
vars: {seed: 1}
sources: {corpus: ./raw}
stages:
  data: {uses: data, inputs: {files: sources.corpus}}
  tok: {uses: tokenize, inputs: {text: data}}
  train:
    uses: train-pretrain
    inputs: {tokens: tok, tokenizer: tok}
    with: {weights: {a: 1}, betas: [0.8, 0.9], seed: "${{ vars.seed }}"}
profiles:
  small: {stages: {train: {with: {max_steps: 5, weights: {b: 2}}}}, vars: {seed: 2}}
  large: {stages: {train: {with: {max_steps: 500, betas: [0.5, 0.6]}}}}
"""


def train(pipeline):
    return pipeline.stages["train"].params


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("train.lr=1e-4", "lr", 1e-4),
        ("train.lr=1", "lr", 1.0),
        ("stages.train.with.lr=1", "lr", 1.0),
        ("train.max_steps=0x10", "max_steps", 16),
        ("train.packing=false", "packing", False),
        ("train.run_tag=007", "run_tag", "007"),
        ("train.run_tag=a=b=c", "run_tag", "a=b=c"),
        ("train.run_tag=", "run_tag", ""),
        ("train.run_tag=null", "run_tag", "null"),
        ("train.run_tag={a: [", "run_tag", "{a: ["),
        ("train.note=1.10", "note", "1.10"),
        ("train.note=null", "note", None),
        ("train.note=~", "note", None),
        ("train.chunks=7", "chunks", 7),
        ("train.chunks=all", "chunks", "all"),
        ("train.optimizer=adamw", "optimizer", "adamw"),
        ("train.betas=[0.1, 0.2]", "betas", (0.1, 0.2)),
        ("train.weights={b: 2}", "weights", {"a": 1.0, "b": 2.0}),
        ("train.weights.b=2", "weights", {"a": 1.0, "b": 2.0}),
        ("train.seed=${{ vars.seed }}", "seed", 1),
        ("vars.seed=9", "seed", 9),
    ],
)
def test_the_value_takes_the_type_of_its_target(load, option, field, value):
    got = getattr(train(load(TEXT, option)), field)
    assert (type(got), got) == (type(value), value)


def test_a_path_is_kept_as_typed(load):
    from pathlib import Path

    assert train(load(TEXT, "train.init=007")).init == Path("007")


def test_profiles_apply_in_order_and_set_wins(load):
    assert train(load(TEXT)).max_steps == 100
    small = train(load(TEXT, profiles=("small",)))
    assert (small.max_steps, small.weights, small.betas, small.seed) == (5, {"a": 1, "b": 2}, (0.8, 0.9), 2)
    both = load(TEXT, profiles=("small", "large"))
    assert (train(both).max_steps, train(both).betas, both.profiles) == (500, (0.5, 0.6), ("small", "large"))
    assert train(load(TEXT, profiles=("large", "small"))).max_steps == 5
    assert train(load(TEXT, "train.max_steps=7", profiles=("small",))).max_steps == 7


def test_the_last_set_wins(load):
    assert train(load(TEXT, "train.lr=1", "train.lr=2")).lr == 2


def test_full_paths_reach_every_section(load, tmp_path):
    pipeline = load(
        TEXT,
        "stages.train.resources.gpus=8",
        "stages.train.env.N=4",
        "stages.train.output=out",
        "stages.train.inputs.tokens=./shards",
        "sources.corpus.uri=./007",
        "defaults.resources.cpus=3",
        "name=other",
    )
    spec = pipeline.stages["train"]
    assert (spec.resources.gpus, spec.resources.cpus, spec.env["N"].value) == (8, 3, "4")
    assert spec.output == tmp_path / "out"
    assert pipeline.sources["corpus"].uri == "./007" and pipeline.name == "other"


def test_paths_on_the_command_line_start_from_the_current_directory(load, registry, tmp_path, monkeypatch):
    from llmctl.spec.pipeline import load_pipeline

    load(TEXT)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    sets = ("sources.corpus.uri=./mine", "stages.train.output=./out", "stages.train.inputs.tokens=./shards")
    pipeline = load_pipeline("../spec.yaml", (), sets, registry=registry)
    assert pipeline.resolve(pipeline.sources["corpus"].uri) == elsewhere / "mine"
    assert pipeline.stages["train"].output == elsewhere / "out"
    assert pipeline.resolve(pipeline.stages["train"].inputs["tokens"][0].uri) == elsewhere / "shards"


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["train.betas[1]=0.5"], "betas", (0.8, 0.5)),
        (["train.betas[0]=0.1", "train.betas[1]=0.2"], "betas", (0.1, 0.2)),
        (["train.weights={c: 3}"], "weights", {"a": 1.0, "c": 3.0}),
        (["train.weights=!replace {c: 3}"], "weights", {"c": 3.0}),
        ([Setting("--set-json", 'train.betas=[0.25, 0.75]')], "betas", (0.25, 0.75)),
        ([Setting("--set-json", 'train.run_tag="a\\u00e9"')], "run_tag", "aé"),
        ([Setting("--set-file", "train.run_tag=note.txt")], "run_tag", "=two\nlines: x\n"),
        ([Setting("--set-file", "train.weights=mix.yaml")], "weights", {"a": 0.5, "z": 1.0}),
        (["train.lr=1", Setting("--set-json", "train.lr=2")], "lr", 2.0),
        ([Setting("--set-json", "train.lr=2"), "train.lr=1"], "lr", 1.0),
    ],
)  # fmt: skip
def test_the_forms_of_set(load, tmp_path, options, field, value):
    (tmp_path / "note.txt").write_text("=two\nlines: x\n")
    (tmp_path / "mix.yaml").write_text("a: 0.5\nz: 1\n")
    assert getattr(train(load(TEXT, *options)), field) == value


def test_appending_goes_behind_what_is_there_or_behind_the_default(load):
    eval_ = TEXT.replace("profiles:", "  eval: {uses: eval, inputs: {model: train, data: tok.tokens}}\nprofiles:")
    more = load(eval_, "eval.tasks+=exact-match").stages["eval"]
    assert more.params.tasks == ["perplexity", "exact-match"], "the default, which no layer had written"
    more = load(eval_, "eval.tasks=[]", "eval.tasks+=[exact-match, perplexity]").stages["eval"]
    assert more.params.tasks == ["exact-match", "perplexity"]
    more = load(eval_, "stages.eval.inputs.data+=data.chat").stages["eval"]
    assert [str(ref) for ref in more.inputs["data"]] == ["tok.tokens", "data.chat"]
    more = load(eval_, "stages.train.gates+={metric: loss, max: 3}").stages["train"]
    assert [gate.max for gate in more.gates] == [3]
    more = load(eval_, "stages.train.gates+={metric: loss, max: 3}", "stages.train.gates[0].max=4").stages["train"]
    assert [gate.max for gate in more.gates] == [4]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (Setting("--set-json", "train.lr=[1"), "E001 --set-json#1:1:10 not JSON"),
        (Setting("--set-json", "train.lr=NaN"), "E001 --set-json#1:1:10 not JSON: NaN is no number of JSON"),
        (Setting("--set-json", "train.lr"), "E020 --set-json#1:1:1 `--set-json train.lr` has no `=`"),
        (Setting("--set-file", "train.run_tag=none.txt"), "E011 --set-file#1:1:15 cannot read none.txt"),
        (Setting("--set-file", "train.lr=mix.yaml"), "E102 mix.yaml:1:1 stages.train.with.lr: Input should be a valid"),
        (Setting("--set-file", "train.lr=bad.yaml"), "E001 bad.yaml:2:1 not YAML"),
    ],
)
def test_mistakes_in_files_and_json_have_a_place(mistakes, tmp_path, setting, expected):
    (tmp_path / "mix.yaml").write_text("a: 0.5\n")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    assert mistakes(TEXT, setting)[-1].startswith(expected)


MISTAKES = [
    ("lr", "E020 --set#1:1:1 `--set lr` has no `=` [write KEY=VALUE]"),
    ("=3", "E020 --set#1:1:1 `` is not a key [as in a.b or a.list[0].b]"),
    ("train..lr=3", "E020 --set#1:1:1 `train..lr` is not a key [as in a.b or a.list[0].b]"),
    ("train=3", "E020 --set#1:1:1 `train` is a stage, not a parameter [write train.PARAM=VALUE]"),
    ("trian.lr=1", "E021 --set#1:1:1 no stage or section `trian` [did you mean `train`?]"),
    ("stages.trian.with.lr=1", "E021 --set#1:1:8 no stage `trian` [did you mean `train`?]"),
    ("stages.train.lr=1", "E101 --set#1:1:14 unknown key `lr` [known keys: needs, gates, output, tag, uses, inputs, "
     "with, env, resources, cache, retries, ephemeral, matrix, foreach]"),
    ("train.lrr=1", "E101 --set#1:1:7 unknown key `lrr` [did you mean `lr`?]"),
    ("vars.sed=1", "E030 --set#1:1:6 no variable `sed` [did you mean `seed`?]"),
    ("sources.corups.uri=./x", "E121 --set#1:1:9 no source `corups` [did you mean `corpus`?]"),
    ("profiles.small.vars.seed=1", "E021 --set#1:1:1 a profile cannot be set [set the value itself, or choose with "
     "--profile]"),
    ("launchers.a=1", "E104 --set#1:1:1 `launchers` is not supported yet by this version of llmctl"),
    ("include=[./x.yaml]", "E021 --set#1:1:1 `include` cannot be set [files are read before the command line counts]"),
    ("secrets.A=env", "E130 --set#1:1:9 no secret `A`"),
    ("train.betas[2]=1", "E020 --set#1:1:7 there is no `stages.train.with.betas[2]`: it has 2 items "
     "[stages.train.with.betas+=… appends]"),
    ("train.lr[0]=1", "E020 --set#1:1:7 there is no `stages.train.with.lr[0]`: it is no list"),
    ("train.weights+=1", "E020 --set#1:1:7 cannot append to `stages.train.with.weights`: it is a map, not a list "
     "[give the whole list]"),
    ("train.x[]=1", "E020 --set#1:1:7 `train.x[]` is not a key [as in a.b or a.list[0].b]"),
    ("train.betas=[0.1", "E001 --set#1:1:17 not YAML: did not find expected ',' or ']', while parsing a flow sequence"),
    ("train.lr=fast", "E102 --set#1:1:10 stages.train.with.lr: Input should be a valid number (got 'fast')"),
    ("train.lr=${{ vars.sed }}", "E030 --set#1:1:10 `vars.sed` is not defined [did you mean `seed`?]"),
    ("train.betas=[0.1, {x: 1}]", "E102 --set#1:1:19 stages.train.with.betas.1: Input should be a valid number "
     "(got a map)"),
    ("stages.train.resources.gpu=1", "E101 --set#1:1:24 unknown key `gpu` [did you mean `gpus`?]"),
    ("stages.train.uses=sftt", "E110 --set#1:1:19 no stage `sftt` is installed [did you mean `sft`?]"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "expected"), MISTAKES)
def test_mistakes_point_into_the_option(mistakes, option, expected):
    assert mistakes(TEXT, option)[-1] == expected


def test_an_unknown_profile_suggests_the_near_one(mistakes):
    assert mistakes(TEXT, profiles=("small", "smal")) == [
        "E022 --profile#2:1:1 no profile `smal` [did you mean `small`?]"
    ]


def test_keys_of_profiles_that_are_not_chosen_are_checked_too(mistakes):
    text = TEXT.replace("large: {stages", "large: {stags: {}, stages").replace("{max_steps: 500", "{max_steps: x")
    assert mistakes(text) == ["E101 spec.yaml:14:11 unknown key `stags` [did you mean `stages`?]"]
    text = TEXT.replace("large: {stages: {train: {with", "large: {stages: {train: {wiht")
    assert mistakes(text) == ["E101 spec.yaml:14:28 unknown key `wiht` [did you mean `with`?]"]


def test_names_in_profiles_are_checked_whether_they_are_chosen_or_not(mistakes, load):
    def profiles(text):
        return TEXT[: TEXT.index("profiles:")] + f"profiles: {text}\n"

    assert mistakes(profiles("{a: hello}"))[0].startswith("E102 spec.yaml:12:15 profiles.a: Input should be a map")
    assert mistakes(profiles("7"))[0].startswith("E102 spec.yaml:12:11 profiles: Input should be a map")
    assert mistakes(profiles("{a: {stages: {trian: {}}}}")) == [
        "E021 spec.yaml:12:25 no stage `trian` [did you mean `train`?]"
    ]
    assert mistakes(profiles("{a: {vars: {sed: 3}}}")) == [
        "E030 spec.yaml:12:23 no variable `sed` [did you mean `seed`?]"
    ]
    load(profiles('{a: {vars: {own: 3}, stages: {train: {with: {seed: "${{ vars.own }}"}}}}}'), profiles=("a",))
    load(profiles("{a: {stages: {more: {uses: data}}}}"), profiles=("a",))


def test_short_and_long_forms_merge(load, tmp_path):
    text = TEXT.replace("sources: {corpus: ./raw}", "sources: {corpus: ./raw}\nstore: ./mine")
    text += '  far: {store: {remotes: {team: "s3://b"}}, sources: {corpus: {type: files}}}\n'
    pipeline = load(text, "sources.corpus=./other", profiles=("far",))
    assert (pipeline.store, pipeline.remotes) == (str(tmp_path / "mine"), {"team": "s3://b"})
    assert pipeline.sources["corpus"].uri == "./other"
    env = load(text, "stages.train.env.A=x", "stages.train.env.A.affects_output=false").stages["train"].env["A"]
    assert (env.value, env.affects_output) == ("x", False)


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        (f"train.betas[{'9' * 5000}]=1", "E020"),
        (Setting("--set-json", "vars.seed=" + "[" * 400 + "]" * 400), "E002"),
    ],
)
def test_absurd_settings_are_mistakes_like_others(mistakes, setting, code):
    assert mistakes(TEXT, setting)[-1].startswith(code)


def test_bytes_that_are_not_utf_8_are_refused(mistakes):
    assert mistakes(TEXT, "train.run_tag=\udcff") == ["E001 --set#1:1:1 --set#1 is not UTF-8"]
