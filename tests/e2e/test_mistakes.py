"""What users do wrong, through the real command line: one clear line, the way out, the documented exit code.

A row is a mistake: the files that are there, the command as typed, the exit code of `pipeline.md` 3.6, and fragments
that the message must hold. To add one, add a row. `HERE` in a command or a fragment is the working directory.
"""

import gzip
import json
import os
import socket
import subprocess
import sys
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


def spec(body: str) -> dict[str, str]:
    """`spec.yaml` with the two lines that every pipeline has."""
    return {"spec.yaml": f"llmctl: 1\nname: test\n{body}"}


FAKE = "stages:\n  tok:\n    uses: fake-tok\n  pre:\n    uses: fake-pre\n    inputs: {tokens: tok, tokenizer: tok}\n"

COMMAND_LINE = [
    Mistake("unknown command", "trian", 2, ("no such command `trian`", "did you mean `train-pretrain`?")),
    Mistake("unknown option", "fake-tok --sizze 3", 2, ("no such option `--sizze`", "did you mean `--size`")),
    Mistake("option out of bounds", "fake-tok --size 5000", 2, ("--size", "5000 is not in the range 1<=x<=1000")),
    Mistake("option of a wrong type", "fake-tok --size many", 2, ("--size", "'many' is not a valid integer")),
    Mistake("option without a value", "fake-tok --size", 2, ("--size", "requires an argument", "`llmctl fake-tok --help`")),
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

STAGES = [
    Mistake("stage that fails", "fake-tok --fail stage", 3, ("it went wrong", "try again")),
    Mistake("bad input found by the stage", "fake-tok --fail input", 5, ("the input is bad", "get a better one")),
    Mistake("machine that cannot", "fake-tok --fail machine", 7, ("no such machine", "buy one")),
    Mistake("full disk in a stage", "fake-tok --fail full", 3, ("space",)),
    Mistake(
        "output directory that is not empty", "fake-tok --output full", 2, ("full", "empty"), {"full/x": "precious"}
    ),
    Mistake("output that is a file", "fake-tok --output file", 2, ("file",), {"file": "precious"}),
]


@pytest.fixture
def make(fake, llmctl, tmp_path):
    """Commit a mistake in `tmp_path/work` and judge what came back."""

    def commit(mistake: Mistake, **options) -> subprocess.CompletedProcess:
        work = tmp_path / "work"
        for name, content in mistake.files.items():
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        args = [word.replace("HERE", str(work)) for word in mistake.args.split()]
        if mistake.stdin is not None:
            (tmp_path / "stdin").write_bytes(mistake.stdin)
            with (tmp_path / "stdin").open("rb") as stdin:
                done = llmctl(*args, stdin=stdin, **options)
        else:
            done = llmctl(*args, **options)
        judge(mistake, done, work)
        return done

    return commit


def judge(mistake, done, work):
    assert done.returncode == mistake.code, f"exit {done.returncode}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "this is a bug" not in done.stderr
    said = " ".join(done.stderr.split())
    for part in mistake.says:
        assert part.replace("HERE", str(work)) in said, f"{part!r} is not in:\n{done.stderr}"
    # The way out: a hint line, or the place in the text with a word beside the carets.
    assert "hint:" in done.stderr or " --> " in done.stderr, done.stderr
    assert max(map(len, done.stderr.splitlines())) < 400


@pytest.mark.parametrize("mistake", [*COMMAND_LINE, *SPECS, *STAGES], ids=lambda mistake: mistake.name)
def test_mistake(mistake, make):
    make(mistake)


def test_there_are_many_and_no_two_are_the_same():
    rows = [*COMMAND_LINE, *SPECS, *STAGES]
    assert len({row.name for row in rows}) == len(rows) >= 30
    assert len({(row.args, str(row.files), row.stdin) for row in rows}) == len(rows)
