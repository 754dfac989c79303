"""How a model wants to be sampled when nobody says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmctl import InputError
from llmctl.generation_config import FILE, read_generation_config, rules_of
from llmctl.generator import Sampling

DRAWING = {"temperature", "top_k", "top_p", "min_p"}
SEARCHING = {"beams", "length_penalty", "early_stopping"}


def default_sampling(directory: Path, **given: Any) -> Sampling:
    """How a model wants to be sampled: its `generation_config.json`, read as transformers reads it.

    What is `given` overrides the file. Without `do_sample` that is greedy, or a beam search with `num_beams`; with it
    temperature 1, top-k 50 and top-p 1 unless it says otherwise. A repetition penalty and rules (forced and banned
    tokens) hold for all of them. Who is given beams gets no draws from the file, and who is given draws no beams.
    """
    wanted = _read(directory)
    draws = given.get("temperature") or given.get("top_k") or given.get("top_p", 1) < 1 or given.get("min_p")
    settled = set()
    if "beams" in given and not draws or ("beams" in wanted and given.get("temperature") == 0):
        settled |= DRAWING
    if draws or given.get("beams") == 1:
        settled |= SEARCHING
    wanted = {name: value for name, value in wanted.items() if name not in settled}
    if "beams" in wanted and wanted.get("temperature"):
        raise InputError(
            f"{directory / FILE} asks for beams that are drawn (do_sample with num_beams), which is not offered",
            hint="set do_sample to false or num_beams to 1 there",
        )
    return Sampling(**{**wanted, **given})


def _read(directory: Path) -> dict[str, Any]:
    """The values of `Sampling` that the file sets."""
    said = read_generation_config(directory)
    found = {name: said[name] for name in ("repetition_penalty",) if name in said}  # greedy or not
    if (rules := rules_of(said)) is not None:
        found["rules"] = rules
    if said.get("num_beams", 1) > 1:
        found |= {"beams": said["num_beams"]}
        found |= {name: said[name] for name in ("length_penalty", "early_stopping") if name in said}
    if said.get("do_sample"):
        found |= {"temperature": 1.0, "top_k": 50, **{name: said[name] for name in DRAWING if name in said}}
    return found
