"""The files beside the graph: configuration, generation defaults, tokenizer, and what onnxruntime-genai reads."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import InputError
from llmctl.generation_config import of_config
from llmctl.text.pooling import POOLING_FILES
from llmctl.text.tokenizer import FILES

GENAI_TYPE = "llama"
"""onnxruntime-genai's plainest decoder-only type. The type picks its token loop, not the mathematics, which are in the
graph; "gpt2" there means another kind of graph, with one past tensor per layer."""


def read_config(directory: Path) -> dict[str, Any]:
    """The model's `config.json`; InputError if it is missing or damaged."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing", hint="give a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object")
    return config


def copy_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and pooling as they are; write `generation_config.json` where there is none."""
    for name in ("config.json", "generation_config.json", *FILES, *POOLING_FILES):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    generation = target / "generation_config.json"
    if not generation.is_file():
        _write(generation, of_config(read_config(source)))


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that onnxruntime-genai wants; `head_size` and `kv_heads` are the cache's."""

    context: int
    dim: int
    heads: int
    head_size: int
    kv_heads: int
    layers: int


def write_genai_config(target: Path, config: dict[str, Any], shape: Shape, *, in_place: bool, positions: bool) -> None:
    """Write `genai_config.json`, from which onnxruntime-genai (0.18) loads the bundle.

    `in_place`: past and present share one buffer of `context` slots. `positions`: the graph has `position_ids`.
    """
    generation = target / "generation_config.json"
    ids = {**config, **(json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {})}
    decoder = {
        **_graph(positions),
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": shape.head_size,
        "hidden_size": shape.dim,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
    }
    model = {
        **_special_ids(ids),
        "context_length": shape.context,
        "decoder": decoder,
        "type": GENAI_TYPE,
        "vocab_size": config["vocab_size"],
    }
    search = {**GREEDY, "max_length": shape.context, "past_present_share_buffer": in_place}
    _write(target / "genai_config.json", {"model": model, "search": search})


GREEDY = {
    "do_sample": False,
    "early_stopping": True,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def _graph(positions: bool) -> dict[str, Any]:
    """The names of the graph's inputs and outputs."""
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        **({"position_ids": "position_ids"} if positions else {}),
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    return {"filename": "model.onnx", "inputs": inputs, "outputs": outputs}


def _special_ids(ids: dict[str, Any]) -> dict[str, Any]:
    """The ids of special tokens; onnxruntime-genai refuses null."""
    eos, pad = ids.get("eos_token_id"), ids.get("pad_token_id")
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    return {
        "bos_token_id": ids.get("bos_token_id") or 0,
        "eos_token_id": eos if eos is not None else 0,
        "pad_token_id": pad if pad is not None else (first_eos or 0),
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
