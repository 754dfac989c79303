"""Secrets, sources, stores, the environment, and the user's own configuration."""

from __future__ import annotations

import pytest

from llmctl.spec.diagnostics import SpecError
from llmctl.spec.resolved import EnvValue

TEXT = """
llmctl: 1
name: t
secrets:
  TOKEN: {from: env}
  OTHER: {from: env, variable: MY_OTHER}
  FILE: {from: file, path: ./secrets/file}
  SHORT: env
sources:
  plain: ./raw
  pinned: {uri: ./big, identity: pinned, digest: "sha256:%s"}
store: {uri: ./my-store, remotes: {team: "s3://bucket/p", disk: ./remote}}
stages:
  data:
    uses: data
    inputs: {files: sources.plain}
    env: {A: {secret: TOKEN}, B: {secret: FILE}, C: "1", D: {value: x, affects_output: false}}
""" % ("ab" * 32)


@pytest.fixture(autouse=True)
def no_config(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCTL_CONFIG", str(tmp_path / "config.yaml"))


def test_secrets_are_names_with_a_place_to_look(load, tmp_path):
    pipeline = load(TEXT)
    found = {name: (s.origin, s.variable, s.path) for name, s in pipeline.secrets.items()}
    assert found == {
        "TOKEN": ("env", "TOKEN", None),
        "OTHER": ("env", "MY_OTHER", None),
        "FILE": ("file", "", tmp_path / "secrets" / "file"),
        "SHORT": ("env", "SHORT", None),
    }
    assert pipeline.secrets["FILE"].where == "spec.yaml:6:3"
    env = pipeline.stages["data"].env
    assert env["A"] == EnvValue(secret="TOKEN", affects_output=False)
    assert env["C"] == EnvValue(value="1") and env["D"] == EnvValue(value="x", affects_output=False)


def test_a_secret_is_in_no_key(load):
    from llmctl.registry import Origin
    from llmctl.store.keys import make_keys

    origin = Origin(dist="fakes", version="1", editable=False)
    first = make_keys(load(TEXT).stages["data"], origin, {"files": ["sha256:1"]})
    other = make_keys(
        load(TEXT.replace("secret: TOKEN", "secret: SHORT")).stages["data"], origin, {"files": ["sha256:1"]}
    )
    assert first.action == other.action, "which secret"
    assert first.preimage["env"] == {"C": "1"}
    changed = make_keys(load(TEXT.replace('C: "1"', 'C: "2"')).stages["data"], origin, {"files": ["sha256:1"]})
    assert first.action != changed.action, "the control: a declared value is part of the key"


def test_sources_stores_and_remotes(load, tmp_path):
    pipeline = load(TEXT)
    assert (pipeline.sources["pinned"].identity, pipeline.sources["pinned"].digest) == ("pinned", "sha256:" + "ab" * 32)
    assert (pipeline.sources["plain"].identity, pipeline.sources["plain"].digest) == ("sha256", "")
    assert pipeline.store == str(tmp_path / "my-store")
    assert pipeline.remotes == {"team": "s3://bucket/p", "disk": str(tmp_path / "remote")}
    short = TEXT.replace('{uri: ./my-store, remotes: {team: "s3://bucket/p", disk: ./remote}}', "./my-store")
    assert load(short).store == str(tmp_path / "my-store")


def test_the_users_own_configuration_says_how_to_get_a_secret_and_names_remotes(load, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "secrets: {TOKEN: {from: command, command: pass show token}, UNUSED: {from: env}}\n"
        'store: {remotes: {home: "file:///mnt/home", team: "s3://mine"}}\n'
    )
    pipeline = load(TEXT)
    token = pipeline.secrets["TOKEN"]
    assert (token.origin, token.command) == ("command", "pass show token")
    assert "UNUSED" not in pipeline.secrets, "only what the spec declares"
    assert pipeline.remotes["home"] == "file:///mnt/home" and pipeline.remotes["team"] == "s3://bucket/p"


def test_mistakes_in_the_users_configuration_are_shown_there(load, tmp_path):
    (tmp_path / "config.yaml").write_text("lr: 3\n")
    with pytest.raises(SpecError, match="unknown key `lr`"):
        load(TEXT)


CASES = [
    ("secret: TOKEN", "secret: TOKEM", "E130 spec.yaml:16:23 no secret `TOKEM` [did you mean `TOKEN`?]"),
    ("TOKEN: {from: env}", "TOKEN: {from: command, command: rm}", "E101 spec.yaml:4:26 unknown key `command`"),
    ("{from: file, path: ./secrets/file}", "{from: file}", "E102 spec.yaml:6:3 secrets.FILE: `from: file` needs"),
    ("TOKEN: {from: env}", "TOKEN: {from: env, path: ./x}", "E102 spec.yaml:4:3 secrets.TOKEN: `path` belongs to"),
    ("A: {secret: TOKEN}", "A: {secret: TOKEN, value: x}", "E102 spec.yaml:16:11 stages.data.env.A: a variable"),
    ("A: {secret: TOKEN}", "A: {secret: TOKEN, affects_output: true}", "E102 spec.yaml:16:11 stages.data.env.A: a se"),
    ("A: {secret: TOKEN}", "A: {}", "E102 spec.yaml:16:11 stages.data.env.A: a variable needs either"),
    ('digest: "sha256:', 'digest: "md5:', "E102 spec.yaml:10:50 sources.pinned.digest: String should match pattern"),
    (", digest:", ", type:", "E102 spec.yaml:10:3 sources.pinned: `identity: pinned` needs the `digest`"),
    ("uri: ./my-store", "uri: s3://b/store", "E104 spec.yaml:11:14 `s3://` is not supported yet"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), CASES)
def test_mistakes(mistakes, old, new, expected):
    assert old in TEXT
    found = mistakes(TEXT.replace(old, new))
    assert any(line.startswith(expected) for line in found), found


def test_the_environment_is_read_only_where_it_cannot_change_a_result_unseen(load, mistakes, monkeypatch, tmp_path):
    monkeypatch.setenv("WHERE", "elsewhere")
    text = TEXT.replace("uri: ./my-store", 'uri: "./${{ env.WHERE }}"').replace('C: "1"', 'C: "${{ env.WHERE }}"')
    pipeline = load(text)
    assert pipeline.store == str(tmp_path / "elsewhere")
    assert pipeline.stages["data"].env["C"].value == "elsewhere", "and there it is part of the key"
    (found,) = mistakes(TEXT.replace("uri: ./my-store", 'uri: "./${{ env.NOWHERE }}"'))
    assert found == "E030 spec.yaml:11:17 `env.NOWHERE` is not set [export NOWHERE=…]"
    (found,) = mistakes(TEXT.replace("plain: ./raw", 'plain: "./${{ env.WHERE }}"'))
    assert found.startswith("E030 spec.yaml:9:13 `env.WHERE` cannot be used here")


def test_a_version_of_a_stage_can_be_asked_for(load, mistakes):
    assert load(TEXT.replace("uses: data", "uses: data@>=1.2,<2")).stages["data"].stage.name == "data"
    (found,) = mistakes(TEXT.replace("uses: data", "uses: data@<1"))
    assert found.startswith("E110") and "is of fakes 1.4.0, the spec wants <1" in found


def test_paths_of_the_users_configuration_count_from_its_file(load, tmp_path, monkeypatch):
    from llmctl.spec.user_config import user_config

    (tmp_path / "conf").mkdir()
    monkeypatch.setenv("LLMCTL_CONFIG", str(tmp_path / "conf" / "c.yaml"))
    (tmp_path / "conf" / "c.yaml").write_text("store: {uri: ./s, remotes: {near: ./r}}\n")
    assert user_config().store == str(tmp_path / "conf" / "s")
    assert load(TEXT).remotes["near"] == str(tmp_path / "conf" / "r")
    monkeypatch.setenv("LLMCTL_CONFIG", str(tmp_path / "conf" / "d.yaml"))
    (tmp_path / "conf" / "d.yaml").write_text("store: {uri: 's3://b/x'}\n")
    with pytest.raises(SpecError, match="E104"):
        user_config()


def test_the_file_of_a_stage_may_ask_for_a_version(registry, tmp_path):
    from llmctl.spec.pipeline import single_stage

    (tmp_path / "s.yaml").write_text('llmctl: 1\nname: t\nuses: "data@>=1"\n')
    assert single_stage(registry.stages["data"], file=tmp_path / "s.yaml", registry=registry)
