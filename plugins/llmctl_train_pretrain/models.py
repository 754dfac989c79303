"""`llmctl models`: the named models and any model directory, in numbers. Free of torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from llmctl.console import human_bytes, table, wants_colour
from llmctl.errors import InputError, UsageError
from llmctl.nn import counts
from llmctl.nn.config import ModelConfig
from llmctl.nn.families import FAMILIES, from_hf, in_transformers
from llmctl.nn.presets import PRESETS, near_presets, preset, preset_names
from llmctl.nn.published import PUBLISHED
from llmctl.spec.files import home_path, is_there

TRAINING, SERVING = ("float32", "bf16"), ("float32", "bf16", "int8", "int4")
CACHES = ("float32", "bf16", "int8")


@dataclass(frozen=True)
class Entry:
    """One model as the command knows it."""

    name: str
    source: str
    config: ModelConfig | None
    """None: an architecture that llmctl's own transformer does not compute."""
    note: str = ""
    elsewhere: str = ""
    """Why it goes through transformers; empty: it does not."""
    stored: int | None = None
    """Parameters counted in the files of a directory."""
    architecture: str = ""
    """The class that a directory's `config.json` names."""


@click.command()
@click.argument("name", required=False)
@click.option("--vocab-size", type=click.IntRange(1), help="Count with this vocabulary. Default: the model's own.")
@click.option("--parallel", help="What each process would hold, as in dp_shard=16,tp=4; tried without any.")
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", help="How to print it.",
)  # fmt: skip
def models(name: str | None, vocab_size: int | None, parallel: str | None, format_: str) -> None:
    """List the models that llmctl knows by name, or show NAME: shape, parameters, operations, memory, source.

    NAME is one of the list, a model directory, or an artifact. Small presets are counted with 8192 tokens.
    """
    entries = [named(other, vocab_size) for other in preset_names()] if name is None else [find(name, vocab_size)]
    spread = spread_over(entries, name, parallel)
    if format_ == "json":
        more = {"spread": spread} if spread else {}
        click.echo(json.dumps([{**facts(entry), **more} for entry in entries], indent=2, ensure_ascii=False))
    elif name is None:
        show_list(entries)
    else:
        click.echo(details(entries[0]) + (f"\n\n{spread_text(spread)}" if spread else ""))


def spread_over(entries: Sequence[Entry], name: str | None, parallel: str | None) -> dict[str, Any]:
    """What each of many processes would hold of the one model; nothing without --parallel."""
    if parallel is None:
        return {}
    config = entries[0].config
    if name is None or config is None:
        raise UsageError("--parallel needs the name of a model that llmctl computes itself", hint="llmctl models")
    from llmctl_train_pretrain.shares import parallel_of, shares

    return shares(config, parallel_of(parallel))


def spread_text(spread: dict[str, Any]) -> str:
    """Two lines for a person."""
    sizes = ", ".join(f"{name} {size}" for name, size in spread["parallel"].items() if size > 1)
    own, size = spread["parameters_per_process"], spread["training_bytes_per_process"]
    lines = [
        ("processes", f"{spread['processes']} ({sizes or 'one'})"),
        ("each holds", f"{short(own)} weights, {human_bytes(size)} with gradients and AdamW, without activations"),
    ]
    return "\n".join(two_columns(lines))


def find(name: str, vocab_size: int | None = None) -> Entry:
    """The model that `name` means: one of the list, else a directory, else an artifact of the store.

    InputError if it is none of these.
    """
    if name in preset_names():
        return named(name, vocab_size)
    path = home_path(name)
    if is_there(path, Path.is_dir):
        return in_directory(path)
    from llmctl.store.models import find_model

    try:
        return in_directory(find_model(name).path)
    except InputError as error:
        if is_there(path) or "/" in name or ":" in name or "@" in name:
            raise
        raise InputError(f"there is no model {name!r}", hint=near_presets(name)) from error


def named(name: str, vocab_size: int | None = None) -> Entry:
    """A preset, small or published."""
    config = preset(name, vocab_size=vocab_size)
    if name in PRESETS:
        return Entry(name, "small preset of llmctl", config)
    published = PUBLISHED[name]
    return Entry(name, published.source, config, published.note, published.elsewhere)


def in_directory(path: Path) -> Entry:
    """The model in a directory with a `config.json`: its own, or that of an ONNX bundle."""
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} has no readable config.json: {error}", hint="name a model directory") from error
    architecture = ", ".join(map(str, values.get("architectures") or ())) if isinstance(values, dict) else ""
    stored = stored_parameters(path)
    try:
        return Entry(path.name, str(path), from_hf(values), stored=stored, architecture=architecture)
    except InputError as error:
        if not architecture:
            raise
        return Entry(
            path.name, str(path), None, elsewhere=error.message, stored=stored, architecture=architecture
        )  # fmt: skip


def stored_parameters(path: Path) -> int | None:
    """Numbers in the safetensors files of a directory, from their headers; None without such files."""
    from llmctl.store.safetensors import read_header

    files = sorted(path.glob("model*.safetensors"))
    try:
        return sum(tensor.values for file in files for tensor in read_header(file)) if files else None
    except ValueError as error:
        raise InputError(f"the weights in {path} are damaged: {error}", hint="copy or download them again") from error


# -- numbers ----------------------------------------------------------------------------------------------------------


def facts(entry: Entry) -> dict[str, Any]:
    """Everything about a model as plain JSON. Without a configuration the numbers are null."""
    config = entry.config
    shared = {
        "name": entry.name,
        "source": entry.source,
        "note": entry.note,
        "transformers": transformers_class(entry),
        "through_transformers": bool(entry.elsewhere),
        "reason": entry.elsewhere,
        "stored_parameters": entry.stored,
    }
    if config is None:
        return {**shared, "parameters": entry.stored, "arch": None, "kind": None}
    parts = counts.count(config)
    length = config.context
    return {
        **shared,
        "arch": config.arch,
        "kind": config.traits.kind,
        "parameters": parts.total,
        "parameters_without_embeddings": parts.without_embedding,
        "parameters_by_part": asdict(parts),
        "flops_per_token": counts.forward_flops(config, length),
        "training_flops_per_token": counts.training_flops(config, length),
        "flops_length": length,
        "training_bytes": {dtype: counts.training_bytes(config, dtype) for dtype in TRAINING},
        "serving_bytes": {dtype: counts.serving_bytes(config, dtype) for dtype in SERVING},
        "cache_bytes_per_token": {dtype: counts.cache_bytes(config, dtype) for dtype in CACHES},
        "cache_bytes_full_context": {dtype: counts.cache_bytes(config, dtype, length) for dtype in CACHES},
        "traits": asdict(config.traits),
        "shape": {key: value for key, value in config.to_dict().items() if key != "traits"},
    }


def transformers_class(entry: Entry) -> str | None:
    """The class of transformers that computes a model, None where it has none."""
    config = entry.config
    if config is None:
        return entry.architecture
    return FAMILIES[config.arch].classes[config.head] if in_transformers(config) else None


# -- text -------------------------------------------------------------------------------------------------------------

HEADERS = ("NAME", "KIND", "LAYERS", "DIM", "HEADS", "CONTEXT", "PARAMETERS", "KV/TOKEN", "THROUGH")


def show_list(entries: Sequence[Entry]) -> None:
    """One line per model: a table of rich on a terminal, plain columns elsewhere."""
    rows = [row(entry) for entry in entries]
    if not wants_colour(sys.stdout):
        click.echo(table(HEADERS, rows))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, header_style="bold", pad_edge=False)
    numbers = (False, False, True, True, True, True, True, True, False)
    for header, right in zip(HEADERS, numbers, strict=True):
        shown.add_column(header, justify="right" if right else "left", no_wrap=True)
    for cells in rows:
        shown.add_row(*map(str, cells), style=None if cells[0] in PUBLISHED else "cyan")
    Console(highlight=False).print(shown)


def row(entry: Entry) -> tuple[object, ...]:
    """The cells of a model's line; the cache is that of bf16."""
    config = entry.config
    assert config is not None
    heads = f"{config.heads}/{config.kv_heads}" if config.kv_heads != config.heads else str(config.heads)
    layers = f"{config.encoder_layers}+{config.layers}" if config.encoder_layers else str(config.layers)
    cache = counts.cache_bytes(config, "bf16")
    through = "transformers" if entry.elsewhere else "llmctl"
    return (
        entry.name, config.traits.kind, layers, config.dim, heads, config.context, short(config.parameters()),
        human_bytes(cache) if cache else "-", through,
    )  # fmt: skip


def short(count: int) -> str:
    """`135M`, `1.24B`, `405B`: three figures."""
    value, unit = (count / 1e9, "B") if count >= 999.5e6 else (count / 1e6, "M")
    return f"{value:.3g}{unit}" if value < 999.5 else f"{value:.0f}{unit}"


def grouped(count: int) -> str:
    """`1 235 814 400`."""
    return f"{count:,}".replace(",", " ")


def details(entry: Entry) -> str:
    """A model's page in the terminal."""
    config = entry.config
    lines = [("source", entry.source)]
    lines += [("note", entry.note)] if entry.note else []
    if config is None:
        lines += [("architecture", entry.architecture), ("transformers", through(entry))]
        lines += [("parameters", grouped(entry.stored))] if entry.stored is not None else []
        return "\n".join([entry.name, *two_columns(lines)])
    lines += [*shape_lines(config), ("transformers", through(entry))]
    return "\n".join([entry.name, *two_columns(lines), "", *two_columns(size_lines(config)), "", memory_table(config)])


def two_columns(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Indented, the second column aligned."""
    return [f"  {name:<19} {text}".rstrip() for name, text in lines]


def through(entry: Entry) -> str:
    """Whether transformers has it, and whether llmctl needs it for that."""
    found = transformers_class(entry)
    if entry.elsewhere:
        return f"{found}; goes through transformers: {entry.elsewhere}"
    return found or "has no such model; saved as a model type of llmctl's own"


def shape_lines(config: ModelConfig) -> list[tuple[str, str]]:
    """What the model looks like, in words."""
    traits = config.traits
    heads = f"{config.heads} heads of {config.head_dim}"
    if config.kv_heads != config.heads:
        heads += f" on {config.kv_heads} key/value head{'s' if config.kv_heads > 1 else ''}"
    layers = f"{config.layers} layers"
    if config.encoder_layers:
        layers = f"{config.encoder_layers} encoder layers and {config.layers} decoder layers"
    tied = "output tied to the embedding" if config.tie_embeddings else "output matrix of its own"
    return [
        ("family", f"{config.arch}, {'an' if traits.kind[0] == 'e' else 'a'} {traits.kind}"),
        ("shape", f"{layers}, width {config.dim}, feed-forward {config.ff_dim}"),
        ("attention", f"{heads}{seen(config)}"),
        ("positions", positions(config)),
        ("context", f"{config.context} tokens"),
        ("vocabulary", f"{config.vocab_size} tokens, {tied}"),
        ("norm", norms(config)),
        ("feed-forward", f"{'gated ' if traits.gated else ''}{traits.activation}"),
        ("biases", "in all layers" if traits.bias else "of queries, keys, values" if traits.qkv_bias else "none"),
        *extras(config),
    ]


def seen(config: ModelConfig) -> str:
    """What the layers see, if it is not everything."""
    parts = []
    if config.window:
        parts.append(f"window {config.window}" + (f" in layers S of {config.pattern}" if config.pattern != "S" else ""))
    if "N" in config.pattern:
        parts.append(f"no positions in layers N of {config.pattern}")
    if config.attention_softcap:
        parts.append(f"scores capped at {config.attention_softcap:g}")
    return "".join(f", {part}" for part in parts)


def positions(config: ModelConfig) -> str:
    """The encoding of positions with its numbers."""
    kind = config.traits.positions
    if kind == "t5":
        return f"T5 buckets, {config.relative_buckets} up to a distance of {config.relative_distance}"
    if kind != "rope":
        names = {"xl": "Transformer-XL relative", "alibi": "ALiBi", "learned": "learned table"}
        return names.get(kind, kind)
    text = f"rotary, base {config.rope_theta:.0f}"
    if config.local_rope_theta:
        text += f" ({config.local_rope_theta:.0f} in windows)"
    if config.rotary_share < 1:
        text += f", {config.rotary_dim} channels of each head"
    scaling = config.rope_scaling
    return f"{text}, scaled {scaling.factor:g} times by {scaling.kind}" if scaling else text


def norms(config: ModelConfig) -> str:
    """Which norm, and where it stands."""
    traits = config.traits
    where = {"pre": "before", "post": "after", "sandwich": "before and after"}[traits.order]
    names = {"layer": "LayerNorm", "rms1": "RMSNorm (1 + weight)", "rms0": "RMSNorm without a gain"}
    further = ", and of queries and keys" if traits.qk_norm else ""
    gain = f" times {config.qk_gain:g}" if config.qk_gain != 1 else ""
    return f"{names.get(traits.norm, 'RMSNorm')} {where} each sub-layer{further}{gain}"


def extras(config: ModelConfig) -> list[tuple[str, str]]:
    """What few models have."""
    traits = config.traits
    found = [
        (bool(config.value_pattern), f"embeddings of values in layers V of {config.value_pattern}"),
        (traits.smear, "the token before in each embedding"),
        (traits.stream_weights, "weights of each block's input"),
        (traits.backout, "the middle state taken off the last"),
        (config.logit_softcap > 0, f"logits capped at {config.logit_softcap:g}"),
    ]
    named = [text for there, text in found if there]
    return [("further", ", ".join(named))] if named else []


def size_lines(config: ModelConfig) -> list[tuple[str, str]]:
    """Parameters and operations."""
    parts = counts.count(config)
    named_parts = (("embedding", parts.embedding), ("positions", parts.positions), ("head", parts.head))
    rest = ", ".join(f"{name} {grouped(value)}" for name, value in named_parts if value)
    forward, training = (f(config, config.context) for f in (counts.forward_flops, counts.training_flops))
    return [
        ("parameters", grouped(parts.total)),
        ("without embeddings", f"{grouped(parts.without_embedding)}   ({rest})"),
        ("FLOPs per token", f"{forward:.3g} forward, {training:.3g} in training, in sequences of {config.context}"),
    ]


def memory_table(config: ModelConfig) -> str:
    """Bytes by number format."""
    headers = ("MEMORY", *SERVING)

    def cells(name: str, sizes: dict[str, float]) -> tuple[str, ...]:
        return (name, *(human_bytes(sizes[dtype]) if dtype in sizes else "-" for dtype in SERVING))

    rows = [
        cells("training (AdamW)", {dtype: counts.training_bytes(config, dtype) for dtype in TRAINING}),
        cells("weights", {dtype: counts.serving_bytes(config, dtype) for dtype in SERVING}),
    ]
    if config.traits.kind != "encoder":
        rows += [
            cells("cache per token", {dtype: counts.cache_bytes(config, dtype) for dtype in CACHES}),
            cells(
                "cache, full context", {dtype: counts.cache_bytes(config, dtype, config.context) for dtype in CACHES}
            ),
        ]
    return "\n".join("  " + line for line in table(headers, rows).splitlines())
