"""Streaming: the parts joined are what the tokenizer decodes at once, and no part is half a character."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.generator import GREEDY
from llmctl.text.streaming import Delta, Detokenizer, complete, stream_text
from llmctl.text.tokenizer import Tokenizer


class Scripted:
    """A generator that says what it was given; `taken` counts what was asked of it."""

    context_length, vocab_size, backend = 512, 1 << 20, "script"

    def __init__(self, ids, eos_ids=frozenset()):
        self.ids, self.eos_ids, self.taken, self.closed = list(ids), eos_ids, 0, False

    def room(self, prompt):
        return self.context_length - len(prompt)

    def stream(self, prompt, sampling=GREEDY):
        try:
            room = min(sampling.max_new_tokens, self.context_length - len(prompt))
            for token in self.ids[:room]:
                if token in self.eos_ids:
                    return
                self.taken += 1
                yield token
        finally:
            self.closed = True

    def generate(self, prompts, sampling=GREEDY):
        return [list(self.stream(prompt, sampling)) for prompt in prompts]

    def logprobs(self, tokens):
        raise NotImplementedError

    logits = logprobs


def deltas(tokenizer, ids, stop=(), **options):
    return list(stream_text(Scripted(ids), tokenizer, [0], replace(GREEDY, max_new_tokens=400, **options), stop))


@pytest.fixture(scope="module", params=["bytes", "ours", "llama2"])
def tokenizer(request, families, plain_bytes):
    return Tokenizer.load(plain_bytes if request.param == "bytes" else families[request.param])


@settings(max_examples=150)
@given(data=st.data())
def test_any_ids_join_to_what_decode_gives(tokenizer, data):
    pool = range(tokenizer.vocab_size)
    if tokenizer.decode([3 + 0, 3 + 0x80]) == "\ufffd\ufffd":
        # Byte fallback: a run of byte tokens is judged as a whole, so one bad byte changes what came before it.
        pool = [i for i in pool if not 3 <= i < 3 + 256]
    ids = data.draw(st.lists(st.sampled_from(pool), max_size=24))
    parts = deltas(tokenizer, ids)
    assert "".join(part.text for part in parts) == tokenizer.decode(ids)
    assert [i for part in parts for i in part.token_ids] == ids
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)


@settings(max_examples=100)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=24))
def test_no_part_holds_half_a_character(tokenizer, text):
    parts = deltas(tokenizer, tokenizer.encode(text))
    assert "".join(part.text for part in parts) == text
    assert not any("\ufffd" in part.text for part in parts)


def test_a_wide_character_waits_for_its_last_byte(plain_bytes):
    tokenizer = Tokenizer.load(plain_bytes)
    ids = tokenizer.encode("a🙂b")
    assert len(ids) == 6
    assert [(part.text, len(part.token_ids)) for part in deltas(tokenizer, ids)] == [
        ("a", 1),
        ("🙂", 4),
        ("b", 1),
        ("", 0),
    ]


def test_what_never_becomes_a_character_is_shown_at_the_end(plain_bytes):
    tokenizer = Tokenizer.load(plain_bytes)
    ids = tokenizer.encode("ok🙂")[:-1]
    assert "".join(part.text for part in deltas(tokenizer, ids)) == tokenizer.decode(ids) == "ok\ufffd"


@settings(max_examples=150)
@given(
    text=st.text(st.sampled_from("ab\n🙂"), max_size=20),
    stop=st.lists(st.text(st.sampled_from("ab\n🙂"), min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_equal_cutting_the_whole_text(tokenizer, text, stop):
    ids = tokenizer.encode(text)
    at = min((found for found in map(text.find, stop) if found >= 0), default=None)
    # A stop string that ends earlier wins over one that begins earlier but is completed by a later token.
    done = complete(Scripted(ids), tokenizer, [0], replace(GREEDY, max_new_tokens=400), stop)
    if at is None:
        assert done.text == text and done.token_ids == ids and done.finish_reason == "stop"
    else:
        assert done.finish_reason == "stop"
        assert text.startswith(done.text) and any(text[len(done.text) :].startswith(s) for s in stop)
        assert not any(s in done.text for s in stop)


def test_a_stop_string_across_tokens_is_not_shown_and_ends_generation(plain_bytes):
    tokenizer = Tokenizer.load(plain_bytes)
    generator = Scripted(tokenizer.encode("one STOP two"))
    parts = list(stream_text(generator, tokenizer, [0], GREEDY, ["STOP", "never"]))
    assert "".join(part.text for part in parts) == "one "
    assert parts[-1].finish_reason == "stop"
    assert generator.taken == len("one STOP") and generator.closed
    assert sum(len(part.token_ids) for part in parts) == len("one STOP")


def test_the_beginning_of_a_stop_string_is_shown_when_it_goes_on_otherwise(plain_bytes):
    tokenizer = Tokenizer.load(plain_bytes)
    parts = deltas(tokenizer, tokenizer.encode("STO STUB"), ["STOP"])
    assert [part.text for part in parts if part.text] == ["STO ", "S" + "TU", "B"]
    assert "".join(part.text for part in deltas(tokenizer, tokenizer.encode("a STO"), ["STOP"])) == "a STO"


def test_finish_reasons(plain_bytes):
    tokenizer = Tokenizer.load(plain_bytes)
    ids = tokenizer.encode("abcdef")
    eos = tokenizer.eos_id

    def reason(ids, context=512, limit=100):
        generator = Scripted(ids, frozenset({eos}))
        generator.context_length = context
        return complete(generator, tokenizer, [0, 0], replace(GREEDY, max_new_tokens=limit))

    assert reason([*ids, eos, *ids]) == complete(Scripted(ids), tokenizer, [0, 0], GREEDY)
    assert reason([*ids, eos]).finish_reason == "stop"
    assert reason(ids, limit=3).finish_reason == "length" and reason(ids, limit=3).text == "abc"
    assert reason(ids, context=6).finish_reason == "length" and reason(ids, context=6).text == "abcd"
    assert reason([eos]).text == "" and reason([eos]).finish_reason == "stop"


def test_an_empty_stop_string_is_no_stop_string(plain_bytes):
    tokenizer = Tokenizer.load(plain_bytes)
    assert complete(Scripted(tokenizer.encode("abc")), tokenizer, [0], GREEDY, [""]).text == "abc"
    assert deltas(tokenizer, []) == [Delta("", [], "stop")]


class Counted:
    """A tokenizer whose work is counted."""

    def __init__(self, tokenizer):
        self._tokenizer, self.most = tokenizer, 0
        self.special_ids, self.byte_tokens = tokenizer.special_ids, tokenizer.byte_tokens

    def decode(self, ids):
        self.most = max(self.most, len(ids))
        return self._tokenizer.decode(ids)


def joined(tokenizer, ids):
    """What a `Detokenizer` gives for ids, and the most of them that it decoded at once."""
    counted = Counted(tokenizer)
    words = Detokenizer(counted)
    parts = [words.add(token) for token in ids]
    return "".join(parts) + words.flush(), counted.most


@settings(max_examples=200)
@given(data=st.data())
def test_runs_without_a_clean_cut_join_to_what_decode_gives_and_stay_cheap(plain_bytes, data):
    tokenizer = Tokenizer.load(plain_bytes)
    byte = {char: tokenizer.encode(char)[0] for char in "aé☃🙂"}
    pieces = st.sampled_from(
        [tokenizer.encode(text) for text in ("a", "é", "☃", "🙂", "\ufffd" * 5)]
        + [tokenizer.encode("☃")[1:], tokenizer.encode("🙂")[:3], tokenizer.encode("☃")[:2], [byte["🙂"]] * 9]
        + [tokenizer.encode("☃")[1:2] * 12, list(tokenizer.special_ids)[:1] * 5]
    )
    ids = [token for part in data.draw(st.lists(pieces, max_size=30)) for token in part]
    text, most = joined(tokenizer, ids)
    assert text == tokenizer.decode(ids)
    assert most <= 40


@settings(max_examples=200)
@given(text=st.text(st.sampled_from("a ☃🙂é\ufffd\U0010fffd"), max_size=60))
def test_any_text_with_its_own_replacement_characters_comes_whole(tokenizer, text):
    ids = tokenizer.encode(text)
    found, most = joined(tokenizer, ids)
    assert found == tokenizer.decode(ids)
    assert most <= 40


@pytest.mark.parametrize("kind", ["special", "replacement", "half"])
def test_a_long_answer_that_never_ends_a_character_costs_no_more_per_token(tokenizer, kind):
    if kind == "special":
        ids = [min(tokenizer.special_ids)] * 2000
    elif kind == "replacement":
        ids = tokenizer.encode("\ufffd" * 700)
    else:
        ids = tokenizer.encode("🙂")[-1:] * 2000
    text, most = joined(tokenizer, ids)
    assert text == tokenizer.decode(ids)
    assert most <= 40
