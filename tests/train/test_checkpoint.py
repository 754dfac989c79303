from __future__ import annotations

import json
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.errors import StageError
from llmctl.train import storage
from llmctl.train.checkpoint import Checkpoints, same_tensors


def some(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"model/a": torch.randn(3, 4, generator=generator), "optimizer/a/step": torch.tensor(float(seed))}


def test_round_trip_is_bit_identical_and_needs_no_pickle(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "ckpt")
    tensors = {**some(1), "nan": torch.tensor([float("nan")]), "random/cpu": torch.get_rng_state()}
    path = checkpoints.save(7, tensors, {"tokens": 5, "curve": [{"loss": 0.1}]})
    checkpoints.wait()
    found = checkpoints.load(7)
    assert found.step == 7 and found.values["tokens"] == 5 and found.values["curve"] == [{"loss": 0.1}]
    assert same_tensors(tensors, found.tensors)
    assert not same_tensors({**tensors, "model/a": tensors["model/a"] + 1e-7}, found.tensors)
    assert sorted(file.name for file in path.iterdir()) == ["index.json", "rank-0.safetensors", "values.json"]
    assert set(load_file(path / "rank-0.safetensors")) == set(tensors)
    assert json.loads((path / "values.json").read_text())["step"] == 7


def test_the_last_two_are_kept_and_leftovers_of_a_kill_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / ".tmp-step-9").mkdir()
    (tmp_path / ".tmp-step-9" / "tensors.safetensors").write_bytes(b"half")
    for step in (2, 10, 30):
        checkpoints.save(step, some(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-30"]
    assert checkpoints.newest(100) == [30, 10] and checkpoints.newest(29) == [10]
    checkpoints.forget_after(10, 30)
    assert checkpoints.steps() == [10]


@pytest.mark.parametrize("file", ["rank-0.safetensors", "values.json", "index.json"])
def test_a_damaged_checkpoint_says_so(tmp_path: Path, file: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, some(1), {}) / file
    checkpoints.wait()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"step-1 is damaged"):
        checkpoints.load(1)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, some(1), {})
    checkpoints.wait()
    usage = namedtuple("usage", "total used free")(10, 10, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StageError, match=r"a checkpoint needs 1 MiB, 1 MiB are free") as error:
        checkpoints.save(2, some(2), {})
    assert "free some disk space" in (error.value.hint or "")
    assert checkpoints.steps() == [1] and len(list(tmp_path.iterdir())) == 1


def test_a_failing_write_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, some(1), {})
    checkpoints.wait()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmctl.train.storage.save_file", full)
    with pytest.raises(StageError, match="No space left on device"):
        checkpoints.save(2, some(2), {})
        checkpoints.wait()
    assert same_tensors(checkpoints.load(1).tensors, some(1)) and checkpoints.steps() == [1]


def test_what_is_saved_is_the_moment_of_saving(tmp_path: Path, monkeypatch) -> None:
    """Training goes on while the thread writes: it must write what was there before."""
    checkpoints, tensors, go_on = Checkpoints(tmp_path), some(1), threading.Event()
    write = storage.save_file

    def late(*given: object) -> None:
        assert go_on.wait(30)
        write(*given)

    monkeypatch.setattr(storage, "save_file", late)
    told: list[int] = []
    checkpoints.written = told.append
    values = {"curve": [1]}
    checkpoints.save(1, tensors, values)
    for tensor in tensors.values():
        tensor.add_(1)
    values["curve"].append(2)
    checkpoints.poll()
    assert told == [] and checkpoints.steps() == []  # not there before it is whole
    go_on.set()
    checkpoints.wait()
    assert told == [1]
    found = checkpoints.load(1)
    assert same_tensors(found.tensors, some(1)) and found.values["curve"] == [1]
    assert not same_tensors(found.tensors, tensors)
    checkpoints.close()


def test_the_single_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "step-3").mkdir()
    save_file(some(3), tmp_path / "step-3/tensors.safetensors")
    (tmp_path / "step-3/values.json").write_text('{"step": 3, "tokens": 8}')
    found = Checkpoints(tmp_path).load(3)
    assert same_tensors(found.tensors, some(3)) and found.values["tokens"] == 8


def test_an_index_cannot_lead_out_of_its_directory(tmp_path: Path) -> None:
    """Nor name anything but a dtype: what came from elsewhere is data."""
    checkpoints = Checkpoints(tmp_path / "ckpt")
    path = checkpoints.save(1, some(1), {})
    checkpoints.wait()
    save_file(some(2), tmp_path / "other.safetensors")
    index = (path / "index.json").read_text()
    (path / "index.json").write_text(index.replace("rank-0.safetensors", "../../other.safetensors"))
    with pytest.raises(ValueError, match="step-1 is damaged"):
        checkpoints.load(1)
    (path / "index.json").write_text(index.replace('"float32"', '"load"'))
    with pytest.raises(ValueError, match="step-1 is damaged: 'load' is no dtype"):
        checkpoints.load(1)
