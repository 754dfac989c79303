"""Metrics reach TensorBoard: its own reader finds them. Without the variable nothing is imported or written."""

from __future__ import annotations

import sys

import pytest

import llmctl_train_pretrain as plugin
from llmctl_train_pretrain import board


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(board, "_writers", {})


def test_tensorboards_own_reader_finds_the_numbers(monkeypatch, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs llmctl[track]")
    monkeypatch.setenv(board.VARIABLE, str(tmp_path))
    for step, loss in enumerate((4.0, 3.0, 2.5), 1):
        plugin.log_metrics("train", {"loss": loss, "lr": 0.1}, step)
    plugin.log_metrics("train", {"loss.train": 2.75}, None)
    (folder,) = (tmp_path / "train").iterdir()
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "loss.train"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 2.5)]
    assert [event.value for event in events.Scalars("loss.train")] == [2.75]


def test_without_the_variable_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.delenv(board.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    plugin.log_metrics("train", {"loss": 1.0}, 1)
    assert not board._writers and not list(tmp_path.iterdir())


def test_a_missing_module_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv(board.VARIABLE, str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(board.MachineError) as caught:
        plugin.log_metrics("train", {"loss": 1.0}, 1)
    assert caught.value.hint == "pip install 'llmctl[track]'"
