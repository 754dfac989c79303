"""Tokenizers of others as tokenizer directories: Hugging Face, the hub, tiktoken rank files, SentencePiece models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from llmctl import InputError, UsageError
from llmctl.text.tokenizer import Tokenizer as Opened
from llmctl.text.tokenizer import copy_tokenizer
from llmctl_tokenize import sentencepiece_model, tiktoken_ranks
from llmctl_tokenize.files import save

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm")


def import_tokenizer(
    source: Path, directory: Path, *, encoding: str = "", pattern: str = "", special: Mapping[str, int] | None = None
) -> str:
    """Write what `source` holds into `directory` and say what it was.

    `encoding` (one of tiktoken's), or `pattern` and `special` (ids by token), complete a rank file; with any other
    source they are a UsageError. InputError if the source is no tokenizer, or one that cannot be expressed.
    """
    kind, path = recognise(source)
    if kind != "tiktoken" and (encoding or pattern or special):
        raise UsageError(
            f"{source} is no tiktoken rank file: it says itself how text is cut and which tokens are special",
            hint="drop --encoding, --pattern and --special",
        )
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory} is not empty", hint="give a new directory")
    if kind == "huggingface":
        copy_tokenizer(path, directory)
    elif kind == "tiktoken":
        _import_ranks(path, directory, encoding, pattern, special or {})
    elif kind == "sentencepiece":
        model = sentencepiece_model.read_model(path.read_bytes())
        save(sentencepiece_model.convert(model), directory, sentencepiece_model.role_names(model))
    elif kind == "gpt2":
        _import_gpt2(path, directory)
    else:
        _import_bert(path, directory)
    Opened.load(directory)
    return kind


def recognise(source: Path) -> tuple[str, Path]:
    """What a file or directory holds, and the file (or directory) to read."""
    if source.is_dir():
        names = {path.name for path in source.iterdir()}
        if "tokenizer.json" in names:
            return "huggingface", source
        if found := next((name for name in SENTENCEPIECE if name in names), None):
            return "sentencepiece", source / found
        if {"vocab.json", "merges.txt"} <= names:
            return "gpt2", source
        if "vocab.txt" in names:
            return "bert", source
        ranks = sorted(name for name in names if name.endswith(".tiktoken"))
        if len(ranks) == 1:
            return "tiktoken", source / ranks[0]
        raise InputError(
            f"{source} holds no tokenizer",
            hint="known are tokenizer.json, *.tiktoken, tokenizer.model, vocab.json with merges.txt, and vocab.txt",
        )
    if not source.is_file():
        raise InputError(f"{source} does not exist")
    if source.name == "tokenizer.json":
        return "huggingface", source.parent
    if source.name == "vocab.txt":
        return "bert", source.parent
    if source.suffix in (".model", ".spm"):
        with source.open("rb") as file:
            # Llama 3 calls its rank file tokenizer.model; a protobuf begins with the tag of a piece.
            return ("sentencepiece" if file.read(1) == b"\n" else "tiktoken"), source
    return "tiktoken", source


def _import_ranks(path: Path, directory: Path, encoding: str, pattern: str, special: Mapping[str, int]) -> None:
    encoding = encoding or (path.stem if path.stem in tiktoken_ranks.ENCODINGS else "")
    if bool(encoding) == bool(pattern):
        raise UsageError(
            f"{path} does not say how text is cut",
            hint=f"give --encoding ({', '.join(tiktoken_ranks.ENCODINGS)}) or --pattern with --special",
        )
    known = tiktoken_ranks.ENCODINGS[encoding] if encoding else tiktoken_ranks.Encoding(pattern, {})
    wanted = tiktoken_ranks.Encoding(known.pattern, {**known.special, **special})
    tokenizer = tiktoken_ranks.convert(tiktoken_ranks.read_ranks(path), wanted)
    end = next((name for name in wanted.special if name == tiktoken_ranks.END), None)
    named = {"eos_token": end} if end else {}
    save(tokenizer, directory, named, [name for name in wanted.special if name != end])


def _import_gpt2(path: Path, directory: Path) -> None:
    """GPT-2's two files: `vocab.json` and `merges.txt`."""
    tokenizer = Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = _role_names(path) or {"eos_token": tiktoken_ranks.END}
    _save_known(tokenizer, directory, names)


def _import_bert(path: Path, directory: Path) -> None:
    """BERT's `vocab.txt`; `do_lower_case` of its configuration decides about capitals (true, where it is silent)."""
    config = _config(path)
    unknown = str(_text(config.get("unk_token")) or "[UNK]")
    tokenizer = Tokenizer(models.WordPiece.from_file(str(path / "vocab.txt"), unk_token=unknown))
    lower = bool(config.get("do_lower_case", True))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=config.get("strip_accents"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    defaults = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
    _save_known(tokenizer, directory, {**defaults, **_role_names(path)})


def _save_known(tokenizer: Tokenizer, directory: Path, names: Mapping[str, str]) -> None:
    """With those of the special tokens that the vocabulary has."""
    known = {role: name for role, name in names.items() if tokenizer.token_to_id(name) is not None}
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(known.values())]
    )
    save(tokenizer, directory, known)


def _role_names(path: Path) -> dict[str, str]:
    config = _config(path)
    return {role: str(_text(config[role])) for role in config if role.endswith("_token") and _text(config[role])}


def _config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            try:
                config |= json.loads((path / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{path / name} is no valid JSON: {error}") from error
    return config


def _text(value: Any) -> Any:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
