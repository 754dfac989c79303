"""A trained or imported tokenizer as the directory that `AutoTokenizer.from_pretrained` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

NO_LIMIT = int(1e30)
"""transformers' own value for "no limit": the context length belongs to a model, not to its tokenizer."""


def save(
    tokenizer: Tokenizer,
    directory: Path,
    names: Mapping[str, str],
    further: Sequence[str] = (),
    template: str | None = None,
) -> None:
    """Write `tokenizer.json`, its configuration and its chat template.

    `names` says which special token plays which part, in transformers' words; `further` are those without a part.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    additional = {"additional_special_tokens": list(further)} if further else {}
    added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
    config = {
        **names,
        "added_tokens_decoder": {
            str(number): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for number, token in sorted(added.items())
        },
        **additional,
        "clean_up_tokenization_spaces": False,
        "model_max_length": NO_LIMIT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"chat_template": template} if template else {}),
    }
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    contents = {"special_tokens_map.json": {**names, **additional}, "tokenizer_config.json": config}
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
