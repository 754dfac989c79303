"""Read a tiktoken rank file (a base64 token and its rank per line) and write it as `tokenizer.json`."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from llmctl import InputError

R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)
_UPPER, _LOWER, _ENDING = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@dataclass(frozen=True)
class Encoding:
    """What a rank file leaves out: how text is cut, and the special tokens with their ids."""

    pattern: str
    special: Mapping[str, int]


END = "<|endoftext|>"
ENCODINGS = {
    "r50k_base": Encoding(R50K, {END: 50256}),
    "p50k_base": Encoding(R50K, {END: 50256}),
    "cl100k_base": Encoding(
        CL100K,
        {
            END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Encoding(O200K, {END: 199999, "<|endofprompt|>": 200018}),
}
"""OpenAI's, as tiktoken has them (tiktoken_ext/openai_public.py)."""


def read_ranks(path: Path) -> dict[bytes, int]:
    """Ranks by token; InputError with the line that is wrong."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f"{path}:{number}: no rank: {error}", hint="each line is a token in base64, a space and its rank"
            ) from error
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise InputError(f"{path} has no token for the byte {missing:#04x}", hint="is the file complete?")
    if len({*ranks.values()}) < len(ranks):
        raise InputError(f"{path} gives two tokens the same rank", hint="is the file damaged?")
    return ranks


def convert(ranks: Mapping[bytes, int], encoding: Encoding) -> Tokenizer:
    """The same ids from `tokenizers`: a merge for each way to make a token of two others, by the token's rank.

    Ids that neither ranks nor special tokens use are filled with `<|reserved_ID|>`.
    """
    alphabet = byte_alphabet()
    vocabulary = {"".join(alphabet[byte] for byte in token): rank for token, rank in ranks.items()}
    if clash := next((name for name, id in encoding.special.items() if id in set(ranks.values())), None):
        raise InputError(f"the special token {clash} has the id of a rank", hint="give its id as NAME=ID")
    last = max(ranks.values())
    places = {id: name for name, id in encoding.special.items()}
    for id in set(range(last)) - set(ranks.values()):
        vocabulary[places.get(id, f"<|reserved_{id}|>")] = id
    tokenizer = Tokenizer(models.BPE(vocabulary, merges(ranks, alphabet), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(oniguruma(encoding.pattern)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Those above the ranks get their ids in the order in which they are added.
    above = range(last + 1, 1 + max([last, *encoding.special.values()]))
    within = [name for id, name in sorted(places.items()) if id <= last]
    names = [*within, *(places.get(id, f"<|reserved_{id}|>") for id in above)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def merges(ranks: Mapping[bytes, int], alphabet: Mapping[int, str]) -> list[tuple[str, str]]:
    """Pairs in the order in which they merge: by the rank of what they make, then by their own."""
    found = []
    for token, rank in ranks.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    return [
        ("".join(alphabet[b] for b in left), "".join(alphabet[b] for b in right)) for *_, left, right in sorted(found)
    ]


def oniguruma(pattern: str) -> str:
    r"""A pattern of Rust's for Oniguruma: there `{1,3}+` repeats instead of being possessive, and `$` ends a line."""
    pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)
    return re.sub(r"(\\.|\[(?:\\.|[^\]])*\])|\$", lambda match: match[1] or r"\z", pattern)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's character for each byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in shown}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + number) for number, byte in enumerate(rest)}
