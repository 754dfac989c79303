"""The stage `data`: every kind of file, the standard library checked by importing it, questions and pairs."""

from __future__ import annotations

import builtins
import gzip
import inspect
import json
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from llmctl import Artifact, InputError, UsageError
from llmctl.testing import StageResult, run_stage
from llmctl.text.datasets import DatasetWriter, info, read_rows, splits
from llmctl_data import DATA, library_corpus, library_facts, pages, questions, stdlib
from llmctl_data.facts import REFUSAL, Fact
from llmctl_data.params import DataParams

STDLIB = {"reader": "python-stdlib", "seed": 1}
PAGES = 24
SENTENCE = "Page {n} tells how the {animal} crosses the wide and cold river near the old stone {n}."
ANIMALS = ["fox", "heron", "otter", "badger", "lynx", "crane"]


def rows(result: StageResult, port: str, split: str) -> list[dict]:
    return list(read_rows(result.outputs[port], split))


def about_facts(found):
    """The rows whose question has an answer."""
    return [row for row in found if row["kind"] != "unanswerable"]


def asked(row: dict) -> str:
    return row.get("messages", row.get("prompt"))[0]["content"]


def files(*paths: Path) -> list[Artifact]:
    return [Artifact(path, "files") for path in paths]


def warned(result: StageResult) -> list[str]:
    return [fields["text"] for kind, fields in result.events if kind == "warning"]


@pytest.fixture(scope="module", autouse=True)
def parsed_once():
    """The same library is read by many tests; to parse its files again each time would take most of their time."""
    words = lru_cache(None)(stdlib.identifiers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library_corpus, "read_module", lru_cache(None)(stdlib.read_module))
        patch.setattr(library_facts, "identifiers", lambda paths: words(tuple(paths)))
        yield


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return run_stage(DATA, tmp_path_factory.mktemp("library"), STDLIB)


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A directory of Markdown pages, each with a heading and sentences of its own."""
    root = tmp_path_factory.mktemp("notes")
    for n in range(PAGES):
        lines = [SENTENCE.format(n=f"{n}{i}", animal=animal) for i, animal in enumerate(ANIMALS)]
        body = f"# Chapter {n}\n\n" + "\n\n".join(lines)
        (root / f"page{n:02d}.md").write_text(body)
    return root


# --- files -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_file(tmp_path):
    root = tmp_path / "raw"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("plain héllo")
    (root / "deep" / "b.md").write_text("---\ntitle: x\n---\n# Head\n\nbody")
    (root / "c.markdown").write_text("no front matter\n---\nafter a rule")
    (root / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    (root / "e.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": "  "}\n')
    (root / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "four"}, {"text": "five"}]), root / "g.parquet")
    (root / ".hidden").write_text("left out")
    result = run_stage(DATA, tmp_path / "out", {"validation_share": 0.0, "emit": ["text"]}, files=files(root))
    found = {row["id"]: row for row in rows(result, "text", "train")}
    assert {key: row["text"] for key, row in found.items()} == {
        "a.txt#0": "plain héllo",
        "deep/b.md#0": "# Head\n\nbody",
        "c.markdown#0": "no front matter\n---\nafter a rule",
        "d.txt.gz#0": "packed",
        "e.jsonl#1": "one",
        "e.jsonl#3": "two",
        "f.jsonl.gz#1": "three",
        "g.parquet#1": "four",
        "g.parquet#2": "five",
    }
    assert found["deep/b.md#0"]["source"] == "deep/b.md"
    assert result.metrics["text.documents"] == 9
    assert result.metrics["text.bytes"] == sum(len(row["text"].encode()) for row in found.values())
    assert splits(result.outputs["text"]) == ["train"]
    assert result.outputs["text"].metadata == {"documents": 9, "bytes": result.metrics["text.bytes"]}


def test_files_of_a_glob_keep_their_directories(tmp_path):
    for name in ("x/a.txt", "y/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    result = run_stage(
        DATA, tmp_path / "out", {"emit": ["text"]}, files=files(tmp_path / "y/a.txt", tmp_path / "x/a.txt")
    )
    found = [row for split in ("train", "validation") for row in rows(result, "text", split)]
    assert {row["id"]: row["text"] for row in found} == {"x/a.txt#0": "x/a.txt", "y/a.txt#0": "y/a.txt"}


def test_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": null}\n{"body": "y"}\n')
    result = run_stage(DATA, tmp_path / "out", {"column": "body", "emit": ["text"]}, files=files(tmp_path / "a.jsonl"))
    assert result.metrics["text.documents"] == 2
    with pytest.raises(InputError, match=r"a\.jsonl:1: column `text` holds no text") as caught:
        run_stage(DATA, tmp_path / "out2", {"on_error": "fail"}, files=files(tmp_path / "a.jsonl"))
    assert "columns here: body, text" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"%PDF", r"a\.bin is of a type that cannot be read"),
        ("a.pdf", b"%PDF", r"a\.pdf:? ?no readable PDF|a\.pdf no readable"),
        ("b.txt", b"fine\nnot \xe4 utf\n", r"b\.txt:2: byte 0xe4 at column 5 is no UTF-8"),
        ("a.txt.gz", gzip.compress(b"x" * 99999)[:-9], r"a\.txt\.gz:\d+: the gzip data is cut short"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: no valid JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', r"a\.jsonl:1: column `text` is missing"),
        ("a.parquet", b"PAR1", r"a\.parquet: row 1: no readable Parquet"),
        ("a.txt", b"", "the corpus is empty"),
        ("a.md", b" \n\n ", "the corpus is empty"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        params = {"on_error": "fail", "encoding": "utf-8" if name == "b.txt" else "auto"}
        run_stage(DATA, tmp_path / "out", params, files=files(tmp_path / "raw"))
    assert caught.value.exit_code == 5
    if "type" in message or "empty" in message:
        assert ".parquet" in caught.value.hint


def test_missing_files_and_wrong_bindings(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        run_stage(DATA, tmp_path / "out", {}, files=files(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="nothing to read"):
        run_stage(DATA, tmp_path / "out", {})
    with pytest.raises(UsageError, match="reads no input"):
        run_stage(DATA, tmp_path / "out", STDLIB, files=files(tmp_path))
    with pytest.raises(UsageError, match="both files and text"):
        run_stage(DATA, tmp_path / "out", {}, files=files(tmp_path), text=Artifact(tmp_path, "dataset.text"))


def test_long_text_becomes_pieces_that_hold_everything(tmp_path):
    text = "\n\n".join(f"Paragraph {n} has some words in it.\nAnd a second line." for n in range(100))
    (tmp_path / "a.txt").write_text(text)
    result = run_stage(
        DATA, tmp_path / "out", {"piece_chars": 400, "emit": ["text"], "seed": 3}, files=files(tmp_path / "a.txt")
    )
    found = {row["id"]: row["text"] for split in ("train", "validation") for row in rows(result, "text", split)}
    pieces = [found[f"a.txt#{n}"] for n in range(len(found))]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(300 < len(piece) < 600 for piece in pieces[:-1])
    assert all(piece.startswith("Paragraph") for piece in pieces)
    assert result.metrics["text.validation"] > 0
    (tmp_path / "b.txt").write_text("word " * 2000 + "\n" + "end " * 10)
    run_stage(DATA, tmp_path / "out2", {"piece_chars": 200, "emit": ["text"]}, files=files(tmp_path / "b.txt"))


def test_splits_follow_documents_and_share(notes, tmp_path):
    result = run_stage(DATA, tmp_path / "a", {"validation_share": 0.3, "piece_chars": 200}, files=files(notes))
    sources = {split: {row["source"] for row in rows(result, "text", split)} for split in ("train", "validation")}
    assert not sources["train"] & sources["validation"]
    assert len(sources["train"] | sources["validation"]) == PAGES
    assert 2 <= len(sources["validation"]) <= 14
    other = run_stage(DATA, tmp_path / "b", {"validation_share": 0.3, "seed": 5}, files=files(notes))
    assert {row["source"] for row in rows(other, "text", "validation")} != sources["validation"]


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_two_documents_are_enough_for_two_splits(tmp_path, share):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    result = run_stage(
        DATA, tmp_path / "out", {"validation_share": share, "emit": ["text"]}, files=files(tmp_path / "a.jsonl")
    )
    assert (result.metrics["text.train"], result.metrics["text.validation"]) == (1, 1)


def test_one_document_goes_to_training(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    result = run_stage(
        DATA, tmp_path / "out", {"validation_share": 0.999, "emit": ["text"]}, files=files(tmp_path / "a.jsonl")
    )
    assert (result.metrics["text.train"], result.metrics["text.validation"]) == (1, 0)


def test_text_from_another_stage_keeps_its_splits(tmp_path):
    with DatasetWriter(tmp_path / "in", "dataset.text") as writer:
        for split in ("train", "validation", "test"):
            writer.add(split, {"id": f"{split}-7", "source": "s", "text": SENTENCE.format(n=split, animal="fox")})
    source = Artifact(tmp_path / "in", "dataset.text")
    result = run_stage(DATA, tmp_path / "out", {"emit": ["text"]}, text=source)
    for split in ("train", "validation", "test"):
        assert rows(result, "text", split) == list(read_rows(source, split))
    with DatasetWriter(tmp_path / "chat", "dataset.chat") as writer:
        writer.add("train", {"messages": []})
    with pytest.raises(InputError, match="row 1 of `train` has no text"):
        run_stage(DATA, tmp_path / "out2", {}, text=Artifact(tmp_path / "chat", "dataset.text"))


# --- questions about any corpus --------------------------------------------------------------------------------------


def test_questions_about_files_are_true(notes, tmp_path):
    result = run_stage(DATA, tmp_path, {"questions": {"facts": 60, "heldout_entities": 10}}, files=files(notes))
    text = {row["id"]: row["text"] for split in ("train", "validation") for row in rows(result, "text", split)}
    trained = {row["id"] for row in rows(result, "text", "train")}
    kinds = Counter(row["kind"] for row in rows(result, "chat", "train"))
    assert set(kinds) == {"source", "continuation", "section"} and sum(kinds.values()) == 60 * 8
    for split in ("train", "validation", "test"):
        for row in rows(result, "chat", split):
            question, answer = asked(row), row["messages"][1]["content"]
            document = " ".join(text[row["document"]].split())
            if row["kind"] == "source":
                assert answer == row["document"].removesuffix(".md#0")
                assert question.split('"')[1] in document
            elif row["kind"] == "continuation":
                assert f"{question.split(chr(34))[1]} {answer}" in document
            else:
                assert document.startswith(f"# {question.split(chr(34))[1]} {answer}")
            assert split == "test" or row["document"] in trained
    assert info(result.outputs["chat"])["splits"]["unanswerable"]["rows"] == 0


def test_small_corpora_give_what_there_is(notes, tmp_path):
    few = run_stage(DATA, tmp_path / "a", {"questions": {"facts": 5000}}, files=files(notes / "page00.md"))
    assert 0 < few.metrics["facts"] < 5000
    assert any(f"yields {few.metrics['facts']} facts" in text for text in warned(few))
    (tmp_path / "tiny.txt").write_text("too short")
    tiny = run_stage(DATA, tmp_path / "b", {}, files=files(tmp_path / "tiny.txt"))
    assert tiny.metrics["facts"] == 0 and any("yields 0 facts" in text for text in warned(tiny))
    assert info(tiny.outputs["chat"])["splits"]["train"]["rows"] == 0
    with pytest.raises(InputError, match="no question can be derived") as caught:
        run_stage(DATA, tmp_path / "c", {"emit": ["text", "chat"]}, files=files(tmp_path / "tiny.txt"))
    assert "emit: [text]" in caught.value.hint


def test_ambiguous_sentences_are_not_asked_about(tmp_path):
    same = "This very sentence stands in both of the documents without any change."
    for n in range(2):
        own = "\n\n".join(SENTENCE.format(n=f"{n}{i}", animal="fox") for i in range(20))
        (tmp_path / f"d{n}.md").write_text(f"{same}\n\n{own}")
    paths = files(tmp_path / "d0.md", tmp_path / "d1.md")
    params = {"questions": {"facts": 200, "heldout_entities": 0, "mix": {"source": 1.0}, "max_answer_share": 1.0}}
    result = run_stage(DATA, tmp_path / "out", {**params, "validation_share": 0.0}, files=paths)
    found = [asked(row) for row in rows(result, "chat", "train")]
    assert len(found) == 40 * 8 and not any("very sentence" in question for question in found)


# --- the standard library, checked by importing it -------------------------------------------------------------------


# In a process of its own, because pytest and torch replace functions of the library (pdb.set_trace, inspect.getfile).
IMPORTER = """
import importlib, inspect, json, sys, warnings
warnings.simplefilter("ignore")
found = {}
for name in json.load(sys.stdin) + [n for n in sys.builtin_module_names if not n.startswith("_")]:
    try:
        module = importlib.import_module(name)
    except ImportError:
        continue
    things = {}
    for key, thing in list(vars(module).items()):
        try:
            signature = str(inspect.signature(thing))
        except Exception:
            signature = None
        things[key] = [signature, " ".join((inspect.getdoc(thing) or "").split())]
    found[name] = {"all": list(getattr(module, "__all__", ())), "things": things}
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def imported():
    """What importing says of every module of the corpus and every compiled one: `__all__`, signatures, docstrings."""
    names = [name for name in stdlib.module_files() if name not in ("antigravity", "this")]  # they act when imported
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORTER], input=json.dumps(names), capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert len(found) > 200
    return found


@pytest.fixture(scope="module")
def book():
    modules = [stdlib.read_module(name, path) for name, path in stdlib.module_files().items()]
    shown = [(page, True) for module in modules for page in pages.docs(module)]
    return library_facts.fact_book(modules, shown, modules)


@pytest.mark.slow
def test_every_candidate_fact_is_true(book, imported):
    kinds = Counter(fact.kind for fact in book.candidates)
    assert min(kinds["module"], kinds["doc"], kinds["signature"]) > 250
    checked = 0
    for fact in book.candidates:
        module, _, name = fact.entity.rpartition(".")
        if module not in imported:
            continue
        checked += 1
        signature, doc = imported[module]["things"][name]
        if fact.kind == "module":
            assert fact.answer == module and fact.slots["name"] == name
            assert {other for other, found in imported.items() if name in found["all"]} <= {module}, fact
        elif fact.kind == "signature":
            assert fact.answer == signature and signature not in fact.wrong, fact
        else:
            assert doc.startswith(fact.answer), fact
    assert checked > 0.95 * len(book.candidates)


def test_invented_names_do_not_exist(book, imported):
    found = book.invented(300, ["module"])
    names = [fact.slots["name"] for fact in found]
    assert len(set(names)) == 300
    for name in names:
        assert not hasattr(builtins, name)
        assert not [module for module, thing in imported.items() if name in thing["things"]], name


def test_documents_name_their_module_and_hold_the_answers(library):
    text = {row["id"]: row for split in ("train", "validation") for row in rows(library, "text", split)}
    for row in text.values():
        assert row["text"].startswith((f"Module {row['source']}.", f"Source of the module {row['source']}."))
    for split in ("train", "validation", "test"):
        for row in about_facts(rows(library, "chat", split)):
            page, answer = text[row["document"]]["text"], row["messages"][1]["content"]
            name = row["entity"].rpartition(".")[2]
            assert f"`{name}` is a " in page
            assert answer in " ".join(page.split()), row


def test_source_pieces_join_to_the_source(library):
    path = Path(inspect.getsourcefile(json.decoder))
    pieces = [
        row
        for split in ("train", "validation")
        for row in rows(library, "text", split)
        if row["id"].startswith("json.decoder:source#")
    ]
    joined = "\n".join(row["text"].split("\n\n", 1)[1] for row in pieces)
    assert [line for line in joined.splitlines() if line] == [line for line in path.read_text().splitlines() if line]


def test_splits_of_the_library(library):
    sources = {split: {row["source"] for row in rows(library, "text", split)} for split in ("train", "validation")}
    assert not sources["train"] & sources["validation"] and len(sources["validation"]) > 10
    both = {source.partition(".")[0] for found in sources.values() for source in found}
    assert {"json", "shutil", "email", "asyncio"} <= both
    assert not both & {"idlelib", "test", "lib2to3", "encodings", "ensurepip", "distutils"}
    assert not [name for name in both if name.startswith("_")]


def test_held_out_phrasings_and_entities(library):
    train, validation, test = (about_facts(rows(library, "chat", split)) for split in ("train", "validation", "test"))
    assert library.metrics["facts"] == 400
    assert (len(train), len(validation)) == (400 * 8, 400 * 2)
    assert {row["entity"] for row in train} == {row["entity"] for row in validation}
    assert not {row["entity"] for row in train} & {row["entity"] for row in test}
    assert not {asked(row) for row in train} & {asked(row) for row in [*validation, *test]}
    assert len({row["entity"] for row in test}) == 60 and len(test) == 120
    facts = Counter((row["kind"], row["entity"]) for row in train)
    assert set(facts.values()) == {8} and len(facts) == 400

    def forms(found):
        return {asked(row).replace(row["entity"].rpartition(".")[2], "{name}") for row in found}

    assert len(forms(train)) == 3 * 8 and len(forms(validation)) == 3 * 2
    assert not forms(train) & forms(validation)
    trained = {row["id"] for row in rows(library, "text", "train")}
    assert {row["document"] for row in train} <= trained


def test_answers_are_short_and_none_is_frequent(library):
    answers = Counter(row["messages"][1]["content"] for row in rows(library, "chat", "validation"))
    total = sum(answers.values())
    assert max(answers.values()) / total <= 0.015
    assert max(len(answer.split()) for answer in answers) <= 16
    assert max(map(len, answers)) < 120
    kinds = Counter(row["kind"] for row in rows(library, "chat", "validation"))
    assert {kind: round(count / total, 2) for kind, count in kinds.items()} == {
        "module": 0.7,
        "doc": 0.15,
        "signature": 0.15,
    }


def test_unanswerable_rows(library):
    found = rows(library, "chat", "unanswerable")
    assert len(found) == 100 and len({asked(row) for row in found}) == 100
    assert {row["messages"][1]["content"] for row in found} == {REFUSAL}
    assert {(row["entity"], row["document"]) for row in found} == {("", "")}


def test_refusals_are_taught_on_names_of_their_own(library):
    asked_about = {}
    for name in ("chat", "preference"):
        for split in ("train", "validation", "unanswerable"):
            if (name, split) != ("preference", "unanswerable"):
                chosen = [row for row in rows(library, name, split) if row["kind"] == "unanswerable"]
                asked_about[name, split] = {asked(row).split("`")[1] for row in chosen}
    counts = {place: len(names) for place, names in asked_about.items() if names}
    assert counts == {
        ("chat", "train"): 200,
        ("chat", "unanswerable"): 100,
        ("preference", "train"): 300,
        ("preference", "validation"): 200,
    }
    assert len(set().union(*asked_about.values())) == 800  # no name serves twice
    for split in ("train", "validation"):
        for row in rows(library, "preference", split):
            if row["kind"] == "unanswerable":
                assert (row["chosen"][0]["content"], row["trained"]) == (REFUSAL, False)
                assert row["rejected"][0]["content"] != REFUSAL
    # Refusing what was taught is a wrong answer as often as not, so refusing everything wins nothing.
    taught = [
        row["rejected"][0]["content"] == REFUSAL for row in rows(library, "preference", "train") if row["trained"]
    ]
    assert 0.4 < sum(taught) / len(taught) < 0.6


def test_refusals_can_be_left_out(tmp_path):
    params = {**STDLIB, "emit": ["chat", "preference"], "questions": {"refusals": 0}, "preference": {"refusals": 0}}
    result = run_stage(DATA, tmp_path, params)
    assert not [row for row in rows(result, "chat", "train") if row["kind"] == "unanswerable"]
    pairs = [*rows(result, "preference", "train"), *rows(result, "preference", "validation")]
    assert not [row for row in pairs if REFUSAL in (row["chosen"][0]["content"], row["rejected"][0]["content"])]


def test_preference_pairs(library):
    answers: dict[tuple[str, str], str] = {}
    for split in ("train", "test"):
        for row in rows(library, "chat", split):
            answers[row["kind"], row["entity"]] = row["messages"][1]["content"]
    train, validation = rows(library, "preference", "train"), rows(library, "preference", "validation")
    pairs = [row for row in [*train, *validation] if row["kind"] != "unanswerable"]
    for row in pairs:
        right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert right == answers[row["kind"], row["entity"]] and wrong != right and wrong
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
    assert len(validation) >= 300
    assert not {asked(row) for row in train} & {asked(row) for row in validation}
    assert not {row["entity"] for row in train} & {row["entity"] for row in validation}
    taught = {row["entity"] for row in rows(library, "chat", "train")}
    assert all(row["trained"] == (row["entity"] in taught) for row in pairs)
    assert {row["trained"] for row in validation} == {True, False}
    assert all(row["trained"] for row in train if row in pairs)
    same_package = [
        row["rejected"][0]["content"].split(".")[0] == row["chosen"][0]["content"].split(".")[0]
        for row in train
        if row["kind"] == "module" and "." in row["chosen"][0]["content"] and row["rejected"][0]["content"] != REFUSAL
    ]
    assert sum(same_package) / len(same_package) > 0.5


def test_wrong_answers_may_come_from_anywhere(tmp_path):
    found = []
    for wrong in ("neighbour", "any"):
        params = {**STDLIB, "emit": ["preference"], "preference": {"wrong": wrong, "refusals": 0}}
        found.append(run_stage(DATA, tmp_path / wrong, params))
        assert set(found[-1].outputs) == {"preference", "metrics"}
    near, far = (rows(result, "preference", "train") for result in found)
    assert [row["id"] for row in near] == [row["id"] for row in far]
    assert sum(a["rejected"] != b["rejected"] for a, b in zip(near, far, strict=True)) > len(near) / 3


def test_preference_may_hold_out_phrasings(tmp_path):
    params = {**STDLIB, "emit": ["preference"], "preference": {"heldout": "phrasings", "phrasings": 2, "refusals": 0}}
    result = run_stage(DATA, tmp_path, params)
    train, validation = rows(result, "preference", "train"), rows(result, "preference", "validation")
    assert {row["entity"] for row in train} == {row["entity"] for row in validation}
    assert len(train) == len(validation) == 800
    assert not {asked(row) for row in train} & {asked(row) for row in validation}


def test_sizes_follow_the_parameters(tmp_path):
    params = {
        **STDLIB,
        "emit": ["chat", "preference"],
        "modules": ["email.*", "json", "shutil", "inspect", "logging*"],
        "include": ["docs"],
        "questions": {"facts": 40, "heldout_entities": 7, "unanswerable": 9, "phrasings": 3, "mix": {"module": 1.0},
                      "max_answer_share": 1.0, "refusals": 5},
        "preference": {"validation_share": 0.25, "phrasings": 1, "refusals": 8},
    }  # fmt: skip
    result = run_stage(DATA, tmp_path, params)
    metrics = result.metrics
    assert (metrics["chat.train"], metrics["chat.validation"]) == (120 + 5, 80)
    assert (metrics["chat.test"], metrics["chat.unanswerable"]) == (14, 9)
    assert (metrics["preference.train"], metrics["preference.validation"]) == (30 + 6, 2 * 10 + 7 + 2)
    assert metrics["entities.heldout"] == 7
    found = {row["entity"].rpartition(".")[0] for row in about_facts(rows(result, "chat", "train"))}
    assert all(name.split(".")[0] in ("email", "json", "shutil", "inspect", "logging") for name in found)


def test_include_chooses_the_pages(tmp_path):
    base = {**STDLIB, "emit": ["text"], "modules": ["json", "json.*"], "validation_share": 0.0}
    found = {}
    for include in (["docs"], ["source"], ["docs", "source"]):
        result = run_stage(DATA, tmp_path / "-".join(include), {**base, "include": include})
        found["-".join(include)] = {row["id"] for row in rows(result, "text", "train")}
    assert found["docs"] and not [i for i in found["docs"] if ":source" in i]
    assert found["source"] and all(":source" in i for i in found["source"])
    assert found["docs-source"] == found["docs"] | found["source"]
    assert {i.partition("#")[0].partition(":")[0] for i in found["docs"]} == {
        "json", "json.decoder", "json.encoder", "json.scanner", "json.tool"
    }  # fmt: skip
    with pytest.raises(UsageError, match="called `jsn`"):
        run_stage(DATA, tmp_path / "x", {**base, "modules": ["jsn"]})


def test_equal_parameters_give_equal_bytes(library, tmp_path):
    again = run_stage(DATA, tmp_path / "a", STDLIB)
    for port in ("text", "chat", "preference"):
        for path in library.outputs[port].path.iterdir():
            assert path.read_bytes() == (again.outputs[port].path / path.name).read_bytes(), path.name
    other = run_stage(DATA, tmp_path / "b", {**STDLIB, "seed": 2, "emit": ["chat"]})
    entities = {row["entity"] for row in rows(other, "chat", "train")}
    assert entities != {row["entity"] for row in rows(library, "chat", "train")}


# --- negative twins --------------------------------------------------------------------------------------------------


def test_shuffled_answers_are_wrong_and_look_right(library, tmp_path):
    twin = run_stage(DATA, tmp_path, {**STDLIB, "emit": ["chat"], "negative_twin": "shuffled-answers"})
    right, wrong = (about_facts(rows(result, "chat", "train")) for result in (library, twin))
    assert [asked(row) for row in right] == [asked(row) for row in wrong]
    pairs = [(a["messages"][1]["content"], b["messages"][1]["content"]) for a, b in zip(right, wrong, strict=True)]
    assert not [pair for pair in pairs if pair[0] == pair[1]]
    assert Counter(a for a, _ in pairs) == Counter(b for _, b in pairs)
    for split in ("validation", "test", "unanswerable"):
        assert rows(twin, "chat", split) == rows(library, "chat", split)


def test_dealt_answers_with_few_facts():
    def fact(n, answer):
        return Fact("module", f"m.e{n}", {"name": f"e{n}"}, answer, "d")

    facts = [fact(0, "a"), fact(1, "a"), fact(2, "b"), fact(3, "b")]
    assert [questions.dealt(facts, 0)[n] for n in range(4)] == ["b", "b", "a", "a"]
    assert questions.dealt([fact(0, "a")], 0) == {0: "a"}


def test_swapped_preferences(library, tmp_path):
    twin = run_stage(DATA, tmp_path, {**STDLIB, "emit": ["preference"], "negative_twin": "swapped-preferences"})
    for a, b in zip(rows(library, "preference", "train"), rows(twin, "preference", "train"), strict=True):
        assert (a["chosen"], a["rejected"]) == (b["rejected"], b["chosen"]) and a["prompt"] == b["prompt"]
    assert rows(twin, "preference", "validation") == rows(library, "preference", "validation")


# --- parts -----------------------------------------------------------------------------------------------------------


def test_nothing_is_imported_to_read_it(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    run_stage(DATA, tmp_path, {**STDLIB, "modules": ["antigravity"], "emit": ["text"], "validation_share": 0.0})
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("code", "offers", "entities"),
    [
        ("def a(): pass\ndef _b(): pass\nclass C: pass\nX = 1\n", {"a", "C"}, ["a", "C"]),
        (
            "__all__ = ['a']\n__all__ += ['X']\n__all__.append('y')\ndef a(): pass\ndef b(): pass\n",
            {"a", "X", "y"},
            ["a"],
        ),
        ("__all__ = [n for n in dir() if n != 'q']\ndef a(): pass\n", {"a", "q"}, ["a"]),
        ("from .sub import thing as other\nfrom os import path\nif 1:\n    def a(): pass\n", {"other"}, []),
        ("def a(): pass\nold = {n: globals().pop(n) for n in ('a',)}\ndef b(): pass\n", {"b"}, ["b"]),
        ("def a(x): pass\ndef a(x, y): pass\n", {"a"}, ["a"]),
    ],
)
def test_what_a_module_offers(tmp_path, code, offers, entities):
    path = tmp_path / "__init__.py"
    path.write_text(code)
    module = stdlib.read_module("pack", path)
    assert offers <= module.offers and module.offers - offers <= {""}
    assert [entity.name for entity in module.entities] == entities


@pytest.mark.parametrize(
    "parameters",
    ["", "a", "a, b=1", "a, /, b", "*, a", "*args, a=None, **kw", "a, /, b, *, c='x'", "a=-1", "self, *rest"],
)
def test_signatures_are_as_inspect_prints_them(parameters):
    import ast

    code = f"def f({parameters}): pass"
    space: dict = {}
    exec(code, space)
    node = ast.parse(code).body[0]
    assert stdlib.signature_of(node.args) == str(inspect.signature(space["f"]))
    if parameters.startswith("self"):
        method = type("C", (), {"f": space["f"]})().f
        assert stdlib.signature_of(node.args, bound=True) == str(inspect.signature(method))


def test_a_name_bound_again_is_not_certain(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        "def a(x):\n    'Do it well.'\ntry:\n    from _m import a\nexcept ImportError:\n    pass\ndef b(): pass\n"
    )
    certain = {entity.name: entity.certain for entity in stdlib.read_module("m", path).entities}
    assert certain == {"a": False, "b": True}
    path.write_text("def a(x): pass\nfrom _m import *\n")
    assert not stdlib.read_module("m", path).entities[0].certain


def test_corrupted_signatures_are_near_and_wrong():
    assert library_facts.corrupted("(a, b, c=None)") == ("(a, b)", "(b, a, c=None)", "(a, b, c=True)")
    assert library_facts.corrupted("(a)") == ()
    assert "(a, *, b=True)" in library_facts.corrupted("(a, *, b=False)")


def test_unreadable_source_is_an_input_error(tmp_path):
    (tmp_path / "m.py").write_text("def (:\n")
    with pytest.raises(InputError, match="no readable Python source"):
        stdlib.read_module("m", tmp_path / "m.py")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reader": "web"}, "'auto', 'python-stdlib', 'toy-translation', 'toy-summary' or 'toy-sentiment'"),
        ({"emit": []}, "at least one of text, chat, preference"),
        ({"emit": ["text", "text"]}, "each once"),
        ({"emit": ["tokens"]}, "'text', 'chat', 'preference' or 'labelled'"),
        ({"validation_share": 1.0}, "less than 1"),
        ({"modules": ["json"]}, "modules belongs to reader: python-stdlib"),
        ({"include": []}, "at least 1 item"),
        ({"questions": {"facts": 0}}, "greater than or equal to 1"),
        ({"questions": {"phrasings": 9}}, "less than or equal to 8"),
        ({"questions": {"mix": {"module": -1.0}}}, "at least 0"),
        ({"questions": {"mix": {}}}, "one of them above 0"),
        ({"questions": {"mix": {"modul": 1.0}}}, "'module'"),
        ({"preference": {"validation_share": 0.0}}, "greater than 0"),
        ({"negative_twin": "yes"}, "'shuffled-answers'"),
        ({"colunm": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        DataParams.model_validate(wrong)
