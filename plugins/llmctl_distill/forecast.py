"""What a distillation will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmctl.errors import UsageError
from llmctl.forecast import Forecast, Given, Unknown
from llmctl.nn.config import ModelConfig
from llmctl.nn.counts import count, forward_flops
from llmctl.train.activations import FLOAT
from llmctl.train.forecasting import answers, config_of
from llmctl_distill.layers import Layers, layer_pairs
from llmctl_distill.params import DistillParams

PLAIN = 7.0
"""Tensors of the size of the logits that forward KL at temperature 1 takes at once: logits and log-probabilities of
both, and what is made of these; counted by a test."""
SOFTENED = 10.0
"""The same at another temperature: the KL at temperature 1 is measured beside it."""
REVERSE, JSD = 11.0, 14.0
BACKWARD = 2
"""A backward pass costs as much as so many forward passes."""
MAX_ROWS, CACHE_BYTES = 64, 1 << 30
"""How many answers are written at once: those of `llmctl.train.generate`, which imports torch."""
ADVICE = {
    "logits": "loss_chunk: 4096, a smaller micro_batch, or divergence: forward-kl",
    "states": "a smaller micro_batch, or 0 for some layers in layer_map",
    "relations": "a smaller micro_batch, a shorter context, or relations: none",
    "cache": "a smaller batch_size, or a lower max_new_tokens",
}


def forecast(params: DistillParams, inputs: Mapping[str, Given]) -> Forecast:
    """The student's training, with the teacher's weights beside it and what the method takes of both."""
    teacher, student = config_of(inputs["teacher"], "teacher"), config_of(inputs["student"], "student")
    if params.method == "sequences":
        found = answers(params, inputs, "student")
        note = f"before the first step the teacher answers every prompt, with at most {params.max_new_tokens} tokens"
        return _with_teacher(replace(found, note=f"{found.note}; {note}"), teacher)
    pairs = _pairs(params, student, teacher)
    rows = 1 if params.micro_batch == "auto" else params.sequences_at_once
    beside = {"states": _states(rows, student, teacher, pairs), "relations": _relations(params, rows, student, teacher)}
    further = {"logits": logits_held(params), "beside": {name: size for name, size in beside.items() if size}}
    found = _with_teacher(answers(params, inputs, "student", further=further), teacher)
    operations = found.operations_per_token + forward_flops(teacher, student.context)
    operations += _hidden_operations(params, student, teacher, pairs)
    if params.method == "on-policy":
        operations += round(params.on_policy_share * forward_flops(student, student.context))
        found = replace(found, memory=_with_cache(params, student, found.memory))
    return replace(found, operations_per_token=operations)


def logits_held(params: DistillParams) -> float:
    """Tensors of the size of the logits that the loss takes at once."""
    if params.mixture == 0:
        return PLAIN if params.temperature == 1 else SOFTENED
    return REVERSE if params.mixture == 1 else JSD


def _with_teacher(found: Forecast, teacher: ModelConfig) -> Forecast:
    memory = {**found.memory, "teacher": FLOAT * count(teacher).total}
    return replace(found, memory=memory, advice={**found.advice, **ADVICE})


def _pairs(params: DistillParams, student: ModelConfig, teacher: ModelConfig) -> Layers:
    """The layers that are compared; Unknown if the map does not fit the models."""
    if params.method != "hidden" or not params.hidden_weight:
        return ()
    try:
        return layer_pairs(student.layers, teacher.layers, params.layer_map)
    except UsageError as error:
        raise Unknown(f"its {error}") from error


def _states(rows: int, student: ModelConfig, teacher: ModelConfig, pairs: Layers) -> float:
    """What enters and leaves the teacher's layers; of both models what is compared, projected, and its difference."""
    each = 2 * teacher.dim + student.dim + 3 * teacher.dim
    return float(rows * student.context * len(pairs) * each * FLOAT)


def _relations(params: DistillParams, rows: int, student: ModelConfig, teacher: ModelConfig) -> float:
    """Scores of all tokens by all, of both models, with their copies: without what no row is taken of, in order, as
    log-probabilities."""
    heads = {
        "values": 2 * min(student.kv_heads, teacher.kv_heads),
        "attention": student.heads + teacher.heads,
    }
    wanted = [name for name in heads if params.relations in (name, "both")]
    return float(rows * student.context**2 * sum(heads[name] for name in wanted) * 5 * FLOAT)


def _hidden_operations(params: DistillParams, student: ModelConfig, teacher: ModelConfig, pairs: Layers) -> int:
    """Projections and relations, forward and backward, per token."""
    total = 0 if student.dim == teacher.dim else len(pairs) * student.dim * teacher.dim * (1 + BACKWARD)
    if params.relations == "none":
        return 2 * total
    for config, backward in ((student, BACKWARD), (teacher, 0)):
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        total += config.dim * (queries + 2 * keys)  # projected once more
        if params.relations in ("attention", "both"):
            total += student.context * queries * (1 + backward) + config.dim * (queries + keys) * backward
        if params.relations in ("values", "both"):
            total += student.context * keys * (1 + backward) + config.dim * keys * backward
    return 2 * total


def _with_cache(params: DistillParams, student: ModelConfig, memory: Mapping[str, int]) -> dict[str, int]:
    """Keys and values of the answers that a process writes at once, if they are more than what the loss takes later."""
    per_row = 2 * student.layers * student.kv_heads * student.head_dim * student.context * FLOAT
    rows = max(1, min(MAX_ROWS, CACHE_BYTES // per_row, params.batch_size // params.parallel.data))
    more = rows * per_row - sum(memory.get(name, 0) for name in ("activations", "logits"))
    return {**memory, "cache": more} if more > 0 else dict(memory)
