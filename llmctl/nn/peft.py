"""LoRA adapters in peft's files, read for our own weights: `adapter_config.json` beside `adapter_model.safetensors`.

LoRA (Hu et al. 2106.09685) adds `scale * up @ down` of a small rank to a matrix; the scale is alpha / rank, or
alpha / sqrt(rank) with rsLoRA (2312.03732). Whatever else peft can put into an adapter changes the model otherwise and
is refused by name, never left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmctl.errors import InputError
from llmctl.nn.hf import split_parts, stored_name
from llmctl.nn.names import is_transposed
from llmctl.nn.shards import read_tensors
from llmctl.nn.transformer import Transformer

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight\Z")
_COPY = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.base_layer)?\.weight\Z")
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations after which the weights that peft trained on are no longer the base's own."""


@dataclass(frozen=True, eq=False)
class Factors:
    """What is added to one weight `(out, in)`: `up @ down`, float32."""

    down: Tensor
    """`(rank, in)`. Weights that the family stores as one share one object."""
    up: Tensor
    """`(out, rank)`, the scale within."""


Adapter = Mapping[str, Factors]
"""By our names of the weights, `blocks.3.attention.q.weight`."""


def read_adapter(directory: Path, model: Transformer, base: str = "") -> Adapter:
    """The adapter in `directory`, for `model`, whose artifact is `base` if that is known.

    InputError, naming the file, for an adapter of another base, of another kind, or that does not fit the weights.
    """
    config = _config(directory)
    _refuse(directory, config)
    said = str(config.get("base_model_name_or_path") or "")
    if base and said.startswith("sha256:") and said != base:
        raise InputError(
            f"the adapter in {directory} was trained on {said[:19]}…, the model is {base[:19]}…",
            hint="give the model that its adapter_config.json names",
        )
    groups = _groups(model)
    found: dict[str, Factors] = {}
    for module, (down, up) in _pairs(directory, model).items():
        names = groups.get(f"{module}.weight")
        if names is None:
            raise InputError(
                f"{directory / TENSORS} changes `{module}`, and no matrix of the model is called so",
                hint="an adapter of embeddings, of a tied head or of another architecture must be merged by peft first",
            )
        shapes = [model.get_parameter(name).shape for name in names]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        if down.shape != (down.shape[0], columns) or up.shape != (rows, down.shape[0]):
            raise InputError(
                f"`{module}` in {directory / TENSORS} is {list(up.shape)} x {list(down.shape)}, "
                f"the model's matrix is [{rows}, {columns}]",
                hint="it was trained on another model",
            )
        try:
            up = up * _scale(config, module, down.shape[0])
        except (AttributeError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
            raise InputError(
                f"{directory / CONFIG} gives no scale for `{module}`, of rank {down.shape[0]}: {error}",
                hint="mend `lora_alpha` or `alpha_pattern`, or have peft write the adapter again",
            ) from error
        for name, part in zip(names, _parts(model, names, up), strict=True):
            found[name] = Factors(down, part.contiguous())
    if not found:
        raise InputError(f"{directory / TENSORS} holds no LoRA matrices")
    return found


@contextmanager
def merged(model: Transformer, adapter: Adapter) -> Iterator[Transformer]:
    """`model` with the adapter in its weights, which are its own again, bit for bit, afterwards."""
    kept = {name: model.get_parameter(name).detach().clone() for name in adapter}
    with torch.no_grad():
        for name, factors in adapter.items():
            model.get_parameter(name).add_(factors.up @ factors.down)
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.get_parameter(name).copy_(weight)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", hint="give a directory that peft has written") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object", hint="give a directory that peft has written")
    return config


def _refuse(directory: Path, config: Mapping[str, Any]) -> None:
    """What an addition of `up @ down` to matrices cannot say."""
    kind, start = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    moved = isinstance(start, str) and start.startswith(_MOVES_THE_BASE)
    asked = {
        f"peft_type {kind}": kind != "LORA",
        "use_dora": config.get("use_dora"),
        f"bias {config.get('bias')}": config.get("bias", "none") != "none",
        f"init_lora_weights {start}": moved,
        **{
            name: config.get(name)
            for name in (
                "lora_bias",
                "modules_to_save",
                "trainable_token_indices",
                "target_parameters",
                "layer_replication",
                "alora_invocation_tokens",
                "use_bdlora",
                "use_qalora",
                "arrow_config",
                "kasa_config",
                "monteclora_config",
            )
        },
    }
    for what, wanted in asked.items():
        if wanted:
            raise InputError(
                f"the adapter in {directory} has {what}, and only plain LoRA is served unmerged",
                hint="merge it into the model with peft (`merge_and_unload`) and export that",
            )


def _groups(model: Transformer) -> dict[str, list[str]]:
    """The stored name of each matrix, and our weights in it: three where a family stores q, k and v as one."""
    groups: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and (name.startswith("blocks.") or name == "unembedding.weight"):
            groups.setdefault(stored_name(model.config, name), []).append(name)
    return groups


def _is_copy(name: str, tensor: Tensor, model: Transformer) -> bool:
    """Whether this is a weight of the model as it is: peft adds that of an adapted head, and of embeddings."""
    match = _COPY.match(name)
    stored = {stored_name(model.config, own): own for own, _ in model.named_parameters()}
    own = stored.get(f"{match[1]}.weight") if match else None
    return own is not None and torch.equal(tensor.float(), model.get_parameter(own).float())


def _pairs(directory: Path, model: Transformer) -> dict[str, tuple[Tensor, Tensor]]:
    """By the module's name: `lora_A (rank, in)` and `lora_B (out, rank)`, float32."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(directory / TENSORS, "cpu").items():
        match = _KEY.match(name)
        if match is None and _is_copy(name, tensor, model):
            continue
        if match is None or tensor.ndim != 2:
            raise InputError(
                f"`{name}` in {directory / TENSORS} is no LoRA matrix of a linear layer",
                hint="merge it into the model with peft (`merge_and_unload`) and export that",
            )
        sides.setdefault(match[1], {})[match[2]] = tensor.float()
    for module, found in sides.items():
        if set(found) != {"A", "B"}:
            raise InputError(f"{directory / TENSORS} has only one of the two matrices of `{module}`")
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})\Z", module):
            alpha = other
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _parts(model: Transformer, names: list[str], up: Tensor) -> list[Tensor]:
    """The rows of `up (out, rank)` that belong to each of our weights."""
    config = model.config
    if len(names) == 1:
        return [up]
    sizes = [model.get_parameter(name).shape[0] for name in names]
    return split_parts(config, names[0], up.T if is_transposed(config, names[0]) else up, sizes)
