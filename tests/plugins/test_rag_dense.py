"""`rag` by meaning: cosines and fused ranks by hand, planted paraphrases, encoders that fit an index and others."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from llmctl import Artifact, InputError, TempFail, UsageError
from llmctl.encoders import open_text_encoder
from llmctl.registry import get_registry
from llmctl.spec.diagnostics import SpecError
from llmctl.spec.pipeline import load_pipeline
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl.text.dense import Dense, DenseSettings, reciprocal_rank_fusion, unit
from llmctl.text.retrieval import Chunk, Index, terms
from llmctl.text.vectors import Vectors, load
from llmctl_embed import EMBED
from llmctl_rag import RAG
from llmctl_rag.commands import search
from llmctl_rag.params import RagParams

TOPICS, WORDS = 12, 6
SYLLABLES = [a + b for a in "bdfgklmnprtvz" for b in "aeiou"]


def spelled(count):
    """So many words of three syllables, whose stems differ."""
    drawn, found = random.Random(3), {}
    while len(found) < count:
        word = "".join(drawn.choice(SYLLABLES) for _ in range(3)) + "x"
        found.setdefault(terms(word)[0], word)
    return list(found.values())


ALL = spelled(TOPICS * WORDS * 2 + TOPICS)
WRITTEN = [ALL[t * WORDS : (t + 1) * WORDS] for t in range(TOPICS)]
"""Words of each topic that stand in documents."""
ASKED = [ALL[(TOPICS + t) * WORDS : (TOPICS + t + 1) * WORDS] for t in range(TOPICS)]
"""Words of each topic that stand in questions: other ones."""
NAMES = ALL[2 * TOPICS * WORDS :]
"""A name in each document that stands nowhere else."""


def train(directory, shuffled=False):
    """Vectors of words that were read side by side; `shuffled` pairs the halves of topics at random."""
    drawn = random.Random(0)
    directory.mkdir()
    lines = []
    for _ in range(4000):
        topic = drawn.randrange(TOPICS)
        other = drawn.randrange(TOPICS) if shuffled else topic
        words = drawn.sample(WRITTEN[topic], 3) + drawn.sample(ASKED[other], 3)
        drawn.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words)}) + "\n")
    (directory / "text.jsonl").write_text("".join(lines))
    text = Artifact(directory / "text.jsonl", "dataset.text")
    params = {"vector_size": 24, "epochs": 3, "sample": 0.0, "seed": 1}
    return run_stage(EMBED, directory / "out", params, text=text).outputs["vectors"]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    return train(tmp_path_factory.mktemp("vectors") / "v")


@pytest.fixture
def corpus(tmp_path):
    drawn = random.Random(1)
    with DatasetWriter(tmp_path / "text", "dataset.text") as writer:
        for topic in range(TOPICS):
            words = [drawn.choice(WRITTEN[topic]) for _ in range(20)]
            writer.add("train", {"id": f"d{topic}", "text": " ".join([NAMES[topic], *words])})
    return Artifact(tmp_path / "text", "dataset.text")


def write_questions(directory, said, shift=0):
    with DatasetWriter(directory, "dataset.chat") as writer:
        for topic, text in enumerate(said):
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "-"}]
            writer.add("validation", {"id": topic, "messages": messages, "document": f"d{(topic + shift) % TOPICS}"})
        messages = [{"role": "user", "content": "quixotic?"}, {"role": "assistant", "content": "-"}]
        writer.add("unanswerable", {"id": "u", "messages": messages, "document": ""})
    return Artifact(directory, "dataset.chat")


@pytest.fixture
def paraphrases(tmp_path):
    return write_questions(tmp_path / "paraphrases", [" ".join(words[:4]) for words in ASKED])


@pytest.fixture
def exact(tmp_path):
    return write_questions(tmp_path / "exact", [f"`{name}`" for name in NAMES])


def measured(folder, corpus, questions, retrieval, encoder, **params):
    given = {"retrieval": retrieval, "top_k": 1, **params}
    inputs = {} if retrieval == "lexical" else {"encoder": encoder}
    return run_stage(RAG, folder, given, text=corpus, questions=questions, **inputs)


@pytest.mark.parametrize(("retrieval", "by_meaning", "by_name"), [("lexical", 0, 1), ("dense", 1, 0), ("hybrid", 1, 1)])
def test_each_way_finds_its_own_and_hybrid_both(
    tmp_path, corpus, vectors, paraphrases, exact, retrieval, by_meaning, by_name
):
    for questions, expected, name in ((paraphrases, by_meaning, "meaning"), (exact, by_name, "name")):
        m = measured(tmp_path / name, corpus, questions, retrieval, vectors).metrics
        assert m["recall@1.value"] == m["mrr.value"] == m["ndcg@1.value"] == expected
        assert m["refusal.answerable"] == 1 - expected  # what is found by its meaning is not refused
        assert m["refusal.value"] == 1.0
        if expected:
            assert m["citations.right_document"] == 1.0


def test_vectors_that_pair_topics_at_random_find_nothing(tmp_path, corpus, paraphrases):
    shuffled = train(tmp_path / "shuffled", shuffled=True)
    m = measured(tmp_path / "out", corpus, paraphrases, "dense", shuffled).metrics
    assert m["recall@1.value"] < 0.4  # chance: 1 of 12


def test_shuffled_relevance_is_at_chance(tmp_path, corpus, vectors):
    wrong = write_questions(tmp_path / "wrong", [" ".join(words[:4]) for words in ASKED], shift=1)
    m = measured(tmp_path / "out", corpus, wrong, "hybrid", vectors).metrics
    assert m["recall@1.value"] == m["ndcg@1.value"] == 0


def by_hand(vectors, text):
    """The mean of unit vectors, weighted by a/(a + p), as Arora et al. write it."""
    total = sum(vectors.info["counts"])
    found = np.zeros(vectors.matrix.shape[1])
    for word in text.lower().split():
        if word in vectors.names:
            row = vectors.names.index(word)
            vector = vectors.matrix[row].astype(np.float64)
            found += vector / np.linalg.norm(vector) * 1e-3 / (1e-3 + vectors.info["counts"][row] / total)
    return found / (np.linalg.norm(found) or 1)


def test_cosines_are_those_of_every_pair_by_hand(tmp_path, corpus, vectors):
    out = run_stage(RAG, tmp_path / "o", {"retrieval": "dense", "chunk_tokens": 8}, text=corpus, encoder=vectors)
    index = Index.load(out.outputs["index"], open_text_encoder(vectors))
    assert len(index.chunks) > 2 * TOPICS
    known = load(vectors.path)
    for question in (f"{ASKED[0][0]} {ASKED[3][1]}", WRITTEN[5][2]):
        asked = by_hand(known, question)
        cosines = [float(by_hand(known, chunk.searched) @ asked) for chunk in index.chunks]
        assert index.dense.cosines(question) == pytest.approx(cosines, abs=1e-5)
        ranked = sorted(range(len(cosines)), key=lambda i: -cosines[i])
        expected = [index.chunks[i].id for i in ranked if cosines[i] > 0]
        index.per_document = len(index.chunks)
        found = index.search(question, len(index.chunks))
        assert [passage.chunk.id for passage in found] == expected
        assert [passage.score for passage in found] == pytest.approx(
            [cosines[i] for i in ranked][: len(found)], abs=1e-5
        )


def test_ranks_are_fused_as_cormack_writes_it():
    first, second = np.array([3.0, 0.0, 2.0, 2.0, 1.0]), np.array([-1.0, 0.5, 0.4, 0.9, 0.0])
    ranks = [{0: 1, 2: 2, 3: 3, 4: 4}, {3: 1, 1: 2, 2: 3}]
    expected = [sum(1 / (60 + one[i]) for one in ranks if i in one) for i in range(5)]
    assert reciprocal_rank_fusion([first, second], 60).tolist() == pytest.approx(expected)
    # Found first by both wins at any k; a single first place can win over two middling ones at a small one.
    one, both = np.array([1.0, 0.9, 0.8, 0.7]), np.array([0.0, 0.5, 0.9, 0.8])
    assert reciprocal_rank_fusion([one, both], 60).argmax() == 2
    assert reciprocal_rank_fusion([one, both], 0).tolist() == pytest.approx(
        [1, 1 / 2 + 1 / 3, 1 / 3 + 1, 1 / 4 + 1 / 2]
    )


def test_recall_rank_and_gain_are_scikit_learns(tmp_path, corpus, vectors):
    metrics = pytest.importorskip("sklearn.metrics")
    # Questions about two topics: the right document is first or second.
    said = [f"{ASKED[t][0]} {ASKED[(t + 1) % TOPICS][1]} {ASKED[(t + 1) % TOPICS][2]}" for t in range(TOPICS)]
    questions = write_questions(tmp_path / "two", said)
    five, one = (
        measured(tmp_path / str(k), corpus, questions, "dense", vectors, top_k=k, similar_above=-1.0) for k in (5, 1)
    )
    index = Index.load(five.outputs["index"], open_text_encoder(vectors))
    relevant, scores = np.eye(TOPICS), np.stack([index.dense.cosines(text) for text in said])
    expected = metrics.ndcg_score(relevant, scores, k=5)
    assert 0.3 < expected < 0.99
    assert five.metrics["ndcg@5.value"] == pytest.approx(expected)
    for result, k in ((five, 5), (one, 1)):
        recall = metrics.top_k_accuracy_score(np.arange(TOPICS), scores, k=k)
        assert result.metrics[f"recall@{k}.value"] == pytest.approx(recall)
    assert one.metrics["recall@1.value"] < five.metrics["recall@5.value"] == 1.0  # so that no rank is cut off
    precision = metrics.label_ranking_average_precision_score(relevant, scores)
    assert five.metrics["mrr.value"] == pytest.approx(precision)


def test_the_first_by_words_and_the_first_by_meaning_are_equal_and_the_cosine_decides(tmp_path):
    Vectors(["login", "password"], np.ones((2, 3), np.float32)).save(tmp_path / "v")
    encoder = open_text_encoder(Artifact(tmp_path / "v", "embeddings"))
    texts = ["a working day", "a forgotten password"]
    chunks = [Chunk(str(n), str(n), 0, len(text), text) for n, text in enumerate(texts)]
    dense = Dense(unit(encoder.embed([one.searched for one in chunks])), encoder, DenseSettings("hybrid", 0.5, 60.0))
    found = Index.build(chunks, dense=dense).search("my login does not work", 2)
    assert [(passage.chunk.id, passage.score) for passage in found] == [("1", 1 / 61), ("0", 1 / 61)]


def test_settings_are_kept_and_matter(tmp_path, corpus, vectors, paraphrases):
    strict = measured(tmp_path / "a", corpus, paraphrases, "dense", vectors, similar_above=1.0)
    assert strict.metrics["refusal.answerable"] == 1.0
    params = {"retrieval": "hybrid", "rrf_k": 3.0, "similar_above": 0.25}
    index = run_stage(RAG, tmp_path / "b", params, text=corpus, encoder=vectors).outputs["index"]
    settings = json.loads((index / "index.json").read_text())["dense"]
    assert settings == {"retrieval": "hybrid", "rrf_k": 3.0, "similar_above": 0.25, "dim": 24}
    opened = Index.load(index, open_text_encoder(vectors))
    assert opened.search(NAMES[4], 1)[0].score == pytest.approx(1 / 4)


def test_equal_inputs_give_equal_indexes(tmp_path, corpus, vectors):
    first, second = (
        run_stage(RAG, tmp_path / n, {"retrieval": "dense"}, text=corpus, encoder=vectors).outputs["index"].path
        for n in "ab"
    )
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_what_an_index_needs_is_said(tmp_path, corpus, vectors):
    for retrieval, given, problem in (
        ("dense", {}, "retrieval: dense needs an encoder"),
        ("lexical", {"encoder": vectors}, "`encoder` has no effect with retrieval: lexical"),
    ):
        with pytest.raises(UsageError, match=problem):
            run_stage(RAG, tmp_path / "x", {"retrieval": retrieval}, text=corpus, **given)
    index = run_stage(RAG, tmp_path / "o", {"retrieval": "dense"}, text=corpus, encoder=vectors).outputs["index"]
    encoder = open_text_encoder(vectors)
    with pytest.raises(InputError, match="finds by meaning and needs the encoder"):
        Index.load(index)
    plain = run_stage(RAG, tmp_path / "p", text=corpus).outputs["index"]
    with pytest.raises(UsageError, match="finds by words alone, an encoder has no effect"):
        Index.load(plain, encoder)
    known = load(vectors.path)
    for name, matrix, problem in (
        ("narrow", known.matrix[:, :20], "has vectors of 24 numbers, the encoder gives 20"),
        ("turned", known.matrix[::-1], "was made with another encoder: a chunk has a cosine of"),
    ):
        Vectors(known.names, matrix, known.info).save(tmp_path / name)
        other = open_text_encoder(Artifact(tmp_path / name, "embeddings"))
        with pytest.raises(InputError, match=problem):
            Index.load(index, other)
    damaged = shutil.copytree(index.path, tmp_path / "damaged")
    (damaged / "chunks.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="holds no readable vectors"):
        Index.load(damaged, encoder)


def test_vectors_that_cannot_be_used_are_refused(tmp_path, corpus, vectors):
    known = load(vectors.path)
    rows = [{"id": name} for name in known.names]
    Vectors(known.names, known.matrix, {}, rows).save(tmp_path / "texts")
    with pytest.raises(InputError, match="holds vectors of texts"):
        open_text_encoder(Artifact(tmp_path / "texts", "embeddings"))
    Vectors(["of", "another", "language"], known.matrix[:3]).save(tmp_path / "other")
    given = Artifact(tmp_path / "other", "embeddings")
    with pytest.raises(InputError, match="no chunk has a word that the encoder knows"):
        run_stage(RAG, tmp_path / "o", {"retrieval": "dense"}, text=corpus, encoder=given)
    Vectors([NAMES[0], *WRITTEN[0]], known.matrix[:7]).save(tmp_path / "few")
    few = Artifact(tmp_path / "few", "embeddings")
    events = run_stage(RAG, tmp_path / "f", {"retrieval": "dense"}, text=corpus, encoder=few).events
    assert any("11 of 12 chunks have no known word" in str(event) for _, event in events)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_vectors_that_are_no_numbers_are_refused(tmp_path, corpus, vectors, monkeypatch, wrong):
    encoder = open_text_encoder(vectors)
    embed = encoder.embed

    def damaged(texts):
        found = embed(texts).copy()
        found[1, 2] = wrong
        return found

    index = run_stage(RAG, tmp_path / "o", {"retrieval": "dense"}, text=corpus, encoder=vectors).outputs["index"]
    monkeypatch.setattr(encoder, "embed", damaged)
    monkeypatch.setattr("llmctl_rag.run.open_text_encoder", lambda *_: encoder)
    with pytest.raises(InputError, match="gives 1 of 12 chunks vectors with NaN or infinity"):
        run_stage(RAG, tmp_path / "x", {"retrieval": "dense"}, text=corpus, encoder=vectors)
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match="made with another encoder"):
        Index.load(index, encoder)


SPEC = """llmctl: 1
name: t
stages:
  data: {{uses: data}}
  rag: {{uses: rag, inputs: {{text: data{inputs}}}, with: {{{params}}}}}
"""


@pytest.mark.parametrize(
    ("inputs", "params", "code", "message"),
    [
        (
            "",
            "retrieval: hybrid",
            "E124",
            "required input `encoder` (model.onnx or model.hf or embeddings) of `rag` is missing: "
            "`retrieval: hybrid` needs it",
        ),
        (
            "",
            "answers: model",
            "E124",
            "required input `model` (model.onnx or model.hf) of `rag` is missing: `answers: model` needs it",
        ),
        (", encoder: ./v", "top_k: 2", "E102", "the input `encoder` of `rag` has no effect with `retrieval: lexical`"),
    ],
)
def test_check_knows_before_anything_runs(tmp_path, monkeypatch, inputs, params, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(SPEC.format(inputs=inputs, params=params))
    with pytest.raises(SpecError) as caught:
        load_pipeline("spec.yaml", registry=get_registry())
    assert [(found.code, found.message) for found in caught.value.diagnostics] == [(code, message)]
    (tmp_path / "spec.yaml").write_text(SPEC.format(inputs=", encoder: ./v", params="retrieval: dense"))
    assert load_pipeline("spec.yaml", registry=get_registry()).stages["rag"].params.retrieval == "dense"


@pytest.mark.parametrize(
    ("params", "idle"),
    [
        ({"similar_above": 0.9}, "similar_above"),
        ({"rrf_k": 1.0}, "rrf_k"),
        ({"retrieval": "dense", "rrf_k": 1.0}, "rrf_k"),
        ({"retrieval": "dense", "k1": 1.2}, "k1"),
        ({"retrieval": "dense", "b": 0.75}, "b"),
    ],
)
def test_settings_without_effect_are_refused(params, idle):
    with pytest.raises(ValueError, match=f"{idle} has no effect with retrieval"):
        RagParams(**params)


def test_stopping_while_chunks_are_embedded(tmp_path, corpus, vectors, monkeypatch):
    import llmctl_rag.run

    monkeypatch.setattr(llmctl_rag.run, "EMBEDDED", 2)
    with pytest.raises(TempFail):
        run_stage(RAG, tmp_path / "o", {"retrieval": "dense"}, stop_after=1, text=corpus, encoder=vectors)


def test_a_question_on_the_command_line(tmp_path, corpus, vectors):
    def said(*arguments):
        return (
            CliRunner()
            .invoke(search, [str(one) for one in arguments], catch_exceptions=False, standalone_mode=False)
            .output
        )

    index = run_stage(RAG, tmp_path / "o", {"retrieval": "hybrid"}, text=corpus, encoder=vectors).outputs["index"].path
    asked = " ".join(ASKED[7][:3])
    (found,) = json.loads(said(index, asked, "--encoder", vectors.path, "--top", 2, "--format", "json"))
    assert found["question"] == asked
    assert [one["document"] for one in found["passages"]][0] == "d7"
    assert found["passages"][0]["support"] == 1.0
    table = said(index, asked, "quixotic", "--encoder", vectors.path, "--top", 1)
    assert "d7/0" in table.splitlines()[2]
    assert table.splitlines()[-1] == "nothing found"
    with pytest.raises(InputError, match="needs the encoder"):
        said(index, asked)


# Encoders of texts


torch = pytest.importorskip("torch")


def make_encoder(directory, seed, write_tokenizer, context=64):
    """A small BERT with random weights over bytes, pooled by its mean."""
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer
    from llmctl.text.pooling import write_pooling

    torch.manual_seed(seed)
    tokenizer = write_tokenizer(directory.with_name("tokenizer"))
    config = ModelConfig(
        arch="bert",
        token_types=2,
        vocab_size=262,
        dim=32,
        layers=2,
        heads=2,
        context=context,
        pad_id=2,
        head="features",
    )
    save_model(Transformer(config), directory, tokenizer)
    write_pooling(directory, "mean", 32, context)
    return Artifact(directory, "model.hf")


def test_an_encoder_gives_chunks_the_vectors_that_embed_gives_them(tmp_path, corpus, write_tokenizer):
    encoder = make_encoder(tmp_path / "encoder", 0, write_tokenizer)
    params = {"retrieval": "dense", "chunk_tokens": 40}
    result = run_stage(RAG, tmp_path / "o", params, text=corpus, encoder=encoder)
    index = Index.load(result.outputs["index"], open_text_encoder(encoder))
    described = json.loads((result.outputs["index"] / "index.json").read_text())
    assert described["settings"]["unit"] == "tokens"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": one.id, "text": one.searched}) + "\n" for one in index.chunks))
    made = run_stage(
        EMBED, tmp_path / "e", {"method": "encode"}, text=Artifact(rows, "dataset.text"), model=encoder
    ).outputs["vectors"]
    assert np.abs(load(made.path).matrix - index.dense.matrix).max() < 1e-6
    assert index.search(index.chunks[9].searched, 1)[0].chunk.id == index.chunks[9].id


WITHOUT_TORCH = """
import sys
from pathlib import Path
sys.modules["torch"] = None
from llmctl import Artifact
from llmctl.encoders import open_text_encoder
from llmctl.text.retrieval import Index
index = Index.load(Path(sys.argv[1]), open_text_encoder(Artifact(Path(sys.argv[2]), "model.onnx"), "cpu", 1))
print(*(passage.chunk.id for passage in index.search(sys.argv[3], 3)))
"""


def test_its_export_belongs_to_the_index_and_other_weights_do_not(tmp_path, corpus, write_tokenizer):
    pytest.importorskip("onnx")
    from llmctl_export_onnx import EXPORT_ONNX

    encoder = make_encoder(tmp_path / "encoder", 0, write_tokenizer)
    params = {"retrieval": "hybrid", "chunk_tokens": 40}
    index = run_stage(RAG, tmp_path / "o", params, text=corpus, encoder=encoder).outputs["index"]
    bundle = run_stage(EXPORT_ONNX, tmp_path / "b", {"parity_prompts": 2, "threads": 1}, model=encoder).outputs["model"]
    by_torch, by_onnx = (Index.load(index, open_text_encoder(one, "cpu", 1)) for one in (encoder, bundle))
    for question in (ASKED[0][0], WRITTEN[3][1]):
        assert by_onnx.dense.cosines(question) == pytest.approx(by_torch.dense.cosines(question), abs=1e-5)
    other = make_encoder(tmp_path / "other", 1, write_tokenizer)
    with pytest.raises(InputError, match="was made with another encoder"):
        Index.load(index, open_text_encoder(other))
    given = [str(index.path), str(bundle.path), ASKED[0][0]]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *given], capture_output=True, text=True)
    assert done.stdout.split() == [one.chunk.id for one in by_onnx.search(ASKED[0][0], 3)], done.stderr


def test_chunks_beyond_the_encoders_context_are_cut_and_counted(tmp_path, corpus, write_tokenizer, model_dir):
    encoder = make_encoder(tmp_path / "encoder", 0, write_tokenizer, context=24)
    model = Artifact(model_dir, "model.hf")
    events = run_stage(RAG, tmp_path / "o", {"retrieval": "dense"}, text=corpus, encoder=encoder, model=model).events
    assert any("longer than the encoder reads and were cut" in str(event) for _, event in events)
    opened = open_text_encoder(encoder)
    long = opened.embed(["abcdefgh" * 10])[0]
    assert opened.cut == 1
    # BOS, 22 bytes and the end, as the text that just fits.
    assert np.abs(long - opened.embed([("abcdefgh" * 10)[:22]])[0]).max() < 1e-6
    assert opened.cut == 1
    assert math.isclose(float(np.linalg.norm(long)), 1, abs_tol=1e-6)


LONG = "abcdefgh" * 10


def say_longest(encoder, **entries):
    path = encoder.path / "sentence_bert_config.json"
    path.write_text(json.dumps({"do_lower_case": False, **entries}))


def framing_encoder(directory, write_tokenizer):
    """One whose tokenizer puts its special tokens around a text by itself, as BERT's do."""
    import tokenizers

    encoder = make_encoder(directory, 0, write_tokenizer)
    file = str(encoder.path / "tokenizer.json")
    raw = tokenizers.Tokenizer.from_file(file)
    first, last = raw.id_to_token(0), raw.id_to_token(1)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, 0), (last, 1)]
    )
    raw.save(file)
    return encoder


def test_a_sentence_encoder_reads_as_much_as_its_max_seq_length_says(tmp_path, write_tokenizer):
    """Cut as transformers' tokenizer cuts at `max_length`, which is what sentence-transformers calls."""
    transformers = pytest.importorskip("transformers")
    encoder = framing_encoder(tmp_path / "encoder", write_tokenizer)
    say_longest(encoder, max_seq_length=12)
    opened = open_text_encoder(encoder)
    found = opened.embed([LONG, "abc"])
    assert opened.cut == 1
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(encoder.path)
    ids = tokenizer(LONG, truncation=True, max_length=12)["input_ids"]
    assert len(ids) == 12
    model = transformers.AutoModel.from_pretrained(encoder.path).eval()
    with torch.inference_mode():
        truth = model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
    assert np.abs(found[0] - truth / np.linalg.norm(truth)).max() < 1e-5
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in (LONG, "abc")))
    text = Artifact(rows, "dataset.text")
    made = run_stage(EMBED, tmp_path / "e", {"method": "encode"}, text=text, model=encoder)
    assert np.abs(load(made.outputs["vectors"].path).matrix - found).max() < 1e-6
    assert (made.metrics["cut"], made.metrics["too_long"]) == (1, 0)
    say_longest(encoder, max_seq_length=20)
    assert np.abs(open_text_encoder(encoder).embed([LONG]) - found[0]).max() > 1e-3
    say_longest(encoder, max_seq_length=999)  # no more than the context
    assert open_text_encoder(encoder).embed([LONG]).shape == (1, 32)


def test_who_names_no_length_has_that_of_its_tokenizer_or_the_context(tmp_path, write_tokenizer):
    from llmctl.text.pooling import read_longest

    encoder = make_encoder(tmp_path / "encoder", 0, write_tokenizer)
    config = encoder.path / "tokenizer_config.json"
    known = json.loads(config.read_text())
    for said, longest in ((16, 16), (int(1e30), None), (1e30, None)):
        say_longest(encoder)
        config.write_text(json.dumps({**known, "model_max_length": said}))
        assert read_longest(encoder.path) == longest
    say_longest(encoder, max_seq_length=None)
    config.write_text(json.dumps({**known, "model_max_length": None}))
    assert read_longest(encoder.path) is None
    for wrong in (0, -1, "128", 1.5, True):
        say_longest(encoder, max_seq_length=wrong)
        with pytest.raises(InputError, match="has the max_seq_length"):
            read_longest(encoder.path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    assert read_longest(tmp_path / "plain") is None  # no sentence encoder
