"""Signatures by a real ssh-keygen: good, tampered, of somebody else, of nobody known, and what is missing."""

import os
import shutil
import subprocess

import pytest

from llmctl.store.manifest import Manifest

NO_TERMINAL = {"start_new_session": True}


@pytest.fixture
def keys(tmp_path):
    """Keys of alice, team and mallory, and a list that knows the first two."""
    folder = tmp_path / "keys"
    folder.mkdir()
    for name in ("alice", "team", "mallory"):
        make_key(folder / name)
    lines = [f"{name}@x.org {(folder / f'{name}.pub').read_text()}" for name in ("alice", "team")]
    (folder / "allowed").write_text("".join(lines))
    return folder


def make_key(path, passphrase=""):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", path.name, "-f", path], check=True)


@pytest.fixture
def artifact(put):
    return put({"weights": "one", "config.json": "{}"})


@pytest.fixture
def check(call, store, keys):
    def verify(what, identity="team@x.org", *args):
        return call(
            "verify", what, "--signed-by", identity, "--allowed-signers", keys / "allowed", "--store", store.root, *args
        )

    return verify


@pytest.fixture
def sign(call, store, keys):
    return lambda what, key="team": call("sign", what, "--key", keys / key, "--store", store.root)


def test_a_good_signature(artifact, sign, check, store):
    assert "it is not signed" in check(artifact.id).out
    done = sign(artifact.id)
    assert done.code == 0, done.error
    (path,) = store.signatures(artifact.id).iterdir()
    assert str(path) in done.out
    good = check(artifact.id, "team@x.org", "--format", "json")
    assert good.code == 0
    assert good.json[0]["signers"] == ["team@x.org"]
    assert "signed by team@x.org" in check(artifact.id).out
    assert sorted(file.name for file in artifact.path.iterdir()) == ["config.json", "llmctl.json", "weights"]


def test_openssh_agrees_without_llmctl(artifact, sign, keys, store):
    """The control: the signature is an ordinary one over the id and a newline."""
    sign(artifact.id)
    (path,) = store.signatures(artifact.id).iterdir()
    command = [
        "ssh-keygen",
        "-Y",
        "verify",
        "-f",
        keys / "allowed",
        "-I",
        "team@x.org",
        "-n",
        "llmctl.artifact",
        "-s",
        path,
    ]
    assert subprocess.run(command, input=f"{artifact.id}\n".encode(), capture_output=True).returncode == 0
    assert subprocess.run(command, input=b"sha256:0\n", capture_output=True).returncode != 0


def test_two_signers(artifact, sign, check):
    sign(artifact.id, "alice")
    assert "it is signed by alice@x.org, not by team@x.org" in check(artifact.id).out
    sign(artifact.id, "team")
    for identity in ("alice@x.org", "team@x.org"):
        assert check(artifact.id, identity).code == 0


def test_an_unknown_signer(artifact, sign, check):
    sign(artifact.id, "mallory")
    done = check(artifact.id)
    assert done.code == 5
    assert "it is signed with the key SHA256:" in done.out and "does not list" in done.out


@pytest.mark.parametrize("what", ["same size", "manifest", "signature of another"])
def test_tampering(what, artifact, put, sign, check, store):
    sign(artifact.id)
    assert check(artifact.id).code == 0
    if what == "same size":
        path = artifact / "weights"
        path.chmod(0o644)
        path.write_text("ONE")
    elif what == "manifest":
        path = artifact / "llmctl.json"
        path.chmod(0o644)
        path.write_text(path.read_text().replace('"path": "weights"', '"path": "weightz"'))
    else:
        other = put({"x": "other"})
        shutil.copytree(store.signatures(artifact.id), store.signatures(other.id))
        artifact = other
    done = check(artifact.id)
    assert done.code == 5
    assert {
        "same size": "is damaged",
        "manifest": "weightz is missing",
        "signature of another": "is no signature of this",
    }[what] in done.out


def test_a_damaged_artifact_is_not_signed(artifact, sign, store):
    path = artifact / "weights"
    path.chmod(0o644)
    path.write_text("ONE")
    done = sign(artifact.id)
    assert done.code == 5 and "is not signed" in done.error and "is damaged" in done.error
    assert not store.signatures(artifact.id).exists()


def test_signatures_travel_with_get_and_copies_can_be_signed(artifact, sign, check, call, store, tmp_path):
    out = tmp_path / "out"
    sign(artifact.id)
    done = call("get", artifact.id, out, "--store", store.root)
    assert done.code == 0
    assert len(list((tmp_path / "out.signatures").iterdir())) == 1
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "llmctl.json", "weights"]
    shutil.rmtree(store.root)
    assert check(out).code == 0
    shutil.rmtree(tmp_path / "out.signatures")
    assert check(out).code == 5
    assert sign(out, "team").code == 0
    assert check(out).code == 0
    assert Manifest.read(out).id == artifact.id


def test_an_artifact_that_replaces_another_does_not_keep_its_signatures(artifact, put, sign, call, store, tmp_path):
    sign(artifact.id)
    call("get", artifact.id, tmp_path / "out", "--store", store.root)
    call("get", put({"x": "2"}).id, tmp_path / "out", "--store", store.root)
    assert not (tmp_path / "out.signatures").exists()


def test_who_is_allowed(artifact, sign, check, call, store, keys, tmp_path, monkeypatch):
    sign(artifact.id)
    base = ("verify", artifact.id, "--signed-by", "team@x.org", "--store", store.root)
    missing = call(*base)
    assert missing.code == 5 and f"{tmp_path}/home/.config/llmctl/allowed_signers" in missing.error
    assert "IDENTITY ssh-ed25519" in missing.hint
    own = tmp_path / "home/.config/llmctl"
    own.mkdir(parents=True)
    shutil.copy(keys / "allowed", own / "allowed_signers")
    assert call(*base).code == 0
    monkeypatch.setenv("LLMCTL_ALLOWED_SIGNERS", str(tmp_path / "nowhere"))
    assert call(*base).code == 5
    monkeypatch.setenv("LLMCTL_ALLOWED_SIGNERS", str(keys / "allowed"))
    assert call(*base).code == 0


def test_an_expired_signer(artifact, sign, check, keys):
    sign(artifact.id)
    text = (keys / "team.pub").read_text()
    (keys / "allowed").write_text(f'team@x.org valid-before="20200101" {text}')
    done = check(artifact.id)
    assert done.code == 5 and "does not list" in done.out


def test_keys_that_cannot_sign(artifact, call, store, keys, tmp_path):
    at = ("--store", store.root)
    none = call("sign", artifact.id, *at)
    assert none.code == 5 and "there is no key in ~/.ssh" in none.error and "ssh-keygen" in none.hint
    assert "there is no key" in call("sign", artifact.id, "--key", tmp_path / "no", *at).error
    (tmp_path / "text").write_text("hello")
    assert "is no SSH key" in call("sign", artifact.id, "--key", tmp_path / "text", *at).error
    (tmp_path / "home/.ssh").mkdir()
    shutil.copy(keys / "team", tmp_path / "home/.ssh/id_ed25519")
    (tmp_path / "home/.ssh/id_ed25519").chmod(0o600)
    shutil.copy(keys / "team.pub", tmp_path / "home/.ssh/id_ed25519.pub")
    assert call("sign", artifact.id, *at).code == 0


def test_an_encrypted_key_and_a_public_key_without_an_agent(artifact, llmctl, llmctl_env, store, keys):
    make_key(keys / "locked", "secret")
    for key, message, hint in (
        ("locked", "is encrypted and no agent holds it", f"ssh-add {keys / 'locked'}"),
        ("team.pub", "is a public key and no agent holds its private half", "ssh-add"),
    ):
        if key == "team.pub":
            (keys / "team").rename(keys / "hidden")
        env = {"SSH_AUTH_SOCK": "", "SSH_ASKPASS_REQUIRE": "never"}
        done = llmctl("sign", artifact.id, "--key", keys / key, "--store", store.root, env=env, **NO_TERMINAL)
        assert done.returncode == 5, done.stderr
        assert message in done.stderr and hint in done.stderr


def test_a_key_that_an_agent_holds(artifact, call, store, keys, check, monkeypatch, tmp_path):
    make_key(keys / "locked", "secret")
    agent = subprocess.run(["ssh-agent", "-s", "-a", tmp_path / "s"], capture_output=True, text=True, check=True).stdout
    pid = int(agent.split("SSH_AGENT_PID=")[1].split(";")[0])
    try:
        ask = tmp_path / "ask"
        ask.write_text("#!/bin/sh\necho secret\n")
        ask.chmod(0o755)
        env = {
            **os.environ,
            "SSH_AUTH_SOCK": str(tmp_path / "s"),
            "SSH_ASKPASS": str(ask),
            "SSH_ASKPASS_REQUIRE": "force",
        }
        subprocess.run(
            ["ssh-add", "-q", keys / "locked"], env=env, check=True, stdin=subprocess.DEVNULL, capture_output=True
        )
        with (keys / "allowed").open("a") as file:
            file.write(f"locked@x.org {(keys / 'locked.pub').read_text()}")
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "s"))
        done = call("sign", artifact.id, "--key", keys / "locked.pub", "--store", store.root)
        assert done.code == 0, done.error
        assert check(artifact.id, "locked@x.org").code == 0
    finally:
        os.kill(pid, 15)


def test_without_openssh(artifact, sign, check, monkeypatch, tmp_path):
    assert sign(artifact.id).code == 0
    monkeypatch.setenv("PATH", str(tmp_path))
    for done in (sign(artifact.id), check(artifact.id)):
        assert done.code == 7
        assert done.error == "ssh-keygen is not installed"
        assert "openssh-client" in done.hint


# -- whom it asks for, and where it looks -----------------------------------------------------------------------------


@pytest.mark.parametrize("nobody", ["", "  "])
def test_a_demand_for_nobody_is_a_mistake(nobody, artifact, check, call, store, keys):
    done = check(artifact.id, nobody)
    assert done.code == 2 and "--signed-by names nobody" in done.error


def test_a_list_without_a_demand_is_a_mistake(artifact, call, store, keys):
    done = call("verify", artifact.id, "--allowed-signers", keys / "allowed", "--store", store.root)
    assert done.code == 2 and "--signed-by" in done.error


@pytest.mark.parametrize(
    ("principals", "identity", "good"),
    [
        ("*@x.org", "anybody@x.org", True),
        ("*@x.org", "team@y.org", False),
        ('"team@x.org,Team X <t@x.org>"', "Team X <t@x.org>", True),
        ("*@x.org,!bad@x.org", "bad@x.org", False),
        ("*@x.org,!bad@x.org", "good@x.org", True),
        ("a@x.org,b@x.org", "b@x.org", True),
        ("a@x.org,b@x.org", "c@x.org", False),
    ],
)
def test_the_list_is_read_as_openssh_reads_it(principals, identity, good, artifact, sign, check, keys, store):
    sign(artifact.id)
    (keys / "allowed").write_text(f"{principals} {(keys / 'team.pub').read_text()}")
    done = check(artifact.id, identity, "--format", "json")
    assert (done.code == 0) is good
    assert (done.json[0]["signers"] == [identity]) is good
    (path,) = store.signatures(artifact.id).iterdir()
    command = [
        "ssh-keygen",
        "-Y",
        "verify",
        "-f",
        keys / "allowed",
        "-I",
        identity,
        "-n",
        "llmctl.artifact",
        "-s",
        path,
    ]
    assert (subprocess.run(command, input=f"{artifact.id}\n".encode(), capture_output=True).returncode == 0) is good


def test_the_list_lies_beside_the_configuration(artifact, sign, call, store, keys, tmp_path, monkeypatch):
    sign(artifact.id)
    monkeypatch.setenv("LLMCTL_CONFIG", str(tmp_path / "mine/config.yaml"))
    base = ("verify", artifact.id, "--signed-by", "team@x.org", "--store", store.root)
    assert f"{tmp_path}/mine/allowed_signers" in call(*base).error
    (tmp_path / "mine").mkdir()
    shutil.copy(keys / "allowed", tmp_path / "mine/allowed_signers")
    assert call(*base).code == 0


def test_a_copy_that_is_called_like_its_digest(artifact, sign, check, call, store, tmp_path):
    """Only a directory that lies where a store has it has its signatures there."""
    out = tmp_path / "a/b/c/d" / artifact.path.name
    call("get", artifact.id, out, "--store", store.root)
    assert sign(out).code == 0
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, f"{out.name}.signatures"]
    assert not list(tmp_path.rglob("signatures")) and check(out).code == 0
    assert sign(artifact.path).code == 0
    assert store.signatures(artifact.id).is_dir()


def test_a_good_signature_in_the_store_counts_beside_a_damaged_one(artifact, sign, check, call, store, tmp_path):
    out = tmp_path / "out"
    sign(artifact.id)
    call("get", artifact.id, out, "--store", store.root)
    (path,) = (tmp_path / "out.signatures").iterdir()
    path.write_text("damaged")
    assert check(out).code == 0
    shutil.rmtree(store.signatures(artifact.id))
    assert check(out).code == 5
