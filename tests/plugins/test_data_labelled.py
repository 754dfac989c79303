"""The stage `data` on labelled rows: fields renamed, mistakes named, toys that follow their rule."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmctl import Artifact, InputError, UsageError
from llmctl.testing import StageResult, run_stage
from llmctl.text.datasets import read_rows, splits
from llmctl.text.labelled import find_task, read_labelled
from llmctl_data import DATA, toys
from llmctl_data.params import DataParams

REVIEWS = [{"review": f"it was {word}, number {n}", "stars": n % 3} for n, word in enumerate("abcdefghijkl" * 3)]


def label(tmp_path: Path, rows: list[dict], task: str, fields: dict | None = None, **params: object) -> StageResult:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run(tmp_path, path, {"task": task, "fields": fields or {}}, **params)


def run(tmp_path: Path, path: Path, labelled: dict, **params: object) -> StageResult:
    values = {"labelled": labelled, "validation_share": 0.25, **params}
    return run_stage(DATA, tmp_path / "out", values, files=[Artifact(path, "files")])


def rows(made: StageResult, split: str, port: str = "labelled") -> list[dict]:
    return list(read_rows(made.outputs[port], split))


def test_fields_are_renamed_and_rows_split(tmp_path):
    made = label(tmp_path, REVIEWS, "classification", {"text": "review", "label": "stars"})
    assert set(made.outputs) == {"text", "labelled", "metrics"}
    found = {split: rows(made, split) for split in splits(made.outputs["labelled"])}
    assert found["train"] and found["validation"]
    every = [row for part in found.values() for row in part]
    assert sorted(row["text"] for row in every) == sorted(row["review"] for row in REVIEWS)
    assert {row["label"] for row in every} == {"0", "1", "2"} and set(every[0]) == {"id", "text", "label"}
    for split, part in found.items():
        assert made.metrics[f"labelled.{split}"] == len(part)
        assert [row["text"] for row in rows(made, split, "text")] == [row["text"] for row in part]
    assert find_task(made.outputs["labelled"]) == "classification"


def test_a_table_is_the_same_as_json_lines(tmp_path):
    fields = {"text": "review", "label": "stars"}
    lines = label(tmp_path / "a", REVIEWS, "classification", fields) if (tmp_path / "a").mkdir() is None else None
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t"), ("t.csv.gz", ",")):
        path = tmp_path / name
        with (gzip.open if name.endswith("gz") else open)(path, "wt", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["stars", "review"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(REVIEWS)
        made = run(tmp_path / name.replace(".", "-"), path, {"task": "classification", "fields": fields})
        both = [
            {row["text"]: row["label"] for s in ("train", "validation") for row in rows(m, s)} for m in (lines, made)
        ]
        assert both[0] == both[1]


def test_cells_may_hold_quotes_and_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('text,label\n"a ""b"",\nc",x\nd,y\n', encoding="utf-8")
    made = run(tmp_path, path, {"task": "classification"}, validation_share=0.0)
    assert [row["text"] for row in rows(made, "train")] == ['a "b",\nc', "d"]
    path.write_text("text,label\na,b,c\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"t.csv:2: 3 cells, the first line names 2"):
        run(tmp_path, path, {"task": "classification"})


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("token-classification", {"tokens": "Ada sang", "labels": "B O"}, {"tokens": ["Ada", "sang"]}),
        ("token-classification", {"tokens": ["a", "b"], "labels": ["x", 1]}, {"labels": ["x", "1"]}),
        ("question-answering", {"context": "Ada sang.", "question": "Who?", "answer": "Ada"}, {"start": 0}),
        ("question-answering", {"context": "b a b", "question": "?", "answer": "b", "start": "4"}, {"start": 4}),
        ("seq2seq", {"source": "a", "target": "b"}, {"target": "b"}),
        ("embedding", {"text": "a", "positive": "b"}, {"positive": "b"}),
        ("classification", {"text": "a", "pair": "b", "label": 1}, {"pair": "b", "label": "1"}),
        ("classification", {"text": "a", "label": "x", "split": "train", "extra": 1}, {"label": "x"}),
    ],
)
def test_rows_of_every_task(tmp_path, task, row, expected):
    made = label(tmp_path, [row], task, validation_share=0.0)
    (found,) = read_labelled(made.outputs["labelled"], "train", task)
    assert expected.items() <= found.items()
    assert "extra" not in found and "split" not in found
    assert made.outputs["labelled"].metadata["rows"] == 1


def test_a_column_may_name_the_split(tmp_path):
    cases = [{"text": f"{n}", "label": "x", "fold": "test" if n % 2 else "train"} for n in range(6)]
    made = label(tmp_path, cases, "classification", {"split": "fold"}, validation_share=0.0)
    assert [row["text"] for row in rows(made, "test")] == ["1", "3", "5"]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("classification", {"text": "a"}, "rows.jsonl:1: no column `label`"),
        ("classification", {"text": 3, "label": "x"}, "`text` is no text"),
        ("classification", {"text": "a", "label": None}, "`label` is no name"),
        ("token-classification", {"tokens": ["a"], "labels": []}, "lists of equal length"),
        ("question-answering", {"context": "b b", "question": "?", "answer": "b"}, "occurs 2 times"),
        ("question-answering", {"context": "b b", "question": "?", "answer": ""}, "answer is empty"),
        ("question-answering", {"context": "b c", "question": "?", "answer": "c", "start": 1}, "does not read 'c'"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, task, row, message):
    with pytest.raises(InputError, match=message):
        label(tmp_path, [row], task)


def test_a_field_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no column `rating`, which fields names for `label`") as caught:
        label(tmp_path, REVIEWS, "classification", {"text": "review", "label": "rating"})
    assert "review, stars" in caught.value.hint


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labelled": {"task": "summing"}}, "'classification'"),
        ({"labelled": {"fields": {"txt": "a"}}}, "fields names `txt`, classification has text, label"),
        ({"labelled": {}, "emit": ["chat"]}, "text and labelled only"),
        ({"emit": ["labelled"]}, "emit names labelled"),
        ({"labelled": {}, "reader": "python-stdlib"}, "labelled belongs to reader: auto"),
        ({"rows": 5}, "rows belongs to reader"),
        ({"negative_twin": "shuffled-labels"}, "needs labelled examples"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        DataParams.model_validate(wrong)


def test_inputs_that_are_not_read_are_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing to read"):
        run_stage(DATA, tmp_path, {"labelled": {}})
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(UsageError, match="reads no input"):
        run_stage(DATA, tmp_path, {"reader": "toy-sentiment"}, files=[Artifact(path, "files")])
    with pytest.raises(UsageError, match="up to 5000 different rows"):
        run_stage(DATA, tmp_path, {"reader": "toy-sentiment", "rows": 5001})


def test_the_toy_translation_follows_its_lexicon_and_order(tmp_path):
    made = run_stage(DATA, tmp_path, {"reader": "toy-translation", "rows": 400, "seed": 3})
    pairs = [row for split in ("train", "validation") for row in rows(made, split)]
    assert len({row["source"] for row in pairs}) == 400 and made.metrics["labelled.validation"] > 10
    words = toys.lexicon(3)
    assert len(set(words.values())) == len(words)
    assert words != toys.lexicon(4)
    back = {theirs: ours for ours, theirs in words.items()}
    moved = 0
    for row in pairs:
        target = [back[word] for word in row["target"].split()]
        assert sorted(target) == sorted(row["source"].split())
        assert target[-1] in toys.VERBS
        moved += target != row["source"].split()
    assert moved == 400  # word for word is never right
    again = run_stage(DATA, tmp_path / "again", {"reader": "toy-translation", "rows": 400, "seed": 3})
    assert rows(again, "train") == rows(made, "train")


def test_the_toy_summary_is_the_marked_sentence_wherever_it_stands(tmp_path):
    made = run_stage(DATA, tmp_path, {"reader": "toy-summary", "rows": 600, "seed": 3})
    every = [row for split in ("train", "validation") for row in rows(made, split)]
    assert len({row["source"] for row in every}) == 600
    places = Counter()
    for row in every:
        sentences = row["source"].split(". ")
        (place,) = (at for at, sentence in enumerate(sentences) if sentence.startswith(toys.MARK))
        words = sentences[place].removeprefix(toys.MARK).rstrip(".").split()
        assert row["target"].split() == [word for word in words if word not in (*toys.ADJECTIVES, *toys.ARTICLES)]
        places[place] += 1
    assert len(places) == toys.SENTENCES and min(places.values()) > 150
    again = run_stage(DATA, tmp_path / "again", {"reader": "toy-summary", "rows": 600, "seed": 3})
    assert rows(again, "train") == rows(made, "train")


def test_the_toy_sentiment_cannot_be_told_by_one_word(tmp_path):
    made = run_stage(DATA, tmp_path, {"reader": "toy-sentiment", "rows": 2000})
    every = [row for split in ("train", "validation") for row in rows(made, split)]
    labels = Counter(row["label"] for row in every)
    assert 900 < labels["positive"] < 1100
    by_word = [
        (any(word in row["text"] for word in toys.GOOD) == (row["label"] == "positive"), " not " in row["text"])
        for row in every
    ]
    assert all(right != negated for right, negated in by_word)
    assert 0.25 < sum(negated for _, negated in by_word) / len(every) < 0.4


def test_shuffled_labels_keep_their_shares_and_lose_their_texts(tmp_path):
    params = {"reader": "toy-sentiment", "rows": 600}
    made = run_stage(DATA, tmp_path / "a", params)
    twin = run_stage(DATA, tmp_path / "b", {**params, "negative_twin": "shuffled-labels"})
    right, wrong = rows(made, "train"), rows(twin, "train")
    assert [row["text"] for row in right] == [row["text"] for row in wrong]
    assert Counter(row["label"] for row in right) == Counter(row["label"] for row in wrong)
    assert 0.4 < sum(a["label"] == b["label"] for a, b in zip(right, wrong, strict=True)) / len(right) < 0.6
    assert rows(made, "validation") == rows(twin, "validation")


def test_labels_of_tokens_are_dealt_within_their_row():
    from llmctl_data.labelled import Labelled, shuffled

    rows = [{"tokens": list("abcd")[:n], "labels": [f"{n}{i}" for i in range(n)]} for n in (2, 3, 4)]
    found = list(shuffled([Labelled(str(n), "f", row) for n, row in enumerate(rows)], 0))
    assert [sorted(one.row["labels"]) for one in found] == [row["labels"] for row in rows]
    assert [one.row["labels"] for one in found] != [row["labels"] for row in rows]
