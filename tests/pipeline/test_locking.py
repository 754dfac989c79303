"""Sources that are what the spec says, and the lock file that says it for all of them."""

from __future__ import annotations

import json

import pytest

SPEC = """
llmctl: 1
name: p
sources: {{one: {one}, two: {{uri: ./two.txt}}}}
stages:
  a: {{uses: make, inputs: {{files: [sources.one, sources.two]}}}}
  b: {{uses: upper, inputs: {{text: a}}}}
"""


@pytest.fixture
def project(fake_stages, work, llmctl):
    (work / "one").mkdir()
    (work / "one" / "x.txt").write_text("x")
    (work / "two.txt").write_text("two")

    def write(one="./one/x.txt"):
        (work / "p.yaml").write_text(SPEC.format(one=one).lstrip())

    write()
    return write


def lines(work):
    return [json.loads(line) for line in (work / "sources.lock.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_lock_names_every_source_and_plugin_and_notices_what_changes(project, llmctl, work):
    assert llmctl("lock", "p.yaml").stdout == "sources.lock.jsonl: 4 lines\n"
    assert [(line["kind"], line["name"]) for line in lines(work)] == [
        ("source", "sources.one"), ("source", "sources.two"), ("stage", "make"), ("stage", "upper"),
    ]  # fmt: skip
    assert llmctl("lock", "p.yaml", "--check").returncode == 0
    assert llmctl("run", "p.yaml", "--locked").returncode == 0
    (work / "two.txt").write_text("other")
    changed = llmctl("lock", "p.yaml", "--check")
    assert changed.returncode == 5 and "source `sources.two`: digest sha256:" in changed.stderr
    assert "sources.one" not in changed.stderr
    refused = llmctl("run", "p.yaml", "--locked")
    assert refused.returncode == 5 and "start" not in refused.stderr
    assert llmctl("run", "p.yaml").returncode == 0, "the control: nobody asked for the lock"
    llmctl("lock", "p.yaml")
    assert llmctl("lock", "p.yaml", "--check").returncode == 0


def test_the_order_and_place_of_things_change_no_line(project, llmctl, work):
    llmctl("lock", "p.yaml")
    before = (work / "sources.lock.jsonl").read_text()
    (work / "one" / "x.txt").write_text("x")
    text = (
        (work / "p.yaml")
        .read_text()
        .replace("one: ./one/x.txt, two: {uri: ./two.txt}", "two: ./two.txt, one: {uri: ./one/x.txt}")
    )
    (work / "p.yaml").write_text(text)
    llmctl("lock", "p.yaml")
    assert (work / "sources.lock.jsonl").read_text() == before
    assert before.splitlines() == sorted(
        before.splitlines(), key=lambda line: (json.loads(line)["kind"], json.loads(line)["name"])
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no"),
        ("{", "is damaged"),
        ("3\n", "holds a line without kind and name"),
        ('{"kind": "stage", "name": "make", "dist": "fake", "rev": 1}\n' * 2, "has two lines for stage `make`"),
        (
            '{"kind": "source", "name": "sources.gone", "digest": "x", "type": "files"}\n',
            "source `sources.gone` is gone",
        ),
        ("", "source `sources.one` is new"),
    ],
)
def test_a_lock_that_cannot_be_used_says_why(content, says, project, llmctl, work):
    if content is not None:
        (work / "sources.lock.jsonl").write_text(content)
    done = llmctl("lock", "p.yaml", "--check")
    assert done.returncode == 5 and says in done.stderr and "hint:" in done.stderr


def test_a_digest_says_what_a_source_must_be(project, llmctl, work):
    llmctl("lock", "p.yaml")
    digest = lines(work)[0]["digest"]
    project(f"{{uri: ./one/x.txt, digest: '{digest}'}}")
    assert llmctl("run", "p.yaml").returncode == 0
    (work / "one" / "x.txt").write_text("changed")
    done = llmctl("run", "p.yaml")
    assert done.returncode == 5
    assert "`sources.one` has changed: its content id is sha256:" in done.stderr and "(p.yaml:3:" in done.stderr
    assert llmctl("plan", "p.yaml").returncode == 5


def test_a_pinned_source_is_taken_on_trust_and_not_hashed(project, llmctl, work, events):
    project(f"{{uri: ./one/x.txt, identity: pinned, digest: 'sha256:{'ab' * 32}'}}")
    assert llmctl("run", "p.yaml").returncode == 0
    (work / "one" / "x.txt").write_text("changed and not looked at")
    again = llmctl("run", "p.yaml")
    assert again.returncode == 0 and "a: cached" in again.stderr
    manifest = next(path for path in (work / ".llmctl/store/artifacts").glob("sha256/*/*/llmctl.json")
                    if json.loads(path.read_text())["provenance"]["stage"] == "make")  # fmt: skip
    assert f"sha256:{'ab' * 32}" in json.loads(manifest.read_text())["provenance"]["inputs"]["files"]


def test_a_pinned_glob_is_refused(project, llmctl, work):
    (work / "one" / "y.txt").write_text("y")
    project(f"{{uri: './one/*.txt', identity: pinned, digest: 'sha256:{'ab' * 32}'}}")
    done = llmctl("run", "p.yaml")
    assert done.returncode == 5 and "is pinned and matches 2 files" in done.stderr
