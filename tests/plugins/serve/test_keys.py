"""API keys: only digests at rest, changes seen at once, mistakes named."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading

import pytest
from click.testing import CliRunner

from llmctl import InputError, UsageError
from llmctl_serve import keys as module
from llmctl_serve.key_commands import keys as command
from llmctl_serve.keys import Keys, changing, make_key, read_keys
from llmctl_serve.rate_limits import Limits


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.jsonl"


def run(*arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def create(path, *arguments):
    return run("create", *arguments, "--file", path).stdout.strip()


def test_a_key_made_by_the_command_opens_and_is_not_in_the_file(path):
    text = create(path, "alice", "--tokens-per-minute", 500, "--scope", "inference", "--scope", "admin")
    key = Keys(path).find(text.encode())
    assert (key.id, key.scopes, key.limits) == ("alice", ("inference", "admin"), Limits(tokens_per_minute=500))
    raw = path.read_text()
    assert text not in raw
    assert text.removeprefix("llmctl-alice-") not in raw
    assert path.stat().st_mode & 0o777 == 0o600
    # The digest is the plain HMAC that RFC 2104 defines.
    expected = hmac.new(bytes.fromhex(key.salt), text.encode(), hashlib.sha256).hexdigest()
    assert json.loads(raw)["digest"] == expected


@pytest.mark.parametrize(
    "change", [lambda k: k[:-1], lambda k: k + "x", lambda k: k.upper(), lambda k: "", lambda k: k[7:], lambda k: "a-b"]
)
def test_whatever_else_is_sent_opens_nothing(path, change):
    text = create(path, "alice")
    assert Keys(path).find(change(text).encode()) is None
    assert Keys(path).find(b"\xff\xfe-\xff-x") is None


def test_comparison_takes_constant_time_also_for_ids_that_do_not_exist(path, monkeypatch):
    compared = []
    real = hmac.compare_digest
    text = create(path, "alice")
    keys = Keys(path)
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    assert keys.find(text.replace("alice", "nobody").encode()) is None
    assert keys.find(b"") is None
    assert [len(a) == len(b) == 64 for a, b in compared] == [True, True]


def test_a_running_server_sees_new_and_revoked_keys(path):
    first = create(path, "alice")
    keys = Keys(path)
    second = create(path, "bob")
    assert keys.find(second.encode()).id == "bob"
    run("revoke", "alice", "--file", path)
    assert keys.find(first.encode()) is None
    assert "disabled" in run("list", "--file", path).stdout
    run("revoke", "bob", "--remove", "--file", path)
    assert keys.find(second.encode()) is None
    assert list(read_keys(path)) == ["alice"]


def test_a_key_expires(path):
    now = [1_000_000_000.0]
    with changing(path) as file:
        key, text = make_key("a", expires="2001-09-09T01:46:50+00:00")  # ten seconds later
        file.keys["a"] = key
        file.save()
    keys = Keys(path, clock=lambda: now[0])
    now[0] += 9.9
    assert keys.find(text.encode())
    now[0] += 0.1
    assert keys.find(text.encode()) is None


def test_a_damaged_or_missing_file_leaves_the_keys_of_before_and_is_told_once(path):
    text = create(path, "alice").encode()
    warnings = []
    keys = Keys(path, warn=warnings.append)
    good = path.read_text()
    path.write_text("{")
    assert keys.find(text)
    assert keys.find(text)
    assert len(warnings) == 1
    assert "keys.jsonl:1" in warnings[0]
    path.unlink()
    assert keys.find(text)
    assert keys.find(text)
    assert len(warnings) == 2
    path.write_text(good.replace("alice", "bob"))
    path.chmod(0o600)
    assert keys.find(text) is None


def test_a_file_that_others_may_write_is_refused(path):
    create(path, "alice")
    path.chmod(0o620)
    with pytest.raises(InputError, match="others may write") as caught:
        Keys(path)
    assert "chmod 600" in caught.value.hint


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[]", "no JSON object"),
        ("{}", "id"),
        ('{"id": "a b", "salt": "", "digest": ""}', "`id`"),
        ('{"id": "a", "salt": "zz", "digest": ""}', "`salt`"),
        ('{"id": "a", "salt": "S", "digest": "short"}', "`digest`"),
        ('{"id": "a", "salt": "S", "digest": "D", "scopes": ["root"]}', "unknown scope `root`"),
        ('{"id": "a", "salt": "S", "digest": "D", "limits": {"tokens_per_minute": 0}}', "tokens_per_minute"),
        ('{"id": "a", "salt": "S", "digest": "D", "limits": {"tokens_per_hour": 5}}', "tokens_per_hour"),
        ('{"id": "a", "salt": "S", "digest": "D", "expires": "2030-01-01T00:00:00"}', "time zone"),
        ('{"id": "a", "salt": "S", "digest": "D", "disabled": "no"}', "disabled"),
        ('{"id": "a", "salt": "S", "digest": "D", "secret": "x"}', "secret"),
    ],
)
def test_mistakes_in_the_file_are_named_with_their_line(path, line, problem):
    path.write_text("# keys\n" + line.replace('"S"', f'"{"0" * 32}"').replace('"D"', f'"{"0" * 64}"') + "\n")
    with pytest.raises(InputError, match=r"keys\.jsonl:2") as caught:
        read_keys(path)
    assert problem in caught.value.message


def test_the_same_id_twice(path):
    create(path, "alice")
    with pytest.raises(UsageError, match="already"):
        create(path, "alice")
    path.write_text(path.read_text() * 2)
    with pytest.raises(InputError, match="twice"):
        read_keys(path)
    with pytest.raises(UsageError, match="no id"):
        make_key("a/b")


def test_a_file_that_others_may_write_is_told_once(path):
    create(path, "alice")
    warnings = []
    keys = Keys(path, warn=warnings.append)
    path.chmod(0o660)
    for _ in range(3):
        keys.find(b"x")
    assert len(warnings) == 1 and "others may write" in warnings[0]
    path.chmod(0o600)
    keys.find(b"x")
    path.chmod(0o660)
    keys.find(b"x")
    assert len(warnings) == 2


def test_racing_commands_lose_no_key(path):
    def add(number):
        with changing(path) as file:
            key, _ = make_key(f"key{number}")
            file.keys[key.id] = key
            file.save()

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(path)) == 8
    assert sorted(each.name for each in path.parent.iterdir()) == ["keys.jsonl", "keys.jsonl.lock"]


def test_a_key_of_the_environment_beside_those_of_the_file(path):
    text = create(path, "alice")
    keys = Keys(path, fixed="sécret")
    assert keys.find("sécret".encode()).scopes == ("inference", "admin")
    assert keys.find(text.encode()).id == "alice"
    assert len(keys) == 2
    assert keys.find(b"secret") is None


def test_listing_shows_no_digest(path):
    create(path, "alice", "--note", "for tests", "--expires-days", "1")
    shown = run("list", "--file", path).stdout + run("list", "--json", "--file", path).stdout
    key = read_keys(path)["alice"]
    assert "for tests" in shown
    assert "active" in shown
    assert key.digest not in shown
    assert key.salt not in shown
    with pytest.raises(UsageError, match="no key `bob`"):
        run("revoke", "bob", "--file", path)
