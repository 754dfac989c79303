"""`rag` and the retrieval it shares: BM25 by hand, chunks that point back, citations, refusal, and their controls."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl import Artifact, InputError, TempFail, UsageError
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl.text.grounding import (
    REFUSAL,
    CitationFilter,
    attribute,
    citations,
    find_grounds,
    grounded_prompt,
    marks,
    quote,
)
from llmctl.text.retrieval import Chunk, Index, asked, read_chunks, terms
from llmctl_rag import RAG
from llmctl_rag.chunks import Chunker, sections, words
from llmctl_rag.params import RagParams

# Terms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("os.path.basename(p)", ["os.path.basename", "os", "path", "basenam", "p"]),
        ("OrderedDict.move_to_end", ["ordereddict.move_to_end", "ordereddict", "order", "dict"]
         + ["move_to_end", "move", "to", "end"]),
        ("HTTPServer serves", ["httpserver", "http", "server", "serv"]),
        ("Straße_nr naïve", ["straße_nr", "straße", "nr", "naïv"]),
        ("utf8 3.14", ["utf8", "utf", "8", "3.14", "3", "14"]),
        ("... -- !", []),
    ],
)  # fmt: skip
def test_terms_know_identifiers(text, expected):
    assert terms(text) == expected


def test_what_is_asked():
    assert asked("What does `move_to_end` do in the collections?") == {"move_to_end": 3, "collections": 1}
    assert asked("Is `any` like os.path?") == {"any": 3, "like": 1, "os.path": 3}
    assert asked("What is this?") == {"What": 1, "is": 1, "this": 1}
    assert asked("") == {}


# BM25


def chunk(number, text, document="", title=""):
    return Chunk(f"c{number}", document or f"d{number}", 0, len(text), text, title)


CORPUS = [
    chunk(0, "the cat sat on the mat with the other cat"),
    chunk(1, "dogs bark at a cat"),
    chunk(2, "a dog and a dog and a dog"),
    chunk(3, "nothing of that sort"),
    chunk(4, "json loads parses json text"),
]


def naive_bm25(query, documents, k1, b):
    """Robertson and Zaragoza's sum, with Lucene's idf, one term at a time."""
    counted = [Counter(terms(document)) for document in documents]
    mean = sum(sum(c.values()) for c in counted) / len(counted)
    scores = []
    for counts in counted:
        score = 0.0
        for term in set(query):
            n = sum(term in other for other in counted)
            idf = math.log(1 + (len(counted) - n + 0.5) / (n + 0.5))
            tf = counts[term]
            score += idf * tf / (tf + k1 * (1 - b + b * sum(counts.values()) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (1.2, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("question", ["cat", "dog cats mat", "parse JSON", "cat unicorn"])
def test_scores_are_bm25_by_hand(question, k1, b):
    index = Index.build(CORPUS, k1=k1, b=b)
    expected = naive_bm25(terms(question), [one.searched for one in CORPUS], k1, b)
    assert index.scores(question) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    found = [passage.chunk.id for passage in index.search(question, 5)]
    ranked = sorted((i for i in range(5) if expected[i] > 0), key=lambda i: -expected[i])
    assert found == [f"c{i}" for i in ranked]


def test_marked_names_count_three_times():
    index = Index.build(CORPUS)
    plain, marked = index.scores("cat dog"), index.scores("`cat` dog")
    assert marked == pytest.approx(plain + 2 * index.scores("cat"), rel=1e-5)


def test_nothing_is_found_without_common_words():
    index = Index.build(CORPUS)
    assert index.search("unicorn", 3) == []
    assert index.search("", 3) == []
    assert index.scores("?!").tolist() == [0] * 5


def test_a_document_contributes_only_so_much():
    same = [chunk(i, f"cat number {i}", document="d") for i in range(4)]
    same.append(chunk(9, "cat in a long other document of words"))
    for per_document in (1, 2, 9):
        index = Index.build(same, per_document=per_document)
        found = Counter(passage.chunk.document for passage in index.search("cat", 5))
        assert found == {"d": min(per_document, 4), "d9": 1}


def test_support_is_the_share_of_the_question_by_rarity():
    index = Index.build(CORPUS)
    idf = lambda n: math.log(1 + (5 - n + 0.5) / (n + 0.5))  # noqa: E731
    assert index.rarity("cat") == pytest.approx(idf(2))
    assert index.rarity("unicorn") == index.rarity("mat") == pytest.approx(idf(1))
    assert index.support("cat unicorn", "a cat") == pytest.approx(idf(2) ** 2 / (idf(2) ** 2 + idf(1) ** 2))
    assert index.support("cat `unicorn`", "a cat") == pytest.approx(idf(2) ** 2 / (idf(2) ** 2 + 9 * idf(1) ** 2))
    assert index.support("cats", "the cat") == 1.0
    # A dotted name needs all its parts in one place.
    assert index.support("json.loads", "json loads") == 1.0
    assert index.support("json.dump", "json loads") == 0.0
    assert index.support("", "a cat") == 0.0


def test_an_index_survives_being_saved(tmp_path):
    index = Index.build(CORPUS, k1=1.2, b=0.3, per_document=3)
    index.save(tmp_path / "a", documents=5)
    again = Index.load(tmp_path / "a")
    assert again.chunks == CORPUS == list(read_chunks(tmp_path / "a"))
    assert again.per_document == 3
    for question in ("cat", "dog json", "unicorn"):
        assert again.search(question, 5) == index.search(question, 5)
    assert again.scores("cat").tolist() == index.scores("cat").tolist()


def test_equal_chunks_give_equal_bytes_in_any_process(tmp_path):
    program = (
        "import sys; from pathlib import Path; from llmctl.text.retrieval import *;"
        "Index.build([Chunk('a', 'd', 0, 3, 'cat dog mouse horse'), Chunk('b', 'd', 0, 3, 'dog bird')])"
        ".save(Path(sys.argv[1]))"
    )
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin"}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / seed)], check=True, env=env)
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert "chunks.jsonl" in files
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_damaged_indexes_are_explained(tmp_path):
    with pytest.raises(InputError, match="holds no index"):
        Index.load(tmp_path / "nothing")
    Index.build(CORPUS).save(tmp_path / "a")
    chunks = tmp_path / "a" / "chunks.jsonl"
    lines = chunks.read_text().splitlines(keepends=True)
    chunks.write_text("".join(lines[:3]))
    with pytest.raises(InputError, match=r"damaged: its files count \[3, 5\] chunks"):
        Index.load(tmp_path / "a")
    chunks.write_text(lines[0] + "{broken")
    with pytest.raises(InputError, match=r"chunks.jsonl:2"):
        Index.load(tmp_path / "a")
    chunks.write_text("".join(lines))
    (tmp_path / "a" / "vocab.index.json").unlink()
    with pytest.raises(InputError, match="no readable index"):
        Index.load(tmp_path / "a")
    with pytest.raises(InputError, match="no words"):
        Index.build([chunk(0, "…")])


# Chunks

MARKDOWN = """Preface.

# One

First text. It goes on.

## One A

```
# no heading
```

More.

# Two
Last.
"""
CODE = '''"""About textual things."""
# a comment is no heading

def dedent(text):
    """Remove margins."""

class Wrapper:
    """Wraps."""

    def fill(self, width=(1,
                          2)):
        return width

def shorten(text): ...
'''


def test_sections_follow_headings_and_join_to_the_text():
    found = list(sections(MARKDOWN))
    assert [part.path for part in found] == [(), ("One",), ("One", "One A"), ("Two",)]
    assert "".join(MARKDOWN[part.start : part.end] for part in found) == MARKDOWN
    found = list(sections(CODE))
    assert [part.path for part in found] == [
        (), ("dedent",), ("Wrapper",), ("Wrapper", "fill"), ("shorten",)
    ]  # fmt: skip
    assert "".join(CODE[part.start : part.end] for part in found) == CODE


def check_chunks(text, chunks, count, limit):
    assert all(text[one.start : one.end] == one.text for one in chunks)
    assert all(one.text == one.text.strip() != "" for one in chunks)
    assert max(map(count, (one.text for one in chunks)), default=0) <= limit
    covered = {at for one in chunks for at in range(one.start, one.end)}
    assert all(char.isspace() or at in covered for at, char in enumerate(text))
    assert len({one.id for one in chunks}) == len(chunks)


@pytest.mark.parametrize("limit", [8, 20, 1000])
@pytest.mark.parametrize("text", [MARKDOWN, CODE, "", "  \n", "word " * 300, "x" * 500 + " y"])
def test_chunks_fit_cover_and_point_back(text, limit):
    count = len if limit == 20 else words
    check_chunks(text, Chunker(count, limit).chunks("d", text, "t"), count, limit)


@given(st.text(alphabet=st.sampled_from("ab #`\n.é☃def(:"), max_size=200), st.integers(1, 12))
def test_chunks_of_any_text(text, limit):
    check_chunks(text, Chunker(len, limit).chunks("d", text), len, limit)


def test_chunks_carry_where_they_stand():
    chunks = Chunker(words, 8).chunks("textwrap#0", CODE, "textwrap")
    titles = {one.title for one in chunks}
    assert any("textwrap.Wrapper.fill" in title for title in titles)
    assert any("textwrap.dedent" in title for title in titles)
    # Small neighbours share a chunk.
    assert len(Chunker(words, 1000).chunks("d", CODE)) == 1


def test_overlap_repeats_the_end_of_the_chunk_before():
    text = " ".join(f"w{i}" for i in range(60))
    plain, overlapped = Chunker(words, 10).chunks("d", text), Chunker(words, 10, 4).chunks("d", text)
    assert all(a.end < b.start for a, b in zip(plain[:-1], plain[1:], strict=True))
    assert all(a.end > b.start for a, b in zip(overlapped[:-1], overlapped[1:], strict=True))
    check_chunks(text, overlapped, words, 10)


# Answers with citations


def test_quotes_come_from_the_passage_and_cite_it():
    text = "Wraps text. The function dedent removes margins [2] of a[0][1]. And more."
    index = Index.build([chunk(0, text), *CORPUS[1:]])
    grounds = find_grounds(index, "What removes margins?", 3, 0.5)
    assert not grounds.refused
    # The mark in the text must not read as a citation.
    assert quote(index, grounds) == "The function dedent removes margins (2) of a[0][1]. [1]"
    refused = find_grounds(index, "What is a unicorn?", 3, 0.5)
    assert (refused.refused, refused.passages, quote(index, refused)) == (True, [], REFUSAL)
    assert find_grounds(index, "cat unicorn", 3, 0.9).refused
    assert not find_grounds(index, "cat unicorn", 3, 0.1).refused


def test_an_empty_index_of_matches_abstains():
    index = Index.build([chunk(0, "unrelated words")])
    assert find_grounds(index, "What does dedent do?", 5, 0.0).refused


def test_citations_that_stand_for_nothing_are_removed():
    index = Index.build(CORPUS)
    passages = index.search("cat", 2)
    assert attribute(index, "Yes [1], no [3], a[9], perhaps [2] [0].", passages) == "Yes [1], no , a[9], perhaps [2] ."
    assert [one.number for one in citations("[2] and [1] and [2]", passages)] == [2, 1]
    assert attribute(index, "dogs bark", passages).endswith(" [1]") is (passages[0].chunk.id == "c1")
    assert attribute(index, "unicorns", passages) == "unicorns"
    assert attribute(index, "", passages) == ""


@given(st.text(alphabet="[]123a ", max_size=30), st.randoms())
def test_the_filter_gives_the_same_in_any_parts(text, chance):
    whole = CitationFilter(2)
    expected = whole.add(text) + whole.flush()
    parts, at = CitationFilter(2), 0
    found = ""
    while at < len(text):
        size = chance.randint(1, 4)
        found += parts.add(text[at : at + size])
        at += size
    assert found + parts.flush() == expected


@given(st.lists(st.sampled_from(["[1]", "[2]", "[3]", "[12]", " a", "b[3]", "c[0][7]", ". "]), max_size=12))
def test_only_citations_that_resolve_are_left(pieces):
    text = "".join(pieces)
    cleaner = CitationFilter(2)
    shown = cleaner.add(text) + cleaner.flush()
    assert marks(shown) == [number for number in marks(text) if number in (1, 2)]


def test_marks():
    assert marks("[1] a[2] [3][4], b[0][1] (x)[5] ([6])") == [1, 3, 4, 6]


def test_the_prompt_holds_as_many_passages_as_fit(byte_tokenizer):
    index = Index.build(CORPUS)
    passages = index.search("cat dog", 3)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "cat?"}]
    sizes = []
    for room in range(20, 400, 20):
        prompt = grounded_prompt(messages, passages, byte_tokenizer, room)
        assert len(prompt.ids) <= room
        assert prompt.passages == passages[: len(prompt.passages)]
        text = byte_tokenizer.decode(prompt.ids)
        assert all(f"[{n}] {p.chunk.text}" in text for n, p in enumerate(prompt.passages, start=1))
        sizes.append(len(prompt.passages))
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (0, 3)


# The stage

MODULES = {
    "textwrap": ("dedent", "Remove common leading whitespace from every line."),
    "json": ("loads", "Parse a document into objects."),
    "math": ("gcd", "The greatest common divisor of integers."),
    "gzip": ("compress", "Pack data into a smaller form."),
    "shutil": ("copytree", "Copy a whole directory recursively."),
    "heapq": ("heappush", "Put an item onto the heap."),
}


@pytest.fixture
def corpus(tmp_path):
    with DatasetWriter(tmp_path / "text", "dataset.text") as writer:
        for i, (module, (name, doc)) in enumerate(MODULES.items()):
            text = f"# {module}\n\nA module.\n\n## {name}\n\nThe function `{name}` of {module}. {doc}\n"
            writer.add("validation" if i == 0 else "train", {"id": f"{module}#0", "source": module, "text": text})
    return Artifact(tmp_path / "text", "dataset.text")


def write_questions(directory, shuffled=False):
    names = list(MODULES)
    documents = names[1:] + names[:1] if shuffled else names
    with DatasetWriter(directory, "dataset.chat") as writer:
        for i, (module, (name, _)) in enumerate(MODULES.items()):
            for n, form in enumerate((f"Which module provides `{name}`?", f"What does `{name}` do?")):
                messages = [{"role": "user", "content": form}, {"role": "assistant", "content": module}]
                row = {"id": f"{module}/{n}", "messages": messages, "kind": "module", "entity": name}
                writer.add("validation", {**row, "document": f"{documents[i]}#0"})
        for name in ("frobnicate", "json.gcd", "unzip_all"):
            messages = [{"role": "user", "content": f"What does `{name}` do?"}, {"role": "assistant", "content": "?"}]
            writer.add("unanswerable", {"id": name, "messages": messages, "kind": "unanswerable", "document": ""})
    return Artifact(directory, "dataset.chat")


@pytest.fixture
def questions(tmp_path):
    return write_questions(tmp_path / "questions")


def test_everything_is_found_cited_and_nonsense_refused(tmp_path, corpus, questions):
    result = run_stage(RAG, tmp_path / "out", {"chunk_tokens": 16, "top_k": 2}, text=corpus, questions=questions)
    m = result.metrics
    assert m["recall@2.value"] == m["recall@2.source"] == 1.0
    assert m["mrr.value"] == 1.0
    assert m["recall@2.n"] == 12
    assert m["citations.resolved"] == 1.0
    assert m["citations.n"] == 12
    assert m["citations.right_document"] == 1.0
    assert (m["refusal.value"], m["refusal.n"], m["refusal.answerable"]) == (1.0, 3, 0.0)
    samples = [json.loads(line) for line in (result.outputs["metrics"] / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 15
    ids = {one.id for one in read_chunks(result.outputs["index"].path)}
    assert all(cited["id"] in ids for sample in samples for cited in sample["citations"])
    assert samples[-1]["answer"] == REFUSAL
    documents = (result.outputs["index"] / "documents.jsonl").read_text().splitlines()
    assert len(documents) == m["documents"] == 6
    assert result.outputs["index"].metadata["chunks"] == m["chunks"]


def test_shuffled_relevance_is_at_chance(tmp_path, corpus):
    shuffled = write_questions(tmp_path / "shuffled", shuffled=True)
    m = run_stage(RAG, tmp_path / "out", {"top_k": 1}, text=corpus, questions=shuffled).metrics
    assert m["recall@1.value"] == m["mrr.value"] == m["citations.right_document"] == 0
    m = run_stage(RAG, tmp_path / "all", {"top_k": 20}, text=corpus, questions=shuffled).metrics
    assert m["recall@20.value"] < 1  # chunks without a common word are not found at any k


def test_refusal_follows_its_threshold(tmp_path, corpus, questions):
    def refusals(threshold):
        params = {"refuse_below": threshold}
        m = run_stage(RAG, tmp_path / str(threshold), params, text=corpus, questions=questions).metrics
        return m["refusal.value"], m["refusal.answerable"]

    assert refusals(0.5) == (1.0, 0.0)
    # Without a threshold only what shares no word with any chunk is refused: `frobnicate` and `unzip_all`.
    assert refusals(0.0) == (pytest.approx(2 / 3), 0.0)
    strict = refusals(1.0)
    assert strict[0] == 1.0
    assert strict[1] > 0  # no chunk "provides" anything


def test_the_index_alone_needs_no_questions(tmp_path, corpus):
    result = run_stage(RAG, tmp_path / "out", text=corpus)
    assert set(result.metrics) == {"chunks", "documents"}
    assert Index.load(result.outputs["index"]).search("gcd", 1)[0].chunk.document == "math#0"
    one = run_stage(RAG, tmp_path / "one", {"split": "validation"}, text=corpus)
    assert one.metrics["documents"] == 1


def test_the_models_tokens_limit_the_chunks(tmp_path, corpus, model_dir, byte_tokenizer):
    model = Artifact(model_dir, "model.hf")
    result = run_stage(RAG, tmp_path / "out", {"chunk_tokens": 24, "chunk_overlap": 6}, text=corpus, model=model)
    chunks = list(read_chunks(result.outputs["index"].path))
    assert max(len(byte_tokenizer.encode(one.text)) for one in chunks) <= 24
    described = json.loads((result.outputs["index"] / "index.json").read_text())
    assert described["settings"]["tokenizer"] == byte_tokenizer.digest
    assert described["settings"]["chunk_overlap"] == 6


def test_a_model_writes_the_answers(tmp_path, corpus, questions, model_dir, byte_tokenizer, opens, scripted):
    # The scripted model answers by what stands in its prompt: a planted counterfactual changes the answer.
    script = {"greatest common divisor": "a divisor [1] [8]", "most ancient cat": "a cat"}
    generator = scripted(byte_tokenizer, script, default="hm", context_length=400)
    opens({model_dir: generator})
    params = {"answers": "model", "max_new_tokens": 40, "chunk_tokens": 120, "top_k": 1}
    model = Artifact(model_dir, "model.onnx")
    result = run_stage(RAG, tmp_path / "out", params, text=corpus, questions=questions, model=model)

    def answers(result):
        lines = (result.outputs["metrics"] / "samples.jsonl").read_text().splitlines()
        return {sample["id"]: sample["answer"] for sample in map(json.loads, lines)}

    assert answers(result)["math/1"] == "a divisor [1]"
    assert answers(result)["json/1"] == "hm"
    assert result.metrics["citations.resolved"] == 1.0
    assert result.metrics["citations.n"] == 2
    with DatasetWriter(tmp_path / "planted", "dataset.text") as writer:
        writer.add("train", {"id": "math#0", "source": "math", "text": "The function `gcd` is a most ancient cat."})
    planted = Artifact(tmp_path / "planted", "dataset.text")
    changed = run_stage(RAG, tmp_path / "out2", params, text=planted, questions=questions, model=model)
    assert answers(changed)["math/1"] == "a cat [1]"


def test_a_model_that_does_not_see_the_passages(
    tmp_path, corpus, questions, model_dir, byte_tokenizer, opens, scripted
):
    opens({model_dir: scripted(byte_tokenizer, {"A module": "saw a passage", "gcd": "math", "loads": "cheese"})})
    params = {"answers": "closed-book", "chunk_tokens": 200}
    model = Artifact(model_dir, "model.onnx")
    result = run_stage(RAG, tmp_path / "out", params, text=corpus, questions=questions, model=model)
    lines = (result.outputs["metrics"] / "samples.jsonl").read_text().splitlines()
    answers = {sample["id"]: sample["answer"] for sample in map(json.loads, lines)}
    assert answers["math/0"] == "math [1]"  # its passage is the one that knows the word
    assert answers["json/0"] == "cheese"  # nothing supports it
    assert answers["frobnicate"] == REFUSAL


def test_questions_without_room_for_a_passage_are_refused(
    tmp_path, corpus, questions, model_dir, byte_tokenizer, opens, scripted
):
    opens({model_dir: scripted(byte_tokenizer, context_length=100)})
    params = {"answers": "model", "max_new_tokens": 40, "chunk_tokens": 120}
    m = run_stage(
        RAG, tmp_path / "out", params, text=corpus, questions=questions, model=Artifact(model_dir, "model.onnx")
    ).metrics
    assert m["refusal.answerable"] == 1.0


def test_equal_inputs_give_equal_indexes(tmp_path, corpus):
    first, second = (run_stage(RAG, tmp_path / name, text=corpus).outputs["index"].path for name in ("a", "b"))
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_mistakes_are_explained(tmp_path, corpus, questions):
    with pytest.raises(UsageError, match="answers: model needs a model"):
        run_stage(RAG, tmp_path / "a", {"answers": "model"}, text=corpus)
    with pytest.raises(ValueError, match="must be below chunk_tokens"):
        RagParams(chunk_tokens=10, chunk_overlap=10)
    with DatasetWriter(tmp_path / "twice", "dataset.text") as writer:
        for _ in range(2):
            writer.add("train", {"id": "x", "text": "some text"})
    with pytest.raises(InputError, match="stands twice"):
        run_stage(RAG, tmp_path / "b", text=Artifact(tmp_path / "twice", "dataset.text"))
    with DatasetWriter(tmp_path / "empty", "dataset.text") as writer:
        writer.add("train", {"id": "x", "text": "  "})
    with pytest.raises(InputError, match="no text to index"):
        run_stage(RAG, tmp_path / "c", text=Artifact(tmp_path / "empty", "dataset.text"))
    with pytest.raises(InputError, match="no question in split"):
        run_stage(RAG, tmp_path / "d", {"split": "validation", "questions_split": "unanswerable"}, text=corpus,
                  questions=questions)  # fmt: skip
    with pytest.raises(InputError, match="no split `test`"):
        run_stage(RAG, tmp_path / "e", {"questions_split": "test"}, text=corpus, questions=questions)


def test_stopping(tmp_path, corpus, questions, monkeypatch):
    import llmctl_rag.run

    monkeypatch.setattr(llmctl_rag.run, "EVERY", 2)
    with pytest.raises(TempFail):
        run_stage(RAG, tmp_path / "out", stop_after=1, text=corpus, questions=questions)


def test_every_parameter_is_read():
    from pathlib import Path

    import llmctl_rag

    source = "".join(p.read_text() for p in Path(llmctl_rag.__file__).parent.glob("*.py") if p.name != "params.py")
    for name in RagParams.model_fields:
        assert f"params.{name}" in source, name
