"""Train a student to give its teacher's answers."""

from __future__ import annotations

from llmctl.errors import InputError, UsageError
from llmctl.nn.foreign import ForeignModel
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.data import Source
from llmctl.train.device import Compute
from llmctl.train.loop import fit
from llmctl.train.models import check_decoder, open_model, write_model
from llmctl.train.objectives import CausalLM, Objective
from llmctl.train.validation import Validate, mean_loss
from llmctl_distill.data import open_data, written_data
from llmctl_distill.hidden import HiddenDistillation, add_projections, drop_projections
from llmctl_distill.layers import layer_pairs
from llmctl_distill.losses import LogitDistillation
from llmctl_distill.on_policy import OnPolicyDistillation, shower
from llmctl_distill.params import DistillParams
from llmctl_distill.relations import RelationLoss, check_relations, relation_heads


def run(ctx: Context, params: DistillParams, teacher: Artifact, student: Artifact, data: Artifact) -> None:
    """Train `student` on the split `train`; KL to the teacher on `validation` where there is one, before and after."""
    master, tokenizer = open_model(teacher, ctx)
    net, own = open_model(student, ctx)
    for one in (master, net):
        check_decoder(one, "teacher and student")
    check_vocabulary(master, net, tokenizer, own)
    length = min(master.config.context, net.config.context)
    compute = Compute.of(params)
    master.to(compute.device).eval().requires_grad_(False)
    objective, measured = make_objectives(ctx, master, net, tokenizer, length, params)
    values: dict[str, float] = {}
    with compute.limit_threads():
        if params.method == "sequences":
            source, held_out, values = written_data(ctx, data, tokenizer, master, length, params, teacher.id)
        else:
            source, held_out = open_data(ctx, data, tokenizer, net, length, params)
        validate = validator(held_out, measured, params)
        if validate is not None:
            values["kl.before"] = validate(net.to(compute.device).eval(), compute)["kl.validation"]
    values |= fit(ctx, net, objective, source, params, validate)
    if params.method == "hidden":
        drop_projections(net)
    sizes = {"parameters": net.config.parameters(), "teacher.parameters": master.config.parameters()}
    write_model(ctx, net, student.path, {**values, **sizes})


def check_vocabulary(teacher: Transformer, student: Transformer, tokenizer: Tokenizer, own: Tokenizer) -> None:
    """InputError unless the same id means the same token to both."""
    sizes = teacher.config.vocab_size, student.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher has a vocabulary of {sizes[0]}, the student one of {sizes[1]}",
            hint="distilling logits needs a student with the teacher's tokenizer",
        )
    if tokenizer.digest != own.digest:
        raise InputError(
            f"the teacher's tokenizer is {tokenizer.digest[:19]}…, the student's {own.digest[:19]}…",
            hint="distilling logits needs a student with the teacher's tokenizer",
        )


def make_objectives(
    ctx: Context, teacher: Transformer, student: Transformer, tokenizer: Tokenizer, length: int, params: DistillParams
) -> tuple[Objective, Objective]:
    """What the method minimises, and what is measured on held-out data, where nobody writes.

    The method `hidden` adds its projections to the student.
    """
    logits = LogitDistillation(teacher, params.temperature, params.alpha, params.mixture)
    if params.method == "sequences":
        return CausalLM(), logits
    if params.method == "on-policy":
        show = shower(ctx.log, tokenizer, params.log_every)
        own = OnPolicyDistillation(
            teacher, params.temperature, beta=params.mixture, params=params, length=length, show=show
        )
        return own, logits
    if params.method == "hidden":
        objective = match_hidden(logits, student, params)
        return objective, objective
    return logits, logits


def match_hidden(logits: LogitDistillation, student: Transformer, params: DistillParams) -> HiddenDistillation:
    """The objective of the method `hidden`; the student gets its projections."""
    teacher = logits.teacher
    if any(isinstance(model, ForeignModel) for model in (teacher, student)):
        raise UsageError(
            "the layers of a model that transformers computes cannot be looked into",
            hint="set method to logits, sequences or on-policy",
        )
    own, aim = student.config, teacher.config
    pairs = layer_pairs(own.layers, aim.layers, params.layer_map) if params.hidden_weight else ()
    add_projections(student, pairs, aim.dim, params.seed)
    relations = None
    if params.relations != "none":
        check_relations(own, aim, params.relations)
        relations = RelationLoss(own.layers - 1, aim.layers - 1, params.relations, relation_heads(own, aim))
    weight = 1.0 if params.relation_weight is None else params.relation_weight
    return HiddenDistillation(logits, pairs, params.hidden_loss, params.hidden_weight, relations, weight)


def validator(source: Source | None, objective: Objective, params: DistillParams) -> Validate | None:
    """The objective, KL and cross-entropy on held-out data; None without any."""
    if source is None:
        return None

    def validate(model: Transformer, compute: Compute) -> dict[str, float]:
        found = mean_loss(model, objective, source.sweep(params.eval_batches), compute)
        if params.method == "sequences":
            found["loss.validation"] = found["ce.validation"]  # what is minimised, here of the data's own answers
        return found

    return validate
