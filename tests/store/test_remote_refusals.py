"""What push and pull refuse, and what they leave alone: on the other side, and here."""

import json
import shutil

import pytest

from llmctl.errors import InputError
from llmctl.spec.canonical import digest
from llmctl.store import Store, names
from llmctl.store.locks import try_lock
from llmctl.store.pulling import pull
from llmctl.store.pushing import push
from llmctl.store.remote import Remote
from llmctl.store.store import Pointer

PREIMAGE = {"v": 1, "stage": "train"}
KEY = digest(PREIMAGE)


@pytest.fixture
def there(tmp_path):
    """A directory on the other side, of which there is nothing yet."""
    return tmp_path / "remote"


@pytest.fixture
def made(store, put):
    """A named result of two outputs."""
    model = put({"words.yaml": "a: 1", "tok/a.json": "{}", "weights": b"w" * 5000}, key=KEY, stage="train")
    numbers = put({"metrics.json": "{}"}, type="metrics", key=KEY, stage="train")
    store.publish(Pointer(key=KEY, preimage=PREIMAGE, outputs={"model": model.id, "metrics": numbers.id}))
    refs = {"model": (model.id, "report"), "metrics": (numbers.id, "metrics")}
    names.write(store, "p", "train", refs, key=KEY, run="r1", tag="best")
    return {"model": model, "metrics": numbers}


@pytest.fixture
def to(call, store):
    return lambda where, *args, what="p/train": call("push", what, "--to", where, "--store", store.root, *args)


@pytest.fixture
def new(call, tmp_path):
    """Pull into a new store: `new("p/train")`."""

    def pulled(there, *args, what="p/train"):
        return call("pull", what, "--from", there, "--store", tmp_path / "new", *args)

    return pulled


def listing(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# -- where a remote may be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["path", "uri", "link", "below"])
def test_the_store_itself_is_no_remote(how, store, made, to, tmp_path):
    (tmp_path / "link").symlink_to(store.root)
    where = {"path": store.root, "uri": f"file://{store.root}", "link": tmp_path / "link", "below": store.root / "new"}
    before = listing(store.root)
    done = to(where[how], "--force")
    assert done.code == 5 and "is this store itself" in done.error
    assert listing(store.root) == before


def test_a_remote_is_a_store_that_other_commands_read(store, made, to, there, call):
    assert to(there).code == 0
    assert json.loads((there / "store.json").read_text()) == {"format": 1}
    assert "p/train.model" in call("ls", "--store", there).out
    assert call("verify", "--all", "--deep", "--store", there).code == 0


def test_a_place_that_is_something_else_is_left_alone(store, made, to, new, there, call):
    there.mkdir()
    (there / "main.py").write_text("x")
    done = to(there)
    assert done.code == 5 and "is no llmctl store and not empty" in done.error
    assert listing(there) == {"main.py": b"x"}
    (there / "main.py").unlink()
    assert call("store", "check", there).code == 0
    assert to(there).code == 0  # what the check has left is nothing
    for text, message in (('{"format": 2}', "is a store of format 2"), ("{", "is damaged")):
        (there / "store.json").write_text(text)
        assert message in to(there).error and message in new(there).error


def test_a_place_on_s3_that_is_something_else(store, made, there, monkeypatch, call):
    """The same by the driver's listing, on an object store: memory has one."""
    remote = Remote("memory://something-else")
    remote.write("main.py", b"x")
    with pytest.raises(InputError, match="not empty"):
        push(store, remote, ["p/train"], lineage=False, alone=False, force=False)
    remote.delete("main.py")
    push(store, remote, ["p/train"], lineage=False, alone=False, force=False)
    assert remote.check()


@pytest.mark.parametrize(
    ("where", "code", "message"),
    [
        ("memory://x", 2, "is gone when this command ends"),
        ("/proc/xx", 5, "cannot write store.json in /proc/xx"),
        ("zip://nosuch.zip", 5, "cannot open zip://nosuch.zip"),
        ("ftp://nosuch.invalid/x", 5, "cannot open ftp://nosuch.invalid/x"),
        ("nonsense://x", 2, "is no address of a store"),
    ],
)
def test_places_that_cannot_be(where, code, message, made, to):
    done = to(where)
    assert done.code == code and message in done.error and "\n" not in done.error


# -- push -------------------------------------------------------------------------------------------------------------


def test_force_never_makes_a_whole_artifact_look_broken(store, made, there, monkeypatch, to):
    to(there)
    marker = there / made["model"].path.relative_to(store.root) / "llmctl.json"
    upload = Remote.upload
    seen = []

    def watched(self, source, path):
        seen.append(marker.is_file())
        upload(self, source, path)

    (marker.parent / "weights").write_bytes(b"v" * 5000)
    monkeypatch.setattr(Remote, "upload", watched)
    assert to(there, "--force").code == 0
    assert len(seen) >= 6 and all(seen)
    assert (marker.parent / "weights").read_bytes() == b"w" * 5000
    (marker.parent / "weights").write_bytes(b"v")
    seen.clear()
    assert to(there).code == 0
    assert seen == [False, False]  # the control: what is incomplete must not look whole while it is mended


def test_a_newer_name_there_stays(store, made, there, to, put):
    assert to(there).code == 0
    newer = {"id": made["metrics"].id, "type": "metrics", "time": "2999-01-01T00:00:00Z"}
    for name in ("train.model", "train.model@best"):
        (there / f"refs/p/{name}.json").write_text(json.dumps(newer))
    done = to(there)
    assert done.out.splitlines()[-1].endswith(
        "names: p/train.metrics, p/train.metrics@best; left as they are, newer there: p/train.model, p/train.model@best"
    )
    assert to(there, "--format", "json").json["newer"] == ["p/train.model", "p/train.model@best"]
    assert names.read_json(there / "refs/p/train.model@best.json") == newer
    (there / "refs/p/train.model.json").write_text(json.dumps({**newer, "time": "2001-01-01T00:00:00Z"}))
    to(there)
    assert names.read_json(there / "refs/p/train.model.json")["id"] == made["model"].id


def test_a_newer_name_here_stays_and_is_said(made, there, to, new, tmp_path):
    to(there)
    new(there)
    path = tmp_path / "new/refs/p/train.model.json"
    newer = {"id": made["metrics"].id, "type": "metrics", "time": "2999-01-01T00:00:00Z"}
    path.write_text(json.dumps(newer))
    assert "left as they are, newer here: p/train.model" in new(there).out
    assert names.read_json(path) == newer


def test_a_damaged_output_of_the_same_stage_is_named(made, there, to):
    path = made["metrics"] / "llmctl.json"
    path.chmod(0o644)
    path.write_text("{")
    done = to(there, what="p/train.model")
    assert done.code == 5 and "llmctl.json is damaged" in done.error
    assert not there.exists()


# -- pull -------------------------------------------------------------------------------------------------------------


def test_a_remote_cannot_write_outside_the_store(store, made, there, to, new, tmp_path):
    to(there)
    id = made["model"].id.removeprefix("sha256:")
    evil = {"id": made["model"].id, "stage": "train", "provenance": {"key": "x", "inputs": "y"}, "time": "2"}
    real = Remote.sizes
    inside = {
        f"records/{id}": {"../../../escaped.json": 1, "x.json": 1, "aa.json": 1, "e" * 64 + ".json": 1},
        "refs/p": {"../../../../escaped~0.model.json": 1, ".hidden.json": 1},
    }

    def sizes(self, folder):
        return {**real(self, folder), **inside.get(folder, {})}

    def read(self, path):
        return json.dumps(evil).encode() if "escaped" in path or "e" * 64 in path else plain(self, path)

    plain = Remote.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remote, "sizes", sizes)
        patch.setattr(Remote, "read", read)
        done = new(there)
    assert done.code == 0, done.error
    assert not list(tmp_path.rglob("*escaped*"))
    assert [path.name for path in (tmp_path / "new/records").rglob("*.json")] == ["e" * 64 + ".json"]
    assert not list((tmp_path / "new/refs").rglob("*hidden*"))


@pytest.mark.parametrize("field", ["key", "outputs", "ref", "inputs"])
def test_what_is_no_id_is_not_followed(field, store, made, there, to, new, put, tmp_path):
    to(there)
    if field == "key":
        odd = put({"odd": "1"}, key="../../../escaped")
        names.write(store, "p", "train", {"model": (odd.id, "report")}, key=KEY, run="r2")
        to(there, "--alone")
    if field == "inputs":
        odd = put({"odd": "1"}, inputs={"x": [5, "../../x"], "y": 7})
        names.write(store, "p", "train", {"model": (odd.id, "report")}, key=KEY, run="r2")
        assert to(there, "--with-lineage").code == 0
    if field == "outputs":
        path = there / store.key(KEY).relative_to(store.root)
        path.write_text(json.dumps({**json.loads(path.read_text()), "outputs": {"model": "../../../escaped"}}))
    if field == "ref":
        (there / "refs/p/train.model.json").write_text(json.dumps({"type": "report", "id": "../../../escaped"}))
        done = new(there, what="p/train.model")
        assert done.code == 5 and "there is no result named" in done.error
        return
    assert new(there, "--with-lineage").code == 0
    assert not (tmp_path / "new/keys").exists() or field == "inputs"


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": [1]}'])
def test_a_damaged_run_of_the_remote(text, store, made, there, to, new):
    store.run("r1").mkdir(parents=True)
    (store.run("r1") / "run.json").write_text(json.dumps({"id": "r1", "stages": {}}))
    assert to(there, what="run:r1").code == 0
    (there / "runs/r1/run.json").write_text(text)
    done = new(there, what="run:r1")
    assert done.code == (0 if "stages" in text else 5)
    assert "stages" in text or "run.json of the run r1" in done.error
    assert "there is no run ../r1" in new(there, what="run:../r1").error
    assert "there is no finished run ../runs/r1" in to(there, what="run:../runs/r1").error


def test_some_files_overwrite_nothing(made, there, to, call, tmp_path):
    to(there)
    out = tmp_path / "out"
    out.mkdir()

    def some(*patterns, where=out):
        given = [word for pattern in patterns for word in ("--files", pattern)]
        return call("pull", "p/train.model", "--from", there, *given, "-o", where)

    (out / "words.yaml").write_text("mine")
    done = some("*")
    assert done.code == 5 and f"{out}/words.yaml exists and is another file" in done.error
    assert listing(out) == {"words.yaml": b"mine"}  # nothing of the others either
    (out / "words.yaml").write_text("a: 1")
    assert some("*").code == 0  # the same file may be there
    assert set(listing(out)) == {"words.yaml", "weights", "tok/a.json"}
    done = some("words.yaml", where=out / "words.yaml")
    assert done.code == 5 and "is not a writable directory" in done.error
    shutil.rmtree(out / "tok")
    (out / "tok").write_text("a file")
    assert "is not a writable directory" in some("tok/*").error
    (out / "weights").unlink()
    (out / "weights").symlink_to("nowhere")
    assert "weights exists and is another file" in some("weights").error
    assert call("pull", "p/train", "--from", there, "--files", "*", "-o", out, "--alone").code == 2


def test_one_that_is_being_pulled_already(made, there, to, new, tmp_path):
    to(there)
    fresh = Store(tmp_path / "new")
    fresh.create()
    name = made["model"].id.removeprefix("sha256:")
    with try_lock(fresh.root / f"locks/pull-{name}.lock"):
        done = new(there)
    assert done.code == 6 and "is being pulled already" in done.error
    assert pull(fresh, Remote(str(there)), ["p/train"], lineage=False, alone=False).moved
