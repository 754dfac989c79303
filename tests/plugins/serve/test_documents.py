"""Answers from documents over HTTP."""

from __future__ import annotations

import pytest

from llmctl.text.retrieval import Chunk, Index

DEDENT = [{"role": "user", "content": "What does `dedent` do?"}]


@pytest.fixture
def index():
    return Index.build(
        [
            Chunk(
                "textwrap#0", "textwrap", 0, 58, "The function dedent removes common leading whitespace. It", "textwrap"
            ),
            Chunk("json#0", "json", 0, 40, "The function loads parses a JSON text.", "json"),
            Chunk("gzip#0", "gzip", 0, 40, "Reads and writes compressed files.", "gzip"),
        ]
    )


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
