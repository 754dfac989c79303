"""What a tokenizer of each kind is made of, before it has a vocabulary: normaliser, cuts, decoder.

Pieces keep spaces as they are (no `▁`), so that a typed `▁` is not read as a space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from llmctl_tokenize.params import TokenizeParams
from llmctl_tokenize.tiktoken_ranks import byte_alphabet

# Both as onnxruntime-extensions knows them: it refuses other counts of digits, {1,2} included.
PATTERNS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "spaces": r"\n+| ?[^ \n]+| +",
    "lines": r"[^\n]+|\n+",
}
GUARDED = ("spaces", "lines", "whole")
"""Patterns that would leave the text of a special token in one piece."""
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
BYTES = {char: byte for byte, char in byte_alphabet().items()}
"""The byte that each character of a byte-level piece stands for."""
NEIGHBOURS = ("", "a", "1", " ", "\n", ".", "'")
"""One of each class that a pattern tells apart: what may stand beside a special token's text."""
UNICODE = {
    "nfc": normalizers.NFC, "nfd": normalizers.NFD, "nfkc": normalizers.NFKC, "nfkd": normalizers.NFKD,
}  # fmt: skip


def untrained(params: TokenizeParams, special: Sequence[str], unknown: str | None) -> Tokenizer:
    """A tokenizer of `params.kind` without a vocabulary; `special` are the tokens that text must never become."""
    tokenizer = Tokenizer(model(params, unknown))
    if steps := normal_forms(params):
        tokenizer.normalizer = steps[0] if len(steps) == 1 else normalizers.Sequence(steps)
    cuts = pre_tokenizer_steps(params, special)
    if cuts:
        tokenizer.pre_tokenizer = cuts[0] if len(cuts) == 1 else pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoder(params)
    return tokenizer


def model(params: TokenizeParams, unknown: str | None) -> models.Model:
    """The empty model of the kind; `char` is a BPE without merges."""
    if params.kind == "wordpiece":
        return models.WordPiece(unk_token=unknown, max_input_chars_per_word=100)
    if params.kind == "word":
        return models.WordLevel(unk_token=unknown)
    if params.kind == "unigram":
        return models.Unigram()
    if params.covers == "byte-level":
        return models.BPE()
    return models.BPE(unk_token=unknown, byte_fallback=params.covers == "byte-fallback")


def normal_forms(params: TokenizeParams) -> list[normalizers.Normalizer]:
    """Unicode normalisation, then what BERT does to white space, Chinese characters, capitals and accents."""
    steps: list[Any] = [] if params.normalizer == "none" else [UNICODE[params.normalizer]()]
    if params.cuts == "words":
        steps.append(normalizers.BertNormalizer(lowercase=params.folds))
    elif params.folds:
        steps += [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    return steps


def pre_tokenizer_steps(params: TokenizeParams, special: Sequence[str]) -> list[pre_tokenizers.PreTokenizer]:
    """The guard, the digits and the pattern, in this order."""
    steps: list[Any] = []
    pattern = params.cuts
    byte_level = params.covers == "byte-level"
    if pattern in GUARDED and params.kind != "char":
        steps.append(guard(special, params.covers == "byte-fallback"))
    if params.digits:
        steps.append(pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{params.digits}}}"), "isolated"))
    if pattern == "words":
        steps.append(pre_tokenizers.BertPreTokenizer())
    if pattern == "gpt2":
        if byte_level:
            return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        return [*steps, pre_tokenizers.Split(Regex(gpt2), "isolated")]
    if pattern in PATTERNS:
        steps.append(pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"))
    if byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return steps


def guard(names: Sequence[str], fallback: bool) -> pre_tokenizers.PreTokenizer:
    """Cuts off the first character of a special token's text: no piece can then be that token.

    Special tokens are found before this, where they are looked for; a model whose vocabulary holds them as pieces
    (Unigram, whole words, merges that happen to spell one) would find them in plain text as well. With `fallback` the
    names of the bytes are cut, too.
    """
    parts = [f"{escaped(name[0])}(?={escaped(name[1:])})" for name in names if len(name) > 1]
    byte = r"<(?=0x[0-9A-F]{2}>)"
    return pre_tokenizers.Split(Regex("|".join([*parts, *([byte] if fallback else [])])), "isolated")


def is_spelt(tokenizer: Tokenizer, params: TokenizeParams, name: str) -> bool:
    """Whether a piece of ordinary text can be spelt as the special token `name`: its id would then be that token's.

    `tokenizer` is untrained, with the cuts of `params`; the guard among them, if there is one, knows `name`.
    """
    if params.covers == "byte-fallback" and name in FALLBACK:
        return True
    spelling = name.removeprefix("##") if params.kind == "wordpiece" else name
    text = spelling
    if params.covers == "byte-level":
        if not set(name) <= set(BYTES):
            return False  # pieces are made of the alphabet of the bytes only
        text = bytes(BYTES[char] for char in name).decode(errors="replace")
    if len(spelling) == 1 or params.kind == "char":
        return len(spelling) == 1
    if "\ufffd" in text:
        return True  # part of a character, whatever stands beside it
    cut = tokenizer.pre_tokenizer
    texts = [before + text + after for before in NEIGHBOURS for after in NEIGHBOURS]
    if tokenizer.normalizer is not None:
        texts = [tokenizer.normalizer.normalize_str(one) for one in texts]
    pieces = (piece for one in texts for piece, _ in (cut.pre_tokenize_str(one) if cut is not None else [(one, None)]))
    return any(spelling in piece for piece in pieces)


def escaped(text: str) -> str:
    """`text` as a regular expression of Oniguruma's."""
    return re.sub(r"([^\w\s])", r"\\\1", text)


def decoder(params: TokenizeParams) -> decoders.Decoder:
    """How tokens become text again."""
    if params.kind == "wordpiece":
        return decoders.WordPiece(cleanup=False)
    if params.covers == "byte-level":
        return decoders.ByteLevel()
    if params.covers == "byte-fallback":
        return decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    if params.cuts == "words":
        return None  # tokens joined by spaces
    return decoders.Fuse()
