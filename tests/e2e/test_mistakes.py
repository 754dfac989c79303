"""What users do wrong, through the real command line: one clear line, the way out, the documented exit code.

A row is a mistake: the files that are there, the command as typed, the exit code of `pipeline.md` 3.6, and fragments
that the message must hold. To add one, add a row. `LAB` is a directory of small
real artifacts, `PORT` a port that is taken; they stand in commands and fragments.
"""

# ruff: noqa: E501  # a mistake is a row of a table
import gzip
import json
import os
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Mistake:
    name: str
    args: str
    code: int
    says: tuple[str, ...]
    files: dict[str, str | bytes] = field(default_factory=dict)
    stdin: bytes | None = None
    slow: bool = False
    """Imports torch for seconds, and a row beside it tests the same way of failing."""


def spec(body: str) -> dict[str, str]:
    """`spec.yaml` with the two lines that every pipeline has."""
    return {"spec.yaml": f"llmctl: 1\nname: test\n{body}"}


FAKE = "stages:\n  tok:\n    uses: fake-tok\n  pre:\n    uses: fake-pre\n    inputs: {tokens: tok, tokenizer: tok}\n"

COMMAND_LINE = [
    Mistake("unknown command", "trian", 2, ("no such command `trian`", "did you mean `train-pretrain`?")),
    Mistake("unknown option", "fake-tok --sizze 3", 2, ("no such option `--sizze`", "did you mean `--size`")),
    Mistake("option out of bounds", "fake-tok --size 5000", 2, ("--size", "5000 is not in the range 1<=x<=1000")),
    Mistake("option of a wrong type", "fake-tok --size many", 2, ("--size", "'many' is not a valid integer")),
    Mistake(
        "option without a value", "fake-tok --size", 2, ("--size", "requires an argument", "`llmctl fake-tok --help`")
    ),
    Mistake("choice that is none", "fake-tok --mode quiet", 2, ("--mode", "'plain', 'loud'")),
    Mistake("word where a flag belongs", "fake-sft ./base", 2, ("unexpected argument `./base`", "--model REF")),
    Mistake("--set without a value", "fake-tok --set size", 2, ("size", "=")),
    Mistake(
        "--set of an unknown key", "fake-tok --set names.x=1 --set nmaes=[a]", 2, ("nmaes", "did you mean `names`?")
    ),
    Mistake("--set of a wrong type", "fake-tok --set fast=perhaps", 2, ("fast", "perhaps")),
    Mistake("--input without a port", "fake-sft --input ./base", 2, ("--input wants PORT=REF", "./base")),
    Mistake("--input of an unknown port", "fake-sft --input modle=./x", 2, ("modle", "model"), {"x/y": ""}),
    Mistake("required input missing", "fake-sft", 2, ("`model`", "is missing", "--input model=PATH")),
    Mistake("input that does not exist", "fake-sft --model nowhere", 5, ("no such file or directory: nowhere",)),
    Mistake("path that does not exist", "fake-sft --model ./nowhere", 5, ("nowhere",)),
    Mistake("unknown artifact id", "fake-sft --model sha256:0123456789abcdef", 5, ("sha256:0123456789abcdef",)),
    Mistake("malformed artifact id", "fake-sft --model sha256:xyz", 2, ("sha256:xyz", "8 to 64 digits")),
    Mistake("unknown artifact name", "fake-sft --model base@best", 5, ("base@best",)),
    Mistake("config file that is not there", "fake-tok -c missing.yaml", 2, ("missing.yaml",)),
    Mistake(
        "config of another stage",
        "fake-sft -c tok.yaml",
        2,
        ("fake-tok",),
        {"tok.yaml": "llmctl: 1\nname: t\nuses: fake-tok\n"},
    ),
    Mistake("text in the pipe", "fake-sft -", 2, ("did you pipe data?", "--input"), stdin=b"hello\n"),
    Mistake("binary data in the pipe", "fake-sft -", 2, ("did you pipe data?",), stdin=bytes(range(256)) * 100),
    Mistake("a newer pipe protocol", "fake-sft -", 2, ("version 9",), stdin=b'{"llmctl":"hello","v":9}\n'),
    Mistake("show of an unknown artifact", "show sha256:0123456789abcdef", 5, ("sha256:0123456789abcdef",)),
    Mistake("get of an unknown artifact", "get nothing/here out", 5, ("nothing/here",)),
    Mistake("lineage of an unknown artifact", "lineage nothing/here", 5, ("nothing/here",)),
    Mistake("format that does not exist", "ls --format xml", 2, ("'xml'", "json")),
]

PLUGINS = [
    Mistake("name that no plugin can have", "plugins new Demo_Stage", 2, ("Demo_Stage", "how about `demo-stage`?")),
    Mistake("new plugin of a name that is taken", "plugins new tokenize", 2, ("an installed stage", "`my-tokenize`")),
    Mistake("new plugin where something is", "plugins new demo", 5, ("not empty", "--force"), {"llmctl-demo/x": ""}),
    Mistake("test of what is not installed", "plugins test fakes", 2, ("`fakes` is installed", "did you mean `fake`?")),
    Mistake("test of a stage that is none", "plugins test fake --stage fake-tokk", 2, ("`fake-tokk`", "did you mean")),
    Mistake(
        "damaged plugin file", "plugins test fake --file x.json", 5, ("x.json",), {"x.json": '{"llmctl-plugin": 7}'}
    ),
    Mistake("subcommand that does not exist", "plugins tset", 2, ("no such command `tset`", "did you mean `test`?")),
]

SPECS = [
    Mistake("spec that is not there", "run missing.yaml", 2, ("missing.yaml",)),
    Mistake("name that is no shipped spec", "run quikstart", 2, ("quikstart", "quickstart")),
    Mistake("spec that is a directory", "check dir", 2, ("dir",), {"dir/x.yaml": ""}),
    Mistake("empty spec", "check spec.yaml", 2, ("spec.yaml",), {"spec.yaml": ""}),
    Mistake("spec that is no map", "check spec.yaml", 2, ("spec.yaml:1:1",), {"spec.yaml": "- a\n- b\n"}),
    Mistake("spec that is not UTF-8", "check spec.yaml", 2, ("spec.yaml", "UTF-8"), {"spec.yaml": b"name: \xff\xfe\n"}),
    Mistake("no version line", "check spec.yaml", 2, ("llmctl",), {"spec.yaml": "name: x\n" + FAKE}),
    Mistake("spec of a later version", "check spec.yaml", 2, ("llmctl: 2", "1"), {"spec.yaml": "llmctl: 2\nname: x\n" + FAKE}),
    Mistake("unknown key", "check spec.yaml", 2, ("unknown key `stage`", "spec.yaml:3:1", "stages"), spec("stage: {}\n")),
    Mistake(
        "unknown parameter",
        "check spec.yaml",
        2,
        ("unknown key `sizee`", "spec.yaml:6:12", "did you mean `size`?"),
        spec("stages:\n  tok:\n    uses: fake-tok\n    with: {sizee: 3}\n"),
    ),
    Mistake(
        "parameter of a wrong type",
        "check spec.yaml",
        2,
        ("stages.tok.with.size", "spec.yaml:6:18"),
        spec("stages:\n  tok:\n    uses: fake-tok\n    with: {size: 'three'}\n"),
    ),
    Mistake("tab in YAML", "check spec.yaml", 2, ("spec.yaml:4", "tab"), spec("stages:\n\ttok: {uses: fake-tok}\n")),
    Mistake("duplicate key", "check spec.yaml", 2, ("duplicate key `name`", "spec.yaml:3"), spec("name: again\n")),
    Mistake("YAML syntax", "check spec.yaml", 2, ("spec.yaml:3",), spec("stages: {tok: [}\n")),
    Mistake("YAML tag", "check spec.yaml", 2, ("!!python/object", "spec.yaml:3"), spec("vars: !!python/object:os.system {}\n")),
    Mistake("unknown stage", "check spec.yaml", 2, ("fake-tokk", "fake-tok"), spec("stages: {tok: {uses: fake-tokk}}\n")),
    Mistake("unknown variable", "check spec.yaml", 2, ("vars.sise", "did you mean"), spec('vars: {size: 1}\nstages:\n  tok:\n    uses: fake-tok\n    with: {size: "${{ vars.sise }}"}\n')),
    Mistake("unknown port", "check spec.yaml", 2, ("token", "tokens"), spec(FAKE.replace("{tokens: tok", "{token: tok"))),
    Mistake("unknown output", "check spec.yaml", 2, ("tok.words",), spec(FAKE.replace("{tokens: tok,", "{tokens: tok.words,"))),
    Mistake(
        "wrong type of artifact",
        "check spec.yaml",
        2,
        ("type mismatch", "fake.model", "fake.tokens"),
        spec(FAKE + "  sft: {uses: fake-sft, inputs: {model: tok.tokens}}\n"),
    ),
    Mistake("unknown stage in needs", "check spec.yaml", 2, ("tokk",), spec(FAKE + "    needs: [tokk]\n")),
    Mistake(
        "cycle",
        "check spec.yaml",
        2,
        ("stages wait for each other", "`one` → `two`", "spec.yaml:4:41"),
        spec("stages:\n  one: {uses: fake-sft, inputs: {model: two}}\n  two: {uses: fake-sft, inputs: {model: one}}\n"),
    ),
    Mistake("unknown profile", "check spec.yaml --profile gpus", 2, ("gpus", "gpu"), spec(FAKE + "profiles: {gpu: {}}\n")),
    Mistake("--set of an unknown stage", "check spec.yaml --set tokk.size=3", 2, ("tokk", "tok"), spec(FAKE)),
    Mistake("--to of an unknown stage", "run spec.yaml --to serve", 2, ("serve",), spec(FAKE)),
    Mistake("gate without a limit", "check spec.yaml", 2, ("gates",), spec("stages:\n  tok:\n    uses: fake-tok\n    gates: [{metric: answer}]\n")),
    Mistake(
        "gate on a metric that is not there",
        "run spec.yaml",
        4,
        ("answr",),
        spec("stages:\n  tok:\n    uses: fake-tok\n    gates: [{metric: answr, min: 1}]\n"),
    ),
    Mistake(
        "gate that fails",
        "run spec.yaml",
        4,
        ("answer", "42", "43"),
        spec("stages:\n  tok:\n    uses: fake-tok\n    gates: [{metric: answer, min: 43}]\n"),
    ),
    Mistake("source that is not there", "run spec.yaml", 5, ("nothing.jsonl",), spec("sources: {x: {uri: ./nothing.jsonl, type: dataset.text}}\nstages: {d: {uses: data, inputs: {text: sources.x}}}\n")),
]  # fmt: skip

SWEEP = 'stages:\n  tok: {uses: fake-tok, matrix: {size: [1, 2]}, with: {size: "${{ matrix.size }}"}}\n'
PRE = "  pre: {uses: fake-pre, inputs: {tokens: tok, tokenizer: tok}}\n"
LAYERS = [
    Mistake("included file that is not there", "check spec.yaml", 2, ("cannot include ./base.yaml: no such file", "spec.yaml:3:11"), spec("include: [./base.yaml]\n" + FAKE)),
    Mistake("files that include each other", "check spec.yaml", 2, ("files include each other", "a.yaml:1:11"), {**spec("include: [./a.yaml]\n" + FAKE), "a.yaml": "include: [./spec.yaml]\n"}),
    Mistake("included URL without a digest", "check spec.yaml", 2, ("has no digest", "sha256: …"), spec("include: ['https://example.org/a.yaml']\n" + FAKE)),
    Mistake("key that an included file cannot hold", "check spec.yaml", 2, ("`uses` cannot stand in an included file", "a.yaml:1:1"), {**spec("include: [./a.yaml]\n" + FAKE), "a.yaml": "uses: fake-tok\n"}),
    Mistake("!replace before a list", "check spec.yaml", 2, ("`!replace` stands before a map only",), spec(FAKE + "vars: {x: !replace [1]}\n")),
    Mistake("alias that is not defined", "check spec.yaml", 2, ("alias `*x` is not defined above",), spec("vars: {a: *x}\n" + FAKE)),
    Mistake("key that is a number", "check spec.yaml", 2, ("a key must be plain text, not `3`", "quote it"), spec("vars: {3: x}\n" + FAKE)),
    Mistake("value that does not end", "check spec.yaml", 2, ("nested deeper than",), spec("vars: {x: " + "[" * 120 + "]" * 120 + "}\n" + FAKE)),
    Mistake("variable defined by itself", "check spec.yaml", 2, ("is defined by itself", "vars.a → vars.a"), spec('vars: {a: "${{ vars.a }}"}\n' + FAKE.replace("fake-tok}", 'fake-tok, with: {text: "${{ vars.a }}"}}'))),
    Mistake("arithmetic in an expression", "check spec.yaml", 2, ("no functions and no arithmetic",), spec('vars: {a: "${{ vars.b * 2 }}"}\n' + FAKE)),
    Mistake("environment in a parameter", "check spec.yaml", 2, ("`env.X` cannot be used here", "use `vars` and --set"), spec('stages:\n  tok: {uses: fake-tok, with: {text: "${{ env.X }}"}}\n')),
    Mistake("environment variable that is not set", "check spec.yaml", 2, ("`env.NO_SUCH` is not set", "export NO_SUCH=…"), spec('stages:\n  tok: {uses: fake-tok, env: {A: "${{ env.NO_SUCH }}"}}\n')),
    Mistake("matrix without values", "check spec.yaml", 2, ("stages.tok.matrix.size: an empty list gives no rows", "write [1e-5, 3e-5]"), spec(SWEEP.replace("[1, 2]", "[]"))),
    Mistake("row that is there twice", "check spec.yaml", 2, ("has the row `size=1` twice", "spec.yaml:4"), spec(SWEEP.replace("[1, 2]", "[1, 1]"))),
    Mistake("key that the matrix does not have", "check spec.yaml", 2, ("`matrix.sise` is not defined", "did you mean `size`?"), spec(SWEEP.replace("${{ matrix.size", "${{ matrix.sise"))),
    Mistake("matrix expression without a matrix", "check spec.yaml", 2, ("`matrix.size` is not defined here", "only a stage with `matrix` or `foreach`"), spec(SWEEP.replace(" matrix: {size: [1, 2]},", ""))),
    Mistake("foreach of a stage without a matrix", "check spec.yaml", 2, ("`foreach` of a stage without a matrix: `tok`",), spec(FAKE + "  more: {uses: fake-tok, foreach: tok}\n")),
    Mistake("several instances where one is wanted", "check spec.yaml", 2, ("`tok` has 2 instances", "or name one"), spec(SWEEP + PRE)),
    Mistake("instance that does not exist", "check spec.yaml", 2, ("no instance `tok[size=3]`", "did you mean `tok[size=2]`?"), spec(SWEEP + PRE.replace("tokens: tok,", 'tokens: "tok[size=3]",'))),
    Mistake("all instances for a port that takes one", "check spec.yaml", 2, ("this port takes one input (got 2)",), spec(SWEEP + PRE.replace("tokens: tok,", 'tokens: "tok[*]",'))),
    Mistake("instances that write to one place", "check spec.yaml", 2, ("is copied to the same place", "${{ matrix.size }}"), spec(SWEEP.replace("matrix:", "output: ./out, matrix:"))),
    Mistake("select without metrics", "check spec.yaml", 2, ("it has no list of metrics to decide by",), spec(SWEEP + '  best: {select: {tokens: "tok[*].tokens"}, by: {metric: answer, mode: max}}\n')),
    Mistake("select of lists that do not match", "check spec.yaml", 2, ("have different lengths: tokens 2, metrics 1",), spec(SWEEP + '  one: {uses: fake-tok}\n  best: {select: {tokens: "tok[*].tokens", metrics: one}, by: {metric: answer, mode: max}}\n')),
    Mistake("select without by", "check spec.yaml", 2, ("missing key `by` in stages.best",), spec(SWEEP + '  best: {select: {metrics: "tok[*]"}}\n')),
    Mistake("secret that is not declared", "check spec.yaml", 2, ("no secret `TOKEM`", "did you mean `TOKEN`?"), spec("secrets: {TOKEN: env}\nstages:\n  tok: {uses: fake-tok, env: {A: {secret: TOKEM}}}\n")),
    Mistake("command in a spec's secret", "check spec.yaml", 2, ("unknown key `command`", "spec.yaml:3:30"), spec("secrets: {TOKEN: {from: env, command: rm}}\n" + FAKE)),
    Mistake("secret that is not set", "run spec.yaml", 7, ("NO_SUCH_TOKEN",), spec("secrets: {NO_SUCH_TOKEN: env}\nstages:\n  tok: {uses: fake-tok, env: {A: {secret: NO_SUCH_TOKEN}}}\n")),
    Mistake("version of a stage that is not installed", "check spec.yaml", 2, ("is of fake 0.1, the spec wants >=2", "pip install 'fake>=2'"), spec(FAKE.replace("uses: fake-tok", '"uses": "fake-tok@>=2"'))),
    Mistake("pinned source without a digest", "check spec.yaml", 2, ("`identity: pinned` needs the `digest`",), spec("sources: {x: {uri: ./x, identity: pinned}}\n" + FAKE)),
    Mistake("store at an address", "check spec.yaml", 2, ("`s3://` is not supported yet",), spec("store: {uri: 's3://b/x'}\n" + FAKE)),
    Mistake("resources of a wrong unit", "check spec.yaml", 2, ("a size such as `8GiB`",), spec("stages:\n  tok: {uses: fake-tok, resources: {memory: lots}}\n")),
    Mistake("--set beyond the end of a list", "check spec.yaml --set tok.names[4]=x", 2, ("there is no `stages.tok.with.names[4]`: it has 0 items",), spec(FAKE)),
    Mistake("--set that appends to a map", "check spec.yaml --set vars.a+=1", 2, ("cannot append to `vars.a`: it is a map",), spec("vars: {a: {b: 1}}\n" + FAKE)),
    Mistake("--set-json that is no JSON", "check spec.yaml --set-json tok.size=[1", 2, ("not JSON",), spec(FAKE)),
    Mistake("--set-file that is not there", "check spec.yaml --set-file tok.text=none.txt", 2, ("cannot read none.txt",), spec(FAKE)),
    Mistake("--set of a profile", "check spec.yaml --set profiles.a.vars.x=1", 2, ("a profile cannot be set", "--profile"), spec(FAKE)),
    Mistake("schema of an unknown stage", "schema stage fake-tokk", 2, ("fake-tokk", "did you mean `fake-tok`?")),
    Mistake("user configuration that changes results", "check spec.yaml", 2, ("unknown key `lr`", "config/llmctl/config.yaml:1:1"), {**spec("secrets: {T: env}\n" + FAKE), "../config/llmctl/config.yaml": "lr: 3\n"}),
]  # fmt: skip

STAGES = [
    Mistake("stage that fails", "fake-tok --fail stage", 3, ("it went wrong", "try again")),
    Mistake("bad input found by the stage", "fake-tok --fail input", 5, ("the input is bad", "get a better one")),
    Mistake("machine that cannot", "fake-tok --fail machine", 7, ("no such machine", "buy one")),
    Mistake("full disk in a stage", "fake-tok --fail full", 3, ("space",)),
    Mistake(
        "output directory that is not empty",
        "fake-serve --output full",
        5,
        ("full", "is not replaced", "choose another directory"),
        {"full/x": "precious"},
    ),
    Mistake(
        "output that is a file",
        "fake-tok --output file",
        5,
        ("file is not a writable directory", "choose another directory"),
        {"file": "precious"},
    ),
]


JSONL = '{"text": "one"}\n{"text": "two"\n'

DATA = [
    Mistake("nothing to read", "data", 2, ("nothing to read", "reader: python-stdlib")),
    Mistake("corpus without text", "data --files corpus", 5, ("the corpus is empty",), {"corpus/a.txt": " \n", "corpus/b.md": ""}),
    Mistake("glob that matches nothing", "data --files docs/*.md", 5, ("docs/*.md",), {"docs/a.txt": "x"}),
    Mistake("file of an unsupported type", "data --files a.docx", 5, ("a.docx", "supported: .txt"), {"a.docx": b"PK\x03\x04"}),
    Mistake("JSONL with a broken line", "data --on-error fail --files rows.jsonl", 5, ("rows.jsonl:2", "no valid JSON"), {"rows.jsonl": JSONL}),
    Mistake("JSONL with a row that is a list", "data --files rows.jsonl", 5, ("rows.jsonl:1", "not an object"), {"rows.jsonl": "[1]\n"}),
    Mistake("JSONL without the column", "data --files rows.jsonl", 5, ("rows.jsonl:1", "`text` is missing", "columns here: body"), {"rows.jsonl": '{"body": "x"}\n'}),
    Mistake("text that is not UTF-8", "data --on-error fail --encoding utf-8 --files a.txt", 5, ("a.txt:1", "UTF-8", "set `encoding`"), {"a.txt": "café".encode("latin-1")}),
    Mistake("gzip that is cut short", "data --on-error fail --files a.jsonl.gz", 5, ("a.jsonl.gz", "cut short or damaged"), {"a.jsonl.gz": gzip.compress(JSONL.encode())[:-12]}),
    Mistake("files that contradict the reader", "data --reader python-stdlib --files a.txt", 2, ("reads no input",), {"a.txt": "x"}),
    Mistake("module that does not exist", "data --reader python-stdlib --set modules=[no_such_module]", 2, ("no_such_module",)),
    Mistake("dataset.text without a column text", "tokenize --text rows.jsonl", 5, ("rows.jsonl has no column `text`", "body"), {"rows.jsonl": '{"body": "x"}\n'}),
    Mistake("vocabulary larger than the data allows", "tokenize --text LAB/text --vocab-size 60000", 3, ("the text allows a vocabulary of", "60000 were asked for", "set vocab_size to")),
    Mistake("vocabulary smaller than the bytes", "tokenize --text LAB/text --vocab-size 100", 2, ("--vocab-size", "greater than or equal to 262")),
    Mistake("damaged tokenizer.json", "tokenize --text LAB/text --tokenizer LAB/tokenizer-damaged", 5, ("tokenizer.json",)),
    Mistake("directory that is no dataset", "tokenize --text LAB/model", 5, ("LAB/model",)),
]  # fmt: skip

TRAIN = "train-pretrain --tokens LAB/tokens --tokenizer LAB/tokenizer"
MODELS = [
    Mistake("artifact of the wrong kind", "train-pretrain --tokens LAB/text --tokenizer LAB/tokenizer", 5, ("LAB/text", "dataset.tokens")),
    Mistake("unknown preset", f"{TRAIN} --preset lama", 2, ("--preset", "'lama'", "`llama`")),
    Mistake("heads that do not divide dim", f"{TRAIN} --dim 100 --heads 3", 2, ("dim 100 is not divisible by heads 3", "heads that fit"), slow=True),
    Mistake("kv_heads that do not divide heads", f"{TRAIN} --dim 96 --heads 6 --kv-heads 4", 2, ("kv_heads 4", "kv_heads that fit"), slow=True),
    Mistake("learning rate of zero", f"{TRAIN} --lr 0", 2, ("--lr", "x>0")),
    Mistake("tokens of another tokenizer", "train-pretrain --tokens LAB/tokens --tokenizer LAB/tokenizer-other", 5, ("was made with the tokenizer", "same `tokenize` stage"), slow=True),
    Mistake("token shard that is cut short", "train-pretrain --tokens LAB/tokens-short --tokenizer LAB/tokenizer", 5, ("train-00000.bin has", "meta.json says")),
    Mistake("model without a tensor", "sft --model LAB/model-torn --data LAB/chat.jsonl", 5, ("model.norm.weight",), slow=True),
    Mistake("model of a foreign architecture", "sft --model LAB/model-foreign --data LAB/chat.jsonl", 5, ("FalconForCausalLM",), slow=True),
    Mistake("chat with an unknown role", "sft --model LAB/model --data LAB/chat-role.jsonl", 5, ("robot",), slow=True),
    Mistake("prompt longer than the context", f"generate LAB/model --prompt {'word' * 400}", 2, ("tokens, the model's context is 16", "shorten the prompt"), slow=True),
    Mistake("negative temperature", "generate LAB/model --prompt hello --temperature -1", 2, ("temperature", "-1")),
    Mistake("empty prompt", "generate LAB/model --prompt=", 2, ("the text to continue is empty", "--prompt")),
    Mistake("chat with a model that is not there", "chat LAB/nothing --prompt hello", 5, ("LAB/nothing",)),
    Mistake("chat with what is no model", "chat LAB/text --prompt hello", 5, ("LAB/text",)),
    Mistake("port in use", "serve --model LAB/model --port PORT", 7, ("PORT", "in use")),
]  # fmt: skip


ALL = [*PLUGINS, *COMMAND_LINE, *SPECS, *LAYERS, *STAGES, *DATA, *MODELS]


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Path:
    """Small real artifacts, whole ones and damaged ones."""
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer
    from llmctl.stage import Artifact
    from llmctl.testing import run_stage
    from llmctl_tokenize import TOKENIZE

    lab = tmp_path_factory.mktemp("lab")
    text = lab / "text"
    text.mkdir()
    words = Path(os.__file__).read_text().split("\n\n")
    for split, rows in (("train", words[:60]), ("validation", words[60:70])):
        lines = (json.dumps({"id": f"{split}{n}", "source": "os", "text": row}) for n, row in enumerate(rows))
        (text / f"{split}-00000-of-00001.jsonl").write_text("".join(f"{line}\n" for line in lines))
    source = Artifact(text, "dataset.text")
    for size, names in ((400, ("tokenizer", "tokens")), (300, ("tokenizer-other", "tokens-other"))):
        made = run_stage(TOKENIZE, lab / f"made{size}", {"vocab_size": size}, text=source).outputs
        for name, port in zip(names, ("tokenizer", "tokens"), strict=True):
            made[port].path.rename(lab / name)
    shape = ModelConfig(
        arch="llama", vocab_size=400, dim=32, layers=1, heads=2, context=16, bos_id=0, eos_id=1, pad_id=2
    )
    save_model(Transformer(shape), lab / "model", lab / "tokenizer")
    damage(lab)
    return lab


def damage(lab: Path) -> None:
    """Copies with one thing wrong each."""
    import shutil

    from safetensors.numpy import load_file, save_file

    for source, copy in (
        ("tokenizer", "tokenizer-damaged"),
        ("tokens", "tokens-short"),
        ("model", "model-torn"),
        ("model", "model-foreign"),
    ):
        shutil.copytree(lab / source, lab / copy)
    broken = lab / "tokenizer-damaged/tokenizer.json"
    broken.write_text(broken.read_text()[:-200])
    shard = lab / "tokens-short/train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    tensors = load_file(lab / "model-torn/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, lab / "model-torn/model.safetensors", metadata={"format": "pt"})
    config = json.loads((lab / "model-foreign/config.json").read_text())
    config |= {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}
    (lab / "model-foreign/config.json").write_text(json.dumps(config))
    for name, role in (("chat", "user"), ("chat-role", "robot")):
        row = {"id": "1", "messages": [{"role": role, "content": "hi"}, {"role": "assistant", "content": "ho"}]}
        (lab / f"{name}.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture
def make(fake, llmctl, tmp_path, request):
    """Commit a mistake in `tmp_path/work` and judge what came back."""

    def commit(mistake: Mistake, **options) -> subprocess.CompletedProcess:
        work = tmp_path / "work"
        for name, content in mistake.files.items():
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        words = {"LAB": str(request.getfixturevalue("lab"))} if "LAB" in mistake.args else {}
        if "PORT" in mistake.args.split():
            words["PORT"] = str(request.getfixturevalue("taken_port"))
        args = [replaced(word, words) for word in mistake.args.split()]
        if mistake.stdin is not None:
            (tmp_path / "stdin").write_bytes(mistake.stdin)
            with (tmp_path / "stdin").open("rb") as stdin:
                done = llmctl(*args, stdin=stdin, **options)
        else:
            done = llmctl(*args, **options)
        judge(mistake, done, words)
        return done

    return commit


@pytest.fixture
def taken_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def replaced(text: str, words: dict[str, str]) -> str:
    for name, value in words.items():
        text = text.replace(name, value)
    return text


def judge(mistake, done, words):
    assert done.returncode == mistake.code, f"exit {done.returncode}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "this is a bug" not in done.stderr
    said = " ".join(done.stderr.split())
    for part in mistake.says:
        assert replaced(part, words) in said, f"{part!r} is not in:\n{done.stderr}"
    # The way out: a hint line, or the place in the text with a word beside the carets.
    assert "hint:" in done.stderr or " --> " in done.stderr, done.stderr
    assert max(map(len, done.stderr.splitlines())) < 400


ROWS = [pytest.param(row, marks=[pytest.mark.slow] if row.slow else [], id=row.name) for row in ALL]


@pytest.mark.parametrize("mistake", ROWS)
def test_mistake(mistake, make):
    make(mistake)


def test_there_are_many_and_no_two_are_the_same():
    assert len({row.name for row in ALL}) == len(ALL) >= 80
    assert len({(row.args, str(row.files), row.stdin) for row in ALL}) == len(ALL)


@pytest.mark.parametrize(
    "damage", [pytest.param("cut", marks=pytest.mark.slow), pytest.param("gone", marks=pytest.mark.slow), "manifest"]
)
def test_corrupt_artifact(damage, fake, llmctl):
    records = [json.loads(line) for line in llmctl("fake-tok").stdout.splitlines()]
    refs = {record["port"]: record for record in records if record["llmctl"] == "ref"}
    path = Path(refs["tokens"]["path"])
    for entry in (path, *path.iterdir()):
        entry.chmod(0o755)
    content, manifest = path / "content.txt", path / "llmctl.json"
    match damage:
        case "cut":
            content.write_bytes(content.read_bytes()[:-3])
        case "gone":
            content.unlink()
        case "manifest":
            manifest.write_text(manifest.read_text()[:-20])
    done = llmctl("fake-pre", "--tokens", refs["tokens"]["id"], "--tokenizer", refs["tokenizer"]["id"])
    assert done.returncode == 5, done.stderr
    assert refs["tokens"]["id"].removeprefix("sha256:")[:12] in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    made_again = llmctl("fake-tok", "--format", "id")  # a damaged artifact is no cache hit
    assert made_again.returncode == 0, made_again.stderr
    assert "cached" not in made_again.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MiB: a run may begin on it."""
    disk = tmp_path / "small"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_no_space_left_for_the_store(fake, llmctl, small_disk):
    done = llmctl("fake-tok", "--store", small_disk / "store", "--text", "x" * 30_000, "--size", "1000")
    assert done.returncode == 3, done.stderr
    assert "space" in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    again = llmctl("fake-tok", "--store", small_disk / "store")
    assert again.returncode == 0, again.stderr


def test_no_space_left_to_begin_with(fake, llmctl, small_disk):
    with (small_disk / "filler").open("wb") as filler:
        filler.write(bytes(39 << 20))
    done = llmctl("fake-tok", "--store", small_disk / "store")
    assert done.returncode == 3, done.stderr
    assert "no space left" in done.stderr
    assert "--store" in done.stderr
    assert "start" not in done.stderr


def test_no_space_left_for_the_copy(fake, llmctl, small_disk):
    done = llmctl("fake-tok", "--output", small_disk / "out", "--text", "x" * 30_000, "--size", "1000")
    assert done.returncode == 3, done.stderr
    assert "space" in done.stderr
    assert "hint:" in done.stderr
