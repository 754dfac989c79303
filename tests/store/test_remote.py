"""Push and pull: to a directory, to memory, to a real S3 server; interrupted, damaged, raced, forbidden."""

import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest

from llmctl.errors import InputError
from llmctl.spec.canonical import digest
from llmctl.store import Store, names, transferring
from llmctl.store import remote as remotes
from llmctl.store.manifest import Manifest
from llmctl.store.pulling import pull
from llmctl.store.pushing import push
from llmctl.store.remote import Remote
from llmctl.store.store import Pointer

BUCKET = "llm-artifacts"


@pytest.fixture(scope="session")
def s3_server():
    """A moto server of the whole session; every test has a prefix of its own."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch, call):
    import fsspec

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").clear_instance_cache()
    fresh = fsspec.filesystem("s3")
    if not fresh.exists(BUCKET):
        fresh.mkdir(BUCKET)
    yield f"s3://{BUCKET}/{time.monotonic_ns()}"
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(params=["directory", "file", "memory", "s3"])
def uri(request, tmp_path, call, monkeypatch):
    """The address of an empty remote; commands of this process may use its memory."""
    monkeypatch.setattr(transferring, "FLEETING", ())
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return {
        "directory": str(tmp_path / "remote"), "file": f"file://{tmp_path}/remote", "memory": f"memory://{time.monotonic_ns()}",
    }[request.param]  # fmt: skip


@pytest.fixture
def there(tmp_path):
    """Another store, on the other side."""
    store = Store(tmp_path / "there")
    store.create()
    return store


PREIMAGES = {name: {"v": 1, "stage": name} for name in ("data", "train")}
KEYS = {name: digest(preimage) for name, preimage in PREIMAGES.items()}


@pytest.fixture
def made(store, put):
    """`data` made a text and metrics, `train` a model of three files from it; named, one tagged, in a finished run."""
    text = put(
        {"x": "text"}, type="dataset.text", stage="data", key=KEYS["data"], inputs={"files": ["sha256:" + "9" * 64]}
    )
    numbers = put({"metrics.json": "{}"}, type="metrics", stage="data", key=KEYS["data"])
    files = {
        "config.json": "{}",
        "weights": b"w" * 300_000,
        "tok/tokenizer.json": '{"a": 1}',
        "tok/tokenizer_config.json": "{}",
    }
    model = put(files, type="report", stage="train", key=KEYS["train"], inputs={"text": [text.id]})
    for name, outputs in (("data", {"text": text, "metrics": numbers}), ("train", {"model": model})):
        ids = {port: artifact.id for port, artifact in outputs.items()}
        store.publish(Pointer(key=KEYS[name], preimage=PREIMAGES[name], outputs=ids))
        refs = {port: (artifact.id, artifact.type) for port, artifact in outputs.items()}
        names.write(store, "p", name, refs, key=KEYS[name], run="r1", tag="best" if name == "train" else "")
    stages = {"train": {"outputs": {"model": {"id": model.id, "type": "report"}}}}
    folder = store.run("r1")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": "r1", "stages": stages}))
    (folder / "spec.json").write_text("{}")
    return {"text": text, "metrics": numbers, "model": model}


def send(store, uri, *texts, lineage=False, alone=False, force=False):
    return push(store, Remote(uri), texts, lineage=lineage, alone=alone, force=force)


def fetch(store, uri, *texts, lineage=False, alone=False):
    return pull(store, Remote(uri), texts, lineage=lineage, alone=alone)


def test_there_and_back(uri, store, there, made, call):
    done = call("push", "p/train", "--to", uri, "--with-lineage", "--store", store.root)
    assert done.code == 0, done.error
    assert "3 of 3 pushed" in done.out and "2 new keys" in done.out
    remote = Remote(uri)
    assert set(remote.sizes("artifacts/sha256")) == {
        str(path.relative_to(store.root / "artifacts/sha256"))
        for path in (store.root / "artifacts/sha256").rglob("*")
        if path.is_file()
    }
    assert set(remote.sizes("refs")) == {
        str(path.relative_to(store.root / "refs")) for path in store.refs.rglob("*.json")
    }
    again = call("push", "p/train", "--to", uri, "--with-lineage", "--store", store.root)
    assert "0 of 3 pushed" in again.out and "0 new keys" in again.out
    done = call("pull", "p/train@best", "--from", uri, "--with-lineage", "--store", there.root, "--format", "json")
    assert done.code == 0, done.error
    assert {row["id"] for row in done.json["artifacts"] if row["moved"]} == {artifact.id for artifact in made.values()}
    for artifact in made.values():
        there.verify(artifact.id)
        assert Manifest.read(there.artifact(artifact.id)) == Manifest.read(artifact.path)
    for key in KEYS.values():
        assert there.lookup(key) == store.lookup(key)
    assert there.resolve("p/train@best").id == made["model"].id
    assert not list((there.root / "work").iterdir()) and not list((there.root / "tmp").iterdir())
    again = call("pull", "p/train@best", "--from", uri, "--with-lineage", "--store", there.root)
    assert "0 of 3 pulled" in again.out and "there already" in again.out


def test_what_comes_along(tmp_path, store, there, made):
    uri = str(tmp_path / "remote")
    send(store, uri, made["text"].id, alone=True)
    assert len(fetch(there, uri, made["text"].id).moved) == 1
    assert there.lookup(KEYS["data"]) is None  # its metrics are not there, so the key leads nowhere
    send(store, uri, made["text"].id)
    report = fetch(there, uri, made["text"].id)
    assert [manifest.type for manifest in report.moved] == ["metrics"]
    assert there.lookup(KEYS["data"])
    assert not there.artifact(made["model"].id).exists()


def test_a_run_travels_as_a_whole(tmp_path, store, there, made, call):
    uri = str(tmp_path / "remote")
    assert call("push", "run:r1", "--to", uri, "--store", store.root).code == 0
    assert call("pull", "run:r1", "--from", uri, "--store", there.root).code == 0
    assert there.lookup(KEYS["train"])
    assert names.read_json(there.run("r1") / "run.json")["id"] == "r1"
    assert "there is no finished run r2" in call("push", "run:r2", "--to", uri, "--store", store.root).error
    missing = call("pull", "run:r2", "--from", uri, "--store", there.root)
    assert missing.code == 5 and missing.hint == "the latest: r1"


def test_records_signatures_and_newer_names(tmp_path, store, there, made, put):
    uri, other = str(tmp_path / "remote"), digest({"v": 1, "stage": "other"})
    put({"x": "text"}, type="dataset.text", key=other)
    store.publish(Pointer(key=other, preimage={"v": 1, "stage": "other"}, outputs={"text": made["text"].id}))
    store.signatures(made["text"].id).mkdir(parents=True)
    (store.signatures(made["text"].id) / "abc.sig").write_text("signature")
    send(store, uri, "p/data.text")
    newer = {"id": made["model"].id, "type": "report", "time": "2999-01-01T00:00:00Z"}
    (there.refs / "p").mkdir(parents=True)
    (there.refs / "p/data.text.json").write_text(json.dumps(newer))
    fetch(there, uri, "p/data.text")
    assert there.lookup(other).outputs == {"text": made["text"].id}
    assert there.record(made["text"].id, other).is_file()
    assert (there.signatures(made["text"].id) / "abc.sig").read_text() == "signature"
    assert names.read_json(there.refs / "p/data.text.json") == newer


def test_some_files_only(uri, store, made, call, tmp_path):
    send(store, uri, "p/train")
    out = tmp_path / "out"
    done = call("pull", "p/train", "--from", uri, "--files", "tok/*", "--files", "c*.json", "-o", out)
    assert done.code == 0, done.error
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == ["config.json", "tok/tokenizer.json", "tok/tokenizer_config.json"]
    nothing = call("pull", "p/train", "--from", uri, "--files", "*.onnx", "-o", out)
    assert (
        nothing.code == 5
        and "has no file like *.onnx" in nothing.error
        and "config.json, tok/tokenizer.json" in nothing.hint
    )
    assert call("pull", "p/train", "--from", uri, "--files", "*").code == 2
    assert call("pull", "p/train", "--from", uri, "-o", out).code == 2


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("p/tarin", "there is no result named `p/tarin` in ", "did you mean `p/train`"),
        ("p/train@bset", "there is no result named `p/train@bset`", "did you mean `p/train@best`"),
        ("q/x", "there is no result named `q/x`", "known: p/data, p/train, p/train@best"),
        ("sha256:00000000", "there is no artifact `sha256:00000000`", "p/train"),
        ("sha256:" + "0" * 64, "there is no whole artifact sha256:00000000", "p/train"),
        ("hello", "`hello` is no id, name or run", "run:<id>"),
    ],
)
def test_something_absent(text, message, hint, tmp_path, store, made, call):
    uri = str(tmp_path / "remote")
    send(store, uri, "p/train", lineage=True)
    done = call("pull", text, "--from", uri, "--store", tmp_path / "new")
    assert done.code == 5
    assert message in done.error and hint in done.hint
    assert not (tmp_path / "new").exists()


def test_an_empty_remote(uri, call):
    done = call("pull", "p/train", "--from", uri)
    assert done.code == 5 and done.hint.endswith(" is empty")


# -- interrupted and damaged ------------------------------------------------------------------------------------------


def test_a_damaged_artifact_is_not_pushed(tmp_path, store, made):
    path = made["model"] / "weights"
    path.chmod(0o644)
    path.write_bytes(b"v" * 300_000)
    with pytest.raises(InputError, match="is not pushed: .*weights is damaged"):
        send(store, str(tmp_path / "remote"), "p/train")
    assert not (tmp_path / "remote").exists()


def test_a_push_that_breaks_off_leaves_nothing_to_take_for_whole(tmp_path, store, there, made, monkeypatch):
    uri = str(tmp_path / "remote")
    sent = []
    upload = Remote.upload

    def breaks(self, source, path):
        if path.endswith("llmctl.json"):
            raise KeyboardInterrupt
        sent.append(path)
        upload(self, source, path)

    monkeypatch.setattr(Remote, "upload", breaks)
    with pytest.raises(KeyboardInterrupt):
        send(store, uri, "p/train")
    assert len(sent) == 4 and Remote(uri).sizes("keys") == {} and Remote(uri).sizes("refs") == {}
    with pytest.raises(InputError, match="there is no whole artifact"):
        fetch(there, uri, made["model"].id)
    monkeypatch.setattr(Remote, "upload", lambda self, source, path: sent.append(path) or upload(self, source, path))
    send(store, uri, "p/train")
    assert [path for path in sent[4:] if not path.endswith("llmctl.json")] == []  # what was there is not sent again
    assert fetch(there, uri, made["model"].id).moved


def test_kill_9_during_push_and_pull(tmp_path, store, put, there):
    """Ten pushes and ten pulls that are killed: the other side never sees a half artifact, and repeating ends well."""
    uri = str(tmp_path / "remote")
    artifact = put({f"part-{number}": os.urandom(200_000) for number in range(12)})
    store.publish(Pointer(key=KEYS["data"], preimage=PREIMAGES["data"], outputs={"out": artifact.id}))

    def killed(work, after):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(0)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1] != 0

    def took(work):
        begun = time.monotonic()
        work()
        return time.monotonic() - begun

    def fetched():
        seconds = took(lambda: fetch(there, uri, artifact.id))
        shutil.rmtree(there.artifact(artifact.id))
        return seconds

    # The shortest of three: were a busy moment the measure, the kills would come when all is done.
    whole = min(took(lambda n=n: send(store, str(tmp_path / f"scale{n}"), artifact.id)) for n in range(3))
    interrupted = 0
    for turn in range(10):
        interrupted += killed(lambda: send(store, uri, artifact.id), whole * (turn + 0.5) / 11)
        folder = tmp_path / "remote" / artifact.path.relative_to(store.root)
        if (folder / "llmctl.json").exists():
            assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
                path.name for path in artifact.path.iterdir()
            }
            shutil.rmtree(tmp_path / "remote")
    assert interrupted > 3
    send(store, uri, artifact.id)
    whole = min(fetched() for _ in range(3))
    interrupted = 0
    for turn in range(10):
        interrupted += killed(lambda: fetch(there, uri, artifact.id), whole * (turn + 0.5) / 11)
        for id in there.ids():
            there.verify(id)
            shutil.rmtree(there.artifact(id))
    assert interrupted > 3
    fetch(there, uri, artifact.id)
    there.verify(artifact.id)
    assert sorted(path.name for path in there.artifact(artifact.id).iterdir()) == sorted(
        path.name for path in artifact.path.iterdir()
    )


@pytest.mark.parametrize("how", ["bytes", "size", "manifest", "path"])
def test_a_damaged_remote_is_found_before_it_counts(how, tmp_path, store, there, made, call):
    uri = str(tmp_path / "remote")
    send(store, uri, "p/train")
    folder = tmp_path / "remote" / made["model"].path.relative_to(store.root)
    if how in ("bytes", "size"):
        (folder / "weights").write_bytes(b"v" * (300_000 if how == "bytes" else 5))
    elif how == "manifest":
        text = (folder / "llmctl.json").read_text()
        (folder / "llmctl.json").write_text(text.replace('"weights"', '"weightz"'))
    else:
        evil = json.loads((folder / "llmctl.json").read_text())
        evil["files"][0]["path"] = "../../../../escaped"
        manifest = Manifest.parse(json.dumps(evil))
        from llmctl.store.manifest import content_id

        evil["id"] = content_id(manifest.type, manifest.files)
        target = tmp_path / "remote/artifacts/sha256" / evil["id"][7:9] / evil["id"][7:]
        target.mkdir(parents=True)
        (target / "llmctl.json").write_text(json.dumps(evil))
        done = call("pull", evil["id"], "--from", uri, "--store", there.root)
        assert done.code == 5 and "lists the path '../../../../escaped'" in done.error
        return
    done = call("pull", "p/train", "--from", uri, "--store", there.root)
    assert done.code == 5
    assert ("weights is damaged" if how != "manifest" else "there is no whole artifact") in done.error
    assert list(there.ids()) == [] and there.lookup(KEYS["train"]) is None
    force = ("--force",) if how == "bytes" else ()
    assert call("push", "p/train", "--to", uri, "--store", store.root, *force).code == 0
    assert call("pull", "p/train", "--from", uri, "--store", there.root).code == 0


def test_a_poisoned_key_is_not_taken(tmp_path, store, there, made):
    """A key that leads to another stage's result, as an attacker or a bug would write it."""
    uri = str(tmp_path / "remote")
    send(store, uri, "p/train")
    path = tmp_path / "remote" / store.key(KEYS["train"]).relative_to(store.root)
    pointer = json.loads(path.read_text())
    path.write_text(json.dumps({**pointer, "preimage": {"v": 1, "stage": "another"}}))
    fetch(there, uri, "p/train")
    assert there.artifact(made["model"].id).is_dir()
    assert there.lookup(KEYS["train"]) is None
    path.write_text(json.dumps(pointer))  # the control
    fetch(there, uri, "p/train")
    assert there.lookup(KEYS["train"])


def test_nothing_but_results_is_sent(tmp_path, store, made, call):
    """A canary in logs, events, requests, notes on inputs and resume state never reaches a remote."""
    places = (
        "runs/r1/logs/train.log",
        "runs/r1/events.jsonl",
        "requests/aa/x.json",
        "externals/x.json",
        "work/x/state",
    )
    for place in places:
        path = store.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("canary-7c1d")
    assert (
        call("push", "run:r1", "p/data.text", "--with-lineage", "--to", tmp_path / "remote", "--store", store.root).code
        == 0
    )
    sent = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert len(sent) > 10
    assert not [path for path in sent if b"canary-7c1d" in path.read_bytes()]


# -- S3 ---------------------------------------------------------------------------------------------------------------


def test_sixteen_racing_creators_have_one_winner(s3):
    remote = Remote(s3)
    won = []
    barrier = threading.Barrier(16)

    def create(number):
        barrier.wait()
        if remote.create("keys/x.json", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert remote.read("keys/x.json") == str(won[0]).encode()


def test_the_first_key_on_the_remote_wins_unless_it_leads_nowhere(uri, store, made, put):
    other = put({"x": "another result"}, key=KEYS["train"])
    send(store, uri, "p/train")
    path = f"keys/{KEYS['train'][7:9]}/{KEYS['train'][7:]}.json"
    store.publish(Pointer(key=KEYS["train"], preimage=PREIMAGES["train"], outputs={"model": other.id}), replace=True)
    send(store, uri, other.id)
    assert json.loads(Remote(uri).read(path))["outputs"] == {"model": made["model"].id}
    folder = f"artifacts/sha256/{made['model'].id[7:9]}/{made['model'].id[7:]}"
    Remote(uri).delete(f"{folder}/llmctl.json")
    send(store, uri, other.id)
    assert json.loads(Remote(uri).read(path))["outputs"] == {"model": other.id}


@pytest.mark.slow
def test_long_listings_are_whole(s3):
    """mlflow#14654 saw only the first thousand objects."""
    remote = Remote(s3)
    remote._fs.pipe({f"{remote.root}/refs/p/{number}.model.json": b"{}" for number in range(1005)})
    assert len(remote.sizes("refs/p")) == 1005


def test_an_unknown_bucket_and_bad_credentials(s3, store, made, call, monkeypatch):
    done = call("push", "p/train", "--to", "s3://no-such-bucket-here/x", "--store", store.root)
    assert done.code == 5 and "no-such-bucket-here" in done.error and "bucket" in done.hint and "\n" not in done.error
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    done = call("push", "p/train", "--to", s3, "--store", store.root)
    assert done.code == 7 and "redentials" in done.error and "AWS_ACCESS_KEY_ID" in done.hint and "\n" not in done.error


def test_a_server_that_is_not_there(store, made, call, monkeypatch, s3):
    import fsspec

    monkeypatch.setattr(remotes, "PAUSES", (0.0,))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    done = call("push", "p/train", "--to", s3, "--store", store.root)
    assert (
        done.code == 5
        and "cannot read store.json" in done.error
        and "127.0.0.1:9" in done.error
        and "\n" not in done.error
    )


# -- what goes wrong for a moment -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failures", "code"), [(2, 0), (99, 5)])
def test_bad_luck_is_tried_again_but_not_for_ever(failures, code, tmp_path, store, made, call, monkeypatch):
    monkeypatch.setattr(remotes, "PAUSES", (0.0, 0.0, 0.0))
    calls = {}
    find = remotes.Remote._put

    def stumbles(self, path, write):
        def flaky(full):
            calls[path] = calls.get(path, 0) + 1
            if calls[path] <= failures:
                raise ConnectionResetError("connection reset by peer")
            write(full)

        find(self, path, flaky)

    monkeypatch.setattr(remotes.Remote, "_put", stumbles)
    done = call("push", "p/train", "--to", tmp_path / "remote", "--store", store.root)
    assert done.code == code
    assert set(calls.values()) <= {3} if code == 0 else max(calls.values()) == 4
    assert code == 0 or "connection reset by peer" in done.error


def test_a_right_that_is_missing_is_not_tried_again(tmp_path, monkeypatch):
    remote = Remote(str(tmp_path))
    calls = []

    def refuse(*args):
        calls.append(args)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(remote._fs, "cat_file", refuse)
    with pytest.raises(InputError, match="cannot read x in .*: Access Denied"):
        remote.read("x")
    assert len(calls) == 1


# -- addresses --------------------------------------------------------------------------------------------------------


def test_named_remotes(tmp_path, store, made, call):
    config = tmp_path / "home/.config/llmctl/config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(f"store:\n  remotes: {{team: {tmp_path / 'remote'}}}\n")
    assert call("push", "p/train", "--to", "team", "--store", store.root).code == 0
    assert (tmp_path / "remote/artifacts").is_dir()
    typo = call("push", "p/train", "--to", "tema", "--store", store.root)
    assert typo.code == 2 and "there is no remote named `tema`" in typo.error and "did you mean `team`" in typo.hint
    config.write_text("store: [")
    assert call("push", "p/train", "--to", "team", "--store", store.root).code == 2


def test_remotes_of_a_spec(tmp_path, store, made, call, monkeypatch):
    from types import SimpleNamespace

    asked = []
    found = SimpleNamespace(remotes={"team": str(tmp_path / "remote")})
    monkeypatch.setattr("llmctl.spec.pipeline.load_pipeline", lambda spec, registry: asked.append(spec) or found)
    done = call("push", "p/train", "--to", "team", "--spec", "p.yaml", "--store", store.root)
    assert done.code == 0 and asked == ["p.yaml"]


@pytest.mark.parametrize(
    ("address", "code", "message", "hint"),
    [
        ("nonsense://x", 2, "nonsense://x is no address of a store", "s3://BUCKET"),
        ("s3://", 2, "s3:// names no bucket", "s3://BUCKET"),
        ("gs://x/y", 7, "gs:// needs a driver that is not installed", "pip install 'gcsfs'"),
    ],
)
def test_addresses(address, code, message, hint, store, made, call):
    done = call("push", "p/train", "--to", address, "--store", store.root)
    assert (done.code, hint in done.hint) == (code, True), done
    assert message in done.error


def test_a_missing_s3_driver_names_the_extra(store, made, call, monkeypatch):
    import fsspec  # noqa: F401  # brings its registry

    monkeypatch.setitem(sys.modules, "s3fs", None)  # importing it fails
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    done = call("push", "p/train", "--to", "s3://b/x", "--store", store.root)
    assert done.code == 7 and "pip install 'llmctl[s3]'" in done.hint


# -- probes -----------------------------------------------------------------------------------------------------------


def test_store_check(uri, call, store):
    done = call("store", "check", uri, "--store", store.root, "--format", "json")
    assert done.code == 0, done.error
    assert [row["ok"] for row in done.json] == [True] * 5
    assert Remote(uri).sizes("") == {}
    text = call("store", "check", "--store", store.root)
    assert text.code == 0 and "flock excludes" in text.out and list((store.root / "tmp").iterdir()) == []


def test_store_check_sees_what_is_missing(tmp_path, call, store, monkeypatch):
    monkeypatch.setattr(Remote, "create", lambda self, path, data: self.write(path, data) or True)
    rows = call("store", "check", tmp_path / "r", "--format", "json").json
    assert [row["probe"] for row in rows if not row["ok"]] == ["a file is created only once"]
    monkeypatch.setattr(Remote, "sizes", lambda self, folder: {})
    done = call("store", "check", tmp_path / "r")
    assert done.code == 7 and "a listing shows it" in done.error and "NO" in done.out
    monkeypatch.setattr("fcntl.flock", lambda *args: None)
    rows = call("store", "check", "--store", store.root, "--format", "json").json
    assert [row["note"] for row in rows if row["probe"] == "flock excludes"] == [
        "two runs may do the same work, and gc must run alone"
    ]
