"""Pre-train a language model on token shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmctl.errors import InputError, UsageError
from llmctl.nn.auxiliary import FILE as AUXILIARY
from llmctl.nn.auxiliary import add_boundary
from llmctl.nn.config import ModelConfig
from llmctl.nn.counts import count
from llmctl.nn.foreign import ForeignModel
from llmctl.nn.foreign_config import ForeignConfig
from llmctl.nn.opening import open_network
from llmctl.nn.presets import TRAIT_NAMES, preset
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.data import JoinedSource, TokenSource
from llmctl.train.device import Compute
from llmctl.train.lengths import reshaped
from llmctl.train.loop import fit
from llmctl.train.mixing import MixedSource
from llmctl.train.models import write_model
from llmctl.train.objectives import CausalLM, MaskedLM
from llmctl.train.validation import Unigram, Validate, language_loss, mean_loss
from llmctl_train_pretrain.goals import MASKED, choose_goal, make_mixture, make_objective, make_source
from llmctl_train_pretrain.params import Goal, PretrainParams


def run(
    ctx: Context,
    params: PretrainParams,
    tokens: Sequence[Artifact],
    tokenizer: Artifact,
    model: Artifact | None = None,
) -> None:
    """Train a fresh model, or go on with `model`, on the splits `train`; measure on `validation`, if there."""
    shards, encoder = [TokenShards.open(one) for one in tokens], Tokenizer.load(tokenizer.path)
    for one in shards:
        check_tokenizer(one, encoder)
    if model is None:
        goal, net = make_model(params, encoder)
    else:
        goal, net = continue_model(ctx, params, encoder, model)
    if goal == "span" and params.boundary:
        add_boundary(net, params.span_max, None if model is None else model.path)
    splits = [one.split("train") for one in shards]
    source = make_mixture(goal, splits, encoder, net.config, params)
    ctx.log(
        f"{net.config.arch}, {net.config.parameters()} parameters, objective {goal}; "
        f"{sum(len(split.tokens) for split in splits)} tokens in {sum(map(len, splits))} documents, "
        f"{source.steps_per_epoch:.1f} steps per epoch"
    )
    rows = packed_values(source)
    if rows:
        ctx.log(
            f"packing {params.packing}: rows are {rows['rows.filled']:.1%} full, {rows['documents.cut']:.1%} of the "
            f"documents are cut, {rows['targets.dropped']:.1%} of the targets dropped"
        )
    values = fit(ctx, net, make_objective(goal), source, params, validator(goal, shards, encoder, net.config, params))
    values |= {**sizes(net.config), **rows, **mixture_values(source, params, int(values["steps"]))}
    epochs = values["steps"] / source.steps_per_epoch
    write_model(ctx, net, tokenizer.path, {"objective": goal, **values, "epochs": epochs})


def packed_values(source: JoinedSource) -> dict[str, float]:
    """How full rows are and what packing costs, over all datasets; nothing of objectives that cut their own pieces."""
    parts = source.sources if isinstance(source, MixedSource) else [source]
    counts = [part.rows.count for part in parts if isinstance(part, TokenSource)]
    if not counts:
        return {}
    room = sum(part.rows.count.rows * part.context for part in parts if isinstance(part, TokenSource))
    targets, dropped = sum(count.targets for count in counts), sum(count.dropped for count in counts)
    return {
        "rows.filled": sum(count.tokens for count in counts) / room,
        "documents.cut": sum(count.cut for count in counts) / sum(count.documents for count in counts),
        "targets.dropped": dropped / (targets + dropped),
    }


def mixture_values(source: JoinedSource, params: PretrainParams, steps: int) -> dict[str, float]:
    """Passes over each dataset of a mixture, and its share of the tokens so far."""
    if not isinstance(source, MixedSource):
        return {}
    names = params.mixture.names or [str(number + 1) for number in range(len(source.sources))]
    passes, shares = source.passes(steps), source.token_shares(steps)
    found = {f"epochs.{name}": value for name, value in zip(names, passes, strict=True)}
    return found | {f"tokens.share.{name}": value for name, value in zip(names, shares, strict=True)}


def sizes(config: ModelConfig | ForeignConfig) -> dict[str, int]:
    """What scaling laws count beside all parameters: those of the blocks, and with them those of the output head.

    Nothing of architectures that are not ours.
    """
    if not isinstance(config, ModelConfig):
        return {}
    blocks = count(config).without_embedding
    return {"parameters.without_embedding": blocks, "parameters.with_head": blocks + config.vocab_size * config.dim}


def check_tokenizer(shards: TokenShards, tokenizer: Tokenizer) -> None:
    """InputError unless the shards were made with this tokenizer."""
    if shards.tokenizer != tokenizer.digest:
        raise InputError(
            f"{shards.directory} was made with the tokenizer {shards.tokenizer[:19]}…, not {tokenizer.digest[:19]}…",
            hint="take tokens and tokenizer from the same `tokenize` stage",
        )
    if shards.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{shards.directory} has a vocabulary of {shards.vocab_size}, the tokenizer one of {tokenizer.vocab_size}",
            hint="make the tokens again",
        )


def make_model(params: PretrainParams, tokenizer: Tokenizer) -> tuple[Goal, Transformer]:
    """The objective, and fresh weights with the heads for it, a function of the seed."""
    special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    shape = {**params.shape(), **special}
    scaling = params.rope_scaling.scaling(preset(params.preset, vocab_size=tokenizer.vocab_size).context)
    if scaling is not None:
        shape["rope_scaling"] = scaling
    config = preset(params.preset, vocab_size=tokenizer.vocab_size, overrides=shape)
    goal = choose_goal(params, config, fresh=True, spans=params.preset.startswith("spanbert"))
    if goal == "mlm-nsp":
        config = replace(config, head="pretraining")
    torch.manual_seed(params.seed)
    return goal, Transformer(config)


def continue_model(
    ctx: Context, params: PretrainParams, tokenizer: Tokenizer, artifact: Artifact
) -> tuple[Goal, Transformer]:
    """The objective, and the weights of `artifact` in a shape that they allow.

    A shorter `context` only shortens the rows. A longer one, unless positions are learned, and a scaling of rotary
    positions become the model's own; what else the weights were made for cannot change.
    """
    model = open_network(artifact.path, log=ctx.log)
    torch.manual_seed(params.seed)  # what an objective adds to it is a function of the seed
    config, changes = model.config, {}
    for name, value in params.shape().items():
        has = getattr(config.traits if name in TRAIT_NAMES else config, name, None)
        if value == has or (name == "context" and value < has):
            continue
        if name != "context" or config.traits.positions == "learned":
            raise UsageError(f"{name} is {value}, the model to continue has {has}", hint=f"leave {name} out")
        changes[name] = value
    scaling = params.rope_scaling.scaling(config.context)
    if scaling is not None:
        changes["rope_scaling"] = scaling
    if model.config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{artifact.path} has a vocabulary of {model.config.vocab_size}, the tokens one of {tokenizer.vocab_size}",
            hint="use the tokenizer that the model was trained with",
        )
    goal = choose_goal(params, model.config, spans=(artifact.path / AUXILIARY).is_file())
    if goal != "causal" and isinstance(model, ForeignModel):
        raise UsageError(
            f"objective {goal} is of llmctl's own transformer; {model.config.arch} is computed by transformers",
            hint="use objective: causal",
        )
    if changes and isinstance(model, ForeignModel):
        raise UsageError(
            f"{min(changes)} cannot be changed: {model.config.arch} is computed by transformers",
            hint=f"leave {min(changes)} out",
        )
    return goal, reshaped(model, changes) if changes else model


def validator(
    goal: Goal, shards: Sequence[TokenShards], tokenizer: Tokenizer, config: ModelConfig, params: PretrainParams
) -> Validate | None:
    """Measures on evenly spread rows of all splits `validation`, one after the other; None without any.

    Loss per token and bits per byte where the next token is predicted, of several datasets for each as well; else
    loss and accuracy, beside the accuracy of guessing by frequency where single tokens are guessed.
    """
    found = {
        name: make_source(goal, one.split("validation"), tokenizer, config, params)
        for name, one in zip(params.mixture.names or map(str, range(1, len(shards) + 1)), shards, strict=True)
        if "validation" in one.splits and len(one.split("validation").tokens)
    }
    if not found:
        return None
    parts: list[JoinedSource] = list(found.values())
    source = parts[0] if len(parts) == 1 else MixedSource(parts, params)
    if goal in ("causal", "prefix"):
        token_bytes = tokenizer.token_bytes()

        def in_bytes(model: Transformer, compute: Compute) -> dict[str, float]:
            values = language_loss(model, source.sweep(params.eval_batches), compute, token_bytes)
            for name, part in found.items() if len(found) > 1 else ():
                each = language_loss(model, part.sweep(params.eval_batches), compute, token_bytes)
                values |= {f"{key}.{name}": value for key, value in each.items()}
            return values

        return in_bytes
    objective = MaskedLM() if goal in MASKED else CausalLM(accuracy=True)
    splits = [one.split("train") for one in shards]
    unigram = Unigram.of(splits, tokenizer.vocab_size, tokenizer.special_ids) if goal in MASKED else None

    def in_hits(model: Transformer, compute: Compute) -> dict[str, float]:
        values = mean_loss(model, objective, source.sweep(params.eval_batches), compute)
        return values | (unigram.measure(source.sweep(params.eval_batches)) if unigram is not None else {})

    return in_hits
