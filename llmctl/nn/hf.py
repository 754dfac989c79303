"""Models as Hugging Face directories, both ways: `save_model` and `load_model`. Strict: every tensor is accounted for.

A weight's name and layout follow from its module's; the tables below are all there is. GPT-2 stores its matrices as
`(in, out)` and query, key and value as one.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmctl.errors import InputError, StageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.text.tokenizer import copy_tokenizer

_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "unembedding": "lm_head",
    "blocks.N.attention_norm": "model.layers.N.input_layernorm",
    "blocks.N.attention.q": "model.layers.N.self_attn.q_proj",
    "blocks.N.attention.k": "model.layers.N.self_attn.k_proj",
    "blocks.N.attention.v": "model.layers.N.self_attn.v_proj",
    "blocks.N.attention.out": "model.layers.N.self_attn.o_proj",
    "blocks.N.attention.q_norm": "model.layers.N.self_attn.q_norm",
    "blocks.N.attention.k_norm": "model.layers.N.self_attn.k_norm",
    "blocks.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blocks.N.ffn.gate": "model.layers.N.mlp.gate_proj",
    "blocks.N.ffn.up": "model.layers.N.mlp.up_proj",
    "blocks.N.ffn.down": "model.layers.N.mlp.down_proj",
}
_GPT2_NAMES = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "unembedding": "lm_head",
    "blocks.N.attention_norm": "transformer.h.N.ln_1",
    "blocks.N.attention.q": "transformer.h.N.attn.c_attn",
    "blocks.N.attention.k": "transformer.h.N.attn.c_attn",
    "blocks.N.attention.v": "transformer.h.N.attn.c_attn",
    "blocks.N.attention.out": "transformer.h.N.attn.c_proj",
    "blocks.N.ffn_norm": "transformer.h.N.ln_2",
    "blocks.N.ffn.up": "transformer.h.N.mlp.c_fc",
    "blocks.N.ffn.down": "transformer.h.N.mlp.c_proj",
}
_NAMES = {"llama": _LLAMA_NAMES, "qwen3": _LLAMA_NAMES, "gpt2": _GPT2_NAMES}

# Buffers that old checkpoints carry beside the weights; they are constants.
_CONSTANTS = re.compile(r".*(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)")
_FUSED = ("q", "k", "v")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.ckpt")


def save_model(model: Transformer, directory: Path, tokenizer_from: Path | None = None) -> None:
    """Write `config.json`, `generation_config.json`, `model.safetensors` and, from `tokenizer_from`, the tokenizer.

    Weights keep their dtype; equal models give equal bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = to_hf_tensors(model)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    config = model.config.to_hf()
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    _write_json(directory / "config.json", dict(sorted({**config, "dtype": dtype}.items())))
    _write_json(directory / "generation_config.json", ids)
    try:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise StageError(f"cannot write model.safetensors: {error}", hint="is the disk full?") from error
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, directory)


def load_model(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Transformer:
    """Read a Hugging Face directory of a family in `llmctl.nn.config.HF_CLASSES`, in training mode.

    `dtype=None` keeps the stored one. Raises InputError for another architecture, a missing, unexpected or misshapen
    tensor, a pickle, a damaged file.
    """
    directory = Path(directory)
    config = load_config(directory)
    tensors = _read_tensors(directory, device)
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
    config = ModelConfig.from_hf(_read_json(directory / "config.json"))
    if not (directory / "generation_config.json").is_file():
        return config
    ids = _read_json(directory / "generation_config.json").get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    others = [id for id in listed if isinstance(id, int) and id not in config.eos_ids and 0 <= id < config.vocab_size]
    return replace(config, other_eos_ids=(*config.other_eos_ids, *others)) if others else config


def hf_name(config: ModelConfig, name: str) -> str:
    """The Hugging Face name of our parameter `name` (`blocks.3.ffn.up.weight`)."""
    module, _, kind = name.rpartition(".")
    number = re.search(r"\d+", module)
    pattern = re.sub(r"\d+", "N", module)
    hf = _NAMES[config.arch][pattern]
    return f"{hf.replace('N', number.group()) if number else hf}.{kind}"


def to_hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every weight under its Hugging Face name and in its layout, on the CPU; a tied head is left out."""
    grouped: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu()
        if _transposed(model.config, name):
            tensor = tensor.T
        grouped.setdefault(hf_name(model.config, name), []).append(tensor)
    # Only GPT-2's c_attn has several parts; named_parameters gives them as q, k, v.
    return {name: torch.cat(parts, dim=-1).contiguous() for name, parts in grouped.items()}


def from_hf_tensors(model: Transformer, tensors: dict[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """The state dict of `model` out of Hugging Face tensors; `source` is named in errors. Nothing may be left over."""
    config = model.config
    tensors = _canonical(config, tensors, source)
    expected = {name: hf_name(config, name) for name, _ in model.named_parameters()}
    missing = sorted(set(expected.values()) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected.values()))
    if missing or unexpected:
        parts = [
            f"{what}: {_few(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise InputError(
            f"the tensors in {source} are not those of its config.json ({config.arch}, {config.layers} layers); "
            + "; ".join(parts)
        )
    state = {}
    for name, parameter in model.named_parameters():
        tensor = tensors[expected[name]]
        fused = _fused_part(config, name)
        whole = torch.Size((*parameter.shape[:0:-1], 3 * parameter.shape[0])) if fused is not None else parameter.shape
        if fused is None and _transposed(config, name):
            whole = parameter.shape[::-1]
        if tensor.shape != whole:
            raise InputError(f"{expected[name]} in {source} has shape {list(tensor.shape)}, expected {list(whole)}")
        if fused is not None:
            tensor = tensor.chunk(3, dim=-1)[fused]
        state[name] = (tensor.T if _transposed(config, name) else tensor).contiguous()
    return state


def _transposed(config: ModelConfig, name: str) -> bool:
    """GPT-2's Conv1D layers hold their matrix as `(in, out)`."""
    return config.arch == "gpt2" and name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def _fused_part(config: ModelConfig, name: str) -> int | None:
    """Which third of GPT-2's `c_attn` holds this parameter."""
    parts = name.split(".")
    if config.arch == "gpt2" and parts[-2] in _FUSED:
        return _FUSED.index(parts[-2])
    return None


def _canonical(config: ModelConfig, tensors: dict[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """Without constant buffers, with the prefix that base-model checkpoints lack, without a tied head's copy."""
    tensors = {name: tensor for name, tensor in tensors.items() if not _CONSTANTS.fullmatch(name)}
    names = _NAMES[config.arch]
    prefix = names["embedding"].partition(".")[0] + "."
    if tensors and not any(name.startswith(prefix) for name in tensors):
        tensors = {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in tensors.items()}
    head, embedding = "lm_head.weight", names["embedding"] + ".weight"
    if config.tie_embeddings and head in tensors and embedding in tensors:
        if not torch.equal(tensors[head], tensors[embedding]):
            raise InputError(
                f"{head} in {source} differs from {embedding}, though config.json ties them",
                hint="set tie_word_embeddings to false in config.json",
            )
        del tensors[head]
    return tensors


def _read_tensors(directory: Path, device: torch.device | str) -> dict[str, Tensor]:
    """All tensors of `model.safetensors` or of the shards its index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not single.exists() and not index.exists():
        pickles = [name for name in _PICKLES if (directory / name).exists()]
        if pickles:
            raise InputError(
                f"{directory} holds its weights as a pickle ({pickles[0]}), which can run any code when it is read",
                hint="convert it: transformers' model.save_pretrained(directory) writes model.safetensors",
            )
        raise InputError(f"{directory} has no model.safetensors")
    if single.exists():
        return _read_file(single, device)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index} has no `weight_map`")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        tensors.update(_read_file(directory / Path(shard).name, device))
    if set(tensors) != set(weight_map):
        raise InputError(f"{index.name} and its files differ in {_few(sorted(set(tensors) ^ set(weight_map)))}")
    return tensors


def _read_file(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    if not path.exists():
        raise InputError(f"{path} is missing, though the index names it")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}", hint="copy or download it again") from error


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
