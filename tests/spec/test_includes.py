from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

MAIN = """
llmctl: 1
name: t
include: [./shared/one.yaml, ./shared/two.yaml]
vars: {size: 3}
stages:
  data: {uses: data, inputs: {files: sources.corpus}, with: {seed: "${{ vars.size }}"}}
  tok: {uses: tokenize, inputs: {text: data}, with: {vocab_size: "${{ vars.vocab }}"}}
"""


@pytest.fixture
def shared(tmp_path) -> Path:
    folder = tmp_path / "shared"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.yaml").write_text("vars: {size: 1, vocab: 100}\nsources: {corpus: ./raw}\n")
    (folder / "two.yaml").write_text("include: [deep/base.yaml]\nvars: {vocab: 200}\n")
    (folder / "deep" / "base.yaml").write_text("vars: {vocab: 300, deep: 1}\nprofiles: {p: {vars: {size: 9}}}\n")
    return folder


def test_later_files_win_and_the_file_itself_wins_over_all(load, shared):
    pipeline = load(MAIN)
    assert pipeline.stages["data"].params.seed == 3
    assert pipeline.stages["tok"].params.vocab_size == 200
    assert load(MAIN, profiles=("p",)).stages["data"].params.seed == 9, "profiles of included files count too"


def test_paths_start_from_the_file_that_says_them(load, shared):
    pipeline = load(MAIN)
    assert pipeline.resolve(pipeline.sources["corpus"].uri) == shared / "raw"


def test_replace_takes_the_place_of_what_lower_layers_say(load, shared):
    (shared / "one.yaml").write_text("stages: {data: {env: {A: x, B: y}, with: {clean: {lang: de, min_chars: 4}}}}\n"
                                     "sources: {corpus: ./raw}\nvars: {vocab: 100}\n")  # fmt: skip
    merged = MAIN.replace("seed: ", "clean: {lang: en}, seed: ").replace("uses: data,", "uses: data, env: {A: z},")
    params = load(merged).stages["data"].params
    assert (params.clean.lang, params.clean.min_chars) == ("en", 4)
    replaced = merged.replace("clean: {", "clean: !replace {").replace("env: {", "env: !replace {")
    spec = load(replaced).stages["data"]
    assert (spec.params.clean.lang, spec.params.clean.min_chars) == ("en", 0)
    assert sorted(load(merged).stages["data"].env) == ["A", "B"] and sorted(spec.env) == ["A"]


def test_replace_of_a_stage_keeps_out_the_defaults(load):
    text = """
        llmctl: 1
        name: t
        defaults: {env: {A: x}, retries: 2}
        stages: {data: {uses: data, env: %s {B: y}}}
    """
    assert sorted(load(text % "").stages["data"].env) == ["A", "B"]
    assert sorted(load(text % "!replace").stages["data"].env) == ["B"]
    assert load(text % "").stages["data"].retries == 2


def test_mistakes_in_an_included_file_are_shown_there(mistakes, shared):
    (shared / "two.yaml").write_text("vars: {vocab: many}\n")
    assert mistakes(MAIN) == [
        "E102 shared/two.yaml:1:15 stages.tok.with.vocab_size: Input should be a valid integer (got 'many')"
    ]


CASES = [
    ("include: [./gone.yaml]", {}, "E011 spec.yaml:3:11 cannot include ./gone.yaml: no such file [looked for "),
    ("include: [./a.yaml]", {"a.yaml": "include: [./b.yaml]\n", "b.yaml": "include: [./a.yaml]\n"},
     "E010 b.yaml:1:11 files include each other: spec.yaml → a.yaml → b.yaml → a.yaml"),
    ("include: [./spec.yaml]", {}, "E010 spec.yaml:3:11 files include each other: spec.yaml → spec.yaml"),
    ("include: [./a.yaml]", {"a.yaml": "- 1\n"}, "E012 a.yaml:1:1 a spec is a map of keys"),
    ("include: [./a.yaml]", {"a.yaml": "vars: [\n"}, "E001 a.yaml:"),
    ("include: [./a.yaml]", {"a.yaml": "uses: data\n"}, "E101 a.yaml:1:1 `uses` cannot stand in an included file"),
    ("include: [3]", {}, "E102 spec.yaml:3:11 `include` is a list of paths"),
    ("include: ['https://x.org/a.yaml']", {}, "E102 spec.yaml:3:11 `https://x.org/a.yaml` has no digest"),
    ("include: [{url: https://x.org/a.yaml}]", {}, "E102 spec.yaml:3:11 an included URL is written {url: …, sha256: "),
    ("include: [{url: ./a.yaml, sha256: aa}]", {}, "E102 spec.yaml:3:17 `./a.yaml` is no URL"),
    ("include: [{url: 'http://127.0.0.1:9/a', sha256: aa}]", {}, "E011 spec.yaml:3:17 cannot include http://127.0.0.1"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "files", "expected"), CASES, ids=lambda value: str(value)[:40])
def test_mistakes_of_includes(mistakes, tmp_path, line, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (found,) = mistakes(f"llmctl: 1\nname: t\n{line}\nstages: {{data: {{uses: data}}}}\n")
    assert found.startswith(expected), found


def test_a_url_is_taken_if_its_digest_is_right(load, mistakes):
    body = b"vars: {vocab: 77}\n"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/base.yaml"
        text = """
            llmctl: 1
            name: t
            include: [{url: %s, sha256: %s}]
            stages:
              data: {uses: data}
              tok: {uses: tokenize, inputs: {text: data}, with: {vocab_size: "${{ vars.vocab }}"}}
        """
        digest = hashlib.sha256(body).hexdigest()
        assert load(text % (url, digest)).stages["tok"].params.vocab_size == 77
        (found,) = mistakes(text % (url, "0" * 64))
        server.shutdown()
    assert f"has changed: its sha256 is {digest}" in found and found.startswith("E011 spec.yaml:3:")
