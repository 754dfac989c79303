"""Sources that need more than a folder: object stores, the hub, locked files, other encodings, records, other tools."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl.text.datasets import read_rows
from llmctl_data import DATA
from llmctl_data.records import text_to_record

PLAIN = {"emit": ["text"], "validation_share": 0.0, "workers": 1}


def texts(result) -> dict[str, str]:
    return {row["id"]: row["text"] for row in read_rows(result.outputs["text"], "train")}


def rejects(result) -> dict[str, str]:
    lines = (result.outputs["metrics"].path / "rejects.jsonl").read_text().splitlines()
    return {told["where"]: told["reason"] for told in map(json.loads, lines)}


def read(root: Path, out: Path, **params):
    return run_stage(DATA, out, {**PLAIN, **params}, files=[Artifact(root, "files")])


@pytest.mark.slow
def test_objects_of_s3(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("ENDPOINT_URL", f"http://{host}:{port}"),
        ("ACCESS_KEY_ID", "testing"),
        ("SECRET_ACCESS_KEY", "testing"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    try:
        fsspec.filesystem("s3").clear_instance_cache()
        files = fsspec.filesystem("s3")
        files.mkdir("corpus")
        files.pipe("corpus/dumps/a.jsonl.gz", gzip.compress(b'{"text": "far"}\n{"text": \n'))
        files.pipe("corpus/dumps/deep/b.txt", b"away")
        files.pipe("corpus/other/c.txt", b"not asked for")
        params = {**PLAIN, "sources": [{"path": "s3://corpus/dumps/**", "name": "bucket", "license": "CC0-1.0"}]}
        result = run_stage(DATA, tmp_path, params)
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        server.stop()
    assert sorted(texts(result).values()) == ["away", "far"]
    assert list(rejects(result).values()) == ["broken line"]
    listed = [json.loads(line) for line in (result.outputs["metrics"].path / "files.jsonl").read_text().splitlines()]
    assert all(told["digest"].startswith("etag:") for told in listed)


def pdf_with_password() -> bytes:
    """An encrypted PDF (ISO 32000-1, 7.6.3) whose entries /U and /O fit no empty password."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] >>",
        b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (b"41" * 32, b"42" * 32),
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 5 /Root 1 0 R /Encrypt 4 0 R /ID [<00> <00>] >>\nstartxref\n%d\n%%%%EOF\n" % len(out)
    return out + b"xref\n0 5\n0000000000 65535 f \n" + table + end


def test_a_pdf_with_a_password_is_named(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/locked.pdf").write_bytes(pdf_with_password())
    (tmp_path / "raw/a.txt").write_text("open")
    result = read(tmp_path / "raw", tmp_path / "out")
    assert rejects(result) == {"locked.pdf": "password"}
    assert list(texts(result).values()) == ["open"]


def test_what_may_not_be_read_is_named():
    """As another user where the tests run as root, whom no permission holds back."""
    root = Path(tempfile.mkdtemp())
    raw, out = root / "raw", root / "out"
    try:
        (raw / "closed").mkdir(parents=True)
        (raw / "closed/in.txt").write_text("nobody sees this")
        (raw / "secret.txt").write_text("nor this")
        (raw / "a.txt").write_text("open")
        read(raw, out / "all")  # what it imports is imported: another user may not see our libraries
        (raw / "secret.txt").chmod(0)
        (raw / "closed").chmod(0)
        for place in (root, out):
            place.chmod(0o777)
        was = os.geteuid()
        if was == 0:
            os.seteuid(65534)
        try:
            result = read(raw, out / "some")
        finally:
            os.seteuid(was)
        assert rejects(result) == {"closed": "unreadable", "secret.txt": "unreadable"}
        assert list(texts(result).values()) == ["open"]
    finally:
        (raw / "closed").chmod(0o700)
        shutil.rmtree(root)


def test_rows_become_records_that_come_back(tmp_path):
    (tmp_path / "raw").mkdir()
    rows = [{"name": "Ann", "n": 3, "tags": ["x", "y"], "s": "7", "none": None}, {"name": "two\nlines", "ok": True}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "raw/a.jsonl").write_text("\n".join([lines[0], '{"name": ', lines[1]]) + "\n")
    result = read(tmp_path / "raw", tmp_path / "out", sources=[{"path": "*.jsonl", "rows": "record"}])
    found = [text_to_record(text) for text in texts(result).values()]
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, rows))
    (where,) = rejects(result)
    assert where.startswith("a.jsonl:2")


def test_resiliparse_reads_pages(tmp_path):
    pytest.importorskip("resiliparse")
    (tmp_path / "raw").mkdir()
    body = "".join(
        f"<p>Otters live along river number {n} and sleep under the roots of old trees.</p>" for n in range(9)
    )
    page = f"<html><body><nav><a href='/'>Home</a></nav><article><h1>Otters</h1>{body}</article></body></html>"
    (tmp_path / "raw/page.html").write_text(page)
    text = texts(read(tmp_path / "raw", tmp_path / "out", html="resiliparse"))["page.html"]
    assert "river number 8" in text and "Home" not in text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_rows_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "raw").mkdir()
    line = '\ufeff{"text": "caf\u00e9"}\n{"text": "\u732b"}\n'
    (tmp_path / "raw/a.jsonl").write_bytes(line.encode(encoding))
    assert sorted(texts(read(tmp_path / "raw", tmp_path / "out")).values()) == ["caf\u00e9", "\u732b"]


def test_a_truncated_archive_gives_what_it_has_and_is_named(tmp_path):
    (tmp_path / "raw").mkdir()
    lines = "".join(json.dumps({"text": f"line {n} " + os.urandom(20).hex()}) + "\n" for n in range(500))
    data = gzip.compress(lines.encode())
    (tmp_path / "raw/a.jsonl.gz").write_bytes(data[: len(data) // 2])
    result = read(tmp_path / "raw", tmp_path / "out")
    kept = texts(result)
    assert 100 < len(kept) < 400
    ((where, reason),) = rejects(result).items()
    assert reason == "cut short or damaged"
    assert where == f"a.jsonl.gz:{len(kept) + 1}"


HUB = """
import json, sys
from pathlib import Path
from llmctl import LlmctlError
from llmctl.testing import run_stage
from llmctl.text.datasets import read_rows
from llmctl_data import DATA
params = {"emit": ["text"], "validation_share": 0.0, "workers": 1, "sources": [{"path": sys.argv[1]}]}
try:
    result = run_stage(DATA, Path(sys.argv[2]), params)
except LlmctlError as error:
    sys.exit(f"error: {error.message}")
print(json.dumps(sorted(row["text"] for row in read_rows(result.outputs["text"], "train"))))
"""


def from_hub(url: str, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the client reads its settings when it is imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    words = [sys.executable, "-c", HUB, url, str(out)]
    return subprocess.run(words, env={**clean, **env}, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_datasets_of_the_hub_s_cache_without_a_network(tmp_path):
    """The cache has the hub client's documented layout: blobs, refs and snapshots."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    held = tmp_path / "hf/hub/datasets--org--otters"
    snapshot = held / "snapshots" / commit
    (snapshot / "data").mkdir(parents=True)
    (held / "refs").mkdir()
    (held / "refs/main").write_text(commit)
    (snapshot / "README.md").write_text("# Otters")
    (snapshot / "data/a.jsonl").write_text('{"text": "one"}\n')
    (snapshot / "data/b.jsonl").write_text('{"text": "two"}\n')
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    found = from_hub("hf://datasets/org/otters/data/*.jsonl", tmp_path / "out", **env)
    assert json.loads(found.stdout) == ["one", "two"], found.stderr
    start = time.monotonic()
    missing = from_hub("hf://datasets/org/herons/*.jsonl", tmp_path / "none", **env)
    assert missing.returncode == 1 and missing.stderr.startswith("error: cannot fetch hf://datasets/org/herons")
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_a_messy_folder_from_the_command_line(tmp_path):
    """Every problem is named on stderr, with a row for every step above; stdout has references alone."""
    raw = tmp_path / "notes"
    raw.mkdir()
    (raw / "rows.jsonl").write_text(
        '{"text": "write to ann@lake.org"}\n{"text": \n{"text": "twice"}\n{"text": "twice"}\n'
    )
    (raw / "old.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (raw / "empty.txt").write_bytes(b"")
    (raw / "locked.pdf").write_bytes(pdf_with_password())
    (raw / "self.txt").symlink_to("self.txt")
    steps = '[{"name": "exact-duplicates"}, {"name": "pii"}]'
    words = [sys.executable, "-m", "llmctl", "data", "--files", "notes", "--store", "store", "--workers", "1"]
    words += ["--set-json", 'emit=["text"]', "--set-json", f"steps={steps}"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [line.removeprefix("data: ").split() for line in done.stderr.splitlines()]
    for told in (
        ["read", "4"],
        ["exact-duplicates", "-1", "1", "exact", "duplicate"],
        ["pii", "0", "1", "edited"],
        ["kept", "3"],
    ):
        assert any(row[: len(told)] == told for row in rows), (told, done.stderr)
    for name in ("old.txt: read as cp1252", "rows.jsonl:2", "empty.txt: ", "locked.pdf: ", "self.txt: "):
        assert f"data: {name}" in done.stderr, done.stderr
    assert "4 not read" in done.stderr
    assert all(line.startswith("{") for line in done.stdout.splitlines())
