"""`llmctl inspect`: what a model makes of a text, or how far its positions reach."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.console import table
from llmctl.errors import InputError, UsageError
from llmctl.generator import Sampling
from llmctl.spec.files import home_path, is_there
from llmctl.stage import Artifact

if TYPE_CHECKING:
    import numpy as np

    from llmctl.text.tokenizer import Tokenizer
    from llmctl.train.lengths import Curve
    from llmctl_train_pretrain.inspection import Choice, Inspection, Prediction, Stack

PAGES = {"text": "inspection.html", "data": "lengths.html"}
FOREIGN = "The model goes through transformers: its attention and lengths are not recorded."
MOST_SHOWN = 4
"""Predictions in the terminal; the page has all."""


@click.command()
@click.argument("model")
@click.option("--text", help="What the model reads; of an encoder, with its mask token. Default: stdin.")
@click.option("--target", help="What an encoder-decoder has written so far.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Tokens of each distribution.")
@click.option("--temperature", type=click.FloatRange(0), help="Show the distribution after it as well.")
@click.option("--top-k", type=click.IntRange(0), help="Likewise: among the k likeliest.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Likewise: within this mass.")
@click.option("--maps", is_flag=True, help="With --format json: all attention weights too.")
@click.option("--data", help="Measure loss by position instead: token shards, a dataset or a text file.")
@click.option("--split", default="validation", show_default=True, help="Split of --data.")
@click.option("--max-length", type=click.IntRange(2), help="Tokens to reach with --data. Default: twice the context.")
@click.option("--rows", type=click.IntRange(1), default=16, show_default=True, help="Sequences of --data to measure.")
@click.option(
    "--scaling",
    multiple=True,
    type=click.Choice(["linear", "ntk", "dynamic", "yarn"]),
    help="With --data: measure with rotary positions scaled so, too; may be given several times.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Where to write the page.")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", help="How to print it.")
@click.pass_context
def inspect(ctx: click.Context, /, model: str, format_: str, output: Path | None, device: str, **given: Any) -> None:
    """Look into MODEL, a model directory, an artifact or a reference.

    With a text: its tokens, the distribution of what comes next, where each head looks, how long the vectors are. With
    --data: perplexity by position, beyond the context too. A page (inspection.html, lengths.html) shows all of it; with
    --format json only where --output says so.
    """
    from llmctl.store.models import find_model

    _check_options(ctx, given)
    found = find_model(model)
    if given["data"] is not None:
        curves = measure(found, given, device)
        _write(output, format_, "data", lambda: _curve_page(model, curves))
        values: Any = {"model": model, "curves": [curve.to_dict() for curve in curves]}
        click.echo(json.dumps(values, indent=2) if format_ == "json" else curve_text(curves))
        return
    inspection = look(model, found, given, device)
    _write(output, format_, "text", lambda: _inspection_page(inspection))
    if format_ == "json":
        click.echo(json.dumps(inspection.to_dict(given["maps"]), indent=2, ensure_ascii=False))
    else:
        click.echo(inspection_text(inspection))


FOR_DATA = ("split", "max_length", "rows", "scaling")
FOR_TEXT = ("text", "target", "top", "temperature", "top_k", "top_p", "maps")


def _check_options(ctx: click.Context, given: dict[str, Any]) -> None:
    """UsageError for an option that would be ignored."""
    other, mode = (FOR_TEXT, "--data") if given["data"] is not None else (FOR_DATA, "a text")
    for name in other:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} has no effect with {mode}", hint="`llmctl inspect --help`")


# -- a text -----------------------------------------------------------------------------------------------------------


def look(name: str, found: Artifact, given: dict[str, Any], device: str) -> Inspection:
    """The inspection of a text by our own model, or from outside by one of ONNX Runtime or transformers."""
    from llmctl.text.tokenizer import Tokenizer
    from llmctl_train_pretrain import outside

    text = given["text"] if given["text"] is not None else _piped()
    sampling, tokenizer = sampling_of(given), Tokenizer.load(found.path)
    target, top = given["target"], given["top"]
    if found.type == "model.onnx":
        from llmctl.registry import get_registry
        from llmctl_train_pretrain.exported_attention import add_attention

        if kind := reads_as(found.path):
            if target is not None:
                raise UsageError("a target has no meaning for a model that only reads", hint="leave --target out")
            seen = outside.inspect_encoder(name, found.path, kind, tokenizer, text, top, sampling, device)
        else:
            generator = get_registry().open_generator(found, device=device, threads=0)
            seen = outside.inspect_generator(name, generator, tokenizer, text, target, top, sampling)
        add_attention(seen, found.path)
        return seen
    from llmctl.nn.foreign import ForeignModel
    from llmctl.nn.opening import open_network
    from llmctl.train.generate import make_generator, pick_device
    from llmctl_train_pretrain.inspection import inspect_model

    model = open_network(found.path, pick_device(device)).eval()
    if isinstance(model, ForeignModel):
        return outside.inspect_generator(name, make_generator(model), tokenizer, text, target, top, sampling, FOREIGN)
    return inspect_model(name, model, tokenizer, text, target, top, sampling)


def reads_as(bundle: Path) -> str:
    """The kind of model in a bundle that reads, empty for one that generates: by `config.json`, or where that is not
    ours by the graph."""
    from llmctl.nn.families import from_hf
    from llmctl.ort import open_encoder

    try:
        config = from_hf(json.loads((bundle / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{bundle} has no readable config.json: {error}", hint="export the model again") from error
    except InputError:  # of another architecture
        try:
            open_encoder(bundle, "cpu")
        except InputError:
            return ""
        return "encoder"
    return "" if config.head == "lm" else config.traits.kind


def _piped() -> str:
    if sys.stdin.isatty():
        raise UsageError("there is no text to look at", hint="give --text, or pipe a text into the command")
    return sys.stdin.read()


def sampling_of(given: dict[str, Any]) -> Sampling | None:
    """What was asked for; None if nothing was."""
    values = {name: given[name] for name in ("temperature", "top_k", "top_p") if given[name] is not None}
    return Sampling(**{"temperature": 1.0, **values}) if values else None


def inspection_text(found: Inspection) -> str:
    """A summary for the terminal: tokens, the last distributions, one line per layer."""
    where = f" for {len(found.source)} of the source" if found.source else ""
    count = f"{len(found.tokens)} token{'s' if len(found.tokens) > 1 else ''}"
    parts = [f"{found.model}: {found.kind}, {found.backend}", f"{count}{where}:"]
    parts.append("  " + " ".join(quoted(token.text) for token in found.tokens))
    parts += ["", *predictions_text(found)] if found.predictions else []
    parts += [text for stack in found.stacks for text in ("", stack_text(stack))]
    parts += ["", found.closed] if found.closed else []
    return "\n".join(parts)


def predictions_text(found: Inspection) -> Iterator[str]:
    """What comes next, the masked tokens, or the labels; of a text that hides nothing, one line per token."""
    everywhere = [p for p in found.predictions if p.at is not None and (p.what == "label" or p.actual is not None)]
    if found.kind == "encoder" and everywhere:
        rows = [
            (
                p.at,
                quoted(found.tokens[p.at].text),
                quoted(p.choices[0].text),
                f"{p.choices[0].probability:.4f}",
                p.rank,
            )
            for p in everywhere
            if p.at is not None
        ]
        if everywhere[0].what == "label":
            yield indented(table(("AT", "TOKEN", "LABEL", "PROBABILITY"), [row[:4] for row in rows]))
        else:
            yield "nothing is masked; what the model would put at each token, and the rank of what stands there:"
            yield indented(table(("AT", "TOKEN", "LIKELIEST", "PROBABILITY", "RANK"), rows))
        return
    chosen = found.predictions[-1:] if found.kind != "encoder" else found.predictions[:MOST_SHOWN]
    yield "\n\n".join(prediction_text(prediction, found) for prediction in chosen)
    if len(chosen) < len(found.predictions):
        yield f"\n({len(found.predictions)} distributions in all; the page and --format json have them)"


def quoted(text: str) -> str:
    """A token's text between quotes, line ends and the like escaped."""
    return json.dumps(text, ensure_ascii=False)


def prediction_text(prediction: Prediction, found: Inspection) -> str:
    """One distribution as a table, and beside it the one after temperature and truncation."""
    at = prediction.at
    token = "" if at is None else quoted(found.tokens[at].text)
    titles = {"next": f"after {token}", "masked": f"at token {at}, {token}", "label": f"label {token}".strip()}
    title = titles.get(prediction.what, f"{prediction.what} of the answer")
    parts = [f"{title}: entropy {prediction.entropy:.2f} nats", choices_text(prediction.choices)]
    if prediction.sampled is not None and found.sampling is not None:
        s = found.sampling
        parts += [
            f"the same after temperature {s.temperature:g}, top-k {s.top_k or 'off'}, top-p {s.top_p:g}:",
            choices_text(prediction.sampled),
        ]
    return "\n".join(parts)


def choices_text(choices: Sequence[Choice]) -> str:
    """Outcomes with their probabilities."""
    rows = [(quoted(c.text), f"{c.probability:.4f}", f"{c.logprob:.3f}") for c in choices]
    return indented(table(("TOKEN", "PROBABILITY", "LOG P"), rows))


def stack_text(stack: Stack) -> str:
    """One line per layer: mean lengths, and where its heads look on average."""
    from llmctl_train_pretrain.inspection import looks

    rows = []
    for layer, weights in enumerate(stack.maps):
        heads = looks(weights)
        means = [sum(head[key] for head in heads) / len(heads) for key in ("self", "previous", "first", "entropy")]
        parts = (stack.residual[1:], stack.attention, stack.feed_forward) if stack.residual else ()
        lengths = [float(part[layer].mean()) for part in parts]
        rows.append((layer, *(f"{value:.3g}" for value in lengths), *(f"{value:.2f}" for value in means)))
    measured = ("LENGTH", "ATTENTION", "FEED-FORWARD") if stack.residual else ()
    headers = ("LAYER", *measured, "SELF", "PREVIOUS", "FIRST", "ENTROPY")
    return f"{stack.name}, means over tokens and heads:\n{indented(table(headers, rows))}"


def indented(text: str) -> str:
    """Two blanks before each line."""
    return "\n".join("  " + line for line in text.splitlines())


# -- positions --------------------------------------------------------------------------------------------------------


def measure(found: Artifact, given: dict[str, Any], device: str) -> list[Curve]:
    """Loss by position of a torch model on the data."""
    if found.type != "model.hf":
        raise UsageError(
            "an exported graph ends at its context", hint="measure the torch model that it was exported from"
        )
    from llmctl.nn.hf import load_model
    from llmctl.text.tokenizer import Tokenizer
    from llmctl.train.generate import pick_device
    from llmctl.train.lengths import length_curves, long_rows

    model = load_model(found.path, pick_device(device)).eval()
    length = given["max_length"] or 2 * model.config.context
    rows = long_rows(documents(given["data"], given["split"], Tokenizer.load(found.path)), length, given["rows"])
    return length_curves(model, rows, given["scaling"])


def documents(text: str, split: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The documents of token shards, of a dataset's split, or a text file as one document."""
    import numpy as np

    from llmctl.text.datasets import SUFFIXES, read_rows
    from llmctl.text.shards import TokenShards

    path = home_path(text)
    if is_there(path, Path.is_file) and not path.name.endswith(SUFFIXES):
        try:
            yield np.array(tokenizer.encode_document(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as text: {error}", hint="give UTF-8") from error
        return
    if not is_there(path):
        from llmctl.store import Store

        path = Store.open().resolve(text, ("dataset.tokens", "dataset.text")).path
    if (path / "meta.json").is_file():
        shards = TokenShards.open(path)
        if shards.tokenizer != tokenizer.digest:
            raise InputError(
                f"the tokens in {path} are of another tokenizer than the model's",
                hint="tokenize the text with the model's tokenizer: `llmctl tokenize --tokenizer MODEL`",
            )
        part = shards.split(split)
        yield from (np.asarray(part.document(i)) for i in range(len(part)))
        return
    for row in read_rows(path, split if path.is_dir() else _only_split(path)):
        if not isinstance(row.get("text"), str):
            raise InputError(f"a row of {path} has no `text`", hint="give a dataset of texts, or token shards")
        yield np.array(tokenizer.encode_document(row["text"]))


def _only_split(path: Path) -> str:
    from llmctl.text.datasets import splits

    return splits(path)[0]


def curve_text(curves: Sequence[Curve]) -> str:
    """Perplexity by position, and what it is within and beyond the context."""
    headers = ("POSITIONS", *(curve.name.upper() for curve in curves))
    rows = [
        (f"{part.first}-{part.last}", *(f"{curve.stretches[i].perplexity:.4g}" for curve in curves))
        for i, part in enumerate(curves[0].stretches)
    ]
    lines = [table(headers, rows), "", f"nats per token, context {curves[0].context}:"]
    lines += [f"  {c.name}: {c.trained:.3f} in its second half, {c.beyond:.3f} beyond" for c in curves]
    return "\n".join(lines)


# -- pages ------------------------------------------------------------------------------------------------------------


def _write(output: Path | None, format_: str, mode: str, make: Any) -> None:
    path = output if output is not None else Path(PAGES[mode]) if format_ == "text" else None
    if path is None:
        return
    try:
        path.write_text(make(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}", hint="choose another --output") from error
    click.echo(f"page: {path}", err=True)


def _inspection_page(found: Inspection) -> str:
    from llmctl_train_pretrain.inspection_page import inspection_page

    return inspection_page(found)


def _curve_page(model: str, curves: Sequence[Curve]) -> str:
    from llmctl.train.pages import curve_page

    return curve_page(model, curves)
