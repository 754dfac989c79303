"""Several models in one server: chosen by name, swapped under load, drained, and loaded only from where they may be."""

from __future__ import annotations

import json
import threading
import time

import pytest

from llmctl import Artifact, InputError
from llmctl_serve.errors import ApiError
from llmctl_serve.opening import Finder

QUESTION = [{"role": "user", "content": "?"}]
KEY = {"Authorization": "Bearer k"}


@pytest.fixture
def fleet(scripted, byte_tokenizer, service_of, serving_models):
    """A server with the models a and b; `old`, `new` answer what they are called."""
    generators = {name: scripted(byte_tokenizer, default=name * 8, delay=0.002) for name in ("old", "new", "other")}

    def find(source):
        if source not in generators:
            raise InputError(f"no artifact is called {source}")
        return Artifact(byte_tokenizer.directory / source, "model.onnx", f"sha256:{source}")

    def open_(name, artifact):
        return service_of(generators[artifact.path.name], name, artifact)

    with serving_models(open_, {"a": "old", "b": "other"}, find, api_key="k") as server:
        server.client = server.client.with_options(api_key="k")
        plain = server.request
        server.request = lambda method, path, body=None, headers=None: plain(
            method, path, body, {**KEY, **(headers or {})}
        )
        yield server


def say(server, **more):
    status, body, headers = server.post({"messages": QUESTION, **more})
    assert status == 200, body
    return body["choices"][0]["message"]["content"], headers["x-llmctl-model"]


def test_models_are_chosen_by_name_and_the_first_is_the_default(fleet):
    assert say(fleet) == say(fleet, model="a") == ("old" * 8, "sha256:old")
    assert say(fleet, model="b") == ("other" * 8, "sha256:other")
    assert [model.id for model in fleet.client.models.list()] == ["a", "b"]


def test_a_swap_under_load_loses_and_crosses_nothing(fleet):
    found, failed, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                text, artifact = say(fleet, model="a")
                found.append((text, artifact))
            except Exception as error:  # the test reports it
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for name in ("new", "old", "new"):
        status, body, _ = fleet.post({"name": "a", "ref": name}, "/admin/models")
        assert (status, body["artifact"]) == (200, f"sha256:{name}")
    assert say(fleet, model="a") == ("new" * 8, "sha256:new")
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert set(found) <= {("old" * 8, "sha256:old"), ("new" * 8, "sha256:new")}
    assert len(found) >= 6


def test_what_cannot_be_loaded_changes_nothing(fleet):
    status, body, _ = fleet.post({"name": "a", "ref": "nowhere"}, "/admin/models")
    assert (status, body["error"]["code"]) == (400, "cannot_load")
    assert say(fleet, model="a")[1] == "sha256:old"


def test_removing_a_model(fleet):
    status, text, _ = fleet.request("DELETE", "/admin/models/b")
    assert (status, json.loads(text)["removed"]) == (200, True)
    assert fleet.post({"messages": QUESTION, "model": "b"})[0] == 404
    assert fleet.request("DELETE", "/admin/models/b")[0] == 404
    assert fleet.request("DELETE", "/admin/models/a")[0] == 409


def test_operations(fleet):
    assert json.loads(fleet.get("/readyz")[1]) == {"status": "ready", "models": ["a", "b"]}
    models = json.loads(fleet.get("/version")[1])["models"]
    assert [(model["id"], model["artifact"]) for model in models] == [("a", "sha256:old"), ("b", "sha256:other")]
    fleet.models.stopping = True
    assert fleet.get("/readyz")[0] == 503
    assert fleet.post({"messages": QUESTION})[1]["error"]["code"] == "shutting_down"


def test_a_reload_reverts_nothing_that_was_loaded_or_removed_meanwhile(fleet):
    """A reload that waits for a load must look at what is served after it."""
    models, order = fleet.models, []
    open_, find = models._open, models._find
    loading, go = threading.Event(), threading.Event()

    def slow(name, artifact):
        order.append(artifact.id)
        if artifact.id == "sha256:new":
            loading.set()
            assert go.wait(10)
        return open_(name, artifact)

    models._open = slow
    load = threading.Thread(target=models.load, args=("a", "new"))
    load.start()
    assert loading.wait(10)
    models._find = lambda source: find("other" if source == "old" else source)  # what `old` points to by now
    reload = threading.Thread(target=models.reload)
    reload.start()
    time.sleep(0.1)
    go.set()
    load.join()
    reload.join()
    assert models.find("a").service.artifact.id == "sha256:new"
    assert order == ["sha256:new"]


def test_a_reload_that_fails_in_whatever_way_leaves_everything_as_it_is(fleet):
    """The signal that asks for it must not end a server that has just no memory for a second model."""
    open_, find = fleet.models._open, fleet.models._find

    def opened(name, artifact):
        if artifact.id == "sha256:new":
            raise MemoryError("no room")
        return open_(name, artifact)

    fleet.models._open = opened
    fleet.models._find = lambda source: find({"old": "new", "other": "old"}[source])
    assert [change.name for change in fleet.models.reload()] == ["b"]
    assert say(fleet, model="a") == ("old" * 8, "sha256:old")
    assert say(fleet, model="b") == ("old" * 8, "sha256:old")
    assert fleet.warnings == ["a stays as it is: MemoryError: no room"]


def test_a_model_that_is_opened_while_the_server_stops_is_closed(fleet):
    opened, open_ = [], fleet.models._open

    def stopping(name, artifact):
        fleet.models.close()
        opened.append(open_(name, artifact))
        return opened[0]

    fleet.models._open = stopping
    with pytest.raises(ApiError) as caught:
        fleet.models.load("c", "new")
    assert caught.value.code == "shutting_down"
    assert "c" not in fleet.models.names
    assert not [thread for thread in threading.enumerate() if thread.name == "engine c"]


def test_without_keys_nobody_administers(scripted, byte_tokenizer, running):
    with running(scripted(byte_tokenizer)) as server:
        for method, path in (("POST", "/admin/models"), ("DELETE", "/admin/models/a"), ("POST", "/admin/reload")):
            status, text, _ = server.request(method, path, {} if method == "POST" else None)
            assert status == 403
            assert "llmctl keys create" in json.loads(text)["error"]["message"]


def test_the_administration_needs_a_key_of_its_own_where_there_are_keys(scripted, byte_tokenizer, running):
    with running(scripted(byte_tokenizer), api_key="k") as server:
        assert server.post({"name": "a", "ref": "own"}, "/admin/models")[0] == 401
        key = {"Authorization": "Bearer k"}
        assert server.post({"name": "a", "ref": "own"}, "/admin/models", key)[0] == 200


@pytest.mark.parametrize("ref", ["/etc", "../x", "~", "./x", "file:///etc", "hf://a/b", "a\0b", "tests", "a" * 300])
def test_a_request_names_no_path(tmp_path, monkeypatch, ref):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "root").mkdir()
    with pytest.raises((InputError, ApiError)):
        Finder(tmp_path / "root").find(ref)


def test_below_the_root_links_out_of_it_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError):
        Finder(root).find("link")
