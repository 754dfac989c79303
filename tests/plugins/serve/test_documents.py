"""Answers from documents over HTTP."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from llmctl import Artifact, InputError, UsageError
from llmctl.encoders import open_text_encoder
from llmctl.testing import run_stage
from llmctl.text.dense import Dense, DenseSettings, unit
from llmctl.text.retrieval import Index
from llmctl.text.tokenizer import Tokenizer
from llmctl.text.vectors import Vectors
from llmctl_serve import SERVE, answers

DEDENT = [{"role": "user", "content": "What does `dedent` do?"}]


def test_grounded_answers_cite_and_refuse(scripted, byte_tokenizer, index, running):
    generator = scripted(byte_tokenizer, {"[1] The function dedent": "It removes whitespace [1] [7]."}, default="hm")
    with running(generator, index) as server:
        status, body, _ = server.post({"messages": DEDENT})
        assert status == 200
        assert body["choices"][0]["message"]["content"] == "It removes whitespace [1] ."
        assert [(cited["number"], cited["id"]) for cited in body["citations"]] == [(1, "textwrap#0")]
        assert body["refused"] is False
        answer = server.client.chat.completions.create(
            model="byte-model", messages=[{"role": "user", "content": "What is `frobnicate`?"}]
        )
        assert answer.refused
        assert answer.citations == []
        assert answer.usage.completion_tokens == 0
        free = server.post({"messages": DEDENT, "retrieval": False})[1]
        assert free["choices"][0]["message"]["content"] == "hm"
        assert "citations" not in free
        lenient = {"messages": [{"role": "user", "content": "frobnicate function"}], "retrieval": {"refuse_below": 0.0}}
        assert server.post(lenient)[1]["refused"] is False


def test_grounded_stream_equals_the_whole_answer(scripted, byte_tokenizer, index, running):
    generator = scripted(byte_tokenizer, {"[1] The function dedent": "whitespace [12], a[1] and [2"}, default="hm")
    with running(generator, index) as server:
        whole = server.post({"messages": DEDENT})[1]
        chunks = list(server.client.chat.completions.create(model="byte-model", messages=DEDENT, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole["choices"][0]["message"]["content"] == "whitespace , a[1] and [2 [1]"
        assert chunks[-1].citations[0]["id"] == "textwrap#0"


def test_a_context_that_holds_no_passage_refuses_in_words_too(scripted, byte_tokenizer, index, running):
    generator = scripted(byte_tokenizer, context_length=100)
    with running(generator, index) as server:
        body = server.post({"messages": DEDENT})[1]
        assert body["choices"][0]["message"]["content"] == "I cannot answer that from these documents."
        assert (body["refused"], body["citations"]) == (True, [])
        assert generator.generated == 0


def test_extractive_answers_need_no_generation(scripted, byte_tokenizer, index, running):
    generator = scripted(byte_tokenizer)
    with running(generator, index, answers="extractive") as server:
        body = server.post({"messages": DEDENT})[1]
        assert body["choices"][0]["message"]["content"] == "The function dedent removes common leading whitespace. [1]"
        assert generator.generated == 0


def test_closed_book_answers_are_refused_and_cited_without_being_shown_the_passages(
    scripted, byte_tokenizer, index, running
):
    generator = scripted(byte_tokenizer, {"[1]": "saw a passage", "dedent": "textwrap"}, default="made up")
    with running(generator, index, answers="closed-book") as server:
        body = server.post({"messages": DEDENT})[1]
        assert body["choices"][0]["message"]["content"] == "textwrap [1]"
        assert body["citations"][0]["document"] == "textwrap"
        unknown = [{"role": "user", "content": "What is `frobnicate`?"}]
        assert server.post({"messages": unknown})[1]["refused"] is True


@pytest.fixture
def by_meaning(tmp_path, index):
    """(the directory of an index that finds by meaning, the vectors that do): other words for what the chunks say."""
    names = ["whitespace", "blanks", "parses", "reads", "compressed", "zipped"]
    matrix = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0)
    Vectors(names, matrix).save(tmp_path / "vectors")
    vectors = Artifact(tmp_path / "vectors", "embeddings")
    encoder = open_text_encoder(vectors)
    made = unit(encoder.embed([chunk.searched for chunk in index.chunks]))
    dense = Dense(made, encoder, DenseSettings("hybrid", 0.5, 60.0))
    Index.build(index.chunks, dense=dense).save(tmp_path / "index")
    return tmp_path / "index", vectors


BLANKS = [{"role": "user", "content": "Who strips blanks?"}]


def test_what_is_asked_in_other_words_is_answered(scripted, byte_tokenizer, index, by_meaning, running):
    generator = scripted(byte_tokenizer, {"[1] The function dedent": "dedent does [1]"}, default="hm")
    with running(generator, Index.load(by_meaning[0], open_text_encoder(by_meaning[1]))) as server:
        body = server.post({"messages": BLANKS})[1]
        assert body["choices"][0]["message"]["content"] == "dedent does [1]"
        assert body["citations"][0]["id"] == "textwrap#0"
        assert server.post({"messages": [{"role": "user", "content": "What is a frobnicator?"}]})[1]["refused"] is True
    with running(scripted(byte_tokenizer), index) as server:  # the control: by words alone nothing is found
        assert server.post({"messages": BLANKS})[1]["refused"] is True


def test_the_stage_takes_the_encoder_of_its_index(tmp_path, model_dir, opens, scripted, index, by_meaning):
    opens({model_dir: scripted(Tokenizer.load(model_dir))})
    params = {"port": 0, "mode": "smoke", "smoke_questions": ["Who strips blanks?"], "answers": "extractive"}
    directory, vectors = by_meaning
    index.save(tmp_path / "plain")

    def serve(name, **inputs):
        return run_stage(SERVE, tmp_path / name, params, model=Artifact(model_dir, "model.onnx"), **inputs)

    dense, plain = Artifact(directory, "index.rag"), Artifact(tmp_path / "plain", "index.rag")
    receipt = serve("both", index=dense, encoder=vectors).outputs["receipt"] / "receipt.json"
    assert "The function dedent removes common leading whitespace. [1]" in receipt.read_text()
    with pytest.raises(InputError, match="finds by meaning and needs the encoder"):
        serve("none", index=dense)
    with pytest.raises(UsageError, match="`encoder` has no effect without an `index`"):
        serve("alone", encoder=vectors)
    with pytest.raises(UsageError, match="finds by words alone, an encoder has no effect"):
        serve("plain", index=plain, encoder=vectors)


FORMS = [
    {"guided_choice": ["yes [9]", "no [9]"]},
    {"tools": [{"type": "function", "function": {"name": "look"}}], "tool_choice": "auto"},
]


@pytest.mark.parametrize("form", FORMS, ids=["form", "tools"])
def test_what_must_keep_to_a_form_is_not_answered_from_the_documents(scripted, byte_tokenizer, index, running, form):
    """Citations would be taken out of it, or put behind it, and a refusal is none of its forms."""

    class Told(scripted):
        def stream(self, prompt, sampling, constraint=None):  # scripted answers keep to any form
            return super().stream(prompt, sampling)

    generator = Told(byte_tokenizer, default="yes [9]")
    with running(generator, index) as server:
        for messages in (DEDENT, [{"role": "user", "content": "What is `frobnicate`?"}]):
            status, body, _ = server.post({"messages": messages, **form})
            assert status == 200, server.warnings
            assert body["choices"][0]["message"]["content"] == "yes [9]"
            assert "citations" not in body
        for asked in (True, {"top_k": 1}):
            status, body, _ = server.post({"messages": DEDENT, "retrieval": asked, **form})
            assert (status, body["error"]["param"]) == (400, "retrieval")
            assert "cannot keep to a form or call tools" in body["error"]["message"]


def test_only_a_question_of_the_user_is_searched_for(scripted, byte_tokenizer, index, running):
    generator = scripted(byte_tokenizer, {"[1] The function dedent": "whitespace [1]"}, default="hm")
    called = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    behind = [
        [{"role": "assistant", "content": "dedent"}],
        [{"role": "assistant", "tool_calls": [called]}, {"role": "tool", "tool_call_id": "c", "content": "dedent"}],
    ]
    with running(generator, index) as server:
        for more in behind:
            body = server.post({"messages": [*DEDENT, *more]})[1]
            assert body["choices"][0]["message"]["content"] == "hm"
            assert "citations" not in body
            status, body, _ = server.post({"messages": [*DEDENT, *more], "retrieval": True})
            assert (status, body["error"]["param"]) == (400, "retrieval")
        asked = server.post({"messages": [*DEDENT, *behind[0], *DEDENT], "retrieval": True})[1]
        assert asked["choices"][0]["message"]["content"] == "whitespace [1]"


def test_an_encoder_that_reads_at_the_end_of_an_answer_holds_nobody_else_up(
    scripted, byte_tokenizer, index, by_meaning, running, monkeypatch
):
    threads = []
    for name in ("quote", "missing_citation"):
        plain = getattr(answers, name)
        monkeypatch.setattr(
            answers, name, lambda *given, plain=plain: threads.append(threading.current_thread().name) or plain(*given)
        )
    generator = scripted(byte_tokenizer, default="It removes whitespace.")
    with running(generator, index) as server:
        whole = server.post({"messages": DEDENT, "n": 2})[1]
        assert {choice["message"]["content"] for choice in whole["choices"]} == {"It removes whitespace. [1]"}
    with running(generator, index, answers="extractive") as server:
        server.post({"messages": DEDENT, "n": 3})
    assert len(threads) == 3  # two answers, and one quotation for three
    assert {name.rpartition("_")[0] for name in threads} <= {"asyncio", "uvloop"}
