"""Byte-level BPE by the `tokenizers` library, saved as a Hugging Face tokenizer directory.

Ties between equally frequent pairs go to the smaller pair of ids, ids being given to special tokens first, then to the
byte alphabet by code point, then in order of creation; so equal text gives an equal tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llmctl_tokenize.special import SpecialTokens, sentinel_names

# Both as onnxruntime-extensions knows them: it refuses other counts of digits, {1,2} included.
PATTERNS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}
NO_LIMIT = int(1e30)
"""transformers' own value for "no limit": the context length belongs to a model, not to its tokenizer."""


def untrained(pattern: str) -> Tokenizer:
    """A byte-level BPE tokenizer without merges."""
    tokenizer = Tokenizer(models.BPE())
    if pattern == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        cut = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, whole])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(
    texts: Iterator[str], vocab_size: int, min_frequency: int, pattern: str, special: SpecialTokens, sentinels: int
) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens: fewer if the texts hold no more pairs of `min_frequency`.

    The special tokens have the first ids, `sentinels` the last.
    """
    tokenizer = untrained(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - sentinels,
        min_frequency=min_frequency,
        special_tokens=list(special.tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in sentinel_names(sentinels)])
    if frame := special.processor():
        tokenizer.post_processor = frame
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, special: SpecialTokens, sentinels: int) -> None:
    """Write the files that `AutoTokenizer.from_pretrained` reads."""
    tokenizer.save(str(directory / "tokenizer.json"))
    further = [*special.further, *reversed(sentinel_names(sentinels))]
    additional = {"additional_special_tokens": further} if further else {}
    config = {
        **special.names,
        "added_tokens_decoder": {
            str(number): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token, number in _numbered(tokenizer, special, sentinels)
        },
        **additional,
        "clean_up_tokenization_spaces": False,
        "model_max_length": NO_LIMIT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"chat_template": special.template} if special.template else {}),
    }
    names = {**special.names, **additional}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if special.template:
        (directory / "chat_template.jinja").write_text(special.template, encoding="utf-8")


def _numbered(tokenizer: Tokenizer, special: SpecialTokens, sentinels: int) -> list[tuple[str, int]]:
    return [(token, tokenizer.token_to_id(token)) for token in (*special.tokens, *sentinel_names(sentinels))]
