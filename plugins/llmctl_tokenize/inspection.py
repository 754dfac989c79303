"""What a tokenizer is made of, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize.tiktoken_ranks import byte_alphabet

SHOWN = 8


def inspect(tokenizer: Tokenizer) -> dict[str, Any]:
    """Facts by name; `problems` are texts."""
    state = json.loads((tokenizer.directory / "tokenizer.json").read_text(encoding="utf-8"))
    model = state["model"]
    merges = model.get("merges", [])
    return {
        "id": tokenizer.digest,
        "kind": model.get("type", "BPE"),
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": dict(sorted(tokenizer.special_tokens().items(), key=lambda item: item[1])),
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
        "unk": tokenizer.unk_id,
        "normalizer": _described(state.get("normalizer")),
        "pre_tokenizer": _described(state.get("pre_tokenizer")),
        "decoder": _described(state.get("decoder")),
        "byte_fallback": bool(model.get("byte_fallback")),
        "chat_template": tokenizer.has_chat_template,
        "merges": len(merges),
        "first_merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges[:SHOWN]],
        "problems": list(problems(tokenizer, state)),
    }


def _described(part: Any) -> str:
    """The types of a component, in order: `Sequence(Split, ByteLevel)`."""
    if not part:
        return "none"
    within = next((part[name] for name in ("normalizers", "pretokenizers", "decoders") if name in part), None)
    return f"{part['type']}({', '.join(map(_described, within))})" if within else str(part["type"])


def problems(tokenizer: Tokenizer, state: dict[str, Any]) -> Iterator[str]:
    """One line for each thing that would trouble a model or a user."""
    vocabulary = tokenizer.vocabulary()
    if tokenizer.vocab_size % 64:
        more = -tokenizer.vocab_size % 64
        size = tokenizer.vocab_size
        yield f"{size} tokens are no multiple of 64: matrix products are slower ({more} more would be one)"
    if tokenizer.eos_id is None and tokenizer.sep_id is None:
        yield "no EOS and no [SEP]: a model cannot say that it has finished"
    if tokenizer.pad_id is None:
        yield "no PAD: batches need another token for padding"
    if holes := tokenizer.vocab_size - len(vocabulary):
        yield f"{holes} ids below {tokenizer.vocab_size} stand for nothing"
    entered = [name for name, id in tokenizer.special_tokens().items() if id in tokenizer.encode(name)]
    if entered := [name for name in entered if tokenizer.special_tokens()[name] != tokenizer.unk_id]:
        yield f"typed text becomes a special token: {', '.join(entered[:SHOWN])}"
    if lost := unreachable(tokenizer, state):
        shown = ", ".join(map(repr, lost[:SHOWN]))
        yield f"{len(lost)} tokens are never the encoding of their own text, such as {shown}"
    sample = "Zażółć gęślą jaźń, 你好 \U0001f642 \u2581\x00\r\n\tx  y"
    if tokenizer.decode(tokenizer.encode(sample), skip_special=False) != sample:
        yield "text does not always come back as it was: it is normalised, or characters are unknown"


def unreachable(tokenizer: Tokenizer, state: dict[str, Any]) -> list[str]:
    """Texts of the tokens that encoding their text does not give: never trained, or hidden by the cuts.

    Parts of characters and pieces that only continue words have no text of their own and are left out.
    """
    bytes_of = {char: byte for byte, char in byte_alphabet().items()}
    special = tokenizer.special_ids
    texts: dict[int, str] = {}
    for token, id in tokenizer.vocabulary().items():
        if id in special or token.startswith("##") or (len(token) == 6 and token.startswith("<0x")):
            continue
        if tokenizer.byte_level:
            try:
                texts[id] = bytes(bytes_of[char] for char in token).decode()
            except (KeyError, UnicodeDecodeError):
                continue
        else:
            texts[id] = token.replace("▁", " ") if "▁" in json.dumps(state["decoder"], ensure_ascii=False) else token
    ids = sorted(texts)
    found = tokenizer.encode_batch([texts[id] for id in ids])
    return [texts[id] for id, encoded in zip(ids, found, strict=True) if id not in encoded]
