"""A server with its parts at hand, over a scripted model or a real one."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import openai
import pytest

from llmctl import Artifact, InputError
from llmctl.engine import EngineOptions
from llmctl.generator import Sampling
from llmctl.one_by_one import OneByOne
from llmctl.text.retrieval import Chunk, Index
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.app import create_app
from llmctl_serve.constraining import Forms
from llmctl_serve.guard import Guard
from llmctl_serve.metrics import ServerMetrics
from llmctl_serve.models import Models
from llmctl_serve.opening import Opener
from llmctl_serve.params import ServeParams
from llmctl_serve.server import HttpServer, endpoint, listen, url
from llmctl_serve.service import Service

QUESTION = [{"role": "user", "content": "Which module provides dedent?"}]
NAME = "byte-model"


class Running:
    """A server with its parts at hand."""

    def __init__(self, models, metrics, listener, warnings):
        self.models, self.metrics, self.warnings = models, metrics, warnings
        self.address, self.base = endpoint(listener), url(listener)
        self.client = openai.OpenAI(base_url=f"{self.base}/v1", api_key="none", max_retries=0, timeout=20)

    @property
    def service(self):
        return self.models.all()[0].service

    @property
    def worker(self):
        return self.models.all()[0].worker

    def request(self, method, path, body=None, headers=None):
        """(status, text, headers) of a raw request."""
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {} if raw is None else {"Content-Type": "application/json"}
        with closing(http.client.HTTPConnection(*self.address, timeout=20)) as connection:
            connection.request(method, path, raw, {**kind, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read().decode(), dict(response.getheaders())

    def post(self, body, path="/v1/chat/completions", headers=None):
        """(status, JSON body, headers) of a raw request."""
        status, text, found = self.request("POST", path, body, headers)
        return status, json.loads(text), found

    def get(self, path, headers=None):
        return self.request("GET", path, headers=headers)[:2]


def make_service(generator, name=NAME, artifact=None, index=None, default=None, params=None) -> Service:
    """A service over a generator, with the engine that fits it."""
    params = params or ServeParams(port=0)
    engine = Opener(params).engine(generator)
    return Service(
        name,
        artifact or Artifact(generator.tokenizer.directory, "model.onnx", "sha256:" + "0" * 64),
        generator.tokenizer,
        params,
        generator=generator,
        engine=engine,
        index=index,
        default=default or Sampling(),
        forms=Forms(generator.tokenizer, engine.vocab_size, engine.eos_ids),
    )


@contextmanager
def serve_models(
    open_: Callable[[str, Artifact], Service],
    sources: dict[str, str],
    find: Callable[[str], Artifact],
    api_key: str = "",
    **params: Any,
) -> Iterator[Running]:
    """A server over what `open_` opens, `sources` first."""
    params = ServeParams(port=0, **{"drain_seconds": 5, **params})
    warnings: list[str] = []
    metrics = ServerMetrics()
    with ExitStack() as stack:
        listener = stack.enter_context(listen(params.host, 0))
        guard = stack.enter_context(closing(Guard(params, metrics, api_key, warnings.append)))
        models = Models(open_, find, metrics, warnings.append)
        stack.callback(models.close)
        for name, source in sources.items():
            models.load(name, source)
        app = create_app(models, guard, warnings.append)
        stack.enter_context(HttpServer(app, listener, params.drain_seconds, models.close, **guard.uvicorn()))
        found = Running(models, metrics, listener, warnings)
        found.app = app
        yield found


@contextmanager
def serve_generator(generator, index=None, api_key="", default=None, **params) -> Iterator[Running]:
    """A server with one model."""
    given = ServeParams(port=0, **{"drain_seconds": 5, **params})

    def open_(name: str, artifact: Artifact) -> Service:
        return make_service(generator, name, artifact, index, default, given)

    def find(source: str) -> Artifact:
        if source != "own":
            raise InputError(f"no such model: {source}")
        return Artifact(generator.tokenizer.directory, "model.onnx", "sha256:" + "0" * 64)

    with serve_models(open_, {NAME: "own"}, find, api_key, **params) as found:
        yield found


@contextmanager
def serve_artifact(artifact, **params):
    """A server over a real model."""
    from llmctl.registry import get_registry

    generator = get_registry().open_generator(artifact, device="cpu", threads=1)
    generator.tokenizer = Tokenizer.load(artifact.path)
    with serve_generator(generator, **{"max_new_tokens": 24, **params}) as server:
        yield server


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def engine_of(generator, **options) -> OneByOne:
    return OneByOne(generator, EngineOptions(**options))


@pytest.fixture
def server(scripted, byte_tokenizer):
    with serve_generator(scripted(byte_tokenizer, {"dedent": "textwrap"}, default="naïve ☃")) as found:
        yield found


@pytest.fixture(scope="session")
def running():
    """`with running(generator, **params) as server:`."""
    return serve_generator


@pytest.fixture(scope="session")
def serving():
    """`with serving(artifact) as server:`, over a real model."""
    return serve_artifact


@pytest.fixture(scope="session")
def serving_models():
    """`with serving_models(open_, sources, find) as server:`."""
    return serve_models


@pytest.fixture(scope="session")
def service_of():
    """A service over a generator."""
    return make_service


@pytest.fixture(scope="session")
def one_by_one():
    """The engine that answers in turn, over a generator."""
    return engine_of


@pytest.fixture(scope="session")
def wait_until():
    """Wait for a condition, at most ten seconds."""
    return wait_for


@pytest.fixture
def index():
    """Three passages of Python's documentation."""
    return Index.build(
        [
            Chunk(
                "textwrap#0", "textwrap", 0, 58, "The function dedent removes common leading whitespace. It", "textwrap"
            ),
            Chunk("json#0", "json", 0, 40, "The function loads parses a JSON text.", "json"),
            Chunk("gzip#0", "gzip", 0, 40, "Reads and writes compressed files.", "gzip"),
        ]
    )
