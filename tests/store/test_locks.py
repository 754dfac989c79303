"""Locks beside those who only look whether somebody has them."""

import fcntl
import os

import pytest

from llmctl.store import locks
from llmctl.store.locks import running, try_lock


@pytest.mark.parametrize("looks", range(5))
def test_who_only_looks_keeps_nobody_from_a_lock(looks, tmp_path, monkeypatch):
    """Somebody looks at the instant of the first attempts; the fourth look is taken for a holder."""
    path = tmp_path / "l.lock"
    try_lock(path, "").release()
    look = os.open(path, os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    left = iter(range(looks - 1))

    def pause(seconds):
        assert 0 < seconds < 0.1
        if next(left, None) is None:
            fcntl.flock(look, fcntl.LOCK_UN)

    if not looks:
        fcntl.flock(look, fcntl.LOCK_UN)
    monkeypatch.setattr(locks.time, "sleep", pause)
    lock = try_lock(path, "r1")
    assert (lock is not None) == (looks <= 3)
    os.close(look)
    if lock:
        assert running(path) == "r1"
