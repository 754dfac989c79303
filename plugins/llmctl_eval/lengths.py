"""Perplexity by position, beyond the context that the model was trained with."""

from __future__ import annotations

import json
import math

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl_eval.params import EvalParams

ROWS = 64
"""Sequences that are measured where `limit` says nothing."""


def lengths(ctx: Context, params: EvalParams, model: Artifact, data: Artifact, split: str) -> dict[str, float]:
    """The metrics of task `lengths`; every point of the curves goes to `lengths.json`, a page to `lengths.html`.

    UsageError for an exported model, which ends at its context; InputError if no document is long enough.
    """
    if model.type != "model.hf":
        raise UsageError(
            f"task lengths needs a model.hf, {model.path} is a {model.type}: an exported graph ends at its context",
            hint="bind the model that it was exported from",
        )
    # Imported here: the other tasks run without torch.
    from llmctl.nn.hf import load_model
    from llmctl.train.generate import pick_device
    from llmctl.train.lengths import length_curves, long_rows
    from llmctl.train.pages import curve_page

    shards = TokenShards.open(data)
    if shards.tokenizer != Tokenizer.load(model.path).digest:
        raise InputError(
            f"the tokens in {data.path} are of another tokenizer than the model's",
            hint="tokenize the text with the model's tokenizer: `llmctl tokenize --tokenizer MODEL`",
        )
    net = load_model(model.path, pick_device(params.device)).eval()
    part = shards.split(split)
    documents = (part.document(i) for i in range(len(part)))
    rows = long_rows(documents, params.max_length or 2 * net.config.context, params.limit or ROWS)
    curves = length_curves(net, rows, params.scalings)
    if ctx.wants("metrics"):
        directory = ctx.output("metrics")
        values = json.dumps([curve.to_dict() for curve in curves], indent=1)
        (directory / "lengths.json").write_text(values + "\n", encoding="utf-8")
        (directory / "lengths.html").write_text(curve_page(net.config.arch, curves), encoding="utf-8")
    found: dict[str, float] = {"lengths.rows": len(rows), "lengths.context": net.config.context}
    names = ["lengths", *(f"lengths.{kind}" for kind in params.scalings)]
    for name, curve in zip(names, curves, strict=True):
        for key, value in (("trained_nats", curve.trained), ("beyond_nats", curve.beyond)):
            if not math.isnan(value):
                found[f"{name}.{key}"] = value
    return found
