"""Train a tokenizer of any kind; equal texts give an equal tokenizer, in whatever order they come.

BPE and WordPiece: ties between equally frequent pairs go to the smaller pair of ids; ids go to special tokens first,
then to the alphabet by code point, then in order of creation. Words and characters: by count, then by code point.
Unigram is trained by sentencepiece, since the trainer of `tokenizers` follows the order of a hash table and gives other
scores each time.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from llmctl import InputError
from llmctl_tokenize import kinds
from llmctl_tokenize.params import TokenizeParams
from llmctl_tokenize.special import SpecialTokens, sentinel_names

Texts = Callable[[], Iterator[str]]
"""Gives the texts from the start, as often as it is called."""


def train(texts: Texts, params: TokenizeParams, special: SpecialTokens) -> Tokenizer:
    """A tokenizer of at most `params.vocab_size` tokens: fewer if the texts do not give more.

    The special tokens have the first ids, the sentinels the last.
    """
    sentinels = sentinel_names(params.sentinel_count)
    tokenizer = kinds.untrained(params, [*special.tokens, *sentinels], special.unknown)
    size = params.vocab_size - len(sentinels)
    fixed = [*special.tokens, *(kinds.FALLBACK if params.covers == "byte-fallback" else [])]
    if params.kind == "bpe":
        _train_bpe(tokenizer, texts, params, size, fixed)
    elif params.kind == "wordpiece":
        _train_wordpiece(tokenizer, texts, params, size, fixed)
    elif params.kind == "word":
        trainer = trainers.WordLevelTrainer(
            vocab_size=size, min_frequency=params.min_frequency, special_tokens=fixed, show_progress=False
        )
        tokenizer.train_from_iterator(texts(), trainer)
    elif params.kind == "char":
        _train_characters(tokenizer, texts, params, size, fixed)
    else:
        _train_unigram(tokenizer, texts, params, size, fixed, special.unknown or "")
    tokenizer = _only_special(tokenizer, special.tokens)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (*special.tokens, *sentinels)])
    if frame := special.processor():
        tokenizer.post_processor = frame
    return tokenizer


def _train_bpe(tokenizer: Tokenizer, texts: Texts, params: TokenizeParams, size: int, fixed: Sequence[str]) -> None:
    byte_level = params.covers == "byte-level"
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else _alphabet(tokenizer, texts, params)
    options: dict[str, Any] = {"max_token_length": params.max_piece_length} if params.max_piece_length else {}
    if params.limit_alphabet:
        options["limit_alphabet"] = len(alphabet)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=params.min_frequency,
        special_tokens=list(fixed),
        initial_alphabet=alphabet,
        show_progress=False,
        **options,
    )
    tokenizer.train_from_iterator(texts(), trainer)


def _train_wordpiece(
    tokenizer: Tokenizer, texts: Texts, params: TokenizeParams, size: int, fixed: Sequence[str]
) -> None:
    alphabet = _alphabet(tokenizer, texts, params)
    limit = {"limit_alphabet": len(alphabet)} if params.limit_alphabet else {}

    def trained(tokenizer: Tokenizer, vocab_size: int, first: Sequence[str]) -> dict[str, int]:
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=params.min_frequency,
            special_tokens=list(first),
            initial_alphabet=alphabet,
            show_progress=False,
            **limit,
        )
        tokenizer.train_from_iterator(texts(), trainer)
        found: dict[str, int] = json.loads(tokenizer.to_str())["model"]["vocab"]
        return found

    # The trainer numbers inner characters (`##x`) in the order of a hash table, and ids decide ties. So they are
    # collected first, and then given their ids in order. By a copy, as training adds the special tokens to a tokenizer,
    # which would then find them in the texts of the second time.
    found = trained(Tokenizer.from_str(tokenizer.to_str()), 0, fixed)
    rest = sorted(set(found) - set(fixed), key=lambda piece: (piece.startswith("##"), piece))
    trained(tokenizer, size, [*fixed, *rest])


def _train_characters(
    tokenizer: Tokenizer, texts: Texts, params: TokenizeParams, size: int, fixed: Sequence[str]
) -> None:
    if params.covers == "byte-level":
        wanted = sorted(pre_tokenizers.ByteLevel.alphabet())
        options: dict[str, Any] = {}
    else:
        counts = _characters(tokenizer, texts)
        frequent = [char for char in _ranked(counts) if counts[char] >= params.min_frequency]
        wanted = frequent[: min(size - len(fixed), params.limit_alphabet or len(frequent))]
        options = {"unk_token": tokenizer.model.unk_token, "byte_fallback": params.covers == "byte-fallback"}
    vocabulary = {token: number for number, token in enumerate([*fixed, *wanted])}
    tokenizer.model = models.BPE(vocabulary, [], **options)


def _train_unigram(
    tokenizer: Tokenizer, texts: Texts, params: TokenizeParams, size: int, fixed: Sequence[str], unknown: str
) -> None:
    from llmctl_tokenize import likelihood

    words: Counter[str] = Counter()
    for text in texts():
        words.update(cut(tokenizer, text))
    if not words:
        raise InputError("the training texts are empty, there is nothing to train a tokenizer on")
    required = sorted(pre_tokenizers.ByteLevel.alphabet()) if params.covers == "byte-level" else _limited(words, params)
    if params.limit_alphabet:
        words = _without_others(words, required)
    pieces = likelihood.train(words, size - len(fixed), params.max_piece_length or 16, required)
    vocabulary = [(token, 0.0) for token in fixed] + pieces
    fallback = params.covers == "byte-fallback"
    tokenizer.model = models.Unigram(vocabulary, list(fixed).index(unknown), fallback)


def _limited(words: Counter[str], params: TokenizeParams) -> list[str]:
    """The characters that must get a piece: all, or the most frequent."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            counts[char] += count
    return _ranked(counts)[: params.limit_alphabet]


def _without_others(words: Counter[str], kept: Sequence[str]) -> Counter[str]:
    """Words cut where a character is not one of `kept`."""
    other = re.compile(f"[^{re.escape(''.join(kept))}]+")
    found: Counter[str] = Counter()
    for word, count in words.items():
        for part in filter(None, other.split(word)):
            found[part] += count
    return found


def cut(tokenizer: Tokenizer, text: str) -> list[str]:
    """The stretches of a text that pieces are made of."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text] if text else []
    return [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _alphabet(tokenizer: Tokenizer, texts: Texts, params: TokenizeParams) -> list[str]:
    """The characters to keep, if their number is limited; else none are prescribed: all are kept."""
    return _ranked(_characters(tokenizer, texts))[: params.limit_alphabet] if params.limit_alphabet else []


def _characters(tokenizer: Tokenizer, texts: Texts) -> Counter[str]:
    counts: Counter[str] = Counter()
    normal = tokenizer.normalizer
    for text in texts():
        counts.update(text if normal is None else normal.normalize_str(text))
    return counts


def _ranked(counts: Counter[str]) -> list[str]:
    """Most frequent first, ties by code point."""
    return sorted(counts, key=lambda char: (-counts[char], char))


def _only_special(tokenizer: Tokenizer, special: Iterable[str]) -> Tokenizer:
    """The same tokenizer, in which bytes and inner characters that were prescribed are no special tokens."""
    state = json.loads(tokenizer.to_str())
    keep = set(special)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in keep]
    return Tokenizer.from_str(json.dumps(state))
