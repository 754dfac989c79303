"""The goals of `llmctl init`: what each one needs, and the spec it becomes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmctl.errors import InputError, UsageError
from llmctl.spec.nodes import scalar_value
from llmctl.starter.material import KINDS, Found, look, look_at_model

TEXTS = ("files", "dataset.text")
TEMPLATES = Path(__file__).parent / "templates"
MODULES = "[bisect, fnmatch, fractions, glob, heapq, json, keyword, shlex, stat, string, textwrap]"
"""Of Python's library, what a smoke run reads."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One goal: the kinds of data and models it takes, first the usual one; `()` means none.

    With `corpus` the data may be left out: the library of the running Python is taken. `elsewhere` says where data of
    another kind belongs.
    """

    name: str
    help: str
    data: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    corpus: bool = False
    model_needed: bool = False
    trains: bool = False
    """Whether the model itself is trained, which asks for one of the architectures that can be."""
    placeholder: str = ""
    elsewhere: Mapping[str, str] | None = None


_TO_RLHF = "preferences are for the stage rlhf, after fine-tuning: llmctl rlhf --model MODEL --data {path}"
GOALS = {
    goal.name: goal
    for goal in (
        Goal(
            name="pretrain",
            help="train a language model from nothing, on your texts or on Python's library",
            data=TEXTS,
            corpus=True,
        ),
        Goal(
            name="fine-tune",
            help="teach an existing model with conversations",
            data=("dataset.chat",),
            models=("model.hf",),
            model_needed=True,
            trains=True,
            placeholder="./data/chat.jsonl",
            elsewhere={
                "dataset.preference": _TO_RLHF,
                "dataset.text": "texts continue pre-training: llmctl train-pretrain --model MODEL; or derive "
                "conversations from them: llmctl data --files {path}",
                "files": "derive conversations from texts: llmctl data --files {path}",
            },
        ),
        Goal(
            name="compress",
            help="make an existing model smaller and compare it with the original",
            data=(*TEXTS, "dataset.chat"),
            models=("model.hf",),
            model_needed=True,
            trains=True,
            placeholder="./data/texts",
            elsewhere={"dataset.preference": "give texts or conversations of the kind that the model is for"},
        ),
        Goal(
            name="rag",
            help="answer from a folder of documents, with citations",
            data=TEXTS,
            models=("model.onnx", "model.hf"),
            corpus=True,
        ),
        Goal(
            name="evaluate",
            help="measure a model on texts, conversations or preferences",
            data=(*TEXTS, "dataset.chat", "dataset.preference", "dataset.tokens"),
            models=("model.hf", "model.onnx"),
            model_needed=True,
            placeholder="./data/texts",
        ),
    )
}


def find_goal(name: str) -> Goal:
    """The goal of that name. UsageError with the near one, else with all."""
    if name in GOALS:
        return GOALS[name]
    words = {"finetune": "fine-tune", "sft": "fine-tune", "train": "pretrain", "eval": "evaluate", "prune": "compress"}
    near = [words[name]] if name in words else get_close_matches(name, GOALS, 1)
    raise UsageError(f"no goal `{name}`", hint=f"did you mean `{near[0]}`?" if near else f"goals: {', '.join(GOALS)}")


def find_data(goal: Goal, path: str) -> Found:
    """What lies at `path`, if the goal can use it. InputError says what was found and what is wanted."""
    found = look(path)
    if found.kind in goal.data:
        return found
    wanted = " or ".join(dict.fromkeys(KINDS[kind] for kind in goal.data))
    hint = (goal.elsewhere or {}).get(found.kind, "").format(path=path)
    raise InputError(f"{path} holds {found.text}; {goal.name} wants {wanted}", hint=hint or found.hint or None)


def find_model(goal: Goal, path: str) -> Found:
    """The model at `path`. InputError if it is none, or one that the goal cannot use."""
    if not goal.models:
        raise UsageError(f"{goal.name} takes no --model", hint="fine-tune, compress, rag and evaluate do")
    return look_at_model(path, goal.models, trains=goal.trains)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A spec about to be written, with what the user must still put in place (path → what belongs there)."""

    text: str
    missing: Mapping[str, str]


def render(goal: Goal, name: str, directory: Path, data: Found | None, model: Found | None, schema: str = "") -> Plan:
    """The text of `directory/NAME.yaml`. What was not given and cannot be left out becomes a path to fill."""
    import jinja2

    missing: dict[str, str] = {}
    if data is None and not goal.corpus:
        kind = goal.data[0]
        missing[goal.placeholder] = KINDS[kind]
        data = Found(path=Path(goal.placeholder), kind=kind, text="", uri=goal.placeholder, splits=("train",))
    if model is None and goal.model_needed:
        missing["./models/base"] = "the model: config.json, model.safetensors, tokenizer.json"
        model = Found(path=Path("./models/base"), kind=goal.models[0], text="", uri="./models/base")
    environment = jinja2.Environment(
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # YAML, not HTML; paths are quoted by `_uri`
    )
    environment.filters["scalar"] = _scalar
    template = environment.from_string((TEMPLATES / f"{goal.name}.yaml.jinja").read_text(encoding="utf-8"))
    values = {"name": name, "file": f"{name}.yaml", **_derived(data)}
    text = template.render(data=_located(data, directory), model=_located(model, directory), **values)
    head = f"# yaml-language-server: $schema={schema}\n" if schema else ""
    return Plan(text=head + text, missing=missing)


def _derived(data: Found | None) -> dict[str, Any]:
    """What follows from the data: where it is measured, how large a vocabulary it fills."""
    kind = data.kind if data else "files"
    by_rows = kind in ("dataset.chat", "dataset.preference")
    held_out = data is not None and "validation" in data.splits
    split = "validation" if not by_rows or held_out else "train"
    size = data.bytes if data and data.bytes else 3 << 20  # what is read of Python's library
    return {
        "texts": kind in TEXTS,
        "chat": kind == "dataset.chat",
        "feed": "sources.chat" if kind == "dataset.chat" else "tokens",
        "by_rows": by_rows,
        "held_out": held_out,
        "split": split,
        "few": "limit: 4, resamples: 100" + (", max_new_tokens: 8" if kind == "dataset.chat" else "")
        if by_rows
        else "max_tokens: 16384",
        "modules": MODULES,
        "share": 0.08 if size > 1 << 20 else 0.2,  # of a small corpus 8 % may be no document at all
        # About 1000 bytes of text for every token of the vocabulary, so that each is seen often enough to be learnt.
        "vocabulary": next((count for count in (4096, 2048, 1024, 512) if size >= 1000 * count), 300),
    }


def _located(found: Found | None, directory: Path) -> Any:
    """`kind` and the YAML text of the path as a spec in `directory` names it."""
    return found and {"kind": found.kind, "uri": _uri(found.uri or spec_path(found.path, directory))}


def spec_path(path: Path, directory: Path) -> str:
    """Relative to the spec where it lies close by, else absolute; always with the `./` or `/` that makes it a path."""
    relative = os.path.relpath(path.absolute(), directory.absolute())
    if relative.startswith("../../.."):
        return str(path.absolute())
    return relative if relative == ".." or relative.startswith("../") else f"./{relative}"


def _scalar(name: str) -> str:
    """A name as a YAML scalar: `2024`, `1e5` and `true` are text only in quotes."""
    return name if isinstance(scalar_value(name), str) else json.dumps(name)


def _uri(text: str) -> str:
    """As a YAML scalar: plain where that is safe inside `{}`, else quoted."""
    return text if re.fullmatch(r"[\w./~-]+", text) else json.dumps(text, ensure_ascii=False)
