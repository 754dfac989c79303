"""How a model wants to be sampled when nobody says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmctl import InputError
from llmctl.generator import Sampling


def default_sampling(directory: Path) -> Sampling:
    """How a model wants to be sampled: its `generation_config.json`, read as transformers reads it.

    Without `do_sample` that is greedy; with it temperature 1, top-k 50 and top-p 1 unless the file says otherwise.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return Sampling()
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
    if not config.get("do_sample"):
        return Sampling()
    given = {name: config[name] for name in ("temperature", "top_k", "top_p") if config.get(name) is not None}
    return Sampling(**{"temperature": 1.0, "top_k": 50, **given})
