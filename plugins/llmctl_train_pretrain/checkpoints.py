"""`llmctl checkpoint`: a training's checkpoint as a Hugging Face model directory."""

from __future__ import annotations

from pathlib import Path

import click

from llmctl.errors import UsageError


@click.command("checkpoint")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    type=click.Choice(["auto", "last", "mean"]),
    default="auto",
    show_default=True,
    help="Those of the last step, or their running mean; auto: the mean if the training keeps one.",
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Directory of the tokenizer to put beside them.")
def checkpoint(checkpoint: Path, output: Path, weights: str, tokenizer: Path | None) -> None:
    """Write CHECKPOINT, a directory step-N or a work directory with several, as a model directory OUTPUT.

    The training may go on meanwhile; of a work directory the newest checkpoint is taken.
    """
    from llmctl.nn.hf import save_model
    from llmctl.text.tokenizer import Tokenizer
    from llmctl.train.exporting import model_of, open_checkpoint

    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty", hint="give a new directory")
    if tokenizer is not None:
        Tokenizer.load(tokenizer)
    found = open_checkpoint(checkpoint)
    model = model_of(found, weights)
    output.mkdir(parents=True, exist_ok=True)
    save_model(model, output, tokenizer)
    click.echo(f"{output}: {model.config.arch}, {model.config.parameters()} parameters, step {found.step}")
