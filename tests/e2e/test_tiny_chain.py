"""The twelve stages of the quickstart, really run: what is exported, reported and printed, and what a second run does.

The working directory has a space and an umlaut in its name, so that every printed command is a quoted one.
"""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STAGES = ["data", "tokenize", "train", "sft", "dpo", "prune", "distill", "onnx", "int8", "eval", "rag", "serve"]
AFTER_SFT = STAGES[STAGES.index("sft") :]
BUNDLE = {
    "model.onnx", "genai_config.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
}  # fmt: skip


@dataclass
class Chain:
    """A directory in which `llmctl` is run as a user does: the installed program, called by its path."""

    work: Path
    env: dict[str, str]
    printed: str = ""

    def __call__(self, *args: str, **kw: object) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name("llmctl")
        kw.setdefault("stdin", subprocess.DEVNULL)
        if "input" in kw:
            del kw["stdin"]
        return subprocess.run(
            [program, *args], cwd=self.work, env=self.env, capture_output=True, text=True, timeout=250, **kw
        )

    def actions(self, *args: str) -> dict[str, str]:
        """What `plan` says, stage by stage."""
        done = self("plan", "tiny.yaml", "--format", "json", *args)
        assert done.returncode == 0, done.stderr
        return {row["stage"]: row["action"] for row in json.loads(done.stdout)}

    def last_run(self) -> dict:
        return json.loads(max((self.work / ".llmctl/store/runs").iterdir()).joinpath("run.json").read_text())


def new_chain(base: Path) -> Chain:
    work = base / "meine Texte ü"
    work.mkdir()
    shutil.copy(HERE / "tiny.yaml", work)
    dropped = ("LLMCTL_", "NO_COLOR", "CLICOLOR", "FORCE_COLOR", "CI", "TERM", "COLUMNS", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return Chain(work, {**env, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The chain, run once to its end."""
    chain = new_chain(tmp_path_factory.mktemp("chain"))
    done = chain("run", "tiny.yaml", "--to", "serve")
    assert done.returncode == 0, done.stderr
    chain.printed = done.stdout
    return chain


def test_every_stage_is_done_and_every_gate_passed(chain):
    run = chain.last_run()
    assert {id: stage["status"] for id, stage in run["stages"].items()} == dict.fromkeys(STAGES, "done")
    gates = [gate["ok"] for stage in run["stages"].values() for gate in stage["gates"]]
    assert gates == [True] * 3
    assert "gates: 3 of 3 passed" in chain.printed


def test_the_exported_bundle_is_whole(chain):
    bundle = chain.work / "exports/tiny"
    assert {path.name for path in bundle.iterdir()} >= BUNDLE
    config = json.loads((bundle / "genai_config.json").read_text())
    assert (bundle / config["model"]["decoder"]["filename"]).is_file()
    assert not any(path.is_symlink() for path in bundle.iterdir())


class Page(html.parser.HTMLParser):
    """Everything that a browser would fetch for a page, and its text."""

    FETCHED = ("src", "srcset", "poster", "background", "data", "xlink:href")

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in self.FETCHED or (name == "href" and tag not in ("a", "area")):
                self.fetched.append(value or "")

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_file_with_everything_in_it(chain):
    report = chain.work / "exports/tiny-report.html"
    assert f"report: {report}" in chain.printed
    source = report.read_text()
    page = Page()
    page.feed(source)
    assert [url for url in page.fetched if not url.startswith(("#", "data:"))] == []
    assert not re.search(r"@import|url\((?!['\"]?(#|data:))", source)
    text = " ".join(page.text)
    for stage in STAGES:
        assert stage in text
    assert "loss of train" in text or "loss of train" in source
    for metric in ("parameters.removed", "parity.max_abs_diff", "bits_per_byte.ratio"):  # the gates
        assert metric in text
    assert "<svg" in source and re.search(r"[Ll]ineage", text)


# -- what was printed works as printed --------------------------------------------------------------------------------


def printed(chain: Chain, word: str) -> str:
    lines = chain.printed.partition("next:\n")[2].splitlines()
    return next(line.strip() for line in lines if re.search(rf"\b{word}\b", line))


def free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


@contextmanager
def served(chain: Chain, command: str, port: int) -> Iterator[None]:
    log = chain.work / "serve.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=chain.work, env=chain.env, stdout=file, stderr=file
        )
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end and server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        assert server.poll() is None, log.read_text()
        yield
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130), log.read_text()
    finally:
        server.kill()
        server.wait()


def test_the_printed_chat_command_answers_a_piped_question(chain):
    command = f"echo 'Which module provides `dedent`?' | {printed(chain, 'chat')}"
    done = subprocess.run(["bash", "-c", command], cwd=chain.work, env=chain.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_printed_serve_and_curl_commands(chain):
    port = 8000
    while not free(port):  # somebody else's server, not a fault of the commands
        port += 1
    serve, curl = (printed(chain, word).replace("8000", str(port)) for word in ("serve", "curl"))
    with served(chain, serve, port):
        done = subprocess.run(["bash", "-c", curl], cwd=chain.work, env=chain.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"] == "tiny"
    assert answer["choices"][0]["message"]["role"] == "assistant"


# -- again ------------------------------------------------------------------------------------------------------------


def test_a_second_run_takes_everything_from_the_store(chain, budget):
    before = {path: path.stat().st_mtime_ns for path in (chain.work / "exports/tiny").iterdir()}
    begun = os.times()
    done = chain("run", "tiny.yaml")
    ended = os.times()
    assert done.returncode == 0, done.stderr
    statuses = {id: stage["status"] for id, stage in chain.last_run()["stages"].items()}
    assert statuses == dict.fromkeys(STAGES[:-1], "cached")  # serve acts on the world: only when named
    cpu = ended.children_user + ended.children_system - begun.children_user - begun.children_system
    assert cpu < budget(2)
    assert {path: path.stat().st_mtime_ns for path in (chain.work / "exports/tiny").iterdir()} == before


def test_another_rate_for_sft_touches_only_what_follows(chain):
    assert set(chain.actions().values()) == {"cached"}
    actions = chain.actions("--set", "sft.lr=0.011")
    assert [id for id in STAGES[:-1] if actions[id] != "cached"] == AFTER_SFT[:-1]
    done = chain("run", "tiny.yaml", "--set", "sft.lr=0.011", "--to", "sft")
    assert done.returncode == 0, done.stderr
    statuses = {id: stage["status"] for id, stage in chain.last_run()["stages"].items()}
    assert statuses == {"data": "cached", "tokenize": "cached", "train": "cached", "sft": "done"}
    # The first spec's results are still there.
    assert set(chain.actions().values()) == {"cached"}


def test_plan_show_ls_lineage_and_get(chain, tmp_path):
    def as_json(*args: str):
        done = chain(*args, "--format", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def as_text(*args: str) -> str:
        done = chain(*args)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    rows = as_json("ls", "--type", "model.onnx")
    names = {name for row in rows for name in row["names"]}
    assert names == {"tiny/onnx.model", "tiny/int8.model"}
    assert "tiny/int8.model" in as_text("ls") and "tiny/train.model" not in as_text("ls", "--type", "model.onnx")

    int8 = next(row["id"] for row in rows if "tiny/int8.model" in row["names"])
    shown = as_json("show", "tiny/int8.model")
    assert (shown["id"], shown["type"]) == (int8, "model.onnx")
    assert shown["metrics"]["bits_per_byte.ratio"] == pytest.approx(
        json.loads((chain.work / ".llmctl/store/keys" / key_path(shown)).read_text())["metrics"]["bits_per_byte.ratio"]
    )
    assert {row["path"] for row in shown["files"]} >= BUNDLE
    assert int8 in as_text("show", "tiny/int8", "--verify")

    ancestors = as_json("lineage", "exports/tiny")
    assert {node["instance"] for node in ancestors} >= set(STAGES[: STAGES.index("int8") + 1])
    text = as_text("lineage", int8[:15])
    assert all(re.search(rf"\b{stage}\b", text) for stage in STAGES[: STAGES.index("int8") + 1])

    assert "data" in as_text("plan", "tiny.yaml") and as_json("plan", "tiny.yaml")[0]["action"] == "cached"

    as_text("get", int8[:15], str(tmp_path / "got"))
    copied = {path.name: path.read_bytes() for path in (tmp_path / "got").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in (chain.work / "exports/tiny").iterdir()}


def key_path(shown: dict) -> str:
    key = shown["provenance"]["key"].removeprefix("sha256:")
    return f"{key[:2]}/{key}.json"


@pytest.mark.slow
def test_all_that_follows_another_rate_runs_again(chain):
    done = chain("run", "tiny.yaml", "--set", "sft.lr=0.012")
    assert done.returncode == 0, done.stderr
    statuses = {id: stage["status"] for id, stage in chain.last_run()["stages"].items()}
    assert {id for id, status in statuses.items() if status == "done"} == set(AFTER_SFT[:-1])
    assert {statuses[id] for id in ("data", "tokenize", "train")} == {"cached"}


# -- the same spec on one's own texts ---------------------------------------------------------------------------------


def write_texts(folder: Path) -> None:
    """The language reference that Python's `help()` shows, as a user's folder of files of every kind."""
    from pydoc_data.topics import topics

    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen = [(name, text) for name, text in sorted(topics.items()) if len(text) > 1500][:28]
    (folder / "notes" / "ältere").mkdir(parents=True)
    for name, text in chosen[:8]:
        (folder / f"{name}.txt").write_text(text)
    for name, text in chosen[8:16]:
        (folder / "notes" / "ältere" / f"{name}.md").write_text(f"# {name}\n\n{text}")
    rows = [{"text": text, "name": name} for name, text in chosen[16:22]]
    (folder / "notes" / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"text": [text for _, text in chosen[22:]]}), folder / "more.parquet")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("uri", "sources"),
    [
        ("./my-texts", {".txt", ".md", ".jsonl", ".parquet"}),
        ("./my-texts/**/*.md", {".md"}),
        ("./my-texts/more.parquet", {".parquet"}),
    ],
)
def test_the_printed_line_for_own_texts(tmp_path, chain, uri, sources):
    pytest.importorskip("pyarrow")
    own = new_chain(tmp_path)
    write_texts(own.work / "my-texts")
    command = printed(chain, "profile")
    assert "--profile files --set sources.corpus.uri=./my-texts --gates warn" in command
    command = command.replace("./my-texts", f"'{uri}'") + " --to serve"
    done = subprocess.run(
        ["bash", "-c", command], cwd=own.work, env=own.env, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    statuses = {id: stage["status"] for id, stage in own.last_run()["stages"].items()}
    assert statuses == dict.fromkeys(STAGES, "done")
    shown = json.loads(own("show", "tiny/data.text", "--format", "json").stdout)
    import gzip

    lines = [
        line
        for path in Path(shown["path"]).glob("*.jsonl.gz")
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    assert {Path(json.loads(line)["source"]).suffix for line in lines} == sources
    answer = own("chat", "exports/tiny", "--prompt", "What is this about?")
    assert answer.returncode == 0, answer.stderr
