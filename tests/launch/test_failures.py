"""How exceptions of libraries are read."""

import contextlib
import errno
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from llmctl.errors import StageError, UsageError
from llmctl.launch import failures
from llmctl.launch.child import encode
from llmctl.launch.environment import stage_environment
from llmctl.launch.failures import explain


class OutOfMemoryError(RuntimeError):
    """Named as torch.cuda's."""


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 3, "no space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 3, "no space left on device"),
        (Exception("I/O error: No space left on device (os error 28)"), 3, "no space left on device"),
        (caused(RuntimeError("write failed"), OSError(errno.ENOSPC, "x")), 3, "no space left on device"),
        (MemoryError(), 3, "out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 3, "out of memory: CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 3, "out of memory"),
        (StageError("parity", hint="h"), 3, "parity"),
        (UsageError("too long"), 2, "too long"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (ValueError("memory of a goldfish"), 1, "ValueError: memory of a goldfish"),
    ],
)
def test_what_is_behind_an_exception(error, code, text, tmp_path):
    found = explain(error, "acme", tmp_path)
    assert found.code == code
    assert text in found.message
    assert found.bug is (code == 1)
    if found.bug:
        assert "bug in acme" in found.hint


def test_an_obscure_error_on_a_full_disk(tmp_path, monkeypatch):
    error = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert explain(error, "acme", tmp_path).code == 1
    monkeypatch.setattr(failures, "free_bytes", lambda path: 4096)
    assert explain(error, "acme", tmp_path).code == 3


@pytest.mark.parametrize("library", ["safetensors", "tokenizers", "sqlite3"])
def test_the_words_of_a_library_for_a_full_disk(library, small_disk):
    """What libraries in Rust and C make of ENOSPC is not an OSError, and must be recognised all the same."""
    with pytest.raises(Exception) as error:  # noqa: PT011, B017  # each has an exception of its own
        if library == "safetensors":
            save_file({"a": np.zeros(1 << 20)}, small_disk / "a.safetensors")
        elif library == "tokenizers":
            words = {f"{'word' * 20}{number}": number for number in range(20_000)}
            Tokenizer(WordLevel(words, "word")).save(str(small_disk / "tokenizer.json"))
        else:
            with contextlib.closing(sqlite3.connect(small_disk / "a.sqlite")) as database:
                database.execute("CREATE TABLE t (x BLOB)")
                database.execute("INSERT INTO t VALUES (zeroblob(4000000))")
                database.commit()
    assert not isinstance(error.value, OSError)
    # Another place with room: the words alone must do.
    assert explain(error.value, "acme", Path("/")).message.startswith("no space left on device")


def test_events_are_json_whatever_a_stage_reports():
    line = encode({"a": np.float32(0.5), "b": np.int64(3), "c": float("inf"), "d": [float("nan"), {"e": 1}], "f": {1}})
    assert json.loads(line) == {"a": 0.5, "b": 3, "c": None, "d": [None, {"e": 1}], "f": "{1}"}


def test_gpus_are_taken_from_those_that_are_visible():
    base = {"CUDA_VISIBLE_DEVICES": "4,5,6"}
    assert stage_environment({}, devices=["4", "5"], base=base)["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert stage_environment({}, devices=[], base=base)["CUDA_VISIBLE_DEVICES"] == ""
    assert stage_environment({}, base=base)["CUDA_VISIBLE_DEVICES"] == "4,5,6"
    assert stage_environment({}, base={})["OMP_WAIT_POLICY"] == "PASSIVE"
    assert stage_environment({}, base={"OMP_WAIT_POLICY": "active"})["OMP_WAIT_POLICY"] == "active"
    assert stage_environment({"CUDA_VISIBLE_DEVICES": "9"}, devices=["4"], base=base)["CUDA_VISIBLE_DEVICES"] == "9"


def test_variables_that_are_called_secrets_are_not_let_through_by_their_prefix():
    names = ("HF_TOKEN", "HUGGINGFACE_API_KEY", "LLMCTL_STORE_SECRET", "HF_PASSWORD")
    base = {**dict.fromkeys(names, "private"), "HF_HOME": "/cache", "HF_TOKEN_PATH": "/t"}
    assert stage_environment({}, base=base).keys() & base.keys() == {"HF_HOME", "HF_TOKEN_PATH"}
    assert stage_environment({"HF_TOKEN": "given"}, base=base)["HF_TOKEN"] == "given"
