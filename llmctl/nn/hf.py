"""Models as Hugging Face directories, both ways: `save_model` and `load_model`. Strict: every tensor is accounted for.

What transformers calls a weight is in `llmctl/nn/names.py`. Some families store several of our matrices as one (GPT-2's
and Phi-3's queries, keys and values), GPT's as `(in, out)`, BLOOM's head by head. A configuration that transformers
does not know keeps our own names.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmctl.errors import InputError
from llmctl.nn.auxiliary import save_auxiliary
from llmctl.nn.config import ModelConfig
from llmctl.nn.families import from_hf, in_transformers, to_hf
from llmctl.nn.names import NAMINGS, hf_name, is_transposed
from llmctl.nn.shards import MAX_SHARD_BYTES, read_shards, write_shards
from llmctl.nn.transformer import Transformer
from llmctl.nn.unpickle import read_pickles
from llmctl.text.tokenizer import copy_tokenizer

# Buffers that old checkpoints carry beside the weights; they are constants.
_CONSTANTS = re.compile(
    r".*(\.attn\.(masked_)?bias|rotary_emb\.inv_freq|embeddings\.position_ids)|(attn|h\.\d+\.attn)\.bias"
)
_GENERATION = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.ckpt")


def save_model(
    model: Transformer,
    directory: Path,
    tokenizer_from: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `config.json`, `generation_config.json`, `model.safetensors` and, from `tokenizer_from`, the tokenizer.

    Weights keep their dtype; equal models give equal bytes. Above `max_shard_bytes` they come in several files with an
    index, as transformers writes them. What an objective added to the model goes to `auxiliary.safetensors`, of which
    transformers knows nothing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = to_hf_tensors(model)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    config = to_hf(model.config)
    ids = {key: config[key] for key in _GENERATION if config.get(key) is not None}
    _write_json(directory / "config.json", dict(sorted({**config, "dtype": dtype}.items())))
    _write_json(directory / "generation_config.json", ids)
    write_shards(tensors, directory, max_shard_bytes)
    save_auxiliary(model, directory)
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, directory)


def load_model(
    directory: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    allow_pickle: bool = False,
) -> Transformer:
    """Read a Hugging Face directory of a family in `llmctl.nn.families`, or one of our own, in training mode.

    `dtype=None` keeps the stored one. With `allow_pickle` a `pytorch_model.bin` is read where there is nothing else,
    tensors only. Raises InputError for another architecture, a missing, unexpected or misshapen tensor, a pickle, a
    damaged file.
    """
    directory = Path(directory)
    config = load_config(directory)
    tensors = _read_tensors(directory, device, allow_pickle)
    with torch.device("meta"):
        model = Transformer(config)
    state = from_hf_tensors(model, tensors, directory)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def load_config(directory: Path) -> ModelConfig:
    """The configuration of a Hugging Face directory, without its weights.

    Ids that only `generation_config.json` lists as end of text (Qwen, Llama 3) become `other_eos_ids`.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} is no model: it has no config.json", hint="give a model.hf directory")
    config = from_hf(_read_json(directory / "config.json"))
    if not (directory / "generation_config.json").is_file():
        return config
    ids = _read_json(directory / "generation_config.json").get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    others = [id for id in listed if isinstance(id, int) and id not in config.eos_ids and 0 <= id < config.vocab_size]
    return replace(config, other_eos_ids=(*config.other_eos_ids, *others)) if others else config


def stored_name(config: ModelConfig, name: str) -> str:
    """What our parameter `name` (`blocks.3.ffn.up.weight`) is called in the files of this model."""
    return hf_name(config, name) if in_transformers(config) else name


def to_hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every weight under its stored name and in its layout, on the CPU; a tied head is left out."""
    config = model.config
    own = {name: parameter for name, parameter in model.named_parameters() if not name.startswith("auxiliary.")}
    grouped: dict[str, list[Tensor]] = {}
    for name, parameter in own.items():
        grouped.setdefault(stored_name(config, name), []).append(parameter.detach().cpu())
    if not in_transformers(config):
        return {name: parts[0].contiguous() for name, parts in grouped.items()}
    first = {stored_name(config, name): name for name in reversed(own)}
    return {name: _join(config, first[name], parts).contiguous() for name, parts in grouped.items()}


def _join(config: ModelConfig, name: str, parts: list[Tensor]) -> Tensor:
    """Our `parts` as the one tensor that the family stores; `name` is that of the first."""
    if is_transposed(config, name):
        parts = [part.T for part in parts]
    if len(parts) == 1:
        return parts[0]
    if NAMINGS[config.arch].by_head:
        heads = [part.reshape(config.heads, 1, config.head_dim, *part.shape[1:]) for part in parts]
        return torch.cat(heads, dim=1).flatten(0, 2)
    return torch.cat(parts, dim=-1 if NAMINGS[config.arch].transposed else 0)


def split_parts(config: ModelConfig, name: str, whole: Tensor, sizes: list[int]) -> list[Tensor]:
    """The inverse of `_join`; `sizes` are the first sizes of our parts."""
    if len(sizes) == 1:
        parts = [whole]
    elif NAMINGS[config.arch].by_head:
        heads = whole.reshape(config.heads, len(sizes), config.head_dim, *whole.shape[1:])
        return [part.flatten(0, 1) for part in heads.unbind(1)]
    else:
        parts = list(torch.split(whole, sizes, dim=-1 if NAMINGS[config.arch].transposed else 0))
    return [part.T if is_transposed(config, name) else part for part in parts]


def from_hf_tensors(model: Transformer, tensors: dict[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """The state dict of `model` out of stored tensors; `source` is named in errors. Nothing may be left over."""
    config = model.config
    ours = in_transformers(config)
    tensors = _canonical(model, tensors, source) if ours else tensors
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(stored_name(config, name), []).append(name)
    missing, unexpected = sorted(set(groups) - set(tensors)), sorted(set(tensors) - set(groups))
    if missing or unexpected:
        parts = [
            f"{what}: {_few(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise InputError(
            f"the tensors in {source} are not those of its config.json ({config.arch}, {config.layers} layers); "
            + "; ".join(parts)
        )
    state: dict[str, Tensor] = {}
    for stored, names in groups.items():
        shapes = [model.get_parameter(name).shape for name in names]
        # Joining empty tensors tells what the whole must look like.
        blank = [torch.empty(shape, device="meta") for shape in shapes]
        whole = _join(config, names[0], blank).shape if ours else shapes[0]
        if tensors[stored].shape != whole:
            raise InputError(f"{stored} in {source} has shape {list(tensors[stored].shape)}, expected {list(whole)}")
        sizes = [shape[0] for shape in shapes]
        found = split_parts(config, names[0], tensors[stored], sizes) if ours else [tensors[stored]]
        state |= {name: part.contiguous() for name, part in zip(names, found, strict=True)}
    return {name: state[name] for name, _ in model.named_parameters()}


def _canonical(model: Transformer, tensors: dict[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """Without constant buffers, with the prefix that base-model checkpoints lack, without copies of tied weights."""
    config = model.config
    tensors = {
        re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)): tensor
        for name, tensor in tensors.items()
        if not _CONSTANTS.fullmatch(name)
    }
    naming, expected = NAMINGS[config.arch], {stored_name(config, name) for name, _ in model.named_parameters()}
    prefix = naming.prefix
    if prefix and tensors and not any(name.startswith(prefix) for name in tensors):
        tensors = {prefix + name if prefix + name in expected else name: tensor for name, tensor in tensors.items()}
    for copy, original in _tied(model).items():
        if copy in tensors and copy not in expected and original in tensors:
            if not torch.equal(tensors[copy], tensors[original]):
                raise InputError(
                    f"{copy} in {source} differs from {original}, though config.json ties them",
                    hint="set tie_word_embeddings to false in config.json",
                )
            del tensors[copy]
    return tensors


def _tied(model: Transformer) -> dict[str, str]:
    """Names under which files may hold a second copy of a weight, and the one that counts."""
    config, names = model.config, {**NAMINGS[model.config.arch].modules}
    embedding = stored_name(config, "embedding.weight")
    copies = {f"{part}.embed_tokens.weight": embedding for part in ("encoder", "decoder")}
    if "unembedding" in names:
        copies[f"{names['unembedding']}.weight"] = embedding
    if model.masked is not None:
        copies[f"{names['unembedding']}.bias"] = stored_name(config, "masked.bias")
    return copies


def _read_tensors(directory: Path, device: torch.device | str, allow_pickle: bool) -> dict[str, Tensor]:
    """All tensors of `model.safetensors` or of the shards its index names; of a pickle only if that is allowed."""
    pickles = [name for name in _PICKLES if (directory / name).exists()]
    if not pickles or any((directory / f"model.safetensors{ending}").exists() for ending in ("", ".index.json")):
        return read_shards(directory, device)
    if allow_pickle:
        return {name: tensor.to(device) for name, tensor in read_pickles(directory).items()}
    raise InputError(
        f"{directory} holds its weights as a pickle ({pickles[0]}), which can run any code when it is read",
        hint="if you trust it: python -m llmctl.nn.unpickle DIRECTORY NEW reads tensors from it and nothing else",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is no JSON object")
    return values


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
