"""Secrets in texts, JSON, files and streams of pieces become `***`."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from urllib.parse import quote

import pytest

from llmctl.errors import MachineError
from llmctl.launch import secrets
from llmctl.launch.masking import CHUNK, MaskedStream, Masker
from llmctl.spec.resolved import Secret


def test_text_and_json():
    masker = Masker({"TOKEN": "hunter2!", "SHORT": "abc"})
    assert masker.text("a hunter2! b abc") == "a *** b abc"  # five characters and fewer would turn up everywhere
    found = masker.plain({"x hunter2!": ["hunter2!", 3, {"y": "no"}], "z": None})
    assert found == {"x ***": ["***", 3, {"y": "no"}], "z": None}
    assert not Masker({"SHORT": "abcde"}) and Masker({"LONG": "abcdef"})
    assert Masker({}).plain({"a": "b"}) == {"a": "b"}


@pytest.mark.parametrize(
    "shown",
    [lambda v: v, lambda v: json.dumps({"t": v}), lambda v: json.dumps(v, ensure_ascii=False), lambda v: v[7:],
     lambda v: "https://x/?t=" + quote(v)],
)  # fmt: skip
def test_other_forms_of_a_value(shown):
    value = 'pä"ss\\w\nsecond line/of it'
    text = Masker({"TOKEN": value}).text(shown(value))
    assert "ss" not in text
    assert "***" in text


def test_a_stream_of_pieces():
    """Whatever the pieces, the result is that of the whole; values that overlap and begin alike included."""
    dice = random.Random(1)
    masker = Masker({"A": "aabbaa", "B": "aabbaacc", "C": "secret-value"})
    for _ in range(300):
        text = "".join(dice.choice(["aabb", "aa", "cc", "secret", "-value", "x", "a"]) for _ in range(12)).encode()
        stream, out, rest = MaskedStream(masker), b"", text
        while rest:
            size = dice.randint(1, 5)
            out, rest = out + stream.feed(rest[:size]), rest[size:]
        out += stream.end()
        assert out == masker.masked(text), text
        assert b"secret-value" not in out and b"aabbaa" not in out


def test_what_cannot_be_a_secret_is_shown_at_once():
    stream = MaskedStream(Masker({"A": "secret-value"}))
    assert stream.feed(b"a line\n") == b"a line\n"
    assert stream.feed(b"a line sec") == b"a line "
    assert stream.feed(b"ond\n") == b"second\n"


def test_files(tmp_path: Path):
    masker, tmp_path = Masker({"TOKEN": "hunter2!"}), tmp_path / "files"
    tmp_path.mkdir()
    at_the_seam = tmp_path / "big"
    at_the_seam.write_bytes(b"x" * (CHUNK - 3) + b"hunter2!" + b"y" * 10)
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x" * CHUNK + b"hunter2!"))
    for path in tmp_path.iterdir():
        assert masker.found_in(path) == "TOKEN", path
    (tmp_path / "fine").write_bytes(b"hunter2?")
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"nothing")[:-5])
    (tmp_path / "plain.gz").write_bytes(b"no gzip")
    for name in ("fine", "broken.gz", "plain.gz"):
        assert masker.found_in(tmp_path / name) == ""


# -- where values come from -------------------------------------------------------------------------------------------


def secret(origin, **fields):
    return {"T": Secret(name="T", origin=origin, where="p.yaml:3:5", **fields)}


def test_values(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "from the environment")
    (tmp_path / "t").write_text("from a file\n")
    for declared, value in (
        (secret("env", variable="MY_TOKEN"), "from the environment"),
        (secret("file", path=tmp_path / "t"), "from a file"),
        (secret("command", command="echo from a command"), "from a command"),
    ):
        assert secrets.resolve(declared, ["T"]) == {"T": value}
        assert secrets.resolve(declared, []) == {}


@pytest.mark.parametrize(
    ("declared", "why", "hint"),
    [
        (secret("env", variable="NO_SUCH"), "the variable NO_SUCH is not set", "export NO_SUCH=…"),
        (secret("file", path=Path("/no/such")), "cannot read /no/such: No such file", "write its value there"),
        (secret("command", command="echo private; exit 3"), "its command ended with exit 3", "in a terminal"),
        (secret("command", command="true"), "it is empty", "give it a value"),
        (secret("command", command="sleep 9"), "its command took more than 0 s", "in a terminal"),
    ],
)
def test_a_missing_secret_says_where_it_was_declared(declared, why, hint, monkeypatch):
    monkeypatch.setattr(secrets, "PATIENCE", 0.2)
    with pytest.raises(MachineError, match=r"the secret `T` \(p.yaml:3:5\) is not there: ") as error:
        secrets.resolve(declared, ["T"])
    assert why in error.value.message
    assert hint in error.value.hint
    assert "private" not in error.value.message


# -- values that are no ordinary text ---------------------------------------------------------------------------------


def test_values_that_are_too_short_leave_a_stream_as_it_is():
    stream = MaskedStream(Masker({"SHORT": "abc"}))
    assert stream.feed(b"abc and ab") == b"abc and ab"
    assert stream.end() == b""


def test_half_a_surrogate_pair_beside_a_secret():
    report = json.loads('{"x": "\\ud800 canary-1 \\udfff \\udc80"}')
    assert Masker({"a": "canary-1"}).plain(report) == {"x": "\ufffd *** \ufffd \udc80"}


def test_a_value_that_is_no_utf8(monkeypatch):
    monkeypatch.setitem(os.environb, b"MY_TOKEN", b"caf\xe9-token")
    found = secrets.resolve(secret("env", variable="MY_TOKEN"), ["T"])
    assert os.fsencode(found["T"]) == b"caf\xe9-token"
    assert Masker(found).masked(b"a caf\xe9-token, caf%E9-token") == b"a ***, ***"
    printed = secret("command", command=r"printf 'caf\351-token'")
    assert secrets.resolve(printed, ["T"]) == found
    with pytest.raises(MachineError, match="it holds a NUL character"):
        secrets.resolve(secret("command", command=r"printf 'a\0b'"), ["T"])
