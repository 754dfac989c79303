"""What stages ask for against what there is: refused before anything starts, with the line that lowers it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmctl.errors import MachineError
from llmctl.pipeline import machine
from llmctl.spec.resolved import Resources


@pytest.fixture
def gpu(tmp_path, monkeypatch) -> Path:
    """A driver that knows one card."""
    card = tmp_path / "gpus" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 42\n")
    monkeypatch.setattr(machine, "GPUS", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def check(store: Path, **asked):
    machine.check_resources(
        [SimpleNamespace(id="train[lr=1]", base="train", resources=replace(Resources(), **asked))], store
    )


def test_what_is_there_may_be_asked_for(gpu):
    check(gpu, cpus=1, gpus=1, gpu_type="h100", memory=1 << 20, disk=1 << 20)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"cpus": 4096}, "asks for 4096 CPU cores, this machine has"),
        ({"gpus": 2}, "asks for 2 GPUs, this machine has 1"),
        ({"memory": 1 << 50}, "asks for 1024 TiB of memory, this machine has"),
        ({"disk": 1 << 50}, "asks for 1024 TiB of free disk, this machine has"),
        ({"gpu_type": "A100"}, "asks for a GPU of type A100, this machine has NVIDIA H100 80GB HBM3"),
    ],
)
def test_what_is_not_there_is_refused_with_the_way_out(gpu, asked, says):
    with pytest.raises(MachineError, match="train\\[lr=1\\]") as caught:
        check(gpu, **asked)
    assert says in caught.value.message
    assert f"stages.train.resources.{next(iter(asked))}=" in (caught.value.hint or "")


def test_a_type_of_gpu_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "GPUS", tmp_path / "none")
    with pytest.raises(MachineError, match="this machine has none"):
        check(tmp_path, gpu_type="H100")


def test_a_limit_of_a_container_is_all_the_memory_there_is(tmp_path, monkeypatch):
    files = {
        "/proc/meminfo": "MemFree: 1 kB\nMemTotal:   16777216 kB\n",
        "/proc/self/cgroup": "0::/user/me\n",
        "/sys/fs/cgroup/user/me/memory.max": "max\n",
        "/sys/fs/cgroup/user/memory.max": f"{8 << 30}\n",
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.memory() == 8 << 30
    with pytest.raises(MachineError, match=r"asks for 9.0 GiB of memory, this machine has 8.0 GiB"):
        check(tmp_path, memory=9 << 30)
    files["/proc/self/cgroup"] = "4:memory:/x\n"
    files["/sys/fs/cgroup/memory/x/memory.limit_in_bytes"] = str(4 << 30)
    assert machine.memory() == 4 << 30
    del files["/proc/self/cgroup"]
    assert machine.memory() == 16 << 30
    files.clear()
    assert machine.memory() > 1 << 20
