"""Read a SentencePiece model (`.model`: a protobuf, sentencepiece_model.proto) and write it as `tokenizer.json`.

Only the fields that decide about ids are read; no protobuf library is needed for that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from llmctl import InputError
from llmctl_tokenize import kinds

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
SPACE = "▁"


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place is its id."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `.model` file says."""

    pieces: list[Piece]
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    suffix_space: bool = False
    charsmap: bytes = b""
    dummy_prefix: bool = True
    trim: bool = True
    """Whether white space at both ends is dropped and runs of spaces become one."""
    escape: bool = True
    roles: Mapping[str, int] = field(default_factory=dict)
    """`unk`, `bos`, `eos`, `pad`: their ids, -1 for none."""


def read_model(data: bytes) -> SentencePieceModel:
    """Parse a model; InputError if it is none."""
    try:
        top = _fields(data)
        pieces = [_piece(_fields(part)) for part in top.get(1, [])]
        trainer, normalizer = (_fields((top.get(number) or [b""])[-1]) for number in (2, 3))
        defaults = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
        roles = {role: _signed(_last(trainer, number, absent)) for role, (number, absent) in defaults.items()}
        if not pieces:
            raise ValueError("it has no pieces")
        return SentencePieceModel(
            pieces,
            _last(trainer, 3, UNIGRAM),
            bool(_last(trainer, 35, 0)),
            bool(_last(trainer, 24, 0)),
            _last(normalizer, 2, b""),
            bool(_last(normalizer, 3, 1)),
            bool(_last(normalizer, 4, 1)),
            bool(_last(normalizer, 5, 1)),
            roles,
        )
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise InputError(
            f"this is no SentencePiece model: {error}", hint="give the `.model` file of a trainer"
        ) from error


def _piece(fields: Mapping[int, list[Any]]) -> Piece:
    return Piece(_last(fields, 1, b"").decode(), _last(fields, 2, 0.0), _last(fields, 3, NORMAL))


def _last(fields: Mapping[int, list[Any]], number: int, absent: Any) -> Any:
    return (fields.get(number) or [absent])[-1]


def _signed(value: int) -> int:
    """An int32 as protobuf writes it: negative ones in 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(data: bytes) -> dict[int, list[Any]]:
    """Values by field number (protobuf's wire format): int, float, or bytes."""
    found: dict[int, list[Any]] = {}
    for number, value in _walk(data):
        found.setdefault(number, []).append(value)
    return found


def _walk(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    value: Any
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 1:
            value, at = struct.unpack_from("<d", data, at)[0], at + 8
        elif kind == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        elif kind == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("it is cut short")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number is too long")


def convert(model: SentencePieceModel) -> Tokenizer:
    """The same ids from `tokenizers`; InputError for what it cannot express."""
    if model.model_type not in (UNIGRAM, BPE):
        raise InputError(
            f"SentencePiece models of type {MODEL_TYPES.get(model.model_type, model.model_type)} are not supported",
            hint="unigram and bpe are; `llmctl tokenize --kind word` or `char` trains the others",
        )
    if model.suffix_space or not model.escape:
        raise InputError("a SentencePiece model that writes spaces after words, or not as ▁, is not supported")
    tokenizer = Tokenizer(_bpe(model) if model.model_type == BPE else _unigram(model))
    tokenizer.normalizer = _normalizer(model)
    hidden = [piece.text for piece in model.pieces if piece.type in (CONTROL, UNKNOWN, UNUSED)]
    if model.model_type == UNIGRAM:
        # Their texts are entries of the vocabulary here, which plain text must not reach.
        tokenizer.pre_tokenizer = kinds.guard(hidden, model.byte_fallback)
    last = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    for piece in model.pieces:
        if piece.type in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece.text, special=True, normalized=False)])
        elif piece.type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.text, special=False, normalized=True)])
    return tokenizer


def _unigram(model: SentencePieceModel) -> models.Unigram:
    unknown = model.roles.get("unk", 0)
    return models.Unigram([(piece.text, piece.score) for piece in model.pieces], unknown, model.byte_fallback)


def _bpe(model: SentencePieceModel) -> models.BPE:
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    usable = {piece.text: piece.score for piece in model.pieces if piece.type == NORMAL}
    ranked = sorted(usable, key=lambda text: (-usable[text], vocabulary[text]))
    merges = [pair for text in ranked for pair in splits(text, usable)]
    unknown = model.pieces[model.roles.get("unk", 0)].text
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)


def splits(text: str, usable: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that make `text`."""
    pairs = ((text[:at], text[at:]) for at in range(1, len(text)))
    return [(left, right) for left, right in pairs if left in usable and right in usable]


def _normalizer(model: SentencePieceModel) -> Any:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.trim:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def role_names(model: SentencePieceModel) -> dict[str, str]:
    """Special tokens by role, in transformers' words."""
    found = {f"{role}_token": number for role, number in model.roles.items() if 0 <= number < len(model.pieces)}
    kept: Sequence[int] = (CONTROL, UNKNOWN)
    return {role: model.pieces[n].text for role, n in found.items() if model.pieces[n].type in kept}
