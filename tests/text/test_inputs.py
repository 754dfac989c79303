"""Texts framed as transformers frames them, and spans that lead back to the exact characters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl.text.inputs import answer_places, best_answer, frame_question, frame_words
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize import TOKENIZE

TEXT = "Ada Lovelace wrote the first program in 1843, they say. Ada sang; the engine (of Babbage) did not. "


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    from llmctl import Artifact

    base = tmp_path_factory.mktemp("tokenizers")
    with DatasetWriter(base / "text", "dataset.text") as writer:
        writer.add("train", {"text": TEXT * 4})
    made = {}
    for special in ("bert", "roberta", "t5", "gpt"):
        params = {"vocab_size": 300, "special": special, "emit": "tokenizer"}
        params |= {"sentinels": 4} if special == "t5" else {}
        result = run_stage(TOKENIZE, base / special, params, text=Artifact(base / "text", "dataset.text"))
        made[special] = Tokenizer.load(result.outputs["tokenizer"].path)
    return made


@pytest.mark.parametrize("special", ["bert", "roberta", "t5"])
def test_the_frame_is_transformers(tokenizers, special: str) -> None:
    ours = tokenizers[special]
    peer = AutoTokenizer.from_pretrained(ours.directory)
    for texts in ((TEXT,), ("Ada", "the engine"), ("", "a")):
        framed = ours.frame(*texts)
        assert framed.ids == peer(*texts)["input_ids"]
        assert framed.segments == peer(*texts, return_token_type_ids=True)["token_type_ids"]
        assert len(framed.ids) == len(framed.parts) == len(framed.spans)


def test_a_tokenizer_without_a_frame_of_its_own_gets_one(tokenizers) -> None:
    framed = tokenizers["gpt"].frame("Ada", " sang")
    assert framed.ids == [0, *tokenizers["gpt"].encode("Ada"), *tokenizers["gpt"].encode(" sang"), 1]
    assert framed.segments[0] == 0 and framed.segments[-1] == 1 and framed.parts[0] is None


@pytest.mark.parametrize("special", ["bert", "roberta"])
@settings(max_examples=60)
@given(data=st.data())
def test_any_run_of_words_maps_back_to_its_exact_characters(tokenizers, special: str, data: st.DataObject) -> None:
    words = TEXT.split()
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(len(words) - 1, first + 6)))
    answer = " ".join(words[first : last + 1])
    start = len(" ".join(words[:first])) + (first > 0)
    asked = frame_question(tokenizers[special], "Who?", TEXT)
    places = answer_places(asked, start, start + len(answer))
    assert places is not None
    starts, ends = (np.where(np.arange(len(asked.framed.ids)) == place, 9.0, 0.0) for place in places)
    begin, end = best_answer(asked, starts, ends, longest=40)
    assert TEXT[begin:end] == answer == TEXT[start : start + len(answer)]


def test_the_best_answer_obeys_order_length_and_context(tokenizers) -> None:
    asked = frame_question(tokenizers["bert"], "Ada?", "Ada sang in a garden")
    count = len(asked.framed.ids)
    context = np.flatnonzero(asked.candidates)
    starts, ends = np.zeros(count), np.zeros(count)
    starts[1], ends[1] = 50, 50  # in the question: no candidate
    starts[context[-1]], ends[context[0]] = 5, 6  # the end before the start: no answer
    begin, end = best_answer(asked, starts, ends, longest=3)
    assert "Ada sang in a garden"[begin:end].startswith("Ada")
    starts[:], ends[:] = 0, 0
    starts[context[0]], ends[context[-1]] = 9, 9
    begin, end = best_answer(asked, starts, ends, longest=2)
    inside = [i for i in context if begin <= asked.framed.spans[i][0] and asked.framed.spans[i][1] <= end]
    assert len(inside) <= 2


def test_words_take_the_place_of_their_first_token(tokenizers) -> None:
    words = ["Ada", "Lovelace", "(of", "Babbage)", "xylophone"]
    found = frame_words(tokenizers["bert"], words)
    for word, place in zip(words, found.places, strict=True):
        start, end = found.framed.spans[place]
        assert word.startswith(" ".join(words)[start:end])
    assert found.places == sorted(found.places) and len(set(found.places)) == 5


def test_characters_of_several_bytes_do_not_shift_the_spans(tokenizers) -> None:
    context = "née Ünal 🙂 Ada"
    asked = frame_question(tokenizers["roberta"], "Wer?", context)
    places = answer_places(asked, context.index("Ada"), len(context))
    starts, ends = (np.where(np.arange(len(asked.framed.ids)) == place, 9.0, 0.0) for place in places)
    begin, end = best_answer(asked, starts, ends, longest=9)
    assert context[begin:end] == "Ada"


def test_the_empty_answer_of_a_path_that_is_no_text(tokenizers, tmp_path: Path) -> None:
    asked = frame_question(tokenizers["bert"], "Who?", "Ada")
    assert answer_places(asked, 3, 9) is None
