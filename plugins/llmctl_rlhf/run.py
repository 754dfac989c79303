"""Align a model with preferences, held to the model it started from."""

from __future__ import annotations

from torch import Tensor

from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.datasets import splits
from llmctl.train.conversations import Encoder, read_pairs, show_examples
from llmctl.train.device import Compute
from llmctl.train.loop import fit
from llmctl.train.models import check_decoder, open_model, write_model
from llmctl.train.validation import Validate, mean_loss
from llmctl_rlhf.losses import DPO
from llmctl_rlhf.pairs import PairSource
from llmctl_rlhf.params import RlhfParams


def run(ctx: Context, params: RlhfParams, model: Artifact, data: Artifact) -> None:
    """Train on the pairs of `train`; `ranking.before` and `.after` on `validation` where there is one."""
    net, tokenizer = open_model(model, ctx)
    check_decoder(net, "preferences")
    length = net.config.context
    encoder = Encoder(tokenizer, length, net.config.eos_ids, params)
    source = PairSource(read_pairs(ctx, data, "train", encoder), length, params)
    held_out = None
    if "validation" in splits(data):
        held_out = PairSource(read_pairs(ctx, data, "validation", encoder), length, params)
    show_examples(ctx, tokenizer, [answer for pair in source.pairs for answer in pair])
    compute = Compute.of(params)
    with compute.limit_threads():
        for pairs in (source, held_out):
            if pairs is not None:
                pairs.measure_reference(ctx, net, compute)
    objective = DPO(params.beta, params.label_smoothing, params.sft_weight)
    values = fit(ctx, net, objective, source, params, validator(held_out, objective, params))
    values["pairs"] = source.size
    if held_out is not None:
        values["ranking.before"] = ranking(held_out.reference)
        with compute.limit_threads():
            values["ranking.after"] = ranking(held_out.logprobs(ctx, net, compute))
    write_model(ctx, net, model.path, values)


def ranking(logprobs: Tensor) -> float:
    """Share of pairs whose chosen answer has the larger log-probability."""
    return float((logprobs[:, 0] > logprobs[:, 1]).double().mean())


def validator(source: PairSource | None, objective: DPO, params: RlhfParams) -> Validate | None:
    """The objective and its metrics on held-out pairs; None without any."""
    if source is None:
        return None

    def validate(model: Transformer, compute: Compute) -> dict[str, float]:
        return mean_loss(model, objective, source.sweep(params.eval_batches), compute)

    return validate
