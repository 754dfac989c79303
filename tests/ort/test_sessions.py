"""How many threads compute, how long they spin, and that an idle session takes no CPU time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from llmctl.errors import UsageError
from llmctl.ort import sessions


def test_two_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    assert sessions._physical([0, 1, 2, 3], tmp_path) == 2
    assert sessions._physical([0, 2], tmp_path) == 1
    assert sessions._physical([0, 1, 9], tmp_path) == 3  # one that the system says nothing of


@pytest.mark.parametrize(
    ("own", "files", "share"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "50000 100000"}, 0.5),
        ("3:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"}, 3.0),
        ("3:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
    ],
    ids=["parent", "unlimited", "container", "version-1", "version-1-unlimited"],
)
def test_the_share_of_a_cgroup(tmp_path: Path, own: str, files: dict[str, str], share: float | None) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    assert sessions._cgroup_share(tmp_path / "fs", tmp_path / "own") == share


@pytest.mark.parametrize(("share", "threads"), [(None, 4), (2.5, 2), (0.5, 1), (8.0, 4)])
def test_threads_are_cores_within_the_share(monkeypatch: pytest.MonkeyPatch, share: float | None, threads: int) -> None:
    monkeypatch.setattr(sessions, "_physical", lambda _: 4)
    monkeypatch.setattr(sessions, "_cgroup_share", lambda: share)
    found, why = sessions.cpu_threads()
    assert found == threads == sessions.session_options(0).intra_op_num_threads
    assert ("cgroup" in why) == (threads < 4)
    assert sessions.session_options(3).intra_op_num_threads == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_an_affinity_mask_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert sessions.cpu_threads()[0] == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("given", "allowed", "duration"), [(None, None, None), ("50", "1", "50"), ("0", "0", None)], ids=str
)
def test_spinning_is_the_users_choice(
    monkeypatch: pytest.MonkeyPatch, given: str | None, allowed: str | None, duration: str | None
) -> None:
    monkeypatch.delenv(sessions.SPIN, raising=False)
    if given is not None:
        monkeypatch.setenv(sessions.SPIN, given)
    options = sessions.session_options(2)
    expected = {"allow_spinning": allowed, "spin_duration_us": duration}
    for name, value in expected.items():
        if value is None:
            with pytest.raises(RuntimeError, match="does not have configuration"):
                options.get_session_config_entry(f"session.intra_op.{name}")
        else:
            assert options.get_session_config_entry(f"session.intra_op.{name}") == value


@pytest.mark.parametrize("given", ["-1", "often", "1.5", ""])
def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(sessions.SPIN, given)
    with pytest.raises(UsageError, match="LLMCTL_SPIN_US must be microseconds"):
        sessions.session_options(1)


def test_idle_threads_take_no_cpu_time(bundle: Path) -> None:
    from llmctl.generator import Sampling
    from llmctl.ort import open_bundle

    generator = open_bundle(bundle, "cpu", 2)
    list(generator.stream([3, 5, 7], Sampling(max_new_tokens=8)))
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.1
