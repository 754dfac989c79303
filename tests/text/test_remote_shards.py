"""Token shards that lie elsewhere: the same batches, a bounded cache, one line for a broken connection."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl.errors import InputError, MachineError
from llmctl.store.types import check
from llmctl.text import remote_files
from llmctl.text.remote_files import Remote, RemoteValues, point
from llmctl.text.shards import ShardWriter, TokenShards
from llmctl.train import layout
from llmctl.train.data import TokenSource
from llmctl.train.params import TrainParams


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remote_files, "PART", 256)
    monkeypatch.setattr(remote_files, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(layout, "BLOCK", 400)
    monkeypatch.setattr(layout, "WINDOW", 2)
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "local", vocab_size=900, tokenizer="sha256:0") as writer:
        for length in rng.integers(0, 80, 120):
            writer.add("train", rng.integers(0, 900, length).tolist(), int(length))
    return tmp_path / "local"


class Ranges(BaseHTTPRequestHandler):
    """Serves a directory with byte ranges; answers 503 as often as `broken` says."""

    directory: Path
    broken = 0
    ranges = True
    asked: list[str] = []  # noqa: RUF012  # one list per server class

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        kind = type(self)
        kind.asked.append(self.path)
        if kind.broken:
            kind.broken -= 1
            self.send_error(503)
            return
        path = kind.directory / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        if kind.ranges and (match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            data, status = data[int(match[1]) : int(match[2] or len(data)) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(local: Path) -> Iterator[tuple[type[Ranges], str]]:
    kind = type("Served", (Ranges,), {"directory": local, "asked": []})
    made = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield kind, f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture(params=["memory", "file", "http", "s3"])
def url(request: pytest.FixtureRequest, local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import fsspec

    if request.param == "http":
        yield request.getfixturevalue("server")[1]
        return
    if request.param == "file":
        yield f"file://{local}"
        return
    if request.param == "memory":
        target = "memory://shards/tokens"
        fsspec.filesystem("memory").put(str(local) + "/", target + "/", recursive=True)
        yield target
        return
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").clear_instance_cache()
    s3 = fsspec.filesystem("s3")
    s3.mkdir("shards")
    s3.put(str(local) + "/", "s3://shards/tokens/", recursive=True)
    yield "s3://shards/tokens"
    fsspec.filesystem("s3").clear_instance_cache()
    moto.stop()


def test_batches_are_those_of_local_shards(url: str, local: Path, tmp_path: Path) -> None:
    point(url, tmp_path / "pointer")
    assert check("dataset.tokens", tmp_path / "pointer")["tokens.train"] > 1000
    params = TrainParams(batch_size=8, packing="best-fit")
    here = TokenSource(TokenShards.open(local).split("train"), 32, params)
    there = TokenSource(TokenShards.open(tmp_path / "pointer").split("train"), 32, params)
    assert isinstance(there.split.tokens, RemoteValues) and len(there.rows.cuts) > 5
    for step in (0, 1, 2, 30):
        one, other = here.micro_batches(step)[0], there.micro_batches(step)[0]
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets)
    there.split.tokens.close()


def test_the_cache_is_bounded_and_the_next_parts_are_fetched_ahead(server, local: Path) -> None:
    kind, url = server
    expected = TokenShards.open(local).split("train").tokens
    values = RemoteValues(f"{url}/train-00000.bin", np.dtype("<u2"), len(expected), cache=1024)
    for start in range(0, len(values), 100):
        assert np.array_equal(values[start : start + 100], expected[start : start + 100])
        kept = list(Path(values._directory.name).iterdir())
        assert sum(path.stat().st_size for path in kept) <= 1024 + 2 * 256
    values.expect(0, 256)
    for future in list(values._parts.values()):
        future.result()
    count = len(kind.asked)
    assert np.array_equal(values[:256], expected[:256])
    assert len(kind.asked) == count  # it was there
    directory = Path(values._directory.name)
    values.close()
    assert not directory.exists()


def test_a_stumbling_server_is_asked_again_and_a_broken_one_is_one_line(server, local: Path) -> None:
    kind, url = server
    count = len(TokenShards.open(local).split("train").tokens)
    values = RemoteValues(f"{url}/train-00000.bin", np.dtype("<u2"), count)
    kind.broken = 3
    assert len(values[:10]) == 10
    kind.broken = 99
    with pytest.raises(InputError) as error:
        values[1000:1010]
    assert f"cannot read {url}/train-00000.bin, bytes" in error.value.message and "(4 attempts)" in error.value.message
    assert "\n" not in error.value.message
    kind.broken = 0
    assert len(values[1000:1010]) == 10  # a failure is not remembered
    values.close()


def test_what_is_not_there_or_not_served_in_ranges_is_said(server, tmp_path: Path) -> None:
    kind, url = server
    with pytest.raises(InputError, match=r"cannot read .*/none/meta.json \(1 attempt\)"):
        point(f"{url}/none", tmp_path / "pointer")
    kind.ranges = False
    values = RemoteValues(f"{url}/train-00000.bin", np.dtype("<u2"), 1000)
    with pytest.raises(InputError, match="it may not serve byte ranges"):
        values[:10]
    values.close()


def test_the_command_makes_a_pointer_or_says_in_one_line_why_not(local: Path, tmp_path: Path) -> None:
    def command(*given: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "llmctl.text.remote_files", *given]
        return subprocess.run(call, capture_output=True, text=True, check=False)

    made = command(f"file://{local}", str(tmp_path / "pointer"))
    assert (made.returncode, made.stderr) == (0, "")
    assert TokenShards.open(tmp_path / "pointer").meta["url"] == f"file://{local}"
    missing = command(f"file://{local}/none", str(tmp_path / "other"))
    assert missing.returncode == 5 and missing.stderr.startswith("error: cannot read file://")
    assert not (tmp_path / "other").exists()
    assert command("file:///x").returncode == 2


def test_a_missing_driver_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def none(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", none)
    for url, hint in (("s3://a/b", "llmctl[s3]"), ("gs://a/b", "the package that it names")):
        with pytest.raises(MachineError, match="Install s3fs") as error:
            Remote(url)
        assert hint in str(error.value.hint)
