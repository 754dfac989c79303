"""Runs from tables and from llmctl's own trainings."""

from __future__ import annotations

import csv
import json

import pytest

from llmctl.errors import InputError, UsageError
from llmctl.store import Store, names
from llmctl.store.hashing import plain_files
from llmctl_train_pretrain.scaling.experiments import read_experiments
from llmctl_train_pretrain.scaling.tables import parse_columns, read_table

# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    """A table of these rows: `write("runs.csv", rows)` → path."""

    def put(name, rows):
        path = tmp_path / name
        if name.endswith(".csv"):
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        elif name.endswith(".parquet"):
            pa = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return put


ROWS = [{"N": 1e8, "D": 2e9, "loss": 3.5}, {"N": 2e8, "D": 1e9, "loss": 3.4}]


@pytest.mark.parametrize("name", ["runs.csv", "runs.jsonl", "runs.parquet"])
def test_every_kind_of_table_gives_the_same_runs(write, name):
    runs = read_table(write(name, ROWS), {})
    assert [(row.parameters, row.tokens, row.loss) for row in runs.rows] == [(1e8, 2e9, 3.5), (2e8, 1e9, 3.4)]
    assert runs.flops_used == pytest.approx([1.2e18, 1.2e18])
    assert (runs.counts, runs.flops) == ("column `N`", "6ND")


def test_tokens_follow_from_operations(write):
    """The columns of Epoch's table of Chinchilla's runs."""
    path = write("runs.csv", [{"Model Size": 1e9, "Training FLOP": 6e19, "loss": 2.5}])
    columns = parse_columns(("parameters=Model Size", "flops=Training FLOP"))
    (row,) = read_table(path, columns).rows
    assert (row.parameters, row.tokens, row.flops) == (1e9, 1e10, 6e19)


def test_rows_of_one_run_are_its_curve(write):
    rows = [{"run": name, "N": 1e8, "D": d, "loss": 5 - d / 1e9} for name in "ab" for d in (2e9, 1e9, 3e9)]
    runs = read_table(write("runs.csv", rows), {})
    assert len(runs) == 2
    assert runs.rows[0].curve == ((1e9, 4.0), (2e9, 3.0), (3e9, 2.0))
    assert (runs.rows[0].tokens, runs.rows[0].loss) == (3e9, 2.0)


def test_two_sizes_under_one_name_are_no_run(write):
    rows = [{"run": "a", "N": n, "D": 1e9, "loss": 3.0} for n in (1e8, 2e8)]
    with pytest.raises(InputError, match="the rows of run `a` differ in `N`"):
        read_table(write("runs.csv", rows), {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"N": 1e8, "loss": 3.5}, "no column for tokens; it has: N, loss"),
        ({"size": 1e8, "D": 1e9, "loss": 3.5}, "no column for parameters"),
        ({"N": "big", "D": 1e9, "loss": 3.5}, "runs.csv:2: `N` is 'big', not a number"),
        ({"N": 1e8, "D": 1e9, "loss": -1}, "runs.csv:2: `loss` is -1, must be positive"),
        ({"N": 1e8, "D": 1e9, "loss": "nan"}, "`loss` is nan, must be positive"),
        ({"N": 1e8, "D": "", "loss": 2}, "`D` is '', not a number"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_place(write, row, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        read_table(write("runs.csv", [row]), {})


def test_other_files_and_columns_are_refused(write, tmp_path):
    with pytest.raises(InputError, match="no column `X`"):
        read_table(write("runs.csv", ROWS), {"parameters": "X"})
    with pytest.raises(InputError, match="is no table"):
        read_table(tmp_path / "runs.txt", {})
    with pytest.raises(UsageError, match="not ROLE=NAME"):
        parse_columns(("size=N",))


# -- trainings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    found = Store(tmp_path / "store")
    found.create()
    return found


@pytest.fixture
def training(store):
    """Leave the metrics of a training in the store under the name `sweep/<instance>`."""

    def put(instance, metrics=None, curve=(), given=None, type="metrics", tokens="t"):
        values = {
            "parameters": 1000, "parameters.without_embedding": 600, "parameters.with_head": 1000, "tokens": 5000,
            "steps": 50, "loss.validation": 3.0, "loss.train": 2.9, "epochs": 0.5, **(metrics or {}),
        }  # fmt: skip
        directory = store.staging() / "out"
        directory.mkdir(parents=True)
        (directory / "metrics.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
        (directory / "curves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
        artifact = store.commit(
            directory,
            type,
            plain_files(directory),
            metadata={},
            provenance={"instance": instance, "with": given or {}, "inputs": {"tokens": [tokens]}},
        )
        names.write(store, "sweep", instance, {type: (artifact.id, type)}, key=artifact.id, run="r")
        return artifact

    return put


def test_a_stage_stands_for_all_of_its_instances(store, training):
    training("train[dim=16]")
    training("train[dim=32]", {"parameters": 4000, "loss.validation": 2.5})
    training("trainer[dim=16]", {"parameters": 1})
    training("train[dim=16]", {"parameters": 1}, type="report")
    for text in ("sweep/train", "sweep/train[*]"):
        runs = read_experiments(store, (text,), "total")
        assert [(row.name, row.parameters, row.loss) for row in runs.rows] == [
            ("sweep/train[dim=16]", 1000, 3.0), ("sweep/train[dim=32]", 4000, 2.5),
        ]  # fmt: skip
    assert runs.rows[0].flops == 6 * 1000 * 5000
    (one,) = read_experiments(store, ("sweep/train[dim=32].metrics",), "total").rows
    assert one.parameters == 4000


def test_a_path_or_an_id_is_a_training_too(store, training):
    artifact = training("train")
    assert len(read_experiments(store, (str(artifact.path), artifact.id, "sweep/train"), "total")) == 1


def test_which_parameters_are_counted(store, training):
    training("train")
    assert read_experiments(store, ("sweep/train",), "without-embedding").rows[0].parameters == 600
    training("old", {"parameters.without_embedding": None})
    with pytest.raises(InputError, match="reports no number `parameters.without_embedding`"):
        read_experiments(store, ("sweep/old",), "without-embedding")


def test_curves_and_what_to_know_about_them(store, training):
    points = [{"step": step, "loss": 4.0, "loss.validation": 5 - step / 50} for step in (10, 30, 50)]
    training("train", {"epochs": 3.0}, points)
    runs = read_experiments(store, ("sweep/train",), "total")
    assert runs.rows[0].curve == ((1000, 4.8), (3000, 4.4), (5000, 4.0))
    assert any("had not decayed" in note for note in runs.notes)
    assert any("saw its data 3 times" in note for note in runs.notes)
    constant = training("constant", {}, [{"step": s, "loss": 4.0} for s in (10, 30, 50)], {"schedule": "constant"})
    notes = read_experiments(store, (constant.id,), "total").notes
    assert notes == ("curves are of the training loss: set eval_every to have curves of the validation loss",)


def test_losses_that_cannot_be_compared(store, training):
    training("train[a=1]")
    training("train[a=2]", {"parameters": 2000}, tokens="u")
    assert any("different tokens" in note for note in read_experiments(store, ("sweep/train",), "total").notes)
    training("train[a=2]", {"parameters": 3000})
    assert read_experiments(store, ("sweep/train",), "total").notes == ()
    training("train[a=3]", {"objective": "mlm"})
    with pytest.raises(InputError, match=r"different objectives: none named .*, mlm \(sweep/train\[a=3\]\)"):
        read_experiments(store, ("sweep/train",), "total")


def test_what_is_no_training_is_named(store, training):
    training("train", {"loss.validation": None})
    with pytest.raises(InputError, match="sweep/train reports no number `loss.validation`"):
        read_experiments(store, ("sweep/train",), "total")
    with pytest.raises(InputError, match="no result named `sweep/trian`"):
        read_experiments(store, ("sweep/trian",), "total")
