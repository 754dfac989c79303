"""Completions as evaluation harnesses use them, tools and forms of answers: over a real model."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from llmctl.text.constraints import GrammarConstraint
from llmctl_serve import answers
from llmctl_serve.conversations import ChatRequest


@pytest.fixture(scope="module")
def server(real_models, serving):
    with serving(real_models[1]) as found:
        yield found


def truth(server, ids):
    """Log-probabilities of all tokens but the first, by one pass over the text."""
    return server.service.generator.logprobs(ids)


@pytest.mark.parametrize("limit", [0, 1])
def test_prompts_are_scored_as_harnesses_ask_for_it(server, limit):
    """The request of lm-evaluation-harness's local-completions: several prompts of ids, echo, one token or none."""
    rows = [[0, *range(70, 80)], [0, 90, 91, 92]]
    answer = server.client.completions.create(
        model="byte-model", prompt=rows, max_tokens=limit, echo=True, logprobs=1, temperature=0, seed=1234
    )
    for choice, ids in zip(answer.choices, rows, strict=True):
        scores = choice.logprobs
        assert len(scores.token_logprobs) == len(ids) + limit  # the harness drops the last one if it asked for one
        assert scores.token_logprobs[0] is scores.top_logprobs[0] is None
        np.testing.assert_allclose(scores.token_logprobs[1 : len(ids)], truth(server, ids), atol=1e-4)
        assert choice.text.startswith(server.service.tokenizer.decode(ids))
        for at, token in zip(scores.text_offset[1:], scores.tokens[1:], strict=False):
            assert "\ufffd" in token or choice.text[at:].startswith(token)
        for token, logprob, top in zip(
            scores.tokens[1:], scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True
        ):
            assert len(top) <= 2
            assert top[token] >= logprob  # the chosen one is always there, or one with its text
    assert answer.usage.completion_tokens == 2 * limit


def test_naming_the_tokens_of_a_prompt_holds_nobody_up(server, monkeypatch):
    threads, plain = [], answers.offsets
    monkeypatch.setattr(
        answers, "offsets", lambda *given: threads.append(threading.current_thread().name) or plain(*given)
    )
    server.client.completions.create(model="byte-model", prompt=[0, 70, 71], max_tokens=0, echo=True, logprobs=1)
    assert [name.rpartition("_")[0] in ("asyncio", "uvloop") for name in threads] == [True]


def test_an_end_counts_as_the_token_that_harnesses_drop(server):
    eos = min(server.service.generator.eos_ids)
    ids = [0, 90, 91]
    answer = server.client.completions.create(
        model="byte-model", prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0, logit_bias={str(eos): 100}
    )
    scores = answer.choices[0].logprobs.token_logprobs
    assert len(scores) == 4
    np.testing.assert_allclose(scores[1:], truth(server, [*ids, eos]), atol=1e-4)


def test_an_end_stands_behind_the_whole_text(server):
    """Whose beginning, the repeated prompt, is counted once."""
    answer = server.client.completions.create(
        model="byte-model", prompt="The", max_tokens=9, echo=True, logprobs=1, extra_body={"guided_regex": "[ab]{4}"}
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.logprobs.text_offset[-5:] == [3, 4, 5, 6, len(choice.text)]


def test_streams_carry_the_scores_of_whole_answers(server):
    ask = {"model": "byte-model", "prompt": "The work", "max_tokens": 6, "logprobs": 2, "temperature": 0}
    whole = server.client.completions.create(**ask).choices[0]
    chunks = [chunk.choices[0] for chunk in server.client.completions.create(**ask, stream=True)]
    found = [score for chunk in chunks if chunk.logprobs for score in chunk.logprobs.token_logprobs]
    np.testing.assert_allclose(found, whole.logprobs.token_logprobs, atol=1e-5)
    assert "".join(chunk.text for chunk in chunks) == whole.text


def test_best_of_gives_the_likeliest(server):
    ask = {"model": "byte-model", "prompt": "a", "max_tokens": 4, "temperature": 1.5, "seed": 3, "logprobs": 0}
    drawn = server.client.completions.create(**ask, n=5).choices
    best = server.client.completions.create(**ask, n=1, best_of=5)
    means = [np.mean(choice.logprobs.token_logprobs) for choice in drawn]
    assert best.choices[0].text == drawn[int(np.argmax(means))].text
    assert best.usage.completion_tokens > len(best.choices[0].logprobs.tokens)


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def test_answers_keep_to_a_schema(server):
    for seed in range(3):
        answer = server.client.chat.completions.create(
            model="byte-model",
            messages=[{"role": "user", "content": "?"}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            temperature=1,
            seed=seed,
            max_tokens=120,
        )
        if answer.choices[0].finish_reason == "stop":
            assert set(json.loads(answer.choices[0].message.content)) == {"ok"}
    choice = server.post({"messages": [{"role": "user", "content": "?"}], "guided_choice": ["yes", "no"]})[1]
    assert choice["choices"][0]["message"]["content"] in ("yes", "no")
    status, body, _ = server.post({"messages": [{"role": "user", "content": "?"}], "guided_regex": "("})
    assert (status, body["error"]["param"]) == (400, "guided_regex")


def masked(server, what):
    return server.metrics.registry.get_sample_value(f"llmctl_masking_seconds_{what}", {"model": "byte-model"}) or 0


def test_what_masking_takes_is_reported(real_models, serving, monkeypatch, wait_until, tmp_path):
    """By token in /metrics, by request in the access log; nothing where an answer has no form."""
    ask = {"messages": [{"role": "user", "content": "?"}], "temperature": 1, "seed": 3, "n": 2}
    log = tmp_path / "access.jsonl"
    with serving(real_models[1], access_log=str(log)) as server:
        server.post(ask)
        assert masked(server, "count") == 0
        body = server.post({**ask, "guided_regex": "[ab]{9}"})[1]
        masks = body["usage"]["completion_tokens"] + 2  # each answer's end
        wait_until(lambda: masked(server, "count") >= masks)  # a request is counted after its last byte has left
        assert masked(server, "count") == masks
        quick = masked(server, "sum") / masked(server, "count")
        assert 0 < quick < 0.02

        plain = GrammarConstraint.mask
        monkeypatch.setattr(GrammarConstraint, "mask", lambda constraint: time.sleep(0.02) or plain(constraint))
        server.post({**ask, "n": 1, "guided_regex": "[ab]{4}"})
        wait_until(lambda: masked(server, "count") >= masks + 5)
        assert masked(server, "sum") - quick * masks >= 5 * 0.02
    lines = [json.loads(line)["masking_ms"] for line in log.read_text().splitlines()]
    assert lines[0] is None
    assert lines[1] > 0
    assert lines[2] >= 100


CALL = '<tool_call>\n{"name": "look", "arguments": {"ok": true}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_found_in_what_the_model_says(scripted, byte_tokenizer, running, stream):
    ask = {"model": "byte-model", "messages": [{"role": "user", "content": "?"}], "tools": TOOLS}
    with running(scripted(byte_tokenizer, default=CALL, context_length=2048)) as server:
        if stream:
            chunks = list(server.client.chat.completions.create(**ask, stream=True))
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = server.client.chat.completions.create(**ask).choices[0]
            calls, reason, text = choice.message.tool_calls, choice.finish_reason, choice.message.content or ""
        assert (reason, text, len(calls)) == ("tool_calls", "", 1)
        assert calls[0].function.name == "look"
        assert json.loads(calls[0].function.arguments) == {"ok": True}
        plain = server.client.chat.completions.create(**ask, tool_choice="none").choices[0]
        assert (plain.message.content, plain.finish_reason) == (CALL, "stop")


@pytest.mark.parametrize(("choice", "forced"), [("auto", False), ("required", True)])
def test_a_call_that_is_asked_for_is_forced(scripted, byte_tokenizer, service_of, choice, forced):
    service = service_of(scripted(byte_tokenizer, context_length=2048))
    body = ChatRequest(messages=[{"role": "user", "content": "?"}], tools=TOOLS, tool_choice=choice)
    constraint = service.ask_chat(body, "").prompts[0].request.constraint
    assert (constraint is not None) == forced
    if forced:
        for token in byte_tokenizer.encode(CALL):
            assert constraint.mask()[token]
            constraint.accept(token)
        assert constraint.mask()[byte_tokenizer.eos_id]


def test_tokenize_and_back(server):
    status, body, _ = server.post({"prompt": "héllo", "return_token_strs": True}, "/v1/tokenize")
    assert status == 200
    assert body["count"] == len(body["tokens"]) == len("héllo".encode()) + 1
    status, back, _ = server.post({"tokens": body["tokens"], "skip_special_tokens": True}, "/v1/detokenize")
    assert back == {"prompt": "héllo"}
    assert server.post({"tokens": [99999]}, "/v1/detokenize")[1]["error"]["param"] == "tokens"


def test_a_decoder_gives_no_embeddings(server):
    status, body, _ = server.post({"input": "a"}, "/v1/embeddings")
    assert (status, body["error"]["param"]) == (400, "model")
