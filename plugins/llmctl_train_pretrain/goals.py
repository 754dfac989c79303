"""What a model is pre-trained for: which objective fits it, what it needs of the tokenizer, where batches come from."""

from __future__ import annotations

from collections.abc import Sequence

from llmctl.errors import InputError, UsageError
from llmctl.nn.config import ModelConfig
from llmctl.text.shards import SplitTokens
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.data import JoinedSource, TokenSource
from llmctl.train.masking import span_lengths
from llmctl.train.mixing import MixedSource
from llmctl.train.objectives import CausalLM, MaskedLM, Objective
from llmctl.train.pieces import (
    CorruptionSource,
    Frame,
    MaskedSource,
    Masking,
    NextSentenceSource,
    PieceSource,
    PrefixSource,
    vocabulary_of,
)
from llmctl_train_pretrain.params import OWN, Goal, PretrainParams

FITTING: dict[str, tuple[Goal, ...]] = {
    "decoder": ("causal", "prefix"),
    "encoder": ("mlm", "mlm-nsp", "span"),
    "encoder-decoder": ("corruption", "prefix"),
}
"""Objectives of each kind of model; its own without another wish is the first, or BERT's if it knows segments."""
MASKED: tuple[Goal, ...] = ("mlm", "mlm-nsp", "span")


def choose_goal(params: PretrainParams, config: ModelConfig, fresh: bool = False, spans: bool = False) -> Goal:
    """The objective of a model of this configuration; `spans`: one that is known to be trained on spans.

    A `fresh` model gets whatever head the objective needs, any other must have it.

    UsageError if the one asked for does not fit, or if parameters are set that the objective does not read.
    """
    fitting = FITTING[config.traits.kind]
    pairs = config.traits.kind == "encoder" and config.token_types > 1 and (fresh or config.head == "pretraining")
    goal: Goal = "span" if spans else "mlm-nsp" if pairs else fitting[0]
    if params.objective != "auto":
        goal = params.objective
    if goal not in fitting:
        article = "a" if config.traits.kind == "decoder" else "an"
        raise UsageError(
            f"objective {goal} does not fit {config.arch}, {article} {config.traits.kind}",
            hint=f"objectives that fit: {', '.join(fitting)}; or choose another preset",
        )
    if goal == "mlm-nsp" and config.token_types < 2:
        raise UsageError(
            f"objective mlm-nsp needs two token types, {config.arch} has {config.token_types}",
            hint="use objective: mlm",
        )
    wanted = ("pretraining",) if goal == "mlm-nsp" else ("mlm", "pretraining") if goal in MASKED else ("lm",)
    if not fresh and config.head not in wanted:
        raise UsageError(
            f"objective {goal} needs the head {' or '.join(wanted)}, the model to continue has {config.head}",
            hint="use an objective of its head",
        )
    fields = PretrainParams.model_fields
    for name, goals in OWN.items():
        if goal not in goals and getattr(params, name) != fields[name].default:
            raise UsageError(
                f"{name} has no effect on objective {goal}",
                hint=f"it belongs to {' and '.join(goals)}; leave it out or set objective",
            )
    if goal != "causal" and params.packing in ("best-fit", "crop"):
        raise UsageError(
            f"packing {params.packing} is of objective causal, {goal} cuts documents into pieces of its own",
            hint="use packing: documents or none",
        )
    return goal


def make_objective(goal: Goal) -> Objective:
    """What is minimised."""
    return MaskedLM() if goal in MASKED else CausalLM()


def make_mixture(
    goal: Goal, splits: Sequence[SplitTokens], tokenizer: Tokenizer, config: ModelConfig, params: PretrainParams
) -> JoinedSource:
    """The batches of the training splits, mixed where there are several; UsageError if the lists do not fit them."""
    given = params.mixture
    for name in ("weights", "epochs", "names"):
        if (values := getattr(given, name)) and len(values) != len(splits):
            raise UsageError(
                f"mixture.{name} has {len(values)} entries for {len(splits)} inputs `tokens`",
                hint="give one for each, in the order of the inputs",
            )
    sources = [make_source(goal, split, tokenizer, config, params) for split in splits]
    if len(sources) == 1:
        if given.weights or given.epochs or given.names or given.alpha != 1:
            raise UsageError("mixture has no effect with one input `tokens`", hint="leave it out, or give several")
        return sources[0]
    return MixedSource(sources, params, given.weights, given.epochs, given.alpha)


def make_source(
    goal: Goal, split: SplitTokens, tokenizer: Tokenizer, config: ModelConfig, params: PretrainParams
) -> TokenSource | PieceSource:
    """The batches of a split. InputError for a tokenizer without the tokens that are needed says which are missing."""
    context = params.context or config.context
    if goal == "causal":
        return TokenSource(split, context, params, params.document_mask)
    frame = Frame.of(tokenizer)
    if goal in MASKED:
        lengths = span_lengths(params.span_p, params.span_max) if goal == "span" else None
        masks = Masking(vocabulary_of(tokenizer), params.mask_share, lengths, params.span_unit == "words")
        made = NextSentenceSource if goal == "mlm-nsp" else MaskedSource
        return made(split, frame, context, params, masks, fixed=params.masking == "static")
    if goal == "prefix":
        return PrefixSource(split, frame, context, params, config.decoder_start_id)
    sentinels = tokenizer.sentinel_ids
    if not sentinels:
        raise InputError(
            f"the tokenizer in {tokenizer.directory} has no sentinels (<extra_id_0>, …), which span corruption needs",
            hint="make it with `tokenize` and special: t5",
        )
    start = config.decoder_start_id
    assert start is not None  # an encoder-decoder's always is
    return CorruptionSource(
        split, frame, context, params, sentinels, start, params.noise_density, params.mean_noise_span
    )
