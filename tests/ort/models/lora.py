"""LoRA adapters in peft's files with random matrices, and transformers with such an adapter merged by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = "base_model.model."
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    path: Path,
    base: Path,
    targets: tuple[str, ...] = LINEAR,
    rank: int = 4,
    seed: int = 0,
    size: float = 0.1,
    layers: tuple[int, ...] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter of the matrices of `base` whose names end in `targets`, in `layers` or in all."""
    from safetensors.numpy import load_file, save_file

    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors = {}
    for name, weight in sorted(load_file(base / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        number = next((int(part) for part in module.split(".") if part.isdigit()), None)
        if module.endswith(targets) and (layers is None or number in layers):
            # GPT-2's Conv1D stores (in, out); peft's matrices do not.
            rows, columns = weight.shape[::-1] if config.get("fan_in_fan_out") else weight.shape
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = random.standard_normal(shape) * (size if side == "B" else columns**-0.5)
                tensors[f"{PREFIX}{module}.lora_{side}.weight"] = values.astype(np.float32)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    said |= {"base_model_name_or_path": str(base), "target_modules": list(targets), **config}
    (path / "adapter_config.json").write_text(json.dumps(said))
    return path


def merged(base: Path, adapter: Path) -> Any:
    """transformers' model of `base` with `W + alpha / r * B A` for every pair of the adapter, in float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config, tensors = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    with torch.no_grad():
        for name in tensors:
            if name.endswith(".lora_A.weight"):
                a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
                module = model.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
                added = config["lora_alpha"] / len(a) * b @ a
                module.weight += added.T if config.get("fan_in_fan_out") else added
    return model
