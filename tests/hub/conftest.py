"""A Hugging Face hub on loopback: what huggingface_hub asks of one, and every way in which it can fail."""

import hashlib
import json
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from safetensors.numpy import save

from llmctl.store import Store


def git_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repository:
    """Files by commit, commits by branch. Files that end in one of `LFS` are kept apart, as the hub does."""

    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    gated: bool = False
    private: str = ""
    """The token that opens it."""

    LFS = (".safetensors", ".bin", ".model")

    def commit(self, files, branch="main"):
        files = {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class FakeHub:
    """`hub.repositories[NAME]`; `cut` and `wrong` break the transfer of a file; `requests` is the log."""

    def __init__(self):
        self.repositories = {}
        self.cut = {}
        """File → how often its transfer breaks off half-way, after a first half."""
        self.wrong = {}
        """File → the bytes that are sent in place of its own."""
        self.status = 0
        """An HTTP status for every request, if not 0."""
        self.requests = []
        """(method, path, authorization, range)"""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self, send=True)

            def do_HEAD(self):
                hub.answer(self, send=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.endpoint, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        """Large files lie elsewhere, behind signed addresses: nobody may send the token there."""
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def add(self, name, files, **options):
        self.repositories[name] = Repository(**options)
        return self.repositories[name].commit(files)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def counts(self):
        """How often each file was sent, by name."""
        found = [re.search(r"/([^/?]+)(\?|$)", path)[1] for method, path, *_ in self.requests if method == "GET"]
        return Counter(found)

    # -- answers ------------------------------------------------------------------------------------------------------

    def answer(self, request, send):
        path = urlsplit(request.path).path
        self.requests.append(
            (request.command, request.path, request.headers.get("authorization"), request.headers.get("range"))
        )
        if self.status:
            return self.reply(request, self.status, b"", send=send)
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(\w+)/([^/]+)", path):
            data = self.repositories[match[1]].commits[match[2]][match[3]]
            return self.transfer(request, match[3], data, {}, send)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repository = self.repositories.get((api or file)[1])
        key = request.headers.get("authorization")
        if repository is None or (repository.private and key != f"Bearer {repository.private}"):
            return self.fail(request, 401, "RepoNotFound", send)
        revision = unquote((api or file)[2] or "main")
        commit = repository.branches.get(revision, revision if revision in repository.commits else None)
        if commit is None:
            return self.fail(request, 404, "RevisionNotFound", send)
        if api:
            return self.reply(request, 200, json.dumps(self.info(repository, api[1], commit)).encode(), send=send)
        if repository.gated and key is None:
            return self.fail(request, 401, "GatedRepo", send)
        return self.resolve(request, repository, file[1], commit, unquote(file[3]), send)

    def info(self, repository, name, commit):
        siblings = []
        for file, data in repository.commits[commit].items():
            row = {"rfilename": file, "size": len(data), "blobId": git_id(data)}
            if file.endswith(repository.LFS):
                row["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 130}
            siblings.append(row)
        return {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}

    def resolve(self, request, repository, name, commit, file, send):
        data = repository.commits[commit].get(file)
        if data is None:
            return self.fail(request, 404, "EntryNotFound", send)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_id(data)}"'}
        if not file.endswith(repository.LFS):
            return self.transfer(request, file, data, headers, send)
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        headers |= {"Location": f"{self.cdn}/cdn/{name}/{commit}/{file}?Signature=private"}
        return self.reply(request, 302, b"", headers, send=send)

    def transfer(self, request, file, data, headers, send):
        data = self.wrong.get(file, data)
        status = 200
        if span := request.headers.get("range"):
            start = int(re.match(r"bytes=(\d+)-", span)[1])
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            status, data = 206, data[start:]
        if send and self.cut.get(file, 0):
            self.cut[file] -= 1
            return self.reply(request, status, data[: max(1, len(data) // 2)], headers, length=len(data), send=send)
        return self.reply(request, status, data, headers, send=send)

    def fail(self, request, status, code, send):
        self.reply(request, status, b"", {"X-Error-Code": code}, send=send)

    def reply(self, request, status, data, headers=None, *, length=None, send):
        request.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data) if length is None else length)}.items():
            request.send_header(key, value)
        request.end_headers()
        if send:
            request.wfile.write(data)
        if length is not None:
            request.close_connection = True


WEIGHTS = {"a": np.arange(4096, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
MODEL = {
    "config.json": '{"architectures": ["LlamaForCausalLM"], "vocab_size": 16}',
    "generation_config.json": "{}",
    "tokenizer.json": '{"model": {}}',
    "model.safetensors": save(WEIGHTS),
    "README.md": "# A model",
    ".gitattributes": "*.safetensors filter=lfs",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": save(WEIGHTS),
    "onnx/model.onnx": b"a graph",
}
"""A repository as they are: more in it than makes a model."""


def sharded():
    parts = [{name: tensor} for name, tensor in WEIGHTS.items()]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"metadata": {"total_size": 16400}, "weight_map": dict(zip(WEIGHTS, names, strict=True))}
    files = {name: data for name, data in MODEL.items() if name != "model.safetensors"}
    return (
        files
        | {"model.safetensors.index.json": json.dumps(index)}
        | {name: save(part) for name, part in zip(names, parts, strict=True)}
    )


@pytest.fixture
def model():
    return dict(MODEL)


@pytest.fixture
def shards():
    return sharded()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Caches, settings and the working directory of a user who has nothing yet."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "LLMCTL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def hub(home, monkeypatch):
    """An empty hub that HF_ENDPOINT names."""
    found = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", found.endpoint)
    yield found
    found.close()


@pytest.fixture
def store(home):
    found = Store(home / "store")
    found.create()
    return found
